"""Pictures and clips as files that say how they were made: PNG, MP4 and GIF, each with its recipe in its metadata.

Values are fp32 in [-1, 1] and clamped to it. One channel is shown as grey, three as RGB, of any other number (latents)
the first. A file appears whole or not at all. The same input gives the same bytes of a PNG or GIF.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odit.storage import whole

GAP = 2  # white pixels between pictures
LEAST_PICTURE, LEAST_CLIP = 64, 128  # short side, in pixels, that what is smaller is enlarged to
CRF = "18"  # x264's constant quality, of 0 (lossless) to 51; about 18 looks like the source (FFmpeg's H.264 guide)
MP4_RATE, GIF_RATE = 500, 50  # most frames a second: viewers slow down a GIF's frames of less than 0.02 s


def grid(x_NCHW: Tensor, columns: int) -> Tensor:
    """Lays pictures out in rows on white, small ones enlarged: (C, height, width)."""
    return clip_grid(x_NCHW[:, :, None], columns)[0]


def clip_grid(x_NCTHW: Tensor, columns: int) -> Tensor:
    """Lays clips out in rows on white, small ones enlarged: (T, C, height, width)."""
    x_NCTHW = enlarge(x_NCTHW, LEAST_PICTURE)
    N, C, T, H, W = x_NCTHW.shape
    height, width = H + GAP, W + GAP
    x_TCHW = x_NCTHW.new_ones(T, C, -(-N // columns) * height + GAP, columns * width + GAP)
    for n, clip_CTHW in enumerate(x_NCTHW):
        top, left = GAP + (n // columns) * height, GAP + (n % columns) * width
        x_TCHW[..., top : top + H, left : left + W] = clip_CTHW.transpose(0, 1)
    return x_TCHW


def strip(x_NCTHW: Tensor, most: int = 8) -> Tensor:
    """Lays evenly spaced frames, ``most`` at most, side by side, a clip a row: (C, height, width)."""
    N, C, T, H, W = x_NCTHW.shape
    num = min(most, T)
    frames = torch.arange(num) * (T - 1) // max(1, num - 1)
    return grid(x_NCTHW[:, :, frames].transpose(1, 2).reshape(N * num, C, H, W), num)


def enlarge(x_dHW: Tensor, least: int) -> Tensor:
    """Repeats pixels until the short side has ``least``; any leading dims."""
    zoom = max(1, -(-least // min(x_dHW.shape[-2:])))
    return x_dHW.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)


def pixels(x_TCHW: Tensor) -> Tensor:
    """Turns values into 8-bit RGB: (T, H, W, 3) uint8; what is not finite becomes black."""
    T, C, H, W = x_TCHW.shape
    x_TCHW = x_TCHW if C == 3 else x_TCHW[:, :1].expand(T, 3, H, W)
    x_TCHW = torch.where(x_TCHW.isfinite(), x_TCHW.float(), -1).clamp(-1, 1)
    return ((x_TCHW + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def save_figure(path: Path, figure: Any) -> None:
    """Writes a figure of matplotlib as PNG, of the same bytes for the same figure."""
    with whole(path, sync=False) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def check_plots(setting: str) -> None:
    """Raises ValueError where matplotlib is not there; ``setting`` is what goes without it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"a plot needs matplotlib, which is not here: pip install -e '.[plots]', or use {setting}")


def save_png(path: Path, x_CHW: Tensor, recipe: dict[str, Any]) -> None:
    """Writes a picture; the recipe is its text field "odit"."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("odit", json.dumps(recipe))
    with whole(path, sync=False) as temporary:
        Image.fromarray(pixels(x_CHW[None])[0].numpy()).save(temporary, format="PNG", pnginfo=info)


def save_mp4(path: Path, x_TCHW: Tensor, fps: float, recipe: dict[str, Any]) -> None:
    """Writes a clip as H.264, or as MPEG-4 Part 2 where PyAV lacks libx264; the recipe is the container's comment.

    Small clips are enlarged; an odd side repeats its last line, as 4:2:0 colour needs even ones.
    """
    import av

    rate = _rate(fps, MP4_RATE)
    frames_THWC = pixels(_even(enlarge(x_TCHW, LEAST_CLIP)))
    with whole(path, sync=False) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        container.metadata["comment"] = json.dumps(recipe)
        stream = _stream(container, rate, *frames_THWC.shape[1:3])
        for t, frame_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(frame_HWC.contiguous().numpy(), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            frame.pts, frame.time_base = t, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _stream(container: Any, rate: Fraction, height: int, width: int) -> Any:
    """A video stream of this size, with its colours declared: a player that must guess guesses from the size."""
    import av

    if "libx264" in av.codecs_available:
        stream = container.add_stream("libx264", rate=rate, options={"crf": CRF})
    else:
        stream = container.add_stream("mpeg4", rate=rate, options={"qmin": "1", "qmax": "3"})
        stream.bit_rate = 8 * height * width * max(1, round(rate))  # plenty: the bounds above decide
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    context = stream.codec_context
    # ITU-T H.273 tables 2-4: BT.709 for all three; FFmpeg's AVCOL_RANGE_MPEG
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
    return stream


def save_gif(path: Path, x_TCHW: Tensor, fps: float, recipe: dict[str, Any]) -> None:
    """Writes an endless clip of at most 256 colours, exact where it has no more; the recipe is the GIF's comment.

    Small clips are enlarged. A GIF counts in hundredths of a second: durations vary so that the whole keeps its time.
    A frame that equals the one before is stored as a longer duration of that one.
    """
    from PIL import Image

    rate = _rate(fps, GIF_RATE)
    ends = [round(100 * t / rate) for t in range(len(x_TCHW) + 1)]
    frames_THWC = pixels(enlarge(x_TCHW, LEAST_CLIP))
    T, H, W, _ = frames_THWC.shape
    if (frames_THWC == frames_THWC[..., :1]).all():
        frames = [Image.fromarray(frame_HW.contiguous().numpy()) for frame_HW in frames_THWC[..., 0]]
    else:  # one palette for the whole clip: colours that stay the same must not flicker
        tall = Image.fromarray(frames_THWC.reshape(T * H, W, 3).numpy())
        tall = tall.quantize(256, method=Image.Quantize.MEDIANCUT)
        frames = [tall.crop((0, t * H, W, (t + 1) * H)) for t in range(T)]
    with whole(path, sync=False) as temporary:
        frames[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=[10 * (end - start) for start, end in itertools.pairwise(ends)],
            loop=0,
            optimize=False,  # keeps palettes as they are
            comment=json.dumps(recipe).encode(),
        )


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads the recipe of a file that this module wrote; raises ValueError where there is none."""
    try:
        recipe = json.loads(_text(path))
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{path} does not exist") from None
        raise ValueError(f"{path} holds no recipe: use a PNG, MP4 or GIF that odit wrote") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no recipe: use a PNG, MP4 or GIF that odit wrote")
    return recipe


def _text(path: Path) -> str:
    if path.suffix.lower() == ".mp4":
        import av

        with av.open(str(path)) as container:
            return container.metadata["comment"]
    from PIL import Image

    with Image.open(path) as picture:
        return picture.info["comment" if picture.format == "GIF" else "odit"]


def check_rate(fps: float, path: Path | None) -> None:
    """Refuses frames a second that a film at ``path`` cannot have; raises ValueError."""
    _rate(fps, GIF_RATE if path is not None and path.suffix.lower() == ".gif" else MP4_RATE)


def _rate(fps: float, most: int) -> Fraction:
    """Frames a second as a fraction of small numbers (MPEG-4 Part 2 holds 16 bits each)."""
    if not (math.isfinite(fps) and 0.1 <= fps <= most):
        raise ValueError(f"fps is {fps}: use frames a second from 0.1 to {most}")
    return Fraction(fps).limit_denominator(100)


def _even(x_TCHW: Tensor) -> Tensor:
    H, W = x_TCHW.shape[-2:]
    rows, cols = torch.arange(H + H % 2).clamp_max(H - 1), torch.arange(W + W % 2).clamp_max(W - 1)
    return x_TCHW[..., rows, :][..., cols]
