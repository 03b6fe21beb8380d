"""Ring attention (Liu et al. 2023): queries stay, keys and values travel from rank to rank.

  forward   n - 1 hops of (k, v), each under way while the block in hand is attended to; results merge by their
            log-sum-exp
  backward  (k, v) travel again; (dk, dv) of a block start with the first rank it visits, travel one step behind it, and
            come home in the last of n - 1 hops, where the owner adds its own part

No block is attended to twice: backward has the merged output and log-sum-exp, which is all that a block's part needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from odit.ops import Ops, at_least_fp32
from odit.parallel import collectives, recorder
from odit.parallel.collectives import Sizes, roll, start_shift
from odit.parallel.mesh import Axis
from odit.parallel.place import Place, split_tokens


def build(ops: Ops, place: Place) -> Ops:
    """The record whose keys and values go round."""
    return replace(split_tokens(ops, place, tables=True), attend=around(ops, place.axis, place.tokens))


def around(ops: Ops, axis: Axis, tokens: Sizes) -> Callable:
    """``attend`` on this rank's tokens with keys of all ranks of the axis, which hold ``tokens``."""
    if axis.size == 1:
        return ops.attend
    ring = _Ring(ops, axis, tokens)

    def attend(q_BlHK: Tensor, k_BlHK: Tensor, v_BlHK: Tensor) -> Tensor:
        return _Attend.apply(ring, q_BlHK, k_BlHK, v_BlHK)

    return attend


class _Ring:
    """The walk of blocks around an axis."""

    def __init__(self, ops: Ops, axis: Axis, tokens: Sizes):
        self.ops, self.axis, self.tokens = ops, axis, tokens

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(o, lse) of this rank's queries over all keys."""
        n = self.axis.size
        kv, o, lse = torch.stack((k, v)), None, None
        for step in range(n):
            coming = self._pass_on(kv, step) if step < n - 1 else None
            recorder.mark(f"attend {step}")
            if q.numel() and kv.numel():
                o, lse = merge(o, lse, *self.ops.attend_lse(q, *kv))
            kv = coming.wait() if coming is not None else None
        if o is None:  # this rank has no tokens
            o, lse = torch.zeros_like(q), q.new_zeros(q.shape[:-1])
        return o.to(q.dtype), lse

    def backward(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """(dq, dk, dv) of this rank's tokens."""
        n = self.axis.size
        kv, dq, own, travelling = torch.stack((k, v)), None, None, None
        for step in range(n):
            coming = self._pass_on(kv, step) if step < n - 1 else None
            recorder.mark(f"attend backward {step}")
            dq, dkv = self._block(do, q, kv, o, lse, dq)
            if step == 0:
                own = dkv
            else:
                dkv = dkv if travelling is None else dkv + travelling.wait()
                travelling = self._pass_on(dkv, step)
            kv = coming.wait() if coming is not None else None
        dk, dv = own + travelling.wait()
        return dq.to(q.dtype), dk, dv

    def _block(self, do, q, kv, o, lse, dq) -> tuple[Tensor, Tensor]:
        """dq with what one block of keys adds to it, and the block's (dk, dv)."""
        if not (q.numel() and kv.numel()):
            return torch.zeros_like(q) if dq is None else dq, torch.zeros_like(kv)
        new_dq, dk, dv = self.ops.attend_grad(do, q, *kv, o, lse)
        return at_least_fp32(new_dq) if dq is None else dq + new_dq, torch.stack((dk, dv))

    def _pass_on(self, block: Tensor, step: int) -> collectives.Handle:
        """Starts a block (2 B l H K) on its hop to the next rank, ``step`` hops from its owner."""
        return start_shift(block, self.axis, 1, dim=2, sizes=roll(self.tokens, step))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ring: _Ring, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = ring.forward(q, k, v)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.ring.backward(do, *ctx.saved_tensors)


def merge(o: Tensor | None, lse: Tensor | None, new_o: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B L H K) and log-sum-exp (B L H) over two sets of keys, in at least fp32; None is no keys yet."""
    new_o = at_least_fp32(new_o)
    if o is None:
        return new_o, new_lse
    both = torch.logaddexp(lse, new_lse)
    return o * (lse - both).exp()[..., None] + new_o * (new_lse - both).exp()[..., None], both


def received(place: Place) -> tuple[int, int]:
    """Values (of K elements) a sample, forward and backward."""
    return passed_values(place.axis, place.tokens, place.heads)


def passed_values(axis: Axis, tokens: Sizes, num_heads: int) -> tuple[int, int]:
    """Values that arrive at this rank by ``around``: every block but its own; gradients of all but its neighbour's."""
    blocks = 2 * (sum(tokens) - tokens[axis.rank]) * num_heads
    gradients = 2 * (sum(tokens) - tokens[axis.rank - 1]) * num_heads
    return (blocks, blocks + gradients) if axis.size > 1 else (0, 0)
