"""What benchmarks share: a clock that waits for the device, names, peaks, presets."""

from __future__ import annotations

import gc
import os
import platform
import time
from pathlib import Path

import torch

from odit import config


def peak_rss() -> int:
    """Peak resident bytes of this process, the interpreter and libraries included."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """What a row was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def preset(name: str) -> config.Run:
    """A preset of train.py."""
    presets = config.presets()
    if name not in presets:
        raise ValueError(f"preset is {name!r}: use one of {', '.join(presets)}")
    return presets[name][1]


def check_steps(steps: int, warmup: int) -> None:
    """Raises ValueError where nothing would be measured."""
    if steps < 1 or warmup < 0:
        raise ValueError(
            f"steps is {steps} and warmup {warmup}: use 1 or more measured steps, and 0 or more before them"
        )


def check_repeats(name: str, repeats: int) -> None:
    """Raises ValueError where nothing would be measured."""
    if repeats < 1:
        raise ValueError(f"{name} is {repeats}: use 1 or more, of which a row has the median")


def clear_peaks(device: torch.device) -> None:
    """Peaks of memory count from here."""
    gc.collect()  # a plan and its graphs refer to each other, and hold the memory of a step
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # peak resident memory (Linux, proc(5))


def peak(device: torch.device) -> int:
    """The most bytes held since ``clear_peaks``: allocated on the GPU, or resident in the process."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss()
