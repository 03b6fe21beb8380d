"""What stands between data and model: captions become tensors, frozen encoders make latents and features of samples.

Frozen weights are in no training state and in no checkpoint; a checkpoint holds their fingerprints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from odit import data, random, tree
from odit.config import Run
from odit.data.tokens import Bytes
from odit.encoders import text as texts
from odit.encoders import vae as vaes
from odit.encoders.frozen import Stored, store
from odit.parallel import collectives
from odit.parallel.mesh import Mesh


class Cache(Protocol):
    """A data set of latents and features that ``experiments/encode.py`` wrote."""

    null: dict[str, Tensor] | None
    """Features of the empty caption, (1, ...)."""
    encoders: dict[str, str]
    """Fingerprints of the encoders that wrote it."""
    precision: str
    """In which they ran."""
    text_size: tuple[int, int]
    """(S, E), as of a front."""

    def scaled(self, sample: Tensor) -> Tensor:
        """What a model sees of latents."""
        ...


@dataclass(frozen=True)
class Front:
    """The encoders of a run; those that it has no use for are None."""

    tokenize: Callable[[list[str]], dict[str, Tensor]] | None = None
    """Captions to {"tokens" (B, S) int64, "mask" (B, S) bool}; picklable."""
    text: texts.TextEncoder | None = None
    text_weights: Stored | None = None
    vae: vaes.Vae | None = None
    vae_weights: Stored | None = None
    cache: Cache | None = None
    """Data that was encoded before: what it holds goes past the encoders here."""

    @property
    def text_size(self) -> tuple[int, int]:
        """(S, E): tokens of a caption and their width as the model gets them, 0 where it reads bytes itself."""
        if self.cache is not None:
            return self.cache.text_size
        if self.tokenize is None:
            return 0, 0
        return self.tokenize.length, 0 if self.text is None else self.text.width  # type: ignore

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the frozen encoders, by their kind's name; with a cache of those that wrote it."""
        if self.cache is not None:
            return self.cache.encoders
        found = {"text": self.text, "vae": self.vae}
        return {name: encoder.fingerprint for name, encoder in found.items() if encoder is not None}

    def sample_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The model's shape of a sample that data has as (C, [T,] H, W); raises ValueError where sizes do not fit."""
        if self.cache is not None:
            return (shape[0] // 2, *shape[1:])  # a cache has means and log-variances
        return shape if self.vae is None else self.vae.latent_shape(shape)

    def pixel_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """([T,] H, W) of what is decoded of samples of the model's ``size``."""
        return size if self.vae is None else self.vae.pixel_size(size)

    def latents(self, x: Tensor, ids_B: Tensor, key: random.Key, normal: Callable = random.normal) -> Tensor:
        """What the model sees of samples: themselves, or scaled draws of the latents' distributions (fp32), by the
        record's ``normal``."""
        if self.cache is not None:
            mean, logvar = x.chunk(2, 1)
            return draw_latents(self.cache.scaled, mean, logvar, ids_B, key, normal)
        if self.vae is None:
            return x
        return draw_latents(self.vae.scaled, *self.moments(x), ids_B, key, normal)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of samples' latents."""
        assert self.vae is not None and self.vae_weights is not None
        return self.vae.moments(self.vae_weights.weights(), x)

    def embed(self, y: tree.Tree) -> tree.Tree:
        """Conditions as the model wants them: the tokens of captions become {"text", "mask", "pooled"}."""
        if self.text is None or self.text_weights is None or "tokens" not in y:
            return y
        return self.text.encode(self.text_weights.weights(), y)

    def decode(self, x: Tensor) -> Tensor:
        """Pictures or clips of what the model drew."""
        if self.vae is None or self.vae_weights is None:
            return x
        return self.vae.decode(self.vae_weights.weights(), x)


def draw_latents(
    scaled: Callable, mean: Tensor, logvar: Tensor, ids_B: Tensor, key: random.Key, normal: Callable
) -> Tensor:
    """Scaled latents (B, ...) fp32; noise is a function of key and draw id."""
    noise = normal(random.fold_in(key, "vae"), tuple(mean.shape[1:]), ids_B)
    return scaled(vaes.sample(mean.float(), logvar.float(), noise)).float()


def load(run: Run, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Front:
    """Loads what a run's encoders name; raises ValueError for what cannot be read or used."""
    cfg = run.encoders
    if cfg.text == "bytes":
        # what captions of a cache are, its shape tells (plan.compose)
        reads = run.data.source != "latents" and data.has_captions(run.data)
        front = Front(Bytes(cfg.text_length) if reads else None)
    else:
        assert cfg.text_path is not None  # checks saw to it
        encoder = texts.load(cfg.text, cfg.text_path, cfg.text_length, dtype)
        front = Front(encoder.tokenize, encoder, _stored(encoder.frozen.take(), run, mesh, device))
    if cfg.vae == "none":
        return front
    assert cfg.vae_path is not None
    vae = vaes.load(cfg.vae, cfg.vae_path, dtype)
    weights = _stored(vae.frozen.take(), run, mesh, device)
    return Front(front.tokenize, front.text, front.text_weights, vae, weights)


def cached(front: Front, cache: Cache) -> Front:
    """A front for data that was encoded before; raises ValueError for an encoder that is not the one that wrote it."""
    for name, found in front.fingerprints.items():
        wrote = cache.encoders.get(name)
        if wrote is None:
            raise ValueError(f"encoders.{name} is given but the latents of data.path have none: leave it out")
        if found != wrote:
            raise ValueError(
                f"encoders.{name}_path has the fingerprint {found}, the latents of data.path were written with {wrote} "
                f"in {cache.precision}: give that one (--encoders.precision {cache.precision}), or leave it out"
            )
    if front.tokenize is not None and (length := front.text_size[0]) != cache.text_size[0]:
        raise ValueError(
            f"encoders.text_length is {length} but the captions of data.path have {cache.text_size[0]} tokens: use "
            f"--encoders.text-length {cache.text_size[0]}"
        )
    return replace(front, cache=cache)


def _stored(weights: dict[str, Tensor], run: Run, mesh: Mesh, device: torch.device) -> Stored:
    axis = mesh.all
    gather = functools.partial(collectives.all_gather, axis=axis, dim=0)
    return store(weights, run.encoders.place, device, axis.rank, axis.size, gather)
