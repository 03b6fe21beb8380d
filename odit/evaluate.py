"""Judging a digits model: class accuracy, Frechet distance with its floor, and distance to the training set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from odit import metrics, random, sample, tree
from odit.config import Sampling
from odit.data import Dataset
from odit.parallel import collectives
from odit.plan import Plan

KEY = random.fold_in(random.key(0), "evaluate")  # the judge is the same for every run


def evaluate(
    plan: Plan,
    params: tree.Tree,
    dataset: Dataset,
    *,
    num: int = 1000,
    seed: int = 0,
    sampling: Sampling | None = None,
    progress: Callable | None = None,
) -> dict[str, Any]:
    """Draws ``num`` pictures, spread evenly over the classes; a classifier trained on the real ones judges them.

    All ranks draw, the first judges, and all return what it found.

    Returns:
        class_accuracy, judge_accuracy: percent; the judge's own is on held-out pictures.
        frechet: squared distance of generated to real training pictures in the judge's features.
        frechet_floor: the same between two halves of the training pictures.
        nearest, nearest_held_out: mean Euclidean distance to the nearest training picture, of generated and of held-out
            pictures; a model that copies falls far below the second.
        copies: generated pictures nearer to a training picture than any held-out one is.
    """
    labels = sample.spread_labels(num, dataset.num_classes)
    key = random.fold_in(random.key(seed), "evaluate")
    pictures = sample.sample(plan, params, labels, key, sampling=sampling, progress=progress).clamp(-1, 1)
    found = measure(pictures, labels, dataset) if plan.mesh.rank == 0 else None
    return collectives.broadcast_object(plan.mesh.all, found)


def measure(pictures: Tensor, labels: Tensor, dataset: Dataset) -> dict[str, Any]:
    """The figures of ``evaluate`` for pictures that should show ``labels``; trains the judge.

    One rank's work: a judge's bits depend on the device and the number of threads that trained it.
    """
    x_train, y_train = dataset.read(dataset.train_ids)
    x_held, y_held = dataset.read(dataset.held_out_ids)
    judge = metrics.train_judge(x_train, y_train, x_held, y_held, dataset.num_classes, random.fold_in(KEY, "judge"))
    logits, features = metrics.classify(judge, pictures)
    _, real = metrics.classify(judge, x_train)
    nearest = metrics.nearest(pictures, x_train)
    nearest_held = metrics.nearest(x_held, x_train)
    return {
        "num": len(pictures),
        "class_accuracy": 100 * float((logits.argmax(-1) == labels).double().mean()),
        "judge_accuracy": 100 * judge.accuracy,
        "frechet": metrics.frechet(*metrics.moments(features), *metrics.moments(real)),
        "frechet_floor": metrics.halves_distance(real, random.fold_in(KEY, "halves")),
        "nearest": float(nearest.mean()),
        "nearest_held_out": float(nearest_held.mean()),
        "copies": int((nearest < nearest_held.min()).sum()),
    }


def report(found: dict[str, Any]) -> str:
    """Lines for people, the class accuracy last."""
    return "\n".join(
        [
            f"judge's own accuracy on held-out digits: {found['judge_accuracy']:.1f}",
            f"frechet distance to the real digits: {found['frechet']:.3f} (between two halves of these: "
            f"{found['frechet_floor']:.3f})",
            f"nearest training digit: {found['nearest']:.2f} away on average (held-out digits: "
            f"{found['nearest_held_out']:.2f}); {found['copies']} of {found['num']} nearer than any held-out digit",
            f"class accuracy: {found['class_accuracy']:.1f}",
        ]
    )
