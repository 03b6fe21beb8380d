"""Whole runs on samples of mixed sizes: every layout sees the same steps, and nothing is read at another's size."""

import csv
import dataclasses
import json
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from test_clips import write_clip
from test_runs import metrics, same_tensors, state, train_script
from tiny import kl

from odit import checks, config, data, memory, optim, plan, random, tree, validate
from odit import train as training
from odit.config import Parallel
from odit.config_json import first_difference, from_json, to_json
from odit.data import loader
from odit.data.dataset import READ_KEY
from odit.models import dit
from odit.parallel.mesh import single

KEY = random.key(3)
STEPS = 6
SIZES = ("8x8", "8x16", "16x8")
SHAPES = {(3, 8, 8), (3, 8, 16), (3, 16, 8)}


def write_picture(path: Path, height: int, width: int) -> None:
    """A picture of noise that its name decides."""
    noise = numpy.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 255, (height, width, 3))
    Image.fromarray(noise.astype(numpy.uint8)).save(path)


def write_table(folder: Path, rows: list[tuple[str, str]]) -> Path:
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])
    return folder / "table.csv"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A table of 50 pictures in three shapes and one that is none."""
    folder, rows = tmp_path_factory.mktemp("mixed"), []
    for i in range(50):
        height, width = ((12, 12), (10, 20), (24, 12))[i * i % 7 % 3]
        write_picture(folder / f"{i}.png", height, width)
        rows.append((f"{i}.png", f"picture {i}"))
    (folder / "none.png").write_bytes(b"no picture")
    return write_table(folder, [*rows, ("none.png", "none")])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A table of clips of 6 frames, pictures of two shapes, and a clip of 2 frames."""
    folder, rows = tmp_path_factory.mktemp("clips"), []
    for i in range(6):
        write_clip(folder / f"{i}.mp4", num=2 if i == 5 else 6, size=(16, 32))
        write_picture(folder / f"{i}.png", 16, (16, 8)[i % 2])
        rows += [(f"{i}.mp4", f"clip {i}"), (f"{i}.png", f"picture {i}")]
    return write_table(folder, rows)


def run_on(path: Path, sizes=SIZES, **changes) -> config.Run:
    model = changes.pop("model", {})
    found = config.Run(
        **{"steps": STEPS, "global_batch": 6, "device": "cpu", "threads": 1, "progress": False, "log_every": 1},
        **{"validation_draws": 1, "micro_batch": 2},
        data=data.Config("table", path, buckets=sizes, held_out=0.2),
        encoders=dataclasses.replace(config.Run().encoders, text_length=8),
        model=dit.Config(**{"width": 16, "depth": 2, "heads": 2, "patch": 4, "text_depth": 1, **model}),
        optimizer=optim.Config(lr=1e-2, eps=1e-4, clip=1.0),
        sampling=config.Sampling(solver="euler", steps=2, guidance=config.Guidance(scale=2.0)),
    )
    return dataclasses.replace(found, **changes)


def opened(run: config.Run) -> data.Dataset:
    return data.open_dataset(run.data, plan.load_front(run).tokenize)


def some_steps(mesh, run):
    """Loss, digest, sample ids and shape of each step, and the validation loss after the last."""
    dataset = opened(run)
    composed = plan.make(run, dataset, mesh)
    state, step, share = training.init_state(composed, KEY), training.make_step(composed), (mesh.dp.rank, mesh.dp.size)
    log = []
    for batch in loader.batches(dataset, KEY, global_batch=run.global_batch, stop=run.steps, part=share):
        state, found = step(state, batch, KEY)
        log.append((found["loss"], found["draw_digest"], batch.ids_B.tolist(), tuple(batch.x.shape)))
    return log, validate.validate(composed, state.ema, dataset)


def assert_same_run(found, alone, dp):
    """Losses within 1e-5, digests bit for bit; the ranks' shares are equal and join to one rank's batches."""
    log, validated = alone
    for s, (loss, word, ids, shape) in enumerate(log):
        for rank_log, _ in found:
            assert rank_log[s][1] == word and abs(rank_log[s][0] - loss) <= 1e-5
            assert rank_log[s][3] == (shape[0] // dp, *shape[1:])
        assert [i for rank_log, _ in found[:: len(found) // dp] for i in rank_log[s][2]] == ids
    for _, told in found:
        assert told.keys() == validated.keys() and all(abs(told[k] - validated[k]) <= 1e-5 for k in told)


@pytest.fixture(scope="module")
def alone(pictures):
    return some_steps(single(), run_on(pictures))


def test_every_step_is_of_one_bucket_and_all_have_steps(alone):
    shapes = [shape for *_, shape in alone[0]]
    assert {shape[1:] for shape in shapes} == SHAPES and all(shape[0] == 6 for shape in shapes)


@pytest.mark.every(3)
@pytest.mark.parametrize("stage, sp, sequence", [(0, 1, "auto"), (3, 1, "auto"), (0, 3, "ulysses"), (3, 3, "ring")])
def test_three_ranks_see_what_one_does(ranks, pictures, alone, stage, sp, sequence):
    """Tokens are 4 and 8 a sample: over three ranks the shares differ from bucket to bucket."""
    run = run_on(pictures, parallel=Parallel(zero=stage, sp=sp, sequence=sequence))
    assert_same_run(ranks.run(3, some_steps, run, sp=sp), alone, 3 // sp)


# Reading


def test_a_sample_is_read_at_its_buckets_size(pictures):
    dataset = opened(run_on(pictures))
    for b, (part, size) in enumerate(zip(dataset.parts, ((8, 8), (8, 16), (16, 8)), strict=True)):
        assert part.shape == (3, *size) and len(part.train_ids) and len(part.held_out_ids)
        ids = torch.cat([part.train_ids, part.held_out_ids])
        assert dataset.assignment.bucket_N[ids].eq(b).all()
        plain = data.open_dataset(
            data.Config("table", pictures, image_size=size[0], image_width=size[1]),
            plan.load_front(run_on(pictures)).tokenize,
        )
        for x, y in (dataset.read(ids), part.read(ids)):
            x_, y_ = plain.read(ids)
            assert torch.equal(x, x_) and torch.equal(y["tokens"], y_["tokens"])
    every = torch.cat([dataset.train_ids, dataset.held_out_ids]).sort().values
    assert torch.equal(every, torch.arange(50))  # all but the last, which is no picture


def test_a_folder_in_buckets(tmp_path):
    for i in range(12):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        write_picture(tmp_path / "ab"[i % 2] / f"{i}.png", *((9, 9), (8, 16))[i // 2 % 2])
    dataset = data.open_dataset(data.Config("folder", tmp_path, buckets=("8x8", "8x16"), held_out=0.2))
    assert dataset.class_names == ["a", "b"] and dataset.shape == (3, 8, 8)
    shapes = {
        tuple(batch.x.shape) for batch in loader.batches(dataset, KEY, global_batch=2, stop=12, workers=0, flip=True)
    }
    assert shapes == {(2, 3, 8, 8), (2, 3, 8, 16)}


def test_worker_processes_change_nothing(pictures):
    dataset = opened(run_on(pictures))
    expected = list(loader.batches(dataset, KEY, global_batch=6, stop=4))
    found = list(loader.batches(dataset, KEY, global_batch=6, stop=4, workers=1))
    for a, b in zip(found, expected, strict=True):
        assert all(map(torch.equal, tree.leaves(list(a)), tree.leaves(list(b))))


def test_substitutes_are_of_the_same_bucket(pictures):
    """A quarter of the samples turns out bad when they are read: every step still has its bucket's shape."""
    run = run_on(pictures)
    dataset, whole = opened(run), opened(run)
    read_as = {}
    for b, part in enumerate(dataset.parts):

        def torn(ids, key=READ_KEY, b=b, read=part.read):
            for i in (torch.as_tensor(ids) & random.MASK).tolist():
                if i % 4 == 1:
                    raise data.BadSample(f"picture {i}", "torn")
                read_as.setdefault(i, set()).add(b)
            return read(ids, key)

        part.read = torn
    found = list(loader.batches(dataset, KEY, global_batch=6, stop=12, bad_budget=1.0))
    expected = list(loader.batches(whole, KEY, global_batch=6, stop=12))
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch.ids_B, other.ids_B) and batch.x.shape == other.x.shape
    bucket_N = dataset.assignment.bucket_N
    assert read_as and all(bs == {int(bucket_N[i])} and i % 4 != 1 for i, bs in read_as.items())


def test_too_many_unreadable_samples_are_listed(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(b"")
    write_picture(tmp_path / "good.png", 8, 8)
    table = write_table(tmp_path, [(path.name, "") for path in sorted(tmp_path.glob("*.png"))])
    with pytest.raises(data.DataError, match=r"12 bad samples among 13 read(.|\n)*11.png: zero bytes"):
        opened(run_on(table))


# The plan


def test_the_plan_tells_what_is_trained_and_what_is_dropped(pictures):
    run = run_on(pictures)
    dataset = opened(run)
    counts = [len(part.train_ids) for part in dataset.parts]
    lines = plan.describe(plan.make(run, dataset)).splitlines()
    told = [line for line in lines if line.startswith(("bucket", "dropped", "skipped", "validation"))]
    for line, size, count, tokens in zip(told, SIZES, counts, (4, 8, 8)):
        assert line.startswith(f"bucket {size}: {count} samples of {tokens} tokens, ")
    held_out = sum(len(part.held_out_ids) for part in dataset.parts)
    left_out = "; 1 held-out sample without a bucket left out" if held_out < 10 else ""
    assert told[3:] == [
        "dropped 1 of 51 samples: 1 unreadable",
        f"skipped {pictures.parent}/none.png: not an image (UnidentifiedImageError)",
        f"validation: {held_out} samples, bucket by bucket{left_out}",
    ]


def test_memory_is_planned_for_the_largest_bucket(pictures):
    run = run_on(pictures, ("8x8", "8x16"))
    composed = plan.make(run, opened(run))
    assert composed.shape.size == (8, 8) and plan.largest(composed).shape.size == (8, 16)
    assert memory.predict(plan.largest(composed)).peak > memory.predict(composed).peak


def test_the_setting_survives_json(pictures):
    run = run_on(pictures)
    assert from_json(config.Run, json.loads(json.dumps(to_json(run)))) == run
    other = to_json(run_on(pictures, SIZES[:2]))
    assert first_difference(to_json(run), other) == ("data.buckets", list(SIZES), list(SIZES[:2]))
    with pytest.raises(ValueError, match=r"data\.buckets is 8"):
        from_json(config.Run, {"data": {"buckets": 8}})
    assert opened(run).fingerprint() != opened(run_on(pictures, SIZES[::-1])).fingerprint()


# What is refused


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"buckets": ("8x8", "12")}, r"data\.buckets has '12'"),
        ({"buckets": ("8x8", "8x12", "1x8x8")}, r"data\.buckets has 8x8 twice"),
        ({"image_size": 8}, r"data\.image_size is 8 but data\.buckets .*: use --data\.image-size None"),
        ({"image_width": 8}, r"data\.image_width is 8 .*: use --data\.image-width None"),
        ({"frames": 2}, r"data\.frames is 2 .*: use --data\.frames None"),
        ({"source": "folder", "buckets": ("8x8", "2x8x8")}, r"data\.buckets has 2x8x8 but data\.source folder"),
        ({"source": "digits", "path": None}, r"data\.buckets is '8x8 8x16 16x8', which data\.source digits .*: leave"),
    ],
)
def test_wrong_settings_are_refused(settings, told):
    run = run_on(Path("table.csv"))
    with pytest.raises(ValueError, match=told):
        checks.check(dataclasses.replace(run, data=dataclasses.replace(run.data, **settings)))


@pytest.mark.parametrize(
    "sizes, changes, told",
    [
        (("8x8", "8x10"), {}, r"data\.buckets has 8x10, and model\.patch 4 does not divide"),
        (("8x10", "8x8"), {}, r"data\.buckets has 8x10, and model\.patch 4 does not divide"),
        (
            ("8x8", "4x4"),
            {"parallel": Parallel(sp=3)},
            r"data\.buckets has 4x4, and parallel\.sp 3 is more than the 1 ",
        ),
        (("4x8x8", "8x8"), {"model": {"arch": "latte"}}, r"data\.buckets has 8x8, and model\.arch latte attends along"),
        (("4x8x8", "8x8"), {"model": {"frame_patch": 2}}, r"data\.buckets has 8x8, and model\.frame_patch 2 does not"),
    ],
)
def test_a_bucket_that_cannot_be_served_is_named(sizes, changes, told):
    run = run_on(Path("table.csv"), sizes, **changes)
    with pytest.raises(ValueError, match=told):
        checks.check(run, world=3)


def test_offload_by_measured_memory_is_refused(monkeypatch):
    run = run_on(Path("table.csv"), parallel=Parallel(offload="auto", zero=2))
    monkeypatch.setattr(checks, "_check_offload", lambda run: None)  # there is no GPU here
    with pytest.raises(ValueError, match=r"parallel\.offload auto .* data\.buckets differ"):
        checks.check(run)


def test_a_bucket_that_the_vae_cannot_take_is_named(tmp_path, pictures):
    encoders = dataclasses.replace(run_on(pictures).encoders, vae="kl", vae_path=kl(tmp_path / "kl", levels=2))
    run = run_on(pictures, ("8x8", "8x16"), encoders=encoders, model={"patch": 2})
    composed = plan.make(run, opened(run))
    assert composed.sizes == ((4, 4), (4, 8)) and composed.shape.size == (4, 4)
    (batch,) = loader.batches(opened(run), KEY, global_batch=6, stop=1)
    latent = composed.front.latents(batch.x, batch.ids_B, KEY)
    assert latent.shape == (6, 4, batch.x.shape[2] // 2, batch.x.shape[3] // 2)
    odd = run_on(pictures, ("8x8", "8x9"), encoders=encoders)
    with pytest.raises(ValueError, match=r"data\.buckets has 8x9, and width 9 is no multiple of the VAE's factor 2"):
        plan.make(odd, opened(odd))


def test_sizes_that_nothing_fills_are_refused(pictures):
    run = run_on(pictures, ("4x8x8",))
    with pytest.raises(data.DataError, match=r"data\.buckets leave no sample to train on"):
        plan.make(run, opened(run))


# Pictures and clips together


def test_a_video_model_learns_of_pictures_and_clips(ranks, mixed):
    """A picture is a clip of one frame; the clip too short for the clips' bucket gives one of its frames."""
    run = run_on(mixed, ("4x8x16", "8x8"), model={"positions": "rotary"})
    alone = some_steps(single(), run)
    assert {shape for *_, shape in alone[0]} == {(6, 3, 4, 8, 16), (6, 3, 1, 8, 8)}
    dataset = opened(run)
    assert dataset.assignment.bucket_N.tolist() == [0, 1] * 5 + [1, 1]
    found = ranks.run(3, some_steps, dataclasses.replace(run, parallel=Parallel(sp=3, sequence="ring")), sp=3)
    assert_same_run(found, alone, 1)


# Whole runs


def test_resume_is_exact(tmp_path, mixed):
    """6 steps against 3, resume, 3, with validation and samples: bit for bit."""
    sizes = ("8x8", "4x8x16", "16x8")
    whole, parted = (run_on(mixed, sizes, out=tmp_path / name, validate_every=4) for name in ("whole", "parted"))
    train_script.main(whole)
    train_script.main(dataclasses.replace(parted, stop_at=3))
    train_script.main(dataclasses.replace(parted, resume="latest"))
    a, b = ([m for m in metrics(run.out) if "loss" in m] for run in (whole, parted))
    assert len(a) == STEPS and a == b
    assert same_tensors(state(whole.out, STEPS), state(parted.out, STEPS))
    assert (whole.out / "samples" / "step_00000006.png").exists()  # of the first bucket, hence pictures
    with pytest.raises(ValueError, match=r"data .*in 8x8 4x8x16 16x8, .* in 8x8 4x8x16, "):
        train_script.main(run_on(mixed, sizes[:2], out=parted.out, resume="latest"))
