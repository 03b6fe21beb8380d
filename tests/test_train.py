"""The step: draws, micro-batches, precision, non-finite gradients, against slow direct writings."""

import dataclasses

import pytest
import torch

from odit import health, optim, random, train, tree, validate
from odit.data import Batch, loader
from odit.draws import Draws, digest, draw
from odit.models import dit

KEY = random.key(5)


def batches(digits, stop, start=0, size=96):
    return list(loader.batches(digits, random.fold_in(KEY, "data"), global_batch=size, start=start, stop=stop))


def run_steps(plan, digits, num, state=None):
    state = state or train.init_state(plan, KEY)
    step, log = train.make_step(plan), []
    for batch in batches(digits, state.step + num, state.step):
        state, metrics = step(state, batch, KEY)
        log.append(metrics)
    return state, log


def flat(t):
    return torch.cat([leaf.double().flatten() for leaf in tree.leaves(t)])


@pytest.mark.parametrize("objective", ["flow", "eps"])
def test_micro_batches_see_the_same_draws_and_agree(tiny, make_plan, digits, objective):
    from odit import diffusion

    changes = {} if objective == "flow" else {"diffusion": diffusion.Config(objective="eps")}
    if objective == "eps":
        changes["sampling"] = dataclasses.replace(tiny.sampling, solver="ddim")
    logs, states = {}, {}
    for micro in (1, 8, 32, 96):
        states[micro], logs[micro] = run_steps(make_plan(tiny, micro_batch=micro, **changes), digits, 2)
    for micro in (1, 8, 32):
        for a, b in zip(logs[micro], logs[96]):
            assert a["draw_digest"] == b["draw_digest"]
            assert abs(a["loss"] - b["loss"]) < 1e-5
            assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 * b["grad_norm"]


def test_gradients_are_those_of_the_mean_loss(tiny, make_plan, digits):
    """Against one plain backward over the whole batch in fp64, built from the public pieces by hand."""
    plan = make_plan(tiny, micro_batch=32)
    params = tree.map(torch.Tensor.double, train.init_state(plan, KEY).params)
    plan = dataclasses.replace(plan, dtype=torch.float64)
    (batch,) = batches(digits, 1)
    batch = batch._replace(x=batch.x.double())
    loss_B, grads, _ = train.gradients(plan, params, batch, KEY)

    draws = draw(plan, batch.ids_B, (1, 8, 8), KEY)
    leaves = [p.requires_grad_() for p in tree.leaves(params)]
    total = 0.0
    for i in range(96):
        t, x, noise = draws.t_B[i].double(), batch.x[i : i + 1], draws.noise[i : i + 1].double()
        label = 10 if draws.dropped_B[i] else int(batch.y[i])
        out = dit.forward(
            params, t * x + (1 - t) * noise, draws.t_B[i : i + 1] * 1000, torch.tensor([label]), tiny.model
        )
        total = total + ((out - (x - noise)) ** 2).mean() / 96
    direct = torch.autograd.grad(total, leaves)
    assert abs(loss_B.mean() - total.detach()) < 1e-12
    for (path, g), d in zip(tree.items(grads), direct):
        assert (g - d).norm() <= 1e-10 * d.norm() + 1e-14, path


def test_draws_are_functions_of_the_sample_alone(tiny, make_plan):
    plan = make_plan(tiny)
    ids = (torch.arange(50) << 32) + torch.arange(50) % 7
    whole = draw(plan, ids, (1, 8, 8), KEY)
    for part in (slice(3, 4), slice(10, 37)):
        for a, b in zip(draw(plan, ids[part], (1, 8, 8), KEY), whole):
            assert torch.equal(a, b[part])
    assert 0 < whole.dropped_B.sum() < 25
    assert len(whole.t_B.unique()) == 50


def test_digest_sees_every_bit_and_no_order():
    ids, y = torch.arange(6), torch.arange(6)
    draws = Draws(random.uniform(KEY, (), ids), random.normal(KEY, (1, 4, 4), ids), torch.zeros(6, dtype=torch.bool))
    word = digest(ids, draws, y)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert digest(ids[order], Draws(*(d[order] for d in draws)), y[order]) == word
    halves = [digest(ids[s], Draws(*(d[s] for d in draws)), y[s]) for s in (slice(0, 2), slice(2, 6))]
    assert sum(halves) % 2**64 == word

    seen = {word}
    for bit in range(32):
        noise = draws.noise.clone()
        noise.view(torch.int32)[2, 0, 1, 3] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
        seen.add(digest(ids, draws._replace(noise=noise), y))
    swapped = draws.noise[torch.tensor([1, 0, 2, 3, 4, 5])]
    dropped = torch.tensor([True] + 5 * [False])
    seen.add(digest(ids, draws._replace(noise=swapped), y))
    seen.add(digest(ids, draws._replace(dropped_B=dropped), y))
    seen.add(digest(ids + 6, draws, y))
    seen.add(digest(ids, draws, y.flip(0)))
    assert len(seen) == 37


def test_adamw_and_ema_follow_the_published_steps():
    """Against torch.optim.AdamW in fp64 and the EMA written out."""
    params = {"a": torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    peer = torch.nn.Parameter(params["a"].clone())
    theirs = torch.optim.AdamW([peer], lr=1e-2, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)
    init, update_ = optim.adamw(0.8, 0.95, 1e-7, 0.1)
    state, ema, by_hand = init(params), tree.map(torch.clone, params), params["a"].clone()
    for n in range(7):
        grads = {"a": torch.sin(params["a"] * (n + 1))}
        peer.grad = grads["a"].clone()
        state = update_(params, grads, state, 1e-2)
        theirs.step()
        rate = optim.ema_rate(optim.Config(ema_decay=0.9), n)
        assert rate == min(0.9, (1 + n) / (10 + n))
        optim.ema_(ema, params, rate)
        by_hand = rate * by_hand + (1 - rate) * params["a"]
        assert (params["a"] - peer).abs().max() < 1e-14
        assert (ema["a"] - by_hand).abs().max() < 1e-14
    assert int(state.count) == 7


def test_clip_is_by_the_global_norm():
    grads = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    norm = float(optim.squared_norm(grads).sqrt())
    assert norm == 5.0
    optim.clip_(grads, norm, 10.0)
    assert grads["b"].item() == 4.0
    optim.clip_(grads, norm, 1.0)
    assert float(optim.squared_norm(grads).sqrt()) == pytest.approx(1.0, abs=1e-7)


def test_learning_rate_schedules():
    cfg = optim.Config(lr=1.0, warmup=4, decay="linear", final_lr=0.2)
    assert [optim.learning_rate(cfg, s, 14) for s in (0, 3, 4, 9, 14)] == pytest.approx([0.25, 1.0, 1.0, 0.6, 0.2])
    cosine = dataclasses.replace(cfg, decay="cosine", final_lr=0.0)
    assert [optim.learning_rate(cosine, s, 14) for s in (4, 9, 14)] == pytest.approx([1.0, 0.5, 0.0])
    assert optim.learning_rate(optim.Config(lr=3.0), 10**6, 10) == 3.0


@pytest.mark.parametrize("precision, tolerance", [("bf16", 2e-2), ("fp16", 4e-3)])
def test_half_precision_follows_fp32(tiny, make_plan, digits, precision, tolerance):
    """Losses of ten steps within about two roundings of the half format (2^-8, 2^-11) of fp32; masters stay fp32."""
    _, reference = run_steps(make_plan(tiny), digits, 10)
    state, log = run_steps(make_plan(tiny, precision=precision), digits, 10)
    assert all(leaf.dtype == torch.float32 for t in (state.params, state.ema, state.opt.m) for leaf in tree.leaves(t))
    assert max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(log, reference)) < tolerance
    assert log[-1]["loss"] != reference[-1]["loss"]
    assert ("loss_scale" in log[0]) == (precision == "fp16")


def test_loss_scale_halves_and_grows():
    scale = train.next_scale(train.LossScale(8.0, 5), finite=False)
    assert scale == (4.0, 0)
    for _ in range(train.GROW_AFTER):
        scale = train.next_scale(scale, finite=True)
    assert scale == (8.0, 0)
    assert train.next_scale(train.LossScale(1.0, 0), finite=False).scale == 1.0


def test_fp16_overflow_skips_and_recovers(tiny, make_plan, digits):
    plan = make_plan(tiny, precision="fp16")
    state = train.init_state(plan, KEY)._replace(loss_scale=train.LossScale(2.0**60, 0))
    before = flat(state.params)
    state, log = run_steps(plan, digits, 1, state)
    assert "bad" in log[0] and torch.equal(flat(state.params), before)
    assert state.loss_scale == (2.0**59, 0) and state.step == 1 and int(state.opt.count) == 0


def test_a_non_finite_batch_changes_nothing_and_is_named(tiny, make_plan, digits):
    plan = make_plan(tiny)
    state, _ = run_steps(plan, digits, 2)
    kept = [flat(t).clone() for t in (state.params, state.opt.m, state.opt.v, state.ema)]
    (batch,) = batches(digits, 3, 2)
    x = batch.x.clone()
    x[17, 0, 3, 3] = float("nan")
    state, metrics = train.make_step(plan)(state, Batch(batch.ids_B, x, batch.y), KEY)
    assert metrics["bad"] == "grad.patch.w"
    assert state.step == 3 and int(state.opt.count) == 2
    for t, before in zip((state.params, state.opt.m, state.opt.v, state.ema), kept):
        assert torch.equal(flat(t), before)
    assert health.first_bad({"a": torch.ones(2), "b": {"c": torch.tensor([1.0, float("inf")])}}) == "b.c"


def test_a_short_run_learns(tiny, make_plan, digits):
    run = dataclasses.replace(tiny, optimizer=dataclasses.replace(tiny.optimizer, lr=3e-3, warmup=0), steps=90)
    _, log = run_steps(make_plan(run), digits, 90)
    first, last = (sum(m["loss"] for m in part) / 5 for part in (log[:5], log[-5:]))
    assert last < 0.5 * first


def test_validation_has_no_noise_of_its_own(tiny, make_plan, digits):
    plan = make_plan(tiny, validation_draws=3)
    params = train.init_state(plan, KEY).params
    first, second = (validate.validate(plan, params, digits) for _ in range(2))
    assert first == second
    assert {f"loss_t{b}" for b in range(10)} < first.keys()
    other = validate.validate(make_plan(tiny, validation_draws=3, seed=9, micro_batch=32), params, digits)
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-6)


def test_sample_gradient_norms_equal_a_loop(tiny, make_plan, digits):
    plan = dataclasses.replace(make_plan(tiny), dtype=torch.float64)
    params = tree.map(torch.Tensor.double, run_steps(make_plan(tiny), digits, 3)[0].params)
    ids = digits.held_out_ids[:20]
    x, y = digits.read(ids)
    draws = draw(plan, ids, (1, 8, 8), KEY)
    x, draws = x.double(), draws._replace(noise=draws.noise.double())
    norms = validate.sample_grad_norms(plan, params, x, y, draws, chunk=8)
    for i in range(20):
        one = Draws(*(d[i : i + 1] for d in draws))
        _, _, grads = train.value_and_grad(
            lambda p, i=i, one=one: (train.losses(plan, p, plan.ops, x[i, None], y[i, None], one).sum(), None), params
        )
        # norms are summed in fp32
        assert float(norms[i]) == pytest.approx(float(flat(grads).norm()), rel=1e-5)


def test_validation_reports_gradient_norms(tiny, make_plan, digits):
    plan = make_plan(tiny, grad_norms=True)
    found = validate.validate(plan, train.init_state(plan, KEY).params, digits)
    assert all(found[f"grad_norm_t{b}"] > 0 for b in range(10))


def test_a_full_gpu_is_one_sentence_with_a_fix():
    told = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which ..."
    error = torch.OutOfMemoryError(told)
    assert health.exit_code(error) == 2
    assert health.sentence(error).startswith("CUDA out of memory. Tried to allocate 2.00 GiB: use a smaller")
