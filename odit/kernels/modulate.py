"""LayerNorm without affine and modulation in one pass: h = n (1 + scale) + shift with n = (x - mean) / std.

Forward reads x and writes h: 4 bytes an element in half precision. Backward reads dh and x and writes dx, 6 bytes;
mean and std come from x again, so that nothing is kept beside x and scale. With g = dh (1 + scale):

    dx = (g - mean(g) - n mean(g n)) / std        means over D
    dshift = sum of dh, dscale = sum of dh n      sums over L
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from odit import ops
from odit.kernels.function import by_rows, empty, entry, served
from odit.kernels.launch import launch
from odit.kernels.rows import (
    SMS,
    WIDEST,
    Tuning,
    modulated,
    norm_backward,
    nothing,
    place,
    plus,
    read,
    spread,
    standardise,
    tiling,
    times_plus,
    totals,
    write,
    write_sum,
)

FORWARD = Tuning(warps_a_row=1, programs=16 * SMS, stages=2, resident=False)
BACKWARD = Tuning(warps_a_row=2, programs=3 * SMS, stages=3, resident=True)


@triton.jit
def forward_kernel(
    x_ptr, shift_ptr, scale_ptr, h_ptr, L, spans, x_b, x_l, shift_b, scale_b, eps,
    D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    b, first, tokens = place(L, STEPS * R, spans)
    row_R = tl.arange(0, R)
    shift, scale = spread(shift_ptr + b * shift_b, row_R, D, W), spread(scale_ptr + b * scale_b, row_R, D, W)
    x_ptr += b * x_b + first * x_l
    h_ptr += (b * L + first) * D
    for start in tl.range(0, STEPS * R, R, num_stages=STAGES):
        here_R = start + row_R < tokens
        n, _ = standardise(read(x_ptr, x_l, start + row_R, here_R, D, W), here_R, eps, D, W)
        write(h_ptr, D, start + row_R, here_R, modulated(n, shift, scale, D, W), D, W)


@triton.jit
def backward_kernel(
    dh_ptr, x_ptr, scale_ptr, dx_ptr, partial_ptr, L, spans, dh_b, dh_l, x_b, x_l, scale_b, eps,
    D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    b, first, tokens = place(L, STEPS * R, spans)
    row_R = tl.arange(0, R)
    scale = spread(scale_ptr + b * scale_b, row_R, D, W)
    dh_ptr += b * dh_b + first * dh_l
    x_ptr += b * x_b + first * x_l
    dx_ptr += (b * L + first) * D
    dshift, dscale = nothing(R, D, W), nothing(R, D, W)
    for start in tl.range(0, STEPS * R, R, num_stages=STAGES):
        here_R = start + row_R < tokens
        dh = read(dh_ptr, dh_l, start + row_R, here_R, D, W)
        n, rstd_R = standardise(read(x_ptr, x_l, start + row_R, here_R, D, W), here_R, eps, D, W)
        dshift, dscale = plus(dshift, dh, D, W), times_plus(dh, n, dscale, D, W)
        write(dx_ptr, D, start + row_R, here_R, norm_backward(dh, n, rstd_R, scale, D, W), D, W)
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    write_sum(partial_ptr, dshift, D, W)
    write_sum(partial_ptr + D, dscale, D, W)


def forward(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    """h, contiguous."""
    x, shift, scale = map(by_rows, (x_BLD, shift_BD, scale_BD))
    h = empty(x)
    B, L, _ = x.shape
    cut = tiling(x, FORWARD)
    strides = (x.stride(0), x.stride(1), shift.stride(0), scale.stride(0))
    launch(
        forward_kernel, B * cut.spans, x.device, x, shift, scale, h, L, cut.spans, *strides, eps,
        **cut.constants,
    )  # fmt: skip
    return h


def backward(dh_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dx, and dshift and dscale as one (B, 2, D)."""
    dh, x, scale = map(by_rows, (dh_BLD, x_BLD, scale_BD))
    dx = empty(x)
    B, L, D = x.shape
    cut = tiling(x, BACKWARD)
    partial = x.new_empty((B, cut.spans, 2, D), dtype=torch.float32)
    strides = (dh.stride(0), dh.stride(1), x.stride(0), x.stride(1), scale.stride(0))
    launch(
        backward_kernel, B * cut.spans, x.device, dh, x, scale, dx, partial, L, cut.spans, *strides, eps,
        **cut.constants,
    )  # fmt: skip
    return dx, totals(partial, x.dtype)


def plain_backward(dh_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``backward`` by the reference."""
    shift_BD = torch.zeros_like(scale_BD)
    pull = torch.func.vjp(lambda *tensors: ops.modulate(*tensors, eps), x_BLD, shift_BD, scale_BD)[1]
    dx, dshift, dscale = pull(dh_BLD)
    return dx, torch.stack((dshift, dscale), 1)


def tangent(x: Tensor, scale: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor, eps: float) -> Tensor:
    """The change of h with x, shift and scale, in plain PyTorch."""
    dtype = x.dtype
    x, scale, dx, dshift, dscale = (y.float() for y in (x, scale, dx, dshift, dscale))
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    n = (x - mean) * torch.rsqrt(variance + eps)
    dn = dx - dx.mean(-1, keepdim=True) - n * (n * dx).mean(-1, keepdim=True)
    dh = dn * torch.rsqrt(variance + eps) * (1 + scale[:, None]) + n * dscale[:, None] + dshift[:, None]
    return dh.to(dtype)


run = entry(
    "modulate",
    forward,
    backward,
    (
        "(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor",
        "(Tensor dh, Tensor x, Tensor scale, float eps) -> (Tensor, Tensor)",
    ),
    (
        lambda x, shift, scale, eps: empty(x),
        lambda dh, x, scale, eps: (empty(x), x.new_empty((x.shape[0], 2, x.shape[2]))),
    ),
    saved=lambda inputs, h: (inputs[0], inputs[2]),
    gradients=lambda cotangents, found: (found[0], found[1][:, 0], found[1][:, 1]),
    tangent=tangent,
    plain_backward=plain_backward,
)


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = ops.EPS) -> Tensor:
    """``ops.modulate`` as one kernel; the reference itself for fp64, mixed dtypes and rows beyond ``WIDEST``."""
    if not served(WIDEST, x_BLD, shift_BD, scale_BD):
        return ops.modulate(x_BLD, shift_BD, scale_BD, eps)
    return run(x_BLD, shift_BD, scale_BD, eps)
