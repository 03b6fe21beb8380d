"""What a run leaves behind: config, metrics, TensorBoard and pictures, in a folder that one live process owns."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import odit
from odit import media
from odit.config import Run
from odit.config_json import to_json
from odit.storage import DISK, Disk, StorageError, make_folders, whole, write_file, write_json, writing

SIDE = 512  # pixels of a picture in TensorBoard; the file has all


class Recorder:
    """Writes ``config.json``, ``metrics.jsonl``, ``tensorboard/`` and ``samples/`` under ``out``.

    On resume ``metrics.jsonl`` is cut after ``step`` and a torn last line is dropped. All of it raises StorageError.
    """

    def __init__(self, run: Run, step: int = 0, disk: Disk = DISK):
        self.out, self.disk = run.out, disk
        config, versions = to_json(run), about()
        write_json(run.out / "config.json", {**config, "_about": versions}, disk=disk)
        # Where a run writes is no part of how its pictures came about: two runs of one config write the same bytes.
        del config["out"], versions["command"]
        self.recipe = {**config, "versions": versions}
        cut_metrics(run.out / "metrics.jsonl", step, disk)
        with contextlib.ExitStack() as files:
            self.metrics = files.enter_context(Appended(run.out / "metrics.jsonl", disk))
            events = files.enter_context(Appended(event_file(run.out / "tensorboard", disk), disk))
            self.board = Board(events, purge_step=step + 1 if step else None)
            self.files = files.pop_all()

    def log(self, step: int, values: dict[str, Any], prefix: str = "") -> None:
        """Appends one line {"step": step, ...}; floats keep full precision, numbers also go to TensorBoard."""
        named = {f"{prefix}{name}": value for name, value in values.items()}
        # JSON has no NaN: what is not finite is written as null
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in named.items()}
        self.metrics.write((json.dumps({"step": step, **finite}) + "\n").encode())
        for name, value in named.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.board.add_scalar(name, value, step)

    def pictures(self, step: int, x: Tensor, columns: int, fps: float = 8) -> Path:
        """Writes a grid of pictures (N, C, H, W) as PNG, of clips (N, C, T, H, W) as MP4, and shows it in TensorBoard.

        TensorBoard gets some frames of some clips. The recipe is the step, the run's config and versions.
        """
        name, recipe = self.out / "samples" / f"step_{step:08d}", {"step": step, **self.recipe}
        x = x[:, :, 0] if x.ndim == 5 and x.shape[2] == 1 else x
        path = name.with_suffix(".png" if x.ndim == 4 else ".mp4")
        shown_CHW = media.grid(x, columns) if x.ndim == 4 else media.strip(x[:8])
        with writing(path, x.numel(), self.disk):  # nobody knows what will be needed: about what the pixels take
            if x.ndim == 4:
                media.save_png(path, shown_CHW, recipe)
            else:
                media.save_mp4(path, media.clip_grid(x, columns), fps, recipe)
        self.board.add_image("samples", shown_CHW, step)
        return path

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.files.close()


class Appended:
    """A file that grows piece by piece, each of which is the system's when ``write`` ends, or raises StorageError.

    Nothing waits in this process, to be refused later, where nobody can tell what it was.
    """

    def __init__(self, path: Path, disk: Disk = DISK):
        self.path, self.disk = path, disk
        with writing(path, 0, disk):
            self.file = open(path, "ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Appends all of it."""
        with writing(self.path, len(data), self.disk):
            self.disk.write(self.file.fileno(), data)

    def __enter__(self) -> Appended:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


class Board:
    """TensorBoard's events, written as they come: SummaryWriter's thread meets a full disk later, with a traceback.

    Args:
        purge_step: TensorBoard forgets what earlier files have of this step and of later ones.
    """

    def __init__(self, file: Appended, purge_step: int | None = None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore (made by protoc)
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.event, self.summary, self.records = Event, summary, RecordWriter(file)
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._add(step=step, summary=self.summary.scalar(name, value))

    def add_image(self, name: str, picture_CHW: Tensor, step: int) -> None:
        """A picture, of values in [-1, 1], at most ``SIDE`` pixels wide and high: its checksum takes a second for some
        MiB, in which training stands still."""
        shrink = max(1, -(-max(picture_CHW.shape[1:]) // SIDE))
        size = [max(1, side // shrink) for side in picture_CHW.shape[1:]]
        small_1CHW = torch.nn.functional.adaptive_avg_pool2d(picture_CHW[None].float(), size)
        self._add(step=step, summary=self.summary.image(name, media.pixels(small_1CHW)[0], dataformats="HWC"))

    def _add(self, **event: Any) -> None:
        self.records.write(self.event(wall_time=time.time(), **event).SerializeToString())


def event_file(folder: Path, disk: Disk = DISK) -> Path:
    """A new name in TensorBoard's folder, which is made; names sort by time."""
    with writing(folder, 0, disk):
        make_folders(folder, disk)
    now_s, ns = divmod(time.time_ns(), 10**9)
    return folder / f"events.out.tfevents.{now_s:010d}.{socket.gethostname()}.{os.getpid()}.{ns:09d}"


RESULTS = ("config.json", "metrics.jsonl", "tensorboard", "samples", "crashes", "ema.safetensors", "evaluation.json")


def set_aside(out: Path) -> Path | None:
    """Moves what a run left in ``out`` to ``out/abandoned_0001``, or the next number: another run starts there.

    Returns the folder; None where there was nothing.
    """
    found = [path for name in RESULTS if (path := out / name).exists()]
    if not found:
        return None
    numbered = (out / f"abandoned_{number:04d}" for number in itertools.count(1))
    aside = next(folder for folder in numbered if not folder.exists())
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


class Silent:
    """The recorder of ranks that do not speak."""

    def log(self, step: int, values: dict[str, Any], prefix: str = "") -> None:
        """Nothing."""

    def pictures(self, step: int, x: Tensor, columns: int, fps: float = 8) -> None:
        """Nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Lock:
    """An advisory lock on ``out/.lock`` while the context lasts; it falls with its process, however that ends.

    Raises ValueError where another process has it or ``out`` is a file, StorageError where it cannot be made.
    """

    def __init__(self, out: Path):
        if os.path.exists(out) and not os.path.isdir(out):
            raise ValueError(f"out {out} is a file: give a folder, or a name that is free")
        with writing(out / ".lock", 0):
            make_folders(out)
            self.file = open(out / ".lock", "a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().decode().strip() or "unknown"
            self.file.close()
            raise ValueError(f"out {out} is in use by process {holder}: wait for it, or use another --out") from None
        except OSError as error:
            self.file.close()
            why = f"{out}/.lock cannot be locked ({errno.errorcode.get(error.errno or 0)}: {error.strerror})"
            raise StorageError(f"{why}: use an --out on a file system with flock") from error
        self.file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            self.file.write(str(os.getpid()).encode())

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def cut_metrics(path: Path, step: int, disk: Disk = DISK) -> None:
    """Keeps the whole lines of steps up to ``step``."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    data = "".join(kept).encode()
    with writing(path, len(data), disk), whole(path, disk) as temporary:
        write_file(temporary, [data], disk)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's ``metrics.jsonl``; none where there is no file. A torn last line is left out."""
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [json.loads(line) for line in lines]


def curve(lines: list[dict[str, Any]], name: str) -> dict[int, float]:
    """{step: value} of the lines of metrics that have one."""
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}


def about() -> dict[str, Any]:
    """Versions and git state of this program."""
    return {
        "odit": odit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "command": sys.argv,
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*args: str) -> str | None:
    try:
        root = Path(odit.__file__).parent
        found = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
