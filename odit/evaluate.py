"""Judging a digits model on all ranks: does a sample show what was asked for, and is it like real ones?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from odit import judge, random, sample, tree
from odit.config import Sampling
from odit.data import Dataset
from odit.parallel import collectives
from odit.plan import Plan

JUDGES: dict[str, tuple[Callable, int]] = {  # what measures a source's samples, and how many are usual
    "digits": (judge.judge_digits, 1000),
    "digits-text": (judge.judge_text, 500),
    "moving-digits": (judge.judge_moving, 400),
}


def evaluate(
    plan: Plan,
    params: tree.Tree,
    dataset: Dataset,
    *,
    num: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    progress: Callable | None = None,
) -> dict[str, Any]:
    """Draws ``num`` samples, spread evenly over what can be asked for; classifiers of the real ones judge them.

    Captions are in wordings that were not trained on. All ranks draw, the first judges, and all return what it found:
    the figures of ``judge.judge_digits`` or ``judge_moving``.
    """
    measure, usual = JUDGES[plan.run.data.source]
    conditions, asked = ask(plan, dataset, num or usual)
    key = random.fold_in(random.key(seed), "evaluate")
    samples = sample.sample(plan, params, conditions, key, sampling=sampling, progress=progress).clamp(-1, 1)
    found = measure(samples, *asked, dataset) if plan.mesh.rank == 0 else None
    return collectives.broadcast_object(plan.mesh.all, found)


def ask(plan: Plan, dataset: Any, num: int) -> tuple[tree.Tree, tuple]:
    """Conditions of ``num`` samples, and what a judge is told that these should show."""
    if plan.tokenize is None:
        labels = sample.spread_labels(num, dataset.num_classes)
        return labels, (labels,)
    prompts, *asked = dataset.prompts(num)
    return plan.tokenize(prompts), tuple(asked)


def report(found: dict[str, Any]) -> str:
    """Lines for people, what was asked for last."""
    if "direction_accuracy" in found:
        return "\n".join(
            [
                f"the judges on real held-out clips: digit {found['real_digit_accuracy']:.1f}, direction "
                f"{found['real_direction_accuracy']:.1f}",
                f"clips in which something moves: {found['moved']:.1f}",
                f"digit accuracy: {found['digit_accuracy']:.1f}",
                f"direction accuracy: {found['direction_accuracy']:.1f}",
            ]
        )
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
