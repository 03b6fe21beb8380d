"""Samples of mixed sizes in buckets of one size each: which bucket a sample goes to, and which a step draws from.

A bucket is (T, H, W): frames, height, width; T = 1 are pictures. Every batch holds samples of one bucket. At G samples
a global batch, a bucket of N samples to train on has n = max(1, round(N / G)) slots in a cycle; the steps take all
slots of a cycle in a keyed order, then those of the next. Slot j in cycle c draws positions (c n + j) G and on of the
bucket's own endless sequence of epochs (odit/data/loader.py), so batches run on across its epochs and nothing in it
is dropped. All this is a function of (key, step): ranks take equal shares of one global batch, hence the same steps.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from odit import random
from odit.data import loader
from odit.data.dataset import READ_KEY, BadSample, DataError, Dataset, sample_ids

Bucket = tuple[int, int, int]

# Sides are rounded to whole patches, so one shape at two sizes is never quite the same aspect ratio (144 x 256 is
# 1.778, 240 x 426 is 1.775): ratios this close to the nearest one count as equally near, and the area decides.
NEAR = 1.03
SERVED, UNREADABLE, TOO_SHORT, PICTURE = range(4)
NAMED = 10  # files that cannot be read which the start names
REASONS = ("", "unreadable", "too short for every bucket", "of one frame (no bucket for pictures)")
ROWS = 2**16  # samples assigned at once


def parse(text: str) -> Bucket:
    """Reads "16x256x256" (T, H, W) or "256x384" (H, W of pictures); raises ValueError."""
    if not re.fullmatch(r"([1-9][0-9]*x)?[1-9][0-9]*x[1-9][0-9]*", text):
        raise ValueError(
            f"data.buckets has {text!r}: write height x width or frames x height x width, such as 256x384 or 16x256x256"
        )
    T, H, W = [1, *map(int, text.split("x"))][-3:]
    return T, H, W


def name(bucket: Bucket) -> str:
    """Writes what ``parse`` reads."""
    return "x".join(map(str, bucket if bucket[0] > 1 else bucket[1:]))


def sizes(buckets: list[Bucket]) -> list[tuple[int, ...]]:
    """Sizes of samples: (H, W), or (T, H, W) of all where one has several frames, so that one model serves them."""
    return [bucket if max(buckets)[0] > 1 else bucket[1:] for bucket in buckets]


def check_distinct(buckets: list[Bucket]) -> None:
    """Raises ValueError for a size that is there twice."""
    if twice := [bucket for i, bucket in enumerate(buckets) if bucket in buckets[:i]]:
        raise ValueError(f"data.buckets has {name(twice[0])} twice: give each size once")


class Assignment(NamedTuple):
    """The bucket of each sample of a data set."""

    bucket_N: Tensor
    """int64 index of the bucket, -1 for none."""
    reason_N: Tensor
    """int64 index into REASONS; 0 where there is a bucket."""


def assign(sizes_N3: Tensor, buckets: list[Bucket], interval: int = 1) -> Assignment:
    """Chooses a bucket for each sample from its frames, height and width (int64; 0, 0, 0 where it cannot be read).

    A bucket of T frames, every ``interval``-th of a clip, needs (T - 1) * interval + 1. Of the buckets that a sample
    is long enough for it takes those of most frames; of these the ones near the closest in aspect ratio (NEAR); of
    these the largest that it covers without being enlarged, or the smallest where it covers none. Where this leaves
    several, it takes the closest in aspect ratio, then the first.
    """
    if not buckets:
        raise ValueError("data.buckets is empty: give sizes such as 256x384 or 16x256x256")
    check_distinct(buckets)
    assert interval >= 1, interval
    buckets_B3 = torch.tensor(buckets, dtype=torch.int64)
    chosen = [_assign(rows, buckets_B3, interval) for rows in sizes_N3.split(ROWS)]
    return Assignment(torch.cat([c.bucket_N for c in chosen]), torch.cat([c.reason_N for c in chosen]))


def _assign(sizes_N3: Tensor, buckets_B3: Tensor, interval: int) -> Assignment:
    T_N1, H_N1, W_N1 = sizes_N3[..., None].unbind(1)
    T_B, H_B, W_B = buckets_B3.unbind(1)
    readable_N = (sizes_N3 > 0).all(1)
    long_enough_NB = readable_N[:, None] & (T_N1 >= (T_B - 1) * interval + 1)
    most_N1 = torch.where(long_enough_NB, T_B, 0).amax(1, keepdim=True)
    possible_NB = long_enough_NB & (T_B == most_N1)
    # How far apart two aspect ratios are, as their quotient: what equals in exact arithmetic equals here.
    a_NB, b_NB = H_N1 * W_B, W_N1 * H_B
    apart_NB = torch.maximum(a_NB, b_NB).double() / torch.minimum(a_NB, b_NB).clamp_min(1)
    apart_NB = torch.where(possible_NB, apart_NB, torch.inf)
    near_NB = possible_NB & (apart_NB <= apart_NB.amin(1, keepdim=True) * NEAR)
    covered_NB = near_NB & (H_B <= H_N1) & (W_B <= W_N1)
    any_N1 = covered_NB.any(1, keepdim=True)
    size_B = (H_B * W_B).double()
    cost_NB = torch.where(torch.where(any_N1, covered_NB, near_NB), torch.where(any_N1, -size_B, size_B), torch.inf)
    apart_NB = torch.where(cost_NB == cost_NB.amin(1, keepdim=True), apart_NB, torch.inf)
    reason_N = torch.where(T_N1[:, 0] == 1, PICTURE, TOO_SHORT)
    reason_N = torch.where(readable_N, torch.where(possible_NB.any(1), SERVED, reason_N), UNREADABLE)
    return Assignment(torch.where(reason_N == SERVED, apart_NB.argmin(1), -1), reason_N)


def members(assignment: Assignment, ids: Tensor, num: int) -> list[Tensor]:
    """The sample ids of each of ``num`` buckets among ``ids``, in the order they have there."""
    return [ids[assignment.bucket_N[ids] == b] for b in range(num)]


class Schedule:
    """Which samples each step trains on; a bucket without samples has no steps.

    Args:
        ids: int64 sample ids to train on, a tensor a bucket; no id twice.
    """

    def __init__(self, ids: list[Tensor], key: random.Key, global_batch: int):
        if global_batch < 1:
            raise ValueError(f"global_batch is {global_batch}: use 1 or more")
        num = sum(map(len, ids))
        if num == 0:
            raise DataError("data.buckets leave no sample to train on: give sizes that the data can fill")
        assert len(torch.cat(ids).unique()) == num, "a sample is in one bucket"
        self.ids, self.key, self.global_batch = ids, key, global_batch
        self.steps = [max(1, round(len(i) / global_batch)) if len(i) else 0 for i in ids]
        """Steps of each bucket in a cycle."""
        self.ends = list(accumulate(self.steps))
        """Bucket b holds the slots ends[b] - steps[b], ..., ends[b] - 1 of a cycle."""
        self.cycle = self.ends[-1]
        """Steps in a cycle."""

    def batch(self, step: int, part: tuple[int, int] = (0, 1)) -> tuple[int, Tensor]:
        """The bucket and draw ids (B,) of one step; arguments as ``order``."""
        return next(self.order(step, step + 1, part))

    def order(self, start: int, stop: int, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, Tensor]]:
        """Yields the bucket and draw ids (B,) of steps start, ..., stop - 1.

        Args:
            part: (rank, num): yields the rank-th of num equal contiguous shares of each global batch.
        """
        rank, num = part
        if self.global_batch % num:
            raise ValueError(f"a global batch of {self.global_batch} cannot be cut into {num} equal parts")
        assert 0 <= rank < num and 0 <= start, (part, start)
        return self._order(start, stop, rank, self.global_batch // num)

    def _order(self, start: int, stop: int, rank: int, share: int) -> Iterator[tuple[int, Tensor]]:
        stride = max(1, loader.ORDER_CHUNK // share)
        for first in range(start, stop, stride):
            bucket_S, batch_S = self._places(torch.arange(first, min(first + stride, stop)))
            positions_SB = batch_S[:, None] * self.global_batch + rank * share + torch.arange(share)
            draws_SB = torch.empty_like(positions_SB)
            for b in bucket_S.unique().tolist():
                key = random.fold_in(self.key, "bucket", b)
                draws_SB[bucket_S == b] = loader.draw_ids(self.ids[b], key, positions_SB[bucket_S == b])
            yield from zip(bucket_S.tolist(), draws_SB)

    def _places(self, steps_S: Tensor) -> tuple[Tensor, Tensor]:
        """The bucket of each step and which batch of it this is; slots are drawn as samples are, cycle after cycle."""
        draws_S = loader.draw_ids(torch.arange(self.cycle), random.fold_in(self.key, "slots"), steps_S)
        cycle_S, slot_S = draws_S >> 32, sample_ids(draws_S)
        ends, steps = torch.tensor(self.ends), torch.tensor(self.steps)
        bucket_S = torch.searchsorted(ends, slot_S, right=True)
        return bucket_S, (cycle_S + 1) * steps[bucket_S] + slot_S - ends[bucket_S]


@runtime_checkable
class Sized(Dataset, Protocol):
    """A data set that knows its samples' sizes before it reads them, and reads them at any."""

    def sizes(self) -> Tensor:
        """Int64 (N, 3) of frames, height and width, zeros for what cannot be read."""
        ...

    def at(self, size: tuple[int, ...]) -> Dataset:
        """The same samples at another size, (H, W) or (T, H, W)."""
        ...


class Bucketed:
    """A data set in buckets: ``parts`` are its views, a bucket each, with that bucket's ids and shape.

    ``shape`` is that of the first bucket. Samples without a bucket are in neither ``train_ids`` nor ``held_out_ids``.
    """

    def __init__(self, dataset: Sized, buckets: list[Bucket], interval: int = 1, bad_budget: float = 0.01):
        """Looks at every sample's header; raises DataError where more cannot be read than ``bad_budget`` allows."""
        self.buckets, self.num = buckets, [len(dataset.train_ids), len(dataset.held_out_ids)]
        self.assignment = assign(dataset.sizes(), buckets, interval)
        self.bad = _unreadable(dataset, self.assignment, bad_budget)
        self.train_ids, self.held_out_ids = (
            ids[self.assignment.bucket_N[ids] >= 0] for ids in (dataset.train_ids, dataset.held_out_ids)
        )
        self.parts = [dataset.at(size) for size in sizes(buckets)]
        for b, part in enumerate(self.parts):
            part.train_ids = members(self.assignment, self.train_ids, len(buckets))[b]
            part.held_out_ids = members(self.assignment, self.held_out_ids, len(buckets))[b]
        self.shape = self.parts[0].shape
        self.num_classes, self.class_names = dataset.num_classes, dataset.class_names

    def schedule(self, key: random.Key, global_batch: int) -> Schedule:
        """What a run with this key trains on."""
        return Schedule([part.train_ids for part in self.parts], key, global_batch)

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, Any]:
        """Reads samples of one bucket by draw id; raises BadSample for the first that cannot be read."""
        (b,) = self.assignment.bucket_N[sample_ids(ids)].unique().tolist()
        return self.parts[b].read(ids, key)

    def fingerprint(self) -> str:
        """Hashes what the samples are and which bucket each is in; tells the buckets."""
        digest = hashlib.blake2b(self.parts[0].fingerprint().encode(), digest_size=16)
        digest.update(self.assignment.bucket_N.numpy().tobytes())
        return f"{digest.hexdigest()} in {' '.join(map(name, self.buckets))}"

    def describe(self, global_batch: int, tokens: Callable[[Bucket], int] | None = None) -> list[str]:
        """The plan in words, as the function of this name, some files that cannot be read, and a line on validation."""
        lines = describe(self.buckets, self.assignment, self.schedule(READ_KEY, global_batch), tokens)
        lines += [f"skipped {path}: {reason}" for path, reason in self.bad.items()]
        if not self.num[1]:
            return lines
        left_out = self.num[1] - len(self.held_out_ids)
        told = f"; {_count(left_out, 'held-out sample')} without a bucket left out" if left_out else ""
        return [*lines, f"validation: {_count(len(self.held_out_ids), 'sample')}, bucket by bucket{told}"]


def _unreadable(dataset: Sized, assignment: Assignment, bad_budget: float) -> dict[str, str]:
    """{path: reason} of the first ``NAMED`` samples that cannot be read; raises DataError, with all of them, where they
    are more than ``bad_budget`` allows, as the loader does of those that it has read."""
    ids = torch.nonzero(assignment.reason_N == UNREADABLE).flatten().tolist()
    too_many = loader.over_budget(len(ids), len(assignment.reason_N), bad_budget)
    bad = {}
    for i in ids if too_many else ids[:NAMED]:
        try:
            dataset.read([i])
        except BadSample as error:
            bad[error.path] = error.reason
    if too_many:
        raise DataError(loader.list_bad(bad, len(assignment.reason_N), bad_budget))
    return bad


def describe(
    buckets: list[Bucket],
    assignment: Assignment,
    schedule: Schedule,
    tokens: Callable[[Bucket], int] | None = None,
) -> list[str]:
    """The plan in words: a line a bucket, and one of what is dropped and why.

    Args:
        tokens: tokens of a sample of a bucket, to be told too.
    """
    lines = []
    for bucket, ids, steps in zip(buckets, schedule.ids, schedule.steps, strict=True):
        length = f" of {tokens(bucket):,} tokens" if tokens else ""
        line = f"bucket {name(bucket)}: {_count(len(ids), 'sample')}{length}"
        if steps:
            share, times = steps / schedule.cycle, steps * schedule.global_batch / len(ids)
            line += f", {steps:,} of {_count(schedule.cycle, 'step')} a cycle ({share:.1%}), {times:.3g} epochs a cycle"
        lines.append(line if steps else f"{line}, left out")
    return [*lines, _dropped(assignment)]


def _dropped(assignment: Assignment) -> str:
    counts = torch.bincount(assignment.reason_N, minlength=len(REASONS)).tolist()
    num, dropped = sum(counts), sum(counts[1:])
    why = ", ".join(f"{count:,} {reason}" for count, reason in zip(counts[1:], REASONS[1:]) if count)
    return (
        f"dropped {dropped:,} of {_count(num, 'sample')}: {why}"
        if dropped
        else f"dropped none of {_count(num, 'sample')}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)
