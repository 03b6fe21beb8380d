"""Latents that cost nothing to store: keyed standard normals, for measuring speed without a dataset."""

from __future__ import annotations

from torch import Tensor

from odit import random
from odit.data.dataset import READ_KEY, sample_ids, split

NUM_SAMPLES = 2**20
KEY = random.fold_in(random.key(0), "odit.data synthetic")


class Synthetic:
    """Sample i is drawn from (KEY, i): values and, with classes, a uniform label."""

    def __init__(self, shape: tuple[int, ...], num_classes: int, held_out: float):
        self.shape, self.num_classes = shape, num_classes
        self.class_names = [str(label) for label in range(num_classes)]
        self.train_ids, self.held_out_ids = split(NUM_SAMPLES, held_out)

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, Tensor]:
        """Draws samples."""
        ids = sample_ids(ids)
        x_BCHW = random.normal(random.fold_in(KEY, "x"), self.shape, ids)
        y_B = random.bits(random.fold_in(KEY, "y"), (), ids) % max(1, self.num_classes)
        return x_BCHW, y_B

    def fingerprint(self) -> str:
        """Names the distribution."""
        return f"synthetic {self.shape} {self.num_classes} {NUM_SAMPLES}"
