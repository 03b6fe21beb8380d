"""The handwritten digits with captions: one of several wordings a draw, and wordings kept for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from odit import random
from odit.data.dataset import READ_KEY
from odit.data.digits import Digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ARTICLES = ("a", "a", "a", "a", "a", "a", "a", "a", "an", "a")  # an eight
# {a} is the article, {word} "seven", {numeral} "7".
WORDINGS = (
    "a handwritten {word}",
    "a handwritten {numeral}",
    "the digit {numeral}",
    "the digit {word}",
    "{a} {word} written by hand",
    "{a} {numeral} written by hand",
    "number {word} in handwriting",
    "the number {numeral}, handwritten",
    "a picture of the digit {word}",
    "a small picture of {a} {numeral}",
    "somebody wrote {a} {word}",
    "{word}",
)
HELD_OUT_WORDINGS = (
    "please draw {a} {numeral}",
    "{word}, pencilled by somebody",
    "this here is the figure {numeral}",
    "show me how people write {word}",
    "some scribbled sign: {a} {word}",
)


class DigitsText:
    """``Digits`` with a caption for a label; samples, their order and the split are those of ``Digits``."""

    def __init__(self, held_out: float, tokenize: Callable[[list[str]], dict[str, Tensor]]):
        self.digits, self.tokenize = Digits(held_out), tokenize
        self.shape, self.num_classes, self.class_names = self.digits.shape, 0, []
        self.train_ids, self.held_out_ids = self.digits.train_ids, self.digits.held_out_ids

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, dict[str, Tensor]]:
        """Reads the samples of draw ids: x (B, 1, 8, 8) and their tokenized captions."""
        ids_B = torch.as_tensor(ids, dtype=torch.int64)
        return self.digits.x_NCHW[ids_B & random.MASK], self.tokenize(self.captions(ids_B, key))

    def captions(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> list[str]:
        """Words the captions of draw ids; ``key`` and the draw id choose the wording."""
        ids_B = torch.as_tensor(ids, dtype=torch.int64)
        which_B = draw_wordings(len(WORDINGS), ids_B, key)
        return [word(WORDINGS[w], digit) for w, digit in zip(which_B.tolist(), self.labels(ids_B).tolist())]

    def labels(self, ids: list[int] | Tensor) -> Tensor:
        """Looks up the digits (B,) int64 that draw ids show."""
        return self.digits.y_N[torch.as_tensor(ids, dtype=torch.int64) & random.MASK]

    def prompts(self, num: int) -> tuple[list[str], Tensor]:
        """Words ``num`` captions in held-out wordings, with the digits (num,) int64 they ask for.

        Digits come in turn; each run of 10 * len(HELD_OUT_WORDINGS) has every digit in every wording once.
        """
        i_N = torch.arange(num)
        digits_N = i_N % 10
        which_N = (digits_N + i_N // 10) % len(HELD_OUT_WORDINGS)
        prompts = [word(HELD_OUT_WORDINGS[w], digit) for w, digit in zip(which_N.tolist(), digits_N.tolist())]
        return prompts, digits_N

    def fingerprint(self) -> str:
        """Hashes pixels, labels and the wordings trained on; the tokenizer is the run's business."""
        return hash_of(self.digits.fingerprint(), *WORDINGS)


def word(wording: str, digit: int, **more: str) -> str:
    """Fills a wording's {a}, {word} and {numeral}, and whatever ``more`` names."""
    return wording.format(a=ARTICLES[digit], word=WORDS[digit], numeral=digit, **more)


def draw_wordings(num: int, ids_B: Tensor, key: random.Key) -> Tensor:
    """Draws which of ``num`` wordings (B,) each draw id gets."""
    return random.bits(random.fold_in(key, "phrasing"), (), ids_B) % num


def hash_of(*parts: str) -> str:
    """Hashes strings."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
