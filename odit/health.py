"""How a run ends: one sentence for what a user can mend, an exit code a kind, and the name of the first bad tensor.

Ranks of one job end together: each watches the others (peers.py), and is ended by its launcher's end
(``mesh.end_with_launcher``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from odit import storage, tree
from odit.data import DataError
from odit.data.children import SIGNALS
from odit.parallel.mesh import RanksLost

# RELIABILITY: 2 config, 3 checkpoint, 4 data, 5 numeric, 6 storage, 7 distributed, 75 stopped by a signal (EX_TEMPFAIL)
CONFIG, CHECKPOINT, DATA, NUMERIC, STORAGE, DISTRIBUTED, STOPPED = 2, 3, 4, 5, 6, 7, 75

AGAIN_S = 1.0  # a signal that comes sooner is the first one twice: to the terminal's group, and from the launcher

TELL_S = 3.0  # what storage and pipes have, all of them together, to take the last words of a process
_said: list[threading.Event] = []  # the last words, each set once it is taken


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


class Damaged(CheckpointError):
    """A checkpoint that is not as it was written."""


class NumericError(ValueError):
    """Numbers that went bad for good, and where."""


class Stopped(Exception):
    """The end of a run that was asked to stop, once its state is saved; what rank 0 says of it."""


class Signals:
    """Takes SIGTERM, SIGINT and SIGUSR1 as a wish to stop after the step; a second one ends this process at once.

    A rank that comes to its end ignores them: its launcher sends SIGTERM as soon as it sees that another one has left,
    and each is to tell how it ended. One that hangs there is killed by the launcher, which waits for 30 s.
    """

    def __init__(self):
        self.asked: str | None = None
        """Name of the signal."""
        self.at, self.before = 0.0, {}

    def __enter__(self) -> Signals:
        self.before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if _is_rank() else handler)

    def end(self) -> None:
        """Where a launcher started this process, takes none from now on: what is left to do is to leave."""
        if _is_rank():
            _ignore_signals()

    def _take(self, number: int, frame: Any) -> None:
        if self.asked is None:
            self.asked, self.at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.at >= AGAIN_S:
            _ignore_signals()  # it leaves within seconds, and one that comes between would have to wait for itself
            leave(128 + number)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Exit:
    """``exit/00000.json`` under a run's folder: this rank's own exit code and reason, as torchrun returns 1 for any."""

    path: Path | None = None
    taking = threading.RLock()  # the path, by a rank's threads, each of which then ends the process

    @classmethod
    def keep(cls, out: Path, rank: int, world: int = 1) -> None:
        """From now on this process tells its end there; what earlier ones told goes, of ranks that are no more too."""
        with storage.writing(out / "exit", 0):
            storage.make_folders(out / "exit")
            cls.path = out / "exit" / f"{rank:05d}.json"
            cls.path.unlink(missing_ok=True)
            for path in (out / "exit").glob("*.json") if rank == 0 else ():
                if path.name >= f"{world:05d}.json":
                    path.unlink(missing_ok=True)

    @classmethod
    def tell(cls, code: int, reason: str = "") -> None:
        """Says it there, once. Where that fails nobody is told, as there is no place to."""
        taken = _expected()  # before the path is taken: who finds that gone waits for this
        with cls.taking:
            path, cls.path = cls.path, None
        _begin(taken, cls._write, path, {"code": code, "reason": reason})

    @staticmethod
    def _write(path: Path | None, told: dict[str, Any]) -> None:
        if path is not None:
            with storage.whole(path, sync=False) as temporary:  # an end does not wait for the disk
                temporary.write_text(json.dumps(told, indent=2) + "\n")


def first_bad(named: tree.Tree) -> str | None:
    """Path of the first leaf with a NaN or an infinity; None where all are finite."""
    for path, leaf in tree.items(named):
        if leaf is not None and not bool(torch.isfinite(leaf).all()):
            return path
    return None


def run(main: Callable[[], None]) -> None:
    """Runs a script's main function; an error a user can mend becomes one line on stderr and its exit code."""
    try:
        main()
        Exit.tell(0)
        heard()
    except Stopped as error:
        if str(error):
            say(print, error, flush=True)
        Exit.tell(STOPPED, str(error))
        leave(STOPPED)
    except Exception as error:
        code = exit_code(error)
        brief = code is not None and "ODIT_TRACEBACK" not in os.environ
        if _is_rank():
            say(_print_error, error, brief)
        Exit.tell(code or 1, sentence(error))
        if _is_rank():
            leave(code or 1)
        heard()
        if not brief:
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(code)


def _print_error(error: Exception, brief: bool) -> None:
    """A rank's error in a line of its own, as another rank's bar may stand on this one; or, where it is not to be
    brief, its traceback, which reads source files."""
    text = f"\nerror: {sentence(error)}" if brief else "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, flush=True)


def sentence(error: Exception) -> str:
    """What an error says to people; a full GPU gets advice."""
    if not isinstance(error, torch.OutOfMemoryError):
        return str(error)
    what = str(error).split(". GPU ")[0].split("\n")[0]  # what was asked for, without the allocator's own hints
    return (
        f"{what}: use a smaller --micro-batch, --parallel.remat block, --parallel.zero 3 or "
        "--parallel.offload optimizer, or a larger --parallel.memory-gib where that is set"
    )


def exit_code(error: Exception) -> int | None:
    """The code of an error that a user can mend; None for any other."""
    kinds = (
        *((CheckpointError, CHECKPOINT), (DataError, DATA), (NumericError, NUMERIC), (ValueError, CONFIG)),
        *((OSError, STORAGE), (RanksLost, DISTRIBUTED), (torch.OutOfMemoryError, CONFIG)),
    )
    return next((code for kind, code in kinds if isinstance(error, kind)), None)


def say(fn: Callable, *args: Any, **settings: Any) -> None:
    """Calls ``fn`` in a thread and lets its errors pass; ``heard`` waits for it.

    For last words: storage may hang, and a pipe may have lost its reader, or be full before one that does not read.
    """
    _begin(_expected(), fn, *args, **settings)


def _expected() -> threading.Event:
    """What ``heard`` waits for from now on."""
    taken = threading.Event()
    _said.append(taken)
    return taken


def _begin(taken: threading.Event, fn: Callable, *args: Any, **settings: Any) -> None:
    """Calls ``fn`` in a thread, here where the system has no more of them, and says that what was expected is over."""

    def call() -> None:
        with contextlib.suppress(Exception):
            fn(*args, **settings)
        taken.set()

    try:
        threading.Thread(target=call, daemon=True).start()
    except RuntimeError:
        call()


def heard() -> None:
    """Waits until all that was said has been taken, ``TELL_S`` at most."""
    until = time.monotonic() + TELL_S
    for taken in list(_said):
        taken.wait(max(0.0, until - time.monotonic()))


def leave(code: int) -> None:
    """Ends this process here, whatever storage and pipes do: the way through destructors may wait for ranks that are
    gone."""
    try:
        Exit.tell(code)
        for stream in (sys.stdout, sys.stderr):
            say(print, end="", file=stream, flush=True)
        heard()
    finally:
        os._exit(code)


def _is_rank() -> bool:
    """Whether a launcher started this process, as a rank of a job."""
    return "RANK" in os.environ
