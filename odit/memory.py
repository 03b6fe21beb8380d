"""A plan of memory: one training step run on meta tensors, with every storage weighed.

Nothing is computed and nothing allocated; the bytes of the storages alive at this step's fullest moment are what the
real one needs. The allocator's rounding and kernels' own workspaces are not in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from odit import finetune, random, train, tree
from odit.draws import draw
from odit.front import Front
from odit.parallel import offload, zero
from odit.plan import Plan

META = torch.device("meta")
SLACK = 0.005


class Memory(NamedTuple):
    """Bytes of one rank: on the device at the peak, of these what stands between steps, and on the host."""

    peak: int
    standing: int
    host: int


def predict(plan: Plan) -> Memory:
    """Weighs a step of ``plan`` as this rank of its mesh would run it; offload auto counts with all on the host."""
    fake = on_meta(plan)
    layout = fake.layout
    offloads = plan.run.parallel.offload != "none"
    parts = [s.local_shape(p.shape) for p, s in zip(tree.leaves(plan.declared), tree.leaves(layout.specs))]
    on_host = _empty(plan.declared, parts, plan.dtype) if offloads else None
    with Weigh(tree.leaves(on_host) if offloads else []) as weigh:
        mine = finetune.select(tree.unflatten(plan.declared, parts), fake.trained)  # train.share_frozen
        state = None if offloads else [_empty(plan.declared, parts, torch.float32), *_beside(mine)]
        standing = weigh.now()
        params = on_host if state is None else state[0]
        grads = _gradients(fake, params, _Down() if offloads else None)
        if state is not None and not fake.one_pass:
            opt = train.optimizer(fake).init({})._replace(m=state[1], v=state[2])
            params, grads = (finetune.select(t, fake.trained) for t in (params, grads))
            train.optimizer(fake).update_(params, grads, opt, 1e-4)
        del grads
    num = sum(map(math.prod, parts))
    few = sum(map(math.prod, mine))  # frozen leaves have a master and a working copy alone
    host = offload.host_bytes(few, plan.dtype) + (num - few) * (4 + plan.dtype.itemsize) if offloads else 0
    return Memory(weigh.peak, standing, host)


def describe(plan: Plan) -> str:
    """One line for people."""
    found, gib = predict(plan), 2**30
    peak, standing = found.peak, found.standing
    if plan.graph_obstacle is None:  # a graph keeps its memory, and what ranks sum stands beside it
        standing = peak
        sums = 4 * sum(math.prod(p.shape) for p in finetune.select(plan.declared, plan.trained))
        peak += sums if plan.mesh.world > 1 and plan.layout.stage < 2 else 0
    line = f"memory: {peak / gib:.2f} GiB a rank at the peak, {standing / gib:.2f} of it between steps"
    if held := _frozen(plan.front):
        line += f"; beside it {held / gib:.2f} of encoders"
    if found.host:
        line += f"; {found.host / gib:.2f} GiB of the host"
    if plan.budget is not None:
        line += f"; after {offload.MEASURED} steps what fits moves to the device, up to {plan.budget / gib:.2f} GiB"
    return line


def _frozen(front: Front) -> int:
    """Bytes on the device between steps that the encoders' weights take; what they compute is not weighed."""
    stored = [weights.held.values() for weights in (front.text_weights, front.vae_weights) if weights is not None]
    return sum(t.nbytes for held in stored for t in held if t.device.type != "cpu")


class Weigh(TorchDispatchMode):
    """Counts the bytes of all storages that operators make on a device while it is on, but not those of ``elsewhere``.

    ``peak`` is exact to ``SLACK``: summing at every operator of a growing step would take many seconds.
    """

    def __init__(self, elsewhere: list[torch.Tensor], device: torch.device = META):
        super().__init__()
        self.device = device
        self.elsewhere = {x.untyped_storage()._cdata for x in elsewhere}
        self.refs: dict[int, StorageWeakRef] = {}  # by address
        self.loose: dict[int, StorageWeakRef] = {}  # those that were seen freed, to be filled again
        self.sizes: dict[int, int] = {}
        self.peak = 0
        self.most = 0  # no less than what is alive of refs: exact when last summed, and all made since

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in _pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device == self.device:
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in self.elsewhere:
                    self.refs[storage._cdata] = StorageWeakRef(storage)
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.most += storage.nbytes()
        if self.most + sum(_size(ref) or 0 for ref in self.loose.values()) > self.peak * (1 + SLACK):
            self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes alive; storages that were freed to be filled again (``bundle.free_``) count with what they have now."""
        tight, loose, sizes = {}, {}, {}
        for address, ref in [*self.refs.items(), *self.loose.items()]:
            size = _size(ref)
            if size is not None:
                resized = address in self.loose or size != self.sizes[address]
                (loose if resized else tight)[address] = ref
                sizes[address] = self.sizes[address]
        self.refs, self.loose, self.sizes = tight, loose, sizes
        self.most = sum(sizes[address] for address in tight)
        return self.most + sum(_size(ref) or 0 for ref in loose.values())


def _size(ref: StorageWeakRef) -> int | None:
    """Bytes of a storage now, None once it is gone."""
    storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return None if storage is None else storage.nbytes()


class _Down:
    """Stands for ``Offload``: gradients of the last two bundles are still on their way down."""

    def __init__(self):
        self.sent: deque[list[torch.Tensor]] = deque(maxlen=2)

    def sink(self, i: int, grads: list[torch.Tensor]) -> list[None]:
        self.sent.append(grads)
        return [None] * len(grads)


def _gradients(plan: Plan, params: tree.Tree, down: _Down | None) -> tree.Tree:
    """``train.gradients`` without what needs values; two micro-batches stand for more."""
    held = plan.layout.hold(params)
    shape, total = plan.shape.sample, None
    for _ in range(min(2, plan.num_micro)):
        ids = torch.empty(plan.micro_batch, dtype=torch.int64, device=META)
        x = torch.empty(plan.micro_batch, *shape, device=META)
        y = tree.map(lambda c: c.expand(plan.micro_batch, *c.shape[1:]), plan.null)
        draws = draw(plan, ids, shape, random.key(0))
        sink: zero.Sink | None = None if down is None else down.sink
        _, grads = train.part_gradients(plan, params, held, x, y, draws, sink=sink)
        total = train.add(total, grads, params, plan.sums_dtype)
        del grads
    return plan.layout.reduce(total)


def embedded(plan: Plan) -> Front:
    """A front that gives features of captions at once: what encoders hold is not weighed."""
    S, E = plan.shape.text_length, plan.shape.text_width
    if not E:
        return Front(plan.tokenize)

    def features(captions: list[str]) -> dict[str, torch.Tensor]:
        text_BSE = torch.zeros(len(captions), S, E)
        return {"text": text_BSE, "mask": torch.ones(len(captions), S, dtype=torch.bool), "pooled": text_BSE[:, 0]}

    return Front(features)


def on_meta(plan: Plan) -> Plan:
    """The plan of steps without data: on meta tensors, eager, and captions without their encoder."""
    objective = plan.objective.to(META) if hasattr(plan.objective, "to") else plan.objective
    return dataclasses.replace(plan, device=META, objective=objective, compiled=False, front=embedded(plan))


def _beside(parts: list[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    """Moments and EMA of the leaves that train."""
    return [_empty(parts, parts, torch.float32) for _ in range(3)]


def _empty(like: tree.Tree, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tree.Tree:
    return tree.unflatten(like, [torch.empty(shape, dtype=dtype, device=META) for shape in shapes])
