"""Puts runs side by side: ``python experiments/compare.py runs/a runs/b --out runs/a-and-b``.

Tells which settings differ, the first logged step at which draws or losses do, losses at a few steps and the last
figures; writes that as report.md, with curves.png and the runs' sample grids in samples.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from odit import comparison, health, media
from odit.storage import whole


@dataclass(frozen=True)
class Compare:
    """Which runs, and where to write."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of two or more runs; the others are held against the first."""
    out: Path = Path("runs/compared")
    """Folder for the report and pictures."""
    steps: int = 8
    """Rows in a table of losses."""
    plot: bool = True
    """Draws curves.png, with matplotlib."""


def main(args: Compare) -> None:
    """Reads, tells and draws."""
    if len(args.runs) < 2:
        raise ValueError(f"runs has {len(args.runs)} folder: give two or more")
    if args.steps < 2:
        raise ValueError(f"steps is {args.steps}: use 2 or more")
    if args.plot:
        media.check_plots("--no-plot")
    runs = comparison.read(args.runs)
    told = comparison.report(runs, args.steps)
    with whole(args.out / "report.md") as temporary:
        temporary.write_text(told, encoding="utf-8")
    print(told)
    written = [f"{args.out}/report.md"]
    if args.plot:
        comparison.save_plot(args.out / "curves.png", runs)
        written.append("curves.png")
    step = comparison.save_samples(args.out / "samples.png", runs)
    written += [] if step is None else [f"samples.png (step {step})"]
    print(f"written: {', '.join(written)}{'; the runs have no sample grid of one step' * (step is None)}")


def cli() -> None:
    """Reads the command line."""
    main(tyro.cli(Compare, description=__doc__))


if __name__ == "__main__":
    health.run(cli)
