"""Guidance against two separate calls of the model."""

import pytest
import torch

from odit.diffusion import Config, build
from odit.diffusion.guidance import guided, level
from odit.diffusion.solvers import sample

B, C = 3, 4


def setup(out_channels=C):
    """A model of 2C channels that counts its calls, and its inputs; every argument matters in every channel."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((B, C, 2, 2), (out_channels, C)))
    calls = []

    def model(x, t, cond):
        calls.append(len(x))
        return torch.einsum("oc,bchw->bohw", weight, x * cond[:, None, None, None]).sin() * t[:, None, None, None]

    return model, x, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]), torch.full((B,), -0.5), calls


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("out_channels", [C, 2 * C])
def test_formula(channels, out_channels):
    model, x, t, cond, null, calls = setup(out_channels)
    out = guided(model, cond, null, scale=4.0, channels=channels)(x, t, 0.5)
    assert calls == [2 * B]  # both passes in one call
    with_cond, without = model(x, t, cond), model(x, t, null)
    num = channels or C
    toward = without + 4.0 * (with_cond - without)
    assert out.shape == with_cond.shape
    assert torch.allclose(out[:, :num], toward[:, :num], atol=1e-12)
    assert torch.allclose(out[:, num:], with_cond[:, num:], atol=1e-12)


def test_scale_one_is_no_guidance():
    model, x, t, cond, _, calls = setup(2 * C)
    out = guided(model, cond, None, scale=1.0)(x, t, 0.5)
    assert calls == [B] and torch.equal(out, model(x, t, cond))


@pytest.mark.parametrize(("at", "inside"), [(0.0, False), (0.29, False), (0.3, True), (0.8, True), (0.81, False)])
def test_interval(at, inside):
    model, x, t, cond, null, calls = setup()
    out = guided(model, cond, null, scale=4.0, interval=(0.3, 0.8))(x, t, at)
    assert calls == [2 * B if inside else B] and torch.equal(out, model(x, t, cond)) is not inside


def test_narrow_outputs_are_combined_in_fp32():
    model, x, t, cond, null, _ = setup()
    out = guided(lambda *args: model(*args).bfloat16(), cond, null, scale=8.0)(x, t, 0.5)
    with_cond, without = (model(x, t, c).bfloat16().float() for c in (cond, null))
    assert out.dtype == torch.float32 and torch.allclose(out, without + 8.0 * (with_cond - without), atol=1e-5)


def test_scale_zero_is_unconditional():
    model, x, t, cond, null, _ = setup()
    assert torch.allclose(guided(model, cond, null, scale=0.0)(x, t, 0.5), model(x, t, null), atol=1e-12)


def test_conditions_may_be_trees():
    model, x, t, cond, null, _ = setup()

    def of_tree(x, t, c):
        return model(x, t, c["text"][0] * c["mask"])

    def tree(c):
        return {"text": [c], "mask": torch.ones(B)}

    plain = guided(model, cond, null, scale=3.0)(x, t, 0.5)
    assert torch.equal(guided(of_tree, tree(cond), tree(null), scale=3.0)(x, t, 0.5), plain)


@pytest.mark.parametrize(("objective", "solver"), [("flow", "heun"), ("eps", "ddim")])
def test_solver_tells_the_level(objective, solver):
    process = build(Config("flow") if objective == "flow" else Config("eps", variance="fixed-small", train_steps=100))
    levels, times = [], []

    def model(x, t, at):
        assert isinstance(at, float)
        levels.append(at)
        times.append(t)
        return 0.1 * x

    sample(process, model, torch.ones(2, 1), solver=solver, steps=4)
    assert levels == sorted(levels, reverse=True) and 0.95 < levels[0] <= 1 and levels[-1] == 0
    assert torch.allclose(level(process, torch.stack(times)), torch.tensor(levels)[:, None].expand(-1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"scale": float("inf")}, "sampling.guidance.scale is inf"),
        ({"scale": 2.0, "interval": (0.5, 0.2)}, "sampling.guidance.interval"),
        ({"scale": 2.0, "interval": (0.0, 1.5)}, "sampling.guidance.interval"),
        ({"scale": 2.0, "channels": 0}, "sampling.guidance.channels"),
    ],
)
def test_refusals(settings, key):
    model, _, _, cond, null, _ = setup()
    with pytest.raises(ValueError, match=key):
        guided(model, cond, null, **settings)
