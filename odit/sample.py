"""Sampling: pictures from weights, each a function of (seed, picture index, label), whatever the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odit import plan as plans
from odit import random, tree
from odit.config import Sampling
from odit.diffusion import guidance, solvers
from odit.plan import Plan


def sample(
    plan: Plan,
    params: tree.Tree,
    labels_N: Tensor,
    key: random.Key,
    *,
    sampling: Sampling | None = None,
    start: int = 0,
    batch: int = 256,
    progress: Callable | None = None,
) -> Tensor:
    """Draws one picture a label: (N, C, H, W) fp32, as the model left them (not clamped).

    Args:
        labels_N: int64; picture ``start + n`` shows label n. The null label gives unconditional pictures.
        start: index of the first picture; its noise depends on key and index alone.
        progress: wraps the iterable of solver steps, such as tqdm.
    """
    sampling = sampling or plan.run.sampling
    indices = torch.arange(start, start + len(labels_N))
    with torch.no_grad():
        working = plan.inference(params)
        parts = [
            _sample_batch(plan, working, y.to(plan.device), ids.to(plan.device), key, sampling, progress)
            for y, ids in zip(labels_N.split(batch), indices.split(batch))
        ]
    return torch.cat(parts).float().cpu()


def _sample_batch(plan, working, labels_B, ids_B, key, sampling: Sampling, progress) -> Tensor:
    shape = (plan.shape.channels, plan.shape.size, plan.shape.size)
    (params, ops), g = working, sampling.guidance
    scale = g.scale if plan.shape.num_classes else 1.0
    model = guidance.guided(
        lambda x, t, y: plan.forward(params, x, t, y, ops=ops),
        labels_B,
        torch.full_like(labels_B, plan.null_label),
        scale=scale,
        interval=g.interval,
        channels=g.channels,
    )
    return solvers.sample(
        plan.objective,
        model,
        random.normal(random.fold_in(key, "sample"), shape, ids_B),
        solver=plans.solver_of(sampling, plan.objective),
        steps=sampling.steps,
        noise_at=lambda i: random.normal(random.fold_in(key, "sample-step", i), shape, ids_B),
        progress=progress,
        clip=sampling.clip,
    )


def choose_labels(num: int, num_classes: int, chosen: tuple[int, ...]) -> Tensor:
    """``num`` labels: the chosen ones in turn, or all of them; raises ValueError for one that is no class."""
    if not chosen:
        return spread_labels(num, num_classes)
    if not num_classes:
        raise ValueError(f"label {chosen[0]} is given but this model knows no classes: leave label out")
    if bad := [y for y in chosen if not 0 <= y < num_classes]:
        raise ValueError(f"label {bad[0]} is no class of this model: it knows {num_classes}, 0 to {num_classes - 1}")
    return torch.tensor(chosen).repeat(-(-num // len(chosen)))[:num]


def override(told: Sampling, num_classes: int, **given: Any) -> Sampling:
    """A run's own sampling with a command line's solver, steps, scale, interval and channels; None keeps its own."""
    given = {name: value for name, value in given.items() if value is not None}
    if "scale" in given and given["scale"] != 1 and not num_classes:
        raise ValueError(f"guidance is {given['scale']} but this model knows no classes: leave guidance out")
    guided = {name: given.pop(name) for name in ("scale", "interval", "channels") if name in given}
    return dataclasses.replace(told, guidance=dataclasses.replace(told.guidance, **guided), **given)


def spread_labels(num: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., V-1, 0, 1, ... (num,): every class about equally often; all 0 where there are no classes."""
    return torch.arange(num) % max(1, num_classes)
