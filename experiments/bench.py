"""Measures: ``python experiments/bench.py zero | sequence``. One JSON object a row."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from odit import checks, config, data, health, memory, models, plan, random, train, tree
from odit.data import loader
from odit.models import dit, latte
from odit.models.config import Config
from odit.ops import flash
from odit.parallel import collectives, recorder, spec
from odit.parallel import mesh as meshes
from odit.parallel import sequence as sequences
from odit.parallel.place import Place


@dataclass(frozen=True)
class Zero:
    """Whole training steps (draws, forward, backward, AdamW, EMA) at each ZeRO stage; under torchrun on many ranks."""

    preset: str = "dit-s-2"
    """Model and objective of this preset of train.py, on synthetic latents."""
    batch: int = 16
    """Samples a step, over all ranks."""
    micro_batch: int | None = None
    """Samples a forward pass and rank."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of matrix products."""
    stages: tuple[str, ...] = ("0", "1", "2", "3", "2+optimizer", "3+optimizer")
    """Layouts: a stage, and after a plus what is offloaded: 3+optimizer, or 3+auto24 for a budget of 24 GiB."""
    remat: Literal["none", "block"] = "none"
    """Activations computed again in backward."""
    compile: bool = False
    """Compiles the blocks; what is planned is of eager ones."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are summed."""
    clip: float | None = None
    """Largest gradient norm; None is the preset's."""
    steps: int = 5
    """Measured steps; the row has their median."""
    warmup: int = 3
    """Steps before them."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""


def zero(cfg: Zero) -> None:
    """Prints a row a layout: ms, samples/s, TFLOP/s, peak memory, bytes moved and exposed communication a rank."""
    rank, world, _ = meshes.start(checks.pick_device(cfg.device))
    try:
        mesh = meshes.make_mesh(world, rank, None, 1)
        meshes.warm_up(mesh)
        for layout in cfg.stages:
            row = zero_row(cfg, layout, mesh)
            if rank == 0:
                print(json.dumps(row), flush=True)
    finally:
        meshes.stop()


def zero_row(cfg: Zero, layout: str, mesh: meshes.Mesh) -> dict[str, Any]:
    """Measures one layout; what could not run is a row with its reason."""
    run = zero_run(cfg, layout)
    name = f"zero {layout}"
    about = {
        "name": name,
        "preset": cfg.preset,
        "batch": cfg.batch,
        "precision": cfg.precision,
        "remat": cfg.remat,
        "compile": cfg.compile,
    }
    front = plan.load_front(run, mesh)
    composed = plan.make(run, data.open_dataset(run.data, front.tokenize), mesh, front)
    where = device_name(composed.device)
    planned = memory.predict(composed).peak if composed.device.type == "cuda" else None
    try:
        found = measure_steps(cfg, composed)
    except torch.OutOfMemoryError as error:
        if mesh.world > 1:
            raise  # the other ranks wait in this step
        return {**about, "ranks": mesh.world, "device": where, "error": str(error).split(". ")[0]}
    peak = max(collectives.gather_objects(mesh.all, found["peak"]))  # of the rank that holds most
    flops = 6 * models.of(run.model).macs(run.model, composed.shape) * cfg.batch
    ms = sorted(found["ms"])[len(found["ms"]) // 2]
    return {
        **about,
        "ranks": mesh.world,
        "device": where,
        "micro_batch": composed.micro_batch,
        "ms": round(ms, 2),
        "samples_per_s": round(1e3 * cfg.batch / ms, 1),
        "tflops": round(flops / ms / 1e9, 2),
        "peak_gib": round(peak / 2**30, 3),
        **({"planned_gib": round(planned / 2**30, 3)} if planned else {}),
        **({"reserved_gib": round(found["reserved"] / 2**30, 3)} if "reserved" in found else {}),
        "gathered_mib": round(found["gathered"] / 2**20, 3),
        "reduced_mib": round(found["reduced"] / 2**20, 3),
        "exposed_ms": round(found["exposed_ms"], 2),
        "loss": found["loss"],
    }


def zero_run(cfg: Zero, layout: str) -> config.Run:
    """The run of a layout such as 3+auto24."""
    stage, _, moved = layout.partition("+")
    gib = float(moved.removeprefix("auto")) if moved.startswith("auto") and moved != "auto" else None
    offload = "auto" if moved.startswith("auto") else moved or "none"
    presets = config.presets()
    if cfg.preset not in presets:
        raise ValueError(f"preset is {cfg.preset!r}: use one of {', '.join(presets)}")
    run = presets[cfg.preset][1]
    clip = run.optimizer.clip if cfg.clip is None else cfg.clip
    return dataclasses.replace(
        run,
        global_batch=cfg.batch,
        micro_batch=cfg.micro_batch,
        precision=cfg.precision,
        device=cfg.device,
        steps=cfg.warmup + cfg.steps,
        evaluate=False,
        optimizer=dataclasses.replace(run.optimizer, clip=clip),
        compile=cfg.compile,
        parallel=config.Parallel(zero=int(stage), reduce=cfg.reduce, remat=cfg.remat, offload=offload, memory_gib=gib),
    )


def measure_steps(cfg: Zero, composed: plan.Plan) -> dict[str, Any]:
    """Milliseconds a step, and of one more, recorded step the bytes and the exposed time; peak over all."""
    key, on_gpu = random.key(0), composed.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # peak resident memory counts from here (Linux, proc(5))
    dataset = data.open_dataset(composed.run.data, composed.front.tokenize)
    share = (composed.mesh.dp.rank, composed.mesh.dp.size)
    (batch,) = loader.batches(dataset, key, global_batch=cfg.batch, stop=1, part=share)
    state, step = train.init_state(composed, key), train.make_step(composed)
    times = []
    for number in range(cfg.warmup + cfg.steps):
        collectives.barrier(composed.mesh.all)
        if on_gpu and number == cfg.warmup:
            torch.cuda.reset_peak_memory_stats()
        began = now(composed.device)
        state, metrics = step(state, batch, key)
        times.append(1e3 * (now(composed.device) - began))
    with recorder.recording() as events:
        step(state, batch, key)
        exposed = 1e3 * recorder.exposed_s(events)
    moved = recorder.totals(events)
    gathered = sum(t.bytes for op, t in moved.items() if op == "all_gather")
    found = {
        "ms": times[cfg.warmup :],
        "loss": metrics["loss"],
        "exposed_ms": exposed,
        "gathered": gathered,
        "reduced": sum(t.bytes for t in moved.values()) - gathered,
        "peak": 0 if on_gpu else peak_rss(),
    }
    if on_gpu:
        found |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return found


def peak_rss() -> int:
    """Peak resident bytes of this process, the interpreter and libraries included."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """What a row was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


@dataclass(frozen=True)
class Sequence:
    """What each sequence strategy moves and keeps in a block, as recorded from rank 0 of a block run without data.

    Needs no GPU and no other ranks: shapes, transfers and storages are the real ones, no number is computed. Times are
    predicted (``odit/parallel/sequence.py``): what a strategy adds to a block's forward and backward pass.
    """

    preset: str = "dit-xl-2"
    """Width, heads and ffn of this preset of train.py."""
    batch: int = 1
    """Samples on the ranks of one sp group."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of matrix products."""
    sp: tuple[int, ...] = (2, 4, 8)
    """Ranks that share a sample."""
    lengths: tuple[int, ...] = (4096, 16384, 131072)
    """Tokens of a sample."""
    frames: int = 16
    """Frames that these make where the strategy is for time x space models (dsp)."""


def sequence(cfg: Sequence) -> None:
    """Prints a row a length, degree and strategy."""
    presets = config.presets()
    if cfg.preset not in presets:
        raise ValueError(f"preset is {cfg.preset!r}: use one of {', '.join(presets)}")
    model = presets[cfg.preset][1].model
    if odd := [length for length in cfg.lengths if length % cfg.frames]:
        raise ValueError(f"frames {cfg.frames} do not divide lengths {odd[0]}: use --frames 1, or another length")
    for length in cfg.lengths:
        alone = measure_block(cfg, model, place_of(cfg, model, "none", length, 1), "none")
        alone_pair = measure_block(cfg, model, place_of(cfg, model, "dsp", length, 1), "dsp")
        for sp in cfg.sp:
            for name, strategy in sequences.STRATEGIES.items():
                row = sequence_row(cfg, model, name, length, sp, alone_pair if strategy.time_space else alone)
                print(json.dumps(row), flush=True)


def sequence_row(cfg: Sequence, model: Config, name: str, length: int, sp: int, alone: dict) -> dict[str, Any]:
    """One strategy: recorded beside told elements, collectives, bytes, predicted times, memory of a block."""
    place = place_of(cfg, model, name, length, sp)
    about = {"name": name, "preset": cfg.preset, "batch": cfg.batch, "precision": cfg.precision}
    about |= {"length": length, "sp": sp}
    if name == "usp":
        about["ulysses"] = place.mesh.ulysses.size
    found = measure_block(cfg, model, place, name)
    told = [values * cfg.batch * model.head_size for values in sequences.STRATEGIES[name].received(place)]
    size = plan.DTYPES[cfg.precision].itemsize
    times = {
        f"{machine.name.lower()}_us": round(
            1e6 * sequences.exposed(name, place, cfg.batch, model.head_size, size, machine), 1
        )
        for machine in (sequences.NVLINK, sequences.INFINIBAND)
    }
    return {
        **about,
        "forward_elements": found["elements"][0],
        "forward_formula": told[0],
        "backward_elements": found["elements"][1],
        "backward_formula": told[1],
        "collectives": found["collectives"],
        "mib": round(found["bytes"] / 2**20, 2),
        **times,
        "kept_mib": round(found["kept"] / 2**20, 2),
        "kept_share": round(found["kept"] / alone["kept"], 4),
    }


def place_of(cfg: Sequence, model: Config, name: str, length: int, sp: int) -> Place:
    """Rank 0's place in a group of ``sp`` ranks that are not there."""
    u = sequences.inner_degree(name, sp, model.heads, None) if name == "usp" else 1
    u = u // 2 if u == sp > 2 else u  # all of sp would be ulysses itself
    sizes = {"sp": sp, "all": sp, "ulysses": u, "ring": sp // u}
    axes = {axis: meshes.Axis(axis, n, 0, None, tuple(range(n))) for axis, n in sizes.items()}
    mesh = dataclasses.replace(meshes.single(), world=sp, **axes)
    claims = sequences.STRATEGIES[name].claims if name != "none" else ""
    fits = {"H": model.heads % sp == 0, "F": model.ffn % sp == 0}
    frames = cfg.frames if name == "dsp" else 1
    return Place(mesh, length, model.heads, frames, claimed="".join(c for c in claims if sp > 1 and fits[c]))


def measure_block(cfg: Sequence, model: Config, place: Place, name: str) -> dict[str, Any]:
    """Transfers and bytes kept for backward of one block (of two, over space and time, for dsp) on meta tensors."""
    dtype, n, paired = plan.DTYPES[cfg.precision], place.axis.size, name == "dsp"
    kernels = memory.flash_on_meta(flash())
    ops = sequences.build(name, kernels, place)
    declared = dit.declare_block(model)
    shares = tree.map(lambda s, p: s.share_shape(p.shape), spec.specs(declared, n, False, n, place.claimed), declared)
    leaf = lambda shape: torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)  # noqa: E731
    params = tree.map(leaf, {"space": shares, "time": shares} if paired else shares)
    tokens = (place.frames // n or 1, place.length // place.frames) if paired else (place.tokens[0],)
    x, c_BD = leaf((cfg.batch, *tokens, model.width)), leaf((cfg.batch, model.width))
    block = latte.make_pair(model, ops) if paired else dit.make_block(model, ops)
    with memory.Weigh([x, c_BD, *tree.leaves(params)]) as weigh:
        with recorder.recording() as forward:
            y = block(params, x, c_BD, ())
        kept = weigh.now()
        with recorder.recording() as backward:
            torch.autograd.grad(y.sum(), [x, c_BD, *tree.leaves(params)])
    totals = [recorder.totals(events) for events in (forward, backward)]
    hops = ("ring_gather", "ring_reduce_scatter", "shift")
    return {
        "elements": [sum(t.elements for t in found.values()) for found in totals],
        "bytes": sum(t.bytes for found in totals for t in found.values()),
        "collectives": [sum(1 if op in hops else t.calls for op, t in found.items()) for found in totals],
        "kept": kept,
    }


BENCHES: dict[str, Callable] = {"zero": zero, "sequence": sequence}


def cli() -> None:
    """Reads the command line: what to measure, and its settings."""
    tyro.extras.subcommand_cli_from_dict(BENCHES, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    health.run(cli)
