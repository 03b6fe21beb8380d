"""A time x space Diffusion Transformer after Latte (Ma et al. 2024): blocks attend within a frame, then along time.

``blocks`` is a list of pairs {"space": ..., "time": ...} of DiT's adaLN-Zero block. Letters: B samples, C channels,
T frames, S tokens a frame, D width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from odit import nn
from odit.models import dit
from odit.ops import Ops, linear


def declare(cfg: dit.Config, shape: dit.Shape) -> dict:
    """Declares every parameter; depth counts blocks, half of them over space and half over time."""
    assert cfg.depth % 2 == 0, f"depth {cfg.depth}: one over time follows each over space"
    pairs = [{"space": dit.declare_block(cfg), "time": dit.declare_block(cfg)} for _ in range(cfg.depth // 2)]
    return dit.around(cfg, shape, pairs)


def forward(
    params: dict, x_BCTHW: Tensor, t_B: Tensor, y_B: Tensor | None, cfg: dit.Config, ops: Ops = Ops()
) -> Tensor:
    """Maps noisy clips, times and labels to (B, outputs * C, T, height, width)."""
    B, _, T, height, width = x_BCTHW.shape
    dtype = params["patch"]["w"].dtype
    frames = x_BCTHW.to(dtype).transpose(1, 2).flatten(0, 1)
    x_BTSD = linear(nn.patchify(frames, cfg.patch), params["patch"]).unflatten(0, (B, T))
    space_SD = nn.sincos_2d(height // cfg.patch, width // cfg.patch, cfg.width).to(x_BTSD)
    x_BTSD = x_BTSD + space_SD + nn.sincos_1d(torch.arange(T), cfg.width).to(x_BTSD)[:, None]

    c_BD = nn.embed_timestep(t_B, params["time"], cfg.timestep_freqs)
    if "label" in params:
        c_BD = c_BD + nn.embed_label(y_B, params["label"]["w"])

    x, _ = ops.enter(x_BTSD)
    x = ops.layers(make_pair(cfg, ops), params["blocks"], x, c_BD)
    shift, scale = nn.adaln(c_BD, params["final"]["adaln"], 2)
    h = ops.modulate(x.flatten(1, 2), shift, scale).unflatten(1, x.shape[1:3])
    out = ops.leave(linear(h, params["final"]["out"]))
    return nn.unpatchify(out.flatten(0, 1), cfg.patch, height, width).unflatten(0, (B, T)).transpose(1, 2)


def make_pair(cfg: dit.Config, ops: Ops):
    """One block over space and one over time as a function ``(p, x_BTSD, c_BD) -> x_BTSD``."""
    return _make_pair(cfg, dit.make_block(cfg, ops), ops.switch)


@functools.lru_cache(maxsize=64)
def _make_pair(cfg: dit.Config, block, switch):
    def pair(p: dict, x: Tensor, c_BD: Tensor) -> Tensor:
        x = rows(p["space"], x, c_BD)
        x = switch(x, "time").transpose(1, 2)
        x = rows(p["time"], x, c_BD)
        return switch(x.transpose(1, 2), "space")

    def rows(p: dict, x: Tensor, c_BD: Tensor) -> Tensor:
        """Attends within dim 2, each index of dim 1 for itself."""
        return block(p, x.flatten(0, 1), c_BD.repeat_interleave(x.shape[1], 0), ()).unflatten(0, x.shape[:2])

    return pair
