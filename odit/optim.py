"""Optimizers as (init, update_), clipping, learning-rate schedules and the EMA; all elementwise but the norm.

State and parameters are fp32 (fp64 in tests). In-place functions end in ``_`` and need no gradient tape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from odit import tree


@dataclass(frozen=True)
class Config:
    """How weights move."""

    lr: float = 1e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, applied to every leaf as DiT's AdamW does."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Shape of the fall from the end of warm-up to the run's last step."""
    final_lr: float = 0.0
    """Learning rate that the decay ends at."""
    clip: float = 0.0
    """Largest global gradient norm; 0 leaves gradients alone."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the weights (DiT: 0.9999)."""
    ema_warmup: bool = True
    """Uses min(decay, (1 + n) / (10 + n)) after n updates, so that short runs forget their start; off is DiT's rule."""


def check(cfg: Config) -> None:
    """Refuses settings no run can use; raises ValueError with key, value and a fix."""
    for name in ("lr", "final_lr", "eps", "clip", "weight_decay"):
        value = getattr(cfg, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"optimizer.{name} is {value}: use a finite number >= 0")
    if cfg.lr == 0:
        raise ValueError("optimizer.lr is 0.0, so nothing would be learned: use a positive number such as 1e-4")
    for name in ("beta1", "beta2", "ema_decay"):
        value = getattr(cfg, name)
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{name} is {value}: use a number in [0, 1)")
    if cfg.warmup < 0:
        raise ValueError(f"optimizer.warmup is {cfg.warmup}: use 0 or more steps")
    if cfg.final_lr > cfg.lr:
        raise ValueError(f"optimizer.final_lr {cfg.final_lr} is above optimizer.lr {cfg.lr}: use at most {cfg.lr}")
    if cfg.decay == "none" and cfg.final_lr != 0:
        raise ValueError(
            f"optimizer.final_lr is {cfg.final_lr} but optimizer.decay is none: use --optimizer.decay linear or cosine"
        )


class AdamState(NamedTuple):
    """Moments shaped like the parameters (fp32) and the number of updates made (int64 scalar, on the CPU)."""

    m: tree.Tree
    v: tree.Tree
    count: Tensor


class Optimizer(NamedTuple):
    """``init(params) -> state`` and ``update_(params, grads, state, lr) -> state``, which moves params in place."""

    init: Callable
    update_: Callable


def adamw(
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, fused: bool = False
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), decay scaled by the learning rate as in torch.optim.AdamW.

    ``fused`` makes one pass over memory (PyTorch's own kernel, CPU and GPU) in place of eight and rounds differently in
    the last bit; both give an element the same bits however the leaves are cut.
    """

    def init(params: tree.Tree) -> AdamState:
        zeros = tree.map(torch.zeros_like, params)
        return AdamState(zeros, tree.map(torch.zeros_like, params), torch.zeros((), dtype=torch.int64))

    def fused_(p: list, g: list, m: list, v: list, lr: float, step: int) -> None:
        steps = [torch.full((), step - 1.0, dtype=torch.float32, device=x.device) for x in p]
        settings = {"beta1": beta1, "beta2": beta2, "lr": lr, "weight_decay": weight_decay, "eps": eps}
        torch_adamw(p, g, m, v, [], steps, fused=True, amsgrad=False, maximize=False, **settings)

    @torch.no_grad()
    def update_(params: tree.Tree, grads: tree.Tree, state: AdamState, lr: float) -> AdamState:
        p, g, m, v = (tree.leaves(t) for t in (params, grads, state.m, state.v))
        count = state.count + 1
        step = int(count)
        if fused:
            fused_(p, g, m, v, lr, step)
            return AdamState(state.m, state.v, count)
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denominator, eps)
        if weight_decay:
            torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_addcdiv_(p, m, denominator, -lr / (1 - beta1**step))
        return AdamState(state.m, state.v, count)

    return Optimizer(init, update_)


def learning_rate(cfg: Config, step: int, steps: int) -> float:
    """Learning rate of 0-based ``step`` in a run of ``steps``: linear warm-up, then the chosen decay."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.decay == "none":
        return cfg.lr
    done = min(1.0, (step - cfg.warmup) / max(1, steps - cfg.warmup))
    left = 1 - done if cfg.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.final_lr + (cfg.lr - cfg.final_lr) * left


def squared_norm(grads: tree.Tree) -> Tensor:
    """Sum of squares over all leaves, in at least fp32; a scalar tensor. A sharded caller sums it across ranks."""
    leaves = tree.leaves(grads)
    norms = torch._foreach_norm(leaves, dtype=torch.promote_types(leaves[0].dtype, torch.float32))
    return torch.stack(norms).square().sum()


@torch.no_grad()
def clip_(grads: tree.Tree, norm: float, limit: float) -> None:
    """Scales gradients in place by min(1, limit / norm), given their global norm."""
    if norm > limit:
        torch._foreach_mul_(tree.leaves(grads), limit / norm)


def ema_rate(cfg: Config, updates: int) -> float:
    """Decay of the EMA after ``updates`` updates."""
    return min(cfg.ema_decay, (1 + updates) / (10 + updates)) if cfg.ema_warmup else cfg.ema_decay


@torch.no_grad()
def ema_(ema: tree.Tree, params: tree.Tree, decay: float) -> None:
    """Moves ``ema`` towards ``params`` in place: ema = decay * ema + (1 - decay) * params."""
    torch._foreach_lerp_(tree.leaves(ema), tree.leaves(params), 1 - decay)
