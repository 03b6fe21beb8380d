"""The manifest of a checkpoint: which tensors it holds, where their pieces lie, and hashes that bind every byte.

A tensor has its whole, logical shape. Its pieces are boxes of it, one a file, that cover it exactly once. A grid of
cells, the same for whoever writes and reads, lies over each tensor, and every cell of a piece has a hash of its own:
who reads a part of a piece reads and checks whole cells, and little else. The files' sizes and headers are bound too,
and the last field is the hash of the manifest's other bytes. A hash shows damage, not forgery.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from odit.health import Damaged

FORMAT = 2
MANIFEST = "manifest.json"
DTYPE = "float32"
CELL = 1 << 18  # bytes: larger ones are read in vain at the rims of parts, smaller ones are many
DIGITS = 32  # of a hash in hex


class Box(NamedTuple):
    """A box in a whole tensor."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(a + n for a, n in zip(self.offsets, self.shape))

    def within(self, other: Box) -> tuple[slice, ...]:
        """Where it lies in a tensor that holds ``other``."""
        return tuple(slice(a - o, a - o + n) for a, n, o in zip(*self, other.offsets))

    def common(self, other: Box) -> Box | None:
        """What two boxes share; None for nothing."""
        low = tuple(max(pair) for pair in zip(self.offsets, other.offsets))
        shape = tuple(min(pair) - a for a, *pair in zip(low, self.ends, other.ends))
        return Box(low, shape) if all(n > 0 for n in shape) else None


class Piece(NamedTuple):
    """A box of a tensor in a file, under the tensor's name; ``hashes`` of its cells one after another."""

    file: str
    box: Box
    hashes: str


class Entry(NamedTuple):
    """A tensor: its whole shape, the shape of its cells, and its pieces."""

    shape: tuple[int, ...]
    cell: tuple[int, ...]
    pieces: tuple[Piece, ...]


class File(NamedTuple):
    """Bytes of a file, and the hashes of its safetensors header (with its length) and of the whole."""

    size: int
    header: str
    hash: str


class Manifest(NamedTuple):
    """``about`` is all of it as JSON tells it; the tensors and files of it once more, checked."""

    folder: Path
    about: dict[str, Any]
    tensors: dict[str, Entry]
    files: dict[str, File]


# ----------------------------------------------------------------------------------------------------- cells and hashes


def cell_shape(shape: tuple[int, ...], claimable: tuple[bool, ...]) -> tuple[int, ...]:
    """Shape of a tensor's cells: about ``CELL`` bytes of fp32, with rims where ranks are likely to cut.

    A dim that strategies may claim is cut first, then the others from the first on, as ZeRO cuts them: into what the
    size has of 24, so that 2, 3, 4, 6, 8, ... ranks find whole cells, or of 8 behind a claimable dim, and multiples.
    """
    cell = list(shape)
    for dim in sorted(range(len(shape)), key=lambda dim: not claimable[dim]):
        rims = math.gcd(shape[dim], 8 if any(claimable[:dim]) else 24)
        if (nbytes := 4 * math.prod(cell)) > CELL:
            enough = (n for n in range(rims, shape[dim], rims) if shape[dim] % n == 0 and nbytes <= n * CELL)
            cell[dim] = shape[dim] // (rims if claimable[dim] else next(enough, shape[dim]))
    return tuple(cell)


def cells(cell: tuple[int, ...], box: Box) -> Iterator[Box]:
    """What a box has of each cell, in row-major order of the cells."""
    for _, part in numbered_cells(cell, box, box):
        yield part


def numbered_cells(cell: tuple[int, ...], box: Box, within: Box) -> Iterator[tuple[int, Box]]:
    """What a box of whole cells has of each, and that cell's number among all of the piece ``within``."""
    if not all(box.shape):
        return
    number, rows = 1, []
    for a, b, p, q, c in reversed(list(zip(box.offsets, box.ends, within.offsets, within.ends, cell))):
        starts = range(a // c * c, b, c)
        rows.append([((i // c - p // c) * number, max(a, i), min(b, i + c) - max(a, i)) for i in starts])
        number *= -(-q // c) - p // c
    for rims in itertools.product(*reversed(rows)):
        numbers, low, shape = zip(*rims) if rims else ((), (), ())
        yield sum(numbers), Box(low, shape)


def whole_cells(cell: tuple[int, ...], box: Box, within: Box) -> Box:
    """The smallest box of whole cells of a piece (``within``) around one in it."""
    low = [max(a // c * c, p) for a, c, p in zip(box.offsets, cell, within.offsets)]
    high = [min(-(-b // c) * c, q) for b, c, q in zip(box.ends, cell, within.ends)]
    return Box(tuple(low), tuple(b - a for a, b in zip(low, high)))


def hash_cells(cell: tuple[int, ...], box: Box, x: torch.Tensor) -> str:
    """The hashes of a piece's cells."""
    return "".join(hash_of(as_bytes(x[part.within(box)])) for part in cells(cell, box))


def hash_of(data: Any) -> str:
    """XXH3, 128 bits."""
    return xxhash.xxh3_128_hexdigest(data)


def as_bytes(x: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; its own memory where that is contiguous and on the CPU."""
    return memoryview(x.detach().cpu().contiguous().view(-1).numpy().view(np.uint8))


# -------------------------------------------------------------------------------------------------- writing and reading


def to_bytes(value: dict[str, Any]) -> bytes:
    """A manifest's bytes: JSON whose last field is the hash of all other bytes."""
    head, tail = json.dumps(value, indent=1)[:-2] + ',\n "hash": "', '"\n}\n'
    return (head + hash_of((head + tail).encode()) + tail).encode()


def tell(entry: Entry) -> dict[str, Any]:
    """A tensor as the manifest tells it."""
    pieces = [
        {"file": p.file, "offsets": list(p.box.offsets), "shape": list(p.box.shape), "hashes": p.hashes}
        for p in entry.pieces
    ]
    return {"shape": list(entry.shape), "dtype": DTYPE, "cell": list(entry.cell), "pieces": pieces}


def read(folder: Path) -> Manifest:
    """Reads and checks the manifest of a checkpoint, and the sizes of its files; raises Damaged."""
    path = folder / MANIFEST
    value = _unsealed(path)
    if found := _first_wrong(folder, value):
        raise Damaged(f"{path} {found}")
    files = {name: _file(path, name, told) for name, told in value["files"].items()}
    tensors = {name: _entry(path, name, told, files) for name, told in value["tensors"].items()}
    for name in files:
        check_file(folder / name, files[name], sum(p.file == name for e in tensors.values() for p in e.pieces))
    return Manifest(folder, value, tensors, files)


def _unsealed(path: Path) -> dict[str, Any]:
    """What a manifest tells, its hash aside; the hash is held to the bytes before anything is believed."""
    try:
        if path.is_symlink():
            raise OSError("it is a link")
        return unseal(path.read_bytes(), path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error}") from None


def unseal(raw: bytes, path: Path) -> dict[str, Any]:
    """What ``to_bytes`` was given, from its result; raises Damaged, with the path where it stood."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from None
    told = value.get("format") if isinstance(value, dict) else value
    if told != FORMAT or type(told) is not int:
        raise Damaged(f"{path} has format {told!r}, this version reads {FORMAT}")
    sealed = re.fullmatch(rb'(.*,\n "hash": ")([0-9a-f]{32})("\n}\n)', raw, re.DOTALL)
    if sealed is None or hash_of(sealed[1] + sealed[3]).encode() != sealed[2]:
        raise Damaged(f"{path} was changed after it was written: its hash does not fit it")
    del value["hash"]
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _first_wrong(folder: Path, value: dict[str, Any]) -> str | None:
    """What is wrong with a manifest's fields but tensors and files."""
    for name in ("step", "updates"):
        if not _is_count(value.get(name)):
            return f"tells {name} as {value.get(name)!r}: it should be a count"
    scale = value.get("loss_scale")
    if not (isinstance(scale, list) and len(scale) == 2 and type(scale[0]) in (int, float) and _is_count(scale[1])):
        return f"tells loss_scale as {scale!r}: it should be a scale and a count"
    for name in ("tensors", "files"):
        if not isinstance(value.get(name), dict):
            return f"tells {name} as {value.get(name)!r}: it should be an object"
    named = re.fullmatch(r"step_(\d{8,})", folder.name)
    if named and int(named[1]) != value["step"]:
        return f"is of step {value['step']}, not of the one that its folder is named after"
    return None


def _file(path: Path, name: str, told: Any) -> File:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name == MANIFEST:
        raise Damaged(f"{path} names the file {name!r}: only plain names beside it are read")
    fields = [told.get(field) for field in File._fields] if isinstance(told, dict) else []
    if not (fields and _is_count(fields[0]) and all(_is_hex(hash, 1) for hash in fields[1:])):
        raise Damaged(f"{path} tells {name} as {told!r}: it should have a size and two hashes")
    return File(*fields)


def _entry(path: Path, name: str, told: Any, files: dict[str, File]) -> Entry:
    """A tensor, checked: its pieces lie in it and cover it exactly once."""
    told = told if isinstance(told, dict) else {}
    shape, cell, pieces = _sizes(told.get("shape")), _sizes(told.get("cell")), told.get("pieces")
    if shape is None or cell is None or len(shape) != len(cell) or not isinstance(pieces, list):
        raise Damaged(f"{path} tells {name} wrongly: it should have a shape, cells and pieces")
    if told.get("dtype") != DTYPE:
        raise Damaged(f"{path} tells {name} as {told.get('dtype')}, states are {DTYPE}")
    if any(c < 1 for c, n in zip(cell, shape) if n):
        raise Damaged(f"{path} tells {name} with cells of {cell}, which are empty")
    entry = Entry(shape, cell, tuple(_piece(path, name, piece, shape, cell, files) for piece in pieces))
    check_cover(path, name, entry)
    return entry


def _piece(path: Path, name: str, told: Any, shape: tuple, cell: tuple, files: dict[str, File]) -> Piece:
    told = told if isinstance(told, dict) else {}
    file, offsets, extent = told.get("file"), _sizes(told.get("offsets")), _sizes(told.get("shape"))
    if file not in files:
        raise Damaged(f"{path}: a piece of {name} is in {file!r}, which is none of its files")
    if offsets is None or extent is None or not len(offsets) == len(extent) == len(shape):
        raise Damaged(f"{path}: the piece of {name} in {file} has no offsets and shape of {len(shape)} dims")
    box = Box(offsets, extent)
    if any(b > n for b, n in zip(box.ends, shape)):
        raise Damaged(f"{path}: the piece of {name} in {file} ends at {box.ends}, outside its shape {shape}")
    num = math.prod(-(-b // c) - a // c if b > a else 0 for a, b, c in zip(offsets, box.ends, cell))
    if not _is_hex(told.get("hashes"), num):
        raise Damaged(f"{path}: the piece of {name} in {file} should have the hashes of {num} cells")
    return Piece(file, box, told["hashes"])


def check_cover(path: Path, name: str, entry: Entry) -> None:
    """Raises Damaged unless the pieces, which lie in the tensor, cover it exactly once."""
    pieces = [piece for piece in entry.pieces if math.prod(piece.box.shape)]
    if len(pieces) > 1:
        low, high = (np.array([getattr(p.box, rim) for p in pieces]) for rim in ("offsets", "ends"))
        shared = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(-1)
        for i, j in np.argwhere(np.triu(shared, 1))[:1]:
            raise Damaged(f"{path}: the pieces of {name} in {pieces[i].file} and {pieces[j].file} overlap")
    held, size = sum(math.prod(piece.box.shape) for piece in pieces), math.prod(entry.shape)
    if held != size:
        raise Damaged(f"{path}: the pieces of {name} hold {held} of its {size} elements")


def check_file(path: Path, told: File, num: int | str = "some") -> None:
    """Raises Damaged unless a file of ``num`` tensors is there, is no link, and has its size."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise Damaged(f"{path} is no plain file: nothing is read through links")
    if not path.exists():
        raise Damaged(f"{path} is missing: {num} tensors are in it")
    if path.stat().st_size != told.size:
        raise Damaged(f"{path} has {path.stat().st_size} bytes, the manifest says {told.size}")


def _is_count(x: Any) -> bool:
    return type(x) is int and x >= 0


def _is_hex(x: Any, num: int) -> bool:
    return isinstance(x, str) and len(x) == num * DIGITS and re.fullmatch("[0-9a-f]*", x) is not None


def _sizes(x: Any) -> tuple[int, ...] | None:
    return tuple(x) if isinstance(x, list) and all(map(_is_count, x)) else None
