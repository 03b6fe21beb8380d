"""The mlp whose bias and GELU are in the epilogues of its products: nothing passes over memory between them.

    z = x w1^T + b1,  h = gelu(z)              one product, which writes both
    y = h w2^T + b2
    dz = (dy w2) gelu'(z),  db1 = sum of dz    one product, which reads z on the way; the rest are PyTorch's

The products are quack-kernels' (CUTLASS, for Hopper and later). Against ``bias_gelu`` forward and backward of an mlp
took 2 to 15 % less on an H200, for each of 15 sizes from 256 tokens of width 1152 to 131,072 of width 384. With
``lean`` h is not kept: the product of backward writes it again, and a layer keeps its input, z and y. On a CPU the same
in plain PyTorch, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit.kernels import bias_gelu, quack
from odit.kernels.linear import bias_gradient, linear
from odit.ops import Ops

LEAST = 2048  # rows without gradients, below which PyTorch's product with GELU is as fast


class Mlp(NamedTuple):
    """What an mlp is: gelu or swiglu, D and F."""

    kind: str
    width: int
    ffn: int
    shares: int = 1
    """Ranks that share the ffn."""


def chosen(ops: Ops, device: torch.device, dtype: torch.dtype, mlp: Mlp, remat: str) -> tuple[Ops, str]:
    """The record with this mlp where it can be, and words on it."""
    if why := obstacle(device, dtype, mlp):
        return ops, f"GELU beside the products of the mlp ({why})"
    return replace(ops, mlp=site(remat)), "GELU in the products of the mlp (quack-kernels)"


def serves(capability: tuple[int, int], dtype: torch.dtype, mlp: Mlp) -> str | None:
    """Why it is not taken on such a GPU, whatever is installed; None where it is."""
    if mlp.kind != "gelu":
        return f"model.mlp is {mlp.kind}"
    if why := quack.serves(capability, dtype):
        return why
    if mlp.width % 8 == mlp.ffn % (8 * mlp.shares) == 0:
        return None
    shared = f" over {mlp.shares} ranks" if mlp.shares > 1 else ""
    return f"width {mlp.width} or ffn {mlp.ffn}{shared} is no multiple of 8"


def obstacle(device: torch.device, dtype: torch.dtype, mlp: Mlp) -> str | None:
    """Why it cannot be taken on this device; None where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    return serves(torch.cuda.get_device_capability(device), dtype, mlp) or quack.missing()


def _product(x_MD: Tensor, w_FD: Tensor, b_F: Tensor, keeps: bool) -> tuple[Tensor | None, Tensor]:
    """z, if it ``keeps`` that, and h."""
    x, w, b = map(quack.aligned, (x_MD, w_FD, b_F))
    return quack.library().gelu(x, w.t(), bias=b, store_preact=keeps)


@torch.library.custom_op("odit::gelu_mlp", mutates_args=())
def _forward(
    x_MD: Tensor, w1_FD: Tensor, b1_F: Tensor, w2_DF: Tensor, b2_D: Tensor | None, lean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, z and h; h is empty if ``lean``."""
    if x_MD.is_cuda:
        z, h = _product(x_MD, w1_FD, b1_F, True)
    else:
        z = torch.nn.functional.linear(x_MD, w1_FD, b1_F)
        h = torch.nn.functional.gelu(z, approximate="tanh")
    y = torch.nn.functional.linear(h, w2_DF, b2_D)
    return y, z, h.new_empty(0) if lean else h


@_forward.register_fake
def _(x_MD, w1_FD, b1_F, w2_DF, b2_D, lean):
    z = x_MD.new_empty((len(x_MD), len(w1_FD)))
    return torch.empty_like(x_MD), z, z.new_empty(0) if lean else torch.empty_like(z)


@torch.library.custom_op("odit::gelu_mlp_backward", mutates_args=())
def _backward(dy_MD: Tensor, w2_DF: Tensor, z_MF: Tensor, lean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dz, db1, and h if ``lean``, else nothing."""
    if dy_MD.is_cuda:
        product = quack.library().gelu_backward_lean if lean else quack.library().gelu_backward
        found = product(quack.aligned(dy_MD), quack.aligned(w2_DF), z_MF)
        dz, db, h = found["D"], found["dbias" if lean else "dwb"], found.get("postact")
    else:
        h, pull = torch.func.vjp(lambda z: torch.nn.functional.gelu(z, approximate="tanh"), z_MF)
        (dz,) = pull(dy_MD @ w2_DF)
        db = dz.sum(0)
    return dz, db.view(-1).to(dz.dtype, copy=True), h if lean else dz.new_empty(0)


@_backward.register_fake
def _(dy_MD, w2_DF, z_MF, lean):
    return torch.empty_like(z_MF), z_MF.new_empty(z_MF.shape[1]), torch.empty_like(z_MF) if lean else z_MF.new_empty(0)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w1, _, w2, _, ctx.lean = inputs
    _, z, h = output
    _, to_w1, _, to_w2, *_ = ctx.needs_input_grad  # frozen weights need no input of theirs
    ctx.save_for_backward(x if to_w1 else None, w1, w2, z, h if to_w2 else None)
    ctx.mark_non_differentiable(z, h)
    ctx.set_materialize_grads(False)  # or zeros of their size would be written


def _differentiate(ctx: Any, dy: Tensor | None, dz: Any, dh: Any) -> tuple[Tensor | None, ...]:
    x, w1, w2, z, h = ctx.saved_tensors
    to_x, to_w1, to_b1, to_w2, to_b2, _ = ctx.needs_input_grad
    dx = dw1 = db1 = dw2 = None
    if dy is None:
        return (None,) * 6
    again = to_w2 and ctx.lean
    if to_x or to_w1 or to_b1 or again:
        dz, db1, written = _backward(dy, w2, z, again)
        h = written if again else h
        dx, dw1 = dz @ w1 if to_x else None, dz.t() @ x if to_w1 else None
    dw2 = dy.t() @ h if to_w2 else None
    return dx, dw1, db1 if to_b1 else None, dw2, bias_gradient(dy) if to_b2 else None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def site(remat: str) -> Callable:
    """``mlp``, or ``lean_mlp`` where what is elementwise runs again in backward."""
    return lean_mlp if remat == "selective" else mlp


def mlp(h_BLD: Tensor, p: dict) -> Tensor:
    """``ops.mlp``; by ``bias_gelu`` for SwiGLU, torch.func's jvp and vmap, and a few widths, and without gradients for
    few rows and when compiled. It has no second derivatives."""
    return _mlp(h_BLD, p, False)


def lean_mlp(h_BLD: Tensor, p: dict) -> Tensor:
    """The same that keeps no h."""
    return _mlp(h_BLD, p, True)


def _mlp(h_BLD: Tensor, p: dict, lean: bool) -> Tensor:
    if "gate" in p or quack.mapped():
        return bias_gelu.mlp(h_BLD, p)
    x, w1, b1, w2 = h_BLD.flatten(0, -2), p["fc1"]["w"], p["fc1"]["b"], p["fc2"]["w"]
    if x.is_cuda and not quack.takes(x, w1, w2, b1):
        return bias_gelu.mlp(h_BLD, p)
    if torch.is_grad_enabled():
        return _forward(x, w1, b1, w2, p["fc2"].get("b"), lean)[0].unflatten(0, h_BLD.shape[:-1])
    if torch.compiler.is_compiling() or not x.is_cuda or len(x) < LEAST:
        return bias_gelu.mlp(h_BLD, p)
    h = _product(x, w1, b1, False)[1]
    return linear(h, p["fc2"]["w"], p["fc2"].get("b")).unflatten(0, h_BLD.shape[:-1])
