"""AdamW, EMA and the copy in half precision in one pass over all leaves.

Reads gradient, weight, both moments and EMA of an element once and writes them once: 36 bytes a parameter with a
gradient and a copy in half precision. An element is ``optim.adamw``'s update in its order of operations (Loshchilov and
Hutter 2019, algorithm 2), the gradient scaled first:

    g = scale grad
    m = m + (1 - beta1) (g - m)
    v = beta2 v + (1 - beta2) g g
    p = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ema = ema + (1 - decay) (p - ema)

Where a product and a sum are one rounding is written out, so that bits do not depend on how leaves are cut. PyTorch's
kernels choose for themselves: bits equal those of ``optim.adamw`` and ``ema_`` but for the last one or two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from odit import tree
from odit.kernels.launch import launch

CHUNK, BLOCK = 16384, 512  # elements a program, and at once: 4 a lane, 16 bytes
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def array(table_ptr, leaf, num: tl.constexpr, kind: tl.constexpr, first, ALIGNED: tl.constexpr):
    """Pointer ``num`` of the leaf, to elements of ``kind`` from ``first`` on."""
    ptr = tl.load(table_ptr + leaf * 6 + num).to(tl.pointer_type(kind))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr + first


@triton.jit
def lerp(a, b, rate):
    """a + rate (b - a), from the nearer end as torch.lerp."""
    return tl.where(rate < 0.5, tl.fma(rate, b - a, a), tl.fma(b - a, rate - 1.0, b))


@triton.jit
def kernel(
    table_ptr, chunks_ptr, scale, rise1, beta2, rise2, correction, eps, shrink, step_size, rise,
    GRAD: tl.constexpr, EMA: tl.constexpr, LOW: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    leaf = tl.load(chunks_ptr + tl.program_id(0) * 3)
    first = tl.load(chunks_ptr + tl.program_id(0) * 3 + 1) * CHUNK
    left = tl.load(chunks_ptr + tl.program_id(0) * 3 + 2) - first
    g_ptr = array(table_ptr, leaf, 0, GRAD, first, ALIGNED)
    p_ptr = array(table_ptr, leaf, 1, tl.float32, first, ALIGNED)
    m_ptr = array(table_ptr, leaf, 2, tl.float32, first, ALIGNED)
    v_ptr = array(table_ptr, leaf, 3, tl.float32, first, ALIGNED)
    ema_ptr = array(table_ptr, leaf, 4, tl.float32, first, ALIGNED)
    low_ptr = array(table_ptr, leaf, 5, LOW, first, ALIGNED)
    if left >= CHUNK:  # without masks, which would make loads an element wide
        for start in range(0, CHUNK, BLOCK):
            block(
                g_ptr, p_ptr, m_ptr, v_ptr, ema_ptr, low_ptr, start + tl.arange(0, BLOCK), None,
                scale, rise1, beta2, rise2, correction, eps, shrink, step_size, rise, EMA, LOW,
            )  # fmt: skip
    else:
        for start in range(0, CHUNK, BLOCK):
            at = start + tl.arange(0, BLOCK)
            block(
                g_ptr, p_ptr, m_ptr, v_ptr, ema_ptr, low_ptr, at, at < left,
                scale, rise1, beta2, rise2, correction, eps, shrink, step_size, rise, EMA, LOW,
            )  # fmt: skip


@triton.jit
def block(
    g_ptr, p_ptr, m_ptr, v_ptr, ema_ptr, low_ptr, at, here,
    scale, rise1, beta2, rise2, correction, eps, shrink, step_size, rise, EMA: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """The elements ``at``, where they are ``here``; everywhere if that is None."""
    g = tl.load(g_ptr + at, mask=here).to(tl.float32) * scale
    p, m, v = tl.load(p_ptr + at, mask=here), tl.load(m_ptr + at, mask=here), tl.load(v_ptr + at, mask=here)
    m = lerp(m, g, rise1)
    v = tl.fma(rise2, g * g, v * beta2)
    p = tl.fma(-step_size, tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction) + eps), p * shrink)
    tl.store(p_ptr + at, p, mask=here)
    tl.store(m_ptr + at, m, mask=here)
    tl.store(v_ptr + at, v, mask=here)
    if EMA:
        tl.store(ema_ptr + at, lerp(tl.load(ema_ptr + at, mask=here), p, rise), mask=here)
    if LOW != tl.int1:
        tl.store(low_ptr + at, p.to(LOW), mask=here)


@functools.lru_cache(maxsize=16)
def chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(leaf, number within the leaf, size of the leaf) of every chunk, int64 (chunks, 3)."""
    rows = [(leaf, n, size) for leaf, size in enumerate(sizes) for n in range(triton.cdiv(size, CHUNK))]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(device)


def prepare(arrays: list[tuple[Tensor | None, ...]]) -> Callable[[tuple[float, ...]], None]:
    """The kernel over leaves (grad, p, m, v, ema or None, low or None) of one device and one set of dtypes, ready to be
    launched with its scalars."""
    grad, p, *_, ema, low = arrays[0]
    assert grad is not None and p is not None
    pointers = [[0 if x is None else x.data_ptr() for x in leaf] for leaf in arrays]
    table = torch.tensor(pointers, dtype=torch.int64).to(p.device, non_blocking=True)
    cut = chunks(tuple(leaf[1].numel() for leaf in arrays), p.device)
    constants = {
        "GRAD": KINDS[grad.dtype],
        "EMA": ema is not None,
        "LOW": tl.int1 if low is None else KINDS[low.dtype],
        "ALIGNED": not any(pointer % 16 for leaf in pointers for pointer in leaf),
        "CHUNK": CHUNK,
        "BLOCK": CHUNK // 2 if p.device.type == "cpu" else BLOCK,  # the interpreter's time is that of its operations
        "num_warps": 4,
    }
    return lambda scalars: launch(kernel, len(cut), p.device, table, cut, *scalars, **constants)


def served(arrays: list[tuple[Tensor | None, ...]]) -> bool:
    """Whether the kernel takes these: state in fp32, gradients and copies in ``KINDS``, contiguous, on one device."""
    device = arrays[0][1].device
    return all(
        all(x is None or x.device == device for x in leaf)
        and all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in leaf[1:5])
        and all(x is None or x.dtype in KINDS for x in (leaf[0], leaf[5]))
        and (leaf[5] is None or leaf[5].is_contiguous())
        for leaf in arrays
    )


class OnePass(NamedTuple):
    """``optim.Optimizer``'s two functions, and the second one in two parts."""

    init: Callable
    update_: Callable
    prepare: Callable


def fused(
    plain: Any, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> OnePass:
    """The optimizer ``plain`` (``optim.adamw`` of the same settings) with an ``update_`` that is one kernel.

    ``update_(params, grads, state, lr, scale=1.0, ema=None, decay=0.0, low=None) -> state`` moves params, moments and
    ``ema`` in place and writes ``low``, the params in another dtype. ``scale`` multiplies the gradients (clipping),
    which stay as they are. What the kernel does not take (fp64, state that is not contiguous) goes through ``plain``.

    ``prepare(params, grads, state, ema=None, low=None) -> update`` does all that needs no number, while gradients are
    still being computed; ``update(lr, scale=1.0, decay=0.0) -> state`` is the rest.
    """

    def scalars(step: int, lr: float, scale: float, decay: float) -> tuple[float, ...]:
        correction, step_size = math.sqrt(1 - beta2**step), lr / (1 - beta1**step)
        rates = (scale, 1 - beta1, beta2, 1 - beta2, correction, eps, 1 - lr * weight_decay, step_size, 1 - decay)
        return tuple(map(float, rates))

    @torch.no_grad()
    def prepared(
        params: tree.Tree, grads: tree.Tree, state: Any, ema: tree.Tree | None = None, low: tree.Tree | None = None
    ) -> Callable[..., Any]:
        p, g, m, v = (tree.leaves(t) for t in (params, grads, state.m, state.v))
        averages, copies = (tree.leaves(t) if t is not None else [None] * len(p) for t in (ema, low))
        arrays = list(zip(g, p, m, v, averages, copies))
        if not arrays or not served(arrays):
            return lambda lr, scale=1.0, decay=0.0: plainly_(params, grads, state, lr, scale, ema, decay, low)
        groups: dict[Any, list] = {}
        for grad, *leaf, copy in arrays:
            groups.setdefault((grad.dtype, copy is not None and copy.dtype), []).append(
                (grad.contiguous(), *leaf, copy)
            )
        launches, count = [prepare(group) for group in groups.values()], state.count + 1

        def update(lr: float, scale: float = 1.0, decay: float = 0.0) -> Any:
            for launched, _ in zip(launches, groups.values()):  # whose copies must live until then
                launched(scalars(int(count), lr, scale, decay))
            return state._replace(count=count)

        return update

    def update_(
        params: tree.Tree, grads: tree.Tree, state: Any, lr: float, scale: float = 1.0, ema: tree.Tree | None = None,
        decay: float = 0.0, low: tree.Tree | None = None,
    ) -> Any:  # fmt: skip
        return prepared(params, grads, state, ema, low)(lr, scale, decay)

    @torch.no_grad()
    def plainly_(params, grads, state, lr, scale, ema, decay, low) -> Any:
        state = plain.update_(params, tree.map(lambda g: g * scale, grads), state, lr)
        if ema is not None:
            torch._foreach_lerp_(tree.leaves(ema), tree.leaves(params), 1 - decay)
        if low is not None:
            torch._foreach_copy_(tree.leaves(low), tree.leaves(params))
        return state

    return OnePass(plain.init, update_, prepared)
