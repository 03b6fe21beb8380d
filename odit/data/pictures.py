"""Reading pictures.

Every picture becomes 8-bit RGB by one rule: the first frame; turned as its EXIF orientation says; transparency laid
over white; 16-bit samples cut to their high byte; grey, palette and CMYK by Pillow's plain formulas (colour profiles
are not applied). Pixels without a stated range (floats, 32-bit integers beyond 16 bits) make a bad sample. Then it is
resized and centre-cropped.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from odit.data import decoding
from odit.data.dataset import BadSample
from odit.data.decoding import MAX_PIXELS

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_picture(path: Path, size: int | tuple[int, int]) -> Tensor:
    """Reads one picture as (3, H, W) fp32 in [-1, 1], ``size`` being (H, W) or a square's side; raises BadSample."""
    return decode_picture(str(path), read_bytes(path), size)


def read_bytes(path: Path, part: tuple[int, int] | None = None, name: str = "") -> bytes:
    """Reads a file, or a part (offset, length) of it; raises BadSample, which calls it ``name`` if given."""
    try:
        with open(path, "rb") as file:
            if part is None:
                return file.read()
            file.seek(part[0])
            data = file.read(part[1])
    except OSError as error:
        raise BadSample(name or path, f"cannot be read ({error.strerror})") from None
    if len(data) < part[1]:
        raise BadSample(name or path, f"truncated: {len(data)} of {part[1]} bytes are there")
    return data


def decode_picture(name: str, data: bytes, size: int | tuple[int, int]) -> Tensor:
    """Decodes the bytes of a picture as ``read_picture`` does; raises BadSample, which calls it ``name``."""
    if not data:
        raise BadSample(name, "zero bytes")
    with _opened(name, io.BytesIO(data)) as picture:
        try:
            rgb = to_rgb(picture)
        except Exception as error:
            raise BadSample(name, f"cannot be decoded ({error})") from None
    return centre_crop(rgb, size).float() / 127.5 - 1


def picture_size(name: str, file: IO[bytes] | Path) -> tuple[int, int]:
    """Tells (height, width) of a picture as it is shown, from its header; raises BadSample."""
    with _opened(name, file) as picture:
        try:
            turned = picture.getexif().get(0x0112) in (5, 6, 7, 8)
            if picture.format == "TIFF" and turned:  # Pillow may have turned its size already
                turned = picture.size == (picture.tag_v2[256], picture.tag_v2[257])
        except Exception as error:
            raise BadSample(name, f"cannot be decoded ({error})") from None
        return picture.size if turned else picture.size[::-1]


@contextlib.contextmanager
def _opened(name: str, file: IO[bytes] | Path) -> Iterator:
    """Reads a picture's header and refuses what need not be decoded."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is accepted or refused below
        try:
            picture = Image.open(file)
        except Image.DecompressionBombError:
            raise BadSample(name, f"more than {MAX_PIXELS:,} pixels") from None
        except Exception as error:  # decoders raise nearly anything on damaged data
            raise BadSample(name, f"not an image ({type(error).__name__})") from None
        with picture:
            try:
                decoding.check_size(*picture.size)
            except decoding.Unusable as reason:
                raise BadSample(name, str(reason)) from None
            yield picture


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


def centre_crop(picture, size: int | tuple[int, int]) -> Tensor:
    """Resizes and crops a PIL image by ``decoding.place``: (3, H, W) uint8 for a ``size`` (H, W) or a square's side."""
    pixels_HWC = decoding.fit(picture, (size, size) if isinstance(size, int) else size)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()
