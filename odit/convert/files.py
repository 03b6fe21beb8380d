"""Files and folders of weights: .pt files that run no code, and the folders of diffusers' models."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from odit.convert.diffusers import from_diffusers, to_diffusers, trim_labels
from odit.convert.latte import TEXT_LENGTH, from_diffusers_latte, to_diffusers_latte
from odit.models.config import Config, Shape
from odit.storage import set_usual_mode, whole, writing

CONFIG, WEIGHTS, INDEX = "config.json", "diffusion_pytorch_model", "model_index.json"


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
            entries = archive.infolist()
    except zipfile.BadZipFile:
        raise ValueError(
            f"{path} is no .pt file of torch 1.6 or later, or is cut short: fetch it again, or load and save it once "
            f"with a current torch"
        ) from None
    if outside := [entry.filename for entry in entries if not _is_inside(entry.filename)]:
        raise ValueError(
            f"{path} names {outside[0]!r}, which lies outside it: it is crafted, and nothing of it was run"
        )
    _fits(path, sum(entry.file_size for entry in entries), size)
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
    """Writes a state dict as torch.save does, whole or not at all; raises StorageError."""
    path, state = Path(path), {name: _own(tensor) for name, tensor in state.items()}
    # a file of Python's, as torch's own does not tell why it could not be written
    with writing(path, _size(state)), whole(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def save_diffusers(
    folder: str | Path, params: dict, cfg: Config, shape: Shape, allow_other_timesteps: bool = False
) -> None:
    """Writes the folder that ``from_pretrained`` of diffusers' DiTTransformer2DModel opens, or of its
    LatteTransformer3DModel: config.json and safetensors weights. Raises StorageError."""
    make = to_diffusers_latte if cfg.arch == "latte" else to_diffusers
    state, config = make(params, cfg, shape, allow_other_timesteps)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _own(tensor, always=True) for name, tensor in state.items()}  # safetensors refuses shared memory
    weights, metadata = folder / f"{WEIGHTS}.safetensors", {"format": "pt"}
    with writing(weights, _size(state)), whole(weights) as temporary:
        safetensors.torch.save_file(state, temporary, metadata)
        set_usual_mode(temporary)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with writing(folder / CONFIG, len(text)), whole(folder / CONFIG) as temporary:
        temporary.write_text(text)


def load_diffusers(folder: str | Path, text_length: int = TEXT_LENGTH) -> tuple[dict, Config, Shape]:
    """Reads what ``save_diffusers`` or diffusers wrote: (params, cfg, shape). A pipeline's folder serves as well.

    Args:
        text_length: tokens of a caption, where the model is a Latte (see ``from_diffusers_latte``).
    Raises:
        ValueError: what is missing, broken, or neither a DiT nor a Latte.
    """
    folder = outer = Path(folder)
    if not (folder / CONFIG).is_file() and (folder / "transformer" / CONFIG).is_file():
        folder = folder / "transformer"
    config = read_json(folder / CONFIG)
    state = _read_state(folder)
    if config.get("_class_name") == "LatteTransformer3DModel":
        return from_diffusers_latte(state, config, text_length)
    params, cfg, shape = from_diffusers(state, config)
    if names := class_names(outer):
        params, shape = trim_labels(params, shape, len(names))
    return params, cfg, shape


def class_names(folder: str | Path) -> list[str] | None:
    """The id2label of a DiTPipeline's folder, in the order of the classes; None where it has none.

    Raises:
        ValueError: one that is no list of names.
    """
    file = Path(folder) / INDEX
    told = read_json(file).get("id2label") if file.is_file() else None
    if told is None:
        return None
    keys = [str(n) for n in range(len(told))] if isinstance(told, dict) else []
    if not keys or told.keys() != set(keys) or not all(isinstance(name, str) for name in told.values()):
        raise ValueError(f"{file} has an id2label that does not name classes 0, 1, 2, ...: mend it or leave it out")
    return [told[key] for key in keys]


def read_json(file: Path) -> dict[str, Any]:
    """An object of a JSON file; raises ValueError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{file.parent} has no {file.name}: it is no folder of a diffusers model") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error})") from None
    if type(found) is not dict:
        raise ValueError(f"{file} holds a {type(found).__name__} and should hold an object")
    return found


def _read_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a model's folder: one safetensors file, several by an index, or a pickle."""
    whole, pickled = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if whole.is_file():
        return _read_safetensors(whole)
    if index.is_file():
        return _read_parted(index)
    if pickled.is_file():
        return read_pt(pickled)
    raise ValueError(f"{folder} has neither {whole.name} nor {index.name} nor {pickled.name}")


def _read_parted(index: Path) -> dict[str, Tensor]:
    """The tensors that an index finds in the files beside it; each must be where the index says."""
    told = read_json(index).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise ValueError(f"{index} has no weight_map of tensors' names to files' names")
    for name in told.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is no safetensors file beside it: it is broken or crafted")
    state: dict[str, Tensor] = {}
    for name in sorted(set(told.values())):
        found = _read_safetensors(index.parent / name)
        if missing := sorted(key for key, file in told.items() if file == name and key not in found):
            raise ValueError(f"{index} finds {missing[0]} in {name}, which does not hold it")
        state |= {key: tensor for key, tensor in found.items() if told.get(key) == name}
    return state


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error})") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or is broken ({error})") from None


def _is_inside(name: str) -> bool:
    """Whether an archive's entry would stay in the folder that it is unpacked in."""
    parts = re.split(r"[/\\]", name)
    return ".." not in parts and parts[0] != "" and ":" not in parts[0]


def _fits(path: Path, claimed: int, size: int) -> None:
    if claimed > size:
        raise ValueError(f"{path} claims {claimed} bytes of tensors and has {size}: it is broken or crafted")


def _size(state: dict[str, Tensor]) -> int:
    """Bytes of a file with these tensors, or a few more: names, shapes and places take some hundred a tensor."""
    return 2048 + sum(tensor.nbytes + 512 for tensor in state.values())


def _own(tensor: Tensor, always: bool = False) -> Tensor:
    """On the CPU, contiguous, and with no memory but its own, which is what savers write."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and not always else tensor.clone()
