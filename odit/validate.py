"""The validation loss: held-out samples at times and noises that never change, so that two states can be compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from odit import random, train, tree
from odit.data import BadSample, DataError, Dataset
from odit.ops import Ops
from odit.plan import Plan

KEY = random.fold_in(random.key(0), "validation")  # not the run's seed: runs that differ in seed are measured alike
BINS = 10


def validate(
    plan: Plan, params: tree.Tree, dataset: Dataset, on_bad: Callable[[str, str], None] | None = None
) -> dict[str, float]:
    """Mean loss on the held-out data, and by bin of t: {"loss": ..., "loss_t0": ..., ..., "loss_t9": ...}.

    Every held-out sample is seen ``validation_draws`` times; bin 0 is the lowest tenth of t. With ``grad_norms`` the
    mean norm of a sample's gradient in each bin is added as ``grad_norm_t*``. A bin no draw fell into is left out, and
    so are pictures that cannot be read: ``on_bad(path, reason)`` is told of each; raises DataError where none is left.
    """
    with torch.no_grad():
        working = plan.inference(params)
    ids = _readable(dataset, plan.micro_batch, on_bad or (lambda path, reason: None))
    repeats = range(plan.run.validation_draws)
    found = [_part(plan, working, dataset, part, i) for i in repeats for part in ids.split(plan.micro_batch)]
    bins, *values = (torch.cat(column).double() for column in zip(*found))
    result = {"loss": float(values[0].mean())}
    for name, value in zip(("loss", "grad_norm"), values):
        for b in range(BINS):
            if bool((bins == b).any()):
                result[f"{name}_t{b}"] = float(value[bins == b].mean())
    return result


def _readable(dataset: Dataset, chunk: int, on_bad: Callable[[str, str], None]) -> Tensor:
    """The held-out ids whose pictures can be read."""
    good = []
    for ids in dataset.held_out_ids.split(chunk):
        try:
            dataset.read(ids)
            good.append(ids)
        except BadSample:
            good += [one for one in ids.split(1) if _can_read(dataset, one, on_bad)]
    if not good:
        raise DataError(f"none of the {len(dataset.held_out_ids)} held-out samples can be read")
    return torch.cat(good)


def _can_read(dataset: Dataset, one: Tensor, on_bad: Callable[[str, str], None]) -> bool:
    try:
        dataset.read(one)
    except BadSample as error:
        on_bad(error.path, error.reason)
        return False
    return True


def _part(plan: Plan, working: tuple[tree.Tree, Ops], dataset: Dataset, ids: Tensor, repeat: int) -> tuple[Tensor, ...]:
    x, y = (field.to(plan.device) for field in dataset.read(ids))
    draws = train.draw(plan, (ids + (repeat << 32)).to(plan.device), tuple(x.shape[1:]), KEY)
    bins = plan.objective.bins(draws.t_B, BINS)
    with torch.no_grad():
        loss_B = train.losses(plan, *working, x, y, draws)
    if not plan.run.grad_norms:
        return bins, loss_B
    return bins, loss_B, sample_grad_norms(plan, working[0], x, y, draws)


def sample_grad_norms(
    plan: Plan, params: tree.Tree, x_BCHW: Tensor, y_B: Tensor, draws: train.Draws, chunk: int = 16
) -> Tensor:
    """Norm of each sample's own gradient over all parameters (B,): vmap of grad, ``chunk`` samples at a time."""

    def norm(x, y, t, noise, dropped):
        one = train.Draws(t[None], noise[None], dropped[None])
        grads = torch.func.grad(lambda p: train.losses(plan, p, plan.ops, x[None], y[None], one).sum())(params)
        return torch.stack([g.float().square().sum() for g in tree.leaves(grads)]).sum().sqrt()

    return torch.func.vmap(norm, chunk_size=chunk)(x_BCHW, y_B, *draws)
