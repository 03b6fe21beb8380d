"""Bias and tanh-GELU in one pass over what the product into the mlp gives: h = gelu(y + b).

Forward reads y and writes h: 4 bytes an element in half precision. Backward reads dh and y and writes dy, 6 bytes, and
sums the bias's gradient on the way, which would otherwise read dy again. With x = y + b, s = sigmoid(2 u) and
u = sqrt(2 / pi) (x + 0.044715 x^3), so that gelu(x) = x s (Hendrycks and Gimpel 2016; tanh(u) = 2 sigmoid(2 u) - 1):

    dy = dh (s + 2 x s (1 - s) u')
    db = sum of dy      over L
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from odit import ops
from odit.kernels.function import by_rows, empty, entry, served
from odit.kernels.launch import launch
from odit.kernels.linear import linear
from odit.kernels.rows import totals

TWICE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)
ROWS, COLUMNS, WARPS = 8, 512, 4  # of a tile
FORWARD_STEPS, BACKWARD_STEPS = 2, 8  # tiles of a program, one below the other
WIDEST = 2**20


@triton.jit
def place(L, F, spans, blocks, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr):
    """(sample, first token, columns, which of them are there) of this program; neighbours have neighbouring columns."""
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    column_C = block * C + tl.arange(0, C)
    return (rest // spans).to(tl.int64), (rest % spans) * STEPS * R, column_C, column_C < F


@triton.jit
def exponential(x):
    """exp(-2 u), so that s = 1 / (1 + it) and 1 - s = it s, neither a difference; below 2^127, as 0 times that is 0."""
    return tl.exp(tl.minimum(-x * (TWICE + TWICE * CUBIC * (x * x)), 80.0))


@triton.jit
def forward_kernel(
    y_ptr, b_ptr, h_ptr, L, F, spans, blocks, y_b, y_l, b_b,
    R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    sample, first, column_C, there_C = place(L, F, spans, blocks, R, C, STEPS)
    b = tl.load(b_ptr + sample * b_b + column_C, mask=there_C, other=0.0).to(tl.float32)
    y_ptr += sample * y_b
    h_ptr += sample * L * F
    for step in tl.static_range(STEPS):
        row_R = (first + step * R + tl.arange(0, R)).to(tl.int64)
        mask = (row_R < L)[:, None] & there_C[None, :]
        x = tl.load(y_ptr + row_R[:, None] * y_l + column_C[None, :], mask=mask, other=0.0).to(tl.float32) + b[None, :]
        h = x / (1.0 + exponential(x))
        tl.store(h_ptr + row_R[:, None] * F + column_C[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dh_ptr, y_ptr, b_ptr, dy_ptr, partial_ptr, L, F, spans, blocks, dh_b, dh_l, y_b, y_l, b_b,
    R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    sample, first, column_C, there_C = place(L, F, spans, blocks, R, C, STEPS)
    b = tl.load(b_ptr + sample * b_b + column_C, mask=there_C, other=0.0).to(tl.float32)
    dh_ptr += sample * dh_b
    y_ptr += sample * y_b
    dy_ptr += sample * L * F
    db = tl.zeros((R, C), tl.float32)
    for step in tl.range(0, STEPS, num_stages=2):
        row_R = (first + step * R + tl.arange(0, R)).to(tl.int64)
        mask = (row_R < L)[:, None] & there_C[None, :]
        dh = tl.load(dh_ptr + row_R[:, None] * dh_l + column_C[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(y_ptr + row_R[:, None] * y_l + column_C[None, :], mask=mask, other=0.0).to(tl.float32) + b[None, :]
        e = exponential(x)
        s = 1.0 / (1.0 + e)
        dy = dh * (s + x * s * (e * s) * (TWICE + 3.0 * TWICE * CUBIC * (x * x)))
        db += dy  # where no row is, dh is 0
        tl.store(dy_ptr + row_R[:, None] * F + column_C[None, :], dy.to(dy_ptr.dtype.element_ty), mask=mask)
    partial_ptr += (sample * spans + first // (STEPS * R)) * F
    tl.store(partial_ptr + column_C, tl.sum(db, 0), mask=there_C)


def _cut(y_BLF: Tensor, steps: int) -> tuple[int, int, dict[str, int]]:
    """Spans a sample, blocks of columns, constants of a program."""
    _, L, F = y_BLF.shape
    steps = min(steps, triton.next_power_of_2(triton.cdiv(L, ROWS)))
    constants = {"R": ROWS, "C": COLUMNS, "STEPS": steps, "num_warps": WARPS}
    return triton.cdiv(L, ROWS * steps), triton.cdiv(F, COLUMNS), constants


def forward(y_BLF: Tensor, b_BF: Tensor) -> Tensor:
    """h, contiguous."""
    y, b = by_rows(y_BLF), by_rows(b_BF)
    h = empty(y)
    B, L, F = y.shape
    spans, blocks, constants = _cut(y, FORWARD_STEPS)
    strides = (y.stride(0), y.stride(1), b.stride(0))
    launch(forward_kernel, B * spans * blocks, y.device, y, b, h, L, F, spans, blocks, *strides, **constants)
    return h


def backward(dh_BLF: Tensor, y_BLF: Tensor, b_BF: Tensor) -> tuple[Tensor, Tensor]:
    """dy and db."""
    dh, y, b = map(by_rows, (dh_BLF, y_BLF, b_BF))
    dy = empty(y)
    B, L, F = y.shape
    spans, blocks, constants = _cut(y, BACKWARD_STEPS)
    partial = y.new_empty((B, spans, 1, F), dtype=torch.float32)
    strides = (dh.stride(0), dh.stride(1), y.stride(0), y.stride(1), b.stride(0))
    launch(
        backward_kernel, B * spans * blocks, y.device, dh, y, b, dy, partial, L, F, spans, blocks, *strides,
        **constants,
    )  # fmt: skip
    return dy, totals(partial, b.dtype)[:, 0]


def reference(y_BLF: Tensor, b_BF: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    return torch.nn.functional.gelu(y_BLF + b_BF[:, None], approximate="tanh")


def plain_backward(dh_BLF: Tensor, y_BLF: Tensor, b_BF: Tensor) -> tuple[Tensor, Tensor]:
    """``backward`` by the reference."""
    return torch.func.vjp(reference, y_BLF, b_BF)[1](dh_BLF)


def tangent(y: Tensor, b: Tensor, dy: Tensor, db: Tensor) -> Tensor:
    """The change of h, in plain PyTorch."""
    x = y.float() + b.float()[:, None]
    slope = torch.func.jvp(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), (x,), (torch.ones_like(x),))[1]
    return (slope * (dy.float() + db.float()[:, None])).to(y.dtype)


run = entry(
    "bias_gelu",
    forward,
    backward,
    ("(Tensor y, Tensor b) -> Tensor", "(Tensor dh, Tensor y, Tensor b) -> (Tensor, Tensor)"),
    (lambda y, b: empty(y), lambda dh, y, b: (empty(y), y.new_empty(b.shape))),
    saved=lambda inputs, h: inputs,
    gradients=lambda cotangents, found: found,
    tangent=tangent,
    plain_backward=plain_backward,
)


def bias_gelu(y_BLF: Tensor, b_BF: Tensor) -> Tensor:
    """``reference`` as one kernel; the bias may be another one a sample. The reference itself for fp64 and mixed
    dtypes."""
    return run(y_BLF, b_BF) if served(WIDEST, y_BLF, b_BF) else reference(y_BLF, b_BF)


def mlp(h_BLD: Tensor, p: dict) -> Tensor:
    """``ops.mlp`` with bias and GELU in one pass; without gradients on a GPU in the product's own epilogue. fc2 is a
    ``linear``."""
    if "gate" in p or h_BLD.ndim != 3 or not served(WIDEST, h_BLD, p["fc1"]["w"], p["fc1"]["b"]):
        return ops.mlp(h_BLD, p)
    w, b = p["fc1"]["w"], p["fc1"]["b"]
    if h_BLD.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        hidden = torch._addmm_activation(b, h_BLD.flatten(0, -2), w.t(), use_gelu=True)
        return ops.linear(hidden.unflatten(0, h_BLD.shape[:-1]), p["fc2"])
    hidden = bias_gelu(torch.nn.functional.linear(h_BLD, w), b.expand(len(h_BLD), -1))
    return linear(hidden, p["fc2"]["w"], p["fc2"].get("b"))
