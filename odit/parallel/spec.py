"""Where a leaf lives: split along one dim over an axis, or whole on every rank; and its part on this rank.

Specs derive from the parameter declaration. A split leaf is cut into equal contiguous parts along the first dim that
the axis divides and that no rule claims; a leaf without such a dim is whole everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from odit import param, random, tree
from odit.parallel.mesh import Axis
from odit.param import Param

CHUNK = 1 << 22  # elements drawn at once, in whole rows


@dataclass(frozen=True)
class Spec:
    """One leaf over one axis: ``dim`` is cut into ``num`` equal parts, or None and whole, for ``reason``."""

    dim: int | None
    num: int
    reason: str = ""

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a rank's part of a leaf of ``shape``."""
        if self.dim is None:
            return tuple(shape)
        return (*shape[: self.dim], shape[self.dim] // self.num, *shape[self.dim + 1 :])

    def take(self, full: Tensor, rank: int) -> Tensor:
        """This rank's part of a whole leaf, a view."""
        if self.dim is None:
            return full
        size = full.shape[self.dim] // self.num
        return full.narrow(self.dim, rank * size, size)

    def offsets(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Where a rank's part starts in the whole leaf, one number a dim."""
        starts = [0] * len(shape)
        if self.dim is not None:
            starts[self.dim] = rank * (shape[self.dim] // self.num)
        return tuple(starts)


def split_first(p: Param, num: int, claimed: str = "") -> Spec:
    """The rule of ZeRO: split along the first dim that ``num`` divides and whose letter is not claimed."""
    for dim, (size, letter) in enumerate(zip(p.shape, p.dims)):
        if size % num == 0 and letter not in claimed:
            return Spec(dim, num)
    return Spec(None, num, f"no dim of {p.shape} ({p.dims}) divides by {num}")


def whole(num: int) -> Spec:
    """Whole on every rank."""
    return Spec(None, num, "kept whole")


def specs(declared: tree.Tree, num: int, split: bool) -> tree.Tree:
    """One spec a leaf: split where it can be, or whole everywhere."""
    return tree.map(lambda p: split_first(p, num) if split else whole(num), declared)


def unsplit(declared: tree.Tree, found: tree.Tree) -> list[str]:
    """One line for each leaf that could not be split: name, shape and reason."""
    named = zip(tree.items(declared), tree.leaves(found))
    return [f"{path} {p.shape} is whole on every rank: {s.reason}" for (path, p), s in named if s.dim is None]


def draw(p: Param, path: str, key: random.Key, spec: Spec, axis: Axis) -> Tensor:
    """Draws this rank's part of a leaf, equal bit for bit to the part of a whole draw.

    Holds a few million elements beside the part, never the whole.
    """
    if spec.dim is None:
        return param.draw(p, path, key)
    leaf_key = random.fold_in(key, path)
    outer = p.shape[: spec.dim + 1]
    row = p.size // math.prod(outer)  # a row is what hangs below one index of the dims up to the split one
    part = torch.empty(spec.local_shape(p.shape)).reshape(-1, outer[-1] // spec.num, row)
    size = part.shape[1]
    for i in range(part.shape[0]):
        first = (i * outer[-1] + axis.rank * size) * row
        for start in range(0, size * row, CHUNK):
            count = min(CHUNK, size * row - start)
            part[i].view(-1)[start : start + count] = p.init(leaf_key, first + start, count)
    return part.reshape(spec.local_shape(p.shape))


def init(declared: tree.Tree, key: random.Key, found: tree.Tree, axis: Axis, device=None) -> tree.Tree:
    """Draws every leaf's part as fp32, one leaf at a time."""
    return tree.map_with_path(lambda path, p, s: draw(p, path, key, s, axis).to(device), declared, found)
