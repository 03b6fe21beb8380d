"""How near generated pictures and clips are to real ones, by the features of a network: ADM's measures, and FVD.

``frechet`` compares Gaussians, ``manifold`` gives precision and recall, ``inception`` and ``i3d`` are the networks and
``files`` the pictures and statistics on disk. Here are the networks as a run uses them, and the figures in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from odit.fidelity import files, frechet, i3d, inception, manifold
from odit.fidelity.frechet import Moments

USUAL = 50_000  # samples that a figure without a number in its name is of (ADM; Heusel et al. 2017)
LEAST = 20  # samples; fewer make no covariance worth the name

Resize = Literal["tensorflow", "torch"]


@dataclass(frozen=True)
class Config:
    """Measuring samples while a run trains."""

    every: int | None = None
    """Steps between measurements, after the last step too; none unless given."""
    reference: Path | None = None
    """Real pictures or their statistics: an .npz of ADM's form, or a folder of pictures."""
    inception: Path | None = None
    """The feature network's weights, pt_inception-2015-12-05-6726825d.pth."""
    num: int = 10_000
    """Samples; fewer than 50,000 stand in the figures' names."""
    batch: int = 64
    """Samples at once on one rank."""


@dataclass(frozen=True)
class Network:
    """A function from pictures or clips to features, by which these are compared."""

    kind: Literal["inception", "i3d"]
    about: dict[str, Any]
    """What a result tells of it: file, its sha256, how pictures come to its size."""
    features: Callable[[Tensor], dict[str, Tensor]]
    """Pictures (B, H, W, 3) uint8, or clips (B, T, H, W, 3), to rows (B, D) of features by name."""
    logits: Callable[[Tensor], Tensor] | None = None
    """Rows of the features "pool" to logits of classes, for the Inception Score."""

    @property
    def clips(self) -> bool:
        """Whether it looks at clips."""
        return self.kind == "i3d"


@dataclass(frozen=True)
class Features:
    """What a network sees of a set of pictures or clips."""

    num: int
    moments: dict[str, Moments]
    """By the features' name: "pool", and of pictures "spatial"."""
    pool_ND: Tensor | None = None
    """Rows of "pool" in the order of the pictures, where these were at hand and not their statistics alone."""


def check(cfg: Config) -> None:
    """Refuses settings by which nothing can be measured; raises ValueError with key, value and a fix."""
    for name, least in (("every", 1), ("num", LEAST), ("batch", 1)):
        if (value := getattr(cfg, name)) is not None and value < least:
            raise ValueError(f"evaluation.{name} is {value}: use {least} or more")
    for name in ("num", "batch"):
        if cfg.every is None and (value := getattr(cfg, name)) != getattr(Config(), name):
            raise ValueError(
                f"evaluation.{name} is {value} but evaluation.every is not given: give the steps between measurements, "
                "or leave both out"
            )
    for name, what in (("reference", "an .npz of ADM's form or a folder"), ("inception", inception.NAME)):
        if (getattr(cfg, name) is None) != (cfg.every is None):
            given, other = ("every", name) if cfg.every else (name, "every")
            raise ValueError(
                f"evaluation.{given} is given but evaluation.{other} is not: give "
                f"{what if cfg.every else 'the steps between measurements'}, or leave both out"
            )


def load_inception(
    path: Path | None, device: torch.device, resize: Resize = "tensorflow", setting: str = "--inception"
) -> Network:
    """Loads the field's Inception; raises ValueError, which names the setting, for what is no such file."""
    params = inception.load(path, device, setting)
    about = {"name": "inception-2015-12-05", **files.identity(Path(path or "")), "resize": resize}
    return Network(
        "inception",
        about,
        lambda x_BHWC: inception.features(params, x_BHWC.to(device), resize),
        lambda pool_ND: inception.logits(params, pool_ND),
    )


def load_i3d(path: Path | None, device: torch.device) -> Network:
    """Loads a network for clips from a TorchScript file, whose code is run; raises ValueError for what is none."""
    net = i3d.load(path, device)
    about = {"name": "torchscript", **files.identity(Path(path or ""))}
    return Network("i3d", about, lambda x_BTHWC: {"pool": i3d.features(net, x_BTHWC.to(device))})


def compare(samples: Features, reference: Features, network: Network) -> dict[str, float]:
    """The figures that the two sets allow, each by a name that says how many samples it is of where they are few.

    fid, sfid, inception_score, precision and recall of pictures, fvd of clips. A reference of statistics alone has
    neither precision nor recall, and one without those of "spatial" no sfid.
    """
    found: dict[str, float] = {}
    names = {"pool": "fvd" if network.clips else "fid", "spatial": "sfid"}
    for feature, name in names.items():
        if feature in samples.moments and feature in reference.moments:
            _check_width(feature, samples.moments[feature], reference.moments[feature])
            found[name] = frechet.distance(samples.moments[feature], reference.moments[feature])
    device = samples.moments["pool"].mean_D.device
    if network.logits is not None and samples.pool_ND is not None:
        found["inception_score"] = inception.score(network.logits(samples.pool_ND.to(device)))
        if reference.pool_ND is not None:
            with inception.full_fp32():
                sets = reference.pool_ND.to(device), samples.pool_ND.to(device)
                found["precision"], found["recall"] = manifold.precision_recall(*sets)
    return {f"{name}{suffix(samples.num)}": value for name, value in found.items()}


def _check_width(feature: str, samples: Moments, reference: Moments) -> None:
    if len(samples.mean_D) != len(reference.mean_D):
        raise ValueError(
            f"the reference's {feature} statistics are of {len(reference.mean_D)} features, the network gives "
            f"{len(samples.mean_D)}: give statistics of the same network"
        )


def suffix(num: int) -> str:
    """What is added to a figure's name: nothing to that of 50,000 samples or more, else their number."""
    if num >= USUAL:
        return ""
    return f"_{num // 1000}k" if num % 1000 == 0 else f"_{num}"


def report(found: dict[str, float]) -> str:
    """Lines for people."""
    return "\n".join(f"{name}: {value:.4f}" for name, value in found.items())
