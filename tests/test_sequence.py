"""Every sequence strategy on every mesh and stage against one rank, in fp64: loss and every gradient."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import own_model
import pytest
import torch
from conftest import redraw

from odit import nn, random, tree
from odit.models import dit, latte
from odit.ops import Ops, linear
from odit.parallel import collectives, sequence, zero
from odit.parallel.mesh import Axis, single
from odit.parallel.place import Place

KEY = random.key(21)
BATCH = 4


@dataclass(frozen=True)
class Case:
    """A model with its tokens, and ``run(params, ids_B, ops) -> loss a sample``."""

    declared: Any
    run: Callable
    length: int
    heads: int
    frames: int = 1


def image_dit(length, heads):
    """A DiT with sine-cosine positions on pictures of 2 x 2L values."""
    cfg = dit.Config(width=24, depth=2, heads=heads, patch=2, mlp_ratio=3.5, label_dropout=0.1)
    declared = dit.declare(cfg, dit.Shape(1, 2, 5, outputs=2))

    def run(params, ids_B, ops):
        x = drawn("x", (1, 2, 2 * length), ids_B)
        out = dit.forward(params, x, drawn("t", (), ids_B) * 100, ids_B % 6, cfg, ops)
        return (out - drawn("target", tuple(out.shape[1:]), ids_B)).square().flatten(1).mean(1)

    return Case(declared, run, length, heads)


def video_dit(length, heads):
    """DiT's blocks on clips, with 3-D rotary positions, QK-norm and SwiGLU; frames of one row of patches."""
    cfg = dit.Config(width=12 * heads, depth=2, heads=heads, qk_norm=True, mlp="swiglu")
    frames = 4 if length % 4 == 0 else 1
    declared = dit.declare(cfg, dit.Shape(2, 2, 0, 1))

    def run(params, ids_B, ops):
        clips = drawn("clip", (frames, 2, 2, 2 * length // frames), ids_B)
        tokens = nn.patchify(clips.flatten(0, 1), 2).unflatten(0, (len(ids_B), frames)).flatten(1, 2)
        x, tables = ops.enter(linear(tokens, params["patch"]), *rotary_3d(frames, length // frames))
        c_BD = nn.embed_timestep(drawn("t", (), ids_B), params["time"])
        x = ops.layers(dit.make_block(cfg, ops), params["blocks"], x, c_BD, tables)
        h = ops.modulate(x, *nn.adaln(c_BD, params["final"]["adaln"], 2))
        out = ops.leave(linear(h, params["final"]["out"]))
        return (out - drawn("target", (length, 8), ids_B)).square().flatten(1).mean(1)

    return Case(declared, run, length, heads)


def rotary_3d(frames, columns):
    """Two of a head's six pairs turn with the frame, four with the column."""
    grid = torch.meshgrid(torch.arange(frames), torch.arange(columns), indexing="ij")
    t, x = (p.flatten().double()[:, None] for p in grid)
    angle = torch.cat([t * torch.tensor([1.0, 0.3]).double(), x * torch.tensor([1.0, 0.5, 0.2, 0.1]).double()], -1)
    return angle.cos(), angle.sin()


def own(length, heads):
    """The 40 lines of own_model.py."""
    cfg = own_model.Config(length=length - 4, heads=heads)

    def run(params, ids_B, ops):
        out = own_model.forward(params, drawn("x", (length - 4,), ids_B), drawn("t", (), ids_B), cfg, ops)
        return (out - drawn("target", (length - 4,), ids_B)).square().mean(1)

    return Case(own_model.declare(cfg), run, length, heads)


def time_space(length, heads):
    """Latte on clips of 4 or, where 4 does not divide, 7 frames."""
    frames = 4 if length % 4 == 0 else 7
    positions = -(-length // frames)
    cfg = dit.Config(width=24, depth=4, heads=heads, patch=2)
    declared = latte.declare(cfg, dit.Shape(1, 2, 5))

    def run(params, ids_B, ops):
        clips = drawn("clip", (1, frames, 2, 2 * positions), ids_B)
        out = latte.forward(params, clips, drawn("t", (), ids_B) * 100, ids_B % 6, cfg, ops)
        return (out - drawn("target", tuple(out.shape[1:]), ids_B)).square().flatten(1).mean(1)

    return Case(declared, run, frames * positions, heads, frames)


def drawn(name, shape, ids_B):
    return random.normal(random.fold_in(KEY, name), shape, ids_B).double()


MODELS = {"image": image_dit, "video": video_dit, "own": own, "time x space": time_space}
SHAPES = {"64 tokens": (64, 4), "61 tokens": (61, 4), "6 heads": (64, 6)}


@functools.cache
def case_of(model, shape):
    return MODELS[model](*SHAPES[shape])


MESHES = {"1x2": (1, 2), "1x3": (1, 3), "1x4": (1, 4), "2x2": (2, 2), "2x3": (2, 3)}


def record_on(mesh, case, name, **options):
    """The record of a strategy of the table, or of this module's ``WRONG``."""
    build = WRONG.get(name) or (sequence.STRATEGIES[name].build if name != "none" else None)
    return Ops() if build is None else build(Ops(), Place(mesh, case.length, case.heads, case.frames, **options))


def loss_and_gradients(mesh, model, shape, name, stage, remat=False):
    """The loss, and this rank's parts of every gradient, of a batch that dp shares and whose tokens sp shares."""
    case = case_of(model, shape)
    layout = layout_on(mesh, case, name, stage, remat)
    params = tree.map(lambda w, s: s.take(w, layout.axis.rank).clone(), redraw(case.declared), layout.specs)
    held = layout.hold(params)
    targets = tree.map(lambda p: p.detach().requires_grad_(), layout.targets(params, held))
    working, ops = layout.view(targets, held, record_on(mesh, case, name))
    each = BATCH // mesh.dp.size
    ids_B = torch.arange(mesh.dp.rank * each, (mesh.dp.rank + 1) * each)
    loss = case.run(working, ids_B, ops).sum() / BATCH / mesh.sp.size
    found = torch.autograd.grad(loss, tree.leaves(targets))
    grads = layout.reduce(tree.unflatten(targets, list(found)))
    return float(collectives.all_reduce_(loss.detach().clone(), mesh.all)), grads


def layout_on(mesh, case, name, stage, remat=False):
    f64 = torch.float64
    return zero.layout(case.declared, stage, mesh.all, f64, f64, torch.device("cpu"), remat)


@functools.cache
def one_rank(model, shape):
    return loss_and_gradients(single(), model, shape, "none", 0)


def assert_equals_one_rank(found, model, shape, specs):
    """Loss and every gradient within 1e-12 of one rank's."""
    loss, whole = one_rank(model, shape)
    for rank_loss, _ in found:
        assert abs(rank_loss - loss) <= 1e-12 * abs(loss)
    joined = joined_by(specs, [grads for _, grads in found])
    for (path, a), b in zip(tree.items(joined), tree.leaves(whole)):
        assert (a - b).norm() <= 1e-12 * b.norm(), path


def joined_by(specs, parts):
    """Whole leaves from the ranks' parts, each laid where its spec says."""

    def join(p, s, *leaves):
        whole = torch.full(p.shape, float("nan"), dtype=torch.float64)
        for rank, leaf in enumerate(leaves):
            s.take(whole, rank).copy_(leaf)
        return whole

    return tree.map(join, specs.declared, specs.specs, *parts)


STRATEGIES = [name for name, s in sequence.STRATEGIES.items() if not s.time_space]
CASES = [
    (model, shape, mesh, name, stage)
    for model, shape, mesh in itertools.product(("image", "video", "own"), SHAPES, MESHES)
    for name in STRATEGIES
    for stage in ((0, 1, 2, 3) if mesh == "2x2" else (0, 2, 3))
]
TIME_SPACE = [
    (mesh, shape, stage)
    for mesh, shape in itertools.product(MESHES, SHAPES)
    for stage in ((0, 1, 2, 3) if mesh == "2x2" else (0, 2, 3))
]


def on_mesh(ranks, mesh, name, heads, fn, *args):
    dp, sp = MESHES[mesh]
    ulysses = sequence.inner_degree(sp, heads) if name == "usp" else 1
    if name == "usp" and ulysses == sp and sp == 4:
        ulysses = 2
    return ranks.run(dp * sp, fn, *args, sp=sp, ulysses=ulysses)


@pytest.mark.parametrize("model, shape, mesh, name, stage", CASES)
def test_equals_one_rank(ranks, model, shape, mesh, name, stage):
    found = on_mesh(ranks, mesh, name, SHAPES[shape][1], loss_and_gradients, model, shape, name, stage)
    assert_equals_one_rank(found, model, shape, described(mesh, model, shape, name, stage))


@pytest.mark.parametrize("mesh, shape, stage", TIME_SPACE)
def test_dsp_equals_one_rank(ranks, mesh, shape, stage):
    found = on_mesh(ranks, mesh, "dsp", 1, loss_and_gradients, "time x space", shape, "dsp", stage)
    assert_equals_one_rank(found, "time x space", shape, described(mesh, "time x space", shape, "dsp", stage))


def described(mesh, model, shape, name, stage):
    """The layout that the ranks have, for its specs."""
    dp, sp = MESHES[mesh]
    many = dataclasses.replace(
        single(),
        world=dp * sp,
        **{n: Axis(n, size, 0, None, tuple(range(size))) for n, size in (("dp", dp), ("sp", sp), ("all", dp * sp))},
    )
    return layout_on(many, case_of(model, shape), name, stage)


WRONG: dict = {}
