"""Judging what captions asked for: which digit a picture or a clip shows, and which way a clip's digit moves."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from odit import metrics, random
from odit.data import Dataset
from odit.data.captioned import DigitsText
from odit.data.moving import DIRECTIONS, SIDE, MovingDigits
from odit.fidelity import frechet

KEY = random.fold_in(random.key(0), "evaluate")  # of all judges of digits, which makes them one judge
FAINT = 0.25  # of full ink: what is fainter is background to the search for the digit, though not to its classifier
MOVED = 2.0  # pixels over the clip; a digit that moves less has no direction
# Ink that a window costs a squared pixel between its middle and the centre of mass: it chooses among the windows that
# hold all of a narrow digit, and against those that catch a little noise instead.
PULL = 0.3


def judge_text(pictures: Tensor, labels: Tensor, dataset: DigitsText) -> dict[str, Any]:
    """The figures of ``judge_digits`` for pictures (N, 1, 8, 8) whose captions asked for the digits ``labels``."""
    return judge_digits(pictures, labels, dataset.digits)


def judge_digits(pictures: Tensor, labels: Tensor, digits: Dataset) -> dict[str, Any]:
    """Trains a classifier on real pictures and measures pictures that should show ``labels``.

    One rank's work: a judge's bits depend on the device and the number of threads that trained it.

    Returns:
        class_accuracy, judge_accuracy: percent; the judge's own is on held-out pictures.
        frechet: squared distance of generated to real training pictures in the judge's features.
        frechet_floor: the same between two halves of the training pictures.
        nearest, nearest_held_out: mean Euclidean distance to the nearest training picture, of generated and of held-out
            pictures; a model that copies falls far below the second.
        copies: generated pictures nearer to a training picture than any held-out one is.
    """
    judge = train(digits)
    x_train, x_held = digits.read(digits.train_ids)[0], digits.read(digits.held_out_ids)[0]
    logits, features = metrics.classify(judge, pictures)
    _, real = metrics.classify(judge, x_train)
    nearest = metrics.nearest(pictures, x_train)
    nearest_held = metrics.nearest(x_held, x_train)
    return {
        "num": len(pictures),
        "class_accuracy": _percent(logits.argmax(-1) == labels),
        "judge_accuracy": 100 * judge.accuracy,
        "frechet": frechet.distance(frechet.moments(features), frechet.moments(real)),
        "frechet_floor": metrics.halves_distance(real, random.fold_in(KEY, "halves")),
        "nearest": float(nearest.mean()),
        "nearest_held_out": float(nearest_held.mean()),
        "copies": int((nearest < nearest_held.min()).sum()),
    }


def judge_moving(clips: Tensor, digits: Tensor, directions: Tensor, dataset: MovingDigits) -> dict[str, Any]:
    """Measures clips (N, 1, T, H, W) that should show ``digits`` (N,) moving in ``directions`` (N,).

    One rank's work, as ``judge_digits``.

    Returns:
        digit_accuracy, direction_accuracy, both_accuracy: percent of the clips that are as they should be.
        moved: percent of the clips in which something moves at all.
        real_digit_accuracy, real_direction_accuracy: the same judges on real held-out clips, the most to hope for.
        judge_accuracy: percent; the classifier's own on held-out pictures.
    """
    judge = train(dataset.digits)
    shown, moving = name(judge, clips), direction(clips)
    ids = dataset.held_out_ids[:: len(DIRECTIONS) + 1]  # steps to another picture and another direction
    real, _ = dataset.read(ids)
    return {
        "num": len(clips),
        "digit_accuracy": _percent(shown == digits),
        "direction_accuracy": _percent(moving == directions),
        "both_accuracy": _percent((shown == digits) & (moving == directions)),
        "moved": _percent(moving >= 0),
        "real_digit_accuracy": _percent(name(judge, real) == dataset.labels(ids)),
        "real_direction_accuracy": _percent(direction(real) == dataset.directions(ids)),
        "judge_accuracy": 100 * judge.accuracy,
    }


def train(digits: Dataset) -> metrics.Judge:
    """Trains the judge of digits on all training pictures; seconds on a CPU."""
    real = (*digits.read(digits.train_ids), *digits.read(digits.held_out_ids))
    return metrics.train_judge(*real, digits.num_classes, random.fold_in(KEY, "judge"))


def name(judge: metrics.Judge, x_NCTHW: Tensor) -> Tensor:
    """Names the digit (N,) int64 that each clip shows."""
    return metrics.classify(judge, still(x_NCTHW))[0].argmax(-1)


def direction(x_NCTHW: Tensor) -> Tensor:
    """Tells the direction (N,) int64 of clips (N, 1, T, H, W), an index into ``DIRECTIONS``; -1 where nothing moves.

    A least-squares line through the centres of mass gives the displacement over the clip; the direction is the nearest
    by angle. Frames without ink have no part in it.
    """
    centre_NTX, mass_NT = _centres(_ink(x_NCTHW))
    num_frames = centre_NTX.shape[1]
    seen_NT = (mass_NT > 0).float()
    count_N = seen_NT.sum(1).clamp(min=1)
    t_NT = torch.arange(num_frames, device=x_NCTHW.device) * seen_NT
    t_NT = (t_NT - t_NT.sum(1, keepdim=True) / count_N[:, None]) * seen_NT  # sums to 0, so centres need no mean
    slope_NX = (t_NT[..., None] * centre_NTX).sum(1) / t_NT.square().sum(1).clamp(min=1e-6)[:, None]
    moved_NX = slope_NX * (num_frames - 1)
    turn_N = torch.atan2(moved_NX[:, 0], moved_NX[:, 1]) / (2 * math.pi)
    nearest_N = (turn_N * len(DIRECTIONS)).round().long() % len(DIRECTIONS)
    return torch.where(torch.linalg.vector_norm(moved_NX, dim=-1) < MOVED, -1, nearest_N)


def still(x_NCTHW: Tensor) -> Tensor:
    """Cuts the digit out of every frame of clips (N, 1, T, H, W) and averages the cuts: (N, 1, 8, 8) in [-1, 1].

    A frame's cut is the window of 8 x 8 with the most ink, and of equals the one nearest to the centre of mass. A clip
    whose frames show different digits, or none, averages to neither.
    """
    ink_NTHW = _ink(x_NCTHW)
    corner_NTX = _corners(ink_NTHW)
    N, T, H, W = ink_NTHW.shape
    row_NTh, column_NTw = (corner_NTX[..., axis, None] + torch.arange(SIDE, device=x_NCTHW.device) for axis in (0, 1))
    pixel_NThw = row_NTh[..., None] * W + column_NTw[..., None, :]
    cut = ink_NTHW.reshape(N, T, H * W).gather(2, pixel_NThw.reshape(N, T, SIDE * SIDE))
    return (2 * cut.mean(1) - 1).reshape(N, 1, SIDE, SIDE)


def _ink(x_NCTHW: Tensor) -> Tensor:
    """Ink (N, T, H, W) in [0, 1]; what is not a number is background."""
    return (x_NCTHW[:, 0].nan_to_num(nan=-1.0).clamp(-1, 1) + 1) / 2


def _centres(ink_NTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column (N, T, 2) of the centre of mass, 0 where there is none, and the mass (N, T), without the faint."""
    ink_NTHW = torch.where(ink_NTHW > FAINT, ink_NTHW, 0)
    mass_NT = ink_NTHW.sum((-2, -1))
    sums = [
        (ink_NTHW.sum(axis) * torch.arange(ink_NTHW.shape[other], device=ink_NTHW.device)).sum(-1)
        for axis, other in ((-1, -2), (-2, -1))
    ]
    return torch.stack(sums, -1) / mass_NT.clamp(min=FAINT)[..., None], mass_NT


def _corners(ink_NTHW: Tensor) -> Tensor:
    """Row and column (N, T, 2) int64 of the upper left pixel of the window that holds the digit."""
    N, T, H, W = ink_NTHW.shape
    centre_NTX, _ = _centres(ink_NTHW)
    strong_NTHW = torch.where(ink_NTHW > FAINT, ink_NTHW, 0)
    mass = F.avg_pool2d(strong_NTHW.reshape(N * T, 1, H, W), SIDE, stride=1) * SIDE**2
    away_NTX = centre_NTX - (SIDE - 1) / 2
    row, column = (torch.arange(side - SIDE + 1, device=ink_NTHW.device) for side in (H, W))
    far = (row - away_NTX[..., :1]).square()[..., None] + (column - away_NTX[..., 1:]).square()[..., None, :]
    best_NT = (mass.reshape(far.shape) - PULL * far).flatten(2).argmax(-1)
    return torch.stack((best_NT // len(column), best_NT % len(column)), -1)


def _percent(right_N: Tensor) -> float:
    return 100 * float(right_N.double().mean())
