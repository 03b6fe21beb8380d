"""Rates of this machine, for forecasts: products, attention, copies, kernels' passes, the host's link, collectives."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odit import checks, optim, pace, plan
from odit import kernels as fused_kernels
from odit.bench import attention as attentions
from odit.bench import kernels
from odit.bench import train as training
from odit.bench.common import device_name, now
from odit.bench.kernels import copy_gb_per_s, drawn, milliseconds
from odit.kernels import attention
from odit.parallel import collectives, offload
from odit.parallel import mesh as meshes
from odit.parallel.mesh import Axis
from odit.rates import find

MISCELLANEOUS = ("of_copy", "host_update_ns", "host_gb_per_s", "around_ms", "launch_us")
WIDTH = 1152  # of the rows that passes run over
HOST_BYTES = 2**28  # of a copy between host and device


@dataclass(frozen=True)
class Rates:
    """What experiments/plan.py forecasts by, as one JSON file; a row each on the way. Under torchrun also the link
    between the ranks, which is the one of their node or, over several nodes, the one between these."""

    out: Path = Path("rates.json")
    """The file to write; a field of it that was not measured keeps what the base has."""
    base: str = "h200"
    """A table, shipped or a file, for what this machine cannot measure: other links, a GPU's kernels on a CPU."""
    products: tuple[str, ...] = (
        "8192x8192x8192",
        *(f"{m}x{n}x{k}" for m in (2048, 8192, 32768) for n, k in ((3456, 1152), (1152, 1152), (4608, 1152))),
        *(f"{m}x1152x4608" for m in (2048, 8192, 32768)),
        *(f"{m}x{n}x32768" for m, n in ((3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608))),
        *(f"8192x{n}x{k}" for n, k in ((1152, 384), (384, 384), (1536, 384), (384, 1536))),
    )
    """M x N x K."""
    shapes: tuple[str, ...] = ("128x256x16x72", "8x4096x16x72", "8x4096x16x64", "128x256x6x64")
    """Batch x tokens x heads x head size of attention, by the backend that would be chosen and by FlashAttention 2."""
    precisions: tuple[str, ...] = ("bf16",)
    """Dtypes of products and attention."""
    rows: int = 2**15
    """Rows of 1,152 values that passes of kernels run over."""
    parameters: int = 2**28
    """Parameters that the optimizer's pass runs over, and the host's a quarter of them."""
    message: int = 2**28
    """Bytes that a collective brings to a rank."""
    repeats: int = 20
    """Measured calls; a row has their median."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""


def rates(cfg: Rates) -> None:
    """Measures, prints a row a figure, and writes the table from rank 0."""
    rank, world, _ = meshes.start(checks.pick_device(cfg.device))
    try:
        mesh = meshes.make_mesh(world, rank, None, 1)
        device = checks.pick_device(cfg.device)
        found = measured(cfg, device, rank == 0)
        if world > 1:
            found["links"] = {link_name(world): link(cfg, mesh.all, device)}
            told({"name": "collectives", "ranks": world, **found["links"]}, rank == 0)
        if rank == 0:
            write(cfg, device, found)
    finally:
        meshes.stop()


def told(row: dict[str, Any], speaks: bool = True) -> None:
    """Prints a row."""
    if speaks:
        print(json.dumps(row), flush=True)


def write(cfg: Rates, device: torch.device, found: dict[str, Any]) -> None:
    """Writes the table: what was found over the base's fields, with where each comes from."""
    base = json.loads(find(cfg.base).read_text())
    measured_links, passed = found.pop("links", {}), found.pop("of_copy")
    links, of_copy = base["links"] | measured_links, base["of_copy"] | passed
    found |= {"of_copy": of_copy} if passed else {}
    kept = {name: source for name, source in base["sources"].items() if name not in found}
    sources = {name: f"of {base['device']}: {source}" for name, source in kept.items()}
    sources |= {name: "measured by bench.py rates" for name in found if name in base["sources"]}
    if measured_links:
        sources["links"] = f"{', '.join(measured_links)}: measured by bench.py rates; others {sources['links']}"
    table = base | found | {"links": links, "sources": sources}
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    cfg.out.write_text(json.dumps(table, indent=2) + "\n")


def measured(cfg: Rates, device: torch.device, speaks: bool) -> dict[str, Any]:
    """The fields that one rank can measure."""
    on_gpu = device.type == "cuda"
    found: dict[str, Any] = {"device": device_name(device), **(about_gpu(device) if on_gpu else {})}
    found["copy_gb_per_s"] = round(copy_gb_per_s(device, cfg.repeats, 2**24), 1)
    told({"name": "copy", "device": found["device"], "gb_per_s": found["copy_gb_per_s"]}, speaks)
    found["products"] = []
    for precision, shape in itertools.product(cfg.precisions, cfg.products):
        found["products"].append(product(cfg, device, precision, shape))
        told({"name": "product", **found["products"][-1]}, speaks)
    found["attention"] = []
    for row in attended(cfg, device):
        found["attention"].append(row)
        told({"name": "attention", **row}, speaks)
    found["of_copy"] = passes(cfg, device, found["copy_gb_per_s"]) if on_gpu else {}
    found["host_update_ns"] = round(1e9 * host_update_s(cfg) / (cfg.parameters // 4), 4)
    found["around_ms"] = around_ms(cfg)
    if on_gpu:
        found["host_gb_per_s"], found["launch_us"] = round(host_gb_per_s(cfg, device), 1), launch_us(cfg)
    told({name: found[name] for name in MISCELLANEOUS if name in found}, speaks)
    return found


def digits(value: float) -> float:
    """Four of them: a CPU's figures are small."""
    return float(f"{value:.4g}")


def about_gpu(device: torch.device) -> dict[str, Any]:
    """What the driver says of it."""
    told_by = torch.cuda.get_device_properties(device)
    memory = round(told_by.total_memory / 2**30, 1)
    processors = told_by.multi_processor_count
    return {"capability": [told_by.major, told_by.minor], "multiprocessors": processors, "memory_gib": memory}


def product(cfg: Rates, device: torch.device, precision: str, shape: str) -> dict[str, Any]:
    """TFLOP/s of x w^T for x (m, k) and w (n, k), as weights lie."""
    m, n, k = map(int, shape.split("x"))
    dtype = plan.DTYPES[precision]
    x, w = drawn(0, (m, k), device).to(dtype), drawn(1, (n, k), device).to(dtype)
    ms = milliseconds(device, cfg.repeats, lambda: torch.nn.functional.linear(x, w))
    return {"precision": precision, "m": m, "n": n, "k": k, "tflops": digits(2 * m * n * k / ms / 1e9)}


def attended(cfg: Rates, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of attention; a library that cannot serve a shape is left out."""
    for precision, shape in itertools.product(cfg.precisions, cfg.shapes):
        B, L, H, K = map(int, shape.split("x"))
        dtype = plan.DTYPES[precision]
        wide = dict(chosen(device, dtype, K, L)) | {"flash2": K}
        asked = attentions.Attention(precision=precision, steps=cfg.repeats)
        for name, size in wide.items():
            row = attentions.row_of(asked, attention.BACKENDS[name], device, (B, L, H, K), size)
            if "ms" in row:
                flops = 4 * B * H * L * L * K
                speeds = {"forward_tflops": flops / row["forward_ms"] / 1e9, "tflops": 3.5 * flops / row["ms"] / 1e9}
                speeds = {key: digits(value) for key, value in speeds.items()}
                shape_of = {"batch": B, "heads": H, "tokens": L, "size": K, "wide": size}
                yield {"precision": precision, "backend": name, **shape_of, **speeds}


def chosen(device: torch.device, dtype: torch.dtype, K: int, L: int) -> Iterator[tuple[str, int]]:
    """(backend, size that heads get) of what runs would choose here, repeating bit for bit and not."""
    for repeats in (True, False):
        with contextlib.suppress(ValueError):  # nothing here repeats at that length
            choice = attention.choose(device, dtype, K, L, repeats=repeats)
            yield choice.backend.name, choice.wide


def passes(cfg: Rates, device: torch.device, copied: float) -> dict[str, float]:
    """Shares of a copy that fused kernels reach; of LayerNorms and gates over all bytes that a block moves."""
    if fused_kernels.obstacle(device) is not None:
        return {}
    asked = kernels.Kernels(batch=max(1, cfg.rows // 256), repeats=cfg.repeats)

    def speed(name: str, direction: str) -> tuple[float, float]:
        """GB moved and seconds."""
        case = kernels.make_case(asked, name, device)
        moved = case.moved[direction == "backward"] * case.inputs[0].numel() * case.inputs[0].element_size() / 1e9
        return moved, milliseconds(device, cfg.repeats, kernels.results(case.fused, case.inputs, direction)) / 1e3

    norms = [speed(name, way) for name in ("modulate", "gated_modulate", "gated") for way in ("forward", "backward")]
    norm = sum(moved for moved, _ in norms) / sum(s for _, s in norms)
    gelu = {way: speed("bias_gelu", way) for way in ("forward", "backward")}
    found = {"norm": norm} | {f"gelu_{way}": moved / s for way, (moved, s) in gelu.items()}
    found |= {"sums": sums_gb_per_s(cfg, device), "optimizer": optimizer_gb_per_s(cfg, device)}
    return {name: round(value / copied, 3) for name, value in found.items()}


def sums_gb_per_s(cfg: Rates, device: torch.device) -> float:
    """What the gradient of a bias reads."""
    from odit.kernels.linear import column_sums

    dy = drawn(0, (1, cfg.rows, WIDTH), device).bfloat16()
    return dy.numel() * 2 / milliseconds(device, cfg.repeats, lambda: column_sums(dy)) / 1e6


def optimizer_gb_per_s(cfg: Rates, device: torch.device) -> float:
    """What AdamW, EMA and the copy in bf16 read and write in one pass: 36 bytes a parameter."""
    from odit.kernels import adamw

    p, m, v, ema = (torch.full((cfg.parameters,), value, device=device) for value in (0.5, 0.01, 1e-4, 0.5))
    grad, low = (torch.full((cfg.parameters,), 0.02, dtype=torch.bfloat16, device=device) for _ in range(2))
    one_pass, count = adamw.fused(optim.adamw()), torch.tensor(10)

    def step() -> None:
        one_pass.update_([p], [grad], optim.AdamState([m], [v], count), 1e-4, ema=[ema], decay=0.999, low=[low])

    return 36 * cfg.parameters / milliseconds(device, cfg.repeats, step) / 1e6


def host_update_s(cfg: Rates) -> float:
    """What offload does on the CPU's cores, for so many parameters that no cache holds them: takes the gradient out of
    staging, its norm and clip, AdamW, EMA and the cast."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    p, m, v, ema, staged = (torch.full((cfg.parameters // 4,), value) for value in (0.5, 0.01, 1e-4, 0.5, 0.02))
    grad, low = torch.empty_like(p), torch.empty_like(p, dtype=torch.bfloat16)
    optimizer, count = optim.adamw(fused=True), torch.tensor(10)

    def step() -> None:
        offload.squared_norm(grad.copy_(staged))
        grad.mul_(0.5)
        optimizer.update_([p], [grad], optim.AdamState([m], [v], count), 1e-4)
        optim.ema_([ema], [p], 0.999)
        low.copy_(p)

    ms = milliseconds(torch.device("cpu"), min(cfg.repeats, 5), step)
    torch.set_num_threads(threads)
    return ms / 1e3


def around_ms(cfg: Rates) -> float:
    """A training step of hardly any model, one thin block: draws, the batch's way to the device, figures, the host."""
    return thin_step_ms(cfg, 1, "auto")


def launch_us(cfg: Rates) -> float:
    """What the host takes for a kernel of thin blocks whose launches no graph keeps."""
    few, more = (thin_step_ms(cfg, depth, "auto+nographs") for depth in (1, 9))
    return round(1e3 * (more - few) / 8 / (pace.FORWARD_KERNELS + pace.BACKWARD_KERNELS), 1)


def thin_step_ms(cfg: Rates, depth: int, way: str) -> float:
    """A training step of so many blocks of one head."""
    asked = training.Train(preset="dit-s-8", steps=cfg.repeats, device=cfg.device)
    run = training.run_of(asked, way)
    thin = dataclasses.replace(run.model, width=64, heads=1, depth=depth)
    return training.measure(asked, dataclasses.replace(run, model=thin))[0]["ms"]


def host_gb_per_s(cfg: Rates, device: torch.device) -> float:
    """The slower way of the two between pinned memory and the GPU."""
    here, there = torch.empty(HOST_BYTES, dtype=torch.uint8).pin_memory(), torch.empty(HOST_BYTES, dtype=torch.uint8)
    there = there.to(device)
    ways = (lambda: there.copy_(here, non_blocking=True), lambda: here.copy_(there, non_blocking=True))
    return min(HOST_BYTES / milliseconds(device, cfg.repeats, way) / 1e6 for way in ways)


def link_name(world: int) -> str:
    """Which link of the table the ranks talk over: their node's, or the one between nodes."""
    return "nvlink" if int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world else "infiniband"


def link(cfg: Rates, axis: Axis, device: torch.device) -> dict[str, float]:
    """GB/s that arrive at a rank by the slowest collective, and microseconds of one that brings hardly anything."""
    speeds = {}
    for name, call, received in transfers(axis, device, cfg.message):
        speeds[name] = round(received / seconds(call, axis, device, cfg.repeats) / 1e9, 3)
    told({"name": "collectives", "gb_per_s": speeds}, axis.rank == 0)
    smallest = [seconds(call, axis, device, cfg.repeats) for _, call, _ in transfers(axis, device, 4 * axis.size)]
    return {"gb_per_s": min(speeds.values()), "launch_us": round(1e6 * max(smallest), 1)}


def transfers(axis: Axis, device: torch.device, size: int) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """(name, call, bytes received) of the collectives that a step has, where ``size`` bytes are on a rank at once."""
    n = axis.size
    each = max(1, size // (2 * n))
    part = torch.zeros(each, dtype=torch.bfloat16, device=device)
    whole = torch.zeros(n * each, dtype=torch.bfloat16, device=device)
    received = 2 * (n - 1) * each
    yield "all_gather", functools.partial(collectives.all_gather_flat, whole, part, axis), received
    yield "reduce_scatter", functools.partial(collectives.reduce_scatter_flat, part, whole, axis), received
    square = whole.view(n, each)

    def swap() -> Tensor:
        return collectives.all_to_all(square, axis, 0, 1)

    yield "all_to_all", swap, received


def seconds(call: Callable[[], Any], axis: Axis, device: torch.device, repeats: int) -> float:
    """Of one call among many, one after the other, on the slowest rank."""
    for _ in range(3):
        call()
    collectives.barrier(axis)
    now(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = (now(device) - began) / repeats
    return max(collectives.gather_objects(axis, taken))
