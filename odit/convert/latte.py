"""diffusers' LatteTransformer3DModel (Latte-1 of text to video): its state dict and config.json.

It is ``Config(arch="latte", adaln="single", text="cross")`` on square clips with captions of a frozen encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from odit import nn
from odit.convert.diffusers import block_parts, check_config, num_layers
from odit.convert.parts import (
    INSTEAD,
    Part,
    Table,
    dense,
    outputs,
    ratio,
    read,
    read_parts,
    refuse_options,
    refuse_timesteps,
    values,
    write_parts,
)
from odit.models import config as model_config
from odit.models import dit
from odit.models.config import Config, Shape
from odit.ops import EPS

EXPECTED = {  # what LatteTransformer3DModel may be told and a Latte is not
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
INTEGERS = (
    *("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "cross_attention_dim", "sample_size"),
    *("patch_size", "caption_channels", "video_length"),
)
DEFAULTS = {  # LatteTransformer3DModel.__init__, diffusers 0.42
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "in_channels": None,
    "out_channels": None,
    "num_layers": 1,
    "dropout": 0.0,
    "cross_attention_dim": None,
    "attention_bias": False,
    "sample_size": 64,
    "patch_size": None,
    "activation_fn": "geglu",
    "num_embeds_ada_norm": None,
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "caption_channels": None,
    "video_length": 16,
}
STRETCHED = 128  # sample_size from which diffusers divides positions by sample_size // 64
TEXT_LENGTH = 120  # T5 tokens of LattePipeline


def from_diffusers_latte(
    state: dict[str, Tensor], config: dict[str, Any], text_length: int = TEXT_LENGTH
) -> tuple[dict, Config, Shape]:
    """Reads a LatteTransformer3DModel's state dict and config.json: (params, cfg, shape) that compute what it computes.

    Args:
        text_length: tokens of a caption (S), which neither tells and no parameter depends on.
    Raises:
        ValueError: what is no Latte, naming the entry or tensor.
    """
    kind = config.get("_class_name", "LatteTransformer3DModel")
    if kind != "LatteTransformer3DModel":
        raise ValueError(f"config.json is of a {kind} and should be of a LatteTransformer3DModel")
    if text_length < 1:
        raise ValueError(f"text_length is {text_length}: use 1 or more, such as {TEXT_LENGTH}")
    config = DEFAULTS | config
    check_config(config, EXPECTED, INTEGERS, "latte")
    D, C = config["num_attention_heads"] * config["attention_head_dim"], config["in_channels"]
    _check_latte_config(config, D)
    hidden = read(state, "transformer_blocks.0.ff.net.0.proj.weight", 2).shape[0]
    num_layers(state, config, "temporal_transformer_blocks")
    cfg = Config(
        arch="latte",
        width=D,
        depth=2 * num_layers(state, config, "transformer_blocks"),
        heads=config["num_attention_heads"],
        patch=config["patch_size"],
        mlp_ratio=ratio(D, hidden),
        text="cross",
        adaln="single",
    )
    shape = Shape(
        channels=C,
        size=(config["video_length"], config["sample_size"], config["sample_size"]),
        outputs=outputs(config["out_channels"] or C, C),
        text_length=text_length,
        text_width=config["caption_channels"],
    )
    model_config.check(cfg, shape)
    frames, rows, columns = cfg.grid(shape.size)
    tables = {
        "pos_embed.pos_embed": Table((1, rows * columns, D), lambda: nn.sincos_2d(rows, columns, D)),
        "temp_pos_embed": Table((1, frames, D), lambda: nn.sincos_1d(torch.arange(frames), D)),
    }
    return read_parts(state, _parts(cfg, shape), cfg, shape, tables), cfg, shape


def _check_latte_config(config: dict, width: int) -> None:
    if config["cross_attention_dim"] != width:
        raise ValueError(
            f"config.json has cross_attention_dim {config['cross_attention_dim']} and captions are projected to the "
            f"width, {width}: no such model can be read"
        )
    if config["norm_eps"] != EPS:
        raise ValueError(
            f"config.json has norm_eps {config['norm_eps']} and a Latte's attention normalises with {EPS}: "
            "no such model can be read"
        )
    if config["sample_size"] >= STRETCHED:
        raise ValueError(
            f"config.json has sample_size {config['sample_size']}, where diffusers divides positions by "
            f"{config['sample_size'] // 64}, and a Latte can be read up to {STRETCHED - 1}"
        )


def to_diffusers_latte(
    params: dict, cfg: Config, shape: Shape, allow_other_timesteps: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Makes a LatteTransformer3DModel's (state dict, config.json).

    The rate of caption dropout and the number of a caption's tokens are not kept: diffusers' model knows neither.

    Raises:
        ValueError: what diffusers cannot represent; ``allow_other_timesteps`` lets timestep frequencies differ.
    """
    refuse(cfg, shape, allow_other_timesteps)
    config = DEFAULTS | EXPECTED
    config |= {
        "_class_name": "LatteTransformer3DModel",
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.head_size,
        "in_channels": shape.channels,
        "out_channels": shape.channels * shape.outputs,
        "num_layers": cfg.depth // 2,
        "cross_attention_dim": cfg.width,
        "sample_size": shape.size[1],
        "patch_size": cfg.patch,
        "norm_eps": EPS,
        "caption_channels": shape.text_width,
        "video_length": shape.size[0],
    }
    return write_parts(params, _parts(cfg, shape)), config


def refuse(cfg: Config, shape: Shape, allow_other_timesteps: bool = False) -> None:
    """Raises ValueError for what LatteTransformer3DModel cannot represent."""
    target = "diffusers' Latte"
    plain = {"arch": "latte", "adaln": "single", "text": "cross", "qk_norm": False, "positions": "sincos"}
    refuse_options(cfg, target, plain | {"mlp": "gelu", "frame_patch": 1, "mlp_eps": EPS})
    if shape.size[1] != shape.size[2]:
        raise ValueError(f"clips are {'x'.join(map(str, shape.size))} and {target} has square frames: {INSTEAD}")
    if shape.size[1] >= STRETCHED:
        raise ValueError(
            f"clips have a side of {shape.size[1]}, where {target} divides positions by {shape.size[1] // 64}, "
            f"and odit's are whole: {INSTEAD}"
        )
    if shape.num_classes or not shape.text_width:
        has = f"{shape.num_classes} classes" if shape.num_classes else "no captions of a frozen encoder"
        raise ValueError(f"the model has {has} and {target} always has such captions and nothing else: {INSTEAD}")
    if cfg.ffn != 4 * cfg.width:
        raise ValueError(f"{target} has an ffn of 4 x width and model.mlp_ratio is {cfg.mlp_ratio}: {INSTEAD}")
    refuse_timesteps(cfg, target, "dit", allow_other_timesteps)


def _parts(cfg: Config, shape: Shape) -> list[Part]:
    D, P = cfg.width, cfg.patch
    parts = [
        *dense("pos_embed.proj", "patch", D, (shape.channels, P, P)),
        *dense("adaln_single.emb.timestep_embedder.linear_1", "time.fc1", D, (dit.FREQUENCIES,)),
        *dense("adaln_single.emb.timestep_embedder.linear_2", "time.fc2", D, (D,)),
        *dense("adaln_single.linear", "adaln", 6 * D, (D,)),
        *dense("caption_projection.linear_1", "text.fc1", D, (shape.text_width,)),
        *dense("caption_projection.linear_2", "text.fc2", D, (D,)),
    ]
    for i in range(cfg.depth // 2):
        for name, path in (("transformer_blocks", "space"), ("temporal_transformer_blocks", "time")):
            name, path = f"{name}.{i}", f"blocks.{i}.{path}"
            parts += [Part(f"{name}.scale_shift_table", (6, D), f"{path}.table"), *block_parts(name, path, cfg)]
        parts += _cross_parts(f"transformer_blocks.{i}.attn2", f"blocks.{i}.space.cross", D)
    return [
        *parts,
        Part("scale_shift_table", (2, D), "final.table"),
        *dense("proj_out", "final.out", values(cfg, shape), (D,)),
    ]


def _cross_parts(name: str, path: str, D: int) -> list[Part]:
    return [
        *dense(f"{name}.to_q", f"{path}.q", D, (D,)),
        *dense(f"{name}.to_k", f"{path}.kv", D, (D,), 0),
        *dense(f"{name}.to_v", f"{path}.kv", D, (D,), 1),
        *dense(f"{name}.to_out.0", f"{path}.out", D, (D,)),
    ]
