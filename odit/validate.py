"""The validation loss: held-out samples at times and noises that never change, so that two states can be compared."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from odit import random, train, tree
from odit.data import BadSample, DataError, Dataset
from odit.draws import Draws, draw
from odit.ops import Ops, at_least_fp32
from odit.parallel import collectives
from odit.parallel.spread import spread
from odit.plan import Plan

KEY = random.fold_in(random.key(0), "validation")  # not the run's seed: runs that differ in seed are measured alike
BINS = 10


def validate(
    plan: Plan, params: tree.Tree, dataset: Dataset, on_bad: Callable[[str, str], None] | None = None
) -> dict[str, float]:
    """Mean loss on the held-out data, and by bin of t: {"loss": ..., "loss_t0": ..., ..., "loss_t9": ...}.

    Every held-out sample is seen ``validation_draws`` times; bin 0 is the lowest tenth of t. With ``grad_norms`` the
    mean norm of a sample's gradient in each bin is added as ``grad_norm_t*``. A bin no draw fell into is left out, and
    so are pictures that cannot be read: ``on_bad(path, reason)`` is told of each once, on a rank that met it.

    Ranks along dp measure a share each, and all return the same; a picture that only some of them can read does not
    keep them apart. Raises DataError, on all of them, where no picture can be read.
    """
    if not len(dataset.held_out_ids):
        raise DataError("there are no held-out samples to validate on")
    with torch.no_grad():
        # Gradients of single samples need the whole weights at once; plan refuses them where zero does not keep these.
        working = (plan.layout.hold(params).whole, plan.ops) if plan.run.grad_norms else plan.inference(params)
    bad: dict[str, str] = {}

    def measured(part: Dataset, places_B: Tensor) -> Tensor:
        ids = part.held_out_ids
        repeats_B, ids_B = places_B // len(ids), ids[places_B % len(ids)]
        x, y, read_B = _read(plan, part, ids_B, bad)
        for other_B in collectives.gather_objects(plan.mesh.sp, read_B) if plan.mesh.sp.size > 1 else ():
            read_B = read_B & other_B  # what one of those that share a sample cannot read is left out by all
        return _measure(plan, working, x, y, read_B, ids_B + (repeats_B << 32))

    # samples of mixed sizes bucket by bucket
    parts = [part for part in getattr(dataset, "parts", [dataset]) if len(part.held_out_ids)]
    counts = [plan.run.validation_draws * len(part.held_out_ids) for part in parts]
    rows = torch.cat(
        [
            spread(functools.partial(measured, part), count, plan.mesh.dp, plan.micro_batch)
            for part, count in zip(parts, counts)
        ]
    )
    everybody = plan.mesh.all
    told = set().union(*collectives.gather_objects(everybody, set(bad))[: everybody.rank])
    for path, reason in bad.items():
        if on_bad is not None and path not in told:
            on_bad(path, reason)
    read, bins, *values = rows[rows[:, 0] == 1].unbind(1)
    if not len(read):
        raise DataError(f"none of the {len(dataset.held_out_ids)} held-out samples can be read")
    result = {"loss": float(values[0].mean())}
    for name, value in zip(("loss", "grad_norm"), values):
        for b in range(BINS):
            if bool((bins == b).any()):
                result[f"{name}_t{b}"] = float(value[bins == b].mean())
    return result


def _read(plan: Plan, dataset: Dataset, ids_B: Tensor, bad: dict[str, str]) -> tuple[Tensor, tree.Tree, Tensor]:
    """Samples, conditions and which of them could be read; zeros and the null condition stand in for the others, which
    ``bad`` then names."""
    try:
        return *dataset.read(ids_B), torch.ones(len(ids_B), dtype=torch.bool)
    except BadSample as error:
        if len(ids_B) > 1:
            x, y, read = zip(*(_read(plan, dataset, one, bad) for one in ids_B.split(1)))
            return torch.cat(x), tree.map(lambda *parts: torch.cat(parts), *y), torch.cat(read)
        bad[error.path] = error.reason
        nothing = tree.map(lambda c: c.cpu(), plan.null)
        return torch.zeros(1, *dataset.shape), nothing, torch.zeros(1, dtype=torch.bool)


def _measure(
    plan: Plan, working: tuple[tree.Tree, Ops], x: Tensor, y: tree.Tree, read_B: Tensor, ids_B: Tensor
) -> Tensor:
    """A row a sample, fp64: whether it was read, bin of t, loss and, with ``grad_norms``, the norm of its gradient."""
    x, y, read_B, ids_B = tree.map(lambda field: field.to(plan.device), [x, y, read_B, ids_B])
    x = plan.front.latents(x, ids_B, KEY, plan.kernels.normal)
    draws = draw(plan, ids_B, tuple(x.shape[1:]), KEY)
    with torch.no_grad():
        columns = [read_B, plan.objective.bins(draws.t_B, BINS), train.losses(plan, *working, x, y, draws)]
    if plan.run.grad_norms:
        columns.append(sample_grad_norms(plan, working[0], x, y, draws))
    return torch.stack([column.double() for column in columns], 1)


def sample_grad_norms(plan: Plan, params: tree.Tree, x: Tensor, y: tree.Tree, draws: Draws, chunk: int = 16) -> Tensor:
    """Norm of each sample's own gradient over all parameters (B,): vmap of grad, ``chunk`` samples at a time."""

    def norm(x, y, t, noise, dropped):
        one = Draws(t[None], noise[None], dropped[None])
        y = tree.map(lambda c: c[None], y)
        grads = torch.func.grad(lambda p: train.losses(plan, p, plan.ops, x[None], y, one).sum())(params)
        return torch.stack([at_least_fp32(g).square().sum() for g in tree.leaves(grads)]).sum().sqrt()

    return torch.func.vmap(norm, chunk_size=chunk)(x, y, *draws)
