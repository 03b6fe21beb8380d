"""Solvers: from noise to a sample by repeated calls of ``model(x, t_net_B, level)``.

Coefficients are Python floats, computed before the loop from fp64 tables, and the network's times go to the device in
one copy; so the loop never waits for the device. ``alpha`` is the cumulative product (signal^2), 1 at clean data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from odit.diffusion.flow import Flow
from odit.diffusion.gaussian import (
    Gaussian,
    eps_from,
    range_log_variance,
    respace,
    spaced_times,
    x0_from,
)
from odit.diffusion.guidance import level
from odit.ops import at_least_fp32


@torch.no_grad()
def sample(
    objective: Gaussian | Flow,
    model,
    noise_BCHW: Tensor,
    *,
    solver: str,
    steps: int,
    noise_at: Callable[[int], Tensor] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    clip: float | None = None,
) -> Tensor:
    """Takes pure noise to a sample in ``steps`` solver steps; computed, and returned, in at least fp32.

    Args:
        model: ``model(x, t_net_B, level)``, guided or not; level is a Python float in [0, 1], 1 at pure noise.
        noise_at: fresh standard normal noise of solver step i, shaped as the sample; ddpm and sde need it.
        progress: wraps the iterable of steps, such as tqdm.
        clip: bounds the predicted x_0 to [-clip, clip] (Gaussian processes, in pixel space).

    Raises ValueError as ``check_solver``, and where noise_at is missing or clip cannot be used. A respaced process is
    solved on its own times when steps is their number.
    """
    check_solver(objective, solver, steps)
    solve = SOLVERS[solver][1]
    if solver in STOCHASTIC and noise_at is None:
        raise ValueError(f"solver {solver} draws noise at every step: pass noise_at")
    if clip is not None and (isinstance(objective, Flow) or not clip > 0):
        raise ValueError(f"clip is {clip}: use a positive bound on x_0 with a Gaussian process, None with a flow")
    x, indices = at_least_fp32(noise_BCHW), range(steps)
    loop = indices if progress is None else progress(indices)
    if isinstance(objective, Flow):
        return solve(objective, model, x, steps, loop, noise_at)
    return solve(respace(objective, spaced_times(objective.num_steps, steps)), model, x, loop, noise_at, clip)


def check_solver(objective: Gaussian | Flow, solver: str, steps: int) -> None:
    """Raises ValueError for a solver of the other family and for a number of steps it cannot make."""
    if isinstance(objective, Flow):
        family, what, most, bound = "flow", "a flow", math.inf, "1 or more"
    else:
        family, what, most = "gaussian", f"a Gaussian process ({objective.predicts})", objective.num_steps
        bound = f"1 to {most}, the number of steps trained on"
    fitting = ", ".join(name for name, (of, _) in SOLVERS.items() if of == family)
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}: use one of {fitting}")
    if SOLVERS[solver][0] != family:
        raise ValueError(f"solver is {solver!r}, which does not solve {what}: use one of {fitting}")
    if not 1 <= steps <= most:
        raise ValueError(f"steps is {steps}: {solver} needs {bound}")


# Single steps, on given alphas.


def ddpm_step(x: Tensor, x0: Tensor, alpha_from: float, alpha_to: float, noise: Tensor | None, log_variance) -> Tensor:
    """Steps to the posterior mean of x_0 and x (DDPM eq. 7), plus noise of this log-variance unless noise is None."""
    ratio = alpha_from / alpha_to
    mean = (1 - ratio) * alpha_to**0.5 / (1 - alpha_from) * x0 + (1 - alpha_to) * ratio**0.5 / (1 - alpha_from) * x
    if noise is None:
        return mean
    std = torch.exp(0.5 * log_variance) if isinstance(log_variance, Tensor) else math.exp(0.5 * log_variance)
    return mean + std * noise


def ddim_step(x: Tensor, x0: Tensor, eps: Tensor, alpha_from: float, alpha_to: float) -> Tensor:
    """Steps along the deterministic path, eta = 0: Song et al. 2021 (DDIM), eq. 12; x and alpha_from are not used."""
    return alpha_to**0.5 * x0 + (1 - alpha_to) ** 0.5 * eps


def dpmpp_2m_step(
    x: Tensor, x0: Tensor, x0_last: Tensor | None, alpha_last: float, alpha_from: float, alpha_to: float
) -> Tensor:
    """Steps by DPM-Solver++(2M), Lu et al. 2022, algorithm 2; of first order where x0_last is None or alpha_to is 1.

    x0 is predicted at alpha_from and x0_last one step earlier, at alpha_last.
    """
    if x0_last is not None and alpha_to < 1:
        ratio = (_log_snr(alpha_to) - _log_snr(alpha_from)) / (_log_snr(alpha_from) - _log_snr(alpha_last))
        x0 = x0 + 0.5 * ratio * (x0 - x0_last)
    shrink = ((1 - alpha_to) / (1 - alpha_from)) ** 0.5
    return shrink * x + (alpha_to**0.5 - shrink * alpha_from**0.5) * x0


def _log_snr(alpha: float) -> float:
    """lambda = log(signal / sigma)."""
    return 0.5 * (math.log(alpha) - math.log1p(-alpha))


# Gaussian solvers run over all steps of a (respaced) process, from the noisiest down.


def _predictor(gaussian: Gaussian, model, x: Tensor, clip: float | None):
    """Makes ``predict(x, k) -> x0, eps, fraction`` at step k of the process; a clipped x_0 gives its own eps."""
    levels = [level(gaussian, t) for t in gaussian.timesteps.tolist()]
    net_T = gaussian.network_time(torch.arange(gaussian.num_steps, device=gaussian.timesteps.device)).to(x.device)
    alphas = gaussian.alphas_cumprod.tolist()

    def predict(x: Tensor, k: int):
        signal, sigma = alphas[k] ** 0.5, (1 - alphas[k]) ** 0.5
        out, fraction = gaussian.split(model(x, net_T[k].expand(len(x)), levels[k]).to(x.dtype), x.shape[1])
        x0 = x0_from(gaussian.predicts, out, x, signal, sigma)
        if clip is None:
            return x0, eps_from(gaussian.predicts, out, x, signal, sigma), fraction
        x0 = x0.clamp(-clip, clip)
        return x0, eps_from("x0", x0, x, signal, sigma), fraction

    return predict


def _ddpm(gaussian, model, x, loop, noise_at, clip):
    """Ancestral sampling: DDPM algorithm 2; the last step returns its mean."""
    predict, alphas = _predictor(gaussian, model, x, clip), [1.0, *gaussian.alphas_cumprod.tolist()]
    bounds = gaussian.log_variances(torch.arange(gaussian.num_steps, device=gaussian.alphas_cumprod.device))
    log_small, log_large = (bound.tolist() for bound in bounds)
    for i in loop:
        k = gaussian.num_steps - 1 - i
        x0, _, fraction = predict(x, k)
        if gaussian.variance == "learned":
            log_variance = range_log_variance(fraction, log_small[k], log_large[k])
        else:
            log_variance = (log_small if gaussian.variance == "fixed-small" else log_large)[k]
        noise = noise_at(i).to(x) if k else None
        x = ddpm_step(x, x0, alphas[k + 1], alphas[k], noise, log_variance)
    return x


def _ddim(gaussian, model, x, loop, noise_at, clip):
    predict, alphas = _predictor(gaussian, model, x, clip), [1.0, *gaussian.alphas_cumprod.tolist()]
    for i in loop:
        k = gaussian.num_steps - 1 - i
        x0, eps, _ = predict(x, k)
        x = ddim_step(x, x0, eps, alphas[k + 1], alphas[k])
    return x


def _dpmpp(gaussian, model, x, loop, noise_at, clip):
    predict, alphas = _predictor(gaussian, model, x, clip), [1.0, *gaussian.alphas_cumprod.tolist()]
    x0_last, alpha_last = None, math.nan
    for i in loop:
        k = gaussian.num_steps - 1 - i
        x0, _, _ = predict(x, k)
        x = dpmpp_2m_step(x, x0, x0_last, alpha_last, alphas[k + 1], alphas[k])
        x0_last, alpha_last = x0, alphas[k + 1]
    return x


# Flow solvers run over the flow's grid in t, from 0 (noise) to 1 (data): even steps, unless it shifts them.


def _velocity(flow: Flow, model, x: Tensor, grid: list[float]):
    """Makes ``velocity(x, i)`` at time i of the grid."""
    net = flow.network_time(torch.tensor(grid, dtype=torch.float64)).to(x.device)

    def velocity(x: Tensor, i: int) -> Tensor:
        out = model(x, net[i].expand(len(x)), level(flow, grid[i])).to(x.dtype)
        return flow.velocity(out, x, grid[i])

    return velocity


def _euler(flow, model, x, steps, loop, noise_at):
    grid = flow.grid(steps)
    velocity = _velocity(flow, model, x, grid)
    for i in loop:
        x = x + velocity(x, i) * (grid[i + 1] - grid[i])
    return x


def _heun(flow, model, x, steps, loop, noise_at):
    """The explicit trapezoid rule: two model calls a step; where data is predicted, which implies no velocity at the
    end, one in the last."""
    grid = flow.grid(steps)
    velocity = _velocity(flow, model, x, grid)
    for i in loop:
        dt = grid[i + 1] - grid[i]
        here = velocity(x, i)
        if flow.predicts == "data" and i == steps - 1:
            return x + here * dt
        there = velocity(x + here * dt, i + 1)
        x = x + (here + there) * (dt / 2)
    return x


def _sde(flow, model, x, steps, loop, noise_at):
    """Euler-Maruyama on dx = (v + w/2 score) dt + sqrt(w) dW with w(t) = 2 (1 - t): SiT's SDE, its ``sigma`` form.

    The noise in x is x - t v, and the score is minus that over 1 - t; with this w the quotient cancels and the drift is
    v - (x - t v), finite from t = 0 to 1. The last step adds its drift and no noise (SiT's "Mean"), for the same reason
    as the last step of ddpm: its noise would stay in the sample.
    """
    grid = flow.grid(steps)
    velocity = _velocity(flow, model, x, grid)
    for i in loop:
        t, dt = grid[i], grid[i + 1] - grid[i]
        v = velocity(x, i)
        x = x + (v - (x - t * v)) * dt
        if i < steps - 1:
            x = x + (2 * (1 - t) * dt) ** 0.5 * noise_at(i).to(x)
    return x


SOLVERS = {
    "ddpm": ("gaussian", _ddpm),
    "ddim": ("gaussian", _ddim),
    "dpm++": ("gaussian", _dpmpp),
    "euler": ("flow", _euler),
    "heun": ("flow", _heun),
    "sde": ("flow", _sde),
}
STOCHASTIC = ("ddpm", "sde")
