"""What a rank holds after backward, byte by byte: the table of ZeRO (Rajbhandari et al. 2020, figure 1) with an EMA.

Bytes a parameter in bf16 with gradients summed in fp32: masters, both moments and EMA 4 each, a working weight 2, a
gradient g = 4. The formulas are exact leaf by leaf; a leaf that does not split is held as on one rank.
"""

import dataclasses
import functools
import gc
import itertools

import pytest
import torch

from odit import config, data, param, plan, random, train, tree
from odit.data import loader
from odit.models import dit
from odit.parallel import spec, zero

KEY = random.key(5)
DIGITS = config.presets()["digits"][1]
RUN = dataclasses.replace(
    DIGITS,
    global_batch=24,
    precision="bf16",
    evaluate=False,
    data=data.Config(source="synthetic", image_size=8, channels=3, num_classes=10, held_out=0.0),
)
MODELS = {
    # 2, 3 and 4 divide width, heads and ffn, and so they do the 12 values of three channels in patches of 2 x 2
    "all split": dit.Config(width=48, depth=2, heads=12, patch=2),
    # an ffn of 143, which none of them divides, and a width of 44, which 3 does not
    "some whole": dit.Config(width=44, depth=2, heads=11, patch=2, mlp_ratio=3.25),
}
G = 4  # bytes of a gradient: accumulated in the masters' dtype
ONCE = 2  # where there is nothing to accumulate and ranks sum once a step: as backward gave it


def bytes_a_parameter(stage, world, micro, inside_blocks, splits):
    """State, working weights that stand for the whole step, and gradients as backward leaves them.

    0: 16 + 2 + g; 1: 16 / N + 2 + g; 2: (16 + g) / N + 2; 3: (16 + g) / N, and 2 more outside the blocks, where weights
    are gathered once a step; g is 2 in stages 0 and 1 of one micro-batch. Stage 3 casts a block's weights from the
    masters when it gathers them: no bf16 shard of them is held, which the table's (18 + g) / N counts.
    """
    n = world if splits else 1
    state = 16 if stage == 0 else 16 / n
    working = 0 if stage == 3 and inside_blocks else 2
    gradient = G / n if stage > 1 else ONCE if micro == 1 else G
    return state, working, gradient


@pytest.fixture(scope="module")
def held(ranks):
    """What the ranks of a world hold, by (world, model, stage, micro-batches)."""

    def measure(world, model, stage, micro):
        size = RUN.global_batch // world // micro
        run = dataclasses.replace(RUN, micro_batch=size, model=MODELS[model], parallel=config.Parallel(zero=stage))
        return ranks.run(world, held_on, run)

    return functools.lru_cache(measure)


WORLDS = pytest.mark.parametrize("world", [2, 3, 4], scope="session")
CASES = pytest.mark.parametrize(
    "model, stage, micro",
    [*itertools.product(["all split"], range(4), (1, 2)), *itertools.product(["some whole"], range(4), (1,))],
)


@pytest.mark.every(5)
@WORLDS
@CASES
def test_held_bytes_equal_the_formulas(held, world, model, stage, micro):
    declared = dit.declare(MODELS[model], dit.Shape(3, 8, 10))
    specs = spec.specs(declared, world, split=True)
    assert ("some whole" == model) == any(s.dim is None for s in tree.leaves(specs))
    for leaves, storages, _ in held(world, model, stage, micro):
        totals = [0, 0, 0]
        for (path, p), s in zip(tree.items(declared), tree.leaves(specs)):
            expected = bytes_a_parameter(stage, world, micro, path.startswith("blocks."), s.dim is not None)
            for kind, size in enumerate(expected):
                assert leaves[kind].get(path, 0) == size * p.size, (("state", "working", "gradient")[kind], path)
                totals[kind] += size * p.size
        assert storages == totals, "a storage is larger than the leaves in it"


@WORLDS
@CASES
@pytest.mark.every(5)
def test_nothing_else_of_the_size_of_the_weights_stands(held, world, model, stage, micro):
    """All tensors that the step made and that are still there: samples and losses, less than 1/4 byte a parameter."""
    num = param.count(dit.declare(MODELS[model], dit.Shape(3, 8, 10)))
    for _, _, others in held(world, model, stage, micro):
        assert others <= num / 4


def held_on(mesh, run):
    """Bytes of state, working weights and gradients by leaf, those of their storages, and those of all else."""
    dataset = data.open_dataset(run.data)
    composed = plan.make(run, dataset, mesh)
    share = (mesh.dp.rank, mesh.dp.size)
    (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1, part=share)
    state = train.init_state(composed, KEY)
    train.gradients(composed, state.params, batch, KEY)  # fills the caches of constants
    gc.collect()
    before, seen = alive(), {}
    hold, reduce = zero.Layout.hold, zero.Layout.reduce

    def noting_hold(layout, shards):
        seen["held"] = hold(layout, shards)
        return seen["held"]

    def noting_reduce(layout, grads):
        seen["grads"], seen["alive"] = grads, alive()
        return reduce(layout, grads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero.Layout, "hold", noting_hold)
        patch.setattr(zero.Layout, "reduce", noting_reduce)
        train.gradients(composed, state.params, batch, KEY)
    kinds = [(state.params, state.opt.m, state.opt.v, state.ema), (working(composed, seen["held"]),), (seen["grads"],)]
    leaves = [by_leaf(trees) for trees in kinds]
    storages = [storages_of(leaf for t in trees for leaf in tree.leaves(t)) for trees in kinds]
    known = before | storages[0] | storages[1] | storages[2]
    others = sum(size for place, size in seen["alive"].items() if place not in known)
    return leaves, [sum(s.values()) for s in storages], others


def working(composed, held):
    """The working weights that stand, as a tree; ``held`` has them as trees, storages or both."""
    if held.whole is not None:
        return held.whole
    outside = {name: t for name, t in composed.declared.items() if name != zero.BLOCKS}
    return tree.unflatten(outside, held.outer.leaves)


def by_leaf(trees):
    """Bytes by path, summed over trees."""
    sizes = {}
    for t in trees:
        for path, leaf in tree.items(t):
            sizes[path] = sizes.get(path, 0) + leaf.numel() * leaf.element_size()
    return sizes


def storages_of(tensors):
    """Bytes by address of the distinct storages."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def alive():
    """Storages of all tensors that Python can reach."""
    return storages_of(t for t in gc.get_objects() if type(t) is torch.Tensor)
