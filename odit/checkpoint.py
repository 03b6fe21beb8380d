"""Checkpoints: what ``saving`` writes, found and read again; and files of whole weights.

``checkpoints/step_00000200/{state-00000-of-00002.safetensors, ..., manifest.json}``; tensors are named role/path, with
the roles param, adamw.m, adamw.v and ema, and have their whole, logical shapes in the manifest: a piece is a box of
such a tensor, and no layout reaches a file. Reading takes from the pieces what a rank needs, whatever wrote them, and
holds every byte of that to its hash. No pickle anywhere. A hash shows damage, not forgery.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from odit import manifest, optim, shards, tree
from odit.health import CheckpointError, Damaged
from odit.manifest import MANIFEST, Box, Manifest
from odit.parallel import collectives
from odit.parallel.mesh import Axis
from odit.plan import Plan
from odit.saving import ROLES, folder_of, save, set_aside, steps
from odit.storage import DISK, Disk, StorageError, failure, whole
from odit.train import LossScale, TrainState

__all__ = [
    "MANIFEST",
    "Weights",
    "find",
    "is_hashed",
    "load",
    "load_weights",
    "on_rank_0",
    "open_weights",
    "read",
    "read_about",
    "save",
    "save_weights",
    "set_aside",
    "step_back",
    "steps",
    "verify",
]


def find(resume: str, out: Path, broken: Collection[Path] = ()) -> Path | None:
    """The folder that ``--resume`` means; raises CheckpointError.

    'latest' is the newest whose manifest and sizes are whole, ``broken`` ones aside, as reading has shown them to be;
    None where there never was one. A path is that one.
    """
    if resume != "latest":
        path = Path(resume)
        if not (path / MANIFEST).exists():
            there = ", ".join(map(str, steps(out))) or "none"
            raise CheckpointError(f"resume {resume} is no checkpoint (no {MANIFEST}); steps in {out}: {there}")
        return path
    for path in (folder_of(out, step) for step in reversed(steps(out))):
        try:
            if path not in broken:
                manifest.read(path)
                return path
        except Damaged as error:
            step_back(error)
    if found := steps(out):
        there = ", ".join(map(str, found))
        raise CheckpointError(f"resume latest: no checkpoint in {out} is whole (steps {there}): use another --out")
    return None


def step_back(error: Damaged) -> None:
    """Warns that a checkpoint is passed over."""
    warnings.warn(f"stepping back past a broken checkpoint: {error}", stacklevel=3)


def verify(path: Path) -> dict[str, Any]:
    """Holds the manifest and every byte of every file to their hashes; returns the manifest or raises Damaged."""
    found = manifest.read(path)
    for name, told in found.files.items():
        shards.check_whole(path / name, told)
    return found.about


def load(path: Path, plan: Plan) -> tuple[TrainState, dict[str, Any]]:
    """Reads this rank's parts of a whole state; called by all ranks, and raises on all of them what one finds.

    Raises:
        Damaged: anything that is not as it was written, or missing.
        CheckpointError: a state of another model.
    """
    return agree(plan.layout.axis, lambda: read(path, plan))


def read(path: Path, plan: Plan) -> tuple[TrainState, dict[str, Any]]:
    """``load`` on one rank, which asks no other."""
    found = manifest.read(path)
    reader = shards.Reader(found)
    roles = {role: _taken(_in_folder(found, reader, role), role, plan) for role in ROLES}
    count = torch.tensor(found.about["updates"], dtype=torch.int64)
    opt = optim.AdamState(roles["adamw.m"], roles["adamw.v"], count)
    loss_scale = LossScale(*found.about["loss_scale"])
    return TrainState(found.about["step"], roles["param"], opt, roles["ema"], loss_scale), found.about


def agree(axis: Axis, fn: Callable[[], Any]) -> Any:
    """This rank's ``fn()``, or on every rank the CheckpointError that the first of those that fail raises."""
    result, error = None, None
    try:
        result = fn()
    except CheckpointError as found:
        error = found
    told = collectives.gather_objects(axis, error and (type(error), str(error)))
    for kind, sentence in filter(None, told):
        raise kind(sentence) from error
    return result


def on_rank_0(axis: Axis, fn: Callable[[], Any]) -> Any:
    """What ``fn()`` returns on rank 0, on every rank, or the ValueError that it raises there."""
    result, error = None, None
    try:
        result = fn() if axis.rank == 0 else None
    except ValueError as found:
        error = found
    result, told = collectives.broadcast_object(axis, (result, error and (type(error), str(error))))
    if told:
        kind, sentence = told
        raise kind(sentence) from error
    return result


class Weights(NamedTuple):
    """Shapes of the leaves in a folder or file, and ``read(path, offsets, shape)``: a box of a leaf, copied (fp32)."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str, tuple[int, ...], tuple[int, ...]], torch.Tensor]


def load_weights(path: Path, plan: Plan, which: str = "ema") -> tree.Tree:
    """This rank's parts of 'ema' or 'param' weights, from a checkpoint folder or a file that ``save_weights`` wrote."""
    return _taken(open_weights(path, which), which, plan)


def open_weights(path: Path, which: str = "ema") -> Weights:
    """'ema' or 'param' weights of a checkpoint folder or of a file that ``save_weights`` wrote, whatever the model."""
    if path.is_dir():
        found = manifest.read(path)
        return _in_folder(found, shards.Reader(found), which)
    if (held := _metadata(path).get("weights")) != which:
        raise CheckpointError(f"{path} holds {held} weights, not {which}: ask for {held}, or give a checkpoint folder")
    return _in_file(path, which)


def _taken(weights: Weights, role: str, plan: Plan) -> tree.Tree:
    """This rank's parts, each held to its declaration."""
    told_in = weights.path / MANIFEST if weights.path.is_dir() else weights.path
    _check_names(told_in, set(weights.shapes), role, plan)

    def leaf(name: str, declared, spec):
        _check_shape(told_in, f"{role}/{name}", weights.shapes[name], declared.shape)
        start, shape = spec.offsets(declared.shape, plan.layout.axis.rank), spec.local_shape(declared.shape)
        return weights.read(name, start, shape).to(plan.home)

    return tree.map_with_path(leaf, plan.declared, plan.layout.specs)


def _in_folder(found: Manifest, reader: shards.Reader, role: str) -> Weights:
    """One role's tensors of a checkpoint; reads only the pieces that overlap."""
    prefix = role + "/"
    shapes = {name[len(prefix) :]: e.shape for name, e in found.tensors.items() if name.startswith(prefix)}
    return Weights(found.folder, shapes, lambda name, offsets, shape: reader.read(prefix + name, offsets, shape))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _check_names(path: Path, found: set[str], role: str, plan: Plan) -> None:
    wanted = set(tree.paths(plan.declared))
    if missing := sorted(wanted - found):
        raise CheckpointError(f"{path} has no tensor {role}/{missing[0]}: it was written for another model")
    if extra := sorted(found - wanted):
        raise CheckpointError(f"{path} holds {len(extra)} tensors this model has not, the first is {role}/{extra[0]}")


def _check_shape(path: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{name} in {path} has shape {found}, this model wants {wanted}: "
            "use the model settings of the run that wrote it"
        )


def save_weights(path: Path, params: tree.Tree, about: dict[str, Any], which: str = "ema", disk: Disk = DISK) -> None:
    """Writes one safetensors file of whole weights; its metadata holds what ``read_about`` returns, and hashes.

    What is told is sealed as a manifest is, hashes of the tensors' cells among it. Raises StorageError.
    """
    tensors = {f"{which}/{p}": leaf for p, leaf in tree.items(params)}
    told = {"format": manifest.FORMAT, **about, "tensors": {name: _hashes(x) for name, x in tensors.items()}}
    metadata = {"format": "pt", "weights": which, "odit": manifest.to_bytes(told).decode()}
    try:
        with whole(path, disk) as temporary:
            shards.write_tensors(temporary, tensors, metadata, disk)
    except OSError as error:
        raise StorageError(failure(error, path, shards.size_of(tensors), disk)) from error


def _hashes(x: torch.Tensor) -> dict[str, Any]:
    shape = tuple(x.shape)
    cell = manifest.cell_shape(shape, (False,) * len(shape))
    return {"shape": shape, "cell": cell, "hashes": manifest.hash_cells(cell, _all_of(shape), x)}


def _all_of(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint folder or a weights file says of itself: config, shape, step, data. Raises CheckpointError."""
    if path.is_dir():
        about = manifest.read(path).about
        if about.get("crash"):
            raise CheckpointError(
                f"{path} is a bad step that was kept for --replay, and no state of a run: "
                "give one of out/checkpoints/step_*"
            )
        return about
    told = _told(path)
    if told is None:
        raise CheckpointError(f"{path} does not say which model it holds: use a file or checkpoint that odit wrote")
    return {name: value for name, value in told.items() if name not in ("format", "tensors")}


def is_hashed(path: Path) -> bool:
    """Whether a changed byte of a checkpoint folder or a weights file shows; files of other programs have no hashes."""
    return path.is_dir() or "tensors" in (_told(path) or {})


def _told(path: Path) -> dict[str, Any] | None:
    """What is in a weights file's metadata, held to its seal if it has one; None where that is not odit's."""
    text = _metadata(path).get("odit")
    if text is None:
        return None
    try:
        told = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} has metadata that cannot be read: {error}") from None
    return manifest.unseal(text.encode(), path) if "tensors" in told or "hash" in told else told


def _metadata(path: Path) -> dict[str, str]:
    with shards.open_file(path) as file:
        return file.metadata() or {}


def _in_file(path: Path, role: str) -> Weights:
    """The weights in one file."""
    prefix, file, told = role + "/", shards.open_file(path), (_told(path) or {}).get("tensors")
    if strange := [key for key in file.keys() if not key.startswith(prefix)]:
        raise CheckpointError(f"{path} holds {strange[0]} beside {role} weights: it is none of odit's files")
    with _readable(path):
        shapes = {key[len(prefix) :]: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    if told is not None:
        _check_told(path, {prefix + name: shape for name, shape in shapes.items()}, told)

    def stored(name: str, box: Box) -> torch.Tensor:
        with _readable(path):
            part = file.get_slice(name)[box.within(_all_of(shapes[name[len(prefix) :]]))]
        if part.dtype != torch.float32:
            raise CheckpointError(f"{name} in {path} is {part.dtype}, weights are float32: convert the file first")
        return part.clone(memory_format=torch.contiguous_format)  # the file is mapped, and may change under us

    def read(name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        box, whole, name = Box(tuple(offsets), tuple(shape)), _all_of(shapes[name]), prefix + name
        if told is None:
            return stored(name, box)
        cell = tuple(told[name]["cell"])
        wide = manifest.whole_cells(cell, box, whole)
        x = stored(name, wide)
        shards.check_cells(path, name, cell, told[name]["hashes"], whole, wide, x, "the one in its header")
        return x if wide == box else x[box.within(wide)].clone(memory_format=torch.contiguous_format)

    return Weights(path, shapes, read)


def _check_told(path: Path, shapes: dict[str, tuple[int, ...]], told: dict[str, Any]) -> None:
    """Raises Damaged unless a file has the tensors, and their shapes, that it tells."""
    for name in {**told, **shapes}:
        theirs, mine = shapes.get(name), tuple(told[name]["shape"]) if name in told else None
        if theirs != mine:
            raise Damaged(
                f"{path} was changed after it was written: its header has {name} as {theirs}, its hashes are of {mine}"
            )
