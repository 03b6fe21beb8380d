"""Draws pictures and clips: ``python experiments/sample.py --checkpoint runs/digits/ema.safetensors --out x.png``.

Under ``torchrun --nproc_per_node 2 -- experiments/sample.py ...`` the ranks draw a share each, of the same pictures;
with ``--parallel.cfg 2`` two of them the halves of a guidance pair.
Without its ``--`` torchrun takes --num for a short form of its own options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from odit import checks, config, health, media, peers, plan, random, record, sample, source, tree
from odit.config_json import to_json
from odit.encoders import config as frozen
from odit.parallel import mesh as meshes
from odit.source import Foreign, Source
from odit.storage import set_usual_mode, try_writing, whole, writing


@dataclass(frozen=True)
class Sample:
    """What to draw, from which weights."""

    checkpoint: Path
    """Checkpoint folder or weights file, a .pt of facebookresearch/DiT, or a folder of diffusers."""
    out: Path | None = None
    """The grid of all samples to write, whose metadata holds the recipe: .png (of clips some frames), .mp4 or .gif;
    samples.png, or samples.mp4 for clips, unless given."""
    fps: float = 8.0
    """Frames a second of clips."""
    num: int = 16
    """Pictures."""
    label: tuple[int, ...] = ()
    """Classes to draw, repeated in turn; all of them unless given."""
    prompt: tuple[str, ...] = ()
    """Captions to draw, repeated in turn."""
    prompts: Path | None = None
    """A text file of captions, one a line, repeated in turn."""
    seed: int = 0
    """Picture i is a function of (weights, seed, i, label), whatever the batch."""
    solver: Literal["ddpm", "ddim", "dpm++", "euler", "heun", "sde"] | None = None
    """The run's own unless given."""
    steps: int | None = None
    """Solver steps; the run's own unless given."""
    guidance: float | None = None
    """Guidance scale; the run's own unless given, 1 for none."""
    interval: tuple[float, float] | None = None
    """Noise levels between which guidance acts; 0 is data, 1 noise."""
    channels: int | None = None
    """Leading channels that are guided."""
    weights: Literal["ema", "param"] = "ema"
    """Averaged or live weights, where the checkpoint has both."""
    batch: int = 64
    """Pictures at once on one rank."""
    columns: int | None = None
    """Columns of the grid; about square unless given."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of matrix products; the run's own unless given."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""
    cfg: Annotated[Literal[1, 2], tyro.conf.arg(name="parallel.cfg")] = 1
    """2 draws with the halves of a guidance pair on two ranks."""
    sp: Annotated[int, tyro.conf.arg(name="parallel.sp")] = 1
    """Ranks that share a picture's tokens."""
    sequence: Annotated[config.Sequence, tyro.conf.arg(name="parallel.sequence")] = "auto"
    """How ranks share a picture's tokens."""
    graphs: bool = True
    """Runs a step as one CUDA graph where that is possible; pictures stay the same."""
    compile: bool = False
    """Compiles the blocks."""
    encoders: frozen.Config = field(default_factory=frozen.Config)
    """Where the run's encoders are now; what is not given is the run's own."""
    foreign: Foreign = field(default_factory=Foreign)
    """What a checkpoint of another project does not tell."""
    tensors: Path | None = None
    """Also writes the raw samples (N, C, H, W) fp32 to this safetensors file."""


def main(args: Sample) -> None:
    """Joins the other ranks, loads, draws, writes."""
    for name in ("num", "batch", "columns"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}: use 1 or more")
    rank, world, _ = meshes.start(checks.pick_device(args.device))
    with contextlib.ExitStack() as stack:
        stack.callback(meshes.stop)
        peers.same_everywhere(meshes.store(), rank, world, "command line", to_json(args))
        found = source.open_source(args.checkpoint, args.weights, args.foreign)
        run, shape = read_run(args, found, world), found.shape
        mesh = meshes.make_mesh(world, rank, **checks.axes(run, world))
        meshes.warm_up(mesh)
        composed = plan.compose(run, shape, mesh)
        source.check_encoders(found, composed)
        if rank == 0 and (notes := [*found.note, *composed.notes]):
            print(*notes, sep="\n")
        if rank == 0 and composed.device.type == "cuda":
            why = sample.graph_obstacle(composed, run.sampling)
            print(f"graphs: {'none, ' + why if why else 'a model call is one CUDA graph'}")
        shown, conditions = choose(args, composed)
        args = dataclasses.replace(args, out=target(args.out, len(composed.shape.size) == 3))
        check_fps(args, len(composed.shape.size) == 3)
        for path in filter(None, (args.out, args.tensors)):  # a place that cannot be written shows before the work
            peers.told_by_rank_0(meshes.store(), rank, str(path), functools.partial(try_writing, path))
        params = found.load(composed)
        pictures = sample.sample(
            composed,
            params,
            conditions,
            random.key(args.seed),
            batch=args.batch,
            progress=functools.partial(tqdm, unit="step", leave=False, disable=rank > 0),
        )
        if rank == 0:
            write(args, composed, shown, pictures)
            print(f"{args.num} samples: {args.out}")


def check_fps(args: Sample, clips: bool) -> None:
    """Refuses a rate that no file will have; raises ValueError."""
    still = args.out is not None and args.out.suffix.lower() == ".png"
    if args.fps != Sample.fps and (still or not clips):
        what = f"out {args.out} is a picture" if clips else f"{args.checkpoint} draws pictures"
        raise ValueError(f"fps is {args.fps} but {what}: leave it out")
    if clips and not still:
        media.check_rate(args.fps, args.out)


def read_run(args: Sample, found: Source, world: int) -> config.Run:
    """The run that wrote the weights, as it samples on ``world`` ranks."""
    run, shape = found.run, found.shape
    sampling = sample.override(
        run.sampling,
        shape.conditional,
        solver=args.solver,
        steps=args.steps,
        scale=args.guidance,
        interval=args.interval,
        channels=args.channels,
        graphs=args.graphs,
    )
    return dataclasses.replace(
        run,
        encoders=source.encoders_of(found, args.encoders),
        global_batch=world,  # nothing is trained here: a batch that any number of ranks divides
        precision=args.precision or run.precision,
        device=args.device,
        sampling=sampling,
        compile=args.compile,
        parallel=config.Parallel(sp=args.sp, sequence=args.sequence, cfg=args.cfg),
    )


def choose(args: Sample, composed: plan.Plan) -> tuple[dict[str, list], tree.Tree]:
    """What each picture shows, for people and for the model."""
    if composed.tokenize is None and composed.shape.text_length:
        raise ValueError(
            "this model draws by captions as a frozen encoder gives them, and it was trained from latents without one: "
            "give --encoders.text and --encoders.text-path"
        )
    if composed.tokenize is None:
        if args.prompt or args.prompts:
            raise ValueError("prompt is given but this model has no captions: use --label, or leave it out")
        labels = sample.choose_labels(args.num, composed.shape.num_classes, args.label)
        return {"labels": labels.tolist()}, labels
    if args.label:
        raise ValueError(f"label {args.label[0]} is given but this model was trained with captions: use --prompt")
    prompts = [*args.prompt, *(sample.read_prompts(args.prompts) if args.prompts else [])]
    if not prompts:
        raise ValueError('prompt is not given but this model draws by captions: use --prompt "..." or --prompts FILE')
    prompts = [prompts[i % len(prompts)] for i in range(args.num)]
    return {"prompts": prompts}, composed.tokenize(prompts)


def target(out: Path | None, clips: bool) -> Path:
    """The file to write; raises ValueError for a kind that cannot hold the samples."""
    out = out or Path("samples.mp4" if clips else "samples.png")
    kinds = (".mp4", ".gif", ".png") if clips else (".png",)
    if out.suffix not in kinds:
        raise ValueError(f"out is {out}, which cannot hold {'clips' if clips else 'pictures'}: use {', '.join(kinds)}")
    return out


def write(args: Sample, composed: plan.Plan, shown: dict[str, list], pictures) -> None:
    """Writes the grid with its recipe, and the tensors where asked."""
    sampling = composed.run.sampling
    recipe = {
        **to_json(args),
        "sampling": {**to_json(sampling), "solver": checks.solver_of(sampling, composed.objective)},
        **shown,
        "versions": record.about(),
    }
    classes = composed.shape.num_classes
    square = classes if classes == 10 and not args.label else math.ceil(args.num**0.5)
    columns = min(args.columns or square, args.num)
    with writing(args.out, pictures.numel()):  # about what the pixels take
        if pictures.ndim == 4:
            media.save_png(args.out, media.grid(pictures, columns), recipe)
        elif args.out.suffix == ".png":
            media.save_png(args.out, media.strip(pictures), recipe)
        else:
            save = media.save_mp4 if args.out.suffix == ".mp4" else media.save_gif
            save(args.out, media.clip_grid(pictures, columns), args.fps, recipe)
    if args.tensors:
        from safetensors.torch import save_file

        labels = {"labels": torch.tensor(shown["labels"])} if "labels" in shown else {}
        with writing(args.tensors, pictures.nbytes), whole(args.tensors) as temporary:
            save_file({"samples": pictures.contiguous(), **labels}, temporary)
            set_usual_mode(temporary)


def cli() -> None:
    """Reads the command line."""
    main(tyro.cli(Sample, description=__doc__))


if __name__ == "__main__":
    health.run(cli)
