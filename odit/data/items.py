"""Samples that are pictures or clips one by one, with captions or labels, whatever lists them: a table, tars."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from odit import random
from odit.data import clips
from odit.data.dataset import READ_KEY, sample_ids, split


class Items:
    """What such data sets share; a kind of them says where a sample is (``item``) and what is said of it
    (``captions_of``), and sets ``y_N`` and ``class_names`` where there are classes."""

    def __init__(
        self,
        num: int,
        size: tuple[int, ...],
        held_out: float,
        tokenize: Callable[[list[str]], Any] | None,
        interval: int,
    ):
        """``size`` is (H, W) of pictures or (T, H, W) of clips, whose frames are ``interval`` apart."""
        self.num, self.size, self.shape = num, tuple(size), (3, *size)
        self.interval, self.tokenize, self.decoder = interval, tokenize, clips.Decoder()
        self.y_N, self.class_names = torch.zeros(num, dtype=torch.int64), []
        self.train_ids, self.held_out_ids = split(num, held_out)
        self.found_sizes: Tensor | None = None

    def item(self, row: int) -> clips.Item:
        """Says where a sample's picture or clip is; raises BadSample for a sample without one."""
        raise NotImplementedError

    def captions_of(self, row: int) -> list[str]:
        """Captions of a sample, one or several; raises BadSample for a sample without one."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """0 where samples have no class."""
        return len(self.class_names)

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, Any]:
        """Reads samples by draw id: x (B, *shape) and labels (B,) or tokenized captions; raises BadSample for the first
        that cannot be read."""
        ids_B = torch.as_tensor(ids, dtype=torch.int64)
        rows = sample_ids(ids_B).tolist()
        x = clips.read_items(map(self.item, rows), ids_B, key, self.size, self.interval, self.decoder)
        if self.tokenize is None:
            return x, self.y_N[rows]
        return x, self.tokenize(choose_captions([self.captions_of(row) for row in rows], key, ids_B))

    def at(self, size: tuple[int, ...]):
        """The same samples at another size."""
        other = copy.copy(self)
        other.size, other.shape = tuple(size), (3, *size)
        return other

    def sizes(self) -> Tensor:
        """Looks at all headers, once: int64 (N, 3) of frames, height and width, zeros for what cannot be read."""
        if self.found_sizes is None:
            self.found_sizes = clips.item_sizes(self.num, self.item)
        return self.found_sizes


def choose_captions(captions: Sequence[list[str]], key: random.Key, ids_B: Tensor) -> list[str]:
    """Chooses one caption a sample, by draw id."""
    u_B = random.uniform(random.fold_in(key, "caption"), (), ids_B).tolist()
    return [some[int(u * len(some))] for some, u in zip(captions, u_B, strict=True)]
