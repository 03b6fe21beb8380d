"""What chance adds to a batch, times, noise and dropped labels, as functions of draw ids; and the digest of it all.

The numbers themselves come from ``odit.random``, or from the kernel with its bits, ``odit.kernels.draws``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from odit import graphs, random, tree
from odit.plan import Plan

MOST_DRAWN = 2**22  # values of a batch up to which draws are a graph, whose memory stays taken


class Draws(NamedTuple):
    """What chance adds to a batch, drawn outside the model: times, noise and which labels are dropped."""

    t_B: Tensor
    noise: Tensor
    dropped_B: Tensor


def draw(plan: Plan, ids_B: Tensor, shape: tuple[int, ...], key: random.Key) -> Draws:
    """Draws for samples by their draw ids (epoch and sample id): no other sample, batch size or rank plays a part."""
    uniform, normal = plan.kernels.uniform, plan.kernels.normal
    t_B = plan.objective.draw_times(
        uniform(random.fold_in(key, "time"), (), ids_B), normal(random.fold_in(key, "time-normal"), (), ids_B)
    )
    noise = normal(random.fold_in(key, "noise"), shape, ids_B)
    dropped = uniform(random.fold_in(key, "label-dropout"), (), ids_B) < plan.run.model.label_dropout
    return Draws(t_B, noise, dropped)


def drawn(plan: Plan, ids_B: Tensor, shape: tuple[int, ...], key: random.Key) -> Draws:
    """``draw``; on a GPU as one graph where samples are few enough for launches to take longer than the drawing."""
    if plan.device.type != "cuda" or not plan.run.graphs or len(ids_B) * math.prod(shape) > MOST_DRAWN:
        return draw(plan, ids_B, shape, key)
    place = (shape, key)
    if place not in plan.graphs:
        plan.graphs[place] = graphs.captured(lambda ids: list(draw(plan, ids, shape, key)))
    return Draws(*plan.graphs[place](ids_B))


def digest(ids_B: Tensor, draws: Draws, conditions: tree.Tree) -> int:
    """Sums over samples (modulo 2**64) a hash of the very bits that enter the loss: id, time, noise, condition.

    A sample's words are weighed with odd multipliers by position and mixed (splitmix64's finaliser), so that any
    flipped bit changes the sum, and the sum does not depend on the order of samples nor on how they are shared out.
    """
    return int(hash_samples((ids_B, draws.t_B, draws.noise, draws.dropped_B, *tree.leaves(conditions)))) & (2**64 - 1)


def hash_samples(parts: tuple[Tensor, ...]) -> Tensor:
    """Sums a hash over samples (modulo 2**64): int64 scalar, of the bits that each has in all parts together."""
    words = torch.cat([_words(part).reshape(len(part), -1) for part in parts], 1)
    place = torch.arange(words.shape[1], dtype=torch.int64, device=words.device)
    weights = _mix(place * -7046029254386353131 + 1) | 1  # 0x9E3779B97F4A7C15, splitmix64's increment
    return _mix((words * weights).sum(1)).sum()


def _words(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).long()
    return x.long()


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (Steele, Lea and Flood 2014), with logical shifts."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ ((z >> 31) & (2**33 - 1))
