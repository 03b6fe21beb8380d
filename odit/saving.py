"""Writing checkpoints: every rank its file, then rank 0 the manifest, then a rename that makes them one checkpoint.

The order is what a crash or a power cut at any moment meets:
  a hidden folder; each rank's file in it, forced to the disk; when all are, the manifest; the folder's names; the
  rename to ``step_*``; the names beside it. Only then older checkpoints go, each renamed to a hidden name first.
What ranks tell one another on the way goes through the job's store, in no collective, so that a thread can write while
training runs. Whatever fails on one rank fails the save on all of them, with the same sentence.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from odit import manifest, shards, tree
from odit.health import Damaged
from odit.manifest import FORMAT, MANIFEST, Box, Entry, File, Piece
from odit.parallel import mesh as meshes
from odit.parallel import sequence
from odit.plan import Plan
from odit.storage import DISK, Disk, StorageError, failure, make_folders, remove_tree, write_file
from odit.train import TrainState

ROLES = ("param", "adamw.m", "adamw.v", "ema")
CLAIMABLE = "".join(strategy.claims for strategy in sequence.STRATEGIES.values())
CHECKPOINTS = "checkpoints"
PART = 1 << 20  # characters that go through the store at once
SLOWEST = 16 * 2**20  # bytes a second of storage that is slow, but not gone


class Job(NamedTuple):
    """What is to be written: the state's pieces that this rank owns, by tensor, and what the manifest tells beside."""

    out: Path
    keep: int
    step: int
    about: dict[str, Any]
    entries: dict[str, Entry]
    """All tensors of all ranks, without pieces."""
    boxes: dict[str, Box]
    pieces: dict[str, torch.Tensor]
    place: str = CHECKPOINTS
    """Folder under ``out`` that steps are written to."""
    extras: tuple[tuple[str, bytes], ...] = ()
    """Names and contents of files that this rank writes beside its pieces."""


def save(plan: Plan, state: TrainState, about: dict[str, Any], disk: Disk = DISK) -> Path:
    """Writes ``out/checkpoints/step_*`` whole or not at all, then deletes all but the ``keep`` newest; on all ranks.

    A whole checkpoint of that step is left as it is: config, seed and data say what is in it.

    Args:
        about: what the manifest tells beside the tensors, such as config and data fingerprint.
    Raises:
        StorageError: on all ranks, where one of them cannot write.
    """
    axis = plan.layout.axis
    return write(job(plan, state, about), Talk(meshes.store(), axis.rank, axis.size), disk)


def job(plan: Plan, state: TrainState, about: dict[str, Any], roles: tuple[str, ...] = ROLES) -> Job:
    """What ``save`` writes, or some roles of it; its tensors are the state's own."""
    rank, entries, boxes, pieces = plan.layout.axis.rank, {}, {}, {}
    trees: dict[str, tree.Tree] = dict(zip(ROLES, (state.params, state.opt.m, state.opt.v, state.ema)))
    for role, t in ((role, trees[role]) for role in roles):
        leaves = zip(tree.items(t), tree.leaves(plan.declared), tree.leaves(plan.layout.specs))
        for (path, leaf), p, spec in leaves:
            name = f"{role}/{path}"
            cell = manifest.cell_shape(p.shape, tuple(letter in CLAIMABLE for letter in p.dims))
            entries[name] = Entry(tuple(p.shape), cell, ())
            if spec.owns(rank):
                assert leaf.dtype == torch.float32, f"{name} is {leaf.dtype}"
                boxes[name], pieces[name] = Box(spec.offsets(p.shape, rank), tuple(leaf.shape)), leaf.detach()
    counts = {"step": state.step, "updates": int(state.opt.count), "loss_scale": list(state.loss_scale)}
    return Job(plan.run.out, plan.run.keep, state.step, {"format": FORMAT, **counts, **about}, entries, boxes, pieces)


# ----------------------------------------------------------------------------------------------- what ranks tell others


class Talk:
    """What the ranks of one save tell one another, by name, through the job's store; alone, through a dict.

    Ranks make their talks in the same order, so that the store can count them.
    """

    def __init__(self, store: Any, rank: int, size: int):
        self.rank, self.size, self.alone, self.patience_s = rank, size, {}, meshes.patience_s()
        self.store = store if size > 1 else None
        self.name = f"checkpoint/{store.add(f'checkpoint/{rank}', 1)}" if size > 1 else ""

    def over(self, store: Any) -> Talk:
        """The same talk over another connection, for a thread."""
        other = object.__new__(Talk)
        other.__dict__ = {**self.__dict__, "store": store if self.store is not None else None}
        return other

    def tell(self, name: str, value: Any) -> None:
        """Tells a JSON value."""
        text = json.dumps(value)
        if self.store is None:
            self.alone[name] = text
            return
        parts = [text[i : i + PART] for i in range(0, len(text), PART)]
        for number, part in enumerate(parts):
            self.store.set(f"{self.name}/{name}/{number}", part)
        self.store.set(f"{self.name}/{name}", str(len(parts)))

    def hear(self, name: str, what: str) -> Any:
        """What was told; raises RanksLost where nobody tells it in ``patience_s``."""
        if self.store is None:
            return json.loads(self.alone[name])
        if not meshes.wait_for(self.store, f"{self.name}/{name}", self.patience_s):
            raise meshes.RanksLost(f"rank {self.rank} waited {self.patience_s:g} s for {what}")
        num = int(self.store.get(f"{self.name}/{name}"))
        return json.loads("".join(self.store.get(f"{self.name}/{name}/{i}").decode() for i in range(num)))

    def forget(self, name: str) -> None:
        """Removes what was told from the store; nobody will ask again."""
        if self.store is not None:
            for number in range(int(self.store.get(f"{self.name}/{name}"))):
                self.store.delete_key(f"{self.name}/{name}/{number}")


# ------------------------------------------------------------------------------------------------------------- one save


def write(job: Job, talk: Talk, disk: Disk = DISK) -> Path:
    """Writes a checkpoint; called by all ranks, in any thread of theirs. Raises StorageError on all of them."""
    root = job.out / job.place
    final, temporary = root / f"step_{job.step:08d}", root / f".step_{job.step:08d}.tmp"
    needed = shards.size_of(job.pieces) + sum(len(data) for _, data in job.extras)
    # one rank may have to write it all; that a rank is gone is found out without this, where it is on this machine
    talk.patience_s = meshes.patience_s() + sum(math.prod(e.shape) for e in job.entries.values()) * 4 / SLOWEST

    def attempt(fn: Callable[[], Any]) -> dict[str, Any]:
        """{"done": result}, or {"error": sentence}: what every rank will raise."""
        try:
            return {"done": fn()}
        except OSError as error:
            return {"error": failure(error, final, needed, disk)}
        except Exception as error:
            return {"error": f"{final} was not written ({type(error).__name__} on rank {talk.rank}: {error})"}

    if talk.rank == 0:
        talk.tell("begun", attempt(lambda: begin(final, temporary, disk)))
    if _done(talk.hear("begun", "rank 0 to make a checkpoint's folder")) == "there":
        return final
    talk.tell(f"written/{talk.rank}", attempt(lambda: _write_pieces(job, talk, temporary, disk)))
    if talk.rank == 0:
        heard = {f"written/{r}": f"rank {r} to write its part of a checkpoint" for r in range(talk.size)}
        told = [talk.hear(name, what) for name, what in heard.items()]
        for name in heard:
            talk.forget(name)
        verdict = next((one for one in told if "error" in one), None)
        verdict = verdict or attempt(lambda: _commit(job, [one["done"] for one in told], temporary, final, disk))
        if "error" in verdict:
            with contextlib.suppress(OSError):
                remove_tree(temporary, disk)
        talk.tell("verdict", verdict)
    _done(talk.hear("verdict", "rank 0 to commit a checkpoint"))
    return final


def _done(told: dict[str, Any]) -> Any:
    if "error" in told:
        raise StorageError(told["error"])
    return told["done"]


def begin(final: Path, temporary: Path, disk: Disk) -> str:
    """Makes the hidden folder, and clears away what killed saves and deletions left; 'there' for a step that is."""
    make_folders(final.parent, disk)
    for name in sorted(os.listdir(final.parent)):
        if re.fullmatch(r"\.(step|abandoned_step)_\d+\.(tmp|old)", name):
            with contextlib.nullcontext() if name == temporary.name else _let_be(final.parent / name):
                remove_tree(final.parent / name, disk)
    if is_whole(final):
        return "there"
    disk.make_folder(temporary)
    return "made"


def _write_pieces(job: Job, talk: Talk, folder: Path, disk: Disk) -> dict[str, Any]:
    """Writes this rank's files; returns the name of that with its pieces, sizes and hashes of all, and {tensor:
    [offsets, shape, cells' hashes]}."""
    name = f"state-{talk.rank:05d}-of-{talk.size:05d}.safetensors"
    files = {name: shards.write_tensors(folder / name, job.pieces, disk=disk)} if job.entries else {}
    for extra, data in job.extras:
        write_file(folder / extra, [data], disk)
        files[extra] = File(len(data), manifest.hash_of(data), manifest.hash_of(data))
    pieces = {
        tensor: [*job.boxes[tensor], manifest.hash_cells(job.entries[tensor].cell, job.boxes[tensor], x)]
        for tensor, x in job.pieces.items()
    }
    return {"name": name, "files": {name: file._asdict() for name, file in files.items()}, "pieces": pieces}


def _commit(job: Job, told: list[dict[str, Any]], temporary: Path, final: Path, disk: Disk) -> None:
    """Writes the manifest, gives the folder its name, and deletes what is too old."""
    found: dict[str, list[Piece]] = {name: [] for name in job.entries}
    for one in told:
        for name, (offsets, shape, hashes) in one["pieces"].items():
            found[name].append(Piece(one["name"], Box(tuple(offsets), tuple(shape)), hashes))
    entries = {name: entry._replace(pieces=tuple(found[name])) for name, entry in job.entries.items()}
    for name, entry in entries.items():
        manifest.check_cover(temporary / MANIFEST, name, entry)
    tensors = {name: manifest.tell(entry) for name, entry in entries.items()}
    files = {name: file for one in told for name, file in one["files"].items()}
    text = manifest.to_bytes({**job.about, "tensors": tensors, "files": files})
    write_file(temporary / MANIFEST, [text], disk)
    disk.sync_path(temporary)
    delete(final, disk)  # what has that name and is not whole
    disk.rename(temporary, final)
    disk.sync_path(final.parent)
    older = [folder_of(job.out, step, job.place) for step in steps(job.out, job.place) if step <= job.step]
    kept = [folder for folder in older if is_whole(folder)]
    for folder in kept[: -job.keep]:
        with _let_be(folder):
            delete(folder, disk)


@contextlib.contextmanager
def _let_be(folder: Path) -> Iterator[None]:
    """What cannot be deleted, as where a reader holds it open over NFS, costs no new checkpoint: the next save tries
    again."""
    try:
        yield
    except OSError as error:
        told = error.strerror or error
        print(f"{folder} cannot be deleted ({told}) and stays for now", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------- the folders


def folder_of(out: Path, step: int, place: str = CHECKPOINTS) -> Path:
    """Where the checkpoint of a step is."""
    return out / place / f"step_{step:08d}"


def steps(out: Path, place: str = CHECKPOINTS) -> list[int]:
    """Steps that have a checkpoint, rising."""
    found = (re.fullmatch(r"step_(\d{8,})", p.name) for p in (out / place).glob("step_*") if (p / MANIFEST).exists())
    return sorted(int(match[1]) for match in found if match)


def is_whole(folder: Path) -> bool:
    """Whether a manifest is there as it was written, and all files with their sizes; what is read is held to hashes."""
    try:
        manifest.read(folder)
    except Damaged:
        return False
    return True


def delete(folder: Path, disk: Disk = DISK) -> None:
    """Deletes a checkpoint; renames first, so that a half-deleted one never looks like one."""
    if not os.path.lexists(folder):
        return
    doomed = folder.with_name(f".{folder.name}.old")
    remove_tree(doomed, disk)
    disk.rename(folder, doomed)
    disk.sync_path(folder.parent)
    remove_tree(doomed, disk)


def set_aside(out: Path, step: int, disk: Disk = DISK) -> None:
    """Renames the checkpoints after ``step`` to ``abandoned_*``: a run that goes on from there has another future."""
    for later in [s for s in steps(out) if s > step]:
        aside = folder_of(out, later).with_name(f"abandoned_{folder_of(out, later).name}")
        delete(aside, disk)
        disk.rename(folder_of(out, later), aside)
        disk.sync_path(aside.parent)
