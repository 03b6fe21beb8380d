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
OPERATIONS = ("create", "write", "sync", "close", "sync_path", "make_folder", "rename", "remove", "remove_folder")


def forced(name):
    """An operation of a disk that a process's death does not undo: nothing has to be forced to it."""

    def call(disk, *args):
        disk.reach(name, args)
        return None if name in ("sync", "sync_path") else getattr(Disk, name)(disk, *args)

    return call


class Counting(Disk):
    """Counts operations, each of which is one call; dies at ``at``, where that is not None."""

    def __init__(self, at=None, half=False, alone=False, store=None):
        self.count, self.at, self.half, self.alone, self.store = 0, at, half, alone, store
        self.names = []

    def reach(self, name, args):
        """What happens as an operation begins."""
        if self.count == self.at:
            if self.half and name == "write":
                os.write(args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2])
            if not self.alone:
                os.kill(os.getpid(), signal.SIGKILL)
            self.store.lose_one()
            threading.Event().wait()
        self.names.append(name)
        self.count += 1


for operation in OPERATIONS:
    setattr(Counting, operation, forced(operation))


def die():
    """Ends this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def child(fn):
    """Runs ``fn`` in a child; returns its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            fn()
        finally:
            os._exit(1)
    return pid


def count(out, world):
    """Names of the operations of each rank, from a save that nobody disturbs."""
    reader, writer = os.pipe()

    def run():
        disks = [Counting() for _ in range(world)]
        states.save(out, NEW, world, disks, zero=2, keep=1)
        os.write(writer, json.dumps([disk.names for disk in disks]).encode())

    os.waitpid(child(run), 0)
    os.close(writer)
    with os.fdopen(reader) as file:
        return json.loads(file.read())


def killed(out, world, rank, at, half, alone):
    """Saves until rank ``rank`` comes to operation ``at``."""

    def run():
        store = states.Store(world, stuck=die)
        disks = [Counting(at if r == rank else None, half, alone, store) for r in range(world)]
        states.save(out, NEW, world, disks, store, zero=2, keep=1)

    os.waitpid(child(run), 0)


def killed_after(out, world, seconds):
    """Saves until a time has passed."""
    pid = child(lambda: states.save(out, NEW, world, [Counting() for _ in range(world)], zero=2, keep=1))
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


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
    os.waitpid(child(lambda: states.save(out, NEXT, world, zero=2, keep=1)), 0)
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
        os.waitpid(child(lambda base=base, world=world: states.save(base, BEFORE, world, zero=2)), 0)
        shutil.copytree(base, out)
        began = time.monotonic()
        names, seconds = count(out, world), time.monotonic() - began
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
