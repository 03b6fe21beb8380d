"""Settings as JSON: written, read again with every value held to its type, and compared with those of another run."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from odit.config import Parallel

# Settings that a resumed run may change: none of them changes what the run means. (ring_fp8 rounds what is computed.)
FREE = {
    *("out", "stop_at", "micro_batch", "resume", "init_from", "replay", "crashes", "log_every", "checkpoint_every"),
    *("checkpoint_async", "keep", "finetune.strict"),
    *(
        "sample_every",
        "validate_every",
        "validation_draws",
        "grad_norms",
        "evaluate",
        "progress",
        "kernels",
        "compile",
        "graphs",
        "deterministic",
    ),
    *("device", "threads", "sampling", "evaluation", "data.workers", "data.path", "data.bad_budget"),
    *("encoders.text_path", "encoders.vae", "encoders.vae_path", "encoders.place"),  # their fingerprints are compared
    *(f"parallel.{setting.name}" for setting in dataclasses.fields(Parallel) if setting.name != "ring_fp8"),
}


def first_difference(a: Any, b: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """(dotted key, value in a, value in b) of the first setting that two runs' JSON differ in and that is not free."""
    for name in {**a, **b}:
        path, x, y = _join(key, name), a.get(name), b.get(name)
        if path in FREE or x == y:
            continue
        if isinstance(x, dict) and isinstance(y, dict):
            if found := first_difference(x, y, path):
                return found
        else:
            return path, x, y
    return None


def to_json(value: Any) -> Any:
    """Turns a config into what json can write."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def from_json(cls: type, found: Any, key: str = "") -> Any:
    """Builds a config of type ``cls`` from what json read.

    Raises:
        ValueError: an unknown key (with the nearest name) or a value of the wrong type, named by its dotted key.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{key or 'config'} is {found!r}: use an object of {cls.__name__}'s settings")
    hints = typing.get_type_hints(cls)
    for name in found:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(hints)}"
            raise ValueError(f"{_join(key, name)} is no setting of this version: {hint}")
    return cls(**{name: _value(hints[name], value, _join(key, name)) for name, value in found.items()})


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _value(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, key)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            if type(None) in args:
                return None
        else:
            return _value(next(a for a in args if a is not type(None)), value, key)
    elif origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise ValueError(f"{key} is {value!r}: use one of {', '.join(map(str, args))}")
    elif origin is tuple:
        args = args[:1] * len(value) if args[-1] is Ellipsis and isinstance(value, (list, tuple)) else args
        if isinstance(value, (list, tuple)) and len(value) == len(args):
            return tuple(_value(a, v, key) for a, v in zip(args, value))
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{key} is {value!r} ({type(value).__name__}): use a value of type {name}")
