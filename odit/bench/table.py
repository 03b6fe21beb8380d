"""Rows of the other benchmarks as tables for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# What a table shows of rows of a kind: (title, key); rows are of the kind whose keys they have.
KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "kernel": (("kernel", "name"), ("eager ms", "eager_ms"), ("compiled", "compile_ms"), ("fused", "fused_ms"),
               ("GB/s", "gb_per_s"), ("of a copy", "of_copy")),
    "optimizer": (("update", "name"), ("parameters", "parameters"), ("foreach ms", "foreach_ms"),
                  ("PyTorch's fused", "torch_fused_ms"), ("one pass", "fused_ms"), ("of a copy", "of_copy")),
    "train": (("model", "preset"), ("batch", "batch"), ("at once", "micro_batch"), ("way", "way"), ("ms", "ms"),
              ("samples/s", "samples_per_s"), ("TFLOP/s", "tflops"), ("peak GiB", "peak_gib"),
              ("taken GiB", "reserved_gib")),
    "sample": (("model", "preset"), ("pictures", "images"), ("way", "way"), ("s", "s"), ("first one", "start_s")),
    "encoders": (("model", "preset"), ("latents", "name"), ("ms", "ms"), ("samples/s", "samples_per_s"),
                 ("in encoders", "encoders_share"), ("peak GiB", "peak_gib")),
    "plan": (("model, batch", "layout"), ("ms predicted", "predicted_ms"), ("measured", "ms"), ("off", "ms_off"),
             ("peak GiB predicted", "predicted_gib"), ("measured", "peak_gib"), ("off", "gib_off")),
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Markdown of the rows in a file, a table a kind."""

    path: Path
    """JSON rows, one a line; others are passed over."""


def table(cfg: Table) -> None:
    """Prints the tables."""
    rows = read_rows(cfg.path)
    if not (told := markdown(rows)):
        raise ValueError(
            f"path {cfg.path} has {len(rows)} rows, none of a kind with a table: give rows of {', '.join(KINDS)}"
        )
    print(told)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; raises ValueError for a file that is not there or of other JSON."""
    if not path.is_file():
        raise ValueError(f"path {path} is no file: give one of rows, such as bench.py train prints")
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"path {path} line {number} is no whole row: use one JSON object a line") from error
    return found


def markdown(rows: list[Row]) -> str:
    """The tables of rows that have all that a kind shows, each below the other."""
    found = []
    for columns in KINDS.values():
        of_kind = [row for row in rows if all(key in row for _, key in columns)]
        rows = [row for row in rows if row not in of_kind]
        if of_kind:
            lines = [[title for title, _ in columns], ["---"] * len(columns)]
            lines += [[shown(row[key], key) for _, key in columns] for row in of_kind]
            found.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(found)


def shown(value: Any, key: str) -> str:
    """A value as a table has it: shares in percent, numbers to four digits."""
    if key in ("of_copy", "encoders_share"):
        return f"{100 * value:.0f} %"
    if key.endswith("_off"):
        return f"{100 * value:+.1f} %"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
