"""Datasets as numbered samples, and an order of them that is a function of (key, epoch, index)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from odit.data.dataset import BadSample, Batch, DataError, Dataset

__all__ = ["BadSample", "Batch", "Config", "DataError", "Dataset", "check", "open_dataset"]

Source = Literal["digits", "folder", "synthetic"]


@dataclass(frozen=True)
class Config:
    """Where pictures come from."""

    source: Source = "digits"
    """scikit-learn's 8 x 8 digits, pictures under --data.path, or random latents to measure speed with."""
    path: Path | None = None
    """Folder of pictures, one sub-folder a class, or flat for no classes (folder only)."""
    image_size: int | None = None
    """Side of the square pictures: required for folder, 32 for synthetic latents unless given, always 8 for digits."""
    channels: int | None = None
    """Channels of a latent, 4 unless given (synthetic only)."""
    num_classes: int | None = None
    """Number of classes, 1000 unless given, 0 for none (synthetic only)."""
    flip: bool = False
    """Mirrors half of the samples, left to right."""
    held_out: float = 0.1
    """Fraction of the samples kept for validation."""
    workers: int = 0
    """Processes that decode ahead; 0 decodes in the training process."""
    bad_budget: float = 0.01
    """Fraction of the samples read that may be bad before the run stops; 10 bad samples are always allowed."""


def check(cfg: Config) -> None:
    """Refuses settings no run can use, without looking at the data; raises ValueError with key, value and a fix."""
    if cfg.source not in get_args(Source):
        raise ValueError(f"data.source is {cfg.source!r}: use one of {', '.join(get_args(Source))}")
    used = {
        "digits": ["image_size"],
        "folder": ["path", "image_size"],
        "synthetic": ["image_size", "channels", "num_classes"],
    }
    for name in ("path", "image_size", "channels", "num_classes"):
        value = getattr(cfg, name)
        if value is not None and name not in used[cfg.source]:
            value = repr(str(value)) if name == "path" else value
            where = " or ".join(source for source in used if name in used[source])
            raise ValueError(
                f"data.{name} is {value}, which data.source {cfg.source} has no use for: leave it out or use {where}"
            )
    if cfg.source == "digits" and cfg.image_size not in (None, 8):
        raise ValueError(f"data.image_size is {cfg.image_size} but digits are 8 x 8: leave it out")
    if cfg.source == "digits" and cfg.flip:
        raise ValueError("data.flip is on but a mirrored digit is no digit: use --data.no-flip with data.source digits")
    if cfg.source == "folder" and cfg.path is None:
        raise ValueError("data.path is not given but data.source is folder: give the folder of pictures")
    if cfg.source == "folder" and cfg.image_size is None:
        raise ValueError("data.image_size is not given but data.source is folder: give a side in pixels such as 256")
    for name, least in (("image_size", 1), ("channels", 1), ("num_classes", 0), ("workers", 0)):
        value = getattr(cfg, name)
        if value is not None and value < least:
            raise ValueError(f"data.{name} is {value}: use {least} or more")
    if not (math.isfinite(cfg.held_out) and 0 <= cfg.held_out < 1):
        raise ValueError(f"data.held_out is {cfg.held_out}: use a fraction in [0, 1) such as 0.1")
    if not (math.isfinite(cfg.bad_budget) and 0 <= cfg.bad_budget <= 1):
        raise ValueError(f"data.bad_budget is {cfg.bad_budget}: use a fraction in [0, 1] such as 0.01")


def open_dataset(cfg: Config) -> Dataset:
    """Opens the dataset that ``cfg`` names; raises ValueError as ``check``, DataError for a folder without pictures."""
    check(cfg)
    if cfg.source == "digits":
        from odit.data.digits import Digits

        return Digits(cfg.held_out)
    if cfg.source == "folder":
        from odit.data.folder import Folder

        assert cfg.path is not None and cfg.image_size is not None  # check saw to it
        return Folder(cfg.path, cfg.image_size, cfg.held_out)
    from odit.data.synthetic import Synthetic

    size = 32 if cfg.image_size is None else cfg.image_size
    shape = (4 if cfg.channels is None else cfg.channels, size, size)
    return Synthetic(shape, 1000 if cfg.num_classes is None else cfg.num_classes, cfg.held_out)
