"""ZeRO: state lives in shards, the model sees whole leaves, and ``materialize`` is the bridge between the two.

The schedule of one micro-batch by stage (Rajbhandari et al. 2020), over all ranks with the same numbers (dp x sp):

  0, 1  whole working weights are there; gradients are summed where they are and all-reduced once a step
        (stage 1 then keeps its part).
  2     whole working weights are there; block i's gradients are reduce-scattered while block i-1 runs backward.
  3     block i's weights are gathered while block i-1 runs, freed after it, and gathered again in backward, block i-1's
        while block i runs backward; gradients as in 2. What is outside the blocks is gathered once a step.

A block's leaves travel together, in one flat buffer: rank r's parts of all leaves, end to end, are row r. ``Bundle``
knows that buffer. Gathers carry the dtype of matrix products, reductions ``reduce_dtype``.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit import optim, tree
from odit.ops import Ops
from odit.parallel import collectives, spec
from odit.parallel.mesh import Axis
from odit.parallel.spec import Spec


class Whole(NamedTuple):
    """A bundle's whole leaves: views into one storage, so that all of it can be freed and filled again at once."""

    flat: Tensor
    leaves: list[Tensor]


class Gathering(NamedTuple):
    """A gather under way: the rows as they arrive, and the whole leaves that they or a copy of them fill."""

    handle: Any
    rows: Tensor
    arrived: Any  # torch.cuda.Event of the side stream, or None
    whole: Whole | None


class Reducing(NamedTuple):
    """A reduction under way; it keeps the whole gradients until it has read them."""

    handles: tuple
    mine: Tensor
    others: Tensor
    arrived: Any
    grads: list[Tensor]


@dataclass(frozen=True)
class Bundle:
    """Leaves that travel together: their whole shapes, specs and the dtypes they travel in.

    On a GPU the copies around a transfer run on the ``side`` stream, next to the blocks' computing. Every use of it
    first waits for what the current stream was given, so memory that either frees is never taken too early.
    """

    shapes: tuple[tuple[int, ...], ...]
    specs: tuple[Spec, ...]
    axis: Axis
    dtype: torch.dtype
    reduce_dtype: torch.dtype
    device: torch.device
    side: Any = None  # torch.cuda.Stream

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Elements of a rank's part of each leaf."""
        return [math.prod(s.local_shape(shape)) for shape, s in zip(self.shapes, self.specs)]

    @functools.cached_property
    def split(self) -> list[int]:
        """Indices of the leaves that are split."""
        return [i for i, s in enumerate(self.specs) if s.dim is not None]

    @functools.cached_property
    def row(self) -> int:
        """Elements of a rank's parts of the split leaves."""
        return sum(self.sizes[i] for i in self.split)

    @property
    def rows_are_whole(self) -> bool:
        """Whether the leaves lie in the rows as they lie in ``Whole``: on one rank."""
        return self.axis.size == 1 and len(self.split) == len(self.shapes)

    def start_gather(self, shards: list[Tensor], into: Whole | None = None) -> Gathering:
        """Casts this rank's parts into a row and starts the all-gather of all rows; ``into`` is filled again."""
        whole = into
        if self.rows_are_whole:
            whole = self._filled(into)
        with self._beside():
            mine = self._joined([shards[i] for i in self.split], self.dtype)
            # .data: filling freed weights again is no change that autograd should see
            rows = whole.flat.data if self.rows_are_whole else mine.new_empty(self.axis.size * self.row)
            handle = collectives.all_gather_flat(rows, mine, self.axis, async_op=True)
            return Gathering(handle, rows, self._event(), whole)

    def finish_gather(self, pending: Gathering, shards: list[Tensor]) -> Whole:
        """Waits for the rows and lays them out as whole leaves."""
        pending.handle.wait()
        self._wait(pending.arrived)
        if self.rows_are_whole:
            return pending.whole
        whole = self._filled(pending.whole)
        filled = [leaf.data for leaf in whole.leaves]
        for rank, row in enumerate(pending.rows.view(self.axis.size, -1)):
            self._copy([self.specs[i].take(filled[i], rank) for i in self.split], self._cut(row))
        others = [i for i, s in enumerate(self.specs) if s.dim is None]
        self._copy([filled[i] for i in others], [shards[i].detach() for i in others])
        return whole

    def gather(self, shards: list[Tensor]) -> Whole:
        """The whole leaves, at once."""
        return self.finish_gather(self.start_gather(shards), shards)

    def start_reduce(self, grads: list[Tensor]) -> Reducing:
        """Starts the sum over ranks of whole gradients: split leaves reduce-scattered, the others all-reduced."""
        with self._beside():
            rows = torch.empty(self.axis.size, self.row, dtype=self.reduce_dtype, device=self.device)
            for rank, row in enumerate(rows):
                self._copy(self._cut(row), [self.specs[i].take(grads[i], rank) for i in self.split])
            mine = rows.new_empty(self.row)
            handles = [collectives.reduce_scatter_flat(mine, rows.view(-1), self.axis, async_op=True)]
            others = self._joined([g for g, s in zip(grads, self.specs) if s.dim is None], self.reduce_dtype)
            if len(others):
                handles.append(collectives.all_reduce_(others, self.axis, async_op=True))
            return Reducing(tuple(handles), mine, others, self._event(), grads)

    def finish_reduce(self, pending: Reducing) -> list[Tensor]:
        """Waits for the sums and cuts them into this rank's parts, in ``reduce_dtype``."""
        for handle in pending.handles:
            handle.wait()
        self._wait(pending.arrived)
        found = dict(zip(self.split, self._cut(pending.mine)))
        others = [i for i, s in enumerate(self.specs) if s.dim is None]
        found |= zip(others, pending.others.split([self.sizes[i] for i in others]))
        return [found[i].view(s.local_shape(shape)) for i, (s, shape) in enumerate(zip(self.specs, self.shapes))]

    def _cut(self, row: Tensor) -> list[Tensor]:
        """A row's parts, in the shapes of the leaves."""
        parts = row.split([self.sizes[i] for i in self.split])
        return [part.view(self.specs[i].local_shape(self.shapes[i])) for i, part in zip(self.split, parts)]

    def _joined(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The parts end to end on the device, wherever they are now."""
        row = torch.empty(sum(p.numel() for p in parts), dtype=dtype, device=self.device)
        slots = [slot.view(p.shape) for slot, p in zip(row.split([p.numel() for p in parts]), parts)]
        self._copy(slots, [p.detach() for p in parts])
        return row

    @staticmethod
    @torch.no_grad()
    def _copy(there: list[Tensor], here: list[Tensor]) -> None:
        if there:
            torch._foreach_copy_(there, here, non_blocking=True)

    def _filled(self, into: Whole | None) -> Whole:
        """Memory to fill: that of freed leaves taken again, or new."""
        if into is None:
            return self._room()
        refill_room_(into)
        return into

    def _room(self) -> Whole:
        flat = torch.empty(sum(map(math.prod, self.shapes)), dtype=self.dtype, device=self.device)
        leaves = [part.view(shape).detach() for part, shape in zip(flat.split(self._whole_sizes), self.shapes)]
        return Whole(flat, leaves)

    @functools.cached_property
    def _whole_sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            yield

    def _event(self) -> Any:
        return None if self.side is None else self.side.record_event()

    def _wait(self, arrived: Any) -> None:
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)


def free_(whole: Whole) -> None:
    """Gives the memory of whole leaves back; tensors that autograd saved keep pointing at the empty storage."""
    whole.flat.untyped_storage().resize_(0)


def refill_room_(whole: Whole) -> None:
    """Takes the memory of freed whole leaves again, with undefined content."""
    whole.flat.untyped_storage().resize_(whole.flat.numel() * whole.flat.element_size())


Sink = Callable[[int, list[Tensor]], list[Tensor | None]]
"""Takes bundle i's summed gradients as they come (-1: outside the blocks) and returns those that stay on the device;
None where it took one away (``offload``)."""


class Materialize(torch.autograd.Function):
    """Shards -> whole leaves. Backward sums the partial gradients over ranks: split leaves get their part."""

    @staticmethod
    def forward(bundle: Bundle, held: Whole | None, sink: Sink | None, *shards: Tensor) -> tuple[Tensor, ...]:
        whole = bundle.gather(list(shards)) if held is None else held
        return tuple(leaf.detach() for leaf in whole.leaves)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.bundle, ctx.sink, ctx.dtypes = inputs[0], inputs[2], [shard.dtype for shard in inputs[3:]]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed = ctx.bundle.finish_reduce(ctx.bundle.start_reduce(list(grads)))
        return None, None, None, *_deliver(ctx.sink, -1, summed, ctx.dtypes)


def _deliver(sink: Sink | None, i: int, grads: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor | None]:
    """Bundle i's gradients for autograd, in the dtypes of the masters, without those that the sink took."""
    kept = grads if sink is None else sink(i, grads)
    return [None if g is None else g.to(dtype) for g, dtype in zip(kept, dtypes)]


def materialize(bundle: Bundle, shards: tree.Tree, held: Whole | None = None, sink: Sink | None = None) -> tree.Tree:
    """The whole leaves of a tree of shards, in the working dtype; ``held`` are whole leaves gathered before.

    Forward: cast, all-gather (or nothing, with ``held``). Backward: reduce-scatter, all-reduce for unsplit leaves.
    """
    return tree.unflatten(shards, list(Materialize.apply(bundle, held, sink, *tree.leaves(shards))))


@dataclass(frozen=True)
class Local:
    """Blocks whose whole weights are there and whose gradients stay where they are (stages 0 and 1)."""

    def start(self, i: int, shards: list[Tensor], into: Whole | None = None) -> None:
        """Nothing to fetch."""

    def finish(self, i: int, pending: None, shards: list[Tensor]) -> Whole:
        """The weights as they came."""
        return Whole(shards[0], shards)

    def free(self, whole: Whole) -> None:
        """Keeps them."""

    def send(self, i: int, grads: list[Tensor]) -> list[Tensor]:
        """Keeps the gradients."""
        return grads

    def receive(self, i: int, sending: list[Tensor], shards: list[Tensor]) -> list[Tensor]:
        """The gradients as they are."""
        return sending


@dataclass(frozen=True)
class Sharded:
    """Blocks whose gradients are reduce-scattered as they come.

    ``held`` are whole working weights a block (stage 2), or None: gathered block by block and freed (stage 3).
    """

    bundles: tuple[Bundle, ...]
    held: tuple[Whole, ...] | None
    sink: Sink | None = None

    def start(self, i: int, shards: list[Tensor], into: Whole | None = None) -> Gathering | None:
        """Starts block i's gather, into the storage of ``into`` where given."""
        if self.held is not None:
            return None
        collectives.mark(f"gather {i}")
        return self.bundles[i].start_gather(shards, into)

    def finish(self, i: int, pending: Gathering | None, shards: list[Tensor]) -> Whole:
        """Block i's whole weights."""
        return self.held[i] if self.held is not None else self.bundles[i].finish_gather(pending, shards)

    def free(self, whole: Whole) -> None:
        """Gives gathered weights back."""
        if self.held is None:
            free_(whole)

    def send(self, i: int, grads: list[Tensor]) -> Any:
        """Starts block i's reduction."""
        collectives.mark(f"reduce {i}")
        return self.bundles[i].start_reduce(grads)

    def receive(self, i: int, sending: Any, shards: list[Tensor]) -> list[Tensor | None]:
        """This rank's parts of block i's summed gradients, in the dtypes of the masters."""
        grads = self.bundles[i].finish_reduce(sending)
        collectives.mark(f"received {i}")
        return _deliver(self.sink, i, grads, [shard.dtype for shard in shards])


def run_layers(ops: Ops, blocks: Local | Sharded, remat: bool = False) -> Ops:
    """The record whose ``layers`` gathers, frees and reduces as the module's head tells.

    With ``remat`` a block keeps its input alone and runs forward again in backward, on the weights gathered for that.
    """

    def layers(block: Callable, params: list, x: Tensor, *args: Any) -> Tensor:
        args_tree = _Args.of(args)
        shards = [leaf for p in params for leaf in tree.leaves(p)]
        return _Layers.apply(block, blocks, remat, params, args_tree, x, *args_tree.tensors, *shards)

    return replace(ops, layers=layers)


class _Args(NamedTuple):
    """Positional arguments of a block, tensors apart from their nesting (tuples of tensors, such as rotary tables)."""

    nesting: tuple
    tensors: tuple[Tensor, ...]

    @staticmethod
    def of(args: tuple) -> _Args:
        flat: list[Tensor] = []
        return _Args(tuple(_places(a, flat) for a in args), tuple(flat))

    def nest(self, tensors: list[Tensor]) -> tuple:
        """The arguments again, with other tensors."""
        return tuple(_nested(place, tensors) for place in self.nesting)


def _places(value: Any, flat: list[Tensor]) -> Any:
    """Appends a value's tensors to ``flat``; their places there, nested as the value is."""
    if isinstance(value, Tensor):
        flat.append(value)
        return len(flat) - 1
    return tuple(_places(v, flat) for v in value)


def _nested(place: Any, tensors: list[Tensor]) -> Any:
    return tensors[place] if isinstance(place, int) else tuple(_nested(p, tensors) for p in place)


FIRST_TENSOR = 6  # index of the first of *tensors among _Layers.forward's inputs


class _Layers(torch.autograd.Function):
    """All blocks as one function that keeps a graph a block; its own backward walks these graphs, so that it can start
    the next gather and the last reduction in between, and every handle has an owner."""

    @staticmethod
    def forward(ctx, block, blocks, remat: bool, params: list, args: _Args, x: Tensor, *tensors: Tensor) -> Tensor:
        num_args, num_blocks = len(args.tensors), len(params)
        shards = _by_block(params, list(tensors[num_args:]))
        kept: list[_Kept] = []
        training = any(ctx.needs_input_grad)
        pending = blocks.start(0, shards[0])
        for i in range(num_blocks):
            whole, pending = blocks.finish(i, pending, shards[i]), None  # its rows go before the next ones come
            pending = blocks.start(i + 1, shards[i + 1]) if i + 1 < num_blocks else None
            collectives.mark(f"forward {i}")
            run = _Kept.run if training and not remat else _Kept.run_without_graph
            keep = run(block, params[i], whole, args, x, list(tensors[:num_args]), ctx.needs_input_grad)
            x = keep.y.detach()
            if training:
                kept.append(keep._replace(y=keep.y if keep.graph else None))
            blocks.free(whole)
        ctx.block, ctx.blocks, ctx.params, ctx.args, ctx.kept = block, blocks, params, args, kept
        ctx.save_for_backward(*tensors)
        return x

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        blocks, params, args, kept = ctx.blocks, ctx.params, ctx.args, ctx.kept
        num_args, num_blocks = len(args.tensors), len(params)
        tensors = list(ctx.saved_tensors)
        shards = _by_block(params, tensors[num_args:])
        dargs: list[Tensor | None] = [None] * num_args
        dshards: list[list[Tensor]] = [[] for _ in range(num_blocks)]
        pending, sending = blocks.start(num_blocks - 1, shards[-1], kept[-1].whole), None
        for i in reversed(range(num_blocks)):
            keep, kept[i] = kept[i], None
            whole, pending = blocks.finish(i, pending, shards[i]), None
            pending = blocks.start(i - 1, shards[i - 1], kept[i - 1].whole) if i else None
            if not keep.graph:
                collectives.mark(f"forward again {i}")
                keep = _Kept.run(ctx.block, params[i], whole, args, keep.x, tensors[:num_args], ctx.needs_input_grad)
            collectives.mark(f"backward {i}")
            dy, new_dargs, dwhole = keep.backward(dy)
            blocks.free(whole)
            dargs = [_add(a, b) for a, b in zip(dargs, new_dargs)]
            del keep
            if sending is not None:
                dshards[i + 1] = blocks.receive(i + 1, sending, shards[i + 1])
            sending = blocks.send(i, dwhole)
        dshards[0] = blocks.receive(0, sending, shards[0])
        return None, None, None, None, None, dy, *dargs, *(d for block in dshards for d in block)


class _Kept(NamedTuple):
    """What a block leaves for backward: with a graph its ends, without one its input."""

    graph: bool
    x: Tensor
    args: list[Tensor]
    whole: Whole | None
    y: Any

    @staticmethod
    def run(block, params, whole: Whole, args: _Args, x: Tensor, tensors: list[Tensor], needs) -> _Kept:
        """Runs a block on leaves of its own, so that its graph ends at them."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            tensors = [
                t.detach().requires_grad_(t.is_floating_point() and needs[FIRST_TENSOR + n])
                for n, t in enumerate(tensors)
            ]
            leaves = [leaf.detach().requires_grad_() for leaf in whole.leaves]
            y = block(tree.unflatten(params, leaves), x, *args.nest(tensors))
        return _Kept(True, x, tensors, Whole(whole.flat, leaves), y)

    @staticmethod
    def run_without_graph(block, params, whole: Whole, args: _Args, x: Tensor, tensors: list[Tensor], needs) -> _Kept:
        """Runs a block and keeps its input."""
        with torch.no_grad():
            y = block(tree.unflatten(params, whole.leaves), x, *args.nest(tensors))
        return _Kept(False, x, tensors, None, y)

    def backward(self, dy: Tensor) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        """Gradients of the input, the arguments and the whole leaves."""
        wanted = [t for t in self.args if t.requires_grad]
        dx, *rest = torch.autograd.grad(self.y, [self.x, *wanted, *self.whole.leaves], dy)
        found = iter(rest[: len(wanted)])
        return dx, [next(found) if t.requires_grad else None for t in self.args], rest[len(wanted) :]


def _by_block(params: list, flat: list[Tensor]) -> list[list[Tensor]]:
    """Cuts a flat list of leaves into one list a block."""
    result, offset = [], 0
    for p in params:
        num = len(tree.leaves(p))
        result.append(flat[offset : offset + num])
        offset += num
    return result


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


@dataclass(frozen=True)
class Layout:
    """How one model's state is stored and used at a stage: what ``plan`` makes and ``train`` calls.

    Masters, moments and EMA are trees like the declaration, each leaf this rank's part.
    """

    stage: int
    axis: Axis
    declared: tree.Tree
    specs: tree.Tree
    dtype: torch.dtype
    reduce_dtype: torch.dtype
    remat: bool
    device: torch.device

    @functools.cached_property
    def outer(self) -> Bundle:
        """The bundle of all that is outside the blocks."""
        return self._bundle(lambda t: _without(t, BLOCKS))

    @functools.cached_property
    def inner(self) -> tuple[Bundle, ...]:
        """A bundle a block."""
        return tuple(self._bundle(lambda t, i=i: t[BLOCKS][i]) for i in range(len(self.declared[BLOCKS])))

    @functools.cached_property
    def _side(self) -> Any:
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _bundle(self, pick: Callable) -> Bundle:
        shapes = tuple(p.shape for p in tree.leaves(pick(self.declared)))
        specs = tuple(tree.leaves(pick(self.specs)))
        return Bundle(shapes, specs, self.axis, self.dtype, self.reduce_dtype, self.device, self._side)

    def hold(self, shards: tree.Tree) -> Held:
        """The working weights that stand for a whole step: all (stages 0 to 2) or those outside the blocks (3)."""
        with torch.no_grad():
            if self.stage == 0:
                return Held(tree.map(lambda p: p.detach().to(self.dtype), shards), None, None)
            outside, blocks = _without(shards, BLOCKS), shards[BLOCKS]
            outer = self.outer.gather(tree.leaves(outside))
            if self.stage == 3:
                return Held(None, outer, None)
            inner = tuple(bundle.gather(tree.leaves(p)) for bundle, p in zip(self.inner, blocks))
            named = tree.unflatten(outside, outer.leaves)
            named[BLOCKS] = [tree.unflatten(p, w.leaves) for p, w in zip(blocks, inner)]
            return Held({k: named[k] for k in shards}, outer, inner)

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
        """Accumulated gradients of ``targets`` as this rank's parts of the sums over ranks; once a step."""
        if self.stage >= 2 or self.axis.size == 1:
            return grads
        summed = {k: None for k in grads}
        summed |= self._all_reduce(_without(grads, BLOCKS), _without(self.specs, BLOCKS))
        summed[BLOCKS] = [self._all_reduce(g, s) for g, s in zip(grads[BLOCKS], self.specs[BLOCKS])]
        return summed

    def _all_reduce(self, grads: tree.Tree, specs: tree.Tree) -> tree.Tree:
        leaves = tree.leaves(grads)
        flat = torch.cat([g.reshape(-1).to(self.reduce_dtype) for g in leaves])
        collectives.all_reduce_(flat, self.axis)
        parts = flat.split([g.numel() for g in leaves])
        wholes = tree.unflatten(grads, [part.view(g.shape).to(g.dtype) for part, g in zip(parts, leaves)])
        return tree.map(lambda whole, s: s.take(whole, self.axis.rank).contiguous(), wholes, specs)

    def squared_norm(self, grads: tree.Tree) -> tuple[Tensor, Tensor]:
        """Sums of squares of this rank's parts of split leaves, to be summed over ranks, and of whole leaves.

        A gradient that is None (offloaded) is not counted.
        """
        found = [(g, s) for g, s in zip(tree.leaves(grads), tree.leaves(self.specs)) if g is not None]
        parts = [[g for g, s in found if (s.dim is None) == kept] for kept in (False, True)]
        zero = torch.zeros((), device=self.device)
        split, whole = (optim.squared_norm(p) if p else zero for p in parts)
        return split, whole


class Held(NamedTuple):
    """Working weights of a step: the whole tree (stages 0 to 2), and storages outside and inside the blocks."""

    whole: tree.Tree | None
    outer: Whole | None
    inner: tuple[Whole, ...] | None


BLOCKS = "blocks"


def layout(
    declared: tree.Tree,
    stage: int,
    axis: Axis,
    dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    device: torch.device,
    remat: bool = False,
) -> Layout:
    """The layout of a declared model at a stage, computed on ``device``."""
    found = spec.specs(declared, axis.size, split=stage > 0)
    return Layout(stage, axis, declared, found, dtype, reduce_dtype, remat, device)


def _without(t: dict, name: str) -> dict:
    return {k: v for k, v in t.items() if k != name}
