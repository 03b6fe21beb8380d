"""Fused kernels in Triton: what a GPU's memory should see once, a file each, and the record that has them.

Triton is loaded by ``fused`` and ``obstacle`` alone.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace

import torch

from odit.ops import Ops

CAPABILITY = (8, 0)  # Ampere: bf16


def fused(ops: Ops) -> Ops:
    """The record with kernels at its leaf sites, and draws by one."""
    from odit.kernels.bias_gelu import mlp
    from odit.kernels.draws import normal, uniform
    from odit.kernels.gated import gated
    from odit.kernels.gated_modulate import gated_modulate
    from odit.kernels.linear import out
    from odit.kernels.modulate import modulate
    from odit.kernels.qkv import qkv

    return replace(
        ops,
        modulate=modulate,
        gated=gated,
        gated_modulate=gated_modulate,
        qkv=qkv,
        out=out,
        mlp=mlp,
        uniform=uniform,
        normal=normal,
    )


def need_triton(what: str) -> None:
    """Raises ValueError where Triton is not installed; ``what`` needs it, on whatever device."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{what} needs Triton, which is not installed: pip install triton, or odit[triton]")


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on this device, such as Triton missing; None where they can, as one of them has just
    done."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return f"they need a GPU, and the device is {device.type}"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"they need a GPU of compute capability 8.0, and this one has {found[0]}.{found[1]}"
    try:
        from odit.kernels.gated import gated

        gated(*(torch.zeros(shape, device=device) for shape in ((1, 1, 8), (1, 8), (1, 1, 8))))
    except Exception as error:  # no C compiler for its launcher, or a Triton that does not fit this PyTorch
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None
