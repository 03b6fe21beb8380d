"""The benchmark of kernels runs, in the interpreter: its rows, not its times."""

import json
from pathlib import Path

import pytest
import torch

from odit.bench import kernels, optimizer, rates, table

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
