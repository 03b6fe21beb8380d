"""Where a leaf lives: its part on each rank, and the share of it that the model sees there.

Specs derive from the parameter declaration. A strategy may claim dims by their letter: such a dim is cut over sp into
equal shares, and a share is all that the ranks at one place along sp ever see of the leaf. ZeRO cuts what the model
sees, a whole leaf over dp x sp together and a share over dp, into equal contiguous parts along the first dim that
divides and that is not claimed; where there is none, every one of these ranks stores all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odit import random, tree
from odit.parallel.mesh import Axis
from odit.param import Draw, Param

CHUNK = 1 << 22  # elements drawn at once
SHORT = 1 << 13  # elements whose draw costs hardly more than its call


@dataclass(frozen=True)
class Spec:
    """One leaf over dp x sp: ``claimed`` is cut into ``num_shares`` over sp, and ``dim`` of what is left into ``num``.

    None for either: that cut is not made; ``reason`` says why ``dim`` is None. Ranks are world ranks, dp-major.
    """

    dim: int | None
    num: int
    reason: str = ""
    claimed: int | None = None
    num_shares: int = 1

    def share_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what the model sees of a leaf of ``shape`` on a rank."""
        return _cut(shape, self.claimed, self.num_shares)

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a rank's part of a leaf of ``shape``."""
        return _cut(self.share_shape(shape), self.dim, self.num)

    def share(self, full: Tensor, rank: int) -> Tensor:
        """What the model sees of a whole leaf on this rank, a view."""
        return _piece(full, self.claimed, self.num_shares, rank % self.num_shares)

    def part(self, share: Tensor, rank: int) -> Tensor:
        """This rank's part of its share, a view."""
        return _piece(share, self.dim, self.num, rank // self.num_shares)

    def take(self, full: Tensor, rank: int) -> Tensor:
        """This rank's part of a whole leaf, a view."""
        return self.part(self.share(full, rank), rank)

    def offsets(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Where a rank's part starts in the whole leaf, one number a dim."""
        starts = [0] * len(shape)
        if self.claimed is not None:
            starts[self.claimed] = rank % self.num_shares * (shape[self.claimed] // self.num_shares)
        if self.dim is not None:
            starts[self.dim] = rank // self.num_shares * (shape[self.dim] // self.num)
        return tuple(starts)

    def owns(self, rank: int) -> bool:
        """Whether a rank is the first of those that hold the same part; over all ranks each part then counts once."""
        return self.dim is not None or rank < self.num_shares

    @property
    def within(self) -> Spec:
        """The spec of a share as a leaf of its own, over the ranks that see it."""
        return replace(self, claimed=None, num_shares=1)


def _cut(shape: tuple[int, ...], dim: int | None, num: int) -> tuple[int, ...]:
    return tuple(shape) if dim is None else (*shape[:dim], shape[dim] // num, *shape[dim + 1 :])


def _piece(x: Tensor, dim: int | None, num: int, index: int) -> Tensor:
    if dim is None:
        return x
    size = x.shape[dim] // num
    return x.narrow(dim, index * size, size)


def split_first(p: Param, num: int, claimed: str = "") -> Spec:
    """The rule of ZeRO: split along the first dim that ``num`` divides and whose letter is not claimed."""
    for dim, (size, letter) in enumerate(zip(p.shape, p.dims)):
        if size % num == 0 and letter not in claimed:
            return Spec(dim, num)
    free = f", {claimed} claimed" if claimed else ""
    return Spec(None, num, f"no dim of {p.shape} ({p.dims}{free}) divides by {num}")


def whole(num: int) -> Spec:
    """Whole on every rank."""
    return Spec(None, num, "kept whole")


def claim(p: Param, sp: int, claimed: str) -> int | None:
    """The first dim with a claimed letter that ``sp`` ranks, more than one, divide."""
    dims = (dim for dim, letter in enumerate(p.dims) if letter in claimed and p.shape[dim] % sp == 0)
    return next(dims, None) if sp > 1 else None


def specs(declared: tree.Tree, num: int, split: bool, sp: int = 1, claimed: str = "") -> tree.Tree:
    """One spec a leaf over ``num`` ranks, ``sp`` of them along sp.

    Args:
        split: whether ZeRO splits what it can.
        claimed: letters of the dims that are cut over sp where sp divides them.
    """

    def leaf(p: Param) -> Spec:
        dim = claim(p, sp, claimed)
        if dim is None:
            return split_first(p, num) if split else whole(num)
        found = split_first(p, num // sp, claimed) if split else whole(num // sp)
        return replace(found, claimed=dim, num_shares=sp)

    return tree.map(leaf, declared)


def unsplit(declared: tree.Tree, found: tree.Tree) -> list[str]:
    """One line for each leaf that ZeRO could not split: name, shape and reason."""
    named = zip(tree.items(declared), tree.leaves(found))
    where = {True: "is whole on every rank", False: "is split over sp alone"}
    return [f"{path} {p.shape} {where[s.claimed is None]}: {s.reason}" for (path, p), s in named if s.dim is None]


def draw(p: Param, path: str, key: random.Key, spec: Spec, axis: Axis) -> Tensor:
    """Draws this rank's part of a leaf, equal bit for bit to the part of a whole draw; ``axis`` is that of all ranks.

    Holds a few million elements beside the part, never the whole.
    """
    part, leaf_key = torch.empty(spec.local_shape(p.shape)), random.fold_in(key, path)
    _fill_(part, p.init, leaf_key, p.shape, spec.offsets(p.shape, axis.rank), 0)
    return part


def _fill_(box: Tensor, init: Draw, key: random.Key, shape: tuple, offsets: tuple, first: int) -> None:
    """Draws the box at ``offsets`` of a tensor of ``shape`` whose first element has the flat index ``first``."""
    row = math.prod(shape[1:])  # what hangs below one index of dim 0
    first += offsets[0] * row
    if box.shape[1:] == shape[1:]:  # one contiguous range
        for i, piece in enumerate(box.view(-1).split(CHUNK)):
            piece.copy_(init(key, first + i * CHUNK, len(piece)))
    elif row <= SHORT:  # whole rows, many at once, of which the box keeps some
        inner = tuple(slice(a, a + n) for a, n in zip(offsets[1:], box.shape[1:]))
        step = CHUNK // row
        for i, rows in enumerate(box.split(step)):
            drawn = init(key, first + i * step * row, len(rows) * row).view(-1, *shape[1:])
            rows.copy_(drawn[(slice(None), *inner)])
    else:
        for i, inner_box in enumerate(box):
            _fill_(inner_box, init, key, shape[1:], offsets[1:], first + i * row)


def init(declared: tree.Tree, key: random.Key, found: tree.Tree, axis: Axis, device=None) -> tree.Tree:
    """Draws every leaf's part as fp32, one leaf at a time."""
    return tree.map_with_path(lambda path, p, s: draw(p, path, key, s, axis).to(device), declared, found)
