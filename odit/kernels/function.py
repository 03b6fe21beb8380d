"""How a kernel becomes a function that torch.compile, autograd and torch.func take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def served(widest: int, *tensors: Tensor) -> bool:
    """Whether kernels take these: one dtype of ``DTYPES``, one device, at most ``widest`` columns; else the reference
    runs."""
    first = tensors[0]
    return (
        first.dtype in DTYPES
        and first.shape[-1] <= widest
        and all(x.dtype == first.dtype and x.device == first.device for x in tensors)
    )


def by_rows(x: Tensor) -> Tensor:
    """The tensor itself where the columns of a row lie side by side, else a copy of it; other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty(x: Tensor) -> Tensor:
    """Room for a contiguous result like x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def entry(
    name: str,
    forward: Callable,
    backward: Callable,
    schemas: tuple[str, str],
    fakes: tuple[Callable, Callable],
    saved: Callable,
    gradients: Callable,
    tangent: Callable,
    plain_backward: Callable,
    seen: bool = False,
) -> Callable:
    """One function of ``forward`` that torch.compile, autograd and torch.func all take.

    While compiling it is the registered operator ``odit::name``, which stays one node of the graph; else an
    autograd.Function with rules for vmap and jvp, which torch.compile refuses. All tensors have samples first.

    Args:
        forward: (*tensors, *settings) -> a tensor or a tuple of them.
        backward: (*cotangents, *saved, *settings) -> tuple of tensors; ``plain_backward`` is its form in plain PyTorch.
        schemas: of the operator and of its backward.
        fakes: what both return, without numbers.
        saved: (inputs, output) -> the tensors that backward and tangent need.
        gradients: (cotangents, what backward returned) -> gradients of the tensors.
        tangent: (*saved, *tangents, *settings) -> the change of the output.
        seen: whether it is the operator under a dispatch mode too, so that recomputing a part of a block can keep it.
    """
    forward_op = torch.library.custom_op(f"odit::{name}", forward, mutates_args=(), schema=schemas[0])
    backward_op = torch.library.custom_op(f"odit::{name}_backward", backward, mutates_args=(), schema=schemas[1])
    forward_op.register_fake(fakes[0])
    backward_op.register_fake(fakes[1])
    gradient = _gradient(backward, plain_backward)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.settings = [x for x in inputs if not isinstance(x, Tensor)]
        _keep(ctx, saved(inputs, output))

    def pulled(run: Callable) -> Callable:
        def pull(ctx: Any, *cotangents: Tensor) -> tuple:
            found = run(*cotangents, *ctx.saved_tensors, *ctx.settings)
            return *gradients(cotangents, found), *(None for _ in ctx.settings)

        return pull

    def push(ctx: Any, *tangents: Any) -> Any:
        return tangent(*ctx.saved_tensors, *tangents[: len(tangents) - len(ctx.settings)], *ctx.settings)

    forward_op.register_autograd(pulled(backward_op), setup_context=setup_context)
    made = function(name, forward, setup_context, pulled(gradient.apply), push)

    def run(*args: Any) -> Any:
        as_operator = torch.compiler.is_compiling() or (seen and _get_current_dispatch_mode() is not None)
        return (forward_op if as_operator else made.apply)(*args)

    return run


def function(name: str, forward: Callable, setup_context: Callable, backward: Callable, jvp: Callable) -> Any:
    """An autograd.Function of these rules, and of ``_folded`` for vmap: all tensors have samples first."""
    rules = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp}
    rules["vmap"] = lambda info, in_dims, *args: _folded(made, info, in_dims, args)
    made = type(name, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in rules.items()})
    return made


def _gradient(launched: Callable, plain: Callable) -> Any:
    """A backward pass as a function that can be mapped and differentiated again, the latter by its plain form."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.settings = [x for x in inputs if not isinstance(x, Tensor)]
        _keep(ctx, [x for x in inputs if isinstance(x, Tensor)])

    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        found, pull = torch.func.vjp(lambda *tensors: plain(*tensors, *ctx.settings), *ctx.saved_tensors)
        pulled = pull(cotangents if isinstance(found, tuple) else cotangents[0])
        return *pulled, *(None for _ in ctx.settings)

    def jvp(ctx: Any, *tangents: Any) -> tuple:
        tensors = tuple(x.contiguous() for x in ctx.saved_tensors)  # tangents take the strides, which may be 0
        return torch.func.jvp(lambda *ts: plain(*ts, *ctx.settings), tensors, tangents[: len(tensors)])[1]

    return function(launched.__name__, launched, setup_context, backward, jvp)


def _keep(ctx: Any, tensors: Iterable[Tensor]) -> None:
    """Saves tensors for backward and for jvp."""
    tensors = tuple(tensors)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _folded(function: Any, info: Any, in_dims: tuple, args: tuple) -> tuple[Any, Any]:
    """vmap of a function whose tensors all have samples first: the mapped dim joins them."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    found = function.apply(*map(fold, args, in_dims))
    if isinstance(found, Tensor):
        return found.unflatten(0, (info.batch_size, -1)), 0
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in found), (0,) * len(found)
