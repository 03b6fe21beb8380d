"""Guidance with its halves on two ranks: the pictures of one rank, and half of the model's rows on each."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from test_ranks_inference import BATCH, RUN, composed_on, opened, share, torchrun

from odit import checkpoint, checks, config, diffusion, plan, random, sample
from odit.config import Guidance, Parallel, Sampling
from odit.config_json import to_json
from odit.models.config import Shape
from odit.parallel.mesh import check_mesh, single

NUM = 13  # pictures, which neither one pair nor two draw in equal batches
GUIDED = {
    "everywhere": (RUN.diffusion, Sampling("sde", 3, Guidance(2.0))),
    "interval": (RUN.diffusion, Sampling("heun", 3, Guidance(3.0, interval=(0.3, 0.8)))),
    "channels": (diffusion.Config("eps", variance="learned"), Sampling("ddim", 3, Guidance(4.0, channels=1))),
}
MESHES = pytest.mark.parametrize("world", [2, 4], scope="session")


def pictures_on(mesh, how, stage=0, scale=None):
    """Pictures and the rows of each forward pass of this rank."""
    process, sampling = GUIDED[how]
    cfg = mesh.cfg.size
    composed, params, rows = composed_on(mesh, stage, diffusion=process, sampling=sampling)
    run = dataclasses.replace(composed.run, parallel=Parallel(zero=stage, cfg=cfg))
    composed = dataclasses.replace(composed, run=run)
    if scale is not None:
        sampling = dataclasses.replace(sampling, guidance=dataclasses.replace(sampling.guidance, scale=scale))
    labels = sample.spread_labels(NUM, 10)
    found = sample.sample(composed, params, labels, random.key(3), sampling=sampling, start=5, batch=BATCH)
    return found, rows


@pytest.fixture(scope="module")
def one_rank():
    """(pictures, rows of the forward passes) of one rank."""
    return {how: pictures_on(single(), how) for how in GUIDED}


@MESHES
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("how", GUIDED)
def test_pairs_draw_the_pictures_of_one_rank(ranks, one_rank, world, stage, how):
    pictures, rows = zip(*ranks.run(world, pictures_on, how, stage, cfg=2))
    alone, alone_rows = one_rank[how]
    assert all(torch.equal(p, pictures[0]) for p in pictures)
    assert (pictures[0] - alone).norm() <= 1e-12 * alone.norm()
    assert all(r == rows[0] for r in rows), "ZeRO-3 gathers in every pass"
    assert max(rows[0]) <= BATCH < max(alone_rows)


@MESHES
def test_each_rank_runs_half_of_the_rows(ranks, one_rank, world):
    """Of both passes of a picture one is here; outside the interval there is one pass, which both ranks run."""
    for how, passes in (("everywhere", 3), ("channels", 3), ("interval", 6)):  # heun calls twice a step
        _, rows = zip(*ranks.run(world, pictures_on, how, 0, cfg=2))
        assert all(sum(r) == passes * share(NUM, world // 2) for r in rows), how
    assert sum(one_rank["everywhere"][1]) == 2 * 3 * NUM
    assert 6 * NUM < sum(one_rank["interval"][1]) < 2 * 6 * NUM, "an interval that some levels lie in"


@pytest.mark.parametrize("world", [2], scope="session")
def test_scale_one_runs_the_conditional_pass_on_both(ranks, world):
    (first, rows), (second, _) = ranks.run(world, pictures_on, "everywhere", 3, 1.0, cfg=2)
    alone, alone_rows = pictures_on(single(), "everywhere", 0, 1.0)
    assert torch.equal(first, second) and (first - alone).norm() <= 1e-12 * alone.norm()
    assert sum(rows) == sum(alone_rows) == 3 * NUM


@pytest.mark.parametrize("world", [4], scope="session")
def test_the_noise_is_that_of_one_rank_to_the_bit(ranks, world):
    alone = first_noise(single())
    found = ranks.run(world, first_noise, cfg=2)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert torch.equal(torch.cat([found[0], found[2]]), alone)


def first_noise(mesh):
    """What the solver of this rank starts from, of four pictures."""
    composed, params, _ = composed_on(mesh)
    seen, told = [], sample.solvers.sample

    def noting(objective, model, noise, **settings):
        seen.append(noise)
        return told(objective, model, noise, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample.solvers, "sample", noting)
        sample.sample(composed, params, sample.spread_labels(4, 10), random.key(3))
    return torch.cat(seen)


@pytest.mark.parametrize(
    ("changes", "world", "told"),
    [
        ({}, 3, "parallel.cfg 2 does not divide dp, which is 3: use 1, or start 4 ranks"),
        ({}, 1, "parallel.cfg 2 does not divide dp, which is 1: use 1, or start 2 ranks"),
        (
            {"sampling": Sampling("sde", 3, Guidance(1.0))},
            2,
            r"parallel.cfg is 2 but sampling.guidance.scale 1.0 has no null pass .*: use parallel.cfg 1, or another",
        ),
        (
            {"model": dataclasses.replace(RUN.model, label_dropout=0.0)},
            2,
            "sampling.guidance.scale is 2.0 but model.label_dropout 0.0 trains no null label: use --model.label-drop",
        ),
    ],
)
def test_refusals(changes, world, told):
    run = dataclasses.replace(RUN, parallel=Parallel(cfg=2), **changes)
    with pytest.raises(ValueError, match=told):
        checks.check(run, world=world)


def test_data_without_classes_is_refused():
    run = dataclasses.replace(RUN, parallel=Parallel(cfg=2))
    with pytest.raises(ValueError, match=r"parallel.cfg is 2 but the data has 0 classes .*: use parallel.cfg 1"):
        checks.check(run, Shape(1, 8, 0), world=2)
    folder = config.presets()["folder"][1]
    folder = dataclasses.replace(folder, data=dataclasses.replace(folder.data, path="x"), parallel=Parallel(cfg=2))
    checks.check(folder, world=2)  # a folder's classes are not known before it is opened


def test_an_odd_dp_beside_sp():
    with pytest.raises(ValueError, match=r"parallel.cfg 2 does not divide dp, which is 3: use 1, or start 8 ranks"):
        check_mesh(6, None, 2, 2)
    assert check_mesh(8, None, 2, 2) == (4, 2)


@pytest.mark.slow
def test_the_sample_script_with_pairs(tmp_path):
    """A run that was not guided, drawn with guidance on two ranks."""
    run = dataclasses.replace(RUN, sampling=Sampling("euler", 2, Guidance(1.0)))
    composed = plan.make(run, opened())
    params = composed_on(single())[1]
    params = sample.tree.map(torch.Tensor.float, params)
    about = {"config": to_json(run), "shape": dataclasses.asdict(composed.shape)}
    checkpoint.save_weights(tmp_path / "ema.safetensors", params, about)
    torchrun(
        2, "sample.py", "--checkpoint", tmp_path / "ema.safetensors", "--out", tmp_path / "x.png",
        "--tensors", tmp_path / "x.safetensors", "--num", "5", "--seed", "3", "--parallel.cfg", "2", "--guidance", "3",
    )  # fmt: skip
    guided = dataclasses.replace(run.sampling, guidance=Guidance(3.0))
    alone = sample.sample(composed, params, sample.spread_labels(5, 10), random.key(3), sampling=guided)
    assert (load_file(tmp_path / "x.safetensors")["samples"] - alone).abs().max() < 1e-5
