"""Collectives as pure functions of (tensor, axis, dims): the only place where numbers pass between ranks.

A value over an axis of n ranks is
  split    rank r holds its share along a dim; its gradient is split the same way;
  same     every rank holds all of it; its gradient is partial, for each rank saw only its own use of the value;
  partial  the value is the sum over ranks of what they hold; its gradient is the same on every rank.
(spmd_types calls these V, R and P.) Collectives only sum. A rank's loss must be its part of the sum: where each rank
computes the whole loss and calls backward on it, every gradient behind a collective is n times too large.

  function         forward                backward                            a rank receives, in elements
  all_gather       split -> same          partial -> split  (reduce_scatter)  total - own share
  reduce_scatter   partial -> split       split -> same     (all_gather)      (n - 1) x own share
  all_reduce       partial -> same        partial -> same   (all_reduce)      the two above, over shares(elements, n)
  all_to_all       split(c) -> split(s)   split(s) -> split(c)                the others' parts of its result
  shift            split -> split         split -> split    (shift back)      the arriving block
  take             same -> split          split -> partial  (zeros around)    nothing

Shares may be uneven (``shares``: the last ones are shorter by one). Then blocks travel in one all-to-all with
their exact sizes, and reduce_scatter adds what arrived: nothing is padded, and what is counted is what moves.

Each function is one linear map (a ``_Map``) with its transpose, so backward, jvp and vmap are exact and nest. If one
rank runs a backward, all ranks of the axis must. An axis of size 1 is the identity and calls nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from odit.parallel import recorder
from odit.parallel.mesh import Axis

# torch 2.13 renames both and warns at the old names; the second names go when torch >= 2.13 is required
_all_gather_single: Callable = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Sizes = tuple[int, ...]


# ---------------------------------------------------------------------------------------------------- shares of a dim


def shares(total: int, n: int) -> Sizes:
    """Sizes of n shares of ``total``: as even as can be, the larger ones first; some are 0 only where n > total."""
    return tuple(total // n + (r < total % n) for r in range(n))


def roll(sizes: Sizes, by: int) -> Sizes:
    """Sizes of the blocks that ranks hold after ``shift(by)``."""
    return tuple(sizes[(r - by) % len(sizes)] for r in range(len(sizes)))


def take(x: Tensor, axis: Axis, dim: int, sizes: Sizes | None = None) -> Tensor:
    """Keeps this rank's share of ``dim``, a view. same -> split; backward split -> partial (zeros elsewhere)."""
    if axis.size == 1:
        return x
    sizes = sizes or shares(x.shape[dim], axis.size)
    assert sum(sizes) == x.shape[dim], f"shares {sizes} of a dim of {x.shape[dim]}"
    return x.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank])


# ---------------------------------------------------------------------------------------------------- public functions


def all_gather(x: Tensor, axis: Axis, dim: int, sizes: Sizes | None = None) -> Tensor:
    """Joins the ranks' shares of ``dim``. split(dim) -> same; backward partial -> split(dim) (reduce_scatter).

    ``sizes`` are the ranks' shares where they differ.
    """
    if axis.size == 1:
        return x
    dim = dim % x.ndim
    sizes = sizes or (x.shape[dim],) * axis.size
    assert sizes[axis.rank] == x.shape[dim], f"rank {axis.rank} holds {x.shape[dim]} of the shares {sizes}"
    return _apply(_AllGather(axis, dim, sizes), x)


def reduce_scatter(x: Tensor, axis: Axis, dim: int, sizes: Sizes | None = None) -> Tensor:
    """Sums over ranks and keeps a share of ``dim``. partial -> split(dim); backward split(dim) -> same (all_gather).

    ``sizes`` default to ``shares``. Sums are in x's dtype.
    """
    if axis.size == 1:
        return x
    dim = dim % x.ndim
    sizes = sizes or shares(x.shape[dim], axis.size)
    assert sum(sizes) == x.shape[dim], f"shares {sizes} of a dim of {x.shape[dim]}"
    return _apply(_ReduceScatter(axis, dim, sizes), x)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sums over ranks. partial -> same; backward partial -> same (all_reduce).

    Backward sums too, for the gradient of a value that is the same everywhere is partial: each rank brings the part
    from its own use. (A sum with identity as its backward is right only where every rank repeats all uses.)
    """
    return x if axis.size == 1 else _apply(_AllReduce(axis), x)


def all_to_all(
    x: Tensor,
    axis: Axis,
    split_dim: int,
    concat_dim: int,
    split_sizes: Sizes | None = None,
    concat_sizes: Sizes | None = None,
) -> Tensor:
    """Splits a whole dim, joins a split one. split(concat_dim) -> split(split_dim); backward the reverse (all_to_all).

    ``split_sizes`` default to ``shares``; ``concat_sizes`` are the ranks' shares of ``concat_dim`` where they differ.
    """
    if axis.size == 1:
        return x
    split_dim, concat_dim = split_dim % x.ndim, concat_dim % x.ndim
    assert split_dim != concat_dim, f"all_to_all splits and joins dim {split_dim}"
    split_sizes = split_sizes or shares(x.shape[split_dim], axis.size)
    concat_sizes = concat_sizes or (x.shape[concat_dim],) * axis.size
    assert sum(split_sizes) == x.shape[split_dim], f"shares {split_sizes} of a dim of {x.shape[split_dim]}"
    assert concat_sizes[axis.rank] == x.shape[concat_dim], (
        f"rank {axis.rank} holds {x.shape[concat_dim]} of the shares {concat_sizes}"
    )
    return _apply(_AllToAll(axis, split_dim, concat_dim, split_sizes, concat_sizes), x)


def shift(x: Tensor, axis: Axis, by: int = 1, dim: int = 0, sizes: Sizes | None = None) -> Tensor:
    """Hands rank i's block to rank (i + by) % n. split -> split; backward split -> split (shift by -by).

    ``sizes`` are what the ranks hold along ``dim`` at this moment, where they differ; ``roll`` gives them after a hop.
    """
    return x if by % axis.size == 0 else _apply(_shift_map(x, axis, by, dim, sizes), x)


# ------------------------------------------------------------------------ forms without gradient, and their handles


class Handle:
    """A transfer under way; ``wait`` returns its result. A handle never outlives the function that owns it."""

    def __init__(self, result: Tensor, finish: Callable[[], None] | None = None):
        self._result, self._finish = result, finish

    def wait(self) -> Tensor:
        """Returns the result, complete (on a GPU: complete for the current stream)."""
        if self._finish is not None:
            self._finish()
            self._finish = None
        return self._result


def all_gather_flat(out: Tensor, x: Tensor, axis: Axis, async_op: bool = False) -> Handle | Tensor:
    """Fills flat ``out`` with the ranks' equal flat ``x`` in rank order; returns out, or a Handle with ``async_op``."""
    assert out.numel() == axis.size * x.numel(), f"{x.numel()} elements on {axis.size} ranks, room for {out.numel()}"
    if axis.size == 1:
        return _given(out.copy_(x), async_op)
    received = out.numel() - x.numel()
    return _launch("all_gather", axis, received, out, x, _call(_all_gather_single, axis), async_op)


def reduce_scatter_flat(out: Tensor, x: Tensor, axis: Axis, async_op: bool = False) -> Handle | Tensor:
    """Fills flat ``out`` with this rank's part of the sum of flat ``x``; returns out, or a Handle with ``async_op``."""
    assert x.numel() == axis.size * out.numel(), f"{x.numel()} elements over {axis.size} ranks, room for {out.numel()}"
    if axis.size == 1:
        return _given(out.copy_(x), async_op)
    received = (axis.size - 1) * out.numel()
    return _launch("reduce_scatter", axis, received, out, x, _call(_reduce_scatter_single, axis), async_op)


def all_reduce_(x: Tensor, axis: Axis, async_op: bool = False) -> Handle | Tensor:
    """Sums contiguous ``x`` over ranks in place; returns x, or a Handle with ``async_op``."""
    if axis.size == 1:
        return _given(x, async_op)
    own = shares(x.numel(), axis.size)[axis.rank]
    received = (axis.size - 1) * own + x.numel() - own

    def call(out: Tensor, _: Tensor, later: bool) -> list:
        return [dist.all_reduce(out, group=axis.group, async_op=later)] if out.numel() else []

    return _launch("all_reduce", axis, received, x, x, call, async_op)


def start_shift(
    x: Tensor, axis: Axis, by: int = 1, dim: int = 0, sizes: Sizes | None = None, part_of: str = "shift"
) -> Handle:
    """``shift`` without gradient that runs while its caller computes; ``wait`` returns the arriving block.

    ``part_of`` names the collective whose n - 1 hops the caller makes, for the recorder.
    """
    return Handle(x) if by % axis.size == 0 else _shift_map(x, axis, by, dim, sizes).start(x.detach(), part_of)


def gather_objects(axis: Axis, obj: Any) -> list:
    """Every rank's picklable object, in rank order; also a barrier. Not recorded."""
    objects = [obj] * axis.size
    if axis.size > 1:
        dist.all_gather_object(objects, obj, group=axis.group)
    return objects


def broadcast_object(axis: Axis, obj: Any, source: int = 0) -> Any:
    """The picklable object of the axis' rank ``source``, on every rank. Not recorded."""
    if axis.size == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=axis.ranks[source], group=axis.group)
    return box[0]


def barrier(axis: Axis) -> None:
    """Returns when every rank of the axis has come here."""
    gather_objects(axis, None)


# --------------------------------------------------------------------------------------- one linear map a collective


@dataclass(frozen=True)
class _Map:
    """A collective as a linear map of plain tensors; ``transpose`` is its adjoint, ``batched`` has a new dim 0."""

    axis: Axis

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def transpose(self) -> _Map:
        raise NotImplementedError

    def batched(self) -> _Map:
        raise NotImplementedError


@dataclass(frozen=True)
class _AllGather(_Map):
    dim: int
    sizes: Sizes

    def __call__(self, x: Tensor) -> Tensor:
        if len(set(self.sizes)) == 1:
            blocks = x.new_empty(self.axis.size, *x.shape)
            all_gather_flat(blocks.view(-1), x.contiguous().view(-1), self.axis)
            return blocks.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        shapes = [_resized(x.shape, self.dim, s) for s in self.sizes]
        return torch.cat(_exchange("all_gather", self.axis, [x] * self.axis.size, shapes), self.dim)

    def transpose(self) -> _Map:
        return _ReduceScatter(self.axis, self.dim, self.sizes)

    def batched(self) -> _Map:
        return replace(self, dim=self.dim + 1)


@dataclass(frozen=True)
class _ReduceScatter(_Map):
    dim: int
    sizes: Sizes

    def __call__(self, x: Tensor) -> Tensor:
        mine = _resized(x.shape, self.dim, self.sizes[self.axis.rank])
        if len(set(self.sizes)) == 1:
            blocks = x.unflatten(self.dim, (self.axis.size, -1)).movedim(self.dim, 0).contiguous()
            out = x.new_empty(mine)
            reduce_scatter_flat(out.view(-1), blocks.view(-1), self.axis)
            return out
        arrived = _exchange("reduce_scatter", self.axis, list(x.split(self.sizes, self.dim)), [mine] * self.axis.size)
        return torch.stack(arrived).sum(0)

    def transpose(self) -> _Map:
        return _AllGather(self.axis, self.dim, self.sizes)

    def batched(self) -> _Map:
        return replace(self, dim=self.dim + 1)


@dataclass(frozen=True)
class _AllReduce(_Map):
    def __call__(self, x: Tensor) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        all_reduce_(y, self.axis)
        return y

    def transpose(self) -> _Map:
        return self

    def batched(self) -> _Map:
        return self


@dataclass(frozen=True)
class _AllToAll(_Map):
    split_dim: int
    concat_dim: int
    split_sizes: Sizes
    concat_sizes: Sizes

    def __call__(self, x: Tensor) -> Tensor:
        mine = _resized(x.shape, self.split_dim, self.split_sizes[self.axis.rank])
        shapes = [_resized(mine, self.concat_dim, s) for s in self.concat_sizes]
        blocks = _exchange("all_to_all", self.axis, list(x.split(self.split_sizes, self.split_dim)), shapes)
        return torch.cat(blocks, self.concat_dim)

    def transpose(self) -> _Map:
        return _AllToAll(self.axis, self.concat_dim, self.split_dim, self.concat_sizes, self.split_sizes)

    def batched(self) -> _Map:
        return replace(self, split_dim=self.split_dim + 1, concat_dim=self.concat_dim + 1)


@dataclass(frozen=True)
class _Shift(_Map):
    by: int
    dim: int
    sizes: Sizes  # before the hop

    def __call__(self, x: Tensor) -> Tensor:
        return self.start(x).wait()

    def start(self, x: Tensor, op: str = "shift") -> Handle:
        n, rank = self.axis.size, self.axis.rank
        target, source = (rank + self.by) % n, (rank - self.by) % n
        out = x.new_empty(_resized(x.shape, self.dim, self.sizes[source]))

        def call(out: Tensor, x: Tensor, _: bool) -> list:
            pairs = ((dist.isend, x, target), (dist.irecv, out, source))
            ops = [dist.P2POp(op, t, group=self.axis.group, group_peer=peer) for op, t, peer in pairs if t.numel()]
            return dist.batch_isend_irecv(ops) if ops else []

        handle = _launch(op, self.axis, out.numel(), out, x.contiguous(), call, True)
        assert isinstance(handle, Handle)
        return handle

    def transpose(self) -> _Map:
        return _Shift(self.axis, -self.by, self.dim, roll(self.sizes, self.by))

    def batched(self) -> _Map:
        return replace(self, dim=self.dim + 1)


class _Apply(torch.autograd.Function):
    """Any _Map under autograd, jvp and vmap: the tangent goes the same way, the cotangent the transposed one."""

    @staticmethod
    def forward(move: _Map, x: Tensor) -> Tensor:
        return move(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.move = inputs[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, _apply(ctx.move.transpose(), grad)

    @staticmethod
    def jvp(ctx, _, tangent: Tensor) -> Tensor:
        return _apply(ctx.move, tangent)

    @staticmethod
    def vmap(info, in_dims, move: _Map, x: Tensor) -> tuple[Tensor, int]:
        return _apply(move.batched(), x.movedim(in_dims[1], 0)), 0


def _apply(move: _Map, x: Tensor) -> Tensor:
    return _Apply.apply(move, x)


def _shift_map(x: Tensor, axis: Axis, by: int, dim: int, sizes: Sizes | None) -> _Shift:
    dim = dim % x.ndim
    sizes = sizes or (x.shape[dim],) * axis.size
    assert sizes[axis.rank] == x.shape[dim], f"rank {axis.rank} holds {x.shape[dim]} of the blocks {sizes}"
    return _Shift(axis, by, dim, sizes)


def _resized(shape: Any, dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


# ------------------------------------------------------------------------------------------------------ the one way out


def _exchange(op: str, axis: Axis, blocks: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Sends blocks[r] to rank r; the result's block r, of shapes[r], comes from rank r. Sizes may differ and be 0."""
    sent = torch.cat([b.reshape(-1) for b in blocks])
    lengths = [torch.Size(s).numel() for s in shapes]
    arrived = sent.new_empty(sum(lengths))

    def call(out: Tensor, x: Tensor, later: bool) -> list:
        counts = [b.numel() for b in blocks]
        return [dist.all_to_all_single(out, x, lengths, counts, group=axis.group, async_op=later)]

    _launch(op, axis, sum(lengths) - lengths[axis.rank], arrived, sent, call, False)
    return [part.view(shape) for part, shape in zip(arrived.split(lengths), shapes)]


def _call(function: Callable, axis: Axis) -> Callable:
    return lambda out, x, later: [function(out, x, group=axis.group, async_op=later)] if len(x) else []


def through_host(axis: Axis, device: torch.device) -> bool:
    """Whether tensors of a GPU go through host memory: over gloo, where ranks share it. A pretended axis has NCCL."""
    return device.type == "cuda" and axis.group is not None and dist.get_backend(axis.group) == "gloo"


def _launch(
    op: str, axis: Axis, received: int, out: Tensor, x: Tensor, call: Callable, async_op: bool
) -> Handle | Tensor:
    """Runs ``call(out, x, later) -> works`` and records it: every byte between ranks passes here.

    Gloo has no send and receive for CUDA tensors and only some collectives: all of them go through pinned host memory.
    """
    number = recorder.next_number()
    recorder.emit(op, axis.name, received, received * x.element_size(), "started", number)
    if x.is_meta:  # a plan: nothing moves, and what is sent stays until it is waited for
        return Handle(out, lambda sent=x: None) if async_op else out
    arrives = recorder.arrival(received * x.element_size())
    on_host = through_host(axis, x.device)
    there, here = (_pinned(out, out is x), _pinned(x, True)) if on_host else (out, x)
    if not async_op:
        recorder.emit(op, axis.name, 0, 0, "waiting", number, device=x.device)
    works = call(there, there if out is x else here, async_op)

    def finish() -> None:
        if async_op:
            recorder.emit(op, axis.name, 0, 0, "waiting", number, device=x.device)
        for work in works if async_op else ():
            work.wait()
        if arrives:
            time.sleep(max(0.0, arrives - time.perf_counter()))
        if on_host:
            out.copy_(there)
        recorder.emit(op, axis.name, received, received * x.element_size(), "waited", number, device=x.device)

    handle = Handle(out, finish)
    return handle if async_op else handle.wait()


def _pinned(like: Tensor, filled: bool) -> Tensor:
    host = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    return host.copy_(like) if filled else host


def _given(x: Tensor, async_op: bool) -> Handle | Tensor:
    return Handle(x) if async_op else x
