"""Reading ahead: processes of the trainer's own that read shares of data while it computes.

Neither PyTorch's DataLoader nor concurrent.futures does it, as a reader that is killed, by a lack of memory, say, is to
end the run with one sentence: the former raises from a signal handler, wherever the trainer is just then, and the
latter (Python 3.12) waits for ever for processes that heed no SIGTERM.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from odit.data import children, decoding
from odit.data.dataset import DataError

AHEAD = 2  # shares that each process has or has read before they are due
TIMEOUT_S = 600


def read_ahead(read: Callable[[Any], Any], shares: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yields what ``read``, picklable, makes of each share, in their order, by ``workers`` processes that run ahead.

    What ``read`` raises is raised here, where its share is due, and DataError where a process ended or takes more than
    ``TIMEOUT_S``. Closing the iterator ends its processes.
    """
    readers: list[_Reader] = []

    def end() -> None:
        while readers:
            readers.pop().end()

    atexit.register(end)  # an iterator that is left open: Python would wait for processes that are busy
    unregister = atexit.unregister  # a name that still stands as Python ends
    asked: deque[_Reader] = deque()
    try:
        for _ in range(workers):
            readers.append(_Reader(read))
        for k, share in enumerate(shares):
            readers[k % workers].ask(share)
            asked.append(readers[k % workers])
            if len(asked) > AHEAD * workers:
                yield asked.popleft().answer()
        while asked:
            yield asked.popleft().answer()
    finally:
        end()
        unregister(end)


class _Reader:
    """A process that calls ``read`` for one share after another. It ends with ``end`` and with this process."""

    def __init__(self, read: Callable[[Any], Any]):
        self.connection, theirs = multiprocessing.Pipe()
        # spawn: a fork after CUDA or gloo threads have started is not safe.
        self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, read))
        with children.signals_held():
            resource_tracker.ensure_running()  # here, as it lets signals through again where it starts
        with theirs, children.signals_held():
            self.process.start()

    def ask(self, share: Any) -> None:
        """Does not wait for it."""
        # By value: ``send`` makes tensors wait in this process's files, which stay open where the reader ends before.
        with contextlib.suppress(ConnectionError):  # ``answer`` tells that it has ended
            self.connection.send_bytes(pickle.dumps(share))

    def answer(self) -> Any:
        """What the oldest share came to that it was asked for, and has not answered yet."""
        try:
            if not self.connection.poll(TIMEOUT_S):
                told = f"a process that reads data took more than {TIMEOUT_S} s for a share of a batch"
                raise DataError(f"{told}: look at its storage, or use more --data.workers")
            made = self.connection.recv()
        except (OSError, EOFError) as error:
            raise DataError(self.tell_end(error)) from error
        if isinstance(made, _Failed):
            raise made.error from RuntimeError(made.stack)
        return made

    def tell_end(self, error: Exception) -> str:
        """Says how it ended, or that it did not, and what may help."""
        self.process.join(1)
        code = self.process.exitcode
        if code is None:
            return f"what a process that reads data sent did not arrive ({error or type(error).__name__})"
        if code >= 0:
            return f"a process that reads data ended with code {code}: it says why above"
        killed_by = signal.Signals(-code)
        told = f"a process that reads data was killed ({killed_by.name})"
        memory = {signal.SIGKILL: "memory", signal.SIGBUS: "shared memory (/dev/shm)"}.get(killed_by)
        return f"{told}: with too little {memory} use fewer --data.workers" if memory else told

    def end(self) -> None:
        self.process.kill()  # it may be busy, and heeds no SIGTERM
        self.process.join()
        self.connection.close()


# What runs in such a process


class _Failed(NamedTuple):
    """What a reader met, as a value, so that it is raised in the trainer with its own type and sentence."""

    error: Exception
    stack: str


def _serve(connection: Connection, read: Callable[[Any], Any]) -> None:
    torch.set_num_threads(1)  # the others are other readers' and the trainer's
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    decoding.end_with_parent(parent.pid)
    shares: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, shares), daemon=True).start()
    while True:
        made = _answer(read, shares.get())
        with contextlib.suppress(ConnectionError):  # nobody takes it: this process ends presently
            connection.send(made)


def _receive(connection: Connection, shares: queue.SimpleQueue[bytes]) -> None:
    """Takes shares while others are read, so that the trainer never waits as it asks; ends the process after it."""
    with contextlib.suppress(ConnectionError, EOFError):
        while True:
            shares.put(connection.recv_bytes())
    os._exit(1)


def _answer(read: Callable[[Any], Any], share: bytes) -> Any:
    try:
        return read(pickle.loads(share))
    except Exception as error:
        return _Failed(_picklable(error), f"in a process that reads data:\n{traceback.format_exc()}")


def _picklable(error: Exception) -> Exception:
    """The error, or where it does not survive the way to another process, its words."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
