"""Will it fit, and how fast? Every layout of a run on so many GPUs, its bytes (footprint) and its seconds (pace).

No GPU is needed, and none of the ranks is there: formulas, a few blocks on tensors without data, and a machine's table
of rates. ``assumed`` says what stands behind the figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from odit import models
from odit.config import Parallel, Run
from odit.footprint import Footprint, footprint, graphed, pretend
from odit.kernels import need_triton
from odit.models.config import Shape
from odit.pace import Pace, pace
from odit.parallel import sequence
from odit.parallel.offload import MARGIN
from odit.rates import Link, Rates

GRAPH_SPARE = 2.5  # GiB that a graph's pool may reserve beside what a step's tensors need (0.2 to 2.2 on an H100)
GIB = 2**30
REMATS = ("none", "selective", "block")


@dataclass(frozen=True)
class Cluster:
    """The GPUs that a run would get."""

    gpus: int
    memory_gib: float
    machine: Rates
    link: str
    """What joins the GPUs of one node; nodes are joined by InfiniBand."""
    node: int = 8
    """GPUs of a node."""

    def between(self, ranks: int) -> Link:
        """What a collective of so many neighbouring ranks runs over."""
        return self.machine.links[self.link if ranks <= self.node else "infiniband"]

    @property
    def room_gib(self) -> float:
        """What a run may take: the allocator cannot use all of it."""
        return self.memory_gib * (1 - MARGIN)


@dataclass(frozen=True)
class Forecast:
    """One layout: what it is, holds and takes."""

    run: Run
    dp: int
    sp: int
    sequence: str
    micro_batch: int
    graphed: bool
    footprint: Footprint
    pace: Pace
    missing_gib: float
    """What it may take beyond the room there is; not positive where it fits for sure."""
    over_gib: float
    """What its tensors and a graph's pool take beyond all of the memory; positive where it cannot run."""

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory, with all that an allocator may waste."""
        return self.missing_gib <= 0

    @property
    def verdict(self) -> str:
        """fits, too large, or close: what the allocator wastes decides."""
        return "fits" if self.fits else "too large" if self.over_gib > 0 else "close"

    @property
    def layout(self) -> str:
        """A few words."""
        p = self.run.parallel
        shared = f" {self.sequence}" if self.sp > 1 else ""
        more = [f"remat {p.remat}"] * (p.remat != "none") + [f"offload {p.offload}"] * (p.offload != "none")
        return ", ".join([f"dp {self.dp} x sp {self.sp}{shared}", f"zero {p.zero}", *more])


def layouts(run: Run, shape: Shape, cluster: Cluster) -> Iterator[Run]:
    """Every way to lay a run out: dp x sp, strategy, ZeRO stage, remat, offload, micro-batch (halved up to 16 times).

    Ranks share tokens within a node alone, whose link is the faster one.
    """
    time_space = models.of(run.model).time_space(run.model, shape.size) > 1
    names = [name for name, s in sequence.STRATEGIES.items() if s.time_space == time_space]
    for sp in (n for n in range(1, min(cluster.gpus, cluster.node) + 1) if cluster.gpus % n == 0):
        dp = cluster.gpus // sp
        if run.global_batch % dp:
            continue
        share = run.global_batch // dp
        sizes = [share // 2**n for n in range(5) if share % 2**n == 0]
        for name in ["none"] if sp == 1 else names:
            for zero, remat, offload, micro in _choices(cluster.gpus, sizes):
                parallel = Parallel(
                    dp=dp, sp=sp, sequence=name, zero=zero, remat=remat, offload=offload, reduce=run.parallel.reduce
                )
                yield replace(run, micro_batch=micro, parallel=parallel)


def _choices(gpus: int, sizes: list[int]) -> Iterator[tuple[Any, ...]]:
    """Stage, remat, offload, micro-batch; on one GPU a stage splits nothing, and matters to offload alone."""
    stages = [(z, "none") for z in range(4 if gpus > 1 else 1)] + [(z, "optimizer") for z in (2, 3)]
    yield from ((zero, remat, off, micro) for zero, off in stages for remat in REMATS for micro in sizes)


def forecast(run: Run, shape: Shape, cluster: Cluster) -> tuple[list[Forecast], list[str]]:
    """All layouts, those that fit first and the fastest of them before the others; and why some cannot run at all."""
    need_triton("a forecast of fused kernels")
    found, refused = [], {}
    for candidate in layouts(run, shape, cluster):
        try:
            found.append(one(candidate, shape, cluster))
        except ValueError as error:
            refused[str(error)] = None
    found.sort(key=lambda f: (not f.fits, f.pace.step if f.fits else f.missing_gib))
    return found, list(refused)


def one(run: Run, shape: Shape, cluster: Cluster) -> Forecast:
    """One layout; raises ValueError where start-up would refuse it, or rates lack its precision."""
    capability = cluster.machine.capability
    composed = pretend(run, shape, cluster.gpus, capability)
    held, mesh = footprint(composed, capability), composed.mesh
    links = {"sp": cluster.between(mesh.sp.size), "all": cluster.between(mesh.world)}
    one_graph = graphed(composed)
    return Forecast(
        run=run,
        dp=mesh.dp.size,
        sp=mesh.sp.size,
        sequence=composed.sequence,
        micro_batch=composed.micro_batch,
        graphed=one_graph,
        footprint=held,
        pace=pace(composed, cluster.machine, capability, links),
        missing_gib=held.taken / GIB + GRAPH_SPARE * one_graph - cluster.room_gib,
        over_gib=held.taken / GIB - cluster.memory_gib,
    )


# ------------------------------------------------------------------------------------------------------ for people


def command(preset: str, found: Forecast, gpus: int, node: int) -> str:
    """The line that runs a layout."""
    p, run = found.run.parallel, found.run
    if gpus == 1:
        start = "python"
    elif gpus <= node:
        start = f"torchrun --standalone --nproc_per_node {gpus}"
    else:
        nodes = -(-gpus // node)
        start = f"torchrun --nnodes {nodes} --nproc_per_node {node} --rdzv_backend c10d --rdzv_endpoint NODE0:29500"
    words = [f"{start} experiments/train.py {preset}", f"--global-batch {run.global_batch}"]
    share = run.global_batch // found.dp
    words += [f"--micro-batch {found.micro_batch}"] * (found.micro_batch != share)
    words += [f"--precision {run.precision}"]
    words += [f"--deterministic {run.deterministic}"] * (run.deterministic is not None)
    words += [f"--parallel.sp {found.sp} --parallel.sequence {found.sequence}"] * (found.sp > 1)
    for name in ("zero", "remat", "offload", "reduce"):
        if getattr(p, name) != getattr(Parallel(), name):
            words.append(f"--parallel.{name} {getattr(p, name)}")
    return " ".join(words)


def row(found: Forecast) -> dict[str, Any]:
    """A layout as JSON."""
    p, w, kept = found.run.parallel, found.footprint.weights, found.footprint.kept
    held = {"masters": w.masters, "moments": w.moments, "ema": w.ema, "working": w.working, "gradients": w.gradients}
    held |= {"sums": w.sums, "activations": kept.forward, "backward": kept.backward}
    held |= {"peak": found.footprint.peak, "taken": found.footprint.taken, "host": found.footprint.host}
    return {
        "dp": found.dp,
        "sp": found.sp,
        "sequence": found.sequence,
        "zero": p.zero,
        "remat": p.remat,
        "offload": p.offload,
        "micro_batch": found.micro_batch,
        "verdict": found.verdict,
        "missing_gib": round(max(0.0, found.missing_gib), 3),
        "over_gib": round(max(0.0, found.over_gib), 3),
        "ms": round(1e3 * found.pace.step, 2),
        "samples_per_s": round(found.run.global_batch / found.pace.step, 1),
        **{f"{name}_gib": round(size / GIB, 3) for name, size in held.items()},
        **{f"{name}_ms": round(1e3 * seconds, 3) for name, seconds in dataclasses.asdict(found.pace).items()},
    }


COLUMNS = ("ms", "samples/s", "peak GiB", "state", "working", "gradients", "activations", "micro", "layout")


def table(found: list[Forecast]) -> str:
    """A line a layout, GiB of its parts, under a head."""
    return "\n".join(_line(cells) for cells in (COLUMNS, *map(_cells, found)))


def _cells(f: Forecast) -> tuple[str, ...]:
    w = f.footprint.weights
    sizes = (f.footprint.peak, w.standing, w.working, max(w.gradients, w.sums), f.footprint.kept.forward)
    speed = f"{f.run.global_batch / f.pace.step:.0f}"
    return f"{1e3 * f.pace.step:.1f}", speed, *(f"{x / GIB:.2f}" for x in sizes), str(f.micro_batch), f.layout


def _line(cells: tuple[str, ...]) -> str:
    widths = (8, 10, 9, 7, 8, 10, 12, 6)
    return " ".join(cell.rjust(width) for cell, width in zip(cells, widths)) + "  " + cells[-1]


def describe(preset: str, found: list[Forecast], refused: list[str], cluster: Cluster, most: int) -> str:
    """The table of the fastest layouts that fit, the first one's command, what may or does not fit, what is assumed."""
    fits, close, large = ([f for f in found if f.verdict == v] for v in ("fits", "close", "too large"))
    room = f"{cluster.gpus} x {cluster.memory_gib:g} GiB"
    if fits:
        lines = [f"{len(fits)} of {len(found)} layouts fit {room}; the fastest:", "", table(fits[:most]), ""]
        lines += ["run it:  " + command(preset, fits[0], cluster.gpus, cluster.node)]
    else:
        lines = [f"none of {len(found)} layouts surely fits {room}"]
    order = "the fastest first" if fits else "what lacks least first"
    for unfit, head, attribute in (
        (close, "too close to tell, so many GiB are missing to be sure", "missing_gib"),
        (large, "too large, by so many GiB", "over_gib"),
    ):
        unfit.sort(key=lambda f: f.pace.step if fits else getattr(f, attribute))
        lines += ["", f"{head}, {order}:", *(_lacks(f, getattr(f, attribute)) for f in unfit[:most])] if unfit else []
    lines += ["", *(f"cannot run: {line}" for line in refused[:3]), *assumed(cluster)]
    return "\n".join(lines)


def _lacks(f: Forecast, gib: float) -> str:
    return f"{gib:8.2f} {1e3 * f.pace.step:10.1f} ms  micro {f.micro_batch}, {f.layout}"


def assumed(cluster: Cluster) -> list[str]:
    """What stands behind the figures, a line each."""
    m = cluster.machine
    beyond = cluster.gpus > cluster.node
    joined = f"{cluster.link} within {cluster.node} GPUs" + ", infiniband between nodes" * beyond
    links = ", ".join(f"{name} {x.gb_per_s:g} GB/s a rank" for name, x in m.links.items())
    return [
        f"assumed: rates of {m.device}; {joined} ({links})",
        f"assumed: allocator and libraries waste {100 * MARGIN:.0f} % of memory, and where a step is one CUDA "
        f"graph {GRAPH_SPARE} GiB more; too large is what has tensors beyond all of it",
        *[
            "assumed: what the host takes without a graph (--no-graphs, offload, fp16) is counted by kernels; where "
            "micro-batches are small it is the limit, and stages 2 and 3 take more than that (README, which layout?)"
        ]
        * (cluster.gpus > 1),
        "assumed: fused kernels, every attention library and quack-kernels; no time for data, validation, checkpoints "
        "or slow ranks; transfers take nothing from kernels beside them",
        *(f"rates: {name}: {source}" for name, source in m.sources.items()),
    ]


LinkName = Literal["nvlink", "infiniband"]
