"""Shapes of the transformers in this package: what a person chooses (Config) and what the data decides (Shape)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from odit.ops import EPS

Size = tuple[int, ...]
"""(height, width) of pictures, (frames, height, width) of clips."""


@dataclass(frozen=True)
class Config:
    """Shape of a model."""

    arch: Literal["dit", "latte"] = "dit"
    """dit attends over all tokens of a picture or clip; latte's blocks attend within a frame and along time in turn."""
    width: int = 384
    """Channels of a token (D)."""
    depth: int = 12
    """Transformer blocks; latte's are half over space, half over time."""
    heads: int = 6
    """Attention heads (H); they divide the width."""
    patch: int = 2
    """Side of a patch in pixels or latent pixels."""
    frame_patch: int = 1
    """Frames of a patch of a clip."""
    mlp_ratio: float = 4.0
    """Ffn width over width."""
    label_dropout: float = 0.1
    """Share of samples trained with the null label or the empty caption; 0 leaves no null label and so no guidance."""
    text: Literal["cross", "pooled"] = "cross"
    """How captions act: cross-attention to their tokens in each block, or one vector beside the time's."""
    text_depth: int = 2
    """Blocks of the byte-level text encoder, where that one is used; 0 leaves a bag of n-grams."""
    adaln: Literal["zero", "single"] = "zero"
    """Modulation regressed in each block (DiT), or once for all blocks plus each one's table (PixArt, diffusers)."""
    qk_norm: bool = False
    """RMS-normalises queries and keys a head."""
    positions: Literal["sincos", "rotary"] = "sincos"
    """Fixed sine-cosine tables added to the tokens (place and frame), or rotary positions in the attention."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward kind; swiglu has a third matrix and 2/3 of the ffn width, so that the count of parameters stays."""
    timestep_freqs: Literal["dit", "diffusers"] = "dit"
    """Frequencies of the timestep embedding; diffusers' port spaces them over half - 1 instead of half."""
    mlp_eps: float = EPS
    """LayerNorm epsilon before the mlp; diffusers' port defaults to 1e-5."""

    @property
    def head_size(self) -> int:
        """K."""
        return self.width // self.heads

    @property
    def ffn(self) -> int:
        """F: mlp_ratio * D, for swiglu two thirds of it rounded up to a multiple of 8."""
        full = int(self.width * self.mlp_ratio)
        return full if self.mlp == "gelu" else -(-2 * full // (3 * 8)) * 8

    def patch_values(self, size: Size) -> int:
        """Values of a patch and channel (P)."""
        return self.patch**2 * (self.frame_patch if len(size) == 3 else 1)

    def grid(self, size: Size) -> tuple[int, int, int]:
        """(T, rows, columns) of the tokens of a picture or clip."""
        *frames, height, width = size
        return frames[0] // self.frame_patch if frames else 1, height // self.patch, width // self.patch


@dataclass(frozen=True)
class Shape:
    """What a model is built around and its data decides."""

    channels: int
    size: Size
    """(height, width) or (frames, height, width); a number is the side of a square picture."""
    num_classes: int = 0
    """0 where samples have no class."""
    outputs: int = 1
    """Values out a channel: 1, or 2 where the variance is learned beside the target."""
    text_length: int = 0
    """Tokens of a caption (S); 0 where samples have none."""
    text_width: int = 0
    """Channels of a caption's tokens as a frozen encoder gives them (E); 0: bytes, which the model encodes itself."""

    def __post_init__(self):
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        object.__setattr__(self, "size", size)

    @property
    def sample(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) or (C, T, H, W)."""
        return (self.channels, *self.size)

    @property
    def conditional(self) -> bool:
        """Whether samples have a class or a caption."""
        return self.num_classes > 0 or self.text_length > 0


SIZES = {  # (depth, width, heads), table 1 of the DiT paper
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}


def sized(name: str, patch: int, **changes) -> Config:
    """The paper's DiT-S, B, L or XL: ``sized("xl", 2)`` is DiT-XL/2."""
    depth, width, heads = SIZES[name]
    return Config(width=width, depth=depth, heads=heads, patch=patch, **changes)


def check(cfg: Config, shape: Shape) -> None:
    """Refuses what cannot be built; raises ValueError with both numbers and a fix."""
    _check_numbers(cfg)
    _check_positions(cfg, shape)
    _check_patches(cfg, shape.size)
    if cfg.arch == "latte":
        _check_latte(cfg, shape.size)


def _check_numbers(cfg: Config) -> None:
    least = {"width": 1, "depth": 1, "heads": 1, "patch": 1, "frame_patch": 1, "text_depth": 0}
    for name, allowed in least.items():
        if getattr(cfg, name) < allowed:
            raise ValueError(f"model.{name} is {getattr(cfg, name)}: use {allowed} or more")
    if cfg.width % cfg.heads:
        fits = [h for h in range(1, 65) if cfg.width % h == 0]
        raise ValueError(f"model.heads {cfg.heads} does not divide model.width {cfg.width}: use one of {fits}")
    if not 0 <= cfg.label_dropout < 1:
        raise ValueError(f"model.label_dropout is {cfg.label_dropout}: use a number in [0, 1), such as 0.1")
    if not (math.isfinite(cfg.mlp_ratio) and cfg.mlp_ratio > 0) or cfg.ffn < 1:
        raise ValueError(f"model.mlp_ratio is {cfg.mlp_ratio}: use a positive number, such as 4")
    if not (math.isfinite(cfg.mlp_eps) and cfg.mlp_eps > 0):
        raise ValueError(f"model.mlp_eps is {cfg.mlp_eps}: use a positive number, such as 1e-6")


def _check_positions(cfg: Config, shape: Shape) -> None:
    if (cfg.positions == "sincos" or cfg.arch == "latte") and cfg.width % 4:
        raise ValueError(
            f"model.width {cfg.width} is no multiple of 4, which 2-D sine-cosine positions need: "
            f"use {-(-cfg.width // 4) * 4}"
        )
    clips = len(shape.size) == 3
    if cfg.positions == "rotary" and (cfg.head_size % (2 if clips else 4) or cfg.head_size < (6 if clips else 4)):
        needs = "an even head size of 6 or more" if clips else "a head size that 4 divides"
        raise ValueError(
            f"model.positions rotary needs {needs}, but width {cfg.width} over {cfg.heads} heads "
            f"is {cfg.head_size}: change model.heads, or use --model.positions sincos"
        )


def _check_patches(cfg: Config, size: Size) -> None:
    *frames, height, width = size
    for side in (height, width):
        if side % cfg.patch:
            fits = [p for p in range(1, side + 1) if height % p == 0 and width % p == 0]
            told = f"{side}" if height == width else f"{height} x {width}"
            raise ValueError(f"model.patch {cfg.patch} does not divide the picture size {told}: use one of {fits}")
    if frames and frames[0] % cfg.frame_patch:
        fits = [p for p in range(1, frames[0] + 1) if frames[0] % p == 0]
        raise ValueError(
            f"model.frame_patch {cfg.frame_patch} does not divide the {frames[0]} frames of a clip: use one of {fits}"
        )
    if not frames and cfg.frame_patch != 1:
        raise ValueError(f"model.frame_patch is {cfg.frame_patch} but the data has pictures, of one frame: use 1")


def _check_latte(cfg: Config, size: Size) -> None:
    if len(size) != 3:
        raise ValueError("model.arch is latte but the data has pictures, not clips: use --model.arch dit")
    if size[0] // cfg.frame_patch < 2:
        smaller = f"--model.frame-patch {size[0] // 2} or less, " if size[0] > 1 else ""
        raise ValueError(
            f"model.arch latte attends along time and {size[0]} frames in patches of {cfg.frame_patch} leave one: "
            f"use {smaller}more frames, or --model.arch dit"
        )
    if cfg.depth % 2:
        raise ValueError(
            f"model.depth {cfg.depth} is odd, but latte's blocks over space and over time come in pairs: "
            f"use {cfg.depth + 1}"
        )
    if cfg.positions != "sincos":
        raise ValueError(f"model.positions {cfg.positions} is not what latte has: use --model.positions sincos")
