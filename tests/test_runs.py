"""Whole runs through the scripts: same command, same numbers; resume, refusals and what is written."""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import script
from safetensors.torch import load_file

from odit import checkpoint, config, data, health, optim, plan, record
from odit.config_json import from_json
from odit.health import CheckpointError, NumericError

ROOT = Path(__file__).parent.parent
TIMED = {"samples_per_s", "peak_gib"}  # what a process has held, too, is its own


train_script, sample_script, evaluate_script = script("train"), script("sample"), script("evaluate")


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def state(out, step):
    file = out / "checkpoints" / f"step_{step:08d}" / "state-00000-of-00001.safetensors"
    return {name: tensor.clone() for name, tensor in load_file(file).items()}  # load_file maps the file


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def variant(run, **changes):
    return dataclasses.replace(run, **changes)


@pytest.fixture
def twice(tiny, tmp_path):
    return tiny, variant(tiny, out=tmp_path / "other")


def test_two_runs_of_one_command_agree_bit_for_bit(twice):
    for run in twice:
        train_script.main(variant(run, steps=8, validate_every=4))
    a, b = (run.out for run in twice)
    assert metrics(a) == metrics(b) and len(metrics(a)) == 10
    assert same_tensors(state(a, 8), state(b, 8))
    assert (a / "samples" / "step_00000008.png").read_bytes() == (b / "samples" / "step_00000008.png").read_bytes()


@pytest.mark.parametrize("micro_batch, at_once", [(4, 4), (None, 32)])
def test_previews_take_no_more_at_once_than_training(micro_batch, at_once, make_plan, digits, tiny, monkeypatch):
    monkeypatch.setattr(train_script.sample, "sample", lambda *args, batch: batch)
    composed = make_plan(tiny, micro_batch=micro_batch)
    assert train_script.grid(composed, digits, SimpleNamespace(ema=None)) == at_once


def test_seeds_differ(twice):
    for seed, run in enumerate(twice):
        train_script.main(variant(run, steps=2, seed=seed))
    a, b = (metrics(run.out) for run in twice)
    assert a[0]["draw_digest"] != b[0]["draw_digest"] and a[0]["loss"] != b[0]["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(twice, precision):
    """20 steps against 10, resume, 10: same losses and same final tensors, bit for bit."""
    whole, parted = (variant(run, precision=precision, validate_every=7) for run in twice)
    train_script.main(whole)
    train_script.main(variant(parted, stop_at=10))
    assert json.loads((parted.out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
    train_script.main(variant(parted, resume="latest"))
    trained = [[line for line in metrics(run.out) if "loss" in line] for run in (whole, parted)]
    assert trained[0] == trained[1] and len(trained[0]) == 20
    assert same_tensors(state(whole.out, 20), state(parted.out, 20))


def test_resume_cuts_metrics_and_steps_back_past_a_broken_checkpoint(tiny):
    train_script.main(variant(tiny, steps=8, checkpoint_every=4))
    expected, final = metrics(tiny.out), state(tiny.out, 8)
    with open(tiny.out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss"')
    broken = tiny.out / "checkpoints" / "step_00000008" / "state-00000-of-00001.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="stepping back past a broken checkpoint"):
        train_script.main(variant(tiny, steps=8, checkpoint_every=4, resume="latest"))
    assert metrics(tiny.out) == expected
    assert same_tensors(state(tiny.out, 8), final)


def test_resume_at_the_ends(tiny, capsys):
    run = variant(tiny, steps=2, resume="latest")
    train_script.main(run)
    assert "no checkpoint in" in capsys.readouterr().out
    train_script.main(run)
    assert "already at step 2 of 2: nothing to do" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        train_script.main(variant(run, resume=str(tiny.out / "checkpoints" / "step_00000001")))


def test_a_used_folder_is_not_written_over(tiny):
    train_script.main(variant(tiny, steps=1))
    with pytest.raises(ValueError, match="holds a run with checkpoints up to step 1: go on with --resume latest"):
        train_script.main(variant(tiny, steps=1))


@pytest.mark.parametrize(
    "change, message", [({"seed": 3}, "seed 0, this run has 3"), ({"global_batch": 48}, "global_batch 96")]
)
def test_resuming_another_run_is_refused(tiny, change, message):
    train_script.main(variant(tiny, steps=4, stop_at=1))
    with pytest.raises(CheckpointError, match=message):
        train_script.main(variant(tiny, steps=4, resume="latest", **change))


def test_a_run_goes_on_with_another_budget_of_bad_samples(tiny):
    """As one that stopped over it says."""
    train_script.main(variant(tiny, steps=4, stop_at=1))
    more = dataclasses.replace(tiny.data, bad_budget=0.05)
    train_script.main(variant(tiny, steps=4, resume="latest", data=more))
    assert checkpoint.steps(tiny.out) == [1, 4]


def test_going_on_from_an_earlier_step_sets_the_later_ones_aside(tiny):
    run = variant(tiny, steps=8, checkpoint_every=2, keep=3)
    train_script.main(run)
    (tiny.out / "checkpoints" / "step_00000008" / "state-00000-of-00001.safetensors").unlink()
    with pytest.warns(UserWarning, match="stepping back"):
        train_script.main(variant(run, resume="latest", stop_at=7, keep=1))
    names = {path.name for path in (tiny.out / "checkpoints").iterdir()}
    assert names == {"step_00000007", "abandoned_step_00000008"}


def test_resuming_elsewhere_over_another_run_is_refused(twice):
    first, second = (variant(run, steps=2) for run in twice)
    train_script.main(first)
    train_script.main(second)
    with pytest.raises(ValueError, match="holds another run: use another --out"):
        train_script.main(variant(second, resume=str(first.out / "checkpoints" / "step_00000002")))


def test_a_finished_run_makes_up_for_what_is_missing_at_its_end(tiny):
    train_script.main(variant(tiny, steps=2))
    (tiny.out / "ema.safetensors").unlink()
    train_script.main(variant(tiny, steps=2, resume="latest"))
    assert (tiny.out / "ema.safetensors").exists()


def test_what_an_earlier_end_left_does_not_finish_a_longer_run(tiny, monkeypatch, capsys):
    """Killed after the last checkpoint and before the weights file; and before its judgement."""
    run = variant(tiny, evaluate=True, optimizer=dataclasses.replace(tiny.optimizer, decay="none"))
    judge = iter([{"class_accuracy": 10.0}])
    monkeypatch.setattr(train_script.evaluate, "evaluate", lambda *args, **settings: next(judge))
    monkeypatch.setattr(train_script.evaluate, "report", lambda found: f"accuracy {found['class_accuracy']}")
    train_script.main(variant(run, steps=2))
    with monkeypatch.context() as cut:
        cut.setattr(train_script, "finish", lambda *args: None)
        train_script.main(variant(run, steps=4, resume="latest"))
    with pytest.raises(StopIteration):
        train_script.main(variant(run, steps=4, resume="latest"))
    assert checkpoint.read_about(tiny.out / "ema.safetensors")["step"] == 4
    judge = iter([{"class_accuracy": 30.0}])
    train_script.main(variant(run, steps=4, resume="latest"))
    assert json.loads((tiny.out / "evaluation.json").read_text()) == {"step": 4, "class_accuracy": 30.0}
    capsys.readouterr()
    train_script.main(variant(run, steps=4, resume="latest"))
    assert "already at step 4 of 4: nothing to do" in capsys.readouterr().out


def test_the_last_step_of_another_run_is_an_end_elsewhere_too(twice):
    first, second = (variant(run, steps=2) for run in twice)
    train_script.main(first)
    train_script.main(variant(second, resume=str(first.out / "checkpoints" / "step_00000002")))
    assert same_tensors(state(first.out, 2), state(second.out, 2))
    assert load_file(second.out / "ema.safetensors").keys() == load_file(first.out / "ema.safetensors").keys()
    assert [line["step"] for line in metrics(second.out)] == [2] and (second.out / "samples/step_00000002.png").exists()


def test_a_new_run_in_a_folder_without_checkpoints_sets_aside_what_is_there(twice, capsys):
    """Of a run that ended before its first one, it would pass for the new one's: curves, crashes, weights."""
    first, second = twice
    broken = dataclasses.replace(first.optimizer, lr=1e30, warmup=0, clip=0.0)
    with pytest.raises(NumericError):
        train_script.main(variant(first, optimizer=broken))
    with pytest.raises(NumericError):
        train_script.main(variant(first, optimizer=broken, seed=1))
    assert f"what an earlier run left in {first.out} is in {first.out}/abandoned_0001 now" in capsys.readouterr().out
    for folder, seed in ((first.out / "abandoned_0001", 0), (first.out, 1)):
        told = [json.loads(file.read_text()) for file in sorted(folder.glob("crashes/*/crash.json"))]
        assert [found["config"]["seed"] for found in told] == [seed] * first.crashes
        assert len(list((folder / "tensorboard").iterdir())) == 1
    train_script.main(variant(second, steps=1))
    train_script.main(variant(second, out=first.out, steps=2, resume=None))
    assert metrics(first.out)[0]["step"] == 1 and (first.out / "abandoned_0002").is_dir()
    assert not (first.out / "crashes").exists()


def test_resuming_on_other_data_is_refused(tiny):
    train_script.main(variant(tiny, steps=4, stop_at=1))
    other = data.Config(source="digits", held_out=0.3)
    with pytest.raises(CheckpointError, match="was written with data"):
        train_script.main(variant(tiny, steps=4, resume="latest", data=other))


def test_a_folder_in_use_is_refused(tiny):
    with (
        record.Lock(tiny.out),
        pytest.raises(ValueError, match=r"is in use by process \d+: wait for it, or use another"),
    ):
        train_script.main(tiny)
    train_script.main(variant(tiny, steps=1))


def test_init_from_starts_at_those_weights(twice):
    first, second = twice
    train_script.main(variant(first, steps=2))
    weights = load_file(first.out / "ema.safetensors")
    slow = dataclasses.replace(second.optimizer, lr=1e-12, warmup=0)
    for n, source in enumerate([first.out / "ema.safetensors", first.out / "checkpoints" / "step_00000002"]):
        run = variant(second, out=second.out / str(n), steps=1, init_from=source, optimizer=slow)
        train_script.main(run)
        started = state(run.out, 1)
        for name, w in weights.items():
            assert (started[name] - w).abs().max() < 1e-6
            assert (started[name.replace("ema/", "param/")] - w).abs().max() < 1e-6


def test_init_from_takes_a_file_of_live_weights(tiny, capsys):
    """There are no other ones in it, and no setting to ask for them by."""
    train_script.main(variant(tiny, steps=2))
    composed = plan.make(tiny, data.open_dataset(tiny.data))
    live = checkpoint.load_weights(tiny.out / "checkpoints" / "step_00000002", composed, "param")
    told = checkpoint.read_about(tiny.out / "ema.safetensors")
    checkpoint.save_weights(tiny.out / "live.safetensors", live, told, "param")
    run = variant(tiny, out=tiny.out / "b", steps=1, init_from=tiny.out / "live.safetensors")
    slow = dataclasses.replace(tiny.optimizer, lr=1e-12, warmup=0)
    train_script.main(variant(run, optimizer=slow))
    assert "live.safetensors (step 2, live weights)" in capsys.readouterr().out
    for name, w in load_file(tiny.out / "live.safetensors").items():
        assert (state(run.out, 1)[name] - w).abs().max() < 1e-6


def test_init_from_what_would_be_set_aside_is_refused(tiny):
    """Other ranks may still read it when it is moved."""
    train_script.main(variant(tiny, steps=1))
    shutil.rmtree(tiny.out / "checkpoints")
    with pytest.raises(
        ValueError, match=r"init_from .*ema\.safetensors is what this run would set aside .* another --out"
    ):
        train_script.main(variant(tiny, steps=1, init_from=tiny.out / "ema.safetensors"))
    assert (tiny.out / "ema.safetensors").exists()


def test_the_folder_of_a_run_that_has_not_ended_names_its_checkpoint(tiny):
    train_script.main(variant(tiny, steps=2, stop_at=1))
    told = f"init_from {tiny.out} is the folder of a run that has not ended: give {tiny.out}/checkpoints/step_00000001"
    with pytest.raises(CheckpointError, match=told):
        train_script.main(variant(tiny, out=tiny.out / "b", init_from=tiny.out))


@pytest.fixture
def poison(monkeypatch):
    """poison(steps): the batches of these steps are NaN."""
    whole = train_script.loader.batches

    def poison(steps):
        def poisoned(*args, **kwargs):
            for step, batch in enumerate(whole(*args, **kwargs), 1):
                yield batch._replace(x=batch.x * float("nan")) if step in steps else batch

        monkeypatch.setattr(train_script.loader, "batches", poisoned)

    return poison


def test_ten_bad_steps_in_a_row_end_the_run(tiny, poison):
    poison(range(1, 21))
    with pytest.raises(NumericError, match=r"10 steps in a row up to 10 were not finite, the last in grad\.patch\.w"):
        train_script.main(tiny)


def test_bad_steps_with_a_good_one_between_end_no_run(tiny, poison):
    poison({*range(1, 10), *range(11, 20)})
    train_script.main(tiny)
    trained = [line for line in metrics(tiny.out) if "draw_digest" in line]
    assert [line["step"] for line in trained if "bad" not in line] == [10, 20]
    assert checkpoint.read_about(tiny.out / "checkpoints" / "step_00000020")["updates"] == 2


def test_what_a_run_writes(tiny):
    train_script.main(variant(tiny, steps=3))
    written = json.loads((tiny.out / "config.json").read_text())
    about = written.pop("_about")
    assert from_json(config.Run, written) == variant(tiny, steps=3)
    assert {"torch", "git", "command"} <= about.keys()
    line = metrics(tiny.out)[0]
    assert {"step", "loss", "grad_norm", "lr", "draw_digest"} <= line.keys()
    assert list((tiny.out / "tensorboard").glob("events*"))
    from PIL import Image

    with Image.open(tiny.out / "samples" / "step_00000003.png") as picture:
        assert picture.size == (10 * 66 + 2, 8 * 66 + 2)


def test_samples_are_functions_of_seed_and_index(tiny, tmp_path):
    sampling = dataclasses.replace(tiny.sampling, solver=None)
    train_script.main(variant(tiny, steps=3, optimizer=optim.Config(lr=1e-2), sampling=sampling))
    found = {}
    for name, changes in {
        "a": dict(num=6, batch=6),
        "b": dict(num=6, batch=4),
        "c": dict(num=3, batch=64),
        "d": dict(num=6, seed=1),
        "e": dict(num=6, guidance=1.0),
    }.items():
        path = tmp_path / f"{name}.safetensors"
        sample_script.main(
            sample_script.Sample(
                tiny.out / "ema.safetensors", tmp_path / f"{name}.png", tensors=path, label=(3, 4), **changes
            )
        )
        found[name] = load_file(path)["samples"]
    # noise is bit-equal; a matmul's bits depend on its number of rows
    assert (found["a"] - found["b"]).abs().max() < 1e-5
    assert (found["a"][:3] - found["c"]).abs().max() < 1e-5
    assert (found["a"] - found["d"]).abs().max() > 0.1
    assert (found["a"] - found["e"]).abs().max() > 1e-4
    from PIL import Image

    with Image.open(tmp_path / "a.png") as picture:
        recipe = json.loads(picture.text["odit"])
    assert recipe["labels"] == [3, 4, 3, 4, 3, 4] and recipe["sampling"]["solver"] == "heun"


WRONG_SAMPLES = [
    (dict(num=0), ValueError, "num is 0: use 1 or more"),
    (dict(label=(10,)), ValueError, "label 10 is no class of this model: it knows 10, 0 to 9"),
    (dict(solver="ddim"), ValueError, "solver is 'ddim', which does not solve a flow"),
    (dict(columns=-2), ValueError, "columns is -2: use 1 or more"),
    (dict(steps=0), ValueError, "steps is 0"),
    (dict(channels=2), ValueError, "channels is 2 but pictures have 1"),
    (dict(weights="param"), CheckpointError, "holds ema weights, not param"),
    (dict(checkpoint=Path("nowhere")), CheckpointError, "checkpoint nowhere does not exist"),
]


def test_wrong_sample_settings_are_refused(tiny, tmp_path):
    train_script.main(variant(tiny, steps=1))
    for changes, error, message in WRONG_SAMPLES:
        args = sample_script.Sample(
            **{"checkpoint": tiny.out / "ema.safetensors", "out": tmp_path / "x.png", **changes}
        )
        with pytest.raises(error, match=message):
            sample_script.main(args)


def test_evaluate_reports_and_ends_with_the_class_accuracy(tiny, capsys):
    train_script.main(variant(tiny, steps=1))
    capsys.readouterr()
    evaluate_script.main(evaluate_script.Evaluate(tiny.out / "ema.safetensors", num=50, out=tiny.out / "e.json"))
    lines = capsys.readouterr().out.strip().splitlines()
    found = json.loads((tiny.out / "e.json").read_text())
    assert lines[-1] == f"class accuracy: {found['class_accuracy']:.1f}"
    # an untrained model shows noise: far from the digits, classes at chance
    assert found["class_accuracy"] < 40 and found["judge_accuracy"] > 98
    assert found["frechet"] > 20 * found["frechet_floor"] > 0
    assert found["copies"] == 0


@pytest.mark.parametrize(
    "error, code", [(ValueError, 2), (CheckpointError, 3), (data.DataError, 4), (NumericError, 5), (OSError, 6)]
)
def test_exit_codes(error, code, capsys):
    def fail():
        raise error("what and why")

    with pytest.raises(SystemExit) as left:
        health.run(fail)
    assert left.value.code == code and capsys.readouterr().err == "error: what and why\n"


@pytest.mark.slow
def test_help_comes_within_a_second_of_importing_torch():
    """In processor time: wall time on an idle machine, and hardly more on a busy one; the best of four, in turns, as a
    machine may be slower for a while."""

    def seconds(*command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    help_ = [str(ROOT / "experiments" / "train.py"), "--help"]
    found = [(seconds(*help_), seconds("-c", "import torch")) for _ in range(4)]
    assert min(help_s for help_s, _ in found) < 1 + min(torch_s for _, torch_s in found)


def test_the_command_line():
    command = [sys.executable, str(ROOT / "experiments" / "train.py"), "digits", "--micro-batch", "36", "--no-progress"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: micro_batch 36 does not divide global_batch 96: the nearest that does is 32\n"
