"""The safetensors files of a checkpoint: written tensor by tensor through a ``Disk``, read by cells and their hashes.

The library writes only to a path of its own or into memory, all at once; so the header, which is all that the format
adds to the tensors' bytes, is made here, byte for byte as the library makes it. Reading is the library's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from odit import manifest
from odit.health import CheckpointError, Damaged
from odit.manifest import Box, File, Manifest, Piece
from odit.storage import DISK, Disk, write_file

WORDS = {torch.float32: "F32"}


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, disk: Disk = DISK
) -> File:
    """Writes fp32 tensors as ``safetensors.torch.save`` would, one after another, and forces the file to the disk.

    Returns its size and hashes, computed from the bytes as they go.
    """
    whole, head, size = xxhash.xxh3_128(), header(tensors, metadata), 0

    def chunks() -> Iterator[bytes | memoryview]:
        nonlocal size
        for name in [None, *sorted(tensors)]:
            data = head if name is None else manifest.as_bytes(tensors[name])
            if len(data):
                whole.update(data)
                size += len(data)
                yield data

    write_file(path, chunks(), disk)
    return File(size, manifest.hash_of(head), whole.hexdigest())


def header(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors header with its length: names in order, padded to 8 bytes."""
    told: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in sorted(tensors):
        x, start = tensors[name], end
        end += x.numel() * x.element_size()
        told[name] = {"dtype": WORDS[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def size_of(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of the file that ``write_tensors`` makes."""
    return len(header(tensors)) + sum(x.numel() * x.element_size() for x in tensors.values())


class Reader:
    """Boxes of a checkpoint's tensors, from whatever pieces hold them; nothing is returned whose hash does not fit.

    A file is opened, and its header checked, when the first box is read from it.
    """

    def __init__(self, found: Manifest):
        self.manifest = found
        self.files: dict[str, Any] = {}

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A box of a tensor, in memory of its own; raises Damaged with file and tensor."""
        entry, box = self.manifest.tensors[name], Box(tuple(offsets), tuple(shape))
        part = torch.empty(shape)
        for piece in entry.pieces:
            common = box.common(piece.box)
            if common is not None:
                wide = manifest.whole_cells(entry.cell, common, piece.box)
                x = self._stored(name, piece, wide)
                self._check(name, entry.cell, piece, wide, x)
                part[common.within(box)] = x[common.within(wide)]
        return part

    def _stored(self, name: str, piece: Piece, box: Box) -> torch.Tensor:
        """A box of a piece as the file has it, copied: the library maps files, which may change under us."""
        path = self.manifest.folder / piece.file
        try:
            if piece.file not in self.files:
                check_header(path, self.manifest.files[piece.file])
                self.files[piece.file] = safe_open(path, "pt")
            found = self.files[piece.file].get_slice(name)
            dtype, shape = found.get_dtype(), tuple(found.get_shape())
            if (dtype, shape) != ("F32", piece.box.shape):
                raise Damaged(f"{name} in {path} is {dtype} {shape}, the manifest says F32 {piece.box.shape}")
            return found[box.within(piece.box)].clone(memory_format=torch.contiguous_format)
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{name} in {path} cannot be read: {error}") from None

    def _check(self, name: str, cell: tuple[int, ...], piece: Piece, box: Box, x: torch.Tensor) -> None:
        path = self.manifest.folder / piece.file
        check_cells(path, name, cell, piece.hashes, piece.box, box, x, "the manifest's")


def check_cells(
    path: Path, name: str, cell: tuple[int, ...], hashes: str, within: Box, box: Box, x: torch.Tensor, whose: str
) -> None:
    """Raises Damaged unless x, a box of whole cells of a piece (``within``), has the hashes of these cells."""
    for number, part in manifest.numbered_cells(cell, box, within):
        told = hashes[manifest.DIGITS * number : manifest.DIGITS * (number + 1)]
        if manifest.hash_of(manifest.as_bytes(x[part.within(box)])) != told:
            raise Damaged(f"{name} in {path} was changed after it was written: its hash is not {whose}")


def check_header(path: Path, told: File) -> None:
    """Raises Damaged unless a file's header is the one that was written."""
    with open(path, "rb") as file:
        length = file.read(8)
        size = int.from_bytes(length, "little")
        if size > told.size - 8:
            raise Damaged(f"{path} has a header of {size} bytes, longer than the file: it is no safetensors file")
        if manifest.hash_of(length + file.read(size)) != told.header:
            raise Damaged(f"{path} was changed after it was written: its header is not the manifest's")


def check_whole(path: Path, told: File) -> None:
    """Raises Damaged unless all of a file is as it was written."""
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error}") from None
    if digest.hexdigest() != told.hash:
        raise Damaged(f"{path} was changed after it was written: its hash is not the manifest's")


def open_file(path: Path) -> Any:
    """A safetensors file that is no part of a checkpoint; raises CheckpointError for what is none."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
