"""Model calls as graphs: a stand-in that runs again what it recorded, from the memory it was recorded with; CUDA's own
on a GPU."""

import pytest
import torch
from conftest import redraw

from odit import graphs, random, sample, tree
from odit.config import Guidance, Sampling

KEY = random.key(2)


class Recorder:
    """Stands for CUDA's graphs: a replay sees the recorded call's own inputs alone, and writes where it wrote."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, run):
        self.recorded += 1
        result = run()

        def replay():
            result.copy_(run())

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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("solver, steps", [("heun", 4), ("euler", 6)])
def test_pictures_are_those_without_graphs(make_plan, tiny, precision, solver, steps, monkeypatch):
    run = make_plan(tiny, device="cuda", precision=precision)
    params = tree.map(lambda x: x.cuda(), redraw(run.declared, dtype=torch.float32))
    few = Sampling(solver, steps, Guidance(2.0, interval=(0.2, 0.9)))
    labels = torch.arange(7) % 10
    found = sample.sample(run, params, labels, KEY, sampling=few, batch=4)
    monkeypatch.setattr(graphs, "captured", lambda fn: fn)
    assert torch.equal(found, sample.sample(run, params, labels, KEY, sampling=few, batch=4))
