"""The optimizer's update of a whole model, in one pass and in several."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from odit import checks, models, optim, plan, tree
from odit.bench.common import device_name, preset
from odit.bench.kernels import copy_gb_per_s, drawn, milliseconds, worst
from odit.kernels import need_triton


@dataclass(frozen=True)
class Optimizer:
    """AdamW, EMA and the copy in half precision on a model's parameters: PyTorch's foreach, its fused AdamW, one pass.
    GB/s of the last, their share of a copy's in the same run, errors against fp64."""

    preset: str = "dit-xl-2"
    """The parameters of this preset of train.py."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of gradients and of the copy."""
    repeats: int = 50
    """Measured updates; the row has their median."""
    device: str = "auto"
    """'auto' takes a GPU where there is one; on a CPU the kernel is interpreted, and times mean nothing."""


def optimizer(cfg: Optimizer) -> None:
    """Prints a row of the copy and one of the update."""
    need_triton("bench.py optimizer")
    device = checks.pick_device(cfg.device)
    copied = copy_gb_per_s(device, cfg.repeats, 2**24)
    print(json.dumps({"name": "copy", "device": device_name(device), "gb_per_s": round(copied, 1)}), flush=True)
    print(json.dumps(adamw_row(cfg, device, copied)), flush=True)


def adamw_row(cfg: Optimizer, device: torch.device, copied: float) -> dict[str, Any]:
    """AdamW, EMA and copy on a model's parameters: foreach, PyTorch's fused AdamW, one pass."""
    from odit.kernels import adamw

    run = preset(cfg.preset)
    shape = checks.expected_shape(run)
    if shape is None:
        raise ValueError(f"preset is {cfg.preset}, whose shapes an encoder decides: use one without encoders")
    declared = models.of(run.model).declare(run.model, shape)
    dtype, decay, lr = plan.DTYPES[cfg.precision], 0.999, 1e-4

    def full(value: float, dtype: torch.dtype = torch.float32) -> tree.Tree:
        return tree.map(lambda p: torch.full(p.shape, value, dtype=dtype, device=device), declared)

    p, m, v, ema = map(full, (0.5, 0.01, 1e-4, 0.5))
    grads, low = full(0.02, dtype), full(0.0, dtype)

    def apart(optimizer: optim.Optimizer) -> Callable[[], None]:
        moments = optim.AdamState(m, v, torch.tensor(10))

        def step() -> None:
            optimizer.update_(p, tree.map(lambda g: g.float(), grads), moments, lr)
            optim.ema_(ema, p, decay)
            torch._foreach_copy_(tree.leaves(low), tree.leaves(p))

        return step

    def together() -> None:
        one_pass.update_(p, grads, optim.AdamState(m, v, torch.tensor(10)), lr, ema=ema, decay=decay, low=low)

    one_pass = adamw.fused(optim.adamw())
    num = sum(x.numel() for x in tree.leaves(p))
    size = num * (32 + 2 * dtype.itemsize)
    ms = {
        "foreach_ms": milliseconds(device, cfg.repeats, apart(optim.adamw())),
        "torch_fused_ms": milliseconds(device, cfg.repeats, apart(optim.adamw(fused=True))),
        "fused_ms": milliseconds(device, cfg.repeats, together),
    }
    speed = size / ms["fused_ms"] / 1e6
    return {
        "name": "adamw",
        "preset": cfg.preset,
        "precision": cfg.precision,
        "device": device_name(device),
        "parameters": num,
        **{key: round(value, 4) for key, value in ms.items()},
        "gb_per_s": round(speed, 1),
        "of_copy": round(speed / copied, 4),
        **adamw_errors(device),
    }


def adamw_errors(device: torch.device) -> dict[str, float]:
    """Errors of one update of a leaf's weights and EMA against fp64."""
    from odit.kernels import adamw

    values = [drawn(n, (99999,), device) for n in range(3)]
    found = {}
    for name, dtype in (("exact", torch.float64), ("eager", torch.float32), ("fused", torch.float32)):
        p, m, g = (x.to(dtype, copy=True) for x in values)
        v, ema, optimizer = g.square(), p.clone(), optim.adamw()
        before = p.clone()
        state = optim.AdamState([m], [v], torch.tensor(10))
        if name == "fused":
            adamw.fused(optimizer).update_([p], [g], state, 1e-2, ema=[ema], decay=0.9)
        else:
            optimizer.update_([p], [g], state, 1e-2)
            optim.ema_([ema], [p], 0.9)
        found[name] = (p - before, m, v, ema)
    return {f"{name}_error": worst(found[name], found["exact"]) for name in ("eager", "fused")}
