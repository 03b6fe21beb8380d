"""The ``layers`` site under ZeRO: runs the blocks, gathers and frees their weights, sends their gradients off.

One autograd function keeps a graph a block and walks these graphs in its own backward. So it can start the next gather
and the last block's reduction in between, every handle has an owner, and nothing is computed twice unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit import tree
from odit.ops import Ops
from odit.ops import layers as plain_layers
from odit.parallel import recorder
from odit.parallel.bundle import Convoy, Gathering, Whole, free_

Sink = Callable[[int, list[Tensor]], list[Tensor | None]]
"""Takes bundle i's summed gradients as they come (-1: outside the blocks) and returns those that stay on the device;
None where it took one away (``offload``)."""


def deliver(sink: Sink | None, i: int, grads: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor | None]:
    """Bundle i's gradients for autograd, in the dtypes of the masters, without those that the sink took."""
    kept = grads if sink is None else sink(i, grads)
    return [None if g is None else g.to(dtype) for g, dtype in zip(kept, dtypes)]


@dataclass(frozen=True)
class Local:
    """Blocks whose whole weights are there and whose gradients stay where they are (stages 0 and 1)."""

    def start(self, i: int, shards: list[Tensor], into: Whole | None = None) -> None:
        """Nothing to fetch."""

    def finish(self, i: int, pending: None, shards: list[Tensor]) -> Whole:
        """The weights as they came."""
        return Whole([], shards)

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

    bundles: tuple[Convoy, ...]
    held: tuple[Whole, ...] | None
    sink: Sink | None = None

    def start(self, i: int, shards: list[Tensor], into: Whole | None = None) -> list[Gathering] | None:
        """Starts block i's gather, into the storage of ``into`` where given."""
        if self.held is not None:
            return None
        recorder.mark(f"gather {i}")
        return self.bundles[i].start_gather(shards, into)

    def finish(self, i: int, pending: list[Gathering] | None, shards: list[Tensor]) -> Whole:
        """Block i's whole weights."""
        return self.held[i] if self.held is not None else self.bundles[i].finish_gather(pending, shards)

    def free(self, whole: Whole) -> None:
        """Gives gathered weights back."""
        if self.held is None:
            free_(whole)

    def send(self, i: int, grads: list[Tensor]) -> Any:
        """Starts block i's reduction."""
        recorder.mark(f"reduce {i}")
        return self.bundles[i].start_reduce(grads)

    def receive(self, i: int, sending: Any, shards: list[Tensor]) -> list[Tensor | None]:
        """This rank's parts of block i's summed gradients, in the dtypes of the masters."""
        grads = self.bundles[i].finish_reduce(sending)
        recorder.mark(f"received {i}")
        return deliver(self.sink, i, grads, [shard.dtype for shard in shards])


def run_layers(ops: Ops, blocks: Local | Sharded, remat: bool = False) -> Ops:
    """The record whose ``layers`` gathers, frees and reduces as ``zero`` tells.

    With ``remat`` a block keeps its input alone and runs forward again in backward, on the weights gathered for that.

    Raises:
        ValueError: the record has other ``layers`` already, which would not run.
    """
    if ops.layers is not plain_layers:
        raise ValueError(
            "a strategy has layers of its own, in whose place ZeRO 2 and 3 and remat block have theirs: use "
            "--parallel.zero 0 or 1 and --parallel.remat none or selective with it"
        )

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
            recorder.mark(f"forward {i}")
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
                recorder.mark(f"forward again {i}")
                keep = _Kept.run(ctx.block, params[i], whole, args, keep.x, tensors[:num_args], ctx.needs_input_grad)
            recorder.mark(f"backward {i}")
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
        return _Kept(True, x, tensors, Whole(whole.flats, leaves), y)

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
