"""Parameters are declared once: shape, dimension letters and initial draw; everything else derives from it.

A declaration is a tree of ``Param``. ``init`` draws it, ``count`` sizes it, a layout reads its ``dims``.
The letters: D width, H heads, K head size, F ffn width, C channels, V classes; a digit or a
lower-case letter names a dim no rule speaks of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from odit import random, tree

Draw = Callable[[random.Key, int, int], Tensor]  # (key, first flat index, how many) -> fp32 values


@dataclass(frozen=True)
class Param:
    """One leaf: its logical shape, a letter a dim, and ``init(key, start, size)``, which draws any flat range of it."""

    shape: tuple[int, ...]
    dims: str
    init: Draw

    def __post_init__(self):
        assert len(self.dims) == len(self.shape), (self.dims, self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def zeros(key: random.Key, start: int, size: int) -> Tensor:
    """Draws nothing: all zero."""
    return torch.zeros(size)


def ones(key: random.Key, start: int, size: int) -> Tensor:
    """Draws nothing: all one."""
    return torch.ones(size)


def normal(std: float) -> Draw:
    """Gaussian of mean 0."""
    return lambda key, start, size: std * random.normal(key, (size,), start=start)


def xavier(fan_in: int, fan_out: int) -> Draw:
    """Uniform in +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010), what DiT initialises its matrices with."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    return lambda key, start, size: (2 * random.uniform(key, (size,), start=start) - 1) * bound


def dense(out: int, dims: str, fan_in: int, draw: Draw | None = None) -> dict:
    """A matrix w (out, fan_in), Xavier unless told, and its bias b (out), zero."""
    return {
        "w": Param((out, fan_in), dims, draw or xavier(fan_in, out)),
        "b": Param((out,), dims[0], zeros),
    }


def norm(width: int) -> dict:
    """Weight, one, and bias, zero, of a LayerNorm."""
    return {"w": Param((width,), "D", ones), "b": Param((width,), "D", zeros)}


def init(declared: tree.Tree, key: random.Key, device=None, dtype=torch.float32) -> tree.Tree:
    """Draws every leaf from (key, path): nothing but the key, its path and its declaration plays a part."""
    return tree.map_with_path(lambda path, p: draw(p, path, key).to(device=device, dtype=dtype), declared)


def draw(p: Param, path: str, key: random.Key) -> Tensor:
    """Draws one whole leaf as fp32 on the CPU, a few million elements at a time."""
    leaf_key, chunk = random.fold_in(key, path), 1 << 22
    parts = [p.init(leaf_key, start, min(chunk, p.size - start)) for start in range(0, p.size, chunk)]
    return torch.cat(parts).reshape(p.shape)


def count(declared: tree.Tree) -> int:
    """Number of trainable elements."""
    return sum(p.size for p in tree.leaves(declared))
