"""Gaussian diffusion in T discrete steps: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (IDDPM), as DiT trains it.

x_t = signal x_0 + sigma eps, with signal^2 = alpha, the cumulative product of 1 - beta up to t, sigma^2 = 1 - alpha.
Everything is derived from that one table; per-sample coefficients are computed in fp64 and then cast to x's dtype.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from odit.ops import at_least_fp32

Predicts = Literal["eps", "x0", "v"]
Variance = Literal["fixed-small", "fixed-large", "learned"]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A discrete Gaussian process, what the network predicts on it, and its reverse variance."""

    predicts: Predicts
    variance: Variance
    alphas_cumprod: Tensor
    """(T,) fp64: cumulative products of 1 - beta."""
    timesteps: Tensor
    """(T,) int64: what the network knows each step as; 0 .. T-1 unless respaced."""
    train_steps: int
    """T of the process that was trained on."""

    @property
    def num_steps(self) -> int:
        """T of this process."""
        return len(self.alphas_cumprod)

    def to(self, device) -> Gaussian:
        """Moves the tables, so that no step of a training run copies them from the host."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device), timesteps=self.timesteps.to(device))

    def draw_times(self, uniform_B: Tensor, normal_B: Tensor) -> Tensor:
        """Makes int64 times, even over [0, T), of fp32 uniforms in [0, 1); the normals are not used."""
        return (uniform_B.double() * self.num_steps).long()

    def network_time(self, t_B: Tensor) -> Tensor:
        """Gives the fp32 time that the timestep embedding sees: the step's number in the process trained on."""
        return self.timesteps.to(t_B.device)[t_B].float()

    def bins(self, t_B: Tensor, num: int) -> Tensor:
        """Sorts times into ``num`` equal bins of t / T, int64."""
        return t_B * num // self.num_steps

    def corrupt(self, x_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Draws x_t ~ q(x_t | x_0) with the noise given: DDPM eq. 4."""
        signal, sigma = self._amplitudes(x_BCHW, t_B)
        return signal * x_BCHW + sigma * noise_BCHW

    def loss(self, model, x_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Computes loss_B, the mean squared error plus, where the variance is learned, the variational bound's term.

        This is IDDPM's hybrid loss with lambda = 1 on a single term L_t in bits a dimension, not multiplied by T: what
        DiT trains with (LossType.MSE, ModelVarType.LEARNED_RANGE). The bound sees the prediction detached.
        ``model(x_t, t_net_B)`` returns C channels, or 2C where the variance is learned. Computed in at least fp32.
        """
        x, noise = at_least_fp32(x_BCHW), at_least_fp32(noise_BCHW)
        x_t = self.corrupt(x, t_B, noise)
        out, fraction = self.split(model(x_t, self.network_time(t_B)).to(x.dtype), x.shape[1])
        error = out - target(self.predicts, x, noise, *self._amplitudes(x, t_B))
        loss_B = mean_per_sample(error.square())
        if fraction is not None:
            loss_B = loss_B + self.bound(x, x_t, t_B, out.detach(), fraction)
        return loss_B

    def bound(self, x: Tensor, x_t: Tensor, t_B: Tensor, out: Tensor, fraction: Tensor) -> Tensor:
        """Computes L_t of the variational bound, (B,) in bits a dimension: DDPM eq. 5.

        That is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or at t = 0 -log p(x_0 | x_1) of values 2/255 apart.
        """
        x0 = x0_from(self.predicts, out, x_t, *self._amplitudes(x, t_B))
        # Both means are weight x_0 + (the same part of x_t), DDPM eq. 7; at t = 0 the weight is 1 and x_t has no part.
        alpha_B, prev_B = self._alphas(t_B)
        weight = over((1 - alpha_B / prev_B) * prev_B.sqrt() / (1 - alpha_B), x)
        distance = weight * (x - x0)
        log_small_B, log_large_B = self.log_variances(t_B)
        log_small = over(log_small_B, x)
        log_model = range_log_variance(fraction, log_small, over(log_large_B, x))
        divergence = normal_kl(distance, log_small, log_model)
        decoder = -discretized_log_likelihood(x, distance, log_model)
        return mean_per_sample(torch.where(over(t_B, x) == 0, decoder, divergence)) / math.log(2)

    def split(self, out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Splits the network's output into the prediction and, where the variance is learned, its fraction."""
        expected = channels * (2 if self.variance == "learned" else 1)
        assert out.shape[1] == expected, f"the model puts out {out.shape[1]} channels where {expected} are needed"
        return out[:, :channels], out[:, channels:] if self.variance == "learned" else None

    def log_variances(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the logarithms, fp64 (B,), of the posterior variance (DDPM eq. 7) and of beta.

        The first is 0 at t = 0 and is replaced by the one at t = 1 (or by beta if there is no t = 1), as IDDPM does.
        """
        alpha_B, prev_B = self._alphas(t_B)
        beta_B = 1 - alpha_B / prev_B
        alpha_B, prev_B = self._alphas(t_B.clamp(min=1) if self.num_steps > 1 else t_B)
        posterior_B = (1 - alpha_B / prev_B) * (1 - prev_B) / (1 - alpha_B)
        return torch.where(posterior_B > 0, posterior_B, beta_B).log(), beta_B.log()

    def _alphas(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """alpha at t and one step closer to the data (1 at t = 0), fp64 (B,)."""
        table = self.alphas_cumprod.to(t_B.device)
        return table[t_B], torch.where(t_B > 0, table[(t_B - 1).clamp(min=0)], 1.0)

    def _amplitudes(self, x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """signal and sigma at t, (B, 1, 1, ...) in x's dtype."""
        alpha_B, _ = self._alphas(t_B)
        return over(alpha_B.sqrt(), x), over((1 - alpha_B).sqrt(), x)


def from_betas(betas: Tensor, predicts: Predicts = "eps", variance: Variance = "learned") -> Gaussian:
    """Makes a process from its T betas, each in (0, 1)."""
    assert bool(((betas > 0) & (betas < 1)).all()), "betas lie in (0, 1)"
    num = len(betas)
    return Gaussian(predicts, variance, torch.cumprod(1 - betas.double(), 0), torch.arange(num), num)


def linear_betas(num_steps: int) -> Tensor:
    """Betas from 1e-4 to 0.02 at 1000 steps (DDPM); other numbers of steps reach about the same noise (IDDPM)."""
    scale = 1000 / num_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=torch.float64)


def cosine_betas(num_steps: int) -> Tensor:
    """Betas for alpha(u) = cos^2((u + 0.008) / 1.008 * pi / 2), at most 0.999: IDDPM eq. 17."""
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alphas = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas[1:] / alphas[:-1]).clamp(max=0.999)


def spaced_times(num_steps: int, steps: int) -> list[int]:
    """Spreads ``steps`` times evenly over 0 .. num_steps-1, both ends included, ascending.

    The same list as DiT's ``timestep_respacing=str(steps)``, which rounds a running sum (hence no product here), but
    for a single step: that starts from pure noise and so sits at num_steps-1, where DiT would put it at 0.
    """
    assert 1 <= steps <= num_steps, (steps, num_steps)
    if steps == 1:
        return [num_steps - 1]
    stride = (num_steps - 1) / (steps - 1)
    return [round(time) for time in itertools.accumulate([stride] * (steps - 1), initial=0.0)]


def respace(gaussian: Gaussian, times: list[int]) -> Gaussian:
    """Keeps only the steps in ``times`` (ascending), with the alphas and network times they have (IDDPM sec. 4)."""
    assert all(a < b for a, b in itertools.pairwise(times)), f"times ascend: {times}"
    assert times and 0 <= times[0] and times[-1] < gaussian.num_steps, f"times lie in [0, {gaussian.num_steps})"
    index = torch.tensor(times, device=gaussian.alphas_cumprod.device)
    return replace(gaussian, alphas_cumprod=gaussian.alphas_cumprod[index], timesteps=gaussian.timesteps[index])


# Conversions. ``signal`` and ``sigma`` are floats, or tensors that broadcast against x_t.


def target(predicts: Predicts, x0, eps, signal, sigma):
    """Gives what the network should put out; v = signal eps - sigma x_0 (Salimans & Ho 2022, sec. 4)."""
    return {"eps": lambda: eps, "x0": lambda: x0, "v": lambda: signal * eps - sigma * x0}[predicts]()


def x0_from(predicts: Predicts, out, x_t, signal, sigma):
    """Gives the data that a prediction implies."""
    return {
        "eps": lambda: (x_t - sigma * out) / signal,
        "x0": lambda: out,
        "v": lambda: signal * x_t - sigma * out,
    }[predicts]()


def eps_from(predicts: Predicts, out, x_t, signal, sigma):
    """Gives the noise that a prediction implies."""
    return {
        "eps": lambda: out,
        "x0": lambda: (x_t - signal * out) / sigma,
        "v": lambda: signal * out + sigma * x_t,
    }[predicts]()


def range_log_variance(fraction, log_small, log_large):
    """Interpolates the log-variance, from the posterior's at fraction = -1 to beta's at 1: IDDPM eq. 15."""
    share = (fraction + 1) / 2
    return share * log_large + (1 - share) * log_small


def normal_kl(distance: Tensor, log_variance_p: Tensor, log_variance_q: Tensor) -> Tensor:
    """Computes KL(p || q) of two normals whose means differ by ``distance``, in nats, elementwise."""
    ratio = log_variance_p - log_variance_q
    return 0.5 * (ratio.exp() - 1 - ratio + distance.square() * torch.exp(-log_variance_q))


def discretized_log_likelihood(x: Tensor, distance: Tensor, log_variance: Tensor) -> Tensor:
    """Computes log p(x) in nats of pixel values in [-1, 1] in 255 steps under a normal about x - distance: DDPM eq. 13.

    The normal's distribution function is the tanh approximation that IDDPM and DiT train with (error below 3e-4).
    """
    scale = torch.exp(-0.5 * log_variance)
    upper = _approximate_cdf(scale * (distance + 1 / 255))
    lower = _approximate_cdf(scale * (distance - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _approximate_cdf(z: Tensor) -> Tensor:
    """The standard normal's distribution function by tanh (Page 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def over(values_B: Tensor, x: Tensor) -> Tensor:
    """Casts one value a sample to x's dtype and shapes it (B, 1, 1, ...) to broadcast against x."""
    return values_B.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def mean_per_sample(x: Tensor) -> Tensor:
    """Averages over all dims but the first."""
    return x.flatten(1).mean(1)
