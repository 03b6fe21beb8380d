"""Steps whose loss or gradient is not finite, kept by the run that met them and executed again on one device.

``out/crashes/step_00000012/`` holds what the step was made of, written as a checkpoint is:

  crash.json               what went bad, on which ranks and samples; the run's config, seed, shapes and versions
  batch-00001.safetensors  of rank 1: ids, samples, times, noise and conditions as they entered the model
  state-*.safetensors      the weights (fp32), each rank's pieces
  manifest.json            binds all files by size and hash

A loss that is not finite tells its sample, and the first such micro-batch is kept. Gradients are summed over ranks
before anybody looks at them: where they alone are bad, all micro-batches are kept and executing them finds the one. A
skipped step leaves the weights as they were, so that bad steps in a row name the folder of the first for them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from odit import checkpoint, config, health, manifest, plan, random, saving, train, tree
from odit.config_json import from_json
from odit.data import Batch
from odit.data.dataset import sample_ids
from odit.draws import Draws, draw
from odit.front import Front
from odit.health import CheckpointError, NumericError
from odit.models.config import Shape
from odit.ops import Ops
from odit.parallel import collectives
from odit.parallel import mesh as meshes
from odit.plan import Plan
from odit.storage import DISK, Disk
from odit.train import TrainState

PLACE, FACTS, ROLE = "crashes", "crash.json", "param"
NAMED = 8  # samples in a sentence


# ------------------------------------------------------------------------------------------------------------- keeping


class Keeper:
    """Writes the first ``run.crashes`` bad steps of a run; every rank calls it alike."""

    def __init__(self, plan: Plan, disk: Disk = DISK):
        there = saving.steps(plan.run.out, PLACE) if plan.layout.axis.rank == 0 else []
        self.plan, self.disk = plan, disk
        self.there: list[int] = collectives.broadcast_object(plan.layout.axis, there)
        """Steps that were kept before a resume."""
        self.left = plan.run.crashes - len(self.there)
        self.weights: tuple[int, int] | None = None
        """The step whose folder holds weights, and after how many updates."""

    def keep(
        self,
        state: TrainState,
        batch: Batch,
        key: random.Key,
        metrics: dict[str, Any],
        about: dict[str, Any],
        last: bool = False,
    ) -> Path | None:
        """The folder of the step that led to ``state``; None where it is not kept.

        A gradient that fp16 cannot hold at a loss scale above 1 is no bad step: the scale halves, as is its way.

        Args:
            metrics: what the step told.
            about: what a checkpoint of ``state`` would tell.
            last: whether the run ends over it; then a gradient is kept at any loss scale.
        Raises:
            StorageError: on all ranks, where one of them cannot write.
        """
        if state.step in self.there:
            return saving.folder_of(self.plan.run.out, state.step, PLACE)
        scale = metrics.get("loss_scale", 1.0)
        if self.left <= 0 or (scale > 1 and math.isfinite(metrics["loss"]) and not last):
            return None
        self.left -= 1
        held = self.weights is not None and self.weights[1] == int(state.opt.count)
        extras, batches = self._batches(batch, key, metrics["bad_samples"])
        if self.plan.layout.axis.rank == 0:
            facts = {
                "bad": metrics["bad"],
                "bad_samples": metrics["bad_samples"],
                **{name: _json(metrics[name]) for name in ("loss", "grad_norm", "lr", "draw_digest")},
                "loss_scale": scale,
                "updates": int(state.opt.count),
                "weights": self.weights[0] if held and self.weights else state.step,
                "layout": _layout(self.plan),
                "batches": batches,
                **about,
            }
            extras.append((FACTS, (json.dumps(facts, indent=1) + "\n").encode()))
        found = saving.job(self.plan, state, {"crash": True}, () if held else (ROLE,))
        found = found._replace(place=PLACE, keep=self.plan.run.crashes, extras=tuple(extras))
        axis = self.plan.layout.axis
        path = saving.write(found, saving.Talk(meshes.store(), axis.rank, axis.size), self.disk)
        if not held:
            self.weights = state.step, int(state.opt.count)
        return path

    def _batches(
        self, batch: Batch, key: random.Key, bad: dict[int, list[int]]
    ) -> tuple[list[tuple[str, bytes]], list[dict[str, Any]]]:
        """This rank's file, if it has one, and what all ranks' hold."""
        rank, size = self.plan.layout.axis.rank, self.plan.micro_batch
        wanted = _suspects(self.plan, batch, bad)
        parts = []
        for number, part in enumerate(train.micro_batches(batch, size)):
            inputs = entered(self.plan, part, key)  # on all ranks, as they may share an encoder's weights
            if number in wanted:
                parts.append({name: x.cpu() for name, x in inputs.items()})
        name, extras, mine = f"batch-{rank:05d}.safetensors", [], None
        if parts:
            rows = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
            extras = [(name, safetensors.torch.save(rows))]
            samples = sample_ids(rows["ids"]).tolist()
            mine = {"file": name, "rank": rank, "first": wanted[0], "micro_batch": size, "samples": samples}
        return extras, [told for told in collectives.gather_objects(self.plan.layout.axis, mine) if told]


def _suspects(plan: Plan, batch: Batch, bad: dict[int, list[int]]) -> list[int]:
    """Numbers of this rank's micro-batches that may have brought the bad numbers."""
    parts = train.micro_batches(batch, plan.micro_batch)
    if not bad:
        return list(range(len(parts))) if plan.mesh.sp.rank == 0 else []
    if plan.layout.axis.rank != min(bad):
        return []
    found = set(bad[min(bad)])
    return [number for number, part in enumerate(parts) if found & set(part.ids_B.tolist())][:1]


def entered(plan: Plan, part: Batch, key: random.Key) -> dict[str, Tensor]:
    """A micro-batch as it enters the model, by name."""
    ids, x, y = tree.map(lambda field: field.to(plan.device), list(part))
    x = plan.front.latents(x, ids, key, plan.kernels.normal)
    draws = draw(plan, ids, tuple(x.shape[1:]), key)
    y = plan.front.embed(train.conditions(plan, y, draws.dropped_B))
    return {"ids": ids, "x": x, **draws._asdict(), **{f"y.{path}": leaf for path, leaf in tree.items(y)}}


def _json(x: Any) -> Any:
    """JSON has no NaN."""
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def _layout(plan: Plan) -> dict[str, Any]:
    mesh = plan.mesh
    sizes = {"ranks": mesh.world, "dp": mesh.dp.size, "sp": mesh.sp.size, "zero": plan.layout.stage}
    return {**sizes, "sequence": plan.sequence, "micro_batch": plan.micro_batch, "device": str(plan.device)}


# ----------------------------------------------------------------------------------------------------- executing again


@dataclass(frozen=True)
class Replay:
    """Executes a step that went bad again, forward and backward, on one device; sums of gradients between blocks may be
    rounded otherwise than in the run."""

    replay: Path
    """Folder of the step, out/crashes/step_*; all settings are those of its run."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Another dtype of matrix products than the run's."""
    kernels: Literal["auto", "reference", "fused"] | None = None
    """Other kernels than the run's."""


class Found(NamedTuple):
    """What one micro-batch gave."""

    loss_B: Tensor
    grads: tree.Tree
    forward: str | None
    """Where numbers were first not finite on the way forward."""
    backward: str | None
    """Of what the gradient was first not finite on the way back."""

    @property
    def leaf(self) -> str | None:
        """The bad gradient that came first: of the last leaf in the model's order."""
        bad = [path for path, g in tree.items({"grad": self.grads}) if health.first_bad(g) is not None]
        return bad[-1] if bad else None

    @property
    def bad(self) -> bool:
        return any((self.forward, self.backward, self.leaf)) or not bool(self.loss_B.isfinite().all())


def replay(args: Replay) -> str:
    """Executes a kept step; the sentence of one whose numbers are finite here.

    Raises:
        NumericError: they are not, and where that began.
        CheckpointError: a folder that is none of a kept step, or that is damaged.
        ValueError: several ranks.
    """
    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"replay runs on one device and these are {world} ranks: use python without torchrun")
    facts = read(args.replay)
    composed = compose(facts, args)
    params = checkpoint.load_weights(_weights(args.replay, facts["weights"]), composed, ROLE)
    where = f"{args.replay} on {composed.device} in {composed.run.precision}"
    if bad := health.first_bad({ROLE: params}):
        raise NumericError(f"{where}: the weights before the step are not finite, the first is {bad}")
    total, losses = None, []
    for told in facts["batches"]:
        for number, inputs in micro_batches(args.replay / told["file"], told):
            found = execute(composed, params, inputs, facts["loss_scale"])
            if found.bad:
                what = f"rank {told['rank']}, micro-batch {number}"
                raise NumericError(f"{where}: {what}: {_sentence(found, inputs['ids'])}")
            total, losses = train.add(total, found.grads, params), [*losses, found.loss_B]
    mean = float(torch.cat(losses).double().mean())
    told = f"{where} does not reproduce: {facts['bad']} was not finite, here the loss is {mean:.6g}"
    if facts["bad_samples"]:
        return f"{told} and all gradients of the micro-batch are finite"
    total = tree.map(lambda g: None if g is None else g / facts["loss_scale"], total)
    bad = health.first_bad({"grad": total})
    if bad or not math.isfinite(float(composed.layout.squared_norm(total))):
        raise NumericError(
            f"{where}: no micro-batch is bad, but the sum of their gradients is: {bad or 'the squared norm'}"
        )
    return f"{told} and all gradients are finite"


def read(folder: Path) -> dict[str, Any]:
    """What is told of a kept step, all its files held to their hashes; raises CheckpointError."""
    if not (folder / manifest.MANIFEST).exists() or not (folder / FACTS).exists():
        raise CheckpointError(f"replay {folder} is no folder of a kept step: give one of out/{PLACE}/step_*")
    checkpoint.verify(folder)
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def _weights(folder: Path, step: int) -> Path:
    """The folder with a kept step's weights: its own, or that of a step before it."""
    found = folder.with_name(saving.folder_of(folder, step).name)
    if not found.is_dir():
        raise CheckpointError(f"replay {folder} has the weights of {found}, which is not there: put it back")
    return found


def compose(facts: dict[str, Any], args: Replay) -> Plan:
    """The plan of the step's run on one device."""
    run = from_json(config.Run, facts["config"])
    changes = {"precision": args.precision, "kernels": args.kernels}
    changes = {name: value for name, value in changes.items() if value is not None}
    run = dataclasses.replace(plan.alone(run), device=args.device, threads=None, **changes)
    return plan.compose(run, Shape(**facts["shape"]), None, Front())


def micro_batches(path: Path, told: dict[str, Any]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Numbers of the micro-batches in a file, and what entered the model."""
    try:
        rows = safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    size = told["micro_batch"]
    for start in range(0, len(rows["ids"]), size):
        yield told["first"] + start // size, {name: x[start : start + size] for name, x in rows.items()}


def execute(plan: Plan, params: tree.Tree, inputs: dict[str, Tensor], scale: float = 1.0) -> Found:
    """One forward and backward pass over what entered the model, watched at every site.

    Args:
        scale: factor on the loss (fp16).
    """
    seen = Seen()
    inputs = {name: x.to(plan.device) for name, x in inputs.items()}
    for name, x in inputs.items():
        seen.see(f"{name.rstrip('.')} as it enters the model", x)
    draws = Draws(*(inputs[name] for name in Draws._fields))
    watched = dataclasses.replace(plan, kernels=watch(plan.kernels, seen))
    held = watched.layout.hold(params)

    def loss_sum(targets: tree.Tree) -> tuple[Tensor, Tensor]:
        model, ops = watched.view(targets, held)
        loss_B = train.losses_of(watched, model, ops, inputs["x"], conditions(inputs), draws)
        seen.see("the loss", loss_B)
        return loss_B.sum() * (scale / plan.run.global_batch), loss_B.detach()

    _, loss_B, grads = train.value_and_grad(loss_sum, watched.layout.targets(params, held), plan.trained)
    return Found(loss_B, grads, seen.forward, seen.backward)


def conditions(inputs: dict[str, Tensor]) -> tree.Tree:
    """The y of what entered the model: a tensor, or a dict of some."""
    found = {name[2:]: x for name, x in inputs.items() if name.startswith("y.")}
    return found[""] if "" in found else found


def _sentence(found: Found, ids_B: Tensor) -> str:
    """What one micro-batch gave, for people."""
    loss, bad = f"loss {float(found.loss_B.double().mean()):.6g}", ids_B[~found.loss_B.isfinite().cpu()].tolist()
    told = [f"{loss} (of {_samples(bad)})" if bad else loss]
    told += [f"forward, the first that is not finite is {found.forward}"] if found.forward else []
    told += [f"backward, the first is the gradient of what {found.backward} gave"] if found.backward else []
    told += [f"the first bad leaf is {found.leaf}"] if found.leaf else []
    return "; ".join(told)


def name(bad: dict[int, list[int]]) -> str:
    """The samples of bad loss, by rank, in words; nothing where there are none."""
    rank = min(bad, default=-1)
    others = f" and ranks {', '.join(map(str, sorted(bad)[1:]))}" if len(bad) > 1 else ""
    return f" (the loss of {_samples(bad[rank])} on rank {rank}{others})" if bad else ""


def _samples(ids: list[int]) -> str:
    """Draw ids as samples, the first ones of many."""
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"sample{'s' * (len(ids) > 1)} {', '.join(map(str, sample_ids(ids[:NAMED]).tolist()))}{more}"


class Seen:
    """Where numbers were first not finite, forward and backward."""

    def __init__(self):
        self.forward: str | None = None
        self.backward: str | None = None

    def see(self, name: str, value: Any) -> Any:
        """Looks at tensors, in tuples too, now and at their gradients later; returns them."""
        for x in _tensors(value):
            if self.forward is None and not bool(torch.isfinite(x).all()):
                self.forward = name
            if x.requires_grad:
                x.register_hook(functools.partial(self._see_gradient, name))
        return value

    def _see_gradient(self, name: str, grad: Tensor) -> None:
        if self.backward is None and not bool(torch.isfinite(grad).all()):
            self.backward = name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield value


def watch(ops: Ops, seen: Seen) -> Ops:
    """The record whose sites show ``seen`` what they give, under a name with the block's, such as blocks.3.attend."""
    place, calls = "", {}

    def watched(name: str, site: Callable) -> Callable:
        def see(*args: Any) -> Any:
            full = f"{place}{name}"
            calls[full] = calls.get(full, 0) + 1
            return seen.see(full if calls[full] == 1 else f"{full} (call {calls[full]})", site(*args))

        return see

    def layers(block: Callable, params: list, x: Tensor, *args: Any) -> Tensor:
        nonlocal place
        seen.see("what blocks get of times and conditions", args)
        for i, p in enumerate(params):
            place = f"blocks.{i}."
            x = seen.see(f"blocks.{i}", ops.layers(block, [p], x, *args))
        place = "final."
        return x

    sites = {field.name: getattr(ops, field.name) for field in dataclasses.fields(ops) if field.name != "layers"}
    return Ops(layers=layers, **{name: watched(name, site) for name, site in sites.items()})
