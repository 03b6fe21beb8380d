"""ZeRO: state lives in shards, the model sees whole leaves, and ``materialize`` is the bridge between the two.

The schedule of one micro-batch by stage (Rajbhandari et al. 2020), over all ranks with the same numbers (dp x sp):

  0, 1  whole working weights are there; gradients are summed where they are and all-reduced once a step
        (stage 1 then keeps its part).
  2     whole working weights are there; block i's gradients are reduce-scattered while block i-1 runs backward.
  3     block i's weights are gathered while block i-1 runs, freed after it, and gathered again in backward, block i-1's
        while block i runs backward; gradients as in 2. What is outside the blocks is gathered once a step.

A leaf that a strategy has claimed over sp is stored and used as this rank's share of it; then "whole" above is the
share, and the ranks with the same numbers are those along dp: its gathers and reductions run beside the others'.

``bundle`` knows the flat buffer in which a block's leaves travel together, ``layers`` walks the blocks; here stand the
leaves outside them, and ``Layout``, which says for a stage what is held, gathered and reduced when.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit import optim, tree
from odit.ops import Ops
from odit.parallel import collectives, spec
from odit.parallel.bundle import Bundle, Convoy, Whole
from odit.parallel.layers import Local, Sharded, Sink, deliver, run_layers
from odit.parallel.mesh import Axis, Mesh
from odit.parallel.spec import Spec


class Materialize(torch.autograd.Function):
    """Shards -> whole leaves. Backward sums the partial gradients over ranks: split leaves get their part."""

    @staticmethod
    def forward(bundle: Convoy, held: Whole | None, sink: Sink | None, *shards: Tensor) -> tuple[Tensor, ...]:
        whole = bundle.gather(list(shards)) if held is None else held
        return tuple(leaf.detach() for leaf in whole.leaves)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.bundle, ctx.sink, ctx.dtypes = inputs[0], inputs[2], [shard.dtype for shard in inputs[3:]]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed = ctx.bundle.finish_reduce(ctx.bundle.start_reduce(list(grads)))
        return None, None, None, *deliver(ctx.sink, -1, summed, ctx.dtypes)


def materialize(bundle: Convoy, shards: tree.Tree, held: Whole | None = None, sink: Sink | None = None) -> tree.Tree:
    """The whole leaves of a tree of shards, in the working dtype; ``held`` are whole leaves gathered before.

    Forward: cast, all-gather (or nothing, with ``held``). Backward: reduce-scatter, all-reduce for unsplit leaves.
    """
    return tree.unflatten(shards, list(Materialize.apply(bundle, held, sink, *tree.leaves(shards))))


@dataclass(frozen=True)
class Layout:
    """How one model's state is stored and used at a stage: what ``plan`` makes and ``train`` calls.

    Masters, moments and EMA are trees like the declaration, each leaf this rank's part. ``axis`` has all ranks, ``dp``
    those that see the same share of a claimed leaf.
    """

    stage: int
    axis: Axis
    dp: Axis
    declared: tree.Tree
    specs: tree.Tree
    dtype: torch.dtype
    reduce_dtype: torch.dtype
    remat: bool
    device: torch.device

    @functools.cached_property
    def outer(self) -> Convoy:
        """The bundles of all that is outside the blocks."""
        return self._bundle(lambda t: _without(t, BLOCKS))

    @functools.cached_property
    def inner(self) -> tuple[Convoy, ...]:
        """The bundles of each block."""
        return tuple(self._bundle(lambda t, i=i: t[BLOCKS][i]) for i in range(len(self.declared[BLOCKS])))

    @functools.cached_property
    def _side(self) -> Any:
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _bundle(self, pick: Callable) -> Convoy:
        declared, specs = (tree.leaves(pick(t)) for t in (self.declared, self.specs))

        def over(axis: Axis, places: tuple[int, ...]) -> Bundle:
            shapes = tuple(specs[i].share_shape(declared[i].shape) for i in places)
            within = tuple(specs[i].within for i in places)
            return Bundle(shapes, within, axis, self.dtype, self.reduce_dtype, self.device, self._side)

        sums = self._sums(specs)
        return Convoy(tuple(over(*s) for s in sums), tuple(places for _, places in sums))

    def _sums(self, specs: list[Spec]) -> list[tuple[Axis, tuple[int, ...]]]:
        """Over which axis the gradients of which leaves are summed: of shares over dp, of the others over all ranks."""
        places = [tuple(i for i, s in enumerate(specs) if (s.claimed is None) == free) for free in (True, False)]
        return [(axis, found) for axis, found in zip((self.axis, self.dp), places) if found]

    def hold(self, shards: tree.Tree, into: Held | None = None) -> Held:
        """The working weights that stand for a whole step: all (stages 0 to 2) or those outside the blocks (3).

        ``into`` are those of an earlier step, whose memory is filled again.
        """
        with torch.no_grad():
            if self.stage == 0:
                return Held(self._cast(shards, into), None, None)
            outside, blocks = _without(shards, BLOCKS), shards[BLOCKS]
            outer = self.outer.gather(tree.leaves(outside), into and into.outer)
            if self.stage == 3:
                return Held(None, outer, None)
            rooms = into.inner if into else [None] * len(blocks)
            inner = tuple(b.gather(tree.leaves(p), room) for b, p, room in zip(self.inner, blocks, rooms))
            named = tree.unflatten(outside, outer.leaves)
            named[BLOCKS] = [tree.unflatten(p, w.leaves) for p, w in zip(blocks, inner)]
            return Held({k: named[k] for k in shards}, outer, inner)

    def _cast(self, shards: tree.Tree, into: Held | None) -> tree.Tree:
        """Masters in the working dtype: themselves where it is theirs, else in the memory of ``into`` if given."""
        if into is None or all(p.dtype == self.dtype for p in tree.leaves(shards)):
            return tree.map(lambda p: p.detach().to(self.dtype), shards)
        torch._foreach_copy_(tree.leaves(into.whole), tree.leaves(shards))
        return into.whole

    def targets(self, shards: tree.Tree, held: Held) -> tree.Tree:
        """What gradients are taken of: whole working weights (stages 0 and 1) or shards."""
        return held.whole if self.stage <= 1 else shards

    def view(self, targets: tree.Tree, held: Held, ops: Ops, sink: Sink | None = None) -> tuple[tree.Tree, Ops]:
        """Parameters and record for a model's forward pass; gradients of stages 2 and 3 go through ``sink``."""
        if self.stage <= 1:
            return targets, run_layers(ops, Local(), True) if self.remat else ops
        outside = _without(targets, BLOCKS)
        params = materialize(self.outer, outside, held.outer, sink)
        params = {k: targets[k] if k == BLOCKS else params[k] for k in targets}
        return params, run_layers(ops, Sharded(self.inner, held.inner, sink), self.remat)

    def reduce(self, grads: tree.Tree) -> tree.Tree:
        """Accumulated gradients of ``targets`` as this rank's parts of the sums over ranks, at least fp32; once a step.

        On one rank, and in stages 2 and 3, they are that already, in the dtype they came in.
        """
        if self.stage >= 2 or self.axis.size == 1:
            return grads
        summed = {k: None for k in grads}
        summed |= self._all_reduce(_without(grads, BLOCKS), _without(self.specs, BLOCKS))
        summed[BLOCKS] = [self._all_reduce(g, s) for g, s in zip(grads[BLOCKS], self.specs[BLOCKS])]
        return summed

    def _all_reduce(self, grads: tree.Tree, specs: tree.Tree) -> tree.Tree:
        leaves, found = tree.leaves(grads), tree.leaves(specs)
        for axis, places in self._sums(found):
            places = [i for i in places if leaves[i] is not None]  # frozen leaves have no gradient
            if not places:
                continue
            flat = torch.cat([leaves[i].reshape(-1).to(self.reduce_dtype) for i in places])
            collectives.all_reduce_(flat, axis)
            for i, summed in zip(places, flat.split([leaves[i].numel() for i in places])):
                summed = summed.view(leaves[i].shape).to(torch.promote_types(leaves[i].dtype, torch.float32))
                leaves[i] = found[i].part(summed, self.axis.rank).contiguous()
        return tree.unflatten(grads, leaves)

    def squared_norm(self, grads: tree.Tree) -> Tensor:
        """Sum of squares of the parts that this rank owns; summed over ranks, every element counts once.

        A gradient that is None (offloaded) is not counted.
        """
        rank = self.axis.rank
        mine = [g for g, s in zip(tree.leaves(grads), tree.leaves(self.specs)) if g is not None and s.owns(rank)]
        return optim.squared_norm(mine) if mine else torch.zeros((), device=self.device)


class Held(NamedTuple):
    """Working weights of a step: the whole tree (stages 0 to 2), and storages outside and inside the blocks."""

    whole: tree.Tree | None
    outer: Whole | None
    inner: tuple[Whole, ...] | None


BLOCKS = "blocks"


def layout(
    declared: tree.Tree,
    stage: int,
    mesh: Mesh,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    device: torch.device,
    remat: bool = False,
    claimed: str = "",
) -> Layout:
    """The layout of a declared model at a stage, computed on ``device``; ``claimed``: letters of dims cut over sp."""
    found = spec.specs(declared, mesh.all.size, stage > 0, mesh.sp.size, claimed)
    return Layout(stage, mesh.all, mesh.dp, declared, found, dtype, reduce_dtype, remat, device)


def _without(t: dict, name: str) -> dict:
    return {k: v for k, v in t.items() if k != name}
