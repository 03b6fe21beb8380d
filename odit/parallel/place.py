"""What a sequence strategy is built for: the axis that shares a sample's tokens, and how many of what there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from odit.ops import Ops
from odit.parallel import collectives
from odit.parallel.collectives import Sizes
from odit.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Place:
    """The mesh and the model's sizes; what a rank holds follows."""

    mesh: Mesh
    length: int
    """Tokens of a sample (L)."""
    heads: int
    """Attention heads (H)."""
    frames: int = 1
    """T of a time x space model, whose L is T x S; else 1."""
    claimed: str = ""
    """Letters of the dims along which weights come as this rank's share (see ``spec``)."""
    fp8: bool = False
    """Whether fastseq's ring carries fp8."""

    @property
    def axis(self) -> Axis:
        """The ranks that share a sample."""
        return self.mesh.sp

    @property
    def tokens(self) -> Sizes:
        """Tokens of each rank; where they do not divide the last ranks have fewer."""
        return collectives.shares(self.length, self.axis.size)

    @property
    def head_shares(self) -> Sizes:
        """Heads of each rank, for a strategy that splits them over the whole axis."""
        return collectives.shares(self.heads, self.axis.size)


def split_tokens(ops: Ops, place: Place, tables: bool) -> Ops:
    """The record that enters with this rank's tokens and leaves with all.

    ``leave`` comes after the last token-wise operation, so every gradient of a replicated parameter is a partial sum
    over the axis, which one sum over dp x sp makes whole.

    Args:
        tables: whether this rank's tokens are also what qkv puts out, so that rotary tables are split with them.
    """
    axis, tokens = place.axis, place.tokens

    def enter(x_BLD: Tensor, *found: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert x_BLD.shape[1] == place.length, f"{x_BLD.shape[1]} tokens where the plan has {place.length}"
        x_BlD = collectives.take(x_BLD, axis, 1, tokens).contiguous()  # a view would keep all tokens alive
        return x_BlD, tuple(collectives.take(t, axis, 0, tokens) for t in found) if tables else found

    def leave(x_BlD: Tensor) -> Tensor:
        return collectives.all_gather(x_BlD, axis, 1, tokens)

    return replace(ops, enter=enter, leave=leave)


def where_heads(attend: Callable) -> Callable:
    """``attend`` for ranks of which some have no heads: no kernel is asked to do nothing, yet o depends on q, k, v."""

    def attend_some(q_BLhK: Tensor, k_BLhK: Tensor, v_BLhK: Tensor) -> Tensor:
        return attend(q_BLhK, k_BLhK, v_BLhK) if q_BLhK.numel() else q_BLhK + k_BLhK + v_BLhK

    return attend_some
