"""The record of sites: what a kernel or a parallel strategy may replace, each with its plain reference.

A model receives the record as its last argument and calls its sites; a site never asks where it is. A kernel or a
strategy is a function from record to record (``dataclasses.replace``). What chance adds is drawn outside the model, by
the sites uniform and normal; a replacement gives the same bits. Letters: B samples, L tokens, D width, H heads,
K head size, F ffn width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odit import random

EPS = 1e-6  # DiT's LayerNorm


def at_least_fp32(x: Tensor) -> Tensor:
    """Casts half precision to fp32 and leaves fp32 and fp64 alone."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def linear(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """x @ w.T + b with w of shape (out, in)."""
    return torch.nn.functional.linear(x, p["w"], p.get("b"))


def modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = EPS) -> Tensor:
    """LayerNorm without affine, then h (1 + scale) + shift; statistics in at least fp32 (DiT, section 3.2)."""
    x = at_least_fp32(x_BLD)
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    h = (x - mean) * torch.rsqrt(variance + eps)
    return (h * (1 + scale_BD[:, None]) + shift_BD[:, None]).to(x_BLD.dtype)


def gated(x_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor) -> Tensor:
    """x + gate * branch."""
    return x_BLD + gate_BD[:, None] * branch_BLD


def gated_modulate(
    x_BLD: Tensor, gate_BD: Tensor, branch_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The residual and the next modulated input: (x', h)."""
    x_BLD = gated(x_BLD, gate_BD, branch_BLD)
    return x_BLD, modulate(x_BLD, shift_BD, scale_BD, eps)


def qkv(h_BLD: Tensor, p: dict, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Projects to q, k, v (B L H K); normalises q and k and rotates them where p and tables say so.

    p holds w (3, H, K, D), b (3, H, K) and, with QK-norm, q_norm and k_norm (K,). tables is () or (cos, sin) (L, K/2).
    """
    q, k, v = project(h_BLD, p["w"], p.get("b"))
    if "q_norm" in p:
        q, k = rms_norm(q, p["q_norm"]), rms_norm(k, p["k_norm"])
    if tables:
        q, k = rotate(q, *tables), rotate(k, *tables)
    return q, k, v


def project(
    h_BLD: Tensor, w_3HKD: Tensor, b_3HK: Tensor | None, linear: Callable = torch.nn.functional.linear
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B L H K) by ``linear``."""
    w, b = w_3HKD, b_3HK
    if w.is_contiguous():
        heads = linear(h_BLD, w.flatten(0, 2), b.flatten() if b is not None else None)
        q, k, v = heads.unflatten(-1, w.shape[:3]).unbind(2)
    else:  # some heads of a larger weight: three products, rather than a copy of it that backward would keep
        q, k, v = (
            linear(h_BLD, w[i].flatten(0, 1), b[i].flatten() if b is not None else None).unflatten(-1, w.shape[1:3])
            for i in range(3)
        )
    return q, k, v


def rms_norm(x: Tensor, weight_K: Tensor, eps: float = EPS) -> Tensor:
    """x / rms(x) * weight over the last dim, statistics in at least fp32 (Zhang and Sennrich 2019)."""
    y = at_least_fp32(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight_K


def rotate(x_BLHK: Tensor, cos_Lk: Tensor, sin_Lk: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + K/2]) by each token's angles (Su et al. 2021); cos, sin are (L, K/2)."""
    a, b = at_least_fp32(x_BLHK).chunk(2, -1)
    cos, sin = cos_Lk[:, None], sin_Lk[:, None]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x_BLHK.dtype)


def attend(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, every query to every token of its sample; plain maths, so jvp and vmap go through.
    Samples may be along several dims: (..., L, H, K)."""
    q, k, v = (x.transpose(-3, -2) for x in (q_BLHK, k_BLHK, v_BLHK))
    scores = at_least_fp32((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2))
    return (torch.softmax(scores, -1).to(v.dtype) @ v).transpose(-3, -2)


def attend_sdpa(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor) -> Tensor:
    """``attend`` by PyTorch's scaled_dot_product_attention: flash kernels on GPUs, which know no jvp."""
    return by_samples(sdpa, q_BLHK, k_BLHK, v_BLHK)


def sdpa(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's attention of (B, L, H, K), at a scale; on meta tensors flash, by name, where PyTorch would take its
    plain form, which keeps all scores."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    if q.is_meta:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0].transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def by_samples(attend: Callable, *qkv: Tensor) -> Tensor:
    """``attend``, which takes (B, L, ...), of q, k and v (..., L, H, K), or of one (..., L, 3, H, K): it sees copies
    where the leading dims cannot be viewed as one."""
    dims = 3 if len(qkv) == 3 else 4  # of a sample
    return attend(*(x.flatten(0, -dims - 1) for x in qkv)).unflatten(0, qkv[0].shape[:-dims])


def attend_lse(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    """``attend`` over some of the keys, and the log-sum-exp (B, L, H) of each query's scores, in at least fp32.

    What several sets of keys give is merged by it: lse = log sum_j exp(lse_j), o = sum_j exp(lse_j - lse) o_j.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    scores = at_least_fp32((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2))
    lse = torch.logsumexp(scores, -1, keepdim=True)
    o = (scores - lse).exp().to(v.dtype) @ v
    return o.transpose(1, 2), lse.squeeze(-1).transpose(1, 2)


def attend_grad(
    do_BLHK: Tensor, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, o_BLHK: Tensor, lse_BLH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) that some of the keys bring, where o and lse are those of all keys together (Dao 2023, section 3.1).

    With P = exp(q k^T / sqrt(K) - lse): dv = P^T do and dS = P (do v^T - do . o), from which dq and dk follow.
    """
    do, q, k, v, o = (x.transpose(1, 2) for x in (do_BLHK, q_BLHK, k_BSHK, v_BSHK, o_BLHK))
    scale = q.shape[-1] ** -0.5
    p = (at_least_fp32((q * scale) @ k.transpose(-1, -2)) - lse_BLH.transpose(1, 2)[..., None]).exp()
    dots = (at_least_fp32(do) * at_least_fp32(o)).sum(-1, keepdim=True)
    ds = (p * (at_least_fp32(do @ v.transpose(-1, -2)) - dots)).to(q.dtype)
    dv = p.to(do.dtype).transpose(-1, -2) @ do
    dq, dk = ds @ (k * scale), ds.transpose(-1, -2) @ (q * scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def attend_lse_flash(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    """``attend_lse`` by PyTorch's flash kernel where that takes it: half precision, K a multiple of 8 up
    to 256, a GPU since Ampere."""
    if not _flash_takes(q_BLHK):
        return attend_lse(q_BLHK, k_BSHK, v_BSHK)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return o.transpose(1, 2), lse.transpose(1, 2)


def attend_grad_flash(
    do_BLHK: Tensor, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, o_BLHK: Tensor, lse_BLH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``attend_grad`` by PyTorch's flash kernel where that takes it."""
    if not _flash_takes(q_BLHK):
        return attend_grad(do_BLHK, q_BLHK, k_BSHK, v_BSHK, o_BLHK, lse_BLH)
    do, q, k, v, o = (x.transpose(1, 2) for x in (do_BLHK, q_BLHK, k_BSHK, v_BSHK, o_BLHK))
    lse = lse_BLH.transpose(1, 2).contiguous()
    no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, False, no_dropout, no_dropout
    )
    return tuple(x.transpose(1, 2) for x in found)


def _flash_takes(q: Tensor) -> bool:
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and (not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (8, 0))


def cross(h_BLD: Tensor, p: dict, text_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Every token attends to the tokens of its sample's caption: (B, L, D).

    p holds q {w (H, K, D), b (H, K)}, kv {w (2, H, K, D), b (2, H, K)} and out {w (D, H, K), b (D)}.
    """
    return out(attend_masked(*cross_qkv(h_BLD, p, text_BSD), mask_BS), p["out"])


def cross_sdpa(h_BLD: Tensor, p: dict, text_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """``cross`` by PyTorch's scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in cross_qkv(h_BLD, p, text_BSD))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_BS[:, None, None])
    return out(o.transpose(1, 2), p["out"])


def cross_qkv(h_BLD: Tensor, p: dict, text_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, L, H, K) of the tokens, k and v (B, S, H, K) of the caption."""
    heads, size = p["q"]["w"].shape[:2]
    q = torch.nn.functional.linear(h_BLD, p["q"]["w"].flatten(0, 1), p["q"]["b"].flatten())
    kv = torch.nn.functional.linear(text_BSD, p["kv"]["w"].flatten(0, 2), p["kv"]["b"].flatten())
    return q.unflatten(-1, (heads, size)), *kv.unflatten(-1, (2, heads, size)).unbind(2)


def attend_masked(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_BS: Tensor) -> Tensor:
    """``attend`` over the keys that the mask keeps, at least one a sample."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
    scores = at_least_fp32((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2))
    scores = scores.masked_fill(~mask_BS[:, None, None], float("-inf"))
    return (torch.softmax(scores, -1).to(v.dtype) @ v).transpose(1, 2)


def out(o_BLHK: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Projects the heads back to D; p holds w (D, H, K) and b (D)."""
    return torch.nn.functional.linear(o_BLHK.flatten(2), p["w"].flatten(1), p["b"])


def mlp(h_BLD: Tensor, p: dict) -> Tensor:
    """fc2(gelu(fc1 h)) with tanh-GELU as DiT; fc2(silu(gate h) * fc1 h) (SwiGLU, Shazeer 2020) where p has a gate."""
    hidden = linear(h_BLD, p["fc1"])
    if "gate" in p:
        hidden = torch.nn.functional.silu(linear(h_BLD, p["gate"])) * hidden
    else:
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    return linear(hidden, p["fc2"])


def enter(x_BLD: Tensor, *tables: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The tokens of this place, and each table in the layout of ``qkv``'s output; here: everything."""
    return x_BLD, tables


def leave(x_BLD: Tensor) -> Tensor:
    """All tokens again."""
    return x_BLD


def hands_on_any(site: Callable) -> Callable:
    """Marks a ``layers`` or ``switch`` that hands on whatever a block gives, and not one tensor alone. Only where both
    are marked may blocks leave their sums to the next one (``Ops.sums``)."""
    site.hands_on_any = id(site)  # type: ignore  # its own: a wrapper that copies attributes is not marked
    return site


@hands_on_any
def switch(x_BTSD: Any, to: str) -> Any:
    """Tokens of a time x space model on their way to attention over 'time' or 'space', which is whole after this."""
    return x_BTSD


@hands_on_any
def layers(block: Callable, params: list, x: Any, *args) -> Any:
    """Runs x through ``block(p, x, *args)`` for each p of params."""
    for p in params:
        x = block(p, x, *args)
    return x


@dataclass(frozen=True)
class Ops:
    """One function a site; the defaults are the single-device reference, whose docstrings are the contracts."""

    enter: Callable = enter
    layers: Callable = layers
    modulate: Callable = modulate
    gated: Callable = gated
    gated_modulate: Callable = gated_modulate
    qkv: Callable = qkv
    attend: Callable = attend
    attend_lse: Callable = attend_lse
    attend_grad: Callable = attend_grad
    cross: Callable = cross
    out: Callable = out
    mlp: Callable = mlp
    leave: Callable = leave
    switch: Callable = switch
    uniform: Callable = random.uniform
    normal: Callable = random.normal

    @property
    def sums(self) -> bool:
        """Whether a block has to sum what it gives; else it may leave that to the next one's first kernel."""
        return not all(getattr(site, "hands_on_any", None) == id(site) for site in (self.layers, self.switch))


def flash() -> Ops:
    """The reference with PyTorch's flash attention."""
    return Ops(attend=attend_sdpa, attend_lse=attend_lse_flash, attend_grad=attend_grad_flash, cross=cross_sdpa)
