"""Tokens of a time x space model turned from one axis to the other: (B, T, S, D) as (B, S, T, D), a copy at its full
speed (PyTorch's of a transposed tensor moves an element at a time, at half of it). The gradient is turned back."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from odit import ops
from odit.kernels.function import entry, served
from odit.kernels.launch import launch

VALUES, WARPS = 4096, 4  # of a program
WIDEST = 2**20


@triton.jit
def kernel(x_ptr, y_ptr, T, S, D, rows, blocks, x_b, x_t, x_s, R: tl.constexpr, C: tl.constexpr):
    block, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row_R = group.to(tl.int64) * R + tl.arange(0, R)  # of y: sample, place, frame
    column_C = block * C + tl.arange(0, C)
    mask = (row_R < rows)[:, None] & (column_C < D)[None, :]
    from_R = row_R // (T * S) * x_b + row_R % T * x_t + row_R // T % S * x_s
    values = tl.load(x_ptr + from_R[:, None] + column_C[None, :], mask=mask)
    tl.store(y_ptr + row_R[:, None] * D + column_C[None, :], values, mask=mask)


def forward(x_BTSD: Tensor) -> Tensor:
    """(B, S, T, D), contiguous."""
    x = x_BTSD if x_BTSD.stride(-1) == 1 else x_BTSD.contiguous()
    B, T, S, D = x.shape
    y = x.new_empty((B, S, T, D))
    C = min(512, max(128, D & -D))  # the largest power of two that divides it
    R, rows, blocks = VALUES // C, B * T * S, triton.cdiv(D, C)
    constants = {"R": R, "C": C, "num_warps": WARPS}
    launch(kernel, triton.cdiv(rows, R) * blocks, x.device, x, y, T, S, D, rows, blocks, *x.stride()[:3], **constants)
    return y


def _fake(x_BTSD: Tensor) -> Tensor:
    B, T, S, D = x_BTSD.shape
    return x_BTSD.new_empty((B, S, T, D))


run = entry(
    "turn",
    forward,
    forward,  # of the gradient, whose frames and places have changed sides
    ("(Tensor x) -> Tensor", "(Tensor dy) -> Tensor"),
    (_fake, _fake),
    saved=lambda inputs, y: (),
    gradients=lambda cotangents, found: (found,),
    tangent=lambda dx: ops.turn(dx),
    plain_backward=ops.turn,
)


def turn(x_BTSD: Tensor) -> Tensor:
    """``ops.turn`` as one kernel; the reference itself for fp64."""
    return run(x_BTSD) if served(WIDEST, x_BTSD) else ops.turn(x_BTSD)
