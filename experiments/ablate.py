"""Remakes an ablation: ``python experiments/ablate.py samplers --out runs/ablate-samplers --processes 2``.

Runs what is missing of a grid, in as many processes at a time as told, and writes table.md, table.csv and plot.png. The
same command goes on after a stop. Runs are normal ones under OUT/runs: ``tensorboard --logdir OUT/runs``.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from odit import ablation, health, media
from odit.ablation import running, table
from odit.ablation.grid import judged_metrics
from odit.storage import whole, write_json


@dataclass(frozen=True)
class Ablate:
    """Which grid, and how much of it is run where."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """The grid; left out, all are listed."""
    out: Path | None = None
    """Folder of its runs and tables: runs/ablate-NAME unless given."""
    grids: Path | None = None
    """A Python file of your own whose GRIDS is {name: odit.ablation.Grid}, instead of the shipped ones."""
    list: bool = False
    """Lists the grid's cells, or those of the share, and what is left out, and runs nothing."""
    processes: int = 1
    """Runs at a time; numbers do not depend on it, times do."""
    shard: str = "1/1"
    """i/n: only the i-th share of n of the runs, for one of several machines; then once without it for the table."""
    seeds: tuple[int, ...] = ()
    """The grid's own unless given."""
    steps: int | None = None
    """Length of every run; the grid's own unless given."""
    judged: int | None = None
    """Samples by which a run is judged, where a metric of the grid needs them; the grid's own unless given."""
    threads: int | None = None
    """CPU threads of each run, the grid's own (1) unless given; a run of another number may differ in its last bits."""
    plot: bool = True
    """Draws plot.png, with matplotlib."""


def main(args: Ablate) -> None:
    """Finds the grid, completes it and writes its tables; failed runs are told last, and end it with an error."""
    grids = ablation.GRIDS if args.grids is None else own_grids(args.grids)
    if args.name is None:
        check_nameless(args, grids)
        print("\n".join(f"{name}: {grid.about} {describe(grid)}" for name, grid in grids.items()))
        return
    if args.name not in grids:
        raise ValueError(f"grid {args.name!r} is not there: use one of {', '.join(grids)}")
    part, parts = parse_shard(args.shard)
    if args.processes < 1:
        raise ValueError(f"processes is {args.processes}: use 1 or more")
    grid = override(grids[args.name], args)
    trials, left_out = ablation.trials(grid)
    print("\n".join([f"{args.name}: {grid.about} {describe(grid)}", *told_left_out(left_out)]), flush=True)
    keys = {trial.train_key for trial in trials}
    shared = running.share(keys, part, parts)
    mine = [trial for trial in trials if trial.train_key in shared]
    if parts > 1:
        few = f": use {len(keys)} shares or fewer" if not mine else ""
        print(f"share {args.shard} has {len(shared)} of {len(keys)} training runs{few}", flush=True)
    if args.list:
        for t in mine:
            print(f"{t.train_key} {t.judge_key} {', '.join(t.cell)}, seed {t.run.seed}")
        return
    if args.plot:
        media.check_plots("--no-plot")
    out = args.out or Path("runs") / f"ablate-{args.name}"
    check_out(out, args.name)
    failed = running.complete(mine, out, args.processes)
    write(args, grid, trials, left_out, out)
    if failed:
        lines = "\n".join(f"{name}: {reason}" for name, reason in failed.items())
        sys.exit(f"error: {len(failed)} of the runs failed; the same command tries them again\n{lines}")


def check_nameless(args: Ablate, grids: dict[str, ablation.Grid]) -> None:
    """Raises ValueError for an option that would be of no use, as no grid is named."""
    for setting in dataclasses.fields(args):
        if setting.name not in ("name", "grids", "list") and getattr(args, setting.name) != setting.default:
            raise ValueError(f"{setting.name} is given without a grid: name one of {', '.join(grids)}")


def check_out(out: Path, name: str) -> None:
    """Raises ValueError for a folder whose table is another grid's, and for what is no folder."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out} is a file: use a folder")
    path = out / "grid.json"
    if path.exists() and (other := json.loads(path.read_text(encoding="utf-8")).get("name")) != name:
        raise ValueError(f"out {out} holds the table of the grid {other!r}: use another --out for {name!r}")


def write(args: Ablate, grid: ablation.Grid, trials, left_out, out: Path) -> None:
    """Writes what there is so far, and prints the table."""
    found = table.rows(grid, trials, out)
    notes = [*table.versions(found), *told_left_out(left_out)]
    told = table.markdown(grid, str(args.name), found, notes)
    for name, text in (("table.md", told), ("table.csv", table.comma_separated(grid, found))):
        with whole(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    cells = [{"cell": t.cell, "seed": t.run.seed, "run": t.train_key, "judged": t.judge_key} for t in trials]
    write_json(out / "grid.json", {"name": args.name, "axes": [axis.name for axis in grid.axes], "trials": cells})
    if args.plot:
        table.save_plot(out / "plot.png", grid, found)
    print(told)
    if missing := sum(not running.is_done(trial, out) for trial in trials):
        print(f"{missing} of {len(trials)} trials are missing")
    print(f"written: {out}/table.md, table.csv, grid.json{', plot.png' if args.plot else ''}")


def override(grid: ablation.Grid, args: Ablate) -> ablation.Grid:
    """The grid with what the command line says of it."""
    given = {name: value for name in ("steps", "threads") if (value := getattr(args, name)) is not None}
    taken = {key for axis in grid.axes for choice in axis.choices for key in choice.settings}
    if clash := sorted(taken & given.keys()):
        raise ValueError(f"{clash[0]} is given, but it is an axis of the grid {args.name}: leave it out")
    if args.judged is not None and not judged_metrics(grid):
        raise ValueError(f"judged is {args.judged}, but the grid {args.name} has no judge: leave it out")
    return dataclasses.replace(
        grid,
        settings={**grid.settings, **given},
        seeds=args.seeds or grid.seeds,
        judged=grid.judged if args.judged is None else args.judged,
    )


def describe(grid: ablation.Grid) -> str:
    """Its size, in a few words."""
    return f"({' x '.join(f'{len(axis.choices)} {axis.name}' for axis in grid.axes)}, {len(grid.seeds)} seeds)"


def told_left_out(left_out: dict[tuple[str, ...], str]) -> list[str]:
    """A line for each reason why cells are left out, with their number and the first."""
    reasons: dict[str, list[tuple[str, ...]]] = {}
    for cell, reason in left_out.items():
        reasons.setdefault(reason, []).append(cell)
    return [f"Left out {len(cells)}, such as {', '.join(cells[0])}: {reason}." for reason, cells in reasons.items()]


def own_grids(path: Path) -> dict[str, ablation.Grid]:
    """The grids that a Python file defines; raises ValueError with the file and what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"grids {path} is {'no file' if path.exists() else 'not there'}: give a Python file of grids")
    try:
        found = runpy.run_path(str(path)).get("GRIDS")
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f" (line {lines[-1]})" if lines else ""  # a syntax error tells its own
        why = " ".join(str(error).split())
        raise ValueError(f"grids {path} cannot be read: {type(error).__name__}: {why}{where}") from error
    if not isinstance(found, dict) or not found or not all(isinstance(g, ablation.Grid) for g in found.values()):
        raise ValueError(f"grids {path} defines no GRIDS of grids: write GRIDS = {{'name': odit.ablation.Grid(...)}}")
    return found


def parse_shard(text: str) -> tuple[int, int]:
    """'2/4' -> (1, 4)."""
    words = text.split("/")
    if len(words) != 2 or not all(word.isdigit() for word in words) or not 1 <= int(words[0]) <= int(words[1]):
        raise ValueError(f"shard is {text!r}: use i/n such as 1/4 for the first of four shares")
    return int(words[0]) - 1, int(words[1])


def cli() -> None:
    """Reads the command line."""
    main(tyro.cli(Ablate, description=__doc__))


if __name__ == "__main__":
    health.run(cli)
