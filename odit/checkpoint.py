"""Checkpoints: each rank's pieces in a safetensors file, and a manifest that binds them by size and hash, written last.

``checkpoints/step_00000200/{state-00000-of-00002.safetensors, ..., manifest.json}``; tensors are named role/path, with
the roles param, adamw.m, adamw.v and ema, and have their whole, logical shapes in the manifest: a piece is a box of
such a tensor, and no layout reaches a file. Reading takes from the pieces what a rank needs, whatever wrote them. No
pickle anywhere. A hash shows damage, not forgery.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from odit import optim, record, tree
from odit.health import CheckpointError
from odit.parallel import collectives
from odit.plan import Plan
from odit.train import LossScale, TrainState

FORMAT = 1
MANIFEST = "manifest.json"
ROLES = ("param", "adamw.m", "adamw.v", "ema")


def save(plan: Plan, state: TrainState, about: dict[str, Any]) -> Path:
    """Writes ``out/checkpoints/step_*`` whole or not at all, then deletes all but the ``keep`` newest; on all ranks.

    Args:
        about: what the manifest tells beside the tensors, such as config and data fingerprint.
    """
    out, axis = plan.run.out, plan.layout.axis
    root = out / "checkpoints"
    final, temporary = root / f"step_{state.step:08d}", root / f".step_{state.step:08d}.tmp"
    if axis.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    collectives.gather_objects(axis, None)  # nobody writes before the folder is there
    told = collectives.gather_objects(axis, _write_pieces(plan, state, temporary))
    if axis.rank == 0:
        _commit(plan, state, about, told, temporary, final)
        for step in [s for s in steps(out) if s <= state.step][: -plan.run.keep]:
            _delete(root / f"step_{step:08d}")
    collectives.gather_objects(axis, None)  # nobody reads before it is committed
    return final


def _write_pieces(plan: Plan, state: TrainState, folder: Path) -> tuple[str, dict, dict]:
    """Writes this rank's file; returns its name, {tensor: offsets of its piece} and its size and hash."""
    axis = plan.layout.axis
    name = f"state-{axis.rank:05d}-of-{axis.size:05d}.safetensors"
    pieces, offsets, live = {}, {}, dict(tree.items(state.params))
    for role, t in zip(ROLES, (state.params, state.opt.m, state.opt.v, state.ema)):
        leaves = zip(tree.items(t), tree.leaves(plan.declared), tree.leaves(plan.layout.specs))
        for (path, leaf), declared, spec in leaves:
            if spec.owns(axis.rank):
                piece = leaf.detach().cpu().contiguous()
                shared = role == "ema" and leaf is live[path]  # of a frozen leaf; safetensors wants memory of its own
                pieces[f"{role}/{path}"] = piece.clone() if shared else piece
                offsets[f"{role}/{path}"] = spec.offsets(declared.shape, axis.rank)
    save_file(pieces, folder / name)
    _sync(folder / name)
    shapes = {tensor: (offsets[tensor], tuple(piece.shape)) for tensor, piece in pieces.items()}
    return name, shapes, {"size": (folder / name).stat().st_size, "blake2b": _hash(folder / name)}


def _commit(plan: Plan, state: TrainState, about: dict, told: list, temporary: Path, final: Path) -> None:
    """Writes the manifest and gives the folder its name."""
    tensors = {
        f"{role}/{path}": {
            "shape": list(p.shape),
            "dtype": "float32",
            "pieces": [
                {"file": file, "offsets": list(where[f"{role}/{path}"][0]), "shape": list(where[f"{role}/{path}"][1])}
                for file, where, _ in told
                if f"{role}/{path}" in where
            ],
        }
        for role in ROLES
        for path, p in tree.items(plan.declared)
    }
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "updates": int(state.opt.count),
        "loss_scale": list(state.loss_scale),
        **about,
        "tensors": tensors,
        "files": {file: size_and_hash for file, _, size_and_hash in told},
    }
    record.write_json(temporary / MANIFEST, {**manifest, "blake2b": _hash_json(manifest)})
    _sync(temporary / MANIFEST)
    _delete(final)
    os.rename(temporary, final)
    _sync(final.parent)


def set_aside(out: Path, step: int) -> None:
    """Renames the checkpoints after ``step`` to ``abandoned_*``: a run that goes on from there has another future."""
    for later in [s for s in steps(out) if s > step]:
        path = out / "checkpoints" / f"step_{later:08d}"
        aside = path.with_name(f"abandoned_{path.name}")
        _delete(aside)
        os.rename(path, aside)


def steps(out: Path) -> list[int]:
    """Steps that have a checkpoint, rising."""
    found = (
        re.fullmatch(r"step_(\d{8,})", p.name) for p in (out / "checkpoints").glob("step_*") if (p / MANIFEST).exists()
    )
    return sorted(int(match[1]) for match in found if match)


def find(resume: str, out: Path) -> Path | None:
    """The folder that ``--resume`` means; raises CheckpointError.

    'latest' is the newest whole one, stepping back past broken ones with a warning, or None where there is none; a path
    is that one.
    """
    if resume != "latest":
        path = Path(resume)
        if not (path / MANIFEST).exists():
            there = ", ".join(map(str, steps(out))) or "none"
            raise CheckpointError(f"resume {resume} is no checkpoint (no {MANIFEST}); steps in {out}: {there}")
        return path
    for step in reversed(steps(out)):
        path = out / "checkpoints" / f"step_{step:08d}"
        try:
            verify(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"stepping back past a broken checkpoint: {error}", stacklevel=2)
    return None


def verify(path: Path) -> dict[str, Any]:
    """Reads the manifest and holds every file to its size and hash; returns the manifest or raises CheckpointError."""
    manifest = _manifest(path)
    for name, told in manifest["files"].items():
        file = path / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing: {len(manifest['tensors'])} tensors are in it")
        if file.stat().st_size != told["size"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, the manifest says {told['size']}")
        if _hash(file) != told["blake2b"]:
            raise CheckpointError(f"{file} was changed after it was written: its hash is not the manifest's")
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(f"{path / MANIFEST} has format {found!r}, this version reads {FORMAT}")
    if manifest.pop("blake2b", None) != _hash_json(manifest):
        raise CheckpointError(f"{path / MANIFEST} was changed after it was written: its hash does not fit it")
    return manifest


def load(path: Path, plan: Plan) -> tuple[TrainState, dict[str, Any]]:
    """Reads this rank's parts of a whole state; raises CheckpointError where anything is damaged, missing or of another
    shape."""
    manifest = verify(path)
    roles = {role: _taken(_in_folder(path, manifest, role), role, plan) for role in ROLES}
    count = torch.tensor(manifest["updates"], dtype=torch.int64)
    opt = optim.AdamState(roles["adamw.m"], roles["adamw.v"], count)
    scale, streak = manifest["loss_scale"]
    return TrainState(manifest["step"], roles["param"], opt, roles["ema"], LossScale(scale, streak)), manifest


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
        return _in_folder(path, verify(path), which)
    if (held := _metadata(path).get("weights")) != which:
        raise CheckpointError(f"{path} holds {held} weights, not {which}: ask for {held}, or give a checkpoint folder")
    return _in_file(path, which)


def _taken(weights: Weights, role: str, plan: Plan) -> tree.Tree:
    """This rank's parts, each held to its declaration."""
    _check_names(weights, role, plan)

    def leaf(name: str, declared, spec):
        _check_shape(weights.path, f"{role}/{name}", weights.shapes[name], declared.shape)
        start, shape = spec.offsets(declared.shape, plan.layout.axis.rank), spec.local_shape(declared.shape)
        return weights.read(name, start, shape).to(plan.home)

    return tree.map_with_path(leaf, plan.declared, plan.layout.specs)


def _in_folder(path: Path, manifest: dict[str, Any], role: str) -> Weights:
    """One role's tensors of a checkpoint; reads only the pieces that overlap."""
    prefix = role + "/"
    told = {name[len(prefix) :]: entry for name, entry in manifest["tensors"].items() if name.startswith(prefix)}
    shapes = {name: tuple(entry["shape"]) for name, entry in told.items()}
    files: dict[str, Any] = {}

    def read(name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        pieces, size = told[name]["pieces"], math.prod(shapes[name])
        covered = sum(math.prod(piece["shape"]) for piece in pieces)
        if covered != size:
            raise CheckpointError(f"{path}: the pieces of {role}/{name} hold {covered} of its {size} elements")
        part = torch.empty(shape)
        with _readable(path):
            for piece in pieces:
                _copy_overlap(part, start, files, path, f"{role}/{name}", piece)
        return part

    return Weights(path, shapes, read)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _copy_overlap(part: torch.Tensor, start: tuple, files: dict, path: Path, key: str, piece: dict[str, Any]) -> None:
    """Copies what a piece and this part have in common; both are boxes in the whole tensor."""
    low = [max(a, b) for a, b in zip(start, piece["offsets"])]
    high = [min(a + n, b + m) for a, n, b, m in zip(start, part.shape, piece["offsets"], piece["shape"])]
    if any(a >= b for a, b in zip(low, high)):
        return
    if piece["file"] not in files:
        files[piece["file"]] = safe_open(path / piece["file"], "pt")
    box = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece["offsets"]))
    part[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start))] = files[piece["file"]].get_slice(key)[box]


def _check_names(weights: Weights, role: str, plan: Plan) -> None:
    found, wanted = set(weights.shapes), set(tree.paths(plan.declared))
    if missing := sorted(wanted - found):
        raise CheckpointError(f"{weights.path} has no tensor {role}/{missing[0]}: it was written for another model")
    if extra := sorted(found - wanted):
        raise CheckpointError(
            f"{weights.path} holds {len(extra)} tensors this model has not, the first is {role}/{extra[0]}"
        )


def _check_shape(path: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{name} in {path} has shape {found}, this model wants {wanted}: "
            "use the model settings of the run that wrote it"
        )


def save_weights(path: Path, params: tree.Tree, about: dict[str, Any], which: str = "ema") -> None:
    """Writes one safetensors file of whole weights; its metadata holds what ``read_about`` returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {f"{which}/{p}": leaf.detach().cpu().contiguous() for p, leaf in tree.items(params)}
    save_file(tensors, temporary, metadata={"format": "pt", "weights": which, "odit": json.dumps(about)})
    _sync(temporary)
    os.replace(temporary, path)


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint folder or a weights file says of itself: config, shape, step, data."""
    if path.is_dir():
        return _manifest(path)
    metadata = _metadata(path)
    if "odit" not in metadata:
        raise CheckpointError(f"{path} does not say which model it holds: use a file or checkpoint that odit wrote")
    try:
        return json.loads(metadata["odit"])
    except ValueError as error:
        raise CheckpointError(f"{path} has metadata that cannot be read: {error}") from None


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None


def _in_file(path: Path, role: str) -> Weights:
    """The weights in one file."""
    prefix = role + "/"
    with _readable(path):
        file = safe_open(path, "pt")
        if strange := [key for key in file.keys() if not key.startswith(prefix)]:
            raise CheckpointError(f"{path} holds {strange[0]} beside {role} weights: it is none of odit's files")
        shapes = {key[len(prefix) :]: tuple(file.get_slice(key).get_shape()) for key in file.keys()}

    def read(name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        with _readable(path):
            part = file.get_slice(f"{role}/{name}")[tuple(slice(a, a + n) for a, n in zip(start, shape))]
        if part.dtype != torch.float32:
            raise CheckpointError(
                f"{role}/{name} in {path} is {part.dtype}, weights are float32: convert the file first"
            )
        return part.clone(memory_format=torch.contiguous_format)  # the file is mapped, and may change under us

    return Weights(path, shapes, read)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest() if hasattr(hashlib, "file_digest") else _hash_310(file)


def _hash_310(file) -> str:
    digest = hashlib.blake2b()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _hash_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(path: Path) -> None:
    """Renames first, so that a half-deleted folder never looks like a checkpoint."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists():
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
