"""Compiled blocks against eager ones in fp64, and how often they are compiled; "aot_eager" stands for inductor."""

import contextlib
import dataclasses
import itertools
import warnings
from concurrent import futures

import pytest
import torch
from test_ranks_inference import composed_on
from test_zero import KEY, RUN, assert_equals_one_rank, fp64_plan, fp64_state, three_steps, with_
from torch._dynamo.backends.debugging import aot_eager

from odit import compiling, memory, plan, random, sample, train, validate
from odit.config import Guidance, Sampling
from odit.data import loader
from odit.data.dataset import READ_KEY
from odit.models import dit
from odit.parallel.mesh import single

WORLDS = pytest.mark.parametrize("world", [2, 1], scope="session")  # 2 first: both ranks load the compiler at once
GRAPHS = []  # what this process has compiled
CALLS = []  # and each call of it
SECONDS = 120.0  # of a case: the first one in a process loads the compiler


def counted(graph, inputs):
    made = aot_eager(graph, inputs)
    GRAPHS.append(graph)

    def call(*args):
        CALLS.append(1)
        return made(*args)

    return call


@contextlib.contextmanager
def compiling_by(backend, fresh=True):
    """Compiles by ``backend``, starting with nothing compiled where ``fresh``."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # the tracer looks at .grad of what is no leaf, and hides the warning by other means than a filter
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        patch.setattr(compiling, "BACKEND", backend)
        compiling.obstacle(torch.device("cpu"), backend)
        if fresh:
            torch._dynamo.reset()
        GRAPHS.clear()
        CALLS.clear()
        yield


@pytest.fixture
def by_aot():
    with compiling_by(counted):
        yield


def compiled_steps(mesh, run):
    """``three_steps`` of test_zero, and how many graphs were compiled and run."""
    with compiling_by(counted, fresh=False):  # cases share what they can, for the sake of time
        return three_steps(mesh, dataclasses.replace(run, compile=True)), len(GRAPHS), len(CALLS)


@pytest.fixture(scope="module")
def one_rank():
    return three_steps(single(), with_())


@WORLDS
@pytest.mark.parametrize("stage, remat", list(itertools.product((0, 1, 2, 3), ("none", "block"))))
def test_compiled_steps_equal_eager_ones(ranks, one_rank, world, stage, remat):
    """Under stage 3 the weights that a graph has saved are freed and filled again between forward and backward."""
    found = ranks.run(world, compiled_steps, with_(stage, 2, remat, world=world), timeout_s=SECONDS)
    micro_batches, blocks = 8, 3  # gradients of one step, then three steps
    for _, graphs, calls in found:
        assert graphs <= 2 and calls == micro_batches * blocks * (2 if remat == "block" else 1)
    assert_equals_one_rank([steps for steps, _, _ in found], one_rank, world, stage, 1e-11)


def whole_lives(mesh, lives):
    """Runs of (stage, remat) one after the other: graphs after each one's steps, validation, and pictures in batches of
    several sizes."""
    with compiling_by(counted):
        return [graphs for stage, remat in lives for graphs in whole_life(mesh, stage, remat)]


def whole_life(mesh, stage, remat):
    run = dataclasses.replace(
        with_(stage, 2, remat, world=mesh.world),
        compile=True,
        model=dit.Config(width=8, depth=2, heads=2, patch=2),
        validation_draws=1,
        sampling=Sampling("heun", 3, Guidance(2.0, interval=(0.3, 0.8))),
    )
    composed, dataset = fp64_plan(run, mesh)
    state, step = fp64_state(composed), train.make_step(composed)
    part = (mesh.dp.rank, mesh.dp.size)
    for batch in loader.batches(dataset, KEY, global_batch=run.global_batch, stop=run.steps, part=part):
        state, _ = step(state, batch, KEY)
    yield len(GRAPHS)
    dataset.held_out_ids = dataset.held_out_ids[:28]
    validate.validate(composed, state.ema, AsFp64(dataset))
    yield len(GRAPHS)
    for num, batch in ((9, 5), (14, 7), (6, 6)):
        sample.sample(composed, state.ema, torch.arange(num) % 10, KEY, batch=batch)
    yield len(GRAPHS)


class AsFp64:
    """A data set read in fp64."""

    def __init__(self, dataset):
        self.held_out_ids, self.shape, self._read = dataset.held_out_ids, dataset.shape, dataset.read

    def read(self, ids, key=READ_KEY):
        x, y = self._read(ids)
        return x.double(), y


@WORLDS
def test_a_run_compiles_its_blocks_twice(ranks, world):
    """Once with gradients and once without, whatever the number of steps, micro-batches and pictures; a second run in
    the same process, of another stage, nothing more."""
    lives = [(0, "none"), (3, "block")] if world == 1 else [(3, "block"), (0, "none")]
    first = [1, 2, 2] if world == 1 else [2, 2, 2]  # recomputing runs blocks without gradients in training too
    for graphs in ranks.run(world, whole_lives, lives, timeout_s=SECONDS):
        assert graphs == [*first, 2, 2, 2]


def test_each_bucket_is_compiled_however_many_there_are(by_aot):
    """With gradients in another thread, as where a GPU's backward pass runs blocks again."""
    block = compiling.compiled_block(lambda p, x, c: x * p["w"] + c[:, None], counted)
    p, lengths = {"w": torch.randn(8, requires_grad=True)}, range(4, 14)
    with futures.ThreadPoolExecutor(1) as other:
        for length in lengths:
            x, c = torch.randn(3, length, 8), torch.randn(3, 8)
            with torch.no_grad():
                found = block(p, x, c)
            assert torch.equal(found, other.submit(block, p, x, c).result())
    assert len(GRAPHS) == 2 * len(lengths) and len(CALLS) == len(GRAPHS)


def test_more_blocks_are_compiled_no_more_often(by_aot):
    for depth in (1, 6):
        torch._dynamo.reset()
        GRAPHS.clear()
        run = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, depth=depth), compile=True)
        composed, dataset = fp64_plan(run)
        (batch,) = loader.batches(dataset, KEY, global_batch=24, stop=1)
        train.gradients(composed, fp64_state(composed).params, batch, KEY)
        assert len(GRAPHS) == 1


def test_one_sample_is_a_shape_of_its_own(by_aot):
    composed, _ = fp64_plan(dataclasses.replace(RUN, compile=True))
    params = fp64_state(composed).params
    for num, graphs in ((4, 1), (1, 2), (3, 2), (1, 2)):
        found = sample.sample(composed, params, torch.arange(num), KEY, sampling=Sampling("euler", 1, Guidance(1.0)))
        assert len(found) == num and len(GRAPHS) == graphs


def pictures(mesh, stage, compiled):
    with compiling_by(counted):
        composed, params, _ = composed_on(mesh, stage, compile=compiled)
        assert composed.compiled == compiled
        return sample.sample(composed, params, torch.arange(11) % 10, random.key(3), batch=4), len(GRAPHS)


@WORLDS
@pytest.mark.parametrize("stage", [0, 3])
def test_pictures_equal_eager_ones(ranks, world, stage):
    eager, none = pictures(single(), 0, False)
    assert none == 0
    for found, graphs in ranks.run(world, pictures, stage, True, timeout_s=SECONDS):
        assert (found - eager).norm() <= 1e-11 * eager.norm() and graphs == 1


def test_gradient_norms_a_sample_and_the_plan_of_memory_stay_eager(by_aot, make_plan, tiny, digits):
    eager, compiled = (make_plan(tiny, grad_norms=True, compile=on) for on in (False, True))
    params = train.init_state(eager, KEY).params
    assert validate.validate(eager, params, digits) == validate.validate(compiled, params, digits)
    assert memory.predict(eager) == memory.predict(compiled)
    assert not GRAPHS


# ------------------------------------------------------------------------------------------------------------- start-up


def test_a_compiler_that_is_not_there_is_told_of(monkeypatch, make_plan, tiny):
    def missing(graph, inputs):
        raise RuntimeError("no C++ compiler found\nand more about it")

    monkeypatch.setattr(compiling, "BACKEND", missing)
    torch._dynamo.reset()
    composed = make_plan(tiny, compile=True)
    assert not composed.compiled
    assert [n for n in composed.notes if n.startswith("compile: none (") and "no C++ compiler found" in n]


def test_the_choice_is_told(monkeypatch, make_plan, tiny):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    assert "compile: blocks, by aot_eager" in make_plan(tiny, compile=True).notes
    assert not [n for n in make_plan(tiny).notes if n.startswith("compile")]
    assert not plan.alone(dataclasses.replace(tiny, compile=True)).compile


@pytest.mark.slow
def test_inductor(make_plan, tiny, digits):
    """The backend of a run, in fp32: two steps and pictures."""
    torch._dynamo.reset()
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
    found = []
    for compiled in (False, True):
        composed = make_plan(tiny, compile=compiled, micro_batch=48)
        if compiled and not composed.compiled:
            pytest.skip(composed.notes[-1])
        state, step = train.init_state(composed, KEY), train.make_step(composed)
        for batch in loader.batches(digits, KEY, global_batch=96, stop=2):
            state, metrics = step(state, batch, KEY)
        found.append((metrics["loss"], sample.sample(composed, state.params, torch.arange(3), KEY)))
    (loss, pictures_), (loss1, pictures1) = found
    assert loss1 == pytest.approx(loss, rel=1e-5) and torch.allclose(pictures_, pictures1, atol=1e-4)
