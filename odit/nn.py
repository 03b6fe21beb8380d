"""Small pure functions that models share: patches, positions, embeddings of times and labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from odit.ops import at_least_fp32, linear


def patchify(x: Tensor, patch: int, frame_patch: int = 1) -> Tensor:
    """Cuts pictures (B, C, H, W) or clips (B, C, T, H, W) into tokens (B, L, C * P): frames first, then rows; channels
    slowest within a token."""
    if x.ndim == 4:
        B, C, H, W = x.shape
        x = x.reshape(B, C, H // patch, patch, W // patch, patch)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // patch) * (W // patch), C * patch * patch)
    B, C, T, H, W = x.shape
    x = x.reshape(B, C, T // frame_patch, frame_patch, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, -1, C * frame_patch * patch * patch)


def unpatchify(x_BLP: Tensor, size: tuple[int, ...], patch: int, frame_patch: int = 1) -> Tensor:
    """Lays tokens, channels fastest within one as in DiT, out as pictures or clips (B, C, *size)."""
    B, _, values = x_BLP.shape
    *frames, H, W = size
    if not frames:
        x = x_BLP.reshape(B, H // patch, W // patch, patch, patch, values // patch**2)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)
    T, C = frames[0], values // (frame_patch * patch**2)
    x = x_BLP.reshape(B, T // frame_patch, H // patch, W // patch, frame_patch, patch, patch, C)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(B, C, T, H, W)


def sincos_1d(position_L: Tensor, dim: int) -> Tensor:
    """Sine and cosine of position * 10000^(-i / (dim/2)), i < dim/2: (L, dim) fp64 (Vaswani et al. 2017)."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = position_L.double()[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), -1)


def sincos_2d(rows: int, columns: int, dim: int) -> Tensor:
    """Fixed position table (rows * columns, dim) fp64: the first half of dim codes the column, the second the row.

    The order is that of MAE and DiT, whose grid puts the width first.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat((sincos_1d(column.flatten(), dim // 2), sincos_1d(row.flatten(), dim // 2)), -1)


def rotary_2d(rows: int, columns: int, head_size: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """cos and sin (rows * columns, head_size / 2) fp64 for 2-D rotary positions: half the pairs turn with the row, half
    with the column (axial RoPE; base 100 as in Heo et al. 2024, "Rotary Position Embedding for Vision Transformer")."""
    quarter = head_size // 4
    frequency = base ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angle = torch.cat([p.flatten().double()[:, None] * frequency for p in (row, column)], -1)
    return angle.cos(), angle.sin()


def rotary_3d(frames: int, rows: int, columns: int, head_size: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """cos and sin (frames * rows * columns, head_size / 2) fp64: 3/8 of the pairs turn with the row, as many with the
    column and the rest with the frame (the parts of CogVideoX, Yang et al. 2024)."""
    pairs = head_size // 2
    in_space = max(1, 3 * pairs // 8)
    grid = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
    parts = [
        position.flatten().double()[:, None] * base ** (-torch.arange(num, dtype=torch.float64) / num)
        for position, num in zip(grid, (pairs - 2 * in_space, in_space, in_space))
    ]
    angle = torch.cat(parts, -1)
    return angle.cos(), angle.sin()


def kept(make: Callable) -> Callable:
    """``make(*args)``, made once. Inference mode, fake tensors and torch.func's levels mark every tensor made under
    them, and such a tensor may not outlive them in a cache; a new thread has none of them."""

    @functools.cache  # for good: graphs read what is in it
    def once(*args: Any) -> Any:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make, *args).result()

    @functools.wraps(make)
    def run(*args: Any) -> Any:
        return (make if torch.compiler.is_compiling() else once)(*args)

    run.once = once  # type: ignore
    return run


def timestep_features(t_B: Tensor, dim: int, freqs: Literal["dit", "diffusers"] = "dit") -> Tensor:
    """cos and sin of t * 10000^(-i / n), i < dim/2, as (B, dim) in at least fp32; n is dim/2 in DiT, dim/2 - 1 in
    diffusers' port."""
    half = dim // 2
    t = at_least_fp32(t_B) if t_B.is_floating_point() else t_B.float()
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) / (half if freqs == "dit" else half - 1)
    frequency = torch.exp(-math.log(10000.0) * exponent).to(t)
    angle = t[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


def embed_timestep(t_B: Tensor, p: dict, freqs: Literal["dit", "diffusers"] = "dit") -> Tensor:
    """fc2(silu(fc1(features))): (B, D); features are computed in at least fp32 and cast to the weights' dtype."""
    w = p["fc1"]["w"]
    features = timestep_features(t_B, w.shape[1], freqs).to(w.dtype)
    return linear(torch.nn.functional.silu(linear(features, p["fc1"])), p["fc2"])


def embed_label(y_B: Tensor, table_VD: Tensor) -> Tensor:
    """Looks labels up: (B, D)."""
    return torch.nn.functional.embedding(y_B, table_VD)


def adaln(c_BD: Tensor, p: dict[str, Tensor], chunks: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates (B, D) each, regressed from silu(c) (DiT, section 3.2)."""
    return linear(torch.nn.functional.silu(c_BD), p).chunk(chunks, -1)


def project(x: Tensor, p: dict) -> Tensor:
    """fc2(gelu(fc1 x)) with tanh-GELU: a caption's features on their way to the model's width (PixArt-alpha)."""
    return linear(torch.nn.functional.gelu(linear(x, p["fc1"]), approximate="tanh"), p["fc2"])


def layer_norm(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """LayerNorm with weight and bias, statistics in at least fp32."""
    y = torch.nn.functional.layer_norm(at_least_fp32(x), x.shape[-1:])
    return y.to(x.dtype) * p["w"] + p["b"]
