"""QK-norm and rotary embedding in one pass over the heads of q, or of k, after their projection.

Forward reads x and writes y, 4 bytes an element in half precision; backward reads dy and x and writes dx, 6 bytes. With
n = x / rms(x), the norm's weight w and the rotation R by a token's angles:

    y = R (w n)
    dx = (g - n mean(g n)) / rms with d = R^T dy, g = w d      mean over K
    dw = sum of d n                                            over L and H, then B
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
from odit.kernels.rows import WARPS, inverse_root, place, totals

WIDEST = 256  # values of a head
ROWS = 32  # heads of tokens that a program works on at once
FORWARD, BACKWARD = 4096, 1024  # programs


@triton.jit
def halves(ptr, x_l, x_h, row_R, here_R, H, K: tl.constexpr, W: tl.constexpr):
    """Both halves of heads, (R, W) each in fp32; row H l + h is head h of token l."""
    column_W = tl.arange(0, W)
    at = (row_R // H)[:, None] * x_l + (row_R % H)[:, None] * x_h + column_W[None, :]
    mask = here_R[:, None] & (column_W < K // 2)[None, :]
    a = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(ptr + at + K // 2, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def put(ptr, row_R, here_R, a, b, K: tl.constexpr, W: tl.constexpr):
    """Stores both halves of heads that lie side by side."""
    column_W = tl.arange(0, W)
    at = row_R[:, None] * K + column_W[None, :]
    mask = here_R[:, None] & (column_W < K // 2)[None, :]
    tl.store(ptr + at, a.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + at + K // 2, b.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def angles(cos_ptr, sin_ptr, cos_l, sin_l, row_R, here_R, H, K: tl.constexpr, W: tl.constexpr):
    """cos and sin of the rows' tokens, (R, W)."""
    column_W = tl.arange(0, W)
    mask = here_R[:, None] & (column_W < K // 2)[None, :]
    cos = tl.load(cos_ptr + (row_R // H)[:, None] * cos_l + column_W[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + (row_R // H)[:, None] * sin_l + column_W[None, :], mask=mask, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def normalise(a, b, eps, K: tl.constexpr):
    """Both halves over the rms of their row, and 1 / rms as (R, 1)."""
    inverse_R1 = inverse_root(tl.sum(a * a + b * b, 1) / K + eps)[:, None]
    return a * inverse_R1, b * inverse_R1, inverse_R1


@triton.jit
def weigh(ptr, a, b, K: tl.constexpr, W: tl.constexpr):
    """Both halves times the weight (K,)."""
    column_W = tl.arange(0, W)
    first = tl.load(ptr + column_W, mask=column_W < K // 2, other=0.0).to(tl.float32)
    second = tl.load(ptr + K // 2 + column_W, mask=column_W < K // 2, other=0.0).to(tl.float32)
    return a * first[None, :], b * second[None, :]


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, cos_ptr, sin_ptr, y_ptr, rows, spans, x_b, x_l, x_h, w_b, cos_b, cos_l, sin_b, sin_l, eps, H,
    K: tl.constexpr, W: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    b, first, count = place(rows, STEPS * R, spans)
    x_ptr += b * x_b
    y_ptr += b * rows * K
    for start in range(0, STEPS * R, R):
        row_R = first.to(tl.int32) + start + tl.arange(0, R)
        here_R = row_R < first + count
        x, y = halves(x_ptr, x_l, x_h, row_R, here_R, H, K, W)
        if NORM:
            x, y, _ = normalise(x, y, eps, K)
            x, y = weigh(w_ptr + b * w_b, x, y, K, W)
        if TURN:
            cos, sin = angles(cos_ptr + b * cos_b, sin_ptr + b * sin_b, cos_l, sin_l, row_R, here_R, H, K, W)
            x, y = x * cos - y * sin, x * sin + y * cos
        put(y_ptr, row_R, here_R, x, y, K, W)


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, w_ptr, cos_ptr, sin_ptr, dx_ptr, partial_ptr, rows, spans, dy_b, dy_l, dy_h, x_b, x_l, x_h,
    w_b, cos_b, cos_l, sin_b, sin_l, eps, H,
    K: tl.constexpr, W: tl.constexpr, R: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    b, first, count = place(rows, STEPS * R, spans)
    dy_ptr += b * dy_b
    x_ptr += b * x_b
    dx_ptr += b * rows * K
    dw_a, dw_b = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for start in range(0, STEPS * R, R):
        row_R = first.to(tl.int32) + start + tl.arange(0, R)
        here_R = row_R < first + count
        d, e = halves(dy_ptr, dy_l, dy_h, row_R, here_R, H, K, W)
        if TURN:
            cos, sin = angles(cos_ptr + b * cos_b, sin_ptr + b * sin_b, cos_l, sin_l, row_R, here_R, H, K, W)
            d, e = d * cos + e * sin, e * cos - d * sin
        if NORM:
            x, y = halves(x_ptr, x_l, x_h, row_R, here_R, H, K, W)
            x, y, inverse_R1 = normalise(x, y, eps, K)
            dw_a += d * x
            dw_b += e * y
            d, e = weigh(w_ptr + b * w_b, d, e, K, W)
            along_R1 = (tl.sum(d * x + e * y, 1) / K)[:, None]
            d, e = (d - x * along_R1) * inverse_R1, (e - y * along_R1) * inverse_R1
        put(dx_ptr, row_R, here_R, d, e, K, W)
    if NORM:
        column_W = tl.arange(0, W)
        partial_ptr += tl.program_id(0).to(tl.int64) * K
        tl.store(partial_ptr + column_W, tl.sum(dw_a, 0), mask=column_W < K // 2)
        tl.store(partial_ptr + K // 2 + column_W, tl.sum(dw_b, 0), mask=column_W < K // 2)


def cut(x_BLHK: Tensor, programs: int, norm: bool, turn: bool) -> tuple[int, dict[str, int]]:
    """Spans of rows (heads of tokens) a sample, and constants."""
    B, L, H, K = x_BLHK.shape
    steps = triton.next_power_of_2(max(1, triton.cdiv(B * L * H, programs * ROWS)))
    constants = {"K": K, "W": triton.next_power_of_2(K // 2), "R": ROWS, "STEPS": steps, "NORM": norm, "TURN": turn}
    return triton.cdiv(L * H, steps * ROWS), constants | {"num_warps": WARPS}


def forward(
    x_BLHK: Tensor, weight_BK: Tensor, cos_BLk: Tensor, sin_BLk: Tensor, eps: float, norm: bool, turn: bool
) -> Tensor:
    """y, contiguous."""
    x, w, cos, sin = map(by_rows, (x_BLHK, weight_BK, cos_BLk, sin_BLk))
    y = empty(x)
    B, L, H, _ = x.shape
    spans, constants = cut(x, FORWARD, norm, turn)
    strides = (*x.stride()[:3], w.stride(0), *cos.stride()[:2], *sin.stride()[:2])
    launch(
        forward_kernel, B * spans, x.device, x, w, cos, sin, y, L * H, spans, *strides, eps, H, **constants,
    )  # fmt: skip
    return y


def backward(
    dy_BLHK: Tensor, x_BLHK: Tensor, weight_BK: Tensor, cos_BLk: Tensor, sin_BLk: Tensor, eps: float, norm: bool,
    turn: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx, and dweight a sample, (B, K); zeros without a norm."""
    dy, x, w, cos, sin = map(by_rows, (dy_BLHK, x_BLHK, weight_BK, cos_BLk, sin_BLk))
    dx = empty(x)
    B, L, H, K = x.shape
    spans, constants = cut(x, BACKWARD, norm, turn)
    partial = x.new_empty((B, spans, 1, K) if norm else (B, 0, 1, K), dtype=torch.float32)
    strides = (*dy.stride()[:3], *x.stride()[:3], w.stride(0), *cos.stride()[:2], *sin.stride()[:2])
    launch(
        backward_kernel, B * spans, x.device, dy, x, w, cos, sin, dx, partial, L * H, spans, *strides, eps, H,
        **constants,
    )  # fmt: skip
    return dx, totals(partial, w.dtype)[:, 0]


def plain(x: Tensor, weight_BK: Tensor, cos: Tensor, sin: Tensor, eps: float, norm: bool, turn: bool) -> Tensor:
    """``forward`` in plain PyTorch, on samples that may have other weights and angles each."""
    y = ops.at_least_fp32(x)
    if norm:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight_BK[:, None, None]
    if turn:
        (a, b), cos, sin = y.chunk(2, -1), cos[:, :, None], sin[:, :, None]
        y = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return y.to(x.dtype)


def plain_backward(
    dy: Tensor, x: Tensor, weight_BK: Tensor, cos: Tensor, sin: Tensor, eps: float, norm: bool, turn: bool
) -> tuple[Tensor, Tensor]:
    """``backward`` in plain PyTorch."""
    return torch.func.vjp(lambda x, w: plain(x, w, cos, sin, eps, norm, turn), x, weight_BK)[1](dy)


def tangent(
    x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, dx: Tensor, dw: Tensor, dcos: Tensor, dsin: Tensor, eps: float,
    norm: bool, turn: bool,
) -> Tensor:  # fmt: skip
    """The change of y with x and the weight, in plain PyTorch; the angles stand."""
    n, dn = ops.at_least_fp32(x), ops.at_least_fp32(dx)
    if norm:
        inverse = torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
        n = n * inverse
        dn = (dn - n * (n * dn).mean(-1, keepdim=True)) * inverse
        dn = dn * w[:, None, None] + n * dw[:, None, None]
    return plain(dn, w, cos, sin, eps, False, turn).to(x.dtype)


run = entry(
    "norm_rotate",
    forward,
    backward,
    (
        "(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps, bool norm, bool turn) -> Tensor",
        "(Tensor dy, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps, bool norm, bool turn)"
        " -> (Tensor, Tensor)",
    ),
    (
        lambda x, *rest: empty(x),
        lambda dy, x, weight, *rest: (empty(x), empty(weight)),
    ),
    saved=lambda inputs, y: inputs[:4],
    gradients=lambda cotangents, found: (*found, None, None),
    tangent=tangent,
    plain_backward=plain_backward,
)


def norm_rotate(x_BLHK: Tensor, weight_K: Tensor | None, tables: tuple[Tensor, ...], eps: float = ops.EPS) -> Tensor:
    """``ops.rms_norm`` where there is a weight, then ``ops.rotate`` where there are tables (cos, sin) (L, K/2).

    The reference itself for fp64, weights of another dtype and heads beyond ``WIDEST`` or odd; the angles get no
    gradient.
    """
    given = (x_BLHK,) if weight_K is None else (x_BLHK, weight_K)
    if not served(WIDEST, *given) or x_BLHK.shape[-1] % 2:
        x = x_BLHK if weight_K is None else ops.rms_norm(x_BLHK, weight_K, eps)
        return ops.rotate(x, *tables) if tables else x
    B, L, _, K = x_BLHK.shape
    weight = x_BLHK.new_ones(K) if weight_K is None else weight_K
    cos, sin = tables or (x_BLHK.new_zeros((1, K // 2)),) * 2
    return run(
        x_BLHK, weight.expand(B, K), *(t.expand(B, L, K // 2) for t in (cos, sin)), eps, weight_K is not None,
        bool(tables),
    )  # fmt: skip


def qkv(h_BLD: Tensor, p: dict, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.qkv`` with QK-norm and rotary as one kernel each for q and k; the projection is a ``linear``."""
    q, k, v = ops.project(h_BLD, p["w"], p.get("b"), linear)
    if tables or "q_norm" in p:
        q, k = (norm_rotate(x, p.get(name), tables) for x, name in ((q, "q_norm"), (k, "k_norm")))
    return q, k, v
