"""The validation loss: held-out samples at times and noises that never change, so that two states can be compared."""

from __future__ import annotations

import torch
from torch import Tensor

from odit import random, train, tree
from odit.data import BadSample, Dataset
from odit.plan import Plan

KEY = random.fold_in(random.key(0), "validation")  # not the run's seed: runs that differ in seed are measured alike
BINS = 10


def validate(plan: Plan, params: tree.Tree, dataset: Dataset) -> dict[str, float]:
    """Mean loss on the held-out data, and by bin of t: {"loss": ..., "loss_t0": ..., ..., "loss_t9": ...}.

    Every held-out sample is seen ``validation_draws`` times; bin 0 is the lowest tenth of t. With ``grad_norms`` the
    mean norm of a sample's gradient in each bin is added as ``grad_norm_t*``. A bin no draw fell into is left out.
    """
    params = plan.materialize(params)
    found = [
        _part(plan, params, dataset, ids, i) for i in range(plan.run.validation_draws) for ids in _chunks(plan, dataset)
    ]
    bins, *values = (torch.cat(column).double() for column in zip(*found))
    result = {"loss": float(values[0].mean())}
    for name, value in zip(("loss", "grad_norm"), values):
        for b in range(BINS):
            if bool((bins == b).any()):
                result[f"{name}_t{b}"] = float(value[bins == b].mean())
    return result


def _chunks(plan: Plan, dataset: Dataset) -> tuple[Tensor, ...]:
    return dataset.held_out_ids.split(plan.micro_batch)


def _part(plan: Plan, params: tree.Tree, dataset: Dataset, ids: Tensor, repeat: int) -> tuple[Tensor, ...]:
    ids, x, y = (field.to(plan.device) for field in _read_good(dataset, ids))
    draws = train.draw(plan, ids + (repeat << 32), tuple(x.shape[1:]), KEY)
    bins = plan.objective.bins(draws.t_B, BINS)
    with torch.no_grad():
        loss_B = train.losses(plan, params, x, y, draws)
    if not plan.run.grad_norms:
        return bins, loss_B
    return bins, loss_B, sample_grad_norms(plan, params, x, y, draws)


def _read_good(dataset: Dataset, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, x, y) of the samples that can be read; a bad held-out picture is left out, always the same one."""
    try:
        return ids, *dataset.read(ids)
    except BadSample:
        if len(ids) == 1:
            return ids[:0], torch.zeros(0, *dataset.shape), ids[:0]
    parts = [_read_good(dataset, one) for one in ids.split(1)]
    good, x, y = (torch.cat(column) for column in zip(*parts))
    return good, x, y


def sample_grad_norms(
    plan: Plan, params: tree.Tree, x_BCHW: Tensor, y_B: Tensor, draws: train.Draws, chunk: int = 16
) -> Tensor:
    """Norm of each sample's own gradient over all parameters (B,): vmap of grad, ``chunk`` samples at a time."""

    def norm(x, y, t, noise, dropped):
        one = train.Draws(t[None], noise[None], dropped[None])
        grads = torch.func.grad(lambda p: train.losses(plan, p, x[None], y[None], one).sum())(params)
        return torch.stack([g.float().square().sum() for g in tree.leaves(grads)]).sum().sqrt()

    return torch.func.vmap(norm, chunk_size=chunk)(x_BCHW, y_B, *draws)
