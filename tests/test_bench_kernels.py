"""The benchmark of kernels runs, in the interpreter: its rows, not its times."""

import json
import re
from pathlib import Path

import pytest
import torch

from odit.bench import attention, kernels, optimizer, rates, sample, save, sequence, table, train, zero

pytest.importorskip("triton")


def test_rows(capsys):
    cfg = kernels.Kernels(
        batch=1, tokens=3, width=64, heads=4, precision="fp32", compile=False, repeats=1, device="cpu"
    )
    kernels.kernels(cfg)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [f"{n} {d}" for n in cfg.kernels for d in ("forward", "backward")][:-1]  # bias has one
    assert [row["name"] for row in rows] == ["copy", *names]
    for row in rows[1:]:
        assert row["fused_ms"] > 0 and row["of_copy"] >= 0
        assert row["fused_error"] < 1e-6 and row["eager_error"] < 1e-6


def test_the_row_of_the_optimizer(monkeypatch):
    one = {"a": torch.empty(5)}
    monkeypatch.setattr(optimizer.models, "of", lambda cfg: type("one", (), {"declare": lambda *args: one}))
    row = optimizer.adamw_row(optimizer.Optimizer(preset="digits", repeats=1), torch.device("cpu"), 1.0)
    assert row["parameters"] == 5 and row["fused_error"] < 2 * row["eager_error"]


def test_a_step_of_thin_blocks_is_measured():
    cfg = rates.Rates(repeats=1, device="cpu")
    assert rates.around_ms(cfg) > 0 and rates.thin_step_ms(cfg, 2, "auto+nographs") > 0


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"kernels has 'softmax': use modulate"):
        kernels.make_case(kernels.Kernels(batch=1, tokens=1), "softmax", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"width 64 .* heads 5"):
        kernels.make_case(kernels.Kernels(batch=1, tokens=1, width=64, heads=5), "norm_rotate", torch.device("cpu"))


@pytest.mark.parametrize("name, kinds", [("h200", 5), ("h200-plan", 1)])
def test_the_tables_of_the_readme_are_those_of_the_rows(name, kinds):
    root = Path(__file__).parents[1]
    rows = [json.loads(line) for line in (root / "docs" / f"{name}.jsonl").read_text().splitlines()]
    found = table.markdown(rows)
    assert found.count("---\n") + found.count("--- |\n") == kinds and found in (root / "README.md").read_text()


@pytest.mark.parametrize("content", ["", "other words", '{"name": "x"}', "{\n}"])
def test_files_without_a_table_are_refused(content, tmp_path):
    (tmp_path / "rows").write_text(content)
    with pytest.raises(ValueError, match=r"rows (has [01] rows, none of a kind with a table|line 1 is no whole row)"):
        table.table(table.Table(tmp_path / "rows"))


def test_a_table_of_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=rf"path {path} is no file: give one of rows"):
            table.table(table.Table(path))


def test_words_of_stages():
    found = {word: zero.parse(word) for word in (*zero.Zero.stages, "3+auto", "3+auto24", "2+auto1.5")}
    assert found["0"] == (0, "none", None) and found["3+optimizer"] == (3, "optimizer", None)
    assert (found["3+auto"], found["3+auto24"]) == ((3, "auto", None), (3, "auto", 24.0))
    assert found["2+auto1.5"] == (2, "auto", 1.5)


@pytest.mark.parametrize("word", ["7", "foo", "", "3+", "3+disk", "3+optimizer24", "3+autofew", "33"])
def test_stages_that_are_none_are_refused_before_any_is_measured(word, capsys):
    with pytest.raises(ValueError, match=rf"^stages has '{re.escape(word)}': use 0, 1, 2 or 3, alone or with"):
        zero.zero(zero.Zero(preset="digits", batch=2, steps=1, warmup=0, stages=("0", word), device="cpu"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("measure, cfg", [(zero.zero, zero.Zero), (train.train_rows, train.Train)])
@pytest.mark.parametrize("changes", [{"steps": 0}, {"warmup": -1}])
def test_steps_without_a_measured_one_are_refused(measure, cfg, changes):
    with pytest.raises(ValueError, match=r"^steps is \d+ and warmup -?\d+: use 1 or more measured steps"):
        measure(cfg(preset="digits", **changes))


@pytest.mark.parametrize(
    "measure, cfg, name",
    [
        (kernels.kernels, kernels.Kernels, "repeats"),
        (attention.attention_rows, attention.Attention, "steps"),
        (sample.sample_rows, sample.Sample, "repeats"),
    ],
)
def test_medians_of_nothing_are_refused(measure, cfg, name, capsys):
    with pytest.raises(ValueError, match=rf"^{name} is 0: use 1 or more"):
        measure(cfg(**{name: 0}, device="cpu"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("shape", ["8x4096x16", "8x4096x16x", "8x4096x16x0", "axbxcxd"])
def test_shapes_that_are_none_are_refused_before_any_is_measured(shape, capsys):
    with pytest.raises(ValueError, match=rf"^shapes has '{shape}': write batch x tokens x heads x head size"):
        attention.attention_rows(attention.Attention(shapes=("1x2x1x8", shape), backends=("plain",), device="cpu"))
    assert not capsys.readouterr().out


def test_rows_of_pictures_tell_what_was_taken(capsys):
    way = "auto+graphs"
    sample.sample_rows(sample.Sample("digits", (1,), (way,), solver="euler", steps=1, repeats=1, device="cpu"))
    row = json.loads(capsys.readouterr().out)
    assert row["way"] == way and row["s"] > 0
    assert "kernels: reference (auto; no fused ones: " in row["taken"]
    assert row["taken"].endswith("; graphs: none (the device is cpu)")


def test_the_row_of_a_save(tmp_path, capsys):
    cfg = save.Save("digits", batch=4, steps=2, warmup=1, out=tmp_path / "run", device="cpu")
    save.save_rows(cfg)
    row = json.loads(capsys.readouterr().out)
    assert row["bytes_equal"] and row["gib"] >= 0 and 0 < row["handed_over_s"] and row["sync_s"] > 0
    assert not cfg.out.exists()
    cfg.out.mkdir()
    with pytest.raises(ValueError, match="run is there already"):
        save.save_rows(cfg)


@pytest.mark.parametrize("changes", [{"sp": (2, 0)}, {"lengths": (0,)}, {"frames": 0}, {"batch": -1}])
def test_numbers_of_sequences_below_one_are_refused(changes):
    with pytest.raises(ValueError, match=rf"^{next(iter(changes))} has (0|-1): use 1 or more"):
        sequence.sequence(sequence.Sequence(**{"preset": "digits", "sp": (2,), "lengths": (16,), **changes}))


@pytest.mark.parametrize("sp, length, frames", [(3, 16, 16), (2, 48, 3), (4, 12, 6)])
def test_sequences_are_measured_where_shares_are_uneven(sp, length, frames, capsys):
    sequence.sequence(sequence.Sequence("digits", sp=(sp,), lengths=(length,), frames=frames))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["forward_elements"] == row["forward_formula"], row["name"]
        assert row["backward_elements"] == row["backward_formula"], row["name"]
