"""Solvers against diffusers' schedulers on the same times and noise, and against solutions known in closed form."""

import itertools
import math

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from odit.diffusion import Config, build
from odit.diffusion.flow import Flow
from odit.diffusion.gaussian import respace, spaced_times, target
from odit.diffusion.solvers import SOLVERS, check_solver, ddim_step, ddpm_step, dpmpp_2m_step, sample

# numpy 2 with diffusers 0.42: np.array(tensor) of theirs.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

T = 1000
PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCE = {"fixed-small": "fixed_small", "fixed-large": "fixed_large", "learned": "learned_range"}
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
X_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def denoiser(process):
    """The exact prediction for data of two normals at -0.7 and 0.7 with spread 0.2, and a made-up variance fraction."""

    def model(x, t_B, level=None):
        alpha = process.alphas_cumprod[t_B.long()].reshape(-1, 1, 1, 1).to(x.dtype)
        total = 1 - alpha + alpha * 0.04
        centre = 0.7 * torch.tanh(alpha.sqrt() * 0.7 * x / total)
        x0 = centre + alpha.sqrt() * 0.04 / total * (x - alpha.sqrt() * centre)
        eps = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        out = target(process.predicts, x0, eps, alpha.sqrt(), (1 - alpha).sqrt())
        return torch.cat([out, torch.sin(3 * x)], 1) if process.variance == "learned" else out

    return model


def noise_at(i):
    return torch.randn(X_T.shape, generator=torch.Generator().manual_seed(100 + i), dtype=torch.float64)


def double(scheduler, process):
    """Gives a scheduler our alphas in fp64, so that a step shows its formula and not its tables' rounding."""
    scheduler.alphas_cumprod = process.alphas_cumprod.clone()
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def walk(scheduler, model, x, monkeypatch=None):
    """Runs a scheduler over its own times; with monkeypatch its draws are noise_at(0), noise_at(1), ..."""
    points = [x]
    for i, t in enumerate(scheduler.timesteps):
        if monkeypatch is not None:
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, dtype, i=i, **__: noise_at(i).to(dtype))
        out = model(points[-1], torch.full((len(x),), int(t)))
        points.append(scheduler.step(out, t, points[-1]).prev_sample)
    return points


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["eps", "v"])
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large", "learned"])
def test_ddpm_is_diffusers(betas, predicts, variance, monkeypatch):
    process, steps = build(Config(predicts, betas, variance)), 40

    def make():
        return DDPMScheduler(
            T,
            beta_schedule=BETAS[betas],
            variance_type=VARIANCE[variance],
            prediction_type=PREDICTION[predicts],
            clip_sample=False,
        )

    model, settings = denoiser(process), {"solver": "ddpm", "steps": steps, "noise_at": noise_at}
    for scheduler, dtype, tolerance in ((make(), torch.float32, 1e-4), (double(make(), process), torch.float64, 1e-10)):
        scheduler.set_timesteps(timesteps=spaced_times(T, steps)[::-1])
        theirs = walk(scheduler, model, X_T.to(dtype), monkeypatch)[-1]
        ours = sample(process, model, X_T.to(dtype), **settings)
        assert ours.dtype == dtype and (ours - theirs).abs().max() <= tolerance


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_ddim_is_diffusers(betas, predicts, clip):
    process, steps = build(Config(predicts, betas, "fixed-small")), 40

    def make():
        return DDIMScheduler(
            T,
            beta_schedule=BETAS[betas],
            prediction_type=PREDICTION[predicts],
            clip_sample=clip is not None,
            clip_sample_range=clip or 1.0,
            timestep_spacing="leading",
        )

    model = denoiser(process)
    for scheduler, dtype, tolerance in ((make(), torch.float32, 1e-4), (double(make(), process), torch.float64, 1e-10)):
        scheduler.set_timesteps(steps)
        spaced = respace(process, scheduler.timesteps.tolist()[::-1])
        ours = sample(spaced, model, X_T.to(dtype), solver="ddim", steps=steps, clip=clip)
        x = X_T.to(dtype)
        for t in scheduler.timesteps:
            out = model(x, torch.full((len(x),), int(t)))
            x = scheduler.step(out, t, x, use_clipped_model_output=clip is not None).prev_sample
        assert ours.dtype == dtype and (ours - x).abs().max() <= tolerance


@pytest.mark.parametrize("betas", ["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 10, 30])  # diffusers treats runs of fewer than 15 steps apart
def test_dpmpp_is_diffusers(betas, predicts, steps):
    process = build(Config(predicts, betas, "fixed-small"))
    scheduler = DPMSolverMultistepScheduler(T, beta_schedule=BETAS[betas], prediction_type=PREDICTION[predicts])
    # From 950 down: at 999 the cosine signal is 5e-5, and a single step would return eps' fp32 rounding times 2e4.
    times = spaced_times(951, steps)
    scheduler.set_timesteps(timesteps=times[::-1])
    model, x = denoiser(process), X_T.float()
    theirs = walk(scheduler, model, x)[-1]
    assert (sample(respace(process, times), model, x, solver="dpm++", steps=steps) - theirs).abs().max() <= 1e-4


STEP_TIMES = [(999, 900, 800), (500, 480, 333), (60, 20, 0)]


@pytest.mark.parametrize("times", STEP_TIMES)
def test_dpmpp_step_is_diffusers_in_fp64(times):
    process = build(Config("x0", variance="fixed-small"))
    scheduler = DPMSolverMultistepScheduler(T, prediction_type="sample", solver_type="midpoint")
    scheduler.set_timesteps(timesteps=list(times))
    last, here, to = (process.alphas_cumprod[t].item() for t in times)
    scheduler.sigmas = torch.tensor([(1 - a) / a for a in (last, here, to)], dtype=torch.float64).sqrt()
    x0_last, x0 = noise_at(0), noise_at(1)
    scheduler._step_index = 0
    first = scheduler.dpm_solver_first_order_update(x0_last, sample=X_T)
    assert (dpmpp_2m_step(X_T, x0_last, None, math.nan, last, here) - first).abs().max() < 1e-10
    scheduler._step_index = 1
    second = scheduler.multistep_dpm_solver_second_order_update([x0_last, x0], sample=X_T)
    assert (dpmpp_2m_step(X_T, x0, x0_last, last, here, to) - second).abs().max() < 1e-10
    # The step to clean data returns x_0 itself, of first order whatever came before.
    assert (dpmpp_2m_step(X_T, x0, x0_last, last, here, 1.0) - x0).abs().max() < 1e-15


@pytest.mark.parametrize("times", [(999, 899), (500, 480), (60, 20), (0, -1)])
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large", "learned"])
def test_ddpm_and_ddim_steps_are_diffusers_in_fp64(times, variance, monkeypatch):
    process, (t, to) = build(Config("eps", variance=variance)), times
    alphas = (process.alphas_cumprod[t].item(), process.alphas_cumprod[to].item() if to >= 0 else 1.0)
    eps, fraction, noise = noise_at(0), noise_at(1), noise_at(2)
    x0 = (X_T - (1 - alphas[0]) ** 0.5 * eps) / alphas[0] ** 0.5
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
    ddpm = double(DDPMScheduler(T, variance_type=VARIANCE[variance], clip_sample=False), process)
    ddpm.set_timesteps(timesteps=[t, to] if to >= 0 else [t])
    out = torch.cat([eps, fraction], 1) if variance == "learned" else eps
    theirs = ddpm.step(out, t, X_T).prev_sample
    beta = 1 - alphas[0] / alphas[1]
    if to < 0:
        ours = ddpm_step(X_T, x0, *alphas, None, None)
    else:
        log_small, log_large = math.log(beta * (1 - alphas[1]) / (1 - alphas[0])), math.log(beta)
        between = log_small + (fraction + 1) / 2 * (log_large - log_small)
        log_variance = {"fixed-small": log_small, "fixed-large": log_large, "learned": between}[variance]
        ours = ddpm_step(X_T, x0, *alphas, noise, log_variance)
    assert (ours - theirs).abs().max() < 1e-10

    ddim = double(DDIMScheduler(T, clip_sample=False), process)
    ddim.num_inference_steps = T // (t - to)  # makes t - T // num_inference_steps the time stepped to
    assert t - T // ddim.num_inference_steps == to
    theirs = ddim.step(eps, t, X_T).prev_sample
    assert (ddim_step(X_T, x0, eps, *alphas) - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++"])
def test_clip_bounds_x0(solver):
    process = build(Config("eps", variance="fixed-small"))
    settings = {"solver": solver, "steps": 10, "noise_at": noise_at}
    free, bound = (sample(process, denoiser(process), X_T, **settings, clip=clip).abs().max() for clip in (None, 0.3))
    assert bound <= 0.3 + 1e-12 < free


def normal_velocity(mean: float, spread: float):
    """The velocity of the straight path to normal data: E[x - noise | x_t], linear in x_t."""

    def model(x, t_B, level):
        t = t_B.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        slope = (t * spread**2 - (1 - t)) / (t**2 * spread**2 + (1 - t) ** 2)
        return mean + slope * (x - t * mean)

    return model


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_flow_solvers_converge_with_their_order(solver, order):
    model, exact = normal_velocity(0.5, 0.3), 0.5 + 0.3 * X_T
    # Powers of two: i / steps is exact in the network's fp32 time.
    errors = [
        (sample(Flow(), model, X_T, solver=solver, steps=steps) - exact).abs().max().item()
        for steps in (32, 64, 128, 256)
    ]
    observed = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert observed[-1] == pytest.approx(order, abs=0.1), (errors, observed)
    assert errors[-1] < {1: 1e-2, 2: 1e-4}[order]


def sde_moments(steps: int, mean: float, spread: float) -> tuple[float, float]:
    """Mean and standard deviation of what the sde solver gives, without sampling.

    Model and solver are linear, so the result is a constant plus a sum of weights times the normals put in; sample
    j of this batch has a 1 in the place of draw j alone, and the last one has none.
    """
    unit = torch.eye(steps + 1, steps, dtype=torch.float64)[:, :, None]
    x = sample(
        Flow(), normal_velocity(mean, spread), unit[:, 0], solver="sde", steps=steps, noise_at=lambda i: unit[:, i + 1]
    )
    return x[-1].item(), (x[:-1] - x[-1]).square().sum().sqrt().item()


def test_sde_reproduces_normal_data():
    mean, spread = 0.5, 0.3
    errors = [
        [abs(a - b) for a, b in zip(sde_moments(n, mean, spread), (mean, spread), strict=True)] for n in (64, 128, 256)
    ]
    assert errors[-1][0] < 1e-2 and errors[-1][1] < 1e-2
    for coarse, fine in itertools.pairwise(errors):  # of weak order 1
        assert fine[1] / coarse[1] == pytest.approx(0.5, abs=0.1), errors
        assert fine[0] <= max(0.6 * coarse[0], 1e-12), errors


def test_ddpm_reproduces_normal_data():
    process, mean, spread = build(Config("x0", variance="fixed-small")), 0.5, 0.3

    def model(x, t_B, level):
        alpha = process.alphas_cumprod[t_B.long()].reshape(-1, 1)
        gain = alpha.sqrt() * spread**2 / (1 - alpha + alpha * spread**2)
        return mean + gain * (x - alpha.sqrt() * mean)

    unit = torch.eye(T + 1, T, dtype=torch.float64)[:, :, None]
    x = sample(process, model, unit[:, 0], solver="ddpm", steps=T, noise_at=lambda i: unit[:, i + 1])
    assert x[-1].item() == pytest.approx(mean, abs=5e-3)
    assert (x[:-1] - x[-1]).square().sum().sqrt().item() == pytest.approx(spread, abs=5e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_progress_noise_and_calls(solver):
    process = build(Config("flow") if SOLVERS[solver][0] == "flow" else Config("eps", variance="fixed-small"))
    drawn, seen, calls = [], [], []

    def model(x, t_B, level):
        assert t_B.shape == (2,) and t_B.dtype == torch.float32 and not torch.is_grad_enabled()
        calls.append(level)
        return 0.1 * x

    def noise(i):
        drawn.append(i)
        return noise_at(i)

    def progress(steps):
        for i in steps:
            seen.append(i)
            yield i

    x = sample(process, model, X_T.bfloat16(), solver=solver, steps=5, noise_at=noise, progress=progress)
    assert x.dtype == torch.float32 and x.shape == X_T.shape and seen == [0, 1, 2, 3, 4]
    assert len(calls) == (10 if solver == "heun" else 5)
    assert drawn == ([0, 1, 2, 3] if solver in ("ddpm", "sde") else [])  # the last step adds none


class Copies(TorchDispatchMode):
    """Counts copies between devices and dtypes."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_neither_reads_from_nor_copies_to_the_device(solver):
    """A tensor on the meta device has no values, so that reading one raises; copies do not grow with the steps."""
    process = build(Config("flow") if SOLVERS[solver][0] == "flow" else Config("v", variance="learned"))
    x = X_T.float().to("meta")

    def model(x, t_B, level):
        return torch.cat([x, x], 1) if SOLVERS[solver][0] == "gaussian" else x

    copies = []
    for steps in (3, 6):
        with Copies() as mode:
            out = sample(process, model, x, solver=solver, steps=steps, noise_at=lambda i: torch.empty_like(x))
        copies.append(mode.num)
        assert out.device.type == "meta" and out.shape == x.shape
    assert copies[0] == copies[1]


GAUSSIAN, FLOW = build(Config("eps", train_steps=100)), build(Config("flow"))
REFUSED = [
    (FLOW, "ddim", 10, "solver is 'ddim'", "euler, heun, sde"),
    (GAUSSIAN, "euler", 10, "solver is 'euler'", "ddpm, ddim, dpm++"),
    (GAUSSIAN, "plms", 10, "solver is 'plms'", "ddpm, ddim, dpm++"),
    (FLOW, "rk4", 10, "solver is 'rk4'", "euler, heun, sde"),
    (GAUSSIAN, "ddim", 101, "steps is 101", "1 to 100"),
    (GAUSSIAN, "ddpm", 0, "steps is 0", "1 to 100"),
    (FLOW, "heun", 0, "steps is 0", "1 or more"),
]


@pytest.mark.parametrize(
    ("process", "solver", "steps", "found", "fix"), REFUSED, ids=[f"{r[1]}-{r[2]}" for r in REFUSED]
)
def test_refusals(process, solver, steps, found, fix):
    for refuse in (
        lambda: check_solver(process, solver, steps),
        lambda: sample(process, None, X_T, solver=solver, steps=steps, noise_at=noise_at),
    ):
        with pytest.raises(ValueError) as error:
            refuse()
        assert found in str(error.value) and fix in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("process", "settings", "found"),
    [
        (GAUSSIAN, {"solver": "ddpm"}, "noise_at"),
        (FLOW, {"solver": "sde"}, "noise_at"),
        (FLOW, {"solver": "euler", "clip": 1.0}, "clip is 1.0"),
        (GAUSSIAN, {"solver": "ddim", "clip": 0.0}, "clip is 0.0"),
    ],
)
def test_sample_refuses(process, settings, found):
    with pytest.raises(ValueError, match=found):
        sample(process, None, X_T, steps=10, **settings)
