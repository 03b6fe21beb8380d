"""The reference of attention at any scale, and what another library's gives against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from odit import ops


def plain(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float) -> Tensor:
    """The reference, with a scale."""
    return ops.attend(q_BLHK * (scale * q_BLHK.shape[-1] ** 0.5), k_BLHK, v_BLHK)


def errors(
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor], qkv_BLHK: Sequence[Tensor], do_BLHK: Tensor, scale: float
) -> dict[str, float]:
    """Relative errors of o, dq, dk and dv by ``attend(q, k, v, scale)``, against the reference in fp64."""

    def run(attend: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv_BLHK]
        with torch.enable_grad():
            o = attend(*leaves, scale)
        return [o.detach().double(), *(g.double() for g in torch.autograd.grad(o, leaves, do_BLHK.to(dtype)))]

    found, exact = run(attend, do_BLHK.dtype), run(plain, torch.float64)
    names = ("o", "dq", "dk", "dv")
    return {n: float((a - b).norm() / b.norm()) for n, a, b in zip(names, found, exact, strict=True)}
