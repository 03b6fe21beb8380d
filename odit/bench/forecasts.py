"""What experiments/plan.py foretells of one GPU beside what it does: times, peaks, and where memory ends."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from odit import checks, config, forecast, rates
from odit.bench import train as training
from odit.bench.common import device_name

GIB = 2**30
WORDS = {
    "selective": {"remat": "selective"},
    "block": {"remat": "block"},
    "offload2": {"zero": 2, "offload": "optimizer"},
    "offload3": {"zero": 3, "offload": "optimizer"},
}


@dataclass(frozen=True)
class Forecasts:
    """Whole training steps on one GPU, as foretold and as measured; then layouts at the edges of a smaller memory."""

    machine: str = "h200"
    """A table of rates that ships, or a file of bench.py rates."""
    layouts: tuple[str, ...] = (
        *("dit-s-2:512", "dit-s-4:1024", "dit-b-2:192", "dit-b-2:320+block", "dit-b-4:512/128", "dit-l-2:96"),
        *("dit-l-2:160+selective", "dit-xl-2:96", "dit-xl-2:192/64+selective", "dit-xl-2:96+offload3"),
        *("dit-b-2:128+offload2", "vdit-s-1x2x2:24", "vdit-b-1x2x2:8+selective", "vdit-xl-1x2x2:6"),
        *("vdit-l-1x2x2:12+block", "latte-xl-1x2x2:6", "latte-b-1x2x2:24+selective"),
    )
    """PRESET:BATCH, /MICRO-BATCH, and with +selective, +block (recomputation), +offload2 or +offload3 (the optimizer on
    the host, in that ZeRO stage)."""
    edges: tuple[str, ...] = (
        *("dit-s-2:8", "dit-b-2:16", "dit-b-2:12+offload2", "dit-l-2:24+block", "dit-xl-2:32"),
        *("dit-xl-2:24+selective", "latte-b-1x2x2:24", "vdit-b-1x2x2:32"),
    )
    """PRESET:GIB, and the words above: the process may have so many GiB of the GPU. Tried are the largest batch that
    fits, the smallest that is too large, one half way and one 5 % beyond."""
    steps: int = 10
    """Measured steps of a layout; fewer with offload."""


def forecasts(cfg: Forecasts) -> None:
    """Prints a row a layout and a row an edge."""
    device = checks.pick_device("auto")
    if device.type != "cuda":
        raise ValueError(f"the device is {device.type}: forecasts are of GPUs, run this on one")
    machine = rates.load(cfg.machine)
    total = torch.cuda.get_device_properties(device).total_memory
    for word in cfg.layouts:
        print(json.dumps(step_row(cfg, word, machine) | {"device": device_name(device)}), flush=True)
    for word in cfg.edges:
        row = edge_row(word, machine, lambda run, gib: runs_in(run, GIB * gib / total))
        print(json.dumps(row | {"device": device_name(device)}), flush=True)


def parse(word: str) -> tuple[str, int, int | None, dict[str, Any]]:
    """(preset, batch or GiB, micro-batch, settings of Parallel) of a word such as dit-xl-2:192/64+selective."""
    first, *more = word.split("+")
    name, _, numbers = first.partition(":")
    size, _, micro = numbers.partition("/")
    if not size.isdigit() or not (micro or "1").isdigit() or not WORDS.keys() >= set(more):
        raise ValueError(f"{word!r} is no layout: write PRESET:NUMBER, /MICRO-BATCH and +{', +'.join(WORDS)}")
    settings: dict[str, Any] = {}
    for each in more:
        settings |= WORDS[each]
    return name, int(size), int(micro) if micro else None, settings


def run_of(name: str, batch: int, micro: int | None, settings: dict[str, Any], steps: int = 1) -> config.Run:
    """The run of a layout, with fused kernels."""
    asked = training.Train(preset=name, batch=batch, micro_batch=micro, steps=steps)
    return dataclasses.replace(training.run_of(asked, "fused"), parallel=config.Parallel(**settings))


def told(run: config.Run, machine: rates.Rates, gib: float) -> forecast.Forecast:
    """The forecast of a run on one GPU of so much memory."""
    cluster = forecast.Cluster(1, gib, machine, "nvlink")
    return forecast.one(dataclasses.replace(run, device="cpu"), checks.expected_shape(run), cluster)


def step_row(cfg: Forecasts, word: str, machine: rates.Rates) -> dict[str, Any]:
    """A layout's time and peak."""
    name, batch, micro, settings = parse(word)
    steps = min(cfg.steps, 4) if "offload" in settings else cfg.steps
    run = run_of(name, batch, micro, settings, steps)
    found = told(run, machine, machine.memory_gib)
    asked = training.Train(preset=name, batch=batch, micro_batch=micro, steps=steps, warmup=2)
    measured, _ = training.measure(asked, run)
    free()
    ms, gib = 1e3 * found.pace.step, found.footprint.peak / GIB
    return {
        "name": "plan",
        "layout": word,
        "machine": cfg.machine,
        "predicted_ms": round(ms, 2),
        **{key: measured[key] for key in ("ms", "peak_gib", "reserved_gib", "kernels")},
        "ms_off": round(ms / measured["ms"] - 1, 3),
        "predicted_gib": round(gib, 2),
        "gib_off": round(gib / measured["peak_gib"] - 1, 3),
    }


def edge_row(word: str, machine: rates.Rates, runs: Callable[[config.Run, float], str]) -> dict[str, Any]:
    """(batch, verdict, what came of it) of batches around an edge; ``runs(run, gib)`` tries one."""
    name, gib, _, settings = parse(word)

    def at(batch: int) -> forecast.Forecast:
        return told(run_of(name, batch, None, settings), machine, gib)

    tried = [(n, at(n).verdict, runs(run_of(name, n, None, settings), gib)) for n in around(at)]
    return {"name": "edge", "layout": word, "tried": tried}


def around(at: Callable[[int], forecast.Forecast]) -> Iterator[int]:
    """The largest batch that fits, one half way to the smallest that is too large, this one, and one 5 % larger."""

    def first(is_beyond: Callable[[forecast.Forecast], bool]) -> int:
        low, high = 0, 1
        while not is_beyond(at(high)):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_beyond(at(middle)) else (middle, high)
        return high

    fits, large = first(lambda f: not f.fits) - 1, first(lambda f: f.verdict == "too large")
    yield from (n for n in (fits, (fits + large) // 2, large, large + max(1, large // 20)) if n)


def runs_in(run: config.Run, fraction: float) -> str:
    """What comes of two steps in a part of the GPU's memory."""
    free()
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        asked = training.Train(batch=run.global_batch, steps=1, warmup=0)
        measured, _ = training.measure(asked, run, clear=torch.cuda.reset_peak_memory_stats)
        return f"ran, {measured['reserved_gib']} GiB reserved"
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        free()
        torch.cuda.set_per_process_memory_fraction(1.0)


def free() -> None:
    """Gives back what an earlier run left."""
    gc.collect()
    torch.cuda.empty_cache()
