"""How a process that reads data is started by the trainer: it heeds no signal to the job.

A signal to the whole job asks the trainer to save and leave; who reads for it serves it until then, and ends with it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Processes started inside never get ``SIGNALS``, from before their first instruction: a mask is inherited. This
    thread gets its own afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
