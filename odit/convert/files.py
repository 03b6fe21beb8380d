"""Files and folders of weights: .pt files that run no code, and the folders of diffusers' models."""

from __future__ import annotations

import argparse
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from odit.convert.diffusers import from_diffusers, to_diffusers
from odit.convert.latte import TEXT_LENGTH, from_diffusers_latte, to_diffusers_latte
from odit.models.config import Config, Shape

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"


def read_pt(path: str | Path, which: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """Reads a state dict from a .pt file, tensors alone and mapped into memory: no code in the file is run.

    A training checkpoint of facebookresearch/DiT (``{"model", "ema", "opt", "args"}``) holds two; ``which`` says whose.
    The tensors stay backed by the file (copied on write), so replace it rather than writing into it.

    Raises:
        ValueError: whatever else the file is, in one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: give the path of a .pt file")
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        raise ValueError(
            f"{path} is no .pt file of torch 1.6 or later, or is cut short: fetch it again, or load and save it once "
            f"with a current torch"
        ) from None
    _fits(path, claimed, size)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the "args" of DiT's checkpoints: a bare record
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken or hostile file may raise nearly anything
        asked = re.search(r"[Uu]nsupported \w+:? (?:GLOBAL )?([\w.]*\w)", str(error))
        reason = f"it asks for {asked[1]}" if asked else (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} holds more than tensors, or is broken ({reason}): nothing of it was run") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("model", loaded.get("ema")), dict):
        if which not in loaded:
            raise ValueError(f"{path} has no {which!r}, only {[*loaded]}: pass which= one of them")
        loaded = loaded[which]
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path} holds a {type(loaded).__name__} and no state dict")
    if others := [name for name, tensor in loaded.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{path} is no state dict: {others[0]!r} is a {type(loaded[others[0]]).__name__}")
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{path}: {name} is no plain tensor ({tensor.layout}, {tensor.device}, {tensor.dtype})")
    # One tensor may stand under many names, as to_diffusers' embedders do; it is in the file once.
    _fits(
        path, sum(nbytes for _, nbytes in {(t.data_ptr(), t.numel() * t.element_size()) for t in loaded.values()}), size
    )
    return {str(name): tensor.detach() for name, tensor in loaded.items()}


def write_pt(path: str | Path, state: dict[str, Tensor]) -> None:
    """Writes a state dict as torch.save does, whole or not at all."""
    _replace(
        Path(path), lambda temporary: torch.save({name: _own(tensor) for name, tensor in state.items()}, temporary)
    )


def save_diffusers(
    folder: str | Path, params: dict, cfg: Config, shape: Shape, allow_other_timesteps: bool = False
) -> None:
    """Writes the folder that ``from_pretrained`` of diffusers' DiTTransformer2DModel opens, or of its
    LatteTransformer3DModel: config.json and safetensors weights."""
    make = to_diffusers_latte if cfg.arch == "latte" else to_diffusers
    state, config = make(params, cfg, shape, allow_other_timesteps)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _own(tensor, always=True) for name, tensor in state.items()}  # safetensors refuses shared memory
    metadata = {"format": "pt"}
    _replace(folder / f"{WEIGHTS}.safetensors", lambda to: safetensors.torch.save_file(state, to, metadata))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    _replace(folder / CONFIG, lambda temporary: temporary.write_text(text))


def load_diffusers(folder: str | Path, text_length: int = TEXT_LENGTH) -> tuple[dict, Config, Shape]:
    """Reads what ``save_diffusers`` or diffusers wrote: (params, cfg, shape). A pipeline's folder serves as well.

    Args:
        text_length: tokens of a caption, where the model is a Latte (see ``from_diffusers_latte``).
    Raises:
        ValueError: what is missing, broken, or neither a DiT nor a Latte.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() and (folder / "transformer" / CONFIG).is_file():
        folder = folder / "transformer"
    weights, pickled = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"
    try:
        config = json.loads((folder / CONFIG).read_text())
    except OSError:
        raise ValueError(f"{folder} has no {CONFIG}: it is no folder of a diffusers model") from None
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON ({error})") from None
    if type(config) is not dict:
        raise ValueError(f"{folder / CONFIG} holds a {type(config).__name__} and should hold an object")
    if weights.is_file():
        try:
            state = safetensors.torch.load_file(weights)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{weights} is no safetensors file, or is broken ({error})") from None
    elif pickled.is_file():
        state = read_pt(pickled)
    else:
        raise ValueError(f"{folder} has neither {weights.name} nor {pickled.name}")
    if config.get("_class_name") == "LatteTransformer3DModel":
        return from_diffusers_latte(state, config, text_length)
    return from_diffusers(state, config)


def _fits(path: Path, claimed: int, size: int) -> None:
    if claimed > size:
        raise ValueError(f"{path} claims {claimed} bytes of tensors and has {size}: it is broken or crafted")


def _own(tensor: Tensor, always: bool = False) -> Tensor:
    """On the CPU, contiguous, and with no memory but its own, which is what savers write."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and not always else tensor.clone()


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
