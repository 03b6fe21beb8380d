"""Saving beside training: a copy of the state in host memory, and a thread that writes it while the run goes on."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from odit import tree
from odit.parallel import mesh as meshes
from odit.plan import Plan
from odit.saving import ROLES, Job, Talk, job, write
from odit.storage import DISK, Disk, StorageError
from odit.train import TrainState


class Saver:
    """Saves of one run. In the background: a copy of the state is taken, and a thread writes it while training goes on.

    One save is in flight at most; an error of it is raised on all ranks after the same step (``at_step``), or where it
    is waited for: by the next save, and when this context ends.
    """

    def __init__(self, plan: Plan, background: bool, disk: Disk = DISK):
        self.plan, self.disk = plan, disk
        self.store, axis = meshes.store(), plan.layout.axis
        self.rank, self.size = axis.rank, axis.size
        self.copies = Copies(plan) if background else None
        # a connection of the thread's own: one that waits is blocked
        self.thread_store = self.store.clone() if background and self.size > 1 else None
        self.flight: Flight | None = None

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Saves a state, or starts to; raises StorageError of this save or of the one before."""
        self.settle()
        found, talk = job(self.plan, state, about), Talk(self.store, self.rank, self.size)
        if self.copies is None:
            write(found, talk, self.disk)
            return
        copied, ready = self.copies.take(found)
        self.flight = Flight(talk)
        self.flight.start(self._background, copied, ready, talk.over(self.thread_store))

    def _background(self, copied: Job, ready: Callable[[], None], talk: Talk) -> None:
        ready()
        write(copied, talk, self.disk)

    def at_step(self, step: int) -> None:
        """Looks, after a step, whether the save in flight has ended; raises its error after the same step on all ranks.

        Rank 0 announces the next step as the one at which all of them look: no other rank ends that step before rank 0
        has begun it. Others ask the store once a step while a save is in flight.
        """
        if self.flight is None:
            return
        if self.size > 1:
            if self.rank == 0 and self.flight.ended() and not self.flight.announced:
                self.flight.announced = True
                self.store.set(f"{self.flight.talk.name}/settled", str(step + 1))
            key = f"{self.flight.talk.name}/settled"
            due = self.store.check([key]) and int(self.store.get(key)) <= step
        else:
            due = self.flight.ended()
        if due:
            self.settle()

    def settle(self) -> None:
        """Waits for the save in flight; raises its error."""
        flight, self.flight = self.flight, None
        if flight is not None:
            flight.join()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.settle()
        elif isinstance(error, Exception) and not (isinstance(error, meshes.RanksLost) or meshes.broken(error)):
            try:
                self.settle()
            except Exception as later:  # the first error is the one to tell, but a disk that is full for a small file
                if isinstance(later, StorageError) and isinstance(error, OSError):  # was filled by the save
                    raise
        if self.copies is not None and self.flight is None:
            self.copies.release()


class Flight:
    """A save in flight: its thread and, when that has ended, its error."""

    def __init__(self, talk: Talk):
        self.talk, self.announced = talk, False
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def start(self, fn: Callable, *args: Any) -> None:
        """Runs ``fn(*args)`` in a thread."""

        def run() -> None:
            try:
                fn(*args)
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def ended(self) -> bool:
        """Whether nothing is to be waited for."""
        return not self.thread.is_alive()

    def join(self) -> None:
        """Waits for the end; raises the error."""
        self.thread.join()
        if self.error is not None:
            raise self.error


class Copies:
    """Host memory for a copy of what this rank owns of a state, kept from save to save.

    Page-locked for a GPU, where copies run on a stream of their own; training's next kernels wait for them, the host
    does not. A thread makes the memory meanwhile: locking it takes some tenths of a second a GiB.
    """

    def __init__(self, plan: Plan):
        self.plan, self.device = plan, plan.device
        self.side = torch.cuda.Stream(plan.device) if plan.device.type == "cuda" else None
        self.index = torch.cuda.current_device() if self.side is not None else None
        self.flat: torch.Tensor | None = None
        self.lack = ""
        """Why there is none."""
        self.maker = threading.Thread(target=self._make, name="checkpoint memory", daemon=True)
        self.maker.start()

    def _make(self) -> None:
        rank, size = self.plan.layout.axis.rank, 0
        for p, spec in zip(tree.leaves(self.plan.declared), tree.leaves(self.plan.layout.specs)):
            size += len(ROLES) * spec.owns(rank) * torch.Size(spec.local_shape(p.shape)).numel()
        try:
            self.flat = self._locked(torch.empty(size))
        except RuntimeError as error:  # the allocator's or the driver's; ``take`` raises it, where somebody hears
            reason = str(error).splitlines()[0].split("] err == 0. ")[-1]  # without the place in a C++ source
            self.lack = (
                f"checkpoint_async needs {4 * size} bytes of host memory for a copy of the state and {_available()} "
                f"({reason}): use --no-checkpoint-async"
            )

    def _locked(self, flat: torch.Tensor) -> torch.Tensor:
        """The same memory, page-locked for a GPU."""
        if self.side is not None and len(flat):
            torch.cuda.set_device(self.index)  # a new thread is on the first GPU
            # not pin_memory: that rounds sizes up to powers of two
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), 4 * len(flat), 0))
        return flat

    def take(self, job: Job) -> tuple[Job, Callable[[], None]]:
        """The job with copies of its tensors, and what waits until they are made; raises ValueError without memory."""
        self.maker.join()
        if self.flat is None:
            raise ValueError(self.lack)
        slots = self.flat.split([x.numel() for x in job.pieces.values()])
        copies = {name: slot.view(x.shape) for (name, x), slot in zip(job.pieces.items(), slots)}
        if self.side is None:
            for name, x in job.pieces.items():
                copies[name].copy_(x)
            return job._replace(pieces=copies), lambda: None
        now = torch.cuda.current_stream(self.device)
        self.side.wait_stream(now)
        with torch.cuda.stream(self.side):
            for name, x in job.pieces.items():
                copies[name].copy_(x, non_blocking=True)
            done = self.side.record_event()
        now.wait_event(done)  # or the next update would overtake the copy
        return job._replace(pieces=copies), done.synchronize

    def release(self) -> None:
        """Gives the memory back."""
        self.maker.join()
        if self.side is not None and self.flat is not None and self.flat.numel():
            torch.cuda.cudart().cudaHostUnregister(self.flat.data_ptr())
        self.flat = None


def _available() -> str:
    """What the machine says of its memory."""
    try:
        told = re.search(r"^MemAvailable: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        told = None
    return f"{1024 * int(told[1])} are available" if told else "nobody can tell how many are available"
