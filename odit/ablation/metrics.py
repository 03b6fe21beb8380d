"""What a trial came to, read from the files that its run and its judgement left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from odit.record import curve, read_metrics

DONE = "ablation.json"  # beside a finished run: how long it took, and its command


@dataclass(frozen=True)
class Metric:
    """One figure of a trial."""

    title: str
    source: Literal["judge", "metrics", "done"]
    """evaluation.json, metrics.jsonl or ablation.json."""
    better: Literal["higher", "lower"]
    read: Callable[[Any], float | None]
    """Takes what the source holds."""
    form: str = ".3f"
    timing: bool = False
    """Whether it is a time: it depends on the machine and on what else that does, and differs from run to run."""


def _key(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda found: found.get(name)


def _last(name: str) -> Callable[[list[dict[str, Any]]], float | None]:
    return lambda lines: next((line[name] for line in reversed(lines) if line.get(name) is not None), None)


def _speed(lines: list[dict[str, Any]]) -> float | None:
    """The median of the logged speeds without the first line's, which knows the start-up."""
    found = [line["samples_per_s"] for line in lines if "samples_per_s" in line][1:]
    return statistics.median(found) if found else None


METRICS = {
    "class_accuracy": Metric("class accuracy, %", "judge", "higher", _key("class_accuracy"), ".1f"),
    "frechet": Metric("Frechet distance", "judge", "lower", _key("frechet"), ".2f"),
    "nearest": Metric("nearest training digit", "judge", "lower", _key("nearest"), ".2f"),
    "validation_loss": Metric("validation loss", "metrics", "lower", _last("validation_loss"), ".5f"),
    "loss": Metric("last loss", "metrics", "lower", _last("loss"), ".5f"),
    "loss_gap": Metric("largest loss gap", "metrics", "lower", lambda lines: None, ".1e"),  # measure has both runs
    "samples_per_s": Metric("samples/s", "metrics", "higher", _speed, ".0f", timing=True),
    "wall_s": Metric("wall time, s", "done", "lower", _key("wall_s"), ".0f", timing=True),
}


def measure(names: tuple[str, ...], folder: Path, judgement: Path, against: Path) -> dict[str, float | None]:
    """The figures of one trial; None where a file or its figure is missing.

    Args:
        against: the run with the same seed that the loss gap is measured from.
    """
    if not (folder / DONE).exists():
        return dict.fromkeys(names)
    lines = read_metrics(folder / "metrics.jsonl")
    judged = json.loads(judgement.read_text(encoding="utf-8")) if judgement.exists() else {}
    sources = {"judge": judged, "metrics": lines, "done": json.loads((folder / DONE).read_text(encoding="utf-8"))}
    found = {name: METRICS[name].read(sources[METRICS[name].source]) for name in names}
    if "loss_gap" in found and (against / DONE).exists():
        found["loss_gap"] = loss_gap(lines, read_metrics(against / "metrics.jsonl"))
    return found


def loss_gap(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> float | None:
    """The largest relative difference of two runs' training losses over the steps that both logged."""
    a, b = curve(lines, "loss"), curve(others, "loss")
    return max((abs(a[step] - b[step]) / max(abs(b[step]), 1e-30) for step in a.keys() & b.keys()), default=None)
