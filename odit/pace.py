"""Seconds of a training step in a layout: the sum of its parts, each by a measured rate (rates) and a count.

  products       FLOPs by the nearest measured shape, no less than their bytes take; what is recomputed counts again
  attention      FLOPs by the backend's measured rate at that head size and length, no less than its bytes take
  passes         what LayerNorms, gates, GELUs and sums for biases read and write, at their measured share of a copy
  optimizer      AdamW, EMA, casts, sums of micro-batches and the gradient's norm, likewise; or the host's sweep
  around         draws, the batch's way to the GPU, figures, the host between two steps, whatever the model
  waits          between the kernels of a graph; without one, launches where they take longer than the kernels
  weights        ZeRO's gathers and reductions that no block's computing hides
  tokens         what a sequence strategy exposes (parallel/sequence.py)

Not in it: data, validation, checkpoints; the memory and the multiprocessors that transfers take from kernels
beside them; ranks that wait for a slower one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from odit import models
from odit.footprint import Part, attended, gelu_in_products, graphed, parts
from odit.kernels.attention import BACKENDS, own_along_time
from odit.parallel import sequence
from odit.parallel.collectives import shares
from odit.plan import Plan
from odit.rates import Link, Rates

FORWARD_KERNELS, BACKWARD_KERNELS = 12, 28  # of a block
MEETINGS = 2 * 1.5  # rows that sums of gradients move: 3 each by count, half by time (37 us of 75 MB on an H100)
RANKS_A_MACHINE = 8


@dataclass(frozen=True)
class Pace:
    """Seconds of a step on one rank, by part."""

    products: float
    attention: float
    passes: float
    optimizer: float
    around: float
    waits: float
    weights: float
    tokens: float

    @property
    def step(self) -> float:
        """All of it."""
        return sum(vars(self).values())


class Passed(NamedTuple):
    """Bytes that a rank receives in a step for its weights and their gradients."""

    gathered: int
    reduced: int


class Block(NamedTuple):
    """Seconds of a block's passes: forward, backward, and what remat runs again."""

    forward: float
    backward: float
    again: float


def pace(composed: Plan, machine: Rates, capability: tuple[int, int], links: dict[str, Link]) -> Pace:
    """A step of this plan, which ``footprint.pretend`` made.

    Args:
        links: what carries the mesh axes dp, sp and all.
    """
    run, m, depth = composed.run, composed.num_micro, composed.run.model.depth
    products = _products_s(composed, machine, capability)
    attention = _attention_s(composed, machine, capability)
    passes = _passes_s(composed, machine, capability)
    again = {"none": (0, 0, 0), "block": (1, 1, 1), "selective": (0, 0, 1)}[run.parallel.remat]
    recomputed = [times * part.forward for times, part in zip(again, (products, attention, passes))]
    ends = _ends_s(composed, machine)
    blocks = [m * depth * (p.forward + p.backward + r) for p, r in zip((products, attention, passes), recomputed)]
    one = Block(*(sum(p[i] for p in (products, attention, passes)) for i in (0, 1)), sum(recomputed))
    kernels = m * depth * (FORWARD_KERNELS * (1 + (run.parallel.remat != "none")) + BACKWARD_KERNELS)
    waits = kernels * 1e-6 * machine.wait_us
    if not graphed(composed):
        waits = max(waits, kernels * 1e-6 * machine.launch_us - sum(blocks))
    return Pace(
        products=blocks[0],
        attention=blocks[1],
        passes=blocks[2] + m * ends,
        optimizer=_optimizer_s(composed, machine),
        around=1e-3 * machine.around_ms,
        waits=waits,
        weights=_weights_s(composed, one, links["all"]),
        tokens=m * _tokens_s(composed, machine, links["sp"]),
    )


# ------------------------------------------------------------------------------------------------ computing, a block


def _tokens(composed: Plan) -> int:
    """Tokens that a rank holds of its micro-batch: the first rank has most."""
    length = models.num_tokens(composed.run.model, composed.shape.size)
    return composed.micro_batch * shares(length, composed.mesh.sp.size)[0]


def _shapes(composed: Plan, capability: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """(m, n, k) of a block's products in the forward pass; heads may be wider than they are."""
    cfg, claimed, n, rows = composed.run.model, composed.claimed, composed.mesh.sp.size, _tokens(composed)
    entry = attended(composed.run, composed.shape, composed.sequence, capability)
    all_rows = rows * n if claimed else rows
    D, F, B = cfg.width, cfg.ffn // (n if "F" in claimed else 1), composed.micro_batch
    inner = cfg.heads * (entry.wide if entry else cfg.head_size) // (n if "H" in claimed else 1)
    yield all_rows, 3 * inner, D
    yield all_rows, D, inner
    for _ in range(2 if cfg.mlp == "swiglu" else 1):
        yield all_rows, F, D
    yield all_rows, D, F
    if cfg.adaln == "zero":
        yield B, 6 * D, D
    if composed.shape.text_length and cfg.text == "cross":
        S = B * composed.shape.text_length
        yield from ((rows, D, D), (S, 2 * D, D), (rows, D, D))


def _product_s(machine: Rates, m: int, n: int, k: int, precision: str) -> tuple[float, float]:
    """Forward; and backward, which is the gradients of the rows and of the weight."""
    forward = machine.product_s(m, n, k, precision)
    return forward, machine.product_s(m, k, n, precision) + machine.product_s(n, k, m, precision)


def _products_s(composed: Plan, machine: Rates, capability: tuple[int, int]) -> Block:
    found = [_product_s(machine, *s, composed.run.precision) for s in _shapes(composed, capability)]
    return Block(sum(f for f, _ in found), sum(b for _, b in found), 0.0)


def _attention_s(composed: Plan, machine: Rates, capability: tuple[int, int]) -> Block:
    """The mean over blocks where these attend to space and to time in turn; not the copies that many frames take."""
    cfg, size, n = composed.run.model, composed.shape.size, composed.mesh.sp.size
    frames, length = models.of(cfg).time_space(cfg, size), models.num_tokens(cfg, size)
    lengths = (length // frames, frames) if frames > 1 else (length,)
    entry = attended(composed.run, composed.shape, composed.sequence, capability)
    merged = composed.sequence in ("ring", "usp")
    backend = "flash2" if merged else entry.backend if entry else None
    own = frames > 1 and own_along_time(length // frames, frames, cfg.heads, cfg.head_size, composed.dtype)
    backends = (backend, "triton" if own else backend)
    heads = (
        cfg.width if merged or frames > 1 else cfg.head_size * shares(cfg.heads, n)[0] * n
    )  # most on a rank, n times
    moved = 4 * composed.micro_batch * length * cfg.width * composed.dtype.itemsize / n
    found = [
        machine.attention_s(seen, cfg.head_size, 4 * composed.micro_batch * length * seen * heads / n, moved, which)
        for seen, which in zip(lengths, backends)
    ]
    return Block(sum(f for f, _ in found) / len(found), sum(b for _, b in found) / len(found), 0.0)


def _passes_s(composed: Plan, machine: Rates, capability: tuple[int, int]) -> Block:
    """Tensors of the tokens' size that fused kernels read and write (kernels/, a line each), sums for biases, sums of
    two gradients where branches meet, which L2 holds in part, q, k and v put together.

    Of blocks that sum themselves: where a sum is left to the next block (``dit.Unsummed``) it is about 1 % of a step
    less."""
    cfg, n, size = composed.run.model, composed.mesh.sp.size, composed.dtype.itemsize
    tokens = _tokens(composed)
    row = tokens * cfg.width * size
    wide = tokens * cfg.ffn * size  # under megatron all tokens and a part of the ffn: as many
    # in products: one tensor more than without GELU, which is written in forward and read in backward
    into, back = (1, 1) if gelu_in_products(composed.run, composed.sequence, capability) else (2, 3)
    forward = machine.pass_s((2 + 4 + 3) * row, "norm") + machine.pass_s(into * wide, "gelu_forward")
    sums = (3 + 1 + 1) * row * (n if composed.claimed else 1)
    entry = attended(composed.run, composed.shape, composed.sequence, capability)
    plain_qk = not cfg.qk_norm and cfg.positions != "rotary"
    packed = 0 if plain_qk and entry and BACKENDS[entry.backend].attend_packed and composed.sequence == "none" else 6
    backward = machine.pass_s((3 + 6 + 3 + MEETINGS + packed) * row, "norm") + machine.pass_s(sums, "sums")
    return Block(forward, backward + machine.pass_s(back * wide, "gelu_backward"), 0.0)


def _ends_s(composed: Plan, machine: Rates) -> float:
    """What stands around the blocks: patches in and out, the last LayerNorm, in bytes."""
    cfg, shape, precision = composed.run.model, composed.shape, composed.run.precision
    rows = composed.micro_batch * models.num_tokens(cfg, shape.size)
    values = shape.channels * cfg.patch_values(shape.size)
    shapes = ((rows, cfg.width, values), (rows, shape.outputs * values, cfg.width))
    products = sum(sum(_product_s(machine, *s, precision)) for s in shapes)
    return products + machine.pass_s(10 * rows * cfg.width * composed.dtype.itemsize, "norm")


# ---------------------------------------------------------------------------------------------------- once a step


def _optimizer_s(composed: Plan, machine: Rates) -> float:
    """36 bytes a parameter and more; of parts where ZeRO splits them. On the host the ranks of a machine share it."""
    whole, local = _counts(composed)
    size, stage, m = composed.dtype.itemsize, composed.run.parallel.zero, composed.num_micro
    seen = local if stage >= 2 else whole
    g = size if composed.sums_dtype is not None and composed.mesh.world == 1 else 4
    sums = 0 if g == size else (size + 4) * whole + (m - 1) * (8 + size) * seen
    cast = (4 + size) * (local if stage else whole) * (size != 4)
    if composed.run.parallel.offload != "none":
        down = 4 * m * local / machine.host_gb_per_s / 1e9
        up = size * local * (2 * m if stage == 3 else 1) / machine.host_gb_per_s / 1e9
        ranks = min(composed.mesh.world, RANKS_A_MACHINE)
        return local * ranks * 1e-9 * machine.host_update_ns + down + up
    return machine.pass_s(sums + cast + (32 + g + g) * local, "optimizer")


def _counts(composed: Plan) -> tuple[int, int]:
    """Elements that the model sees and those of this rank's parts."""
    leaves = parts(composed)
    return sum(x.seen for x in leaves), sum(x.local for x in leaves)


# ---------------------------------------------------------------------------------------------------- between ranks


def passed(composed: Plan) -> Passed:
    """Bytes received in a step, exactly: gathers in the working dtype, reductions in theirs (README, ZeRO)."""
    inside, outside = _bundles(composed)
    stage, m = composed.run.parallel.zero, composed.num_micro
    gathers = 2 * m if stage == 3 else min(stage, 1)
    gathered = sum(gathers * b.gathered for b in inside) + min(stage, 1) * outside.gathered
    reduced = (m if stage >= 2 else 1) * sum(b.reduced for b in [*inside, outside])
    return Passed(gathered, reduced)


def _bundles(composed: Plan) -> tuple[list[Passed], Passed]:
    """One gather and one reduction of each block, and of what is outside them."""
    leaves: dict[int, list[Part]] = {}
    for x in parts(composed):
        leaves.setdefault(x.block, []).append(x)
    outside = _bundle(composed, leaves.pop(-1))
    return [_bundle(composed, found) for found in leaves.values()], outside


def _bundle(composed: Plan, leaves: list[Part]) -> Passed:
    """What is claimed over sp travels apart, along dp alone (parallel/bundle.py)."""
    mesh, p, gathered, reduced = composed.mesh, composed.run.parallel, 0, 0
    for n, claimed in ((mesh.all.size, False), (mesh.dp.size, True)):
        chosen = [x for x in leaves if x.claimed == claimed]
        split = sum(x.seen for x in chosen if x.split)
        whole = sum(x.seen for x in chosen if not x.split)
        parts_alone = split - split // n
        reduced += parts_alone + _all_reduced(whole, n) if p.zero >= 2 else _all_reduced(split + whole, n)
        gathered += parts_alone if p.zero else 0
    return Passed(gathered * composed.dtype.itemsize, reduced * (2 if p.reduce == "bf16" else 4))


def _all_reduced(num: int, n: int) -> int:
    """Elements that the first rank receives (collectives.all_reduce_)."""
    own = shares(num, n)[0]
    return (n - 1) * own + num - own if n > 1 else 0


def _weights_s(composed: Plan, block: Block, link: Link) -> float:
    """What is left of gathers and reductions beside the blocks that run meanwhile.

    Stages 0 and 1 sum once, after backward, and hide nothing; stage 2 reduces a block beside the next one's backward
    pass; stage 3 also gathers the next block beside this one's forward and backward pass.
    """
    if composed.mesh.world == 1:
        return 0.0
    inside, outside = _bundles(composed)
    stage, m = composed.run.parallel.zero, composed.num_micro

    def seconds(num_bytes: float) -> float:
        return num_bytes / link.gb_per_s / 1e9 + 1e-6 * link.launch_us if num_bytes else 0.0

    gather, reduce = (sum(seconds(b[i]) for b in inside) for i in (0, 1))
    once, ends = seconds(outside.gathered) * min(stage, 1), seconds(outside.reduced)
    if stage <= 1:
        return once + ends + reduce + (gather if stage else 0.0)
    num = len(inside)
    depth = composed.run.model.depth
    forward, backward = (depth * s for s in (block.forward, block.backward + block.again))
    if stage == 2:
        return once + gather + m * (ends + _exposed(reduce, backward, num))
    return once + m * (ends + _exposed(gather, forward, num) + _exposed(gather + reduce, backward, num))


def _exposed(transfer: float, work: float, num: int) -> float:
    """Of ``num`` transfers each beside another's work: the first is waited for, and what outlasts the work."""
    return transfer / num + max(0.0, (transfer - work) * (num - 1) / num)


def _tokens_s(composed: Plan, machine: Rates, link: Link) -> float:
    """What a sequence strategy exposes in a micro-batch, forward and backward."""
    if composed.sequence == "none":
        return 0.0
    cfg, place = composed.run.model, composed.place(composed.shape.size)
    flops = max(p.tflops for p in machine.products) * 1e12
    told = sequence.Machine("", link.gb_per_s * 1e9, 1e-6 * link.launch_us, flops)
    each = sequence.exposed(
        composed.sequence, place, composed.micro_batch, cfg.head_size, composed.dtype.itemsize, told
    )
    num = 1 + max(x.block for x in parts(composed))
    return num * each * (1 + (composed.run.parallel.remat != "none") / 2)
