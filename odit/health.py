"""How a run ends: one sentence for what a user can mend, an exit code a kind, and the name of the first bad tensor."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from odit import tree
from odit.data import DataError

# RELIABILITY: 2 config, 3 checkpoint, 4 data, 5 numeric, 6 storage, 7 distributed
CONFIG, CHECKPOINT, DATA, NUMERIC, STORAGE = 2, 3, 4, 5, 6


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


class NumericError(ValueError):
    """Numbers that went bad for good, and where."""


def first_bad(named: tree.Tree) -> str | None:
    """Path of the first leaf with a NaN or an infinity; None where all are finite."""
    for path, leaf in tree.items(named):
        if not bool(torch.isfinite(leaf).all()):
            return path
    return None


def run(main: Callable[[], None]) -> None:
    """Runs a script's main function; an error a user can mend becomes one line on stderr and its exit code."""
    try:
        main()
    except CheckpointError as error:
        _leave(error, CHECKPOINT)
    except DataError as error:
        _leave(error, DATA)
    except NumericError as error:
        _leave(error, NUMERIC)
    except ValueError as error:
        _leave(error, CONFIG)
    except OSError as error:
        _leave(error, STORAGE)


def _leave(error: Exception, code: int) -> None:
    if "ODIT_TRACEBACK" in os.environ:
        raise error
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
