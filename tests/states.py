"""States of a few small leaves on any number of ranks, without processes: layouts are data, and ranks are threads."""

import dataclasses
import errno
import functools
import math
import os
import threading
from datetime import timedelta
from pathlib import Path

import torch

from odit import config, optim, param, plan, saving, train, tree
from odit.models import dit
from odit.models.config import Shape
from odit.parallel.mesh import Axis, single
from odit.storage import DISK, Disk

# Primes, a scalar, leaves smaller than the world, dims that strategies claim before and behind others, and plain ones.
DECLARED = {
    "scalar": param.Param((), "", param.zeros),
    "prime": param.Param((7,), "D", param.zeros),
    "two": param.Param((2, 3), "DX", param.zeros),
    "blocks": [
        {
            "qkv": param.Param((3, 6, 2), "3HD", param.zeros),
            "out": param.Param((8, 6), "DH", param.zeros),
            "fc": param.Param((24,), "F", param.zeros),
            "odd": param.Param((5, 8), "XD", param.zeros),
        }
    ],
}
ROLES = saving.ROLES


@functools.cache
def one_rank():
    run = dataclasses.replace(
        config.presets()["digits"][1], device="cpu", model=dit.Config(width=8, depth=1, heads=2, patch=2)
    )
    return plan.compose(run, Shape(1, (8, 8), 10))


def plan_of(out: Path, world=1, rank=0, zero=0, sp=1, claimed="", keep=2, declared=None):
    """The plan of one rank of ``world``, ``sp`` of them along sp, with the letters that a strategy has claimed."""
    base = one_rank()
    mesh = dataclasses.replace(
        single(),
        rank=rank,
        world=world,
        all=Axis("all", world, rank, None, tuple(range(world))),
        sp=Axis("sp", sp, rank % sp, None, tuple(range(sp))),
        dp=Axis("dp", world // sp, rank // sp, None, tuple(range(world // sp))),
    )
    run = dataclasses.replace(base.run, out=out, keep=keep, parallel=config.Parallel(zero=zero))
    return dataclasses.replace(base, run=run, declared=declared or DECLARED, mesh=mesh, claimed=claimed)


@functools.cache
def whole(step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a step's state, role/path -> whole; no two elements are alike."""
    shapes = {f"{role}/{path}": p.shape for role in ROLES for path, p in tree.items(DECLARED)}
    numbers = iter(range(step * 100_000, (step + 1) * 100_000))
    return {
        name: torch.tensor([next(numbers) for _ in range(math.prod(shape))]).float().view(shape)
        for name, shape in shapes.items()
    }


def state_of(composed, step: int) -> train.TrainState:
    """The parts of ``whole(step)`` that a plan's rank holds."""
    rank = composed.layout.axis.rank

    def parts(role):
        return tree.map_with_path(
            lambda path, s: s.take(whole(step)[f"{role}/{path}"], rank).clone(), composed.layout.specs
        )

    p, m, v, ema = map(parts, ROLES)
    return train.TrainState(step, p, optim.AdamState(m, v, torch.tensor(step)), ema, train.LossScale(1.0, step))


def is_state(composed, state: train.TrainState, step: int) -> bool:
    """Whether a rank's state is, bit for bit, that of a step."""
    expected = state_of(composed, step)
    trees = [(s.params, s.opt.m, s.opt.v, s.ema) for s in (state, expected)]
    same = all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, map(list, trees)), strict=True))
    return same and (state.step, int(state.opt.count), state.loss_scale) == (step, step, expected.loss_scale)


class Store:
    """A job's store between threads; ``stuck`` is called when all live ranks wait for what nobody will tell."""

    def __init__(self, world: int, stuck=lambda: None):
        self.values, self.changed = {}, threading.Condition()
        self.live, self.waiting, self.stuck = world, 0, stuck

    def set(self, key, value):
        with self.changed:
            self.values[key] = value.encode()
            self.changed.notify_all()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)

    def add(self, key, num):
        with self.changed:
            self.values[key] = str(int(self.values.get(key, b"0")) + num).encode()
            return int(self.values[key])

    def delete_key(self, key):
        return self.values.pop(key, None) is not None

    def clone(self):
        return self

    def wait(self, keys, timeout: timedelta):
        with self.changed:
            self.waiting += 1
            while not self.check(keys):
                if self.waiting == self.live:
                    self.stuck()
                self.changed.wait()
            self.waiting -= 1

    def lose_one(self):
        """One rank will tell nothing any more."""
        with self.changed:
            self.live -= 1
            if self.waiting == self.live:
                self.stuck()


class FullDisk(Disk):
    """Takes not a byte."""

    def write(self, handle, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save(out: Path, step: int, world=1, disks=None, store=None, plans=None, **layout):
    """Saves a step's state as ``world`` ranks, threads; results or errors by rank."""
    store, found = store or Store(world), [None] * world

    def run(rank):
        composed = plans[rank] if plans else plan_of(out, world, rank, **layout)
        try:
            job = saving.job(composed, state_of(composed, step), {"note": step})
            found[rank] = saving.write(job, saving.Talk(store, rank, world), disks[rank] if disks else DISK)
        except Exception as error:
            found[rank] = error
        store.lose_one()

    if world == 1:
        run(0)
        return found
    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
