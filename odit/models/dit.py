"""The Diffusion Transformer with adaLN-Zero (Peebles and Xie 2023, "Scalable Diffusion Models with Transformers").

Defaults are exactly the paper's model and facebookresearch/DiT. Letters: B samples, C channels, L tokens, D width,
H heads, K head size, F ffn width, V classes, P values a patch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from odit import nn, param
from odit.ops import EPS, Ops, layers, linear
from odit.param import Param


@dataclass(frozen=True)
class Config:
    """Shape of a DiT."""

    width: int = 384
    """Channels of a token (D)."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 6
    """Attention heads (H); they divide the width."""
    patch: int = 2
    """Side of a patch in pixels or latent pixels."""
    mlp_ratio: float = 4.0
    """Ffn width over width."""
    label_dropout: float = 0.1
    """Share of samples trained with the null label; 0 leaves no null label and so no guidance."""
    qk_norm: bool = False
    """RMS-normalises queries and keys a head."""
    positions: Literal["sincos", "rotary"] = "sincos"
    """Fixed 2-D sine-cosine table added to the tokens, or 2-D rotary positions in the attention."""
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


@dataclass(frozen=True)
class Shape:
    """What a DiT is built around and its data decides: picture channels and side, values out a channel, classes."""

    channels: int
    size: int
    num_classes: int = 0
    """0 means unconditional."""
    outputs: int = 1
    """1, or 2 where the variance is learned beside the target."""


SIZES = {  # (depth, width, heads), table 1 of the paper
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}
FREQUENCIES = 256  # size of the sinusoidal timestep features


def sized(name: str, patch: int, **changes) -> Config:
    """The paper's DiT-S, B, L or XL: ``sized("xl", 2)`` is DiT-XL/2."""
    depth, width, heads = SIZES[name]
    return Config(width=width, depth=depth, heads=heads, patch=patch, **changes)


def check(cfg: Config, shape: Shape) -> None:
    """Refuses what cannot be built; raises ValueError with both numbers and a fix."""
    for name in ("width", "depth", "heads", "patch"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"model.{name} is {getattr(cfg, name)}: use 1 or more")
    if cfg.width % cfg.heads:
        fits = [h for h in range(1, 65) if cfg.width % h == 0]
        raise ValueError(f"model.heads {cfg.heads} does not divide model.width {cfg.width}: use one of {fits}")
    if cfg.positions == "sincos" and cfg.width % 4:
        raise ValueError(
            f"model.width {cfg.width} is no multiple of 4, which 2-D sine-cosine positions need: "
            f"use {-(-cfg.width // 4) * 4}"
        )
    if cfg.positions == "rotary" and cfg.head_size % 4:
        raise ValueError(
            f"model.positions rotary needs a head size that 4 divides, but width {cfg.width} over {cfg.heads} heads "
            f"is {cfg.head_size}: change model.heads, or use --model.positions sincos"
        )
    if shape.size % cfg.patch:
        fits = [p for p in range(1, shape.size + 1) if shape.size % p == 0]
        raise ValueError(f"model.patch {cfg.patch} does not divide the picture size {shape.size}: use one of {fits}")
    if not 0 <= cfg.label_dropout < 1:
        raise ValueError(f"model.label_dropout is {cfg.label_dropout}: use a number in [0, 1), such as 0.1")
    if not (math.isfinite(cfg.mlp_ratio) and cfg.mlp_ratio > 0) or cfg.ffn < 1:
        raise ValueError(f"model.mlp_ratio is {cfg.mlp_ratio}: use a positive number, such as 4")
    if not (math.isfinite(cfg.mlp_eps) and cfg.mlp_eps > 0):
        raise ValueError(f"model.mlp_eps is {cfg.mlp_eps}: use a positive number, such as 1e-6")


def declare(cfg: Config, shape: Shape) -> dict:
    """Declares every parameter, initialised as facebookresearch/DiT does: Xavier matrices, zero biases, normal(0.02)
    embeddings, and zeros where adaLN-Zero wants the block to be the identity and the output to be 0."""
    return around(cfg, shape, [declare_block(cfg) for _ in range(cfg.depth)])


def around(cfg: Config, shape: Shape, blocks: list) -> dict:
    """Declared blocks with what stands around them: embedders of patches, times and labels, and the final layer."""
    D, P = cfg.width, cfg.patch**2
    p_in, p_out = shape.channels * P, shape.channels * P * shape.outputs
    small = param.normal(0.02)
    labels = {"label": {"w": Param((num_labels(cfg, shape), D), "VD", small)}} if shape.num_classes else {}
    return {
        "patch": _dense(D, "DP", p_in),
        "time": {"fc1": _dense(D, "Df", FREQUENCIES, small), "fc2": _dense(D, "Dd", D, small)},
        **labels,
        "blocks": blocks,
        "final": {"adaln": _dense(2 * D, "2D", D, param.zeros), "out": _dense(p_out, "PD", D, param.zeros)},
    }


def declare_block(cfg: Config) -> dict:
    """The parameters of one adaLN-Zero block."""
    D, H, K, F = cfg.width, cfg.heads, cfg.head_size, cfg.ffn
    qkv = {
        "w": Param((3, H, K, D), "3HKD", param.xavier(D, 3 * D)),
        "b": Param((3, H, K), "3HK", param.zeros),
    }
    if cfg.qk_norm:
        qkv |= {name: Param((K,), "K", param.ones) for name in ("q_norm", "k_norm")}
    mlp = {"fc1": _dense(F, "FD", D), "fc2": _dense(D, "DF", F)}
    if cfg.mlp == "swiglu":
        mlp["gate"] = _dense(F, "FD", D)
    return {
        "adaln": _dense(6 * D, "6D", D, param.zeros),
        "qkv": qkv,
        "out": {"w": Param((D, H, K), "DHK", param.xavier(D, D)), "b": Param((D,), "D", param.zeros)},
        "mlp": mlp,
    }


def _dense(out: int, dims: str, fan_in: int, init: Callable | None = None) -> dict:
    return {
        "w": Param((out, fan_in), dims, init or param.xavier(fan_in, out)),
        "b": Param((out,), dims[0], param.zeros),
    }


def num_tokens(cfg: Config, shape: Shape) -> int:
    """Tokens of a sample (L)."""
    return (shape.size // cfg.patch) ** 2


def num_labels(cfg: Config, shape: Shape) -> int:
    """Rows of the label table: the classes and, with label dropout, the null label after them."""
    return shape.num_classes + (cfg.label_dropout > 0)


def forward(params: dict, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None, cfg: Config, ops: Ops = Ops()) -> Tensor:
    """Maps noisy pictures, times as the embedding wants them and labels to (B, outputs * C, height, width).

    Computes in the dtype of the weights. y_B is int64, num_classes being the null label; None where unconditional.
    """
    height, width = x_BCHW.shape[-2:]
    dtype = params["patch"]["w"].dtype
    x = linear(nn.patchify(x_BCHW.to(dtype), cfg.patch), params["patch"])
    positions = _tables if torch.compiler.is_compiling() else _positions
    table, rotary = positions(cfg, height // cfg.patch, width // cfg.patch, x.device, dtype)
    if table is not None:
        x = x + table

    c_BD = nn.embed_timestep(t_B, params["time"], cfg.timestep_freqs)
    if "label" in params:
        c_BD = c_BD + nn.embed_label(y_B, params["label"]["w"])

    x, rotary = ops.enter(x, *rotary)
    x = ops.layers(make_block(cfg, ops), params["blocks"], x, c_BD, rotary)
    shift, scale = nn.adaln(c_BD, params["final"]["adaln"], 2)
    x = linear(ops.modulate(x, shift, scale), params["final"]["out"])
    return nn.unpatchify(ops.leave(x), cfg.patch, height, width)


def make_block(cfg: Config, ops: Ops) -> Callable:
    """One adaLN-Zero block as a function ``(p, x_BLD, c_BD, rotary) -> x_BLD``; one object per (cfg, sites in it)."""
    return _make_block(cfg, replace(ops, layers=layers))


@functools.lru_cache(maxsize=64)
def _make_block(cfg: Config, ops: Ops) -> Callable:
    """Must not see ``ops.layers``, which a layout makes anew each step around that step's weights."""

    def block(p: dict, x: Tensor, c_BD: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = nn.adaln(c_BD, p["adaln"], 6)
        h = ops.modulate(x, shift1, scale1)
        branch = ops.out(ops.attend(*ops.qkv(h, p["qkv"], rotary)), p["out"])
        x, h = ops.gated_modulate(x, gate1, branch, shift2, scale2, cfg.mlp_eps)
        return ops.gated(x, gate2, ops.mlp(h, p["mlp"]))

    return block


@functools.lru_cache(maxsize=64)
def _positions(cfg: Config, rows: int, columns: int, device, dtype) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """``_tables``, made once. Inference mode, fake tensors and torch.func's levels mark every tensor made under them,
    and such a tensor may not outlive them in a cache; a new thread has none of them."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_tables, cfg, rows, columns, device, dtype).result()


def _tables(cfg: Config, rows: int, columns: int, device, dtype) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The additive table (L, D) or None, and the rotary tables () or (cos, sin) of (L, K/2) in at least fp32."""
    if cfg.positions == "sincos":
        return nn.sincos_2d(rows, columns, cfg.width).to(device=device, dtype=dtype), ()
    at_least = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = nn.rotary_2d(rows, columns, cfg.head_size)
    return None, (cos.to(device=device, dtype=at_least), sin.to(device=device, dtype=at_least))


def num_params(cfg: Config, shape: Shape) -> tuple[int, int]:
    """(all, trainable) parameters; the fixed position table is what papers count and no run trains."""
    trainable = param.count(declare(cfg, shape))
    table = (shape.size // cfg.patch) ** 2 * cfg.width if cfg.positions == "sincos" else 0
    return trainable + table, trainable


def macs(cfg: Config, shape: Shape) -> int:
    """Multiply-accumulates of one forward pass of one picture, matrix products only."""
    D, L, F = cfg.width, (shape.size // cfg.patch) ** 2, cfg.ffn
    mlp = (3 if cfg.mlp == "swiglu" else 2) * D * F
    block = L * (4 * D * D + mlp) + 2 * L * L * D + 6 * D * D
    ends = L * shape.channels * cfg.patch**2 * D * (1 + shape.outputs) + 2 * D * D
    return cfg.depth * block + ends + FREQUENCIES * D + D * D
