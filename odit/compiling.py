"""torch.compile for the blocks: one function that all of them share, in two kinds, with gradients and without.

Whoever runs the blocks (plain ``layers``, ZeRO, recomputing) calls the compiled function where it called the block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from odit import tree
from odit.ops import Ops

BACKEND: Any = "inductor"
VERSIONS = 1024  # of blocks' code that are kept, one a shape, kind and model
EAGER = ("odit.parallel", "odit.tree")  # code that ends a graph: what passes between ranks, and what it calls


def compiled(ops: Ops) -> Ops:
    """The record whose ``layers`` hands on the compiled block; comes last, around the layout's own ``layers``."""

    def layers(block: Callable, params: list, x: Tensor, *args: Any) -> Tensor:
        return ops.layers(compiled_block(block, BACKEND), params, x, *args)

    return replace(ops, layers=layers)


@functools.lru_cache(maxsize=64)
def compiled_block(block: Callable, backend: Any) -> Callable:
    """``block(p, x, *args)``, compiled at its first call with gradients and at its first without.

    With gradients shapes are those of a micro-batch, of each bucket always the same. Without, the number of samples is
    left open: dim 0 of x and of tensors among ``args``; tables in tuples, like weights, have no samples. One sample is
    a shape of its own, as torch.compile will have it.
    """
    _prepare()
    training = torch.compile(block, backend=backend, dynamic=False)
    inference = torch.compile(block, backend=backend, dynamic=True)

    def run(p: tree.Tree, x: Tensor, *args: Any) -> Tensor:
        _keep_versions()
        x = x.contiguous()  # a share of tokens is a view in the first block and is none in the others
        if torch.is_grad_enabled():
            return training(p, x, *args)
        p = tree.map(lambda leaf: _fixed(leaf, 0), p)
        args = tuple(_fixed(a, 1) if isinstance(a, Tensor) else tuple(_fixed(t, 0) for t in a) for a in args)
        return inference(p, _fixed(x, 1), *args)

    return run


def _fixed(x: Tensor, first: int) -> Tensor:
    """The bare tensor (its base, or whether it requires a gradient, compiles anew), fixed in dims from ``first``."""
    x = x.data
    torch._dynamo.mark_static(x, list(range(first, x.ndim)))
    return x


@functools.cache
def _prepare() -> None:
    """Has torch.compile end its graph at every call of code under ``EAGER``, and compile what that calls on its own;
    torch.compiler.disable on each function would cost every run the 1.5 s that loading the compiler takes.
    """
    import torch._dynamo

    for package in EAGER:
        torch._dynamo.trace_rules.add(package)


def _keep_versions() -> None:
    """Beyond its own 8 of a block, which is a few buckets, torch.compile would run them eagerly. Each thread has such
    settings of its own, and a backward pass that runs blocks again is in another one."""
    found = torch._dynamo.config
    if found.recompile_limit < VERSIONS:
        found.recompile_limit = found.accumulated_recompile_limit = VERSIONS


@functools.cache
def obstacle(device: torch.device, backend: Any) -> str | None:
    """Why nothing can be compiled on this device, such as a compiler that is not there; None where it works."""
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2, device=device))
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # what the tracer wraps
        return (str(cause).splitlines() or [type(cause).__name__])[0]
    return None
