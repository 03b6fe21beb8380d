"""How a process ends: with its own code and reason, whatever signals, storage and pipes do meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import conftest
import pytest
import torch.distributed as dist
from test_processes import SMALL, errors, exits, in_threads, ranks_alone

from odit import health, peers, record

ROOT = Path(__file__).parent.parent
tmp_path = conftest.in_memory  # for tests of how long an end takes
END_S = 60  # what a process that ends may take on a busy machine, its start included


def forks(tmp_path, code, *cases):
    """{case: exit code} of a process each that ``run(out, case)`` of ``code`` makes; ``out`` is a folder of its own."""
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # or nothing would be left to flush
    command = [sys.executable, "-c", code + FORKS, str(tmp_path), *cases]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=END_S)
    found = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith(cases))
    return {case: int(found[case]) for case in cases}


FORKS = """
import signal
from odit.parallel import mesh

for case in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        mesh.end_with_launcher()
        signal.alarm(10)  # ends a process that does not end
        run(Path(sys.argv[1]) / case, case)
        sys.exit(0)
    print(case, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


# --------------------------------------------------------------------------------------- a signal while a rank unwinds

UNWINDING = """
import contextlib, os, signal, sys
from pathlib import Path
from odit import health

def run(out, case):
    raised = {"refused": ValueError("why"), "done": None}.get(case, health.Stopped("why"))
    if case != "alone":
        os.environ["RANK"] = "0"

    def main():
        health.Exit.keep(out, 0)
        with contextlib.ExitStack() as stack:
            stack.callback(os.kill, os.getpid(), signal.SIGTERM)  # the launcher has seen that another rank left
            stack.enter_context(health.Signals())
            if raised:
                raise raised

    health.run(main)
"""


def test_a_rank_that_unwinds_tells_its_own_end(tmp_path):
    """And a process without a launcher, which nobody else would end, is ended by a signal."""
    ends = {"stopped": (75, "why"), "refused": (2, "why"), "done": (0, "")}
    codes = {case: code for case, (code, _) in ends.items()}
    assert forks(tmp_path, UNWINDING, *ends, "alone") == codes | {"alone": -signal.SIGTERM}
    for case, (code, reason) in ends.items():
        assert exits(tmp_path / case) == [{"code": code, "reason": reason}]


# The second rank is asked to stop. Whenever it has settled a save it is ended, if the first rank has left before it.
STOPPING = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "experiments")
import train
from odit import checkpoint, health

health.AGAIN_S = 0.0  # any signal after the first is a second one
out, second = Path(sys.argv[-1]), os.environ["RANK"] == "1"
batches, settle = train.loader.batches, train.Saver.settle

def asking(*args, **settings):
    for number, batch in enumerate(batches(*args, **settings)):
        if number == 1 and second:
            os.kill(os.getpid(), signal.SIGUSR1)
        yield batch

def late(saver):
    settle(saver)
    until = time.monotonic() + 1.5
    while second and checkpoint.steps(out) and time.monotonic() < until:
        if (out / "exit" / "00000.json").exists():
            os.kill(os.getpid(), signal.SIGTERM)  # as a launcher does
            break
        time.sleep(0.02)

train.loader.batches, train.Saver.settle = asking, late
health.run(train.cli)
"""


@pytest.mark.slow
def test_a_rank_that_was_asked_to_stop_takes_the_launchers_end_for_no_second_signal(tmp_path):
    (tmp_path / "stopping.py").write_text(STOPPING)
    command = [str(tmp_path / "stopping.py"), "dit-s-8", "--no-progress", "--device", "cpu", *SMALL]
    codes, texts = ranks_alone(tmp_path, 2, lambda rank: [*command, "--out", str(tmp_path / "run")])
    assert codes == [75, 75], texts
    first, second = exits(tmp_path / "run")
    assert first["reason"].startswith("stopped by a signal to another rank at step 2, which is saved")
    assert (first["code"], second) == (75, {"code": 75, "reason": ""})


# --------------------------------------------------------------------------------- storage and pipes that take no words

HINDERED = """
import linecache, os, signal, sys, threading, time
from pathlib import Path
import torch.distributed as dist
from odit import health, peers, storage

health.TELL_S, peers.ROLL_CALL_S = 0.5, 0.1

def hang(*args):
    time.sleep(1000)

def pipe(stream, full):
    reader, writer = os.pipe()
    os.dup2(writer, stream.fileno())
    os.close(writer)
    if not full:
        os.close(reader)
        return
    os.set_blocking(stream.fileno(), False)
    try:
        while True:
            os.write(stream.fileno(), bytes(4096))
    except BlockingIOError:
        os.set_blocking(stream.fileno(), True)

def fail(error):
    raise error

def call_the_roll():
    store = dist.HashStore()
    store.set("reason", "why on rank 0")
    peers.Watch(store, 0, 1)._take_part(store)

def run(out, case):
    health.Exit.keep(out, 0)
    if "storage" in case:
        storage.Disk.rename = hang
    if case == "no stdout":
        sys.stdout.close()
        sys.stdout = None
    elif "stdout" in case:
        pipe(sys.stdout, "full" in case)
        print("words on their way")
    if "stderr" in case:
        pipe(sys.stderr, "full" in case)
    if "sources" in case:
        linecache.getlines = hang
    if "all" in case:
        health.TELL_S = 2.0
        signal.alarm(4)  # they wait together
    if "stopped" in case:
        health.run(lambda: fail(health.Stopped("why")))
    elif "unknown" in case:
        os.environ["RANK"] = "0"
        health.run(lambda: fail(KeyError("why")))
    elif "refused" in case:
        os.environ["RANK"] = "0"
        health.run(lambda: fail(ValueError("why")))
    else:  # as a watch does while the main thread waits for ranks that are gone
        threading.Thread(target=call_the_roll if "stderr" in case else lambda: health.leave(7)).start()
    hang()
"""


def test_a_process_ends_whatever_storage_and_pipes_do(tmp_path):
    ends = {
        "storage hangs": (7, None),
        "storage hangs, stdout and stderr are full: all": (7, None),
        "no stdout": (7, ""),
        "no reader of stdout": (7, ""),
        "stdout is full": (7, ""),
        "no reader of stderr": (7, "why on rank 0"),
        "no reader of stdout when stopped": (75, "why"),
        "stdout is full when stopped": (75, "why"),
        "no reader of stderr when refused": (2, "why"),
        "sources cannot be read at an unknown error": (1, "'why'"),
    }
    assert forks(tmp_path, HINDERED, *ends) == {case: code for case, (code, _) in ends.items()}
    for case, (code, reason) in ends.items():
        told = [(found["code"], found["reason"].split(":")[0]) for found in exits(tmp_path / case)]
        assert told == ([] if reason is None else [(code, reason)])


def test_the_last_words_where_the_system_has_no_more_threads(tmp_path, monkeypatch, capsys):
    def none_left(thread):
        raise RuntimeError("can't start new thread")

    health.Exit.keep(tmp_path, 0)
    monkeypatch.setattr(threading.Thread, "start", none_left)
    health.say(print, "words")
    health.Exit.tell(2, "why")
    health.heard()
    assert exits(tmp_path) == [{"code": 2, "reason": "why"}] and capsys.readouterr().out == "words\n"


# ------------------------------------------------------------------------------------------------ a folder that is used


def test_every_rank_refuses_a_folder_in_use_and_leaves_what_is_in_it(tmp_path):
    out = tmp_path / "run"
    (out / "exit").mkdir(parents=True)
    kept = {"code": 0, "reason": "of the job that has the folder"}
    for rank in range(3):
        (out / "exit" / f"{rank:05d}.json").write_text(json.dumps(kept))
    command = ["experiments/train.py", "dit-s-8", "--out", str(out), "--device", "cpu", *SMALL]
    with record.Lock(out):
        codes, texts = ranks_alone(tmp_path, 2, lambda rank: command)
    assert codes == [2, 2], texts
    sentence = f"error: out {out} is in use by process {os.getpid()}: wait for it, or use another --out"
    assert errors(texts) == [sentence, sentence] and exits(out) == 3 * [kept]


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_what_rank_0_finds_is_raised_on_all_ranks(kind):
    def refuse():
        raise kind("why")

    store = dist.HashStore()
    found = in_threads(3, lambda rank: peers.told_by_rank_0(store, rank, "refused", refuse))
    assert [(type(error), str(error)) for error in found] == 3 * [(kind, "why")]
    assert in_threads(3, lambda rank: peers.told_by_rank_0(store, rank, "fine", lambda: 5)) == [5, None, None]
    assert peers.told_by_rank_0(None, 0, "alone", lambda: 5) == 5
    with pytest.raises(kind, match="why"):
        peers.told_by_rank_0(None, 0, "alone", refuse)
