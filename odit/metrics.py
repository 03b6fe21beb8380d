"""Measures of generated pictures: a classifier of the real ones (the judge), nearest neighbours, halves of one set."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from odit import optim, random, tree
from odit.fidelity import frechet

HALVES_KEY = random.fold_in(random.key(0), "odit.metrics halves")


def halves_distance(features_ND: Tensor, key: random.Key = HALVES_KEY) -> float:
    """Frechet distance between two keyed halves of one set: what sampling alone makes of a distance of zero.

    The distance is biased upwards by about 1/N, so compare with a distance between sets of N/2.
    """
    num = len(features_ND)
    shuffled_ND = features_ND[random.permutation(key, num, torch.arange(num))]
    return frechet.distance(frechet.moments(shuffled_ND[: num // 2]), frechet.moments(shuffled_ND[num // 2 :]))


def nearest(x_ND: Tensor, train_MD: Tensor, chunk: int = 256) -> Tensor:
    """Euclidean distance (N,) fp64 from each sample to the closest of ``train_MD``; further dims are flattened."""
    x, train = x_ND.flatten(1).double(), train_MD.flatten(1).double()
    # Differences, not |a|^2 - 2ab + |b|^2, which rounds the distance of a copy to something above zero.
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, train, compute_mode=exact).amin(1) for part in x.split(chunk)])


class Judge(NamedTuple):
    """A trained classifier."""

    params: tree.Tree
    accuracy: float
    """On the held-out samples, in [0, 1]."""


FEATURES = 32  # few enough for a well conditioned covariance of some hundred samples
WIDTHS = (32, 48, 64)
GRID = 4  # pictures are pooled to this side before the features, so any size of at least this will do


def classify(judge: Judge, x_NCHW: Tensor, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and the penultimate layer's features (N, 32) of pictures in [-1, 1]."""
    with torch.no_grad():
        parts = [_forward(judge.params, x) for x in x_NCHW.split(chunk)]
    logits, features = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits, features


def accuracy(judge: Judge, x_NCHW: Tensor, y_N: Tensor) -> float:
    """Fraction of pictures that the judge puts in their class."""
    return float((classify(judge, x_NCHW)[0].argmax(-1) == y_N).double().mean())


def train_judge(
    x_NCHW: Tensor,
    y_N: Tensor,
    x_held: Tensor,
    y_held: Tensor,
    num_classes: int,
    key: random.Key,
    *,
    epochs: int = 20,
    batch: int = 64,
    lr: float = 3e-3,
    shift: int = 1,
    noise: float = 0.2,
) -> Judge:
    """Trains a small convolutional classifier on ``x_NCHW`` and measures it on held-out pictures.

    Every epoch moves each picture by up to ``shift`` pixels and adds Gaussian noise of up to ``noise``, so that the
    judge looks at shapes; all of it is drawn from ``key``. One device and thread count gives one judge.
    """
    params = _init(x_NCHW.shape[1], num_classes, random.fold_in(key, "init"))
    optimizer = optim.adamw(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.05)
    state = optimizer.init(params)
    num = len(y_N)
    steps_an_epoch = max(1, num // batch)
    steps = epochs * steps_an_epoch
    for step in range(steps):
        epoch, index = divmod(step, steps_an_epoch)
        if index == 0:
            x_epoch, y_epoch = _augment(x_NCHW, y_N, random.fold_in(key, "epoch", epoch), shift, noise)
        x, y = x_epoch[index * batch : (index + 1) * batch], y_epoch[index * batch : (index + 1) * batch]
        leaves = [leaf.requires_grad_() for leaf in tree.leaves(params)]
        loss = F.cross_entropy(_forward(params, x)[0], y, label_smoothing=0.05)
        grads = tree.unflatten(params, list(torch.autograd.grad(loss, leaves)))
        rate = lr * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        state = optimizer.update_(params, grads, state, rate)
    judge = Judge(tree.map(torch.detach, params), 0.0)
    return judge._replace(accuracy=accuracy(judge, x_held, y_held))


def _init(channels: int, num_classes: int, key: random.Key) -> tree.Tree:
    """Normal weights of variance 2 / fan-in (He et al. 2015), zero biases."""

    def layer(name: str, *shape: int) -> dict:
        scale = math.sqrt(2 / math.prod(shape[1:]))
        return {"w": random.normal(random.fold_in(key, name), shape) * scale, "b": torch.zeros(shape[0])}

    fan = (channels, *WIDTHS)
    return {
        "convs": [layer(f"convs.{i}", fan[i + 1], fan[i], 3, 3) for i in range(len(WIDTHS))],
        "features": layer("features", FEATURES, WIDTHS[-1] * GRID * GRID),
        "classes": layer("classes", num_classes, FEATURES),
    }


def _forward(params: tree.Tree, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    h = x_NCHW
    for p in params["convs"]:
        h = F.gelu(F.conv2d(h, p["w"], p["b"], padding=1))
        if min(h.shape[-2:]) >= 2 * GRID:
            h = F.max_pool2d(h, 2)
    if h.shape[-2:] != (GRID, GRID):
        h = F.adaptive_avg_pool2d(h, GRID)
    h = h.flatten(1)
    features = F.linear(F.layer_norm(h, h.shape[-1:]), params["features"]["w"], params["features"]["b"])
    return F.linear(F.gelu(features), params["classes"]["w"], params["classes"]["b"]), features


def _augment(x_NCHW: Tensor, y_N: Tensor, key: random.Key, shift: int, noise: float) -> tuple[Tensor, Tensor]:
    """Shuffles, moves by whole pixels (the border repeats) and adds noise of a level uniform in [0, noise] a sample."""
    N, _, H, W = x_NCHW.shape
    order = torch.argsort(random.bits(random.fold_in(key, "order"), (N,)), stable=True)
    padded = F.pad(x_NCHW[order], (shift,) * 4, mode="replicate")
    moved = random.bits(random.fold_in(key, "shift"), (2, N)) % (2 * shift + 1)
    rows = moved[0, :, None] + torch.arange(H)
    columns = moved[1, :, None] + torch.arange(W)
    x = padded[torch.arange(N)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    level = noise * random.uniform(random.fold_in(key, "level"), (N, 1, 1, 1))
    return x + level * random.normal(random.fold_in(key, "noise"), tuple(x.shape)), y_N[order]
