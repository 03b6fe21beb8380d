"""Draws against the published vectors, against slow float64 formulas and against themselves in other shapes."""

import math

import pytest
import torch

from odit import random

ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32, 10 rounds (Salmon et al. 2011): counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
KEY = random.fold_in(random.key(7), "test")


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_philox_known_answers(counter, key, answer):
    assert random.philox(counter, key) == answer
    tensors = random.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(t) for t in tensors) == answer


def test_bits_are_philox_words():
    ids = torch.tensor([3, 2**32 * 5 + 9])
    drawn = random.bits(KEY, (6,), ids)
    for b, (lo, hi) in enumerate([(3, 0), (9, 5)]):
        words = [*random.philox((0, 0, lo, hi), KEY), *random.philox((1, 0, lo, hi), KEY)]
        assert drawn[b].tolist() == words[:6]


@pytest.mark.parametrize("draw", [random.bits, random.uniform, random.normal])
def test_a_draw_depends_on_key_id_and_index_alone(draw):
    ids = torch.arange(10) * 977
    whole = draw(KEY, (3, 5), ids)
    for part in (slice(0, 1), slice(3, 7), slice(9, 10)):
        assert torch.equal(draw(KEY, (3, 5), ids[part]), whole[part])
    long = draw(KEY, (1001,))
    for start, size in [(0, 7), (1, 2), (37, 400), (999, 2)]:
        assert torch.equal(draw(KEY, (size,), start=start), long[start : start + size])
    assert not torch.equal(draw(random.fold_in(KEY, 1), (1001,)), long)


def test_normal_is_box_muller_of_the_bits():
    u = [(w + 0.5) / 2**32 for w in random.bits(KEY, (2000,)).tolist()]
    direct = []
    for a, b in zip(u[0::2], u[1::2]):
        radius = math.sqrt(-2 * math.log(a))
        direct += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    z = random.normal(KEY, (2000,))
    # fp32 rounding of a value near 4 is 2.4e-7; the fp64 polynomials are good to 1e-15
    assert (z.double() - torch.tensor(direct, dtype=torch.float64)).abs().max() < 3e-7


def test_moments_and_range():
    z, u = random.normal(KEY, (400_000,)).double(), random.uniform(KEY, (400_000,)).double()
    # five standard errors of each mean at this count
    assert abs(z.mean()) < 8e-3 and abs(z.var() - 1) < 1.2e-2 and abs((z**4).mean() - 3) < 8e-2
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 2.3e-3
    extreme = torch.tensor([0.5, 1 - 0.5], dtype=torch.float64) * 2.0**-32
    assert torch.isfinite(random._log(extreme)).all()


def test_keys_derive_unrelated_streams():
    keys = {random.fold_in(KEY, *d) for d in [(0,), (1,), ("a",), ("b",), (0, 1), (1, 0), ("a", 0), ("0",), (2**40,)]}
    assert len(keys) == 9
    with pytest.raises(ValueError, match=r"seed -1 is outside \[0, 2\*\*64\)"):
        random.key(-1)


@pytest.mark.parametrize("num", [1, 2, 3, 10, 1000, 1797, 4097])
def test_permutation_is_one(num):
    index = torch.arange(num)
    permuted = random.permutation(KEY, num, index)
    assert sorted(permuted.tolist()) == list(range(num))
    assert torch.equal(random.permutation(KEY, num, index[num // 2 :]), permuted[num // 2 :])
    if num >= 1000:
        assert not torch.equal(random.permutation(random.fold_in(KEY, 1), num, index), permuted)
        # rank correlation of a random permutation is below 5 / sqrt(n)
        assert abs(torch.corrcoef(torch.stack([index, permuted]).double())[0, 1]) < 5 / num**0.5


@pytest.mark.gpu
def test_gpu_draws_the_same_bits():
    ids = torch.arange(64) * 12345
    for draw in (random.bits, random.uniform, random.normal):
        assert torch.equal(draw(KEY, (4, 33), ids.cuda()).cpu(), draw(KEY, (4, 33), ids))
