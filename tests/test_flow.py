"""The straight path against its formula, one number at a time."""

import pytest
import torch

from odit.diffusion import Config, build
from odit.diffusion.solvers import sample


def draws(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 3, 3), (4, 2, 2, 3, 3)])
def test_loss_is_the_formula(shape):
    x, noise, out = draws(*shape)
    flow, t_B = build(Config("flow", time_scale=1000.0)), torch.tensor([0.0, 0.25, 0.7, 1.0])
    seen = []
    loss_B = flow.loss(lambda x_t, t: seen.append((x_t, t)) or out, x, t_B, noise)
    assert loss_B.dtype == torch.float64 and loss_B.shape == (4,)
    assert torch.equal(seen[0][1], t_B * 1000) and seen[0][1].dtype == torch.float32
    for b, t in enumerate(t_B.tolist()):
        rows = [v[b].flatten().tolist() for v in (x, noise, out, seen[0][0])]
        path = [t * a + (1 - t) * n for a, n in zip(*rows[:2], strict=True)]
        errors = [(o - (a - n)) ** 2 for a, n, o in zip(*rows[:3], strict=True)]
        assert rows[3] == pytest.approx(path, abs=1e-14)
        assert loss_B[b].item() == pytest.approx(sum(errors) / len(errors), rel=1e-13)


def test_velocity_is_the_paths_derivative():
    x, noise, _ = draws(1, 3, 4)
    flow, h = build(Config("flow")), 2.0**-10

    def at(t):
        return flow.corrupt(x, torch.tensor([t]), noise)

    slope = (at(0.5 + h) - at(0.5 - h)) / (2 * h)
    assert flow.loss(lambda x_t, t: slope, x, torch.tensor([0.5]), noise).item() < 1e-24
    assert torch.equal(at(0.0), noise) and torch.equal(at(1.0), x)  # t = 0 is noise, t = 1 is data


def test_narrow_types_are_computed_in_fp32():
    x, noise, out = draws(4, 2, 3, dtype=torch.bfloat16)
    flow, t_B = build(Config("flow")), torch.tensor([0.1, 0.4, 0.6, 0.9])
    narrow = flow.loss(lambda x_t, t: out, x, t_B, noise)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, flow.loss(lambda x_t, t: out.float(), x.float(), t_B, noise.float()))


def test_times():
    uniform, normal = torch.rand(1000, generator=torch.Generator().manual_seed(1)), draws(1000, dtype=torch.float32)[0]
    assert torch.equal(build(Config("flow")).draw_times(uniform, normal), uniform)
    t_B = build(Config("flow", times="logit-normal")).draw_times(uniform, normal)
    assert t_B.dtype == torch.float32 and torch.allclose(torch.logit(t_B.double()).float(), normal, atol=1e-5)
    # A draw's bits do not depend on its neighbours (torch.sigmoid alters about one in 25 of these when taken alone).
    flow = build(Config("flow", times="logit-normal"))
    alone = [flow.draw_times(uniform[i : i + 1], normal[i : i + 1]) for i in range(1000)]
    assert torch.equal(torch.cat(alone), t_B)


def test_bins():
    bins = build(Config("flow")).bins(torch.tensor([0.0, 0.0999, 0.1, 0.55, 1 - 2.0**-24, 1.0]), 10)
    assert bins.dtype == torch.int64 and bins.tolist() == [0, 0, 1, 5, 9, 9]


def test_shifted_times_are_the_papers():
    """Esser et al. 2024, eq. 23, on noise levels: t_m = shift t_n / (1 + (shift - 1) t_n); draws and grid alike."""
    flow, plain = build(Config("flow", shift=3.0)), build(Config("flow"))
    uniform = torch.rand(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t, moved in zip(uniform.tolist(), flow.shifted(uniform).tolist()):
        level = 1 - t
        assert 1 - moved == pytest.approx(3 * level / (1 + 2 * level), rel=1e-12)
    assert flow.grid(4) == pytest.approx([0, 0.1, 0.25, 0.5, 1]) and plain.grid(4) == [0, 0.25, 0.5, 0.75, 1]
    drawn = flow.draw_times(uniform.float(), uniform.float())
    assert torch.equal(drawn, flow.shifted(uniform.float())) and (drawn < uniform.float()).all()


def test_a_network_may_predict_data():
    """Its loss is that of the velocity it implies: 0 of the data itself, and weighed by 1 / (1 - t)^2, bounded."""
    x, noise, wrong = draws(5, 2, 3, 3)
    flow, t_B = build(Config("flow", predicts="data")), torch.tensor([0.0, 0.3, 0.8, 0.96, 1.0])
    assert torch.equal(flow.loss(lambda x_t, t: x, x, t_B, noise), torch.zeros(5, dtype=torch.float64))
    loss_B = flow.loss(lambda x_t, t: x + wrong, x, t_B, noise)
    for b, t in enumerate(t_B.double().tolist()):
        error = wrong[b].square().mean().item() / max(1 - t, 0.05) ** 2
        assert loss_B[b].item() == pytest.approx(error, rel=1e-6)  # t is fp32
    x_t = flow.corrupt(x, t_B, noise)
    implied = flow.velocity(x, x_t, t_B.double().reshape(-1, 1, 1, 1))[:3]
    assert torch.allclose(implied, (x - noise)[:3], atol=1e-6)


DATA = dict(predicts="data")


CASES = [("euler", dict(shift=4.0)), ("euler", DATA), ("heun", DATA | dict(shift=4.0))]


@pytest.mark.parametrize("solver, settings", CASES)
def test_solvers_reach_a_known_point(solver, settings):
    """Data that is one point is reached exactly, from any grid and by either kind of prediction."""
    point, noise, _ = draws(3, 2, 4)
    flow = build(Config("flow", **settings))

    def model(x, t_net_B, level):
        return point if flow.predicts == "data" else (point - x) / level

    found = sample(flow, model, noise, solver=solver, steps=40)
    assert (found - point).abs().max() < 1e-12
