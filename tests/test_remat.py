"""Selective recomputing: the same numbers, a fraction of the memory, attention never twice."""

import collections
import dataclasses
import functools
import weakref

import pytest
import test_latte
import torch
from test_compile import SECONDS, compiled_steps, compiling_by
from test_zero import KEY, assert_equals_one_rank, fp64_plan, fp64_state, three_steps, with_
from torch.utils._python_dispatch import TorchDispatchMode

from odit import config, crash, memory, ops, remat, train, tree
from odit.data import loader
from odit.models import dit
from odit.parallel.mesh import single

WORLDS = pytest.mark.parametrize("world", [1, 2], scope="session")


@pytest.fixture(scope="module")
def one_rank():
    return three_steps(single(), with_())


@WORLDS
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_steps_equal_those_that_keep_all(ranks, one_rank, world, stage):
    found = ranks.run(world, three_steps, with_(stage, 2, "selective", world=world))
    assert_equals_one_rank(found, one_rank, world, stage, 1e-12)


@WORLDS
def test_compiled_steps_equal_those_that_keep_all(ranks, one_rank, world):
    found = ranks.run(world, compiled_steps, with_(3, 2, "selective", world=world), timeout_s=SECONDS)
    assert_equals_one_rank([steps for steps, _, _ in found], one_rank, world, 3, 1e-11)


class Counts(TorchDispatchMode):
    """Calls of each operator, by its bare name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().split("::")[-1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def block_on_meta():
    """A block of DiT-XL with flash attention over 4 x 256 tokens, its input and its weights, without data."""
    cfg = config.presets()["dit-xl-2"][1].model
    make = lambda shape: torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)  # noqa: E731
    params = tree.map(lambda p: make(p.shape), dit.declare_block(cfg))
    block = dit.make_block(cfg, ops.flash())
    return block, params, make((4, 256, cfg.width)), make((4, cfg.width))


def kept_values(wrap) -> tuple[float, collections.Counter]:
    """What a block keeps for backward beside its input, in values a token and channel, and backward's operators."""
    block, params, x, c = block_on_meta()
    with memory.Weigh([x, c, *tree.leaves(params)]) as weigh:
        y = wrap(block)(params, x, c, ())
        kept = weigh.now()
    with Counts() as counts:
        torch.autograd.grad(y.sum(), [x, c, *tree.leaves(params)])
    return kept / (2 * x.numel()), counts.calls


def test_a_block_keeps_what_attention_gives_and_products():
    everything, backward = kept_values(lambda block: block)
    few, again = kept_values(remat.selective)
    assert everything > 16
    # q, k, v, o, two branches, the mlp's 4 and y, the next block's input; log-sum-exp and modulations: under 0.3
    assert 11 <= few < 11.3
    name = "_scaled_dot_product_flash_attention"
    assert again[name] == backward[name] == 0 and again[f"{name}_backward"] == 1
    assert again["mm"] + again["addmm"] == backward["mm"] + backward["addmm"]


def test_blocks_that_leave_their_sums_keep_no_more():
    """A block hands on what it would sum: its branch is kept already, x stands for the sum. All gradients as ever."""
    _, params, x, c = block_on_meta()
    cfg = config.presets()["dit-xl-2"][1].model
    plain = ops.flash()

    def kept(record, blocks):
        with memory.Weigh([x, c, *tree.leaves(params)]) as weigh:
            y = record.layers(dit.make_block(cfg, record, record.sums), [params] * blocks, x, c, ())
            found = weigh.now()
        with Counts() as counts:
            torch.autograd.grad((y.branch if isinstance(y, tuple) else y).sum(), [x, *tree.leaves(params)])
        return found / (2 * x.numel()), counts.calls

    def a_block(record):
        return kept(record, 4)[0] - kept(record, 3)[0]

    few, summing = remat.recomputing(plain), remat.recomputing(plain, keeps_branches=False)
    assert not few.sums and summing.sums and a_block(few) == a_block(summing) < 11.3
    again, backward = (kept(record, 3)[1] for record in (few, plain))
    assert again["mm"] + again["addmm"] == backward["mm"] + backward["addmm"]


@pytest.mark.parametrize("arch", ["dit", "latte"])
def test_gradients_of_blocks_that_leave_their_sums(arch):
    cfg, shape = test_latte.made(arch, "zero", "labels")
    params, given = test_latte.drawn(cfg, shape), test_latte.batch(shape)

    def run(record):
        leaves = [p.requires_grad_() for p in tree.leaves(params)]
        out = test_latte.forward(tree.unflatten(params, leaves), *given, cfg, record)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    assert not remat.recomputing(ops.Ops()).sums
    assert all(map(torch.equal, run(remat.recomputing(ops.Ops())), run(ops.Ops())))


@pytest.mark.parametrize("stage, how, changes, sums", [
    (0, "none", {}, False), (0, "selective", {}, False), (0, "none", {"lora": 2}, False),
    (0, "block", {}, True), (2, "none", {}, True), (3, "selective", {}, True), (2, "none", {"lora": 2}, True),
    (0, "selective", {"compiled": True}, True),
    (0, "none", {"sequence": "megatron"}, False), (0, "selective", {"sequence": "megatron"}, True),
])  # fmt: skip
def test_which_blocks_sum(stage, how, changes, sums):
    """Those whose layers or switch hand on one tensor, and those that would keep more otherwise."""
    composed, _ = fp64_plan(with_(stage, 1, how))
    changes = dict(changes)
    lora = dataclasses.replace(composed.run.finetune, lora_rank=changes.pop("lora", 0))
    plan = dataclasses.replace(composed, run=dataclasses.replace(composed.run, finetune=lora), **changes)
    record = plan.inference(fp64_state(composed).params)[1]
    assert record.sums is sums
    assert dataclasses.replace(plan.record((4, 4)), layers=record.layers).sums is sums  # of another bucket


def test_sites_that_are_not_marked_get_sums():
    """dsp's switch, a replay's layers, and a stranger's that wraps ours."""
    copied = functools.wraps(ops.layers)(lambda *args: ops.layers(*args))
    records = (ops.Ops(layers=copied), ops.Ops(switch=lambda x, to: x), crash.watch(ops.Ops(), crash.Seen()))
    assert [record.sums for record in (*records, ops.Ops())] == [True, True, True, False]
    left = weakref.ref(remat.recomputing(ops.Ops()).layers)
    assert left() is None  # a mark that held its function would keep a step's records until the collector runs


@pytest.mark.parametrize("stage, how", [(2, "none"), (3, "none"), (0, "block")])
def test_layers_of_a_strategy_are_refused_where_they_would_not_run(stage, how):
    composed, _ = fp64_plan(with_(stage, 1, how))
    own = dataclasses.replace(composed.kernels, layers=lambda *args: ops.layers(*args))
    plan = dataclasses.replace(composed, kernels=own)
    with pytest.raises(ValueError, match=r"layers of its own.* --parallel.zero 0 or 1 and --parallel.remat none"):
        plan.inference(fp64_state(composed).params)


def test_nothing_is_kept_where_nothing_is_differentiated():
    block, params, x, c = block_on_meta()
    with torch.no_grad(), memory.Weigh([x, c, *tree.leaves(params)]) as weigh:
        y = remat.selective(block)(params, x, c, ())
        assert weigh.now() == 2 * y.numel()


def test_the_plan_of_memory_sees_it():
    """The kept part of a plan's peak shrinks as a block's does."""

    def peak(how):
        composed, _ = fp64_plan(with_(0, 1, how))
        return memory.predict(composed).peak

    assert peak("block") < peak("selective") < peak("none")


def test_a_compiled_block_recomputes_inside_its_graph():
    """Under torch.compile the partitioner follows the same rule, as gradients in fp64 show, in one graph."""
    with compiling_by("aot_eager"):
        run = dataclasses.replace(with_(0, 1, "selective"), compile=True)
        composed, dataset = fp64_plan(run)
        (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1)
        found = train.gradients(composed, fp64_state(composed).params, batch, KEY)[1]
        eager, _ = fp64_plan(with_(0, 1, "none"))
        expected = train.gradients(eager, fp64_state(eager).params, batch, KEY)[1]
        for a, b in zip(tree.leaves(found), tree.leaves(expected)):
            assert (a - b).norm() <= 1e-11 * b.norm()
