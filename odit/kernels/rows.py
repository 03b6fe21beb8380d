"""Rows of width D in registers, and sums over tokens: what the kernels of this package are written in.

A row's tile is a tuple of parts (R, W) in fp32 that cover D, R tokens by W columns: a width such as 1152 is 9 x 128,
where one power of two would be 2048, nearly half of it idle. Beyond D and beyond the last token parts are 0.
A program runs over a span of one sample's tokens. What it sums over them goes, one row a span, to a buffer (B, spans,
N, D) in fp32, and ``totals`` adds the spans in their order: no atomics, the same bits every time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from odit.kernels.launch import launch

WARPS = 4
SMS = 132  # of an H100 and an H200: programs that are resident at once are so many times what fits on one
LANE_VALUES = 4  # values that a lane loads at once: 128 columns a warp
WIDE, WIDEST = 1536, 3072  # columns beyond which a row takes twice the warps, and beyond which it does not fit


class Tuning(NamedTuple):
    """How a kernel is spread over a GPU, for rows of up to ``WIDE`` columns."""

    warps_a_row: int
    programs: int
    """At least so many where there are tokens for them, or as near below as B allows with ``resident``."""
    stages: int
    """Steps whose loads are under way at once (through shared memory); 1 leaves that to the programs of an SM."""
    resident: bool
    """Whether all programs run at once, so that one more would wait for a whole one: those that write sums are few."""


class Tiling(NamedTuple):
    """How samples of L tokens are cut: spans a sample, and the constants of a program."""

    spans: int
    constants: dict[str, int]


def tiling(x_BLD: Tensor, tuning: Tuning) -> Tiling:
    """Cuts the tokens of samples into spans.

    Programs that are not ``resident`` take a power of two of steps, so that few shapes mean few compilations. The cut
    looks at the shape, not at the GPU: sums have the same order everywhere.
    """
    B, L, D = x_BLD.shape
    warps_a_row, programs, stages, resident = tuning
    warps_a_row = min(WARPS, warps_a_row * triton.next_power_of_2(triton.cdiv(D, WIDE)))
    warps_a_row = min(warps_a_row, triton.next_power_of_2(triton.cdiv(D, 32 * LANE_VALUES)))
    rows, width = WARPS // warps_a_row, min(32 * LANE_VALUES * warps_a_row, triton.next_power_of_2(D))
    if x_BLD.device.type == "cpu":  # the interpreter's time is that of its operations, whatever their size
        rows, programs = 16, 2 * B if resident else 8
    if resident:
        steps = max(1, triton.cdiv(L, rows * max(1, programs // max(1, B))))
    else:
        steps = 2 ** int(math.log2(max(1, B * L // (programs * rows))))
    constants = {"D": D, "R": rows, "W": width, "STEPS": steps, "STAGES": stages, "num_warps": WARPS}
    return Tiling(triton.cdiv(L, steps * rows), constants)


@triton.jit
def place(L, span, spans):
    """(sample, first token, tokens) of this program; the first two in 64 bits, as they lead to offsets."""
    b = (tl.program_id(0) // spans).to(tl.int64)
    first = (tl.program_id(0) % spans).to(tl.int64) * span
    return b, first, tl.minimum(span, L - first).to(tl.int32)


@triton.jit
def columns(i: tl.constexpr, here_R, D: tl.constexpr, W: tl.constexpr):
    """The columns of part ``i``, and which of its elements are there."""
    column_W = i * W + tl.arange(0, W)
    mask = here_R[:, None]
    if (i + 1) * W > D:
        mask = mask & (column_W < D)[None, :]
    return column_W[None, :], mask


@triton.jit
def read(ptr, stride, row_R, here_R, D: tl.constexpr, W: tl.constexpr):
    """The rows as parts; those not here are 0."""
    parts = ()
    for i in tl.static_range((D + W - 1) // W):
        column_1W, mask = columns(i, here_R, D, W)
        part = tl.load(ptr + row_R[:, None] * stride + column_1W, mask=mask, other=0.0)
        parts = parts + (part.to(tl.float32),)
    return parts


@triton.jit
def spread(ptr, row_R, D: tl.constexpr, W: tl.constexpr):
    """One row (D,) as parts, the same in every row."""
    return read(ptr, 0, row_R, row_R >= 0, D, W)


@triton.jit
def write(ptr, stride, row_R, here_R, parts, D: tl.constexpr, W: tl.constexpr):
    """Stores the rows that are here, rounded to what ``ptr`` points to."""
    for i in tl.static_range((D + W - 1) // W):
        column_1W, mask = columns(i, here_R, D, W)
        tl.store(ptr + row_R[:, None] * stride + column_1W, parts[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_sum(ptr, parts, D: tl.constexpr, W: tl.constexpr):
    """Stores the sum of the rows, (D,)."""
    for i in tl.static_range((D + W - 1) // W):
        column_W = i * W + tl.arange(0, W)
        tl.store(ptr + column_W, tl.sum(parts[i], 0), mask=column_W < D)


@triton.jit
def nothing(R: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Parts of zeros, to be summed into."""
    parts = ()
    for _ in tl.static_range((D + W - 1) // W):
        parts = parts + (tl.zeros((R, W), tl.float32),)
    return parts


@triton.jit
def plus(a, b, D: tl.constexpr, W: tl.constexpr):
    """a + b."""
    parts = ()
    for i in tl.static_range((D + W - 1) // W):
        parts = parts + (a[i] + b[i],)
    return parts


@triton.jit
def times_plus(a, b, c, D: tl.constexpr, W: tl.constexpr):
    """a b + c."""
    parts = ()
    for i in tl.static_range((D + W - 1) // W):
        parts = parts + (a[i] * b[i] + c[i],)
    return parts


@triton.jit
def times(a, b, D: tl.constexpr, W: tl.constexpr):
    """a b."""
    parts = ()
    for i in tl.static_range((D + W - 1) // W):
        parts = parts + (a[i] * b[i],)
    return parts


@triton.jit
def rounded(a, ptr, D: tl.constexpr, W: tl.constexpr):
    """The values as ``ptr`` would hold them."""
    parts = ()
    for i in tl.static_range((D + W - 1) // W):
        parts = parts + (a[i].to(ptr.dtype.element_ty).to(tl.float32),)
    return parts


@triton.jit
def mean(a, D: tl.constexpr, W: tl.constexpr):
    """The mean of each row, (R,)."""
    total = a[0]
    for i in tl.static_range(1, (D + W - 1) // W):
        total += a[i]
    return tl.sum(total, 1) / D


@triton.jit
def inverse_root(x):
    """1 / sqrt(x), rounded once: a step of Newton's method on the GPU's own, whose error is a whole row's."""
    r = tl.rsqrt(x)
    square = x * r
    return tl.fma(0.5 * r, tl.fma(-square, r, 1.0) - tl.fma(x, r, -square) * r, r)


@triton.jit
def standardise(x, here_R, eps, D: tl.constexpr, W: tl.constexpr):
    """LayerNorm without affine: n = (x - mean) / std as parts, and 1 / std (R,). Rows not here are 0."""
    mean_R = mean(x, D, W)
    centred = ()
    for i in tl.static_range((D + W - 1) // W):
        part = x[i] - mean_R[:, None]
        if (i + 1) * W > D:
            column_W = i * W + tl.arange(0, W)
            part = tl.where((column_W < D)[None, :], part, 0.0)
        centred = centred + (part,)
    variance_R = tl.where(here_R, mean(times(centred, centred, D, W), D, W), 1.0)
    rstd_R = inverse_root(variance_R + eps)
    n = ()
    for i in tl.static_range((D + W - 1) // W):
        n = n + (centred[i] * rstd_R[:, None],)
    return n, rstd_R


@triton.jit
def modulated(n, shift, scale, D: tl.constexpr, W: tl.constexpr):
    """n (1 + scale) + shift."""
    parts = ()
    for i in tl.static_range((D + W - 1) // W):
        parts = parts + (n[i] * (1.0 + scale[i]) + shift[i],)
    return parts


@triton.jit
def norm_backward(dh, n, rstd_R, scale, D: tl.constexpr, W: tl.constexpr):
    """dx of h = n (1 + scale) + shift: with g = dh (1 + scale), (g - mean(g) - n mean(g n)) / std."""
    g = ()
    for i in tl.static_range((D + W - 1) // W):
        g = g + (dh[i] * (1.0 + scale[i]),)
    mean_R, along_R = mean(g, D, W), mean(times(g, n, D, W), D, W)
    dx = ()
    for i in tl.static_range((D + W - 1) // W):
        dx = dx + ((g[i] - mean_R[:, None] - n[i] * along_R[:, None]) * rstd_R[:, None],)
    return dx


@triton.jit
def totals_kernel(partial_ptr, out_ptr, spans, size, blocks, STEPS: tl.constexpr, T: tl.constexpr, W: tl.constexpr):
    """Sums W of ``size`` columns of one sample over its spans, T of them at a time, in their order."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    column_W = (tl.program_id(0) % blocks) * W + tl.arange(0, W)
    partial_ptr += b * spans * size
    total_W = tl.zeros((W,), tl.float32)
    for first in range(0, STEPS * T, T):
        span_T = first + tl.arange(0, T)
        mask = (span_T < spans)[:, None] & (column_W < size)[None, :]
        total_W += tl.sum(tl.load(partial_ptr + span_T[:, None] * size + column_W[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + b * size + column_W, total_W.to(out_ptr.dtype.element_ty), mask=column_W < size)


def totals(partial_BTND: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over spans, (B, N, D) in ``dtype``."""
    B, T, N, D = partial_BTND.shape
    out_BND = partial_BTND.new_empty((B, N, D), dtype=dtype)
    # many spans: more programs, of fewer steps one after the other; few: wider ones, of no idle rows
    rows, width = (4, 512) if T <= 4 else (16, 128) if T <= 16 else (64, 32)
    blocks = triton.cdiv(N * D, width)
    constants = {"STEPS": triton.next_power_of_2(triton.cdiv(T, rows)), "T": rows, "W": width, "num_warps": WARPS}
    launch(totals_kernel, B * blocks, out_BND.device, partial_BTND, out_BND, T, N * D, blocks, **constants)
    return out_BND
