"""Frames of clips, and the crop that frames and pictures share: what a decoder process runs (see odit.data.clips).

No torch here: such a process stands beside every process that reads clips, and would pay seconds and 200 MB for it.

Frame k of a clip is the k-th that decoding the whole file would show. To get there without that, the packets are walked
once, which gives each frame's time; then decoding starts at the last keyframe before the first frame asked for, and
each frame is known by its time. A file whose frames cannot be told by their times (raw streams, some AVI), or where one
does not come out as foretold (hidden frames, damage), is decoded from its start and counted instead.

Frames become 8-bit RGB by swscale (the stream's matrix and range, BT.601 where it states none), turned as the display
matrix says in quarters; transparency and the shape of pixels are not applied.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import io
import itertools
import json
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_PIXELS = 64_000_000
"""More than this is refused from the header: a decoded picture would take 200 MB or more."""
MAX_ASPECT = 20
"""Longer than this many times its width (or the other way), a picture's centre crop shows next to nothing of it."""
LISTS = ("concat", "hls", "dash", "imf")
"""Formats that name other files; ``_refuse`` keeps most of them from being opened, but not those of concat."""
HIDING = ("vp8", "vp9", "mpeg4")
"""Codecs that may have packets without a frame to show, so that fewer frames than packets are no sign of damage."""
HEADER = struct.Struct("<?Q")
"""Before each answer: whether it is what was asked for (else a reason), and how many bytes follow."""
LOOK_S = 0.5
"""How often a process looks whether its parent lives."""


class Unusable(Exception):
    """What is asked for cannot be had from this file; the message is the reason."""


# The crop


class Placing(NamedTuple):
    """How a picture of some size becomes one of another; sizes are (width, height) as in Pillow."""

    halved: list[tuple[int, int]]
    """Sizes to go through with a box filter."""
    resized: tuple[int, int]
    """Size after one bicubic step: covers the target, and one side fits it."""
    corner: tuple[int, int]
    """(left, top) of the cut."""


def place(width: int, height: int, target: tuple[int, int]) -> Placing:
    """Fits ``width`` x ``height`` to a target (height, width).

    ADM's rule (Dhariwal and Nichol 2021, ``center_crop_arr``), for any rectangle: halve with a box filter while both
    sides are at least twice too long, then one bicubic step, then crop, an odd rest going to the right and the bottom.
    """
    target_height, target_width = target
    halved = []
    while width >= 2 * target_width and height >= 2 * target_height:
        width, height = width // 2, height // 2
        halved.append((width, height))
    scale = max(target_width / width, target_height / height)
    # max: a product that rounds down must not leave the target uncovered
    width, height = max(target_width, round(width * scale)), max(target_height, round(height * scale))
    return Placing(halved, (width, height), ((width - target_width) // 2, (height - target_height) // 2))


def fit(picture, target: tuple[int, int]):
    """Resizes and crops a PIL image by ``place``: (H, W, channels) uint8 array."""
    import numpy
    from PIL import Image

    placing = place(picture.width, picture.height, target)
    for size in placing.halved:
        picture = picture.resize(size, Image.Resampling.BOX)
    picture = picture.resize(placing.resized, Image.Resampling.BICUBIC)
    left, top = placing.corner
    return numpy.array(picture.crop((left, top, left + target[1], top + target[0])))


def check_size(width: int, height: int) -> None:
    """Raises Unusable for a frame or picture that is too large or too long."""
    if width * height > MAX_PIXELS:
        raise Unusable(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Unusable(f"{width} x {height} is longer than {MAX_ASPECT}:1")


# Files


class Part(io.RawIOBase):
    """The bytes [offset, offset + length) of a file, as a file: a member of a tar."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        self.file.seek(self.offset + self.position)
        data = self.file.read(max(0, min(len(buffer), self.length - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _refuse(*_) -> None:
    raise PermissionError("a clip is one file")  # a playlist can name others, on other machines too


@contextlib.contextmanager
def opened(path: str, part: tuple[int, int] | None = None) -> Iterator[tuple[Any, Any]]:
    """Opens a file, or a part (offset, length) of it: (container, its first video stream); raises Unusable."""
    import av

    try:
        file = open(path, "rb")
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror})") from None
    with file:
        if (part[1] if part else os.fstat(file.fileno()).st_size) == 0:
            raise Unusable("zero bytes")
        try:
            # Given as a file: its name cannot be taken for a protocol's
            container = av.open(Part(file, *part) if part else file, io_open=_refuse)
        except Exception as error:  # what PyAV raises is not all of one kind
            raise Unusable(f"not a video ({type(error).__name__})") from None
        with container:
            if container.format.name in LISTS:
                raise Unusable(f"not a video but a list of files ({container.format.name})")
            if not container.streams.video:
                raise Unusable("no video stream")
            stream: Any = container.streams.video[0]
            if stream.codec_context is None:
                raise Unusable("no decoder for its codec")
            check_size(stream.codec_context.width or 1, stream.codec_context.height or 1)
            stream.codec_context.thread_count = 1  # readers are many; each is one
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, stream


class Index(NamedTuple):
    """The frames of a clip by their packets."""

    pts: list[int]
    """Times in the stream's unit, ascending, of the frames that are shown."""
    keys: list[tuple[int, int]]
    """(pts, time to seek to) of the keyframes, ascending; the latter is the dts where the file has one."""
    timed: bool
    """Whether each frame has a time of its own."""


def walk(container, stream) -> Index:
    """Reads all packets and decodes none; raises Unusable for a file that ends before its header says."""
    pts, keys, num, end, gap, timed = [], [], 0, 0, 0, True
    for packet in container.demux(stream):
        if packet.size == 0:
            continue  # the empty packet that ends a stream
        if packet.is_corrupt:
            raise Unusable(f"truncated: the packet of frame {num} is cut")
        num += 1
        if packet.pts is None:
            timed = False
            continue
        end = max(end, packet.pts + (packet.duration or 0))
        gap = max(gap, packet.duration or 0)
        if packet.is_keyframe:
            keys.append((packet.pts, _coded(packet)))
        if not packet.is_discard:  # decoded but not shown: before the start that an edit list sets
            pts.append(packet.pts)
    if not num:
        raise Unusable("no frames")
    if timed:
        _check_whole(container, stream, num, end, gap)
    pts.sort()
    unique = all(a < b for a, b in itertools.pairwise(pts))
    return Index(pts, sorted(keys), timed and unique and bool(keys))


def _check_whole(container, stream, num: int, end: int, gap: int) -> None:
    """Raises Unusable where ``num`` frames up to time ``end`` are not what the header says; ``gap`` is the longest."""
    import av

    start = stream.start_time or 0
    # A trimmed file states more frames than it shows, but its duration is that of what it shows
    if num < stream.frames and stream.duration is not None and end + gap < start + stream.duration:
        raise Unusable(f"truncated: {num} of {stream.frames} frames are there")
    if not stream.frames and stream.duration is None and container.duration is not None:  # Matroska states seconds only
        stated, there = container.duration / av.time_base, float((end - min(0, start)) * stream.time_base)
        if there < 0.9 * stated and len(container.streams) == 1:  # another stream may well be longer
            raise Unusable(f"truncated: {there:.1f} of {stated:.1f} s are there")


def _coded(packet) -> int:
    """The time that orders packets as they are decoded; Matroska leaves it out where pictures are reordered."""
    return packet.pts if packet.dts is None else packet.dts


def decoded(container, stream) -> Iterator[Any]:
    """Decodes from where the container stands to its end."""
    for packet in container.demux(stream):
        yield from packet.decode()


def choose(num: int, frames: int, interval: int, at: float) -> list[int]:
    """Chooses the numbers of ``frames`` frames, ``interval`` apart, out of ``num``: the span starts at ``at`` in [0, 1)
    of the places where it can; raises Unusable where there is none."""
    span = (frames - 1) * interval + 1
    if num < span:
        apart = f" ({frames}, {interval} apart)" if interval > 1 else ""
        raise Unusable(f"{num} frames, but {span} are asked for{apart}")
    start = min(int(at * (num - span + 1)), num - span)
    return list(range(start, start + span, interval))


def read_frames(path: str, part, size: tuple[int, int, int], interval: int, at: float):
    """Reads (T, H, W, 3) uint8 frames of ``size`` (T, H, W), see ``choose``; raises Unusable."""
    import numpy
    from av.error import FFmpegError

    with opened(path, part) as (container, stream):
        try:
            index = walk(container, stream)
            if index.timed:
                numbers = choose(len(index.pts), size[0], interval, at)
                found = _by_time(container, stream, index, [index.pts[i] for i in numbers], size[1:])
                if found is not None:
                    return numpy.stack(found)
        except FFmpegError as error:
            raise Unusable(f"cannot be decoded ({error.strerror})") from None
        least = len(index.pts) if index.timed and stream.codec_context.name not in HIDING else 1
    return numpy.stack(_by_count(path, part, size, interval, at, least))


def _by_time(container, stream, index: Index, times: list[int], target: tuple[int, int]) -> list | None:
    """Decodes from the keyframe before the first of ``times``; None where they do not all come out whole."""
    from av.error import FFmpegError

    _, start = index.keys[max(0, bisect.bisect_right(index.keys, times[0], key=lambda key: key[0]) - 1)]
    wanted, found = set(times), []
    try:
        container.seek(start, stream=stream)
        packets = container.demux(stream)
        first = next(packets)
        if not first.size or _coded(first) > start:
            return None  # this format's seek missed
        for frame in _decoded_from(first, packets):
            if frame.pts is None or frame.pts > times[-1]:
                break
            if frame.pts in wanted:
                if frame.is_corrupt:
                    return None
                wanted.remove(frame.pts)
                found.append(pixels(frame, target))
            if not wanted:
                return found
    except FFmpegError:
        return None
    return None


def _decoded_from(first, packets) -> Iterator[Any]:
    yield from first.decode()
    for packet in packets:
        yield from packet.decode()


def _by_count(path: str, part, size: tuple[int, int, int], interval: int, at: float, least: int) -> list:
    """Decodes everything twice, once to count (``least`` must come out) and once to take; raises Unusable."""
    from av.error import FFmpegError

    try:
        num = _count(path, part)
        if num < least:
            raise Unusable(f"damaged: {num} of {least} frames come out")
        numbers = choose(num, size[0], interval, at)
        wanted, found = set(numbers), []
        with opened(path, part) as (container, stream):
            for number, frame in enumerate(decoded(container, stream)):
                if number in wanted:
                    if frame.is_corrupt:
                        raise Unusable(f"frame {number} is damaged")
                    found.append(pixels(frame, size[1:]))
                if len(found) == len(numbers):
                    break
    except FFmpegError as error:
        raise Unusable(f"cannot be decoded ({error.strerror})") from None
    return found


def _count(path: str, part) -> int:
    with opened(path, part) as (container, stream):
        num = sum(1 for _ in decoded(container, stream))
    if not num:
        raise Unusable("no frames")
    return num


def pixels(frame, target: tuple[int, int]):
    """Converts a frame to (H, W, 3) uint8 of the target's size."""
    from PIL import Image

    check_size(frame.width, frame.height)
    picture = Image.fromarray(_reformatter().reformat(frame, format="rgb24").to_ndarray())
    turn = frame.rotation % 360  # degrees counter-clockwise
    if turn in (90, 180, 270):
        picture = picture.transpose(getattr(Image.Transpose, f"ROTATE_{turn}"))
    return fit(picture, target)


@functools.cache
def _reformatter():
    """One for all frames: it keeps swscale's tables, which cost more than the conversion of a small frame."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def probe(path: str, part=None) -> tuple[int, int, int, float]:
    """Tells (frames, height, width, frames a second) from the header and the first frame (which knows how it is
    turned); the packets are counted where the header gives no number or one that its duration belies."""
    from av.error import FFmpegError

    try:
        with opened(path, part) as (container, stream):
            frame = next(decoded(container, stream), None)
            if frame is None:
                raise Unusable("no frames")
            height, width = (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
            num, rate = stream.frames, stream.average_rate or 0
            stated = 0 if stream.duration is None else float(stream.duration * stream.time_base * rate)
        if not num or abs(num - stated) > 1 + 0.01 * num:
            with opened(path, part) as (container, stream):
                index = walk(container, stream)
            num = len(index.pts) if index.timed else _count(path, part)
    except FFmpegError as error:
        raise Unusable(f"cannot be decoded ({error.strerror})") from None
    return num, height, width, float(rate)


# The process


def end_with_parent(parent: int) -> None:
    """Ends this process within ``LOOK_S`` of the end of ``parent``, the process that started it, whatever ended that.

    A thread looks, as the kernel's own way (PR_SET_PDEATHSIG) ends a child with the thread that started it. It needs
    Python's lock, which decoders and reads let go.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=look, name="parent", daemon=True).start()


def answer(request: dict) -> bytes:
    """Answers one request: raw pixels of frames, or what ``probe`` tells as JSON."""
    path, part = request["path"], request["part"]
    try:
        if request["what"] == "probe":
            return json.dumps(probe(path, part)).encode()
        return read_frames(path, part, request["size"], request["interval"], request["at"]).tobytes()
    except Unusable:
        raise
    except Exception as error:  # a file must not end the process by an error that nobody foresaw
        raise Unusable(f"cannot be decoded ({type(error).__name__}: {error})") from None


def serve(limit_s: int) -> None:
    """Answers requests, a JSON line each, from stdin on stdout until stdin ends, or the parent does."""
    end_with_parent(os.getppid())  # one that is gone already has asked nothing, and stdin ends
    import av.logging
    import numpy  # noqa: F401 (now, not within the time of the first clip)
    from PIL import Image  # noqa: F401

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it, wherever it hangs
    av.logging.set_level(None)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(BrokenPipeError):
        answers.write(HEADER.pack(True, 0))
        answers.flush()
        for line in sys.stdin.buffer:
            signal.alarm(limit_s)  # for a parent that is gone while no thread of this process can run
            try:
                ok, data = True, answer(json.loads(line))
            except Unusable as reason:
                ok, data = False, str(reason).encode(errors="replace")
            answers.write(HEADER.pack(ok, len(data)))
            answers.write(data)
            answers.flush()
            signal.alarm(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
