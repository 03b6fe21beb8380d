"""Attention by each library at the shapes that DiTs have, forward and with backward."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from odit import checks, plan, random
from odit.bench.common import check_repeats, device_name
from odit.bench.kernels import milliseconds
from odit.kernels import attention, trial

KEY = random.key(0)
Shape = tuple[int, int, int, int]  # B, L, H, K


@dataclass(frozen=True)
class Attention:
    """Each backend at each shape; a backend that cannot serve one is a row with its reason."""

    shapes: tuple[str, ...] = ("128x256x16x72", "8x4096x16x72", "8x4096x16x64", "2x16384x16x72", "128x256x6x64")
    """Batch x tokens x heads x head size."""
    wide: tuple[int, ...] = (0, 80)
    """Head sizes to make heads of 72 as wide as, by zero columns that are in no time; 0 is as they are."""
    backends: tuple[str, ...] = ("sdpa", "flash2", "cudnn", "flash4", "flash4_any", "triton")
    """Libraries (plain is the reference)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype."""
    steps: int = 20
    """Measured calls; the row has their median."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""


def attention_rows(cfg: Attention) -> None:
    """Prints a row a shape, width and backend: ms, TFLOP/s on the true head size, error against fp64."""
    for name in cfg.backends:
        if name not in attention.BACKENDS:
            raise ValueError(f"backends has {name!r}: use {', '.join(attention.BACKENDS)}")
    check_repeats("steps", cfg.steps)
    device, shapes = checks.pick_device(cfg.device), [parse(shape) for shape in cfg.shapes]
    for told, shape in zip(cfg.shapes, shapes):
        K = shape[3]
        for wide in cfg.wide:
            if wide and (K != 72 or wide <= K):
                continue
            for name in cfg.backends:
                row = row_of(cfg, attention.BACKENDS[name], device, shape, wide or K)
                print(json.dumps({"name": "attention", "backend": name, "shape": told, **row}), flush=True)


def parse(shape: str) -> Shape:
    """Reads "8x4096x16x72"; raises ValueError."""
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){3}", shape):
        raise ValueError(f"shapes has {shape!r}: write batch x tokens x heads x head size, such as 8x4096x16x72")
    B, L, H, K = map(int, shape.split("x"))
    return B, L, H, K


def row_of(cfg: Attention, backend: attention.Backend, device: torch.device, shape: Shape, wide: int) -> dict[str, Any]:
    """Times forward, and forward with backward."""
    (B, L, H, K), dtype = shape, plan.DTYPES[cfg.precision]
    about = {"wide": wide, "precision": cfg.precision, "device": device_name(device)}
    if why := backend.obstacle(device, dtype, wide):
        return {**about, "error": why}
    q, k, v, do = (_draw(part, shape, wide, device).to(dtype) for part in ("q", "k", "v", "do"))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both() -> Tensor:
        o = backend.attend(*leaves, K**-0.5)
        torch.autograd.grad(o, leaves, do)
        return o

    with torch.no_grad():
        forward_ms = milliseconds(device, cfg.steps, lambda: backend.attend(q, k, v, K**-0.5))
    both_ms = milliseconds(device, cfg.steps, both)
    flops = 4 * B * H * L * L * K
    return {
        **about,
        "forward_ms": round(forward_ms, 4),
        "ms": round(both_ms, 4),
        "forward_tflops": round(flops / forward_ms / 1e9, 1),
        "tflops": round(3.5 * flops / both_ms / 1e9, 1),
        "error": _error(backend, leaves, do, K),
    }


def _draw(part: str, shape: Shape, wide: int, device: torch.device) -> Tensor:
    """(B, L, H, wide) with zeros from K on; drawn once for a sample of each of 8, for the sake of time."""
    B, L, H, K = shape
    x = random.normal(random.fold_in(KEY, part), (min(B, 2), L, H, K)).to(device)
    x = torch.nn.functional.pad(x, (0, wide - K))
    return x.repeat(-(-B // len(x)), 1, 1, 1)[:B].contiguous()


def _error(backend: attention.Backend, leaves: list[Tensor], do: Tensor, K: int) -> float:
    """The largest relative error of the output and the gradients of one head of one sample."""
    *qkv, do = (x[:1, :, :1].contiguous() for x in (*leaves, do))
    return max(trial.errors(backend.attend, qkv, do, K**-0.5).values())
