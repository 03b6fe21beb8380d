"""Latents and text features in files: what ``experiments/encode.py`` writes once and runs train from.

``FOLDER/{latents-00000.safetensors, latents-00000.json, ..., null.safetensors, settings.json, index.json}``. Shard i
holds the samples i * shard_size and on of a data set: ``ids``, ``mean`` and ``logvar`` (N, C, [T,] h, w) of their
latents, of their mirror images too where asked (``mean_mirrored``, ``logvar_mirrored``), and labels ``y`` or what
stands for captions (``text``, ``mask``, ``pooled``, or ``tokens``, ``mask``). A bad sample has no row. A shard counts
once the JSON beside it is there, and the folder once ``index.json`` is, which binds all files by size and hash and is
written last. A hash shows damage, not forgery.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from odit import random, tree
from odit.data import loader
from odit.data.dataset import READ_KEY, BadSample, DataError, Dataset, sample_ids, split
from odit.storage import set_usual_mode, writing

FORMAT = 1
INDEX, SETTINGS, NULL = "index.json", "settings.json", "null.safetensors"
MEANS, MIRRORED = ("mean", "logvar"), ("mean_mirrored", "logvar_mirrored")
OPEN_FILES = 256  # of which a process keeps the maps


class Latents:
    """Samples that were encoded before: x (B, 2 C, [T,] h, w) fp32 is mean and log-variance, one after the other.

    Sample ids, split and labels are those of the data set that was encoded. What chance decided in reading that one,
    such as where in a film a clip starts, stays as it was then.
    """

    def __init__(self, path: Path, held_out: float, flip: bool = False):
        """Opens a folder; raises DataError, or ValueError for ``flip`` where no mirror images were encoded.

        Args:
            flip: half of the samples, by key and draw id, are read as their mirror images; none without a run's key.
        """
        self.path, self.index, self.flip = Path(path), read_index(path), flip
        if flip and not self.index["mirrored"]:
            raise ValueError(
                f"data.flip is on but data.path {str(path)!r} holds no mirror images: encode with --mirror, or use "
                "--data.no-flip"
            )
        channels, *size = self.index["sample"]
        self.shape = (2 * channels, *size)
        self.num_classes, self.class_names = self.index["num_classes"], self.index["class_names"]
        self.encoders, self.precision = self.index["encoders"], self.index["settings"]["precision"]
        self.text_size = text_size(self.index)
        self.train_ids, self.held_out_ids = split(self.index["num_samples"], held_out)
        self.bad = {sample: (name, reason) for sample, name, reason in self.index["bad"]}
        _check_sizes(self.path, self.index)
        null = load_file(self.path / NULL) if "null" in self.index else None
        self.null = null and {name: null[name] for name in self.index["conditions"]}  # in the order that read has
        self.scale, self.shift = torch.tensor(self.index["scale"]), torch.tensor(self.index["shift"])
        self._open: dict[int, tuple[Any, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # maps of files stay in their process

    def scaled(self, sample: Tensor) -> Tensor:
        """What a model sees of latents (B, C, ...): (sample - shift) * scale, as the autoencoder's own ``scaled``."""
        tables = (self.shift, self.scale)
        shift, scale = (table.to(sample.device).reshape(-1, *[1] * (sample.ndim - 2)) for table in tables)
        return (sample - shift) * scale

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, tree.Tree]:
        """Reads samples by draw id; raises BadSample for the first that was bad when it was encoded, or is now.

        The y of captions is {"text" (B, S, E), "mask" (B, S), "pooled" (B, E)}, or {"tokens", "mask"} where the model
        encodes bytes itself.
        """
        ids_B = torch.as_tensor(ids, dtype=torch.int64)
        mirrored_B = torch.zeros(len(ids_B), dtype=torch.bool)
        if self.flip and key != READ_KEY:
            mirrored_B = loader.mirrored(key, ids_B)
        rows = [self._row(*row) for row in zip(sample_ids(ids_B).tolist(), mirrored_B.tolist(), strict=True)]
        x, y = zip(*rows)
        return torch.cat(x), tree.map(lambda *parts: torch.cat(parts), *y)

    def _row(self, sample: int, mirrored: bool) -> tuple[Tensor, tree.Tree]:
        shard = sample // self.index["settings"]["shard_size"]
        file, ids_N = self._file(shard)
        row = int(torch.searchsorted(ids_N, sample))
        if row == len(ids_N) or int(ids_N[row]) != sample:
            raise BadSample(*self.bad[sample])

        names, where = (*(MIRRORED if mirrored else MEANS), *self.index["conditions"]), self.path / shard_name(shard)
        try:
            parts = {name: file.get_slice(name)[row : row + 1] for name in names}
        except SafetensorError as error:
            raise BadSample(f"{where}: sample {sample}", f"it cannot be read: {error}") from None
        if reason := self._wrong(parts):
            raise BadSample(f"{where}: sample {sample}", reason)
        mean, logvar, *conditions = parts.values()
        y = parts["y"] if "y" in parts else dict(zip(self.index["conditions"], conditions))
        return torch.cat([mean, logvar], 1).float(), y

    def _wrong(self, parts: dict[str, Tensor]) -> str | None:
        """What is wrong with a sample: a part of another shape than all have, or one with a NaN or an infinity."""
        for name, part in parts.items():
            wanted, found = [1, *self.index["conditions"].get(name, self.index["sample"])], list(part.shape)
            if found != wanted:
                return f"its {name} has shape {found} and by {INDEX} it should have {wanted}: encode the data again"
            if part.is_floating_point() and not bool(part.isfinite().all()):
                return f"its {name} is not finite"
        return None

    def _file(self, shard: int) -> tuple[Any, Tensor]:
        """The map of a shard, and the ids of its rows, ascending."""
        if shard not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            path = self.path / shard_name(shard)
            try:
                file = safe_open(path, "pt")
                self._open[shard] = file, file.get_tensor("ids").clone()
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} cannot be read: {error}") from None
        return self._open[shard]

    def verify(self) -> None:
        """Holds every file to its hash; raises DataError with the names of those that were changed."""
        changed = [name for name, told in _files(self.index) if hash_of(self.path / name) != told["blake2b"]]
        if changed:
            raise DataError(
                f"data.path {str(self.path)!r}: {', '.join(changed)} changed after the encoding: delete them with "
                f"their .json and {INDEX}, and run experiments/encode.py again"
            )

    def fingerprint(self) -> str:
        """Hashes the hashes of all that is read, hence latents, features and labels to the bit."""
        told = [[name, told["blake2b"]] for name, told in _files(self.index)]
        return _digest([told, self.index["scale"], self.index["shift"], self.class_names])


def read_index(path: Path | str) -> dict[str, Any]:
    """Reads the index of a folder; raises DataError where there is none, or not yet, or one of another format."""
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"data.path {str(path)!r} is no folder: give the one that experiments/encode.py wrote")
    if not (folder / INDEX).exists():
        raise DataError(f"data.path {str(path)!r} {_unfinished(folder)}")
    index = _read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise DataError(f"{folder / INDEX} has format {index.get('format')!r}, this version reads {FORMAT}")
    if index.pop("blake2b", None) != _digest(index):
        raise DataError(f"{folder / INDEX} was changed after it was written: run experiments/encode.py again")
    return index


def text_size(index: dict[str, Any]) -> tuple[int, int]:
    """(S, E) of captions, E = 0 where they are bytes; (0, 0) where there are none."""
    shapes = index["conditions"]
    if "text" in shapes:
        return tuple(shapes["text"])
    return (shapes["tokens"][0], 0) if "tokens" in shapes else (0, 0)


def _unfinished(folder: Path) -> str:
    """What a folder without an index has and lacks."""
    if not (folder / SETTINGS).exists():
        return f"has no {INDEX}: give a folder that experiments/encode.py wrote"
    settings = _read_json(folder / SETTINGS)
    num = num_shards(settings["num_samples"], settings["shard_size"])
    missing = missing_shards(folder, num)
    names = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
    lacks = f"lacks {len(missing)} of {num} shards ({names})" if missing else f"has all {num} shards but no {INDEX}"
    return f"{lacks}: run the same experiments/encode.py again, which goes on from there"


def _files(index: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, told in enumerate(index["shards"]):
        yield shard_name(number), told
    if "null" in index:
        yield NULL, index["null"]


def _check_sizes(folder: Path, index: dict[str, Any]) -> None:
    for name, told in _files(index):
        if not (folder / name).exists():
            raise DataError(f"{folder / name} is missing: delete {INDEX} and run experiments/encode.py again")
        if (size := (folder / name).stat().st_size) != told["size"]:
            raise DataError(
                f"{folder / name} has {size} bytes, {INDEX} says {told['size']}: delete both and run "
                "experiments/encode.py again"
            )


# --- writing ---


def shard_name(shard: int) -> str:
    return f"latents-{shard:05d}.safetensors"


def num_shards(num: int, size: int) -> int:
    """Shards of ``num`` samples, ``size`` each but the last."""
    return -(-num // size)


def missing_shards(folder: Path, num: int) -> list[int]:
    """The numbers of those that are not complete."""
    return [shard for shard in range(num) if read_shard_told(folder, shard) is None]


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Claims a folder for these settings; raises ValueError where it was begun with others, with both values."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    if not file.exists():
        _write_json(file, settings)  # of several processes each writes the same
    found = _read_json(file)
    for name in {**found, **settings}:
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"out {str(folder)!r} was begun with {name} {found.get(name)}, this call has {settings.get(name)}: "
                "use that, or another --out"
            )


class Part(NamedTuple):
    """Some samples of a data set as they were read."""

    ids_B: Tensor
    """Of those that could be."""
    samples: tuple[Tensor, tree.Tree] | None
    """x and y; None where none could."""
    bad: list[tuple[int, str, str]]
    """(sample id, path, reason) of the others."""


def read_part(dataset: Dataset, ids_B: Tensor) -> Part:
    """Reads samples, as validation does: what chance decides is that of epoch 0 and of no run."""
    try:
        return Part(ids_B, dataset.read(ids_B), [])
    except BadSample:
        read = [_read_one(dataset, sample) for sample in ids_B.tolist()]
    good = [one for one in read if not isinstance(one[1], BadSample)]
    bad = [(sample, error.path, error.reason) for sample, error in read if isinstance(error, BadSample)]
    if not good:
        return Part(ids_B[:0], None, bad)
    ids, samples = zip(*good)
    x, y = zip(*samples)
    return Part(torch.tensor(ids), (torch.cat(x), tree.map(lambda *parts: torch.cat(parts), *y)), bad)


def _read_one(dataset: Dataset, sample: int) -> tuple[int, Any]:
    try:
        return sample, dataset.read([sample])
    except BadSample as error:
        return sample, error


def write_shard(folder: Path, shard: int, tensors: dict[str, Tensor], bad: list[tuple[int, str, str]]) -> None:
    """Writes a shard, then the JSON that says it is whole; each appears whole or not at all. Raises StorageError."""
    path = folder / shard_name(shard)
    write_tensors(path, tensors)
    told = {"num": len(tensors["ids"]), "bad": bad, **size_and_hash(path), "sums": _sums(tensors)}
    conditions = [name for name in tensors if name not in ("ids", *MEANS, *MIRRORED)]
    told["conditions"] = {name: list(tensors[name].shape[1:]) for name in conditions}
    _write_json(path.with_suffix(".json"), told)


def read_shard_told(folder: Path, shard: int) -> dict[str, Any] | None:
    """What is told of a complete shard; None of any other."""
    path = folder / shard_name(shard)
    if not (path.exists() and path.with_suffix(".json").exists()):
        return None
    told = _read_json(path.with_suffix(".json"))
    return told if told["size"] == path.stat().st_size else None


def bad_samples(folder: Path, num: int) -> list[tuple[int, str, str]]:
    """(sample id, path, reason) of what is bad in ``num`` complete shards."""
    told = [read_shard_told(folder, shard) for shard in range(num)]
    return [tuple(bad) for one in told if one is not None for bad in one["bad"]]


def _sums(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Sums a channel over samples and pixels, fp64: number, mean, and the square of a draw's expectation."""
    mean, logvar = (tensors[name].double().transpose(0, 1).flatten(1) for name in MEANS)
    square = mean.square() + logvar.exp()
    return {"num": mean.shape[1], "mean": mean.sum(1).tolist(), "square": square.sum(1).tolist()}


def finish(folder: Path, about: dict[str, Any], scale: Tensor, shift: Tensor, null: dict[str, Tensor] | None) -> dict:
    """Writes null features and the index, from what is told of the shards, all complete; returns the index.

    Args:
        about: format and shards aside all that the index says, such as sample, num_samples, settings, encoders.
    """
    settings = about["settings"]
    told = [read_shard_told(folder, i) for i in range(num_shards(about["num_samples"], settings["shard_size"]))]
    shards = [one for one in told if one is not None]
    assert len(shards) == len(told), "all shards are complete"
    num = sum(one["num"] for one in shards)
    if not num:
        raise DataError(f"none of the {about['num_samples']} samples can be read")
    index = {
        "format": FORMAT,
        **about,
        "num": num,
        "conditions": next(one["conditions"] for one in shards if one["num"]),
        "scale": scale.tolist(),
        "shift": shift.tolist(),
        **_statistics([one["sums"] for one in shards if one["num"]], scale, shift),
        "bad": bad_samples(folder, len(shards)),
        "shards": [{name: one[name] for name in ("num", "size", "blake2b")} for one in shards],
    }
    if null is not None:
        write_tensors(folder / NULL, null)
        index["null"] = size_and_hash(folder / NULL)
    for left in folder.glob(".*.tmp"):  # by processes that were killed
        left.unlink()
    _write_json(folder / INDEX, {**index, "blake2b": _digest(index)})
    return index


def _statistics(sums: list[dict[str, Any]], scale: Tensor, shift: Tensor) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation a channel of drawn latents, plain and scaled (mirror images aside)."""
    num = sum(one["num"] for one in sums)
    mean_C, square_C = (torch.tensor([one[name] for one in sums]).double().sum(0) / num for name in ("mean", "square"))
    std_C = (square_C - mean_C.square()).clamp(min=0).sqrt()
    scaled = {"mean": ((mean_C - shift) * scale).tolist(), "std": (std_C * scale).tolist()}
    return {"latents": {"mean": mean_C.tolist(), "std": std_C.tolist()}, "scaled": scaled}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all; raises StorageError."""
    needed = sum(x.nbytes + 128 for x in tensors.values())  # with names, shapes and places
    with _whole(path, needed) as temporary:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary)


def _write_json(path: Path, value: Any) -> None:
    data = (json.dumps(value, indent=1) + "\n").encode()
    with _whole(path, len(data)) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def _whole(path: Path, needed: int) -> Iterator[Path]:
    """A temporary name beside ``path``, on every machine another, for ``needed`` bytes that become ``path``."""
    with writing(path, needed):
        handle, name = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            set_usual_mode(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no object: delete it and run experiments/encode.py again")
    return found


def size_and_hash(path: Path) -> dict[str, Any]:
    """Size and blake2b of a file."""
    return {"size": path.stat().st_size, "blake2b": hash_of(path)}


def hash_of(path: Path) -> str:
    digest = hashlib.blake2b()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
