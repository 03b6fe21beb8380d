"""Runs what a grid still lacks: a subprocess a training run and a judgement, some at a time.

What is there already is known by files that appear whole when a run or a judgement has ended well, so a grid may be
killed at any point: the same command goes on, and a run that was under way from its newest checkpoint. A trial's
command names all that it depends on, CPU threads included, so neither order nor number of processes matters.
"""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from odit import config, health
from odit.ablation.grid import NO_MEANING, Trial
from odit.ablation.metrics import DONE
from odit.config_json import to_json
from odit.parallel import mesh as meshes
from odit.storage import write_json

SCRIPTS = Path(__file__).parents[2] / "experiments"
LOOK_S = 0.1  # between looks at whether a subprocess has ended


@dataclass(frozen=True)
class Job:
    """One subprocess that a grid needs."""

    name: str
    """For people."""
    command: tuple[str, ...]
    log: Path
    """What it prints."""
    threads: int | None
    """CPU threads it may take."""
    trial: Trial
    folder: Path | None = None
    """The training run's; None of a judgement."""


@dataclass
class _Live:
    """A job that is running."""

    job: Job
    process: subprocess.Popen
    log: TextIO
    began: float
    fresh: bool
    asked: bool = False


def training(trials: Iterable[Trial], out: Path) -> dict[str, Job]:
    """{key: job} of every training run that the trials need, whether it is done or not."""
    return {trial.train_key: _training(trial, out) for trial in reversed(list(trials))}  # named by its first trial


def judging(trials: Iterable[Trial], out: Path) -> dict[str, Job]:
    """{key: job} of every judgement that the trials need, whether it is done or not."""
    return {trial.judge_key: _judging(trial, out) for trial in trials if trial.judged is not None}


def is_trained(trial: Trial, out: Path) -> bool:
    """Whether its training run has ended well."""
    return (trial.folder(out) / DONE).exists()


def is_done(trial: Trial, out: Path) -> bool:
    """Whether nothing of it is missing."""
    return is_trained(trial, out) and (trial.judged is None or trial.judgement(out).exists())


def share(keys: Iterable[str], part: int, parts: int) -> set[str]:
    """The training runs of one machine of several, by their names alone: all machines agree without talking."""
    return set(sorted(set(keys))[part::parts])


def complete(trials: list[Trial], out: Path, processes: int) -> dict[str, str]:
    """Trains and then judges whatever is missing; {job's name: why} of what failed.

    Raises:
        Stopped: a signal came; all subprocesses have ended, runs with a checkpoint.
    """
    missing = [trial for trial in trials if not is_trained(trial, out)]
    failed = run_all(list(reversed(training(missing, out).values())), processes)
    missing = [trial for trial in trials if is_trained(trial, out) and not is_done(trial, out)]
    return failed | run_all(list(judging(missing, out).values()), processes)


def run_all(jobs: list[Job], processes: int) -> dict[str, str]:
    """Runs jobs, ``processes`` at a time; {name: the last line it printed} of those that failed."""
    waiting, live, failed, num_ended = collections.deque(jobs), [], {}, 0
    with health.Signals() as signals:
        try:
            while (waiting and signals.asked is None) or live:
                while waiting and len(live) < processes and signals.asked is None:
                    live.append(_start(waiting.popleft()))
                if signals.asked is not None:
                    _stop(live)
                time.sleep(LOOK_S)
                for one in [one for one in live if one.process.poll() is not None]:
                    live.remove(one)
                    num_ended += 1
                    reason = _end(one)
                    if signals.asked is None:
                        took = f"{time.monotonic() - one.began:.0f} s"
                        print(f"[{num_ended}/{len(jobs)}] {one.job.name}: {reason or took}", flush=True)
                        failed |= {one.job.name: reason} if reason else {}
        finally:
            for one in live:
                one.process.kill()
                one.process.wait()
                one.log.close()
    if signals.asked is not None:
        raise health.Stopped(f"stopped by {signals.asked}: the same command goes on from here")
    return failed


def _start(job: Job) -> _Live:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = open(job.log, "a", encoding="utf-8")
    print(f"$ {' '.join(job.command)}", file=log, flush=True)
    environment = dict(os.environ)
    if job.threads is not None:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads))
    process = subprocess.Popen(
        job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
        start_new_session=True,  # a terminal's Ctrl-C reaches this program alone, which passes it on once
        preexec_fn=meshes.end_with_launcher,
    )  # fmt: skip
    fresh = job.folder is None or not (job.folder / "checkpoints").exists()
    return _Live(job, process, log, time.monotonic(), fresh)


def _stop(live: list[_Live]) -> None:
    """Asks once: a run takes a second signal for a wish to end without a checkpoint."""
    for one in live:
        if not one.asked and one.process.poll() is None:
            one.asked = True
            one.process.send_signal(signal.SIGTERM)


def _end(one: _Live) -> str | None:
    """Marks a training run that ended well as done; why it did not end well, otherwise."""
    one.log.close()
    job = one.job
    if one.process.returncode != 0:
        return f"{last_line(job.log)} (exit code {one.process.returncode}; all of it: {job.log})"
    if job.folder is not None:
        wall = time.monotonic() - one.began if one.fresh else None  # of a run that was cut, nobody knows
        write_json(job.folder / DONE, {"wall_s": wall, "command": list(job.command)})
    return None


def last_line(log: Path) -> str:
    """The last line of a log that says something; of a job that was refused, its error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-20:] if line.startswith("error:")]
    return (errors or lines or ["no word"])[-1]


def _training(trial: Trial, out: Path) -> Job:
    folder = trial.folder(out)
    given = (trial.preset, *flags(trial), "--resume", "latest", "--no-progress", "--out", str(folder))
    launcher = [sys.executable]
    if trial.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(trial.ranks), "--"]
    command = (*launcher, str(SCRIPTS / "train.py"), *given)
    name = f"train {trial.train_key} ({', '.join(trial.cell)}, seed {trial.run.seed})"
    return Job(name, command, out / "logs" / f"{trial.train_key}.txt", trial.run.threads, trial, folder)


def _judging(trial: Trial, out: Path) -> Job:
    sampling, out_file = trial.sampling, trial.judgement(out)
    command = [
        *(sys.executable, str(SCRIPTS / "evaluate.py"), "--checkpoint", str(trial.folder(out) / "ema.safetensors")),
        *("--num", str(trial.judged), "--seed", str(trial.run.seed), "--steps", str(sampling.steps)),
        *("--guidance", str(sampling.guidance.scale), "--device", trial.run.device, "--out", str(out_file)),
    ]
    if sampling.solver is not None:
        command += ["--solver", sampling.solver]
    name = f"judge {trial.judge_key} ({', '.join(trial.cell)}, seed {trial.run.seed})"
    return Job(name, tuple(command), out / "logs" / f"{trial.judge_key}.txt", trial.run.threads, trial)


def flags(trial: Trial) -> list[str]:
    """The command line's words for all that a trial's run changes of its preset."""
    preset = to_json(config.presets()[trial.preset][1])
    found: list[str] = []
    for key, value in _differing(preset, to_json(trial.run)):
        if key not in NO_MEANING:
            *path, last = key.replace("_", "-").split(".")
            if isinstance(value, bool):
                found.append(f"--{'.'.join([*path, last if value else f'no-{last}'])}")
            else:
                words = value if isinstance(value, list) else [value]
                found += [f"--{'.'.join([*path, last])}", *map(str, words)]
    return found


def _differing(a: dict[str, Any], b: dict[str, Any], key: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value in b) of every setting that two configs differ in."""
    for name, value in b.items():
        path = f"{key}.{name}" if key else name
        if isinstance(value, dict):
            yield from _differing(a[name], value, path)
        elif value != a[name]:
            yield path, value
