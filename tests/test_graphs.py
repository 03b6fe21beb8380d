"""Model calls as graphs: a stand-in that runs again what it recorded, from the memory it was recorded with; CUDA's own
on a GPU."""

import dataclasses

import pytest
import torch
from conftest import redraw

from odit import checks, data, diffusion, footprint, graphs, plan, random, sample, train, tree
from odit.config import Guidance, Parallel, Sampling
from odit.data import loader
from odit.models import dit

KEY = random.key(2)


class Recorder:
    """Stands for CUDA's graphs: a replay sees the recorded call's own inputs alone, and writes where it wrote."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        result = run()

        def replay():
            for there, new in zip(tree.leaves([result]), tree.leaves([run()]), strict=True):
                there.copy_(new)

        return replay, result


def model(x, t_B, y):
    return x * t_B[:, None] + y["a"] - y["b"]


def draw(seed, num=3):
    x, a, b = (random.normal(random.fold_in(KEY, seed, part), (num, 4)) for part in range(3))
    return x, torch.arange(num) * 0.1 + seed, {"a": a, "b": b}


def test_every_call_is_of_its_own_arguments_and_results_are_kept():
    recorder = Recorder()
    call = graphs.captured(model, recorder)
    found = [call(*draw(seed)) for seed in range(4)]
    for seed, result in enumerate(found):
        assert torch.equal(result, model(*draw(seed)))
    assert recorder.recorded == 1


def test_shapes_have_graphs_of_their_own_up_to_a_number():
    recorder = Recorder()
    call = graphs.captured(model, recorder)
    for seed, num in enumerate([3, 5, 3, 1, 2, 7, 9, 7, 3]):
        assert torch.equal(call(*draw(seed, num)), model(*draw(seed, num)))
    assert recorder.recorded == graphs.MOST


def test_arguments_are_not_written_to():
    call = graphs.captured(model, Recorder())
    args = draw(0)
    call(*args)
    call(*draw(1))
    assert torch.equal(args[0], draw(0)[0]) and torch.equal(args[2]["a"], draw(0)[2]["a"])


LAYOUTS = {
    "zero 0": Parallel(),
    "zero 1": Parallel(zero=1),
    "zero 2": Parallel(zero=2),
    "zero 3": Parallel(zero=3),
    "zero 3, block": Parallel(zero=3, remat="block"),
    "zero 1, ulysses": Parallel(zero=1, sp=2, sequence="ulysses"),
    "zero 2, megatron": Parallel(zero=2, sp=2, sequence="megatron"),
    "zero 3, ring": Parallel(zero=3, sp=2, sequence="ring"),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_of_ranks_are_those_without_graphs(ranks, tiny, layout, precision):
    """Weights move between replays: what a graph reads of them is filled again where it was."""
    run = dataclasses.replace(tiny, precision=precision, parallel=LAYOUTS[layout], global_batch=8, micro_batch=2)
    sp = run.parallel.sp or 1
    for plainly, graphed, recorded in ranks.run(2, both_ways, run, dp=2 // sp, sp=sp):
        assert plainly == graphed and recorded == 1


def both_ways(mesh, run):
    """Three steps without graphs and with the stand-in: their metrics and the last weights' sums."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_recorder", lambda: recorder)
        plainly = steps_of(mesh, run)
        patch.setattr(plan.Plan, "graph_obstacle", None)
        return plainly, steps_of(mesh, run), recorder.recorded


# (ranks, settings, what stands in the way)
OBSTACLES = [
    (1, {}, None),
    (2, {}, None),
    (1, dict(graphs=False), "--no-graphs"),
    (2, dict(parallel=Parallel(sp=2, sequence="ulysses")), None),
    (2, dict(parallel=Parallel(zero=1)), None),
    (2, dict(parallel=Parallel(zero=3)), None),
    (1, dict(parallel=Parallel(zero=3)), None),
    (1, dict(parallel=Parallel(zero=2, offload="optimizer")), "host memory"),
    (2, dict(precision="fp16"), "loss scale"),
]


@pytest.mark.parametrize("world, settings, why", OBSTACLES)
def test_what_cannot_be_a_graph(tiny, world, settings, why):
    """And a forecast, whose GPU is not there, decides alike."""
    run = dataclasses.replace(tiny, global_batch=8, **settings)
    told = footprint.pretend(run, checks.expected_shape(run), world, (9, 0))
    assert footprint.graphed(told) == (why is None)
    found = dataclasses.replace(told, device=torch.device("cuda")).graph_obstacle
    assert found is None if why is None else why in found
    assert told.graph_obstacle == "--no-graphs" if "graphs" in settings else "the device is cpu" == told.graph_obstacle


@pytest.mark.parametrize(
    "num, told", [(4, "micro-batch are one"), (5, "are one, for the first 4 of 5 sizes that come")]
)
def test_sizes_beyond_the_graphs_that_are_kept_are_told(make_plan, tiny, num, told):
    composed = dataclasses.replace(make_plan(tiny), device=torch.device("cuda"), sizes=((8, 8),) * num)
    (line,) = [line for line in plan.describe(composed).splitlines() if line.startswith("graphs")]
    assert line.endswith(told)


@pytest.mark.every(3)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_weights_are_filled_again_where_they_were(ranks, tiny, world, stage, precision):
    run = dataclasses.replace(tiny, precision=precision, parallel=Parallel(zero=stage), global_batch=2)
    for before, after, right in ranks.run(world, held_again, run, dp=world, sp=1):
        assert before == after and right


def held_again(mesh, run):
    """Where the weights of two steps lie, and whether the second ones are right."""
    composed = plan.make(dataclasses.replace(run, device="cpu"), data.open_dataset(run.data), mesh)
    layout, params = composed.layout, train.init_state(composed, KEY).params
    held = layout.hold(params)
    before = [leaf.data_ptr() for leaf in leaves_of(held)]
    with torch.no_grad():
        torch._foreach_add_(tree.leaves(params), 1.0)
    again = leaves_of(layout.hold(params, held))
    right = all(map(torch.equal, again, leaves_of(layout.hold(params))))
    return before, [leaf.data_ptr() for leaf in again], right


def leaves_of(held):
    return tree.leaves(held.whole) if held.whole is not None else held.outer.leaves


def steps_of(mesh, run):
    dataset = data.open_dataset(run.data)
    composed = plan.make(dataclasses.replace(run, device="cpu"), dataset, mesh)
    share = (mesh.dp.rank, mesh.dp.size)
    batches = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=3, part=share)
    state, step, told = train.init_state(composed, KEY), train.make_step(composed), []
    for batch in batches:
        state, metrics = step(state, batch, KEY)
        told.append(metrics)
    return told, [leaf.double().sum().item() for leaf in tree.leaves(state.params)]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("solver, steps", [("heun", 4), ("euler", 6)])
def test_pictures_are_those_without_graphs(make_plan, tiny, precision, solver, steps, monkeypatch):
    run = make_plan(tiny, device="cuda", precision=precision)
    params = tree.map(lambda x: x.cuda(), redraw(run.declared, dtype=torch.float32))
    few = Sampling(solver, steps, Guidance(2.0, interval=(0.2, 0.9)))
    assert sample.graph_obstacle(run, few) is None
    labels = torch.arange(7) % 10
    found = sample.sample(run, params, labels, KEY, sampling=few, batch=4)
    monkeypatch.setattr(graphs, "captured", lambda fn: fn)
    assert torch.equal(found, sample.sample(run, params, labels, KEY, sampling=few, batch=4))


@pytest.mark.gpu
@pytest.mark.parametrize("by_graphs", [False, True])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_waits_for_the_gpu(make_plan, tiny, solver, by_graphs):
    few = Sampling(solver, 4, Guidance(2.0), graphs=by_graphs)
    run = make_plan(tiny, device="cuda", precision="bf16", diffusion=diffusion.Config("eps"), sampling=few)
    params = tree.map(lambda x: x.cuda(), redraw(run.declared, dtype=torch.float32))
    pictures = sample.drawer(run, params)(torch.arange(4), KEY, progress=unwaited)
    assert pictures(torch.arange(4)).isfinite().all()


def unwaited(steps):
    """Solver steps, after the first of which (where kernels are compiled and graphs captured) waiting is an error."""
    for i in steps:
        torch.cuda.set_sync_debug_mode("error" if i else "default")
        try:
            yield i
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "device, settings, one",
    [
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("cuda", dict(precision="fp32"), False),
        ("cuda", dict(parallel=Parallel(zero=1)), False),
        ("cuda", dict(parallel=Parallel(zero=3)), False),
    ],
)
def test_where_modulations_come_from_one_product(make_plan, tiny, device, settings, one):
    made = make_plan(tiny, **dict(precision="bf16") | settings)
    made = dataclasses.replace(made, device=torch.device(device))
    assert sample.joins(made) is one and not sample.joins(dataclasses.replace(made, compiled=True))


@pytest.mark.gpu
def test_pictures_of_modulations_by_one_product(make_plan, tiny, monkeypatch):
    """Sums of as many values in half precision's products: the same bits but for a product that is cut another way."""
    run = make_plan(tiny, device="cuda", precision="bf16")
    params = tree.map(lambda x: x.cuda(), redraw(run.declared, dtype=torch.float32))
    found = [sample.sample(run, params, torch.arange(7) % 10, KEY)]
    monkeypatch.setattr(dit, "joined", lambda params: params)
    found.append(sample.sample(run, params, torch.arange(7) % 10, KEY))
    torch.testing.assert_close(*found, rtol=2**-7, atol=2**-7)
