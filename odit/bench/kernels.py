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

from odit import checks, ops, plan
from odit.bench.common import check_repeats, device_name, now
from odit.kernels import need_triton

CLEARED = 2**28  # bytes written between two calls: nothing is left in a cache
AHEAD = 2_000_000  # cycles of the GPU that pass before a call, which is queued meanwhile


@dataclass(frozen=True)
class Kernels:
    """Each fused kernel, forward and backward: ms eager, compiled and fused, the last's GB/s, their share of a copy's
    in the same run, errors against fp64."""

    batch: int = 128
    """Samples."""
    tokens: int = 256
    """Tokens of a sample."""
    width: int = 1152
    """Width of the model."""
    heads: int = 16
    """Heads that it is cut into for norm_rotate."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of tensors."""
    kernels: tuple[str, ...] = ("modulate", "gated", "gated_modulate", "bias_gelu", "norm_rotate", "bias")
    """Which; bias is the sum over rows that a bias has as its gradient."""
    compile: bool = True
    """Times torch.compile of the reference too."""
    repeats: int = 50
    """Measured calls; a row has their median."""
    device: str = "auto"
    """'auto' takes a GPU where there is one; on a CPU kernels are interpreted, and times mean nothing."""


class Case(NamedTuple):
    """A kernel and its reference on some inputs, and how many tensors of x's size forward and backward move; 0 where
    there is no such kernel."""

    fused: Callable
    reference: Callable
    inputs: tuple[Tensor, ...]
    moved: tuple[int, int]


def kernels(cfg: Kernels) -> None:
    """Prints a row of the copy, then those of kernels, forward and backward."""
    check_repeats("repeats", cfg.repeats)
    need_triton("bench.py kernels")
    device = checks.pick_device(cfg.device)
    copied = copy_gb_per_s(device, cfg.repeats, 4 * cfg.batch * cfg.tokens * cfg.width)
    about = {"precision": cfg.precision, "device": device_name(device)}
    print(json.dumps({"name": "copy", **about, "gb_per_s": round(copied, 1)}), flush=True)
    about |= {"batch": cfg.batch, "tokens": cfg.tokens, "width": cfg.width}
    for name in cfg.kernels:
        case = make_case(cfg, name, device)
        for direction, moved in zip(("forward", "backward"), case.moved):
            if moved:
                row = kernel_row(cfg, case, direction, moved, copied)
                print(json.dumps({"name": f"{name} {direction}", **about, **row}), flush=True)


def copy_gb_per_s(device: torch.device, repeats: int, size: int) -> float:
    """What a copy of 1 GiB, on a CPU of ``size`` bytes, reads and writes: GB/s."""
    size = 2**30 if device.type == "cuda" else size
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(device, repeats, lambda: target.copy_(source)) / 1e6


def make_case(cfg: Kernels, name: str, device: torch.device) -> Case:
    """The kernel of that name on inputs that depend on shapes alone; raises ValueError where there is none."""
    from odit.kernels.bias_gelu import bias_gelu
    from odit.kernels.bias_gelu import reference as gelu_reference
    from odit.kernels.gated import gated
    from odit.kernels.gated_modulate import gated_modulate
    from odit.kernels.linear import column_sums
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
    if name == "bias_gelu":
        y, b = drawn(0, (B, L, 4 * D), device).to(dtype), drawn(1, (4 * D,), device).to(dtype)
        return Case(bias_gelu, gelu_reference, (y, b.expand(B, -1)), (2, 3))
    if name == "bias":
        return Case(lambda x: column_sums(x.flatten(0, 1)[None])[0], lambda x: x.sum((0, 1)), (x,), (1, 0))
    if name != "norm_rotate":
        raise ValueError(f"kernels has {name!r}: use modulate, gated, gated_modulate, bias_gelu, norm_rotate, bias")
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
        row[f"{way}_ms"] = round(milliseconds(case.inputs[0].device, cfg.repeats, run), 4)
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


def milliseconds(device: torch.device, repeats: int, run: Callable[[], Any]) -> float:
    """The median time of a call, on the GPU by its own clock and with cold caches."""
    for _ in range(min(5, repeats)):
        run()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = now(device)
            run()
            times.append(1e3 * (now(device) - began))
        return statistics.median(times)
    scratch = torch.empty(CLEARED, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        scratch.zero_()
        torch.cuda._sleep(AHEAD)
        before.record()
        run()
        after.record()
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in events)
