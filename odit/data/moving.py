"""Clips of one handwritten digit that moves in one of eight directions, with captions that name both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from odit import random
from odit.data.captioned import draw_wordings, hash_of, word
from odit.data.dataset import READ_KEY
from odit.data.digits import Digits

SIDE = 8  # of a digit
# (rows down, columns right) of direction i, at i eighths of a turn from right; down is positive, as rows are counted.
DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
WAYS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")
TO = tuple(way.replace("right", "to the right").replace("left", "to the left") for way in WAYS)
# {a}, {word} and {numeral} as in captioned; {way} is "up and left", {to} "up and to the left".
WORDINGS = (
    "a handwritten {word} moving {to}",
    "a handwritten {numeral} moving {way}",
    "the digit {numeral} drifting {way}",
    "the digit {word} drifting {to}",
    "{a} {word} written by hand, going {way}",
    "{a} {numeral} written by hand that goes {to}",
    "number {word} sliding {to}",
    "the number {numeral} slides {way}",
    "{a} {numeral} that travels {to}",
    "{word}, travelling {way}",
)
HELD_OUT_WORDINGS = (
    "please make {a} {numeral} wander {to}",
    "{word}, pencilled by somebody, floats {way}",
    "watch the figure {numeral} head {way}",
    "a short film: {word} on its way {to}",
    "some scribbled sign, {a} {word}, shifting {way}",
)


class MovingDigits:
    """Sample 8 * p + d is digit picture p of ``Digits`` moving in direction d; held out are the held-out pictures.

    The digit moves by whole pixels and stays whole in every frame. ``size`` - 8 is its room: it crosses all of that
    along each axis it moves on, and is in the middle of the other.
    """

    def __init__(
        self, held_out: float, tokenize: Callable[[list[str]], dict[str, Tensor]], frames: int = 16, size: int = 16
    ):
        if frames < 2:
            raise ValueError(f"clips of {frames} frames cannot show a digit that moves: use 2 or more")
        if size < 2 * SIDE:
            raise ValueError(f"frames of side {size} leave a digit of 8 x 8 no room to move: use 16 or more")
        self.digits, self.tokenize = Digits(held_out), tokenize
        self.shape, self.num_classes, self.class_names = (1, frames, size, size), 0, []
        self.train_ids, self.held_out_ids = (
            (pictures[:, None] * len(DIRECTIONS) + torch.arange(len(DIRECTIONS))).flatten()
            for pictures in (self.digits.train_ids, self.digits.held_out_ids)
        )

    def read(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> tuple[Tensor, dict[str, Tensor]]:
        """Reads the samples of draw ids: x (B, 1, T, H, W) and their tokenized captions."""
        ids_B = torch.as_tensor(ids, dtype=torch.int64)
        _, T, size, _ = self.shape
        corner_BTX = self.corners(ids_B)
        row_BTh, column_BTw = (corner_BTX[..., axis, None] + torch.arange(SIDE) for axis in (0, 1))
        clip_BT = torch.arange(len(ids_B) * T).reshape(-1, T)
        pixel_BThw = (clip_BT[..., None, None] * size + row_BTh[..., None]) * size + column_BTw[..., None, :]
        x_BCTHW = torch.full((len(ids_B), *self.shape), -1.0)
        x_BCTHW.view(-1)[pixel_BThw] = self.digits.x_NCHW[self._pictures(ids_B)].expand(-1, T, -1, -1)
        return x_BCTHW, self.tokenize(self.captions(ids_B, key))

    def corners(self, ids: list[int] | Tensor) -> Tensor:
        """Row and column (B, T, 2) int64 of the digit's upper left pixel in every frame.

        Frame t has gone round(room * t / (T - 1)) pixels, halves rounded up.
        """
        _, T, size, _ = self.shape
        room = size - SIDE
        gone_T = (2 * room * torch.arange(T) + T - 1) // (2 * (T - 1))
        sign_BX = torch.tensor(DIRECTIONS)[self.directions(ids)]
        start_BX = torch.tensor((room, room // 2, 0))[sign_BX + 1]
        return start_BX[:, None] + sign_BX[:, None] * gone_T[:, None]

    def captions(self, ids: list[int] | Tensor, key: random.Key = READ_KEY) -> list[str]:
        """Words the captions of draw ids; ``key`` and the draw id choose the wording."""
        ids_B = torch.as_tensor(ids, dtype=torch.int64)
        which_B = draw_wordings(len(WORDINGS), ids_B, key)
        columns = (which_B, self.labels(ids_B), self.directions(ids_B))
        return [_word(WORDINGS[w], digit, direction) for w, digit, direction in zip(*(c.tolist() for c in columns))]

    def labels(self, ids: list[int] | Tensor) -> Tensor:
        """Looks up the digits (B,) int64 that draw ids show."""
        return self.digits.y_N[self._pictures(ids)]

    def directions(self, ids: list[int] | Tensor) -> Tensor:
        """Tells the directions (B,) int64, an index into ``DIRECTIONS``, that draw ids move in."""
        return (torch.as_tensor(ids, dtype=torch.int64) & random.MASK) % len(DIRECTIONS)

    def _pictures(self, ids: list[int] | Tensor) -> Tensor:
        return (torch.as_tensor(ids, dtype=torch.int64) & random.MASK) // len(DIRECTIONS)

    def prompts(self, num: int) -> tuple[list[str], Tensor, Tensor]:
        """Words ``num`` captions in held-out wordings, with the digits and the directions (num,) int64 they ask for.

        Digits and directions both come in turn; each run of 80 has every pair of them once, and each run of
        80 * len(HELD_OUT_WORDINGS) every pair in every wording.
        """
        i_N = torch.arange(num)
        digits_N = i_N % 10
        directions_N = (i_N + i_N // 40) % 8  # 40 is where both turns end together: shifted, they meet other partners
        which_N = (digits_N + directions_N + i_N // 80) % len(HELD_OUT_WORDINGS)
        columns = (which_N, digits_N, directions_N)
        prompts = [_word(HELD_OUT_WORDINGS[w], digit, way) for w, digit, way in zip(*(c.tolist() for c in columns))]
        return prompts, digits_N, directions_N

    def fingerprint(self) -> str:
        """Hashes pixels, labels, the clips' shape and the wordings trained on; the tokenizer is the run's business."""
        return hash_of(self.digits.fingerprint(), str(self.shape), "crosses all", *WORDINGS, *WAYS)


def _word(wording: str, digit: int, direction: int) -> str:
    return word(wording, digit, way=WAYS[direction], to=TO[direction])
