"""Megatron sequence parallelism (Shoeybi et al. 2019, Korthikanti et al. 2022): weights are split, and between them
tokens.

  qkv, attend, out   all-gather of the tokens; this rank's heads of all of them; reduce-scatter of partial sums
  mlp                the same with this rank's part of the ffn

Weights are stored split on heads (H) and ffn (F) where the axis divides these; where it does not, a leaf is stored as
any other and a rank uses a slice of it. A branch's bias is added once, by rank 0. Backward keeps gathered tokens twice.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from odit.ops import Ops
from odit.parallel import collectives
from odit.parallel.place import Place, split_tokens, where_heads

CLAIMS = "HF"


def build(ops: Ops, place: Place) -> Ops:
    """The record whose branches gather tokens, compute a part of every token's branch, and reduce-scatter."""
    axis, tokens = place.axis, place.tokens

    def qkv(h_BlD: Tensor, p: dict, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        return ops.qkv(gathered(h_BlD), {k: cut(x, 1, "H") if k in ("w", "b") else x for k, x in p.items()}, tables)

    def out(o_BLhK: Tensor, p: dict) -> Tensor:
        return summed(ops.out(o_BLhK, {"w": cut(p["w"], 1, "H"), "b": once(p["b"])}))

    def mlp(h_BlD: Tensor, p: dict) -> Tensor:
        mine = {k: {"w": cut(x["w"], 0, "F"), "b": cut(x["b"], 0, "F")} for k, x in p.items() if k != "fc2"}
        mine["fc2"] = {"w": cut(p["fc2"]["w"], 1, "F"), "b": once(p["fc2"]["b"])}
        return summed(ops.mlp(gathered(h_BlD), mine))

    def gathered(h_BlD: Tensor) -> Tensor:
        return collectives.all_gather(h_BlD, axis, 1, tokens)

    def summed(branch_BLD: Tensor) -> Tensor:
        return collectives.reduce_scatter(branch_BLD, axis, 1, tokens)

    def cut(x: Tensor, dim: int, letter: str) -> Tensor:
        return x if letter in place.claimed else collectives.take(x, axis, dim, shares_of(x, dim))

    def shares_of(x: Tensor, dim: int) -> collectives.Sizes:
        return collectives.shares(x.shape[dim], axis.size)

    def once(bias: Tensor) -> Tensor:
        return bias * float(axis.rank == 0)

    sites = dict(qkv=qkv, attend=where_heads(ops.attend), out=out, mlp=mlp)
    return replace(split_tokens(ops, place, tables=False), **sites)


def received(place: Place) -> tuple[int, int]:
    """Values (of K elements) a sample, forward and backward: two gathers and two reduce-scatters each."""
    n, mine = place.axis.size, place.tokens[place.axis.rank]
    both = 2 * (place.length - mine) * place.heads + 2 * (n - 1) * mine * place.heads
    return both, both
