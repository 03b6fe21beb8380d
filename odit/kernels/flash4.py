"""Attention by flash-attn 4 (Dao et al.; CUTLASS, for Hopper and later), as operators with gradients of our own.

Its kernels are young, and one gave wrong numbers without a word: in 4.0.0b36, on Hopper, the kernel of backward lays
out the sums of dq for heads rounded up to a multiple of 16, and what turns them into dq reads them for a multiple of
32, so that dq of heads of 72 or 80 is noise (flash-attention, pull request 2896). Where it writes like that it is read
like that, and ``obstacle`` tries each head size on a small case before it is taken: no version is believed.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from odit.kernels import trial

TOLERANCE = 0.05  # of o and each gradient; rounding in half precision makes 0.005
TRIED = (2, 300, 2)  # samples, tokens (several tiles of each kernel, the last one not full) and heads of the small case


@functools.cache
def load() -> Any:
    """flash-attn 4's module, whose forward and backward are functions without autograd of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of CUTLASS; an error where warnings are errors
        from flash_attn.cute import interface

    _read_as_written(interface)
    return interface


def _read_as_written(interface: Any) -> None:
    """Makes what reads sums of dq on Hopper take heads as wide as the kernel that writes them does, see above."""
    writer = getattr(interface, "FlashAttentionBackwardSm90", None)
    read = getattr(interface, "_bwd_postprocess_convert", None)
    if writer is None or read is None or writer(None, 72).tile_hdim != 80:  # mended, or another version
        return

    @functools.wraps(read)
    def mended(*args: Any, hdim_multiple_of: int = 32, **settings: Any) -> None:
        on_hopper = args[5] // 10 == 9
        read(*args, hdim_multiple_of=16 if on_hopper and hdim_multiple_of == 32 else hdim_multiple_of, **settings)

    interface._bwd_postprocess_convert = mended


COMPILED = set()  # what has run in this process: name, shape, dtype and settings


def run(name: str, *args: Any, **settings: Any) -> tuple[Any, ...]:
    """What its function of this name gives, the first time without the warnings of its compiler."""
    values = sorted((key, value) for key, value in settings.items() if not isinstance(value, Tensor))
    fn, key = getattr(load(), name), (name, args[0].shape, args[0].dtype, *values)
    if key in COMPILED:
        return fn(*args, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fn(*args, **settings)
    COMPILED.add(key)
    return found


@torch.library.custom_op("odit::attend_fa4", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, repeats: bool) -> tuple[Tensor, Tensor]:
    o, lse, *_ = run("_flash_attn_fwd", q, k, v, softmax_scale=scale, return_lse=True)
    return o, lse


def _outputs(q_BLHK: Tensor) -> tuple[Tensor, Tensor]:
    """Room for o (B, L, H, K) and log-sum-exp (B, H, L)."""
    B, L, H, K = q_BLHK.shape
    return q_BLHK.new_empty((B, L, H, K)), q_BLHK.new_empty((B, H, L), dtype=torch.float32)


@_forward.register_fake
def _(q, k, v, scale, repeats):
    return _outputs(q)


@torch.library.custom_op("odit::attend_fa4_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, repeats: bool
) -> Tensor:
    """dq, dk and dv as one (B, L, 3, H, K), each written in its place: ``attend_packed`` needs no copy of all three."""
    d = _gradient(q)
    dq, dk, dv = d.unbind(2)
    run("_flash_attn_bwd", q, k, v, o, do.contiguous(), lse, scale, deterministic=repeats, dq=dq, dk=dk, dv=dv)
    return d


def _gradient(q_BLHK: Tensor) -> Tensor:
    """Room for dq, dk and dv as one (B, L, 3, H, K)."""
    B, L, H, K = q_BLHK.shape
    return q_BLHK.new_empty((B, L, 3, H, K))


@_backward.register_fake
def _(do, q, k, v, o, lse, scale, repeats):
    return _gradient(q)


@torch.library.custom_op("odit::attend_fa4_packed", mutates_args=())
def _forward_packed(qkv: Tensor, scale: float, repeats: bool) -> tuple[Tensor, Tensor]:
    o, lse, *_ = run("_flash_attn_fwd", *qkv.unbind(2), softmax_scale=scale, return_lse=True)
    return o, lse


@_forward_packed.register_fake
def _(qkv, scale, repeats):
    return _outputs(qkv[:, :, 0])


def _keep(ctx, inputs, output):
    """Of q, k and v, or of one tensor of them."""
    *given, ctx.scale, ctx.repeats = inputs
    ctx.save_for_backward(*given, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dlse):
    *given, o, lse = ctx.saved_tensors
    if do is None:
        return *(None for _ in given), None, None
    q, k, v = given if len(given) == 3 else given[0].unbind(2)
    d = _backward(do, q, k, v, o, lse, ctx.scale, ctx.repeats)
    return *(d.unbind(2) if len(given) == 3 else (d,)), None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
_forward_packed.register_autograd(_differentiate, setup_context=_keep)


def attend(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, as an operator: flash-attn's own autograd function would end a graph of torch.compile."""
    return _forward(q_BLHK, k_BLHK, v_BLHK, scale, True)[0]


def attend_any(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float) -> Tensor:
    """The same, whose dq is summed in whatever order its parts are ready."""
    return _forward(q_BLHK, k_BLHK, v_BLHK, scale, False)[0]


def attend_packed(qkv_BL3HK: Tensor, scale: float) -> Tensor:
    """``attend`` of the three slices, whose gradient is one tensor too."""
    return _forward_packed(qkv_BL3HK, scale, True)[0]


def attend_packed_any(qkv_BL3HK: Tensor, scale: float) -> Tensor:
    """``attend_any`` of the three slices."""
    return _forward_packed(qkv_BL3HK, scale, False)[0]


def obstacle(device: torch.device, dtype: torch.dtype, K: int, repeats: bool) -> str | None:
    """Why ``attend``, or else ``attend_any``, cannot serve heads of K on this GPU; None where it has just done so."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn-4 is not installed"
    try:
        load()
    except Exception as error:  # an older flash-attn, or a part of it that does not fit
        return f"flash-attn-4 cannot be loaded ({type(error).__name__})"
    try:
        wrong = errors(device, dtype, K, repeats)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"flash-attn-4 cannot run ({type(error).__name__})"
    for name, error in wrong.items():
        if not error <= TOLERANCE:
            return f"flash-attn-4's {name} is wrong for heads of {K}, by {error:.0%}"
    return None


@functools.cache
def errors(device: torch.device, dtype: torch.dtype, K: int, repeats: bool) -> dict[str, float]:
    """Relative errors of o, dq, dk and dv on the small case."""
    draws = torch.Generator(device).manual_seed(0)
    B, L, H = TRIED
    *qkv, do = torch.randn((B, L, 4, H, K), generator=draws, device=device).to(dtype).unbind(2)
    return trial.errors(attend if repeats else attend_any, qkv, do, K**-0.5)
