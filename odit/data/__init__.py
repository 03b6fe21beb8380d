"""Datasets as numbered samples, and an order of them that is a function of (key, epoch, index)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from odit.data import buckets
from odit.data.dataset import BadSample, Batch, DataError, Dataset

__all__ = ["BadSample", "Batch", "Config", "DataError", "Dataset", "check", "expected", "has_captions", "open_dataset"]

Source = Literal["digits", "digits-text", "moving-digits", "folder", "table", "tars", "latents", "synthetic"]


@dataclass(frozen=True)
class Config:
    """Where pictures, clips and what is said of them come from."""

    source: Source = "digits"
    """digits, digits-text, moving-digits: scikit-learn's digits, with classes, with captions, as clips with captions;
    folder: pictures, a sub-folder a class; table: CSV, JSONL, parquet or Hugging Face rows of path and caption; tars:
    webdataset shards; latents: what experiments/encode.py made of one of these; synthetic: random latents to measure
    speed with."""
    path: Path | None = None
    """Folder of pictures (a sub-folder a class, or flat for no classes), table, shards such as 'a/{00..09}.tar', or
    folder of latents."""
    image_size: int | None = None
    """Height, and width unless that is given; 32 for synthetic latents and 16 for moving-digits unless given."""
    image_width: int | None = None
    """Width, where pictures are not square."""
    frames: int | None = None
    """Frames of a clip; pictures unless given. 16 for moving-digits unless given."""
    buckets: tuple[str, ...] = ()
    """Mixed sizes, such as 256x256 256x384 or 16x256x256 1x256x384, instead of image_size and frames: a batch is of one
    of them. Samples are drawn of the first (folder, table, tars)."""
    interval: int = 1
    """Frames of the film from one frame of a clip to the next (table, tars)."""
    caption: str | None = None
    """Column of a table's captions: 'caption' unless given."""
    label: str | None = None
    """Column of classes in a table, 'cls' in tars, to train with these instead of captions."""
    channels: int | None = None
    """Channels of a latent, 4 unless given (synthetic only)."""
    num_classes: int | None = None
    """Number of classes, 1000 unless given, 0 for none (synthetic only)."""
    flip: bool = False
    """Mirrors half of the samples, left to right; latents only where both images were encoded."""
    held_out: float = 0.1
    """Fraction of the samples kept for validation."""
    workers: int = 0
    """Processes that decode ahead; 0 decodes in the training process."""
    bad_budget: float = 0.01
    """Fraction of the samples read that may be bad before the run stops; 10 bad samples are always allowed."""


DIGITS = ("digits", "digits-text", "moving-digits")
SIZED = ["path", "image_size", "image_width", "buckets"]
USED = {
    "digits": ["image_size"],
    "digits-text": ["image_size"],
    "moving-digits": ["image_size", "frames"],
    "folder": SIZED,
    "table": [*SIZED, "frames", "interval", "caption", "label"],
    "tars": [*SIZED, "frames", "interval", "label"],
    "latents": ["path"],
    "synthetic": ["image_size", "image_width", "frames", "channels", "num_classes"],
}


def check(cfg: Config) -> None:
    """Refuses settings no run can use, without looking at the data; raises ValueError with key, value and a fix."""
    if cfg.source not in get_args(Source):
        raise ValueError(f"data.source is {cfg.source!r}: use one of {', '.join(get_args(Source))}")
    for name in (*SIZED, "frames", "interval", "caption", "label", "channels", "num_classes"):
        value = getattr(cfg, name)
        if value != getattr(Config, name) and name not in USED[cfg.source]:
            value = " ".join(value) if isinstance(value, tuple) else value
            value = repr(str(value)) if isinstance(value, (Path, str)) else value
            where = " or ".join(source for source in USED if name in USED[source])
            raise ValueError(
                f"data.{name} is {value}, which data.source {cfg.source} has no use for: leave it out or use {where}"
            )
    _check_digits(cfg)
    if cfg.buckets:
        _check_buckets(cfg)
    clips = cfg.frames is not None or any(frames > 1 for frames, *_ in map(buckets.parse, cfg.buckets))
    if cfg.interval > 1 and not clips:
        raise ValueError(
            f"data.interval is {cfg.interval} but the data has pictures: give --data.frames, or leave it out"
        )
    if "path" in USED[cfg.source]:
        what = {
            "folder": "folder of pictures",
            "table": "table's file",
            "tars": "shards",
            "latents": "folder that experiments/encode.py wrote",
        }[cfg.source]
        if cfg.path is None:
            raise ValueError(f"data.path is not given but data.source is {cfg.source}: give the {what}")
        if cfg.image_size is None and "image_size" in USED[cfg.source] and not cfg.buckets:
            raise ValueError(
                f"data.image_size is not given but data.source is {cfg.source}: give a side in pixels such as 256"
            )
    for name in ("image_size", "image_width", "frames", "interval", "channels", "num_classes", "workers"):
        bound = 0 if name in ("num_classes", "workers") else 1
        value = getattr(cfg, name)
        if value is not None and value < bound:
            raise ValueError(f"data.{name} is {value}: use {bound} or more")
    if cfg.source == "tars" and cfg.label not in (None, "cls"):
        raise ValueError(f"data.label is {cfg.label!r} but tars hold classes in key.cls: use --data.label cls")
    if cfg.caption is not None and cfg.label is not None:
        raise ValueError(
            f"data.caption is {cfg.caption!r} and data.label is {cfg.label!r}: "
            "a model has captions or classes, give one"
        )
    if not (math.isfinite(cfg.held_out) and 0 <= cfg.held_out < 1):
        raise ValueError(f"data.held_out is {cfg.held_out}: use a fraction in [0, 1) such as 0.1")
    if not (math.isfinite(cfg.bad_budget) and 0 <= cfg.bad_budget <= 1):
        raise ValueError(f"data.bad_budget is {cfg.bad_budget}: use a fraction in [0, 1] such as 0.01")


def _check_buckets(cfg: Config) -> None:
    found = [buckets.parse(text) for text in cfg.buckets]
    buckets.check_distinct(found)
    for name in ("image_size", "image_width", "frames"):
        if (value := getattr(cfg, name)) is not None:
            raise ValueError(
                f"data.{name} is {value} but data.buckets give the sizes: use --data.{name.replace('_', '-')} None"
            )
    for bucket in found:
        if bucket[0] > 1 and cfg.source == "folder":
            raise ValueError(
                f"data.buckets has {buckets.name(bucket)} but data.source folder has pictures, of one frame: "
                "use height x width, or data.source table or tars"
            )


def bucket_sizes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Sizes of samples by the names of their buckets: (H, W), or (T, H, W) of all where one has several frames."""
    found = [buckets.parse(text) for text in cfg.buckets]
    return dict(zip(map(buckets.name, found), buckets.sizes(found)))


def _check_digits(cfg: Config) -> None:
    if cfg.source in ("digits", "digits-text") and cfg.image_size not in (None, 8):
        raise ValueError(f"data.image_size is {cfg.image_size} but digits are 8 x 8: leave it out")
    if cfg.source == "moving-digits" and (cfg.image_size or 16) < 16:
        raise ValueError(f"data.image_size is {cfg.image_size}, where a digit of 8 x 8 has no room: use 16 or more")
    if cfg.source == "moving-digits" and (cfg.frames or 16) < 2:
        raise ValueError(f"data.frames is {cfg.frames}, in which nothing moves: use 2 or more")
    if cfg.source in DIGITS and cfg.flip:
        raise ValueError(
            f"data.flip is on but a mirrored digit is no digit: use --data.no-flip with data.source {cfg.source}"
        )


def has_captions(cfg: Config) -> bool:
    """Whether samples come with captions; looks into the index of latents."""
    if cfg.source == "latents":
        from odit.data import latents

        assert cfg.path is not None
        return latents.text_size(latents.read_index(cfg.path))[0] > 0
    return cfg.source in ("digits-text", "moving-digits") or (cfg.source in ("table", "tars") and cfg.label is None)


def expected(cfg: Config) -> tuple[int, tuple[int, ...], int]:
    """(channels, size, classes) as far as the settings tell them: a folder's classes are not known yet, hence 0."""
    assert cfg.source != "latents", "their index tells"
    if cfg.source in ("digits", "digits-text"):
        return 1, (8, 8), 10 if cfg.source == "digits" else 0
    default = {"moving-digits": 16, "synthetic": 32}.get(cfg.source, 0)
    frames = 16 if cfg.source == "moving-digits" and cfg.frames is None else cfg.frames
    height = cfg.image_size or default
    size = (*([frames] if frames else []), height, cfg.image_width or height)
    if cfg.buckets:
        size = next(iter(bucket_sizes(cfg).values()))
    if cfg.source == "moving-digits":
        return 1, size, 0
    if cfg.source == "synthetic":
        return cfg.channels or 4, size, 1000 if cfg.num_classes is None else cfg.num_classes
    return 3, size, 0


def open_dataset(cfg: Config, tokenize: Callable[[list[str]], dict[str, Any]] | None = None) -> Dataset:
    """Opens the dataset that ``cfg`` names; raises ValueError as ``check``, DataError where there is nothing to read.

    Args:
        tokenize: turns captions into tensors with B first; for data that has some (latents have theirs encoded).
    """
    check(cfg)
    dataset = _open(cfg, tokenize)
    if not cfg.buckets:
        return dataset
    assert isinstance(dataset, buckets.Sized)  # check saw to it
    return buckets.Bucketed(dataset, list(map(buckets.parse, cfg.buckets)), cfg.interval, cfg.bad_budget)


def _open(cfg: Config, tokenize: Callable[[list[str]], dict[str, Any]] | None) -> Dataset:
    if cfg.source == "latents":
        from odit.data.latents import Latents

        assert cfg.path is not None  # check saw to it
        return Latents(cfg.path, cfg.held_out, cfg.flip)
    assert (tokenize is not None) == has_captions(cfg), "captions and what reads them come together"
    channels, size, num_classes = expected(cfg)
    if cfg.source == "digits":
        from odit.data.digits import Digits

        return Digits(cfg.held_out)
    if cfg.source == "digits-text":
        from odit.data.captioned import DigitsText

        return DigitsText(cfg.held_out, tokenize)
    if cfg.source == "moving-digits":
        from odit.data.moving import MovingDigits

        return MovingDigits(cfg.held_out, tokenize, *size[:2])
    if cfg.source == "folder":
        from odit.data.folder import Folder

        assert cfg.path is not None  # check saw to it
        return Folder(cfg.path, size, cfg.held_out)
    if cfg.source == "table":
        from odit.data.table import Table

        columns = {"caption_column": cfg.caption or "caption", "label_column": cfg.label or "label"}
        return _labelled(cfg, Table(str(cfg.path), size, cfg.held_out, tokenize, interval=cfg.interval, **columns))
    if cfg.source == "tars":
        from odit.data.tars import Tars

        return _labelled(cfg, Tars(str(cfg.path), size, cfg.held_out, tokenize, interval=cfg.interval))
    from odit.data.synthetic import Synthetic

    return Synthetic((channels, *size), num_classes, cfg.held_out)


def _labelled(cfg: Config, dataset: Dataset) -> Dataset:
    """The dataset, which has classes where they were asked for; raises DataError."""
    if cfg.label is not None and not dataset.num_classes:
        raise DataError(f"data.label is {cfg.label!r} but {str(cfg.path)!r} holds no classes under that name")
    return dataset
