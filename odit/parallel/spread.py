"""Numbered items spread over an axis: every rank computes an equal share of them, and all ranks get all the results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from odit.parallel import collectives
from odit.parallel.mesh import Axis


def spread(fn: Callable[[Tensor], Tensor], num: int, axis: Axis, batch: int) -> Tensor:
    """Rows 0 to ``num`` - 1 of ``fn``, on the CPU, the same on every rank; a rank computes ceil(num / n) of them.

    Args:
        fn: ``(indices_B) -> (B, ...)``; row i is a function of index i alone, so that any rank may compute it.
        batch: most indices of one call.

    ``fn`` may run collectives (ZeRO-3 gathers weights in every forward pass): all ranks call it equally often, with
    equally many indices. Where they do not divide, the last one is repeated and its extra rows are dropped.
    """
    assert num > 0, "nothing to spread"
    parts = []
    for start in range(0, num, axis.size * batch):
        count = min(axis.size * batch, num - start)
        size = -(-count // axis.size)
        mine_B = start + torch.arange(axis.rank * size, (axis.rank + 1) * size).clamp(max=count - 1)
        parts.append(collectives.all_gather(fn(mine_B), axis, 0)[:count].cpu())
    return torch.cat(parts)
