"""The kernel of draws against ``odit.random``, equal in every bit: interpreted on the CPU, and on a GPU (-m gpu)."""

import collections
import dataclasses
import re

import pytest
import torch

from odit import graphs, kernels, ops, random, sample, train
from odit.draws import draw

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from odit.kernels import draws

KEYS = {"folded": random.fold_in(random.key(3), "test"), "ones": random.key(2**64 - 1), "zeros": random.key(0)}
IDS = {
    "no ids": None,
    "one": torch.tensor([7]),
    "several": torch.tensor([3, 2**32 * 5 + 9, 2**63 - 1, -5, 2**31]),
    "every other": torch.arange(2**33, 2**33 + 6)[::2],
    "none of them": torch.arange(0),
}
KINDS = ("uniform", "normal")
BOTH = pytest.mark.parametrize("name", KINDS)


def both(name, *args, **settings):
    return tuple(getattr(module, name)(*args, **settings) for module in (draws, random))


def assert_same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


@BOTH
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (17,), (4, 5, 7), (0,)], ids=str)
def test_bits_are_those_of_the_reference(name, key, ids, shape):
    assert_same(*both(name, key, shape, ids))


@BOTH
@pytest.mark.parametrize("start", [1, 2, 3, 4, 37, 2**33 + 5])
def test_a_part_of_a_draw_is_had_alone(name, start):
    assert_same(*both(name, KEYS["folded"], (9,), start=start))
    assert_same(*both(name, KEYS["folded"], (3, 3), IDS["several"], start=start))


@BOTH
def test_many_values(name):
    """Of several programs, in every quadrant and with every exponent up to 2^-19 or so."""
    assert_same(*both(name, KEYS["folded"], (1_000_000,)))


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("shape", [(), (17,), (4, 32, 32), (1_000_003,)], ids=str)
@pytest.mark.parametrize("num", [None, 1, 128])
def test_bits_on_a_gpu_are_those_of_the_cpu(name, key, shape, num):
    num = min(num or 0, 8) if shape == (1_000_003,) else num
    ids = torch.arange(num) * 123456789123 if num else None
    expected = getattr(random, name)(key, shape, ids)
    found = getattr(draws, name)(key, shape, None if ids is None else ids.cuda(), device="cuda")
    assert found.is_cuda
    assert_same(found.cpu(), expected)


@pytest.mark.gpu
def test_a_graph_draws_the_same():
    call = graphs.captured(lambda ids: [getattr(draws, name)(KEYS["ones"], (4, 5, 7), ids) for name in KINDS])
    for ids in (torch.arange(3), IDS["several"][:3]):
        for name, found in zip(KINDS, call(ids.cuda())):
            assert_same(found.cpu(), getattr(random, name)(KEYS["ones"], (4, 5, 7), ids))


@pytest.mark.parametrize("fusion", [False, True])
def test_no_product_and_sum_are_one_rounding(monkeypatch, fusion):
    """In what Triton makes for a GPU, by the options that a launch passes; with fusion there would be many."""
    told = {}
    monkeypatch.setattr(draws, "launch", lambda *args, **constants: told.update(constants))
    draws.normal(KEYS["folded"], (4,), IDS["one"])
    options = {name: told.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    assert options["enable_fp_fusion"] is False
    types = {"out_ptr": "*fp32", "ids_ptr": "*i64", **dict.fromkeys(told, "constexpr")}
    signature = {name: types.get(name, "i32") for name in draws.kernel.arg_names}
    source = ASTSource(draws.kernel, signature, constexprs=told | {"BLOCK": draws.BLOCK})
    made = triton.compile(source, GPUTarget("cuda", 90, 32), options | {"enable_fp_fusion": fusion}).asm["ptx"]
    count = collections.Counter(re.findall(r"\s(\w+(?:\.r\w)?)\.f64\s", made))
    # ptxas, too, may merge what has no rounding of its own (PTX ISA, mul and add)
    assert bool(count["fma.rn"]) == bool(count["mul"]) == bool(count["add"]) == fusion
    assert count["mul.rn"] > 50 or fusion
    assert count["div.rn"] == count["sqrt.rn"] == 2


@pytest.fixture
def fused(monkeypatch, make_plan, tiny):
    """A plan that has the kernel at its sites and nothing else of theirs, and one that has none; what was drawn."""
    seen = []

    def noted(draw):
        return lambda *args: (seen.append(draw.__name__), draw(*args))[1]

    plain = make_plan(tiny)
    record = dataclasses.replace(plain.kernels, uniform=noted(draws.uniform), normal=noted(draws.normal))
    return dataclasses.replace(plain, kernels=record), plain, seen


def test_a_run_draws_by_the_record(fused):
    ids, drawn = torch.tensor([5, 2**32 * 2 + 1, 7]), []
    for composed in fused[:2]:
        params = train.init_state(composed, KEYS["folded"]).params
        pictures = sample.sample(composed, params, ids % 10, KEYS["folded"])
        drawn.append([*draw(composed, ids, composed.shape.sample, KEYS["folded"]), pictures])
    assert all(map(torch.equal, *drawn))
    assert sorted(fused[2]) == ["normal"] * 3 + ["uniform"] * 2


def test_the_record_has_the_kernel():
    assert (ops.Ops().uniform, ops.Ops().normal) == (random.uniform, random.normal)
    record = kernels.fused(ops.Ops())
    assert (record.uniform, record.normal) == (draws.uniform, draws.normal)
    meta = record.normal(KEYS["folded"], (3,), torch.empty(2, dtype=torch.int64, device="meta"))
    assert meta.is_meta and meta.shape == (2, 3)
