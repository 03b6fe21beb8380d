"""The byte-level text encoder trained along with a model: a small pre-LayerNorm transformer (Xiong et al. 2020).

It needs no download and no tokenizer file. A byte's embedding has those of the n-grams that end there added, looked up
by their hash (Pagnoni et al. 2024, "Byte Latent Transformer", section 3.2.1): words need not be spelled out by
attention first. N-grams stay within a word and the blanks around it (Bojanowski et al. 2017, "Enriching Word Vectors
with Subword Information"), so that a word reads alike in every wording. Letters: B samples, S bytes of a caption, D
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from odit import nn, param
from odit.data.tokens import BEGIN, VOCABULARY
from odit.models.config import Config
from odit.ops import attend_masked, mlp, out, qkv
from odit.param import Param

NGRAMS = (2, 3, 4, 5, 6)
BUCKETS = 8192
BLANK = ord(" ")
PRIME = 1_000_003  # of the rolling polynomial hash, in int64 without overflow while reduced by the modulus below
MODULUS = (1 << 31) - 1


def declare(cfg: Config) -> dict:
    """Declares the encoder, of the model's own width and head size."""
    D, H, K, F = cfg.width, cfg.heads, cfg.head_size, 4 * cfg.width
    dense = param.dense

    def layer() -> dict:
        return {
            "norm1": param.norm(D),
            "qkv": {
                "w": Param((3, H, K, D), "3hkD", param.xavier(D, 3 * D)),
                "b": Param((3, H, K), "3hk", param.zeros),
            },
            "out": {"w": Param((D, H, K), "Dhk", param.xavier(D, D)), "b": Param((D,), "D", param.zeros)},
            "norm2": param.norm(D),
            "mlp": {"fc1": dense(F, "fD", D), "fc2": dense(D, "Df", F)},
        }

    return {
        "embed": Param((VOCABULARY, D), "vD", param.normal(0.02)),
        "ngrams": Param((BUCKETS, D), "vD", param.normal(0.02)),
        "layers": [layer() for _ in range(cfg.text_depth)],
        "norm": param.norm(D),
    }


def encode(p: dict, tokens_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Maps bytes to features (B, S, D) and one of each caption (B, D); padding is seen by nobody.

    A caption's own is the normalised mean of what is normalised a byte for the others: bytes of words that were never
    trained on are small and stay so.
    """
    x = nn.embed_label(tokens_BS, p["embed"])
    for places_BS, within_BS in ngrams(tokens_BS):
        x = x + nn.embed_label(places_BS, p["ngrams"]) * within_BS[..., None]
    x = x + 0.02 * _places(x.shape[1], x.shape[2], x.device, x.dtype)  # about as large as what they are added to
    for layer in p["layers"]:
        q, k, v = qkv(nn.layer_norm(x, layer["norm1"]), layer["qkv"], ())
        x = x + out(attend_masked(q, k, v, mask_BS), layer["out"])
        x = x + mlp(nn.layer_norm(x, layer["norm2"]), layer["mlp"])
    kept_BS1 = mask_BS[..., None].to(x.dtype)
    mean_BD = (x * kept_BS1).sum(1) / kept_BS1.sum(1)
    return nn.layer_norm(x, p["norm"]), nn.layer_norm(mean_BD, p["norm"])


@nn.kept
def _places(length: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return nn.sincos_1d(torch.arange(length), width).to(device, dtype)


def ngrams(tokens_BS: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each n, the rows (B, S) int64 of the n-grams that end at each byte, and whether (B, S) they have no blank but
    at their ends. A caption begins with a blank, and before that stands nothing (0)."""
    tokens_BS = torch.where(tokens_BS == BEGIN, BLANK, tokens_BS)
    found, hashed, earlier = [], tokens_BS + 1, tokens_BS + 1
    within = torch.ones_like(tokens_BS, dtype=torch.bool)
    for n in range(2, max(NGRAMS) + 1):
        if n > 2:
            within = within & (earlier != BLANK + 1)  # the first byte of n - 1 is now inside
        earlier = torch.nn.functional.pad(earlier, (1, 0))[:, :-1]
        hashed = (hashed * PRIME + earlier) % MODULUS
        if n in NGRAMS:
            found.append((hashed % BUCKETS, within))
    return found
