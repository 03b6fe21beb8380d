"""A folder of pictures: one sub-folder a class, or no sub-folders and no classes."""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from odit import random
from odit.data import clips
from odit.data.dataset import READ_KEY, DataError, sample_ids, split
from odit.data.pictures import EXTENSIONS, centre_crop, read_picture

__all__ = ["Folder", "centre_crop", "find_pictures", "read_picture"]


class Folder:
    """Pictures under ``path``, sorted by class and then by name; their sizes and pixels are looked at when needed."""

    def __init__(self, path: Path, size: int | tuple[int, ...], held_out: float):
        height, width = (size, size) if isinstance(size, int) else size
        self.path, self.shape = Path(path), (3, height, width)
        self.class_names, self.names, labels = find_pictures(self.path)
        self.num_classes = len(self.class_names)
        self.y_N = torch.tensor(labels, dtype=torch.int64)
        self.train_ids, self.held_out_ids = split(len(self.names), held_out)
        self.found_sizes: Tensor | None = None

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, Tensor]:
        """Decodes pictures; raises BadSample(path, reason) for the first that cannot be used."""
        ids = sample_ids(ids)
        pictures = [read_picture(self.path / self.names[i], self.shape[1:]) for i in ids.tolist()]
        return torch.stack(pictures), self.y_N[ids]

    def at(self, size: tuple[int, ...]) -> Folder:
        """The same pictures at another size (H, W)."""
        height, width = size
        other = copy.copy(self)
        other.shape = (3, height, width)
        return other

    def sizes(self) -> Tensor:
        """Looks at all headers, once: int64 (N, 3) of 1, height and width, zeros for what cannot be read."""
        if self.found_sizes is None:
            self.found_sizes = clips.item_sizes(len(self.names), self.item)
        return self.found_sizes

    def item(self, row: int) -> clips.Item:
        """Says where a picture is."""
        path = self.path / self.names[row]
        return clips.Item(str(path), path, clip=False)

    def fingerprint(self) -> str:
        """Hashes names and file sizes (one stat a file) and the image size."""
        digest = hashlib.blake2b(str(self.shape).encode(), digest_size=16)
        for name in self.names:
            path = self.path / name
            size = path.stat().st_size if path.exists() else -1
            digest.update(os.fsencode(name) + b"\0" + str(size).encode() + b"\0")
        return digest.hexdigest()


def find_pictures(path: Path) -> tuple[list[str], list[str], list[int]]:
    """Lists class names, picture names relative to ``path`` and labels; hidden files are passed over.

    Raises DataError where there is nothing to train on or where the folder can be read in two ways.
    """
    if not path.is_dir():
        found = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"data.path {str(path)!r} {found}: give a folder of pictures")
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"data.path {str(path)!r} cannot be listed ({error.strerror}): give a readable folder"
        ) from None
    flat = [entry.name for entry in entries if entry.is_file() and _is_picture(entry.name)]
    folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    found = {name: _walk(path, name) for name in folders}
    classes = [name for name in folders if found[name]]
    if not classes:
        if not flat:
            raise DataError(f"data.path {str(path)!r} holds no pictures ({' '.join(EXTENSIONS)})")
        return [], flat, [0] * len(flat)
    if flat:
        raise DataError(
            f"data.path {str(path)!r} holds pictures ({flat[0]!r}) beside sub-folders of pictures ({classes[0]!r}): "
            "keep all in sub-folders, one a class, or none"
        )
    if empty := [name for name in folders if not found[name]]:
        raise DataError(
            f"data.path {str(path)!r} has {len(empty)} sub-folders without pictures, the first is {empty[0]!r}: "
            "remove or fill them, as each sub-folder is a class"
        )
    names = [name for folder in classes for name in found[folder]]
    labels = [label for label, folder in enumerate(classes) for _ in found[folder]]
    return classes, names, labels


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _walk(path: Path, folder: str) -> list[str]:
    names = []
    for parent, folders, files in os.walk(path / folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.relpath(os.path.join(parent, name), path) for name in files if _is_picture(name)]
    return sorted(names)
