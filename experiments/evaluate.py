"""Judges a digits model: ``python experiments/evaluate.py --checkpoint runs/digits/ema.safetensors``.

Under ``torchrun --nproc_per_node 2 -- experiments/evaluate.py ...`` the ranks draw a share of the samples each.
Without its ``--`` torchrun takes --num for a short form of its own options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from odit import checks, config, data, evaluate, health, plan, record, sample, source
from odit.health import CheckpointError
from odit.models.config import Shape
from odit.parallel import mesh as meshes
from odit.source import Foreign, Source


@dataclass(frozen=True)
class Evaluate:
    """What to judge, and with how many samples."""

    checkpoint: Path
    """Checkpoint folder or weights file of a digits run; with --data, weights of other projects as sample.py takes."""
    num: int | None = None
    """Samples; 1000 digits, 500 by captions or 400 clips unless given."""
    seed: int = 0
    """Seed of the samples."""
    solver: Literal["ddpm", "ddim", "dpm++", "euler", "heun", "sde"] | None = None
    """The run's own unless given."""
    steps: int | None = None
    """Solver steps; the run's own unless given."""
    guidance: float | None = None
    """Guidance scale; the run's own unless given, 1 for none."""
    weights: Literal["ema", "param"] = "ema"
    """Averaged or live weights, where the checkpoint has both."""
    out: Path | None = None
    """Writes the figures to this JSON file too."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""
    cfg: Annotated[Literal[1, 2], tyro.conf.arg(name="parallel.cfg")] = 1
    """2 draws with the halves of a guidance pair on two ranks."""
    sp: Annotated[int, tyro.conf.arg(name="parallel.sp")] = 1
    """Ranks that share a sample's tokens."""
    sequence: Annotated[config.Sequence, tyro.conf.arg(name="parallel.sequence")] = "auto"
    """How ranks share a sample's tokens."""
    data: Literal["digits"] | None = None
    """What weights of other projects were trained on, which they do not tell."""
    foreign: Foreign = field(default_factory=Foreign)
    """What else a checkpoint of another project does not tell."""


def main(args: Evaluate) -> None:
    """Joins the other ranks, loads, draws, judges; the last line is the class accuracy."""
    if args.num is not None and args.num < 20:
        raise ValueError(f"num is {args.num}: a Frechet distance needs more samples, use 20 or more (1000 is usual)")
    opened = source.open_source(args.checkpoint, args.weights, args.foreign)
    run = with_data(args, opened)
    if run.data.source not in evaluate.JUDGES:
        raise ValueError(
            f"checkpoint {args.checkpoint} was trained on data.source {run.data.source}: only digits have a judge"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be written shows before the work
    rank, world, _ = meshes.start(checks.pick_device(args.device))
    with contextlib.ExitStack() as stack:
        stack.callback(meshes.stop)
        health.same_everywhere(meshes.store(), rank, world, "command line", config.to_json(args))
        told = sample.override(
            run.sampling,
            opened.shape.conditional,
            solver=args.solver,
            steps=args.steps,
            scale=args.guidance,
        )
        run = dataclasses.replace(
            run,
            global_batch=world,  # nothing is trained here: a batch that any number of ranks divides
            device=args.device,
            sampling=told,
            parallel=config.Parallel(sp=args.sp, sequence=args.sequence, cfg=args.cfg),
        )
        mesh = meshes.make_mesh(world, rank, **checks.axes(run, world))
        meshes.warm_up(mesh)
        front = plan.load_front(run, mesh)
        dataset = data.open_dataset(run.data, front.tokenize)
        if not len(dataset.held_out_ids):
            raise ValueError(f"checkpoint {args.checkpoint} held no digits out, so nothing tells how good a judge is")
        if opened.foreign and (shape := plan.shape_of(run, dataset, front)) != opened.shape:
            raise CheckpointError(
                f"checkpoint {args.checkpoint} draws {describe(opened.shape)}, data.source {run.data.source} has "
                f"{describe(shape)}: only a model of that data can be judged by it"
            )
        composed = plan.make(run, dataset, mesh, front)
        if rank == 0 and (notes := [*opened.note, *composed.notes]):
            print(*notes, sep="\n")
        params = opened.load(composed)
        found = evaluate.evaluate(
            composed, params, dataset, num=args.num, seed=args.seed,
            progress=functools.partial(tqdm, unit="step", leave=False, disable=rank > 0),
        )  # fmt: skip
        if rank == 0:
            if args.out:
                record.write_json(args.out, {**found, "sampling": config.to_json(run.sampling), "seed": args.seed})
            print(evaluate.report(found))


def with_data(args: Evaluate, opened: Source) -> config.Run:
    """The run that wrote the weights, on the data that it or the command line tells; raises ValueError."""
    if "data" in opened.about or opened.run.data.source != "latents":
        if args.data is not None:
            raise ValueError(f"data is given but checkpoint {args.checkpoint} tells its own: leave it out")
        return opened.run
    if args.data is None:
        raise ValueError(
            f"checkpoint {args.checkpoint} does not tell what it was trained on: use --data digits where that is digits"
        )
    return dataclasses.replace(opened.run, data=config.presets()[args.data][1].data)


def describe(shape: Shape) -> str:
    """What a model draws, in a few words."""
    return f"{'x'.join(map(str, shape.sample))} of {shape.num_classes} classes"


def cli() -> None:
    """Reads the command line."""
    main(tyro.cli(Evaluate, description=__doc__))


if __name__ == "__main__":
    health.run(cli)
