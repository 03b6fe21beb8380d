"""What ranks of one job tell each other beside their collectives, through the job's store: whether they were started
alike, what rank 0 found, and that one of them is gone or late."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from odit import health
from odit.parallel import mesh as meshes
from odit.parallel.mesh import RanksLost

ROLL_CALL_S = 2.0  # what ranks have to answer; a thread of each does so at once
WORDS_S = 3.0  # what ranks have to raise the error that another one of them has ended by
LOOK_S = 1.0  # how often a watch looks whether a step is late, and whether the other ranks of this machine live
FOREVER_S = 20 * 86400.0  # in milliseconds it still fits the integer that the store uses


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
            store.set(f"{what}/verdict", json.dumps(error and (health.exit_code(error), str(error))))
        if error:
            raise error
    elif told := json.loads(store.get(f"{what}/verdict")):
        code, words = told
        raise (OSError if code == health.STORAGE else ValueError)(words)
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
                self.store.set(f"left/{self.rank}", "error" if error and not isinstance(error, health.Stopped) else "")
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
                with contextlib.suppress(RuntimeError):
                    self._take_part(store)
                health.leave(health.DISTRIBUTED)

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
                health.leave(health.DISTRIBUTED)

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
                health.say(print, f"\nerror: {told}", file=sys.stderr, flush=True)
                store.set("told", told)
            if meshes.wait_for(store, "told", ROLL_CALL_S + 1):
                told = store.get("told").decode()
                break
        health.Exit.tell(health.DISTRIBUTED, told)
        health.leave(health.DISTRIBUTED)


class _Others:
    """The processes of other ranks, as far as this machine knows them."""

    def __init__(self, ranks: list[int]):
        self.ranks, self.names, self.ended = ranks, {}, {}

    def gone(self, store: Any) -> set[int]:
        """The ranks that have ended without leaving a watch's block: at once where something killed them, after
        ``WORDS_S`` where an error of their own did, which others may be about to raise too."""
        now, found = time.monotonic(), set()
        for rank in self.dead(store):
            left = self._left(store, rank)
            since = self.ended.setdefault(rank, now)
            if left is None or (left == "error" and now - since > WORDS_S):
                found.add(rank)
        return found

    def dead(self, store: Any) -> set[int]:
        """The ranks whose process has ended, however it did."""
        return {rank for rank in self.ranks if not self._lives(store, rank)}

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
    """Asks all ranks where they are; the sentence that says who does not answer and where the others are.

    Waits for nobody whose process is known to have ended.
    """
    others = [r for r in range(world) if r != rank]
    for other in others:
        store.set(f"called/{other}", "")
    processes, until, found = _Others(others), time.monotonic() + ROLL_CALL_S, {}
    while True:
        dead = processes.dead(store)  # before the answers: who gave one and ended has given it
        new = [r for r in range(world) if r not in found and store.check([f"at/{r}"])]
        found |= {r: store.get(f"at/{r}").decode() for r in new}
        if len(found.keys() | dead) == world or time.monotonic() >= until:
            break
        time.sleep(0.05)
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
