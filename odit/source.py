"""Weights of any kind under one roof: what a path is, what it says of itself, and its tensors, a box at a time.

A path is a checkpoint folder or a weights file of odit, a ``.pt`` of facebookresearch/DiT, or a folder of diffusers
(DiT, Latte; a pipeline or its transformer). Weights of other projects are told in odit's own terms: the run that would
have made them, as far as anything says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from odit import checkpoint, config, convert, data, diffusion, plan, tree
from odit.checkpoint import Weights
from odit.config_json import from_json, to_json
from odit.convert.files import CONFIG, WEIGHTS
from odit.convert.latte import TEXT_LENGTH
from odit.encoders import config as encoders
from odit.health import CheckpointError
from odit.models.config import SIZES, Config, Shape
from odit.plan import Plan

Which = Literal["ema", "param"]


@dataclass(frozen=True)
class Foreign:
    """What weights of other projects do not tell of themselves; of no use for odit's own."""

    heads: int | None = None
    """Attention heads, of a .pt whose width is none of the published DiTs'."""
    null_label: bool = True
    """Whether the last row of a .pt's label table is the null label rather than a class."""
    text_length: int | None = None
    """Tokens of a caption, of a Latte; 120 unless given, as in diffusers' pipeline."""


@dataclass(frozen=True)
class Source:
    """Weights that are not read yet, and what they say of the model they are of."""

    path: Path
    kind: str
    """'step 150' of odit's own, else the project."""
    foreign: bool
    """Whether another project's format tells the model, and nothing the data."""
    which: Which
    about: dict[str, Any]
    """As ``checkpoint.read_about``; of another project's weights config, shape and, where told, class_names."""
    open: Callable[[], Weights]
    hashed: bool = False
    """Whether a changed byte shows."""

    @property
    def note(self) -> list[str]:
        """A line for people where damage would not show."""
        return [] if self.hashed else [f"{self.path} carries no hashes: a changed byte in it would not show"]

    @functools.cached_property
    def weights(self) -> Weights:
        """Shapes of the leaves, and boxes of them; raises CheckpointError where anything is damaged."""
        return self.open()

    @functools.cached_property
    def shape(self) -> Shape:
        """What the model is built around; raises CheckpointError where that is not told."""
        try:
            return Shape(**self.about["shape"])
        except (KeyError, TypeError):
            raise CheckpointError(
                f"{self.path} does not tell its shape: use weights that a run of odit wrote"
            ) from None

    @property
    def model(self) -> dict[str, Any]:
        """The model's settings, as JSON."""
        return self.about.get("config", {}).get("model", {})

    @property
    def diffusion(self) -> dict[str, Any]:
        """What the model predicts on which process, as JSON; empty where that is not told."""
        return self.about.get("config", {}).get("diffusion", {})

    @property
    def run(self) -> config.Run:
        """The run that made them, on one rank; raises ValueError for settings that this version does not have."""
        return plan.alone(from_json(config.Run, self.about.get("config", {})))

    def load(self, composed: Plan) -> tree.Tree:
        """This rank's parts of the weights, each held to its declaration; raises CheckpointError."""
        if not self.foreign:
            return checkpoint.load_weights(self.path, composed, self.which)
        rank = composed.layout.axis.rank

        def leaf(path: str, p: Any, spec: Any) -> Tensor:
            start, sizes = spec.offsets(p.shape, rank), spec.local_shape(p.shape)
            return self.weights.read(path, start, sizes).to(composed.home)

        return tree.map_with_path(leaf, composed.declared, composed.layout.specs)


def open_source(
    path: Path, which: Which | None = "ema", foreign: Foreign = Foreign(), setting: str = "checkpoint"
) -> Source:
    """Opens weights of any kind; ``setting`` is what an error calls the path.

    Args:
        which: averaged or live weights, where there are both; None takes what is there, the averaged ones first.
    Raises:
        CheckpointError: what is not there, is none of these or is damaged, in one sentence.
    """
    if not path.exists():
        raise CheckpointError(f"{setting} {path} does not exist: give a checkpoint, a weights file or a model's folder")
    if path.is_dir() and (path / "ema.safetensors").exists():
        raise CheckpointError(
            f"{setting} {path} is the folder of a run: give {path / 'ema.safetensors'}, or one of its checkpoints"
        )
    if path.is_dir() and (found := checkpoint.steps(path)):
        raise CheckpointError(
            f"{setting} {path} is the folder of a run that has not ended: give {checkpoint.folder_of(path, found[-1])}"
        )
    if (path / checkpoint.MANIFEST).exists() or path.suffix == ".safetensors":
        return _own(path, which)
    try:
        return _of_diffusers(path, which, foreign) if path.is_dir() else _of_dit(path, which or "ema", foreign)
    except ValueError as error:
        told = str(error)
        raise CheckpointError(told if str(path) in told else f"{setting} {path}: {told}") from None


def encoders_of(found: Source, given: encoders.Config) -> encoders.Config:
    """The encoders of the run that made the weights, with what a command line says of them, in the dtype in which they
    served."""
    run, shape = found.run, found.shape
    told = {f.name: getattr(given, f.name) for f in dataclasses.fields(given) if getattr(given, f.name) != f.default}
    made = dataclasses.replace(run.encoders, **told)
    if made.text != "bytes" or made.vae != "none":
        made = dataclasses.replace(made, precision=made.precision or run.precision)
    return dataclasses.replace(made, text_length=shape.text_length or made.text_length)


def check_encoders(found: Source, composed: Plan) -> None:
    """Refuses encoders that the weights were not trained with, and says what is shown without an autoencoder."""
    told = found.about.get("encoders")
    if told is None:
        _check_sizes(found, composed)
    else:
        _check_fingerprints(found, told, composed)
    if draws_latents(found) and composed.front.vae is None and composed.mesh.rank == 0:
        print("no --encoders.vae and --encoders.vae-path to decode with: the first channel of latents is shown")


def draws_latents(found: Source) -> bool:
    """Whether what the weights draw has to be decoded; a guess by the channels where nothing tells."""
    told = found.about.get("encoders")
    return found.shape.channels not in (1, 3) if told is None else "vae" in told


def _check_fingerprints(found: Source, told: dict[str, str], composed: Plan) -> None:
    """Refuses encoders that are not those of the run, by what it told of them."""
    for name, given in composed.front.fingerprints.items():
        if name not in told:
            raise CheckpointError(
                f"encoders.{name} is given but checkpoint {found.path} was trained without one: leave it out"
            )
        if given != told[name]:
            raise CheckpointError(
                f"encoders.{name}_path has the fingerprint {given} in {composed.run.encoders.precision}, checkpoint "
                f"{found.path} was trained with {told[name]}: give that one, in the --encoders.precision it had"
            )


def _check_sizes(found: Source, composed: Plan) -> None:
    """Refuses encoders of other widths than the model's, where no fingerprint tells which ones it had."""
    front, shape = composed.front, found.shape
    if front.vae is not None and front.vae.channels != shape.channels:
        raise CheckpointError(
            f"encoders.vae_path has latents of {front.vae.channels} channels, checkpoint {found.path} draws "
            f"{shape.channels}: give the one that it was trained with"
        )
    if front.text is not None and front.text_size != (shape.text_length, shape.text_width):
        raise CheckpointError(
            f"encoders.text_path makes captions of {front.text_size[1]} channels, checkpoint {found.path} reads "
            f"{shape.text_width}: give the one that it was trained with"
        )


def _own(path: Path, which: Which | None) -> Source:
    if path.is_file() and path.name.startswith(WEIGHTS) and (path.parent / CONFIG).exists():
        raise CheckpointError(f"{path} is a file of a diffusers model: give its folder {path.parent}")
    about = checkpoint.read_about(path)
    which = which or ("ema" if path.is_dir() else _held(path))
    kind, hashed = f"step {about.get('step')}", checkpoint.is_hashed(path)
    return Source(path, kind, False, which, about, lambda: checkpoint.open_weights(path, which), hashed)


def _held(path: Path) -> Which:
    """'param' where a weights file says so."""
    try:
        with safe_open(path, "pt") as file:
            return "param" if (file.metadata() or {}).get("weights") == "param" else "ema"
    except (OSError, SafetensorError):  # read_about tells what is wrong
        return "ema"


def _of_dit(path: Path, which: Which, foreign: Foreign) -> Source:
    state = convert.read_pt(path, "ema" if which == "ema" else "model")
    published = {width for _, width, _ in SIZES.values()}
    width = len(state.get("x_embedder.proj.weight", ()))
    heads = None if width in published else foreign.heads
    params, cfg, shape = convert.from_dit(state, heads, 0.1 if foreign.null_label else 0.0)
    # what facebookresearch/DiT's sample.py does: 250 steps of DDPM, three of four channels guided
    channels = 3 if shape.channels == 4 else None
    sampling = config.Sampling(solver="ddpm", steps=250, guidance=config.Guidance(channels=channels))
    objective = diffusion.Config("eps", variance="learned" if shape.outputs == 2 else "fixed-large")
    return _converted(path, "facebookresearch/DiT", which, params, cfg, shape, objective, sampling, None)


def _of_diffusers(path: Path, which: Which | None, foreign: Foreign) -> Source:
    if which == "param":
        raise CheckpointError(f"weights is param but {path} of diffusers holds one set of weights: leave it out")
    if not any((path / name / CONFIG).exists() for name in ("", "transformer")):
        raise CheckpointError(
            f"{path} has neither odit's {checkpoint.MANIFEST} nor diffusers' {CONFIG}: it is no checkpoint, or an "
            "unfinished one"
        )
    params, cfg, shape = convert.load_diffusers(path, foreign.text_length or TEXT_LENGTH)
    objective, clip = convert.read_scheduler(path, shape)
    sampling = config.Sampling(solver="ddim", clip=clip)
    return _converted(path, "diffusers", "ema", params, cfg, shape, objective, sampling, convert.class_names(path))


def _converted(
    path: Path,
    kind: str,
    which: Which,
    params: tree.Tree,
    cfg: Config,
    shape: Shape,
    objective: diffusion.Config,
    sampling: config.Sampling,
    names: list[str] | None,
) -> Source:
    """Weights of another project as those of a run on latents, or pixels, of which no more is known."""
    steps = min(sampling.steps, objective.train_steps or 1000)
    guidance = sampling.guidance if cfg.label_dropout else config.Guidance(scale=1.0)
    run = config.Run(
        data=data.Config(source="latents", path=path, held_out=0.0),
        model=cfg,
        diffusion=objective,
        sampling=dataclasses.replace(sampling, steps=steps, guidance=guidance),
        evaluate=False,
    )
    about = {"config": to_json(run), "shape": dataclasses.asdict(shape)}
    about |= {"class_names": names} if names else {}
    leaves = dict(tree.items(params))

    def read(name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        box = leaves[name][tuple(slice(a, a + n) for a, n in zip(offsets, sizes))]
        return box.float().clone().contiguous()

    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    return Source(path, kind, True, which, about, lambda: Weights(path, shapes, read))
