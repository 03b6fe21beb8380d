"""A function without side effects as CUDA graphs: where few samples are drawn, launching kernels costs more than
running them, and a graph is launched once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from odit import tree

WARM_UP = 2  # calls before a capture: libraries choose kernels and take workspaces in the first ones
MOST = 4  # graphs that one function keeps


def captured(fn: Callable[..., Any], record: Callable | None = None, copies: bool = True) -> Callable[..., Any]:
    """``fn(*trees of tensors) -> tree of tensors`` by a graph a set of shapes, captured when first met; no gradients.

    What ``fn`` closes over (weights) must stay where it is. Results are copies, the caller's own; without ``copies``
    they are good until the next call.

    Args:
        record: ``record(run) -> (replay, result)``, which captures ``run()``; CUDA's unless given.
    """
    record, graphs = record or _recorder(), {}

    def call(*args: Any) -> Any:
        leaves = tree.leaves(list(args))
        shapes = tuple((tuple(x.shape), x.dtype, x.device) for x in leaves)
        if shapes not in graphs:
            if len(graphs) == MOST:
                return fn(*args)
            own = [x.clone() for x in leaves]  # a graph reads its inputs where they were
            graphs[shapes] = own, record(lambda: fn(*tree.unflatten(list(args), own)))
        own, (replay, result) = graphs[shapes]
        if leaves:
            torch._foreach_copy_(own, leaves)
        replay()
        return tree.map(torch.clone, result) if copies else result

    return call


def _recorder() -> Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]:
    """``record(run) -> (replay, result)`` for graphs that share their memory: one runs at a time, and what it gave is
    done with before the next one runs."""
    pool = torch.cuda.graph_pool_handle()
    return lambda run: _record(run, pool)


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The one on which all is captured: cuBLAS keeps a workspace (32 MiB on Hopper) for every stream it has seen."""
    return torch.cuda.Stream(device)


def _record(run: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """Captures a call on a stream of its own; its memory is the graph's until that is dropped."""
    side = _stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # other threads may do as they like: NCCL's asks for events, a checkpoint's locks memory
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            result = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise RuntimeError(
            f"no CUDA graph can be made of this ({why}): use --no-graphs, of a training run --sampling.no-graphs too"
        ) from error
    return graph.replay, result
