"""Attention by the library that measured best on this device, for this head size and length.

  softmax(q k^T scale) v, every query to every token of its sample; q, k, v (B, L, H, K), scale 1 / sqrt(K)

Libraries serve some head sizes badly (DiT-XL's is 72). Then heads are made wider by zero columns, on their way through
the weights: the qkv product writes them and the out product reads them, so that no tensor of tokens is copied. Scores
and outputs stay what they were; parameters, gradients and files know nothing of it.

``TABLE`` is what ``experiments/bench.py attention`` measured; ``choose`` reads it and says why.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from odit import ops as reference
from odit.kernels import flash4
from odit.kernels.trial import plain
from odit.ops import Ops

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """One library's attention."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """``attend(q, k, v, scale)``, differentiable."""
    obstacle: Callable[[torch.device, torch.dtype, int], str | None]
    """Why it cannot serve (device, dtype, K); None where it can."""
    told: str
    repeats: bool = True
    """Whether its backward pass gives the same bits each time."""
    attend_packed: Callable[[Tensor, float], Tensor] | None = None
    """``attend_packed(qkv (B, L, 3, H, K), scale)``, whose gradient is one tensor too: no copy puts three together.
    None where the library has no place for it."""


# --- PyTorch's ---


def cudnn(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float) -> Tensor:
    """cuDNN's, by PyTorch's operator of it: no context manager, hence no flags to set and reset a call."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    keeps = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, keeps, 0.0, False, False, scale=scale)
    return found[0].transpose(1, 2)


def flash2(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float) -> Tensor:
    """FlashAttention 2, by PyTorch's operator of it."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return found[0].transpose(1, 2)


def _needs_gpu(least: tuple[int, int], device: torch.device, dtype: torch.dtype, K: int) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}"
    if (found := torch.cuda.get_device_capability(device)) < least:
        return f"compute capability {found[0]}.{found[1]} is below {least[0]}.{least[1]}"
    if dtype not in HALF:
        return f"{str(dtype).removeprefix('torch.')} is not half precision"
    return f"head size {K} is no multiple of 8" if K % 8 else None


def _flash4_obstacle(repeats: bool, device: torch.device, dtype: torch.dtype, K: int) -> str | None:
    return _needs_gpu((9, 0), device, dtype, K) or flash4.obstacle(device, dtype, K, repeats)


# --- odit's own ---


def triton(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float) -> Tensor:
    """The kernel for short samples."""
    from odit.kernels.short_attention import attend

    return attend(q_BLHK, k_BLHK, v_BLHK, scale)


def triton_packed(qkv_BL3HK: Tensor, scale: float) -> Tensor:
    """The same of one tensor."""
    from odit.kernels.short_attention import attend_packed

    return attend_packed(qkv_BL3HK, scale)


def _triton_obstacle(device: torch.device, dtype: torch.dtype, K: int) -> str | None:
    if found := _needs_gpu((8, 0), device, dtype, K):
        return found
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from odit.kernels.short_attention import WIDEST

    return f"head size {K} is beyond {WIDEST}" if K > WIDEST else None


# --- the choice ---


def _always(device: torch.device, dtype: torch.dtype, K: int) -> str | None:
    return None


BACKENDS = {
    b.name: b
    for b in (
        Backend("plain", plain, _always, "reference attention"),
        Backend("sdpa", reference.sdpa, _always, "PyTorch's choice of attention", repeats=False),
        Backend("flash2", flash2, functools.partial(_needs_gpu, (8, 0)), "FlashAttention 2 (PyTorch's)", repeats=False),
        Backend("cudnn", cudnn, functools.partial(_needs_gpu, (9, 0)), "cuDNN's attention", repeats=False),
        Backend(
            "flash4",
            flash4.attend,
            functools.partial(_flash4_obstacle, True),
            "flash-attn 4",
            attend_packed=flash4.attend_packed,
        ),
        Backend(
            "flash4_any",
            flash4.attend_any,
            functools.partial(_flash4_obstacle, False),
            "flash-attn 4, summing in any order",
            repeats=False,
            attend_packed=flash4.attend_packed_any,
        ),
        Backend("triton", triton, _triton_obstacle, "odit's kernel for short samples", attend_packed=triton_packed),
    )
}


@dataclass(frozen=True)
class Entry:
    """What measured best for heads of ``size`` and at least ``least`` tokens; ``wide`` is the size that heads get."""

    size: int
    least: int
    backend: str
    wide: int
    told: str
    """TFLOP/s of forward and backward together, of it and of the next."""


# One H200, bf16, forward + backward, TFLOP/s on the true head size (torch 2.11, flash-attn 4.0.0b36), 16 heads, 8
# samples of 4,096 tokens and 128 of 256; whole steps, and 576 tokens, on one H100. What adds up in the order in which
# parts are ready comes last of its kind.
HOPPER = (
    Entry(72, 2048, "flash4_any", 80, "473 against 424 unpadded, cuDNN 335"),
    Entry(72, 2048, "flash4", 80, "403 against 369 unpadded"),
    Entry(72, 2048, "cudnn", 80, "335 against 327 unpadded"),
    Entry(72, 512, "cudnn", 72, "182 against flash-attn 4's 173"),
    Entry(72, 0, "triton", 72, "backward 0.59 ms against cuDNN's 0.66, and no copy of 0.11"),
    Entry(72, 0, "cudnn", 72, "182 against flash-attn 4's 173"),
    Entry(64, 2048, "flash4_any", 64, "548 against cuDNN's 461"),
    Entry(64, 2048, "flash4", 64, "541 against 548 in any order"),
    Entry(64, 2048, "cudnn", 64, "461 against FlashAttention 2's 276"),
    Entry(64, 512, "cudnn", 64, "265 against FlashAttention 2's 175"),
    Entry(64, 0, "triton", 64, "a step of DiT-B/2 89.8 ms against 92.8 with cuDNN's, of Latte-B 90.5 against 102.8"),
    Entry(64, 0, "cudnn", 64, "218 against flash-attn 4's 151"),
)
TABLE = {(9, 0): HOPPER}


def entries(
    capability: tuple[int, int], size: int, length: int, widens: bool = True, repeats: bool | None = None
) -> list[Entry]:
    """The table's entries that serve, the best one first, whatever is installed; arguments as of ``choose``."""
    found = [
        e for e in TABLE.get(capability, ()) if e.size == size and length >= e.least and (e.wide == size or widens)
    ]
    nearest = max((entry.least for entry in found), default=0)
    found = [entry for entry in found if entry.least == nearest]
    if repeats:
        return [entry for entry in found if BACKENDS[entry.backend].repeats]
    return found if repeats is False else sorted(found, key=lambda entry: not BACKENDS[entry.backend].repeats)


@dataclass(frozen=True)
class Choice:
    """The backend, the size that heads get on their way through it, and a line for people."""

    backend: Backend
    wide: int
    told: str


def choose(
    device: torch.device, dtype: torch.dtype, size: int, length: int, widens: bool = True, repeats: bool | None = None
) -> Choice:
    """Reads the table: the first entry that can run of those measured nearest below this length; else PyTorch's choice.

    Args:
        widens: whether heads may be made wider.
        repeats: whether the backward pass must give the same bits each time; None prefers that among what was measured,
            and takes another where none does.
    Raises:
        ValueError: none of them repeats, and one must.
    """
    if device.type != "cuda":
        return Choice(BACKENDS["plain"], size, "reference attention (no GPU)")
    passed, capability = "", torch.cuda.get_device_capability(device)
    for entry in entries(capability, size, length, widens, repeats):
        backend = BACKENDS[entry.backend]
        if why := backend.obstacle(device, dtype, entry.wide):
            passed = passed or f"; not {backend.told}: {why}"
            continue
        wider = f", heads of {size} as {entry.wide}" if entry.wide != size else ""
        return Choice(backend, entry.wide, f"{backend.told}{wider} (measured: {entry.told}{passed}){_told(backend)}")
    unmeasured = f"head size {size}" if capability in TABLE else f"compute capability {capability[0]}.{capability[1]}"
    reason = passed.removeprefix("; ") or f"{unmeasured} was not measured"
    if not repeats:
        return Choice(BACKENDS["sdpa"], size, f"{BACKENDS['sdpa'].told} ({reason}){_told(BACKENDS['sdpa'])}")
    own = BACKENDS["triton"]
    if (why := own.obstacle(device, dtype, size) or _too_long(length)) is None:
        return Choice(own, size, f"{own.told} ({reason})")
    raise ValueError(
        f"deterministic is given, and no attention here repeats bit for bit for {length} tokens in heads of {size} "
        f"({own.told}: {why}{passed}): install flash-attn-4 where it serves, use --kernels reference, or leave "
        "deterministic out"
    )


def _told(backend: Backend) -> str:
    return "" if backend.repeats else "; its backward pass does not repeat bit for bit"


def _too_long(length: int) -> str | None:
    from odit.kernels.short_attention import LONGEST

    return f"{length} tokens are beyond {LONGEST}" if length > LONGEST else None


@functools.lru_cache(maxsize=64)  # the same record each time: blocks are compiled once a record
def with_attention(ops: Ops, choice: Choice, size: int, packs: bool = False) -> Ops:
    """The record whose ``attend`` is the chosen one, for heads of ``size``.

    ``attend_lse`` and ``attend_grad`` scale by the head size they see: strategies that call them take no wide heads.
    With ``packs`` the results of ``qkv`` go into ``attend`` and nowhere else, and may be one tensor.
    """
    scale, backend = size**-0.5, choice.backend
    ops = replace(ops, attend=lambda q, k, v: _attend_samples(backend.attend, q, k, v, scale=scale))
    if packs and backend.attend_packed is not None:
        ops = _packed(ops, scale, backend.attend_packed)
    return ops if choice.wide == size else _widened(ops, choice.wide - size)


def _attend_samples(attend: Callable, *given: Tensor, scale: float) -> Tensor:
    """``attend`` for samples along one dim, of q, k and v or of one (B, L, 3, H, K). Where they are along two, few
    tokens go to the own kernel, which reads them where they lie, more by copies; plain maths takes any."""
    dims = 3 if len(given) == 3 else 4  # of a sample
    if given[0].ndim == 1 + dims or attend is plain:
        return attend(*given, scale)
    from odit.kernels import short_attention as own

    if own.reaches(given[0]):
        return (own.attend if dims == 3 else own.attend_packed)(*given, scale)
    return reference.by_samples(lambda *xs: attend(*xs, scale), *given)


def own_along_time(places: int, frames: int, heads: int, size: int, dtype: torch.dtype) -> bool:
    """Whether attention along time, of heads of ``size`` on a GPU, goes to the own kernel."""
    from odit.kernels.short_attention import reaches

    return reaches(torch.empty((1, places, frames, heads, size), dtype=dtype, device="meta"))


def _packed(ops: Ops, scale: float, attend_packed: Callable) -> Ops:
    """q, k and v as one tensor, as the product gives them; three where they are normalised or rotated after it."""
    from odit.kernels.linear import linear

    def qkv(h_BLD: Tensor, p: dict, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if tables or "q_norm" in p:
            return ops.qkv(h_BLD, p, tables)
        w, b = p["w"], p["b"]
        return (linear(h_BLD, w.flatten(0, 2), b.flatten()).unflatten(-1, w.shape[:3]),)

    def attend_either(*given: Tensor) -> Tensor:
        return _attend_samples(attend_packed, *given, scale=scale) if len(given) == 1 else ops.attend(*given)

    return replace(ops, qkv=qkv, attend=attend_either)


def _widened(ops: Ops, more: int) -> Ops:
    """Heads with ``more`` zero columns. Where q and k are normalised or rotated these come after that, by a copy."""

    def pad(x: Tensor, dim: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, more))

    def qkv(h_BLD: Tensor, p: dict, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        if tables or "q_norm" in p:
            return tuple(pad(x, 3) for x in ops.qkv(h_BLD, p, tables))  # type: ignore
        return ops.qkv(h_BLD, {name: pad(leaf, 2) for name, leaf in p.items()}, ())

    def out(o_BLHK: Tensor, p: dict[str, Tensor]) -> Tensor:
        return ops.out(o_BLHK, {**p, "w": pad(p["w"], 2)} if o_BLHK.shape[-1] != p["w"].shape[2] else p)

    return replace(ops, qkv=qkv, out=out)
