"""The composer: from a config to the functions and shapes a run needs, after every start-up check."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from odit import compiling, data, diffusion, optim, tree
from odit.config import Parallel, Run, Sampling
from odit.diffusion import solvers
from odit.diffusion.flow import Flow
from odit.models import dit
from odit.ops import Ops, flash
from odit.parallel import collectives, sequence, zero
from odit.parallel.mesh import Mesh, check_mesh, single
from odit.parallel.place import Place
from odit.parallel.spec import unsplit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first step."""

    run: Run
    device: torch.device
    shape: dit.Shape
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

    @property
    def null_label(self) -> int:
        """The label of guidance's unconditional pass."""
        return self.shape.num_classes

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
    def budget(self) -> float | None:
        """Bytes of device memory that offload auto may fill; None where nothing is placed by a budget."""
        p = self.run.parallel
        if p.offload != "auto":
            return None
        return 2**30 * p.memory_gib if p.memory_gib else 0.95 * torch.cuda.mem_get_info(self.device)[1]

    @property
    def forward(self) -> Callable:
        """``(params, x_BCHW, t_B, y_B, ops=...) -> out``."""
        return functools.partial(dit.forward, cfg=self.run.model)

    @functools.cached_property
    def place(self) -> Place:
        """What the sequence strategy is built for."""
        cfg, p = self.run.model, self.run.parallel
        length = dit.num_tokens(cfg, self.shape)
        return Place(self.mesh, length, cfg.heads, claimed=self.claimed, fp8=p.ring_fp8)

    @functools.cached_property
    def ops(self) -> Ops:
        """The record that the model gets: kernels under the sequence strategy."""
        return sequence.build(self.sequence, self.kernels, self.place)

    @functools.cached_property
    def layout(self) -> zero.Layout:
        """How the state is stored and used; ZeRO splits over dp x sp together, what is claimed over sp over dp."""
        p = self.run.parallel
        reduce_dtype = torch.promote_types(self.dtype, torch.float32) if p.reduce == "fp32" else torch.bfloat16
        return zero.layout(
            self.declared, p.zero, self.mesh, self.dtype, reduce_dtype, self.device, p.remat == "block", self.claimed
        )

    def view(self, targets: tree.Tree, held: zero.Held, sink: zero.Sink | None = None) -> tuple[tree.Tree, Ops]:
        """``layout.view`` of this plan's record: parameters and record for a forward pass."""
        params, ops = self.layout.view(targets, held, self.ops, sink)
        return params, compiling.compiled(ops) if self.compiled else ops

    def inference(self, params: tree.Tree) -> tuple[tree.Tree, Ops]:
        """Parameters and record for forward passes without gradients, from this rank's parts of the weights."""
        if self.home != self.device:  # cast once, not in each forward pass
            params = tree.map(lambda p: _pinned(p.to(self.dtype)) if p.device.type == "cpu" else p, params)
        held = self.layout.hold(params)
        return self.view(self.layout.targets(params, held), held)


def _pinned(x: torch.Tensor) -> torch.Tensor:
    return x.pin_memory() if torch.cuda.is_available() else x


def check(run: Run, shape: dit.Shape | None = None, world: int = 1) -> None:
    """Refuses what cannot run on ``world`` ranks, before anything slow happens.

    Raises:
        ValueError: one sentence that names the key, what was found and what would be right.
    """
    _check_numbers(run)
    _check_served(run)
    dp, sp = divide(run, world)
    _check_share(run, dp)
    _check_offload(run)
    data.check(run.data)
    diffusion.check(run.diffusion)
    optim.check(run.optimizer)
    objective = diffusion.build(run.diffusion)
    _check_pairs(run, shape)
    shape = shape or _expected_shape(run)
    dit.check(run.model, shape)
    _check_sequence(run, shape, sp, world)
    check_sampling(run.sampling, run.model, shape, objective)
    if run.evaluate and run.data.source == "digits" and run.data.held_out * 1797 < 1:
        raise ValueError(
            f"data.held_out is {run.data.held_out} but evaluate needs held-out digits for its judge: "
            "use --data.held-out 0.1666 or --no-evaluate"
        )


def _check_numbers(run: Run) -> None:
    for name in ("steps", "global_batch", "log_every", "checkpoint_every", "sample_every", "validate_every", "keep"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name} is {getattr(run, name)}: use 1 or more")
    if run.validation_draws < 1:
        raise ValueError(f"validation_draws is {run.validation_draws}: use 1 or more")
    if not 0 <= run.seed < 2**64:
        raise ValueError(f"seed is {run.seed}: use an integer in [0, 2**64)")
    if run.stop_at is not None and not 0 < run.stop_at <= run.steps:
        raise ValueError(
            f"stop_at {run.stop_at} lies outside the run's steps 1 to {run.steps}: use a step between them"
        )
    if run.threads is not None and run.threads < 1:
        raise ValueError(f"threads is {run.threads}: use 1 or more")


def _check_sequence(run: Run, shape: dit.Shape, sp: int, world: int) -> None:
    p = run.parallel
    try:
        if run.grad_norms and sp > 1:
            raise ValueError(
                f"grad_norms needs whole samples on a rank, which parallel.sp {sp} does not leave: use --parallel.sp 1"
            )
        sequence.check(p.sequence, sp, dit.num_tokens(run.model, shape), 1, p.ulysses, p.ring_fp8)
    except ValueError as error:
        if sp == 1 or p.sp is not None or p.dp is not None:
            raise
        nearest = max(1, round(run.global_batch / world)) * world
        told = str(error).split(": use")[0]
        raise ValueError(
            f"{told}; sp is {sp} because global_batch {run.global_batch} does not divide over {world} ranks: "
            f"use --global-batch {nearest}"
        ) from None


def _check_share(run: Run, dp: int) -> None:
    """The global batch is cut into equal shares, and these into equal micro-batches."""
    if run.global_batch % dp:
        nearest = max(dp, round(run.global_batch / dp) * dp)
        raise ValueError(
            f"global_batch {run.global_batch} does not divide over parallel.dp {dp}: the nearest that does is {nearest}"
        )
    share, micro = run.global_batch // dp, run.micro_batch
    if micro is not None and (micro < 1 or share % micro):
        nearest = min((n for n in range(1, share + 1) if share % n == 0), key=lambda n: abs(n - micro))
        of = (
            f"global_batch {run.global_batch}"
            if dp == 1
            else f"the share of a rank, {run.global_batch} / {dp} = {share}"
        )
        raise ValueError(f"micro_batch {micro} does not divide {of}: the nearest that does is {nearest}")


def _check_offload(run: Run) -> None:
    p = run.parallel
    if p.memory_gib is not None and p.offload != "auto":
        raise ValueError(
            f"parallel.memory_gib is {p.memory_gib} but parallel.offload is {p.offload}: use --parallel.offload auto, "
            "which places state by it, or leave it out"
        )
    if p.memory_gib is not None and not p.memory_gib > 0:
        raise ValueError(f"parallel.memory_gib is {p.memory_gib}: use a positive number")
    if p.offload != "none" and p.zero < 2:
        raise ValueError(
            f"parallel.offload {p.offload} takes gradients away block by block, which parallel.zero {p.zero} does not: "
            "use --parallel.zero 2 or 3 (on any number of ranks, one too)"
        )
    if p.offload == "auto" and pick_device(run.device).type != "cuda":
        raise ValueError(
            "parallel.offload auto places state by a GPU's memory and this run is on the CPU: leave it out"
        )


def _check_served(run: Run) -> None:
    """Settings that this version knows but does not serve are refused, never ignored."""
    p = run.parallel
    later = {
        "parallel.remat": (p.remat, ("none", "block")),
        "kernels": (run.kernels, ("auto", "reference")),
        "replay": (run.replay, (None,)),
    }
    for key, (found, served) in later.items():
        if found not in served:
            fits = " or ".join(str(value) for value in served)
            raise ValueError(f"{key} is {found}, which this version does not serve yet: use {fits}")
    if run.grad_norms and p.zero == 3:
        raise ValueError(
            "grad_norms needs whole weights, which parallel.zero 3 does not keep: use parallel.zero 2 or less"
        )


def divide(run: Run, world: int) -> tuple[int, int]:
    """(dp, sp) of ``world`` ranks.

    Unless told, tokens are shared by as few ranks as can be: sharing samples moves less. Raises ValueError.
    """
    p = run.parallel
    if p.sp is not None or p.dp is not None:
        return check_mesh(world, p.dp, p.sp if p.sp is not None else max(1, world // max(1, p.dp)), p.cfg)
    degrees = [sp for sp in range(1, world + 1) if world % sp == 0 and run.global_batch % (world // sp) == 0]
    paired = [sp for sp in degrees if world // sp % p.cfg == 0]
    return check_mesh(world, None, (paired or degrees)[0], p.cfg)


def axes(run: Run, world: int) -> dict[str, int]:
    """The sizes that ``make_mesh`` wants for a run on ``world`` ranks."""
    dp, sp = divide(run, world)
    p = run.parallel
    ulysses = sequence.inner_degree(p.sequence, sp, run.model.heads, p.ulysses)
    return {"dp": dp, "sp": sp, "ulysses": ulysses, "cfg": p.cfg}


def check_sampling(sampling: Sampling, model: dit.Config, shape: dit.Shape, objective: Any) -> None:
    """Refuses solver settings that do not fit the objective or the model."""
    solvers.check_solver(objective, solver_of(sampling, objective), sampling.steps)
    g = sampling.guidance
    if not 0 <= g.scale < float("inf"):
        raise ValueError(f"sampling.guidance.scale is {g.scale}: use a number >= 0; 1 is no guidance")
    if not 0 <= g.interval[0] < g.interval[1] <= 1:
        raise ValueError(f"sampling.guidance.interval is {g.interval}: use two rising numbers in [0, 1]")
    if g.channels is not None and not 1 <= g.channels <= shape.channels:
        raise ValueError(
            f"sampling.guidance.channels is {g.channels} but pictures have {shape.channels}: "
            f"use 1 to {shape.channels}, or leave it out for all"
        )
    if shape.num_classes and not model.label_dropout and g.scale != 1:
        raise ValueError(
            f"sampling.guidance.scale is {g.scale} but model.label_dropout 0.0 trains no null label: "
            "use --model.label-dropout 0.1 or a scale of 1"
        )
    if sampling.clip is not None and isinstance(objective, Flow):
        raise ValueError(f"sampling.clip is {sampling.clip}, which a flow's solvers do not have: leave it out")
    if sampling.clip is not None and not sampling.clip > 0:
        raise ValueError(f"sampling.clip is {sampling.clip}: use a positive number, or leave it out")


def _check_pairs(run: Run, shape: dit.Shape | None) -> None:
    """Refuses guidance on two ranks where there is none; without a shape, classes are not known yet."""
    p, scale = run.parallel, run.sampling.guidance.scale
    if p.cfg == 1:
        return
    if shape is not None and not shape.num_classes:
        raise ValueError(
            f"parallel.cfg is {p.cfg} but the data has 0 classes, so that nothing is guided: use parallel.cfg 1"
        )
    if scale == 1:
        raise ValueError(
            f"parallel.cfg is {p.cfg} but sampling.guidance.scale 1.0 has no null pass for a second rank: "
            "use parallel.cfg 1, or another scale, such as 4"
        )


def solver_of(sampling: Sampling, objective: Any) -> str:
    """The solver chosen, or the default for the objective."""
    return sampling.solver or ("heun" if isinstance(objective, Flow) else "ddim")


def make(run: Run, dataset: data.Dataset, mesh: Mesh | None = None) -> Plan:
    """Composes the plan of a run on this data; checks first."""
    plan = compose(run, _shape(run, dataset), mesh)
    if run.global_batch <= len(dataset.train_ids):
        return plan
    note = (
        f"global batch {run.global_batch} is more than the {len(dataset.train_ids)} training samples: "
        "a batch holds some of them twice, with other noise"
    )
    return dataclasses.replace(plan, notes=(*plan.notes, note))


def compose(run: Run, shape: dit.Shape, mesh: Mesh | None = None) -> Plan:
    """Composes the plan of a run for data of a known shape, on one rank unless a mesh is given; checks first."""
    mesh = mesh or single()
    check(run, shape, mesh.world)
    device, notes = pick_device(run.device), []
    if run.threads:
        torch.set_num_threads(run.threads)
    elif (
        run.parallel.offload != "none" and device.type == "cuda"
    ):  # the CPU updates; torchrun leaves it one core a rank
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    _check_budget(run, device)
    objective = diffusion.build(run.diffusion)
    if not shape.num_classes:
        notes.append("guidance: none (the data has no classes)")
    kernels = Ops()
    if run.kernels == "auto" and device.type == "cuda":
        kernels = flash()
        notes.append("kernels: PyTorch's attention (auto on a GPU), the rest reference")
    elif run.kernels == "auto":
        notes.append("kernels: reference (auto on a CPU)")
    name, told = _strategy(run, shape, mesh, device)
    obstacle = compiling.obstacle(device, compiling.BACKEND) if run.compile else None
    if run.compile:
        notes.append(f"compile: none ({obstacle})" if obstacle else f"compile: blocks, by {compiling.BACKEND}")
    return Plan(
        run=run,
        device=device,
        shape=shape,
        declared=dit.declare(run.model, shape),
        objective=objective if isinstance(objective, Flow) else objective.to(device),
        kernels=kernels,
        dtype=DTYPES[run.precision],
        mesh=mesh,
        sequence=name,
        notes=(*notes, *told),
        claimed=_claimed(name, run.model, mesh.sp.size),
        compiled=run.compile and obstacle is None,
    )


def _strategy(run: Run, shape: dit.Shape, mesh: Mesh, device: torch.device) -> tuple[str, list[str]]:
    """The sequence strategy, and lines on how it was chosen and what it leaves unused."""
    p, sp, notes = run.parallel, mesh.sp.size, []
    if sp == 1:
        return "none", notes
    if p.sp is None and p.dp is None:
        notes.append(
            f"mesh: dp {mesh.dp.size} x sp {sp}: global batch {run.global_batch} does not divide over {mesh.world} "
            f"ranks, so {sp} of them share the tokens of a sample"
        )
    name, place = p.sequence, Place(mesh, dit.num_tokens(run.model, shape), run.model.heads)
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


def _claimed(name: str, model: dit.Config, sp: int) -> str:
    """The letters that a strategy claims and sp divides; other weights are stored as ever, and sliced where used."""
    sizes = {"H": model.heads, "F": model.ffn}
    claims = sequence.STRATEGIES[name].claims if name != "none" else ""
    return "".join(letter for letter in claims if sizes[letter] % sp == 0)


def _check_budget(run: Run, device: torch.device) -> None:
    gib = run.parallel.memory_gib
    if gib is not None and gib * 2**30 > (total := torch.cuda.mem_get_info(device)[1]):
        raise ValueError(
            f"parallel.memory_gib is {gib} but this GPU has {total / 2**30:.1f} GiB: use less, or leave it out for "
            f"{0.95 * total / 2**30:.1f}"
        )


def alone(run: Run) -> Run:
    """The same run on one rank, nothing compiled."""
    return dataclasses.replace(run, parallel=Parallel(), micro_batch=None, compile=False)


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' is a GPU where there is one. Raises ValueError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not name.startswith("cuda"):
        raise ValueError(f"device is {name!r}: use auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r} but PyTorch {torch.__version__} sees no GPU: use --device cpu or auto")
    return torch.device(name)


def _shape(run: Run, dataset: data.Dataset) -> dit.Shape:
    channels, height, width = dataset.shape
    assert height == width, dataset.shape
    return dit.Shape(channels, height, dataset.num_classes, 2 if run.diffusion.learned_variance else 1)


def _expected_shape(run: Run) -> dit.Shape:
    """The shape as far as the config tells it, without opening the data; a folder's classes are not known yet."""
    cfg, outputs = run.data, 2 if run.diffusion.learned_variance else 1
    if cfg.source == "digits":
        return dit.Shape(1, 8, 10, outputs)
    if cfg.source == "folder":
        return dit.Shape(3, cfg.image_size, 0, outputs)
    channels, size, num_classes = cfg.channels, cfg.image_size, cfg.num_classes
    return dit.Shape(channels or 4, size or 32, 1000 if num_classes is None else num_classes, outputs)


def _ranks(plan: Plan) -> str:
    mesh = plan.mesh
    told = f"{mesh.world} rank{'s' * (mesh.world > 1)}"
    return told if mesh.sp.size == 1 else f"{told} (dp {mesh.dp.size} x sp {mesh.sp.size}, {plan.sequence})"


def describe(plan: Plan) -> str:
    """A few lines for people: model, data, objective, choices."""
    total, trainable = dit.num_params(plan.run.model, plan.shape)
    cfg, shape = plan.run.model, plan.shape
    lines = [
        f"model: DiT width {cfg.width}, depth {cfg.depth}, heads {cfg.heads}, patch {cfg.patch}: "
        f"{total / 1e6:.2f} M parameters ({trainable / 1e6:.2f} M trained), "
        f"{dit.macs(cfg, shape) / 1e9:.3f} GMAC a sample",
        f"data: {plan.run.data.source}, {shape.channels}x{shape.size}x{shape.size}, "
        + (f"{shape.num_classes} classes" if shape.num_classes else "unconditional"),
        f"run: {plan.run.diffusion.objective}, {plan.run.steps} steps of {plan.run.global_batch}, {plan.run.precision} "
        f"on {plan.device}, seed {plan.run.seed}"
        + (f", {_ranks(plan)}, zero {plan.layout.stage}" if plan.mesh.world > 1 or plan.layout.stage else ""),
    ]
    if plan.layout.stage and (whole := unsplit(plan.declared, plan.layout.specs)):
        lines += [f"zero: {line}" for line in whole if not re.match(rf"{zero.BLOCKS}\.[1-9]", line)]  # blocks are alike
    return "\n".join([*lines, *plan.notes])
