"""Sequence strategies in whole runs: training, sampling, memory, compiled blocks, checkpoints."""

import dataclasses
import functools

import pytest
import torch
from conftest import redraw
from ranks import RankFailed
from test_compile import GRAPHS, SECONDS, compiling_by, counted
from test_sequence import loss_and_gradients
from test_zero import KEY, eight_steps, fp64_plan, fp64_state, with_

from odit import compiling, config, data, memory, ops, plan, random, sample, train, tree, validate
from odit.config import Guidance, Parallel, Sampling
from odit.data import loader
from odit.data.dataset import READ_KEY
from odit.draws import draw
from odit.models import dit
from odit.parallel import sequence
from odit.parallel.mesh import Axis, single

NAMES = [name for name, s in sequence.STRATEGIES.items() if not s.time_space]
DIGITS = dataclasses.replace(config.presets()["digits"][1], device="cpu", threads=1, steps=8, evaluate=False)
MOVING = dataclasses.replace(
    config.presets()["moving-digits"][1],
    **{"device": "cpu", "threads": 1, "steps": 8, "evaluate": False, "global_batch": 8},
    model=dit.Config(arch="latte", width=24, depth=4, heads=4, patch=4, frame_patch=2, text_depth=1),
)


def sizes(name, sp, heads=4):
    """What ``ranks.run`` needs for a strategy over ``sp`` ranks."""
    return {"sp": sp, "ulysses": sequence.inner_degree(name, sp, heads, 2 if sp == 4 else None)}


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def digits_alone():
    return eight_steps(single(), dataclasses.replace(config.presets()["digits"][1], steps=8, evaluate=False))


@pytest.fixture(scope="module")
def moving_alone():
    return eight_steps(single(), MOVING)


@pytest.mark.every(11)  # coprime to the axes, so that all their values come
@pytest.mark.parametrize("name", [*NAMES, "auto"])
@pytest.mark.parametrize("sp, stage", [(2, 2), (2, 3), (4, 2), (4, 3)])
def test_digits_in_fp32_see_the_same_draws(ranks, digits_alone, name, sp, stage):
    """Eight steps of the preset on four ranks: digests bit for bit, losses within 1e-5."""
    inner = 2 if name == "usp" and sp == 4 else None
    run = dataclasses.replace(DIGITS, parallel=Parallel(sp=sp, sequence=name, ulysses=inner, zero=stage))
    same_log(ranks.run(4, eight_steps, run, **sizes(name, sp)), digits_alone)


@pytest.mark.every(5)
@pytest.mark.parametrize("name", ["dsp", "auto"])
@pytest.mark.parametrize("sp, stage", [(2, 2), (2, 3), (4, 2), (4, 3)])
def test_moving_digits_in_fp32_see_the_same_draws(ranks, moving_alone, name, sp, stage):
    """The same of a small Latte on captioned clips."""
    run = dataclasses.replace(MOVING, parallel=Parallel(sp=sp, sequence=name, zero=stage))
    same_log(ranks.run(4, eight_steps, run, sp=sp), moving_alone)


def same_log(logs, alone):
    """Digests bit for bit, losses within 1e-5."""
    for log in logs:
        for (loss, word), (loss1, word1) in zip(log, alone, strict=True):
            assert word == word1 and abs(loss - loss1) <= 1e-5


@pytest.mark.every(8)
@pytest.mark.parametrize("how", ["block", "selective", "offload"])
@pytest.mark.parametrize("name", NAMES)
def test_remat_and_offload_change_nothing(ranks, digits_alone, name, how):
    options = {"offload": "optimizer"} if how == "offload" else {"remat": how}
    run = dataclasses.replace(DIGITS, micro_batch=24, parallel=Parallel(sp=2, sequence=name, zero=3, **options))
    # selective's first use in a process loads the compiler, for its decorators
    same_log(ranks.run(4, eight_steps, run, **sizes(name, 2), timeout_s=SECONDS), digits_alone)


@pytest.mark.every(3)
@pytest.mark.parametrize("options", [{"remat": "block"}, {"remat": "selective"}, {"offload": "optimizer"}])
def test_remat_and_offload_change_nothing_of_dsp(ranks, moving_alone, options):
    run = dataclasses.replace(MOVING, micro_batch=2, parallel=Parallel(sp=2, sequence="dsp", zero=3, **options))
    same_log(ranks.run(4, eight_steps, run, sp=2, timeout_s=SECONDS), moving_alone)


def other_samples(mesh, what):
    """A step in which the second of two ranks that share samples has read another one, or other pixels of it."""
    run = dataclasses.replace(DIGITS, parallel=Parallel(sp=2))
    dataset = data.open_dataset(run.data)
    composed = plan.make(run, dataset, mesh)
    (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1)
    ids, x = batch.ids_B.clone(), batch.x.clone()
    ids[3] += mesh.sp.rank * (what == "sample")
    x[5, 0, 2, 2] += 1e-3 * mesh.sp.rank * (what == "pixel")
    train.make_step(composed)(train.init_state(composed, KEY), batch._replace(ids_B=ids, x=x), KEY)


@pytest.mark.parametrize("what", ["sample", "pixel"])
def test_ranks_that_share_samples_must_read_the_same(ranks, what):
    with pytest.raises(RankFailed, match=r"ranks \[0, 1\] did(.|\n)*share samples over parallel.sp 2 read different"):
        ranks.run(2, other_samples, what, sp=2)


def validated(mesh, bad_rank):
    """Validation where one rank cannot read a picture; the losses, and what this rank told of it."""
    run = dataclasses.replace(DIGITS, validation_draws=1, micro_batch=24, parallel=Parallel(sp=2))
    dataset = data.open_dataset(run.data)
    dataset.held_out_ids = dataset.held_out_ids[:20]
    bad, read = int(dataset.held_out_ids[7]), dataset.read

    def torn(ids, key=READ_KEY):
        if bad in torch.as_tensor(ids).tolist() and mesh.rank in bad_rank:
            raise data.BadSample("picture 7", "torn")
        return read(ids)

    dataset.read = torn
    composed, told = plan.make(run, dataset, mesh), []
    params = train.init_state(composed, KEY).params
    return validate.validate(composed, params, dataset, lambda path, why: told.append(path)), told


@pytest.mark.parametrize("bad_rank", [(0,), (1,), (0, 1)])
def test_a_picture_that_one_of_those_who_share_it_cannot_read_is_left_out(ranks, bad_rank):
    found = ranks.run(2, validated, bad_rank, sp=2)
    everybody = ranks.run(2, validated, (0, 1), sp=2)
    assert [losses for losses, _ in found] == [losses for losses, _ in everybody]
    assert [path for _, told in found for path in told] == ["picture 7"]


# ------------------------------------------------------------------------------------------------------------- sampling

DRAWN = dataclasses.replace(
    DIGITS,
    model=dit.Config(width=24, depth=2, heads=4, patch=2),
    sampling=Sampling(solver="sde", steps=3, guidance=Guidance(scale=2.0)),
)


def pictures_on(mesh, name="auto", cfg=1, stage=0, batch=4, ulysses=None, run=DRAWN):
    layout = Parallel(sp=mesh.sp.size, sequence=name, cfg=cfg, zero=stage, ulysses=ulysses)
    run = dataclasses.replace(run, global_batch=12, parallel=layout)
    dataset = data.open_dataset(run.data, plan.load_front(run).tokenize)
    composed = plan.make(run, dataset, mesh)
    whole = redraw(composed.declared, dtype=torch.float32)
    params = tree.map(lambda w, s: s.take(w, mesh.all.rank).clone(), whole, composed.layout.specs)
    start, key = {}, random.fold_in(random.key(3), "sample")

    def noted(used, shape, ids=None):
        found = random.normal(used, shape, ids)
        if used == key:
            start.update(zip(ids.tolist(), found))
        return found

    noting = dataclasses.replace(composed, kernels=dataclasses.replace(composed.kernels, normal=noted))
    shown = sample.previews(composed, dataset, 6, 10)
    return sample.sample(noting, params, shown, random.key(3), batch=batch), start


@pytest.fixture(scope="module")
def drawn_alone():
    return pictures_on(single())


@pytest.mark.every(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world, sp, stage", [(2, 2, 0), (4, 4, 3), (3, 3, 0), (4, 2, 3)])
def test_pictures_are_those_of_one_rank(ranks, drawn_alone, name, world, sp, stage):
    inner = 2 if name == "usp" and sp == 4 else None
    found = ranks.run(world, pictures_on, name, 1, stage, 3, inner, **sizes(name, sp))
    same_pictures(found, drawn_alone)


@pytest.mark.parametrize("name", NAMES)
def test_split_guidance_over_shared_tokens(ranks, drawn_alone, name):
    found = ranks.run(4, pictures_on, name, 2, 3, **sizes(name, 2), cfg=2)
    same_pictures(found, drawn_alone)


CLIPS = dataclasses.replace(MOVING, sampling=DRAWN.sampling)


@pytest.fixture(scope="module")
def clips_alone():
    return pictures_on(single(), run=CLIPS)


MESHES = [(2, 2, 1, 0), (3, 3, 1, 0), (4, 4, 1, 3), (4, 2, 1, 3), (4, 2, 2, 3)]


@pytest.mark.parametrize("world, sp, cfg, stage", MESHES)
def test_clips_under_dsp_are_those_of_one_rank(ranks, clips_alone, world, sp, cfg, stage):
    """Shares of 8 frames and 16 places over 2, 3 and 4 ranks; the last case splits guidance over two groups as well."""
    same_pictures(ranks.run(world, pictures_on, "dsp", cfg, stage, 3, None, CLIPS, sp=sp, cfg=cfg), clips_alone)


def same_pictures(found, alone):
    """Within 1e-5 in fp32; the noise they start from is bit-equal."""
    for pictures, start in found:
        assert torch.equal(pictures, found[0][0]) and (pictures - alone[0]).abs().max() <= 1e-5
        assert start and all(torch.equal(x, alone[1][i]) for i, x in start.items())


# --------------------------------------------------------------------------------------------------------------- memory


@functools.cache
def kept_bytes(name, sp):
    """Bytes that a forward pass of DiT-XL on 4096 tokens in bf16 leaves for backward on rank 0."""
    size = sequence.inner_degree(name, sp, 16, 2 if sp == 4 else None)
    counts = {"sp": sp, "all": sp, "ulysses": size, "ring": sp // size}
    axes = {axis: Axis(axis, n, 0, None, tuple(range(n))) for axis, n in counts.items()}
    mesh = dataclasses.replace(single(), world=sp, **axes)
    run = dataclasses.replace(config.presets()["dit-xl-2"][1], precision="bf16", global_batch=4)
    images = dataclasses.replace(run.data, image_size=128)
    inner = size if name == "usp" and sp > 1 else None
    layout = Parallel(sp=sp, sequence=name if sp > 1 else "none", ulysses=inner)
    run = dataclasses.replace(run, data=images, parallel=layout)
    composed = plan.make(run, data.open_dataset(run.data), mesh)
    composed = dataclasses.replace(memory.on_meta(composed), kernels=ops.flash())
    specs = composed.layout.specs
    shapes = tree.map(lambda p, s: torch.empty(s.local_shape(p.shape), device="meta"), composed.declared, specs)
    held = composed.layout.hold(shapes)
    targets = tree.map(lambda p: p.detach().requires_grad_(), composed.layout.targets(shapes, held))
    x, ids = torch.empty(4, 4, 128, 128, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    draws = draw(composed, ids, (4, 128, 128), KEY)
    with memory.Weigh([x, ids, *draws, *tree.leaves(targets)]) as weigh:
        loss = train.losses(composed, *composed.view(targets, held), x, ids, draws)
        assert loss.requires_grad
        return weigh.now()


MOST = {"ulysses": 0.27, "ring": 0.27, "usp": 0.27, "fastseq": 0.3, "megatron": 0.32}


@pytest.mark.parametrize("name, most", MOST.items())
def test_four_ranks_keep_a_quarter_of_the_activations(name, most):
    """Beside a quarter of what one rank keeps: attention's output on both sides of its all-to-all (M / n elements a
    block), the tokens that fastseq has gathered (M (n - 1) / n), and twice these for megatron."""
    alone, four = kept_bytes("ring", 1), kept_bytes(name, 4)
    assert four <= most * alone
    size, n = 28 * 4 * 4096 * 1152 * 2, 4
    more = {"ulysses": 1 / n, "usp": 1 / n, "ring": 0, "fastseq": 1, "megatron": 2 * (n - 1) / n}[name] * size
    assert four == pytest.approx(alone / n + more, rel=0.005)


# ------------------------------------------------------------------------------------------------------------- compiled


def compiled_steps(mesh, name, remat):
    """Loss and gradients in fp64 of eager and of compiled blocks, and how many graphs the first and the second of two
    rounds of training and sampling made."""
    run = with_(3, 2, remat, world=mesh.dp.size)
    layout = dataclasses.replace(run.parallel, sp=2, sequence=name)
    model = dataclasses.replace(run.model, width=24, heads=4, depth=2)
    composed, dataset = fp64_plan(dataclasses.replace(run, model=model, parallel=layout), mesh)
    share = (mesh.dp.rank, mesh.dp.size)
    (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1, part=share)
    params = fp64_state(composed).params
    expected = train.gradients(composed, params, batch, KEY)
    num = []
    few = Sampling(steps=2, guidance=Guidance(scale=2.0))
    with compiling_by(counted):
        found = dataclasses.replace(composed, compiled=True)
        for _ in range(2):
            loss_B, grads, _ = train.gradients(found, params, batch, KEY)
            sample.sample(found, params, torch.arange(4), KEY, sampling=few)
            num.append(len(GRAPHS))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(tree.leaves(grads), tree.leaves(expected[1]))]
    return float((loss_B - expected[0]).norm() / expected[0].norm()), max(errors), num


STRETCHES = {"ulysses": 3, "ring": 3, "usp": 3, "fastseq": 5, "megatron": 7}  # what lies between a block's collectives


@pytest.mark.every(6)
@pytest.mark.parametrize("name, remat", [*((name, "none") for name in NAMES), ("ulysses", "block")])
def test_compiled_blocks_equal_eager_ones(ranks, name, remat):
    """Every stretch between collectives is compiled once with gradients and once without, however often it runs."""
    found = ranks.run(2, compiled_steps, name, remat, **sizes(name, 2), timeout_s=SECONDS)
    for loss, worst, (first, second) in found:
        assert loss <= 1e-12 and worst <= 1e-11
        assert (first, second) == (2 * STRETCHES[name],) * 2


def compiled_dsp(mesh):
    """Eager and compiled losses and gradients of the time x space model, and the graphs of each of two rounds."""
    args, num = ("time x space", "64 tokens", "dsp", 3), []
    eager = loss_and_gradients(mesh, *args)
    with compiling_by(counted):
        for _ in range(2):
            found = loss_and_gradients(mesh, *args, wrap=compiling.compiled)
            num.append(len(GRAPHS))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(tree.leaves(found[1]), tree.leaves(eager[1]))]
    return abs(found[0] - eager[0]) / eager[0], max(errors), num


@pytest.mark.slow
def test_compiled_dsp_equals_eager(ranks):
    """A pair of blocks has three stretches: before, between and after its two switches."""
    for loss, worst, (first, second) in ranks.run(2, compiled_dsp, sp=2, timeout_s=SECONDS):
        assert loss <= 1e-12 and worst <= 1e-11
        assert 0 < first == second <= 3
