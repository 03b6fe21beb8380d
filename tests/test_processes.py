"""Jobs of several processes: they start alike, end together, and say whose fault it was."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import conftest
import graphed
import pytest
import torch
import torch.distributed as dist

from odit import checkpoint, crash, health, manifest, peers, saving
from odit.health import NumericError
from odit.parallel import mesh as meshes

ROOT = Path(__file__).parent.parent
START_S, END_S = 90.0, 10.0  # what a start may take on a busy machine, and what an end may
SMALL = ["--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--global-batch", "8", "--log-every", "1"]


# -------------------------------------------------------------------------------- processes that a test starts and ends


tmp_path = conftest.in_memory  # for tests of how long an end takes


def processes(job):
    """Pid -> rank of the live processes of a job, found by the mark that they all inherit; a launcher has rank None."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # another user's, or just gone
        if f"ODIT_JOB={job}" in variables:
            found[int(folder.name)] = next((int(v[5:]) for v in variables if v.startswith("RANK=")), None)
    return found


def pid_of(rank, launcher, job):
    """Of a rank itself, a child of the launcher; it may have started processes, which are marked alike."""
    found = []
    for pid in (pid for pid, marked in processes(job).items() if marked == rank):
        with suppress(OSError):  # gone by now
            found += [pid] if meshes._stat(pid)[1] == str(launcher.pid) else []
    (pid,) = found
    return pid


@contextmanager
def marked(job):
    """The environment of a job; nothing of it is left behind."""
    try:
        settings = {"ODIT_JOB": str(job), "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        yield os.environ | settings | {"GLOO_SOCKET_IFNAME": "lo"}
    finally:
        for pid in processes(job):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_until(true, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.05)
    return bool(true())


@contextmanager
def torchrun(tmp_path, *args, world=4, device="cpu", script=("experiments/train.py",), **environment):
    """A small run of ``world`` ranks under torchrun that has come to its first steps: (launcher, log file).

    On random latents: scikit-learn, which has the digits, would double the time to start.
    """
    log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command += [*script, "dit-s-8", *args, "--out", str(tmp_path / "run"), "--device", device, *SMALL]
    with marked(tmp_path) as env, open(log, "w") as file:
        launcher = subprocess.Popen(command, cwd=ROOT, env=env | environment, stdout=file, stderr=file)
        wait_until(lambda: launcher.poll() is not None or (metrics.exists() and metrics.stat().st_size), START_S)
        assert launcher.poll() is None and metrics.exists(), log.read_text()
        try:
            yield launcher, log
        except (AssertionError, subprocess.TimeoutExpired):  # shows where those are that are left
            for pid in set(processes(tmp_path)) - {launcher.pid}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
                time.sleep(1)
            print(log.read_text())
            raise
        finally:
            launcher.kill()
            launcher.wait()


def ranks_alone(tmp_path, world, command, environment=()):
    """Runs ``command(rank)`` as ranks whose launcher is the test: exit codes (None: alive) and stderr by rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ExitStack() as stack:
        env = stack.enter_context(marked(tmp_path)) | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "WORLD_SIZE": str(world),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # as under torchrun: the launcher keeps the store
            **dict(environment),
        }
        logs = [tmp_path / f"stderr{rank}" for rank in range(world)]
        started = [
            subprocess.Popen(
                [sys.executable, *command(rank)],
                cwd=ROOT,
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=stack.enter_context(open(log, "w")),
            )
            for rank, log in enumerate(logs)
        ]
        wait_until(lambda: all(p.poll() is not None or stopped(p.pid) for p in started), START_S)
        codes = [process.poll() for process in started]
        for process in started:
            process.kill()
            process.wait()
        return codes, [log.read_text() for log in logs]


def stopped(pid):
    """Whether a process is stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def errors(texts):
    return [line for text in texts for line in text.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------------------------- a whole training job


def test_a_killed_rank_ends_the_job(tmp_path):
    with torchrun(tmp_path, "--no-progress") as (launcher, _):
        killed = time.monotonic()
        pid = pid_of(2, launcher, tmp_path)
        os.kill(pid, signal.SIGKILL)
        assert launcher.wait(END_S) not in (0, None)
        assert wait_until(lambda: not processes(tmp_path), END_S - (time.monotonic() - killed)), processes(tmp_path)


def test_ranks_end_with_their_launcher(tmp_path):
    """And, as this job shows its progress: what ranks tell of their speed and memory."""
    with torchrun(tmp_path) as (launcher, log):
        assert {None, 0, 1, 2, 3} == set(processes(tmp_path).values())
        killed = time.monotonic()
        launcher.kill()
        assert launcher.wait() == -signal.SIGKILL
        assert wait_until(lambda: not processes(tmp_path), END_S), processes(tmp_path)
        assert time.monotonic() - killed < END_S
    shown = r"loss [\d.]+, \d+ samples/s \(\d+ a rank, slowest rank [0-3]: \d+\), ([\d.]+)-([\d.]+) GiB a rank"
    found = re.search(shown, log.read_text())
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert found and 0 < float(found[1]) <= float(found[2]) and abs(float(found[2]) - line["peak_gib"]) < 0.01


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_and_is_named(tmp_path):
    """The launcher kills it, as it does not react to SIGTERM, after 30 seconds."""
    with torchrun(tmp_path, "--no-progress", ODIT_TIMEOUT_S="5") as (launcher, log):
        pid = pid_of(2, launcher, tmp_path)
        os.kill(pid, signal.SIGSTOP)
        others = {p for p, rank in processes(tmp_path).items() if rank not in (2, None)}
        assert wait_until(lambda: not others & set(processes(tmp_path)), 5 + END_S), processes(tmp_path)
        assert launcher.wait(30 + END_S) != 0
        assert wait_until(lambda: not processes(tmp_path), END_S), processes(tmp_path)
    (line,) = errors([log.read_text()])
    assert re.match(r"error: no step in 5 s on rank [013]: rank 2 of 4 does not answer, ranks? ", line), line
    assert exits(tmp_path / "run") == 3 * [{"code": 7, "reason": line.removeprefix("error: ")}]


# ------------------------------------------------------------------------------------------- processes that read data

ORPHANS = """
import sys, time
from pathlib import Path
from odit.data import BadSample, ahead, clips

here, decoder = Path(__file__).parent, clips.Decoder()

def read(share):
    if share == "quick":
        return
    try:
        clips.probe(here / "none.mp4", decoder)
    except BadSample:  # the decoder has come
        (here / "reading").touch()
        clips.probe(here / "hanging.mp4", decoder)

if __name__ == "__main__":  # one of two workers, whichever it is, has nothing to do while the other one hangs
    list(ahead.read_ahead(read, ["quick", "hanging"], 2))
elif sys.argv[1] == "importing":  # a worker, as it starts
    (here / "importing").touch()
    while not (here / "alone").exists():
        time.sleep(0.05)
"""


@pytest.mark.parametrize("does", [pytest.param("importing", marks=pytest.mark.slow), "reading"])
def test_workers_and_decoders_end_with_their_parent(tmp_path, does):
    """Whatever a worker does: it still starts, it waits for work, or for a decoder that hangs."""
    (tmp_path / "orphans.py").write_text(ORPHANS)
    os.mkfifo(tmp_path / "hanging.mp4")  # nobody writes to it: whoever opens it waits
    with marked(tmp_path) as env:
        parent = subprocess.Popen([sys.executable, str(tmp_path / "orphans.py"), does], cwd=ROOT, env=env)
        assert wait_until((tmp_path / does).exists, START_S)
        time.sleep(0.3)  # what was asked of the decoder is under way
        left = set(processes(tmp_path)) - {parent.pid}
        parent.kill()
        parent.wait()
        (tmp_path / "alone").touch()
        assert len(left) == {"importing": 3, "reading": 4}[does]  # one is multiprocessing's, which ends with the others
        assert wait_until(lambda: not processes(tmp_path), END_S), processes(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["rank", "launcher"])
def test_a_kill_ends_workers_and_decoders(tmp_path, whom):
    """The killed rank's, and those of the one that ends over it, while all wait for decoders that hang."""
    from test_clips import write_clip  # PyAV is not on every machine that has a GPU

    clip, hanging = write_clip(tmp_path / "a.mp4"), tmp_path / "hanging"
    (tmp_path / "rows.csv").write_text("path,label\n" + 64 * "a.mp4,0\n")
    table = ["--data.source", "table", "--data.path", str(tmp_path / "rows.csv"), "--data.label", "label"]
    table += ["--data.image-size", "16", "--data.channels", "None", "--data.num-classes", "None", "--data.workers", "2"]
    with torchrun(tmp_path, "--no-progress", *table, world=2) as (launcher, _):
        os.mkfifo(hanging)
        os.replace(hanging, clip)
        assert wait_until(lambda: rests(tmp_path / "run" / "metrics.jsonl"), END_S)
        found = processes(tmp_path)
        assert len(found) >= 1 + 2 * (1 + 2 + 2)  # and what multiprocessing starts for its own
        rank = pid_of(1, launcher, tmp_path)
        killed = time.monotonic()
        os.kill({"launcher": launcher.pid, "rank": rank}[whom], signal.SIGKILL)
        assert wait_until(lambda: not set(processes(tmp_path)) - {launcher.pid}, END_S), processes(tmp_path)
        assert launcher.wait(END_S) != 0 and time.monotonic() - killed < END_S


def rests(file, seconds=1.0):
    """Whether nothing is added to a file for so long."""
    before = file.stat().st_size
    time.sleep(seconds)
    return file.stat().st_size == before


# ---------------------------------------------------------------------------------------------------- during a save


SAVING = ("--no-progress", "--steps", "100000", "--checkpoint-every", "5", "--checkpoint-async")


@contextmanager
def while_saving(tmp_path, step, fault):
    """A job of two ranks with a fault of faulty.py while it saves a step: (launcher, log file)."""
    with torchrun(tmp_path, *SAVING, world=2, script=("tests/faulty.py", fault)) as (launcher, log):
        hidden = tmp_path / "run" / "checkpoints" / f".step_{step:08d}.tmp"
        assert wait_until(hidden.exists, START_S), log.read_text()
        yield launcher, log


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "rank"])
def test_a_signal_during_a_save_leaves_that_one_and_the_last(tmp_path, whom):
    with while_saving(tmp_path, 5, "slow=1") as (launcher, log):
        rank = pid_of(1, launcher, tmp_path)
        os.kill({"launcher": launcher.pid, "rank": rank}[whom], signal.SIGTERM)
        assert launcher.wait(3 * END_S) != 0
        assert wait_until(lambda: not processes(tmp_path), END_S), processes(tmp_path)
    out = tmp_path / "run"
    assert [told["code"] for told in exits(out)] == 2 * [75], log.read_text()
    last = int(re.search(r"at step (\d+), which is saved", exits(out)[0]["reason"])[1])
    assert checkpoint.steps(out) == sorted({5, last})
    for step in checkpoint.steps(out):
        checkpoint.verify(saving.folder_of(out, step))


@pytest.mark.parametrize("whom", ["rank", pytest.param("launcher", marks=pytest.mark.slow)])
def test_a_kill_during_a_save_leaves_the_one_before(tmp_path, whom):
    with while_saving(tmp_path, 10, "slow=2") as (launcher, _):
        rank = pid_of(1, launcher, tmp_path)
        killed = time.monotonic()
        os.kill({"launcher": launcher.pid, "rank": rank}[whom], signal.SIGKILL)
        assert wait_until(lambda: not set(processes(tmp_path)) - {launcher.pid}, END_S), processes(tmp_path)
        assert launcher.wait(END_S) != 0 and time.monotonic() - killed < END_S
    out = tmp_path / "run"
    assert checkpoint.steps(out) == [5] and checkpoint.find("latest", out) == saving.folder_of(out, 5)
    checkpoint.verify(saving.folder_of(out, 5))


def test_a_kill_while_storage_hangs_ends_the_job(tmp_path):
    """Nothing can be written any more, not how a rank ended either."""
    with while_saving(tmp_path, 5, "stuck=5") as (launcher, log):
        killed = time.monotonic()
        os.kill(pid_of(1, launcher, tmp_path), signal.SIGKILL)
        assert launcher.wait(END_S) != 0
        assert wait_until(lambda: not processes(tmp_path), END_S - (time.monotonic() - killed)), processes(tmp_path)
    (line,) = errors([log.read_text()])
    assert "rank 1 of 2 does not answer" in line
    assert checkpoint.steps(tmp_path / "run") == [] and not list((tmp_path / "run" / "exit").glob("*.json"))


# ------------------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.slow
def test_a_rank_that_stays_bad_ends_the_job_with_its_code(tmp_path):
    """After ten steps, three of which are kept, with the weights of the first one as they are in the last."""
    command = ["tests/faulty.py", "nan=1", "dit-s-8", "--no-progress", "--out", str(tmp_path / "run"), *SMALL]
    command += ["--device", "cpu", "--parallel.zero", "2", "--checkpoint-every", "1", "--keep", "20"]
    codes, texts = ranks_alone(tmp_path, 2, lambda rank: command)
    assert codes == [5, 5], texts
    out, reason = tmp_path / "run", "10 steps in a row up to 11 were not finite, the last in grad.patch.w"
    assert errors(texts) == 2 * [f"error: {reason}"]
    assert exits(out) == 2 * [{"code": 5, "reason": reason}]
    assert saving.steps(out, crash.PLACE) == [2, 3, 4] and checkpoint.steps(out) == list(range(1, 11))
    first, last = (manifest.read(saving.folder_of(out, step)) for step in (1, 10))
    assert first.tensors == last.tensors and first.about["updates"] == last.about["updates"] == 1
    with pytest.raises(
        NumericError, match=r"rank 1, micro-batch 0: loss nan .* forward, .* is x as it enters the model"
    ):
        crash.replay(crash.Replay(saving.folder_of(out, 3, crash.PLACE), "cpu"))


def test_ranks_with_different_command_lines_end_before_they_meet(tmp_path):
    def command(rank):
        extra = ["--data.held-out", "0.25"] if rank == 1 else ["--device", "cpu", "--threads", "1"]
        return ["experiments/train.py", "digits", "--out", str(tmp_path / "run"), *SMALL, *extra]

    codes, texts = ranks_alone(tmp_path, 2, command)
    assert codes == [2, 2], texts
    sentence = "error: data.held_out is 0.16666666666666666 on rank 0 and 0.25 on rank 1: give every rank the same "
    assert errors(texts) == 2 * [sentence + "command line"]
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- ranks that wait for one that never comes

STEPS = """
import os, signal, sys, time
import torch
from odit import health, peers
from odit.parallel import collectives, mesh as meshes

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def sleep():
    time.sleep(1000)

def die():
    tell_time()
    os.kill(os.getpid(), signal.SIGKILL)

def tell_time():
    open(os.path.join(os.path.dirname(__file__), "lost"), "w").write(str(time.time()))

def fail():
    tell_time()
    raise ValueError("the words of rank 1")

def main():
    does = dict(pair.split("=") for pair in sys.argv[1:])
    if does.get(os.environ["RANK"]) == "lose":
        os.environ["MASTER_PORT"] = "1"
    device = os.environ.get("STEPS_DEVICE", "cpu")
    rank, world, _ = meshes.start(device)
    with peers.Watch(meshes.store(), rank, world) as watch:
        mesh = meshes.make_mesh(world, rank, None, 1)
        meshes.warm_up(mesh)
        watch.patience_s = float(os.environ.get("STEPS_PATIENCE_S", watch.patience_s))
        for step in range(1000):
            watch.beat()
            if step == 3 and str(rank) in does:
                globals()[does[str(rank)]]()
            step_together(mesh, device)

def step_together(mesh, device):
    collectives.all_reduce_(torch.ones(9, device=device), mesh.all).sum().item()

health.run(main)
"""


@pytest.fixture
def steps(tmp_path):
    """Runs ranks that do as told in the fourth step: steps(world, "1=fail") -> (codes, stderr) by rank."""
    (tmp_path / "steps.py").write_text(STEPS)
    return lambda world, *does, **env: ranks_alone(
        tmp_path, world, lambda rank: [str(tmp_path / "steps.py"), *does], env
    )


def test_an_error_of_one_rank_ends_the_others(steps):
    codes, texts = steps(3, "1=fail")
    assert codes == [7, 2, 7], texts
    assert errors(texts[1:2]) == ["error: the words of rank 1"]
    (line,) = errors([texts[0], texts[2]])  # one rank speaks
    pattern = (
        r"error: axis (all|dp) over ranks 0, 1, 2 broke \(.+\) on rank [02]: rank 1 of 3 does not answer, ranks 0, 2 "
    )
    assert re.fullmatch(pattern + r"are in step_together \(steps.py:\d+\)", line), line


def test_a_rank_that_hangs_ends_the_job_and_is_named(steps):
    codes, texts = steps(3, "1=sleep", "2=stop", STEPS_PATIENCE_S="2.5")
    assert codes == [7, 7, None], texts
    (line,) = errors(texts)
    pattern = r"error: no step in 2.5 s on rank [01]: rank 2 of 3 does not answer, rank 0 is in step_together "
    assert re.fullmatch(pattern + r"\(steps.py:\d+\), rank 1 is in sleep \(steps.py:\d+\)", line), line


@pytest.mark.parametrize("how, code", [("die", -signal.SIGKILL), pytest.param("fail", 2, marks=pytest.mark.slow)])
def test_a_rank_that_is_lost_ends_those_that_no_collective_tells(steps, tmp_path, how, code):
    """As over NCCL, whose calls never return: the others only learn that the process is not there any more."""
    codes, texts = steps(3, "0=sleep", f"1={how}", "2=sleep")
    ended = time.time()
    assert codes == [7, code, 7], texts
    (line,) = errors([texts[0], texts[2]])
    pattern = r"error: rank 1 ended on rank [02]: rank 1 of 3 does not answer, ranks 0, 2 are in sleep \(steps.py:\d+\)"
    assert re.fullmatch(pattern, line), line
    assert ended - float((tmp_path / "lost").read_text()) < END_S + peers.WORDS_S


NCCL = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


class TestNccl:
    """Whose calls never return when a rank is gone, and which no signal handler interrupts."""

    pytestmark = NCCL

    @pytest.mark.parametrize("whom", ["rank 0", "rank 1", "launcher"])
    def test_a_kill_ends_the_job(self, tmp_path, whom):
        with torchrun(tmp_path, "--no-progress", world=2, device="cuda") as (launcher, log):
            pid = launcher.pid if whom == "launcher" else pid_of(int(whom[-1]), launcher, tmp_path)
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            assert wait_until(lambda: not set(processes(tmp_path)) - {launcher.pid}, END_S), log.read_text()
            assert launcher.wait(END_S) != 0 and time.monotonic() - killed < END_S
        if whom != "launcher":
            (line,), lost = errors([log.read_text()]), int(whom[-1])
            assert f"rank {lost} of 2 does not answer" in line, line
            assert exits(tmp_path / "run") == [{"code": 7, "reason": line.removeprefix("error: ")}]

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_steps_by_graphs_are_those_without(self, tmp_path, precision):
        """Of two micro-batches, with a checkpoint on its way at the first steps."""
        args = ["dit-s-8", *SMALL, "--steps", "12", "--micro-batch", "2", "--precision", precision, "--device", "cuda"]
        args += ["--no-progress", "--checkpoint-every", "1", "--checkpoint-async"]
        found = []
        for way in ("graphs", "no-graphs"):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            command += ["experiments/train.py", *args, f"--{way}", "--out", str(tmp_path / way)]
            with marked(tmp_path) as env:
                done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=2 * START_S)
            assert done.returncode == 0 and ("graphs: none" in done.stdout) == (way == "no-graphs"), done.stderr
            lines = map(json.loads, (tmp_path / way / "metrics.jsonl").read_text().splitlines())
            found.append([(r["loss"], r["grad_norm"], r["draw_digest"]) for r in lines if "draw_digest" in r])
        assert found[0] == found[1] and len(found[0]) == 12

    def test_graphs_of_every_layout_have_the_bits_of_none(self, tmp_path):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        with marked(tmp_path) as env:
            path = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
            done = subprocess.run(
                [*command, "tests/graphed.py"], cwd=ROOT, env=env | path, capture_output=True, text=True,
                timeout=4 * START_S,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(rows) == 2 * len(graphed.LAYOUTS)
        assert [row for row in rows if not (row["equal"] and row["graphs"])] == []

    def test_a_signal_leaves_a_checkpoint(self, tmp_path):
        with torchrun(tmp_path, "--no-progress", "--steps", "100000", world=2, device="cuda") as (launcher, log):
            launcher.terminate()
            assert launcher.wait(3 * END_S) != 0
            assert wait_until(lambda: not processes(tmp_path), END_S), processes(tmp_path)
        assert [told["code"] for told in exits(tmp_path / "run")] == 2 * [75], log.read_text()
        (step,) = checkpoint.steps(tmp_path / "run")
        checkpoint.verify(saving.folder_of(tmp_path / "run", step))

    def test_an_error_of_one_rank_ends_the_other(self, steps, tmp_path):
        codes, texts = steps(2, "1=fail", STEPS_DEVICE="cuda")
        ended = time.time() - float((tmp_path / "lost").read_text())
        assert codes == [7, 2] and ended < END_S + peers.WORDS_S, (codes, ended, texts)
        assert errors(texts[1:]) == ["error: the words of rank 1"]
        (line,) = errors(texts[:1])
        assert "rank 1 of 2 does not answer, rank 0 is in step_together" in line, line

    def test_a_rank_that_hangs_is_named(self, steps):
        codes, texts = steps(2, "1=stop", STEPS_DEVICE="cuda", ODIT_TIMEOUT_S="8")
        assert codes == [7, None], texts
        (line,) = errors(texts)
        assert "no step in 8 s on rank 0: rank 1 of 2 does not answer, rank 0 is in step_together" in line, line


def test_which_processes_live():
    ended = subprocess.Popen(["sleep", "100"])
    boot, space, *_ = meshes.process().split()
    name = f"{boot} {space} {ended.pid} {meshes._stat(ended.pid)[19]}"
    assert meshes.lives(meshes.process()) and meshes.lives(name)
    ended.kill()
    assert wait_until(lambda: not meshes.lives(name), 5)  # a zombie, which nobody has waited for
    ended.wait()
    assert not meshes.lives(name)
    assert not meshes.lives(f"{boot} {space} {os.getpid()} 1")  # another that had its number before
    assert meshes.lives(f"elsewhere {space} {ended.pid} 1") and meshes.lives("")


def test_the_ranks_of_one_launcher_are_neighbours(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert meshes.neighbours(6, 16) == [4, 5, 7]


def test_a_rank_that_never_comes_is_named_and_one_that_finds_no_launcher_says_so(steps):
    codes, texts = steps(2, "1=lose", ODIT_TIMEOUT_S="2")
    assert codes == [7, 7], texts
    assert errors(texts[:1]) == ["error: rank 1 of 2 did not come in 2 s"]
    assert errors(texts[1:])[0].startswith("error: rank 1 does not reach the store at 127.0.0.1:1 in 2 s: ")


def test_slurm_starts_one_torchrun_a_node(tmp_path):
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for stub in ("scontrol", "srun"):
        (tmp_path / stub).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(
        ["bash", "experiments/train.slurm", "digits", "--out", "a b"],
        cwd=ROOT, env=env | {"SLURM_JOB_ID": "123456"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = [
        "--kill-on-bad-exit=1",
        "--cpus-per-task",
        "1",
        ".venv/bin/torchrun",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "gpu",
    ]
    told += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "n1:23456", "--rdzv_id", "123456"]
    assert done.stdout.splitlines() == [*told, "experiments/train.py", "digits", "--out", "a b"]


# --------------------------------------------------------------------------------------- the parts, in threads as ranks


def in_threads(world, fn):
    """Results or errors of ``fn(rank)`` by rank."""
    found = {}

    def run(rank):
        try:
            found[rank] = fn(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[rank] for rank in range(world)]


def test_every_rank_raises_the_first_difference():
    told = [{"seed": 0, "data": {"path": None}}, {"seed": 0, "data": {"path": "b"}}, {"seed": 0, "data": {"path": "b"}}]
    store = dist.HashStore()
    found = in_threads(3, lambda rank: peers.same_everywhere(store, rank, 3, "config", told[rank]))
    sentence = "data.path is None on rank 0 and 'b' on ranks 1, 2: give every rank the same config"
    assert [type(error) for error in found] == 3 * [ValueError] and {str(error) for error in found} == {sentence}
    assert in_threads(3, lambda rank: peers.same_everywhere(store, rank, 3, "again", told[1])) == 3 * [None]
    peers.same_everywhere(None, 0, 1, "alone", {})


@pytest.mark.parametrize(
    "told, sentence",
    [
        ([{"a": {"b": 1, "c": 2}}] * 2, None),
        ([{"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "d": 5}], "a.c is 2 on rank 0 and 4 on rank 1"),
        ([{"a": (1, 2)}, {"a": (1, 3)}, {"a": (1, 2)}], "a is (1, 2) on ranks 0, 2 and (1, 3) on rank 1"),
        ([{"a": 1}, {"a": 1, "b": 2}], "b is not there on rank 0 and 2 on rank 1"),
        ([{"a": rank % 6} for rank in range(6)], "a is " + " and ".join(f"{r} on rank {r}" for r in range(6))),
        ([{"a": rank == 5} for rank in range(6)], "a is False on ranks 0 to 4 and True on rank 5"),
    ],
)
def test_first_unlike(told, sentence):
    assert peers.first_unlike(told) == sentence


def test_one_rank_calls_the_roll_and_the_odd_ones_come_first(monkeypatch):
    monkeypatch.setattr(peers, "ROLL_CALL_S", 0.2)
    store = dist.HashStore()
    for rank, place in enumerate("abaa"):
        store.set(f"at/{rank}", place)
    assert (
        peers.call_roll(store, 0, 5, "why")
        == "why: rank 4 of 5 does not answer, rank 1 is in b, ranks 0, 2, 3 are in a"
    )
    assert all(store.check([f"called/{rank}"]) for rank in (1, 2, 3, 4)) and not store.check(["called/0"])


def test_a_roll_call_waits_for_no_process_that_has_ended(monkeypatch):
    monkeypatch.setattr(peers, "ROLL_CALL_S", 60.0)
    ended = subprocess.Popen(["true"])
    store, process = dist.HashStore(), meshes.process().split()
    store.set("process/1", " ".join([*process[:2], str(ended.pid), "1"]))
    ended.wait()
    store.set("at/0", "a")
    began = time.monotonic()
    assert peers.call_roll(store, 0, 2, "why") == "why: rank 1 of 2 does not answer, rank 0 is in a"
    assert time.monotonic() - began < 10


def test_who_answers_the_roll_and_ends_has_answered(monkeypatch):
    store = dist.HashStore()

    def answers_and_ends(name):
        store.set("at/1", "b")
        return False

    monkeypatch.setattr(meshes, "lives", answers_and_ends)
    store.set("at/0", "a")
    assert peers.call_roll(store, 0, 2, "why") == "why: rank 0 is in a, rank 1 is in b"


def test_another_rank_calls_the_roll_where_the_first_is_ended_over_it(monkeypatch, capsys):
    monkeypatch.setattr(peers, "ROLL_CALL_S", 0.1)
    codes = []
    monkeypatch.setattr(health, "leave", codes.append)
    store = dist.HashStore()
    assert store.add("turn/0", 1) == 1
    store.set("reason", "why on rank 0")
    peers.Watch(store, 1, 2)._take_part(store)
    health.heard()
    said = r"\nerror: why on rank 0: rank 0 of 2 does not answer, rank 1 is in _take_part \(peers.py:\d+\)\n"
    assert codes == [7] and re.fullmatch(said, capsys.readouterr().err)


def test_a_watch_is_quiet_while_steps_come_and_at_rest(monkeypatch, capsys):
    monkeypatch.setenv("ODIT_TIMEOUT_S", "0.3")
    monkeypatch.setattr(health, "leave", lambda code: pytest.fail("left"))
    with peers.Watch(dist.HashStore(), 0, 2) as watch:
        for _ in range(8):
            watch.beat()
            time.sleep(0.1)
        watch.rest()
        time.sleep(1)
    assert all(not thread.is_alive() for thread in watch.threads) and capsys.readouterr().err == ""
    with pytest.raises(RuntimeError, match="no collective"), peers.Watch(dist.HashStore(), 0, 2):
        raise RuntimeError("no collective")
    with peers.Watch(None, 0, 1) as alone:
        alone.beat()
    assert not alone.threads


@pytest.mark.slow
def test_what_is_between_steps_may_take_longer_than_one(tmp_path):
    args = ["--no-progress", "--steps", "2", "--log-every", "1", "--data.held-out", "0.001"]
    fault = ("tests/faulty.py", "validating=9")
    with torchrun(tmp_path, *args, world=2, script=fault, ODIT_TIMEOUT_S="6") as (launcher, log):
        assert launcher.wait(START_S) == 0, log.read_text()
    assert "validation loss" in log.read_text()


def test_an_error_of_another_rank_leaves_this_one_time_for_its_own(monkeypatch):
    """What most errors are of is met by all ranks, by one of them first; a rank that was killed is told at once."""
    monkeypatch.setattr(peers, "WORDS_S", 0.5)
    monkeypatch.setattr(meshes, "lives", lambda name: False)
    store, others = dist.HashStore(), peers._Others([1, 2, 3])
    store.set("left/2", "error")
    store.set("left/3", "")
    assert others.gone(store) == {1}
    time.sleep(0.6)
    assert others.gone(store) == {1, 2}


def test_lost_ranks_have_an_exit_code(capsys):
    def lose():
        raise meshes.RanksLost("rank 3 of 4 did not come in 600 s")

    with pytest.raises(SystemExit) as left:
        health.run(lose)
    assert left.value.code == 7 and capsys.readouterr().err == "error: rank 3 of 4 did not come in 600 s\n"


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_wrong_timeout_is_refused(text, monkeypatch):
    monkeypatch.setenv("ODIT_TIMEOUT_S", text)
    with pytest.raises(ValueError, match=f"ODIT_TIMEOUT_S is '{text}': use a positive number of seconds"):
        meshes.patience_s()


# ------------------------------------------------------------------------------------------------ runs asked to stop


def exits(out):
    """Exit codes and reasons that ranks left, by rank."""
    return [json.loads(path.read_text()) for path in sorted((out / "exit").glob("*.json"))]


@pytest.mark.parametrize("whom", ["launcher", pytest.param("rank 2", marks=pytest.mark.slow)])
def test_a_signal_leaves_one_checkpoint_and_its_own_code(tmp_path, whom):
    """All ranks stop after the same step, whoever was told; the run goes on from there."""
    with torchrun(tmp_path, "--no-progress", "--steps", "100000", "--checkpoint-every", "50000") as (launcher, log):
        if whom == "launcher":
            launcher.terminate()
        else:
            pid = pid_of(2, launcher, tmp_path)
            os.kill(pid, signal.SIGUSR1)
        assert launcher.wait(3 * END_S) != 0
        assert wait_until(lambda: not processes(tmp_path), END_S), processes(tmp_path)
    out = tmp_path / "run"
    (folder,) = (out / "checkpoints").iterdir()
    step = json.loads((folder / "manifest.json").read_text())["step"]
    assert [told["code"] for told in exits(out)] == 4 * [75], log.read_text()
    by = "SIGTERM" if whom == "launcher" else "a signal to another rank"
    assert exits(out)[0]["reason"] == f"stopped by {by} at step {step}, which is saved: go on with --resume latest"
    assert folder.name == f"step_{step:08d}" and not [told["reason"] for told in exits(out)[1:] if told["reason"]]


def test_who_ends_a_process_waits_for_the_one_that_tells_its_end(tmp_path, monkeypatch):
    """Two threads of a rank may find out at once that others are lost."""
    begun, whole = threading.Event(), health.storage.whole

    def late(*args, **settings):
        begun.set()
        time.sleep(0.3)
        return whole(*args, **settings)

    monkeypatch.setattr(health.storage, "whole", late)
    health.Exit.keep(tmp_path, 0)
    first = threading.Thread(target=health.Exit.tell, args=(7, "why"))
    first.start()
    assert begun.wait(5)
    health.Exit.tell(7)
    health.heard()
    assert exits(tmp_path) == [{"code": 7, "reason": "why"}]
    first.join()


def test_who_finds_the_end_told_has_that_to_wait_for(tmp_path, monkeypatch):
    """From the moment at which the place to tell it is taken."""
    waits = []

    @contextmanager
    def taking():
        yield
        waits.append(any(not taken.is_set() for taken in health._said))

    monkeypatch.setattr(health, "_said", [])
    health.Exit.keep(tmp_path, 0)
    monkeypatch.setattr(health.Exit, "taking", taking())
    health.Exit.tell(7)
    health.heard()
    assert waits == [True] and exits(tmp_path) == [{"code": 7, "reason": ""}]


def test_ranks_that_are_no_more_tell_nothing(tmp_path):
    """Two ranks were stopped, one goes on."""
    for rank in range(2):
        health.Exit.keep(tmp_path, rank, 2)
        health.Exit.tell(75)
        health.heard()
    health.Exit.keep(tmp_path, 1, 2)
    assert [path.name for path in (tmp_path / "exit").iterdir()] == ["00000.json"]
    health.Exit.tell(75)
    health.heard()
    health.Exit.keep(tmp_path, 0, 1)
    health.Exit.tell(0)
    health.heard()
    assert exits(tmp_path) == [{"code": 0, "reason": ""}]


def test_a_second_signal_ends_a_process_at_once(tmp_path):
    code = (
        "import os, signal, time\nfrom odit import health\n"
        "with health.Signals() as signals:\n"
        "    for _ in range(3):\n        os.kill(os.getpid(), signal.SIGTERM)\n"  # as a launcher repeats it
        "    print(signals.asked, flush=True)\n    time.sleep(1.1)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(5)\n    print('still there')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "SIGTERM\n"), done.stderr
