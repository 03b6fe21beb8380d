"""The 1,797 handwritten digits that come with scikit-learn: 8 x 8 pixels of 17 levels, ten classes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from odit import random
from odit.data.dataset import READ_KEY, sample_ids, split

# scikit-learn has them from Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), test part.


class Digits:
    """All digits in memory; level v of 0..16 is stored as v / 8 - 1."""

    def __init__(self, held_out: float):
        from sklearn.datasets import load_digits

        self.shape, self.num_classes = (1, 8, 8), 10
        self.class_names = [str(digit) for digit in range(10)]
        levels, labels = load_digits(return_X_y=True)
        self.x_NCHW = torch.from_numpy(levels).float().reshape(-1, 1, 8, 8) / 8 - 1
        self.y_N = torch.from_numpy(labels).long()
        self.train_ids, self.held_out_ids = split(len(self.y_N), held_out)

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, Tensor]:
        """Copies samples out of memory."""
        ids = sample_ids(ids)
        return self.x_NCHW[ids], self.y_N[ids]

    def fingerprint(self) -> str:
        """Hashes pixels and labels."""
        digest = hashlib.blake2b(self.x_NCHW.numpy().tobytes(), digest_size=16)
        digest.update(self.y_N.numpy().tobytes())
        return digest.hexdigest()
