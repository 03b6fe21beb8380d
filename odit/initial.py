"""``--init-from``: step 0 from weights that need not be those of quite this model.

What hangs on classes, captions or a learned variance is fitted by name, all else must be the same:

  label.w               its classes where their number is the same, or drawn; the null row, its last, stays the null row
  time.fc2.b            takes the null row where labels end: the model starts as the unconditional half of what it was
  text.*, *.cross.*     drawn where the weights have none or those of another width, left out where this model has none
  *.lora.*              drawn where the weights have none
  final.out.*           its prediction half; rows of a learned variance that are not there are zero

Each rank reads its own parts; weights of other projects are read whole on each rank first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit import finetune, param, random, tree
from odit.checkpoint import Weights
from odit.config_json import to_json
from odit.health import CheckpointError
from odit.models.config import Shape
from odit.plan import Plan
from odit.source import Foreign, Source, open_source

STRUCTURE = ("arch", "width", "depth", "heads", "patch", "frame_patch", "adaln", "qk_norm", "mlp")
MEANING = (*STRUCTURE, "positions", "timestep_freqs", "mlp_eps")
"""Settings of a model that must be the same; the last ones show in no shape."""
LISTED = 6  # names in a line


class Fit(NamedTuple):
    """One leaf made of what the weights have: ``make(drawn) -> whole``, from the leaf's own draw."""

    told: str
    make: Callable[[Tensor], Tensor]
    drawn: bool
    """Whether some of it stays as it is drawn."""


class Start(NamedTuple):
    """This rank's parts of the weights of step 0, and lines on where they are from."""

    params: tree.Tree
    lines: list[str]


def start(plan: Plan, drawn: tree.Tree, key: random.Key) -> Start:
    """Step 0 of ``plan`` from ``run.init_from``.

    Args:
        drawn: this rank's parts of a fresh draw from ``key``.
    Raises:
        CheckpointError: weights that cannot be read, or are of another model: both shapes, and the settings behind it.
        ValueError: a leaf that is drawn afresh and that finetune.train leaves as it is drawn.
    """
    source = open_source(plan.run.init_from, None, Foreign(heads=plan.run.model.heads), setting="init_from")
    shapes, declared = source.weights.shapes, dict(tree.items(plan.declared))
    fits = {path: fit for path, fit in _fits(source, plan) if path in declared}
    fresh = [path for path in declared if path not in fits and _is_drawn(path, shapes.get(path), declared[path].shape)]
    left = [path for path in shapes if path not in declared]
    _check_same(source, plan, {*fits, *fresh})
    told = {path: f"{path} ({fits[path].told})" for path in fits} | {path: path for path in fresh}
    _check_trained(plan, {p: told[p] for p in declared if p in fresh or (p in fits and fits[p].drawn)})
    line = _line(source, len(declared) - len(fits) - len(fresh), len(declared), told, left)
    if plan.run.finetune.strict and (left or fits or not all(map(finetune.is_adapter, fresh))):
        raise CheckpointError(f"finetune.strict wants weights that fit as they are, not so; {line}")

    def leaf(path: str, p: param.Param, spec: Any, mine: Tensor) -> Tensor:
        rank = plan.layout.axis.rank
        if path in fresh:
            return mine
        if path in fits:
            whole = fits[path].make(param.draw(p, path, random.fold_in(key, "weights")))
            return spec.take(whole, rank).to(plan.home, copy=True).contiguous()
        return source.weights.read(path, spec.offsets(p.shape, rank), spec.local_shape(p.shape)).to(plan.home)

    params = tree.map_with_path(leaf, plan.declared, plan.layout.specs, drawn)
    return Start(params, [line, *source.note, *_other_objective(source, plan)])


def _whole(weights: Weights, path: str) -> Tensor:
    shape = weights.shapes[path]
    return weights.read(path, (0,) * len(shape), shape)


def _fits(source: Source, plan: Plan) -> list[tuple[str, Fit]]:
    """Leaves that are made of what the weights have, by path."""
    weights, theirs, mine = source.weights, source.shape, plan.shape
    rows, wanted = weights.shapes.get("label.w", (0,))[0], dict(tree.items(plan.declared)).get("label.w")
    found = []
    if rows and wanted is not None and (theirs.num_classes, rows) != (mine.num_classes, wanted.shape[0]):
        found.append(("label.w", _fit_labels(weights, rows, wanted.shape[0], theirs.num_classes, mine.num_classes)))
    if rows > theirs.num_classes and wanted is None:
        found.append(("time.fc2.b", Fit("the null row of label.w added", lambda _: _without_labels(weights), False)))
    if theirs.outputs != mine.outputs and theirs.channels == mine.channels:
        found += [(f"final.out.{name}", _fit_outputs(weights, f"final.out.{name}", theirs, mine)) for name in "wb"]
    return found


def _without_labels(weights: Weights) -> Tensor:
    """time.fc2.b (D,) of the model whose every label is the null label."""
    return _whole(weights, "time.fc2.b") + _whole(weights, "label.w")[-1]


def _fit_labels(weights: Weights, rows: int, wanted: int, theirs: int, mine: int) -> Fit:
    """Classes stay where they are as many, and the null label, the row after them, where both models have one."""
    same, kept = theirs == mine, rows > theirs and wanted > mine

    def make(drawn_VD: Tensor) -> Tensor:
        table_VD = _whole(weights, "label.w")
        if same:
            drawn_VD[:mine] = table_VD[:mine]
        if kept:
            drawn_VD[mine] = table_VD[theirs]
        return drawn_VD

    classes = f"{mine} classes" if same else f"{theirs} -> {mine} classes"
    null = "null row kept" if kept else "null row drawn" if wanted > mine else "no null row"
    return Fit(f"{classes}, {null}", make, not same or (wanted > mine and not kept))


def _fit_outputs(weights: Weights, path: str, theirs: Shape, mine: Shape) -> Fit:
    """Rows are (P, outputs, C): a token's places, then the prediction and, where it is learned, the variance."""

    def make(drawn: Tensor) -> Tensor:
        found = _whole(weights, path).unflatten(0, (-1, theirs.outputs, theirs.channels))
        made = torch.zeros_like(drawn).unflatten(0, (-1, mine.outputs, mine.channels))
        made[:, :1] = found[:, :1]
        return made.flatten(0, 2)

    told = "prediction kept, variance zero" if mine.outputs > 1 else "prediction kept, variance left out"
    return Fit(told, make, mine.outputs > 1)


def _is_drawn(path: str, found: tuple[int, ...] | None, wanted: tuple[int, ...]) -> bool:
    """Whether a leaf is drawn: one of conditions, of another shape or not there, or an adapter that is not there."""
    if path.startswith("text."):
        return found != wanted
    return found is None and (path == "label.w" or ".cross." in path or finetune.is_adapter(path))


def _check_same(source: Source, plan: Plan, fitted: set[str]) -> None:
    """Refuses all that is not fitted and differs: names, shapes, and settings that neither shows."""
    weights, declared = source.weights, dict(tree.items(plan.declared))
    model = to_json(plan.run.model)
    behind = [
        f"model.{name} is {source.model[name]} there and {model[name]} here"
        for name in (*STRUCTURE, "mlp_ratio")
        if name in source.model and source.model[name] != model[name]
    ]
    if source.shape.channels != plan.shape.channels:
        behind.append(f"samples have {source.shape.channels} channels there and {plan.shape.channels} here")
    why = f": {', '.join(behind)}" if behind else ": it was written for another model"
    for path in declared:
        if path not in fitted and path not in weights.shapes:
            raise CheckpointError(f"init_from {weights.path} has no tensor {path}{why}")
    for path in weights.shapes:
        if path not in declared and finetune.is_adapter(path):
            raise CheckpointError(
                f"init_from {weights.path} holds adapters ({path}) that this run has not: give the ema.safetensors of "
                "that run, where they are merged"
            )
        if path not in declared and not (path.startswith(("label.", "text.")) or ".cross." in path):
            raise CheckpointError(f"init_from {weights.path} holds {path}, which this model has not{why}")
    for path, p in declared.items():
        if path not in fitted and weights.shapes[path] != p.shape:
            raise CheckpointError(
                f"{path} in init_from {weights.path} has shape {weights.shapes[path]}, this model wants {p.shape}{why}"
            )
    for name in MEANING:
        if name in source.model and source.model[name] != model[name]:
            raise CheckpointError(
                f"init_from {weights.path} is of a model with model.{name} {source.model[name]} and this run has "
                f"{model[name]}, which no shape shows: use --model.{name.replace('_', '-')} {source.model[name]}"
            )


def _check_trained(plan: Plan, drawn: dict[str, str]) -> None:
    """Refuses leaves that would stay as they are drawn."""
    cfg, trains = plan.run.finetune, dict(zip(tree.paths(plan.declared), plan.trained))
    given = () if cfg.train == finetune.EVERYTHING else cfg.train
    for path, told in drawn.items():
        if not trains[path]:
            patterns = " ".join(f'"{pattern}"' for pattern in (*given, f"{_pattern(path).rpartition('.')[0]}.*"))
            raise ValueError(
                f"{told} would stay as it is drawn at step 0, as finetune.train has "
                f"{' '.join(given) if given else 'adapters alone'}: use --finetune.train {patterns}"
            )


def _line(source: Source, taken: int, num: int, told: dict[str, str], left: list[str]) -> str:
    live = ", live weights" if source.which == "param" else ""
    text = f"init: {taken} of {num} tensors from {source.weights.path} ({source.kind}{live})"
    if told:
        text += f"; fresh or fitted: {_grouped(list(told.values()))}"
    return text + (f"; left out: {_grouped(left)}" if left else "")


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _grouped(names: list[str]) -> str:
    """Names of alike leaves of all blocks once, the first ones of many."""
    found = list(dict.fromkeys(map(_pattern, names)))
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(found[:LISTED]) + more


def _target(diffusion: dict[str, Any]) -> str | None:
    """What a model of these settings gives: an objective, and of flow what it predicts."""
    objective, predicts = diffusion.get("objective"), diffusion.get("predicts", "velocity")
    return objective if objective != "flow" or predicts == "velocity" else f"flow, predicts {predicts}"


def _other_objective(source: Source, plan: Plan) -> list[str]:
    objective = _target(dataclasses.asdict(plan.run.diffusion))
    theirs = _target(source.diffusion)
    if theirs in (None, objective):
        return []
    return [f"init: these weights predict what diffusion.objective {theirs} asks for, this run is {objective}"]
