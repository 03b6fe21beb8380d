"""Runs side by side: what their configs differ in, the first step at which their numbers do, curves and pictures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odit import media
from odit.record import curve, read_metrics
from odit.storage import whole

LETTER = 7  # pixels, at most, of a letter above a picture
MISSING = "not there"
PLACE = ("out", "resume")  # where a run is and how it was started last


@dataclass(frozen=True)
class Told:
    """What a run's folder tells."""

    name: str
    """Its folder, as short as tells it from the others'."""
    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluation: dict[str, Any]


def read(folders: tuple[Path, ...]) -> list[Told]:
    """Reads runs; raises ValueError where a folder is none, or one is given twice."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"runs {' '.join(map(str, folders))} has a folder twice: give each once")
    found = []
    for name, folder in zip(short_names(folders), folders):
        if not (folder / "config.json").is_file():
            raise ValueError(f"run {folder} has no config.json: give the --out of a run of train.py")
        told, judged = folder / "config.json", folder / "evaluation.json"
        evaluation = json.loads(judged.read_text(encoding="utf-8")) if judged.exists() else {}
        config = json.loads(told.read_text(encoding="utf-8"))
        found.append(Told(name, folder, config, read_metrics(folder / "metrics.jsonl"), evaluation))
    return found


def short_names(folders: tuple[Path, ...]) -> list[str]:
    """The fewest last parts of the folders' paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for num in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-num:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def flat(config: dict[str, Any], key: str = "") -> dict[str, Any]:
    """{dotted key: value}, of versions too."""
    found = {}
    for name, value in config.items():
        path = f"{key}.{name}" if key else name
        found |= flat(value, path) if isinstance(value, dict) else {path: value}
    return found


def differences(runs: list[Told]) -> list[tuple[str, list[Any]]]:
    """(dotted key, value of each run) of every setting and version that not all have alike, places aside."""
    flats = [flat(run.config) for run in runs]
    keys = {key: None for found in flats for key in found if key not in (*PLACE, "_about.command")}
    told = [(key, [found.get(key, MISSING) for found in flats]) for key in keys]
    return [(key, values) for key, values in told if any(value != values[0] for value in values)]


@dataclass(frozen=True)
class Parting:
    """Where one run leaves another, over the steps that both logged."""

    num_common: int
    draws: int | None
    """The first step whose draw_digest differs: the runs no longer see the same times, noises and samples."""
    loss: int | None
    """The first step whose loss differs, in any bit."""
    largest: float | None
    """Relative difference of the losses where it is largest."""
    at: int | None
    """That step."""


def parting(a: Told, b: Told) -> Parting:
    """Where ``b`` leaves ``a``; a step is where it shows, which is at most a run's log_every after where it begins."""
    ours, theirs = _losses(a.lines), _losses(b.lines)
    steps = sorted(ours.keys() & theirs.keys())
    draws = next((s for s in steps if ours[s].get("draw_digest") != theirs[s].get("draw_digest")), None)
    loss = next((s for s in steps if ours[s]["loss"] != theirs[s]["loss"]), None)
    gaps = {
        s: abs(x - y) / max(abs(x), 1e-30)
        for s in steps
        if (x := ours[s]["loss"]) is not None and (y := theirs[s]["loss"]) is not None
    }
    at = max(gaps, key=lambda s: gaps[s], default=None)
    return Parting(len(steps), draws, loss, None if at is None else gaps[at], at)


def _losses(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in lines if "loss" in line}


def describe(a: Told, b: Told) -> str:
    """A sentence on where two runs part."""
    found = parting(a, b)
    if not found.num_common:
        return f"{b.name} and {a.name} logged no step in common."
    told = [f"{b.name} against {a.name}, {found.num_common} common steps"]
    told.append("the same draws" if found.draws is None else f"draws differ from step {found.draws}")
    if found.loss is None:
        told.append("the same losses, bit for bit")
    else:
        told.append(f"losses differ from step {found.loss}")
        if found.at is not None:
            told.append(f"by {found.largest:.1e} of their value at most (step {found.at})")
    return f"{'; '.join(told)}."


def report(runs: list[Told], num_steps: int = 8) -> str:
    """All of it as Markdown: settings, partings, losses at a few steps and the last figures."""
    names = [run.name for run in runs]
    parts = ["# Runs side by side", "", *[f"- {run.name}: {run.folder}" for run in runs]]
    if found := differences(runs):
        parts += _section("Settings and versions that differ", ["setting", *names], found)
    else:
        parts += ["", "## Settings and versions that differ", "", "None."]
    parts += ["", "## Where they part", "", *[f"- {describe(runs[0], run)}" for run in runs[1:]]]
    parts += ["", "A difference shows at the next step that both runs logged."]
    for name, title in (("loss", "Training loss"), ("validation_loss", "Validation loss")):
        curves = [curve(run.lines, name) for run in runs]
        steps = spaced(sorted(set().union(*curves)), num_steps)
        if steps:
            rows = [(str(step), [c.get(step, MISSING) for c in curves]) for step in steps]
            parts += _section(title, ["step", *names], rows)
    if rows := last_figures(runs):
        parts += _section("Last figures", ["figure", *names], rows)
    return "\n".join([*parts, ""])


def spaced(steps: list[int], most: int) -> list[int]:
    """At most that many of the steps, evenly spaced, first and last among them."""
    num = min(most, len(steps))
    return [steps[i * (len(steps) - 1) // max(1, num - 1)] for i in range(num)]


def last_figures(runs: list[Told]) -> list[tuple[str, list[Any]]]:
    """(name, each run's last logged value), of what training, validation and the judge tell in numbers."""
    last = []
    for run in runs:
        found = {key: value for line in run.lines for key, value in line.items() if value is not None}
        judged = {f"evaluation_{key}": value for key, value in run.evaluation.items()}
        last.append({**found, **{k: v for k, v in judged.items() if isinstance(v, (int, float))}})
    names = {name: None for found in last for name in found if "_loss_t" not in name}
    return [(name, [found.get(name, MISSING) for found in last]) for name in names]


def _section(title: str, head: list[str], rows: Iterable[tuple[str, list[Any]]]) -> list[str]:
    """A heading and a table, each row a name and a value of each run."""
    lines = [head, ["---"] * len(head), *[[name, *map(_shown, values)] for name, values in rows]]
    return ["", f"## {title}", "", *[f"| {' | '.join(line)} |" for line in lines]]


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def save_plot(path: Path, runs: list[Told]) -> None:
    """Losses, gradient norms, validation losses and speeds over steps, a line a run."""
    from matplotlib.figure import Figure

    known = ("loss", "validation_loss", "grad_norm", "samples_per_s")
    names = [name for name in known if any(curve(run.lines, name) for run in runs)] or ["loss"]
    figure = Figure(figsize=(4.6 * len(names), 4.2), dpi=110, layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for run, style in zip(runs, itertools.cycle(("-", "--", "-.", ":"))):  # equal runs lie on each other
            points = curve(run.lines, name)
            marker = "o" if len(points) < 20 else None
            panel.plot(list(points), list(points.values()), style, marker=marker, ms=3, lw=1.3, label=run.name)
        panel.set_xlabel("step")
        panel.set_title(name.replace("_", " "), fontsize="medium")
        panel.grid(alpha=0.3)
        if name == names[0]:
            panel.legend(fontsize="small")
    media.save_figure(path, figure)


def save_samples(path: Path, runs: list[Told]) -> int | None:
    """Puts the sample grids of the newest step that all runs have side by side; None where they share none.

    The pictures are those that the runs wrote, each under its name; films are not shown.
    """
    from PIL import Image, ImageDraw

    steps = set.intersection(*({f.stem for f in (run.folder / "samples").glob("step_*.png")} for run in runs))
    if not steps:
        return None
    step = max(steps)
    grids = [Image.open(run.folder / "samples" / f"{step}.png").convert("RGB") for run in runs]
    gap, line = 12, 18
    width = sum(grid.width for grid in grids) + gap * (len(grids) + 1)
    shown = Image.new("RGB", (width, max(grid.height for grid in grids) + line + 2 * gap), "white")
    left, pen = gap, ImageDraw.Draw(shown)
    for run, grid in zip(runs, grids):
        pen.text((left, gap // 2), run.name[-(grid.width // LETTER) :], fill="black")
        shown.paste(grid, (left, line + gap))
        left += grid.width + gap
    with whole(path, sync=False) as temporary:
        shown.save(temporary, format="PNG")
    return int(step.removeprefix("step_"))
