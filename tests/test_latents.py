"""Encoded once: the same files whoever writes them, and the same training as from the pictures themselves."""

import csv
import dataclasses
import itertools
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny as makers
import torch
from conftest import script
from PIL import Image
from safetensors.torch import load_file, save_file
from test_storage import tmpfs  # noqa: F401 (a fixture)

from odit import checkpoint, checks, config, data, health, plan, random, sample, train, validate
from odit.data import latents, loader
from odit.encoders import config as encoders
from odit.health import CheckpointError
from odit.models import config as models
from odit.storage import StorageError

ROOT = Path(__file__).parent.parent
NUM = 14


encode_script, sample_script, train_script = script("encode"), script("sample"), script("train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with captions, clips with captions, a folder of two classes, and encoders."""
    root = tmp_path_factory.mktemp("made")
    makers.kl(root / "kl", scaling_factor=0.7, shift_factor=0.1)
    makers.kl(root / "other", seed=1)
    makers.clip(root / "clip")
    rows = []
    for i in range(NUM):
        pixels = (random.uniform(random.fold_in(random.key(0), i), (8, 8, 3)) * 255).to(torch.uint8)
        path = root / "classes" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
        rows.append((f"classes/{'ab'[i % 2]}/{i:02d}.png", f"a {makers.WORDS[1 + i % 3]} square"))
    table(root / "rows.csv", rows)
    return root


def table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])


def args(folder, out, **changes):
    """Pictures with captions by both encoders, 4 samples a file, 3 at once."""
    given = encode_script.Encode(
        out=out,
        batch=3,
        shard_size=4,
        mirror=True,
        device="cpu",
        progress=False,
        data=data.Config(source="table", path=folder / "rows.csv", image_size=8),
        encoders=encoders.Config("clip", str(folder / "clip"), 12, "kl", str(folder / "kl")),
    )
    return dataclasses.replace(given, **changes)


@pytest.fixture(scope="module")
def cache(folder):
    """What the arguments above make."""
    encode_script.main(args(folder, folder / "cache"))
    return folder / "cache"


def online(folder, **changes):
    """A run that encodes as it goes."""
    run = config.Run(
        steps=20,
        global_batch=6,
        device="cpu",
        validation_draws=1,
        progress=False,
        data=data.Config(source="table", path=folder / "rows.csv", image_size=8, held_out=0.2, flip=True),
        encoders=encoders.Config("clip", str(folder / "clip"), 12, "kl", str(folder / "kl")),
        model=models.Config(width=32, depth=2, heads=2, patch=2, label_dropout=0.3),
        sampling=config.Sampling(solver="euler", steps=2, guidance=config.Guidance(scale=2.0)),
    )
    return dataclasses.replace(run, **changes)


def from_cache(run, cache, **changes):
    """The same run from what was encoded."""
    found = data.Config(source="latents", path=cache, held_out=run.data.held_out, flip=run.data.flip)
    return dataclasses.replace(run, data=found, encoders=encoders.Config(), **changes)


def composed(run):
    """Plan and data, as train.py opens them."""
    checks.check(run)
    front = plan.load_front(run)
    dataset = data.open_dataset(run.data, front.tokenize)
    return plan.make(run, dataset, None, front), dataset


def losses(run):
    """The loss of each step, then the validation loss."""
    made, dataset = composed(run)
    key = random.key(run.seed)
    state, step = train.init_state(made, key), train.make_step(made)
    flip = run.data.flip and made.front.cache is None
    found = []
    for batch in loader.batches(
        dataset, random.fold_in(key, "data"), global_batch=run.global_batch, stop=run.steps, flip=flip
    ):
        state, metrics = step(state, batch, key)
        found.append(metrics["loss"])
    return torch.tensor([*found, validate.validate(made, state.ema, dataset)["loss"]], dtype=torch.float64)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


# --- training ---


@pytest.mark.parametrize("flip", [True, False])
def test_training_from_the_cache_is_training_online(flip, folder, cache):
    run = online(folder, steps=20 if flip else 4)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, flip=flip))
    want, got = losses(run), losses(from_cache(run, cache))
    # the encoders see other batches, whose matrix products are summed in another order
    assert (got - want).abs().max() < 1e-5
    assert want.std() > 1e-3


def test_classes_and_captions_as_bytes_train_alike(folder, tmp_path):
    classes = data.Config(source="folder", path=folder / "classes", image_size=8)
    for name, source in (("classes", classes), ("bytes", args(folder, tmp_path).data)):
        length = {"text_length": 24} if name == "bytes" else {}
        kl = encoders.Config(vae="kl", vae_path=str(folder / "kl"), **length)
        out = tmp_path / name
        encode_script.main(args(folder, out, data=source, encoders=kl, mirror=False))
        run = online(folder, steps=4, encoders=kl, data=dataclasses.replace(source, held_out=0.2))
        assert (losses(from_cache(run, out)) - losses(run)).abs().max() < 1e-5
        made, dataset = composed(from_cache(run, out))
        assert (made.shape, dataset.class_names) == (composed(run)[0].shape, ["a", "b"] if name == "classes" else [])
        assert (made.tokenize is None) == (name == "classes")


def test_clips_train_alike(folder, tmp_path):
    from odit import media

    for i in range(4):
        clip_CTHW = random.uniform(random.fold_in(random.key(1), i), (3, 3, 128, 128)) * 2 - 1
        media.save_mp4(tmp_path / f"{i}.mp4", clip_CTHW.transpose(0, 1), 8.0, {})
    table(tmp_path / "clips.csv", [(f"{i}.mp4", "a red circle moves left") for i in range(4)])
    clips = data.Config(source="table", path=tmp_path / "clips.csv", image_size=8, frames=3)
    encode_script.main(args(folder, tmp_path / "out", data=clips))
    run = online(folder, steps=2, global_batch=4, data=dataclasses.replace(clips, held_out=0.25, flip=True))
    got = from_cache(run, tmp_path / "out")
    assert composed(got)[0].shape == composed(run)[0].shape
    assert (losses(got) - losses(run)).abs().max() < 1e-5


def test_lower_precision_is_near(folder, cache, tmp_path):
    encode_script.main(args(folder, tmp_path / "half", dtype="fp16"))
    x, y = latents.Latents(tmp_path / "half", 0.0).read([3, 5])
    want, _ = latents.Latents(cache, 0.0).read([3, 5])
    assert x.dtype == torch.float32 and y["text"].dtype == torch.float16
    assert 0 < (x - want).abs().max() < 1e-2


# --- reading ---


def test_rows_are_what_the_encoders_make(folder, cache):
    made, dataset = composed(online(folder))
    opened = latents.Latents(cache, 0.2, flip=True)
    assert len(pickle.loads(pickle.dumps(opened)).read([1])[0]) == 1
    assert torch.equal(opened.train_ids, dataset.train_ids) and torch.equal(opened.held_out_ids, dataset.held_out_ids)
    ids, key = torch.arange(NUM) + (3 << 32), random.key(5)
    x, captions = dataset.read(ids)
    for given, pixels in ((latents.READ_KEY, x), (key, loader.mirror(x, key, ids))):
        found, y = opened.read(ids, given)
        torch.testing.assert_close(found, torch.cat(made.front.moments(pixels), 1), rtol=1e-4, atol=1e-5)
        for name, want in made.front.embed(captions).items():
            torch.testing.assert_close(y[name], want, rtol=1e-4, atol=1e-5)
    assert 0 < int(loader.mirrored(key, ids).sum()) < NUM
    z = found[:, :4]
    assert torch.equal(opened.scaled(z), made.front.vae.scaled(z))
    null = made.front.embed(made.tokenize([""]))
    torch.testing.assert_close(opened.null["text"], null["text"], rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_many_draws(cache):
    opened = latents.Latents(cache, 0.0)
    mean, logvar = opened.read(torch.arange(NUM))[0].chunk(2, 1)
    noise = random.normal(random.key(0), (2000, *mean.shape))
    z = mean + torch.exp(logvar / 2) * noise
    for name, drawn in (("latents", z), ("scaled", opened.scaled(z.flatten(0, 1)))):
        drawn_CN = drawn.reshape(-1, 4, 16).transpose(0, 1).flatten(1)
        told = opened.index[name]
        torch.testing.assert_close(torch.tensor(told["mean"]).float(), drawn_CN.mean(1), rtol=0.01, atol=0.01)
        torch.testing.assert_close(torch.tensor(told["std"]).float(), drawn_CN.std(1), rtol=0.01, atol=0.01)


def test_flips_need_mirror_images(folder, tmp_path):
    encode_script.main(args(folder, tmp_path, mirror=False))
    with pytest.raises(ValueError, match=r"data.flip is on .* no mirror images: encode with --mirror"):
        latents.Latents(tmp_path, 0.0, flip=True)


# --- writing ---


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(world, folder, cache, tmp_path):
    job = encode_script.open_job(args(folder, tmp_path))
    latents.begin(tmp_path, job.settings)
    for rank in range(world):
        encode_script.encode(job, rank, world)
    index, want = encode_script.finish(job), latents.read_index(cache)
    assert index["num"] == index["num_samples"] == NUM
    names = [name for name in contents(cache) if name != latents.INDEX]
    assert {name: contents(tmp_path)[name] for name in names} == {name: contents(cache)[name] for name in names}
    assert latents.Latents(tmp_path, 0.0).fingerprint() == latents.Latents(cache, 0.0).fingerprint()
    assert {**index, "source": 0} == {**want, "source": 0}
    (tmp_path / "any").touch()  # as others may read that, they may read these
    assert len({path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}) == 1


def test_what_was_killed_is_completed(folder, tmp_path, capsys):
    given = args(folder, tmp_path)
    encode_script.main(given)
    whole = contents(tmp_path)
    (tmp_path / latents.INDEX).unlink()
    (tmp_path / "latents-00001.safetensors").unlink()
    (tmp_path / "latents-00002.json").unlink()
    (tmp_path / "latents-00003.safetensors").write_bytes(b"cut")
    (tmp_path / ".latents-00001.safetensors.x.tmp").write_bytes(b"half")
    with pytest.raises(data.DataError, match=r"lacks 3 of 4 shards \(1, 2, 3\): run the same exp"):
        latents.Latents(tmp_path, 0.0)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in whole if (tmp_path / name).exists()}
    encode_script.main(given)
    assert "1 of 4 shards are there already" in capsys.readouterr().out
    assert contents(tmp_path) == whole  # what a killed process left half-written is gone, too
    kept = {name for name, at in times.items() if (tmp_path / name).stat().st_mtime_ns == at}
    assert kept == {"latents-00000.safetensors", "latents-00000.json", latents.SETTINGS}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 2}, "was begun with batch 3, this call has 2"),
        ({"mirror": False}, "was begun with mirror True, this call has False"),
        ({"vae_path": "other"}, "was begun with encoder of vae [0-9a-f]{32}, this call has [0-9a-f]{32}"),
        ({"rows": "fewer.csv"}, "was begun with num_samples 14, this call has 13"),
    ],
)
def test_other_settings_are_refused(changes, message, folder, cache):
    given, changes = args(folder, cache), dict(changes)
    if "vae_path" in changes:
        path = str(folder / changes.pop("vae_path"))
        given = dataclasses.replace(given, encoders=dataclasses.replace(given.encoders, vae_path=path))
    if "rows" in changes:
        fewer = folder / changes.pop("rows")
        fewer.write_text("\n".join((folder / "rows.csv").read_text().splitlines()[:-1]))
        given = dataclasses.replace(given, data=dataclasses.replace(given.data, path=fewer))
    with pytest.raises(ValueError, match=message):
        encode_script.main(dataclasses.replace(given, **changes))


def test_bad_samples_are_left_out_and_replaced(folder, tmp_path, capsys):
    rows = [line.split(",") for line in (folder / "rows.csv").read_text().splitlines()[1:]]
    rows = [[str(folder / name), caption] for name, caption in rows]
    for i in (2, 8, 9, 10, 11):  # one of the first file, the whole third
        rows[i][0] = str(tmp_path / f"{i}.png")
        Path(rows[i][0]).write_bytes(b"no picture")
    table(tmp_path / "rows.csv", rows)
    given = args(folder, tmp_path / "out")
    encode_script.main(dataclasses.replace(given, data=dataclasses.replace(given.data, path=tmp_path / "rows.csv")))
    told = capsys.readouterr().out
    assert "9 of 14 samples" in told and told.count("left out ") == 5 and str(tmp_path / "2.png") in told
    opened = latents.Latents(tmp_path / "out", 0.0)
    with pytest.raises(data.BadSample, match=r"2.png"):
        opened.read([1, 2])
    met = []
    (batch,) = loader.batches(
        opened, random.key(0), global_batch=NUM, stop=1, on_bad=lambda path, reason: met.append(path)
    )
    assert len(batch.x) == NUM and sorted(Path(p).name for p in met) == ["10.png", "11.png", "2.png", "8.png", "9.png"]
    source = dataclasses.replace(given.data, path=tmp_path / "rows.csv", held_out=0.0)
    read = data.open_dataset(source, lambda captions: {"n": torch.zeros(len(captions))})
    (want,) = loader.batches(read, random.key(0), global_batch=NUM, stop=1)
    assert torch.equal(batch.ids_B, want.ids_B)
    # the same samples stand in: mean latents of equal pictures are equal
    same = (want.x[:, None] == want.x).flatten(2).all(2)
    near = (batch.x[:, None] - batch.x).abs().flatten(2).amax(2) < 1e-5
    assert torch.equal(same, near) and same.sum() > NUM


def test_features_that_are_not_finite_are_left_out(folder, tmp_path, monkeypatch, capsys):
    """As where they are beyond what fp16 has; fp32 has them."""
    moments, calls = encode_script.fronts.Front.moments, itertools.count()

    def large(front, x):
        mean, logvar = moments(front, x)
        mean[0, 0, 0, 0] = 1e5 if next(calls) % NUM == 5 else mean[0, 0, 0, 0]
        return mean, logvar

    monkeypatch.setattr(encode_script.fronts.Front, "moments", large)
    for dtype, bad in (("fp32", 0), ("fp16", 1)):
        out = tmp_path / dtype
        encode_script.main(args(folder, out, batch=1, mirror=False, dtype=dtype))
        told = capsys.readouterr().out
        assert f"{NUM - bad} of {NUM} samples" in told
        assert told.count(": sample 5: its features are not finite in fp16\n") == told.count("left out ") == bad
    with pytest.raises(data.BadSample, match=r"rows.csv': sample 5: its features are not finite in fp16"):
        latents.Latents(out, 0.0).read([4, 5])
    assert latents.Latents(out, 0.0).read([4, 6])[0].isfinite().all()


def test_too_much_that_is_bad_ends_the_encoding(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    table(tmp_path / "rows.csv", [("a.png", "a")] * 12)
    with pytest.raises(data.DataError, match=r"12 bad samples of 12, data.bad_budget is 0.01"):
        encode_script.main(args(folder, tmp_path, data=data.Config("table", tmp_path / "rows.csv", 8)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoders": encoders.Config()}, "encoders.vae is none, which leaves nothing to encode"),
        ({"data": data.Config("digits")}, "data.source is digits, which has no pictures of 3 channels"),
        ({"shard_size": 0}, "shard_size is 0: use 1 or more"),
        ({"data": data.Config("table", Path("x"), buckets=("8x8", "8x16"))}, "data.buckets is 8x8 8x16 but files"),
        ({"data": data.Config("folder", Path("x"), 8, flip=True)}, "data.flip is on.*use --mirror|captions"),
    ],
)
def test_what_cannot_be_encoded_is_refused(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        encode_script.main(args(folder, tmp_path, **changes))


def test_a_full_disk_ends_the_encoding(folder, tmpfs):  # noqa: F811
    """With what is whole; and the same command goes on from there."""
    (tmpfs / "filling").write_bytes(bytes((256 - 24) * 1024))  # of 256
    given = args(folder, tmpfs / "out")
    with pytest.raises(
        StorageError, match=r"latents-0000[123]\.\w+ cannot be written \(ENOSPC: .* bytes .* 0 are free"
    ) as failed:
        encode_script.main(given)
    assert health.exit_code(failed.value) == 6 and not list((tmpfs / "out").glob(".*"))
    (tmpfs / "filling").unlink()
    encode_script.main(given)
    assert latents.Latents(tmpfs / "out", 0.0).index["num"] == NUM


# --- records that went bad ---


def test_records_that_went_bad_are_skipped_counted_and_replaced(folder, tmp_path):
    """A NaN in latents, an infinity in text features, and a record of another shape: the one of the last file."""
    encode_script.main(args(folder, tmp_path / "whole", shard_size=NUM - 1))
    shutil.copytree(tmp_path / "whole", tmp_path / "bad")

    def spoil(shard, change):
        path = tmp_path / "bad" / latents.shard_name(shard)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return path

    def make_bad(tensors):
        tensors["mean"][3, 0, 0, 0] = math.nan
        tensors["text"][5, 0, 0] = math.inf

    first = spoil(0, make_bad)
    last = spoil(1, lambda tensors: tensors.update(mean=tensors["mean"].reshape(1, 4, 2, 8)))
    want = {
        f"{first}: sample 3": "its mean is not finite",
        f"{first}: sample 5": "its text is not finite",
        f"{last}: sample 13": "its mean has shape [1, 4, 2, 8] and by index.json it should have [1, 4, 4, 4]: encode "
        "the data again",
    }
    whole, bad, met = latents.Latents(tmp_path / "whole", 0.0), latents.Latents(tmp_path / "bad", 0.0), {}
    for number, (path, reason) in zip((3, 5, 13), want.items()):
        with pytest.raises(data.BadSample) as failed:
            bad.read([0, number])
        assert (failed.value.path, failed.value.reason) == (path, reason)
    key = random.key(0)
    (batch,) = loader.batches(
        bad, key, global_batch=NUM, stop=1, on_bad=lambda path, reason: met.update({path: reason})
    )
    assert met == want and set(batch.ids_B.tolist()) == set(range(NUM))
    for draw, x, text in zip(batch.ids_B.tolist(), batch.x, batch.y["text"]):
        number, attempts = draw, itertools.count()
        while number in (3, 5, 13):
            number = loader.substitute(bad.train_ids, key, draw, next(attempts))
        (want_x,), y = whole.read([number])
        assert torch.equal(x, want_x) and torch.equal(text, y["text"][0])
    spoil(0, lambda tensors: tensors["pooled"][:11].fill_(math.nan))
    with pytest.raises(data.DataError, match=r"12 bad samples among 14 read, data.bad_budget is 0.01"):
        next(loader.batches(latents.Latents(tmp_path / "bad", 0.0), key, global_batch=NUM, stop=1))


# --- refusals of runs ---


def test_damage_is_seen(folder, cache, tmp_path, capsys):
    shutil.copytree(cache, tmp_path / "c")
    opened, file, show = (
        latents.Latents(tmp_path / "c", 0.0),
        tmp_path / "c" / "latents-00001.safetensors",
        script("show"),
    )
    opened.verify()
    show.main(show.Show(tmp_path / "c"))
    told = capsys.readouterr().out
    assert told.startswith("kind: latents of 14 samples of ") and "hashes: every byte is as it was written\n" in told
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(data.DataError, match=r"latents-00001.safetensors changed after the encoding"):
        show.main(show.Show(tmp_path / "c"))
    file.write_bytes(whole[:-1])
    with pytest.raises(data.DataError, match=rf"has {len(whole) - 1} bytes, index.json says {len(whole)}"):
        latents.Latents(tmp_path / "c", 0.0)
    file.unlink()
    with pytest.raises(data.DataError, match=r"latents-00001.safetensors is missing"):
        latents.Latents(tmp_path / "c", 0.0)
    index = tmp_path / "c" / latents.INDEX
    for a, b, message in [
        ('"format": 1', '"format": 2', "has format 2, this version reads 1"),
        ('"num": 14', '"num": 13', "was changed after it was written"),
    ]:
        index.write_text((cache / latents.INDEX).read_text().replace(a, b, 1))
        with pytest.raises(data.DataError, match=message):
            latents.read_index(tmp_path / "c")
    with pytest.raises(data.DataError, match=r"has no index.json: give a folder that experiments/encode.py wrote"):
        latents.read_index(folder)
    with pytest.raises(data.DataError, match="is no folder"):
        checks.check(from_cache(online(folder), tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"data.path is not given but data.source is latents"):
        data.check(data.Config("latents"))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"vae": "kl", "vae_path": "other"}, "vae_path has the fingerprint .* were written with"),
        ({"vae": "kl", "vae_path": "kl", "precision": "bf16"}, r"--encoders.precision fp32\)"),
        ({"text": "clip", "text_path": "clip"}, "text_length is 64 but the captions of data.path have 12 tokens"),
    ],
)
def test_encoders_that_did_not_write_it_are_refused(given, message, folder, cache):
    given = {name: str(folder / value) if name.endswith("path") else value for name, value in given.items()}
    run = dataclasses.replace(from_cache(online(folder), cache), encoders=encoders.Config(**given))
    with pytest.raises(ValueError, match=message):
        composed(run)


# --- pictures ---


def test_a_run_from_latents_and_what_it_draws(folder, cache, tmp_path, capsys):
    """Trains without encoders; draws with them, by captions, what the same weights draw in a run that had them."""
    run = from_cache(online(folder), cache, steps=2, out=tmp_path / "run", evaluate=False, precision="fp32")
    train_script.main(run)
    weights, shown = run.out / "ema.safetensors", ("a red square",)
    assert checkpoint.read_about(weights)["encoders"] == latents.read_index(cache)["encoders"]
    given = sample_script.Sample(weights, tmp_path / "x.png", num=2, device="cpu", tensors=tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"it was trained from latents without one: give --encoders.text and"):
        sample_script.main(dataclasses.replace(given, prompt=shown))
    text = encoders.Config("clip", str(folder / "clip"))
    capsys.readouterr()
    sample_script.main(dataclasses.replace(given, prompt=shown, encoders=text))
    assert "the first channel of latents is shown" in capsys.readouterr().out
    both = dataclasses.replace(text, vae="kl", vae_path=str(folder / "kl"))
    cache.rename(cache.with_name("moved"))  # the data need not be there
    try:
        sample_script.main(dataclasses.replace(given, prompt=shown, encoders=both))
    finally:
        cache.with_name("moved").rename(cache)
    made, _ = composed(online(folder))
    params = checkpoint.load_weights(weights, made)
    want = sample.sample(made, params, made.tokenize([*shown, *shown]), random.key(0))
    torch.testing.assert_close(load_file(tmp_path / "x.safetensors")["samples"], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="was trained with"):
        wrong = dataclasses.replace(both, vae_path=str(folder / "other"))
        sample_script.main(dataclasses.replace(given, prompt=shown, encoders=wrong))


def test_the_command_line_encodes(folder, tmp_path):
    command = [sys.executable, ROOT / "experiments" / "encode.py", "--out", tmp_path, "--data.source", "folder"]
    command += ["--data.path", folder / "classes", "--data.image-size", "8", "--encoders.vae", "kl", "--no-progress"]
    command += ["--encoders.vae-path", folder / "kl", "--device", "cpu", "--shard-size", "5"]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert f"{tmp_path}: 14 of 14 samples, 4x4x4" in ended.stdout
    assert [shard["num"] for shard in latents.read_index(tmp_path)["shards"]] == [5, 5, 4]
