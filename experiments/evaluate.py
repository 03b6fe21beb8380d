"""Judges a digits model, or measures any model's pictures: FID, sFID, Inception Score, precision, recall; FVD of clips.

``python experiments/evaluate.py --checkpoint runs/digits/ema.safetensors`` has classifiers judge digits. With
``--reference`` samples of any model are compared with real pictures by a feature network; with ``--samples`` pictures
that are there already. Under ``torchrun --nproc_per_node 2 -- experiments/evaluate.py ...`` the ranks draw a share of
the samples each, the same ones on any number of ranks. Without its ``--`` torchrun takes --num for a short form of its
own options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from odit import checks, config, data, evaluate, fidelity, health, peers, plan, random, record, sample, source, tree
from odit.config_json import to_json
from odit.encoders import config as frozen
from odit.fidelity import files
from odit.health import CheckpointError
from odit.models.config import Shape
from odit.parallel import mesh as meshes
from odit.parallel.mesh import Mesh
from odit.source import Foreign, Source


@dataclass(frozen=True)
class Evaluate:
    """What to judge or to measure, and with how many samples."""

    checkpoint: Path | None = None
    """Checkpoint folder or weights file, or weights of other projects as sample.py takes them."""
    num: int | None = None
    """Samples; 50,000 with --reference, all there are with --samples; of digits 1000, 500 by captions or 400 clips."""
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
    """Writes the figures, and what they are of, to this JSON file too."""
    graphs: bool = True
    """Runs a step of sampling as one CUDA graph where that is possible; pictures stay the same."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""
    cfg: Annotated[Literal[1, 2], tyro.conf.arg(name="parallel.cfg")] = 1
    """2 draws with the halves of a guidance pair on two ranks."""
    sp: Annotated[int, tyro.conf.arg(name="parallel.sp")] = 1
    """Ranks that share a sample's tokens."""
    sequence: Annotated[config.Sequence, tyro.conf.arg(name="parallel.sequence")] = "auto"
    """How ranks share a sample's tokens."""
    data: Literal["digits"] | None = None
    """What weights of other projects were trained on, which they do not tell: for the judge of digits."""
    foreign: Foreign = field(default_factory=Foreign)
    """What else a checkpoint of another project does not tell."""

    reference: Path | None = None
    """Real pictures: an .npz of ADM's form (pictures, statistics or both), or a folder; of clips also one of films."""
    samples: Path | None = None
    """Measures these instead of drawing any: an .npz of ADM's form, or a folder of pictures of one size."""
    inception: Path | None = None
    """Weights of the feature network for pictures, pt_inception-2015-12-05-6726825d.pth."""
    i3d: Path | None = None
    """TorchScript file of the feature network for clips, (B, 3, T, H, W) of 0 to 255, such as i3d_torchscript.pt; its
    code is run, so take it from where you trust."""
    resize: fidelity.Resize = "tensorflow"
    """How pictures come to the network's size: as TensorFlow's graph and ADM do it, or as pytorch-fid does (torch)."""
    labels: Literal["uniform", "balanced"] = "uniform"
    """Drawn uniformly, as ADM and DiT do, or each class equally often."""
    prompts: Path | None = None
    """A text file of captions to draw, one a line, repeated in turn."""
    batch: int = 64
    """Pictures at once on one rank; figures differ by rounding alone."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of the model's matrix products; the run's own unless given. Feature networks run in fp32."""
    encoders: frozen.Config = field(default_factory=frozen.Config)
    """Where the run's encoders are now; what is not given is the run's own."""
    interval: int = 1
    """Frames of a reference film from one frame of a clip to the next."""
    samples_out: Path | None = None
    """Writes the pictures that were drawn to this .npz, which ADM's own evaluator.py reads."""
    statistics_out: Path | None = None
    """Writes the reference's statistics to this .npz, which serves as --reference from then on."""


ANY = {"num", "out", "device"}
DRAWING = {"checkpoint", "seed", "solver", "steps", "guidance", "weights", "cfg", "sp", "sequence", "foreign"}
COMPARING = {"reference", "inception", "i3d", "resize", "batch", "interval", "statistics_out"}
USED = {
    "--checkpoint": ANY | DRAWING | {"data"},
    "--reference": ANY | DRAWING | COMPARING | {"labels", "prompts", "precision", "encoders", "samples_out"},
    "--samples": ANY | COMPARING | {"samples"},
}
NAMES = {"--checkpoint": "the judge of digits", "--reference": "a comparison", "--samples": "a comparison of files"}


def main(args: Evaluate) -> None:
    """Joins the other ranks, loads, draws and judges or measures; with a judge the class accuracy comes last."""
    check(args)
    opened = None if args.checkpoint is None else source.open_source(args.checkpoint, args.weights, args.foreign)
    judged = None if opened is None or args.reference is not None else with_data(args, opened)
    if judged is not None and judged.data.source not in evaluate.JUDGES:
        raise ValueError(
            f"checkpoint {args.checkpoint} was trained on data.source {judged.data.source}: only digits have a judge, "
            "for others give --reference"
        )
    for path in filter(None, (args.out, args.samples_out, args.statistics_out)):
        path.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be written shows before the work
    rank, world, _ = meshes.start(checks.pick_device(args.device))
    with contextlib.ExitStack() as stack:
        stack.callback(meshes.stop)
        peers.same_everywhere(meshes.store(), rank, world, "command line", to_json(args))
        if opened is None:
            measure_files(args, meshes.make_mesh(world, rank, world, 1))
        elif judged is None:
            measure_model(args, opened, rank, world)
        else:
            judge(args, opened, judged, rank, world)


def check(args: Evaluate) -> None:
    """Refuses settings that do not go together, before anything slow happens; raises ValueError."""
    if args.num is not None and args.num < fidelity.LEAST:
        raise ValueError(f"num is {args.num}: a Frechet distance needs more samples, use 20 or more (1000 is usual)")
    if args.batch < 1:
        raise ValueError(f"batch is {args.batch}: use 1 or more")
    for name, file in (("out", "figures.json"), ("samples_out", "samples.npz"), ("statistics_out", "statistics.npz")):
        if (path := getattr(args, name)) is not None and path.is_dir():
            raise ValueError(f"{name} {path} is a folder: use a file such as {path / file}")
    if (args.checkpoint is None) == (args.samples is None):
        told = "neither checkpoint nor samples is given" if args.samples is None else "checkpoint and samples are given"
        raise ValueError(f"{told}: give --checkpoint to draw samples, or --samples where they are there")
    if args.samples is not None and args.reference is None:
        raise ValueError("samples is given but reference is not: give --reference, what to compare them with")
    mode = "--samples" if args.samples is not None else "--checkpoint" if args.reference is None else "--reference"
    for name in (f.name for f in dataclasses.fields(args)):
        if name not in USED[mode] and getattr(args, name) != getattr(Evaluate(), name):
            fix = "give --reference, or leave it out" if mode == "--checkpoint" else "leave it out"
            raise ValueError(f"{name} is given, which {NAMES[mode]} has no use for: {fix}")
    if args.inception is not None and args.i3d is not None:
        raise ValueError("inception and i3d are given: give --inception for pictures, --i3d for clips")


def judge(args: Evaluate, opened: Source, run: config.Run, rank: int, world: int) -> None:
    """Draws digits and has them judged."""
    run = on_ranks(args, dataclasses.replace(run, sampling=sampling_of(args, run, opened)), world)
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
    found = evaluate.evaluate(
        composed, opened.load(composed), dataset, num=args.num, seed=args.seed, progress=bar(rank, "step")
    )
    if rank == 0:
        if args.out:
            record.write_json(args.out, {**found, "sampling": to_json(run.sampling), "seed": args.seed})
        print(evaluate.report(found))


def measure_model(args: Evaluate, opened: Source, rank: int, world: int) -> None:
    """Draws pictures or clips and compares them with the reference."""
    assert args.reference is not None  # else there is a judge
    run, num = opened.run, args.num or fidelity.USUAL
    run = dataclasses.replace(
        run,
        encoders=source.encoders_of(opened, args.encoders),
        precision=args.precision or run.precision,
        sampling=sampling_of(args, run, opened),
    )
    run = on_ranks(args, run, world)
    mesh = meshes.make_mesh(world, rank, **checks.axes(run, world))
    meshes.warm_up(mesh)
    composed = plan.compose(run, opened.shape, mesh)
    source.check_encoders(opened, composed)
    if source.draws_latents(opened) and composed.front.vae is None:
        raise ValueError(
            f"checkpoint {args.checkpoint} draws latents, of which no picture is shown without an autoencoder: give "
            "--encoders.vae and --encoders.vae-path"
        )
    size = composed.front.pixel_size(opened.shape.size)
    network = load_network(args, composed.device, size)
    reference = files.open_reference(args.reference, "reference", size, args.interval)
    if rank == 0 and (notes := [*opened.note, *composed.notes]):
        print(*notes, sep="\n")
    conditions, labels = choose(args, composed, num)
    read = evaluate.drawn_pictures(composed, opened.load(composed), conditions, args.seed)
    with contextlib.ExitStack() as stack:
        write = None
        if args.samples_out is not None and rank == 0:
            write = stack.enter_context(files.writing(args.samples_out, (num, *size, 3), labels))
        samples = evaluate.look(
            network, read, num, mesh.pictures, composed.device, batch=args.batch, keep=network.logits is not None,
            write=write, progress=bar(rank, "round"),
        )  # fmt: skip
    told = {
        "checkpoint": str(args.checkpoint),
        "weights": args.weights,
        "step": opened.about.get("step"),
        "seed": args.seed,
        "labels": args.labels if labels is not None else None,
        "prompts": str(args.prompts) if args.prompts else None,
        "sampling": {**to_json(run.sampling), "solver": checks.solver_of(run.sampling, composed.objective)},
        "precision": run.precision,
        "vae": composed.front.fingerprints.get("vae"),
        "rounding": files.ROUNDING,
    }
    finish(args, network, samples, reference, mesh.pictures, mesh, composed.device, told)


def measure_files(args: Evaluate, mesh: Mesh) -> None:
    """Compares pictures or clips that are there with the reference."""
    assert args.samples is not None and args.reference is not None  # check saw to it
    meshes.warm_up(mesh)
    device = checks.pick_device(args.device)
    pictures = files.open_pictures(args.samples, "samples")
    network = load_network(args, device, pictures.size)
    reference = files.open_reference(args.reference, "reference", pictures.size, args.interval)
    num = args.num or len(pictures)
    if not fidelity.LEAST <= num <= len(pictures):
        least = f"{fidelity.LEAST} or more" if args.num is None else f"--num {len(pictures)} or less"
        raise ValueError(f"samples {args.samples} holds {len(pictures)}, and {num} are to be compared: use {least}")
    samples = evaluate.look(
        network, pictures.read, num, mesh.all, device, batch=args.batch, keep=network.logits is not None,
        progress=bar(mesh.rank, "round"),
    )  # fmt: skip
    told = {"samples": str(args.samples), "samples_identity": source_of(args.samples)}
    finish(args, network, samples, reference, mesh.all, mesh, device, told)


def finish(args, network, samples, reference, axis, mesh: Mesh, device: torch.device, told: dict[str, Any]) -> None:
    """Looks at the reference, compares, and writes and prints what is found."""
    seen = evaluate.look_at_reference(network, reference, axis, device, args.batch, bar(mesh.rank, "round"))
    if args.statistics_out is not None and mesh.rank == 0:
        files.write_statistics(args.statistics_out, seen.moments)
    found = evaluate.compare(network, samples, seen, mesh.all)
    if mesh.rank > 0:
        return
    if args.out:
        seen_as = {"interval": args.interval} if network.clips else {}
        about = {
            "num": samples.num,
            "batch": args.batch,
            **told,
            "reference": {**reference.about, **seen_as},
            "network": network.about,
        }
        record.write_json(args.out, {**found, **about, "versions": record.about()})
    print(fidelity.report(found))


def load_network(args: Evaluate, device: torch.device, size: tuple[int, ...]) -> fidelity.Network:
    """The feature network for what there is; raises ValueError where it is for the other kind."""
    clips = len(size) == 3
    if clips and args.inception is not None:
        raise ValueError("inception is given but the samples are clips: give --i3d")
    if not clips and args.i3d is not None:
        raise ValueError("i3d is given but the samples are pictures: give --inception")
    if clips:
        return fidelity.load_i3d(args.i3d, device)
    return fidelity.load_inception(args.inception, device, args.resize)


def choose(args: Evaluate, composed: plan.Plan, num: int) -> tuple[tree.Tree, torch.Tensor | None]:
    """The conditions of the samples, and their labels where these are classes."""
    if composed.shape.text_length:
        if composed.tokenize is None or args.prompts is None:
            raise ValueError(
                "this model draws by captions: give --prompts, a file of them, and --encoders.text and "
                "--encoders.text-path where it was trained from latents"
            )
        prompts = sample.read_prompts(args.prompts)
        return composed.tokenize([prompts[i % len(prompts)] for i in range(num)]), None
    if args.prompts is not None:
        raise ValueError("prompts is given but this model has no captions: leave it out")
    classes = composed.shape.num_classes
    if args.labels == "balanced" or not classes:
        labels = sample.spread_labels(num, classes)
    else:
        labels = sample.random_labels(num, classes, random.key(args.seed))
    return labels, labels if classes else None


def sampling_of(args: Evaluate, run: config.Run, opened: Source) -> config.Sampling:
    """The run's own sampling with what the command line says of it."""
    conditional = opened.shape.conditional
    given = {"solver": args.solver, "steps": args.steps, "scale": args.guidance, "graphs": args.graphs}
    return sample.override(run.sampling, conditional, **given)


def on_ranks(args: Evaluate, run: config.Run, world: int) -> config.Run:
    """The run as it samples on ``world`` ranks."""
    return dataclasses.replace(
        run,
        global_batch=world,  # nothing is trained here: a batch that any number of ranks divides
        device=args.device,
        evaluation=fidelity.Config(),
        parallel=config.Parallel(sp=args.sp, sequence=args.sequence, cfg=args.cfg),
    )


def bar(rank: int, unit: str) -> Any:
    """A progress bar on rank 0."""
    return functools.partial(tqdm, unit=unit, leave=False, disable=rank > 0)


def source_of(path: Path) -> dict[str, str] | None:
    """A file's name and hash; None of a folder."""
    return files.identity(path) if path.is_file() else None


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
