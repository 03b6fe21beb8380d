"""Flow matching on the straight path between noise and data: SiT (Ma et al. 2024), Lipman et al. 2023.

x_t = t x + (1 - t) noise for t in [0, 1]: t = 0 is pure noise and t = 1 is data. The network predicts dx_t/dt, or x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from odit.diffusion.gaussian import mean_per_sample, over
from odit.ops import at_least_fp32

NEAREST = 0.05  # least 1 - t that a loss divides a prediction of data by


@dataclass(frozen=True)
class Flow:
    """A straight path with its distribution of training times."""

    times: Literal["uniform", "logit-normal"] = "uniform"
    time_scale: float = 1.0
    """Factor from t to what the timestep embedding sees."""
    predicts: Literal["velocity", "data"] = "velocity"
    """What the network puts out; see ``velocity``."""
    shift: float = 1.0
    """Moves times towards noise: see ``shifted``."""

    def draw_times(self, uniform_B: Tensor, normal_B: Tensor) -> Tensor:
        """Makes fp32 times of fp32 draws: the uniforms themselves, or the logistic function of the normals; shifted."""
        if self.times == "uniform":
            return self.shifted(uniform_B.float())
        # torch.sigmoid's bits depend on how a tensor is sliced
        return self.shifted(1 / (1 + torch.exp(-normal_B.float())))

    def shifted(self, t):
        """Maps t so that the noise level l = 1 - t becomes shift l / (1 + (shift - 1) l); a number or a tensor.

        The more values tell of one thing (pixels of a large picture, frames of a clip), the more noise hides as much
        of it: Esser et al. 2024 (Stable Diffusion 3), eq. 23, with shift the root of how many times more.
        """
        return t if self.shift == 1 else t / (t + self.shift * (1 - t))

    def grid(self, steps: int) -> list[float]:
        """Times of ``steps`` solver steps, from 0 (noise) to 1 (data): even ones, shifted."""
        return [self.shifted(i / steps) for i in range(steps + 1)]

    def velocity(self, out: Tensor, x_t: Tensor, t) -> Tensor:
        """dx/dt at x_t from what the network put out: itself, or (data - x_t) / (1 - t).

        Data is the easier output where a patch has about as many values as a token has channels or more: noise fills
        all of them, data a few (Li and He 2025, "Back to Basics: Let Denoising Generative Models Denoise"). The loss
        stays that of the velocity, with 1 - t bounded as there. t is a number below 1 that is taken as it is, or a
        tensor that broadcasts and is bounded.
        """
        if self.predicts == "velocity":
            return out
        return (out - x_t) / ((1 - t).clamp(min=NEAREST) if isinstance(t, Tensor) else 1 - t)

    def network_time(self, t_B: Tensor) -> Tensor:
        """Gives the fp32 time that the timestep embedding sees."""
        return t_B.float() * self.time_scale

    def bins(self, t_B: Tensor, num: int) -> Tensor:
        """Sorts times into ``num`` equal bins of [0, 1), int64; t = 1 counts to the last."""
        return (t_B.double() * num).long().clamp(max=num - 1)

    def corrupt(self, x_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Gives the point at t on the path from noise to data."""
        t = over(t_B, x_BCHW)
        return t * x_BCHW + (1 - t) * noise_BCHW

    def loss(self, model, x_BCHW: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Computes loss_B, the mean squared error of the velocity x - noise, in at least fp32."""
        x, noise = at_least_fp32(x_BCHW), at_least_fp32(noise_BCHW)
        x_t = self.corrupt(x, t_B, noise)
        out = model(x_t, self.network_time(t_B)).to(x.dtype)
        assert out.shape == x.shape, f"the model puts out {tuple(out.shape)} where {tuple(x.shape)} is needed"
        t = over(t_B, x)
        # of an exact prediction the velocity is x - noise, also where 1 - t is bounded
        target = self.velocity(x, x_t, t) if self.predicts == "data" else x - noise
        return mean_per_sample((self.velocity(out, x_t, t) - target).square())
