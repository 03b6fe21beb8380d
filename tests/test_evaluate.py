"""Pictures measured over ranks and by the scripts: the same figures on any number of ranks, and what they are of."""

import dataclasses
import functools
import json

import numpy
import pytest
import tiny as makers
import torch
from conftest import redraw, script
from PIL import Image
from test_ranks_inference import torchrun

from odit import checkpoint, config, data, evaluate, fidelity, judge, media, metrics, models, plan, random, sample
from odit.config_json import first_difference, to_json
from odit.data import DataError
from odit.encoders import config as encoders
from odit.encoders import vae as vaes
from odit.fidelity import files, frechet
from odit.models import dit
from odit.models.config import Shape
from odit.parallel.mesh import single

evaluate_script, train_script = script("evaluate"), script("train")
CPU = torch.device("cpu")
KEY = random.key(7)
RUN = dataclasses.replace(
    config.presets()["digits"][1],
    global_batch=12,
    model=dit.Config(width=24, depth=2, heads=4, patch=2),
    sampling=config.Sampling(solver="sde", steps=3, guidance=config.Guidance(scale=2.0)),
    evaluate=False,
)
NUM = 29  # pictures, in calls of BATCH: they divide over neither 2 nor 3 ranks, and the last call is not full
BATCH = 4
DIM = 12


def tiny_network(clips=False):
    """A feature network whose bits depend on how many pictures it is given, as any product of matrices."""

    def features(x):
        flat = x.float().flatten(1) / 255
        w = random.normal(random.fold_in(KEY, "w"), (flat.shape[1], DIM))
        pool = torch.tanh(flat @ w)
        return {"pool": pool} if clips else {"pool": pool, "spatial": flat[:, :8]}

    return fidelity.Network("i3d" if clips else "inception", {"name": "tiny"}, features, None if clips else logits)


def logits(pool):
    return 3 * pool[:, :5]


def real_pictures(num=25):
    return (random.bits(random.fold_in(KEY, "real"), (num, 8, 8, 3)) % 256).to(torch.uint8)


@functools.lru_cache
def opened():
    return data.open_dataset(RUN.data)


def measured_on(mesh):
    """Figures, pictures as they were written, and how many each call was of, all of digits that the model draws."""
    composed = plan.make(RUN, opened(), mesh)
    params = redraw(composed.declared, dtype=torch.float32)
    labels = sample.random_labels(NUM, 10, KEY)
    drawn, calls, written = evaluate.drawn_pictures(composed, params, labels, 3), [], []

    def read(places):
        calls.append(places.tolist())
        return drawn(places)

    write = written.append if mesh.rank == 0 else None
    network, real = tiny_network(), real_pictures()
    found = evaluate.look(network, read, NUM, mesh.pictures, CPU, batch=BATCH, write=write)
    reference = evaluate.look(network, real.__getitem__, len(real), mesh.pictures, CPU, batch=BATCH)
    figures = evaluate.compare(network, found, reference, mesh.all)
    return figures, torch.cat(written) if written else None, calls, None if found.pool_ND is None else found.pool_ND


@pytest.fixture(scope="module")
def on_one_rank():
    return measured_on(single())


@pytest.mark.parametrize("world", [1, 2, 3], scope="session")
def test_pictures_and_figures_do_not_depend_on_ranks(ranks, on_one_rank, world):
    figures, written, calls, pools = zip(*ranks.run(world, measured_on))
    expected, pictures, _, pool = on_one_rank
    assert sorted(expected) == ["fid_29", "inception_score_29", "precision_29", "recall_29", "sfid_29"]
    assert all(f == figures[0] for f in figures)
    for name, value in figures[0].items():
        # pictures and features are equal to the bit; fp64 sums are added in another order
        assert value == pytest.approx(expected[name], rel=1e-10, abs=1e-10), name
    assert torch.equal(written[0], pictures) and torch.equal(pools[0], pool)
    assert written[1:] == pools[1:] == (None,) * (world - 1)
    assert {len(places) for rank in calls for places in rank} == {BATCH}
    assert len({len(rank) for rank in calls}) == 1 and len(calls[0]) == -(-NUM // (BATCH * world))


def test_two_ranks_that_draw_one_picture_count_it_once(ranks, on_one_rank):
    figures, written, calls, _ = zip(*ranks.run(4, measured_on, cfg=2))
    expected, pictures, _, _ = on_one_rank
    assert all(f == figures[0] for f in figures) and sorted(figures[0]) == sorted(expected)
    assert written[1:] == (None,) * 3 and written[0].shape == pictures.shape
    assert (written[0].int() - pictures.int()).abs().max() <= 1  # halves of guidance are products of fewer rows
    assert calls[0] == calls[1] != calls[2] == calls[3]


def test_figures_are_those_of_all_pictures_at_once(on_one_rank):
    figures, pictures, _, pool = on_one_rank
    network = tiny_network()
    rows, real = network.features(pictures), network.features(real_pictures())
    torch.testing.assert_close(pool, rows["pool"])
    expected = frechet.distance(frechet.moments(rows["pool"]), frechet.moments(real["pool"]))
    assert figures["fid_29"] == pytest.approx(expected, rel=1e-5)  # fp32 features of calls of four
    assert len(pictures) == NUM and pictures.float().std() > 1
    composed = plan.make(RUN, opened())
    params, labels = redraw(composed.declared, dtype=torch.float32), sample.random_labels(NUM, 10, KEY)
    places = torch.tensor([9, 0, 28, 17])
    assert torch.equal(evaluate.drawn_pictures(composed, params, labels, 3)(places), pictures[places])  # in order


def test_pictures_are_those_that_sample_draws():
    composed = plan.make(RUN, opened())
    params = redraw(composed.declared, dtype=torch.float32)
    labels = sample.spread_labels(6, 10)
    found = evaluate.drawn_pictures(composed, params, labels, 3)(torch.arange(6))
    drawn = sample.sample(composed, params, labels, random.fold_in(random.key(3), "fidelity"))
    assert torch.equal(found, media.pixels(drawn)) and found.shape == (6, 8, 8, 3)


def test_random_labels_are_uniform_and_keyed_by_place():
    labels = sample.random_labels(20_000, 10, KEY)
    assert torch.equal(labels[:50], sample.random_labels(50, 10, KEY))
    assert (labels.bincount(minlength=10) - 2000).abs().max() < 200  # 4.7 deviations
    assert not torch.equal(labels, sample.random_labels(20_000, 10, random.key(8)))
    assert sample.random_labels(3, 0, KEY).tolist() == [0, 0, 0]


def test_statistics_of_a_larger_set_go_before_pictures(tmp_path):
    told = {"pool": frechet.moments(random.normal(KEY, (40, DIM)))}
    files.write_statistics(tmp_path / "ref.npz", told)
    with numpy.load(tmp_path / "ref.npz") as held:
        numpy.savez(tmp_path / "both.npz", arr_0=real_pictures().numpy(), **held)
    opened = files.open_reference(tmp_path / "both.npz", "reference")
    found = evaluate.look_at_reference(tiny_network(), opened, single().all, CPU)
    assert torch.equal(found.moments["pool"].cov_DD, told["pool"].cov_DD) and len(found.pool_ND) == 25
    assert found.moments["spatial"].cov_DD.shape == (8, 8)


def test_digits_are_compared_by_the_same_code(monkeypatch, digits):
    x, y, x_held, y_held = (part[:96] for part in digits_of(digits))
    small = metrics.train_judge(x, y, x_held, y_held, 10, KEY, epochs=1)
    monkeypatch.setattr(judge, "train", lambda dataset: small)
    expected = [frechet.moments(metrics.classify(small, part)[1]) for part in (x, digits.read(digits.train_ids)[0])]
    value = frechet.distance(*expected)
    assert judge.judge_digits(x, y, digits)["frechet"] == value > 0
    monkeypatch.setattr(frechet, "distance", lambda a, b: -1.0)
    found = judge.judge_digits(x, y, digits)
    assert found["frechet"] == found["frechet_floor"] == -1


def digits_of(dataset):
    return (*dataset.read(dataset.train_ids), *dataset.read(dataset.held_out_ids))


# -------------------------------------------------------------------------------------------------------------- scripts


@pytest.fixture
def tiny_networks(monkeypatch):
    """Both loaders give tiny networks, whatever the file."""
    monkeypatch.setattr(fidelity, "load_inception", lambda path, device, *_, **__: tiny_network())
    monkeypatch.setattr(fidelity, "load_i3d", lambda path, device: tiny_network(clips=True))


def weights_of(tmp_path, run, shape, **told):
    declared = models.of(run.model).declare(run.model, shape)
    params = redraw(declared, dtype=torch.float32)
    about = {"step": 7, "config": to_json(run), "shape": dataclasses.asdict(shape), **told}
    checkpoint.save_weights(tmp_path / "ema.safetensors", params, about)
    return tmp_path / "ema.safetensors"


def evaluated(**given):
    evaluate_script.main(evaluate_script.Evaluate(device="cpu", **given))


@pytest.fixture
def reference(tmp_path):
    numpy.savez(tmp_path / "ref.npz", real_pictures().numpy())
    return tmp_path / "ref.npz"


def test_a_model_is_measured_and_then_its_file(tmp_path, tiny_networks, reference, capsys):
    weights = weights_of(tmp_path, RUN, Shape(1, 8, 10), data="told", encoders={})
    given = dict(reference=reference, inception=tmp_path / "w.pth", batch=8)
    evaluated(
        checkpoint=weights, num=24, seed=5, guidance=1.5, steps=2, out=tmp_path / "a.json",
        samples_out=tmp_path / "samples.npz", statistics_out=tmp_path / "stats.npz", **given,
    )  # fmt: skip
    lines = capsys.readouterr().out.strip().splitlines()
    found = json.loads((tmp_path / "a.json").read_text())
    assert lines[-5] == f"fid_24: {found['fid_24']:.4f}"
    assert found["sampling"]["guidance"]["scale"] == 1.5 and found["sampling"]["steps"] == 2
    assert found["sampling"]["solver"] == "sde" and found["seed"] == 5 and found["num"] == 24
    assert found["labels"] == "uniform" and found["vae"] is None and "round" in found["rounding"]
    assert found["reference"]["file"] == "ref.npz" and found["reference"]["num"] == 25
    assert found["network"] == {"name": "tiny"} and "torch" in found["versions"]
    with numpy.load(tmp_path / "samples.npz") as held:
        assert held["arr_0"].shape == (24, 8, 8, 3)
        assert (held["arr_1"] == sample.random_labels(24, 10, random.key(5)).numpy()).all()

    evaluated(samples=tmp_path / "samples.npz", out=tmp_path / "b.json", **given)
    again = json.loads((tmp_path / "b.json").read_text())
    assert len(again["samples_identity"]["sha256"]) == 64
    names = ["fid_24", "sfid_24", "inception_score_24", "precision_24", "recall_24"]
    assert [again[name] for name in names] == [found[name] for name in names]

    (tmp_path / "folder").mkdir()
    with numpy.load(tmp_path / "samples.npz") as held:
        for i, x in enumerate(held["arr_0"]):
            Image.fromarray(x).save(tmp_path / "folder" / f"{i:02}.png")
    given["reference"] = tmp_path / "stats.npz"
    evaluated(samples=tmp_path / "folder", out=tmp_path / "c.json", **given)
    folder = json.loads((tmp_path / "c.json").read_text())
    assert folder["fid_24"] == found["fid_24"] and folder["sfid_24"] == found["sfid_24"]
    assert "precision_24" not in folder  # statistics have none


def test_clips_are_measured(tmp_path, tiny_networks):
    run = dataclasses.replace(
        config.presets()["vdit-s-1x2x2"][1],
        model=dit.Config(width=24, depth=2, heads=4, patch=2),
        sampling=config.Sampling(solver="ddim", steps=2, guidance=config.Guidance(scale=1.0)),
    )
    weights = weights_of(tmp_path, run, Shape(3, (2, 8, 8), 4, outputs=2), data="told", encoders={})
    clips = torch.stack([real_pictures(), real_pictures().flip(0)], 1)
    numpy.savez(tmp_path / "ref.npz", clips.numpy())
    evaluated(
        checkpoint=weights, num=20, reference=tmp_path / "ref.npz", i3d=tmp_path / "x.pt", out=tmp_path / "a.json",
        samples_out=tmp_path / "clips.npz", labels="balanced",
    )  # fmt: skip
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["fvd_20"] > 0 and "fid_20" not in found
    with numpy.load(tmp_path / "clips.npz") as held:
        assert held["arr_0"].shape == (20, 2, 8, 8, 3) and held["arr_1"].tolist() == [0, 1, 2, 3] * 5


def test_latents_are_decoded_and_the_result_names_the_autoencoder(tmp_path, tiny_networks, reference):
    folder = makers.kl(tmp_path / "vae")
    own = encoders.Config(vae="kl", vae_path=str(folder))
    fingerprint = vaes.load("kl", str(folder), torch.float32).fingerprint
    run = dataclasses.replace(RUN, data=data.Config(source="latents", path=tmp_path / "gone"))
    weights = weights_of(tmp_path, run, Shape(4, 4, 3), data="told", encoders={"vae": fingerprint})
    given = dict(checkpoint=weights, reference=reference, inception=reference, num=20, batch=10, steps=1)
    with pytest.raises(ValueError, match=r"give --encoders.vae and --encoders.vae-path"):
        evaluated(**given)
    evaluated(**given, encoders=own, out=tmp_path / "a.json", samples_out=tmp_path / "a.npz")
    assert json.loads((tmp_path / "a.json").read_text())["vae"] == fingerprint
    assert files.open_pictures(tmp_path / "a.npz", "samples").size == (8, 8)  # of latents of 4 x 4, factor 2


def test_captions_are_drawn_from_a_file(tmp_path, tiny_networks, reference):
    run = dataclasses.replace(config.presets()["digits-text"][1], sampling=config.Sampling(steps=1), evaluate=False)
    front = plan.load_front(run)
    composed = plan.make(run, data.open_dataset(run.data, front.tokenize), front=front)
    weights = weights_of(tmp_path, run, composed.shape, data="told", encoders={})
    given = dict(checkpoint=weights, reference=reference, inception=reference, num=20, batch=20)
    with pytest.raises(ValueError, match=r"draws by captions: give --prompts"):
        evaluated(**given)
    (tmp_path / "p.txt").write_text("a seven\n\nan eight\n")
    evaluated(**given, prompts=tmp_path / "p.txt", out=tmp_path / "a.json", samples_out=tmp_path / "a.npz")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["labels"] is None and found["prompts"].endswith("p.txt")
    conditions = composed.tokenize(["a seven", "an eight"] * 10)
    loaded = checkpoint.load_weights(weights, composed)
    expected = evaluate.drawn_pictures(composed, loaded, conditions, 0)(torch.arange(20))
    assert torch.equal(files.open_pictures(tmp_path / "a.npz", "samples").read(torch.arange(20)), expected)


WRONG = [
    (dict(samples=None), ValueError, "neither checkpoint nor samples is given: give --checkpoint to draw"),
    (dict(checkpoint="weights"), ValueError, "checkpoint and samples are given"),
    (dict(reference=None), ValueError, "samples is given but reference is not"),
    (dict(samples_out="x.npz"), ValueError, "samples_out is given, which a comparison of files has no use for: leave"),
    (dict(guidance=2.0), ValueError, "guidance is given, which a comparison of files has no use for"),
    (dict(samples=None, checkpoint="digits", data="digits"), ValueError, "data is given, which a comparison has no"),
    (dict(reference="clips.npz"), DataError, r"clips.npz holds clips of 2 frames, .* compared with pictures"),
    (dict(reference="few.npz"), DataError, "the reference holds 5 pictures or clips: give 20 or more"),
    (dict(batch=0), ValueError, "batch is 0: use 1 or more"),
    (dict(out="empty"), ValueError, "out .*empty is a folder: use a file such as .*empty/figures.json"),
    (dict(statistics_out="empty"), ValueError, "statistics_out .*empty is a folder: use .*statistics.npz"),
    (dict(samples_out="empty"), ValueError, "samples_out .*empty is a folder: use .*samples.npz"),
    (dict(i3d="x.pt"), ValueError, "inception and i3d are given"),
    (dict(inception=None, i3d="x.pt"), ValueError, "i3d is given but the samples are pictures: give --inception"),
    (dict(num=40), ValueError, "holds 25, and 40 are to be compared: use --num 25 or less"),
    (dict(reference="empty"), DataError, r"reference .*empty' holds no pictures"),
    (dict(reference="gone.npz"), DataError, "reference .*gone.npz does not exist"),
    (dict(samples=None, checkpoint="weights", reference=None, inception=None), ValueError, "only digits have a judge"),
    (
        dict(samples=None, checkpoint="digits", reference=None, inception=None, labels="balanced"),
        ValueError,
        "labels is",
    ),
    (dict(samples=None, checkpoint="weights"), ValueError, "draws latents, of which no picture is shown"),
    (dict(samples=None, checkpoint="weights", prompts="p.txt"), ValueError, "draws latents"),
    (dict(samples=None, checkpoint="digits", prompts="p.txt"), ValueError, "prompts is given but this model has no"),
    (
        dict(samples=None, checkpoint="digits", reference=None, num=20),
        ValueError,
        "inception is given, which the judge of digits has no use for: give --reference",
    ),
]


def test_wrong_settings_are_refused(tmp_path, tiny_networks, reference):
    for name, run, shape in (
        ("weights", dataclasses.replace(RUN, data=data.Config(source="latents", path=tmp_path)), Shape(4, 8, 3)),
        ("digits", RUN, Shape(1, 8, 10)),
    ):
        (tmp_path / name).mkdir()
        weights_of(tmp_path / name, run, shape, data="told").rename(tmp_path / f"{name}.safetensors")
    given = dict(samples=reference, reference=reference, inception="w.pth")
    (tmp_path / "empty").mkdir()
    numpy.savez(tmp_path / "clips.npz", torch.stack([real_pictures(), real_pictures()], 1).numpy())
    numpy.savez(tmp_path / "few.npz", real_pictures(5).numpy())
    for changes, error, message in WRONG:
        told = {
            name: tmp_path / (f"{value}.safetensors" if name == "checkpoint" else value)
            if isinstance(value, str)
            else value
            for name, value in {**given, **changes}.items()
        }
        with pytest.raises(error, match=message):
            evaluated(**told)


def test_without_a_network_the_command_says_what_to_fetch(reference, tmp_path):
    with pytest.raises(ValueError, match=r"inception is not given: fetch https://.*pt_inception.*6726825d.pth"):
        evaluated(samples=reference, reference=reference)
    clips = torch.stack([real_pictures(), real_pictures()], 1)
    numpy.savez(tmp_path / "clips.npz", clips.numpy())
    with pytest.raises(ValueError, match=r"i3d is not given: fetch i3d_torchscript.pt"):
        evaluated(samples=tmp_path / "clips.npz", reference=tmp_path / "clips.npz")


def test_a_run_measures_itself(tiny, tiny_networks, reference, monkeypatch):
    measuring = fidelity.Config(every=2, reference=reference, inception=reference, num=20, batch=8)
    run = dataclasses.replace(tiny, steps=3, evaluation=measuring)
    train_script.main(run)
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row for row in rows if "evaluation_fid_20" in row}
    assert sorted(found) == [2, 3] and found[2]["evaluation_fid_20"] != found[3]["evaluation_fid_20"]
    assert {"evaluation_sfid_20", "evaluation_precision_20", "evaluation_recall_20"} <= set(found[3])
    told = first_difference(to_json(run), to_json(dataclasses.replace(run, evaluation=fidelity.Config())))
    assert told is None  # a resumed run may measure itself otherwise
    # what the script finds of the same weights, from the same noise and labels
    evaluated(
        checkpoint=run.out / "ema.safetensors", reference=reference, inception=reference, num=20, batch=8,
        labels="balanced", out=run.out / "a.json",
    )  # fmt: skip
    again = json.loads((run.out / "a.json").read_text())
    assert again["fid_20"] == pytest.approx(found[3]["evaluation_fid_20"], rel=1e-12)


def test_a_run_without_a_network_says_what_to_fetch(tiny, reference, tmp_path):
    measuring = fidelity.Config(every=2, reference=reference, inception=tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth is no file: fetch https://.* its path by --evaluation.inception"):
        train_script.main(dataclasses.replace(tiny, evaluation=measuring))


def test_runs_by_captions_do_not_measure_themselves(tiny, tmp_path):
    measuring = fidelity.Config(every=2, reference=tmp_path, inception=tmp_path)
    composed = plan.make(dataclasses.replace(tiny, evaluation=measuring), opened())
    for shape, what in ((Shape(1, 8, 0, 1, 8, 0), "by captions"), (Shape(1, (2, 8, 8), 3), "clips")):
        with pytest.raises(ValueError, match=f"this run draws {what}: leave it out"):
            evaluate.during_training(dataclasses.replace(composed, shape=shape))


@pytest.mark.slow
def test_the_script_under_torchrun(tmp_path, reference):
    """Two ranks, the real network with drawn weights: figures and written samples are those of one."""
    from odit.fidelity import inception

    draws = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in inception.shapes().items():
        fan = max(1, torch.Size(shape[1:]).numel())
        state[name] = torch.randn(shape, generator=draws) * (2 / fan) ** 0.5 if len(shape) > 1 else torch.ones(shape)
    torch.save(state, tmp_path / "w.pth")
    weights = weights_of(tmp_path, RUN, Shape(1, 8, 10), data="told", encoders={})
    found = []
    for num in (1, 2):
        torchrun(
            num, "evaluate.py", "--checkpoint", weights, "--num", "21", "--batch", "4", "--reference", reference,
            "--inception", tmp_path / "w.pth", "--out", tmp_path / f"{num}.json", "--samples-out",
            tmp_path / f"{num}.npz", "--device", "cpu",
        )  # fmt: skip
        found.append(json.loads((tmp_path / f"{num}.json").read_text()))
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    for name in ("fid_21", "sfid_21", "inception_score_21", "precision_21", "recall_21"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-10, abs=1e-10), name
    assert found[0]["network"]["resize"] == "tensorflow" and len(found[0]["network"]["sha256"]) == 64
