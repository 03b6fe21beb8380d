"""Bytes a rank holds in a layout, by formula: what scales with weights leaf by leaf, what scales with samples by a
step of one or two blocks on meta tensors (memory.py), which thousands of layouts share.

A step is fullest at one of four moments:

  start of backward   state, working weights, sums of earlier micro-batches, all activations, a block's backward pass
  its second block    one block's activations fewer, that block's gradients on their way
  end of backward     all gradients, the activations of the first block
  after it            gradients cast, summed over ranks and applied; no activations

The last is a step of samples of a token each, weighed for each way of splitting weights; the first three are sums.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from odit import memory, models, ops, plan, train, tree
from odit.choice import DTYPES, mlp_sizes
from odit.config import Parallel, Run
from odit.draws import Draws
from odit.kernels import attention
from odit.models.config import Config, Shape
from odit.parallel import mesh as meshes
from odit.parallel import offload, zero
from odit.plan import Plan

BATCHES = (8, 16)  # of the weighed steps; bytes are affine in the samples and in the blocks


class Weights(NamedTuple):
    """Bytes of a rank that scale with the parameters, on the device while backward runs."""

    masters: int
    moments: int
    ema: int
    working: int
    gradients: int
    """As backward leaves them: whole ones in the working dtype, or this rank's parts in the masters'."""
    sums: int
    """Of what earlier micro-batches left."""
    block: int
    """Elements of the largest block, as the model sees it."""

    @property
    def standing(self) -> int:
        """Between steps."""
        return self.masters + self.moments + self.ema


class Kept(NamedTuple):
    """Bytes of a rank that scale with its samples: kept by a forward pass, of them in a block, and what backward needs
    beside them."""

    forward: float
    block: float
    backward: float


@dataclass(frozen=True)
class Footprint:
    """What a rank of a layout holds."""

    weights: Weights
    kept: Kept
    peak: int
    """Tensors at the fullest moment."""
    taken: int
    """Memory that a graph's pool keeps to itself counted in: what has to fit."""
    host: int


def pretend(run: Run, shape: Shape, world: int, capability: tuple[int, int]) -> Plan:
    """The plan of rank 0 of ``world`` GPUs that need not be there, with the kernels that they would have.

    Raises ValueError for a layout that start-up refuses.
    """
    mesh = meshes.pretend(world, **_degrees(run, world))
    p = run.parallel
    here = replace(run, device="cpu", kernels="reference", parallel=replace(p, memory_gib=None))
    composed = plan.compose(here, shape, mesh)
    kernels = record(run, shape, composed.sequence, capability)
    one_pass = run.kernels != "reference" and p.offload == "none"
    return replace(composed, run=replace(here, kernels=run.kernels), kernels=kernels, one_pass=one_pass)


def _degrees(run: Run, world: int) -> dict[str, Any]:
    found = plan.checks.axes(run, world)
    return {name: found[name] for name in ("dp", "sp", "ulysses")}


def record(run: Run, shape: Shape, strategy: str, capability: tuple[int, int]) -> ops.Ops:
    """The record that ``plan`` would choose on a GPU of this compute capability, where all libraries are there."""
    from odit import kernels
    from odit.kernels import gelu_mlp

    if run.kernels == "reference":
        return ops.Ops()
    size, found = run.model.head_size, attended(run, shape, strategy, capability)
    fused = kernels.fused(ops.flash())
    if gelu_in_products(run, strategy, capability):
        fused = replace(fused, mlp=gelu_mlp.site(run.parallel.remat))
    if found is None:
        return fused
    choice = attention.Choice(attention.BACKENDS[found.backend], found.wide, found.told)
    return attention.with_attention(fused, choice, size, strategy == "none")


def gelu_in_products(run: Run, strategy: str, capability: tuple[int, int]) -> bool:
    """Whether the mlp's products have its GELU in them there."""
    from odit.kernels import gelu_mlp

    mlp = gelu_mlp.Mlp(*mlp_sizes(run, strategy))
    return run.kernels != "reference" and gelu_mlp.serves(capability, DTYPES[run.precision], mlp) is None


def attended(run: Run, shape: Shape, strategy: str, capability: tuple[int, int]) -> attention.Entry | None:
    """The attention that is taken there; None where PyTorch chooses, or parts are merged by their log-sum-exp."""
    if strategy in ("ring", "usp"):
        return None
    frames = models.of(run.model).time_space(run.model, shape.size)
    length = models.num_tokens(run.model, shape.size) // frames
    return next(iter(attention.entries(capability, run.model.head_size, length, True, run.deterministic)), None)


def footprint(composed: Plan, capability: tuple[int, int]) -> Footprint:
    """What a rank of this plan holds, which ``pretend`` made."""
    run, num_micro = composed.run, composed.num_micro
    w, kept = weights(composed), activations(composed, capability)
    sums = w.sums if num_micro > 1 else 0
    base = w.standing + w.working + sums
    stage, dtype = run.parallel.zero, composed.dtype.itemsize
    whole = dtype * w.block if stage == 3 else 0  # a gathered block, and as much again for the rows of the next one
    sending = w.block * (dtype + (2 if run.parallel.reduce == "bf16" else 4)) if stage >= 2 else w.block * dtype
    moments = (
        base + 2 * whole + kept.forward + kept.backward,
        base + 2 * whole + kept.forward - kept.block + kept.backward + sending,
        base + whole + w.gradients + kept.block + kept.backward + (sending if stage >= 2 else 0),
        after_backward(composed, capability),
    )
    peak = taken = max(moments)
    if graphed(composed):  # captured before there are sums, and its pool stays beside them and what follows
        pool = max(moments[:3]) - base
        peak = max(*(moment - sums for moment in moments[:3]), moments[3])
        # where all sums follow backward, those of micro-batches are all the last moment has beside what ranks sum;
        # else it has the graph's gradients in it
        summed = num_micro > 1 and composed.mesh.world > 1 and stage < 2
        taken = max(*moments[:3], moments[3] + pool - (0 if summed else w.gradients))
    host = 0
    if run.parallel.offload != "none":
        leaves, size = parts(composed), composed.dtype.itemsize
        few = sum(x.local for x in leaves if x.trained)  # frozen leaves have a master and a working copy alone
        frozen = sum(x.local for x in leaves) - few
        host = offload.host_bytes(few, composed.dtype) + frozen * (4 + size)
    return Footprint(w, kept, int(peak), int(taken), host)


def graphed(composed: Plan) -> bool:
    """Whether forward and backward would be one CUDA graph there."""
    return replace(composed, device=torch.device("cuda")).graph_obstacle is None


class Part(NamedTuple):
    """A leaf as one rank has it."""

    seen: int
    """Elements that the model sees: all, or a strategy's share."""
    local: int
    """Elements that are stored here."""
    block: int
    """-1 outside the blocks."""
    split: bool
    """Whether ZeRO splits it."""
    claimed: bool
    """Whether a strategy has claimed it over sp."""
    trained: bool


def parts(composed: Plan) -> tuple[Part, ...]:
    """The leaves in order; layouts that split weights alike share what was found."""
    run, mesh, p = composed.run, composed.mesh, composed.run.parallel
    parallel = Parallel(dp=mesh.dp.size, sp=mesh.sp.size, sequence=composed.sequence, zero=p.zero, ulysses=p.ulysses)
    return _parts(replace(_same(run), parallel=parallel, global_batch=mesh.dp.size), composed.shape, mesh.world)


@functools.lru_cache(maxsize=4096)
def _parts(run: Run, shape: Shape, world: int) -> tuple[Part, ...]:
    composed = pretend(run, shape, world, (0, 0))
    found = zip(tree.items(composed.declared), tree.leaves(composed.layout.specs), composed.trained)

    def part(path: str, p: Any, s: Any, trained: bool) -> Part:
        first, place, *_ = f"{path}.".split(".")
        seen, local = (math.prod(shape) for shape in (s.share_shape(p.shape), s.local_shape(p.shape)))
        block = int(place) if first == zero.BLOCKS else -1
        return Part(seen, local, block, s.dim is not None, s.claimed is not None, trained)

    return tuple(part(path, p, s, trained) for (path, p), s, trained in found)


def weights(composed: Plan) -> Weights:
    """Exact bytes by leaf: the table of ZeRO (README, what each stage costs and saves)."""
    leaves, stage, size = parts(composed), composed.run.parallel.zero, composed.dtype.itemsize
    stays = composed.run.parallel.offload == "none"
    local = sum(x.local for x in leaves)
    few = sum(x.local for x in leaves if x.trained)
    held = 0 if stage == 0 and size == 4 else sum(x.seen for x in leaves if stage < 3 or x.block < 0)
    seen = few if stage >= 2 else sum(x.seen for x in leaves if x.trained)
    blocks = [0] * (1 + max(x.block for x in leaves))
    for x in leaves:
        blocks[x.block] += x.seen * (x.block >= 0)
    return Weights(
        masters=4 * local * stays,
        moments=8 * few * stays,
        ema=4 * few * stays,
        working=size * held,
        gradients=(4 if stage >= 2 else size) * seen * (stays or stage < 2),
        sums=4 * seen * stays,
        block=max(blocks),
    )


# ---------------------------------------------------------------------------------------------- weighed, and kept


def activations(composed: Plan, capability: tuple[int, int]) -> Kept:
    """Of this rank's micro-batch, from steps of few samples and blocks."""
    run, mesh = composed.run, composed.mesh
    key = replace(
        _same(run), parallel=Parallel(dp=1, sp=mesh.sp.size, sequence=composed.sequence, remat=run.parallel.remat)
    )
    key = replace(key, parallel=replace(key.parallel, ulysses=run.parallel.ulysses, ring_fp8=run.parallel.ring_fp8))
    few, more = _depths(run.model)
    found = [[_weigh(key, composed.shape, capability, depth, b) for b in BATCHES] for depth in (few, more)]

    def at(part: int, blocks: float) -> float:
        """Affine in the samples, at two depths, and in the depth."""
        ends = [_line(BATCHES, [each[part] for each in row], composed.micro_batch) for row in found]
        return _line((few, more), ends, blocks)

    forward = at(0, run.model.depth)
    return Kept(forward, (at(0, more) - at(0, few)) / (more - few) * _step(run.model), at(1, few))


def _line(places: tuple[int, int], values: list[float], x: float) -> float:
    (a, b), (y, z) = places, values
    return y + (z - y) * (x - a) / (b - a)


def _step(model: Config) -> int:
    """Blocks of the depth that are one entry of the parameters."""
    return 2 if model.arch == "latte" else 1


def _depths(model: Config, least: int = 1) -> tuple[int, int]:
    return least * _step(model), (least + 1) * _step(model)


def _same(run: Run) -> Run:
    """The run without what plays no part in activations, so that layouts share what was weighed."""
    return replace(Run(), model=run.model, diffusion=run.diffusion, data=run.data, encoders=run.encoders,
                   finetune=run.finetune, init_from=run.init_from, precision=run.precision, kernels=run.kernels,
                   deterministic=run.deterministic, sampling=run.sampling, evaluate=False, global_batch=1)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _weigh(run: Run, shape: Shape, capability: tuple[int, int], depth: int, batch: int) -> tuple[int, int]:
    """(kept by the forward pass, needed beside it by backward) of so many blocks and samples, in bytes."""
    run = replace(run, model=replace(run.model, depth=depth), global_batch=batch)
    composed = memory.on_meta(pretend(run, shape, run.parallel.sp or 1, capability))
    layout, device = composed.layout, memory.META
    parts = [s.local_shape(p.shape) for p, s in zip(tree.leaves(composed.declared), tree.leaves(layout.specs))]
    sample, trained = composed.shape.sample, composed.trained
    with memory.Weigh([]) as weigh:
        held = layout.hold(tree.unflatten(composed.declared, [torch.empty(s, device=device) for s in parts]))
        leaves = [p.detach() for p in tree.leaves(held.whole)]
        wanted = [p.requires_grad_() for p, t in zip(leaves, trained) if t]
        before = weigh.now()
        x = torch.empty(batch, *sample, device=device)
        y = tree.map(lambda c: c.expand(batch, *c.shape[1:]), composed.null)
        dropped_B = torch.empty(batch, dtype=torch.bool, device=device)
        t_B = composed.objective.draw_times(*(torch.empty(batch, device=device) for _ in range(2)))
        draws = Draws(t_B, torch.empty_like(x), dropped_B)
        targets = tree.unflatten(composed.declared, leaves)
        loss = train.losses(composed, *composed.view(targets, held), x, y, draws).sum()
        kept = weigh.now() - before
        torch.autograd.grad(loss, wanted, allow_unused=True)
        return kept, weigh.peak - before - kept


def after_backward(composed: Plan, capability: tuple[int, int]) -> float:
    """The peak of a step of samples of hardly any tokens, from steps of few blocks."""
    run, mesh, p = composed.run, composed.mesh, composed.run.parallel
    sp = mesh.sp.size if composed.claimed else 1
    micro = 2 if composed.num_micro > 1 else 1
    parallel = Parallel(dp=mesh.world // sp, sp=sp, zero=p.zero, reduce=p.reduce, offload=p.offload)
    parallel = replace(parallel, sequence=composed.sequence if sp > 1 else "auto")
    key = replace(_same(run), optimizer=run.optimizer, parallel=parallel, micro_batch=1, graphs=run.graphs)
    key = replace(key, global_batch=micro * parallel.dp)
    patch, clip = run.model.patch, len(composed.shape.size) == 3
    small = replace(composed.shape, size=(*((2 * run.model.frame_patch,) if clip else ()), patch * max(sp, 1), patch))
    few, more = _depths(run.model, 3)  # with fewer blocks not all that is under way at once is there
    found = [_weigh_step(key, small, capability, mesh.world, depth) for depth in (few, more)]
    return _line((few, more), found, run.model.depth)


@functools.lru_cache(maxsize=4096)
def _weigh_step(run: Run, shape: Shape, capability: tuple[int, int], world: int, depth: int) -> int:
    run = replace(run, model=replace(run.model, depth=depth))
    return memory.predict(pretend(run, shape, world, capability)).peak
