"""Training steps at each ZeRO stage."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from odit import checks, config, data, memory, models, plan, random, train
from odit.bench.common import check_steps, clear_peaks, device_name, now, peak, preset
from odit.data import loader
from odit.parallel import collectives, recorder
from odit.parallel import mesh as meshes


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
    remat: Literal["none", "block", "selective"] = "none"
    """Activations computed again in backward."""
    compile: bool = False
    """Compiles the blocks; what is planned is of eager ones."""
    graphs: bool = True
    """Forward and backward of a micro-batch are one CUDA graph where they can be."""
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
    check_steps(cfg.steps, cfg.warmup)
    for layout in cfg.stages:
        parse(layout)
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
        "graphs": cfg.graphs,
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
    moved = {
        "gathered_mib": round(found["gathered"] / 2**20, 3),
        "reduced_mib": round(found["reduced"] / 2**20, 3),
        "exposed_ms": round(found["exposed_ms"], 2),
    }
    hidden = composed.exchanges and composed.graph_obstacle is None  # within a graph, where nothing records them
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
        **({} if hidden else moved),
        "loss": found["loss"],
    }


def parse(layout: str) -> tuple[Any, Any, float | None]:
    """'3+auto24' -> (3, 'auto', 24.0): the stage, what is offloaded and the budget in GiB."""
    found = re.fullmatch(r"([0-3])(?:\+(optimizer|auto)((?<=auto)\d+(?:\.\d+)?)?)?", layout)
    if found is None:
        raise ValueError(f"stages has {layout!r}: use 0, 1, 2 or 3, alone or with +optimizer, +auto or +auto24 (GiB)")
    stage, offload, gib = found.groups()
    return int(stage), offload or "none", float(gib) if gib else None


def zero_run(cfg: Zero, layout: str) -> config.Run:
    """The run of a layout such as 3+auto24."""
    stage, offload, gib = parse(layout)
    run = preset(cfg.preset)
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
        graphs=cfg.graphs,
        parallel=config.Parallel(zero=stage, reduce=cfg.reduce, remat=cfg.remat, offload=offload, memory_gib=gib),
    )


def measure_steps(cfg: Zero, composed: plan.Plan) -> dict[str, Any]:
    """Milliseconds a step, and of one more, recorded step the bytes and the exposed time; peak over all."""
    key, on_gpu = random.key(0), composed.device.type == "cuda"
    clear_peaks(composed.device)
    dataset = data.open_dataset(composed.run.data, composed.front.tokenize)
    share = (composed.mesh.dp.rank, composed.mesh.dp.size)
    (batch,) = loader.batches(dataset, key, global_batch=cfg.batch, stop=1, part=share)
    state, step = train.init_state(composed, key), train.make_step(composed)
    times = []
    for number in range(cfg.warmup + cfg.steps):
        collectives.barrier(composed.mesh.all)
        if on_gpu and number == cfg.warmup and composed.graph_obstacle is not None:
            torch.cuda.reset_peak_memory_stats()  # what a graph holds is allocated while it is captured alone
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
        "peak": peak(composed.device),
    }
    return found | ({"reserved": torch.cuda.max_memory_reserved()} if on_gpu else {})
