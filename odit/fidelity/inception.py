"""Inception-v3 as FID, sFID, Inception Score, precision and recall know it, as a pure function of its weights.

The weights are those of TensorFlow's ``inception-2015-12-05`` (Szegedy et al. 2015; classify_image_graph_def.pb), which
Heusel et al. 2017 and ADM use, in the file that pytorch-fid and torch-fidelity distribute,
``pt_inception-2015-12-05-6726825d.pth``: a state dict of tensors under torchvision's names, ``NAME.conv.weight`` and
``NAME.bn.{weight, bias, running_mean, running_var}`` for each of 94 convolutions, and ``fc.weight``, ``fc.bias`` for
1,008 classes: 23,850,960 parameters. The first eight digits of the file's sha256 are in its name.

The network differs from torchvision's: average pooling does not count what lies outside the picture, and the pooling
branch of the last block takes the maximum.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from odit import tree

NAME = "pt_inception-2015-12-05-6726825d.pth"
FETCH = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}"
SIDE = 299
CLASSES = 1008
SPATIAL = 7  # leading channels of mixed_6/conv:0, 17 x 17 each, which are sFID's (Nash et al. 2021; ADM)
SPLIT = 5000  # samples of one part of an Inception Score (ADM)
EPS = 1e-3  # of batch normalisation


def _tower(block: str, *convs: tuple) -> dict[str, tuple[int, int, int, int]]:
    """Shapes (out, in, rows, columns) of a block's convolutions, each told as (name, in, out, rows[, columns])."""
    return {f"{block}.{name}": (out, width, *(size * 2)[:2]) for name, width, out, *size in convs}


def _a(block: str, width: int, pool: int) -> dict:
    return _tower(
        block,
        *(("branch1x1", width, 64, 1), ("branch5x5_1", width, 48, 1), ("branch5x5_2", 48, 64, 5)),
        *(("branch3x3dbl_1", width, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3)),
        ("branch_pool", width, pool, 1),
    )


def _c(block: str, mid: int) -> dict:
    return _tower(
        block,
        *(("branch1x1", 768, 192, 1), ("branch7x7_1", 768, mid, 1)),
        *(("branch7x7_2", mid, mid, 1, 7), ("branch7x7_3", mid, 192, 7, 1), ("branch7x7dbl_1", 768, mid, 1)),
        *(("branch7x7dbl_2", mid, mid, 7, 1), ("branch7x7dbl_3", mid, mid, 1, 7)),
        *(("branch7x7dbl_4", mid, mid, 7, 1), ("branch7x7dbl_5", mid, 192, 1, 7), ("branch_pool", 768, 192, 1)),
    )


def _e(block: str, width: int) -> dict:
    return _tower(
        block,
        *(("branch1x1", width, 320, 1), ("branch3x3_1", width, 384, 1)),
        *(("branch3x3_2a", 384, 384, 1, 3), ("branch3x3_2b", 384, 384, 3, 1)),
        *(("branch3x3dbl_1", width, 448, 1), ("branch3x3dbl_2", 448, 384, 3)),
        *(("branch3x3dbl_3a", 384, 384, 1, 3), ("branch3x3dbl_3b", 384, 384, 3, 1), ("branch_pool", width, 192, 1)),
    )


CONVS: dict[str, tuple[int, int, int, int]] = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
    **_a("Mixed_5b", 192, 32),
    **_a("Mixed_5c", 256, 64),
    **_a("Mixed_5d", 288, 64),
    **_tower(
        "Mixed_6a",
        ("branch3x3", 288, 384, 3),
        *(("branch3x3dbl_1", 288, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3)),
    ),
    **_c("Mixed_6b", 128),
    **_c("Mixed_6c", 160),
    **_c("Mixed_6d", 160),
    **_c("Mixed_6e", 192),
    **_tower(
        "Mixed_7a",
        *(("branch3x3_1", 768, 192, 1), ("branch3x3_2", 192, 320, 3), ("branch7x7x3_1", 768, 192, 1)),
        *(("branch7x7x3_2", 192, 192, 1, 7), ("branch7x7x3_3", 192, 192, 7, 1), ("branch7x7x3_4", 192, 192, 3)),
    ),
    **_e("Mixed_7b", 1280),
    **_e("Mixed_7c", 2048),
}
NORMS = ("weight", "bias", "running_mean", "running_var")


def shapes() -> dict[str, tuple[int, ...]]:
    """What a file of weights has to hold."""
    found: dict[str, tuple[int, ...]] = {"fc.weight": (CLASSES, 2048), "fc.bias": (CLASSES,)}
    for name, shape in CONVS.items():
        found[f"{name}.conv.weight"] = shape
        found |= {f"{name}.bn.{norm}": shape[:1] for norm in NORMS}
    return found


def load(path: Path | None, device: torch.device, setting: str = "--inception") -> tree.Tree:
    """Reads weights as tensors alone, no code in the file being run; raises ValueError in one sentence."""
    if path is None or not path.is_file():
        found = "is not given" if path is None else f"{path} is no file"
        raise ValueError(f"inception {found}: fetch {FETCH} and give its path by {setting}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # the file is of torch 1.5 or older: no zip
    except Exception as error:  # a broken or hostile file may raise nearly anything
        raise ValueError(f"inception {path} holds more than tensors, or is broken: fetch {FETCH} again") from error
    return tree.map(lambda w: w.to(device), folded(path, state))


def folded(path: Path, state: dict[str, Tensor]) -> tree.Tree:
    """Weights {"convs": {name: {"w", "b"}}, "fc"} of a state dict, batch normalisation being part of the convolutions.

    Raises ValueError for a tensor that is missing, not asked for or of another shape.
    """
    wanted = shapes()
    held = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")} if isinstance(state, dict) else {}
    for name in [*wanted, *held]:
        tensor = held.get(name)
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        if found != wanted.get(name):
            told = f"has no {name}" if tensor is None else f"has {name} of shape {found}"
            right = f"of shape {wanted[name]}" if name in wanted else "not there"
            raise ValueError(f"inception {path} {told}, which should be {right}: fetch {FETCH}")
    convs = {name: _fold(held[f"{name}.conv.weight"], *(held[f"{name}.bn.{norm}"] for norm in NORMS)) for name in CONVS}
    return {"convs": convs, "fc": held["fc.weight"].float()}


def _fold(w: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> dict[str, Tensor]:
    """A convolution that normalises too: gamma (w x - mean) / sqrt(var + eps) + beta, folded in fp64."""
    scale = gamma.double() / (var.double() + EPS).sqrt()
    return {
        "w": (w.double() * scale[:, None, None, None]).float(),
        "b": (beta.double() - mean.double() * scale).float(),
    }


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Convolutions and products in fp32 and not in TF32, which a GPU takes for convolutions unless told."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def features(
    params: tree.Tree, x_BHWC: Tensor, resize: Literal["tensorflow", "torch"] = "tensorflow"
) -> dict[str, Tensor]:
    """Features of pictures uint8 (B, H, W, 3): "pool" (B, 2048), and "spatial" (B, 2023) in TensorFlow's order.

    Args:
        resize: how pictures come to 299 x 299. "tensorflow" is what the graph does and so ADM's evaluator: bilinear,
            output pixel i at i * size / 299 (no half-pixel centres), values (x - 128) / 128. "torch" is what
            pytorch-fid does: bilinear with half-pixel centres, values 2 x / 255 - 1. Neither smooths first. Figures
            differ by it.
    """
    with torch.no_grad(), full_fp32():
        x_BCHW = x_BHWC.permute(0, 3, 1, 2).float()
        if resize == "tensorflow":
            x = (resize_as_tensorflow(x_BCHW, SIDE) - 128) / 128
        else:
            x = 2 * F.interpolate(x_BCHW / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
        x_17, spatial = _to_17(params["convs"], x.to(params["fc"].dtype))
        return {"pool": _to_pool(params["convs"], x_17), "spatial": spatial}


def resize_as_tensorflow(x_BCHW: Tensor, side: int) -> Tensor:
    """TensorFlow 1's ResizeBilinear with align_corners false: rows and columns at i * size / side, in fp32.

    (tensorflow/core/kernels/resize_bilinear_op.cc, the LegacyScaler.)
    """
    for dim in (2, 3):
        size = x_BCHW.shape[dim]
        at = torch.arange(side, dtype=torch.float32, device=x_BCHW.device) * torch.tensor(size / side)
        low = at.floor().long().clamp(max=size - 1)
        weight = (at - low).view(-1, *(1,) * (3 - dim))
        below, above = x_BCHW.index_select(dim, low), x_BCHW.index_select(dim, (low + 1).clamp(max=size - 1))
        x_BCHW = below + (above - below) * weight
    return x_BCHW


def logits(params: tree.Tree, pool_ND: Tensor) -> Tensor:
    """Logits (N, 1008) without the bias, as ADM's evaluator leaves it out."""
    with torch.no_grad(), full_fp32():
        return pool_ND @ params["fc"].T


def score(logits_NV: Tensor, split: int = SPLIT) -> float:
    """The Inception Score exp E KL(p(y|x) | p(y)) of Salimans et al. 2016: the mean over parts of ``split`` samples in
    their order, the last one being shorter, as ADM's evaluator takes it."""
    parts = []
    for part in logits_NV.double().split(split):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        parts.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(parts).mean())


def _conv(x: Tensor, p: dict[str, Tensor], stride: int = 1, pad: bool = True) -> Tensor:
    """relu(w x + b); ``pad`` keeps the size."""
    padding = tuple((size - 1) // 2 if pad else 0 for size in p["w"].shape[2:])
    return F.relu(F.conv2d(x, p["w"], p["b"], stride, padding))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _to_17(convs: dict, x: Tensor) -> tuple[Tensor, Tensor]:
    """The stem and the blocks at 35 x 35 and 17 x 17, and sFID's channels on the way."""
    x = _conv(x, convs["Conv2d_1a_3x3"], 2, pad=False)
    x = _conv(x, convs["Conv2d_2a_3x3"], pad=False)
    x = F.max_pool2d(_conv(x, convs["Conv2d_2b_3x3"]), 3, 2)
    x = _conv(x, convs["Conv2d_3b_1x1"])
    x = F.max_pool2d(_conv(x, convs["Conv2d_4a_3x3"], pad=False), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _block_a(_of(convs, name), x)
    x = _block_b(_of(convs, "Mixed_6a"), x)
    spatial = x
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        if name == "Mixed_6d":  # its first branch is TensorFlow's mixed_6/conv:0, after the ReLU
            spatial = _conv(x, convs["Mixed_6d.branch1x1"])[:, :SPATIAL]
        x = _block_c(_of(convs, name), x)
    return x, spatial.permute(0, 2, 3, 1).flatten(1)


def _to_pool(convs: dict, x: Tensor) -> Tensor:
    """The blocks at 8 x 8, averaged over these."""
    x = _block_d(_of(convs, "Mixed_7a"), x)
    x = _block_e(_of(convs, "Mixed_7b"), x, _average)
    x = _block_e(_of(convs, "Mixed_7c"), x, lambda x: F.max_pool2d(x, 3, 1, 1))
    return x.mean((2, 3))


def _of(convs: dict, block: str) -> dict:
    """A block's convolutions by their short names."""
    return {name.partition(".")[2]: p for name, p in convs.items() if name.startswith(f"{block}.")}


def _block_a(p: dict, x: Tensor) -> Tensor:
    five = _conv(_conv(x, p["branch5x5_1"]), p["branch5x5_2"])
    three = _conv(_conv(_conv(x, p["branch3x3dbl_1"]), p["branch3x3dbl_2"]), p["branch3x3dbl_3"])
    return torch.cat((_conv(x, p["branch1x1"]), five, three, _conv(_average(x), p["branch_pool"])), 1)


def _block_b(p: dict, x: Tensor) -> Tensor:
    double = _conv(_conv(x, p["branch3x3dbl_1"]), p["branch3x3dbl_2"])
    double = _conv(double, p["branch3x3dbl_3"], 2, pad=False)
    return torch.cat((_conv(x, p["branch3x3"], 2, pad=False), double, F.max_pool2d(x, 3, 2)), 1)


def _block_c(p: dict, x: Tensor) -> Tensor:
    single = double = x
    for i in range(1, 4):
        single = _conv(single, p[f"branch7x7_{i}"])
    for i in range(1, 6):
        double = _conv(double, p[f"branch7x7dbl_{i}"])
    return torch.cat((_conv(x, p["branch1x1"]), single, double, _conv(_average(x), p["branch_pool"])), 1)


def _block_d(p: dict, x: Tensor) -> Tensor:
    three = _conv(_conv(x, p["branch3x3_1"]), p["branch3x3_2"], 2, pad=False)
    seven = x
    for i in range(1, 4):
        seven = _conv(seven, p[f"branch7x7x3_{i}"])
    return torch.cat((three, _conv(seven, p["branch7x7x3_4"], 2, pad=False), F.max_pool2d(x, 3, 2)), 1)


def _block_e(p: dict, x: Tensor, pool) -> Tensor:
    three = _conv(x, p["branch3x3_1"])
    double = _conv(_conv(x, p["branch3x3dbl_1"]), p["branch3x3dbl_2"])
    split = [_conv(three, p[f"branch3x3_2{i}"]) for i in "ab"] + [_conv(double, p[f"branch3x3dbl_3{i}"]) for i in "ab"]
    return torch.cat((_conv(x, p["branch1x1"]), *split, _conv(pool(x), p["branch_pool"])), 1)
