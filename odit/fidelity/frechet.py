"""Gaussians fitted to features, and how far apart two of them are.

Sums over features are in fp64 and centred: a batch, or another rank's sums, is added by the update of Chan, Golub and
LeVeque (1983, "Algorithms for Computing the Sample Variance"), which loses nothing to a mean that is large beside the
spread. So batches may be cut and spread over ranks as one likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """A Gaussian, in fp64."""

    mean_D: Tensor
    cov_DD: Tensor
    """Unbiased, as numpy.cov gives it."""


class Sums(NamedTuple):
    """Features seen so far, in fp64: how many, their mean, and the sum of (x - mean)(x - mean)^T."""

    count: int
    mean_D: Tensor
    scatter_DD: Tensor


def nothing(dim: int, device: torch.device | None = None) -> Sums:
    """The sums of no features."""
    zeros = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    return Sums(0, zeros.new_zeros(dim), zeros)


def add(sums: Sums, features_ND: Tensor) -> Sums:
    """The sums with these features too."""
    num = len(features_ND)
    if num == 0:
        return sums
    x_ND = features_ND.double()
    mean_D = x_ND.mean(0)
    centred_ND, off_D = x_ND - mean_D, mean_D - sums.mean_D
    count = sums.count + num
    between = torch.outer(off_D, off_D) * (sums.count * num / count)
    scatter_DD = torch.addmm(sums.scatter_DD, centred_ND.T, centred_ND) + between
    return Sums(count, sums.mean_D + off_D * (num / count), scatter_DD)


def joined(sums: Sums, sum_across: Callable[[Tensor], Tensor]) -> Sums:
    """The sums over all ranks; ``sum_across`` adds a tensor over them."""
    count = int(sum_across(sums.mean_D.new_tensor([float(sums.count)])))
    mean_D = sum_across(sums.mean_D * sums.count) / max(1, count)
    off_D = sums.mean_D - mean_D
    scatter_DD = sum_across(sums.scatter_DD + torch.outer(off_D, off_D) * sums.count)
    return Sums(count, mean_D, scatter_DD)


def fitted(sums: Sums) -> Moments:
    """The Gaussian of what was summed; needs two samples or more."""
    assert sums.count > 1, f"a covariance of {sums.count} samples"
    return Moments(sums.mean_D, sums.scatter_DD / (sums.count - 1))


def moments(features_ND: Tensor) -> Moments:
    """The Gaussian of features; needs two samples or more."""
    return fitted(add(nothing(features_ND.shape[1], features_ND.device), features_ND))


def distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of two Gaussians, |a - b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0.

    A B is not symmetric, and a matrix square root of it loses digits or fails where A or B lacks rank. Its trace needs
    none: the eigenvalues of (A B)^(1/2) are those of (sqrt(A) B sqrt(A))^(1/2), which are the singular values of
    F^T G for any A = F F^T and B = G G^T. F and G come from symmetric eigenvalues, of which those that are rounding
    errors are left out: their square roots (1e-8 each, of hundreds in FID-10k's 2048 dims) would be most of the error.
    (Dowson and Landau 1982; used on features by Heusel et al. 2017.)
    """
    device = a.mean_D.device
    (mean_a_D, cov_a_DD), (mean_b_D, cov_b_DD) = (Moments(*(t.to(device).double() for t in m)) for m in (a, b))
    overlap = torch.linalg.svdvals(_factor(cov_a_DD).T @ _factor(cov_b_DD)).sum()
    found = (mean_a_D - mean_b_D).square().sum() + cov_a_DD.trace() + cov_b_DD.trace() - 2 * overlap
    return max(0.0, float(found))


def _factor(cov_DD: Tensor) -> Tensor:
    """F (D, rank) with F F^T the covariance."""
    value_D, vector_DD = torch.linalg.eigh(cov_DD)
    # numpy.linalg.matrix_rank's bound; sums of few dims err by more than D roundings
    least = max(len(value_D), 256) * torch.finfo(torch.float64).eps * value_D[-1].clamp(min=0)
    kept_D = value_D > least
    return vector_DD[:, kept_D] * value_D[kept_D].sqrt()
