"""Ulysses (Jacobs et al. 2023): tokens are split everywhere but in attention, where heads are.

q, k, v  B l H K -> B L h K    one all-to-all of the three together
attend   a rank's heads see all tokens
o        B L h K -> B l H K    one all-to-all
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from odit.ops import Ops
from odit.parallel import collectives
from odit.parallel.collectives import Sizes, shares
from odit.parallel.mesh import Axis
from odit.parallel.place import Place, split_tokens, where_heads


def build(ops: Ops, place: Place) -> Ops:
    """The record whose attention swaps tokens for heads and back."""
    attend = over_heads(ops.attend, place.axis, place.tokens, place.heads)
    return replace(split_tokens(ops, place, tables=True), attend=attend)


def over_heads(attend: Callable, axis: Axis, tokens: Sizes, num_heads: int) -> Callable:
    """``attend`` on a share of the heads and the tokens of all ranks of the axis, called with the reverse."""
    heads = shares(num_heads, axis.size)

    def swapped(q_BlHK: Tensor, k_BlHK: Tensor, v_BlHK: Tensor) -> Tensor:
        three_BlHK = torch.stack((q_BlHK, k_BlHK, v_BlHK))
        q_BLhK, k_BLhK, v_BLhK = collectives.all_to_all(three_BlHK, axis, 3, 2, heads, tokens).unbind(0)
        o_BLhK = where_heads(attend)(q_BLhK, k_BLhK, v_BLhK)
        return collectives.all_to_all(o_BLhK, axis, 1, 2, tokens, heads)

    return swapped


def received(place: Place) -> tuple[int, int]:
    """Values (of K elements) a sample, forward and backward."""
    return swapped_values(place.axis, place.tokens, place.heads)


def swapped_values(axis: Axis, tokens: Sizes, num_heads: int) -> tuple[int, int]:
    """Values that arrive at this rank by ``over_heads``, forward and backward."""
    mine, heads = tokens[axis.rank], shares(num_heads, axis.size)[axis.rank]
    to_heads, to_tokens = (sum(tokens) - mine) * heads, (num_heads - heads) * mine
    return 3 * to_heads + to_tokens, 3 * to_tokens + to_heads
