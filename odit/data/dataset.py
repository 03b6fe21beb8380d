"""What a dataset is: shapes, ids, a split, and a way to read samples."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from odit import random, tree

# The split belongs to the data, not to a run: this key never changes.
SPLIT_KEY = random.fold_in(random.key(0), "odit.data split")
# What chance decides in reading where no run is: validation, and data sets looked at by themselves.
READ_KEY = random.fold_in(random.key(0), "odit.data read")


class DataError(ValueError):
    """The data as a whole cannot be used: nothing there, or too much of it is bad."""


class BadSample(Exception):
    """One sample cannot be used; the loader replaces it and counts it."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(str(path), reason)  # both in args, so that it survives pickling
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Batch(NamedTuple):
    """Samples with the ids that their random draws hang on."""

    ids_B: Tensor
    """int64 draw ids, epoch * 2**32 + sample id: unique in a run."""
    x: Tensor
    """fp32 pictures (B, C, H, W) or clips (B, C, T, H, W) in [-1, 1] (synthetic latents: standard normal)."""
    y: tree.Tree
    """int64 labels (B,) in [0, num_classes), all 0 where there are no classes; or captions, a dict of tensors."""


class Dataset(Protocol):
    """A finite set of samples, numbered from 0; picklable, so that worker processes can have it."""

    shape: tuple[int, ...]
    """(C, H, W) of a picture, (C, T, H, W) of a clip."""
    num_classes: int
    """0 where samples have no class."""
    class_names: list[str]
    """One name a class, in the order of the labels."""
    train_ids: Tensor
    """int64 sample ids to train on, ascending."""
    held_out_ids: Tensor
    """int64 sample ids kept for validation, ascending."""

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, tree.Tree]:
        """Reads samples by their draw ids, of which a sample's own id is that of epoch 0: x (B, *shape) fp32 and y.

        What chance decides, such as where in a film a clip starts, is a function of key and draw id. Raises BadSample
        for the first that cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """Hashes what the samples are, so that a resumed run can refuse other data."""
        ...


def sample_ids(ids: list[int] | Tensor) -> Tensor:
    """Recovers sample ids from draw ids."""
    return torch.as_tensor(ids, dtype=torch.int64) & random.MASK


def split(num: int, held_out: float) -> tuple[Tensor, Tensor]:
    """Splits the ids of ``num`` samples into (train, held out), a function of ``num`` and ``held_out`` alone."""
    num_held_out = round(num * held_out)
    if num_held_out == num:
        raise DataError(f"data.held_out {held_out} of {num} samples leaves none to train on: use a smaller fraction")
    chosen = torch.zeros(num, dtype=torch.bool)
    chosen[random.permutation(SPLIT_KEY, num, torch.arange(num_held_out))] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
