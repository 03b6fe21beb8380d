"""Fused kernels against eager and compiled PyTorch, and against what a copy moves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from odit import checks, models, ops, optim, plan, tree
from odit.bench.common import device_name, now, preset

CLEARED = 2**30  # bytes written between two calls: nothing is left in a cache, and the next call is queued meanwhile


@dataclass(frozen=True)
class Kernels:
    """Each fused kernel, forward and backward, and the optimizer's pass: ms eager, compiled and fused, the last's
    GB/s and their share of a copy's in the same run, errors against fp64."""

    batch: int = 128
    """Samples."""
    tokens: int = 256
    """Tokens of a sample."""
    width: int = 1152
    """Width of the model."""
    heads: int = 16
    """Heads that it is cut into for norm_rotate."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of tensors, and of the optimizer's gradients and copies."""
    kernels: tuple[str, ...] = ("modulate", "gated", "gated_modulate", "norm_rotate", "adamw")
    """Which."""
    preset: str = "dit-xl-2"
    """The optimizer updates the parameters of this preset of train.py."""
    compile: bool = True
    """Times torch.compile of the reference too."""
    repeats: int = 50
    """Measured calls; a row has their median."""
    device: str = "auto"
    """'auto' takes a GPU where there is one; on a CPU kernels are interpreted, and times mean nothing."""


class Case(NamedTuple):
    """A kernel and its reference on some inputs, and how many tensors of x's size forward and backward move."""

    fused: Callable
    reference: Callable
    inputs: tuple[Tensor, ...]
    moved: tuple[int, int]


def kernels(cfg: Kernels) -> None:
    """Prints a row of the copy, then two a kernel, forward and backward, and one of the optimizer."""
    device = checks.pick_device(cfg.device)
    copied = copy_gb_per_s(cfg, device)
    about = {"precision": cfg.precision, "device": device_name(device)}
    print(json.dumps({"name": "copy", **about, "gb_per_s": round(copied, 1)}), flush=True)
    about |= {"batch": cfg.batch, "tokens": cfg.tokens, "width": cfg.width}
    for name in cfg.kernels:
        if name == "adamw":
            print(json.dumps(adamw_row(cfg, device, copied)), flush=True)
            continue
        case = make_case(cfg, name, device)
        for number, direction in enumerate(("forward", "backward")):
            row = kernel_row(cfg, case, direction, case.moved[number], copied)
            print(json.dumps({"name": f"{name} {direction}", **about, **row}), flush=True)


def copy_gb_per_s(cfg: Kernels, device: torch.device) -> float:
    """What a copy of 1 GiB (on a CPU of x's size) reads and writes, GB/s."""
    size = 2**30 if device.type == "cuda" else 4 * cfg.batch * cfg.tokens * cfg.width
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(cfg, lambda: target.copy_(source)) / 1e6


def make_case(cfg: Kernels, name: str, device: torch.device) -> Case:
    """The kernel of that name on inputs that depend on shapes alone; raises ValueError where there is none."""
    from odit.kernels.gated import gated
    from odit.kernels.gated_modulate import gated_modulate
    from odit.kernels.modulate import modulate
    from odit.kernels.qkv import norm_rotate

    B, L, D, H = cfg.batch, cfg.tokens, cfg.width, cfg.heads
    dtype = plan.DTYPES[cfg.precision]
    x, branch = (drawn(n, (B, L, D), device).to(dtype) for n in range(2))
    shift, scale, gate, *_ = drawn(2, (B, 6 * D), device).to(dtype).chunk(6, -1)
    if name == "modulate":
        return Case(modulate, ops.modulate, (x, shift, scale), (2, 3))
    if name == "gated":
        return Case(gated, ops.gated, (x, gate, branch), (3, 3))
    if name == "gated_modulate":
        return Case(gated_modulate, ops.gated_modulate, (x, gate, branch, shift, scale), (4, 6))
    if name != "norm_rotate":
        raise ValueError(f"kernels has {name!r}: use modulate, gated, gated_modulate, norm_rotate or adamw")
    if D % (2 * H):
        raise ValueError(f"width {D} is no even number of values a head for heads {H}: use another number of heads")
    angles, weight = drawn(3, (L, D // H // 2), device), drawn(4, (D // H,), device).to(dtype)
    tables = (angles.cos(), angles.sin())
    q = drawn(5, (B, L, 3, H, D // H), device).to(dtype)[:, :, 0]
    return Case(
        lambda q, weight: norm_rotate(q, weight, tables),
        lambda q, weight: ops.rotate(ops.rms_norm(q, weight), *tables),
        (q, weight),
        (2, 3),
    )


def drawn(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normal values, drawn where they are needed."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def kernel_row(cfg: Kernels, case: Case, direction: str, moved: int, copied: float) -> dict[str, Any]:
    """Times and errors of one direction."""
    ways = {"eager": case.reference, "fused": case.fused}
    if cfg.compile:
        torch._dynamo.reset()
        functorch_config.donated_buffer = False  # the backward pass runs many times
        ways["compile"] = torch.compile(case.reference, dynamic=False)
    exact = results(case.reference, tuple(x.double() for x in case.inputs), direction)()
    found, row = {}, {}
    for way, function in ways.items():
        run = results(function, case.inputs, direction)
        found[way] = worst(run(), exact)
        row[f"{way}_ms"] = round(milliseconds(cfg, run), 4)
    size = case.inputs[0].numel() * case.inputs[0].element_size()
    speed = moved * size / row["fused_ms"] / 1e6
    row |= {"gb_per_s": round(speed, 1), "of_copy": round(speed / copied, 4)}
    return row | {f"{way}_error": error for way, error in found.items()}


def results(function: Callable, inputs: tuple[Tensor, ...], direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the forward pass without a tape, or of the backward pass alone; it returns outputs, or gradients."""
    if direction == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return as_tuple(function(*inputs))

        return forward
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    outputs = as_tuple(function(*inputs))
    cotangents = [drawn(6 + n, y.shape, y.device).to(inputs[0]) for n, y in enumerate(outputs)]
    return lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    """One result as several."""
    return found if isinstance(found, tuple) else (found,)


def worst(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest relative error (of norms) of several results."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact))


def milliseconds(cfg: Kernels, run: Callable[[], Any]) -> float:
    """The median time of a call, on the GPU by its own clock and with cold caches."""
    device = checks.pick_device(cfg.device)
    for _ in range(min(5, cfg.repeats)):
        run()
    if device.type != "cuda":
        times = []
        for _ in range(cfg.repeats):
            began = now(device)
            run()
            times.append(1e3 * (now(device) - began))
        return statistics.median(times)
    scratch = torch.empty(CLEARED, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(cfg.repeats)]
    for before, after in events:
        scratch.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in events)


def adamw_row(cfg: Kernels, device: torch.device, copied: float) -> dict[str, Any]:
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
        "foreach_ms": milliseconds(cfg, apart(optim.adamw())),
        "torch_fused_ms": milliseconds(cfg, apart(optim.adamw(fused=True))),
        "fused_ms": milliseconds(cfg, together),
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
