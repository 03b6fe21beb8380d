"""Which encoders stand between data and model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Config:
    """Frozen encoders of captions and of pictures or clips; what is not given is done without."""

    text: Literal["bytes", "clip", "t5"] = "bytes"
    """bytes is read by a small encoder in the model, trained along with it; clip and t5 are frozen."""
    text_path: str | None = None
    """Folder or hub name of the text encoder (clip, t5)."""
    text_length: int = 64
    """Tokens of a caption; longer ones are cut."""
    vae: Literal["none", "kl", "cogvideox", "wan"] = "none"
    """Autoencoder in whose latents the model works: diffusers' AutoencoderKL (clips by frames), or a causal 3-D one."""
    vae_path: str | None = None
    """Folder or hub name of the autoencoder."""
    place: Literal["device", "host", "shard"] = "device"
    """Where frozen weights wait: on the device, in host memory, or a share on each rank; the last two fetch them for
    each use."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of frozen encoders; the run's own unless given."""


def check(cfg: Config) -> None:
    """Refuses settings that do not go together; raises ValueError."""
    for kind, path, none in (("text", cfg.text_path, "bytes"), ("vae", cfg.vae_path, "none")):
        chosen = getattr(cfg, kind)
        if chosen == none and path is not None:
            raise ValueError(
                f"encoders.{kind}_path is {path!r} but encoders.{kind} is {chosen}, which reads no file: leave it out, "
                f"or say which kind it is with --encoders.{kind}"
            )
        if chosen != none and path is None:
            raise ValueError(f"encoders.{kind} is {chosen} but encoders.{kind}_path is not given: give its folder")
    if not (math.isfinite(cfg.text_length) and cfg.text_length >= 2):
        raise ValueError(f"encoders.text_length is {cfg.text_length}: use 2 or more")
    if cfg.place != "device" and cfg.vae == "none" and cfg.text == "bytes":
        raise ValueError(f"encoders.place is {cfg.place} but nothing is frozen: use device, or give an encoder")
    if cfg.precision is not None and cfg.vae == "none" and cfg.text == "bytes":
        raise ValueError(f"encoders.precision is {cfg.precision} but nothing is frozen: leave it out")
