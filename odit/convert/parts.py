"""What every format is made of: the list of its parts, export and import by it, and what a state dict's shapes tell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from odit import models, tree
from odit.models.config import Config, Shape

KINDS = {"dit": "DiT", "latte": "Latte"}
INSTEAD = "use odit's own weights file"


class Table(NamedTuple):
    """A fixed position table that a file may hold: (1, num, D), made where it is compared (fp64)."""

    shape: tuple[int, int, int]
    make: Callable[[], Tensor]


class Part(NamedTuple):
    """One foreign tensor: ``leaf(path)[index].reshape(shape)``, the whole leaf where index is None.

    A path may have several whole parts (diffusers copies the embedders into each block); they must be equal.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: int | None = None


def dense(name: str, path: str, fan_out: int, fan_in: tuple[int, ...], index: int | None = None) -> list[Part]:
    """A matrix and its bias."""
    return [
        Part(f"{name}.weight", (fan_out, *fan_in), f"{path}.w", index),
        Part(f"{name}.bias", (fan_out,), f"{path}.b", index),
    ]


def write_parts(params: dict, parts: list[Part]) -> dict[str, Tensor]:
    """The foreign state dict; its tensors are views of the parameters."""
    leaves = dict(tree.items(params))
    assert leaves.keys() == {part.path for part in parts}, "cfg and shape are not those of the parameters"
    return {
        part.name: (leaves[part.path] if part.index is None else leaves[part.path][part.index]).reshape(part.shape)
        for part in parts
    }


def read_parts(
    state: dict[str, Tensor], parts: list[Part], cfg: Config, shape: Shape, tables: dict[str, Table]
) -> dict:
    """The parameters that ``parts`` say; each tensor must be there with its shape, and none more but the fixed position
    ``tables``, which must be those given."""
    found: dict[str, list[tuple[Part, Tensor]]] = {}
    for part in parts:
        tensor = read(state, part.name, len(part.shape))
        if tensor.shape != part.shape:
            raise ValueError(f"{part.name} has shape {tuple(tensor.shape)} and should have {part.shape}")
        found.setdefault(part.path, []).append((part, tensor))
    if unknown := sorted(state.keys() - {part.name for part in parts} - tables.keys()):
        raise ValueError(
            f"{unknown[0]} (one of {len(unknown)} such) is no tensor of a {KINDS[cfg.arch]}: no such model can be read"
        )
    for name in tables.keys() & state.keys():
        _check_table(state[name], tables[name], name)
    leaves = {path: _one_leaf(group) for path, group in found.items()}
    declared = models.of(cfg).declare(cfg, shape)
    return tree.map_with_path(lambda path, p: leaves[path].reshape(p.shape), declared)


def _one_leaf(group: list[tuple[Part, Tensor]]) -> Tensor:
    """The slices of one leaf on top of each other, or the one tensor that all its copies must be."""
    (first, tensor), *others = group
    if first.index is not None:
        return torch.stack([other for _, other in group])
    for part, other in others:
        if other.dtype != tensor.dtype or not torch.equal(tensor, other):
            raise ValueError(
                f"{part.name} differs from {first.name}: odit has one embedder for all blocks, so that blocks "
                f"trained apart cannot be read"
            )
    return tensor


def _check_table(found: Tensor, table: Table, name: str) -> None:
    if found.shape != table.shape:
        raise ValueError(f"{name} has shape {tuple(found.shape)} and should have {table.shape}")
    # Entries are at most 1: half an epsilon of rounding, and as much for a library's own sine.
    bound = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    error = (found.double() - table.make()[None].to(found.device)).abs().max().item()
    if not error <= bound:
        raise ValueError(
            f"{name} differs by {error:.2g} from the sine-cosine table of {table.shape[1]} positions, where rounding "
            f"explains {bound:.2g}: odit computes the table, so that a trained or resized one cannot be read"
        )


def read(state: dict[str, Tensor], name: str, rank: int) -> Tensor:
    """One tensor of a state dict, of that many dims."""
    tensor = state.get(name)
    if tensor is None:
        raise ValueError(f"{name} is missing: the weights are not whole, or those of another model")
    if tensor.ndim != rank or not tensor.is_floating_point():
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} and should be a floating-point tensor of "
            f"{rank} dims"
        )
    return tensor


def depth(state: dict[str, Tensor], prefix: str) -> int:
    """Blocks whose tensors stand under ``prefix``."""
    return len({match[1] for name in state if (match := re.match(rf"{prefix}\.(\d+)\.", name))})


def ratio(width: int, hidden: int) -> float:
    """The mlp_ratio whose ffn is ``hidden``: the quotient, or its upper neighbour where rounding falls below."""
    found = hidden / width
    return found if int(width * found) == hidden else math.nextafter(found, math.inf)


def outputs(values: int, one: int) -> int:
    """Values out a channel, of ``values`` where one a channel makes ``one``."""
    if values not in (one, 2 * one):
        raise ValueError(
            f"the final layer has {values} values where a DiT has {one}, or {2 * one} with learned variance"
        )
    return values // one


def values(cfg: Config, shape: Shape) -> int:
    """Values out a token."""
    return cfg.patch**2 * shape.channels * shape.outputs


def refuse_options(cfg: Config, target: str, plain: dict) -> None:
    """Refuses options that a format has no names for."""
    for name, value in plain.items():
        if getattr(cfg, name) != value:
            raise ValueError(f"model.{name} is {getattr(cfg, name)} and {target} has only {value}: {INSTEAD}")


def refuse_timesteps(cfg: Config, target: str, freqs: str, allow_other_timesteps: bool) -> None:
    """Refuses timestep frequencies that no weight tells, unless the difference is accepted."""
    if cfg.timestep_freqs != freqs and not allow_other_timesteps:
        raise ValueError(
            f"model.timestep_freqs is {cfg.timestep_freqs} and {target} computes those of {freqs}, so that its outputs "
            "will differ: pass allow_other_timesteps=True (--allow-other-timesteps) to accept that, or train with "
            f"--model.timestep-freqs {freqs}"
        )


def refuse_pictures(cfg: Config, shape: Shape, target: str, freqs: str, allow_other_timesteps: bool) -> None:
    """Refuses what neither DiT format can represent: they are of square pictures with classes."""
    if len(shape.size) != 2 or shape.size[0] != shape.size[1]:
        raise ValueError(f"samples are {'x'.join(map(str, shape.size))} and {target} has square pictures: {INSTEAD}")
    plain = {"arch": "dit", "adaln": "zero", "qk_norm": False, "positions": "sincos", "mlp": "gelu"}
    refuse_options(cfg, target, plain)
    if shape.text_length:
        raise ValueError(f"the model has captions of {shape.text_length} tokens and {target} only labels: {INSTEAD}")
    if not shape.num_classes:
        raise ValueError(f"the model is unconditional and {target} always has labels: {INSTEAD}")
    refuse_timesteps(cfg, target, freqs, allow_other_timesteps)
