"""A pool of gloo processes: started at the first use, kept for the session, each case some milliseconds.

``ranks.run(4, fn, *args, sp=2)`` calls the module-level function ``fn(mesh, *args)`` on 4 ranks and returns their
results in rank order. Groups stay while cases keep the number of ranks; changing it costs about 0.2 s, so give a
parameter named world ``scope="session"`` and pytest sorts the cases by it. Warnings are errors there too.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from odit.parallel import mesh

TIMEOUT_S = 60.0  # of a case; gloo's own is longer, so that the parent tells where the ranks are
GRACE_S = 1.0  # what the other ranks have once one has failed; they wait for it in a collective, most likely
START_S, START_NUM = 120.0, 4


class RankFailed(Exception):
    """A rank raised, died or did not answer."""


class Worker(NamedTuple):
    """A process and the parent's end of its pipe."""

    process: Any
    pipe: connection.Connection


class Pool:
    """Worker r is rank r of every case; those that a case needs and that are not there are started."""

    def __init__(self):
        self.workers: dict[int, Worker] = {}
        self.store: Any = None
        self.world, self.generation = 0, 0

    def run(
        self,
        world: int,
        fn: Callable,
        *args: Any,
        dp: int | None = None,
        sp: int = 1,
        ulysses: int = 1,
        cfg: int = 1,
        timeout_s: float = TIMEOUT_S,
    ) -> list:
        """Results of ``fn(mesh, *args)`` by rank; raises RankFailed with the first failing rank's traceback."""
        self._start(world)
        if world != self.world:
            self.world, self.generation = world, self.generation + 1
        job = pickle.dumps((world, self.generation, (dp, sp, ulysses, cfg), fn, args))
        for rank in range(world):
            self.workers[rank].pipe.send_bytes(job)
        return self._collect(world, f"{fn.__module__}.{fn.__name__}{args}", timeout_s)

    def close(self) -> None:
        """Ends the processes; a later run starts new ones."""
        self._end(list(self.workers))

    def _start(self, world: int) -> None:
        """Starts what is missing, the first time enough for most cases at once."""
        if self.store is None:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            world = max(world, START_NUM)
        new = [rank for rank in range(world) if rank not in self.workers]
        for rank in new:
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(
                target=_work, args=(rank, theirs, self.store.port, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self.workers[rank] = Worker(process, ours)
        for rank in new:
            pipe = self.workers[rank].pipe
            if not pipe.poll(START_S):
                self.close()
                raise RankFailed(f"a process did not start in {START_S} s")
            pipe.recv_bytes()

    def _end(self, ranks: list[int]) -> None:
        ended = [self.workers.pop(rank) for rank in ranks]
        for process, _ in ended:
            process.kill()
        for process, pipe in ended:
            process.join()
            process.close()
            pipe.close()

    def _collect(self, world: int, case: str, timeout_s: float) -> list:
        """The answers; on a failure the others get a little time, and the processes of those that hang are replaced."""
        waiting = {worker.pipe: rank for rank, worker in self.workers.items() if rank < world}
        results, failures = [None] * world, {}
        until = time.monotonic() + timeout_s
        while waiting and (ready := connection.wait(list(waiting), max(0.0, until - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    self.workers[rank].process.join(GRACE_S)
                    ok, value = False, f"died with exit code {self.workers[rank].process.exitcode}"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
                    until = min(until, time.monotonic() + GRACE_S)
        if not failures and not waiting:
            return results
        stuck = "".join(f"\nrank {rank} did not answer and is here:\n{self._stack(rank)}" for rank in waiting.values())
        if waiting or any(not self.workers[rank].process.is_alive() for rank in range(world)):
            self._end(list(range(world)))
        self.world = 0  # groups may have messages under way: new ones for the next case
        if failures:
            rank = next(iter(failures))
            raise RankFailed(
                f"{case} failed on rank {rank} of {world} (ranks {sorted(failures)} did): {failures[rank]}{stuck}"
            )
        raise RankFailed(f"{case} did not end in {timeout_s} s on {world} ranks{stuck}")

    def _stack(self, rank: int) -> str:
        """The Python stacks of a process that does not answer."""
        pid = self.workers[rank].process.pid
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        with open(f"/proc/{pid}/fd/{STACKS_FD}") as file:
            return file.read()


STACKS_FD = 100  # the file that a worker's SIGUSR1 writes to


def _work(rank: int, pipe: connection.Connection, port: int, parent: int) -> None:
    """A worker's life: jobs come as bytes, answers go as (True, result) or (False, traceback)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the parent, whatever ends that
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), STACKS_FD)
    faulthandler.register(signal.SIGUSR1, file=STACKS_FD, all_threads=False)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
    timeout = timedelta(seconds=10 * TIMEOUT_S)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    generation, meshes = 0, {}
    pipe.send_bytes(b"ready")
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        try:
            world, wanted, shape, fn, args = pickle.loads(job)
            if wanted != generation:
                mesh.stop()
                generation, meshes = wanted, {}
                if world > 1:
                    prefixed = dist.PrefixStore(str(generation), store)
                    dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=world, timeout=timeout)
            if shape not in meshes:
                dp, sp, ulysses, cfg = shape
                meshes[shape] = mesh.make_mesh(
                    world, rank, dp, sp, ulysses=ulysses, cfg=cfg, timeout_s=timeout.total_seconds()
                )
            answer = pickle.dumps((True, fn(meshes[shape], *args)))
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


_POOL = Pool()


@pytest.fixture(scope="session")
def ranks():
    """The session's pool."""
    yield _POOL
    _POOL.close()
