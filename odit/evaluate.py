"""Evaluation on all ranks: the judges of digits, and the distances of pictures and clips from real ones (fidelity)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odit import fidelity, judge, media, random, sample, tree
from odit.config import Sampling
from odit.data import DataError, Dataset
from odit.fidelity import files, frechet
from odit.parallel import collectives
from odit.parallel.mesh import Axis
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


# ------------------------------------------------------------------------------------------------------------ fidelity


def drawn_pictures(
    plan: Plan, params: tree.Tree, conditions_N: tree.Tree, seed: int, sampling: Sampling | None = None
) -> Callable[[Tensor], Tensor]:
    """A function from places int64 (B,) among the conditions to the pictures or clips there, uint8 (B, [T,] H, W, 3).

    ``files.ROUNDING`` says how they are rounded. As ``sample.drawer`` it may run collectives.
    """
    key = random.fold_in(random.key(seed), "fidelity")
    draw = sample.drawer(plan, params)(conditions_N, key, sampling=sampling)

    def pictures(places_B: Tensor) -> Tensor:
        x = draw(places_B)
        return media.pixels(x) if x.ndim == 4 else torch.stack([media.pixels(clip.transpose(0, 1)) for clip in x])

    return pictures


def look(
    network: fidelity.Network,
    read: Callable[[Tensor], Tensor],
    num: int,
    axis: Axis,
    device: torch.device,
    *,
    batch: int = 64,
    keep: bool = True,
    write: Callable[[Tensor], None] | None = None,
    progress: Callable | None = None,
) -> fidelity.Features:
    """The network's features of pictures 0 to ``num`` - 1, which the ranks of an axis share out.

    Every call is of equally many pictures on any number of ranks, the last one repeated where some are missing: a
    convolution's and a matrix product's bits may depend on how many they are given. So pictures and features are the
    same bits on any number of ranks, and the moments are equal up to the order in which fp64 sums are added.

    Args:
        read: ``(places_B) -> uint8 (B, ...)``; may run collectives, as all ranks call it equally often.
        keep: whether the axis' first rank returns the rows of "pool" too, all of them in order.
        write: takes all pictures in order; given on the axis' first rank, or on none.
        progress: wraps the iterable of rounds, such as tqdm.
    """
    batch = min(batch, num)
    writes = collectives.broadcast_object(axis, write is not None)
    sums: dict[str, frechet.Sums] = {}
    kept: list[Tensor] = []
    rounds = range(0, num, axis.size * batch)
    for start in rounds if progress is None else progress(rounds):
        places_B = start + axis.rank * batch + torch.arange(batch)
        valid = int((places_B < num).sum())
        x = read(places_B.clamp(max=num - 1))
        found = network.features(x)
        for name, rows in found.items():
            before = sums.get(name) or frechet.nothing(rows.shape[1], rows.device)
            sums[name] = frechet.add(before, rows[:valid])
        if keep:
            kept += _in_order(found["pool"], axis, num - start)
        if writes:
            for rows in _in_order(x.to(device), axis, num - start):
                assert write is not None
                write(rows)
    sum_across = functools.partial(collectives.all_reduce, axis=axis)
    moments = {name: frechet.fitted(frechet.joined(s, sum_across)) for name, s in sums.items()}
    return fidelity.Features(num, moments, torch.cat(kept) if kept else None)


def _in_order(rows: Tensor, axis: Axis, most: int) -> list[Tensor]:
    """All ranks' rows, up to ``most``, as a list of one on the axis' first rank and of none on the others."""
    whole = collectives.all_gather(rows, axis, 0)[:most]
    return [whole.cpu()] if axis.rank == 0 else []


def look_at_reference(
    network: fidelity.Network,
    reference: files.Reference,
    axis: Axis,
    device: torch.device,
    batch: int = 64,
    progress: Callable | None = None,
) -> fidelity.Features:
    """The features of a reference; moments that its file tells, which may be of a larger set, go before."""
    if reference.pictures is None:
        return fidelity.Features(0, reference.moments)
    pictures = reference.pictures
    if len(pictures) < fidelity.LEAST:
        raise DataError(f"the reference holds {len(pictures)} pictures or clips: give {fidelity.LEAST} or more")
    keep = network.logits is not None
    found = look(network, pictures.read, len(pictures), axis, device, batch=batch, keep=keep, progress=progress)
    return fidelity.Features(found.num, found.moments | reference.moments, found.pool_ND)


def compare(
    network: fidelity.Network, samples: fidelity.Features, reference: fidelity.Features, everybody: Axis
) -> dict[str, float]:
    """``fidelity.compare`` on the first rank of all; every rank returns what it found, or raises its ValueError."""
    found: dict[str, float] | ValueError = {}
    if everybody.rank == 0:
        try:
            found = fidelity.compare(samples, reference, network)
        except ValueError as error:
            found = error
    found = collectives.broadcast_object(everybody, found)
    if isinstance(found, ValueError):
        raise found
    return found


def during_training(plan: Plan) -> Callable[[tree.Tree], dict[str, float]] | None:
    """A function from this rank's parts of weights to their figures, by ``run.evaluation``; None where none are wanted.

    Network and reference are read here, once. Labels are spread evenly, and the noise is always the same.
    """
    cfg = plan.run.evaluation
    if cfg.every is None:
        return None
    if plan.shape.text_length or len(plan.shape.size) == 3:
        raise ValueError(
            "evaluation.every needs pictures by classes or without condition, and this run draws "
            f"{'by captions' if plan.shape.text_length else 'clips'}: leave it out, and use experiments/evaluate.py"
        )
    assert cfg.reference is not None  # checks saw to it
    axis, device = plan.mesh.pictures, plan.device
    network = fidelity.load_inception(cfg.inception, device, setting="--evaluation.inception")
    opened = files.open_reference(cfg.reference, "evaluation.reference", plan.front.pixel_size(plan.shape.size))
    reference = look_at_reference(network, opened, axis, device, cfg.batch)
    labels = sample.spread_labels(cfg.num, plan.shape.num_classes)
    batch = cfg.batch if plan.budget is None else min(cfg.batch, plan.micro_batch)  # as sample grids

    def measure(params: tree.Tree) -> dict[str, float]:
        read = drawn_pictures(plan, params, labels, plan.run.seed)
        samples = look(network, read, cfg.num, axis, device, batch=batch)
        return compare(network, samples, reference, plan.mesh.all)

    return measure
