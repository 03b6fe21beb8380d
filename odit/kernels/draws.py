"""Standard normals and uniforms, each draw one kernel, with the bits of ``odit.random``.

A lane draws one block of Philox4x32-10, the words w0 to w3 of a sample, and makes four values of it: uniforms
(w >> 8) 2^-24, or normals by Box-Muller on (w0, w1) and (w2, w3), in fp64:

    u = (w0 + 1/2) 2^-32, v = (w1 + 1/2) 2^-32, r = sqrt(-2 log u): r cos(2 pi v) and r sin(2 pi v)

Bits are those of ``odit.random`` because operations and their order are: no product and sum may become one rounding
(``enable_fp_fusion``), and in fp64 Triton's division and square root round as IEEE 754 has it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from odit.kernels.launch import launch

BLOCK, WARPS = 128, 4  # Philox blocks a program: one a lane
# Of artanh(s) / s in s^2, and of sin(x) / x and cos x in x^2, highest first: kernels import nothing of odit.random.
LOG = tl.constexpr(tuple(1.0 / n for n in range(21, 0, -2)))
SIN = tl.constexpr(tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1)))
COS = tl.constexpr(tuple((-1) ** n / math.factorial(2 * n) for n in range(8, -1, -1)))
ROOT_HALF, LN_2, TURN = tl.constexpr(math.sqrt(0.5)), tl.constexpr(math.log(2)), tl.constexpr(2 * math.pi)


@triton.jit
def horner(x, series: tl.constexpr, NUM: tl.constexpr):
    """The polynomial of these ``NUM`` coefficients, highest first."""
    total = x * series[0] + series[1]
    for i in tl.static_range(2, NUM):
        total = total * x + series[i]
    return total


@triton.jit
def log(u):
    """``random._log`` of u in [2^-33, 1), whose exponent and mantissa are cut from its bits."""
    word = u.to(tl.int64, bitcast=True)
    exponent = (word >> 52) - 1022
    mantissa = ((word & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    low = mantissa < ROOT_HALF
    mantissa = tl.where(low, mantissa * 2, mantissa)
    exponent = tl.where(low, exponent - 1, exponent).to(tl.float64)
    s = (mantissa - 1) / (mantissa + 1)
    return exponent * LN_2 + 2 * s * horner(s * s, LOG, 11)


@triton.jit
def sin_cos_turns(u):
    """``random._sin_cos_turns`` of u that is no multiple of 1/4: neither of them is 0."""
    nearest = tl.floor(4 * u + 0.5)
    x = (u - 0.25 * nearest) * TURN
    sin, cos = x * horner(x * x, SIN, 9), horner(x * x, COS, 9)
    quadrant = nearest.to(tl.int32)
    odd = (quadrant & 1) == 1
    s, c = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    return tl.where((quadrant & 2) != 0, -s, s), tl.where(((quadrant + 1) & 2) != 0, -c, c)


@triton.jit
def pair(w0, w1, NORMAL: tl.constexpr):
    """Two values of two words."""
    if NORMAL:
        radius = tl.sqrt(-2.0 * log((w0.to(tl.float64) + 0.5) * 2.0**-32))
        sin, cos = sin_cos_turns((w1.to(tl.float64) + 0.5) * 2.0**-32)
        return (radius * cos).to(tl.float32), (radius * sin).to(tl.float32)
    else:
        return (w0 >> 8).to(tl.float32) * 2.0**-24, (w1 >> 8).to(tl.float32) * 2.0**-24


@triton.jit
def put(out_ptr, row, at, size, value, here):
    """Stores element ``at`` of the row, where it has one."""
    tl.store(out_ptr + row * size + at, value, mask=here & (at >= 0) & (at < size))


@triton.jit(do_not_specialize=["k0", "k1", "first", "blocks", "skip", "size", "rows"])  # one compilation for all keys
def kernel(
    out_ptr, ids_ptr, k0, k1, first, blocks, skip, size, rows,
    IDS: tl.constexpr, NORMAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, block = lane // blocks, lane % blocks
    here = row < rows
    c0, zero = (block + first).to(tl.uint32), (block * 0).to(tl.uint32)
    lo, hi = zero, zero
    if IDS:
        id = tl.load(ids_ptr + row, mask=here, other=0)
        lo, hi = id.to(tl.uint32), (id >> 32).to(tl.uint32)
    k0, k1 = zero + k0.to(tl.uint32), zero + k1.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(c0, zero, lo, hi, k0, k1)
    z0, z1 = pair(w0, w1, NORMAL)
    z2, z3 = pair(w2, w3, NORMAL)
    at = block * 4 - skip
    put(out_ptr, row, at, size, z0, here)
    put(out_ptr, row, at + 1, size, z1, here)
    put(out_ptr, row, at + 2, size, z2, here)
    put(out_ptr, row, at + 3, size, z3, here)


def uniform(k: tuple[int, int], shape=(), ids: Tensor | None = None, *, device=None, start: int = 0) -> Tensor:
    """``random.uniform`` by the kernel."""
    return draw(k, shape, ids, device, start, normal=False)


def normal(k: tuple[int, int], shape=(), ids: Tensor | None = None, *, device=None, start: int = 0) -> Tensor:
    """``random.normal`` by the kernel."""
    return draw(k, shape, ids, device, start, normal=True)


def draw(k: tuple[int, int], shape, ids: Tensor | None, device, start: int, normal: bool) -> Tensor:
    """One launch; arguments as ``random.bits``."""
    rows, several = (1, ()) if ids is None else (len(ids), (len(ids),))
    assert ids is None or ids.dtype == torch.int64, ids.dtype
    out = torch.empty((*several, *shape), dtype=torch.float32, device=ids.device if ids is not None else device)
    size = math.prod(shape)
    first, last = start // 4, -(-(start + size) // 4)
    assert last <= 2**32, "a single draw is limited to 2**34 words"
    blocks = last - first
    block = 2**14 if out.device.type == "cpu" else BLOCK  # the interpreter's time is that of its operations
    words = (word - 2**32 if word >= 2**31 else word for word in k)  # as int32: Triton tells types by values
    launch(
        kernel, triton.cdiv(rows * blocks, block), out.device, out, out if ids is None else ids.contiguous(), *words,
        first, blocks, start - 4 * first, size, rows, IDS=ids is not None, NORMAL=normal, BLOCK=block, num_warps=WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
