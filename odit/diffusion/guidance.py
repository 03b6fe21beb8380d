"""Classifier-free guidance (Ho & Salimans 2022), within an interval of noise levels (Kynkaanniemi et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from odit import tree
from odit.diffusion.flow import Flow
from odit.diffusion.gaussian import Gaussian
from odit.ops import at_least_fp32


def level(objective: Gaussian | Flow, t):
    """Gives the noise's share of the path, 0 at clean data and 1 at pure noise: t / T, or 1 - t of a flow.

    t is a Python number or a tensor; for a Gaussian process both t and T are of the process that was trained on.
    """
    return 1 - t if isinstance(objective, Flow) else t / objective.train_steps


def in_one_call(model, x, t_net_B, cond_B, null_B) -> tuple[Tensor, Tensor]:
    """(conditional, null) predictions from one call of 2B samples, the conditional half first."""
    both_B = tree.map(lambda c, n: torch.cat([c, n]), cond_B, null_B)
    cond, null = model(torch.cat([x, x]), torch.cat([t_net_B, t_net_B]), both_B).chunk(2)
    return cond, null


def as_is(fn, *told):
    """``fn`` itself."""
    return fn


def guided(
    model,
    cond_B,
    null_B,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    both=in_one_call,
    wrap=as_is,
):
    """Makes ``model_guided(x, t_net_B, level)`` of ``model(x, t_net_B, cond)``: null + scale (cond - null).

    At scale 1, and at levels outside the interval (its ends are inside), the null pass is left out and the result is
    the conditional one bit for bit.

    Args:
        cond_B, null_B: tensors or trees of tensors with B first; null_B may be None at scale 1.
        channels: how many leading channels are guided: 3 in DiT's published numbers, None for all C of the prediction.
            The others, a learned variance among them, are the conditional pass's.
        both: ``(model, x, t_net_B, cond_B, null_B) -> (conditional, null)``, which runs the two passes.
        wrap: ``wrap(fn, *told) -> fn`` of what is called in each step, a function of tensors and of what is told.
    """
    low, high = interval
    if not math.isfinite(scale):
        raise ValueError(f"sampling.guidance.scale is {scale}: use a finite number, 1 for no guidance")
    if not 0 <= low < high <= 1:
        raise ValueError(f"sampling.guidance.interval is ({low}, {high}): use two rising levels in [0, 1]")
    if channels is not None and channels < 1:
        raise ValueError(f"sampling.guidance.channels is {channels}: use 1 or more, or leave it out for all")

    def toward(x, t_net_B, cond_B, null_B):
        num = x.shape[1] if channels is None else channels
        assert num <= x.shape[1], f"{num} guided channels of {x.shape[1]}"
        # the difference is small and scale large: not in bf16
        cond, null = (at_least_fp32(out) for out in both(model, x, t_net_B, cond_B, null_B))
        guided = null[:, :num] + scale * (cond[:, :num] - null[:, :num])
        return torch.cat([guided, cond[:, num:]], 1)

    alone, together = wrap(model), wrap(toward, scale, channels)

    def model_guided(x, t_net_B, level: float):
        if scale == 1 or not low <= level <= high:
            return alone(x, t_net_B, cond_B)
        return together(x, t_net_B, cond_B, null_B)

    return model_guided
