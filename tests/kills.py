"""Saves killed at every point: ``python tests/kills.py FOLDER --every 4`` prints what was found as JSON.

A program of its own because it forks, which a process with threads should not. Each point is a child whose threads are
the ranks of one save. Either all of them die in the moment in which a rank begins (or is half through) an operation; or
that rank alone, and the others when they all wait for it; or all at a random time. Then the newest checkpoint that
loads must be the one before or the new one, bit for bit. Retention keeps one, so the one before is deleted meanwhile.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import states

from odit import checkpoint, saving
from odit.storage import Disk

BEFORE, NEW, NEXT = 7, 9, 11
HERE = b"."  # what a child tells that has come to its point
OPERATIONS = ("create", "write", "sync", "close", "sync_path", "make_folder", "rename", "remove", "remove_folder")


def forced(name):
    """An operation of a disk that a process's death does not undo: nothing has to be forced to it."""

    def call(disk, *args):
        disk.reach(name, args)
        return None if name in ("sync", "sync_path") else getattr(Disk, name)(disk, *args)

    return call


class Counting(Disk):
    """Counts operations, each of which is one call; dies at ``at``, where that is not None, and tells so before."""

    def __init__(self, at=None, half=False, alone=False, store=None, tell=None):
        self.count, self.at, self.half, self.alone, self.store, self.tell = 0, at, half, alone, store, tell
        self.names = []

    def reach(self, name, args):
        """What happens as an operation begins."""
        if self.count == self.at:
            if self.half and name == "write":
                os.write(args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2])
            self.tell(HERE)
            if not self.alone:
                die()
            self.store.lose_one()
            threading.Event().wait()
        self.names.append(name)
        self.count += 1


for operation in OPERATIONS:
    setattr(Counting, operation, forced(operation))


class Store(states.Store):
    """Dies when all live ranks wait for what nobody has told; one that was told, and has not woken yet, does not."""

    def __init__(self, world):
        super().__init__(world, self.die_if_lost)
        self.awaited = {}

    def wait(self, keys, timeout):
        with self.changed:
            self.awaited[threading.get_ident()] = keys
            super().wait(keys, timeout)
            del self.awaited[threading.get_ident()]

    def die_if_lost(self):
        if not any(map(self.check, self.awaited.values())):
            die()


def die():
    """Ends this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def child(fn):
    """Runs ``fn(tell)`` in a child; returns its process id and a file of the bytes that it tells."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            fn(lambda data: os.write(writer, data))
        finally:
            os._exit(1)
    os.close(writer)
    return pid, os.fdopen(reader, "rb", buffering=0)


def run_child(fn):
    """What ``fn(tell)`` tells in a child, and whether that was killed, when it has ended."""
    pid, file = child(fn)
    with file:
        told = file.read()
    return told, was_killed(pid)


def was_killed(pid):
    """Waits for a child's end."""
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def count(out, world):
    """Names of the operations of each rank, and the time in seconds, of a save that nobody disturbs."""

    def run(tell):
        disks, began = [Counting() for _ in range(world)], time.monotonic()
        states.save(out, NEW, world, disks, zero=2, keep=1)
        tell(json.dumps([[disk.names for disk in disks], time.monotonic() - began]).encode())

    return json.loads(run_child(run)[0])


def killed(out, world, rank, at, half, alone):
    """Saves until rank ``rank`` comes to operation ``at``."""

    def run(tell):
        store = Store(world)
        disks = [Counting(at if r == rank else None, half, alone, store, tell) for r in range(world)]
        states.save(out, NEW, world, disks, store, zero=2, keep=1)

    assert run_child(run) == (HERE, True), "a save died elsewhere, or not at all"


def killed_after(out, world, seconds):
    """Saves until a time has passed; idles where the save is done before."""

    def run(tell):
        disks = [Counting() for _ in range(world)]
        tell(HERE)
        states.save(out, NEW, world, disks, zero=2, keep=1)
        signal.pause()

    pid, file = child(run)
    with file:
        assert file.read(1) == HERE
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert was_killed(pid), "a save ended otherwise"


def loads(out):
    """(step of the newest checkpoint that loads or None, whether all its bits are right)."""
    if not all(saving.is_whole(saving.folder_of(out, step)) for step in saving.steps(out)):
        return None, False  # something looks like a checkpoint and is none
    path = checkpoint.find("latest", out)
    if path is None:
        return None, False
    composed = states.plan_of(out)
    state, _ = checkpoint.read(path, composed)
    return state.step, states.is_state(composed, state, state.step)


def goes_on(out, world):
    """Whether the next save works and leaves nothing beside itself."""
    run_child(lambda tell: states.save(out, NEXT, world, zero=2, keep=1))
    return loads(out) == (NEXT, True) and os.listdir(out / "checkpoints") == [f"step_{NEXT:08d}"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--random", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draws, found, bad = random.Random(args.seed), {}, []
    for step in (BEFORE, NEW, NEXT):
        states.state_of(states.plan_of(args.folder), step)  # what children then need not make
    for world in args.worlds:
        base, out = args.folder / f"base{world}", args.folder / "run"
        run_child(lambda tell, base=base, world=world: states.save(base, BEFORE, world, zero=2))
        shutil.copytree(base, out)
        names, seconds = count(out, world)
        shutil.rmtree(out)
        points = [
            (killed, (world, rank, at, half, alone))
            for rank, all_names in enumerate(names)
            for at, name in enumerate(all_names)
            for half, alone in itertools.product((False, True), (False, True))
            if name == "write" or not half
            if world > 1 or not alone
        ][:: args.every]
        points += [(killed_after, (world, draws.uniform(0, 1.2 * seconds))) for _ in range(args.random)]
        for number, (kill, what) in enumerate(points):
            shutil.copytree(base, out)
            kill(out, *what)
            step, same = loads(out)
            went_on = number % 10 or goes_on(out, world)
            if step not in (BEFORE, NEW) or not same or not went_on:
                bad.append([kill.__name__, *what, step, same, bool(went_on)])
            key = f"{kill.__name__} {world} {step}"
            found[key] = found.get(key, 0) + 1
            shutil.rmtree(out)
    print(json.dumps({"points": sum(found.values()), "found": found, "bad": bad}))


if __name__ == "__main__":
    sys.exit(main())
