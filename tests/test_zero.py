"""Every ZeRO stage on every world against one rank, in fp64: loss, gradients, parameters, moments and EMA."""

import collections
import dataclasses
import functools
import gc
import itertools
import time
from unittest import mock

import pytest
import torch
from conftest import redraw
from torch.multiprocessing.reductions import StorageWeakRef

from odit import checkpoint, config, data, optim, param, plan, random, sample, train, tree, validate
from odit.data import loader
from odit.draws import draw
from odit.models import dit
from odit.parallel import collectives, offload, recorder, spec, zero
from odit.parallel.mesh import single

KEY = random.key(5)
# Adam's eps is 1e-4: with 1e-8 the rounding noise of the key bias' gradient becomes whole steps.
RUN = dataclasses.replace(
    config.presets()["digits"][1],
    steps=3,
    global_batch=24,
    model=dit.Config(width=20, depth=3, heads=5, patch=2, mlp_ratio=3.5, qk_norm=True),
    optimizer=optim.Config(lr=1e-2, eps=1e-4, weight_decay=0.1, clip=0.0, ema_decay=0.9),
)


def fp64_plan(run, mesh=None):
    dataset = data.open_dataset(run.data)
    return dataclasses.replace(plan.make(run, dataset, mesh), dtype=torch.float64), dataset


@functools.lru_cache(maxsize=8)
def weights_of(model, shape):
    """Drawn once a process: draws are much of a small case's time."""
    return redraw(dit.declare(model, shape))


def fp64_state(composed):
    """A state whose weights, biases included, are drawn, cut into this rank's parts."""
    axis, whole = composed.layout.axis, weights_of(composed.run.model, composed.shape)
    params = tree.map(lambda w, s: s.take(w, axis.rank).clone(), whole, composed.layout.specs)
    ema = tree.map(torch.clone, params)
    return train.TrainState(0, params, train.optimizer(composed).init(params), ema, train.LossScale(1.0, 0))


def three_steps(mesh, run):
    """Losses and digests of three steps, gradients of the first, and the state after the last; this rank's parts."""
    composed, dataset = fp64_plan(run, mesh)
    state, step = fp64_state(composed), train.make_step(composed)
    share = (mesh.dp.rank, mesh.dp.size)
    batches = list(loader.batches(dataset, KEY, global_batch=run.global_batch, stop=3, part=share))
    _, grads, _ = train.gradients(composed, state.params, batches[0], KEY)
    log = []
    for batch in batches:
        state, metrics = step(state, batch, KEY)
        log.append((metrics["loss"], metrics["grad_norm"], metrics["draw_digest"]))
    return log, {"grad": grads, "param": state.params, "m": state.opt.m, "v": state.opt.v, "ema": state.ema}


def assert_equals_one_rank(found, expected, world, stage, bound):
    """``three_steps`` of every rank against one rank's: digests equal, numbers and leaves within ``bound`` of them."""
    log, wholes = expected
    for rank_log, _ in found:
        for (loss, norm, word), (loss1, norm1, word1) in zip(rank_log, log, strict=True):
            assert word == word1
            assert abs(loss - loss1) <= bound * abs(loss1) and abs(norm - norm1) <= bound * norm1
    specs = spec.specs(dit.declare(RUN.model, dit.Shape(1, 8, 10)), world, split=stage > 0)
    for role, whole in wholes.items():
        joined = assemble([parts[role] for _, parts in found], specs)
        for (path, a), b in zip(tree.items(joined), tree.leaves(whole)):
            # The key bias' gradient is rounding noise (softmax does not see it): judged by the query bias' size.
            scale = whole["blocks"][0]["qkv"]["b"].norm() if path.endswith("qkv.b") else b.norm()
            assert (a - b).norm() <= bound * scale, f"{role} {path}"


def assemble(parts, specs):
    """Whole leaves of one role from the ranks' parts; leaves kept whole must be the same on every rank."""

    def whole(s, *leaves):
        if s.dim is not None:
            return torch.cat(leaves, s.dim)
        assert all(torch.equal(leaf, leaves[0]) for leaf in leaves)
        return leaves[0]

    return tree.map(whole, specs, *parts)


@pytest.fixture(scope="module")
def one_rank():
    """Results of one rank at stage 0, by clip."""
    return {clip: three_steps(single(), with_(clip=clip)) for clip in (0.0, 0.5)}


def with_(stage=0, micro=1, remat="none", clip=0.0, world=1, offload="none"):
    return dataclasses.replace(
        RUN,
        micro_batch=RUN.global_batch // world // micro,
        optimizer=dataclasses.replace(RUN.optimizer, clip=clip),
        parallel=config.Parallel(zero=stage, remat=remat, offload=offload),
    )


STAGES = ["0", "1", "2", "3", "2 offload", "3 offload"]
CASES = list(itertools.product(STAGES, (1, 2), ("none", "block"), (0.0, 0.5)))


@pytest.mark.every(11)  # coprime to the axes, so that all their values come
@pytest.mark.parametrize("world", [1, 2, 3, 4], scope="session")
@pytest.mark.parametrize("how, micro, remat, clip", CASES)
def test_equals_one_rank(ranks, one_rank, world, how, micro, remat, clip):
    stage = int(how[0])
    run = with_(stage, micro, remat, clip, world, "optimizer" if how.endswith("offload") else "none")
    assert_equals_one_rank(ranks.run(world, three_steps, run), one_rank[clip], world, stage, 1e-12)


@pytest.mark.parametrize("world", [2, 3, 4], scope="session")
def test_weights_are_drawn_shard_by_shard_bit_for_bit(ranks, world):
    declared = dit.declare(RUN.model, dit.Shape(1, 8, 10))
    specs = spec.specs(declared, world, split=True)
    joined = assemble(ranks.run(world, drawn_parts), specs)
    for (path, a), b in zip(tree.items(joined), tree.leaves(param.init(declared, KEY))):
        assert torch.equal(a, b), path
    dims = {s.dim for s in tree.leaves(specs)}
    assert {2: 1, 3: None, 4: 1}[world] in dims, "the case this world is here for: a later dim, or none that divides"


def drawn_parts(mesh):
    declared = dit.declare(RUN.model, dit.Shape(1, 8, 10))
    specs = spec.specs(declared, mesh.all.size, split=True)
    return spec.init(declared, KEY, specs, mesh.all)


def test_what_cannot_split_is_named():
    declared = dit.declare(RUN.model, dit.Shape(1, 8, 10))
    lines = spec.unsplit(declared, spec.specs(declared, 3, split=True))
    assert "patch.b (20,) is whole on every rank: no dim of (20,) (D) divides by 3" in lines


@pytest.mark.parametrize("world", [4], scope="session")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ema_moves_without_a_collective_and_bit_for_bit(ranks, world, stage):
    found = ranks.run(world, ema_on_a_rank, with_(stage, world=world))
    assert all(events == 0 for events, _ in found)
    specs = spec.specs(dit.declare(RUN.model, dit.Shape(1, 8, 10)), world, split=stage > 0)
    joined = assemble([ema for _, ema in found], specs)
    ema, params = (redraw(dit.declare(RUN.model, dit.Shape(1, 8, 10)), random.key(k)) for k in (11, 12))
    optim.ema_(ema, params, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(joined), tree.leaves(ema)))


def ema_on_a_rank(mesh, run):
    """The whole update of a step, with a learning rate of 0 so that the parameters stay what they are."""
    composed, _ = fp64_plan(run, mesh)
    take = lambda w, s: s.take(w, mesh.all.rank).clone()  # noqa: E731
    ema, params = (tree.map(take, redraw(composed.declared, random.key(k)), composed.layout.specs) for k in (11, 12))
    opt = train.optimizer(composed).init(params)
    state = train.TrainState(0, params, opt, ema, train.LossScale(1.0, 0))
    with recorder.recording() as events:
        state = train.update(composed, state, tree.map(torch.ones_like, params))(0.0, 0.9, 1.0)
    return len(events), state.ema


@pytest.mark.parametrize("world", [2, 3, 4], scope="session")
@pytest.mark.parametrize("stage, micro", list(itertools.product((0, 1, 2, 3), (1, 2))))
def test_bytes_equal_the_formula(ranks, world, stage, micro):
    """Every transfer of a step, against the sums over its leaves of: p (N - 1) / N received a gather or reduction of a
    leaf of p elements that splits; gathers 1 (stages 1, 2; 3 outside the blocks) or 2 m (3 in the blocks); reductions
    1 (stages 0, 1) or m; an all-reduce counts as two, and is what whole leaves get."""
    model = dit.Config(width=24, depth=2, heads=4, patch=2)
    run = dataclasses.replace(with_(stage, micro, world=world), model=model, precision="bf16")
    declared = dit.declare(model, dit.Shape(1, 8, 10))
    specs = spec.specs(declared, world, split=stage > 0)
    outside = [{k: v for k, v in t.items() if k != zero.BLOCKS} for t in (declared, specs)]
    bundles = [outside, *([t[zero.BLOCKS][i] for t in (declared, specs)] for i in range(2))]
    whole = [path for path, s in tree.items(specs) if s.dim is None]
    assert stage == 0 or whole == (["final.out.b"] if world == 3 else []), "one leaf does not split over 3 ranks"
    for rank, found in enumerate(ranks.run(world, step_traffic, run)):
        expected = collections.Counter()
        for number, (leaves, found_specs) in enumerate(bundles):
            pairs = list(zip(tree.leaves(leaves), tree.leaves(found_specs)))
            split = sum(p.size for p, s in pairs if s.dim is not None)
            kept = sum(p.size for p, s in pairs if s.dim is None)
            part = split * (world - 1) // world
            gathers = {0: 0, 1: 1, 2: 1, 3: 2 * micro if number else 1}[stage]
            expected["all_gather", part, 2 * part] += gathers
            if stage <= 1:
                both = all_reduced(split + kept, world, rank)
                expected["all_reduce", both, 4 * both] += 1
            else:
                expected["reduce_scatter", part, 4 * part] += micro
                both = all_reduced(kept, world, rank)
                expected["all_reduce", both, 4 * both] += micro if kept else 0
        assert found == +expected


def all_reduced(size, world, rank):
    """Elements a rank receives: a reduce-scatter of its share, then the others' shares."""
    own = collectives.shares(size, world)[rank]
    return (world - 1) * own + size - own


def step_traffic(mesh, run):
    """Counts of (operation, elements, bytes) over the transfers of one step's gradients."""
    dataset = data.open_dataset(run.data)
    composed = plan.make(run, dataset, mesh)
    state, share = train.init_state(composed, KEY), (mesh.dp.rank, mesh.dp.size)
    (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1, part=share)
    with recorder.recording() as events:
        train.gradients(composed, state.params, batch, KEY)
    return collections.Counter((e.op, e.elements, e.bytes) for e in events if e.phase == "started")


@pytest.mark.parametrize("world", [2], scope="session")
def test_stage_3_prefetches_and_reduces_in_flight(ranks, world):
    """Of the transfers themselves: block i+1's gather is started before block i's forward and waited for after it; in
    backward so are block i-1's gather and block i+1's reduction."""
    run = dataclasses.replace(with_(3, world=world), model=dit.Config(width=16, depth=4, heads=4, patch=2))
    for events in ranks.run(world, schedule, run):
        at = {note: i for i, (_, _, note) in enumerate(events) if note.startswith(("forward", "backward"))}
        forward, back = spans(events[: at["forward 3"] + 1], "gather"), spans(events[at["forward 3"] + 1 :], "gather")
        for i in (0, 1, 2):
            started, waited = forward[i + 1]
            assert started < at[f"forward {i}"] and (waited is None or waited > at[f"forward {i}"])
        shift = at["forward 3"] + 1
        reduced = spans(events[shift:], "reduce")
        for i in (3, 2, 1):
            assert back[i - 1][0] < at[f"backward {i}"] - shift < back[i - 1][1]
            assert reduced[i][0] < at[f"backward {i - 1}"] - shift < reduced[i][1]


def spans(events, kind):
    """{block: (place of the start, place of the end of waiting)} of the transfers that follow marks "kind block"."""
    found = {}
    for place, (_, _, note) in enumerate(events):
        if note.startswith(kind):
            started = next(i for i in range(place, len(events)) if events[i][0] == "started")
            ends = (i for i, e in enumerate(events) if e[:2] == ("waited", events[started][1]))
            found[int(note.split()[1])] = (started, next(ends, None))
    return found


def schedule(mesh, run):
    composed, dataset = fp64_plan(run, mesh)
    state = fp64_state(composed)
    share = (mesh.dp.rank, mesh.dp.size)
    (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1, part=share)
    with recorder.recording() as events:
        train.gradients(composed, state.params, batch, KEY)
    return [(event.phase, event.number, event.note) for event in events]


@pytest.mark.parametrize("world", [1, 2, 4], scope="session")
@pytest.mark.parametrize("remat", ["none", "block"])
def test_stage_3_has_two_blocks_weights_alive_at_most(ranks, world, remat):
    """Beside them only the rank's own row, which a gather sends, for a moment."""
    run = dataclasses.replace(with_(3, remat=remat, world=world), model=dit.Config(width=16, depth=6, heads=4))
    block = param.count(dit.declare(run.model, dit.Shape(1, 8, 10))["blocks"][0])
    for peak, gathers in ranks.run(world, most_alive, run):
        assert gathers == 12, "each block is gathered in forward and again in backward"
        assert block < peak <= 2 * block


def most_alive(mesh, run):
    """(most elements alive of rows and whole blocks, gathers), read off the storages whenever one comes."""
    composed, dataset = fp64_plan(run, mesh)
    state, refs, peak, gathers = fp64_state(composed), {}, [0], [0]
    start, finish = zero.Bundle.start_gather, zero.Bundle.finish_gather

    def note(flat):
        storage = flat.untyped_storage()
        refs.setdefault(storage._cdata, StorageWeakRef(storage))
        del storage
        time.sleep(0.03)  # gloo's thread drops its hold on a transfer's tensors a moment after wait() has returned
        alive = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in refs.values()]
        peak[0] = max(peak[0], sum(s.nbytes() for s in alive if s is not None) // flat.element_size())

    def start_gather(self, shards, into=None):
        pending = start(self, shards, into)
        gathers[0] += 1
        note(pending.rows)
        return pending

    def finish_gather(self, pending, shards):
        whole = finish(self, pending, shards)
        note(whole.flats[0])
        return whole

    (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1, part=(mesh.dp.rank, mesh.dp.size))
    held = composed.layout.hold(state.params)
    draws = draw(composed, batch.ids_B, (1, 8, 8), KEY)
    with mock.patch.multiple(zero.Bundle, start_gather=start_gather, finish_gather=finish_gather):
        train.part_gradients(composed, state.params, held, batch.x, batch.y, draws)
    return peak[0], gathers[0]


@pytest.mark.every(5)
@pytest.mark.parametrize("world", [1, 2, 4], scope="session")
@pytest.mark.parametrize("how", STAGES)
def test_digits_in_fp32_see_the_same_draws(ranks, digits_alone, world, how):
    """Eight steps of the preset as it is: digests bit for bit, losses within 1e-5."""
    run = dataclasses.replace(config.presets()["digits"][1], device="cpu", threads=1, steps=8, evaluate=False)
    moved = "optimizer" if how.endswith("offload") else "none"
    run = dataclasses.replace(run, parallel=config.Parallel(zero=int(how[0]), offload=moved))
    for log in ranks.run(world, eight_steps, run):
        for (loss, word), (loss1, word1) in zip(log, digits_alone, strict=True):
            assert word == word1 and abs(loss - loss1) <= 1e-5


@pytest.fixture(scope="module")
def digits_alone():
    return eight_steps(single(), dataclasses.replace(config.presets()["digits"][1], steps=8, evaluate=False))


def eight_steps(mesh, run):
    dataset = data.open_dataset(run.data, plan.load_front(run).tokenize)
    composed = plan.make(run, dataset, mesh)
    state, step, share = train.init_state(composed, KEY), train.make_step(composed), (mesh.dp.rank, mesh.dp.size)
    log = []
    for batch in loader.batches(dataset, KEY, global_batch=run.global_batch, stop=8, part=share):
        state, metrics = step(state, batch, KEY)
        log.append((metrics["loss"], metrics["draw_digest"]))
    return log


@pytest.mark.slow
def test_checkpoints_of_any_layout_are_read_by_any_other(ranks, tmp_path):
    """Written by four layouts, read by four others: every leaf bit for bit, moments and EMA too."""
    run = dataclasses.replace(RUN, out=tmp_path)
    at = lambda out, stage: dataclasses.replace(run, out=tmp_path / out, parallel=config.Parallel(zero=stage))  # noqa: E731
    for world, stage in ((1, 0), (2, 3), (3, 1), (4, 2)):
        ranks.run(world, write_checkpoint, at(str(world), stage))
    whole = redraw(dit.declare(RUN.model, dit.Shape(1, 8, 10)))
    for world, stage in ((1, 0), (2, 2), (3, 3), (4, 1)):
        specs = spec.specs(dit.declare(RUN.model, dit.Shape(1, 8, 10)), world, split=stage > 0)
        for writer in (1, 2, 3, 4):
            parts = ranks.run(world, read_checkpoint, at(str(writer), stage))
            for role in range(4):
                for a, b in zip(tree.leaves(assemble([p[role] for p in parts], specs)), tree.leaves(whole)):
                    assert torch.equal(a, b.float() * (role + 1)), (writer, world, role)


def write_checkpoint(mesh, run):
    composed, _ = fp64_plan(run, mesh)
    whole = redraw(composed.declared)
    trees = [
        tree.map(lambda w, s, k=k: s.take(w.float() * k, mesh.all.rank).clone(), whole, composed.layout.specs)
        for k in (1, 2, 3, 4)
    ]
    opt = optim.AdamState(trees[1], trees[2], torch.tensor(7))
    checkpoint.save(composed, train.TrainState(7, trees[0], opt, trees[3], train.LossScale(1.0, 0)), {})


def read_checkpoint(mesh, run):
    composed, _ = fp64_plan(run, mesh)
    state, _ = checkpoint.load(run.out / "checkpoints" / "step_00000007", composed)
    assert (state.step, int(state.opt.count)) == (7, 7)
    return state.params, state.opt.m, state.opt.v, state.ema


@pytest.mark.every(5)
@pytest.mark.parametrize("how", STAGES)
def test_a_step_leaves_nothing_behind(how):
    """Tensors alive after a step are as many as after the one before, without help of the garbage collector."""
    run = with_(int(how[0]), offload="optimizer" if how.endswith("offload") else "none")
    composed, dataset = fp64_plan(run)
    state, step = fp64_state(composed), train.make_step(composed)
    (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1)
    alive = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            state, _ = step(state, batch, KEY)
            time.sleep(0.05)  # the offload thread drops its last job a moment after it has told the result
            alive.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    finally:
        gc.enable()
    assert alive[2] == alive[3] == alive[4]


@pytest.mark.gpu
@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("how", STAGES[1:])
def test_on_a_gpu_side_streams_change_nothing(how, remat):
    """Six steps in fp64, where copies on other streams run beside computing, against stage 0."""
    loss, state, _ = stage_0_on_a_gpu()
    found_loss, found, _ = six_steps_on_a_gpu(how, remat)
    assert abs(loss - found_loss) <= 1e-12 * loss
    for (path, a), b in zip(tree.items([state.params, state.ema]), tree.leaves([found.params, found.ema])):
        assert (a.cpu() - b.cpu()).norm() <= 1e-11 * a.norm().cpu(), path
    devices = {x.device.type for x in tree.leaves([found.params, found.ema, found.opt.m, found.opt.v])}
    assert devices == {"cpu" if how.endswith("offload") else "cuda"}


@pytest.mark.gpu
def test_on_a_gpu_a_placed_state_samples_and_validates(monkeypatch):
    """Offload auto, where every second leaf has moved to the GPU: what is drawn and measured is that of stage 0."""
    _, state, expected = stage_0_on_a_gpu()
    monkeypatch.setattr(offload.Offload, "fitting", lambda host, *room: {n for n in host.host if n % 2})
    _, placed, found = six_steps_on_a_gpu("3 auto", "none")
    assert {x.device.type for x in tree.leaves(placed.params)} == {"cpu", "cuda"}
    for a, b in zip(drawn_and_measured(*expected, state), drawn_and_measured(*found, placed)):
        assert (a - b).norm() <= 1e-7 * a.norm()  # pictures come rounded to fp32


def drawn_and_measured(composed, dataset, state):
    """Eight pictures of four steps from the EMA, and the validation losses."""
    sampling = config.Sampling(steps=4, guidance=config.Guidance(scale=2.0))
    pictures = sample.sample(composed, state.ema, torch.arange(8), KEY, sampling=sampling)
    return pictures.double(), torch.tensor(list(validate.validate(composed, state.params, dataset).values()))


@functools.lru_cache(maxsize=1)
def stage_0_on_a_gpu():
    return six_steps_on_a_gpu("0", "none")


def six_steps_on_a_gpu(how, remat):
    run = dataclasses.replace(
        with_(int(how[0]), 2, remat, 0.5, offload={"offload": "optimizer", "auto": "auto"}.get(how[2:], "none")),
        device="cuda",
        steps=6,
        data=data.Config(source="synthetic", image_size=32, channels=4, num_classes=10, held_out=2**-14),
        model=dit.Config(width=512, depth=4, heads=8, patch=2),
    )
    composed, dataset = fp64_plan(run)
    state, step = fp64_state(composed), train.make_step(composed)
    moved = [tree.map(lambda x: x.to(composed.home), t) for t in (state.params, state.opt.m, state.opt.v, state.ema)]
    opt = state.opt._replace(m=moved[1], v=moved[2])
    state = state._replace(params=moved[0], opt=opt, ema=moved[3])
    for batch in loader.batches(dataset, KEY, global_batch=run.global_batch, stop=6):
        state, metrics = step(state, batch, KEY)
    return metrics["loss"], state, (composed, dataset)
