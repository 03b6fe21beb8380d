"""Sampling, validation and evaluation over ranks: the same values on every rank and world, a share of the work each."""

import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import redraw
from safetensors.torch import load_file

from odit import checkpoint, config, data, evaluate, metrics, optim, plan, random, sample, tree, validate
from odit.config_json import to_json
from odit.data import BadSample, DataError
from odit.data.dataset import READ_KEY
from odit.draws import draw
from odit.models import dit
from odit.parallel.mesh import single

RUN = dataclasses.replace(
    config.presets()["digits"][1],
    global_batch=12,
    validation_draws=5,
    model=dit.Config(width=24, depth=2, heads=4, patch=2),
    optimizer=optim.Config(),
    sampling=config.Sampling(solver="sde", steps=3, guidance=config.Guidance(scale=2.0)),
)
NUM_HELD, NUM_PICTURES, BATCH = 11, 17, 4  # 11 x 5 validation draws and 17 pictures divide over neither 2 nor 3 ranks
WORLDS = pytest.mark.parametrize("world", [1, 2, 3], scope="session")
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


class Few:
    """The digits in fp64, eleven of them held out; those whose place among these is in ``bad`` cannot be read."""

    def __init__(self, bad=()):
        self.digits = opened()
        self.shape, self.num_classes = self.digits.shape, self.digits.num_classes
        self.held_out_ids = self.digits.held_out_ids[:NUM_HELD]
        self.train_ids = self.digits.train_ids[:200]
        self.bad = {int(self.held_out_ids[place]): f"held-out {place}" for place in bad}

    def read(self, ids, key=READ_KEY):
        for one in torch.as_tensor(ids).tolist():
            if one in self.bad:
                raise BadSample(self.bad[one], "torn")
        x, y = self.digits.read(ids)
        return x.double(), y


@functools.lru_cache
def opened():
    return data.open_dataset(RUN.data)


def composed_on(mesh, stage=0, dataset=None, **changes):
    """An fp64 plan, this rank's parts of re-drawn weights, and a list that fills with the rows of each forward pass."""
    run = dataclasses.replace(RUN, parallel=config.Parallel(zero=stage), **changes)
    composed, rows = plan.make(run, dataset or Few(), mesh), []

    def enter(x_BLD, *tables):
        rows.append(len(x_BLD))
        return composed.ops.enter(x_BLD, *tables)

    counted = dataclasses.replace(composed.ops, enter=enter)
    counting = dataclasses.replace(composed, dtype=torch.float64, kernels=counted)
    specs = counting.layout.specs
    params = tree.map(lambda w, s: s.take(w, mesh.all.rank).clone(), redraw(counting.declared), specs)
    return counting, params, rows


def share(num, world):
    return math.ceil(num / world)


def all_equal(found):
    return all(f == found[0] for f in found)


# ------------------------------------------------------------------------------------------------------------- sampling


def pictures_on(mesh, stage=0):
    composed, params, rows = composed_on(mesh, stage)
    labels = sample.spread_labels(NUM_PICTURES, 10)
    return sample.sample(composed, params, labels, random.key(3), start=5, batch=BATCH), rows


@pytest.fixture(scope="module")
def one_rank_pictures():
    return pictures_on(single())[0]


@WORLDS
@STAGES
def test_pictures_are_shared_out_and_gathered(ranks, one_rank_pictures, world, stage):
    pictures, rows = zip(*ranks.run(world, pictures_on, stage))
    assert pictures[0].shape == (NUM_PICTURES, 1, 8, 8) and pictures[0].dtype == torch.float32
    assert all(torch.equal(p, pictures[0]) for p in pictures)
    assert (pictures[0] - one_rank_pictures).norm() <= 1e-12 * one_rank_pictures.norm()
    assert all_equal(rows), "ZeRO-3 gathers in every pass: ranks that call the model unequally often wait for ever"
    assert sum(rows[0]) == 2 * RUN.sampling.steps * share(NUM_PICTURES, world)  # 2: guidance
    assert max(rows[0]) <= 2 * BATCH


@WORLDS
def test_fewer_pictures_than_ranks(ranks, world):
    assert [len(found) for found in ranks.run(world, one_picture)] == [1] * world


def one_picture(mesh):
    composed, params, _ = composed_on(mesh, 3)
    return sample.sample(composed, params, torch.tensor([7]), random.key(3))


# ----------------------------------------------------------------------------------------------------------- validation


def validated_on(mesh, stage=0, bad=(), grad_norms=False):
    """Figures (None where there are none), rows a forward pass, and what this rank was told cannot be read."""
    dataset, told = Few(bad[mesh.rank] if isinstance(bad, dict) else bad), []
    composed, params, rows = composed_on(mesh, stage, dataset, grad_norms=grad_norms)
    try:
        found = validate.validate(composed, params, dataset, lambda path, reason: told.append(path))
    except DataError as error:
        assert str(error) == f"none of the {NUM_HELD} held-out samples can be read"
        found = None
    return found, rows, told


@pytest.fixture(scope="module")
def one_rank_figures():
    """Figures of one rank by (bad, grad_norms)."""
    return functools.lru_cache(lambda bad, grad_norms: validated_on(single(), 0, bad, grad_norms)[0])


def agree(found, expected):
    """Whether figures have the same names and agree to rounding in fp64."""
    return found.keys() == expected.keys() and all(
        abs(value - expected[name]) <= 1e-12 * abs(expected[name]) for name, value in found.items()
    )


@WORLDS
@STAGES
def test_validation_is_shared_out_and_gathered(ranks, one_rank_figures, world, stage):
    figures, rows, _ = zip(*ranks.run(world, validated_on, stage))
    assert all_equal(figures) and agree(figures[0], one_rank_figures((), False))
    assert all_equal(rows) and sum(rows[0]) == share(NUM_HELD * RUN.validation_draws, world)
    assert max(rows[0]) <= RUN.global_batch // world


def test_validation_means_are_those_of_a_loop():
    """One sample at a time, each repeat on its own, against the figures of one rank."""
    composed, params, _ = composed_on(single())
    dataset, losses = Few(), []
    for repeat in range(RUN.validation_draws):
        for one in dataset.held_out_ids:
            x, y = dataset.read(one[None])
            draws = draw(composed, one[None] + (repeat << 32), (1, 8, 8), validate.KEY)
            losses.append(float(validate.train.losses(composed, params, composed.ops, x, y, draws)))
    expected = sum(losses) / len(losses)
    assert abs(validated_on(single())[0]["loss"] - expected) <= 1e-12 * expected


@WORLDS
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradient_norms_are_shared_out_and_gathered(ranks, one_rank_figures, world, stage):
    figures, rows, normed = zip(*ranks.run(world, norms_on, stage))
    assert all_equal(figures) and agree(figures[0], one_rank_figures((), True))
    assert any(name.startswith("grad_norm_t") for name in figures[0])
    assert all_equal(rows) and normed == (share(NUM_HELD * RUN.validation_draws, world),) * world


def norms_on(mesh, stage):
    """Figures, rows a forward pass (1 under vmap), and of how many samples this rank took the norm."""
    norms, normed = validate.sample_grad_norms, []

    def noting(plan, params, x, *rest):
        normed.append(len(x))
        return norms(plan, params, x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "sample_grad_norms", noting)
        found, rows, _ = validated_on(mesh, stage, (), True)
    return found, rows, sum(normed)


@WORLDS
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("bad", [(0, 4, 10), (10,), tuple(range(10))], ids=str)
def test_pictures_that_cannot_be_read_are_left_out_alike(ranks, one_rank_figures, world, stage, bad):
    """Place 10 is the last sample, which is repeated where the ranks' shares do not come out even."""
    figures, rows, told = zip(*ranks.run(world, validated_on, stage, bad))
    assert all_equal(figures) and agree(figures[0], one_rank_figures(bad, False))
    assert all_equal(rows)
    assert sorted(itertools.chain(*told)) == sorted(f"held-out {place}" for place in bad), "told of once, on one rank"


def test_a_picture_that_cannot_be_read_needs_no_null_label():
    """Something stands in for its label where the model has no row for the null label."""
    model = dataclasses.replace(RUN.model, label_dropout=0.0)
    dataset, sampling = Few((3,)), config.Sampling(guidance=config.Guidance(scale=1.0))
    composed, params, _ = composed_on(single(), 0, dataset, model=model, sampling=sampling)
    assert math.isfinite(validate.validate(composed, params, dataset)["loss"])


@pytest.mark.parametrize("world", [2, 3], scope="session")
@pytest.mark.parametrize("stage", [0, 3])
def test_a_picture_that_one_rank_cannot_read_keeps_the_ranks_together(ranks, world, stage):
    figures, rows, told = zip(*ranks.run(world, validated_on, stage, {0: (), 1: (2, 6), 2: ()}))
    assert all_equal(figures) and all_equal(rows)
    assert told[1] and not told[0]


@WORLDS
def test_no_readable_picture_is_an_error_on_every_rank(ranks, world):
    figures, rows, _ = zip(*ranks.run(world, validated_on, 3, tuple(range(NUM_HELD))))
    assert figures == (None,) * world and all_equal(rows)


# ----------------------------------------------------------------------------------------------------------- evaluation


def evaluated_on(mesh, stage=0):
    """Figures, rows a forward pass and how many judges this rank trained; a rank's own judge would be another one."""
    composed, params, rows = composed_on(mesh, stage)
    train_judge, trained = metrics.train_judge, []

    def train_own(*args, **settings):
        trained.append(mesh.rank)
        *args, key = args
        return train_judge(*args, random.fold_in(key, mesh.rank) if mesh.rank else key, **settings, epochs=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "train_judge", train_own)
        found = evaluate.evaluate(composed, params, FewFloats(), num=21)
    return found, rows, len(trained)


class FewFloats(Few):
    """The same in fp32, for the judge."""

    def read(self, ids, key=READ_KEY):
        x, y = super().read(ids)
        return x.float(), y


@WORLDS
@pytest.mark.parametrize("stage", [0, 3])
def test_evaluation_draws_on_all_ranks_and_judges_on_one(ranks, one_rank_evaluation, world, stage):
    figures, rows, judges = zip(*ranks.run(world, evaluated_on, stage))
    assert all_equal(figures)
    for name, value in figures[0].items():
        # pictures are equal to the bit or nearly so; the judge looks at them in fp32
        assert value == pytest.approx(one_rank_evaluation[name], rel=1e-5), name
    assert all_equal(rows) and sum(rows[0]) == 2 * RUN.sampling.steps * share(21, world)
    assert judges == (1,) + (0,) * (world - 1)


@pytest.fixture(scope="module")
def one_rank_evaluation():
    return evaluated_on(single())[0]


# -------------------------------------------------------------------------------------------------------------- scripts


def test_the_sample_script_under_torchrun(tmp_path):
    """Three ranks draw what one draws, and one of them writes and tells."""
    composed = plan.make(RUN, opened())
    params = redraw(composed.declared, dtype=torch.float32)
    about = {"config": to_json(RUN), "shape": dataclasses.asdict(composed.shape)}
    checkpoint.save_weights(tmp_path / "ema.safetensors", params, about)
    told = torchrun(
        3, "sample.py", "--checkpoint", tmp_path / "ema.safetensors", "--out", tmp_path / "x.png",
        "--tensors", tmp_path / "x.safetensors", "--num", "7", "--seed", "3",
    )  # fmt: skip
    assert told.count("7 samples: ") == 1
    alone = sample.sample(composed, params, sample.spread_labels(7, 10), random.key(3))
    # a matrix product's bits depend on its number of rows
    assert (load_file(tmp_path / "x.safetensors")["samples"] - alone).abs().max() < 1e-5


def torchrun(num, script, *args):
    """Standard output of a script on ``num`` ranks; the ``--`` keeps torchrun from reading the script's options."""
    root = Path(__file__).parent.parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num), "--"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*launcher, root / "experiments" / script, *args], capture_output=True, text=True, env=environment, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
