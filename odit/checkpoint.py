"""Checkpoints: one safetensors file of the whole state and a manifest that binds it by size and hash, written last.

``checkpoints/step_00000200/{state.safetensors, manifest.json}``; tensors are named role/path, with the roles param,
adamw.m, adamw.v and ema. No pickle anywhere. A hash shows damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from odit import optim, record, tree
from odit.health import CheckpointError
from odit.plan import Plan
from odit.train import LossScale, TrainState

FORMAT = 1
STATE, MANIFEST = "state.safetensors", "manifest.json"


def save(out: Path, state: TrainState, about: dict[str, Any], keep: int) -> Path:
    """Writes ``out/checkpoints/step_*`` whole or not at all, then deletes all but the ``keep`` newest.

    Args:
        about: what the manifest tells beside the tensors, such as config and data fingerprint.
    """
    root = out / "checkpoints"
    final, temporary = root / f"step_{state.step:08d}", root / f".step_{state.step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = _tensors(state)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / STATE)
    _sync(temporary / STATE)
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "updates": int(state.opt.count),
        "loss_scale": list(state.loss_scale),
        **about,
        "tensors": {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()},
        "files": {STATE: {"size": (temporary / STATE).stat().st_size, "blake2b": _hash(temporary / STATE)}},
    }
    record.write_json(temporary / MANIFEST, {**manifest, "blake2b": _hash_json(manifest)})
    _sync(temporary / MANIFEST)
    _delete(final)
    os.rename(temporary, final)
    _sync(root)
    for step in [s for s in steps(out) if s <= state.step][:-keep]:
        _delete(root / f"step_{step:08d}")
    return final


def set_aside(out: Path, step: int) -> None:
    """Renames the checkpoints after ``step`` to ``abandoned_*``: a run that goes on from there has another future."""
    for later in [s for s in steps(out) if s > step]:
        path = out / "checkpoints" / f"step_{later:08d}"
        aside = path.with_name(f"abandoned_{path.name}")
        _delete(aside)
        os.rename(path, aside)


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    roles = {"param": state.params, "adamw.m": state.opt.m, "adamw.v": state.opt.v, "ema": state.ema}
    return {f"{role}/{path}": leaf for role, t in roles.items() for path, leaf in tree.items(t)}


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
    """Reads a whole state; raises CheckpointError where anything is damaged, missing or of another shape."""
    manifest = verify(path)
    roles = {role: _read(path / STATE, role, plan) for role in ("param", "adamw.m", "adamw.v", "ema")}
    count = torch.tensor(manifest["updates"], dtype=torch.int64)
    opt = optim.AdamState(roles["adamw.m"], roles["adamw.v"], count)
    scale, streak = manifest["loss_scale"]
    return TrainState(manifest["step"], roles["param"], opt, roles["ema"], LossScale(scale, streak)), manifest


def load_weights(path: Path, plan: Plan, which: str = "ema") -> tree.Tree:
    """Reads 'ema' or 'param' weights from a checkpoint folder, or those of a file that ``save_weights`` wrote."""
    if path.is_dir():
        verify(path)
        return _read(path / STATE, which, plan)
    if (held := _metadata(path).get("weights")) != which:
        raise CheckpointError(f"{path} holds {held} weights, not {which}: ask for {held}, or give a checkpoint folder")
    return _read(path, which, plan)


def save_weights(path: Path, params: tree.Tree, about: dict[str, Any], which: str = "ema") -> None:
    """Writes one safetensors file of weights; its metadata holds what ``read_about`` returns."""
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


def _read(path: Path, role: str, plan: Plan) -> tree.Tree:
    """One role's tensors on the plan's device, each held to its declaration."""

    def leaf(name: str, declared):
        key = f"{role}/{name}"
        if key not in names:
            raise CheckpointError(f"{path} has no tensor {key}: it was written for another model")
        tensor = file.get_tensor(key)
        if tuple(tensor.shape) != declared.shape:
            raise CheckpointError(
                f"{key} in {path} has shape {tuple(tensor.shape)}, this model wants {declared.shape}: "
                "use the model settings of the run that wrote it"
            )
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{key} in {path} is {tensor.dtype}, state is float32: convert the file first")
        return tensor.to(plan.device, copy=True)  # safe_open maps the file, which may change under us

    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            loaded = tree.map_with_path(leaf, plan.declared)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    extra = {n for n in names if n.startswith(role + "/")} - {f"{role}/{p}" for p in tree.paths(plan.declared)}
    if extra:
        raise CheckpointError(f"{path} holds {len(extra)} tensors this model has not, the first is {sorted(extra)[0]}")
    return loaded


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
