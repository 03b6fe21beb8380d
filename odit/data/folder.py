"""A folder of pictures: one sub-folder a class, or no sub-folders and no classes.

Every picture becomes 8-bit RGB by one rule: the first frame; turned as its EXIF orientation says; transparency laid
over white; 16-bit samples cut to their high byte; grey, palette and CMYK by Pillow's plain formulas (colour profiles
are not applied). Pixels without a stated range (floats, 32-bit integers beyond 16 bits) make a bad sample. Then it is
resized and centre-cropped to a square.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from odit import random
from odit.data.dataset import READ_KEY, BadSample, DataError, sample_ids, split

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 64_000_000
"""More than this is refused from the header: a decoded picture would take 200 MB or more."""
MAX_ASPECT = 20
"""Longer than this many times its width (or the other way), a picture's centre crop shows next to nothing of it."""


class Folder:
    """Pictures under ``path``, sorted by class and then by name; their sizes and pixels are looked at when needed."""

    def __init__(self, path: Path, size: int | tuple[int, ...], held_out: float):
        height, width = (size, size) if isinstance(size, int) else size
        self.path, self.shape = Path(path), (3, height, width)
        self.class_names, self.names, labels = find_pictures(self.path)
        self.num_classes = len(self.class_names)
        self.y_N = torch.tensor(labels, dtype=torch.int64)
        self.train_ids, self.held_out_ids = split(len(self.names), held_out)

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, Tensor]:
        """Decodes pictures; raises BadSample(path, reason) for the first that cannot be used."""
        ids = sample_ids(ids)
        pictures = [read_picture(self.path / self.names[i], self.shape[-1]) for i in ids.tolist()]
        return torch.stack(pictures), self.y_N[ids]

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


def read_picture(path: Path, size: int) -> Tensor:
    """Reads one picture as (3, size, size) fp32 in [-1, 1]; raises BadSample."""
    from PIL import Image

    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadSample(path, f"cannot be read ({error.strerror})") from None
    if not data:
        raise BadSample(path, "zero bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is accepted or refused below
        try:
            picture = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            raise BadSample(path, f"more than {MAX_PIXELS:,} pixels") from None
        except Exception as error:  # decoders raise nearly anything on damaged data
            raise BadSample(path, f"not an image ({type(error).__name__})") from None
        with picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise BadSample(path, f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise BadSample(path, f"{width} x {height} is longer than {MAX_ASPECT}:1")
            try:
                rgb = to_rgb(picture)
            except Exception as error:
                raise BadSample(path, f"cannot be decoded ({error})") from None
    return centre_crop(rgb, size).float() / 127.5 - 1


def to_rgb(picture):
    """Converts a PIL image of any mode to 8-bit RGB by the rule at the top of this file; raises ValueError or what the
    decoder raises."""
    import numpy
    from PIL import Image, ImageOps

    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # I;16, I;16B, I;16L, and I, which older Pillows use for 16-bit PNG
        levels = numpy.asarray(picture).astype(numpy.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"pixels from {levels.min()} to {levels.max()} do not fit 16 bits")
        picture = Image.fromarray((levels >> 8).astype(numpy.uint8))
    if picture.mode == "F":
        raise ValueError("float pixels have no stated range")
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def centre_crop(picture, size: int) -> Tensor:
    """Resizes the short side to ``size`` and cuts the middle square: (3, size, size) uint8.

    ADM's rule (Dhariwal and Nichol 2021, ``center_crop_arr``): halve with a box filter while the short side is at least
    twice too long, then one bicubic step, then crop, an odd rest going to the right and the bottom.
    """
    import numpy
    from PIL import Image

    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels_HWC = numpy.array(picture.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()
