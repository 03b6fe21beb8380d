"""The gated residual in one pass: x + gate branch.

Forward reads x and branch and writes their sum: 6 bytes an element in half precision. Backward reads dx' and branch and
writes dbranch, 6 bytes; dx is dx' itself.

    dbranch = gate dx'
    dgate = sum of dx' branch      over L
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
    nothing,
    place,
    read,
    spread,
    tiling,
    times,
    times_plus,
    totals,
    write,
    write_sum,
)

FORWARD = Tuning(warps_a_row=1, programs=16 * SMS, stages=1, resident=False)
BACKWARD = Tuning(warps_a_row=4, programs=4 * SMS, stages=3, resident=True)


@triton.jit
def forward_kernel(
    x_ptr, gate_ptr, branch_ptr, out_ptr, L, spans, x_b, x_l, gate_b, branch_b, branch_l,
    D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    b, first, tokens = place(L, STEPS * R, spans)
    row_R = tl.arange(0, R)
    gate = spread(gate_ptr + b * gate_b, row_R, D, W)
    x_ptr += b * x_b + first * x_l
    branch_ptr += b * branch_b + first * branch_l
    out_ptr += (b * L + first) * D
    for start in tl.range(0, STEPS * R, R, num_stages=STAGES):
        here_R = start + row_R < tokens
        x = read(x_ptr, x_l, start + row_R, here_R, D, W)
        branch = read(branch_ptr, branch_l, start + row_R, here_R, D, W)
        write(out_ptr, D, start + row_R, here_R, times_plus(gate, branch, x, D, W), D, W)


@triton.jit
def backward_kernel(
    dout_ptr, gate_ptr, branch_ptr, dbranch_ptr, partial_ptr, L, spans, dout_b, dout_l, gate_b, branch_b,
    branch_l, D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    b, first, tokens = place(L, STEPS * R, spans)
    row_R = tl.arange(0, R)
    gate = spread(gate_ptr + b * gate_b, row_R, D, W)
    dout_ptr += b * dout_b + first * dout_l
    branch_ptr += b * branch_b + first * branch_l
    dbranch_ptr += (b * L + first) * D
    dgate = nothing(R, D, W)
    for start in tl.range(0, STEPS * R, R, num_stages=STAGES):
        here_R = start + row_R < tokens
        dout = read(dout_ptr, dout_l, start + row_R, here_R, D, W)
        branch = read(branch_ptr, branch_l, start + row_R, here_R, D, W)
        dgate = times_plus(dout, branch, dgate, D, W)
        write(dbranch_ptr, D, start + row_R, here_R, times(gate, dout, D, W), D, W)
    write_sum(partial_ptr + tl.program_id(0).to(tl.int64) * D, dgate, D, W)


def forward(x_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor) -> Tensor:
    """x', contiguous."""
    x, gate, branch = map(by_rows, (x_BLD, gate_BD, branch_BLD))
    out = empty(x)
    B, L, _ = x.shape
    cut = tiling(x, FORWARD)
    strides = (x.stride(0), x.stride(1), gate.stride(0), branch.stride(0), branch.stride(1))
    launch(
        forward_kernel, B * cut.spans, x.device, x, gate, branch, out, L, cut.spans, *strides,
        **cut.constants,
    )  # fmt: skip
    return out


def backward(dout_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """dbranch and dgate."""
    dout, gate, branch = map(by_rows, (dout_BLD, gate_BD, branch_BLD))
    dbranch = empty(branch)
    B, L, D = branch.shape
    cut = tiling(branch, BACKWARD)
    partial = branch.new_empty((B, cut.spans, 1, D), dtype=torch.float32)
    strides = (dout.stride(0), dout.stride(1), gate.stride(0), branch.stride(0), branch.stride(1))
    launch(
        backward_kernel, B * cut.spans, branch.device, dout, gate, branch, dbranch, partial, L, cut.spans,
        *strides, **cut.constants,
    )  # fmt: skip
    return dbranch, totals(partial, gate.dtype)[:, 0]


def plain_backward(dout_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """``backward`` by the reference."""
    pull = torch.func.vjp(lambda *tensors: ops.gated(torch.zeros_like(dout_BLD), *tensors), gate_BD, branch_BLD)[1]
    dgate, dbranch = pull(dout_BLD)
    return dbranch, dgate


run = entry(
    "gated",
    forward,
    backward,
    (
        "(Tensor x, Tensor gate, Tensor branch) -> Tensor",
        "(Tensor dout, Tensor gate, Tensor branch) -> (Tensor, Tensor)",
    ),
    (lambda x, gate, branch: empty(x), lambda dout, gate, branch: (empty(branch), empty(gate))),
    saved=lambda inputs, out: inputs[1:],
    gradients=lambda cotangents, found: (cotangents[0], found[1], found[0]),
    tangent=lambda gate, branch, dx, dgate, dbranch: dx + dgate[:, None] * branch + gate[:, None] * dbranch,
    plain_backward=plain_backward,
)


def gated(x_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor) -> Tensor:
    """``ops.gated`` as one kernel; the reference itself for fp64, mixed dtypes and rows beyond ``WIDEST``."""
    if not served(WIDEST, x_BLD, gate_BD, branch_BLD):
        return ops.gated(x_BLD, gate_BD, branch_BLD)
    return run(x_BLD, gate_BD, branch_BLD)
