"""What a grid came to: mean and spread over seeds as Markdown, CSV and a plot.

All of them are functions of the trials' files and of the grid alone, so they are the same bytes whoever ran it in
whatever order. Times are the exception, and marked as one.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odit import media
from odit.ablation.grid import Grid, Trial
from odit.ablation.metrics import METRICS, measure
from odit.record import curve, read_metrics

PANELS = 3  # of a plot beside each other
ARROW = {"higher": "↑", "lower": "↓"}


@dataclass(frozen=True)
class Row:
    """A cell: its choices and, for each metric, the value of each seed (None where it is missing)."""

    cell: tuple[str, ...]
    values: dict[str, tuple[float | None, ...]]
    folders: tuple[Path, ...]
    """The runs of its seeds."""


def rows(grid: Grid, trials: Iterable[Trial], out: Path) -> list[Row]:
    """One row a cell, in the order of the grid; seeds in the order of ``grid.seeds``."""
    cells: dict[tuple[str, ...], list[Trial]] = {}
    for trial in trials:
        cells.setdefault(trial.cell, []).append(trial)
    first = next(iter(cells.values()))
    found = []
    for cell, seeds in cells.items():
        folders = tuple(trial.folder(out) for trial in seeds)
        of_seed = [
            measure(grid.metrics, folder, trial.judgement(out), first[i].folder(out))
            for i, (trial, folder) in enumerate(zip(seeds, folders))
        ]
        found.append(Row(cell, {name: tuple(m[name] for m in of_seed) for name in grid.metrics}, folders))
    return found


def spread(values: Iterable[float | None]) -> tuple[float, float | None, int] | None:
    """Mean, sample standard deviation (None of one value) and number of the values that are there."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there)


def markdown(grid: Grid, name: str, found: list[Row], notes: Iterable[str] = ()) -> str:
    """The table for people: mean ± sample standard deviation over seeds, the best mean of a column in bold."""
    best = {metric: _best(metric, found) for metric in grid.metrics}
    head = [axis.name for axis in grid.axes]
    head += [f"{METRICS[m].title} {ARROW[METRICS[m].better]}{' (time)' * METRICS[m].timing}" for m in grid.metrics]
    lines = [f"# {name}", "", grid.about, "", _line(head), _line(["---"] * len(head))]
    for row in found:
        shown = [_shown(metric, row.values[metric], best[metric], len(grid.seeds)) for metric in grid.metrics]
        lines.append(_line([*row.cell, *shown]))
    seeds = ", ".join(map(str, grid.seeds))
    num = len(grid.seeds)
    told = f"Mean ± sample standard deviation over {num} seed{'s' * (num > 1)} ({seeds})"
    told += f", each judged by {grid.judged} samples." if grid.judged else "."
    if any(METRICS[metric].timing for metric in grid.metrics):
        told += " Columns of times depend on the machine and on what else it did; all others are exact."
    return "\n".join([*lines, "", *[f"{note}  " for note in (told, *notes)], ""])


def _best(metric: str, found: list[Row]) -> float | None:
    """The best mean of a column; None of a single one, of gaps, and of times, taken while other runs went on."""
    means = [s[0] for row in found if (s := spread(row.values[metric]))]
    if METRICS[metric].timing or metric == "loss_gap" or len(set(means)) < 2:
        return None
    return max(means) if METRICS[metric].better == "higher" else min(means)


def _shown(metric: str, values: tuple[float | None, ...], best: float | None, num_seeds: int) -> str:
    summary = spread(values)
    if summary is None:
        return "missing"
    mean, deviation, num = summary
    form = METRICS[metric].form
    text = format(mean, form) + ("" if deviation is None else f" ± {format(deviation, form)}")
    text = f"**{text}**" if mean == best else text
    return text if num == num_seeds else f"{text} (n = {num})"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def comma_separated(grid: Grid, found: list[Row]) -> str:
    """A line a cell and metric, in full precision: the choices, the summary and the value of each seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [f"seed {seed}" for seed in grid.seeds]
    writer.writerow([*(axis.name for axis in grid.axes), "metric", "timing", "mean", "std", "n", *seeds, "runs"])
    for row in found:
        for metric in grid.metrics:
            values = row.values[metric]
            mean, deviation, num = spread(values) or (None, None, 0)
            runs = " ".join(folder.name for folder in row.folders)
            writer.writerow([*row.cell, metric, METRICS[metric].timing, mean, deviation, num, *values, runs])
    return text.getvalue()


def versions(found: list[Row]) -> list[str]:
    """A line on the versions that wrote the runs; of several versions, one that says that they may differ by it."""
    told = []
    for folder in sorted({folder for row in found for folder in row.folders}):
        if (path := folder / "config.json").exists():
            about = json.loads(path.read_text(encoding="utf-8"))["_about"]
            git = (about["git"] or "no git")[:12] + " with changes" * about["git_dirty"]
            told.append(f"odit {about['odit']} ({git}), torch {about['torch']}")
    several = sorted(set(told))
    if len(several) > 1:
        return [f"The runs are of {len(several)} versions, which may differ in their numbers: {'; '.join(several)}."]
    return [f"{several[0]}."] if several else []


def save_plot(path: Path, grid: Grid, found: list[Row]) -> None:
    """A panel a metric: the last axis to the right, a line for each combination of the others, bars of the spread."""
    from matplotlib.figure import Figure

    num = len(grid.metrics) + grid.curves
    wide, high = min(num, PANELS), -(-num // PANELS)
    figure = Figure(figsize=(5.2 * wide, 4.2 * high + 0.4), dpi=110, layout="constrained")
    panels = list(figure.subplots(high, wide, squeeze=False).flat)
    for panel, metric in zip(panels, grid.metrics):
        _panel(panel, grid, metric, found)
    if grid.curves:
        _curves(panels[num - 1], found)
    for panel in panels[num:]:
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    if len(handles) > 1:
        title = ", ".join(axis.name for axis in grid.axes[:-1])
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small", title=title)
    media.save_figure(path, figure)


def _panel(panel: Any, grid: Grid, metric: str, found: list[Row]) -> None:
    places = {choice.name: i for i, choice in enumerate(grid.axes[-1].choices)}
    lines: dict[tuple[str, ...], list[tuple[int, float, float]]] = {}
    for row in found:
        if summary := spread(row.values[metric]):
            lines.setdefault(row.cell[:-1], []).append((places[row.cell[-1]], summary[0], summary[1] or 0.0))
    for i, (cell, points) in enumerate(lines.items()):
        x, mean, deviation = zip(*points)
        aside = 0.24 * ((i + 0.5) / len(lines) - 0.5)  # so that bars do not hide each other
        label = ", ".join(cell) or METRICS[metric].title
        style = "os^Dv<>P"[i % 8]
        panel.errorbar([p + aside for p in x], mean, deviation, marker=style, ms=4, lw=1, capsize=2, label=label)
    panel.set_xticks(list(places.values()), list(places))
    panel.set_xlabel(grid.axes[-1].name)
    panel.set_title(f"{METRICS[metric].title} {ARROW[METRICS[metric].better]}", fontsize="medium")
    panel.grid(alpha=0.3)


def _curves(panel: Any, found: list[Row]) -> None:
    """The training losses of all cells' first seeds over each other."""
    for row in found:
        points = curve(read_metrics(row.folders[0] / "metrics.jsonl"), "loss")
        panel.plot(list(points), list(points.values()), lw=1, alpha=0.7, label=", ".join(row.cell))
    panel.set_xlabel("step")
    panel.set_title(f"training loss, first seed, {len(found)} cells", fontsize="medium")
    panel.grid(alpha=0.3)
