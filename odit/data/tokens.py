"""Bytes as tokens: captions for the text encoder that is trained along with a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BEGIN, PAD = 256, 257
VOCABULARY = 258


@dataclass(frozen=True)
class Bytes:
    """Captions to {"tokens" (B, S) int64, "mask" (B, S) bool}: a begin token, then UTF-8, cut at a whole character."""

    length: int
    """S."""

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        """Tokens of captions; the empty one is the begin token alone."""
        tokens_BS = torch.full((len(captions), self.length), PAD, dtype=torch.int64)
        mask_BS = torch.zeros(len(captions), self.length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            text = caption.encode()[: self.length - 1].decode(errors="ignore").encode()
            tokens_BS[row, : len(text) + 1] = torch.tensor([BEGIN, *text])
            mask_BS[row, : len(text) + 1] = True
        return {"tokens": tokens_BS, "mask": mask_BS}
