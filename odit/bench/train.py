"""Training steps with each choice of kernels, compilation and recomputation, on one GPU."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._dynamo.utils import counters

from odit import config, data, models, plan, random, train
from odit.bench.common import check_steps, clear_peaks, device_name, now, peak, preset
from odit.data import loader

KERNELS = ("reference", "auto", "fused")
MORE = ("compile", "nographs", "any")
REMATS = ("block", "selective")


@dataclass(frozen=True)
class Train:
    """Whole training steps (draws, forward, backward, AdamW, EMA) at equal batch."""

    preset: str = "dit-xl-2"
    """Model and objective of this preset of train.py, on synthetic latents."""
    batch: int = 128
    """Samples a step."""
    micro_batch: int | None = None
    """Samples a forward pass."""
    ways: tuple[str, ...] = ("reference+nographs", "reference+compile", "fused", "fused+compile")
    """Kernels (reference, auto, fused), with +compile, +nographs, +any for sums in any order (--deterministic False),
    and +block or +selective for what is recomputed."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of matrix products."""
    steps: int = 10
    """Measured steps, one after the other as in a run; the row has their mean."""
    warmup: int = 3
    """Steps before them, after a first one, which is told as start_s, compilation and capture included."""
    profile: int = 0
    """Adds a row of the kernels that took longest in one more step, so many of them."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""


def train_rows(cfg: Train) -> None:
    """Prints a row a way: ms, samples/s, TFLOP/s (6 a multiply-accumulate of the model), peak memory, start, loss."""
    check_steps(cfg.steps, cfg.warmup)
    for way in cfg.ways:
        run = run_of(cfg, way)
        about = {"name": "train", "preset": cfg.preset, "way": way, "batch": cfg.batch, "precision": cfg.precision}
        try:
            row, slowest = measure(cfg, run)
        except torch.OutOfMemoryError as error:
            row, slowest = {"error": str(error).split(". ")[0]}, []
        print(json.dumps({**about, **row}), flush=True)
        if slowest:
            print(json.dumps({"name": "train kernels", "way": way, "kernels": slowest}), flush=True)


def run_of(cfg: Train, way: str) -> config.Run:
    """The run of a way such as fused+compile+selective; raises ValueError for a word that is none."""
    kernels, *more = way.split("+")
    known = {*REMATS, *MORE}
    if kernels not in KERNELS or not known.issuperset(more):
        raise ValueError(
            f"ways has {way!r}: use {', '.join(KERNELS)}, with +compile, +nographs, +any, +block or +selective"
        )
    remat = next((word for word in more if word in REMATS), "none")
    run = preset(cfg.preset)
    return dataclasses.replace(
        run,
        global_batch=cfg.batch,
        micro_batch=cfg.micro_batch,
        precision=cfg.precision,
        kernels=kernels,
        compile="compile" in more,
        graphs="nographs" not in more,
        deterministic=False if "any" in more else None,
        device=cfg.device,
        steps=1 + cfg.warmup + cfg.steps,
        evaluate=False,
        parallel=config.Parallel(remat=remat),
    )


def measure(cfg: Train, run: config.Run, clear: Callable[[], None] | None = None) -> tuple[dict[str, Any], list]:
    """The row of a run, and its slowest kernels if they are asked for; ``clear`` starts the count of peaks."""
    torch._dynamo.reset()
    counters.clear()
    gc.collect()  # the graphs of the way before
    composed = plan.make(run, data.open_dataset(run.data, None))
    dataset, key = data.open_dataset(run.data, composed.front.tokenize), random.key(0)
    (batch,) = loader.batches(dataset, key, global_batch=cfg.batch, stop=1)
    state, step = train.init_state(composed, key), train.make_step(composed)
    clear() if clear else clear_peaks(composed.device)
    began = now(composed.device)
    state, metrics = step(state, batch, key)
    start = now(composed.device) - began
    for _ in range(cfg.warmup):
        state, metrics = step(state, batch, key)
    began = now(composed.device)
    for _ in range(cfg.steps):
        state, metrics = step(state, batch, key)
    ms = 1e3 * (now(composed.device) - began) / cfg.steps
    flops = 6 * models.of(run.model).macs(run.model, composed.shape) * cfg.batch
    row = {
        "micro_batch": composed.micro_batch,
        "device": device_name(composed.device),
        "kernels": "; ".join(line for line in composed.notes if line.startswith(("kernels", "compile"))),
        "ms": round(ms, 2),
        "samples_per_s": round(1e3 * cfg.batch / ms, 1),
        "tflops": round(flops / ms / 1e9, 1),
        "peak_gib": round(peak(composed.device) / 2**30, 2),
        **reserved(composed.device),
        "start_s": round(start, 1),
        "compilations": counters["stats"]["unique_graphs"],
        "loss": metrics["loss"],
    }
    return row, slowest(lambda: step(state, batch, key), cfg.profile) if cfg.profile else []


def reserved(device: torch.device) -> dict[str, float]:
    """What PyTorch has taken of the GPU, graphs' own memory and what it keeps for later included."""
    return {"reserved_gib": round(torch.cuda.memory_reserved() / 2**30, 2)} if device.type == "cuda" else {}


def slowest(run: Callable[[], Any], most: int) -> list[tuple[str, float, int]]:
    """(kernel, ms, launches) of what took longest on the GPU in one call; before them the sum over all kernels, the
    call's own time, and the longest waits of the GPU with the kernels before and after."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        span = time.perf_counter() - began
    on_gpu = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu.sort(key=lambda e: -e.self_device_time_total)
    rows = [(e.key[:90], round(e.self_device_time_total / 1e3, 3), e.count) for e in on_gpu[:most]]
    total = sum(e.self_device_time_total for e in on_gpu) / 1e3
    told = [("all kernels", round(total, 3), sum(e.count for e in on_gpu)), ("wall", round(1e3 * span, 3), 1)]
    return [*told, *waits(found.events()), *rows]


def waits(events: list, most: int = 8) -> list[tuple[str, float, int]]:
    """(kernel before > kernel after, ms, 1) of the longest times in which the GPU did nothing, and their sum."""
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    found, last = [], events[0]
    for e in events[1:]:
        if (gap := e.time_range.start - last.time_range.end) > 0:
            found.append((f"wait: {last.name[:40]} > {e.name[:40]}", round(gap / 1e3, 3), 1))
        last = max(last, e, key=lambda e: e.time_range.end)
    found.sort(key=lambda row: -row[1])
    return [("all waits", round(sum(row[1] for row in found), 3), len(found)), *found[:most]]
