"""Trains a Diffusion Transformer: ``python experiments/train.py digits --steps 200 --seed 1 --out runs/a``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from odit import (
    checkpoint,
    checks,
    config,
    crash,
    data,
    evaluate,
    finetune,
    health,
    initial,
    memory,
    peers,
    plan,
    random,
    record,
    sample,
    train,
    tree,
    validate,
)
from odit.config_json import first_difference, to_json
from odit.data import loader
from odit.health import CheckpointError, NumericError
from odit.parallel import collectives
from odit.parallel import mesh as meshes
from odit.saver import Saver
from odit.storage import StorageError


def main(run: config.Run) -> None:
    """Checks, joins the other ranks, restores or initialises, then steps to the end, writing what is asked for."""
    began = time.monotonic()
    checks.check(run, world=int(os.environ.get("WORLD_SIZE", 1)))
    rank, world, _ = meshes.start(checks.pick_device(run.device))
    with contextlib.ExitStack() as stack:
        stack.callback(meshes.stop)
        watch = stack.enter_context(peers.Watch(meshes.store(), rank, world))
        signals = stack.enter_context(health.Signals())
        peers.same_everywhere(meshes.store(), rank, world, "command line", shared(run))
        if lock := peers.told_by_rank_0(meshes.store(), rank, "lock", lambda: record.Lock(run.out)):
            stack.enter_context(lock)
        health.Exit.keep(run.out, rank, world)
        mesh = meshes.make_mesh(world, rank, **checks.axes(run, world))
        meshes.warm_up(mesh)
        front = plan.load_front(run, mesh)
        dataset = data.open_dataset(run.data, front.tokenize)
        told = {"data": identity(dataset), "encoders": front.fingerprints}
        peers.same_everywhere(meshes.store(), rank, world, "data", told)
        composed = plan.make(run, dataset, mesh, front)
        say(composed, plan.describe(composed))
        if composed.device.type == "cuda" and rank == 0:
            say(composed, memory.describe(plan.largest(composed)))

        key = random.key(run.seed)
        restored = restore(composed, dataset)
        state = train.share_frozen(composed, restored or fresh(composed, key))
        stop = run.stop_at or run.steps
        if state.step >= stop and (state.step != run.steps or finished(run, dataset)):
            say(composed, f"already at step {state.step} of {stop}: nothing to do")
            return
        if rank == 0 and (restored is None or not checkpoint.steps(run.out)):
            if aside := record.set_aside(run.out):
                say(composed, f"what an earlier run left in {run.out} is in {aside} now")
        recorder = stack.enter_context(record.Recorder(run, state.step) if rank == 0 else record.Silent())
        measure = evaluate.during_training(composed)
        with Saver(composed, run.checkpoint_async) as saver:
            state = loop(composed, dataset, state, key, recorder, stop, watch, saver, signals, measure)
        composed.graphs.clear()  # the memory of a step
        say(composed, f"{run.out}: step {state.step} of {run.steps} after {time.monotonic() - began:.0f} s")
        if state.step == run.steps:
            finish(composed, dataset, state, recorder)


def shared(run: config.Run) -> dict[str, Any]:
    """The settings that all ranks have alike; the others tell what one machine has, and the data is compared itself."""
    told = to_json(run)
    told = {key: value for key, value in told.items() if key not in ("device", "threads", "progress")}
    return told | {"data": {key: value for key, value in told["data"].items() if key not in ("path", "workers")}}


def say(composed: plan.Plan, text: str) -> None:
    """Prints on rank 0."""
    if composed.mesh.rank == 0:
        print(text, flush=True)


def restore(composed: plan.Plan, dataset: data.Dataset) -> train.TrainState | None:
    """The state that ``--resume`` asks for, or None for a fresh start; refuses to write over a run by accident."""
    run = composed.run
    if run.resume is None:
        if found := checkpoint.steps(run.out):
            raise ValueError(
                f"out {run.out} holds a run with checkpoints up to step {found[-1]}: go on with --resume latest, "
                "or use another --out"
            )
        return None
    broken: list[Path] = []
    while True:
        path = checkpoint.on_rank_0(composed.mesh.all, lambda: wanted(composed, dataset, broken))
        if path is None:
            say(composed, f"resume latest: no checkpoint in {run.out}, starting at step 0")
            return None
        try:
            state, _ = checkpoint.load(path, composed)
            break
        except health.Damaged as error:
            if run.resume != "latest":
                raise
            if composed.mesh.rank == 0:
                checkpoint.step_back(error)
            broken.append(path)
    if composed.mesh.rank == 0:
        checkpoint.set_aside(run.out, state.step)
    say(composed, f"resumed from {path} at step {state.step}")
    return state


def wanted(composed: plan.Plan, dataset: data.Dataset, broken: list[Path]) -> Path | None:
    """The checkpoint that ``--resume`` means, where this run may go on from it; ``broken`` ones aside."""
    run = composed.run
    path = checkpoint.find(run.resume, run.out, broken)
    if path is None:
        return None
    told = checkpoint.read_about(path)
    if checkpoint.steps(run.out) and path.resolve().parent != (run.out / "checkpoints").resolve():
        raise ValueError(f"resume {path} would go on in {run.out}, which holds another run: use another --out")
    if told["data"] != identity(dataset):
        raise CheckpointError(
            f"{path} was written with data {told['data']}, this run has {identity(dataset)}: give that data"
        )
    if told.get("encoders", {}) != composed.front.fingerprints:
        raise CheckpointError(
            f"{path} was trained with encoders {told.get('encoders')}, this run has {composed.front.fingerprints}: "
            "give the same ones"
        )
    if found := first_difference(told["config"], to_json(run)):
        name, theirs, mine = found
        if name != "steps" or run.optimizer.decay != "none":
            raise CheckpointError(
                f"{path} was written with {name} {theirs}, this run has {mine}, and that changes what it means: "
                "use that value, or start a new run from its weights with --init-from"
            )
    return path


def fresh(composed: plan.Plan, key: random.Key) -> train.TrainState:
    """Step 0, from a draw or from ``--init-from``."""
    run = composed.run
    finetune.check(run.finetune, run.init_from is not None)  # there was nothing to resume
    state = train.init_state(composed, key)
    if run.init_from is None:
        return state
    if any(run.init_from.resolve().is_relative_to((run.out / name).resolve()) for name in record.RESULTS):
        raise ValueError(f"init_from {run.init_from} is what this run would set aside in its out: use another --out")
    params, lines = initial.start(composed, state.params, key)
    say(composed, "\n".join(lines))
    return state._replace(params=params, ema=tree.map(torch.clone, params))


def loop(composed, dataset, state, key, recorder, stop, watch, saver, signals, measure) -> train.TrainState:
    """Steps from ``state`` to ``stop``; raises Stopped, with the state saved, where a signal asked for it."""
    run, step, keeper = composed.run, train.make_step(composed), crash.Keeper(composed)
    batches = loader.batches(
        dataset,
        random.fold_in(key, "data"),
        global_batch=run.global_batch,
        start=state.step,
        stop=stop,
        workers=run.data.workers,
        flip=run.data.flip and composed.front.cache is None,  # latents mirror themselves
        bad_budget=run.data.bad_budget,
        on_bad=on_bad,
        part=(composed.mesh.dp.rank, composed.mesh.dp.size),
    )
    bar = tqdm(
        total=stop, initial=state.step, unit="step", disable=not run.progress or composed.mesh.rank > 0, mininterval=0.5
    )
    mark, mark_step, bad_streak = time.monotonic(), state.step, 0
    if state.step == stop and not checkpoint.on_rank_0(composed.mesh.all, lambda: stop in checkpoint.steps(run.out)):
        periodic(composed, dataset, state, recorder, stop, saver, measure)  # resumed from another run's last step
    watch.beat()
    try:
        for batch in batches:
            state, metrics = step(state, batch, key, signals.asked is not None)
            saver.at_step(state.step)
            asked = metrics.pop("stop", False) and state.step < stop
            bad_streak = bad_streak + 1 if "bad" in metrics else 0
            if "bad" in metrics:
                watch.rest()
                keep(composed, dataset, state, batch, key, metrics, keeper, bad_streak == 10)
                watch.beat()
            if bad_streak == 10:
                raise NumericError(
                    f"10 steps in a row up to {state.step} were not finite, the last in {metrics['bad']}"
                )
            bar.update()
            if state.step % run.log_every == 0 or state.step in (1, stop) or bad_streak:
                now = time.monotonic()
                speed = run.global_batch * (state.step - mark_step) / max(1e-9, now - mark)
                mark, mark_step = now, state.step
                text, peaks = a_rank(composed, speed)
                recorder.log(state.step, {**metrics, "samples_per_s": round(speed, 1), **peaks})
                bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {speed:.0f} samples/s{text}")
            paused = time.monotonic()
            watch.rest()
            periodic(composed, dataset, state, recorder, stop, saver, measure)
            if asked:
                leave(composed, dataset, state, saver, signals)
            watch.beat()
            mark += time.monotonic() - paused
    finally:
        watch.rest()
        batches.close()
        bar.close()
    return state


def keep(composed, dataset, state, batch, key, metrics, keeper, last) -> None:
    """Keeps a bad step to be executed again, and names what was bad."""
    try:
        folder = keeper.keep(state, batch, key, metrics, about(composed, dataset, state), last)
        kept = f"; to execute it again: --replay {folder}" if folder else ""
    except StorageError as error:
        kept = f"; {error}"
    samples = crash.name(metrics.pop("bad_samples"))
    if composed.mesh.rank == 0:
        tqdm.write(f"step {state.step}: {metrics['bad']} is not finite{samples}; the update was skipped{kept}")


def leave(composed, dataset, state, saver, signals) -> None:
    """Saves and raises Stopped, on all ranks after the same step."""
    saver.save(state, about(composed, dataset, state))
    saver.settle()
    signals.end()
    collectives.barrier(composed.mesh.all)  # or the launcher, which sees one rank leave, ends others that still listen
    by = signals.asked or "a signal to another rank"
    told = f"stopped by {by} at step {state.step}, which is saved: go on with --resume latest"
    raise health.Stopped(told if composed.mesh.rank == 0 else "")


def a_rank(composed: plan.Plan, speed: float) -> tuple[str, dict[str, float]]:
    """A rank's part of the speed and its peak memory in words, with the range over ranks; and {"peak_gib": the most}.

    Ranks step together, so that a slow one slows all: their speeds differ by little, their memory may differ by much.
    """
    mesh = composed.mesh
    told = collectives.gather_objects(mesh.all, (speed / mesh.world, peak_gib(composed.device)))
    speeds, peaks = zip(*told)
    if mesh.world == 1:
        # in a CPU process of one rank the peak is mostly Python and libraries
        return f", {peaks[0]:.2f} GiB", {"peak_gib": round(peaks[0], 3)} if composed.device.type == "cuda" else {}
    slowest = min(range(mesh.world), key=lambda rank: speeds[rank])
    text = (
        f" ({speeds[mesh.rank]:.0f} a rank, slowest rank {slowest}: {speeds[slowest]:.0f}), "
        f"{min(peaks):.2f}-{max(peaks):.2f} GiB a rank"
    )
    return text, {"peak_gib": round(max(peaks), 3)}


def peak_gib(device: Any) -> float:
    """The most memory that this process has held so far: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def on_bad(path: str, reason: str) -> None:
    """Names a picture that was left out."""
    tqdm.write(f"skipped {path}: {reason}")


def periodic(composed, dataset, state, recorder, stop, saver, measure) -> None:
    """Validation, pictures, figures of many pictures, and checkpoints, when they are due."""
    run, last = composed.run, state.step == stop
    if (state.step % run.validate_every == 0 or last) and len(dataset.held_out_ids):
        found = validate.validate(composed, state.ema, dataset, on_bad)
        recorder.log(state.step, found, prefix="validation_")
        if composed.mesh.rank == 0:
            tqdm.write(f"step {state.step}: validation loss {found['loss']:.5f} (EMA weights)")
    if state.step % run.sample_every == 0 or last:
        recorder.pictures(state.step, grid(composed, dataset, state), columns(composed))
    if measure is not None and (state.step % run.evaluation.every == 0 or last):
        found = measure(state.ema)
        recorder.log(state.step, found, prefix="evaluation_")
        if composed.mesh.rank == 0:
            tqdm.write(f"step {state.step}: {', '.join(f'{name} {value:.3f}' for name, value in found.items())}")
    if state.step % run.checkpoint_every == 0 or last:
        saver.save(state, about(composed, dataset, state))


def grid(composed: plan.Plan, dataset: data.Dataset, state: train.TrainState):
    """Pictures from the EMA weights, always of the same noise: 8 rows of a column a class, or of 4 columns."""
    shown = sample.previews(composed, dataset, 8 * columns(composed), columns(composed))
    batch = min(32, composed.micro_batch)  # twice that without gradients needs less memory than a micro-batch with them
    return sample.sample(composed, state.ema, shown, random.key(composed.run.seed), batch=batch)


def columns(composed: plan.Plan) -> int:
    """Columns of the sample grid."""
    return min(composed.shape.num_classes, 10) or 4


def about(composed, dataset, state) -> dict:
    """What checkpoints and weights files tell beside their tensors."""
    run = composed.run
    return {
        "step": state.step,
        "seed": run.seed,
        "global_batch": run.global_batch,
        "samples": state.step * run.global_batch,
        "config": to_json(run),
        "shape": dataclasses.asdict(composed.shape),
        "data": identity(dataset),
        "encoders": composed.front.fingerprints,
        "class_names": dataset.class_names,
        "versions": record.about(),
    }


def identity(dataset: data.Dataset) -> str:
    """What a run may not change on resume: the samples, and which of them it trains on."""
    return f"{dataset.fingerprint()}, {len(dataset.train_ids)} to train on"


def finished(run: config.Run, dataset: data.Dataset) -> bool:
    """Whether the end of this run, and not an earlier one of fewer steps, has left all it should."""
    weights, judgement = run.out / "ema.safetensors", run.out / "evaluation.json"
    if not weights.exists():
        return False
    told = checkpoint.read_about(weights)
    made = {**told["config"], "finetune": told.get("finetune")}  # as finish tells it
    if told["data"] != identity(dataset) or first_difference(made, to_json(run)):
        return False
    if not run.evaluate or run.data.source not in evaluate.JUDGES:
        return True
    return judgement.exists() and json.loads(judgement.read_text()).get("step") == run.steps


def finish(composed, dataset, state, recorder) -> None:
    """The weights to share, where things lie and, for digits, the judgement, whose last line is the accuracy."""
    run, out = composed.run, composed.run.out
    if composed.mesh.rank == 0:
        # Read back from the checkpoint: no rank ever holds the whole EMA while it trains.
        here = dataclasses.replace(plan.alone(run), device="cpu", kernels="reference")
        alone = plan.compose(here, composed.shape, None, composed.front)
        whole = checkpoint.load_weights(out / "checkpoints" / f"step_{state.step:08d}", alone)
        told = about(composed, dataset, state)
        if run.finetune.lora_rank:  # what samples and exports knows the plain model alone
            whole = finetune.merge(whole, run.finetune.scale)
            told |= {"config": to_json(dataclasses.replace(run, finetune=finetune.Config()))}
        checkpoint.save_weights(out / "ema.safetensors", whole, {**told, "finetune": to_json(run.finetune)})
    kind = "png" if composed.shape.size[:-2] in ((), (1,)) else "mp4"
    shown = out / "samples" / f"step_{state.step:08d}.{kind}"
    say(composed, f"weights: {out / 'ema.safetensors'}\nsamples: {shown}")
    if run.evaluate and run.data.source in evaluate.JUDGES:
        progress = functools.partial(tqdm, unit="step", leave=False, disable=not run.progress or composed.mesh.rank > 0)
        found = evaluate.evaluate(composed, state.ema, dataset, progress=progress)
        if composed.mesh.rank == 0:
            record.write_json(out / "evaluation.json", {"step": state.step, **found})
        recorder.log(state.step, found, prefix="evaluation_")
        say(composed, evaluate.report(found))


def cli() -> None:
    """Reads the command line: a preset and what is changed of it; or ``--replay``, with or without a preset."""
    warnings.filterwarnings("default", module="odit")
    presets, words = config.presets(), sys.argv[1:]
    if any(word.split("=")[0] == "--replay" for word in words):
        print(crash.replay(tyro.cli(crash.Replay, args=words[words[0] in presets :])))
        return
    main(tyro.extras.overridable_config_cli(presets, description=__doc__))


if __name__ == "__main__":
    health.run(cli)
