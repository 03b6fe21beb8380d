"""Every collective against its oracle: a function on the list of all ranks' blocks, differentiated on one process."""

import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from ranks import RankFailed
from torch import Tensor

from odit.parallel import collectives as c
from odit.parallel import recorder
from odit.parallel.mesh import Axis, single

WORLDS = (1, 2, 3, 4)
Blocks = list[Tensor]


# --------------------------------------------------------------------------------------------------------- oracles


def all_gather_oracle(blocks: Blocks, dim: int) -> Blocks:
    return [torch.cat(blocks, dim)] * len(blocks)


def reduce_scatter_oracle(blocks: Blocks, dim: int) -> Blocks:
    return list(sum(blocks).split(c.shares(blocks[0].shape[dim], len(blocks)), dim))


def all_reduce_oracle(blocks: Blocks) -> Blocks:
    return [sum(blocks)] * len(blocks)


def all_to_all_oracle(blocks: Blocks, split_dim: int, concat_dim: int) -> Blocks:
    whole = torch.cat(blocks, concat_dim)
    return list(whole.split(c.shares(whole.shape[split_dim], len(blocks)), split_dim))


def shift_oracle(blocks: Blocks, by: int) -> Blocks:
    return [blocks[(r - by) % len(blocks)] for r in range(len(blocks))]


def take_oracle(blocks: Blocks, dim: int) -> Blocks:
    return [b.split(c.shares(b.shape[dim], len(blocks)), dim)[r] for r, b in enumerate(blocks)]


# ------------------------------------------------------------------------------------------------------- the table


class Case(NamedTuple):
    """A call, its oracle, and the shapes of the ranks' blocks on n ranks."""

    call: Callable[[Tensor, Axis], Tensor]
    oracle: Callable[[Blocks], Blocks]
    shapes: Callable[[int], list[tuple[int, ...]]]
    moves: bool = True  # forward adds nothing, so it must be equal


def same(*shape: int) -> Callable:
    return lambda n: [shape] * n


def split(shape: tuple[int, ...], dim: int, total: int) -> Callable:
    return lambda n: [(*shape[:dim], size, *shape[dim + 1 :]) for size in c.shares(total, n)]


UNEVEN = 5  # over 2, 3, 4 ranks: (3, 2), (2, 2, 1), (2, 2, 1, 0)
CASES: dict[str, Case] = {}
for dim in (0, 1, 2):
    CASES[f"all_gather {dim}"] = Case(
        lambda x, axis, dim=dim: c.all_gather(x, axis, dim), lambda b, dim=dim: all_gather_oracle(b, dim), same(2, 3, 4)
    )
    CASES[f"all_gather {dim} uneven"] = Case(
        lambda x, axis, dim=dim: c.all_gather(x, axis, dim, c.shares(UNEVEN, axis.size)),
        lambda b, dim=dim: all_gather_oracle(b, dim),
        split((2, 3, 4), dim, UNEVEN),
    )
    for name, shape in (("", (12, 12, 12)), (" uneven", (5, 5, 5))):
        CASES[f"reduce_scatter {dim}{name}"] = Case(
            lambda x, axis, dim=dim: c.reduce_scatter(x, axis, dim),
            lambda b, dim=dim: reduce_scatter_oracle(b, dim),
            same(*shape),
            moves=False,
        )
CASES["all_gather -1"] = Case(
    lambda x, axis: c.all_gather(x, axis, -1), lambda b: all_gather_oracle(b, -1), same(2, 3, 4)
)
CASES["all_reduce"] = Case(c.all_reduce, all_reduce_oracle, same(3, 5), moves=False)
CASES["all_reduce transposed"] = Case(
    lambda x, axis: c.all_reduce(x.mT, axis), lambda b: all_reduce_oracle([x.mT for x in b]), same(3, 5), moves=False
)
for s, j in ((0, 1), (1, 0), (2, 1), (1, 3), (-2, -3)):
    for name, heads, tokens in (("", 12, 12), (" uneven heads", 5, 12), (" uneven both", 6, 7), (" few heads", 2, 7)):
        CASES[f"all_to_all {s}<-{j}{name}"] = Case(
            lambda x, axis, s=s, j=j, tokens=tokens: c.all_to_all(
                x, axis, s, j, concat_sizes=c.shares(tokens, axis.size)
            ),
            lambda b, s=s, j=j: all_to_all_oracle(b, s, j),
            split(tuple(heads if d == s % 4 else 2 for d in range(4)), j % 4, tokens),
        )
for by in (1, 2, -1, 5):
    CASES[f"shift {by}"] = Case(
        lambda x, axis, by=by: c.shift(x, axis, by), lambda b, by=by: shift_oracle(b, by), same(2, 3)
    )
    CASES[f"shift {by} uneven"] = Case(
        lambda x, axis, by=by: c.shift(x, axis, by, 1, c.shares(UNEVEN, axis.size)),
        lambda b, by=by: shift_oracle(b, by),
        split((2, 3), 1, UNEVEN),
    )
CASES["take"] = Case(lambda x, axis: c.take(x, axis, 1), lambda b: take_oracle(b, 1), same(2, 5))
CASES["two hops"] = Case(
    lambda x, axis: c.shift(
        c.shift(x, axis, 1, 0, c.shares(UNEVEN, axis.size)), axis, 1, 0, c.roll(c.shares(UNEVEN, axis.size), 1)
    ),
    lambda b: shift_oracle(b, 2),
    split((2, 3), 0, UNEVEN),
)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(case: Case, n: int, dtype: torch.dtype) -> tuple[Blocks, Blocks]:
    """All ranks' blocks and the cotangents of their results."""
    blocks = [draw(shape, r, dtype) for r, shape in enumerate(case.shapes(n))]
    return blocks, [draw(y.shape, 100 + r, dtype) for r, y in enumerate(case.oracle(blocks))]


class Answer(NamedTuple):
    """What a rank found: result, gradient, and what the recorder counted in forward and backward."""

    y: Tensor
    grad: Tensor
    forward: dict[str, recorder.Total]
    backward: dict[str, recorder.Total]


def on_a_rank(mesh, name: str, dtype: torch.dtype, axis: str = "all") -> Answer:
    axis = mesh[axis]
    blocks, cotangents = inputs(CASES[name], axis.size, dtype)
    x = blocks[axis.rank].requires_grad_()
    with recorder.recording() as forward:
        y = CASES[name].call(x, axis)
    with recorder.recording() as backward:
        y.backward(cotangents[axis.rank])
    return Answer(y.detach(), x.grad, recorder.totals(forward), recorder.totals(backward))


def all_on_a_rank(mesh, dtype: torch.dtype) -> dict[str, Answer | str]:
    """Every case's answer, or its traceback where all ranks fail alike."""
    found = {}
    for name in CASES:
        try:
            found[name] = on_a_rank(mesh, name, dtype)
        except Exception:
            found[name] = traceback.format_exc()
    return found


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).double().norm() <= tolerance * b.double().norm())


# one sum of at most 4 numbers a result: a few units in the last place
TOLERANCE = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 2e-2}


@pytest.fixture(scope="session")
def answers(ranks):
    """(world, dtype) -> each case's answers by rank; one visit to the pool for all cases."""
    found = {}

    def of(world: int, dtype: torch.dtype, name: str) -> list[Answer]:
        if (world, dtype) not in found:
            try:
                found[world, dtype] = ranks.run(world, all_on_a_rank, dtype)
            except RankFailed as error:
                found[world, dtype] = error  # told again for each case, at once
        if isinstance(found[world, dtype], RankFailed):
            raise found[world, dtype]
        own = [rank[name] for rank in found[world, dtype]]
        assert not any(isinstance(answer, str) for answer in own), own
        return own

    return of


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str, scope="session")
@pytest.mark.parametrize("world", WORLDS, scope="session")
def test_equals_its_oracle_forward_and_backward(answers, world, dtype, name):
    case, found = CASES[name], answers(world, dtype, name)
    blocks, cotangents = inputs(case, world, dtype)
    for x in blocks:
        x.requires_grad_()
    expected = case.oracle(blocks)
    grads = torch.autograd.grad(expected, blocks, cotangents)
    for rank, answer in enumerate(found):
        if case.moves:
            assert torch.equal(answer.y, expected[rank]), f"rank {rank}"
        assert close(answer.y, expected[rank], TOLERANCE[dtype]), f"rank {rank}"
        assert close(answer.grad, grads[rank], TOLERANCE[dtype]), f"gradient of rank {rank}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS, scope="session")
def test_backward_is_the_transpose(answers, world, name):
    """<g, A x> = <A^T g, x>, summed over ranks."""
    found = answers(world, torch.float64, name)
    blocks, cotangents = inputs(CASES[name], world, torch.float64)
    there = sum((g * a.y).sum() for g, a in zip(cotangents, found))
    back = sum((x * a.grad).sum() for x, a in zip(blocks, found))
    assert torch.isclose(there, back, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------- counts


def expected_counts(name: str, n: int) -> list[tuple[dict, dict]]:
    """Elements received by each rank, forward and backward, from the formulas in the module's head."""
    op, case = name.split()[0], CASES[name]
    blocks, cotangents = inputs(case, n, torch.float64)
    x, y = [b.numel() for b in blocks], [g.numel() for g in cotangents]
    if n == 1 or op == "take":
        return [({}, {})] * n
    result = []
    for r in range(n):
        if op == "all_gather":
            counts = {op: sum(x) - x[r]}, {"reduce_scatter": (n - 1) * x[r]}
        elif op == "reduce_scatter":
            counts = {op: (n - 1) * y[r]}, {"all_gather": sum(y) - y[r]}
        elif op == "all_reduce":
            own = c.shares(x[r], n)[r]
            counts = {op: (n - 1) * own + x[r] - own}, {op: (n - 1) * own + x[r] - own}
        elif op == "all_to_all":  # kept: the part of the own block that lies in the own share
            j = int(name.split()[1].split("<-")[1]) % 4
            kept = y[r] // cotangents[r].shape[j] * blocks[r].shape[j] if y[r] else 0
            counts = {op: y[r] - kept}, {op: x[r] - kept}
        elif op == "shift":
            by = int(name.split()[1])
            counts = ({"shift": x[(r - by) % n]}, {"shift": x[r]}) if by % n else ({}, {})
        else:  # two hops
            counts = {"shift": x[r - 1] + x[r - 2]}, {"shift": x[r] + x[r - 1]}
        result.append(counts)
    return result


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", WORLDS, scope="session")
def test_recorder_counts_what_a_rank_receives(answers, world, name):
    for answer, (forward, backward) in zip(answers(world, torch.bfloat16, name), expected_counts(name, world)):
        assert {op: t.elements for op, t in answer.forward.items()} == forward
        assert {op: t.elements for op, t in answer.backward.items()} == backward
        assert all(t.bytes == 2 * t.elements for t in [*answer.forward.values(), *answer.backward.values()])


@pytest.mark.parametrize("total", (1, 5, 12, 13, 1000))
@pytest.mark.parametrize("n", (1, 2, 3, 4, 7))
def test_all_reduce_counts_sum_to_2_M_of_n_minus_1(total, n):
    own = c.shares(total, n)
    assert sum((n - 1) * s + total - s for s in own) == 2 * total * (n - 1)


# ------------------------------------------------------------------------------------------------------- functorch


TRANSFORMED = [
    *("all_gather 0", "all_gather 1 uneven", "all_gather -1", "reduce_scatter 0 uneven", "reduce_scatter 1"),
    *("all_reduce", "all_reduce transposed", "all_to_all 2<-1", "all_to_all -2<--3 uneven both"),
    *("shift 1", "shift -1 uneven", "take", "two hops"),
]


def transforms_on_a_rank(mesh) -> dict[str, dict[str, float]]:
    """How far jvp, vmap, grad and two nestings are from the plain thing, by case."""
    axis = mesh.all
    return {name: transforms(CASES[name], axis) for name in TRANSFORMED}


def transforms(case: Case, axis: Axis) -> dict[str, float]:
    f64 = torch.float64
    blocks, cotangents = inputs(case, axis.size, f64)
    x, g = blocks[axis.rank], cotangents[axis.rank]
    t = draw(x.shape, 7 + axis.rank, f64)

    def f(x: Tensor) -> Tensor:
        return case.call(x, axis)

    def cubes(x: Tensor) -> Tensor:
        return (f(x) ** 3 * g).sum()

    def far(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        return float((a - b).abs().max()) if a.numel() else 0.0

    many = torch.stack((x, t, -2 * x), 1)
    rows = many.unbind(1)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(cubes(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf, t)
    grad = torch.func.grad(cubes)
    value, tangent = torch.func.jvp(f, (x,), (t,))
    return {
        "jvp": far(value, f(x)) + far(tangent, f(t)),
        "vmap": far(torch.func.vmap(f, in_dims=1)(many), torch.stack([f(r) for r in rows])),
        "grad": far(grad(x), first.detach()),
        "vmap of grad": far(torch.func.vmap(grad, in_dims=1)(many), torch.stack([grad(r) for r in rows])),
        "jvp of grad": far(torch.func.jvp(grad, (x,), (t,))[1], second),
        "vmap of vmap": far(
            torch.func.vmap(torch.func.vmap(f, 0), 2)(torch.stack((many, -many))),
            torch.stack([torch.stack((f(r), f(-r))) for r in rows]),
        ),
    }


@pytest.mark.parametrize("world", (1, 2), scope="session")
def test_transforms_of_torch_func(ranks, world):
    for rank, found in enumerate(ranks.run(world, transforms_on_a_rank)):
        for name, errors in found.items():
            for transform, error in errors.items():
                assert error <= 1e-12, f"{transform} of {name} on rank {rank}: {error}"


# -------------------------------------------------------------------------------------------------------- sub-axes


def subaxis_on_a_rank(mesh) -> dict[str, Tensor]:
    me = torch.tensor([float(mesh.rank)])
    return {name: c.all_gather(me, mesh[name], 0) for name in ("dp", "sp", "all")} | {
        f"sum {name}": c.all_reduce(me, mesh[name]) for name in ("dp", "sp", "all")
    }


def test_only_the_own_group_moves(ranks):
    groups = {
        "dp": {0: [0, 2], 1: [1, 3], 2: [0, 2], 3: [1, 3]},
        "sp": {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]},
        "all": {rank: [0, 1, 2, 3] for rank in range(4)},
    }
    for rank, found in enumerate(ranks.run(4, subaxis_on_a_rank, dp=2, sp=2)):
        for name, members in groups.items():
            assert found[name].tolist() == members[rank]
            assert found[f"sum {name}"].item() == sum(members[rank])


def case_on_subaxis(mesh, names: list[str], axis: str) -> dict[str, Answer]:
    return {name: on_a_rank(mesh, name, torch.float64, axis) for name in names}


@pytest.mark.parametrize("axis", ("dp", "sp"))
def test_collectives_on_a_subaxis_equal_those_of_a_world_of_that_size(ranks, answers, axis):
    names = ["all_gather 1 uneven", "reduce_scatter 1", "all_to_all 2<-1 uneven both", "shift 1", "shift 1 uneven"]
    for rank, found in enumerate(ranks.run(4, case_on_subaxis, names, axis, dp=2, sp=2)):
        place = {"dp": rank // 2, "sp": rank % 2}[axis]
        for name in names:
            expected = answers(2, torch.float64, name)[place]
            assert torch.equal(found[name].y, expected.y) and torch.equal(found[name].grad, expected.grad), name
            assert found[name].forward == expected.forward


# ------------------------------------------------------------------------------------------ forms without gradient


def flat_on_a_rank(mesh, async_op: bool) -> dict[str, Tensor]:
    axis, n = mesh.all, mesh.world
    x, wide, y = draw((6,), mesh.rank, torch.float64), draw((6 * n,), mesh.rank, torch.float64), torch.ones(5)
    gathered, scattered = torch.empty(6 * n, dtype=torch.float64), torch.empty(6, dtype=torch.float64)
    results = [
        c.all_gather_flat(gathered, x, axis, async_op=async_op),
        c.reduce_scatter_flat(scattered, wide, axis, async_op=async_op),
        c.all_reduce_(y, axis, async_op=async_op),
    ]
    if async_op:
        results = [handle.wait() for handle in reversed(results)][::-1]
    assert results[0] is gathered and results[1] is scattered and results[2] is y
    blocks = [torch.arange(float(size)) + 10 * r for r, size in enumerate(c.shares(UNEVEN, n))]
    hop = c.start_shift(blocks[mesh.rank], axis, -1, 0, c.shares(UNEVEN, n))
    return {"gathered": gathered, "scattered": scattered, "reduced": y, "shifted": hop.wait(), "again": hop.wait()}


@pytest.mark.parametrize("async_op", (False, True))
@pytest.mark.parametrize("world", WORLDS, scope="session")
def test_flat_forms(ranks, world, async_op):
    parts = [draw((6,), r, torch.float64) for r in range(world)]
    total = sum(draw((6 * world,), r, torch.float64) for r in range(world))
    for rank, found in enumerate(ranks.run(world, flat_on_a_rank, async_op)):
        assert torch.equal(found["gathered"], torch.cat(parts))
        assert close(found["scattered"], total.view(world, 6)[rank], 1e-15)
        assert torch.equal(found["reduced"], torch.full((5,), float(world)))
        source = (rank + 1) % world
        arrives = torch.arange(float(c.shares(UNEVEN, world)[source])) + 10 * source
        assert torch.equal(found["shifted"], arrives) and torch.equal(found["again"], arrives)


def empty_on_a_rank(mesh) -> int:
    nothing = torch.empty(0)
    c.all_gather_flat(torch.empty(0), nothing, mesh.all, async_op=True).wait()
    c.reduce_scatter_flat(torch.empty(0), nothing, mesh.all)
    c.all_reduce_(nothing, mesh.all)
    return c.all_gather(torch.empty(2, 0), mesh.all, 0).numel()


def test_nothing_travels_too(ranks):
    assert ranks.run(2, empty_on_a_rank) == [0, 0]


def objects_on_a_rank(mesh):
    gathered = [c.gather_objects(mesh[name], {"rank": mesh.rank}) for name in ("dp", "sp", "all")]
    c.barrier(mesh.all)
    return gathered, [c.broadcast_object(mesh[name], mesh.rank, source=1) for name in ("dp", "sp", "all")]


def test_objects(ranks):
    for rank, (gathered, told) in enumerate(ranks.run(4, objects_on_a_rank, dp=2, sp=2)):
        members = [[rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1], [0, 1, 2, 3]]
        assert [[found["rank"] for found in group] for group in gathered] == members
        assert told == [group[1] for group in members]
    assert c.gather_objects(single().dp, 3) == [3] and c.broadcast_object(single().dp, 3) == 3


# ------------------------------------------------------------------------------------------ recorder and test link


def recorded_on_a_rank(mesh) -> list[recorder.Event]:
    x = torch.ones(4, dtype=torch.bfloat16)
    out = torch.empty(4 * mesh.world, dtype=torch.bfloat16)
    recorder.mark("nobody hears this")
    with recorder.recording() as events:
        handle = c.all_gather_flat(out, x, mesh.all, async_op=True)
        recorder.mark("block 0")
        with recorder.recording() as inner:
            c.all_reduce_(x, mesh.all)
        handle.wait()
    c.all_reduce_(x, mesh.all)
    assert [e.op for e in inner] == ["all_reduce"] * 3
    return events


def test_recorder_keeps_the_order_of_starts_waits_and_marks(ranks):
    for events in ranks.run(2, recorded_on_a_rank):
        assert [(e.op, e.phase) for e in events] == [
            ("all_gather", "started"),
            ("mark", "mark"),
            ("all_reduce", "started"),
            ("all_reduce", "waiting"),
            ("all_reduce", "waited"),
            ("all_gather", "waiting"),
            ("all_gather", "waited"),
        ]
        assert events[1].note == "block 0" and events[0].number == events[6].number != events[2].number
        assert (events[0].axis, events[0].elements, events[0].bytes) == ("all", 4, 8)
        assert [e.time for e in events] == sorted(e.time for e in events)
        each = recorder.Total(calls=1, elements=4, bytes=8)
        assert recorder.totals(events, "all") == {"all_gather": each, "all_reduce": each}
        assert recorder.totals(events, "sp") == {}


def exposed_on_a_rank(mesh) -> tuple[float, float]:
    """Exposed seconds of a hop alone and of one beside work of half its time."""
    found = []
    for work in (0.0, 0.1):
        c.barrier(mesh.all)
        with recorder.slow_link(seconds=0.2), recorder.recording() as events:
            handle = c.start_shift(torch.ones(10), mesh.all)
            time.sleep(work)
            handle.wait()
        found.append(recorder.exposed_s(events))
    return tuple(found)


def test_exposed_time_is_what_work_does_not_hide(ranks):
    for alone, beside in ranks.run(2, exposed_on_a_rank):
        assert 0.19 < alone < 0.35 and 0.05 < beside < 0.15 and beside < alone


def slow_on_a_rank(mesh) -> list[float]:
    """Seconds of: hop alone, hop beside work, two hops at once, a blocking call, a hop at full speed."""
    x, times = torch.ones(1000), []

    def timed(body: Callable) -> None:
        c.barrier(mesh.all)
        began = time.perf_counter()
        body()
        times.append(time.perf_counter() - began)

    def beside_work() -> None:
        handle = c.start_shift(x, mesh.all)
        time.sleep(0.1)
        handle.wait()

    def two() -> None:
        handles = [c.start_shift(x, mesh.all), c.start_shift(x, mesh.all)]
        for handle in handles:
            handle.wait()

    with recorder.slow_link(seconds=0.08, bytes_per_s=4000 / 0.04):
        for body in (lambda: c.shift(x, mesh.all), beside_work, two, lambda: c.all_reduce(torch.ones(2), mesh.all)):
            timed(body)
    timed(lambda: c.shift(x, mesh.all))
    return times


def test_slow_link_delays_what_is_waited_for(ranks):
    for alone, beside, two, blocking, fast in ranks.run(2, slow_on_a_rank):
        assert 0.12 <= alone < 0.18 and 0.12 <= beside < 0.18  # 0.1 of work is hidden
        assert 0.24 <= two < 0.32 and 0.08 <= blocking < 0.12
        assert fast < 0.05


# ----------------------------------------------------------------------------------------------- shares and misuse


@pytest.mark.parametrize("n", (1, 2, 3, 4, 8))
@pytest.mark.parametrize("total", (0, 1, 4, 5, 61, 64))
def test_shares(total, n):
    sizes = c.shares(total, n)
    assert sum(sizes) == total and len(sizes) == n
    assert list(sizes) == sorted(sizes, reverse=True) and max(sizes) == -(-total // n)
    assert max(sizes) - min(sizes) <= 1
    assert c.roll(c.roll(sizes, 1), -1) == sizes


def test_one_rank_gets_its_own_tensor_back_and_nothing_is_recorded():
    axis, x = single().all, torch.ones(4, 4, requires_grad=True)
    with recorder.recording() as events:
        for name, case in CASES.items():
            if "transposed" not in name and "all_to_all" not in name:
                assert case.call(x, axis) is x, name
        assert c.all_to_all(x, axis, 0, 1) is x
    assert events == []


def misuse_on_a_rank(mesh) -> list[str]:
    x, axis = torch.ones(4, 3), mesh.all
    calls = {
        "shares (3, 2) of a dim of 4": lambda: c.reduce_scatter(x, axis, 0, (3, 2)),
        "holds 4 of the shares": lambda: c.all_gather(x, axis, 0, (3, 3)),
        "splits and joins dim 0": lambda: c.all_to_all(x, axis, 0, -2),
        "holds 3 of the shares": lambda: c.all_to_all(x, axis, 0, 1, concat_sizes=(1, 2)),
        "holds 4 of the blocks": lambda: c.shift(x, axis, 1, 0, (1, 1)),
        "room for 12": lambda: c.all_gather_flat(torch.empty(12), x.view(-1), axis),
        "over 2 ranks": lambda: c.reduce_scatter_flat(torch.empty(5), x.view(-1), axis),
    }
    silent = []
    for words, call in calls.items():
        try:
            call()
            silent.append(words)
        except AssertionError as error:
            if words not in str(error):
                silent.append(f"{words}: {error}")
    return silent


def test_sizes_that_do_not_fit_fail_before_anything_moves(ranks):
    assert ranks.run(2, misuse_on_a_rank) == [[], []]


# ------------------------------------------------------------------------------------------ ranks that share a GPU


def gpu_on_a_rank(mesh, name: str) -> Answer:
    blocks, cotangents = inputs(CASES[name], mesh.world, torch.float64)
    x = blocks[mesh.rank].cuda().requires_grad_()
    y = CASES[name].call(x, mesh.all)
    y.backward(cotangents[mesh.rank].cuda())
    assert y.is_cuda and x.grad.is_cuda
    handle = c.start_shift(x.detach(), mesh.all)
    assert handle.wait().is_cuda and c.all_reduce_(torch.ones(2, device="cuda"), mesh.all).tolist() == [mesh.world] * 2
    return Answer(y.detach().cpu(), x.grad.cpu(), {}, {})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["all_gather 1", "reduce_scatter 1 uneven", "all_reduce", "all_to_all 2<-1", "shift 1"]
)
def test_cuda_tensors_travel_through_gloo(ranks, answers, name):
    for found, expected in zip(ranks.run(2, gpu_on_a_rank, name, timeout_s=60.0), answers(2, torch.float64, name)):
        assert close(found.y, expected.y, 1e-15) and close(found.grad, expected.grad, 1e-15)
