"""facebookresearch/DiT's state dict."""

from __future__ import annotations

import math

from torch import Tensor

from odit import diffusion, nn
from odit.convert.parts import (
    INSTEAD,
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
from odit.ops import EPS


def from_dit(
    state: dict[str, Tensor], heads: int | None = None, label_dropout: float = 0.1
) -> tuple[dict, Config, Shape]:
    """Reads a facebookresearch/DiT state dict: (params, cfg, shape), the tensors being views of the given ones.

    Args:
        heads: H, which no tensor's shape tells; needed unless the width is one of the paper's.
        label_dropout: what the model was trained with; 0 means that the last row of the label table is a class too.
    Raises:
        ValueError: what is no DiT, naming the tensor.
    """
    D, C, patch, _ = read(state, "x_embedder.proj.weight", 4).shape
    rows = read(state, "y_embedder.embedding_table.weight", 2).shape[0]
    hidden = read(state, "blocks.0.mlp.fc1.weight", 2).shape[0]
    table = read(state, "pos_embed", 3)
    width_out = read(state, "final_layer.linear.weight", 2).shape[0]
    side = math.isqrt(table.shape[1])
    if side**2 != table.shape[1]:
        raise ValueError(
            f"pos_embed has {table.shape[1]} tokens, which is no square: odit's DiT is for square pictures"
        )
    if rows <= (label_dropout > 0):
        raise ValueError(
            f"y_embedder.embedding_table.weight has {rows} row, the null label's: such a model has no classes"
        )
    cfg = Config(
        width=D,
        depth=depth(state, "blocks"),
        heads=_heads(D) if heads is None else heads,
        patch=patch,
        mlp_ratio=ratio(D, hidden),
        label_dropout=label_dropout,
    )
    shape = Shape(C, (side * patch, side * patch), rows - (label_dropout > 0), outputs(width_out, patch**2 * C))
    dit.check(cfg, shape)
    tables = {"pos_embed": Table((1, side * side, D), lambda: nn.sincos_2d(side, side, D))}
    return read_parts(state, _parts(cfg, shape), cfg, shape, tables), cfg, shape


def to_dit(params: dict, cfg: Config, shape: Shape, allow_other_timesteps: bool = False) -> dict[str, Tensor]:
    """Makes a facebookresearch/DiT state dict, the fixed position table included.

    Raises:
        ValueError: what that code cannot represent; ``allow_other_timesteps`` lets timestep frequencies differ.
    """
    refuse_pictures(cfg, shape, "facebookresearch/DiT", "dit", allow_other_timesteps)
    if cfg.mlp_eps != EPS:
        raise ValueError(
            f"facebookresearch/DiT normalises with epsilon {EPS} and this model's mlp with {cfg.mlp_eps}: "
            f"to accept the difference pass dataclasses.replace(cfg, mlp_eps={EPS})"
        )
    side = shape.size[0] // cfg.patch
    table = nn.sincos_2d(side, side, cfg.width).to(params["patch"]["w"])
    return write_parts(params, _parts(cfg, shape)) | {"pos_embed": table[None]}


def check_objective(cfg: diffusion.Config) -> None:
    """Raises ValueError for what facebookresearch/DiT's code does not sample by: no tensor tells the objective."""
    known = {"objective": ("eps",), "betas": (None, "linear"), "train_steps": (None, 1000)}
    for name, served in known.items():
        if (found := getattr(cfg, name)) not in served:
            raise ValueError(
                f"diffusion.{name} is {found} and facebookresearch/DiT samples by {served[-1]}, which its files do not "
                f"tell: {INSTEAD}"
            )


def _parts(cfg: Config, shape: Shape) -> list[Part]:
    D, F, P = cfg.width, cfg.ffn, cfg.patch
    parts = [
        *dense("x_embedder.proj", "patch", D, (shape.channels, P, P)),
        *dense("t_embedder.mlp.0", "time.fc1", D, (dit.FREQUENCIES,)),
        *dense("t_embedder.mlp.2", "time.fc2", D, (D,)),
        Part("y_embedder.embedding_table.weight", (dit.num_labels(cfg, shape), D), "label.w"),
    ]
    for i in range(cfg.depth):
        name, path = f"blocks.{i}", f"blocks.{i}"
        parts += [
            *dense(f"{name}.attn.qkv", f"{path}.qkv", 3 * D, (D,)),
            *dense(f"{name}.attn.proj", f"{path}.out", D, (D,)),
            *dense(f"{name}.mlp.fc1", f"{path}.mlp.fc1", F, (D,)),
            *dense(f"{name}.mlp.fc2", f"{path}.mlp.fc2", D, (F,)),
            *dense(f"{name}.adaLN_modulation.1", f"{path}.adaln", 6 * D, (D,)),
        ]
    return [
        *parts,
        *dense("final_layer.adaLN_modulation.1", "final.adaln", 2 * D, (D,)),
        *dense("final_layer.linear", "final.out", values(cfg, shape), (D,)),
    ]


def _heads(width: int) -> int:
    for _, published, heads in dit.SIZES.values():
        if published == width:
            return heads
    widths = sorted(width for _, width, _ in dit.SIZES.values())
    raise ValueError(
        f"width {width} is none of the published {widths}, and no tensor tells the heads: pass heads= (--foreign.heads)"
    )
