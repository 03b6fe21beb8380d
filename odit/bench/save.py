"""Saves of a training state: one that training waits for against one beside it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

from odit import checkpoint, data, plan, random, train
from odit.bench.common import check_steps, device_name, now, preset
from odit.data import loader
from odit.saver import Saver


@dataclass(frozen=True)
class Save:
    """How long training stands still for a save beside it, and what that slows, on one device.

    The row: seconds of a save that training waits for; those until one beside it lets training go on, and their share
    of the former; the same with all that steps took longer than before while it was written; and whether both wrote
    the same bytes, as they do if no later update came into the second.
    """

    preset: str = "dit-xl-2"
    """Model of this preset of train.py, on synthetic latents."""
    batch: int = 64
    """Samples a step."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of matrix products."""
    steps: int = 10
    """Steps whose mean is that without a save."""
    warmup: int = 40
    """Steps before them: as in a run, memory for the copy is there when the first save comes."""
    out: Path = Path("runs/bench-save")
    """Folder for both checkpoints, which are removed again; must not be there."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""


def save_rows(cfg: Save) -> None:
    """Prints the row."""
    check_steps(cfg.steps, cfg.warmup)
    if cfg.out.exists():
        raise ValueError(f"out {cfg.out} is there already: give a folder that is not")
    try:
        print(json.dumps({"name": "checkpoint", "preset": cfg.preset, **measure(cfg)}), flush=True)
    finally:
        shutil.rmtree(cfg.out, ignore_errors=True)


def measure(cfg: Save) -> dict[str, Any]:
    """What the row says."""
    run = dataclasses.replace(
        preset(cfg.preset),
        global_batch=cfg.batch,
        micro_batch=None,
        precision=cfg.precision,
        out=cfg.out,
        device=cfg.device,
        evaluate=False,
    )
    dataset, key = data.open_dataset(run.data, None), random.key(0)
    composed = plan.make(run, dataset)
    (batch,) = loader.batches(dataset, key, global_batch=cfg.batch, stop=1)
    state, step = train.init_state(composed, key), train.make_step(composed)

    timed = functools.partial(timed_on, composed.device)
    with Saver(composed, background=True) as saver:
        for _ in range(cfg.warmup):
            state, _ = step(state, batch, key)
        times = []
        for _ in range(cfg.steps):
            seconds, (state, _) = timed(functools.partial(step, state, batch, key))
            times.append(seconds)
        usual = sum(times) / len(times)
        waited, folder = timed(lambda: checkpoint.save(composed, state, {}))
        first = digests(folder)
        shutil.rmtree(folder)
        handed, _ = timed(lambda: saver.save(state, {}))
        beside = []
        while not saver.flight.ended():
            seconds, (state, _) = timed(functools.partial(step, state, batch, key))
            beside.append(seconds)
        saver.settle()
    slowed = sum(seconds - usual for seconds in beside)
    return {
        "device": device_name(composed.device),
        "step_ms": round(1e3 * usual, 1),
        "sync_s": round(waited, 3),
        "handed_over_s": round(handed, 4),
        "stall_share": round(handed / waited, 4),
        "steps_meanwhile": len(beside),
        "slowed_s": round(slowed, 3),
        "with_slowing": round((handed + slowed) / waited, 4),
        "gib": round(sum(path.stat().st_size for path in folder.iterdir()) / 2**30, 2),
        "bytes_equal": digests(folder) == first,
    }


def timed_on(device: torch.device, fn: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it gives."""
    began = now(device)
    found = fn()
    return now(device) - began, found


def digests(folder: Path) -> dict[str, str]:
    """The hash of each file of tensors."""
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))}
