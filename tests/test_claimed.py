"""Weights stored split over sp on claimed dims, beside ZeRO: what a rank draws, holds, sums, saves and counts."""

import collections
import dataclasses
import functools
import itertools
import math
from unittest import mock

import pytest
import torch
from conftest import redraw
from test_zero import KEY, RUN, weights_of

from odit import checkpoint, config, data, memory, param, plan, random, train, tree
from odit.data import loader
from odit.draws import draw
from odit.models import dit
from odit.parallel import bundle, offload, recorder, spec
from odit.parallel.mesh import Axis, single

MODELS = {
    # 2 and 3 divide 6 heads and an ffn of 84
    "both": dit.Config(width=24, depth=2, heads=6, patch=2, mlp_ratio=3.5, qk_norm=True),
    # neither divides 5 heads, 2 alone an ffn of 70; nor do 4 ranks divide anything of some leaves
    "some": dit.Config(width=20, depth=2, heads=5, patch=2, mlp_ratio=3.5, qk_norm=True),
}
CLAIMED = "HF"
MESHES = pytest.mark.parametrize("dp, sp", [(1, 2), (1, 3), (2, 2)], scope="session")
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


def run_of(model, stage, remat="none", moved="none", **changes):
    layout = config.Parallel(zero=stage, remat=remat, offload=moved)
    return dataclasses.replace(RUN, model=MODELS[model], global_batch=12, parallel=layout, **changes)


@functools.lru_cache
def dataset():
    return data.open_dataset(RUN.data)


def batches_of(mesh, num):
    """This rank's share of the first batches, in fp64: the loss is computed in the dtype of the samples."""
    found = loader.batches(dataset(), KEY, global_batch=12, stop=num, part=(mesh.dp.rank, mesh.dp.size))
    return [batch._replace(x=batch.x.double()) for batch in found]


def composed_on(mesh, run, claimed=CLAIMED, dtype=torch.float64):
    """The plan of a mesh whose sp ranks are megatron's; one that claims less slices the whole weights it then has."""
    strategy = "megatron" if mesh.sp.size > 1 else "auto"
    layout = dataclasses.replace(run.parallel, sp=mesh.sp.size, sequence=strategy)
    composed = plan.make(dataclasses.replace(run, parallel=layout), dataset(), mesh)
    kept = "".join(letter for letter in composed.claimed if letter in claimed)
    return dataclasses.replace(composed, dtype=dtype, claimed=kept)


def declared_of(model):
    return dit.declare(MODELS[model], dit.Shape(1, 8, 10))


def parts_of(whole, specs, rank):
    return tree.map(lambda w, s: s.take(w, rank).clone(), whole, specs)


def assemble(declared, specs, parts):
    """Whole leaves from every rank's parts; those that another rank owns must be its bits."""

    def leaf(p, s, *found):
        joined = torch.full(p.shape, math.nan, dtype=found[0].dtype)
        for rank, part in enumerate(found):
            box = joined[box_of(p, s, rank)]
            assert s.owns(rank) or torch.equal(box, part)
            box.copy_(part)
        assert not joined.isnan().any()
        return joined

    return tree.map(leaf, declared, specs, *parts)


def box_of(p, s, rank):
    return tuple(slice(a, a + n) for a, n in zip(s.offsets(p.shape, rank), s.local_shape(p.shape)))


# ------------------------------------------------------------------------------------------------------------ the specs


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dp, sp", [(1, 1), (4, 1), (1, 2), (2, 2), (1, 3), (3, 2), (2, 3), (8, 2)])
@EVERY_MODEL
def test_the_parts_that_ranks_own_tile_a_leaf(model, dp, sp, split):
    declared = declared_of(model)
    specs = spec.specs(declared, dp * sp, split, sp, CLAIMED)
    for (path, p), s in zip(tree.items(declared), tree.leaves(specs)):
        times = torch.zeros(p.shape)
        full = torch.arange(p.size).view(p.shape)
        for rank in range(dp * sp):
            assert torch.equal(s.take(full, rank), full[box_of(p, s, rank)]), path
            assert s.share(full, rank).shape == s.share_shape(p.shape)
            if s.owns(rank):
                times[box_of(p, s, rank)] += 1
        assert (times == 1).all(), path


def test_which_dims_are_cut():
    """dp x sp = 2 x 2: claimed dims over sp, then the first other that 2 divides over dp; the rest over all."""
    declared = declared_of("both")["blocks"][0]
    found = dict(tree.items(spec.specs(declared, 4, True, 2, CLAIMED)))
    cuts = {path: (s.claimed, s.num_shares, s.dim, s.num) for path, s in found.items()}
    assert cuts["qkv.w"] == (1, 2, 2, 2)  # 3HKD: 3 does not divide
    assert cuts["out.w"] == (1, 2, 0, 2)  # DHK
    assert cuts["mlp.fc1.w"] == (0, 2, 1, 2)  # FD
    assert cuts["mlp.fc1.b"] == (0, 2, None, 2)  # F: nothing is left to split
    assert cuts["mlp.fc2.w"] == (1, 2, 0, 2)  # DF
    assert cuts["adaln.w"] == (None, 1, 0, 4)  # 6D
    assert all(s.claimed is None for s in tree.leaves(spec.specs(declared, 4, True, 1, CLAIMED))), "one rank along sp"
    some = spec.specs(declared_of("some")["blocks"][0], 4, True, 2, CLAIMED)
    assert some["qkv"]["w"] == spec.specs(declared_of("some")["blocks"][0], 4, True)["qkv"]["w"], "2 does not divide 5"
    (line,) = (x for x in spec.unsplit(declared, spec.specs(declared, 4, True, 2, CLAIMED)) if "fc1.b" in x)
    assert line == "mlp.fc1.b (84,) is split over sp alone: no dim of (84,) (F, HF claimed) divides by 2"


# ------------------------------------------------------------------------------------------------------ initial weights


@MESHES
@EVERY_MODEL
@STAGES
def test_weights_are_drawn_share_by_share_bit_for_bit(ranks, dp, sp, model, stage):
    whole = param.init(declared_of(model), random.fold_in(KEY, "weights"))
    specs = spec.specs(declared_of(model), dp * sp, stage > 0, sp, CLAIMED)
    for rank, (params, ema) in enumerate(ranks.run(dp * sp, drawn_on, run_of(model, stage), dp=dp, sp=sp)):
        for (path, w), s, a, b in zip(tree.items(whole), *map(tree.leaves, (specs, params, ema))):
            assert torch.equal(a, s.take(w, rank)) and torch.equal(b, a), path


def drawn_on(mesh, run):
    state = train.init_state(composed_on(mesh, run), KEY)
    return state.params, state.ema


@pytest.mark.parametrize("short", [0, 100, 10**6])
@pytest.mark.parametrize("shape", [(3, 6, 4, 24), (24, 6, 4), (6, 4), (8, 4, 2, 3)])
def test_a_box_is_drawn_without_the_whole(monkeypatch, short, shape):
    """Every box of two cut dims, bit for bit, in draws of at most ``CHUNK`` elements, or a row."""
    monkeypatch.setattr(spec, "SHORT", short)
    monkeypatch.setattr(spec, "CHUNK", max(50, min(short, math.prod(shape[1:]))))
    asked = []

    def init(key, start, size):
        asked.append(size)
        return random.normal(key, (size,), start=start)

    p = param.Param(shape, "abcd"[: len(shape)], init)
    whole = param.draw(p, "leaf", KEY)
    asked.clear()
    for dim, claimed in itertools.permutations(range(len(shape)), 2):
        if shape[dim] % 2 == 0 and shape[claimed] % 2 == 0:
            s = spec.Spec(dim, 2, "", claimed, 2)
            for rank in range(4):
                part = spec.draw(p, "leaf", KEY, s, Axis("all", 4, rank, None, (0, 1, 2, 3)))
                assert torch.equal(part, s.take(whole, rank)), (s, rank)
    assert asked and max(asked) <= spec.CHUNK


# ----------------------------------------------------------------------------------------- what the model sees and sums


@MESHES
@EVERY_MODEL
@STAGES
def test_the_model_sees_this_ranks_shares(ranks, dp, sp, model, stage):
    whole = redraw(declared_of(model))
    specs = spec.specs(declared_of(model), dp * sp, stage > 0, sp, CLAIMED)
    for rank, seen in enumerate(ranks.run(dp * sp, seen_on, run_of(model, stage), dp=dp, sp=sp)):
        for (path, w), s, x in zip(tree.items(whole), tree.leaves(specs), tree.leaves(seen)):
            assert torch.equal(x, s.share(w, rank)), path


def seen_on(mesh, run):
    """What the layout gives a model's forward pass, outside the blocks and in each."""
    composed = composed_on(mesh, run)
    layout, blocks = composed.layout, []

    def block(p, x):
        blocks.append(tree.map(torch.clone, p))
        return x

    params = parts_of(weights_of(composed.run.model, composed.shape), layout.specs, mesh.rank)
    with torch.no_grad():
        held = layout.hold(params)
        seen, record = layout.view(layout.targets(params, held), held, composed.ops)
        record.layers(block, seen["blocks"], torch.zeros(1))
    return seen | {"blocks": blocks}


CASES = [
    *itertools.product("0123", ("none", "block")),
    *itertools.product(("2 offload", "3 offload"), ("none", "block")),
]


@pytest.mark.every(7)
@MESHES
@EVERY_MODEL
@pytest.mark.parametrize("how, remat", CASES)
def test_equals_one_rank(ranks, one_rank, dp, sp, model, how, remat):
    """Loss, global norm and every gradient leaf; parameters, moments and EMA after two steps."""
    stage, moved = int(how[0]), "optimizer" if how.endswith("offload") else "none"
    run = run_of(model, stage, remat, moved, micro_batch=6 // dp)
    loss, norm, expected = one_rank(model)
    specs = spec.specs(declared_of(model), dp * sp, stage > 0, sp, CLAIMED)
    found = ranks.run(dp * sp, two_steps, run, dp=dp, sp=sp)
    for rank_loss, rank_norm, _ in found:
        assert abs(rank_loss - loss) <= 1e-12 * loss and abs(rank_norm - norm) <= 1e-12 * norm
    for role, whole in expected.items():
        joined = assemble(declared_of(model), specs, [parts[role] for _, _, parts in found])
        for (path, a), b in zip(tree.items(joined), tree.leaves(whole)):
            assert (a - b).norm() <= 1e-12 * b.norm(), f"{role} {path}"


@pytest.fixture(scope="module")
def one_rank():
    return functools.lru_cache(lambda model: two_steps(single(), run_of(model, 0)))


def two_steps(mesh, run):
    """Loss, global norm and this rank's gradients of the first batch, and its state after two steps of them."""
    composed = composed_on(mesh, run)
    params = parts_of(weights_of(composed.run.model, composed.shape), composed.layout.specs, mesh.rank)
    state = train.TrainState(
        0, params, train.optimizer(composed).init(params), tree.map(torch.clone, params), train.LossScale(1.0, 0)
    )
    batches = batches_of(mesh, 2)
    host = train.offloaded(composed)
    if host is not None:
        host.begin(state.params, state.opt, state.ema, offload.Settings(state.opt.count, 0.0, 0.0, 1.0))
    loss_B, grads, word = train.gradients(composed, state.params, batches[0], KEY, host=host)
    loss, norm, *_ = train.agree(composed, loss_B, grads, word, host)
    if host is not None:
        leaves = enumerate(tree.leaves(params))
        grads = tree.unflatten(params, [host.totals[n].view(p.shape) for n, p in leaves])
    step = train.make_step(composed)
    for batch in batches:
        state, _ = step(state, batch, KEY)
    roles = {"grad": grads, "param": state.params, "m": state.opt.m, "v": state.opt.v, "ema": state.ema}
    return loss, norm, roles


@MESHES
@STAGES
def test_shares_travel_over_dp_alone(ranks, dp, sp, stage):
    """Elements that a rank receives for a step's gradients, by axis: unclaimed leaves over all, shares over dp."""
    declared = declared_of("both")
    specs = spec.specs(declared, dp * sp, stage > 0, sp, CLAIMED)
    received = ranks.run(dp * sp, received_on, run_of("both", stage), dp=dp, sp=sp)
    expected = collections.Counter()
    for (path, p), s in zip(tree.items(declared), tree.leaves(specs)):
        axis, num = ("all", dp * sp) if s.claimed is None else ("dp", dp)
        size = math.prod(s.share_shape(p.shape))
        gathers = 2 if stage == 3 and path.startswith("blocks.") else 1
        times = 2 if s.dim is None else 1 + gathers if stage > 1 else 2 + gathers
        expected[axis] += times * size * (num - 1) / num
    if dp == 1:
        assert expected.pop("dp") == 0
    names = {"all", "dp"} & set(expected)
    total = {name: sum(found[name] for found in received) / len(received) for name in names}
    assert total == pytest.approx(dict(expected), rel=1e-12)
    assert all(set(found) <= names for found in received)


def received_on(mesh, run):
    """Elements by axis, without the strategy's own."""
    composed = composed_on(mesh, run, dtype=torch.float32)
    params = train.init_state(composed, KEY).params
    (batch,) = batches_of(mesh, 1)
    with recorder.recording() as events:
        train.gradients(composed, params, batch, KEY)
    names = {e.axis for e in events} & {"all", "dp"}
    return {name: sum(t.elements for t in recorder.totals(events, name).values()) for name in names}


@MESHES
@pytest.mark.parametrize("remat", ["none", "block"])
def test_stage_3_has_two_blocks_shares_alive_at_most(ranks, dp, sp, remat):
    declared = declared_of("both")["blocks"][0]
    specs = spec.specs(declared, dp * sp, True, sp, CLAIMED)
    block = 4 * sum(math.prod(s.share_shape(p.shape)) for p, s in zip(tree.leaves(declared), tree.leaves(specs)))
    for most, left in ranks.run(dp * sp, alive_on, run_of("both", 3, remat), dp=dp, sp=sp):
        assert block <= most <= 2 * block and left == 0


def alive_on(mesh, run):
    """Most bytes of gathered blocks whenever a gather has ended, and those after backward."""
    composed, flats, most = composed_on(mesh, run, dtype=torch.float32), {}, []
    params, (batch,) = train.init_state(composed, KEY).params, batches_of(mesh, 1)
    held, finish = composed.layout.hold(params), bundle.Convoy.finish_gather

    def now():
        return sum(flat.untyped_storage().nbytes() for flat in flats.values())

    def finish_gather(convoy, pending, shards):
        whole = finish(convoy, pending, shards)
        flats.update((id(flat), flat) for flat in whole.flats)
        most.append(now())
        return whole

    draws = draw(composed, batch.ids_B, (1, 8, 8), KEY)
    with mock.patch.object(bundle.Convoy, "finish_gather", finish_gather):
        train.part_gradients(composed, params, held, batch.x, batch.y, draws)
    return max(most), now()


# ----------------------------------------------------------------------------------------------- checkpoints and memory


@EVERY_MODEL
@pytest.mark.every(2)
def test_checkpoints_of_any_layout_are_read_by_any_other(ranks, tmp_path, model):
    """Every leaf bit for bit, moments and EMA too, between layouts with and without claims; a weights file also."""
    layouts = [(1, 1, 0, ""), (1, 2, 1, "HF"), (2, 1, 3, ""), (1, 3, 0, "HF"), (2, 2, 3, "HF")]
    whole = redraw(declared_of(model), dtype=torch.float32)
    checkpoint.save_weights(tmp_path / "w.safetensors", whole, {})
    for number, (dp, sp, stage, claimed) in enumerate(layouts):
        run = run_of(model, stage, out=tmp_path / str(number))
        ranks.run(dp * sp, write_checkpoint, run, claimed, dp=dp, sp=sp)
    for dp, sp, stage, claimed in layouts:
        specs = spec.specs(declared_of(model), dp * sp, stage > 0, sp, claimed)
        args = (run_of(model, stage, out=tmp_path), claimed, len(layouts))
        for rank, found in enumerate(ranks.run(dp * sp, read_checkpoints, *args, dp=dp, sp=sp)):
            for writer, times, t in found:
                for (path, w), s, x in zip(tree.items(whole), tree.leaves(specs), tree.leaves(t)):
                    assert torch.equal(x, s.take(w * times, rank)), (writer, times, path)


def write_checkpoint(mesh, run, claimed):
    composed = composed_on(mesh, run, claimed)
    whole = redraw(composed.declared, dtype=torch.float32)
    trees = [parts_of(tree.map(lambda w, k=k: w * k, whole), composed.layout.specs, mesh.rank) for k in (1, 2, 3, 4)]
    state = train.init_state(composed, KEY)
    opt = state.opt._replace(m=trees[1], v=trees[2])
    checkpoint.save(composed, state._replace(params=trees[0], opt=opt, ema=trees[3]), {})


def read_checkpoints(mesh, run, claimed, num):
    """(writer, factor, this rank's parts) of every role of every checkpoint, and of the weights file."""
    composed, found = composed_on(mesh, run, claimed), []
    for writer in range(num):
        state, _ = checkpoint.load(run.out / str(writer) / "checkpoints" / "step_00000000", composed)
        roles = (state.params, state.opt.m, state.opt.v, state.ema)
        found += [(writer, times, t) for times, t in enumerate(roles, start=1)]
    return [*found, ("file", 1, checkpoint.load_weights(run.out / "w.safetensors", composed))]


@MESHES
@STAGES
def test_held_bytes_equal_the_formulas(ranks, dp, sp, stage):
    """A claimed leaf's state is 1 / (dp sp) of it from stage 1 on and 1 / sp at stage 0 or where dp cannot split it;
    its working weight, where one stands, 1 / sp. No storage is larger than the leaves in it."""
    declared = declared_of("both")
    for held, storages in ranks.run(dp * sp, held_on, run_of("both", stage), dp=dp, sp=sp):
        totals = [0, 0]
        for path, p in tree.items(declared):
            parts, unsplit = (sp, path.endswith("fc1.b")) if set(p.dims) & set(CLAIMED) else (1, path in held[2])
            state = parts if stage == 0 or unsplit else dp * sp
            stands = not (stage == 3 and path.startswith("blocks."))
            expected = (4 * 4 * p.size // state, 4 * p.size // parts * stands)
            assert (held[0][path], held[1].get(path, 0)) == expected, path
            totals = [a + b for a, b in zip(totals, expected)]
        assert storages == totals


def held_on(mesh, run):
    """(bytes of state and of standing working weights by leaf, unclaimed leaves that do not split), storages' bytes."""
    composed = composed_on(mesh, run, dtype=torch.float32)
    state = train.init_state(composed, KEY)
    held = composed.layout.hold(state.params)
    outside = {name: t for name, t in composed.declared.items() if name != "blocks"}
    working = held.whole if held.whole is not None else tree.unflatten(outside, held.outer.leaves)
    kinds = [(state.params, state.opt.m, state.opt.v, state.ema), (working,)]
    sizes, storages = [], []
    for trees in kinds:
        found = collections.Counter()
        for path, x in (item for t in trees for item in tree.items(t)):
            found[path] += x.numel() * x.element_size()
        sizes.append(dict(found))
        unique = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for t in trees for x in tree.leaves(t)}
        storages.append(sum(unique.values()))
    if composed.layout.stage == 0:
        storages[1] = sum(sizes[1].values())  # at stage 0 in fp32 the working weights are the masters themselves
    unsplit = {path for path, s in tree.items(composed.layout.specs) if s.dim is None and s.claimed is None}
    return (*sizes, unsplit), storages


def test_the_plan_of_memory_counts_shares():
    """Digits over sp = 2: masters, moments and EMA of this rank's parts, and a lower peak where leaves are claimed."""
    one = dataclasses.replace(single(), world=2)
    two = dataclasses.replace(
        one, sp=Axis("sp", 2, 0, None, (0, 1)), all=Axis("all", 2, 0, None, (0, 1)), dp=Axis("dp", 1, 0, None, (0,))
    )
    found = {}
    for stage, claimed in itertools.product((0, 3), ("", CLAIMED)):
        composed = composed_on(two, run_of("both", stage), claimed, torch.float32)
        specs = tree.leaves(composed.layout.specs)
        num = sum(math.prod(s.local_shape(p.shape)) for p, s in zip(tree.leaves(composed.declared), specs))
        found[stage, claimed] = memory.predict(composed)
        assert found[stage, claimed].standing == 16 * num
    assert found[0, CLAIMED].peak < found[0, ""].peak
