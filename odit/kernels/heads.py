"""Heads in registers, whatever their size: what the kernels of attention are written in.

Tensor cores want powers of two, and a head of 72 as 128 would be 78 % more work. So a head's columns are cut into parts
of powers of two, 72 into 64 and 16, of which the last is filled up with zeros: a product over columns is the sum of its
parts' products, one into columns is a product a part.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST = 16  # columns of a tensor core's product


def parts(K: int) -> tuple[int, ...]:
    """The widths of a head's parts: the powers of two of K, made a multiple of ``LEAST``."""
    rest = triton.cdiv(K, LEAST) * LEAST
    return tuple(1 << bit for bit in range(rest.bit_length() - 1, -1, -1) if rest >> bit & 1)


@triton.jit
def part(i: tl.constexpr, row_R, L: tl.constexpr, K: tl.constexpr, WIDTHS: tl.constexpr, R: tl.constexpr):
    """The columns of part ``i``, and which of its elements are there: what is always there, the compiler sees."""
    at = 0
    for j in tl.static_range(i):
        at += WIDTHS[j]
    column_W = at + tl.arange(0, WIDTHS[i])
    mask = tl.full((R, WIDTHS[i]), True, tl.int1)
    if L % R != 0:
        mask = mask & (row_R < L)[:, None]
    if i + 1 == len(WIDTHS):  # the others are whole
        mask = mask & (column_W < K)[None, :]
    return column_W[None, :], mask


@triton.jit
def load(ptr, stride, row_R, L: tl.constexpr, K: tl.constexpr, WIDTHS: tl.constexpr, R: tl.constexpr):
    """Rows of one head as parts; beyond L and K they are 0."""
    found = ()
    for i in tl.static_range(len(WIDTHS)):
        column_1W, mask = part(i, row_R, L, K, WIDTHS, R)
        found = found + (tl.load(ptr + row_R[:, None] * stride + column_1W, mask=mask, other=0.0),)
    return found


@triton.jit
def store(ptr, stride, row_R, values, factor, L: tl.constexpr, K: tl.constexpr, WIDTHS: tl.constexpr, R: tl.constexpr):
    """Stores the parts times ``factor`` as rows of one head."""
    for i in tl.static_range(len(WIDTHS)):
        column_1W, mask = part(i, row_R, L, K, WIDTHS, R)
        value = (values[i] * factor).to(ptr.dtype.element_ty)
        tl.store(ptr + row_R[:, None] * stride + column_1W, value, mask=mask)


@triton.jit
def zeros(R: tl.constexpr, WIDTHS: tl.constexpr):
    """Parts to be summed into, in fp32."""
    found = ()
    for i in tl.static_range(len(WIDTHS)):
        found = found + (tl.full((R, WIDTHS[i]), 0.0, tl.float32),)
    return found


@triton.jit
def over_columns(a, b, WIDTHS: tl.constexpr):
    """a b^T, in fp32."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(WIDTHS)):
        total = tl.dot(a[i], tl.trans(b[i]), total, input_precision="ieee")
    return total


@triton.jit
def add_product(total, a, b, WIDTHS: tl.constexpr):
    """total + a b, for each part of b; a is rounded to b's dtype."""
    found = ()
    for i in tl.static_range(len(WIDTHS)):
        found = found + (tl.dot(a.to(b[i].dtype), b[i], total[i], input_precision="ieee"),)
    return found


@triton.jit
def times_rows(a, factor_R, WIDTHS: tl.constexpr):
    """Each row of the parts times its factor."""
    found = ()
    for i in tl.static_range(len(WIDTHS)):
        found = found + (a[i] * factor_R[:, None],)
    return found


@triton.jit
def row_products(a, b, WIDTHS: tl.constexpr):
    """Sum over columns of a b, (R,) in fp32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(WIDTHS)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total
