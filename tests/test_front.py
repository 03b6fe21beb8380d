"""Captions and frozen encoders in whole runs: what enters the loss, guidance, and many ranks."""

import csv
import dataclasses
import functools
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from conftest import redraw
from PIL import Image

from odit import checks, config, data, plan, random, sample, train, tree, validate
from odit.config import Guidance, Parallel, Sampling
from odit.data import loader
from odit.draws import draw
from odit.encoders.config import Config as Encoders
from odit.models import dit
from odit.parallel.mesh import single

KEY = random.key(5)
SECONDS = 120.0  # of a case: the first one in a process loads the libraries of the encoders
WORDS = ("a red square", "a blue circle", "", "a photo of a green square")


@functools.cache
def folder():
    """Twelve pictures with captions, a tiny autoencoder and a tiny CLIP; one a process."""
    path = Path(tempfile.mkdtemp())
    tiny.kl(path / "vae")
    tiny.clip(path / "clip")
    with open(path / "table.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "caption"))
        for i in range(12):
            pixels = random.bits(random.fold_in(KEY, "picture", i), (3, 16, 16)) % 256
            Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy()).save(path / f"{i}.png")
            rows.writerow((f"{i}.png", WORDS[i % 4]))
    return path


def run_of(**changes):
    """A run on these pictures, of 8 x 8 latents."""
    path = folder()
    run = dataclasses.replace(
        config.presets()["captions"][1],
        **{"device": "cpu", "threads": 1, "steps": 3, "global_batch": 4, "progress": False, "validation_draws": 2},
        data=data.Config(source="table", path=path / "table.csv", image_size=16, held_out=0.25),
        model=dit.Config(width=24, depth=2, heads=4, patch=2, label_dropout=0.3),
        encoders=Encoders("clip", str(path / "clip"), 8, "kl", str(path / "vae")),
        sampling=Sampling(solver="euler", steps=2, guidance=Guidance(scale=2.0)),
    )
    return dataclasses.replace(run, **changes)


def three_steps(mesh, run):
    """Losses and digests, a validation loss and two pictures."""
    front = plan.load_front(run, mesh)
    dataset = data.open_dataset(run.data, front.tokenize)
    composed = plan.make(run, dataset, mesh, front)
    state, step, log = train.init_state(composed, KEY), train.make_step(composed), []
    part = (mesh.dp.rank, mesh.dp.size)
    for batch in loader.batches(dataset, KEY, global_batch=run.global_batch, stop=3, part=part):
        state, metrics = step(state, batch, KEY)
        log.append((metrics["loss"], metrics["draw_digest"]))
    pictures = sample.sample(composed, state.params, sample.previews(composed, dataset, 2, 2), KEY)
    return log, validate.validate(composed, state.params, dataset)["loss"], pictures


@pytest.fixture(scope="module")
def alone():
    return three_steps(single(), run_of())


@pytest.mark.parametrize(
    "world, place, layout",
    [
        (2, "shard", Parallel(zero=3)),
        (2, "host", Parallel(zero=2, sp=2, sequence="fastseq")),
        (3, "shard", Parallel(sp=3, sequence="megatron", zero=3)),
    ],
)
def test_encoded_samples_are_the_same_on_any_ranks(ranks, alone, world, place, layout):
    run = run_of(parallel=layout)
    run = dataclasses.replace(run, encoders=dataclasses.replace(run.encoders, place=place))
    for log, loss, pictures in ranks.run(world, three_steps, run, sp=layout.sp or 1, timeout_s=SECONDS):
        assert [word for _, word in log] == [word for _, word in alone[0]]
        assert [loss for loss, _ in log] == pytest.approx([loss for loss, _ in alone[0]], abs=1e-5)
        assert loss == pytest.approx(alone[1], abs=1e-5) and (pictures - alone[2]).abs().max() <= 1e-4


def test_the_loss_is_of_scaled_draws_and_of_what_the_encoder_says():
    """Against the same written out: diffusers' moments, the keyed noise, the features of the captions as dropped."""
    run = run_of()
    front = plan.load_front(run)
    dataset = data.open_dataset(run.data, front.tokenize)
    composed = plan.make(run, dataset, None, front)
    params = redraw(composed.declared, dtype=torch.float32)
    (batch,) = loader.batches(dataset, KEY, global_batch=4, stop=1)
    mean, logvar = front.vae.moments(front.vae_weights.weights(), batch.x)
    noise = random.normal(random.fold_in(KEY, "vae"), tuple(mean.shape[1:]), batch.ids_B)
    z = (mean + torch.exp(0.5 * logvar) * noise - front.vae.shift) * front.vae.scale
    latents = front.latents(batch.x, batch.ids_B, KEY)
    assert torch.allclose(latents, z, atol=1e-6) and latents.shape == (4, *composed.shape.sample)
    draws = draw(composed, batch.ids_B, tuple(z.shape[1:]), KEY)
    captions = [WORDS[int(i)] for i in (batch.ids_B & random.MASK) % 4]
    words = ["" if dropped else caption for caption, dropped in zip(captions, draws.dropped_B.tolist())]
    assert 0 < sum(draws.dropped_B.tolist()) < 4
    y = front.text.encode(front.text_weights.weights(), front.tokenize(words))
    out = dit.forward(params, composed.objective.corrupt(z, draws.t_B, draws.noise),
                      composed.objective.network_time(draws.t_B), y, run.model)  # fmt: skip
    expected = (out - (z - draws.noise)).square().flatten(1).mean(1)
    found = train.losses(composed, params, composed.ops, latents, batch.y, draws)
    assert torch.allclose(found, expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- guidance


def demo(kind):
    """A plan whose conditions are classes, captions by cross-attention, or one vector of them; re-drawn weights."""
    source = "digits" if kind == "class" else "digits-text"
    reads = {} if kind == "class" else {"text_depth": 1, "text": kind}
    run = dataclasses.replace(
        config.presets()[source][1],
        **{"device": "cpu", "threads": 1, "sampling": Sampling(solver="euler", steps=2, guidance=Guidance(scale=3.0))},
        model=dit.Config(width=24, depth=2, heads=4, patch=2, **reads),
    )
    front = plan.load_front(run)
    dataset = data.open_dataset(run.data, front.tokenize)
    composed = plan.make(run, dataset, None, front)
    return composed, redraw(composed.declared, dtype=torch.float32), sample.previews(composed, dataset, 4, 10)


@pytest.mark.parametrize("kind", ["class", "cross", "pooled"])
def test_guidance_guides(kind, monkeypatch):
    """Conditional and null outputs differ; the null condition is what training drops to; scale 1 is the conditional
    pass alone, bit for bit, and other scales are null + scale (conditional - null)."""
    composed, params, shown = demo(kind)
    nulls = tree.map(lambda c, null: null.expand(c.shape), shown, composed.null)
    seen, forward = [], plan.Plan.forward

    def noted(self, params, x, t, y, ops):
        seen.append(y)
        return forward(self, params, x, t, y, ops)

    monkeypatch.setattr(plan.Plan, "forward", noted)
    drawn = {}
    for scale in (1.0, 3.0):
        sampling = dataclasses.replace(composed.run.sampling, guidance=Guidance(scale=scale))
        drawn[scale] = sample.sample(composed, params, shown, KEY, sampling=sampling)
        size = len(tree.leaves(seen[-1])[0])
        assert size == (4 if scale == 1 else 8)  # scale 1 has no null pass
    second = tree.map(lambda c: c[4:], seen[-1])
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(second), tree.leaves(nulls)))
    dropped = train.conditions(composed, shown, torch.ones(4, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(dropped), tree.leaves(nulls)))
    null_alone = sample.sample(composed, params, nulls, KEY, sampling=sampling)
    assert (drawn[1.0] - null_alone).abs().max() > 1e-3 and (drawn[3.0] - drawn[1.0]).abs().max() > 1e-3

    x, t = random.normal(KEY, composed.shape.sample, torch.arange(4)), torch.full((4,), 500.0)
    first = seen[0]
    plain = composed.forward(params, x, t, shown, composed.ops)
    assert torch.equal(composed.forward(params, x, t, first, composed.ops), plain)


def test_other_wording_or_caption_changes_only_its_own_sample():
    composed, params, shown = demo("cross")
    x, t = random.normal(KEY, composed.shape.sample, torch.arange(4)), torch.full((4,), 500.0)
    other = composed.tokenize(["a six"])
    changed = tree.map(lambda c, new: torch.cat([c[:2], new, c[3:]]), shown, other)
    a, b = (composed.forward(params, x, t, y, composed.ops) for y in (shown, changed))
    assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]]) and not torch.equal(a[2], b[2])


def test_encoders_that_nothing_uses_are_refused():
    for run, said in (
        (dataclasses.replace(config.presets()["digits"][1], encoders=Encoders("clip", "x")), "has no captions"),
        (dataclasses.replace(config.presets()["digits"][1], encoders=Encoders(vae="kl", vae_path="x")), "3 channels"),
        (run_of(encoders=Encoders(vae="kl")), "vae_path is not given"),
        (run_of(encoders=Encoders(place="host")), "nothing is frozen"),
        (run_of(encoders=Encoders(text_path="x")), "reads no file"),
    ):
        with pytest.raises(ValueError, match=said):
            checks.check(run)
