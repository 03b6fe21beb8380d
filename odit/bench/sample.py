"""Sampling with guidance: seconds for a few and for many pictures."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from dataclasses import dataclass
from typing import Literal

import torch

from odit import config, data, plan, random, tree
from odit import sample as sampling
from odit.bench import train
from odit.bench.common import check_repeats, clear_peaks, device_name, now, peak, preset
from odit.parallel import spec


@dataclass(frozen=True)
class Sample:
    """Pictures from noise, both passes of guidance in each step; latents alone, nothing decoded."""

    preset: str = "dit-xl-2"
    """Model and objective of this preset of train.py."""
    images: tuple[int, ...] = (1, 8, 64)
    """Pictures at once."""
    ways: tuple[str, ...] = ("auto", "auto+compile", "auto+graphs", "fused+compile+graphs")
    """Kernels (reference, auto, fused), with +compile, and with +graphs for calls as CUDA graphs."""
    solver: str = "ddim"
    """Solver."""
    steps: int = 50
    """Its steps."""
    guidance: float = 4.0
    """Scale of guidance; 1 is none."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of matrix products."""
    repeats: int = 5
    """Measured draws; a row has their median. The first draw is told as start_s."""
    profile: int = 0
    """Adds a row of the kernels that took longest in one more draw, so many of them."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""


def sample_rows(cfg: Sample) -> None:
    """Prints a row a way and number of pictures: seconds of a draw, of the first one, peak memory, and what was taken:
    a way that cannot be had says so."""
    check_repeats("repeats", cfg.repeats)
    for way in cfg.ways:
        run = run_of(cfg, way)
        torch._dynamo.reset()
        composed = plan.make(run, data.open_dataset(run.data, None))
        key = random.key(0)
        draw = sampling.sampler(composed, weights(composed))
        for num in cfg.images:
            clear_peaks(composed.device)
            labels, times = torch.arange(num) % max(1, composed.shape.num_classes), []
            for _ in range(1 + cfg.repeats):
                began = now(composed.device)
                drawn = draw(labels, key)
                times.append(now(composed.device) - began)
            row = {
                "name": "sample",
                "preset": cfg.preset,
                "way": way,
                "images": num,
                "steps": cfg.steps,
                "precision": cfg.precision,
                "device": device_name(composed.device),
                "taken": taken(composed, run),
                "s": round(statistics.median(times[1:]), 4),
                "start_s": round(times[0], 2),
                "peak_gib": round(peak(composed.device) / 2**30, 2),
                "mean": float(drawn.double().abs().mean()),
            }
            print(json.dumps(row), flush=True)
            if cfg.profile:
                slowest = train.slowest(functools.partial(draw, labels, key), cfg.profile)
                print(json.dumps({"name": "sample kernels", "way": way, "images": num, "kernels": slowest}), flush=True)


def taken(composed: plan.Plan, run: config.Run) -> str:
    """Words on kernels, compilation and graphs."""
    why = sampling.graph_obstacle(composed, run.sampling)
    told = [line for line in composed.notes if line.startswith(("kernels", "compile"))]
    return "; ".join([*told, f"graphs: none ({why})" if why else "graphs: a step is one"])


def weights(composed: plan.Plan) -> tree.Tree:
    """A run's first weights, the same in each call, with noise where these are 0: there a block is the identity."""
    noise = torch.Generator(composed.device).manual_seed(0)
    first = spec.init(composed.declared, random.key(0), composed.layout.specs, composed.layout.axis, composed.device)
    return tree.map(lambda p: p if p.any() else torch.empty_like(p).normal_(0, 0.02, generator=noise), first)


def run_of(cfg: Sample, way: str) -> config.Run:
    """The run of a way such as fused+compile+graphs."""
    kernels, *more = way.split("+")
    if kernels not in train.KERNELS or not {"compile", "graphs"}.issuperset(more):
        raise ValueError(f"ways has {way!r}: use {', '.join(train.KERNELS)}, with +compile or +graphs")
    run = preset(cfg.preset)
    guided = config.Guidance(scale=cfg.guidance, channels=run.sampling.guidance.channels)
    return dataclasses.replace(
        run,
        precision=cfg.precision,
        kernels=kernels,
        compile="compile" in more,
        device=cfg.device,
        evaluate=False,
        sampling=config.Sampling(solver=cfg.solver, steps=cfg.steps, guidance=guided, graphs="graphs" in more),
    )
