"""Foreign weight names as pure maps, both ways and bit for bit: facebookresearch/DiT's .pt files and diffusers' DiT.

A format is a list of ``Part``: which slice of which leaf a foreign tensor is. Export reads the list left to right,
import right to left; nothing else knows names, and nothing is computed but reshapes. Letters as in models/dit.py.

    params, cfg, shape = from_dit(read_pt("DiT-XL-2-256x256.pt"))
    params, cfg, shape = load_diffusers("DiT-XL-2-256")
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from odit import nn, tree
from odit.models import dit
from odit.models.dit import Config, Shape
from odit.ops import EPS

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"


class Part(NamedTuple):
    """One foreign tensor: ``leaf(path)[index].reshape(shape)``, the whole leaf where index is None.

    A path may have several whole parts (diffusers copies the embedders into each block); they must be equal.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: int | None = None


# --- facebookresearch/DiT ---


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
    D, C, patch, _ = _rank(state, "x_embedder.proj.weight", 4).shape
    rows = _rank(state, "y_embedder.embedding_table.weight", 2).shape[0]
    hidden = _rank(state, "blocks.0.mlp.fc1.weight", 2).shape[0]
    table = _rank(state, "pos_embed", 3)
    values = _rank(state, "final_layer.linear.weight", 2).shape[0]
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
        depth=_depth(state, "blocks"),
        heads=_heads(D) if heads is None else heads,
        patch=patch,
        mlp_ratio=_ratio(D, hidden),
        label_dropout=label_dropout,
    )
    shape = Shape(C, side * patch, rows - (label_dropout > 0), _outputs(values, patch**2 * C))
    dit.check(cfg, shape)
    return _import(state, _dit_parts(cfg, shape), cfg, shape, "pos_embed"), cfg, shape


def to_dit(params: dict, cfg: Config, shape: Shape, allow_other_timesteps: bool = False) -> dict[str, Tensor]:
    """Makes a facebookresearch/DiT state dict, the fixed position table included.

    Raises:
        ValueError: what that code cannot represent; ``allow_other_timesteps`` lets timestep frequencies differ.
    """
    _refuse(cfg, shape, "facebookresearch/DiT", "dit", allow_other_timesteps)
    if cfg.mlp_eps != EPS:
        raise ValueError(
            f"facebookresearch/DiT normalises with epsilon {EPS} and this model's mlp with {cfg.mlp_eps}: "
            f"to accept the difference pass dataclasses.replace(cfg, mlp_eps={EPS})"
        )
    side = shape.size[0] // cfg.patch
    table = nn.sincos_2d(side, side, cfg.width).to(params["patch"]["w"])
    return _export(params, _dit_parts(cfg, shape)) | {"pos_embed": table[None]}


def _dit_parts(cfg: Config, shape: Shape) -> list[Part]:
    D, F, P = cfg.width, cfg.ffn, cfg.patch
    parts = [
        *_dense("x_embedder.proj", "patch", D, (shape.channels, P, P)),
        *_dense("t_embedder.mlp.0", "time.fc1", D, (dit.FREQUENCIES,)),
        *_dense("t_embedder.mlp.2", "time.fc2", D, (D,)),
        Part("y_embedder.embedding_table.weight", (dit.num_labels(cfg, shape), D), "label.w"),
    ]
    for i in range(cfg.depth):
        name, path = f"blocks.{i}", f"blocks.{i}"
        parts += [
            *_dense(f"{name}.attn.qkv", f"{path}.qkv", 3 * D, (D,)),
            *_dense(f"{name}.attn.proj", f"{path}.out", D, (D,)),
            *_dense(f"{name}.mlp.fc1", f"{path}.mlp.fc1", F, (D,)),
            *_dense(f"{name}.mlp.fc2", f"{path}.mlp.fc2", D, (F,)),
            *_dense(f"{name}.adaLN_modulation.1", f"{path}.adaln", 6 * D, (D,)),
        ]
    return [
        *parts,
        *_dense("final_layer.adaLN_modulation.1", "final.adaln", 2 * D, (D,)),
        *_dense("final_layer.linear", "final.out", _values(cfg, shape), (D,)),
    ]


# --- diffusers ---

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
DROPOUT = 0.1  # of CombinedTimestepLabelEmbeddings: diffusers' label table always has a null row


def from_diffusers(state: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict, Config, Shape]:
    """Reads a DiTTransformer2DModel's state dict and config.json: (params, cfg, shape) that compute what it computes.

    Files older than diffusers 0.29 name the class Transformer2DModel; they are the same model.

    Raises:
        ValueError: what is no DiT, naming the entry or tensor, and an embedder's copies that differ, naming both.
    """
    kind = config.get("_class_name", "DiTTransformer2DModel")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise ValueError(f"config.json is of a {kind}: only DiTTransformer2DModel can be read")
    needed = {} if kind == "DiTTransformer2DModel" else DEFAULTS.keys() - set(SAME_DEFAULT)
    if missing := sorted(key for key in needed if key not in config):
        raise ValueError(f"config.json of a {kind} has no {missing[0]}, whose default is not a DiT's: add it")
    config = DEFAULTS | config
    for key, value in EXPECTED.items():
        if config[key] != value:
            raise ValueError(
                f"config.json has {key} {config[key]!r} and a DiT has {value!r}: no such model can be read"
            )
    for key in INTEGERS:
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"config.json has {key} {config[key]!r}: it must be a positive integer")
    if not isinstance(config["norm_eps"], float):
        raise ValueError(f"config.json has norm_eps {config['norm_eps']!r}: it must be a number, such as 1e-5")
    D = config["num_attention_heads"] * config["attention_head_dim"]
    hidden = _rank(state, "transformer_blocks.0.ff.net.0.proj.weight", 2).shape[0]
    C, depth = config["in_channels"], _depth(state, "transformer_blocks")
    if config["num_layers"] != depth:
        raise ValueError(f"config.json has num_layers {config['num_layers']} and the weights have {depth}")
    cfg = Config(
        width=D,
        depth=depth,
        heads=config["num_attention_heads"],
        patch=config["patch_size"],
        mlp_ratio=_ratio(D, hidden),
        label_dropout=DROPOUT,
        timestep_freqs="diffusers",
        mlp_eps=config["norm_eps"],
    )
    shape = Shape(C, config["sample_size"], config["num_embeds_ada_norm"], _outputs(config["out_channels"] or C, C))
    dit.check(cfg, shape)
    return _import(state, _diffusers_parts(cfg, shape), cfg, shape, "pos_embed.pos_embed"), cfg, shape


def to_diffusers(
    params: dict, cfg: Config, shape: Shape, allow_other_timesteps: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Makes a DiTTransformer2DModel's (state dict, config.json); all embedder copies are one tensor.

    The rate of label dropout is not kept (diffusers trains with 0.1).

    Raises:
        ValueError: what diffusers cannot represent; ``allow_other_timesteps`` lets timestep frequencies differ.
    """
    _refuse(cfg, shape, "diffusers", "diffusers", allow_other_timesteps)
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
    return _export(params, _diffusers_parts(cfg, shape)), config


def _diffusers_parts(cfg: Config, shape: Shape) -> list[Part]:
    D, F, P = cfg.width, cfg.ffn, cfg.patch
    parts = _dense("pos_embed.proj", "patch", D, (shape.channels, P, P))
    for i in range(cfg.depth):
        name, path = f"transformer_blocks.{i}", f"blocks.{i}"
        parts += [
            *_dense(f"{name}.norm1.emb.timestep_embedder.linear_1", "time.fc1", D, (dit.FREQUENCIES,)),
            *_dense(f"{name}.norm1.emb.timestep_embedder.linear_2", "time.fc2", D, (D,)),
            Part(f"{name}.norm1.emb.class_embedder.embedding_table.weight", (dit.num_labels(cfg, shape), D), "label.w"),
            *_dense(f"{name}.norm1.linear", f"{path}.adaln", 6 * D, (D,)),
            *_dense(f"{name}.attn1.to_q", f"{path}.qkv", D, (D,), 0),
            *_dense(f"{name}.attn1.to_k", f"{path}.qkv", D, (D,), 1),
            *_dense(f"{name}.attn1.to_v", f"{path}.qkv", D, (D,), 2),
            *_dense(f"{name}.attn1.to_out.0", f"{path}.out", D, (D,)),
            *_dense(f"{name}.ff.net.0.proj", f"{path}.mlp.fc1", F, (D,)),
            *_dense(f"{name}.ff.net.2", f"{path}.mlp.fc2", D, (F,)),
        ]
    return [
        *parts,
        *_dense("proj_out_1", "final.adaln", 2 * D, (D,)),
        *_dense("proj_out_2", "final.out", _values(cfg, shape), (D,)),
    ]


# --- both ---


def _dense(name: str, path: str, fan_out: int, fan_in: tuple[int, ...], index: int | None = None) -> list[Part]:
    return [
        Part(f"{name}.weight", (fan_out, *fan_in), f"{path}.w", index),
        Part(f"{name}.bias", (fan_out,), f"{path}.b", index),
    ]


def _export(params: dict, parts: list[Part]) -> dict[str, Tensor]:
    leaves = dict(tree.items(params))
    assert leaves.keys() == {part.path for part in parts}, "cfg and shape are not those of the parameters"
    return {
        part.name: (leaves[part.path] if part.index is None else leaves[part.path][part.index]).reshape(part.shape)
        for part in parts
    }


def _import(state: dict[str, Tensor], parts: list[Part], cfg: Config, shape: Shape, table: str) -> dict:
    """The parameters that ``parts`` say; each tensor must be there with its shape; none but the position table more."""
    found: dict[str, list[tuple[Part, Tensor]]] = {}
    for part in parts:
        tensor = _rank(state, part.name, len(part.shape))
        if tensor.shape != part.shape:
            raise ValueError(f"{part.name} has shape {tuple(tensor.shape)} and should have {part.shape}")
        found.setdefault(part.path, []).append((part, tensor))
    if unknown := sorted(state.keys() - {part.name for part in parts} - {table}):
        raise ValueError(f"{unknown[0]} (one of {len(unknown)} such) is no tensor of a DiT: no such model can be read")
    if table in state:
        _check_table(state[table], cfg, shape, table)

    leaves = {}
    for path, group in found.items():
        (first, tensor), *others = group
        if first.index is not None:
            leaves[path] = torch.stack([other for _, other in group])
            continue
        for part, other in others:
            if other.dtype != tensor.dtype or not torch.equal(tensor, other):
                raise ValueError(
                    f"{part.name} differs from {first.name}: odit has one embedder for all blocks, so that blocks "
                    f"trained apart cannot be read"
                )
        leaves[path] = tensor
    declared = dit.declare(cfg, shape)
    return tree.map_with_path(lambda path, p: leaves[path].reshape(p.shape), declared)


def _check_table(found: Tensor, cfg: Config, shape: Shape, name: str) -> None:
    side = shape.size[0] // cfg.patch
    table = nn.sincos_2d(side, side, cfg.width)[None]
    if found.shape != table.shape:
        raise ValueError(f"{name} has shape {tuple(found.shape)} and should have {tuple(table.shape)}")
    # Entries are at most 1: half an epsilon of rounding, and as much for a library's own sine.
    bound = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    error = (found.double() - table.to(found.device)).abs().max().item()
    if not error <= bound:
        raise ValueError(
            f"{name} differs by {error:.2g} from the sine-cosine table of {side} x {side} tokens, where rounding "
            f"explains {bound:.2g}: odit computes the table, so that a trained or resized one cannot be read"
        )


def _refuse(cfg: Config, shape: Shape, target: str, freqs: str, allow_other_timesteps: bool) -> None:
    if len(shape.size) != 2 or shape.size[0] != shape.size[1]:
        raise ValueError(
            f"samples are {'x'.join(map(str, shape.size))} and {target} has square pictures: "
            "use odit's own weights file"
        )
    plain = {"arch": "dit", "adaln": "zero", "qk_norm": False, "positions": "sincos", "mlp": "gelu"}
    for name, value in plain.items():
        if getattr(cfg, name) != value:
            raise ValueError(
                f"model.{name} is {getattr(cfg, name)} and {target} has only {value}: use odit's own weights file"
            )
    if not shape.num_classes:
        raise ValueError(f"the model is unconditional and {target} always has labels: use odit's own weights file")
    if cfg.timestep_freqs != freqs and not allow_other_timesteps:
        raise ValueError(
            f"model.timestep_freqs is {cfg.timestep_freqs} and {target} computes those of {freqs}, so that its outputs "
            f"will differ: pass allow_other_timesteps=True to accept that, or train with --model.timestep-freqs {freqs}"
        )


def _rank(state: dict[str, Tensor], name: str, rank: int) -> Tensor:
    tensor = state.get(name)
    if tensor is None:
        raise ValueError(f"{name} is missing: these are no weights of a DiT")
    if tensor.ndim != rank or not tensor.is_floating_point():
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} and should be a floating-point tensor of "
            f"{rank} dims"
        )
    return tensor


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return len({match[1] for name in state if (match := re.match(rf"{prefix}\.(\d+)\.", name))})


def _heads(width: int) -> int:
    for _, published, heads in dit.SIZES.values():
        if published == width:
            return heads
    widths = sorted(width for _, width, _ in dit.SIZES.values())
    raise ValueError(f"width {width} is none of the published {widths}, and no tensor tells the heads: pass heads=")


def _ratio(width: int, hidden: int) -> float:
    """The mlp_ratio whose ffn is ``hidden``: the quotient, or its upper neighbour where rounding falls below."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _outputs(values: int, one: int) -> int:
    if values not in (one, 2 * one):
        raise ValueError(
            f"the final layer has {values} values where a DiT has {one}, or {2 * one} with learned variance"
        )
    return values // one


def _values(cfg: Config, shape: Shape) -> int:
    return cfg.patch**2 * shape.channels * shape.outputs


# --- files ---


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
    """Writes the folder that ``DiTTransformer2DModel.from_pretrained`` opens: config.json and safetensors weights."""
    state, config = to_diffusers(params, cfg, shape, allow_other_timesteps)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _own(tensor, always=True) for name, tensor in state.items()}  # safetensors refuses shared memory
    metadata = {"format": "pt"}
    _replace(folder / f"{WEIGHTS}.safetensors", lambda to: safetensors.torch.save_file(state, to, metadata))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    _replace(folder / CONFIG, lambda temporary: temporary.write_text(text))


def load_diffusers(folder: str | Path) -> tuple[dict, Config, Shape]:
    """Reads what ``save_diffusers`` or diffusers wrote: (params, cfg, shape). A pipeline's folder serves as well.

    Raises:
        ValueError: what is missing, broken or no DiT.
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
