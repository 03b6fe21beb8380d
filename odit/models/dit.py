"""The Diffusion Transformer (Peebles and Xie 2023, "Scalable Diffusion Models with Transformers") of images and video.

Defaults are exactly the paper's model and facebookresearch/DiT. A clip's tokens are those of all its frames. Letters:
B samples, C channels, T frames, L tokens, D width, H heads, K head size, F ffn width, V classes, P values a patch,
S tokens of a caption, E their width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit import nn, param
from odit.models import text
from odit.models.config import SIZES, Config, Shape, Size, check, sized
from odit.ops import Ops, layers, linear
from odit.param import Param

__all__ = ["FREQUENCIES", "SIZES", "Config", "Shape", "check", "declare", "forward", "macs", "sized"]

FREQUENCIES = 256  # size of the sinusoidal timestep features


def declare(cfg: Config, shape: Shape) -> dict:
    """Declares every parameter, initialised as facebookresearch/DiT does: Xavier matrices, zero biases, normal(0.02)
    embeddings, and zeros where adaLN-Zero wants the block to be the identity and the output to be 0."""
    return around(cfg, shape, [declare_block(cfg, crosses(cfg, shape)) for _ in range(cfg.depth)])


def around(cfg: Config, shape: Shape, blocks: list) -> dict:
    """Declared blocks with what stands around them: embedders of patches, times, labels or captions, and the final
    layer."""
    D, P = cfg.width, cfg.patch_values(shape.size)
    p_in, p_out = shape.channels * P, shape.channels * P * shape.outputs
    small, zeros = param.normal(0.02), param.zeros
    single = cfg.adaln == "single"
    final = {"table": Param((2, D), "2D", zeros)} if single else {"adaln": param.dense(2 * D, "2D", D, zeros)}
    return {
        "patch": param.dense(D, "DP", p_in),
        "time": {"fc1": param.dense(D, "Df", FREQUENCIES, small), "fc2": param.dense(D, "Dd", D, small)},
        **({"label": {"w": Param((num_labels(cfg, shape), D), "VD", small)}} if shape.num_classes else {}),
        **({"text": _declare_text(cfg, shape)} if shape.text_length else {}),
        **({"adaln": param.dense(6 * D, "6D", D, zeros)} if single else {}),
        "blocks": blocks,
        "final": {**final, "out": param.dense(p_out, "PD", D, zeros)},
    }


def _declare_text(cfg: Config, shape: Shape) -> dict:
    D, E = cfg.width, shape.text_width
    found = {"fc1": param.dense(D, "Dd", E or D), "fc2": param.dense(D, "Dd", D)}
    return found if E else {"encoder": text.declare(cfg), **found}


def crosses(cfg: Config, shape: Shape) -> bool:
    """Whether captions act by cross-attention."""
    return shape.text_length > 0 and cfg.text == "cross"


def declare_block(cfg: Config, crossed: bool = False) -> dict:
    """The parameters of one block; ``crossed`` says whether it looks at captions."""
    D, H, K, F = cfg.width, cfg.heads, cfg.head_size, cfg.ffn
    qkv = {
        "w": Param((3, H, K, D), "3HKD", param.xavier(D, 3 * D)),
        "b": Param((3, H, K), "3HK", param.zeros),
    }
    if cfg.qk_norm:
        qkv |= {name: Param((K,), "K", param.ones) for name in ("q_norm", "k_norm")}
    mlp = {"fc1": param.dense(F, "FD", D), "fc2": param.dense(D, "DF", F)}
    if cfg.mlp == "swiglu":
        mlp["gate"] = param.dense(F, "FD", D)
    single = {"table": Param((6, D), "6D", param.zeros)}
    return {
        **(single if cfg.adaln == "single" else {"adaln": param.dense(6 * D, "6D", D, param.zeros)}),
        "qkv": qkv,
        "out": {"w": Param((D, H, K), "DHK", param.xavier(D, D)), "b": Param((D,), "D", param.zeros)},
        **({"cross": _declare_cross(cfg)} if crossed else {}),
        "mlp": mlp,
    }


def _declare_cross(cfg: Config) -> dict:
    """Cross-attention, 0 at first. Its heads are no rule's (h, not H): a token meets captions wherever it is."""
    D, H, K = cfg.width, cfg.heads, cfg.head_size
    return {
        "q": {"w": Param((H, K, D), "hKD", param.xavier(D, D)), "b": Param((H, K), "hK", param.zeros)},
        "kv": {"w": Param((2, H, K, D), "2hKD", param.xavier(D, 2 * D)), "b": Param((2, H, K), "2hK", param.zeros)},
        "out": {"w": Param((D, H, K), "DhK", param.zeros), "b": Param((D,), "D", param.zeros)},
    }


def num_labels(cfg: Config, shape: Shape) -> int:
    """Rows of the label table: the classes and, with label dropout, the null label after them."""
    return shape.num_classes + (cfg.label_dropout > 0)


def forward(params: dict, x: Tensor, t_B: Tensor, y: Any, cfg: Config, ops: Ops = Ops()) -> Tensor:
    """Maps noisy pictures or clips, times as the embedding wants them and conditions to (B, outputs * C, *size).

    Computes in the dtype of the weights.

    Args:
        x: (B, C, H, W) or (B, C, T, H, W).
        y: labels (B,) int64, num_classes being the null label; captions as {"tokens", "mask"} (bytes) or {"text" (B, S,
            E), "mask" (B, S) bool, "pooled" (B, E)}; None where unconditional.
    """
    size, dtype = tuple(x.shape[2:]), params["patch"]["w"].dtype
    h = linear(nn.patchify(x.to(dtype), cfg.patch, cfg.frame_patch), params["patch"])
    table, rotary = positions(cfg, size, x.device, dtype)
    if table is not None:
        h = h + table
    c_BD, caption = condition(params, t_B, y, cfg)
    h, rotary = ops.enter(h, *rotary)
    blocks, c = for_blocks(params, c_BD)
    h = ops.layers(make_block(cfg, ops, ops.sums), blocks, h, c, rotary, *caption)
    return nn.unpatchify(ops.leave(final(params["final"], h, c_BD, ops)), size, cfg.patch, cfg.frame_patch)


def condition(params: dict, t_B: Tensor, y: Any, cfg: Config) -> tuple[Tensor, tuple[Tensor, ...]]:
    """c (B, D) of the times and of what acts beside them, and the caption for cross-attention: () or (text, mask)."""
    c_BD = nn.embed_timestep(t_B, params["time"], cfg.timestep_freqs)
    if "label" in params:
        return c_BD + nn.embed_label(y, params["label"]["w"]), ()
    if "text" not in params:
        return c_BD, ()
    p, dtype, mask_BS = params["text"], c_BD.dtype, y["mask"]
    if "encoder" in p:
        y = dict(zip(("text", "pooled"), text.encode(p["encoder"], y["tokens"], mask_BS)))
    if cfg.text == "pooled":
        return c_BD + nn.project(y["pooled"].to(dtype), p), ()
    return c_BD, (nn.project(y["text"].to(dtype), p), mask_BS)


def for_blocks(params: dict, c_BD: Tensor) -> tuple[list, Tensor]:
    """The blocks, and what they get of c: silu(c), or (B, 6 D) regressed once for all of them (adaLN-single,
    PixArt-alpha). Blocks of ``joined`` weights get their modulations (B, 6 D) with their parameters."""
    c_BD = torch.nn.functional.silu(c_BD)
    if "joined" not in params:
        return params["blocks"], linear(c_BD, params["adaln"]) if "adaln" in params else c_BD
    shares = iter(linear(c_BD, params["joined"]).split(6 * c_BD.shape[-1], -1))
    return [each_block(lambda p: {**p, "modulations": next(shares)}, p) for p in params["blocks"]], c_BD


def joined(params: dict) -> dict:
    """The same weights for sampling, with one product for the modulations of all blocks: a product a block costs more
    than reading its weights where samples are few. ``joined`` holds w (blocks * 6 D, D) and b (blocks * 6 D,), in the
    order of the blocks. ``params`` themselves where not all blocks have plain ones."""
    found: list[dict] = []
    for p in params["blocks"]:
        each_block(lambda p: found.append(p.get("adaln", {})), p)
    if any(p.keys() != {"w", "b"} for p in found):  # adaLN-single has none, adapters have more
        return params
    blocks = [each_block(lambda p: {k: v for k, v in p.items() if k != "adaln"}, p) for p in params["blocks"]]
    return {**params, "blocks": blocks, "joined": {name: torch.cat([p[name] for p in found]) for name in ("w", "b")}}


def each_block(fn: Callable[[dict], Any], p: dict) -> Any:
    """``fn`` of a block, or of each of the blocks that p holds, always in the same order."""
    return fn(p) if "qkv" in p else {name: each_block(fn, q) for name, q in p.items()}


def final(p: dict, x: Tensor | Unsummed, c_BD: Tensor, ops: Ops) -> Tensor:
    """The final layer: (B, L, outputs * C * P)."""
    shift, scale = (p["table"] + c_BD[:, None]).unbind(1) if "table" in p else nn.adaln(c_BD, p["adaln"], 2)
    return linear(modulated(x, shift, scale, ops)[1], p["out"])


class Unsummed(NamedTuple):
    """x + gate branch, whose sum is left to the modulation after it: both are one pass over memory, and so are their
    gradients. x and branch are (B, L, D), or (B, T, S, D) between blocks of Latte, gate (B, D)."""

    x: Tensor
    gate: Tensor
    branch: Tensor


def each(x: Tensor | Unsummed, fn: Callable[[Tensor], Tensor]) -> Any:
    """``fn`` of tokens (B, L, D) or (B, T, S, D), or of both x and branch of an ``Unsummed``, which it stays."""
    return x._replace(x=fn(x.x), branch=fn(x.branch)) if isinstance(x, Unsummed) else fn(x)


def modulated(x: Tensor | Unsummed, shift: Tensor, scale: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
    """x, summed, and its modulation: (B, L, D) both; shift and scale (B, D)."""
    if isinstance(x, Unsummed):
        return ops.gated_modulate(*x, shift, scale)
    return x, ops.modulate(x, shift, scale)


def make_block(cfg: Config, ops: Ops, sums: bool = True) -> Callable:
    """One block as a function ``(p, x_BLD, c, rotary, *caption) -> x_BLD``; one object per (cfg, sites in it).

    Without ``sums`` it gives, and after the first one gets, an ``Unsummed``.
    """
    return _make_block(cfg, replace(ops, layers=layers), sums)


@functools.lru_cache(maxsize=64)
def _make_block(cfg: Config, ops: Ops, sums: bool) -> Callable:
    """Must not see ``ops.layers``, which a layout makes anew each step around that step's weights."""

    def block(p: dict, x: Tensor | Unsummed, c: Tensor, rotary: tuple[Tensor, ...], *caption: Tensor) -> Any:
        return run_block(cfg, ops, ops.attend, p, x, c, rotary, *caption, sums=sums)

    return block


def run_block(
    cfg: Config,
    ops: Ops,
    attend: Callable,
    p: dict,
    x: Tensor | Unsummed,
    c: Tensor,
    rotary: tuple,
    *caption: Tensor,
    sums: bool = True,
) -> Tensor | Unsummed:
    """A block of the paper, with cross-attention to captions after self-attention where p has it (PixArt-alpha).

    Args:
        attend: what the tokens do with what ``ops.qkv`` gives.
        c: silu(c) (B, D), or (B, 6 D) under adaLN-single.
        x: tokens (B, L, D), or the ``Unsummed`` of the block before.
        sums: whether it gives tokens (B, L, D), or an ``Unsummed``.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = modulations(p, c)
    x_BLD, h = modulated(x, shift1, scale1, ops)
    branch = ops.out(attend(*ops.qkv(h, p["qkv"], rotary)), p["out"])
    if "cross" in p:
        x_BLD = ops.gated(x_BLD, gate1, branch)
        x_BLD = x_BLD + ops.cross(x_BLD, p["cross"], *caption)
        h = ops.modulate(x_BLD, shift2, scale2, cfg.mlp_eps)
    else:
        x_BLD, h = ops.gated_modulate(x_BLD, gate1, branch, shift2, scale2, cfg.mlp_eps)
    branch = ops.mlp(h, p["mlp"])
    return ops.gated(x_BLD, gate2, branch) if sums else Unsummed(x_BLD, gate2, branch)


def modulations(p: dict, c: Tensor) -> tuple[Tensor, ...]:
    """A block's shifts, scales and gates (B, D): regressed from silu(c) (B, D), or its table added to c (B, 6 D)."""
    if "modulations" in p:  # regressed with those of all blocks
        return p["modulations"].chunk(6, -1)
    if "table" in p:
        return (p["table"] + c.unflatten(-1, p["table"].shape)).unbind(1)
    return linear(c, p["adaln"]).chunk(6, -1)


def positions(cfg: Config, size: Size, device, dtype) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The additive table (L, D) or None, and the rotary tables () or (cos, sin) of (L, K/2) in at least fp32."""
    return _tables(cfg, size, device, dtype)


@nn.kept
def _tables(cfg: Config, size: Size, device, dtype) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    frames, rows, columns = cfg.grid(size)
    clips = len(size) == 3
    if cfg.positions == "sincos":
        table = nn.sincos_2d(rows, columns, cfg.width)
        if clips:  # factorised: a frame's and a place's are added (OpenDiT's video DiT)
            table = (nn.sincos_1d(torch.arange(frames), cfg.width)[:, None] + table).flatten(0, 1)
        return table.to(device=device, dtype=dtype), ()
    at_least = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = (
        nn.rotary_3d(frames, rows, columns, cfg.head_size) if clips else nn.rotary_2d(rows, columns, cfg.head_size)
    )
    return None, (cos.to(device=device, dtype=at_least), sin.to(device=device, dtype=at_least))


def time_space(cfg: Config, size: Size) -> int:
    """Frames that attention does not run across: 1, as every token sees every other one."""
    return 1


def macs(cfg: Config, shape: Shape) -> int:
    """Multiply-accumulates of one forward pass of one sample, matrix products only, a frozen text encoder aside."""
    frames, rows, columns = cfg.grid(shape.size)
    L = frames * rows * columns
    return cfg.depth * block_macs(cfg, shape, L, L, crosses(cfg, shape)) + macs_around(cfg, shape, L)


def block_macs(cfg: Config, shape: Shape, tokens: int, seen: int, crossed: bool) -> int:
    """Those of a block over ``tokens``, of which each attends to ``seen``."""
    D, F, S = cfg.width, cfg.ffn, shape.text_length
    mlp = (3 if cfg.mlp == "swiglu" else 2) * D * F
    cross = tokens * 2 * D * D + S * 2 * D * D + 2 * tokens * S * D if crossed else 0
    return tokens * (4 * D * D + mlp) + 2 * tokens * seen * D + (6 * D * D if cfg.adaln == "zero" else 0) + cross


def macs_around(cfg: Config, shape: Shape, tokens: int) -> int:
    """Those of what stands around the blocks."""
    D, S = cfg.width, shape.text_length
    ends = tokens * shape.channels * cfg.patch_values(shape.size) * D * (1 + shape.outputs)
    modulation = 2 * D * D if cfg.adaln == "zero" else 6 * D * D
    found = ends + modulation + FREQUENCIES * D + D * D
    if not S:
        return found
    encoder = 0 if shape.text_width else cfg.text_depth * (S * 12 * D * D + 2 * S * S * D)
    return found + encoder + (S if cfg.text == "cross" else 1) * ((shape.text_width or D) * D + D * D)
