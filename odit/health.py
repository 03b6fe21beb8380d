"""How a run ends: one sentence for what a user can mend, an exit code a kind, and the name of the first bad tensor.

Ranks of one job end together: each watches the others, and is ended by its launcher's end (``mesh.end_with_launcher``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from odit import storage, tree
from odit.data import DataError
from odit.parallel import mesh as meshes
from odit.parallel.mesh import RanksLost

# RELIABILITY: 2 config, 3 checkpoint, 4 data, 5 numeric, 6 storage, 7 distributed, 75 stopped by a signal (EX_TEMPFAIL)
CONFIG, CHECKPOINT, DATA, NUMERIC, STORAGE, DISTRIBUTED, STOPPED = 2, 3, 4, 5, 6, 7, 75

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN_S = 1.0  # a signal that comes sooner is the first one twice: to the terminal's group, and from the launcher

ROLL_CALL_S = 2.0  # what ranks have to answer; a thread of each does so at once
WORDS_S = 3.0  # what ranks have to raise the error that another one of them has ended by
TELL_S = 5.0  # what storage has to take an exit code, and a pipe the last words
LOOK_S = 1.0  # how often a watch looks whether a step is late, and whether the other ranks of this machine live
FOREVER_S = 20 * 86400.0  # in milliseconds it still fits the integer that the store uses


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
    told = threading.Event()
    told.set()

    @classmethod
    def keep(cls, out: Path, rank: int, world: int = 1) -> None:
        """From now on this process tells its end there; what earlier ones told goes, of ranks that are no more too."""
        storage.make_folders(out / "exit")
        cls.path, cls.told = out / "exit" / f"{rank:05d}.json", threading.Event()
        cls.path.unlink(missing_ok=True)
        for path in (out / "exit").glob("*.json") if rank == 0 else ():
            if path.name >= f"{world:05d}.json":
                path.unlink(missing_ok=True)

    @classmethod
    def tell(cls, code: int, reason: str = "") -> None:
        """Writes it, once; that, and who comes later, takes ``TELL_S`` at most: storage may hang. Where it fails nobody
        is told, as there is no place to."""
        with cls.taking:
            path, cls.path = cls.path, None
        if path is not None:
            told = {"code": code, "reason": reason}
            threading.Thread(target=cls._write, args=(path, told, cls.told), daemon=True).start()
        cls.told.wait(TELL_S)

    @staticmethod
    def _write(path: Path, told: dict[str, Any], done: threading.Event) -> None:
        with contextlib.suppress(Exception):
            storage.write_json(path, told)
        done.set()


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
    except Stopped as error:
        Exit.tell(STOPPED, str(error))
        if str(error):
            briefly(print, error)
        leave(STOPPED)
    except Exception as error:
        code, words = exit_code(error), f"error: {sentence(error)}"
        Exit.tell(code or 1, sentence(error))
        told = code is not None and "ODIT_TRACEBACK" not in os.environ
        if _is_rank():
            # another rank's bar may stand on this line
            briefly(*((print, f"\n{words}") if told else (traceback.print_exception, error)), file=sys.stderr)
            leave(code or 1)
        if not told:
            raise
        print(words, file=sys.stderr)
        sys.exit(code)


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


def leave(code: int) -> None:
    """Ends this process here, whatever storage and pipes do: the way through destructors may wait for ranks that are
    gone."""
    try:
        Exit.tell(code)
        for stream in (sys.stdout, sys.stderr):
            briefly(print, end="", file=stream, flush=True)
    finally:
        os._exit(code)


def briefly(fn: Callable, *args: Any, **settings: Any) -> None:
    """Calls ``fn`` in a thread, waits ``TELL_S`` and lets its errors pass: a pipe may have lost its reader, or be full
    before one that does not read."""

    def call() -> None:
        with contextlib.suppress(Exception):
            fn(*args, **settings)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(TELL_S)


def _is_rank() -> bool:
    """Whether a launcher started this process, as a rank of a job."""
    return "RANK" in os.environ


def told_by_rank_0(store: Any, rank: int, what: str, fn: Callable[[], Any]) -> Any:
    """What ``fn()`` returns on rank 0, None on the others. Needs no group.

    Raises its ValueError or OSError on all ranks, on the others as one of these two kinds with the same sentence.
    """
    result, error = None, None
    if rank == 0:
        try:
            result = fn()
        except (ValueError, OSError) as found:
            error = found
        if store is not None:
            store.set(f"{what}/verdict", json.dumps(error and (exit_code(error), str(error))))
        if error:
            raise error
    elif told := json.loads(store.get(f"{what}/verdict")):
        code, words = told
        raise (OSError if code == STORAGE else ValueError)(words)
    return result


def same_everywhere(store: Any, rank: int, world: int, what: str, told: dict[str, Any]) -> None:
    """Raises ValueError on every rank unless all of them tell the same; nothing on one rank. Needs no group.

    The sentence names the first differing key, its values and which ranks have them.
    """
    if store is None:
        return
    store.set(f"{what}/{rank}", json.dumps(told))
    if rank == 0:
        store.set(f"{what}/verdict", first_unlike([json.loads(store.get(f"{what}/{r}")) for r in range(world)]) or "")
    if verdict := store.get(f"{what}/verdict").decode():
        raise ValueError(f"{verdict}: give every rank the same {what}")


def first_unlike(told: list[dict[str, Any]]) -> str | None:
    """What the ranks' nested dicts differ in first, such as 'seed is 0 on ranks 0, 2 and 1 on rank 1'."""
    flat = [dict(_flat(t)) for t in told]
    for key in {key: None for f in flat for key in f}:
        found: dict[Any, list[int]] = {}
        for rank, f in enumerate(flat):
            found.setdefault(f.get(key, "not there"), []).append(rank)
        if len(found) > 1:
            return f"{key} is {' and '.join(f'{v} on {meshes.name_ranks(ranks)}' for v, ranks in found.items())}"
    return None


def _flat(value: dict[str, Any], key: str = "") -> Iterator[tuple[str, str]]:
    for name, x in value.items():
        path = f"{key}.{name}" if key else name
        yield from _flat(x, path) if isinstance(x, dict) else [(path, repr(x))]


class Watch:
    """Ends this rank when another one is gone or late; then one line, of one rank, says who is where. Idle on one rank.

    The step that ``beat`` announces is late after ``patience_s``; an error of a collective inside the block says that a
    rank is gone, and so does the end of a process on this machine that has not left the block. Who finds out calls the
    roll through the store, and a thread of each rank answers, whatever its main thread is doing. Threads end the
    process too: NCCL keeps the main one in calls that never return, where no signal reaches Python.
    """

    def __init__(self, store: Any, rank: int, world: int):
        self.store, self.rank, self.world = store, rank, world
        self.patience_s, self.due = meshes.patience_s(), math.inf
        self.left, self.place = threading.Event(), ""
        self.main, self.threads = threading.get_ident(), []

    def beat(self) -> None:
        """Expects a step from now on, in ``patience_s``."""
        self.due = time.monotonic() + self.patience_s

    def rest(self) -> None:
        """Expects no step: what follows may take its time."""
        self.due = math.inf

    def __enter__(self) -> Watch:
        if self.store is not None:
            self.store.set(f"process/{self.rank}", meshes.process())
            # a connection each: one that waits is blocked
            self.threads = [
                threading.Thread(target=target, args=(self.store.clone(),), daemon=True)
                for target in (self._answer, self._time)
            ]
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        reason = meshes.broken(error) if error else None
        if self.store is None:
            return
        if not reason:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"left/{self.rank}", "error" if error and not isinstance(error, Stopped) else "")
        if error and not reason:
            return  # an error of this rank's own: its words come first, and then the process ends
        if reason:
            if "ODIT_TRACEBACK" in os.environ:
                traceback.print_exception(error)
            self.place = _place(reversed(list(traceback.walk_tb(trace))))
            with contextlib.suppress(RuntimeError):
                self._call(self.store, reason)
            raise RanksLost(f"{reason} on rank {self.rank}; the job's store, where to ask for the others, is gone")
        self.left.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"called/{self.rank}", "")  # wakes the thread that answers
        for thread in self.threads:
            thread.join(ROLL_CALL_S)

    def _answer(self, store: Any) -> None:
        with contextlib.suppress(RuntimeError):  # where the store is gone nobody can ask
            while not meshes.wait_for(store, f"called/{self.rank}", FOREVER_S):
                pass
            if not self.left.is_set():
                self._take_part(store)

    def _time(self, store: Any) -> None:
        others, gone = _Others(meshes.neighbours(self.rank, self.world)), set()
        while not self.left.wait(max(0.0, min(LOOK_S, self.due - time.monotonic()))):
            reason = f"no step in {self.patience_s:g} s" if time.monotonic() >= self.due else None
            before, gone = gone, others.gone(store)
            if lost := sorted(gone & before):  # seen twice: an error of a collective comes first, and says more
                reason = f"{meshes.name_ranks(lost)} ended"
            if reason:
                with contextlib.suppress(Exception):
                    self._call(store, reason)
                leave(DISTRIBUTED)

    def _call(self, store: Any, reason: str) -> None:
        if not store.check(["reason"]):
            store.set("reason", f"{reason} on rank {self.rank}")
        self._take_part(store)

    def _take_part(self, store: Any) -> None:
        """Says where this rank is, waits until one rank has called the roll and told what it found, and ends this one.

        Who comes first calls. Its launcher, which sees the failure too, may end it over that: then another one does.
        """
        told = store.get("reason").decode()
        store.set(f"at/{self.rank}", self.place or _place(traceback.walk_stack(sys._current_frames()[self.main])))
        for turn in range(3):
            if store.add(f"turn/{turn}", 1) == 1:
                told = call_roll(store, self.rank, self.world, told)
                briefly(print, f"\nerror: {told}", file=sys.stderr, flush=True)
                store.set("told", told)
            if meshes.wait_for(store, "told", ROLL_CALL_S + 1):
                told = store.get("told").decode()
                break
        Exit.tell(DISTRIBUTED, told)
        leave(DISTRIBUTED)


class _Others:
    """The processes of the other ranks that this rank's launcher started."""

    def __init__(self, ranks: list[int]):
        self.ranks, self.names, self.ended = ranks, {}, {}

    def gone(self, store: Any) -> set[int]:
        """The ranks that have ended without leaving a watch's block: at once where something killed them, after
        ``WORDS_S`` where an error of their own did, which others may be about to raise too."""
        now, found = time.monotonic(), set()
        for rank in self.ranks:
            if self._lives(store, rank):
                continue
            left = self._left(store, rank)
            since = self.ended.setdefault(rank, now)
            if left is None or (left == "error" and now - since > WORDS_S):
                found.add(rank)
        return found

    def _lives(self, store: Any, rank: int) -> bool:
        """By its name, for which the store is asked until it is there."""
        if rank not in self.names:
            with contextlib.suppress(RuntimeError):
                if store.check([f"process/{rank}"]):
                    self.names[rank] = store.get(f"process/{rank}").decode()
        return meshes.lives(self.names.get(rank, ""))

    def _left(self, store: Any, rank: int) -> str | None:
        """How it left the block; None where it did not, or where nobody can be asked any more."""
        try:
            return store.get(f"left/{rank}").decode() if store.check([f"left/{rank}"]) else None
        except RuntimeError:
            return None


def call_roll(store: Any, rank: int, world: int, reason: str) -> str:
    """Asks all ranks where they are; the sentence that says who does not answer and where the others are."""
    for other in set(range(world)) - {rank}:
        store.set(f"called/{other}", "")
    until, found = time.monotonic() + ROLL_CALL_S, {}
    while len(found) < world and time.monotonic() < until:
        time.sleep(0.05)
        new = [r for r in range(world) if r not in found and store.check([f"at/{r}"])]
        found |= {r: store.get(f"at/{r}").decode() for r in new}
    places: dict[str, list[int]] = {}
    for r in sorted(found):
        places.setdefault(found[r], []).append(r)
    silent = [r for r in range(world) if r not in found]
    told = [f"{meshes.name_ranks(silent)} of {world} do{'es' * (len(silent) == 1)} not answer"] if silent else []
    for place, ranks in sorted(places.items(), key=lambda item: len(item[1]))[:4]:  # the odd ones first
        told.append(f"{meshes.name_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} in {place}")
    return f"{reason}: {', '.join(told)}"


def _place(stack: Iterable[tuple[Any, int]]) -> str:
    """The innermost line of a stack, given innermost first, that is odit's but not a collective's."""
    for frame, line in stack:
        name = frame.f_globals.get("__name__", "")
        if name == "__main__" or (name.startswith("odit.") and not name.startswith("odit.parallel.")):
            return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{line})"
    return "another program"
