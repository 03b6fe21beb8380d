"""Sampling: pictures from weights, each a function of (seed, picture index, label), whatever the batch and ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odit import checks, graphs, models, random, tree
from odit.config import Sampling
from odit.data import BadSample, DataError, Dataset
from odit.diffusion import guidance, solvers
from odit.parallel import collectives
from odit.parallel.mesh import Axis
from odit.parallel.spread import spread
from odit.plan import Plan


def sample(plan: Plan, params: tree.Tree, conditions_N: tree.Tree, key: random.Key, **settings: Any) -> Tensor:
    """``sampler(plan, params)`` used once."""
    return sampler(plan, params)(conditions_N, key, **settings)


def sampler(plan: Plan, params: tree.Tree) -> Callable[..., Tensor]:
    """What draws pictures from these weights, which must stay as they are: cast, compiled and captured once.

    ``draw(conditions_N, key, *, sampling=None, start=0, batch=256, progress=None)`` gives one picture or clip a
    condition: (N, C, [T,] H, W) fp32, as the model left them (not clamped). Ranks along dp draw a share each, with
    ``parallel.cfg`` 2 pairs of them; all return all pictures.

        batch: pictures at once on one rank.
        other settings: as of ``drawer``.
    """
    at = drawer(plan, params)

    def draw(conditions_N: tree.Tree, key: random.Key, *, batch: int = 256, **settings: Any) -> Tensor:
        pictures = at(conditions_N, key, **settings)
        with torch.no_grad():
            return spread(pictures, len(tree.leaves(conditions_N)[0]), plan.mesh.pictures, batch).float()

    return draw


def drawer(plan: Plan, params: tree.Tree) -> Callable[..., Callable[[Tensor], Tensor]]:
    """What a sampler draws by, for whoever shares pictures out over ranks in another way; the weights must stay.

    ``at(conditions_N, key, *, sampling=None, start=0, progress=None)`` gives a function from places int64 (B,) among
    the conditions to the pictures there. It may run collectives: all ranks call it equally often, for equally many
    places.

        conditions_N: labels int64, or captions as ``plan.tokenize`` makes them; picture ``start + n`` shows number n.
            The null label, or the empty caption, gives unconditional pictures.
        sampling: solver, steps and guidance; the run's own unless given.
        start: index of the first picture; its noise depends on key and index alone.
        progress: wraps the iterable of solver steps, such as tqdm.
    """
    with torch.no_grad():
        params, ops = plan.inference(params)
        params = models.of(plan.run.model).joined(params) if joins(plan) else params

    def forward(x: Tensor, t_B: Tensor, y: tree.Tree) -> Tensor:
        return plan.forward(params, x, t_B, y, ops=ops)

    graphed: dict[tuple, Callable] = {}

    def as_graph(fn: Callable, *told: Any) -> Callable:
        """What was captured for these settings; ``fn`` does the same as when that was."""
        return graphed.setdefault(told, graphs.captured(fn))

    def at(
        conditions_N: tree.Tree,
        key: random.Key,
        *,
        sampling: Sampling | None = None,
        start: int = 0,
        progress: Callable | None = None,
    ) -> Callable[[Tensor], Tensor]:
        told = sampling or plan.run.sampling
        wrap = as_graph if graph_obstacle(plan, told) is None else guidance.as_is

        def pictures(places_B: Tensor) -> Tensor:
            ids_B = (start + places_B).to(plan.device)
            conditions_B = tree.map(lambda c: c[places_B].to(plan.device), conditions_N)
            with torch.no_grad():
                return _sample_batch(plan, forward, conditions_B, ids_B, key, told, progress, wrap)

        return pictures

    return at


def joins(plan: Plan) -> bool:
    """Whether the modulations of all blocks come from one product: on a GPU, where that holds no weight twice (copies
    of their own in half precision), and not compiled, as that would fix the number of samples."""
    own = plan.layout.stage == 0 and plan.dtype != torch.float32
    return plan.device.type == "cuda" and own and not plan.compiled


def graph_obstacle(plan: Plan, sampling: Sampling) -> str | None:
    """Why a model call cannot be one CUDA graph; None where it can."""
    if not sampling.graphs:
        return "--sampling.no-graphs"
    if plan.device.type != "cuda":
        return f"the device is {plan.device.type}"
    if plan.mesh.sp.size > 1:
        return f"parallel.sp {plan.mesh.sp.size} passes tokens between ranks in each block"
    if plan.mesh.cfg.size > 1:
        return "parallel.cfg 2 passes predictions between ranks in each step"
    if plan.layout.stage == 3 and plan.mesh.world > 1:
        return "parallel.zero 3 gathers weights in each block"
    return "weights are in host memory" if plan.home != plan.device else None


def _sample_batch(plan, model, conditions_B, ids_B, key, sampling: Sampling, progress, wrap) -> Tensor:
    shape, g, normal = plan.shape.sample, sampling.guidance, plan.kernels.normal
    null_1, conditions_B = plan.front.embed(plan.null), plan.front.embed(conditions_B)
    scale = g.scale if plan.shape.conditional else 1.0
    guided = guidance.guided(
        model,
        conditions_B,
        tree.map(lambda c, null: null.expand(c.shape), conditions_B, null_1),
        scale=scale,
        interval=g.interval,
        channels=g.channels,
        both=guidance.in_one_call if plan.mesh.cfg.size == 1 else in_halves(plan.mesh.cfg),
        wrap=wrap,
    )
    drawn = solvers.sample(
        plan.objective,
        guided,
        normal(random.fold_in(key, "sample"), shape, ids_B),
        solver=checks.solver_of(sampling, plan.objective),
        steps=sampling.steps,
        noise_at=lambda i: normal(random.fold_in(key, "sample-step", i), shape, ids_B),
        progress=progress,
        clip=sampling.clip,
    )
    return plan.front.decode(drawn)


def in_halves(axis: Axis) -> Callable:
    """Runs guidance's passes on the two ranks of ``axis``, the conditional one on the first; both get both results."""

    def both(model, x, t_net_B, cond_B, null_B):
        mine = model(x, t_net_B, cond_B if axis.rank == 0 else null_B)
        return collectives.all_gather(mine, axis, 0).chunk(2)

    return both


def previews(plan: Plan, dataset: Dataset, num: int, columns: int) -> tree.Tree:
    """The conditions of the ``num`` pictures that a run shows: a class a column, or captions of its data."""
    if not plan.shape.text_length:
        return spread_labels(num, min(plan.shape.num_classes, columns))
    if hasattr(dataset, "prompts"):
        return plan.tokenize(dataset.prompts(num)[0])
    ids = dataset.held_out_ids if len(dataset.held_out_ids) else dataset.train_ids
    # one rank reads: what another one cannot read would set those apart that draw one picture
    found = list(itertools.islice(_conditions(dataset, ids), num)) if plan.mesh.rank == 0 else None
    found = collectives.broadcast_object(plan.mesh.all, found)
    return tree.map(lambda *parts: torch.cat(parts), *(found[i % len(found)] for i in range(num)))


def _conditions(dataset: Dataset, ids: Tensor) -> Iterator[tree.Tree]:
    """The conditions of those samples that can be read, one by one; raises DataError where there is none."""
    some = False
    for one in ids.split(1):
        with contextlib.suppress(BadSample):
            yield dataset.read(one)[1]
            some = True
    if not some:
        raise DataError(f"none of {len(ids)} samples can be read, so that there is no caption to show")


def choose_labels(num: int, num_classes: int, chosen: tuple[int, ...]) -> Tensor:
    """``num`` labels: the chosen ones in turn, or all of them; raises ValueError for one that is no class."""
    if not chosen:
        return spread_labels(num, num_classes)
    if not num_classes:
        raise ValueError(f"label {chosen[0]} is given but this model knows no classes: leave label out")
    if bad := [y for y in chosen if not 0 <= y < num_classes]:
        raise ValueError(f"label {bad[0]} is no class of this model: it knows {num_classes}, 0 to {num_classes - 1}")
    return torch.tensor(chosen).repeat(-(-num // len(chosen)))[:num]


def read_prompts(path: Path) -> list[str]:
    """The lines of a file of captions that hold something; raises ValueError where there is none, or no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
        raise ValueError(f"prompts {path} cannot be read ({why}): give a text file of captions, one a line") from None
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError(f"prompts {path} has no caption in it: write one a line")
    return found


def override(told: Sampling, conditional: bool, **given: Any) -> Sampling:
    """A run's own sampling with a command line's solver, steps, scale, interval and channels; None keeps its own."""
    given = {name: value for name, value in given.items() if value is not None}
    if "scale" in given and given["scale"] != 1 and not conditional:
        raise ValueError(
            f"guidance is {given['scale']} but this model knows no classes and no captions: leave guidance out"
        )
    guided = {name: given.pop(name) for name in ("scale", "interval", "channels") if name in given}
    return dataclasses.replace(told, guidance=dataclasses.replace(told.guidance, **guided), **given)


def random_labels(num: int, num_classes: int, key: random.Key) -> Tensor:
    """Labels (num,) drawn uniformly, each a function of key and index alone; all 0 where there are no classes."""
    # 53 bits of 64: what a remainder favours is less than 1e-12
    lo, hi = random.bits(random.fold_in(key, "label"), (2,), torch.arange(num)).unbind(1)
    return (lo + ((hi & 0x1FFFFF) << 32)) % max(1, num_classes)


def spread_labels(num: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., V-1, 0, 1, ... (num,): every class about equally often; all 0 where there are no classes."""
    return torch.arange(num) % max(1, num_classes)
