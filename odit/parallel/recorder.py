"""The recorder of what passes between ranks, and a slow link to test overlap with.

For tests, which compare what a step moves with what the formulas say and look at the order of transfers and computing,
and for the benchmark, which prints bytes and the time that transfers are not hidden. The collectives ``emit`` when a
transfer starts, when its caller begins to wait and when the wait is over; code that computes may ``mark`` a line
between them. It costs nothing while nobody records.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Event(NamedTuple):
    """One line of a recording; ``elements`` and ``bytes`` are what this rank receives (table in ``collectives``)."""

    op: str  # all_gather, reduce_scatter, all_reduce, all_to_all, shift or what its hops are part of, or mark
    axis: str  # its name; empty for a mark
    elements: int
    bytes: int
    phase: str  # started, waiting, waited or mark; a call that does not return a handle has all, one after the other
    number: int  # of the transfer: joins its events
    time: float  # time.perf_counter
    note: str  # of a mark
    passed: Any  # on a GPU, where waiting is the stream's: torch.cuda.Event of the current stream; else None


class Total(NamedTuple):
    """Sums over a recording's transfers."""

    calls: int
    elements: int
    bytes: int


@contextmanager
def recording() -> Iterator[list[Event]]:
    """Yields a list that fills with this process' events in order, from any thread, until the block ends.

    An axis of size 1 moves nothing and records nothing.
    """
    events: list[Event] = []
    _recorders.append(events)
    try:
        yield events
    finally:
        _recorders[:] = [r for r in _recorders if r is not events]


def mark(note: str) -> None:
    """Writes a line of the caller's own (what is computed now) between the transfers; nothing when nobody records."""
    emit("mark", "", 0, 0, "mark", -1, note)


def totals(events: list[Event], axis: str | None = None) -> dict[str, Total]:
    """Calls, elements and bytes by operation, of one axis or of all."""
    found: dict[str, Total] = {}
    for e in events:
        if e.phase == "started" and axis in (None, e.axis):
            old = found.get(e.op, Total(0, 0, 0))
            found[e.op] = Total(old.calls + 1, old.elements + e.elements, old.bytes + e.bytes)
    return found


def exposed_s(events: list[Event]) -> float:
    """Seconds that computing stood still for transfers: from the call of ``wait`` until they were there."""
    starts = {e.number: e for e in events if e.phase == "waiting"}
    total = 0.0
    for end in (e for e in events if e.phase == "waited"):
        start = starts[end.number]
        if end.passed is None:
            total += end.time - start.time
        else:
            end.passed.synchronize()
            total += start.passed.elapsed_time(end.passed) / 1e3
    return total


@contextmanager
def slow_link(seconds: float = 0.0, bytes_per_s: float = float("inf")) -> Iterator[None]:
    """For tests of overlap: a transfer takes ``seconds`` + bytes / ``bytes_per_s``, and one starts as another is there.

    The delay is in ``wait``, on top of the real transfer, and costs no processor time. One link a rank, for all axes.
    """
    global _link
    _link = _Link(seconds, bytes_per_s)
    try:
        yield
    finally:
        _link = None


class _Link:
    def __init__(self, seconds: float, bytes_per_s: float):
        self.seconds, self.bytes_per_s, self.free = seconds, bytes_per_s, 0.0

    def arrival(self, num_bytes: int) -> float:
        self.free = max(self.free, time.perf_counter()) + self.seconds + num_bytes / self.bytes_per_s
        return self.free


# ------------------------------------------------------------------------------------------------- for the collectives


_recorders: list[list[Event]] = []
_numbers = itertools.count()
_link: _Link | None = None


def next_number() -> int:
    """A number for a transfer, another one at every call in this process."""
    return next(_numbers)


def arrival(num_bytes: int) -> float:
    """When (time.perf_counter) a transfer that starts now is there, which holds up the next; 0 without a slow link."""
    return 0.0 if _link is None else _link.arrival(num_bytes)


def emit(
    op: str,
    axis: str,
    elements: int,
    num_bytes: int,
    phase: str,
    number: int,
    note: str = "",
    device: torch.device | None = None,
) -> None:
    """Adds an event of now to every recording under way; on a CUDA ``device`` it holds the current stream's place."""
    if not _recorders:
        return
    passed = None
    if device is not None and device.type == "cuda":
        passed = torch.cuda.Event(enable_timing=True)
        passed.record()
    event = Event(op, axis, elements, num_bytes, phase, number, time.perf_counter(), note, passed)
    for events in list(_recorders):
        events.append(event)
