"""Writes weights for others: ``python experiments/export.py --checkpoint runs/a/ema.safetensors --to dit --out a.pt``.

``--checkpoint`` takes whatever ``sample.py`` takes, so that this converts from one project's format to another's too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from odit import checkpoint, config, convert, finetune, health, plan, source, tree
from odit.config_json import to_json
from odit.convert.diffusers import NULL
from odit.encoders import frozen, vae
from odit.front import Front
from odit.health import CheckpointError
from odit.manifest import MANIFEST
from odit.source import Foreign, Source
from odit.storage import writing

KEPT = ("step", "seed", "global_batch", "samples", "shape", "data", "encoders", "class_names", "versions")
OF_RUNS = ("metrics.jsonl", "checkpoints", MANIFEST)  # what tells that a folder is a run's or a checkpoint's
LATENTS = ("synthetic", "latents")  # sources of latents, whatever encoders are told


@dataclass(frozen=True)
class Export:
    """Which weights, and in which form."""

    checkpoint: Path
    """Checkpoint folder or weights file, a .pt of facebookresearch/DiT, or a folder of diffusers."""
    out: Path
    """What to write: a .safetensors file (odit), a .pt file (dit) or a folder (diffusers)."""
    to: Literal["odit", "dit", "diffusers"] = "odit"
    """odit: one file that says what it is; dit: facebookresearch/DiT; diffusers: a folder of DiTPipeline or
    LattePipeline."""
    weights: Literal["ema", "param"] = "ema"
    """Averaged or live weights, where the checkpoint has both."""
    vae_path: str | None = None
    """Folder or hub name of the AutoencoderKL to put into the folder of diffusers."""
    allow_other_timesteps: bool = False
    """Accepts that outputs differ because the other project computes other timestep frequencies."""
    foreign: Foreign = field(default_factory=Foreign)
    """What a checkpoint of another project does not tell."""


def main(args: Export) -> None:
    """Opens, refuses what the form cannot hold, writes whole or not at all, and says what the form leaves out."""
    check_out(args)
    found = source.open_source(args.checkpoint, args.weights, args.foreign)
    run = found.run
    if args.to == "dit":
        convert.check_objective(run.diffusion)
    elif args.to == "diffusers":
        convert.check_pipeline(run.model, found.shape, run.diffusion, args.allow_other_timesteps)
        if run.encoders.vae not in ("none", "kl"):
            raise ValueError(
                f"encoders.vae is {run.encoders.vae} and diffusers' pipelines decode by AutoencoderKL alone"
            )
    autoencoder = load_vae(args, args.vae_path, found, run) if args.vae_path is not None else None
    params, run = whole(found, run)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    num = sum(leaf.numel() for leaf in tree.leaves(params))
    if args.to == "odit":
        checkpoint.save_weights(args.out, params, about(found, run), args.weights)
    elif args.to == "dit":
        convert.write_pt(args.out, convert.to_dit(params, run.model, found.shape, args.allow_other_timesteps))
    else:
        beside = autoencoder.state_dict().values() if autoencoder is not None else ()
        needed = 4 * num + sum(tensor.nbytes for tensor in beside)
        with whole_folder(args.out) as folder, writing(args.out, needed):  # free is told while the folder is there
            names, allow = found.about.get("class_names"), args.allow_other_timesteps
            convert.save_pipeline(folder, params, run.model, found.shape, run.diffusion, names, allow)
            if autoencoder is not None:
                autoencoder.save_pretrained(folder / "vae", safe_serialization=True)
    print(f"{args.out}: {num / 1e6:.2f} M parameters, {args.weights} weights of {args.checkpoint} ({found.kind})")
    for line in [*found.note, *left_out(args, found, run)]:
        print(line)


def check_out(args: Export) -> None:
    """Refuses settings that do not go together, a folder that holds something, and a run's own file."""
    suffix = {"odit": ".safetensors", "dit": ".pt", "diffusers": ""}[args.to]
    if suffix and args.out.suffix != suffix:
        raise ValueError(f"out is {args.out} but --to {args.to} writes a {suffix} file: use {args.out.stem}{suffix}")
    if (args.out.is_dir() and (suffix or any(args.out.iterdir()))) or (not suffix and args.out.is_file()):
        raise ValueError(f"out {args.out} is there already: use another --out, or remove it")
    if args.out.is_file() and (found := [name for name in OF_RUNS if (args.out.parent / name).exists()]):
        raise ValueError(f"out {args.out} is a run's own, as {found[0]} is beside it: use another --out")
    if args.out.is_file() and args.checkpoint.exists() and args.out.samefile(args.checkpoint):
        raise ValueError(f"out {args.out} is the checkpoint itself: use another --out")
    if args.vae_path is not None and args.to != "diffusers":
        raise ValueError(f"vae_path is given but --to {args.to} has no place for it: leave it out")


def whole(found: Source, run: config.Run) -> tuple[tree.Tree, config.Run]:
    """The plain model's weights, adapters merged, and the run as of these."""
    composed = plan.compose(dataclasses.replace(run, device="cpu", threads=None), found.shape, None, Front())
    params = found.load(composed)
    if not run.finetune.lora_rank:
        return params, run
    return finetune.merge(params, run.finetune.scale), dataclasses.replace(run, finetune=finetune.Config())


def about(found: Source, run: config.Run) -> dict[str, Any]:
    """What a weights file tells of itself, from what the checkpoint told."""
    kept = {name: found.about[name] for name in KEPT if name in found.about}
    return {**kept, "config": to_json(run), "finetune": found.about.get("config", {}).get("finetune")}


def load_vae(args: Export, path: str, found: Source, run: config.Run) -> Any:
    """The autoencoder as a module; raises ValueError for one that is not the model's or that pipelines read otherwise.

    DiTPipeline and LattePipeline divide latents by scaling_factor and know no shift and no value a channel.
    """
    if draws_pixels(found, run):
        raise ValueError(f"vae_path is given but checkpoint {args.checkpoint} draws pixels: leave it out")
    place, given = frozen.find(path, "vae", "vae_path"), vae.load("kl", path)
    if told := found.about.get("encoders", {}).get("vae"):
        prints = (vae.load("kl", path, dtype).fingerprint for dtype in plan.DTYPES.values())
        if told not in prints:  # it was taken in the dtype in which it served
            raise CheckpointError(
                f"vae_path has the fingerprint {given.fingerprint}, checkpoint {args.checkpoint} was trained with "
                f"{told}: give that one"
            )
    if given.channels != found.shape.channels:
        raise ValueError(
            f"vae_path has latents of {given.channels} channels, checkpoint {args.checkpoint} draws "
            f"{found.shape.channels}: give the one that it was trained with"
        )
    if given.shift.any() or given.scale.numel() > 1:
        raise ValueError("vae_path shifts latents, or scales them a channel, and diffusers' pipelines do neither")
    import diffusers

    return frozen.load_module(getattr(diffusers, vae.CLASSES["kl"]), place, "vae_path", torch_dtype=torch.float32)


def draws_pixels(found: Source, run: config.Run) -> bool:
    """Whether samples are pixels as they are; of another project's weights nothing says so."""
    return not (found.foreign or run.data.source in LATENTS or "vae" in found.about.get("encoders", {}))


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when all is in it."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def left_out(args: Export, found: Source, run: config.Run) -> list[str]:
    """What the form does not hold and a user may miss, a line each."""
    if args.to == "odit":
        return []
    lines = [f"size: of the first of data.buckets, {' '.join(run.data.buckets)}"] if len(run.data.buckets) > 1 else []
    if args.to == "dit":
        return lines
    pipeline = "LattePipeline" if run.model.arch == "latte" else "DiTPipeline"
    lines.append("steps: n of diffusers' DDIM are at multiples of T // n, odit's n from T - 1 to 0; equal where n is T")
    if found.shape.num_classes not in (0, NULL):
        lines.append(
            f"labels: {pipeline} looks for the null label in row {NULL}; rows from {found.shape.num_classes} on are "
            "copies of it"
        )
    if args.vae_path is None and draws_pixels(found, run):
        lines.append(
            f"vae: none, as this model draws pixels and {pipeline} decodes latents: the transformer opens alone, by "
            f"from_pretrained({str(args.out)!r}, subfolder='transformer')"
        )
    elif args.vae_path is None:
        lines.append(f"vae: none; give {pipeline}.from_pretrained a vae=, or export with --vae-path")
    if run.model.arch == "latte":
        lines.append(
            f"text: none; give {pipeline}.from_pretrained a tokenizer= and a text_encoder=, or it prompt_embeds="
        )
    if (channels := run.sampling.guidance.channels) is not None:
        lines.append(f"guidance: {pipeline} guides all channels, this run {channels}")
    if run.sampling.clip is not None:
        lines.append(
            f"clip: none; this run bounds x_0 by {run.sampling.clip}, and then steps otherwise than diffusers' DDIM"
        )
    return lines


def cli() -> None:
    """Reads the command line."""
    main(tyro.cli(Export, description=__doc__))


if __name__ == "__main__":
    health.run(cli)
