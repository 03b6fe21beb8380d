"""Captions as bytes: a tokenizer that needs no vocabulary file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BEGIN, PAD = 256, 257  # tokens 0..255 are the bytes themselves
VOCABULARY = 258


@dataclass(frozen=True)
class Bytes:
    """Makes UTF-8 bytes of captions, S = ``length`` tokens each: begin, bytes, padding.

    The empty caption is the begin token alone: the null condition of guidance.
    """

    length: int

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"captions of {self.length} tokens have no room for the begin token: use 1 or more")

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns tokens (B, S) int64 and mask (B, S) bool, False at padding; cuts what is longer, between characters.

        Raises UnicodeEncodeError for a caption that has no UTF-8 form (a lone surrogate).
        """
        rows = [[BEGIN, *_cut(caption, self.length - 1)] for caption in captions]
        padded = [row + [PAD] * (self.length - len(row)) for row in rows]
        tokens_BS = torch.tensor(padded, dtype=torch.int64).reshape(len(rows), self.length)
        return {"tokens": tokens_BS, "mask": tokens_BS != PAD}


def _cut(caption: str, num_bytes: int) -> bytes:
    # Of valid UTF-8 cut anywhere, only the last character can be broken: decoding drops it.
    return caption.encode()[:num_bytes].decode(errors="ignore").encode()
