"""Latte (Ma et al. 2024, "Latent Diffusion Transformer for Video Generation"), variant 1: a time x space transformer.

Blocks attend within a frame and along time in turn: ``blocks`` is a list of pairs {"space": ..., "time": ...} of DiT's
block. Captions act in the blocks over space, frames' positions enter before the first block over time. With adaLN
``zero`` it is OpenDiT's Latte, with ``single`` that of diffusers. Letters as in dit.py; S tokens a frame.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from odit import nn
from odit.models import dit
from odit.models.config import Config, Shape, Size
from odit.models.dit import Unsummed
from odit.ops import Ops, layers, linear

joined = dit.joined  # of the two blocks of each pair


def declare(cfg: Config, shape: Shape) -> dict:
    """Declares every parameter, initialised as DiT's; depth counts blocks, half of them over space, half over time."""
    pairs = [
        {"space": dit.declare_block(cfg, dit.crosses(cfg, shape)), "time": dit.declare_block(cfg)}
        for _ in range(cfg.depth // 2)
    ]
    pairs[0]["first"] = {}  # has no leaves: it tells the pair where frames' positions enter
    return dit.around(cfg, shape, pairs)


def forward(params: dict, x_BCTHW: Tensor, t_B: Tensor, y: Any, cfg: Config, ops: Ops = Ops()) -> Tensor:
    """Maps noisy clips, times and conditions (see ``dit.forward``) to (B, outputs * C, T, H, W)."""
    size, dtype = tuple(x_BCTHW.shape[2:]), params["patch"]["w"].dtype
    frames, rows, columns = cfg.grid(size)
    x = linear(nn.patchify(x_BCTHW.to(dtype), cfg.patch, cfg.frame_patch), params["patch"])
    place_SD, _ = dit.positions(replace(cfg, positions="sincos"), size[1:], x.device, dtype)
    x_BTSD = x.unflatten(1, (frames, rows * columns)) + place_SD
    time_TD = _frames_table(frames, cfg.width, x.device, x.dtype)
    c_BD, caption = dit.condition(params, t_B, y, cfg)
    x, _ = ops.enter(x_BTSD)
    blocks, c = dit.for_blocks(params, c_BD)
    x = ops.layers(make_pair(cfg, ops, ops.sums), blocks, x, c, (time_TD,), *caption)
    h = dit.final(params["final"], dit.each(x, flat), c_BD, ops).unflatten(1, (-1, rows * columns))
    return nn.unpatchify(ops.leave(h).flatten(1, 2), size, cfg.patch, cfg.frame_patch)


def flat(x_BTSD: Tensor) -> Tensor:
    """(B, T S, D)."""
    return x_BTSD.flatten(1, 2)


@nn.kept
def _frames_table(frames: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return nn.sincos_1d(torch.arange(frames), width).to(device, dtype)


def make_pair(cfg: Config, ops: Ops, sums: bool = True) -> Callable:
    """A block over space and one over time as ``(p, x_BTSD, c, (time_TD,), *caption) -> x_BTSD``.

    Without ``sums`` it gives, and after the first one gets, an ``Unsummed``.
    """
    return _make_pair(cfg, replace(ops, layers=layers), sums)


@functools.lru_cache(maxsize=64)
def _make_pair(cfg: Config, ops: Ops, sums: bool) -> Callable:
    def pair(p: dict, x: Tensor | Unsummed, c: Tensor, tables: tuple[Tensor], *caption: Tensor) -> Tensor | Unsummed:
        x = ops.switch(block(p["space"], x, in_space, c, *caption), "time")
        x = plus(x, tables[0][:, None]) if "first" in p else x
        return ops.switch(block(p["time"], x, in_time, c), "space")

    def block(p: dict, x: Tensor | Unsummed, attend: Callable, c: Tensor, *caption: Tensor) -> Tensor | Unsummed:
        """DiT's block: (B, T, S, D) to (B, T, S, D), or an ``Unsummed`` of these to another."""
        frames = (x.x if isinstance(x, Unsummed) else x).shape[1]
        attend = functools.partial(attend, frames)
        y = dit.run_block(cfg, ops, attend, p, dit.each(x, flat), c, (), *caption, sums=sums)
        return dit.each(y, lambda z: z.unflatten(1, (frames, -1)))

    def in_space(frames: int, *qkv: Tensor) -> Tensor:
        """Attention within each frame; q, k, v are (B, T S, H, K), or one (B, T S, 3, H, K)."""
        o = ops.attend(*(y.unflatten(1, (frames, -1)).flatten(0, 1) for y in qkv))
        return o.unflatten(0, (-1, frames)).flatten(1, 2)

    def in_time(frames: int, *qkv: Tensor) -> Tensor:
        """Attention along time, each place for itself: samples along B and S, whose tokens lie a frame apart."""
        return ops.attend(*(y.unflatten(1, (frames, -1)).transpose(1, 2) for y in qkv)).transpose(1, 2).flatten(1, 2)

    return pair


def plus(x: Tensor | Unsummed, table: Tensor) -> Tensor | Unsummed:
    """Tokens (B, T, S, D), summed or not, and a table of positions (T, 1, D)."""
    return x._replace(x=x.x + table) if isinstance(x, Unsummed) else x + table


def time_space(cfg: Config, size: Size) -> int:
    """Frames that blocks over space keep apart (T)."""
    return cfg.grid(size)[0]


def macs(cfg: Config, shape: Shape) -> int:
    """Multiply-accumulates of one forward pass of one clip, as ``dit.macs``."""
    frames, rows, columns = cfg.grid(shape.size)
    L = frames * rows * columns
    space = dit.block_macs(cfg, shape, L, rows * columns, dit.crosses(cfg, shape))
    time = dit.block_macs(cfg, shape, L, frames, False)
    return cfg.depth // 2 * (space + time) + dit.macs_around(cfg, shape, L)
