"""Improved precision and recall: is a sample within reach of the real pictures, and these within reach of samples?

Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models". A set's manifold is
the union of balls around its features, each as wide as the distance to its k-th nearest neighbour in the set.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

K = 3  # ADM's and the paper's choice
ELEMENTS = 1 << 26  # of one block of distances: 256 MB in fp32


def precision_recall(real_MD: Tensor, samples_ND: Tensor, k: int = K, elements: int = ELEMENTS) -> tuple[float, float]:
    """(fraction of samples in a ball around a real picture, fraction of real pictures in a ball around a sample).

    ADM's definition. It rounds features to fp16 before it takes distances, which moves its figures in the third
    decimal; here distances are in the features' own dtype, at least fp32. Memory is bounded by ``elements`` distances.
    Raises ValueError for sets that have no k-th neighbour.
    """
    for name, x in (("real pictures", real_MD), ("samples", samples_ND)):
        if len(x) <= k:
            raise ValueError(f"precision and recall need more than {k} {name}: {len(x)} are there")
    dtype = torch.promote_types(real_MD.dtype, torch.float32)
    centre_D = real_MD.to(dtype).mean(0)  # distances stay, and the squares that they are differences of get smaller
    real_MD, samples_ND = (x.to(dtype) - centre_D for x in (real_MD, samples_ND.to(real_MD.device)))
    return (
        _covered(samples_ND, real_MD, _radii(real_MD, k, elements), elements),
        _covered(real_MD, samples_ND, _radii(samples_ND, k, elements), elements),
    )


def _radii(x_ND: Tensor, k: int, elements: int) -> Tensor:
    """Squared distance (N,) of each row to its k-th nearest other row."""
    # the smallest of all is a row's own
    return torch.cat([rows.kthvalue(k + 1, 1).values for rows in _distances(x_ND, x_ND, elements)])


def _covered(x_ND: Tensor, centres_MD: Tensor, radii_M: Tensor, elements: int) -> float:
    """The fraction of rows that lie in some ball."""
    inside = [(rows <= radii_M).any(1) for rows in _distances(x_ND, centres_MD, elements)]
    return float(torch.cat(inside).double().mean())


def _distances(x_ND: Tensor, y_MD: Tensor, elements: int) -> Iterator[Tensor]:
    """Squared distances of rows of x to all of y, block by block."""
    y_norm_M = y_MD.square().sum(1)
    for rows in x_ND.split(max(1, elements // len(y_MD))):
        yield (rows.square().sum(1, keepdim=True) - 2 * rows @ y_MD.T + y_norm_M).clamp(min=0)
