"""Reading ahead: processes of the trainer's own that read shares of data while it computes."""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from odit.data import children, decoding
from odit.data.dataset import DataError

AHEAD = 2  # shares under way or waiting for the trainer, for each process
TIMEOUT_S = 600


def read_ahead(read: Callable[[Any], Any], shares: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yields what ``read``, picklable, makes of each share, in their order, by ``workers`` processes that run ahead.

    What ``read`` raises is raised here, where its share is due, and DataError where a process ended or takes more than
    ``TIMEOUT_S``. Closing the iterator ends its processes.
    """
    readers = _Readers(read, workers)
    asked: collections.deque[futures.Future] = collections.deque()
    try:
        for share in shares:
            asked.append(readers.ask(share))
            if len(asked) > AHEAD * workers:
                yield readers.answer(asked.popleft())
        while asked:
            yield readers.answer(asked.popleft())
    finally:
        readers.end()


class _Readers:
    """A pool of processes that call ``read``, which end with ``end`` and with this process, and heed no other signal.

    A DataLoader tells of a killed worker by a signal handler, which raises wherever the trainer is just then, and often
    inside a function that cannot be left so; here it is told where what was read is due.
    """

    def __init__(self, read: Callable[[Any], Any], workers: int):
        # spawn: a fork after CUDA or gloo threads have started is not safe.
        spawn = multiprocessing.get_context("spawn")
        self.pool = futures.ProcessPoolExecutor(workers, spawn, _begin, (read, os.getpid()))
        self.processes: set[BaseProcess] = set()
        self.end = weakref.finalize(self, _end, self.pool, self.processes)  # once, and at the latest as Python ends
        resource_tracker.ensure_running()  # when that starts it lets signals through again

    def ask(self, share: Any) -> futures.Future:
        """Starts a process, too, where none is idle."""
        others = set(multiprocessing.active_children())  # a pool does not tell which processes are its own
        try:
            with children.signals_held():
                asked = self.pool.submit(_read, share)
        except BrokenProcessPool as error:
            raise DataError(self.tell_end(error)) from error
        self.processes.update(set(multiprocessing.active_children()) - others)
        return asked

    def answer(self, asked: futures.Future) -> Any:
        """Waits for what was read."""
        if not futures.wait([asked], TIMEOUT_S).done:
            told = f"a process that reads data took more than {TIMEOUT_S} s for a share of a batch"
            raise DataError(f"{told}: look at its storage, or use more --data.workers")
        try:
            return asked.result()
        except BrokenProcessPool as error:
            raise DataError(self.tell_end(error)) from error

    def tell_end(self, error: BrokenProcessPool) -> str:
        """Ends the processes, and says how one of them had ended before."""
        by_sentinel = {process.sentinel: process for process in self.processes}
        ended = [by_sentinel[s] for s in multiprocessing.connection.wait(by_sentinel, 1) if isinstance(s, int)]
        self.end()  # exit codes are known for sure only then
        if not ended:
            return f"what a process that reads data sent did not arrive ({str(error.__cause__ or error).strip()})"
        code = ended[0].exitcode or 0
        if code >= 0:
            return f"a process that reads data ended with code {code}: it says why above"
        memory = "shared memory (/dev/shm)" if -code == signal.SIGBUS else "memory"
        told = f"a process that reads data was killed ({signal.Signals(-code).name})"
        return f"{told}: with too little {memory} use fewer --data.workers"


def _end(pool: futures.ProcessPoolExecutor, processes: set[BaseProcess]) -> None:
    """Does not wait for what they do: Python would wait for one that is busy, and they do not heed its SIGTERM."""
    for process in processes:
        process.kill()
    pool.shutdown(cancel_futures=True)
    for process in processes:
        process.join()


# What runs in such a process

_reads: Callable[[Any], Any]


def _begin(read: Callable[[Any], Any], parent: int) -> None:
    global _reads
    _reads = read
    torch.set_num_threads(1)  # the others are other readers' and the trainer's
    decoding.end_with_parent(parent)


def _read(share: Any) -> Any:
    try:
        return _reads(share)
    except Exception as error:
        if _survives(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _survives(error: Exception) -> bool:
    """Whether an error arrives in another process as it is."""
    try:
        pickle.loads(pickle.dumps(error))
        return True
    except Exception:
        return False
