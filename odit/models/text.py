"""The byte-level text encoder trained along with a model: a small pre-LayerNorm transformer (Xiong et al. 2020).

It needs no download and no tokenizer file. Letters: B samples, S bytes of a caption, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from odit import nn, param
from odit.models.config import Config
from odit.ops import attend_masked, mlp, out, qkv
from odit.param import Param

VOCABULARY = 258
"""256 bytes, a begin token before each caption, and padding."""


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
        "layers": [layer() for _ in range(cfg.text_depth)],
        "norm": param.norm(D),
    }


def encode(p: dict, tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Maps bytes to features (B, S, D); padding is seen by nobody."""
    x = nn.embed_label(tokens_BS, p["embed"])
    positions = nn.sincos_1d(torch.arange(x.shape[1]), x.shape[2]).to(x)
    x = x + 0.02 * positions  # about as large as what they are added to
    for layer in p["layers"]:
        q, k, v = qkv(nn.layer_norm(x, layer["norm1"]), layer["qkv"], ())
        x = x + out(attend_masked(q, k, v, mask_BS), layer["out"])
        x = x + mlp(nn.layer_norm(x, layer["norm2"]), layer["mlp"])
    return nn.layer_norm(x, p["norm"])
