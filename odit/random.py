"""Counter-based random numbers: every draw is a function of a key, a draw id and an element's index.

The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). A key is 64
bits; the 128-bit counter is (block of four words, 0, low and high word of the draw id). Nothing here has state, so a
draw does not depend on batch size, rank count or the order of calls.

All arithmetic is on integers, or on float64 with +, -, *, / and sqrt alone (exactly rounded by IEEE 754): bits depend
neither on how a tensor is sliced nor on the device. ``torch.log`` and friends promise neither (vector body and tail
of one loop can differ), hence the few polynomials below.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# Multipliers and Weyl increments of the Philox4x32 paper (section 3.3 and its Random123 implementation).
M0, M1, W0, W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
# Coefficients, highest first: of artanh(s) / s and cos x in s^2 and x^2, and of sin(x) / x.
LOG = tuple(1.0 / n for n in range(21, 0, -2))
SIN = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1))
COS = tuple((-1) ** n / math.factorial(2 * n) for n in range(8, -1, -1))


class Key(NamedTuple):
    """The two 32-bit words that select a stream."""

    lo: int
    hi: int


def key(seed: int) -> Key:
    """Makes a key from a seed in [0, 2**64)."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is outside [0, 2**64): use a non-negative integer")
    return Key(seed & MASK, seed >> 32)


def fold_in(k: Key, *data: int | str) -> Key:
    """Derives a new key from a key and names or numbers; any change of any of them gives an unrelated stream."""
    for datum in data:
        if isinstance(datum, str):
            datum = int.from_bytes(hashlib.blake2s(datum.encode(), digest_size=8).digest(), "little")
            kind = 2
        else:
            assert 0 <= datum < 2**64, datum
            kind = 1
        # The counter's second word is 0 for draws, so a derived key never repeats a drawn word.
        words = philox((kind, 1, datum & MASK, datum >> 32), k)
        k = Key(words[0], words[1])
    return k


def philox(counter, k):
    """Philox4x32-10 on four counter words and two key words, Python ints or int64 tensors of words alike."""
    c0, c1, c2, c3 = counter
    k0, k1 = k
    for _ in range(10):
        hi0, lo0 = _multiply(M0, c0)
        hi1, lo1 = _multiply(M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1, c2, c3


def _multiply(a: int, b):
    """High and low word of a 32 x 32 bit product (an int64 product wraps, but keeps all 64 bits)."""
    if isinstance(b, Tensor) and a >= 2**31:
        a -= 2**32  # the same product modulo 2**64 once b * 2**32 is added back; keeps the scalar inside int32 range
        product = b * a + (b << 32)
    else:
        product = a * b
    return (product >> 32) & MASK, product & MASK


def bits(k: Key, shape, ids: Tensor | None = None, *, device=None, start: int = 0) -> Tensor:
    """Draws 32-bit words as int64.

    Args:
        shape: of one draw; without ``ids`` the result has this shape, with ``ids`` (B,) int64 it is (B, *shape) and
            row b depends on ids[b] alone.
        start: index of the first element within the draw, so that a part of a long draw can be had without the rest.
    """
    size = math.prod(shape)
    device = ids.device if ids is not None else device
    first, last = start // 4, -(-(start + size) // 4)
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    if ids is None:
        lo, hi = torch.zeros_like(block), torch.zeros_like(block)
    else:
        block = block.expand(len(ids), -1)
        lo, hi = (ids & MASK)[:, None].expand_as(block), ((ids >> 32) & MASK)[:, None].expand_as(block)
    assert last <= 2**32, "a single draw is limited to 2**34 words"
    words = torch.stack(philox((block, torch.zeros_like(block), lo, hi), k), -1).flatten(-2)
    words = words[..., start - 4 * first :][..., :size]
    return words.reshape((*words.shape[:-1], *shape))


def uniform(k: Key, shape=(), ids: Tensor | None = None, *, device=None, start: int = 0) -> Tensor:
    """Draws fp32 uniforms in [0, 1): multiples of 2**-24. Arguments as ``bits``."""
    return (bits(k, shape, ids, device=device, start=start) >> 8).float() * 2.0**-24


def normal(k: Key, shape=(), ids: Tensor | None = None, *, device=None, start: int = 0) -> Tensor:
    """Draws fp32 standard normals (Box-Muller, computed in fp64); at most 6.76 in size. Arguments as ``bits``."""
    size = math.prod(shape)
    begin, end = start - start % 2, start + size + (start + size) % 2
    words = bits(k, (end - begin,), ids, device=device, start=begin)
    u = (words.double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2.0 * _log(u[..., 0::2]))
    sin, cos = _sin_cos_turns(u[..., 1::2])
    z = torch.stack((radius * cos, radius * sin), -1).flatten(-2).float()
    z = z[..., start - begin :][..., :size]
    return z.reshape((*z.shape[:-1], *shape))


def _horner(x: Tensor, coefficients) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = total * x + c
    return total


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of u > 0: frexp, then 2 artanh((m-1)/(m+1)) by its series; error about 1e-16 relative to 1."""
    mantissa, exponent = torch.frexp(u)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2, mantissa)
    exponent = exponent.double() - low.double()
    s = (mantissa - 1) / (mantissa + 1)
    return exponent * math.log(2) + 2 * s * _horner(s * s, LOG)


def _sin_cos_turns(u: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of 2 pi u by Taylor series on [-pi/4, pi/4] and the quadrant's symmetry."""
    quadrant = torch.floor(4 * u + 0.5)
    x = (u - 0.25 * quadrant) * (2 * math.pi)
    x2 = x * x
    sin, cos = x * _horner(x2, SIN), _horner(x2, COS)
    odd = quadrant.long() & 1 == 1
    flip_sin, flip_cos = (quadrant.long() & 2) != 0, ((quadrant.long() + 1) & 2) != 0
    s, c = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    return torch.where(flip_sin, -s, s), torch.where(flip_cos, -c, c)


def permutation(k: Key, num: int, index: Tensor) -> Tensor:
    """Maps index in [0, num) to its place in a keyed permutation of [0, num), each element in O(1).

    A four-round Feistel network on the smallest even number of bits that holds ``num``, walked until the value falls
    inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). index is int64 of any shape; the words of
    the key may be tensors of that shape, a key an element.
    """
    assert num > 0
    half = max(1, -(-(num - 1).bit_length() // 2))
    value = _feistel(k, index, half)
    while len(outside := torch.nonzero(value.flatten() >= num)[:, 0]):
        # words of a key can be tensors, one an index
        part = Key(*(w.flatten()[outside] if isinstance(w, Tensor) else w for w in k))
        walked = _feistel(part, value.flatten()[outside], half)
        value = value.flatten().index_copy(0, outside, walked).reshape(index.shape)
    return value


def _feistel(k: Key, value: Tensor, half: int) -> Tensor:
    """Permutes the numbers of 2 * half bits, keyed by four Philox rounds' worth of words."""
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for round_ in range(4):
        counter = (right, torch.full_like(right, 2), torch.full_like(right, round_), torch.zeros_like(right))
        left, right = right, left ^ (philox(counter, k)[0] & mask)
    return (left << half) | right
