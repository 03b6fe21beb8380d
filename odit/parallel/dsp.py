"""DSP (Zhao et al. 2024): time x space models. What attention does not run over is split; one all-to-all in between.

attention over space   B t S D   frames are split
attention over time    B T s D   positions are split
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from odit.ops import Ops
from odit.parallel import collectives
from odit.parallel.collectives import shares
from odit.parallel.place import Place


def build(ops: Ops, place: Place) -> Ops:
    """The record that enters and leaves with all of space on every rank, and switches where the model says so."""
    axis, (frames, positions) = place.axis, both_shares(place)

    def enter(x_BTSD: Tensor, *tables: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = (x_BTSD.shape[1], x_BTSD.shape[2])
        assert found == (sum(frames), sum(positions)), f"{found} frames and positions where the plan has {place}"
        return collectives.take(x_BTSD, axis, 1, frames).contiguous(), tables

    def switch(x: Tensor, to: str) -> Tensor:
        if to == "time":
            return collectives.all_to_all(x, axis, 2, 1, positions, frames)
        assert to == "space", f"switch to {to}: time or space"
        return collectives.all_to_all(x, axis, 1, 2, frames, positions)

    def leave(x_BtSD: Tensor) -> Tensor:
        return collectives.all_gather(x_BtSD, axis, 1, frames)

    return replace(ops, enter=enter, switch=switch, leave=leave)


def both_shares(place: Place) -> tuple[collectives.Sizes, collectives.Sizes]:
    """Frames and positions of a frame that each rank holds when they are split."""
    n = place.axis.size
    return shares(place.frames, n), shares(place.length // place.frames, n)


def received(place: Place) -> tuple[int, int]:
    """Values (of K elements) a sample, forward and backward, of a block over space and one over time: two switches."""
    frames, positions = both_shares(place)
    t, s = frames[place.axis.rank], positions[place.axis.rank]
    to_time, to_space = (sum(frames) - t) * s, (sum(positions) - s) * t
    both = (to_time + to_space) * place.heads
    return both, both
