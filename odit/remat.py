"""Recomputing part of a block in its backward pass instead of keeping it (selective activation recomputation,
Korthikanti et al. 2022), by PyTorch's checkpoint with a rule an operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from odit import tree
from odit.ops import Ops, hands_on_any

PRODUCTS = ("mm", "addmm", "linear", "gelu_mlp")  # with weights; plain attention's are batched and run again
ATTENTION = ("attention", "attend")  # in an operator's name: PyTorch's kernels and those of odit


def recomputing(ops: Ops, keeps_branches: bool = True) -> Ops:
    """The record whose ``layers`` hands on ``selective`` blocks; around ``compiled``, so that it is compiled too.

    A block may leave its sum to the next one where it ``keeps_branches`` anyway, as products; else that would keep one
    value a token and channel more.
    """

    def layers(block: Callable, params: list, x: Any, *args: Any) -> Any:
        return ops.layers(selective(block), params, x, *args)

    return replace(ops, layers=layers if ops.sums or not keeps_branches else hands_on_any(layers))


@functools.lru_cache(maxsize=64)
def selective(block: Callable) -> Callable:
    """``block(p, x, *args)`` that keeps its input, what attention gives and the products with weights.

    What is elementwise (modulation, gates, GELU) runs again in backward: of a DiT block about 11 values a token and
    channel are kept instead of 17, for a few passes over memory and no product.
    """

    def run(p: tree.Tree, x: Any, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return block(p, x, *args)
        return checkpoint(block, p, x, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)

    return run


def _contexts():
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().split("::")[-1].split(".")[0]
    if name in PRODUCTS or any(word in name for word in ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
