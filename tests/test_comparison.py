"""Runs side by side: settings that differ, the first step at which numbers do, and pictures."""

import json

import numpy
import pytest
from conftest import script
from PIL import Image

from odit import comparison

compare = script("compare")
CONFIG = {"out": "x", "resume": None, "seed": 0, "optimizer": {"lr": 1.0, "clip": 0.0}, "_about": {"torch": "2"}}


@pytest.fixture
def make_run(tmp_path):
    """(name, losses {step: loss}, draws {step: digest}, config changes) -> folder of a run."""

    def make(name, losses, draws=None, picture=None, **changes):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        told = {**CONFIG, "out": str(folder), **changes}
        lines = [{"step": s, "loss": x, "draw_digest": (draws or {}).get(s, f"d{s}")} for s, x in losses.items()]
        lines.append({"step": max(losses), "validation_loss": 0.25})
        torn = '{"step": 99, "lo'  # of a run that is still writing
        (folder / "config.json").write_text(json.dumps(told))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
        if picture is not None:
            step, grey = picture
            Image.new("RGB", (40, 30), (grey,) * 3).save(folder / "samples" / f"step_{step:08d}.png")
        return folder

    return make


def test_the_first_step_that_differs_is_found_for_draws_and_for_losses(make_run):
    a = make_run("a", {1: 2.0, 2: 1.0, 4: 0.5, 6: 0.4})
    b = make_run("b", {1: 2.0, 2: 1.0 + 2**-52, 3: 9.0, 4: 0.75}, draws={4: "other"})
    found = comparison.parting(*comparison.read((a, b)))
    assert found == comparison.Parting(num_common=3, draws=4, loss=2, largest=0.5, at=4)
    words = comparison.describe(*comparison.read((a, b)))
    assert "draws differ from step 4; losses differ from step 2; by 5.0e-01 of their value at most (step 4)" in words


def test_equal_runs_are_told_so_and_runs_without_common_steps_too(make_run):
    same = comparison.read((make_run("a", {1: 2.0, 2: 1.0}), make_run("b", {2: 1.0, 5: 3.0})))
    assert comparison.describe(*same).endswith("1 common steps; the same draws; the same losses, bit for bit.")
    apart = comparison.read((make_run("c", {1: 2.0}), make_run("d", {2: 2.0})))
    assert "logged no step in common" in comparison.describe(*apart)


def test_a_loss_that_is_not_finite_differs(make_run):
    runs = comparison.read((make_run("a", {1: 2.0, 2: 1.0}), make_run("b", {1: 2.0, 2: None})))
    assert comparison.parting(*runs).loss == 2 and comparison.parting(*runs).at == 1


def test_settings_that_differ_are_dotted_and_places_are_none(make_run):
    a = make_run("a", {1: 1.0})
    b = make_run("b", {1: 1.0}, optimizer={"lr": 2.0, "clip": 0.0}, resume="latest", _about={"torch": "3"})
    c = make_run("c", {1: 1.0}, later=True)
    missing = comparison.MISSING
    assert comparison.differences(comparison.read((a, b, c))) == [
        ("optimizer.lr", [1.0, 2.0, 1.0]),
        ("_about.torch", ["2", "3", "2"]),
        ("later", [missing, missing, True]),
    ]
    assert comparison.differences(comparison.read((a, make_run("d", {1: 1.0})))) == []


def test_names_are_as_short_as_tells_runs_apart(tmp_path):
    assert comparison.short_names((tmp_path / "x" / "a", tmp_path / "y" / "a")) == ["x/a", "y/a"]
    assert comparison.short_names((tmp_path / "x" / "a", tmp_path / "y" / "b")) == ["a", "b"]


def test_steps_of_a_table_are_evenly_spaced_with_both_ends():
    assert comparison.spaced(list(range(0, 101)), 5) == [0, 25, 50, 75, 100]
    assert comparison.spaced([3], 5) == [3] and comparison.spaced([], 5) == []


def test_the_script_writes_report_curves_and_samples(make_run, tmp_path, capsys):
    a = make_run("a", {1: 2.0, 2: 1.0}, picture=(2, 50))
    b = make_run("b", {1: 2.0, 2: 1.5}, picture=(2, 200), seed=1)
    (b / "evaluation.json").write_text(json.dumps({"class_accuracy": 12.5, "sampling": {"steps": 3}}))
    compare.main(compare.Compare((a, b), tmp_path / "out"))
    told = capsys.readouterr().out
    for line in (
        "| seed | 0 | 1 |",
        "| 2 | 1 | 1.5 |",
        "| validation_loss | 0.25 | 0.25 |",
        f"| evaluation_class_accuracy | {comparison.MISSING} | 12.5 |",
    ):
        assert line in told.splitlines()
    assert (tmp_path / "out" / "report.md").read_text() in told
    with Image.open(tmp_path / "out" / "curves.png") as curves:
        assert curves.size[0] > 600
    shown = numpy.asarray(Image.open(tmp_path / "out" / "samples.png").convert("L"))
    assert (shown == 50).sum() == (shown == 200).sum() == 40 * 30  # each whole
    columns = [numpy.flatnonzero((shown == grey).any(0)) for grey in (50, 200)]
    assert columns[0].max() < columns[1].min()


def test_runs_without_a_common_picture_are_compared_all_the_same(make_run, tmp_path, capsys):
    runs = make_run("a", {1: 2.0}, picture=(1, 50)), make_run("b", {1: 2.0}, picture=(2, 50))
    compare.main(compare.Compare(runs, tmp_path / "out", plot=False))
    assert "the runs have no sample grid of one step" in capsys.readouterr().out
    assert not (tmp_path / "out" / "samples.png").exists()


def test_what_cannot_be_compared_is_refused(make_run, tmp_path):
    a = make_run("a", {1: 1.0})
    for args, words in (
        (compare.Compare((a,)), "runs has 1 folder: give two or more"),
        (compare.Compare((a, a)), "has a folder twice"),
        (compare.Compare((a, tmp_path / "none")), "none has no config.json: give the --out of a run"),
        (compare.Compare((a, tmp_path), steps=1), "steps is 1"),
    ):
        with pytest.raises(ValueError, match=words):
            compare.main(args)
