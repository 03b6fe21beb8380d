"""Going on after a kill, and on other layouts, is the run that nobody stopped."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import script
from test_precision import KEY, RUN, dataset
from test_runs import ROOT, metrics, same_tensors, state

from odit import checkpoint, config, plan, random, train
from odit.data import loader
from odit.parallel.mesh import single

train_script = script("train")


def killed_in(run, step):
    """A whole run that kills itself in a step."""
    torch.set_num_threads(1)
    make = train.make_step

    def make_step(composed):
        def stepping(state, *args):
            if state.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return made(state, *args)

        made = make(composed)
        return stepping

    train.make_step = make_step
    train_script.main(run)


@pytest.mark.parametrize(
    "device, precision",
    [
        ("cpu", "fp32"),
        pytest.param("cpu", "bf16", marks=pytest.mark.slow),
        pytest.param("cuda", "bf16", marks=pytest.mark.gpu),
    ],
)
def test_after_a_kill_no_bit_differs(tiny, tmp_path, device, precision):
    """20 steps against a kill in the thirteenth, with a checkpoint each five steps, and a resume."""
    repeats = True if device == "cuda" else None
    whole = dataclasses.replace(tiny, device=device, precision=precision, deterministic=repeats, checkpoint_every=5)
    parted = dataclasses.replace(whole, out=tmp_path / "parted")
    train_script.main(whole)
    process = multiprocessing.get_context("spawn").Process(target=killed_in, args=(parted, 12))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and checkpoint.steps(parted.out)[-1] in (5, 10)
    assert metrics(parted.out)[-1]["step"] == 12
    train_script.main(dataclasses.replace(parted, resume="latest"))
    assert metrics(whole.out) == metrics(parted.out) and len(metrics(whole.out)) == 21  # and a validation
    assert same_tensors(state(whole.out, 20), state(parted.out, 20))


# ------------------------------------------------------------------------------------------------------ other layouts


def segment_on(mesh, run, stop):
    """Steps from the newest checkpoint to ``stop``, and one there: (losses, digests, draw ids a step)."""
    composed = plan.make(run, dataset(), mesh)
    found = checkpoint.find("latest", run.out)
    state = checkpoint.load(found, composed)[0] if found else train.init_state(composed, KEY)
    step, losses, digests, ids = train.make_step(composed), [], [], []
    batches = loader.batches(
        dataset(),
        random.fold_in(KEY, "data"),
        global_batch=run.global_batch,
        start=state.step,
        stop=stop,
        part=(mesh.dp.rank, mesh.dp.size),
    )
    for batch in batches:
        state, found = step(state, batch, KEY)
        losses.append(found["loss"])
        digests.append(found["draw_digest"])
        ids.append(batch.ids_B.tolist())
    checkpoint.save(composed, state, {})
    return losses, digests, ids


# ranks, of them along sp, ZeRO stage
SEGMENTS = [(1, 1, 0), (4, 1, 3), (4, 2, 2), (3, 1, 1)]
EACH = 8


def test_on_other_layouts_it_is_the_run_of_one_rank(ranks, tmp_path):
    """1 -> 4 -> 2 x 2 -> 3 ranks: the same draws, each sample once an epoch, and losses but for sums' roundings."""
    run = dataclasses.replace(RUN, global_batch=96, steps=EACH * len(SEGMENTS))
    alone = segment_on(single(), dataclasses.replace(run, out=tmp_path / "alone"), run.steps)
    losses, digests, ids = [], [], []
    for number, (world, sp, stage) in enumerate(SEGMENTS, 1):
        layout = config.Parallel(sp=sp, zero=stage, sequence="ulysses" if sp > 1 else "auto")
        part = dataclasses.replace(run, out=tmp_path / "parted", parallel=layout)
        found = ranks.run(world, segment_on, part, number * EACH, sp=sp, timeout_s=60)
        assert all(f[:2] == found[0][:2] for f in found)
        losses += found[0][0]
        digests += found[0][1]
        ids += [[i for rank in range(0, world, sp) for i in found[rank][2][n]] for n in range(EACH)]
    assert digests == alone[1] and ids == alone[2]
    assert max(abs(a - b) for a, b in zip(losses, alone[0], strict=True)) < 1e-5
    flat, train_ids = [i for step in ids for i in step], dataset().train_ids.tolist()
    whole = len(flat) // len(train_ids)
    assert whole >= 2
    for epoch in range(whole):
        seen = sorted(i & 0xFFFFFFFF for i in flat if i >> 32 == epoch)
        assert seen == train_ids


WORDS = (
    "digits --steps 20 --model.width 24 --model.depth 2 --no-evaluate --no-progress --log-every 1 --device cpu".split()
)
PARTS = [(1, 5, ""), (4, 10, "--parallel.zero 3"), (4, 15, "--parallel.sp 2 --parallel.zero 2"), (3, 20, "")]


def script_on(world, out, *words):
    """A run of the script on ``world`` ranks."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command = [*start, "experiments/train.py", *WORDS, "--out", str(out), *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_script_goes_on_on_other_layouts(tmp_path):
    script_on(1, tmp_path / "alone")
    for world, stop, words in PARTS:
        script_on(world, tmp_path / "parted", "--resume", "latest", "--stop-at", str(stop), *words.split())
    alone, parted = (
        [line for line in metrics(tmp_path / name) if "draw_digest" in line] for name in ("alone", "parted")
    )
    assert [line["step"] for line in parted] == list(range(1, 21))
    assert [line["draw_digest"] for line in alone] == [line["draw_digest"] for line in parted]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(alone, parted, strict=True)) < 1e-5
