"""Which kernels a run takes: from its settings, what its GPU has and what is installed, with a line that says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from odit import models
from odit.config import Run
from odit.kernels import attention, fused, obstacle
from odit.models.config import Shape, Size
from odit.ops import Ops, flash

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def kernels_of(run: Run, shape: Shape, sizes: Sequence[Size], device: torch.device, strategy: str) -> tuple[Ops, str]:
    """The record of one rank, for samples of these sizes, and a line on it."""
    on_gpu = device.type == "cuda"
    if run.kernels == "reference":
        return Ops(), "kernels: reference"
    if run.kernels == "auto" and (why := obstacle(device)):
        if on_gpu and run.deterministic:
            raise ValueError(f"deterministic needs fused kernels on a GPU, which cannot run here ({why}): leave it out")
        if on_gpu:
            return flash(), f"kernels: PyTorch's attention, the rest reference (auto; no fused ones: {why})"
        return Ops(), f"kernels: reference (auto; no fused ones: {why})"
    cfg = run.model
    length = max(models.num_tokens(cfg, s) // models.of(cfg).time_space(cfg, s) for s in (shape.size, *sizes))
    plain = strategy not in ("ring", "usp")  # these merge parts of attention by their log-sum-exp
    if run.deterministic and on_gpu and not plain:
        raise ValueError(
            f"deterministic is given, and parallel.sequence {strategy} merges parts of attention by a kernel that does "
            "not repeat bit for bit: use fastseq, ulysses or megatron, or leave deterministic out"
        )
    found = attention.choose(device, DTYPES[run.precision], cfg.head_size, length, plain, run.deterministic)
    ops = fused(flash() if on_gpu else Ops())
    if run.deterministic:
        ops = replace(ops, cross=Ops().cross)  # captions are short
    packs = strategy == "none"  # nothing looks at q, k and v between qkv and attend
    merged = "PyTorch's flash attention in parts, whose backward pass does not repeat bit for bit"
    told = f"kernels: fused{' (auto)' * (run.kernels == 'auto')}; {found.told if plain or not on_gpu else merged}"
    if on_gpu:
        from odit.kernels import gelu_mlp, quack  # the first loads Triton

        mlp = gelu_mlp.Mlp(*mlp_sizes(run, strategy))
        ops, line = gelu_mlp.chosen(ops, device, DTYPES[run.precision], mlp, run.parallel.remat)
        told += f"{along_time(run, (shape.size, *sizes))}; {line}; {quack.told(device, DTYPES[run.precision])}"
    return attention.with_attention(ops, found, cfg.head_size, packs), told


def along_time(run: Run, sizes: Sequence[Size]) -> str:
    """Words on attention along time, where blocks are over space and time in turn."""
    cfg, own = run.model, True
    for size in sizes:
        if (frames := models.of(cfg).time_space(cfg, size)) == 1:
            return ""
        places = models.num_tokens(cfg, size) // frames
        own &= attention.own_along_time(places, frames, cfg.heads, cfg.head_size, DTYPES[run.precision])
    return "; along time odit's kernel" if own else "; along time the same or, for few frames, odit's kernel"


def mlp_sizes(run: Run, strategy: str) -> tuple[str, int, int, int]:
    """What kind of mlp the model has, D, F, and how many ranks share F."""
    cfg, sp = run.model, run.parallel.sp or 1
    return cfg.mlp, cfg.width, cfg.ffn, sp if strategy == "megatron" else 1
