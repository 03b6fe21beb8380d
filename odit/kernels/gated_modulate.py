"""The gated residual and the next modulated input in one pass: x' = x + gate branch, h = n (1 + scale) + shift with
n = (x' - mean) / std.

Forward reads x and branch and writes x' and h: 8 bytes an element in half precision. Backward reads dx', dh, x' and
branch and writes dx and dbranch, 12 bytes; x itself is not kept. With g = dh (1 + scale):

    dx = dx' + (g - mean(g) - n mean(g n)) / std                           means over D
    dbranch = gate dx
    dgate = sum of dx branch, dshift = sum of dh, dscale = sum of dh n     sums over L
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from odit import ops
from odit.kernels import modulate as norm
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
    rounded,
    spread,
    standardise,
    tiling,
    times,
    times_plus,
    totals,
    write,
    write_sum,
)

FORWARD = Tuning(warps_a_row=1, programs=16 * SMS, stages=1, resident=False)
BACKWARD = Tuning(warps_a_row=2, programs=2 * SMS, stages=3, resident=True)


@triton.jit
def forward_kernel(
    x_ptr, gate_ptr, branch_ptr, shift_ptr, scale_ptr, out_ptr, h_ptr, L, spans, x_b, x_l, branch_b, branch_l,
    gate_b, shift_b, scale_b, eps, D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    b, first, tokens = place(L, STEPS * R, spans)
    row_R = tl.arange(0, R)
    gate = spread(gate_ptr + b * gate_b, row_R, D, W)
    shift, scale = spread(shift_ptr + b * shift_b, row_R, D, W), spread(scale_ptr + b * scale_b, row_R, D, W)
    x_ptr += b * x_b + first * x_l
    branch_ptr += b * branch_b + first * branch_l
    out_ptr += (b * L + first) * D
    h_ptr += (b * L + first) * D
    for start in tl.range(0, STEPS * R, R, num_stages=STAGES):
        here_R = start + row_R < tokens
        x = read(x_ptr, x_l, start + row_R, here_R, D, W)
        branch = read(branch_ptr, branch_l, start + row_R, here_R, D, W)
        out = rounded(times_plus(gate, branch, x, D, W), out_ptr, D, W)  # h is that of the x' which is stored
        write(out_ptr, D, start + row_R, here_R, out, D, W)
        n, _ = standardise(out, here_R, eps, D, W)
        write(h_ptr, D, start + row_R, here_R, modulated(n, shift, scale, D, W), D, W)


@triton.jit
def backward_kernel(
    dout_ptr, dh_ptr, out_ptr, gate_ptr, branch_ptr, scale_ptr, dx_ptr, dbranch_ptr, partial_ptr, L, spans,
    dout_b, dout_l, dh_b, dh_l, branch_b, branch_l, gate_b, scale_b, eps,
    D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    b, first, tokens = place(L, STEPS * R, spans)
    row_R = tl.arange(0, R)
    gate, scale = spread(gate_ptr + b * gate_b, row_R, D, W), spread(scale_ptr + b * scale_b, row_R, D, W)
    dout_ptr += b * dout_b + first * dout_l
    dh_ptr += b * dh_b + first * dh_l
    branch_ptr += b * branch_b + first * branch_l
    out_ptr += (b * L + first) * D
    dx_ptr += (b * L + first) * D
    dbranch_ptr += (b * L + first) * D
    dgate, dshift, dscale = nothing(R, D, W), nothing(R, D, W), nothing(R, D, W)
    for start in tl.range(0, STEPS * R, R, num_stages=STAGES):
        here_R = start + row_R < tokens
        dh = read(dh_ptr, dh_l, start + row_R, here_R, D, W)
        n, rstd_R = standardise(read(out_ptr, D, start + row_R, here_R, D, W), here_R, eps, D, W)
        dshift, dscale = plus(dshift, dh, D, W), times_plus(dh, n, dscale, D, W)
        dx = plus(read(dout_ptr, dout_l, start + row_R, here_R, D, W), norm_backward(dh, n, rstd_R, scale, D, W), D, W)
        write(dx_ptr, D, start + row_R, here_R, dx, D, W)
        write(dbranch_ptr, D, start + row_R, here_R, times(gate, dx, D, W), D, W)
        dgate = times_plus(dx, read(branch_ptr, branch_l, start + row_R, here_R, D, W), dgate, D, W)
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * D
    write_sum(partial_ptr, dgate, D, W)
    write_sum(partial_ptr + D, dshift, D, W)
    write_sum(partial_ptr + 2 * D, dscale, D, W)


def forward(
    x_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x' and h, contiguous."""
    x, gate, branch, shift, scale = map(by_rows, (x_BLD, gate_BD, branch_BLD, shift_BD, scale_BD))
    out, h = empty(x), empty(x)
    B, L, _ = x.shape
    cut = tiling(x, FORWARD)
    strides = (x.stride(0), x.stride(1), branch.stride(0), branch.stride(1))
    strides += (gate.stride(0), shift.stride(0), scale.stride(0))
    launch(
        forward_kernel, B * cut.spans, x.device, x, gate, branch, shift, scale, out, h, L, cut.spans,
        *strides, eps, **cut.constants,
    )  # fmt: skip
    return out, h


def backward(
    dout_BLD: Tensor, dh_BLD: Tensor, out_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dbranch, and dgate, dshift and dscale as one (B, 3, D)."""
    dout, dh, gate, branch, scale = map(by_rows, (dout_BLD, dh_BLD, gate_BD, branch_BLD, scale_BD))
    out = out_BLD.contiguous()
    dx, dbranch = empty(out), empty(out)
    B, L, D = out.shape
    cut = tiling(out, BACKWARD)
    partial = out.new_empty((B, cut.spans, 3, D), dtype=torch.float32)
    strides = (dout.stride(0), dout.stride(1), dh.stride(0), dh.stride(1), branch.stride(0), branch.stride(1))
    strides += (gate.stride(0), scale.stride(0))
    launch(
        backward_kernel, B * cut.spans, out.device, dout, dh, out, gate, branch, scale, dx, dbranch, partial, L,
        cut.spans, *strides, eps, **cut.constants,
    )  # fmt: skip
    return dx, dbranch, totals(partial, out.dtype)


def plain_backward(
    dout_BLD: Tensor, dh_BLD: Tensor, out_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``backward`` by the reference."""
    normed, both_B2D = norm.plain_backward(dh_BLD, out_BLD, scale_BD, eps)
    dx = dout_BLD + normed
    dgate = (dx * branch_BLD).sum(1)
    return dx, gate_BD[:, None] * dx, torch.cat((dgate[:, None], both_B2D), 1)


def tangent(
    out: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, dx: Tensor, dgate: Tensor, dbranch: Tensor,
    dshift: Tensor, dscale: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The change of x' and h, in plain PyTorch."""
    dout = dx + dgate[:, None] * branch + gate[:, None] * dbranch
    return dout, norm.tangent(out, scale, dout, dshift, dscale, eps)


run = entry(
    "gated_modulate",
    forward,
    backward,
    (
        "(Tensor x, Tensor gate, Tensor branch, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
        "(Tensor dout, Tensor dh, Tensor out, Tensor gate, Tensor branch, Tensor scale, float eps)"
        " -> (Tensor, Tensor, Tensor)",
    ),
    (
        lambda x, gate, branch, shift, scale, eps: (empty(x), empty(x)),
        lambda dout, dh, out, *rest: (empty(out), empty(out), out.new_empty((out.shape[0], 3, out.shape[2]))),
    ),
    saved=lambda inputs, outputs: (outputs[0], inputs[1], inputs[2], inputs[4]),
    gradients=lambda _, found: (found[0], found[2][:, 0], found[1], found[2][:, 1], found[2][:, 2]),
    tangent=tangent,
    plain_backward=plain_backward,
)


def gated_modulate(
    x_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = ops.EPS
) -> tuple[Tensor, Tensor]:
    """``ops.gated_modulate`` as one kernel; the reference itself for fp64, mixed dtypes and rows beyond ``WIDEST``."""
    if not served(WIDEST, x_BLD, gate_BD, branch_BLD, shift_BD, scale_BD):
        return ops.gated_modulate(x_BLD, gate_BD, branch_BLD, shift_BD, scale_BD, eps)
    return run(x_BLD, gate_BD, branch_BLD, shift_BD, scale_BD, eps)
