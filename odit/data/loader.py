"""The order of samples, and reading them: batch ``step`` is a function of (key, step) and the data alone.

Position p of the endless sequence of epochs is sample ``train_ids[permutation(key of epoch p // n, p % n)]``. Step s
holds positions s * global_batch and on, so batches run on across epochs and nothing is dropped, saved or shuffled.
A bad sample is replaced by one that its draw id selects; the draw id stays, so every other draw of the run does too.
Where sizes are mixed, ``buckets.Schedule`` says which samples a step has, and substitutes are of the same bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit import random, tree
from odit.data import ahead
from odit.data.dataset import BadSample, Batch, DataError, Dataset

MAX_ATTEMPTS = 64  # substitutes tried for one sample; if this many are bad in a row, the data is
ALWAYS_ALLOWED = 10  # bad samples that never stop a run
ORDER_CHUNK = 2**14  # positions looked up at once: a permutation costs milliseconds however few it maps
READ_CHUNK = 8  # samples read at once; a bad one makes its chunk be read again one by one

Share = tuple[int, Tensor]
"""Which part of the data set a step is of (0, but for mixed sizes), and the draw ids (B,) of this rank's samples."""


def batches(
    dataset: Dataset,
    key: random.Key,
    *,
    global_batch: int,
    start: int = 0,
    stop: int,
    workers: int = 0,
    flip: bool = False,
    bad_budget: float = 0.01,
    on_bad: Callable[[str, str], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Yields the batches of steps start, ..., stop - 1, the same bit for bit for any ``workers``.

    Args:
        part: (rank, num): yields the rank-th of num equal contiguous shares of each global batch.
        on_bad: called with (path, reason) once a bad file.
        bad_budget: raises DataError, listing the files, when more distinct samples than this fraction of those read,
            and more than 10, were bad. Counted in this iterator: from ``start``, in this part.

    Closing the iterator ends its worker processes.
    """
    rank, num = part
    if global_batch < 1 or global_batch % num:
        raise ValueError(f"a global batch of {global_batch} cannot be cut into {num} equal parts")
    assert 0 <= rank < num and 0 <= start, (part, start)
    if hasattr(dataset, "schedule"):  # samples of mixed sizes (odit/data/buckets.py), each batch of one of the parts
        parts, shares = dataset.parts, dataset.schedule(key, global_batch).order(start, stop, part)
    else:
        parts = [dataset]
        shares = ((0, ids_B) for ids_B in order(dataset.train_ids, key, global_batch, start, stop, part))
    return _batches(parts, key, shares, workers, flip, bad_budget, on_bad)


def order(
    train_ids: Tensor, key: random.Key, global_batch: int, start: int, stop: int, part: tuple[int, int] = (0, 1)
) -> Iterator[Tensor]:
    """Yields the draw ids (B,) of each step's share."""
    rank, num = part
    share = global_batch // num
    stride = max(1, ORDER_CHUNK // share)
    for first in range(start, stop, stride):
        steps = torch.arange(first, min(first + stride, stop))
        positions = steps[:, None] * global_batch + rank * share + torch.arange(share)
        yield from draw_ids(train_ids, key, positions)


def draw_ids(train_ids: Tensor, key: random.Key, positions: Tensor) -> Tensor:
    """Maps positions in the sequence of epochs to draw ids, epoch * 2**32 + sample id; any shape, int64."""
    num = len(train_ids)
    epoch = positions // num
    first = int(epoch.min())
    keys = torch.tensor([random.fold_in(key, "order", e) for e in range(first, int(epoch.max()) + 1)])
    lo, hi = keys[epoch - first].unbind(-1)
    key_of_position: Any = random.Key(lo, hi)  # type: ignore (words may be tensors: one call serves many epochs)
    return (epoch << 32) + train_ids[random.permutation(key_of_position, num, positions % num)]


def substitute(train_ids: Tensor, key: random.Key, draw_id: int, attempt: int) -> int:
    """Chooses the sample id that stands in for a bad sample; a function of the arguments, nothing else."""
    word = random.fold_in(key, "substitute", draw_id, attempt).lo
    return int(train_ids[word % len(train_ids)])


def mirror(x: Tensor, key: random.Key, ids_B: Tensor) -> Tensor:
    """Mirrors half of the samples left to right, chosen by draw id."""
    return torch.where(mirrored(key, ids_B).reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


def mirrored(key: random.Key, ids_B: Tensor) -> Tensor:
    """Chooses the half (B,) bool of the samples that are mirrored."""
    return random.uniform(random.fold_in(key, "flip"), (), ids_B) < 0.5


class Reading(NamedTuple):
    """One share as it was read."""

    ids_B: Tensor
    samples: tuple[Tensor, tree.Tree] | None
    """x and y; None when every attempt at one of them failed."""
    bad: list[tuple[str, str]]
    """(path, reason) of what was met on the way."""


def read_share(dataset: Dataset, key: random.Key, ids_B: Tensor) -> Reading:
    """Reads the samples of ``ids_B``, bad ones replaced."""
    xs, ys, bad = [], [], []
    for ids in ids_B.split(READ_CHUNK):
        try:
            read = [dataset.read(ids, key)]
        except BadSample:
            read = [_read_one(dataset, key, draw_id, bad) for draw_id in ids.tolist()]
        for sample in read:
            if sample is None:
                return Reading(ids_B, None, bad)
            xs.append(sample[0])
            ys.append(sample[1])
    return Reading(ids_B, (torch.cat(xs), tree.map(lambda *parts: torch.cat(parts), *ys)), bad)


def _read_one(dataset: Dataset, key: random.Key, draw_id: int, bad: list) -> tuple[Tensor, tree.Tree] | None:
    epoch, sample_id = draw_id & ~random.MASK, draw_id & random.MASK
    for attempt in range(MAX_ATTEMPTS):
        try:
            return dataset.read([epoch + sample_id], key)
        except BadSample as error:
            bad.append((error.path, error.reason))
            sample_id = substitute(dataset.train_ids, key, draw_id, attempt)
    return None


def _read_of(parts: list[Dataset], key: random.Key, share: Share) -> Reading:
    return read_share(parts[share[0]], key, share[1])


def _batches(parts, key, shares, workers, flip, bad_budget, on_bad) -> Iterator[Batch]:
    bad: dict[str, str] = {}
    num_read, num_train = 0, sum(len(part.train_ids) for part in parts)
    read = functools.partial(_read_of, parts, key)
    shares = ((k, ids_B.clone()) for k, ids_B in shares)  # a view is pickled with all that it is a view of
    for reading in ahead.read_ahead(read, shares, workers):
        for path, reason in reading.bad:
            if path not in bad:
                bad[path] = reason
                if on_bad is not None:
                    on_bad(path, reason)
        # Distinct bad samples against distinct samples: a damaged file does not count anew in each epoch.
        num_read = min(num_read + len(reading.ids_B), num_train)
        if reading.samples is None or over_budget(len(bad), num_read, bad_budget):
            raise DataError(list_bad(bad, num_read, bad_budget))
        x, y = reading.samples
        yield Batch(reading.ids_B, mirror(x, key, reading.ids_B) if flip else x, y)


def over_budget(num_bad: int, num_read: int, bad_budget: float) -> bool:
    """Whether so many bad samples end a run."""
    return num_bad > max(ALWAYS_ALLOWED, bad_budget * num_read)


def list_bad(bad: dict[str, str], num_read: int, bad_budget: float) -> str:
    """Says that there are too many, and lists them by path with the reason."""
    files = "\n".join(f"  {path}: {reason}" for path, reason in bad.items())
    return (
        f"{len(bad)} bad samples among {num_read} read, data.bad_budget is {bad_budget} "
        f"({ALWAYS_ALLOWED} are always allowed): raise the budget, which --resume takes too, or begin anew without "
        f"these files\n{files}"
    )
