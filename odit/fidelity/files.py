"""Pictures, clips and statistics on disk: .npz files in ADM's form, and folders.

ADM's form (openai/guided-diffusion, evaluations): ``arr_0`` holds pictures (N, H, W, 3) uint8, or here clips
(N, T, H, W, 3), and ``arr_1`` their labels; ``mu`` and ``sigma`` are mean and covariance of the features of a larger
set, ``mu_s`` and ``sigma_s`` of its spatial ones. A file may hold either or both. Pictures are read a batch at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from odit import media, storage
from odit.data import clips
from odit.data.dataset import BadSample, DataError
from odit.data.folder import find_pictures
from odit.data.pictures import picture_size, read_picture
from odit.fidelity.frechet import Moments

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ROUNDING = "round((x + 1) * 127.5), halves to even, of x clamped to [-1, 1]"  # media.pixels


class Pictures(Protocol):
    """Pictures (H, W) or clips (T, H, W) of one size, by their numbers."""

    size: tuple[int, ...]

    def __len__(self) -> int: ...

    def read(self, ids_B: Tensor) -> Tensor:
        """Pictures uint8 (B, *size, 3); raises DataError for one that cannot be read."""
        ...


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    about: dict[str, Any]
    pictures: Pictures | None
    moments: dict[str, Moments]
    """Those that the file tells."""


class Npz:
    """``arr_0`` of an .npz: mapped into memory where it is stored as it is, else unpacked as it is read."""

    def __init__(self, path: Path):
        self.path, self.archive = path, zipfile.ZipFile(path)
        info = self.archive.getinfo("arr_0.npy")
        with self.archive.open(info) as file:
            shape, fortran, dtype = _header(file)
            self.start = file.tell()
        if dtype != numpy.uint8 or fortran or len(shape) not in (4, 5) or shape[-1] != 3 or not shape[0]:
            raise DataError(
                f"{path} has an arr_0 of shape {shape} and dtype {dtype}: pictures are (N, H, W, 3) or (N, T, H, W, 3) "
                "of uint8"
            )
        self.num, self.size = shape[0], tuple(shape[1:-1])
        self.row = int(numpy.prod(shape[1:]))
        if info.file_size != self.start + self.num * self.row:
            raise DataError(f"{path} has an arr_0 of {info.file_size} bytes, not of the {shape} that it tells")
        self.mapped = self._map(info) if info.compress_type == zipfile.ZIP_STORED else None
        self.file = None if self.mapped else self.archive.open(info)

    def __len__(self) -> int:
        return self.num

    def read(self, ids_B: Tensor) -> Tensor:
        """Pictures uint8 (B, *size, 3)."""
        rows = [numpy.frombuffer(self._row(i), numpy.uint8) for i in ids_B.tolist()]
        return torch.from_numpy(numpy.stack(rows)).reshape(-1, *self.size, 3)

    def _row(self, i: int) -> bytes | memoryview:
        start = self.start + i * self.row
        try:
            if self.mapped is not None:
                return self.mapped[start : start + self.row]
            assert self.file is not None
            self.file.seek(start)
            return self.file.read(self.row)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(f"{self.path} is damaged at picture {i} ({error})") from None

    def _map(self, info: zipfile.ZipInfo) -> memoryview:
        """The member's own bytes: its local header is 30 bytes, a name and extra fields (PKWARE's APPNOTE, 4.3.7)."""
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            name, extra = struct.unpack("<26xHH", file.read(30))
            start = info.header_offset + 30 + name + extra
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if start + info.file_size > len(whole):
            end = start + info.file_size
            raise DataError(f"{self.path} is cut short: its arr_0 ends at byte {end} of {len(whole)}")
        return memoryview(whole)[start : start + info.file_size]


class Folder:
    """Pictures below a folder, in the order of their names, resized and cropped as ADM does to a size (H, W).

    Without a size they have to be of one already, which is theirs.
    """

    def __init__(self, path: Path, size: tuple[int, ...] | None = None):
        _, names, _ = find_pictures(path)
        self.paths, self.exact = [path / name for name in names], size is None
        self.size = size or _told(self.paths[0], lambda: picture_size(str(self.paths[0]), self.paths[0]))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, ids_B: Tensor) -> Tensor:
        """Pictures uint8 (B, H, W, 3)."""
        return torch.cat([_told(self.paths[i], lambda i=i: self._read(self.paths[i])) for i in ids_B.tolist()])

    def _read(self, path: Path) -> Tensor:
        if self.exact and (found := picture_size(str(path), path)) != self.size:
            raise BadSample(path, f"{found[0]} x {found[1]}, and the first picture is {self.size[0]} x {self.size[1]}")
        return media.pixels(read_picture(path, (self.size[0], self.size[1]))[None])


class Films:
    """Films in a folder, in the order of their names: the first T frames of each, ``interval`` apart, as (T, H, W)."""

    def __init__(self, path: Path, size: tuple[int, ...], interval: int):
        self.paths = sorted(file for file in path.rglob("*") if clips.is_clip(file.name))
        self.size, self.interval, self.decoder = size, interval, clips.Decoder()
        if not self.paths:
            suffixes = " ".join(clips.EXTENSIONS)
            raise DataError(f"data.path {str(path)!r} holds no films ({suffixes}): give a folder of them, or an .npz")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, ids_B: Tensor) -> Tensor:
        """Clips uint8 (B, T, H, W, 3)."""
        return torch.stack([_told(self.paths[i], lambda i=i: self._read(self.paths[i])) for i in ids_B.tolist()])

    def _read(self, path: Path) -> Tensor:
        T, H, W = self.size
        return media.pixels(clips.read_clip(path, (T, H, W), self.interval, 0.0, self.decoder).transpose(0, 1))


def open_pictures(path: Path, setting: str, size: tuple[int, ...] | None = None, interval: int = 1) -> Pictures:
    """Opens an .npz or a folder; raises DataError, which calls it ``setting``, for what holds no pictures.

    Args:
        size: (H, W) that pictures of a folder are brought to, or (T, H, W) of clips; an .npz keeps its own H and W.
    """
    found = open_reference(path, setting, size, interval).pictures
    if found is None:
        raise DataError(f"{setting} {path} holds statistics and no arr_0: give pictures")
    return found


def open_reference(path: Path, setting: str, size: tuple[int, ...] | None = None, interval: int = 1) -> Reference:
    """Opens what samples are compared with; raises DataError as ``open_pictures`` does."""
    if path.is_dir():
        try:
            pictures = Films(path, size, interval) if size and len(size) == 3 else Folder(path, size)
        except DataError as error:
            raise DataError(str(error).replace("data.path", setting, 1)) from None
        return Reference({"folder": str(path), "num": len(pictures), "names": _names(pictures.paths)}, pictures, {})
    if not path.is_file():
        raise DataError(f"{setting} {path} does not exist: give an .npz of ADM's form, or a folder")
    try:
        with open(path, "rb") as file, numpy.load(file, allow_pickle=False) as held:
            names = set(held.files)
            moments = {
                feature: _moments(path, held[mean], held[cov])
                for feature, (mean, cov) in STATISTICS.items()
                if {mean, cov} <= names
            }
        pictures = Npz(path) if "arr_0" in names else None
    except DataError:
        raise
    except Exception as error:  # zipfile and numpy raise nearly anything on damaged data
        raise DataError(f"{setting} {path} is no .npz, or is damaged ({error}): give one of ADM's form") from None
    if pictures is not None and size is not None and pictures.size[:-2] != size[:-2]:
        theirs, ours = (f"clips of {s[0]} frames" if len(s) == 3 else "pictures" for s in (pictures.size, size))
        raise DataError(f"{setting} {path} holds {theirs}, and they are to be compared with {ours}: give the same kind")
    if pictures is None and not moments:
        raise DataError(f"{setting} {path} holds {sorted(names)}: it should hold arr_0, or mu and sigma, or both")
    return Reference({**identity(path), "num": None if pictures is None else len(pictures)}, pictures, moments)


def identity(path: Path) -> dict[str, str]:
    """A file's name and the sha256 of its bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"file": path.name, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def writing(path: Path, shape: tuple[int, ...], labels: Tensor | None = None) -> Iterator[Callable[[Tensor], None]]:
    """Hands out what appends pictures uint8 to ``arr_0`` of an .npz, ``shape`` in all; ``labels`` become ``arr_1``.

    The file appears when all are there. It is what ``numpy.savez`` writes, but for the time of day, which is left out.
    """
    num = 0

    def append(x_BHWC: Tensor) -> None:
        nonlocal num
        num += len(x_BHWC)
        file.write(x_BHWC.contiguous().cpu().numpy().tobytes())

    with storage.whole(path, sync=False) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
                numpy.lib.format.write_array_header_1_0(file, header)
                yield append
            assert num == shape[0], f"{num} of {shape[0]} pictures"
            if labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
                    numpy.lib.format.write_array(file, labels.cpu().numpy())


def write_statistics(path: Path, moments: dict[str, Moments]) -> None:
    """Writes means and covariances as ADM's reference files hold them."""
    arrays = {}
    for feature, names in STATISTICS.items():
        if feature in moments:
            arrays |= dict(zip(names, (t.cpu().numpy() for t in moments[feature])))
    with storage.whole(path) as temporary, open(temporary, "wb") as file:
        numpy.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())


def _header(file: Any) -> tuple[tuple[int, ...], bool, numpy.dtype]:
    """(shape, in Fortran's order, dtype) of an .npy, whose data begins where the file stands then."""
    version = numpy.lib.format.read_magic(file)
    read = {1: numpy.lib.format.read_array_header_1_0, 2: numpy.lib.format.read_array_header_2_0}
    if version[0] not in read:
        raise ValueError(f"version {version} of .npy")
    return read[version[0]](file)


def _moments(path: Path, mean: numpy.ndarray, cov: numpy.ndarray) -> Moments:
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise DataError(f"{path} has a mean of shape {mean.shape} and a covariance of {cov.shape}, which do not match")
    found = Moments(*(torch.from_numpy(t.astype(numpy.float64)) for t in (mean, cov)))
    if not all(bool(t.isfinite().all()) for t in found):
        raise DataError(f"{path} has statistics that are not finite")
    return found


def _names(paths: list[Path]) -> str:
    """A hash of names and sizes of files: one stat a file."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(path.name) + b"\0" + str(path.stat().st_size).encode() + b"\0")
    return digest.hexdigest()


def _told(path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` gives; a picture that cannot be used ends an evaluation, which must be of all of them."""
    try:
        return read()
    except BadSample as bad:
        raise DataError(f"{bad}: mend or remove it, as an evaluation is of all pictures") from None
