"""A grid of runs: axes over settings, seeds and metrics; and the trials that it means.

A trial is one cell with one seed. What it trains and how its samples are judged are two things, each with a folder
named by a hash of all that it depends on: trials that differ in their sampling alone share one training run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from odit import checks, config, evaluate, fidelity
from odit.ablation import metrics
from odit.config import Run, Sampling
from odit.config_json import from_json, to_json

# Settings of a run that say where and how it is started, and nothing about what it is.
NO_MEANING = ("out", "resume", "progress")
# What a trial sets of its own run, so that no axis and no settings can, and what to do about it.
TAKEN = {
    "seed": "use the grid's seeds",
    "evaluate": "leave it out, as the grid's judged is for that",
    "out": "use ablate.py's --out",
    "resume": "leave it out, as every run resumes",
    "progress": "leave it out, as runs draw no bars",
}


@dataclass(frozen=True)
class Choice:
    """One place on an axis: the name that a table shows, and the settings behind it by their dotted keys."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """What is varied, and its choices in the order of the table."""

    name: str
    choices: tuple[Choice, ...]


def values(key: str, *found: Any, name: str | None = None) -> Axis:
    """An axis over one setting, named by the last part of its key unless told."""
    choices = tuple(Choice(str(value), {key: value}) for value in found)
    return Axis(name or key.rpartition(".")[2].replace("_", " "), choices)


def variants(name: str, choices: Mapping[str, Mapping[str, Any]]) -> Axis:
    """An axis whose choices set several settings each."""
    return Axis(name, tuple(Choice(label, settings) for label, settings in choices.items()))


@dataclass(frozen=True)
class Grid:
    """Every combination of the axes' choices, with every seed; combinations that no run can be are left out."""

    about: str
    """A line on what it compares."""
    axes: tuple[Axis, ...]
    """The last one is the plot's horizontal axis."""
    metrics: tuple[str, ...]
    """Names in ``metrics.METRICS``."""
    preset: str = "digits"
    """The run that all trials start from."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What all trials change of it, by dotted keys; an axis over the same setting goes before."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of a cell's runs, and of the samples by which each is judged."""
    judged: int | None = None
    """Samples by which experiments/evaluate.py judges a trial; None where nothing is judged."""
    ranks: int = 1
    """Ranks of a run, by torchrun where it is more than one."""
    curves: bool = False
    """Draws the losses of all cells over each other too."""

    def __post_init__(self) -> None:
        """Raises ValueError for a field of the wrong kind, such as a tuple of one that lacks its comma."""
        for name, (fits, fix) in KINDS.items():
            if not fits(value := getattr(self, name)):
                raise ValueError(f"the grid's {name} is {reprlib.repr(value)} ({type(value).__name__}): use {fix}")
        for axis in self.axes:
            if not _each(axis.choices, Choice) or not all(isinstance(c.settings, Mapping) for c in axis.choices):
                raise ValueError(f"axis {axis.name!r} has choices of another kind: make it by values or variants")


def _each(value: Any, kind: type) -> bool:
    """Whether it is a tuple or a list of the kind alone; True and False are no integers here."""
    return isinstance(value, (tuple, list)) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _from(least: int, value: Any) -> bool:
    return _each([value], int) and value >= least


# {field of Grid: (whether a value is of its kind, what would be)}
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "about": (lambda v: isinstance(v, str), "a line of text"),
    "axes": (lambda v: _each(v, Axis), "a tuple of axes such as (values('optimizer.lr', 1e-3, 2e-3),), comma included"),
    "metrics": (lambda v: _each(v, str), "a tuple of names such as ('loss',), comma included"),
    "preset": (lambda v: isinstance(v, str), "a preset's name such as 'digits'"),
    "settings": (lambda v: isinstance(v, Mapping), "a dict such as {'steps': 400}"),
    "seeds": (lambda v: _each(v, int), "a tuple of integers such as (0, 1)"),
    "judged": (lambda v: v is None or _from(fidelity.LEAST, v), f"None, or {fidelity.LEAST} or more such as 500"),
    "ranks": (lambda v: _from(1, v), "1 or more"),
    "curves": (lambda v: isinstance(v, bool), "True or False"),
}


@dataclass(frozen=True)
class Trial:
    """One cell with one seed."""

    cell: tuple[str, ...]
    """Its choice on each axis."""
    preset: str
    run: Run
    """What is trained; ``out`` is of no meaning."""
    sampling: Sampling
    """How the judge's samples are drawn."""
    judged: int | None
    ranks: int = 1

    @property
    def train_key(self) -> str:
        """Names the training run's folder: a hash of its whole config and of the number of ranks."""
        told = {key: value for key, value in to_json(self.run).items() if key not in NO_MEANING}
        return digest({"run": told, "ranks": self.ranks})

    @property
    def judge_key(self) -> str:
        """Names the judgement's folder: a hash of the training run's and of how samples are drawn."""
        return digest({"train": self.train_key, "num": self.judged, "sampling": to_json(self.sampling)})

    def folder(self, out: Path) -> Path:
        """Where its training run lies."""
        return out / "runs" / self.train_key

    def judgement(self, out: Path) -> Path:
        """Where the figures of its samples lie."""
        return out / "judged" / self.judge_key / "evaluation.json"


def digest(value: Any) -> str:
    """A hash of what JSON can write, of any order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def trials(grid: Grid) -> tuple[list[Trial], dict[tuple[str, ...], str]]:
    """All trials in the order of the table, seeds innermost; and the cells that were left out, with the reason.

    Raises:
        ValueError: a grid that names what is not there, or whose every cell was left out.
    """
    check(grid)
    found, left_out = [], {}
    for choices in itertools.product(*(axis.choices for axis in grid.axes)):
        cell = tuple(choice.name for choice in choices)
        settings = dict(grid.settings)
        for choice in choices:
            settings.update(choice.settings)
        base = changed(config.presets()[grid.preset][1], settings)
        made = [_trial(grid, cell, dataclasses.replace(base, seed=seed)) for seed in grid.seeds]
        try:
            for trial in made:
                _check(trial)
        except ValueError as error:
            left_out[cell] = str(error)
        else:
            found += made
    if not found:
        raise ValueError(f"no cell of the grid can run, the first because {next(iter(left_out.values()))}")
    return found, left_out


def judged_metrics(grid: Grid) -> list[str]:
    """Its metrics that a judge of samples finds."""
    return [name for name in grid.metrics if name in metrics.METRICS and metrics.METRICS[name].source == "judge"]


def check(grid: Grid) -> None:
    """Raises ValueError for a grid without meaning, one sentence with the field and a fix."""
    if grid.preset not in (known := config.presets()):
        raise ValueError(f"the grid's preset is {grid.preset!r}: use one of {', '.join(known)}")
    if unknown := [name for name in grid.metrics if name not in metrics.METRICS]:
        raise ValueError(f"the grid has metric {unknown[0]!r}: use some of {', '.join(metrics.METRICS)}")
    if not grid.metrics or not grid.axes or not grid.seeds:
        raise ValueError("the grid has no metrics, no axes or no seeds: give one or more of each")
    needed = judged_metrics(grid)
    if needed and grid.judged is None:
        raise ValueError(f"the grid has metric {needed[0]!r} but judged is None: give a number of samples such as 500")
    if grid.judged is not None and not needed:
        raise ValueError(
            f"the grid's judged is {grid.judged} but no metric needs it: leave it out or add class_accuracy"
        )
    if len(set(grid.seeds)) < len(grid.seeds):
        raise ValueError(f"the grid's seeds are {' '.join(map(str, grid.seeds))}: give each once")
    for axis in grid.axes:
        names = [choice.name for choice in axis.choices]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"axis {axis.name!r} has the choices {names}: give one or more, each of its own name")
    _check_settings(grid)


def _check_settings(grid: Grid) -> None:
    """Raises ValueError for a setting that a trial or another axis would overwrite: a table would tell what is not."""
    for key in grid.settings:
        if key in TAKEN:
            raise ValueError(f"the grid's settings have {key}, which each trial sets: {_instead(key, [grid.settings])}")
    owners: dict[str, str] = {}
    for axis in grid.axes:
        keys = dict.fromkeys(key for choice in axis.choices for key in choice.settings)
        for key in keys:
            if key in TAKEN:
                fix = _instead(key, [choice.settings for choice in axis.choices])
                raise ValueError(f"axis {axis.name!r} changes {key}, which each trial sets: {fix}")
            if other := next((name for taken, name in owners.items() if _overlap(key, taken)), None):
                raise ValueError(
                    f"{key} is in two axes: {other!r} and {axis.name!r} would overwrite each other's, change it in one"
                )
        owners |= dict.fromkeys(keys, axis.name)


def _instead(key: str, changes: list[Mapping[str, Any]]) -> str:
    """What to do where settings have what a trial sets."""
    found = tuple(dict.fromkeys(change[key] for change in changes if key in change)) if key == "seed" else ()
    return f"use seeds={found}" if found else TAKEN[key]


def _overlap(a: str, b: str) -> bool:
    """Whether two dotted keys are of one setting, or one of them holds the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def changed(run: Run, settings: Mapping[str, Any]) -> Run:
    """The run with some settings changed by their dotted keys; raises ValueError for what is no setting."""
    told = to_json(run)
    for key, value in settings.items():
        *path, last = key.split(".")
        inner = told
        for name in path:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key} is no setting of this version: {name} has no parts")
        inner[last] = to_json(value)
    return from_json(Run, told)


def _trial(grid: Grid, cell: tuple[str, ...], run: Run) -> Trial:
    """Takes what experiments/evaluate.py can be told out of the run, so that it decides over the judgement alone."""
    sampling = run.sampling
    if grid.judged is not None:
        base = changed(config.presets()[grid.preset][1], grid.settings).sampling
        guidance = dataclasses.replace(sampling.guidance, scale=base.guidance.scale)
        own = dataclasses.replace(sampling, solver=None, steps=base.steps, guidance=guidance)
        run = dataclasses.replace(run, sampling=own)
    return Trial(cell, grid.preset, dataclasses.replace(run, evaluate=False), sampling, grid.judged, grid.ranks)


def _check(trial: Trial) -> None:
    """Raises ValueError for what cannot be trained, or not be sampled as it is to be judged, or has no judge."""
    if trial.judged is not None and trial.run.data.source not in evaluate.JUDGES:
        raise ValueError(
            f"data.source is {trial.run.data.source}, which has no judge: use one of {', '.join(evaluate.JUDGES)}, or "
            "leave out judged and its metrics"
        )
    if trial.judged is not None and checks.no_digits_held_out(trial.run.data):
        raise ValueError(
            f"data.held_out is {trial.run.data.held_out} but judged needs held-out digits for its judge: use 0.1666, "
            "or leave out judged and its metrics"
        )
    checks.check(trial.run, world=trial.ranks)
    checks.check(dataclasses.replace(trial.run, sampling=trial.sampling), world=trial.ranks)
