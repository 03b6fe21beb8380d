"""Attention of samples with few tokens: all of a head stays near one multiprocessor, whatever the size of the head.

With S = scale q k^T, rows over queries, P = exp(S - lse) and lse = log sum exp S:

    o = P v
    dv = P^T do
    dP = do v^T, delta = sum of do o - dlse, dS = P (dP - delta)      sum over K (Dao 2023, section 3.1)
    dq = scale dS k, dk = scale dS^T q

Forward reads q, k, v and writes o, 8 bytes an element in half precision, and lse. Backward reads q, k, v, o and do
and writes dq, dk, dv, 16 bytes: first all dq, a block of queries at a time, then all dk and dv, a block of keys at a
time. S and dP are computed for each of the two, which costs two more products than accumulating dq across blocks of
keys, but needs neither atomics (the bits are the same every time) nor room in memory. A sample that is one block is
done at once.

q, k and v may be slices of one tensor (B, L, 3, H, K); their gradients always are. Samples may be along two dims,
(B, S, L, H, K), wherever a name says BLHK: a clip's tokens along time, a sample a place, are read where they lie,
(B, L, S, H, K) in memory, and o and the gradients are written so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from odit import ops
from odit.kernels.function import by_rows, entry, served
from odit.kernels.heads import (
    LEAST,
    add_product,
    load,
    over_columns,
    parts,
    row_products,
    store,
    times_rows,
    zeros,
)
from odit.kernels.launch import launch
from odit.kernels.trial import plain

WIDEST = 128  # columns of a head
LONGEST = 1024  # tokens; every length is compiled for itself
FEW = 64  # tokens up to which the own forward pass is faster than cuDNN's


class Tuning(NamedTuple):
    """How a pass is cut."""

    queries: int
    """Queries of a block; the rows of a product over queries: 64 for each 4 warps."""
    keys: int
    """Keys of a block; in ``KEYS`` the rows of a product."""
    steps: int
    """Blocks of rows that a program works on, one after the other; 0 means all of a head."""
    stages: int
    """Blocks of the inner loop whose loads are under way at once, from L2; with 1 they pass the multiprocessor's own
    cache, from which later steps get them."""
    warps: int
    registers: int | None = None
    """At most so many a thread; None leaves it to the compiler."""


# The best of 98 and 215 cuts on an H200 at B 128, L 256, H 16, K 72 in bf16: 0.180 ms forward, 0.593 ms backward.
FORWARD = Tuning(queries=64, keys=64, steps=1, stages=2, warps=4, registers=128)
QUERIES = Tuning(queries=64, keys=64, steps=1, stages=2, warps=4)
KEYS = Tuning(queries=32, keys=64, steps=1, stages=2, warps=4)  # 64 queries would not fit in its registers
WHOLE = {16: 1, 32: 2, 64: 4}  # rows of a sample that is one block of backward, and warps; of forward too below 64


@triton.jit
def place(S, H, SPANS: tl.constexpr):
    """(b, s, head, span) of this program, and its sample; all of samples in 64 bits, as they lead to offsets."""
    head = tl.program_id(0) // SPANS
    sample = (head // H).to(tl.int64)
    return sample // S, sample % S, head % H, tl.program_id(0) % SPANS, sample


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, S, H, q_b, q_s, q_l, k_b, k_s, k_l, v_b, v_s, v_l, o_b, o_s, o_l, scale,
    q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr, L: tl.constexpr, K: tl.constexpr, WIDTHS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    b, s, h, span, sample = place(S, H, SPANS)
    q_ptr += b * q_b + s * q_s + h * q_h
    k_ptr += b * k_b + s * k_s + h * k_h
    v_ptr += b * v_b + s * v_s + h * v_h
    o_ptr += b * o_b + s * o_s + h * K
    lse_ptr += (sample * H + h) * L
    exponent = scale * 1.4426950408889634  # of 2: log2(e)
    if N >= L:  # all keys at once: they stay for every block of queries
        k, v = load(k_ptr, k_l, tl.arange(0, N), L, K, WIDTHS, N), load(v_ptr, v_l, tl.arange(0, N), L, K, WIDTHS, N)
    for step in tl.range(0, STEPS, num_stages=STAGES if N >= L else 1):
        row_M = (span * STEPS + step) * M + tl.arange(0, M)
        q = load(q_ptr, q_l, row_M, L, K, WIDTHS, M)
        if N >= L:
            s_MN = over_columns(q, k, WIDTHS)
            if N > L:
                s_MN = tl.where((tl.arange(0, N) < L)[None, :], s_MN, float("-inf"))
            high_M = tl.max(s_MN, 1) * exponent
            p_MN = tl.exp2(s_MN * exponent - high_M[:, None])
            total_M = tl.sum(p_MN, 1)
            o = add_product(zeros(M, WIDTHS), p_MN, v, WIDTHS)
        else:
            high_M, total_M = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
            o = zeros(M, WIDTHS)
            for first in tl.range(0, L, N, num_stages=STAGES):
                row_N = first + tl.arange(0, N)
                s_MN = over_columns(q, load(k_ptr, k_l, row_N, L, K, WIDTHS, N), WIDTHS)
                if L % N:
                    s_MN = tl.where((row_N < L)[None, :], s_MN, float("-inf"))
                higher_M = tl.maximum(high_M, tl.max(s_MN, 1) * exponent)
                fade_M = tl.exp2(high_M - higher_M)
                p_MN = tl.exp2(s_MN * exponent - higher_M[:, None])
                total_M = total_M * fade_M + tl.sum(p_MN, 1)
                v = load(v_ptr, v_l, row_N, L, K, WIDTHS, N)
                o = add_product(times_rows(o, fade_M, WIDTHS), p_MN, v, WIDTHS)
                high_M = higher_M
        store(o_ptr, o_l, row_M, times_rows(o, 1.0 / total_M, WIDTHS), 1.0, L, K, WIDTHS, M)
        tl.store(lse_ptr + row_M, (high_M + tl.log2(total_M)) * 0.6931471805599453, mask=row_M < L)


@triton.jit
def queries_pass(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, dq_ptr, delta_ptr, q_l, k_l, v_l, o_l, do_l, d_l, scale,
    span, L: tl.constexpr, K: tl.constexpr, WIDTHS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """delta and dq of blocks of queries."""
    exponent = scale * 1.4426950408889634
    for step in tl.range(0, STEPS, num_stages=1):
        row_M = (span * STEPS + step) * M + tl.arange(0, M)
        do = load(do_ptr, do_l, row_M, L, K, WIDTHS, M)
        delta_M = row_products(do, load(o_ptr, o_l, row_M, L, K, WIDTHS, M), WIDTHS)
        delta_M -= tl.load(dlse_ptr + row_M, mask=row_M < L, other=0.0)
        tl.store(delta_ptr + row_M, delta_M, mask=row_M < L)
        lse_M = tl.load(lse_ptr + row_M, mask=row_M < L, other=0.0) * 1.4426950408889634
        q = load(q_ptr, q_l, row_M, L, K, WIDTHS, M)
        dq = zeros(M, WIDTHS)
        for first in tl.range(0, L, N, num_stages=STAGES):
            row_N = first + tl.arange(0, N)
            k, v = load(k_ptr, k_l, row_N, L, K, WIDTHS, N), load(v_ptr, v_l, row_N, L, K, WIDTHS, N)
            s_MN, dp_MN = over_columns(q, k, WIDTHS), over_columns(do, v, WIDTHS)
            if L % N:
                s_MN = tl.where((row_N < L)[None, :], s_MN, float("-inf"))
            p_MN = tl.exp2(s_MN * exponent - lse_M[:, None])
            dq = add_product(dq, p_MN * (dp_MN - delta_M[:, None]), k, WIDTHS)
        store(dq_ptr, d_l, row_M, dq, scale, L, K, WIDTHS, M)


@triton.jit
def keys_pass(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_l, k_l, v_l, do_l, d_l, scale, span,
    L: tl.constexpr, K: tl.constexpr, WIDTHS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of blocks of keys; products are transposed, so that P^T and dS^T go from registers into the next."""
    exponent = scale * 1.4426950408889634
    for step in tl.range(0, STEPS, num_stages=1):
        row_N = (span * STEPS + step) * N + tl.arange(0, N)
        k, v = load(k_ptr, k_l, row_N, L, K, WIDTHS, N), load(v_ptr, v_l, row_N, L, K, WIDTHS, N)
        dk, dv = zeros(N, WIDTHS), zeros(N, WIDTHS)
        for first in tl.range(0, L, M, num_stages=STAGES):
            row_M = first + tl.arange(0, M)
            q, do = load(q_ptr, q_l, row_M, L, K, WIDTHS, M), load(do_ptr, do_l, row_M, L, K, WIDTHS, M)
            lse_M = tl.load(lse_ptr + row_M, mask=row_M < L, other=0.0) * 1.4426950408889634
            delta_M = tl.load(delta_ptr + row_M, mask=row_M < L, other=0.0)
            s_NM, dp_NM = over_columns(k, q, WIDTHS), over_columns(v, do, WIDTHS)
            if L % N:  # their rows are not stored, but must not overflow
                s_NM = tl.where((row_N < L)[:, None], s_NM, float("-inf"))
            p_NM = tl.exp2(s_NM * exponent - lse_M[None, :])
            dv = add_product(dv, p_NM, do, WIDTHS)
            dk = add_product(dk, p_NM * (dp_NM - delta_M[None, :]), q, WIDTHS)
        store(dv_ptr, d_l, row_N, dv, 1.0, L, K, WIDTHS, N)
        store(dk_ptr, d_l, row_N, dk, scale, L, K, WIDTHS, N)


@triton.jit
def whole_pass(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr, delta_ptr, q_l, k_l, v_l, o_l, do_l,
    d_l, scale, L: tl.constexpr, K: tl.constexpr, WIDTHS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """delta, dq, dk and dv of a head that is one block."""
    row_N = tl.arange(0, N)
    do, o = load(do_ptr, do_l, row_N, L, K, WIDTHS, N), load(o_ptr, o_l, row_N, L, K, WIDTHS, N)
    q, k = load(q_ptr, q_l, row_N, L, K, WIDTHS, N), load(k_ptr, k_l, row_N, L, K, WIDTHS, N)
    v = load(v_ptr, v_l, row_N, L, K, WIDTHS, N)
    lse_N = tl.load(lse_ptr + row_N, mask=row_N < L, other=0.0) * 1.4426950408889634
    delta_N = row_products(do, o, WIDTHS) - tl.load(dlse_ptr + row_N, mask=row_N < L, other=0.0)
    tl.store(delta_ptr + row_N, delta_N, mask=row_N < L)
    s_NN = over_columns(q, k, WIDTHS)
    if L < N:
        there_NN = (row_N < L)[:, None] & (row_N < L)[None, :]
        s_NN = tl.where(there_NN, s_NN, float("-inf"))
    p_NN = tl.exp2(s_NN * (scale * 1.4426950408889634) - lse_N[:, None])
    ds_NN = p_NN * (over_columns(do, v, WIDTHS) - delta_N[:, None])
    store(dv_ptr, d_l, row_N, add_product(zeros(N, WIDTHS), tl.trans(p_NN), do, WIDTHS), 1.0, L, K, WIDTHS, N)
    store(dq_ptr, d_l, row_N, add_product(zeros(N, WIDTHS), ds_NN, k, WIDTHS), scale, L, K, WIDTHS, N)
    store(dk_ptr, d_l, row_N, add_product(zeros(N, WIDTHS), tl.trans(ds_NN), q, WIDTHS), scale, L, K, WIDTHS, N)


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, d_ptr, delta_ptr, S, H, q_b, q_s, q_l, k_b, k_s, k_l, v_b,
    v_s, v_l, o_b, o_s, o_l, do_b, do_s, do_l, d_b, d_s, d_l, scale,
    q_h: tl.constexpr, k_h: tl.constexpr, v_h: tl.constexpr, do_h: tl.constexpr, L: tl.constexpr,
    K: tl.constexpr, WIDTHS: tl.constexpr, SPANS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """``QUERIES`` and ``KEYS`` are (M, N, steps, stages) of the pass to be done; the other's steps are 0. Or ``ROWS``
    are those of a block that is all of a head."""
    b, s, h, span, sample = place(S, H, SPANS)
    q_ptr += b * q_b + s * q_s + h * q_h
    k_ptr += b * k_b + s * k_s + h * k_h
    v_ptr += b * v_b + s * v_s + h * v_h
    o_ptr += b * o_b + s * o_s + h * K
    do_ptr += b * do_b + s * do_s + h * do_h
    d_ptr += b * d_b + s * d_s + h * K
    lse_ptr += (sample * H + h) * L
    dlse_ptr += (sample * H + h) * L
    delta_ptr += (sample * H + h) * L
    if QUERIES[2]:
        queries_pass(
            q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, d_ptr, delta_ptr, q_l, k_l, v_l, o_l, do_l, d_l,
            scale, span, L, K, WIDTHS, QUERIES[0], QUERIES[1], QUERIES[2], QUERIES[3],
        )  # fmt: skip
    if KEYS[2]:
        keys_pass(
            q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, d_ptr + H * K, d_ptr + 2 * H * K, q_l, k_l, v_l, do_l,
            d_l, scale, span, L, K, WIDTHS, KEYS[0], KEYS[1], KEYS[2], KEYS[3],
        )  # fmt: skip
    if ROWS:
        whole_pass(
            q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, d_ptr, d_ptr + H * K, d_ptr + 2 * H * K, delta_ptr,
            q_l, k_l, v_l, o_l, do_l, d_l, scale, L, K, WIDTHS, ROWS,
        )  # fmt: skip


def rows_of(L: int) -> int:
    """Those of a block that holds L tokens."""
    return max(LEAST, triton.next_power_of_2(L))


def cut(tuning: Tuning, L: int, rows: int) -> tuple[Tuning, int]:
    """The tuning for L tokens, where the rows of a program are its field ``rows``, and programs a head."""
    fitting = tuning._replace(queries=min(tuning.queries, rows_of(L)), keys=min(tuning.keys, rows_of(L)))
    blocks = triton.cdiv(L, fitting[rows])
    steps = min(tuning.steps or blocks, blocks)
    return fitting._replace(steps=steps), triton.cdiv(blocks, max(1, steps))


def options(tuning: Tuning) -> dict[str, int]:
    """How the compiler spreads a program."""
    limit = {} if tuning.registers is None else {"maxnreg": tuning.registers}
    return {"num_warps": tuning.warps, **limit}


def forward_pass(L: int) -> tuple[Tuning, int]:
    """The cut of forward, and programs a head."""
    whole = rows_of(L)
    at_once = whole in WHOLE and whole < FORWARD.queries
    return cut(Tuning(whole, whole, 1, 1, WHOLE[whole]) if at_once else FORWARD, L, rows=0)


def passes(L: int) -> list[tuple[int, dict[str, Any]]]:
    """The launches of backward: programs a head, the cuts as the kernel takes them, and options."""
    left_out = {"QUERIES": (LEAST, LEAST, 0, 1), "KEYS": (LEAST, LEAST, 0, 1), "ROWS": 0}
    if (whole := rows_of(L)) in WHOLE:
        return [(min(L, 1), {**left_out, "ROWS": whole, "num_warps": WHOLE[whole]})]
    (queries, spans), (keys, more) = cut(QUERIES, L, rows=0), cut(KEYS, L, rows=1)
    return [
        (spans, {**left_out, "QUERIES": queries[:4], **options(QUERIES)}),
        (more, {**left_out, "KEYS": keys[:4], **options(KEYS)}),
    ]


def room(q: Tensor, *rest: int) -> Tensor:
    """For a result (B, L, *rest), contiguous, or (B, S, L, *rest), laid out as q: S outside of L, or L outside of S."""
    if q.ndim == 4:
        return q.new_empty((*q.shape[:2], *rest))
    B, S, L = q.shape[:3]
    if q.stride(1) < q.stride(2):
        return q.new_empty((B, L, S, *rest)).transpose(1, 2)
    return q.new_empty((B, S, L, *rest))


def outputs(q_BLHK: Tensor) -> tuple[Tensor, Tensor]:
    """Room for o and lse."""
    *samples, L, H, K = q_BLHK.shape
    return room(q_BLHK, H, K), q_BLHK.new_empty((*samples, H, L), dtype=torch.float32)


def inputs_gradients(q_BLHK: Tensor, lse_BHL: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what backward returns."""
    return room(q_BLHK, 3, *q_BLHK.shape[-2:]), torch.empty_like(lse_BHL)


def strides(*tensors_BLHK: Tensor) -> list[int]:
    """How far samples lie apart, along their two dims (0 where that is one), and tokens, of each."""
    return [step for x in tensors_BLHK for step in (x.stride(0), x.stride(1) if x.ndim > 4 else 0, x.stride(-3))]


def forward(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o, which lies as q does, and lse (B, H, L) in fp32."""
    o, lse = outputs(q_BLHK)
    q, k, v = map(by_rows, (q_BLHK, k_BLHK, v_BLHK))
    *samples, L, H, K = q.shape
    tuning, spans = forward_pass(L)
    launch(
        forward_kernel, math.prod(samples) * H * spans, q.device, q, k, v, o, lse, math.prod(samples[1:]), H,
        *strides(q, k, v, o), scale, q_h=q.stride(-2), k_h=k.stride(-2), v_h=v.stride(-2), L=L, K=K, WIDTHS=parts(K),
        M=tuning.queries, N=tuning.keys, STEPS=tuning.steps, STAGES=tuning.stages, SPANS=spans, **options(tuning),
    )  # fmt: skip
    return o, lse


def fastest_forward(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``forward``, or where that is faster cuDNN's kernel: on Hopper in half precision for more than a few tokens (256:
    0.157 ms against 0.180 where backward takes 0.593) of samples along one dim."""
    x = q_BLHK
    few = x.ndim > 4 or x.shape[1] <= FEW or x.dtype == torch.float32
    if few or not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0):
        return forward(q_BLHK, k_BLHK, v_BLHK, scale)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
    return o.transpose(1, 2).contiguous(), lse.reshape(lse.shape[:3])


def backward(
    do_BLHK: Tensor, dlse_BHL: Tensor, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, o_BLHK: Tensor, lse_BHL: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv as one (B, L, 3, H, K), which lies as q does, and delta (B, H, L) in fp32."""
    d, delta = inputs_gradients(q_BLHK, lse_BHL)
    do, q, k, v, o = map(by_rows, (do_BLHK, q_BLHK, k_BLHK, v_BLHK, o_BLHK))
    *samples, L, H, K = q.shape
    o = o if o.stride(-2) == K else o.contiguous()
    dlse, lse = (x.contiguous() for x in (dlse_BHL, lse_BHL))
    tensors = (q, k, v, o, do, lse, dlse, d, delta)
    sizes = (math.prod(samples[1:]), H, *strides(q, k, v, o, do, d[..., 0, :, :]))
    constants = {"q_h": q.stride(-2), "k_h": k.stride(-2), "v_h": v.stride(-2), "do_h": do.stride(-2), "L": L, "K": K}
    for spans, how in passes(L):
        launch(
            backward_kernel, math.prod(samples) * H * spans, q.device, *tensors, *sizes, scale, **constants,
            WIDTHS=parts(K), SPANS=spans, **how,
        )  # fmt: skip
    return d, delta


def plain_backward(
    do: Tensor, dlse_BHL: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse_BHL: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """``backward`` in plain PyTorch."""
    dtype = q.dtype
    do, q, k, v, o = (ops.at_least_fp32(x.transpose(-3, -2)) for x in (do, q, k, v, o))
    p = (scale * (q @ k.mT) - lse_BHL[..., None]).exp()
    delta_BHL = (do * o).sum(-1) - dlse_BHL
    ds = p * (do @ v.mT - delta_BHL[..., None])
    d_BHL3K = torch.stack((scale * (ds @ k), scale * (ds.mT @ q), p.mT @ do), -2)
    return d_BHL3K.movedim(-4, -2).to(dtype), delta_BHL


def tangent(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse_BHL: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The change of o and lse, in plain PyTorch."""
    dtype = q.dtype
    q, k, v, dq, dk, dv = (ops.at_least_fp32(x.transpose(-3, -2)) for x in (q, k, v, dq, dk, dv))
    p = (scale * (q @ k.mT) - lse_BHL[..., None]).exp()
    ds = scale * (dq @ k.mT + q @ dk.mT)
    dlse_BHL = (p * ds).sum(-1)
    do = (p * (ds - dlse_BHL[..., None])) @ v + p @ dv
    return do.transpose(-3, -2).to(dtype), dlse_BHL


run = entry(
    "short_attention",
    fastest_forward,
    backward,
    (
        "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
        "(Tensor do, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale) -> (Tensor, Tensor)",
    ),
    (
        lambda q, k, v, scale: outputs(q),
        lambda do, dlse, q, k, v, o, lse, scale: inputs_gradients(q, lse),
    ),
    saved=lambda inputs, outputs: (*inputs[:3], *outputs),
    gradients=lambda _, found: found[0].unbind(-3),
    tangent=tangent,
    plain_backward=plain_backward,
    seen=True,
)


def packed(fn: Callable, at: int) -> Callable:
    """The function with one (B, L, 3, H, K) in place of its arguments q, k and v, which are from ``at`` on."""

    def on_slices(*args: Any) -> Any:
        return fn(*args[:at], *args[at].unbind(-3), *args[at + 1 :])

    return on_slices


run_packed = entry(
    "short_attention_packed",
    packed(fastest_forward, 0),
    packed(backward, 2),
    (
        "(Tensor qkv, float scale) -> (Tensor, Tensor)",
        "(Tensor do, Tensor dlse, Tensor qkv, Tensor o, Tensor lse, float scale) -> (Tensor, Tensor)",
    ),
    (
        lambda qkv, scale: outputs(qkv.select(-3, 0)),
        lambda do, dlse, qkv, o, lse, scale: inputs_gradients(qkv.select(-3, 0), lse),
    ),
    saved=lambda inputs, outputs: (inputs[0], *outputs),
    gradients=lambda _, found: found[:1],
    tangent=lambda qkv, o, lse, dqkv, scale: tangent(*qkv.unbind(-3), o, lse, *dqkv.unbind(-3), scale),
    plain_backward=packed(plain_backward, 2),
    seen=True,
)


def takes(scale: float, *tensors: Tensor) -> bool:
    """Whether the kernels serve these; else the reference runs."""
    alike = all(x.shape == tensors[0].shape for x in tensors)
    return served(WIDEST, *tensors) and alike and tensors[0].shape[-3] <= LONGEST and scale > 0


def reaches(x: Tensor) -> bool:
    """Whether samples along two dims, (B, S, L, H, K) or (B, S, L, 3, H, K), are done where they lie: few tokens in
    half precision (on a CPU in any), whose gradients' offsets fit in 32 bits."""
    few = x.shape[2] <= FEW and x.shape[-1] <= WIDEST and (x.element_size() == 2 or x.device.type == "cpu")
    return few and 3 * math.prod(x.shape[1:3]) * math.prod(x.shape[-2:]) < 2**31


def attend(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v as one kernel, its backward as another; q, k and v (B, L, H, K) or (B, S, L, H, K).

    The reference itself for fp64, mixed dtypes, heads beyond ``WIDEST``, samples beyond ``LONGEST`` and scales that are
    not positive. Where q, k and v are the slices of one tensor, ``attend_packed`` spares a copy of their gradients.
    """
    if not takes(scale, q_BLHK, k_BLHK, v_BLHK):
        return plain(q_BLHK, k_BLHK, v_BLHK, scale)
    return run(q_BLHK, k_BLHK, v_BLHK, scale)[0]


def attend_packed(qkv_BL3HK: Tensor, scale: float) -> Tensor:
    """``attend`` of the three slices, whose gradient is one tensor too, written in place."""
    q, k, v = qkv_BL3HK.unbind(-3)
    if not takes(scale, q, k, v):
        return plain(q, k, v, scale)
    return run_packed(qkv_BL3HK, scale)[0]
