"""FastSeq (OpenDiT, Zhao et al. 2024): two collectives a layer, one of them hidden behind the qkv product.

  qkv   B l D -> B L h K   a ring all-gather of the tokens: while a chunk is on its hop to the next rank, the heads of
                           this rank are computed from the chunk in hand, so the matrix product hides n - 1 hops
  out   B L h K -> B l H K one all-to-all of the attention's output

  backward of qkv          a ring reduce-scatter: a chunk's input gradient is computed and what has arrived for it is
                           added; while the sum is on its hop the chunk's weight gradient is computed

Backward keeps the gathered tokens, M = B L D elements a block. Each rank uses its heads' slice of the qkv weight as a
view; its gradient is zero outside, and the sum over ranks that every gradient gets joins the slices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from odit import tree
from odit.ops import Ops, at_least_fp32
from odit.parallel import collectives, recorder
from odit.parallel.collectives import roll, start_shift
from odit.parallel.place import Place, split_tokens, where_heads


def build(ops: Ops, place: Place) -> Ops:
    """The record whose qkv gathers tokens and splits heads, and whose out turns that back."""
    axis, tokens, heads = place.axis, place.tokens, place.head_shares
    ring = _Ring(ops, place)

    def qkv(h_BlD: Tensor, p: dict, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        mine = some_heads(p, place)
        return _Qkv.apply(ring, mine, tables, h_BlD, *tree.leaves(mine))

    def out(o_BLhK: Tensor, p: dict) -> Tensor:
        return ops.out(collectives.all_to_all(o_BLhK, axis, 1, 2, tokens, heads), p)

    return replace(split_tokens(ops, place, tables=False), qkv=qkv, attend=where_heads(ops.attend), out=out)


def some_heads(p: dict, place: Place) -> dict:
    """The qkv parameters of this rank's heads, as views; those that have no head are whole."""
    cut = {name: collectives.take(p[name], place.axis, 1, place.head_shares) for name in ("w", "b") if name in p}
    return {name: cut.get(name, leaf) for name, leaf in p.items()}


class _Ring:
    """The walk of token chunks around the axis."""

    def __init__(self, ops: Ops, place: Place):
        self.ops, self.axis, self.tokens, self.fp8 = ops, place.axis, place.tokens, place.fp8

    def forward(self, h: Tensor, p: dict, tables: tuple[Tensor, ...], training: bool) -> tuple[list[Tensor], list[Any]]:
        """(q, k, v) of all tokens, and in training a graph a chunk in the order of ranks."""
        n, rank = self.axis.size, self.axis.rank
        found, graphs = [None] * n, [None] * n
        chunk = _pack(h) if self.fp8 else h
        for step in range(n):
            source = (rank - step) % n
            coming = None
            if step < n - 1:
                coming = start_shift(chunk, self.axis, 1, 1, roll(self.tokens, step), part_of="ring_gather")
            recorder.mark(f"qkv {step}")
            x = (_unpack(chunk, h.dtype) if self.fp8 else chunk).detach().requires_grad_(training)
            with torch.set_grad_enabled(training), saved_tensors_hooks(_as_it_is, _as_it_is):
                three = self.ops.qkv(x, p, self._rows(tables, source))
            found[source] = [part.detach() for part in three]
            if training:
                graphs[source] = x, [torch.autograd.graph.get_gradient_edge(part) for part in three]
            chunk = coming.wait() if coming is not None else None
        return [torch.cat(parts, 1) for parts in zip(*found)], graphs

    def backward(
        self, grads: tuple[Tensor, ...], leaves: list[Tensor], graphs: list[Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """(dh of this rank's tokens, gradients of the leaves)."""
        n, rank = self.axis.size, self.axis.rank
        chunks = list(zip(*(g.split(self.tokens, 1) for g in grads)))
        coming, dx, totals = None, None, None
        for step in range(n):
            target = (rank - 1 - step) % n
            (x, edges), graphs[target] = graphs[target], None
            recorder.mark(f"qkv input gradient {step}")
            (dx,) = torch.autograd.grad(edges, x, chunks[target], retain_graph=True)
            if coming is not None:
                dx = dx + coming.wait()
            if step < n - 1:
                sizes = roll(self.tokens, step + 1)
                coming = start_shift(dx, self.axis, 1, 1, sizes, part_of="ring_reduce_scatter")
            recorder.mark(f"qkv weight gradient {step}")
            found = torch.autograd.grad(edges, leaves, chunks[target])
            found = [at_least_fp32(g) for g in found]
            totals = found if totals is None else [a + b for a, b in zip(totals, found)]
        return dx, [total.to(leaf.dtype) for total, leaf in zip(totals, leaves)]

    def _rows(self, tables: tuple[Tensor, ...], source: int) -> tuple[Tensor, ...]:
        return tuple(t.narrow(0, sum(self.tokens[:source]), self.tokens[source]) for t in tables)


def _as_it_is(x: Tensor) -> Tensor:
    """What a graph of a chunk saves is kept, whoever recomputes around it: backward walks each of them twice."""
    return x


class _Qkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ring: _Ring, p: dict, tables: tuple, h: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        training = any(ctx.needs_input_grad)
        ctx.leaves = [leaf.detach().requires_grad_(training) for leaf in leaves]
        found, ctx.graphs = ring.forward(h, tree.unflatten(p, ctx.leaves), tables, training)
        ctx.ring = ring
        return tuple(found)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh, dleaves = ctx.ring.backward(grads, ctx.leaves, ctx.graphs)
        return None, None, None, dh, *dleaves


FP8_MAX = 448.0  # of torch.float8_e4m3fn


def _pack(h_BlD: Tensor) -> Tensor:
    """Bytes (B, l, D + 4): each token in fp8 (e4m3) and its fp32 scale. All ranks use these, their owner too."""
    scale = h_BlD.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / FP8_MAX
    values = (h_BlD.float() / scale).to(torch.float8_e4m3fn)
    return torch.cat((values.view(torch.uint8), scale.view(torch.uint8)), -1)


def _unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    values, scale = packed[..., :-4].contiguous(), packed[..., -4:].contiguous()
    return (values.view(torch.float8_e4m3fn).float() * scale.view(torch.float32)).to(dtype)


def received(place: Place) -> tuple[int, int]:
    """Values (of K elements) a sample, forward and backward."""
    rank, tokens, heads = place.axis.rank, place.tokens, place.head_shares
    gathered, reduced = (place.length - tokens[r] for r in (rank, rank - 1))
    to_tokens, to_heads = (place.heads - heads[rank]) * tokens[rank], (place.length - tokens[rank]) * heads[rank]
    return gathered * place.heads + to_tokens, reduced * place.heads + to_heads
