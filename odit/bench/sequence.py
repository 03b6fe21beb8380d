"""What each sequence strategy moves and keeps, without a GPU and without other ranks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import torch

from odit import memory, plan, tree
from odit.bench.common import preset
from odit.models import dit, latte
from odit.models.config import Config
from odit.ops import flash
from odit.parallel import collectives, recorder, spec
from odit.parallel import mesh as meshes
from odit.parallel import sequence as sequences
from odit.parallel.place import Place


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
    model = preset(cfg.preset).model
    for name, values in {"batch": (cfg.batch,), "sp": cfg.sp, "lengths": cfg.lengths, "frames": (cfg.frames,)}.items():
        if wrong := [value for value in values if value < 1]:
            raise ValueError(f"{name} has {wrong[0]}: use 1 or more")
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
    kernels = flash()
    ops = sequences.build(name, kernels, place)
    declared = dit.declare_block(model)
    shares = tree.map(lambda s, p: s.share_shape(p.shape), spec.specs(declared, n, False, n, place.claimed), declared)
    leaf = lambda shape: torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)  # noqa: E731
    params = tree.map(leaf, {"space": shares, "time": shares} if paired else shares)
    tokens = (collectives.shares(place.frames, n)[0], place.length // place.frames) if paired else (place.tokens[0],)
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
