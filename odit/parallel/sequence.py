"""The table of sequence strategies, one file each, and the choice between them.

A strategy is a function from record to record, ``build(ops, place) -> Ops``. It calls the sites it was given and
repeats none of their arithmetic. Its line in the table enrols it in the benchmark and in every test, its name in
``config.Sequence`` in the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from odit.ops import Ops
from odit.parallel import dsp, fastseq, megatron, ring, ulysses, usp
from odit.parallel.place import Place


@dataclass(frozen=True)
class Strategy:
    """How the ranks of an axis share a sample's tokens."""

    build: Callable[[Ops, Place], Ops]
    received: Callable[[Place], tuple[int, int]]
    """Values of K elements that this rank receives a sample and block, forward and backward."""
    collectives: int
    """Collectives of a block's forward pass; a ring counts as one."""
    claims: str = ""
    """Letters of the dims on which weights are stored split over the axis."""
    time_space: bool = False
    """Whether it is for time x space models, and for no others."""


STRATEGIES: dict[str, Strategy] = {
    "fastseq": Strategy(fastseq.build, fastseq.received, 2),
    "ulysses": Strategy(ulysses.build, ulysses.received, 2),
    "ring": Strategy(ring.build, ring.received, 1),
    "usp": Strategy(usp.build, usp.received, 3),
    "megatron": Strategy(megatron.build, megatron.received, 4, claims=megatron.CLAIMS),
    "dsp": Strategy(dsp.build, dsp.received, 2, time_space=True),
}


def build(name: str, ops: Ops, place: Place) -> Ops:
    """The record under a strategy of the table; an axis of one rank leaves it as it is."""
    return ops if name == "none" or place.axis.size == 1 else STRATEGIES[name].build(ops, place)


def inner_degree(name: str, sp: int, heads: int, asked: int | None) -> int:
    """Size of the mesh's ulysses axis: what usp was asked for, or the most ranks among which the heads divide."""
    if name not in ("usp", "auto"):
        return 1
    return asked or math.gcd(sp, heads)


def check(name: str, sp: int, length: int, frames: int, ulysses: int | None, fp8: bool) -> None:
    """Refuses what cannot share ``length`` tokens over ``sp`` ranks; raises ValueError with both numbers and a fix."""
    if sp > 1 and name == "none":
        raise ValueError(
            f"parallel.sequence is none but parallel.sp {sp} shares a sample's tokens: use --parallel.sequence auto, "
            "or --parallel.sp 1"
        )
    if sp == 1 and name not in ("auto", "none"):
        raise ValueError(
            f"parallel.sequence {name} shares a sample's tokens but parallel.sp is 1: use --parallel.sp 2 or more, or "
            "--parallel.sequence auto"
        )
    if sp > length:
        raise ValueError(f"parallel.sp {sp} is more than the {length} tokens of a sample: use --parallel.sp {length}")
    if ulysses is not None and (name != "usp" or ulysses < 1 or sp % ulysses):
        fits = [u for u in range(1, sp + 1) if sp % u == 0]
        raise ValueError(
            f"parallel.ulysses {ulysses} with parallel.sequence {name} over parallel.sp {sp}: it is usp's inner degree "
            f"and divides sp; use --parallel.sequence usp and one of {fits}, or leave it out"
        )
    if fp8 and name != "fastseq":
        raise ValueError(
            f"parallel.ring_fp8 is True but parallel.sequence is {name}: use --parallel.sequence fastseq, whose ring "
            "it is, or leave it out"
        )
    if sp > 1 and name not in ("auto", "none") and STRATEGIES[name].time_space != (frames > 1):
        fits = [n for n, s in STRATEGIES.items() if s.time_space == (frames > 1)]
        raise ValueError(
            f"parallel.sequence {name} needs a time x space model{' not' * (frames > 1)}, and a sample has "
            f"{frames} x {length // frames} tokens: use one of {', '.join(fits)}"
        )
    most = min(frames, length // frames)
    if frames > 1 and sp > most:  # whatever is asked for, dsp is what a time x space model has
        raise ValueError(
            f"parallel.sp {sp} is more than the {frames} frames or their {length // frames} tokens, which dsp splits "
            f"in turn: use --parallel.sp {most} or fewer"
        )


def idle(name: str, sp: int, heads: int, ulysses: int) -> str | None:
    """A line on ranks that a strategy leaves without heads."""
    over = {"usp": ulysses, "ring": 1, "dsp": 1}.get(name, sp)
    if heads >= over:
        return None
    return f"sequence: {heads} heads over {over} ranks leave {over - heads} of them without attention; ring would not"


# ------------------------------------------------------------------------------------------------------- the choice


class Machine(NamedTuple):
    """What the choice needs to know of a machine, per rank."""

    name: str
    link: float
    """Bytes a second that a collective brings to a rank."""
    launch: float
    """Seconds before a collective's first byte."""
    flops: float
    """Matrix products, floating-point operations a second."""


NVLINK = Machine("NVLink", 370e9, 15e-6, 600e12)  # bus bandwidth of NVLink4; H200 at the shapes of DiT-XL, bf16
INFINIBAND = Machine("InfiniBand", 50e9, 30e-6, 600e12)  # 400 Gb/s a GPU
GLOO = Machine("gloo", 1e9, 200e-6, 50e9)  # processes of one CPU


def exposed(name: str, place: Place, batch: int, head_size: int, itemsize: int, machine: Machine) -> float:
    """Seconds that a strategy adds to a block's forward and backward pass over an even, free split of its work.

    Bytes and launches that computing does not hide, and the wait for the rank with most heads. What a ring hides is
    C/n + (n - 1) max(C/n, T/(n - 1)) for work C and transfer T; backward has twice the work.
    """
    n, width = place.axis.size, place.heads * head_size
    each = batch * head_size * itemsize / machine.link
    forward, backward = (values * each for values in STRATEGIES[name].received(place))
    launches = 2 * STRATEGIES[name].collectives * machine.launch
    attention = 4 * batch * place.length**2 * width / n / machine.flops
    projection = 6 * batch * place.length * width**2 / n / machine.flops
    branches = projection + 18 * batch * place.length * width**2 / n / machine.flops  # out and an ffn of 4 D beside qkv
    if name == "fastseq":
        gather = (place.length - min(place.tokens)) * place.heads * each
        hidden = _unhidden(projection, gather, n) + _unhidden(2 * projection, gather, n)
        return forward + backward - 2 * gather + hidden + launches + 3 * _uneven(place, n) * (attention + projection)
    if name == "ring":
        return _unhidden(attention, forward, n) + _unhidden(2 * attention, backward, n) + launches
    if name == "usp":
        u, r = place.mesh.ulysses.size, place.mesh.ring.size
        passed = 2 * (place.length - place.length / r) * place.heads / u * each
        hidden = _unhidden(attention, passed, r) + _unhidden(2 * attention, 2 * passed, r)
        return max(0.0, forward + backward - 3 * passed) + hidden + launches + 3 * _uneven(place, u) * attention
    if name == "megatron":
        return forward + backward + launches + 3 * _uneven(place, n) * (attention + branches)
    return forward + backward + launches + (0.0 if name == "dsp" else 3 * _uneven(place, n) * attention)


def _unhidden(work: float, transfer: float, n: int) -> float:
    """What is left of a ring's transfer beside its work."""
    return 0.0 if n == 1 else work / n + (n - 1) * max(work / n, transfer / (n - 1)) - work


def _uneven(place: Place, n: int) -> float:
    """How much longer the rank with most heads works than it would with an even share: 0 where heads divide."""
    return -(-place.heads // n) * n / place.heads - 1


def choose(place: Place, batch: int, head_size: int, itemsize: int, machine: Machine) -> tuple[str, str]:
    """The strategy that exposes least, and why, in one line."""
    fits = [name for name, s in STRATEGIES.items() if s.time_space == (place.frames > 1)]
    if place.mesh.ring.size == 1 or place.mesh.ulysses.size == 1:
        fits = [name for name in fits if name != "usp"]  # it is ulysses or ring then
    cost = {name: exposed(name, place, batch, head_size, itemsize, machine) for name in fits}
    best, *rest = sorted(fits, key=lambda name: cost[name])
    line = (
        f"sequence: {best} (auto): {place.length} tokens and {place.heads} heads over {place.axis.size} ranks expose "
        f"{1e6 * cost[best]:.0f} us a block on {machine.name}"
    )
    return best, line + "".join(f", {name} {1e6 * cost[name]:.0f}" for name in rest[:2])
