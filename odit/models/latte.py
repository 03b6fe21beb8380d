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
    x = ops.layers(make_pair(cfg, ops), blocks, x, c, (time_TD,), *caption)
    h = dit.final(params["final"], x.flatten(1, 2), c_BD, ops).unflatten(1, x.shape[1:3])
    return nn.unpatchify(ops.leave(h).flatten(1, 2), size, cfg.patch, cfg.frame_patch)


@nn.kept
def _frames_table(frames: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return nn.sincos_1d(torch.arange(frames), width).to(device, dtype)


def make_pair(cfg: Config, ops: Ops) -> Callable:
    """A block over space and one over time as ``(p, x_BTSD, c, (time_TD,), *caption) -> x_BTSD``."""
    return _make_pair(cfg, replace(ops, layers=layers))


@functools.lru_cache(maxsize=64)
def _make_pair(cfg: Config, ops: Ops) -> Callable:
    def pair(p: dict, x: Tensor, c: Tensor, tables: tuple[Tensor], *caption: Tensor) -> Tensor:
        x = over_rows(p["space"], x, c, *caption)
        x = ops.turn(ops.switch(x, "time"))
        if "first" in p:
            x = x + tables[0]
        x = over_rows(p["time"], x, c)
        return ops.switch(ops.turn(x), "space")

    def over_rows(p: dict, x: Tensor, c: Tensor, *caption: Tensor) -> Tensor:
        """DiT's block, whose tokens attend within dim 2, each index of dim 1 for itself."""
        rows = x.shape[1]

        def attend(*qkv: Tensor) -> Tensor:
            o = ops.attend(*(y.unflatten(1, (rows, -1)).flatten(0, 1) for y in qkv))
            return o.unflatten(0, (-1, rows)).flatten(1, 2)

        y = dit.run_block(cfg, ops, attend, p, x.flatten(1, 2), c, (), *caption)
        return y.unflatten(1, x.shape[1:3])

    return pair


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
