"""Fine-tuning: which leaves of a model train, and low-rank adapters beside its matrices (LoRA, Hu et al. 2021).

An adapter of a matrix w (O, I) is two declared leaves beside it, ``lora.a`` (R, I) and ``lora.b`` (O, R), and the model
computes with w + (alpha / R) b a. To ZeRO, checkpoints and the EMA they are leaves as any other; the sum is made block
by block, where a block is run, so that no second copy of all weights stands. In half precision that sum is rounded to
the working dtype like any weight. Letters: R rank of the adapters, the others as in models/dit.py.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from odit import param, tree
from odit.ops import Ops, hands_on_any
from odit.param import Param

BLOCKS = "blocks"
ADAPTER = "lora"
EVERYTHING = ("all",)
SUBBLOCKS = ("space", "time")  # a time x space model's two blocks of a pair


@dataclass(frozen=True)
class Config:
    """What of a model trains."""

    train: tuple[str, ...] = EVERYTHING
    """Patterns of leaves that train, such as label.* final.* blocks.*.cross.*; the others keep their values. 'all' is
    every leaf, and with adapters these alone; patterns come on top of adapters."""
    lora_rank: int = 0
    """Rank of the adapters (R); 0 is none."""
    lora_alpha: float | None = None
    """Adapters act with alpha / R; None is R."""
    lora_targets: tuple[str, ...] = ("qkv", "out", "mlp")
    """Parts of a block whose matrices get adapters, such as qkv, out, mlp, mlp.fc1, cross, adaln."""
    strict: bool = False
    """Refuses --init-from weights unless each tensor is there with its shape and its classes, and no other."""

    @property
    def scale(self) -> float:
        """Factor on b a."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank


def check(cfg: Config, started: bool) -> None:
    """Refuses settings no run can use; ``started`` says whether the run starts from weights. Raises ValueError."""
    if cfg.lora_rank < 0:
        raise ValueError(f"finetune.lora_rank is {cfg.lora_rank}: use 1 or more, or 0 for no adapters")
    if cfg.lora_alpha is not None and not cfg.lora_rank:
        raise ValueError(f"finetune.lora_alpha is {cfg.lora_alpha} but finetune.lora_rank is 0: use a rank, such as 8")
    if cfg.lora_alpha is not None and not (math.isfinite(cfg.lora_alpha) and cfg.lora_alpha > 0):
        raise ValueError(f"finetune.lora_alpha is {cfg.lora_alpha}: use a positive number, such as {cfg.lora_rank}")
    if cfg.lora_targets != Config.lora_targets and not cfg.lora_rank:
        named = " ".join(cfg.lora_targets)
        raise ValueError(f"finetune.lora_targets is {named} but finetune.lora_rank is 0: use a rank, such as 8")
    if cfg.lora_rank and not cfg.lora_targets:
        raise ValueError(f"finetune.lora_rank is {cfg.lora_rank} but finetune.lora_targets is empty: name some, as qkv")
    if not cfg.train:
        raise ValueError("finetune.train is empty: use all, or patterns such as label.* final.*")
    if "all" in cfg.train and len(cfg.train) > 1:
        raise ValueError(f"finetune.train is {' '.join(cfg.train)}: use all alone, or patterns without it")
    given = {"lora_rank": cfg.lora_rank, "train": cfg.train != EVERYTHING, "strict": cfg.strict}
    if not started and (names := [name for name, value in given.items() if value]):
        raise ValueError(f"finetune.{names[0]} is set but nothing is fine-tuned: give weights with --init-from")


def trained(cfg: Config, declared: dict) -> tuple[bool, ...]:
    """Which leaves train, in the order of ``tree.leaves``; raises ValueError for a pattern that matches none."""
    paths = tree.paths(declared)
    if cfg.train == EVERYTHING:
        return tuple(not cfg.lora_rank or is_adapter(path) for path in paths)
    for pattern in cfg.train:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, [*_prefixes(paths), *paths], 3, 0.3)
            raise ValueError(f"finetune.train {pattern} matches no leaf of this model: the nearest are {_list(near)}")
    return tuple(is_adapter(path) or any(fnmatch.fnmatchcase(path, p) for p in cfg.train) for path in paths)


def _prefixes(paths: list[str]) -> list[str]:
    """Patterns of whole sub-trees: label.*, blocks.*.qkv.*, ..."""
    found = set()
    for path in paths:
        names = ["*" if name.isdigit() else name for name in path.split(".")]
        found |= {".".join([*names[:n], "*"]) for n in range(1, len(names)) if names[n - 1] != "*"}
    return sorted(found)


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


def is_adapter(path: str) -> bool:
    """Whether a leaf belongs to an adapter."""
    return path.split(".")[-2:-1] == [ADAPTER]


def select(t: tree.Tree, chosen: tuple[bool, ...]) -> list:
    """The chosen leaves of a tree."""
    return [leaf for leaf, is_chosen in zip(tree.leaves(t), chosen, strict=True) if is_chosen]


def declare(cfg: Config, declared: dict) -> dict:
    """A model's declaration with adapters; raises ValueError for a target that names no matrix of a block."""
    if not cfg.lora_rank:
        return declared
    named = {name for block in declared[BLOCKS] for name in _matrices(block)}
    for target in cfg.lora_targets:
        if not any(_meant(target, name) for name in named):
            known = sorted({part for name in named for part in (_inner(name), _inner(name).split(".")[0])})
            raise ValueError(
                f"finetune.lora_targets {target} is no matrix of a block of this model: use some of {_list(known)}"
            )
    return {**declared, BLOCKS: [_declare_block(cfg, block) for block in declared[BLOCKS]]}


def _declare_block(cfg: Config, node: Any, name: str = "") -> Any:
    if not isinstance(node, dict):
        return node
    found = {key: _declare_block(cfg, child, f"{name}.{key}" if name else key) for key, child in node.items()}
    if _is_matrix(node) and any(_meant(target, name) for target in cfg.lora_targets):
        found[ADAPTER] = _adapter(node["w"], len(node["b"].shape), cfg.lora_rank)
    return found


def _matrices(node: Any, name: str = "") -> Iterator[str]:
    """Names of a block's parts that hold a matrix and its bias."""
    if isinstance(node, dict):
        if _is_matrix(node):
            yield name
        for key, child in node.items():
            yield from _matrices(child, f"{name}.{key}" if name else key)


def _is_matrix(node: dict) -> bool:
    return "w" in node and "b" in node


def _inner(name: str) -> str:
    first, _, rest = name.partition(".")
    return rest if first in SUBBLOCKS else name


def _meant(target: str, name: str) -> bool:
    """Whether a target names a matrix or a part that holds it, with or without space. or time. before it."""
    return any(f"{found}.".startswith(f"{target}.") for found in (name, _inner(name)))


def _adapter(w: Param, num_out: int, rank: int) -> dict:
    """a, Gaussian of variance 1 / I, and b, zero; ``num_out`` of w's dims are outputs. Dims keep w's letters."""
    fan_in = math.prod(w.shape[num_out:])
    return {
        "a": Param((rank, *w.shape[num_out:]), "r" + w.dims[num_out:], param.normal(fan_in**-0.5)),
        "b": Param((*w.shape[:num_out], rank), w.dims[:num_out] + "r", param.zeros),
    }


def merge(p: Any, scale: float) -> Any:
    """The plain model's parameters: each w with an adapter becomes w + scale * b a, and adapters are gone."""
    if isinstance(p, list):
        return [merge(child, scale) for child in p]
    if not isinstance(p, dict):
        return p
    found = {key: merge(child, scale) for key, child in p.items() if key != ADAPTER}
    if ADAPTER in p:
        found["w"] = merged(p["w"], p[ADAPTER]["a"], p[ADAPTER]["b"], scale)
    return found


def merged(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """w + scale * b a, shaped as w: b (*out, R), a (R, *in)."""
    return w + scale * (b.flatten(0, -2) @ a.flatten(1)).view(w.shape)


def adapted(ops: Ops, scale: float) -> Ops:
    """The record whose ``layers`` merges a block's weights where it runs the block; around compiled ``layers``."""

    def layers(block: Callable, params: list, x: Any, *args: Any) -> Any:
        return ops.layers(_merging(block, scale), params, x, *args)

    return replace(ops, layers=layers if ops.sums else hands_on_any(layers))


@functools.lru_cache(maxsize=64)
def _merging(block: Callable, scale: float) -> Callable:
    """One object per block, which compiles once."""

    def merging(p: dict, x: Any, *args: Any) -> Any:
        return block(merge(p, scale), x, *args)

    return merging


def describe(cfg: Config, declared: dict) -> list[str]:
    """Lines on what trains, where that is not everything."""
    if cfg == replace(Config(), strict=cfg.strict):
        return []
    chosen, lines = trained(cfg, declared), []
    if cfg.lora_rank:
        num = sum(map(is_adapter, tree.paths(declared))) // 2
        lines.append(
            f"lora: {num} adapters of rank {cfg.lora_rank}, alpha {cfg.scale * cfg.lora_rank:g}, "
            f"on {' '.join(cfg.lora_targets)}; ema.safetensors will hold merged weights of the plain model"
        )
    parts = select(declared, chosen)
    total, few = param.count(declared), sum(p.size for p in parts)
    lines.append(
        f"trained: {len(parts)} of {len(chosen)} leaves, {few / 1e6:.3f} M of {total / 1e6:.3f} M parameters; "
        "the others are frozen"
    )
    return lines
