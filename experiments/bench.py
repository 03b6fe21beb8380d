"""Measures: ``python experiments/bench.py kernels | attention | optimizer | train | sample | save | zero | sequence |
encoders | rates | forecasts``. One JSON object a row; rates also writes what experiments/plan.py forecasts by;
``table`` makes Markdown of rows."""

from __future__ import annotations

from collections.abc import Callable

import tyro

from odit import health
from odit.bench import (
    attention,
    encoders,
    forecasts,
    kernels,
    optimizer,
    rates,
    sample,
    save,
    sequence,
    table,
    train,
    zero,
)

BENCHES: dict[str, Callable] = {
    "kernels": kernels.kernels,
    "attention": attention.attention_rows,
    "optimizer": optimizer.optimizer,
    "train": train.train_rows,
    "sample": sample.sample_rows,
    "save": save.save_rows,
    "zero": zero.zero,
    "sequence": sequence.sequence,
    "encoders": encoders.encoders,
    "rates": rates.rates,
    "forecasts": forecasts.forecasts,
    "table": table.table,
}


def cli() -> None:
    """Reads the command line: what to measure, and its settings."""
    tyro.extras.subcommand_cli_from_dict(BENCHES, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    health.run(cli)
