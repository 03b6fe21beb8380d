"""A torch module as a pure function of its weights, and where those weights live between calls."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Place = Literal["device", "host", "shard"]
ALIGN = 512  # bytes at which a tensor starts in a flat buffer, as in torch's CUDA allocator: kernels then choose alike


# --- a module without its weights ---


class Frozen:
    """A module in eval mode whose weights are an argument: ``frozen(weights, "encode", x)`` is ``module.encode(x)``.

    The module given is left as it is; what is kept of it is a copy without storage. A weight that several parts of the
    module share has one name, its first. Results are the module's own bit for bit where its weights ask for no gradient
    (torch chooses a convolution's kernel by that too). Modules that write to themselves during a call (feature caches
    of video encoders) write to that copy, so one Frozen serves one thread at a time.
    """

    skeleton: nn.Module
    """The module on the meta device."""
    weights: dict[str, Tensor]
    """Parameters and buffers, non-persistent ones too, under their names in the module; empty after ``take``."""
    fingerprint: str
    """Hash of the names, shapes, dtypes and bytes of all weights."""
    num_params: int
    """Number of elements of the parameters, shared ones counted once."""

    def __init__(self, module: nn.Module):
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        self.weights = {name: tensor.detach() for name, tensor in named.items()}
        self.fingerprint = fingerprint(self.weights)
        self.num_params = sum(p.numel() for p in module.parameters())
        hollow = {id(tensor): _hollow(tensor) for tensor in named.values()}  # deepcopy's memo: shared stays shared
        self.skeleton = copy.deepcopy(module, hollow).eval()
        self._dispatch = _Dispatch(self.skeleton)

    @torch.no_grad()
    def __call__(self, weights: dict[str, Tensor], method: str, *args, **kwargs) -> Any:
        """Calls a method of the module with these weights; needs every weight and computes on their device."""
        named = {f"module.{name}": tensor for name, tensor in weights.items()}
        return torch.func.functional_call(self._dispatch, named, (method, *args), kwargs, strict=True)

    def take(self) -> dict[str, Tensor]:
        """Hands the weights over and forgets them, so that ``store`` alone decides how long they stay in memory."""
        assert self.weights, "the weights were taken before"
        weights, self.weights = self.weights, {}
        return weights


class _Dispatch(nn.Module):
    """Makes any method the forward of a module, the only one that functional_call knows."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, method: str, *args, **kwargs):
        return getattr(self.module, method)(*args, **kwargs)


def _hollow(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


# --- fingerprints ---


def fingerprint(weights: dict[str, Tensor]) -> str:
    """Hashes names, dtypes, shapes and bytes in the order of the names (blake2b; a core a tensor)."""
    with ThreadPoolExecutor() as pool:
        return digest(*pool.map(lambda name: _digest(name, weights[name]), sorted(weights)))


def digest(*parts: str) -> str:
    """Hashes strings in their order, 32 hex digits."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _digest(name: str, tensor: Tensor) -> str:
    hashed = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), digest_size=16)
    hashed.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


# --- where weights live ---


@dataclass(frozen=True)
class Stored:
    """Weights at rest; ``weights()`` makes them whole on the compute device for one call."""

    held: dict[str, Tensor]
    """What is kept between calls: the weights by name, or this rank's share of one flat buffer a dtype."""
    materialize: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    def weights(self) -> dict[str, Tensor]:
        """Returns all weights on the device; for "shard" a collective, which all ranks call alike.

        Unless the place is "device" they are freed when the caller drops them.
        """
        return self.materialize(self.held)


def store(
    weights: dict[str, Tensor],
    place: Place,
    device: torch.device | str,
    rank: int = 0,
    num: int = 1,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Stored:
    """Puts copies of weights where they live between calls; those given may be maps of a file.

    Args:
        place: "device" keeps all of them on the device; "host" in host memory, page-locked for a CUDA device, and
            brings them up for each call; "shard" keeps 1/num on each rank and gathers the whole for each call.
        gather: makes the whole flat buffer of the ranks' equal flat shares, in the order of ranks ("shard" only).
    """
    device = torch.device(device)
    if place == "device":
        return Stored({name: tensor.to(device, copy=True) for name, tensor in weights.items()}, dict)
    if place == "host":
        locked = device.type == "cuda"
        held = {name: t.cpu().pin_memory() if locked else t.to("cpu", copy=True) for name, t in weights.items()}
        return Stored(held, lambda held: {name: t.to(device, non_blocking=True) for name, t in held.items()})
    if place != "shard":
        raise ValueError(f"encoders.place is {place!r}: use one of {', '.join(get_args(Place))}")
    assert gather is not None and 0 <= rank < num, (gather, rank, num)
    flats = _flats(weights)
    held = {str(dtype): _share(weights, slots, dtype, rank, num).to(device) for dtype, slots in flats.items()}
    return Stored(held, lambda held: _whole(held, flats, gather))


class _Slot(NamedTuple):
    """Where a tensor stands in the flat buffer of its dtype (in elements)."""

    name: str
    shape: torch.Size
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


def _flats(weights: dict[str, Tensor]) -> dict[torch.dtype, list[_Slot]]:
    """Lays the weights out, one flat buffer a dtype."""
    flats: dict[torch.dtype, list[_Slot]] = {}
    for name, tensor in weights.items():
        slots = flats.setdefault(tensor.dtype, [])
        unit = ALIGN // tensor.element_size()
        slots.append(_Slot(name, tensor.shape, -(-slots[-1].stop // unit) * unit if slots else 0))
    return flats


def _share(weights: dict[str, Tensor], slots: list[_Slot], dtype: torch.dtype, rank: int, num: int) -> Tensor:
    """Copies rank's part of a flat buffer out of the weights; the last parts end in zeros."""
    size = -(-slots[-1].stop // num)
    share, first = torch.zeros(size, dtype=dtype), rank * size
    for slot in slots:
        start, stop = max(slot.start, first), min(slot.stop, first + size)
        if start < stop:
            flat = weights[slot.name].reshape(-1)
            share[start - first : stop - first] = flat[start - slot.start : stop - slot.start]
    return share


def _whole(held: dict[str, Tensor], flats: dict[torch.dtype, list[_Slot]], gather: Callable) -> dict[str, Tensor]:
    """Gathers the flat buffers; the weights are views of them."""
    whole = {}
    for dtype, slots in flats.items():
        flat = gather(held[str(dtype)])
        whole |= {slot.name: flat[slot.start : slot.stop].view(slot.shape) for slot in slots}
    return whole


# --- models in folders and on the hub ---


class Source(NamedTuple):
    """Where a model was found, in the terms of ``from_pretrained``, and its config.json."""

    path: str
    subfolder: str
    config: dict[str, Any]


def find(path: Path | str, inside: str, setting: str) -> Source:
    """Finds a model: in a folder, its sub-folder ``inside`` where that exists, or under a hub name.

    Raises:
        ValueError: no such folder, no config.json in it, or a hub name that cannot be reached, naming ``setting``.
    """
    folder = Path(path)
    if folder.is_dir():
        subfolder = inside if (folder / inside).is_dir() else ""
        return Source(str(folder), subfolder, _read(folder / subfolder / "config.json", setting))
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        raise ValueError(f"{setting} is {str(path)!r}, where there is no folder: give a folder or a hub name")
    found = _download(str(path), inside)
    if found is not None:
        return Source(str(path), found[0], _read(found[1], setting))
    raise ValueError(
        f"{setting} is {str(path)!r}, which is neither a folder here nor a model that the hub or its local cache gives:"
        " give a folder, or download it first"
    )


def _read(file: Path, setting: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{setting} needs a config.json that can be read at {file}: {error}") from error


def _download(name: str, inside: str) -> tuple[str, Path] | None:
    """Finds a hub model's config.json, at its root or ``inside``, in the local cache first: (sub-folder, file)."""
    from huggingface_hub import errors, hf_hub_download

    for local in (True, False):
        for subfolder in ("", inside):
            try:
                file = hf_hub_download(name, "config.json", subfolder=subfolder or None, local_files_only=local)
                return subfolder, Path(file)
            except errors.LocalEntryNotFoundError:
                if not local:
                    return None  # the hub does not answer: it need not be asked again
            except (OSError, ValueError):  # not there, not allowed, or no name the hub takes
                continue
    return None


def load_module(cls: Any, source: Source, setting: str, **kwargs) -> Any:
    """Calls ``cls.from_pretrained`` of a module, from safetensors alone; refuses what leaves a weight without a value.

    Raises:
        ValueError: weights missing, torn or of other shapes, naming ``setting``.
    """
    where = f"{setting} {Path(source.path) / source.subfolder}"
    try:
        module, info = cls.from_pretrained(
            source.path,
            subfolder=source.subfolder,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            **kwargs,
        )
    except Exception as error:  # what a library makes of a broken folder is anything
        raise ValueError(f"{where} cannot be loaded as {cls.__name__} from safetensors: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{where} lacks {len(missing)} weights of {cls.__name__}, the first {missing[0]}")
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise ValueError(f"{where} has {name} of shape {tuple(found)} where its config makes {tuple(wanted)}")
    return module.requires_grad_(False).eval()


def first_line(error: Exception) -> str:
    """Says what another library's error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
