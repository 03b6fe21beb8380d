"""The composer: from a config to the functions and shapes a run needs, after every start-up check (checks.py)."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from odit import checks, compiling, data, diffusion, finetune, graphs, models, remat, tree
from odit import front as fronts
from odit.choice import DTYPES, kernels_of
from odit.config import Parallel, Run
from odit.data import buckets
from odit.data.latents import Latents
from odit.data.tokens import Bytes
from odit.diffusion.flow import Flow
from odit.front import Front
from odit.models import dit
from odit.models.config import Config, Shape, Size
from odit.ops import Ops
from odit.parallel import collectives, sequence, zero
from odit.parallel.mesh import Mesh, single
from odit.parallel.place import Place
from odit.parallel.spec import unsplit


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first step."""

    run: Run
    device: torch.device
    shape: Shape
    declared: dict
    objective: Any
    kernels: Ops
    """The record of one rank."""
    dtype: torch.dtype
    mesh: Mesh
    sequence: str
    """The strategy by which ranks share a sample's tokens, or none."""
    notes: tuple[str, ...]
    """Choices made for the user and why, one line each."""
    claimed: str = ""
    """Letters of the dims on which that strategy has weights stored split over sp, such as HF (heads, ffn)."""
    compiled: bool = False
    """Whether blocks are compiled: asked for, and possible here."""
    one_pass: bool = False
    """Whether the optimizer's update is one kernel."""

    front: Front = field(default_factory=Front)
    """What stands between data and model."""
    sizes: tuple[Size, ...] = ()
    """What the model sees of samples, a bucket each; ``shape`` is of the first."""

    @property
    def tokenize(self) -> Callable[[list[str]], dict[str, torch.Tensor]] | None:
        """Captions to tensors, samples first; None where samples have none."""
        return self.front.tokenize

    @functools.cached_property
    def null(self) -> tree.Tree:
        """The condition of guidance's unconditional pass, (1, ...): the null label, or the empty caption."""
        if not self.shape.text_length:
            last = dit.num_labels(self.run.model, self.shape) - 1  # without a null label, some label to stand in
            return torch.tensor([max(0, last)], device=self.device)
        cached = self.front.cache.null if self.front.cache is not None else None
        return tree.map(lambda x: x.to(self.device), cached or self.tokenize([""]))

    @property
    def micro_batch(self) -> int:
        """Samples of one forward pass on one rank."""
        return self.run.micro_batch or self.run.global_batch // self.mesh.dp.size

    @property
    def num_micro(self) -> int:
        """Micro-batches of a step on one rank."""
        return self.run.global_batch // self.mesh.dp.size // self.micro_batch

    @property
    def home(self) -> torch.device:
        """Where masters, moments and EMA start to live."""
        return self.device if self.run.parallel.offload == "none" else torch.device("cpu")

    @property
    def sums_dtype(self) -> torch.dtype | None:
        """Of a step's gradients until ranks sum them; None for the masters', which sums over micro-batches need, an
        optimizer of several passes, and fp16, in which what is small is lost once the loss scale is divided out."""
        if self.num_micro > 1 or self.dtype == torch.float16:
            return None
        as_they_come = self.one_pass if self.mesh.world == 1 else self.layout.stage <= 1  # which reduces them later
        return self.dtype if as_they_come else None

    @property
    def graph_obstacle(self) -> str | None:
        """Why forward and backward of a micro-batch cannot be one CUDA graph; None where they can."""
        if not self.run.graphs:
            return "--no-graphs"
        if self.device.type != "cuda":
            return f"the device is {self.device.type}"
        if self.home != self.device:
            return "weights are in host memory"
        if self.exchanges and collectives.through_host(self.mesh.all, self.device):
            return "ranks that share a GPU exchange tensors in it through the host"
        if self.dtype == torch.float16:
            return "the loss scale of fp16 changes"
        return "a frozen text encoder runs in it" if self.front.text is not None else None

    @property
    def exchanges(self) -> bool:
        """Whether ranks exchange tokens, weights or gradients within a micro-batch."""
        return self.mesh.sp.size > 1 or (self.layout.stage >= 2 and self.mesh.world > 1)

    @functools.cached_property
    def graphs(self) -> dict[Any, Any]:
        """Captured functions, by what they depend on (graphs.py)."""
        return {}

    @property
    def budget(self) -> float | None:
        """Bytes of device memory that offload auto may fill; None where nothing is placed by a budget."""
        p = self.run.parallel
        if p.offload != "auto":
            return None
        return 2**30 * p.memory_gib if p.memory_gib else 0.95 * torch.cuda.mem_get_info(self.device)[1]

    def forward(self, params: tree.Tree, x: torch.Tensor, t_B: torch.Tensor, y: Any, ops: Ops) -> torch.Tensor:
        """The model, by the parameters and the record that ``view`` gave."""
        size = tuple(x.shape[2:])
        if size != self.shape.size:  # of another bucket
            ops = replace(self.record(size), layers=ops.layers)
        return models.of(self.run.model).forward(params, x, t_B, y, self.run.model, ops)

    @property
    def ops(self) -> Ops:
        """The record that the model gets: kernels under the sequence strategy."""
        return self.record(self.shape.size)

    def record(self, size: Size) -> Ops:
        """``ops`` for samples of another size."""
        if size not in self._records:
            self._records[size] = sequence.build(self.sequence, self.kernels, self.place(size))
        return self._records[size]

    @functools.cached_property
    def _records(self) -> dict[Size, Ops]:
        return {}

    def place(self, size: Size) -> Place:
        """What the sequence strategy is built for."""
        return replace(_place(self.run, size, self.mesh), claimed=self.claimed, fp8=self.run.parallel.ring_fp8)

    @functools.cached_property
    def layout(self) -> zero.Layout:
        """How the state is stored and used; ZeRO splits over dp x sp together, what is claimed over sp over dp."""
        p = self.run.parallel
        reduce_dtype = torch.promote_types(self.dtype, torch.float32) if p.reduce == "fp32" else torch.bfloat16
        return zero.layout(
            self.declared, p.zero, self.mesh, self.dtype, reduce_dtype, self.device, p.remat == "block", self.claimed
        )

    @functools.cached_property
    def trained(self) -> tuple[bool, ...]:
        """Which leaves train, in order; the others are frozen."""
        return finetune.trained(self.run.finetune, self.declared)

    def view(self, targets: tree.Tree, held: zero.Held, sink: zero.Sink | None = None) -> tuple[tree.Tree, Ops]:
        """``layout.view`` of this plan's record: parameters and record for a forward pass."""
        params, ops = self.layout.view(targets, held, self.ops, sink)
        ops = compiling.compiled(ops) if self.compiled else ops
        if self.run.parallel.remat == "selective":
            # of claimed weights ranks have parts: a branch is summed over them, after the product that is kept
            ops = remat.recomputing(ops, keeps_branches=not _claims(self.sequence))
        cfg = self.run.finetune
        return params, finetune.adapted(ops, cfg.scale) if cfg.lora_rank else ops

    def inference(self, params: tree.Tree) -> tuple[tree.Tree, Ops]:
        """Parameters and record for forward passes without gradients, from this rank's parts of the weights."""
        if self.home != self.device:  # cast once, not in each forward pass
            params = tree.map(lambda p: _pinned(p.to(self.dtype)) if p.device.type == "cpu" else p, params)
        held = self.layout.hold(params)
        return self.view(self.layout.targets(params, held), held)


def _pinned(x: torch.Tensor) -> torch.Tensor:
    return x.pin_memory() if torch.cuda.is_available() else x


def make(run: Run, dataset: data.Dataset, mesh: Mesh | None = None, front: Front | None = None) -> Plan:
    """Composes the plan of a run on this data; checks first."""
    front = front or load_front(run, mesh)
    if isinstance(dataset, Latents):
        front = fronts.cached(front, dataset)
    sizes = bucket_sizes(run, front)
    shape = shape_of(run, dataset, front)
    checks.check_buckets(run, shape, sizes, (mesh or single()).world)
    plan = compose(run, shape, mesh, front, tuple(sizes.values()))
    if isinstance(dataset, buckets.Bucketed):
        tokens = [models.num_tokens(run.model, size) for size in sizes.values()]
        told = dataset.describe(run.global_batch, dict(zip(dataset.buckets, tokens)).__getitem__)
        plan = dataclasses.replace(plan, notes=(*plan.notes, *told), sizes=tuple(sizes.values()))
    if run.global_batch <= len(dataset.train_ids):
        return plan
    note = (
        f"global batch {run.global_batch} is more than the {len(dataset.train_ids)} training samples: "
        "a batch holds some of them twice, with other noise"
    )
    return dataclasses.replace(plan, notes=(*plan.notes, note))


def load_front(run: Run, mesh: Mesh | None = None) -> Front:
    """Loads the encoders that a run names, in their dtype, on its device."""
    dtype = DTYPES[run.encoders.precision or run.precision]
    return fronts.load(run, mesh or single(), checks.pick_device(run.device), dtype)


def compose(
    run: Run,
    shape: Shape,
    mesh: Mesh | None = None,
    front: Front | None = None,
    sizes: Sequence[Size] = (),
) -> Plan:
    """Composes the plan of a run for data of a known shape, on one rank unless a mesh is given; checks first.

    Args:
        sizes: of other samples than ``shape`` tells, in buckets.
    """
    mesh = mesh or single()
    checks.check(run, shape, mesh.world)
    device, notes = checks.pick_device(run.device), []
    if run.threads:
        torch.set_num_threads(run.threads)
    elif (
        run.parallel.offload != "none" and device.type == "cuda"
    ):  # the CPU updates; torchrun leaves it one core a rank
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    checks.check_budget(run, device)
    checks.check_kernels(run, device)
    objective = diffusion.build(run.diffusion)
    if not shape.conditional:
        notes.append("guidance: none (the data has no classes and no captions)")
    name, told = _strategy(run, shape, mesh, device)
    kernels, line = kernels_of(run, shape, sizes, device, name)
    notes.append(line)
    front = front or load_front(run, mesh)
    if front.tokenize is None and shape.text_length and not shape.text_width:  # a cache of captions as bytes
        front = replace(front, tokenize=Bytes(shape.text_length))
    obstacle = compiling.obstacle(device, compiling.BACKEND) if run.compile else None
    if run.compile:
        notes.append(f"compile: none ({obstacle})" if obstacle else f"compile: blocks, by {compiling.BACKEND}")
    declared = finetune.declare(run.finetune, models.of(run.model).declare(run.model, shape))
    notes += finetune.describe(run.finetune, declared)
    return Plan(
        run=run,
        device=device,
        shape=shape,
        declared=declared,
        objective=objective if isinstance(objective, Flow) else objective.to(device),
        kernels=kernels,
        dtype=DTYPES[run.precision],
        mesh=mesh,
        sequence=name,
        notes=(*notes, *told),
        claimed=_claimed(name, run.model, mesh.sp.size),
        compiled=run.compile and obstacle is None,
        one_pass=kernels.modulate is not Ops().modulate and run.parallel.offload == "none",
        front=front,
    )


def _strategy(run: Run, shape: Shape, mesh: Mesh, device: torch.device) -> tuple[str, list[str]]:
    """The sequence strategy, and lines on how it was chosen and what it leaves unused."""
    p, sp, notes = run.parallel, mesh.sp.size, []
    if sp == 1:
        return "none", notes
    if p.sp is None and p.dp is None:
        notes.append(
            f"mesh: dp {mesh.dp.size} x sp {sp}: global batch {run.global_batch} does not divide over {mesh.world} "
            f"ranks, so {sp} of them share the tokens of a sample"
        )
    name, place = p.sequence, _place(run, shape.size, mesh)
    if name == "auto":
        batch = run.micro_batch or run.global_batch // mesh.dp.size
        near = int(os.environ.get("LOCAL_WORLD_SIZE", sp)) % sp == 0
        machine = sequence.GLOO if device.type == "cpu" else sequence.NVLINK if near else sequence.INFINIBAND
        size = DTYPES[run.precision].itemsize
        name, line = sequence.choose(place, batch, run.model.head_size, size, machine)
        if mesh.all.group is not None:  # machines may hold unequally many ranks
            name, line = collectives.broadcast_object(mesh.all, (name, line))
        notes.append(line)
    if line := sequence.idle(name, sp, run.model.heads, mesh.ulysses.size):
        notes.append(line)
    return name, notes


def _place(run: Run, size: Size, mesh: Mesh) -> Place:
    cfg = run.model
    return Place(mesh, models.num_tokens(cfg, size), cfg.heads, models.of(cfg).time_space(cfg, size))


def _claimed(name: str, model: Config, sp: int) -> str:
    """The letters that a strategy claims and sp divides; other weights are stored as ever, and sliced where used."""
    sizes = {"H": model.heads, "F": model.ffn}
    return "".join(letter for letter in _claims(name) if sizes[letter] % sp == 0)


def _claims(name: str) -> str:
    """The letters of the dims on which a strategy would have weights stored split."""
    return sequence.STRATEGIES[name].claims if name != "none" else ""


def alone(run: Run) -> Run:
    """The same run on one rank, nothing compiled, no gradients measured."""
    kernels = "auto" if run.kernels == "fused" else run.kernels  # it may run where there is no GPU
    run = dataclasses.replace(run, parallel=Parallel(), micro_batch=None, compile=False, grad_norms=False)
    return dataclasses.replace(run, kernels=kernels, deterministic=None)


def shape_of(run: Run, dataset: data.Dataset, front: Front) -> Shape:
    """What the model is built around on this data."""
    channels, *size = front.sample_shape(dataset.shape)
    outputs = 2 if run.diffusion.learned_variance else 1
    return Shape(channels, tuple(size), dataset.num_classes, outputs, *front.text_size)


def bucket_sizes(run: Run, front: Front) -> dict[str, Size]:
    """What the model sees of samples by their buckets' names; raises ValueError for one that an encoder cannot take."""
    found = {}
    for name, size in data.bucket_sizes(run.data).items():
        try:
            found[name] = front.sample_shape((3, *size))[1:]
        except ValueError as error:
            raise ValueError(f"data.buckets has {name}, and {error}") from None
    return found


def largest(plan: Plan) -> Plan:
    """The plan as of the bucket with most tokens, whose steps hold most."""
    size = max(plan.sizes, key=lambda size: models.num_tokens(plan.run.model, size), default=plan.shape.size)
    return dataclasses.replace(plan, shape=replace(plan.shape, size=size))


def _ranks(plan: Plan) -> str:
    mesh = plan.mesh
    told = f"{mesh.world} rank{'s' * (mesh.world > 1)}"
    return told if mesh.sp.size == 1 else f"{told} (dp {mesh.dp.size} x sp {mesh.sp.size}, {plan.sequence})"


def describe(plan: Plan) -> str:
    """A few lines for people: model, data, objective, choices."""
    cfg, shape = plan.run.model, plan.shape
    total, trainable = models.num_params(cfg, shape)
    patch = f"{cfg.frame_patch}x{cfg.patch}x{cfg.patch}" if len(shape.size) == 3 else cfg.patch
    condition = f"{shape.num_classes} classes" if shape.num_classes else "unconditional"
    condition = f"captions of {shape.text_length} tokens" if shape.text_length else condition
    choices = list(plan.notes)
    if plan.device.type == "cuda":
        why, num = plan.graph_obstacle, len(plan.sizes)
        some = f", for the first {graphs.MOST} of {num} sizes that come" if num > graphs.MOST else ""
        told = f"none ({why})" if why else f"forward and backward of a micro-batch are one{some}"
        choices.append(f"graphs: {told}")
    lines = [
        f"model: {'Latte' if cfg.arch == 'latte' else 'DiT'} width {cfg.width}, depth {cfg.depth}, heads {cfg.heads}, "
        f"patch {patch}: {total / 1e6:.2f} M parameters ({trainable / 1e6:.2f} M trained), "
        f"{models.of(cfg).macs(cfg, shape) / 1e9:.3f} GMAC a sample",
        f"data: {plan.run.data.source}, {'x'.join(map(str, shape.sample))}, {condition}",
        f"run: {plan.run.diffusion.objective}, {plan.run.steps} steps of {plan.run.global_batch}, {plan.run.precision} "
        f"on {plan.device}, seed {plan.run.seed}"
        + (f", {_ranks(plan)}, zero {plan.layout.stage}" if plan.mesh.world > 1 or plan.layout.stage else ""),
    ]
    if plan.layout.stage and (whole := unsplit(plan.declared, plan.layout.specs)):
        lines += [f"zero: {line}" for line in whole if not re.match(rf"{zero.BLOCKS}\.[1-9]", line)]  # blocks are alike
    return "\n".join([*lines, *choices])
