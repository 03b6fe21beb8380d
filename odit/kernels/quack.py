"""quack-kernels' products (CUTLASS, for Hopper and later): where they serve, and how they are called."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MEASURED = ((9, 0),)  # compute capabilities where they were faster, by ``experiments/bench.py train`` and ``sample``
HALF = (torch.float16, torch.bfloat16)
GELU = "gelu_tanh_approx"
ROWS = 8192  # without gradients, from which a plain product is faster than PyTorch's
COLUMNS = 192  # of its tiles; where the last one would not be full (DiT-L's 1024) PyTorch's is faster


def serves(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why they are not taken on such a GPU, whatever is installed; None where they are."""
    if capability not in MEASURED:
        return f"not measured on compute capability {capability[0]}.{capability[1]}"
    return None if dtype in HALF else f"{str(dtype).removeprefix('torch.')} is not half precision"


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why they cannot be taken on this device; None where they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    return serves(torch.cuda.get_device_capability(device), dtype) or missing()


@functools.cache
def missing() -> str | None:
    """Why they cannot be loaded; None where they can."""
    try:
        library()
    except ModuleNotFoundError as error:
        known = error.name == "quack"
        return f"quack-kernels {'is not installed' if known else f'needs {error.name}, which is not installed'}"
    except Exception as error:  # a version that does not fit
        return f"quack-kernels cannot be loaded ({type(error).__name__})"
    return None


@functools.cache
def library() -> Any:
    """The products with their tiles, the fastest of ten on an H200 for 32,768 tokens of width 1152."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from quack import gemm_interface
        from quack.epilogue import library as epilogues
        from quack.gemm_config import GemmConfig

    def tiles(columns: int) -> GemmConfig:
        return GemmConfig(128, columns, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)

    return SimpleNamespace(
        plain=functools.partial(gemm_interface.gemm_tuned.fn, config=tiles(COLUMNS)),
        gelu=functools.partial(gemm_interface.gemm_act, activation=GELU, tuned=False, config=tiles(COLUMNS)),
        gelu_backward=functools.partial(epilogues.dact_dbias_mod(GELU), tuned=False, config=tiles(128)),
        gelu_backward_lean=functools.partial(epilogues.dgelu_dbias_mod, tuned=False, config=tiles(128)),
    )


def linear(x: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of x (..., K), without gradients: (..., N)."""
    x_MK = x.flatten(0, -2)
    y = x.new_empty(len(x_MK), len(w_NK))
    library().plain(aligned(x_MK), aligned(w_NK).t(), y, bias=None if b_N is None else aligned(b_N))
    return y.unflatten(0, x.shape[:-1])


def faster(x: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> bool:
    """Whether ``linear`` is taken for these: for many rows without gradients, not compiled, where it serves.

    On an H200 16, 32 and 64 guided pictures of DiT-XL/2 take 2.0, 1.7 and 2.8 % less time, 256 of B/2 3.2 %. Training
    steps gained less than 1 % from such products; there only the first pass of ``remat block`` takes them, whose second
    one is PyTorch's. Bits were the same in all that was measured; XL's have a test.
    """
    if torch.is_grad_enabled() or not x.is_cuda or torch.compiler.is_compiling() or mapped():
        return False
    given = (x, w_NK) if b_N is None else (x, w_NK, b_N)
    whole = len(w_NK) % COLUMNS == 0 and w_NK.numel() > 0  # a rank may have no head
    return whole and x.shape[:-1].numel() >= ROWS and takes(*given) and obstacle(x.device, x.dtype) is None


def told(device: torch.device, dtype: torch.dtype) -> str:
    """Words on which products ``faster`` takes."""
    why = obstacle(device, dtype)
    return f"without gradients {ROWS:,} tokens and more by {f'PyTorch ({why})' if why else 'quack-kernels'}"


def aligned(x: Tensor) -> Tensor:
    """x where its rows start at multiples of 16 bytes, as the GPU's copies of tiles demand; else a copy of it."""
    starts = x.storage_offset() % 8 == 0 and (x.ndim == 1 or x.stride(0) % 8 == 0)
    return x if x.stride(-1) == 1 and starts else x.clone(memory_format=torch.contiguous_format)


def takes(*tensors: Tensor) -> bool:
    """Whether they are of one dtype, in half precision, and the columns of a row fill multiples of 16 bytes."""
    dtype = tensors[0].dtype
    return dtype in HALF and all(x.dtype == dtype and x.shape[-1] % 8 == 0 for x in tensors)


def mapped() -> bool:
    """Whether torch.func's jvp or vmap looks on, for which they have no rules."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
