"""Will it fit, and how fast? Bytes a rank and seconds a step of every layout of a preset, on GPUs that are not here.

``python experiments/plan.py dit-xl-2 --gpus 8 --memory-gib 80 --global-batch 256`` prints the fastest layouts that fit,
the command for the first, and which others are too large or too close to tell.
"""

from __future__ import annotations

import dataclasses
import json
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
    for name in ("gpus", "node", "most"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}: use 1 or more")
    machine = rates.load(args.machine)
    run = dataclasses.replace(
        preset(args.preset), precision=args.precision, deterministic=args.deterministic, evaluate=False
    )
    run = dataclasses.replace(run, global_batch=args.global_batch or run.global_batch)
    shape = checks.expected_shape(run)
    if shape is None:
        raise ValueError(f"preset is {args.preset}, whose shapes an encoder decides: use one without encoders")
    cluster = Cluster(args.gpus, args.memory_gib or machine.memory_gib, machine, args.link, args.node)
    found, refused = forecast.forecast(run, shape, cluster)
    print(forecast.describe(args.preset, found, refused, cluster, args.most))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [forecast.row(f) for f in found]
        asked = {name: value for name, value in vars(args).items() if name != "out"}
        about = {"asked": asked, "memory_gib": cluster.memory_gib, "assumed": forecast.assumed(cluster)}
        args.out.write_text(json.dumps({**about, "refused": refused, "layouts": rows}, indent=1) + "\n")


if __name__ == "__main__":
    health.run(lambda: main(tyro.cli(Plan, description=__doc__)))
