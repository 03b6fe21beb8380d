"""Measures: ``python experiments/bench.py zero | sequence | encoders | attention | kernels``. One JSON object a row."""

from __future__ import annotations

from collections.abc import Callable

import tyro

from odit import health
from odit.bench import attention, encoders, kernels, sequence, zero

BENCHES: dict[str, Callable] = {
    "zero": zero.zero,
    "sequence": sequence.sequence,
    "encoders": encoders.encoders,
    "attention": attention.attention_rows,
    "kernels": kernels.kernels,
}


def cli() -> None:
    """Reads the command line: what to measure, and its settings."""
    tyro.extras.subcommand_cli_from_dict(BENCHES, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    health.run(cli)
