"""diffusers' DiTTransformer2DModel: its state dict and config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from odit import nn
from odit.convert.parts import (
    INSTEAD,
    KINDS,
    Part,
    Table,
    dense,
    depth,
    outputs,
    ratio,
    read,
    read_parts,
    refuse_pictures,
    values,
    write_parts,
)
from odit.models import dit
from odit.models.dit import Config, Shape

EXPECTED = {  # what DiTTransformer2DModel may be told and a DiT is not
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
INTEGERS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
DEFAULTS = (
    EXPECTED | INTEGERS | {"out_channels": None, "norm_eps": 1e-5}
)  # DiTTransformer2DModel.__init__, diffusers 0.42
SAME_DEFAULT = ("dropout", "norm_eps", "out_channels")  # in Transformer2DModel too, see from_diffusers
MOST = 1 << 16  # of any number in a config.json
NULL = 1000  # class_null of DiTPipeline.__call__, diffusers 0.42, however many classes there are
DROPOUT = 0.1  # of CombinedTimestepLabelEmbeddings: diffusers' label table always has a null row


def from_diffusers(state: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict, Config, Shape]:
    """Reads a DiTTransformer2DModel's state dict and config.json: (params, cfg, shape) that compute what it computes.

    Files older than diffusers 0.29 name the class Transformer2DModel; they are the same model.

    Raises:
        ValueError: what is no DiT, naming the entry or tensor, and an embedder's copies that differ, naming both.
    """
    kind = config.get("_class_name", "DiTTransformer2DModel")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise ValueError(
            f"config.json is of a {kind}: only DiTTransformer2DModel and LatteTransformer3DModel can be read"
        )
    needed = {} if kind == "DiTTransformer2DModel" else DEFAULTS.keys() - set(SAME_DEFAULT)
    if missing := sorted(key for key in needed if key not in config):
        raise ValueError(f"config.json of a {kind} has no {missing[0]}, whose default is not a DiT's: add it")
    config = DEFAULTS | config
    check_config(config, EXPECTED, INTEGERS, "dit")
    D = config["num_attention_heads"] * config["attention_head_dim"]
    hidden = read(state, "transformer_blocks.0.ff.net.0.proj.weight", 2).shape[0]
    C = config["in_channels"]
    cfg = Config(
        width=D,
        depth=num_layers(state, config, "transformer_blocks"),
        heads=config["num_attention_heads"],
        patch=config["patch_size"],
        mlp_ratio=ratio(D, hidden),
        label_dropout=DROPOUT,
        timestep_freqs="diffusers",
        mlp_eps=config["norm_eps"],
    )
    shape = Shape(C, config["sample_size"], config["num_embeds_ada_norm"], outputs(config["out_channels"] or C, C))
    dit.check(cfg, shape)
    _, rows, columns = cfg.grid(shape.size)
    tables = {"pos_embed.pos_embed": Table((1, rows * columns, D), lambda: nn.sincos_2d(rows, columns, D))}
    return read_parts(state, _parts(cfg, shape), cfg, shape, tables), cfg, shape


def check_config(config: dict, expected: dict, integers: dict | tuple, arch: str) -> None:
    """Refuses a config.json that is not of our model, and numbers that are none."""
    for key, value in expected.items():
        if config[key] != value:
            raise ValueError(
                f"config.json has {key} {config[key]!r} and a {KINDS[arch]} has {value!r}: no such model can be read"
            )
    for key in integers:
        if type(config[key]) is not int or not 1 <= config[key] <= MOST:
            raise ValueError(f"config.json has {key} {config[key]!r}: it must be a positive integer up to {MOST}")
    if not isinstance(config["norm_eps"], float):
        raise ValueError(f"config.json has norm_eps {config['norm_eps']!r}: it must be a number, such as 1e-5")


def num_layers(state: dict[str, Tensor], config: dict, prefix: str) -> int:
    """Blocks under ``prefix``, which config.json and the weights must say alike."""
    found = depth(state, prefix)
    if config["num_layers"] != found:
        raise ValueError(f"config.json has num_layers {config['num_layers']} and the weights have {found}")
    return found


def to_diffusers(
    params: dict, cfg: Config, shape: Shape, allow_other_timesteps: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Makes a DiTTransformer2DModel's (state dict, config.json); all embedder copies are one tensor.

    The rate of label dropout is not kept (diffusers trains with 0.1).

    Raises:
        ValueError: what diffusers cannot represent; ``allow_other_timesteps`` lets timestep frequencies differ.
    """
    refuse(cfg, shape, allow_other_timesteps)
    config = DEFAULTS | {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.head_size,
        "in_channels": shape.channels,
        "out_channels": shape.channels * shape.outputs,
        "num_layers": cfg.depth,
        "sample_size": shape.size[0],
        "patch_size": cfg.patch,
        "num_embeds_ada_norm": shape.num_classes,
        "norm_eps": cfg.mlp_eps,
    }
    return write_parts(params, _parts(cfg, shape)), config


def refuse(cfg: Config, shape: Shape, allow_other_timesteps: bool = False) -> None:
    """Raises ValueError for what DiTTransformer2DModel cannot represent."""
    refuse_pictures(cfg, shape, "diffusers", "diffusers", allow_other_timesteps)
    if not cfg.label_dropout:
        raise ValueError(
            "diffusers' label table has a null label and model.label_dropout 0 has none: "
            "train with --model.label-dropout 0.1, or export with to_dit"
        )
    if cfg.ffn != 4 * cfg.width:
        raise ValueError(
            f"diffusers' DiT has an ffn of 4 x width and model.mlp_ratio is {cfg.mlp_ratio}: "
            f"train with --model.mlp-ratio 4, or export with to_dit"
        )


def pad_labels(params: dict, shape: Shape) -> tuple[dict, Shape]:
    """Puts the null label where DiTPipeline looks for it, in row 1000: the rows between are copies of it.

    Raises:
        ValueError: more classes than that.
    """
    if shape.num_classes > NULL:
        raise ValueError(
            f"the model has {shape.num_classes} classes and DiTPipeline takes {NULL} for the null label: {INSTEAD}"
        )
    table_VD, num = params["label"]["w"], shape.num_classes
    padded_VD = torch.cat([table_VD[:num], table_VD[num:].expand(NULL + 1 - num, -1)])
    return {**params, "label": {"w": padded_VD}}, replace(shape, num_classes=NULL)


def trim_labels(params: dict, shape: Shape, num: int) -> tuple[dict, Shape]:
    """Undoes ``pad_labels`` for a model of ``num`` classes; leaves rows alone that are no copies."""
    table_VD = params["label"]["w"]
    if not 0 < num < shape.num_classes or not torch.equal(table_VD[num:-1], table_VD[-1:].expand_as(table_VD[num:-1])):
        return params, shape
    return {**params, "label": {"w": table_VD[: num + 1]}}, replace(shape, num_classes=num)


def _parts(cfg: Config, shape: Shape) -> list[Part]:
    D, P = cfg.width, cfg.patch
    parts = dense("pos_embed.proj", "patch", D, (shape.channels, P, P))
    for i in range(cfg.depth):
        name, path = f"transformer_blocks.{i}", f"blocks.{i}"
        parts += [
            *dense(f"{name}.norm1.emb.timestep_embedder.linear_1", "time.fc1", D, (dit.FREQUENCIES,)),
            *dense(f"{name}.norm1.emb.timestep_embedder.linear_2", "time.fc2", D, (D,)),
            Part(f"{name}.norm1.emb.class_embedder.embedding_table.weight", (dit.num_labels(cfg, shape), D), "label.w"),
            *dense(f"{name}.norm1.linear", f"{path}.adaln", 6 * D, (D,)),
            *block_parts(name, path, cfg),
        ]
    return [
        *parts,
        *dense("proj_out_1", "final.adaln", 2 * D, (D,)),
        *dense("proj_out_2", "final.out", values(cfg, shape), (D,)),
    ]


def block_parts(name: str, path: str, cfg: Config) -> list[Part]:
    """Self-attention and feed-forward of diffusers' BasicTransformerBlock."""
    D, F = cfg.width, cfg.ffn
    return [
        *dense(f"{name}.attn1.to_q", f"{path}.qkv", D, (D,), 0),
        *dense(f"{name}.attn1.to_k", f"{path}.qkv", D, (D,), 1),
        *dense(f"{name}.attn1.to_v", f"{path}.qkv", D, (D,), 2),
        *dense(f"{name}.attn1.to_out.0", f"{path}.out", D, (D,)),
        *dense(f"{name}.ff.net.0.proj", f"{path}.mlp.fc1", F, (D,)),
        *dense(f"{name}.ff.net.2", f"{path}.mlp.fc2", D, (F,)),
    ]
