"""Precision where state is sharded: bf16 reductions, fp32 masters, and bad numbers on one rank alone."""

import dataclasses
import functools
import math

import pytest
import torch
from conftest import redraw

from odit import config, data, ops, optim, plan, random, train, tree
from odit.data import loader
from odit.models import dit
from odit.parallel import recorder, spec
from odit.parallel.mesh import single

KEY = random.key(5)
RUN = dataclasses.replace(
    config.presets()["digits"][1],
    steps=10,
    global_batch=24,
    model=dit.Config(width=24, depth=2, heads=4, patch=2),
    optimizer=optim.Config(lr=1e-3, eps=1e-4, weight_decay=0.1, clip=1.0, ema_decay=0.9),
)
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])
LAST_OF = "blocks.0.mlp.fc2.w"


@functools.lru_cache
def dataset():
    return data.open_dataset(RUN.data)


def run_at(stage, world=1, micro=1, sp=1, **changes):
    layout = config.Parallel(zero=stage, sp=sp, reduce=changes.pop("reduce", "fp32"))
    return dataclasses.replace(RUN, micro_batch=RUN.global_batch * sp // world // micro, parallel=layout, **changes)


def share_of(run, step, rank, num):
    (batch,) = loader.batches(
        dataset(), KEY, global_batch=run.global_batch, start=step, stop=step + 1, part=(rank, num)
    )
    return batch


def parts_of(composed, dtype=torch.float32):
    """This rank's parts of re-drawn weights."""
    rank = composed.layout.axis.rank
    whole = redraw(composed.declared, dtype=dtype)
    return tree.map(lambda w, s: s.take(w, rank).clone(), whole, composed.layout.specs)


def drawn_state(composed):
    """A first state with re-drawn weights; all else as ``init_state`` makes it."""
    params = tree.map(lambda p: p.to(composed.home), parts_of(composed))
    return train.init_state(composed, KEY)._replace(params=params, ema=tree.map(torch.clone, params))


# ------------------------------------------------------------------------------------------- gradients summed in bf16


def reduced_on(mesh, run, dtype=None):
    """This rank's parts of the gradients of one step, and its traffic by operation."""
    composed = plan.make(run, dataset(), mesh)
    composed = composed if dtype is None else dataclasses.replace(composed, dtype=dtype)
    params = parts_of(composed, dtype or torch.float32)
    batch = share_of(run, 0, mesh.dp.rank, mesh.dp.size)
    with recorder.recording() as events:
        _, grads, _ = train.gradients(composed, params, batch, KEY)
    return grads, recorder.totals(events)


def partial_gradients(world, micro):
    """fp64 gradients of each micro-batch of each rank, as parts of the whole batch's, on one rank."""
    composed = dataclasses.replace(plan.make(run_at(0, 1), dataset()), dtype=torch.float64)
    params = redraw(composed.declared)
    for rank in range(world):
        for part in train.micro_batches(share_of(composed.run, 0, rank, world), RUN.global_batch // world // micro):
            yield train.gradients(composed, params, part, KEY)[1]


@pytest.mark.parametrize("world", [2], scope="session")
@STAGES
@pytest.mark.parametrize("micro", [1, 2])
def test_bf16_reduction_is_within_its_rounding(ranks, world, stage, micro):
    """Everything but the reduction is fp64 here. bf16 has 8 significant bits, so a rounding is at most u = 2^-8 of its
    operand: each of the two partial sums a, b is rounded to travel and their sum once more, |error| <= (2 + u) u
    (|a| + |b|). That holds for each reduction: one a step (stages 0, 1) or a micro-batch (2, 3), added up in fp64."""
    u, specs = 2.0**-8, spec.specs(dit.declare(RUN.model, dit.Shape(1, 8, 10)), world, split=stage > 0)
    partial = list(partial_gradients(world, micro))
    found = [
        grads for grads, _ in ranks.run(world, reduced_on, run_at(stage, world, micro, reduce="bf16"), torch.float64)
    ]
    rounded = 0
    for path, s in tree.items(specs):
        parts = [dict(tree.items(grads))[path] for grads in found]
        grad = torch.cat(parts, s.dim) if s.dim is not None else parts[0]
        assert s.dim is not None or torch.equal(parts[0], parts[1]), path
        terms = torch.stack([dict(tree.items(p))[path] for p in partial])
        error, bound = (grad - terms.sum(0)).abs(), (2 + u) * u * terms.abs().sum(0)
        assert (error <= bound + 1e-12 * terms.norm()).all(), path  # the last: matrix products, and zeros
        if micro == 1 or stage <= 1:
            assert torch.equal(grad, grad.bfloat16().double()), f"{path} did not travel as bf16"
        rounded += int((error > 1e-10 * bound).sum())
    assert rounded > 1000


@pytest.mark.parametrize("world", [2], scope="session")
@STAGES
def test_bf16_reduction_halves_the_bytes_of_gradients(ranks, world, stage):
    for (_, wide), (_, narrow) in zip(
        *(ranks.run(world, reduced_on, run_at(stage, world, reduce=reduce)) for reduce in ("fp32", "bf16"))
    ):
        assert wide.keys() == narrow.keys()
        for op, total in wide.items():
            factor = 1 if op == "all_gather" else 2  # gathers carry weights in the dtype of matrix products
            assert (total.calls, total.elements, total.bytes) == (
                narrow[op].calls,
                narrow[op].elements,
                factor * narrow[op].bytes,
            )
        assert {"all_reduce", "reduce_scatter"} & wide.keys()


# ---------------------------------------------------------------------------------------------------------------- bf16


def bf16_on(mesh, run):
    """Losses of four steps, and the dtypes of state and of standing weights before, between and after."""
    composed = plan.make(run, dataset(), mesh)
    state, step = drawn_state(composed), train.make_step(composed)
    losses, dtypes, working = [], set(), set()
    for i in range(4):
        dtypes |= state_dtypes(state)
        working |= {leaf.dtype for leaf in standing(composed.layout.hold(state.params))}
        state, metrics = step(state, share_of(run, i, mesh.dp.rank, mesh.dp.size), KEY)
        losses.append(metrics["loss"])
    return losses, dtypes | state_dtypes(state), working


def state_dtypes(state):
    return {leaf.dtype for t in (state.params, state.opt.m, state.opt.v, state.ema) for leaf in tree.leaves(t)}


def standing(held):
    """All tensors of the working weights that stand."""
    wholes = [held.outer, *(held.inner or ())]
    return [*(tree.leaves(held.whole) if held.whole else []), *(t for w in wholes if w for t in (*w.flats, *w.leaves))]


@pytest.fixture(scope="module")
def one_rank_losses():
    """Losses of one rank at stage 0 by precision."""
    return {p: bf16_on(single(), run_at(0, precision=p))[0] for p in ("fp32", "bf16")}


@pytest.mark.parametrize("world", [1, 2, 4], scope="session")
@STAGES
def test_bf16_keeps_masters_and_losses(ranks, one_rank_losses, world, stage):
    """Losses agree to a quarter of a bf16 rounding (2^-8) between worlds, whose products round alike but for the order
    of sums, and to one rounding with fp32; they are means over 24 x 64 values (found: 7e-5 and 3e-4)."""
    found = ranks.run(world, bf16_on, run_at(stage, world, precision="bf16"))
    for losses, dtypes, working in found:
        assert dtypes == {torch.float32} and working == {torch.bfloat16}
        assert losses == found[0][0]
        for loss, alone, exact in zip(losses, one_rank_losses["bf16"], one_rank_losses["fp32"]):
            assert abs(loss - alone) <= 2**-10 * alone
            assert abs(loss - exact) <= 2**-8 * exact and loss != exact


# ------------------------------------------------------------------------------------------- bad numbers on one rank


class Poison(torch.autograd.Function):
    """The identity; its gradient's last element is infinite."""

    @staticmethod
    def forward(ctx, w):
        return w.view_as(w)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[-1] = math.inf
        return grad


def poisoned_mlp(h, p):
    return ops.mlp(h, {**p, "fc2": {**p["fc2"], "w": Poison.apply(p["fc2"]["w"])}})


def bad_step_on(mesh, run, fault, culprit):
    """A step whose numbers go bad on the rank ``culprit`` alone (input: on those that share its samples), and a good
    one after it.

    Faults: 'element', an infinite element in the gradient of a block's fc2.w (its last: the last rank's part of it,
    with ZeRO) beside a finite loss; 'large', a sample whose gradient fp16 cannot hold and whose loss fp32 can;
    'input', a sample that is infinite.
    """
    composed = plan.make(run, dataset(), mesh)
    mine = mesh.rank == culprit
    bad = composed
    if fault == "element" and mine:
        bad = dataclasses.replace(composed, kernels=dataclasses.replace(composed.kernels, mlp=poisoned_mlp))
    state = drawn_state(composed)
    batches = [share_of(run, i, mesh.dp.rank, mesh.dp.size) for i in range(3)]
    state, first = train.make_step(composed)(state, batches[0], KEY)  # so that moments and EMA are not zero
    before = [leaf.clone() for leaf in leaves_of(state)]
    x = batches[1].x.clone()
    if fault != "element" and mesh.rank // mesh.sp.size == culprit // mesh.sp.size:
        x[1, 0, 2, 3] = {"large": 3e4, "input": math.inf}[fault]
    skipped, metrics = train.make_step(bad)(state, batches[1]._replace(x=x), KEY)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, leaves_of(skipped), strict=True))
    count = int(skipped.opt.count)
    last, after = train.make_step(composed)(skipped, batches[2], KEY)
    moved = all(not torch.equal(a, b) for a, b in zip(before, leaves_of(last), strict=True))
    scales = (state.loss_scale, skipped.loss_scale, last.loss_scale)
    counts = (int(state.opt.count), count, int(last.opt.count))
    return {
        "first": first,
        "metrics": {k: repr(v) for k, v in metrics.items()},  # a NaN is not equal to itself
        "after": after,
        "steps": (state.step, skipped.step, last.step),
        "counts": counts,
        "scales": scales,
        "unchanged": unchanged,
        "moved": moved,
    }


def leaves_of(state):
    return [leaf for t in (state.params, state.opt.m, state.opt.v, state.ema) for leaf in tree.leaves(t)]


# The bad element comes from rank 0 and ends in the part of the last; of the other faults rank 0 has nothing itself.
CASES = [
    (2, 1, "fp32", "element", 0),
    (2, 1, "fp32", "input", 1),
    (2, 1, "fp16", "element", 0),
    (2, 1, "fp16", "large", 1),
    (2, 1, "fp16", "input", 1),
    (2, 2, "fp32", "element", 1),
    (2, 2, "fp32", "input", 0),
    (4, 1, "fp32", "element", 0),
    (4, 1, "fp16", "element", 0),
    (4, 2, "fp32", "element", 3),
    (4, 2, "fp32", "input", 2),
]


@pytest.mark.every(3)  # coprime to the axes, so that all their values come
@pytest.mark.parametrize("world, sp, precision, fault, culprit", CASES, scope="session")
@STAGES
def test_bad_numbers_on_one_rank_skip_the_step_on_all(ranks, world, sp, stage, precision, fault, culprit):
    found = ranks.run(world, bad_step_on, run_at(stage, world, sp=sp, precision=precision), fault, culprit, sp=sp)
    assert all(f == found[0] for f in found), "all ranks tell the same"
    one = found[0]
    assert one["unchanged"] and one["moved"]
    assert one["steps"] == (1, 2, 3) and one["counts"] == (1, 1, 2)
    assert "bad" not in one["first"] and "bad" not in one["after"]
    assert math.isfinite(float(one["metrics"]["loss"])) == (fault != "input")
    if fault == "element":
        assert one["metrics"]["bad"] == repr(f"grad.{LAST_OF}")
    else:
        assert one["metrics"]["bad"].startswith("'grad.")
    first = train.LossScale(train.FIRST_SCALE, 1) if precision == "fp16" else train.LossScale(1.0, 0)
    halved = train.LossScale(train.FIRST_SCALE / 2, 0) if precision == "fp16" else first
    again = train.LossScale(train.FIRST_SCALE / 2, 1) if precision == "fp16" else first
    assert one["scales"] == (first, halved, again)
