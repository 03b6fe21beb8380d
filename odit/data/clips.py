"""Clips, read by a process that may hang or die without taking the run with it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from odit import random
from odit.data import children, decoding, pictures
from odit.data.dataset import BadSample, DataError

EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")
TIMEOUT_S = 30.0
PROBES = 8  # threads that look at headers, each with a decoder once there are clips
START_TIMEOUT_S = 120.0  # a fraction of a second, but for a machine that starts hundreds of processes at once


class Item(NamedTuple):
    """Where the bytes of a picture or a clip are."""

    name: str
    """What errors call it."""
    path: Path
    part: tuple[int, int] | None = None
    """(offset, length) within the file; None for all of it."""
    data: bytes | None = None
    """The bytes themselves, where they are in no file (``path`` says nothing then)."""
    clip: bool | None = None
    """Whether it is a clip; None if the suffix of ``name`` tells."""

    @property
    def is_clip(self) -> bool:
        return is_clip(self.name) if self.clip is None else self.clip

    def read(self) -> bytes:
        """Reads the bytes; raises BadSample."""
        return pictures.read_bytes(self.path, self.part, self.name) if self.data is None else self.data

    @contextlib.contextmanager
    def as_file(self) -> Iterator[Item]:
        """Gives the item as one that is in a file, which the decoder's process can open."""
        if self.data is None:
            yield self
            return
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.data)
            file.flush()
            yield Item(self.name, Path(file.name))


class Decoder:
    """One process that decodes, started when first needed; picklable, but the process stays behind.

    It runs ``odit/data/decoding.py`` alone, without this package and PyTorch, takes a JSON line a request on its stdin
    and answers on its stdout. It ends when its parent does.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self.timeout_s = timeout_s
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        self.end = lambda: None

    def __reduce__(self):
        return Decoder, (self.timeout_s,)

    def ask(self, item: Item, **request) -> bytearray:
        """Sends a request about a file and waits for the answer; raises BadSample."""
        line = json.dumps({"path": os.path.abspath(item.path), "part": item.part, **request}).encode() + b"\n"
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            assert self.process is not None and self.process.stdin is not None
            try:
                with contextlib.suppress(BrokenPipeError):  # it died just now: the answer will not come either
                    self.process.stdin.write(line)
                    self.process.stdin.flush()
                ok, data = self._receive(self.timeout_s)
            except TimeoutError:
                self._end()
                raise BadSample(item.name, f"the decoder did not answer in {self.timeout_s:g} s") from None
            except EOFError:
                raise BadSample(item.name, f"the decoder died of it ({self._cause()})") from None
            except BaseException:  # an answer half read would be taken for the next one's
                self._end()
                raise
        if not ok:
            raise BadSample(item.name, data.decode())
        return data

    def close(self) -> None:
        """Ends the process; a later request starts another."""
        with self.lock:
            self._end()

    def _start(self) -> None:
        self._end()
        # runpy, not the file itself: that would put its folder in front of all modules
        run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        limit_s = str(int(self.timeout_s) + 10)
        command = [sys.executable, "-c", run, decoding.__file__, limit_s]
        with children.signals_held():
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.end = weakref.finalize(self, _kill, self.process)
        try:
            self._receive(START_TIMEOUT_S)
        except (TimeoutError, EOFError):
            raise DataError(f"the process that decodes clips did not start ({self._cause()}): is PyAV whole?") from None

    def _end(self) -> None:
        self.end()
        self.process = None

    def _cause(self) -> str:
        assert self.process is not None
        process = self.process
        self._end()
        code = process.returncode
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def _receive(self, timeout_s: float) -> tuple[bool, bytearray]:
        deadline = time.monotonic() + timeout_s
        ok, length = decoding.HEADER.unpack(self._receive_bytes(decoding.HEADER.size, deadline))
        return ok, self._receive_bytes(length, deadline)

    def _receive_bytes(self, num: int, deadline: float) -> bytearray:
        assert self.process is not None and self.process.stdout is not None
        data = bytearray(num)
        view = memoryview(data)
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while view:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            got = os.readv(self.process.stdout.fileno(), [view])
            if not got:
                raise EOFError
            view = view[got:]
        return data


def _kill(process: subprocess.Popen) -> None:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    if process.poll() is None:
        process.kill()  # it holds nothing worth an orderly end
    process.wait()


def read_clip(item: Item | Path, size: tuple[int, int, int], interval: int, at: float, decoder: Decoder) -> Tensor:
    """Reads T frames, ``interval`` apart, as (3, T, H, W) fp32 in [-1, 1]; raises BadSample.

    Args:
        size: (T, H, W); each frame is resized and cropped as a picture is.
        at: in [0, 1), where among the places that a span can start at it does; 0 is the first frame.
    """
    item = item if isinstance(item, Item) else Item(str(item), item)
    with item.as_file() as item:
        data = decoder.ask(item, what="frames", size=size, interval=interval, at=at)
    x_THWC = torch.frombuffer(data, dtype=torch.uint8).reshape(*size, 3)
    return x_THWC.permute(3, 0, 1, 2).contiguous().float() / 127.5 - 1


def probe(item: Item | Path, decoder: Decoder) -> tuple[int, int, int, float]:
    """Tells (frames, height, width, frames a second) of a clip from its header and first frame; raises BadSample."""
    item = item if isinstance(item, Item) else Item(str(item), item)
    with item.as_file() as item:
        frames, height, width, rate = json.loads(decoder.ask(item, what="probe"))
    return frames, height, width, rate


def is_clip(name: str) -> bool:
    """Tells a clip from a picture, by the suffix."""
    return name.lower().endswith(EXTENSIONS)


def read_item(item: Item, size: tuple[int, ...], interval: int, at: float, decoder: Decoder) -> Tensor:
    """Reads a picture for ``size`` (H, W) or a clip for (T, H, W), as (3, *size) fp32 in [-1, 1]; raises BadSample.

    A clip gives its frame at ``at`` where a picture is asked for; a picture is a clip of one frame, not of more.
    """
    frames = size[0] if len(size) == 3 else 1
    if item.is_clip:
        return read_clip(item, (frames, size[-2], size[-1]), interval, at, decoder).reshape(3, *size)
    if frames > 1:
        raise BadSample(item.name, f"a picture, but clips of {frames} frames are asked for")
    return pictures.decode_picture(item.name, item.read(), (size[-2], size[-1])).reshape(3, *size)


def read_items(
    items: Iterable[Item], ids_B: Tensor, key: random.Key, size: tuple[int, ...], interval: int, decoder: Decoder
) -> Tensor:
    """Reads items as (B, 3, *size), each span's start drawn by draw id; raises BadSample for the first that is bad."""
    at_B = random.uniform(random.fold_in(key, "start of the span"), (), ids_B).tolist()
    return torch.stack([read_item(item, size, interval, at, decoder) for item, at in zip(items, at_B, strict=True)])


def item_size(item: Item, decoder: Decoder) -> tuple[int, int, int]:
    """Tells (frames, height, width) of a picture or a clip as it is shown; raises BadSample."""
    if item.is_clip:
        return probe(item, decoder)[:3]
    in_file = item.data is None and item.part is None
    return 1, *pictures.picture_size(item.name, item.path if in_file else io.BytesIO(item.read()))


def item_sizes(num: int, item: Callable[[int], Item]) -> Tensor:
    """Looks at ``num`` items in a few threads: int64 (N, 3) of frames, height and width, zeros for unreadable ones."""
    decoders: queue.LifoQueue[Decoder] = queue.LifoQueue()
    for _ in range(PROBES):
        decoders.put(Decoder())

    def look(row: int) -> tuple[int, int, int]:
        decoder = decoders.get()
        try:
            return item_size(item(row), decoder)
        except BadSample:
            return 0, 0, 0
        finally:
            decoders.put(decoder)

    with ThreadPoolExecutor(PROBES) as pool:
        found = list(pool.map(look, range(num)))
    for _ in range(PROBES):
        decoders.get().close()
    return torch.tensor(found, dtype=torch.int64).reshape(num, 3)
