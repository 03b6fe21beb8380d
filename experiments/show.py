"""Tells what a checkpoint is and whether it is whole: ``python experiments/show.py runs/a/ema.safetensors``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from odit import checkpoint, config, crash, health, plan, source
from odit.config_json import to_json
from odit.data import latents
from odit.front import Front
from odit.source import Foreign, Source

TENSORS = 5  # shown
NAMES = 10  # of classes shown
WHOLE = "hashes: every byte is as it was written"
UNTOLD = ("model", "diffusion")  # what is compared with presets of weights that do not tell their run
FREE = ("out", "data.path", "device", "threads", "progress")  # where a run was, and not what


@dataclass(frozen=True)
class Show:
    """What to look at."""

    path: tyro.conf.Positional[Path]
    """Checkpoint folder or weights file, a .pt of facebookresearch/DiT, a folder of diffusers or of latents, or that of
    a bad step."""
    foreign: Foreign = field(default_factory=Foreign)
    """What a checkpoint of another project does not tell."""


def main(args: Show) -> None:
    """Reads it whole, so that damage shows, and prints what it says of itself."""
    if (args.path / latents.INDEX).exists():
        print(*cache(latents.Latents(args.path, held_out=0.0)), *files(args.path), sep="\n")
        return
    if (args.path / crash.FACTS).exists():
        print(*bad_step(crash.read(args.path)), *files(args.path), sep="\n")
        return
    found = source.open_source(args.path, None, args.foreign)
    num = len(found.weights.shapes)
    print(*lines(found), hashes(found), *files(args.path), *tensors(found), sep="\n")
    if num > TENSORS:
        print(f"  and {num - TENSORS} more")


def cache(found: latents.Latents) -> Iterator[str]:
    """What files of latents hold; raises DataError for one that was changed."""
    index = found.index
    yield f"kind: latents of {index['num']} samples of {'x'.join(map(str, index['sample']))}, {len(index['bad'])} bad"
    yield from (f"encoder: {name} {fingerprint}" for name, fingerprint in found.encoders.items())
    yield f"settings: {', '.join(f'{name} {value}' for name, value in index['settings'].items())}"
    found.verify()
    yield WHOLE


def bad_step(facts: dict[str, Any]) -> Iterator[str]:
    """What a run kept of a step whose numbers were not finite; its files were held to their hashes."""
    yield f"kind: bad step {facts['step']}, whose {facts['bad']} was not finite (loss {facts['loss']})"
    yield f"layout: {', '.join(f'{name} {value}' for name, value in facts['layout'].items())}"
    for told in facts["batches"]:
        yield f"samples of rank {told['rank']}: {', '.join(map(str, told['samples']))}"
    yield f"weights: those before step {facts['weights']}, in its folder"
    yield WHOLE


def hashes(found: Source) -> str:
    """Whether all bytes are as they were written; raises CheckpointError where they are not."""
    if not found.hashed:
        return "hashes: none"
    if found.path.is_dir():
        checkpoint.verify(found.path)
    else:
        for name, shape in found.weights.shapes.items():
            found.weights.read(name, (0,) * len(shape), shape)
    return WHOLE


def lines(found: Source) -> Iterator[str]:
    """Kind, step, model, data, run, settings and the rest, a line each."""
    told, run = found.about, found.run
    yield f"kind: {kind(found)}"
    if not found.foreign:
        yield f"step: {told.get('step')}"
    quiet = dataclasses.replace(run, device="cpu", threads=None)
    described = plan.describe(plan.compose(quiet, found.shape, None, Front())).splitlines()
    yield from described[: 2 if found.foreign else 3]
    yield settings(run, found.foreign)
    for name, fingerprint in told.get("encoders", {}).items():
        yield f"encoder: {name} {fingerprint}"
    if names := told.get("class_names"):
        more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
        yield f"classes: {', '.join(names[:NAMES])}{more}"
    if versions := told.get("versions"):
        yield f"written by: odit {versions.get('odit')}, torch {versions.get('torch')}, git {versions.get('git')}"


def kind(found: Source) -> str:
    """What a path is, for people."""
    if found.foreign:
        return f"weights of {found.kind}"
    return "checkpoint folder" if found.path.is_dir() else f"weights file ({found.which})"


def settings(run: config.Run, foreign: bool) -> str:
    """The preset with the fewest other settings, and these."""
    mine = dict(flat(to_json(run), foreign))
    others = {
        name: {key: value for key, value in mine.items() if value != preset.get(key)}
        for name, (_, default) in config.presets().items()
        for preset in [dict(flat(to_json(default), foreign))]
    }
    name = min(others, key=lambda name: len(others[name]))
    flags = [flag(*setting) for setting in others[name].items()]
    return f"config: {' '.join([name, *flags])}" if flags else f"config: {name} as it is"


def flat(told: dict[str, Any], foreign: bool, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of the settings that are compared."""
    for name, value in told.items():
        path = f"{key}.{name}" if key else name
        if path in FREE or path.split(".")[0] == "parallel" or (foreign and path.split(".")[0] not in UNTOLD):
            continue
        yield from flat(value, foreign, path) if isinstance(value, dict) else [(path, value)]


def flag(key: str, value: Any) -> str:
    """A setting as a command line has it."""
    group, _, name = key.replace("_", "-").rpartition(".")
    name = f"no-{name}" if value is False else name
    told = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"--{group}{'.' * bool(group)}{name}" + ("" if isinstance(value, bool) else f" {told}")


def files(path: Path) -> Iterator[str]:
    """Files and their sizes."""
    inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    yield f"files: {len(inside)}, {sum(file.stat().st_size for file in inside):,} bytes"
    for file in inside:
        yield f"  {file.relative_to(path) if path.is_dir() else file.name}: {file.stat().st_size:,}"


def tensors(found: Source) -> Iterator[str]:
    """The first tensors with shape and root mean square."""
    weights = found.weights
    yield f"tensors: {len(weights.shapes)}"
    for name, shape in list(weights.shapes.items())[:TENSORS]:
        leaf = weights.read(name, (0,) * len(shape), shape)
        yield f"  {name} {'x'.join(map(str, shape))}, rms {leaf.square().mean().sqrt().item():.4g}"


def cli() -> None:
    """Reads the command line."""
    main(tyro.cli(Show, description=__doc__))


if __name__ == "__main__":
    health.run(cli)
