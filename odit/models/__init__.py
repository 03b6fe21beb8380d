"""Models: a file each with ``declare(cfg, shape)``, ``forward(params, x, t, y, cfg, ops)``, ``macs(cfg, shape)``,
``time_space(cfg, size)`` and ``joined(params)``; all are built from one Config and one Shape (config.py)."""

from __future__ import annotations

from types import ModuleType

from odit import param
from odit.models import dit, latte
from odit.models.config import Config, Shape

MODELS = {"dit": dit, "latte": latte}


def of(cfg: Config) -> ModuleType:
    """The module of a config's architecture."""
    return MODELS[cfg.arch]


def num_tokens(cfg: Config, size: tuple[int, ...]) -> int:
    """Tokens of a sample (L)."""
    frames, rows, columns = cfg.grid(size)
    return frames * rows * columns


def num_params(cfg: Config, shape: Shape) -> tuple[int, int]:
    """(all, trainable) parameters; the fixed position tables are what papers count and no run trains."""
    trainable = param.count(of(cfg).declare(cfg, shape))
    frames, rows, columns = cfg.grid(shape.size)
    places = rows * columns + (frames if len(shape.size) == 3 else 0)
    return trainable + (places * cfg.width if cfg.positions == "sincos" else 0), trainable
