"""How a kernel runs: compiled on a GPU, by Triton's interpreter on a CPU, not at all where tensors hold no numbers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """Runs ``programs`` programs of a kernel, on the GPU's current stream; on meta tensors nothing."""
    if device.type == "meta" or programs == 0:
        return
    if device.type == "cpu":
        with _interpreting(kernel.fn):
            interpreter.InterpretedFunction(kernel.fn)[(programs,)](*args, **constants)
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **constants)


@contextlib.contextmanager
def _interpreting(fn: Callable) -> Iterator[None]:
    """Has functions that a kernel calls interpreted too, Triton's own (tl.sum) among them, and nothing afterwards.

    TRITON_INTERPRET would do so, but only where it was set before Triton's first import, and for the whole process.
    """
    builder = type(interpreter.interpreter_builder)
    scopes = [interpreter._patch_lang(each) for each in (fn, tl.sum.fn)]
    compiled, dot = JITFunction.__call__, builder.create_dot
    JITFunction.__call__ = lambda self, *args, **kwargs: _rewritten(self.fn)(*args, **kwargs)
    builder.create_dot = lambda self, a, b, *rest: dot(self, _multipliable(a), _multipliable(b), *rest)
    try:
        yield
    finally:
        JITFunction.__call__, builder.create_dot = compiled, dot
        for scope in reversed(scopes):
            scope.restore()


@functools.cache
def _rewritten(fn: Callable) -> Callable:
    return interpreter.InterpretedFunction(fn).rewrite()


def _multipliable(x: Any) -> Any:
    """bf16 as fp32: the interpreter keeps its bits as integers, and tl.dot would multiply these (Triton 3.6)."""
    return interpreter.interpreter_builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
