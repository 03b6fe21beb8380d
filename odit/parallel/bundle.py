"""Leaves that travel together: a block's parts in one flat buffer, gathered into whole leaves and reduced into parts.

Rank r's parts of all leaves, end to end, are row r. Gathers carry the dtype of matrix products, reductions
``reduce_dtype``. Where a strategy has claimed dims, the leaves cut over sp travel apart from the others, over dp alone:
``Convoy`` is both. Whole means what the model sees: of a claimed leaf this rank's share.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit.parallel import collectives
from odit.parallel.mesh import Axis
from odit.parallel.spec import Spec


class Whole(NamedTuple):
    """Whole leaves: views into one storage a bundle, so that all of it can be freed and filled again at once."""

    flats: list[Tensor]
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
            rows = whole.flats[0].data if self.rows_are_whole else mine.new_empty(self.axis.size * self.row)
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
        return Whole([flat], leaves)

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


@dataclass(frozen=True)
class Convoy:
    """Bundles over axes of their own that start together; ``places`` are their leaves' indices in the one list.

    All it does is share lists out and join them again: every method is ``Bundle``'s.
    """

    bundles: tuple[Bundle, ...]
    places: tuple[tuple[int, ...], ...]

    def start_gather(self, shards: list[Tensor], into: Whole | None = None) -> list[Gathering]:
        """Starts the all-gathers; ``into`` is filled again."""
        if into is None:
            rooms = [None] * len(self.bundles)
        else:
            rooms = [Whole([flat], leaves) for flat, leaves in zip(into.flats, self._shared_out(into.leaves))]
        return [b.start_gather(s, room) for b, s, room in zip(self.bundles, self._shared_out(shards), rooms)]

    def finish_gather(self, pending: list[Gathering], shards: list[Tensor]) -> Whole:
        """Waits for the rows and lays them out as whole leaves."""
        found = [b.finish_gather(p, s) for b, p, s in zip(self.bundles, pending, self._shared_out(shards))]
        return Whole([flat for whole in found for flat in whole.flats], self._joined([w.leaves for w in found]))

    def gather(self, shards: list[Tensor], into: Whole | None = None) -> Whole:
        """The whole leaves, at once; ``into`` is filled again."""
        return self.finish_gather(self.start_gather(shards, into), shards)

    def start_reduce(self, grads: list[Tensor]) -> list[Reducing]:
        """Starts the sums of whole gradients, each over its bundle's axis."""
        return [b.start_reduce(g) for b, g in zip(self.bundles, self._shared_out(grads))]

    def finish_reduce(self, pending: list[Reducing]) -> list[Tensor]:
        """Waits for the sums and cuts them into this rank's parts, in ``reduce_dtype``."""
        return self._joined([b.finish_reduce(p) for b, p in zip(self.bundles, pending)])

    def _shared_out(self, leaves: list[Tensor]) -> list[list[Tensor]]:
        return [[leaves[i] for i in places] for places in self.places]

    def _joined(self, lists: list[list[Tensor]]) -> list[Tensor]:
        found = {i: x for places, xs in zip(self.places, lists) for i, x in zip(places, xs, strict=True)}
        return [found[i] for i in range(len(found))]


def free_(whole: Whole) -> None:
    """Gives the memory of whole leaves back; tensors that autograd saved keep pointing at the empty storage."""
    for flat in whole.flats:
        flat.untyped_storage().resize_(0)


def refill_room_(whole: Whole) -> None:
    """Takes the memory of freed whole leaves again, with undefined content; what was not freed stays where it is."""
    for flat in whole.flats:
        storage, size = flat.untyped_storage(), flat.numel() * flat.element_size()
        if storage.nbytes() != size:  # as resizing moves a storage even to its own size
            storage.resize_(size)
