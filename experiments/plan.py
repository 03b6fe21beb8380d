"""Will it fit, and how fast? Bytes a rank and seconds a step of every layout of a preset, on GPUs that are not here.

``python experiments/plan.py dit-xl-2 --gpus 8 --memory-gib 80 --global-batch 256`` prints the fastest layouts that fit,
the command for the first, and which others are too large or too close to tell.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from odit import checks, forecast, health, rates
from odit.bench.common import preset
from odit.forecast import Cluster


@dataclass(frozen=True)
class Plan:
    """A run, and the GPUs it would get."""

    preset: tyro.conf.Positional[str]
    """A preset of train.py."""
    gpus: int = 8
    """Ranks, 1 to 1,024 and more."""
    memory_gib: float | None = None
    """Memory of a GPU; the machine's own unless given."""
    global_batch: int | None = None
    """Samples a step, over all ranks; the preset's unless given."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of matrix products."""
    deterministic: bool | None = None
    """As train.py's: off is faster where samples have thousands of tokens."""
    machine: str = "h200"
    """A table of rates that ships (h100, h200), or a file that bench.py rates wrote."""
    link: forecast.LinkName = "nvlink"
    """What joins the GPUs of a node; nodes are joined by InfiniBand."""
    node: int = 8
    """GPUs of a node."""
    most: int = 12
    """Layouts in the table."""
    out: Path | None = None
    """Writes all layouts to this JSON file."""


def main(args: Plan) -> None:
    """Forecasts, prints and writes."""
    check(args)
    machine = rates.load(args.machine)
    run = dataclasses.replace(
        preset(args.preset), precision=args.precision, deterministic=args.deterministic, evaluate=False
    )
    if args.global_batch is not None:
        run = dataclasses.replace(run, global_batch=args.global_batch)
    shape = checks.expected_shape(run)
    if shape is None:
        raise ValueError(f"preset is {args.preset}, whose shapes an encoder decides: use one without encoders")
    memory_gib = machine.memory_gib if args.memory_gib is None else args.memory_gib
    cluster = Cluster(args.gpus, memory_gib, machine, args.link, args.node)
    found, refused = forecast.forecast(run, shape, cluster)
    print(forecast.describe(args.preset, found, refused, cluster, args.most))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [forecast.row(f) for f in found]
        asked = {name: value for name, value in vars(args).items() if name != "out"}
        about = {"asked": asked, "memory_gib": cluster.memory_gib, "assumed": forecast.assumed(cluster)}
        args.out.write_text(json.dumps({**about, "refused": refused, "layouts": rows}, indent=1) + "\n")


def check(args: Plan) -> None:
    """Raises ValueError for numbers without meaning, and for a place that cannot be written."""
    for name in ("gpus", "global_batch", "node", "most"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name} is {value}: use 1 or more")
    if args.memory_gib is not None and not 0 < args.memory_gib < math.inf:
        raise ValueError(f"memory_gib is {args.memory_gib}: use a number of GiB above 0, such as 80")
    if args.out is not None and args.out.is_dir():
        raise ValueError(f"out {args.out} is a folder: use a file such as {args.out / 'plan.json'}")


if __name__ == "__main__":
    health.run(lambda: main(tyro.cli(Plan, description=__doc__)))
