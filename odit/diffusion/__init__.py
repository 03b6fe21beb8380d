"""Diffusion as functions of a denoiser: what is learned, on which path, with which loss; solvers and guidance.

Time is t_B, one a sample: int64 in [0, T) for a Gaussian process (T steps, 0 nearly clean), fp32 in [0, 1] for a flow
(0 pure noise, 1 data: the direction of SiT). A trained model is called as ``model(x_t, t_net_B)``; a solver calls
``model(x_t, t_net_B, level)``, where level is a Python float, 0 at clean data and 1 at pure noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from odit.diffusion.flow import Flow
from odit.diffusion.gaussian import Gaussian, cosine_betas, from_betas, linear_betas

# What linear_betas needs to stay below 1: its last value is 20 / train_steps.
MIN_LINEAR_STEPS = 21
CHOICES = {
    "objective": ("flow", "eps", "x0", "v"),
    "betas": ("linear", "cosine"),
    "variance": ("fixed-small", "fixed-large", "learned"),
    "predicts": ("velocity", "data"),
    "times": ("uniform", "logit-normal"),
}
ONLY_GAUSSIAN = ("betas", "variance", "train_steps")
ONLY_FLOW = ("predicts", "times", "time_scale", "shift")


@dataclass(frozen=True)
class Config:
    """What is learned and on which path; None stands for the default of the objective's family."""

    objective: Literal["flow", "eps", "x0", "v"] = "flow"
    """What the network predicts: the velocity of a straight path (SiT), or eps, x0 or v of a Gaussian process."""
    betas: Literal["linear", "cosine"] | None = None
    """Noise schedule of a Gaussian process (eps, x0, v): linear unless told."""
    variance: Literal["fixed-small", "fixed-large", "learned"] | None = None
    """Reverse variance of a Gaussian process: learned unless told (as DiT): the network then puts out 2C channels."""
    train_steps: int | None = None
    """Number of steps T of a Gaussian process: 1000 unless told."""
    predicts: Literal["velocity", "data"] | None = None
    """What a flow's network puts out: the velocity unless told; data suits patches of many values (JiT)."""
    times: Literal["uniform", "logit-normal"] | None = None
    """Distribution of training times of a flow: uniform unless told (as SiT); logit-normal as Stable Diffusion 3."""
    time_scale: float | None = None
    """Factor from a flow's t in [0, 1] to what the timestep embedding sees: 1.0 unless told (as SiT)."""
    shift: float | None = None
    """Moves a flow's times towards noise, in training and for solvers (Stable Diffusion 3, eq. 23): 1.0, not at all,
    unless told; 3 to 5 are usual for large pictures and clips."""

    @property
    def learned_variance(self) -> bool:
        """Whether the network puts out 2C channels: a prediction, and where the log-variance lies in its range."""
        return self.objective != "flow" and self.variance in (None, "learned")


def check(cfg: Config) -> None:
    """Raises ValueError for values out of range and for settings that the objective has no use for."""
    for key, choices in CHOICES.items():
        value = getattr(cfg, key)
        if value not in choices and not (value is None and key != "objective"):
            raise ValueError(f"diffusion.{key} is {value!r}: use one of {', '.join(choices)}")
    useless, fit = (ONLY_GAUSSIAN, "eps, x0 or v") if cfg.objective == "flow" else (ONLY_FLOW, "flow")
    if found := {key: value for key in useless if (value := getattr(cfg, key)) is not None}:
        what = " and ".join(f"diffusion.{key} is {value!r}" for key, value in found.items())
        fix = " ".join(f"--diffusion.{key.replace('_', '-')} None" for key in found)
        raise ValueError(
            f"{what}, which diffusion.objective {cfg.objective} does not have: use {fix}, or an objective of {fit}"
        )
    if cfg.train_steps is not None:
        least = 2 if cfg.betas == "cosine" else MIN_LINEAR_STEPS
        if cfg.train_steps < least:
            kind = cfg.betas or "linear"
            raise ValueError(f"diffusion.train_steps is {cfg.train_steps}: {kind} betas need {least} or more")
    if cfg.time_scale is not None and not (math.isfinite(cfg.time_scale) and cfg.time_scale > 0):
        raise ValueError(f"diffusion.time_scale is {cfg.time_scale}: use a positive number, 1.0 as SiT or 1000.0")
    if cfg.shift is not None and not (math.isfinite(cfg.shift) and cfg.shift > 0):
        raise ValueError(f"diffusion.shift is {cfg.shift}: use a positive number, 1.0 for none or 3.0 for clips")


def build(cfg: Config) -> Gaussian | Flow:
    """Makes the objective that a config describes; raises ValueError as ``check``."""
    check(cfg)
    if cfg.objective == "flow":
        scale, shift = (1.0 if value is None else value for value in (cfg.time_scale, cfg.shift))
        return Flow(cfg.times or "uniform", scale, cfg.predicts or "velocity", shift)
    betas = {"linear": linear_betas, "cosine": cosine_betas}[cfg.betas or "linear"]
    return from_betas(betas(cfg.train_steps or 1000), cfg.objective, cfg.variance or "learned")
