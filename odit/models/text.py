"""The byte-level text encoder trained along with a model: a small pre-LayerNorm transformer (Xiong et al. 2020).

It needs no download and no tokenizer file. A byte's embedding has those of the n-grams that end there added, looked up
by their hash (Pagnoni et al. 2024, "Byte Latent Transformer", section 3.2.1): words need not be spelled out by
attention first. Letters: B samples, S bytes of a caption, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from odit import nn, param
from odit.data.tokens import VOCABULARY
from odit.models.config import Config
from odit.ops import attend_masked, mlp, out, qkv
from odit.param import Param

NGRAMS = (2, 3, 4, 5, 6)
BUCKETS = 8192
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
    """Maps bytes to features (B, S, D) and their mean over each caption (B, D); padding is seen by nobody."""
    x = nn.embed_label(tokens_BS, p["embed"])
    for places_BS in hashes(tokens_BS):
        x = x + nn.embed_label(places_BS, p["ngrams"])
    positions = nn.sincos_1d(torch.arange(x.shape[1]), x.shape[2]).to(x)
    x = x + 0.02 * positions  # about as large as what they are added to
    for layer in p["layers"]:
        q, k, v = qkv(nn.layer_norm(x, layer["norm1"]), layer["qkv"], ())
        x = x + out(attend_masked(q, k, v, mask_BS), layer["out"])
        x = x + mlp(nn.layer_norm(x, layer["norm2"]), layer["mlp"])
    x = nn.layer_norm(x, p["norm"])
    kept_BS1 = mask_BS[..., None].to(x.dtype)
    return x, (x * kept_BS1).sum(1) / kept_BS1.sum(1)


def hashes(tokens_BS: Tensor) -> list[Tensor]:
    """Rows (B, S) int64 of the n-grams that end at each byte, for each n; before a caption stands nothing (0)."""
    found, hashed, earlier = [], tokens_BS + 1, tokens_BS + 1
    for n in range(2, max(NGRAMS) + 1):
        earlier = torch.nn.functional.pad(earlier, (1, 0))[:, :-1]
        hashed = (hashed * PRIME + earlier) % MODULUS
        if n in NGRAMS:
            found.append(hashed % BUCKETS)
    return found
