"""Offload: masters, moments and EMA in host memory, where the CPU updates them.

(ColossalAI's Gemini and HybridAdam; ZeRO-Offload, Ren et al. 2021.) What the device sees of a leaf that lives on the
host are its working copy, which gathers read block by block, and its gradient, which leaves as its block's backward
ends. The schedule of one step:

  forward, backward   block i's working copy goes up while its neighbour computes (``zero``)
  backward            block i's summed gradient goes down into one of two staging buffers; meanwhile a thread takes
                      block i+1's from the other, adds it to what earlier micro-batches left and, after the last one,
                      adds up its squared norm
  after it            all ranks agree by the global norm whether the step counts; then AdamW, EMA and the cast to the
                      working copy run in one sweep over the host's leaves

The update waits for the verdict because a step that does not count must leave no bit changed. Running it earlier,
beside a second copy of the state, was measured: the copy costs more (0.25 s for 675 M parameters on 16 cores) than
backward could hide (0.14 s). Only working copies and staging buffers are page-locked, since no copy engine touches the
rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit import optim, tree
from odit.parallel import collectives, zero

ROW = 1 << 12  # elements whose squares one core adds up
MEASURED = 2  # steps with everything on the host before a budget is filled
MARGIN = 0.06  # of a budget that stays free, for what the allocator cannot use
TAIL = 64  # the fused kernel rounds the last elements of an odd length differently: they go through a padded copy


class Leaves(NamedTuple):
    """A leaf's master, moments and EMA, flat (fp32)."""

    p: Tensor
    m: Tensor
    v: Tensor
    ema: Tensor


class Settings(NamedTuple):
    """What an update needs beside gradients; the same for every leaf of a step."""

    count: Tensor
    lr: float
    ema_decay: float
    unscale: float  # 1 / loss scale


class Offload:
    """The host's side of a training run; ``host`` are indices of the leaves that live there, all or, after ``settle``
    under a ``budget`` of device bytes, those that do not fit. ``frozen`` are those that no update moves.

    One step: ``begin``; ``sources``, which gathers read; ``sink`` of each micro-batch during its backward;
    ``squared_norm``; and ``update_``, if the step counts.
    """

    def __init__(
        self,
        layout: zero.Layout,
        optimizer: optim.Optimizer,
        host: Iterable[int],
        budget: float | None = None,
        num_micro: int = 1,
        frozen: Iterable[int] = (),
    ):
        assert layout.stage >= 2, "gradients leave block by block in stages 2 and 3 alone"
        self.layout, self.optimizer, self.host, self.frozen = layout, optimizer, set(host), set(frozen)
        self.paths = tree.paths(layout.declared)
        self.specs = tree.leaves(layout.specs)
        self.sizes = [math.prod(s.local_shape(p.shape)) for p, s in zip(tree.leaves(layout.declared), self.specs)]
        numbered = tree.unflatten(layout.declared, list(range(len(self.sizes))))
        self.bundles = [tree.leaves(block) for block in numbered[zero.BLOCKS]]
        self.bundles.append(tree.leaves({k: v for k, v in numbered.items() if k != zero.BLOCKS}))
        self.on_gpu = layout.device.type == "cuda"
        self.down = torch.cuda.Stream(layout.device) if self.on_gpu else None
        most = max(sum(self.sizes[n] for n in bundle) for bundle in self.bundles)
        self.staging = [self._pinned(most, layout.reduce_dtype) for _ in range(2)]
        self.working = {}
        for bundle in self.bundles:
            flat = self._pinned(sum(self.sizes[n] for n in bundle), layout.dtype)
            self.working |= dict(zip(bundle, flat.split([self.sizes[n] for n in bundle])))
        self.totals: dict[int, Tensor] = {}
        self.cast_from: tree.Tree = None  # the parameters that ``working`` was cast from
        self.budget, self.num_micro, self.steps = budget, num_micro, 0
        if budget is not None:  # the allocator frees what it caches rather than pass this, and fails at it
            total = torch.cuda.mem_get_info(layout.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
        self.thread = ThreadPoolExecutor(1, "offload")
        self.jobs: list[Future] = []

    def sources(self, params: tree.Tree) -> tree.Tree:
        """What gathers read: working copies of host leaves, masters of the others."""
        leaves = tree.leaves(params)
        if self.cast_from is not params:
            for n in self.host:
                self.working[n].copy_(leaves[n].view(-1))
            self.cast_from = params
        return tree.unflatten(
            params, [self.working[n].view(p.shape) if n in self.host else p for n, p in enumerate(leaves)]
        )

    def begin(self, params: tree.Tree, opt: optim.AdamState, ema: tree.Tree, settings: Settings) -> None:
        """Starts a step."""
        self.trees, self.opt = (params, opt.m, opt.v, ema), opt
        self.state = [Leaves(*(x.view(-1) for x in four)) for four in zip(*map(tree.leaves, self.trees), strict=True)]
        self.settings, self.squares = settings, {}
        assert not self.jobs, "the last step was not ended"

    def sink(self, first: bool, last: bool) -> zero.Sink:
        """What takes a micro-batch's gradients; ``first`` and ``last`` say which of the step's it is."""

        def take(i: int, grads: list[Tensor]) -> list[Tensor | None]:
            bundle = self.bundles[i]
            mine = [(n, g) for n, g in zip(bundle, grads) if n in self.host - self.frozen]
            if mine:
                if len(self.jobs) >= 2:
                    self.jobs[-2].result()  # its staging buffer is free again
                staged, arrived = self._send_down(mine, self.staging[len(self.jobs) % 2])
                self.jobs.append(self.thread.submit(self._absorb, staged, arrived, list(grads), first, last))
            return [None if n in self.host else g for n, g in zip(bundle, grads)]

        return take

    def squared_norm(self) -> float:
        """Sum of squares of the host gradients that this rank owns, once all have arrived."""
        for job in self.jobs:
            job.result()
        self.jobs.clear()
        rank = self.layout.axis.rank
        return sum(square for n, square in sorted(self.squares.items()) if self.specs[n].owns(rank))

    def first_bad(self) -> str | None:
        """Path of the first host leaf whose gradient is not finite."""
        return next((self.paths[n] for n in sorted(self.squares) if not math.isfinite(self.squares[n])), None)

    def update_(self, grads: tree.Tree, clip: float) -> dict[str, Any]:
        """Updates all leaves in place, here and on the device, in a step that counts; what changes in the state.

        ``grads`` are those of the leaves on the device, ``clip`` scales all.
        """
        pairs = enumerate(zip(self.state, tree.leaves(grads)))
        there = [(s, g) for n, (s, g) in pairs if n not in self.host | self.frozen]
        if there:
            leaves, grads = zip(*there)
            if clip != 1:
                torch._foreach_mul_(list(grads), clip)
            p, m, v, ema = ([s[k] for s in leaves] for k in range(4))
            self._adamw_(p, [g.view(-1) for g in grads], m, v)
            optim.ema_(ema, p, self.settings.ema_decay)
        for n in sorted(self.host - self.frozen):
            self._update_(n, clip)
        self.cast_from = self.trees[0]
        return {"opt": self.opt._replace(count=self.opt.count + 1)}

    def settle(self, params: tree.Tree, opt: optim.AdamState, ema: tree.Tree) -> dict[str, Any]:
        """Before a step: with a budget and after the first ones, moves to the device what fits beside their peak."""
        self.steps += 1
        if self.budget is None or self.steps != MEASURED + 1:
            return {}
        room = self.budget * (1 - MARGIN) - torch.cuda.max_memory_reserved()
        room = min(collectives.gather_objects(self.layout.axis, room))  # whole leaves live at one place on all ranks
        return self.move(self.fitting(room, tree.leaves(params)[0].element_size()), params, opt, ema)

    def fitting(self, room: float, width: int = 4) -> set[int]:
        """Host leaves, in order, whose state and gradients (two at once with micro-batches) fit into ``room`` bytes.

        ``width`` is that of an element of the masters.
        """
        found = set()
        for n in sorted(self.host):
            size = self.sizes[n] * width * (5 if self.num_micro == 1 else 6)
            if size <= room:
                found.add(n)
                room -= size
        return found

    def move(self, leaves: set[int], params: tree.Tree, opt: optim.AdamState, ema: tree.Tree) -> dict[str, Any]:
        """``params``, ``opt`` and ``ema`` with some leaves moved to the device, where they stay."""
        self.host -= leaves
        for n in leaves:
            for held in (self.working, self.totals):
                held.pop(n, None)

        def moved(t: tree.Tree) -> tree.Tree:
            return tree.unflatten(
                t, [x.to(self.layout.device) if n in leaves else x for n, x in enumerate(tree.leaves(t))]
            )

        self.cast_from = None
        return {"params": moved(params), "opt": opt._replace(m=moved(opt.m), v=moved(opt.v)), "ema": moved(ema)}

    def _pinned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self.on_gpu)

    def _send_down(self, mine: list[tuple[int, Tensor]], room: Tensor) -> tuple[list[tuple[int, Tensor]], Any]:
        """Starts the copies into a staging buffer; returns them by leaf, and the event of their arrival."""
        slots = room[: sum(g.numel() for _, g in mine)].split([g.numel() for _, g in mine])
        if self.down is None:
            for slot, (_, g) in zip(slots, mine):
                slot.copy_(g.reshape(-1))
            return [(n, slot) for slot, (n, _) in zip(slots, mine)], None
        self.down.wait_stream(torch.cuda.current_stream(self.layout.device))
        with torch.cuda.stream(self.down):
            for slot, (_, g) in zip(slots, mine):
                slot.copy_(g.reshape(-1), non_blocking=True)
            arrived = self.down.record_event()
        return [(n, slot) for slot, (n, _) in zip(slots, mine)], arrived

    @torch.no_grad()
    def _absorb(self, staged: list, arrived: Any, kept_alive: list[Tensor], first: bool, last: bool) -> None:
        """In the thread: takes a bundle's gradients out of staging, as the module's head tells."""
        if arrived is not None:
            arrived.synchronize()
        kept_alive.clear()  # the device may have its memory back
        for n, found in staged:
            total = self._added(n, found, first)
            if last:
                if self.settings.unscale != 1:
                    total.mul_(self.settings.unscale)
                self.squares[n] = squared_norm(total)

    def _added(self, n: int, found: Tensor, first: bool) -> Tensor:
        """A leaf's gradient in the masters' dtype, with what earlier micro-batches left."""
        if n not in self.totals:
            self.totals[n] = torch.empty(self.sizes[n], dtype=self.state[n].p.dtype)
        return self.totals[n].copy_(found) if first else self.totals[n].add_(found)

    @torch.no_grad()
    def _update_(self, n: int, clip: float) -> None:
        """AdamW, EMA and the cast of one host leaf."""
        (p, m, v, ema), grad = self.state[n], self.totals[n]
        if clip != 1:
            grad.mul_(clip)
        full = len(p) - len(p) % TAIL
        if full:
            self._adamw_(*([x[:full]] for x in (p, grad, m, v)))
        if rest := len(p) - full:
            padded = [torch.nn.functional.pad(x[full:], (0, TAIL - rest)) for x in (p, grad, m, v)]
            self._adamw_(*([x] for x in padded))
            for x, found in zip((p, grad, m, v), padded):
                x[full:] = found[:rest]
        optim.ema_([ema], [p], self.settings.ema_decay)
        self.working[n].copy_(p)

    def _adamw_(self, p: list[Tensor], grad: list[Tensor], m: list[Tensor], v: list[Tensor]) -> None:
        self.optimizer.update_(p, grad, optim.AdamState(m, v, self.settings.count), self.settings.lr)


def host_bytes(num: int, dtype: torch.dtype) -> int:
    """Host memory of ``num`` elements in bytes: masters, moments, EMA, gradients (fp32) and the working copy."""
    return num * (20 + dtype.itemsize)


def squared_norm(x: Tensor) -> float:
    """Sum of squares of a flat tensor, by rows: PyTorch's norm of all of it would run on one core."""
    rows = x[: len(x) // ROW * ROW].view(-1, ROW)
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=1), x[rows.numel() :]])
    return float(torch.linalg.vector_norm(norms)) ** 2
