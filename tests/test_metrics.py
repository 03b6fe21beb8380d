"""The judge, halves of one set and nearest neighbours against slower or known answers."""

import numpy
import pytest
import torch

from odit import data, metrics, random
from odit.fidelity import frechet

KEY = random.key(11)


def gaussian(name: str, num: int, dim: int) -> torch.Tensor:
    """Correlated fp64 samples with a mean of their own."""
    mix = random.normal(random.fold_in(KEY, name, "mix"), (dim, dim)).double()
    mean = random.normal(random.fold_in(KEY, name, "mean"), (dim,)).double()
    return random.normal(random.fold_in(KEY, name), (num, dim)).double() @ mix + mean


def test_halves_distance_is_that_of_two_disjoint_halves():
    x = gaussian("a", 400, 4)
    floor = metrics.halves_distance(x)
    assert floor == metrics.halves_distance(x) != metrics.halves_distance(x, KEY)
    # Equal distributions: of the order of tr(cov) * dim / N, far below the distance to another distribution
    assert 0 < floor < 0.2 * float(frechet.moments(x)[1].trace())
    # Halves by position would see this trend; keyed halves must not
    trend = torch.linspace(0, 10, 400, dtype=torch.float64)[:, None].expand(-1, 4) + 0.01 * x
    assert metrics.halves_distance(trend) < 1


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_is_brute_force(chunk):
    x, train = gaussian("a", 20, 12).reshape(20, 3, 2, 2), gaussian("b", 33, 12).reshape(33, 3, 2, 2)
    expected = [min(float((a - b).square().sum().sqrt()) for b in train) for a in x]
    numpy.testing.assert_allclose(metrics.nearest(x, train, chunk=chunk), expected, rtol=1e-12)


def test_nearest_of_a_copy_is_zero():
    train = 100 + random.normal(KEY, (50, 64))
    assert metrics.nearest(train[[3, 7]], train).tolist() == [0, 0]


@pytest.fixture(scope="module")
def digits():
    dataset = data.open_dataset(data.Config(held_out=1 / 6))
    return *dataset.read(dataset.train_ids), *dataset.read(dataset.held_out_ids)


@pytest.fixture(scope="module")
def judge(digits):
    return metrics.train_judge(*digits, 10, random.key(0), epochs=8)


def test_judge_knows_held_out_digits(judge, digits):
    _, _, x_held, y_held = digits
    assert judge.accuracy >= 0.98
    logits, features = metrics.classify(judge, x_held, chunk=77)
    assert logits.shape == (len(y_held), 10) and features.shape == (len(y_held), metrics.FEATURES)
    assert float((logits.argmax(-1) == y_held).double().mean()) == judge.accuracy
    assert metrics.accuracy(judge, x_held, (y_held + 1) % 10) < 0.05


def test_judge_features_tell_digits_from_noise_and_from_one_class(judge, digits):
    x, y, *_ = digits
    features = metrics.classify(judge, x)[1]
    real = frechet.moments(features)
    floor = metrics.halves_distance(features)
    noise = metrics.classify(judge, random.normal(KEY, tuple(x.shape)).clamp(-1, 1))[1]
    assert frechet.distance(frechet.moments(noise), real) > 20 * floor
    assert frechet.distance(frechet.moments(features[y == 3]), real) > 20 * floor
    # covariance of some hundred samples has full rank: no dead features
    values = torch.linalg.eigvalsh(frechet.moments(features)[1])
    assert values[0] > 1e-6 * values[-1]


def test_judge_is_a_function_of_its_key(digits):
    x, y, x_held, y_held = (t[:96] for t in digits)
    before = torch.random.get_rng_state()
    first, again, other = (
        metrics.train_judge(x, y, x_held, y_held, 10, random.key(seed), epochs=2, batch=32) for seed in (1, 1, 2)
    )
    assert torch.equal(first.params["classes"]["w"], again.params["classes"]["w"])
    assert not torch.equal(first.params["classes"]["w"], other.params["classes"]["w"])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("size", [(3, 4, 4), (1, 20, 28)])
def test_judge_takes_other_shapes(size):
    x = random.normal(KEY, (10, *size))
    y = torch.arange(10) % 3
    judge = metrics.train_judge(x, y, x, y, 3, KEY, epochs=1, batch=5)
    assert metrics.classify(judge, x)[0].shape == (10, 3)
