"""Training as a pure step over an explicit state: ``state, metrics = step(state, batch, key)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odit import finetune, graphs, health, optim, random, tree
from odit.data import Batch, DataError
from odit.draws import Draws, drawn, hash_samples
from odit.ops import Ops
from odit.parallel import collectives, offload, spec, zero
from odit.plan import Plan

GROW_AFTER = 2000  # finite steps before the fp16 loss scale doubles, as torch.amp.GradScaler
FIRST_SCALE = 2.0**16


class LossScale(NamedTuple):
    """Factor on the fp16 loss and how many finite steps it has stood; (1, 0) for fp32 and bf16."""

    scale: float
    streak: int


class TrainState(NamedTuple):
    """All that a run is at a step boundary; weights, moments and EMA are fp32, each leaf this rank's part.

    ``step`` counts attempts, ``opt.count`` updates.
    """

    step: int
    params: tree.Tree
    opt: optim.AdamState
    ema: tree.Tree
    loss_scale: LossScale


class Words(NamedTuple):
    """64-bit hashes of what a rank's samples are, int64 scalars on the device."""

    draws: Tensor
    """``odit.draws.digest``: what is logged."""
    x: Tensor
    """Of the pictures, clips or latents as they were read; ranks that share samples compare it."""


def init_state(plan: Plan, key: random.Key) -> TrainState:
    """Draws this rank's parts of the weights of step 0; the EMA starts as their copy."""
    layout = plan.layout
    params = spec.init(plan.declared, random.fold_in(key, "weights"), layout.specs, layout.axis, plan.home)
    scale = FIRST_SCALE if plan.dtype == torch.float16 else 1.0
    ema = tree.map(torch.clone, params)
    return TrainState(0, params, optimizer(plan).init(params), ema, LossScale(scale, 0))


def share_frozen(plan: Plan, state: TrainState) -> TrainState:
    """The state whose frozen leaves take no memory beside their weight: it is the EMA too, and moments are one zero."""

    def moments(t: tree.Tree) -> tree.Tree:
        pairs = zip(tree.leaves(t), plan.trained)
        return tree.unflatten(t, [x if trains else x.new_zeros(()).expand(x.shape) for x, trains in pairs])

    averages = zip(tree.leaves(state.ema), tree.leaves(state.params), plan.trained)
    ema = tree.unflatten(state.ema, [x if trains else p for x, p, trains in averages])
    return state._replace(opt=state.opt._replace(m=moments(state.opt.m), v=moments(state.opt.v)), ema=ema)


def optimizer(plan: Plan) -> optim.Optimizer:
    """The run's AdamW."""
    cfg = plan.run.optimizer
    return optim.adamw(cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, fused=plan.run.parallel.offload != "none")


def losses(plan: Plan, params: tree.Tree, ops: Ops, x: Tensor, y: tree.Tree, draws: Draws) -> Tensor:
    """Loss a sample (B,), from weights in the working dtype and a record that can run them."""
    return losses_of(plan, params, ops, x, plan.front.embed(conditions(plan, y, draws.dropped_B)), draws)


def losses_of(plan: Plan, params: tree.Tree, ops: Ops, x: Tensor, y: tree.Tree, draws: Draws) -> Tensor:
    """``losses`` of conditions as they enter the model."""
    return plan.objective.loss(lambda x, t: plan.forward(params, x, t, y, ops=ops), x, draws.t_B, draws.noise)


def conditions(plan: Plan, y: tree.Tree, dropped_B: Tensor) -> tree.Tree:
    """The labels or captions the model sees: the null one where they were dropped."""
    return tree.map(lambda c, null: torch.where(over(dropped_B, c), null, c), y, plan.null)


def over(chosen_B: Tensor, c: Tensor) -> Tensor:
    """A choice a sample, shaped to broadcast against c."""
    return chosen_B.reshape(-1, *[1] * (c.ndim - 1))


def value_and_grad(
    fn: Callable[[tree.Tree], tuple[Tensor, Any]], params: tree.Tree, trained: tuple[bool, ...] | None = None
) -> tuple[Tensor, Any, tree.Tree]:
    """(value, aux, gradients) of ``fn(params) -> (value, aux)``, by torch.autograd.grad; None for what has none and for
    leaves that are not ``trained`` (all are unless told).

    torch.func.grad keeps a graph for a second derivative even when none is asked for: 53 % more memory a step.
    """
    leaves = [p.detach() for p in tree.leaves(params)]
    wanted = [p.requires_grad_() for p, w in zip(leaves, trained or [True] * len(leaves)) if w]
    value, aux = fn(tree.unflatten(params, leaves))
    grads = iter(torch.autograd.grad(value, wanted, allow_unused=True))
    return value.detach(), aux, tree.unflatten(params, [next(grads) if p.requires_grad else None for p in leaves])


def make_step(plan: Plan) -> Callable[[TrainState, Batch, random.Key], tuple[TrainState, dict[str, Any]]]:
    """Makes the step function: draws, gradients over micro-batches, clip, AdamW, EMA. Params and EMA move in place.

    A step takes this rank's share of the global batch. A non-finite loss or gradient on any rank leaves weights,
    moments and EMA as they were, bit for bit, on all of them; the metrics then name the first bad tensor as ``bad`` and
    the samples whose loss is bad, by rank, as ``bad_samples``.
    Where ``stop`` is true on any rank they hold ``stop`` on all of them.
    """
    cfg, host = plan.run.optimizer, offloaded(plan)

    def step(state: TrainState, batch: Batch, key: random.Key, stop: bool = False) -> tuple[TrainState, dict[str, Any]]:
        lr = optim.learning_rate(cfg, state.step, plan.run.steps)
        decay = optim.ema_rate(cfg, int(state.opt.count))
        if host is not None:
            state = state._replace(**host.settle(*state[1:4]))
            settings = offload.Settings(state.opt.count, lr, decay, 1 / state.loss_scale.scale)
            host.begin(state.params, state.opt, state.ema, settings)
        loss_B, grads, words = gradients(plan, state.params, batch, key, state.loss_scale.scale, host)
        move = update(plan, state, grads, host)
        loss, norm, word, stop = agree(plan, loss_B, grads, words, host, stop)
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr, "draw_digest": f"{word:016x}"}
        if stop:
            metrics["stop"] = True
        finite = math.isfinite(loss) and math.isfinite(norm)
        if plan.dtype == torch.float16:
            metrics["loss_scale"] = state.loss_scale.scale
        if finite:
            state = move(lr, decay, norm)
        else:
            name, metrics["bad_samples"] = tell_bad(plan, grads, loss_B, batch.ids_B, host)
            metrics["bad"] = name or ("grad_norm" if math.isfinite(loss) else "loss")
        scale = next_scale(state.loss_scale, finite) if plan.dtype == torch.float16 else state.loss_scale
        return state._replace(step=state.step + 1, loss_scale=scale), metrics

    return step


def offloaded(plan: Plan) -> offload.Offload | None:
    """The host's side of a run that keeps its state there."""
    if plan.run.parallel.offload == "none":
        return None
    everything = range(len(tree.leaves(plan.declared)))
    frozen = {n for n in everything if not plan.trained[n]}
    return offload.Offload(plan.layout, optimizer(plan), everything, plan.budget, plan.num_micro, frozen)


def update(
    plan: Plan, state: TrainState, grads: tree.Tree, host: offload.Offload | None = None
) -> Callable[[float, float, float], TrainState]:
    """``move(lr, decay, norm) -> state`` after an update by AdamW and EMA, where ``norm`` is the gradients' global one;
    leaves move in place. What needs no number is done here, while a GPU still computes the gradients."""
    clip, kept = plan.run.optimizer.clip, plan.trained

    def factor(norm: float) -> float:
        return clip / max(norm, clip) if clip else 1.0

    if host is not None:
        return lambda lr, decay, norm: state._replace(**host.update_(grads, factor(norm)))
    p, g, m, v, ema = (finetune.select(t, kept) for t in (state.params, grads, *state.opt[:2], state.ema))
    opt = optim.AdamState(m, v, state.opt.count)

    def moved(found: optim.AdamState) -> TrainState:
        return state._replace(opt=state.opt._replace(count=found.count))

    if plan.one_pass:
        ready = one_pass(plan)(p, g, opt, ema)
        return lambda lr, decay, norm: moved(ready(lr, factor(norm), decay))

    def plainly(lr: float, decay: float, norm: float) -> TrainState:
        if clip:
            optim.clip_(g, norm, clip)
        found = optimizer(plan).update_(p, g, opt, lr)
        optim.ema_(ema, p, decay)
        return moved(found)

    return plainly


def one_pass(plan: Plan) -> Callable:
    """The optimizer's update by one kernel, with clipping's factor and the EMA in it."""
    from odit.kernels import adamw  # which loads Triton

    cfg = plan.run.optimizer
    return adamw.fused(optimizer(plan), cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay).prepare


def agree(
    plan: Plan,
    loss_B: Tensor,
    grads: tree.Tree,
    words: Words,
    host: offload.Offload | None = None,
    stop: bool = False,
) -> tuple[float, float, int, bool]:
    """(mean loss, global gradient norm, draw digest, whether any rank wants to stop) over all ranks, by one small
    all-reduce; the same bits on each.

    What several ranks hold alike counts once, with what the first of them has; samples with the first rank along sp.
    Raises DataError, on all ranks, where ranks that share samples saw different ones.
    """
    square = plan.layout.squared_norm(grads).double()
    if host is not None:
        square = square + host.squared_norm()
    pieces = torch.stack([(word >> shift) & 0xFFFF for word in words for shift in (0, 16, 32, 48)])
    everybody = pieces.double()  # which sums them exactly
    speaks = plan.mesh.sp.rank == 0
    loss = loss_B.double().sum() if speaks else torch.zeros((), dtype=torch.float64, device=plan.device)
    wish = torch.full_like(square, float(stop))
    told = torch.cat([torch.stack([loss, square, wish]), everybody * speaks, everybody])
    loss, total, wishes, *pieces = collectives.all_reduce_(told, plan.layout.axis).tolist()
    if [plan.mesh.sp.size * piece for piece in pieces[:8]] != pieces[8:]:
        raise DataError(
            f"ranks that share samples over parallel.sp {plan.mesh.sp.size} read different ones, as where a picture "
            "can be read on one machine and not on another: give all ranks the same data"
        )
    pieces = pieces[:4]
    word = sum(int(piece) << shift for piece, shift in zip(pieces, (0, 16, 32, 48)))
    return loss / plan.run.global_batch, math.sqrt(total), word & (2**64 - 1), wishes > 0


def tell_bad(
    plan: Plan, grads: tree.Tree, loss_B: Tensor, ids_B: Tensor, host: offload.Offload | None = None
) -> tuple[str | None, dict[int, list[int]]]:
    """The first bad tensor that any rank saw, in the order of ranks; and draw ids of samples of bad loss, by rank.

    Ranks that share samples compute the same losses, and the first of them tells.
    """
    here = health.first_bad({"grad": grads})
    if here is None and host is not None and (path := host.first_bad()):
        here = f"grad.{path}"
    samples = ids_B[~torch.isfinite(loss_B).cpu()].tolist() if plan.mesh.sp.rank == 0 else []
    told = collectives.gather_objects(plan.layout.axis, (here, samples))
    name = next((name for name, _ in told if name), None)
    return name, {rank: samples for rank, (_, samples) in enumerate(told) if samples}


def gradients(
    plan: Plan,
    params: tree.Tree,
    batch: Batch,
    key: random.Key,
    scale: float = 1.0,
    host: offload.Offload | None = None,
) -> tuple[Tensor, tree.Tree, Words]:
    """(loss a sample, this rank's parts of the gradients, hashes) of this rank's share, one micro-batch at a time.

    Gradients are those of the sum of losses over the global batch size, summed over ranks; loss and hashes are local.
    Gradients of leaves that live on the host stay there and are None here.
    """
    layout = plan.layout
    params = params if host is None else host.sources(params)
    graphed = graphed_gradients(plan, params) if plan.graph_obstacle is None else None
    held = layout.hold(params) if graphed is None else None
    total, all_losses, nothing = None, [], torch.zeros((), dtype=torch.int64, device=plan.device)
    word, seen = nothing, nothing
    parts = micro_batches(batch, plan.micro_batch)
    for number, part in enumerate(parts):
        ids, x, y = tree.map(lambda field: field.to(plan.device, non_blocking=True), list(part))
        seen = seen + hash_samples((x,)) if plan.mesh.sp.size > 1 else seen
        x = plan.front.latents(x, ids, key, plan.kernels.normal)
        draws = drawn(plan, ids, tuple(x.shape[1:]), key)
        word = word + hash_samples((ids, *draws, *tree.leaves(conditions(plan, y, draws.dropped_B))))
        sink = None if host is None else host.sink(first=number == 0, last=number == len(parts) - 1)
        if graphed is not None:
            loss_B, grads = graphed(x, y, draws)
        else:
            loss_B, grads = part_gradients(plan, params, held, x, y, draws, scale, sink)
        all_losses.append(loss_B)
        total = add(total, grads, params, plan.sums_dtype, own=graphed is not None and len(parts) > 1)
        del grads  # or they would stand beside the sum until the next ones come
    total = layout.reduce(total)
    here = [g for g in tree.leaves(total) if g is not None]
    if scale != 1 and here:
        torch._foreach_mul_(here, 1 / scale)
    return torch.cat(all_losses), total, Words(word, seen)


def graphed_gradients(plan: Plan, params: tree.Tree) -> Callable[[Tensor, tree.Tree, Draws], tuple[Tensor, tree.Tree]]:
    """``part_gradients`` of these weights as one graph, for a step: hundreds of kernels are launched at once. Gradients
    are good until the next call."""
    place = ("gradients", *(p.data_ptr() for p in tree.leaves(params)))
    if place not in plan.graphs:
        for old in [key for key in plan.graphs if key[0] == "gradients"]:
            del plan.graphs[old]  # of a state that is gone: it holds the memory of a step
        there: list[bool] = []  # which leaves have a gradient
        held = plan.layout.hold(params)

        def run(x: Tensor, y: tree.Tree, t_B: Tensor, noise: Tensor, dropped_B: Tensor) -> list[Tensor]:
            draws = Draws(t_B, noise, dropped_B)
            loss_B, grads = part_gradients(plan, params, held, x, y, draws)
            there[:] = [g is not None for g in tree.leaves(grads)]
            return [loss_B, *(g for g in tree.leaves(grads) if g is not None)]

        plan.graphs[place] = graphs.captured(run, copies=False), there, held
    captured, there, held = plan.graphs[place]
    plan.layout.hold(params, into=held)  # a graph reads them where they were

    def call(x: Tensor, y: tree.Tree, draws: Draws) -> tuple[Tensor, tree.Tree]:
        loss_B, *found = captured(x, y, *draws)
        grads = iter(found)
        return loss_B.clone(), tree.unflatten(params, [next(grads) if some else None for some in there])

    return call


def part_gradients(
    plan: Plan,
    params: tree.Tree,
    held: zero.Held,
    x: Tensor,
    y: tree.Tree,
    draws: Draws,
    scale: float = 1.0,
    sink: zero.Sink | None = None,
) -> tuple[Tensor, tree.Tree]:
    """(loss a sample, gradients) of one micro-batch, by a forward and a backward pass."""

    def loss_sum(targets):
        loss_B = losses(plan, *plan.view(targets, held, sink), x, y, draws)
        # each of the sp ranks computes the same losses whole, and gradients are summed over all ranks
        return loss_B.sum() * (scale / plan.run.global_batch / plan.mesh.sp.size), loss_B.detach()

    return value_and_grad(loss_sum, plan.layout.targets(params, held), plan.trained)[1:]


def add(
    total: tree.Tree | None, grads: tree.Tree, params: tree.Tree, dtype: torch.dtype | None = None, own: bool = False
) -> tree.Tree:
    """Gradients so far and those of one more micro-batch; in ``dtype``, or in the masters'. With ``own`` the sum is
    memory of its own from the first one on."""
    if total is not None:
        return tree.map(lambda a, b: None if b is None else a.add_(b), total, grads)
    return tree.map(lambda g, p: None if g is None else g.to(dtype or p.dtype, copy=own), grads, params)


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Cuts a batch into parts of ``size`` samples."""
    starts = range(0, len(batch.ids_B), size)
    return [Batch(*tree.map(lambda field, i=i: field[i : i + size], list(batch))) for i in starts]


def next_scale(state: LossScale, finite: bool) -> LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018): halves after a non-finite step, doubles after 2,000 finite."""
    if not finite:
        return LossScale(max(1.0, state.scale / 2), 0)
    if state.streak + 1 < GROW_AFTER:
        return LossScale(state.scale, state.streak + 1)
    return LossScale(state.scale * 2, 0)
