"""Grids: what a trial means, that only what is missing runs, and that the table is a function of the trials alone."""

import contextlib
import dataclasses
import json
import os
import runpy
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import tyro
from conftest import script

from odit import ablation, config, health
from odit.ablation import Grid, metrics, running, table, trials, values, variants
from odit.config_json import from_json

ablate, train_script, evaluate_script = script("ablate"), script("train"), script("evaluate")

# What stands in for train.py and evaluate.py: it leaves the same files, in a tenth of a second. A line of the file
# "starts" tells each start; a learning rate of 13 fails, and of 7 waits for a signal.
STAND_IN = """
    import json, pathlib, signal, sys, time
    words = sys.argv[1:]
    told = lambda name, default=None: words[words.index(name) + 1] if name in words else default
    out = pathlib.Path(told("--out"))
    if pathlib.Path(__file__).name == "evaluate.py":
        weights = json.loads(pathlib.Path(told("--checkpoint")).read_text())
        out.parent.mkdir(parents=True, exist_ok=True)
        number = weights["lr"] * float(told("--guidance")) + int(told("--seed"))
        out.write_text(json.dumps({"class_accuracy": number, "frechet": 1 / (1 + number)}))
        home = out.parents[2]
    else:
        lr, seed = float(told("--optimizer.lr", 1)), int(told("--seed", 0))
        home = out.parents[1]
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        lines = [{"step": step, "loss": lr / step + seed, "samples_per_s": time.time()} for step in (1, 2, 3)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
        about = {"odit": "1", "git": None, "git_dirty": False, "torch": "2"}
        (out / "config.json").write_text(json.dumps({"_about": about}))
        (out / "ema.safetensors").write_text(json.dumps({"lr": lr}))
    with open(home / "starts", "a") as file:
        file.write(out.name + " " + told("--seed", "0") + chr(10))
    if told("--optimizer.lr") == "13.0":
        sys.exit("error: thirteen")
    if told("--optimizer.lr") == "7.0":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        time.sleep(60)
"""

RATES = values("optimizer.lr", 2, 3, name="rate")
SCALES = values("sampling.guidance.scale", 1.0, 4.0, name="scale")
GRID = Grid(
    "Two rates and two scales.",
    axes=(RATES, SCALES),
    metrics=("class_accuracy", "frechet", "loss", "loss_gap", "samples_per_s", "wall_s"),
    settings={"threads": 1, "steps": 3},
    judged=20,
    curves=True,
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder of scripts that stand in, which jobs start from now on."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("train.py", "evaluate.py"):
        (folder / name).write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(running, "SCRIPTS", folder)
    return folder


@pytest.fixture
def own_grids(monkeypatch):
    """Makes grids available to the command."""
    return lambda **grids: monkeypatch.setattr(ablation, "GRIDS", grids)


def starts(out):
    return (out / "starts").read_text().splitlines()


def command(name, out, plot=False, **settings):
    """Runs a grid; the bytes of what it writes."""
    ablate.main(ablate.Ablate(name, out, plot=plot, **settings))
    return {path: (out / path).read_bytes() for path in ("table.md", "table.csv", "grid.json", "plot.png")[: 3 + plot]}


def exact(csv):
    """The lines of a table that are no times."""
    return [line for line in csv.decode().splitlines() if ",True," not in line]


# ------------------------------------------------------------------------------------------------------ what is a trial


def test_trials_that_differ_in_sampling_alone_share_a_training_run():
    found, left_out = trials(GRID)
    assert not left_out
    assert [(t.cell, t.run.seed) for t in found[:3]] == [(("2", "1.0"), 0), (("2", "1.0"), 1), (("2", "4.0"), 0)]
    assert len(found) == 8 and len({t.train_key for t in found}) == 4 and len({t.judge_key for t in found}) == 8
    assert {t.run.sampling.guidance.scale for t in found} == {1.5}  # the preset's, in every run's own pictures


def test_what_the_judge_cannot_be_told_belongs_to_the_training_run():
    axis = values("sampling.guidance.interval", (0.0, 1.0), (0.2, 0.8))
    assert len({t.train_key for t in trials(dataclasses.replace(GRID, axes=(axis,)))[0]}) == 4


@pytest.mark.parametrize("key, value", [("threads", 2), ("seed", 1), ("optimizer.lr", 2.5), ("parallel.zero", 1)])
def test_a_key_changes_with_each_setting(key, value):
    trial = trials(GRID)[0][0]
    other = dataclasses.replace(trial, run=ablation.grid.changed(trial.run, {key: value}))
    assert trial.train_key != other.train_key and trial.judge_key != other.judge_key


def test_a_key_knows_ranks_and_number_of_samples_but_no_place():
    trial = trials(GRID)[0][0]
    elsewhere = dataclasses.replace(trial.run, out=Path("x"), resume="latest", progress=False)
    assert dataclasses.replace(trial, run=elsewhere).judge_key == trial.judge_key
    assert dataclasses.replace(trial, ranks=2).train_key != trial.train_key
    judged = dataclasses.replace(trial, judged=21)
    assert judged.train_key == trial.train_key and judged.judge_key != trial.judge_key


@pytest.mark.parametrize("name", ablation.GRIDS)
def test_the_shipped_grids_commands_mean_their_trials(name, tmp_path):
    """Read as train.py and evaluate.py read them, the commands of all cells give the trials' settings back."""
    grid = dataclasses.replace(ablation.GRIDS[name], seeds=(5,))
    found, _ = trials(grid)
    assert len(found) >= 6
    for trial in each_choice_once(found, lambda t: t.train_key):
        job = running.training([trial], tmp_path)[trial.train_key]
        words = job.command[job.command.index(str(running.SCRIPTS / "train.py")) + 1 :]
        run = tyro.extras.overridable_config_cli({"digits": config.presets()["digits"]}, args=list(words))
        assert dataclasses.replace(run, out=trial.run.out, resume=None, progress=True) == trial.run
        assert (run.out, run.resume) == (trial.folder(tmp_path), "latest")
        assert (trial.ranks > 1) == ("torch.distributed.run" in job.command)
    for trial in each_choice_once(found, lambda t: t.judge_key) if grid.judged else []:
        job = running.judging([trial], tmp_path)[trial.judge_key]
        args = tyro.cli(evaluate_script.Evaluate, args=list(job.command[2:]))
        assert (args.num, args.seed, args.out) == (grid.judged, 5, trial.judgement(tmp_path))
        own = dataclasses.replace(trial.run.sampling, steps=args.steps, solver=args.solver or trial.run.sampling.solver)
        assert dataclasses.replace(own, guidance=config.Guidance(scale=args.guidance)) == trial.sampling


def each_choice_once(found, key):
    """Trials of different keys, until every choice of every axis has come."""
    seen, keys = set(), set()
    for trial in found:
        choices = set(enumerate(trial.cell))
        if not choices <= seen and key(trial) not in keys:
            seen |= choices
            keys.add(key(trial))
            yield trial


def test_a_run_of_a_command_is_the_trials(tmp_path):
    """A real run of two steps: the config that it writes has the key of its folder."""
    small = {"model.width": 16, "model.depth": 1, "model.heads": 2, "steps": 2, "sampling.steps": 1}
    trial = trials(dataclasses.replace(GRID, settings={**small, "threads": 1, "validation_draws": 1}))[0][-1]
    words = running.training([trial], tmp_path)[trial.train_key].command[2:]
    train_script.main(tyro.extras.overridable_config_cli(config.presets(), args=list(words)))
    told = json.loads((trial.folder(tmp_path) / "config.json").read_text())
    del told["_about"]
    assert dataclasses.replace(trial, run=from_json(config.Run, told)).train_key == trial.train_key
    assert (trial.folder(tmp_path) / "ema.safetensors").exists()


def test_cells_that_cannot_run_are_left_out_with_the_reason():
    objectives = variants("objective", {"flow": {}, "eps": ablation.shipped.OBJECTIVES.choices[1].settings})
    solvers = values("sampling.solver", "heun", "ddim")
    found, left_out = trials(dataclasses.replace(GRID, axes=(objectives, solvers)))
    assert {t.cell for t in found} == {("flow", "heun"), ("eps", "ddim")}
    assert "which does not solve a flow" in left_out["flow", "ddim"]
    with pytest.raises(ValueError, match="no cell of the grid can run, the first because solver is 'ddim'"):
        trials(dataclasses.replace(GRID, axes=(values("sampling.solver", "ddim"),)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"preset": "digit"}, "preset is 'digit': use one of digits"),
        ({"metrics": ("fid",)}, "metric 'fid': use some of class_accuracy"),
        ({"metrics": ()}, "no metrics"),
        ({"judged": None}, "metric 'class_accuracy' but judged is None"),
        ({"seeds": (1, 1)}, "seeds are 1 1: give each once"),
        ({"axes": (values("optimizer.lr", 1, 1),)}, "each of its own name"),
        ({"axes": (values("optimizer.rl", 1),)}, "optimizer.rl is no setting of this version: use one of lr"),
        ({"axes": (values("seed.lr", 1),)}, "seed has no parts"),
        ({"axes": (values("optimizer.lr", "x"),)}, "optimizer.lr is 'x'"),
        ({"axes": (values("seed", 3, 6),)}, r"axis 'seed' changes seed, .*: use seeds=\(3, 6\)"),
        ({"axes": (values("out", "a", "b"),)}, "axis 'out' changes out, which each trial sets: use ablate.py's --out"),
        ({"settings": {"seed": 7}}, r"settings have seed, which each trial sets: use seeds=\(7,\)"),
        ({"settings": {"resume": "latest"}}, "settings have resume, .*: leave it out"),
        ({"axes": (RATES, variants("b", {"x": {"optimizer.lr": 3}}))}, "optimizer.lr is in two axes: 'rate' and 'b'"),
        ({"axes": (RATES, variants("b", {"x": {"optimizer": {}}}))}, "optimizer is in two axes: 'rate' and 'b'"),
        ({"axes": RATES}, r"the grid's axes is Axis\(.*comma included"),
        ({"axes": (ablation.Axis("a", RATES.choices[0]),)}, "axis 'a' has choices of another kind"),
        ({"axes": (ablation.Axis("a", (ablation.Choice("x", 3),)),)}, "axis 'a' has choices of another kind"),
        ({"metrics": ("loss")}, r"the grid's metrics is 'loss' \(str\): use a tuple"),
        ({"seeds": 3}, r"the grid's seeds is 3 \(int\): use a tuple of integers such as \(0, 1\)"),
        ({"ranks": 0}, r"the grid's ranks is 0 \(int\): use 1 or more"),
        ({"judged": 19}, r"the grid's judged is 19 \(int\): use None, or 20 or more"),
        ({"settings": ("steps", 3)}, "the grid's settings is .*: use a dict"),
        ({"metrics": ("loss",)}, "the grid's judged is 20 but no metric needs it: leave it out"),
        ({"preset": "dit-s-8"}, "no cell of the grid can run, the first because data.source is synthetic.*no judge"),
    ],
)
def test_a_grid_without_meaning_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        trials(dataclasses.replace(GRID, **changes))


def test_an_axis_goes_before_the_settings():
    rates = [t.run.optimizer.lr for t in trials(dataclasses.replace(GRID, settings={"optimizer.lr": 9}, seeds=(0,)))[0]]
    assert rates == [2, 2, 3, 3]


def test_cells_without_a_judge_are_left_out():
    axis = variants("data", {"digits": {}, "latents": {"data.source": "latents", "data.path": "x"}})
    found, left_out = trials(dataclasses.replace(GRID, axes=(axis,)))
    assert {t.cell for t in found} == {("digits",)} and "data.source is latents, which has no" in left_out["latents",]


def test_cells_whose_judge_could_not_be_tried_are_left_out():
    found, left_out = trials(dataclasses.replace(GRID, axes=(values("data.held_out", 0.0, 1e-4, 0.2),)))
    assert {t.run.data.held_out for t in found} == {0.2}
    why = "data.held_out is {} but judged needs held-out digits for its judge"
    assert [line.split(":")[0] for line in left_out.values()] == [why.format(0.0), why.format(1e-4)]


# ----------------------------------------------------------------------------------------------------------- what runs


def test_one_and_two_processes_make_the_same_table_and_a_rerun_starts_nothing(stand_in, own_grids, tmp_path, capfd):
    own_grids(two=GRID)
    first = command("two", tmp_path / "a", processes=1, plot=True)
    second = command("two", tmp_path / "b", processes=2)
    assert exact(first["table.csv"]) == exact(second["table.csv"]) and first["grid.json"] == second["grid.json"]
    assert sorted(starts(tmp_path / "a")) == sorted(starts(tmp_path / "b")) and len(starts(tmp_path / "a")) == 4 + 8
    assert command("two", tmp_path / "a", processes=2, plot=True) == first
    assert len(starts(tmp_path / "a")) == 12
    assert "| 3 | 4.0 | **12.5 ± 0.7** |" in first["table.md"].decode()
    assert "loss gap" in first["table.md"].decode() and "missing" not in capfd.readouterr().out


def test_only_what_is_missing_runs(stand_in, own_grids, tmp_path):
    own_grids(two=GRID)
    first = command("two", tmp_path)
    found, _ = trials(GRID)
    found[2].judgement(tmp_path).unlink()
    (found[-1].folder(tmp_path) / metrics.DONE).unlink()  # as of a run that was killed before it ended
    (tmp_path / "starts").unlink()
    again = command("two", tmp_path)
    assert starts(tmp_path) == [f"{found[-1].train_key} 1", "evaluation.json 0"]
    assert exact(first["table.csv"]) == exact(again["table.csv"])
    assert "(n = 1)" in again["table.md"].decode()  # nobody knows how long a run took that was cut


def test_a_run_that_fails_is_told_and_the_others_go_on(stand_in, own_grids, tmp_path, capsys):
    own_grids(two=dataclasses.replace(GRID, axes=(values("optimizer.lr", 13, 2, name="rate"),)))
    with pytest.raises(SystemExit, match=r"2 of the runs failed(.|\n)*13, seed 0\): error: thirteen \(exit code 1"):
        command("two", tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| 13 | missing |" in text and "| 2 | 3.5 ± 0.7 |" in text
    assert "2 of 4 trials are missing" in capsys.readouterr().out


def test_shares_of_several_machines_make_the_whole(stand_in, own_grids, tmp_path):
    own_grids(two=dataclasses.replace(GRID, axes=(RATES,), judged=None, metrics=("loss",)))
    whole = command("two", tmp_path / "whole")
    for part in (1, 2, 3):
        command("two", tmp_path / "parts", shard=f"{part}/3")
    assert len(starts(tmp_path / "parts")) == 4
    assert exact(command("two", tmp_path / "parts")["table.csv"]) == exact(whole["table.csv"])
    assert len(starts(tmp_path / "parts")) == 4
    keys = [t.train_key for t in trials(GRID)[0]]
    shares = [running.share(reversed(keys), part, 3) for part in range(3)]
    assert set.union(*shares) == set(keys) and sum(map(len, shares)) == len(set(keys))


def test_a_signal_stops_the_runs_after_their_step(stand_in, tmp_path):
    jobs = list(
        running.training(trials(dataclasses.replace(GRID, axes=(values("optimizer.lr", 7),)))[0], tmp_path).values()
    )
    ended = threading.Thread(target=ask_to_stop, args=(tmp_path,))
    ended.start()
    with pytest.raises(health.Stopped, match="stopped by SIGTERM: the same command goes on"):
        running.run_all(jobs, processes=1)
    ended.join()
    assert len(starts(tmp_path)) == 1  # the second was not begun
    assert not list(tmp_path.glob(f"runs/*/{metrics.DONE}"))


def ask_to_stop(out):
    wait_for(out / "starts")
    time.sleep(0.2)  # its handler comes after
    os.kill(os.getpid(), signal.SIGTERM)


def wait_for(path, seconds=30):
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert path.exists()


def test_runs_end_with_a_grid_that_is_killed(stand_in, tmp_path):
    """SIGKILL of the command leaves no process behind, and the same command goes on."""
    grids = tmp_path / "grids.py"
    grids.write_text(
        "from odit.ablation import Grid, running, values\nfrom pathlib import Path\n"
        f"running.SCRIPTS = Path({str(stand_in)!r})\n"
        "GRIDS = {'slow': Grid('x', (values('optimizer.lr', 7),), ('loss',), settings={'threads': 1})}\n"
    )
    root, out = Path(__file__).parent.parent, tmp_path / "out"
    line = [sys.executable, root / "experiments/ablate.py", "slow", "--grids", grids, "--out", out, "--processes", "2"]
    line += ["--no-plot"]
    with subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.DEVNULL) as process:
        wait_for(out / "starts")
        process.kill()
    until = time.monotonic() + 5
    while of_grid(out) and time.monotonic() < until:
        time.sleep(0.05)
    assert not of_grid(out)
    (stand_in / "train.py").write_text(textwrap.dedent(STAND_IN).replace("time.sleep(60)", "pass"))
    found = runpy.run_path(str(grids))["GRIDS"]["slow"]
    assert running.complete(trials(found)[0], out, processes=2) == {}
    assert all(running.is_done(trial, out) for trial in trials(found)[0])


def of_grid(out):
    """Processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] if str(out / "runs").encode() in path.read_bytes() else []
    return found


# -------------------------------------------------------------------------------------------- the command, the table


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"name": "threes"}, "grid 'threes' is not there: use one of two"),
        ({"shard": "0/3"}, "shard is '0/3': use i/n"),
        ({"shard": "x"}, "shard is 'x'"),
        ({"processes": 0}, "processes is 0"),
        ({"name": "bare", "judged": 9}, "judged is 9, but the grid bare has no judge"),
        ({"name": "lengths", "steps": 9}, "steps is given, but it is an axis of the grid lengths"),
        ({"judged": 0}, "judged is 0 .*20 or more"),
        ({"name": None}, "out is given without a grid: name one of two, bare, lengths"),
        ({"name": None, "out": None, "seeds": (1,)}, "seeds is given without a grid"),
        ({"out": Path(__file__)}, "out .* is a file: use a folder"),
    ],
)
def test_a_command_line_without_meaning_is_refused(settings, words, own_grids, tmp_path):
    bare = dataclasses.replace(GRID, judged=None, metrics=("loss",))
    own_grids(two=GRID, bare=bare, lengths=dataclasses.replace(GRID, axes=(values("steps", 2, 3),)))
    with pytest.raises(ValueError, match=words):
        ablate.main(ablate.Ablate(**{"name": "two", "out": tmp_path, **settings}))


def test_the_command_makes_up_for_a_judge_that_the_grid_lacks(own_grids, capsys):
    own_grids(two=dataclasses.replace(GRID, judged=None))
    ablate.main(ablate.Ablate("two", judged=20, list=True))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == [
        trial.judge_key for trial in trials(GRID)[0]
    ]


def test_a_share_is_listed_and_an_empty_one_says_so(own_grids, capsys):
    own_grids(two=GRID)
    keys = sorted({trial.train_key for trial in trials(GRID)[0]})
    ablate.main(ablate.Ablate("two", shard="2/3", list=True))
    told = capsys.readouterr().out.splitlines()[1:]
    assert told[0] == "share 2/3 has 1 of 4 training runs" and {line.split()[0] for line in told[1:]} == {keys[1]}
    ablate.main(ablate.Ablate("two", shard="5/5", list=True))
    assert "share 5/5 has 0 of 4 training runs: use 4 shares or fewer" in capsys.readouterr().out


def test_a_folder_of_another_grid_keeps_its_table(stand_in, own_grids, tmp_path):
    own_grids(two=GRID, three=GRID)
    before = command("two", tmp_path)
    with pytest.raises(ValueError, match="holds the table of the grid 'two': use another --out for 'three'"):
        command("three", tmp_path)
    assert command("two", tmp_path) == before


@pytest.mark.parametrize(
    "content, words",
    [
        ("x = 1\nimport nowhere_at_all", r"ModuleNotFoundError: No module named 'nowhere_at_all' \(line 2\)"),
        ("GRIDS = {", r"SyntaxError: '\{' was never closed \(grids.py, line 1\)"),
        ("from odit.ablation import *\nGRIDS = {'a': Grid('x', metric=3)}", r"TypeError: .*'metric' \(line 2\)"),
        (
            "from odit.ablation import *\nGRIDS = {'a': Grid('x', (), (), seeds=3)}",
            r"ValueError: .*seeds is 3 .*line 2",
        ),
        ("GRIDS = {}", "defines no GRIDS of grids"),
        ("", "defines no GRIDS of grids"),
    ],
)
def test_files_of_grids_that_cannot_be_read(content, words, tmp_path):
    path = tmp_path / "grids.py"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^grids .*grids.py .*{words}") as caught:
        ablate.main(ablate.Ablate(grids=path))
    assert "\n" not in str(caught.value)


def test_a_place_without_a_file_of_grids(tmp_path):
    for path, words in ((tmp_path, "is no file"), (tmp_path / "gone.py", "gone.py is not there: give a Python file")):
        with pytest.raises(ValueError, match=words):
            ablate.main(ablate.Ablate(grids=path))


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(stand_in, own_grids, tmp_path, monkeypatch):
    own_grids(two=GRID)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a plot needs matplotlib.*\[plots\].* or use --no-plot"):
        command("two", tmp_path, plot=True)
    assert not (tmp_path / "starts").exists()


def test_mean_and_spread():
    numbers = [3.0, 4.5, 10.0]
    mean, deviation, num = table.spread([3.0, None, 4.5, 10.0])
    assert (mean, num) == (sum(numbers) / 3, 3)
    assert deviation == pytest.approx((sum((x - mean) ** 2 for x in numbers) / 2) ** 0.5, rel=1e-15)
    assert table.spread([2.0]) == (2.0, None, 1) and table.spread([None]) is None


def test_the_best_is_bold_by_the_direction_and_times_never_are():
    cells = [
        table.Row((name,), {"class_accuracy": (x, x), "frechet": (x, x), "samples_per_s": (x, x)}, ())
        for name, x in (("a", 1.0), ("b", 2.0))
    ]
    grid = dataclasses.replace(GRID, axes=(RATES,), metrics=tuple(cells[0].values))
    lines = table.markdown(grid, "x", cells).splitlines()
    assert "| a | 1.0 ± 0.0 | **1.00 ± 0.00** | 1 ± 0 |" in lines
    assert "| b | **2.0 ± 0.0** | 2.00 ± 0.00 | 2 ± 0 |" in lines


def test_a_loss_gap_is_relative_and_over_common_steps():
    a = [{"step": s, "loss": x} for s, x in ((1, 2.0), (2, 4.0), (3, 9.0))] + [{"step": 2, "validation_loss": 1.0}]
    b = [{"step": s, "loss": x} for s, x in ((1, 2.0), (2, 5.0))]
    assert metrics.loss_gap(a, b) == pytest.approx(0.2, rel=1e-15) and metrics.loss_gap(a, []) is None


def test_a_speed_is_the_median_without_the_first():
    lines = [{"step": s, "samples_per_s": x} for s, x in ((1, 1.0), (2, 5.0), (3, 7.0), (4, 90.0))]
    assert metrics.METRICS["samples_per_s"].read(lines) == statistics.median([5.0, 7.0, 90.0])


def test_versions_are_told_and_several_are_pointed_out(tmp_path):
    folders = tuple(tmp_path / name for name in "ab")
    for folder, torch_version in zip(folders, ("2.1", "2.2")):
        folder.mkdir()
        about = {"odit": "1", "git": "f" * 40, "git_dirty": True, "torch": torch_version}
        (folder / "config.json").write_text(json.dumps({"_about": about}))
    (line,) = table.versions([table.Row(("a",), {}, folders)])
    assert "2 versions" in line and "odit 1 (ffffffffffff with changes), torch 2.1; " in line
    assert table.versions([table.Row(("a",), {}, folders[:1])]) == ["odit 1 (ffffffffffff with changes), torch 2.1."]


@pytest.mark.slow
def test_a_real_grid_is_the_same_on_one_and_two_processes(own_grids, tmp_path):
    small = {"model.width": 16, "model.depth": 1, "model.heads": 2, "steps": 4, "log_every": 1, "threads": 1}
    own_grids(real=dataclasses.replace(GRID, settings={**small, "validation_draws": 1, "sampling.steps": 2}))
    found = [command("real", tmp_path / str(num), processes=num) for num in (1, 2)]
    assert exact(found[0]["table.csv"]) == exact(found[1]["table.csv"])
