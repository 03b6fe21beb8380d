"""Reading ahead: processes of the trainer's own that read shares of data while it computes.

Neither PyTorch's DataLoader nor concurrent.futures does it, as a reader that is killed, by a lack of memory, say, is to
end the run with one sentence: the former raises from a signal handler, wherever the trainer is just then, and the
latter (Python 3.12) waits for ever for processes that heed no SIGTERM.
"""

from __future__ import annotations

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
from multiprocessing import resource_tracker, util
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch

from odit.data import children
from odit.data.dataset import DataError

AHEAD = 2  # shares that each process has or has read before they are due
TIMEOUT_S = 600
END_S = 10  # a killed process is gone by then, but where storage that does not answer holds it: the error is told first
SCARCE = "with too little shared memory (/dev/shm) or too few open files (ulimit -n) use fewer --data.workers"


def read_ahead(read: Callable[[Any], Any], shares: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yields what ``read``, picklable, makes of each share, in their order, by ``workers`` processes that run ahead.

    Without workers it reads in this process, when asked. What ``read`` raises is raised here, where its share is due,
    and DataError where a process ended or takes more than ``TIMEOUT_S``. Closing the iterator ends its processes.
    """
    if workers == 0:
        yield from map(read, shares)
        return
    pickled = pickle.dumps(read)
    readers = [_Reader() for _ in range(workers)]
    # The latest as Python ends, which would wait for processes that are busy; once, and not in a fork of this process.
    end = util.Finalize(None, _end, (readers,), exitpriority=0)
    asked: deque[_Reader] = deque()
    try:
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.send(pickled)
        del pickled
        for k, share in enumerate(shares):
            readers[k % workers].send(pickle.dumps(share))
            asked.append(readers[k % workers])
            if len(asked) > AHEAD * workers:
                yield asked.popleft().answer()
        while asked:
            yield asked.popleft().answer()
    finally:
        end()


def _end(readers: list[_Reader]) -> None:
    for reader in readers:
        reader.end()


class _Reader:
    """A process that calls ``read`` for one share after another. It ends with ``end`` and with this process."""

    def __init__(self):
        util.get_temp_dir()  # one for all, which goes with this process: a killed one leaves its own
        self.connection, self.theirs = multiprocessing.Pipe()
        # spawn: a fork after CUDA or gloo threads have started is not safe.
        self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(self.theirs,))

    def start(self) -> None:
        with children.signals_held():
            resource_tracker.ensure_running()  # here, as it lets signals through again where it starts
        with self.theirs, children.signals_held():
            self.process.start()

    def send(self, pickled: bytes) -> None:
        """Sends what the process takes, ``read`` and then shares, without waiting for it to read them.

        By value: ``Connection.send`` makes tensors wait in this process's files, which stay open where the reader ends
        before. ``read`` is no argument of the process: where that ends before it takes all, a start waits for ever.
        """
        with contextlib.suppress(ConnectionError):  # ``answer`` tells that it has ended
            self.connection.send_bytes(pickled)

    def answer(self) -> Any:
        """What the oldest share came to that it was asked for, and has not answered yet."""
        try:
            if not self.connection.poll(TIMEOUT_S):
                told = f"a process that reads data took more than {TIMEOUT_S} s for a share of a batch"
                raise DataError(f"{told}: look at its storage, or use more --data.workers")
            made = self.connection.recv()
        except (OSError, EOFError, RuntimeError) as error:
            raise DataError(self.tell_end(error)) from error
        if isinstance(made, _Failed):
            raise made.error from RuntimeError(made.stack)
        return made

    def tell_end(self, error: Exception) -> str:
        """Says how it ended, or that it did not, and what may help."""
        self.process.join(1)
        code = self.process.exitcode
        if code is None:
            return f"what a process that reads data sent did not arrive ({_words(error)}): {SCARCE}"
        if code >= 0:
            return f"a process that reads data ended with code {code} (what it said, if anything, stands above)"
        names: dict[int, str] = {number: number.name for number in signal.Signals}
        told = f"a process that reads data was killed ({names.get(-code, -code)})"
        scarce: dict[int, str] = {signal.SIGKILL: "memory", signal.SIGBUS: "shared memory (/dev/shm)"}
        return f"{told}: with too little {scarce[-code]} use fewer --data.workers" if -code in scarce else told

    def end(self) -> None:
        if self.process.pid is not None:
            self.process.kill()  # it may be busy, and heeds no SIGTERM
            self.process.join(END_S)
        self.connection.close()


# What runs in such a process


class _Failed(NamedTuple):
    """What a reader met, as a value, so that it is raised in the trainer with its own type and sentence."""

    error: Exception
    stack: str


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)  # the others are other readers' and the trainer's
    sent: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, sent), daemon=True).start()
    read = pickle.loads(sent.get())
    while True:
        made = _answer(read, sent.get())
        with contextlib.suppress(OSError):  # nobody takes it: this process ends presently
            connection.send_bytes(made)


def _receive(connection: Connection, sent: queue.SimpleQueue[bytes]) -> None:
    """Takes what is sent while shares are read, so that the trainer need not wait as it asks.

    Nothing comes any more where the trainer has ended, or closed its side: then this process ends too, at once.
    """
    try:
        while True:
            sent.put(connection.recv_bytes())
    finally:
        os._exit(1)


def _answer(read: Callable[[Any], Any], share: bytes) -> memoryview:
    """What a share came to, pickled; tensors as files in memory, which the trainer opens."""
    try:
        made = read(pickle.loads(share))
    except Exception as error:
        made = _Failed(_picklable(error), f"in a process that reads data:\n{traceback.format_exc()}")
    try:
        return ForkingPickler.dumps(made)
    except Exception as error:
        told = f"what a process that reads data has read cannot be sent ({_words(error)})"
        helps = f": {SCARCE}" if isinstance(error, (OSError, RuntimeError)) else ""
        return ForkingPickler.dumps(_Failed(DataError(told + helps), traceback.format_exc()))


def _picklable(error: Exception) -> Exception:
    """The error, or where it does not survive the way to another process, its words."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(_words(error))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
