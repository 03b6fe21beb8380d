"""Linear layers whose bias gets its gradient by a kernel: db = sum of dy over rows, one read of dy.

The products stay PyTorch's: forward is its linear, which adds the bias on the way, and so are dx and dw. That the bias
has a gradient is told afterwards: the product takes it as a constant, and ``credit`` hands the result on as it is and
sends what comes back for it, summed over rows, to the bias too. Without gradients, for many rows, forward may be
another library's (quack.py).

A program of the kernel sums R rows by C columns at a time over a span of rows, in fp32, and ``totals`` adds the spans
in their order: no atomics, the same bits every time. dy is read once, 2 bytes an element in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from odit.kernels import quack
from odit.kernels.function import by_rows, function, served
from odit.kernels.launch import launch
from odit.kernels.rows import SMS, WARPS, totals

TILE, COLUMNS = 4096, 128  # elements of a tile, and its columns
PROGRAMS = 4 * SMS  # all of them run at once
STAGES = 3  # tiles whose loads are under way at once
WIDEST = 2**20


@triton.jit
def sums_kernel(
    x_ptr, partial_ptr, N, D, spans, blocks, x_g, x_n, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks  # neighbours have neighbouring columns
    column_C = block * C + tl.arange(0, C)
    there_C = column_C < D
    first = (rest % spans) * STEPS * R
    x_ptr += (rest // spans).to(tl.int64) * x_g
    total = tl.zeros((R, C), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        row_R = (first + step * R + tl.arange(0, R)).to(tl.int64)
        mask = (row_R < N)[:, None] & there_C[None, :]
        total += tl.load(x_ptr + row_R[:, None] * x_n + column_C[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + rest.to(tl.int64) * D + column_C, tl.sum(total, 0), mask=there_C)


def column_sums(x_GND: Tensor) -> Tensor:
    """The sums over N, (G, D), in x's dtype."""
    x = by_rows(x_GND)
    G, N, D = x.shape
    columns = min(COLUMNS, triton.next_power_of_2(max(1, D)))  # 0 where a rank has no head
    rows, blocks = TILE // columns, triton.cdiv(D, columns)
    programs = 8 if x.device.type == "cpu" else PROGRAMS  # the interpreter's time is that of its operations
    tiles = triton.cdiv(N, rows)
    steps = triton.cdiv(tiles, max(1, programs // max(1, G * blocks)))
    spans = triton.cdiv(tiles, max(1, steps))
    partial = x.new_empty((G, spans, 1, D), dtype=torch.float32)
    launch(
        sums_kernel, G * spans * blocks, x.device, x, partial, N, D, spans, blocks, x.stride(0), x.stride(1),
        R=rows, C=columns, STEPS=steps, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return totals(partial, x.dtype)[:, 0]


sums_op = torch.library.custom_op("odit::column_sums", column_sums, mutates_args=(), schema="(Tensor x) -> Tensor")
sums_op.register_fake(lambda x: x.new_empty((x.shape[0], x.shape[2])))


def bias_gradient(dy_MD: Tensor) -> Tensor:
    """The sum over rows, (D,), by the kernel where that serves."""
    return sums_op(dy_MD[None])[0] if served(WIDEST, dy_MD) else dy_MD.sum(0)


def _remember_shape(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.shape = inputs[0].shape


sums = function(
    "column_sums",
    column_sums,
    _remember_shape,
    backward=lambda ctx, d_GD: d_GD[:, None].expand(ctx.shape),
    jvp=lambda ctx, dx_GND: sums.apply(dx_GND),
)


class Credit(torch.autograd.Function):
    """What torch.compile traces: without rules for vmap and jvp, which it refuses."""

    @staticmethod
    def forward(y: Tensor, b_GD: Tensor) -> Tensor:
        """y (G, ..., D) itself."""
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """dy and db."""
        return dy, sums_op(dy.flatten(1, -2))


credited = function(
    "credit",
    Credit.forward,
    Credit.setup_context,
    backward=lambda ctx, dy: (dy, sums.apply(dy.flatten(1, -2))),
    jvp=lambda ctx, dy, db_GD: dy + db_GD.view(len(db_GD), *[1] * (dy.ndim - 2), -1),
)


def credit(y: Tensor, b_D: Tensor) -> Tensor:
    """y (..., D), to which the bias was added as a constant, as a function of the bias too."""
    apply = Credit.apply if torch.compiler.is_compiling() else credited.apply
    return apply(y[None], b_D[None]).squeeze(0)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of rows of x; that itself where the bias wants no gradient, for fp64 and mixed
    dtypes; without gradients quack-kernels' product, where that is faster."""
    if quack.faster(x, w, b):
        return quack.linear(x, w, b)
    if b is None or not (torch.is_grad_enabled() and b.requires_grad and served(WIDEST, b, x)):
        return torch.nn.functional.linear(x, w, b)
    return credit(torch.nn.functional.linear(x, w, b.detach()), b)


def out(o_BLHK: Tensor, p: dict[str, Tensor]) -> Tensor:
    """``ops.out``."""
    return linear(o_BLHK.flatten(2), p["w"].flatten(1), p["b"])
