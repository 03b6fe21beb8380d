"""USP (Fang and Zhao 2024): sp = ring x ulysses. Neighbours swap tokens for heads; each share of heads goes round.

Heads need to divide among the ulysses ranks alone, and what travels is less than with a ring of all.
"""

from __future__ import annotations

from dataclasses import replace

from odit.ops import Ops
from odit.parallel.collectives import Sizes, shares
from odit.parallel.place import Place, split_tokens
from odit.parallel.ring import around, passed_values
from odit.parallel.ulysses import over_heads, swapped_values


def build(ops: Ops, place: Place) -> Ops:
    """The record whose attention is a ring inside of Ulysses."""
    mine, groups = groups_of(place)
    attend = over_heads(around(ops, place.mesh.ring, groups), place.mesh.ulysses, mine, place.heads)
    return replace(split_tokens(ops, place, tables=True), attend=attend)


def groups_of(place: Place) -> tuple[Sizes, Sizes]:
    """Tokens of the ranks of this rank's ulysses group, and of each group."""
    u = place.mesh.ulysses.size
    groups = [place.tokens[i : i + u] for i in range(0, place.axis.size, u)]
    return groups[place.mesh.ring.rank], tuple(map(sum, groups))


def received(place: Place) -> tuple[int, int]:
    """Values (of K elements) a sample, forward and backward."""
    (mine, groups), ulysses = groups_of(place), place.mesh.ulysses
    swapped = swapped_values(ulysses, mine, place.heads)
    passed = passed_values(place.mesh.ring, groups, shares(place.heads, ulysses.size)[ulysses.rank])
    return swapped[0] + passed[0], swapped[1] + passed[1]
