"""Named axes over the ranks: dp (who holds which samples) x sp (who holds which tokens), and their process groups.

Rank order is dp-major: rank = dp * sp_size + sp, so that the ranks of one sp group, which talk most, are neighbours.
A mesh is a value handed to whoever needs it; there is no current mesh, and an axis of size 1 has no group at all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Axis:
    """One mesh axis as this rank sees it; ``rank`` counts within the axis, ``ranks`` are the members' world ranks."""

    name: str
    size: int
    rank: int
    group: Any  # torch.distributed.ProcessGroup; None where size == 1
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Mesh:
    """The axes of one rank; ``all`` is dp x sp together, in world rank order."""

    rank: int
    world: int
    dp: Axis
    sp: Axis
    all: Axis

    def __getitem__(self, name: str) -> Axis:
        if name not in ("dp", "sp", "all"):
            raise KeyError(f"no mesh axis {name!r}: dp, sp or all")
        return getattr(self, name)


def single() -> Mesh:
    """The mesh of one rank, without any process group."""
    return Mesh(0, 1, *(Axis(name, 1, 0, None, (0,)) for name in ("dp", "sp", "all")))


def check_mesh(world: int, dp: int | None, sp: int) -> tuple[int, int]:
    """(dp, sp) for ``world`` ranks, with dp from what sp leaves where it is None; needs no process group.

    Raises ValueError with the nearest numbers that work.
    """
    for name, value in (("dp", dp), ("sp", sp)):
        if value is not None and value < 1:
            raise ValueError(f"--parallel.{name} {value}: it must be at least 1")
    if world % sp:
        raise ValueError(f"--parallel.sp {sp} does not divide {_ranks(world)}: use {_nearest(world, sp)}")
    if dp is not None and dp * sp != world:
        fixes = [f"--parallel.dp {world // sp}"]
        if world % dp == 0:
            fixes.append(f"--parallel.sp {world // dp}")
        raise ValueError(
            f"--parallel.dp {dp} x --parallel.sp {sp} makes {_ranks(dp * sp)} and there are {world}: "
            f"use {' or '.join(fixes)}, or start {_ranks(dp * sp)}"
        )
    return world // sp, sp


def make_mesh(world: int, rank: int, dp: int | None, sp: int, *, timeout_s: float = TIMEOUT_S) -> Mesh:
    """Makes the axes and their groups; every rank calls this once, at the same place of the program.

    Needs an initialised process group of ``world`` ranks when world > 1. Each axis has a group of its own, so that
    ZeRO's traffic does not queue behind a strategy's; only where sp == 1, ``all`` is dp's group under another name.
    """
    num_dp, num_sp = check_mesh(world, dp, sp)
    if world == 1:
        return single()
    assert dist.is_initialized() and dist.get_world_size() == world, "start() comes before make_mesh()"
    dp_axis = _axis("dp", rank, [tuple(range(s, world, num_sp)) for s in range(num_sp)], timeout_s)
    sp_axis = _axis("sp", rank, [tuple(range(d * num_sp, (d + 1) * num_sp)) for d in range(num_dp)], timeout_s)
    if num_sp == 1:
        all_axis = Axis("all", world, rank, dp_axis.group, dp_axis.ranks)
    else:
        all_axis = _axis("all", rank, [tuple(range(world))], timeout_s)
    return Mesh(rank, world, dp_axis, sp_axis, all_axis)


def start(
    device: str | torch.device, timeout_s: float = TIMEOUT_S, *, share_gpu: bool | None = None
) -> tuple[int, int, int]:
    """(rank, world, local rank) from torchrun's environment, with the process group initialised when world > 1.

    NCCL where each rank has a GPU of its own (which becomes the current one), gloo on CPU, and gloo also where several
    ranks share a GPU, which has to be asked for: ``share_gpu`` or ODIT_SHARE_GPU=1. Without torchrun: (0, 1, 0).
    """
    if "RANK" not in os.environ:
        return 0, 1, 0
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = torch.device(device).type == "cuda"
    num_gpus = torch.cuda.device_count() if on_gpu else 0
    if share_gpu is None:
        share_gpu = os.environ.get("ODIT_SHARE_GPU", "0") == "1"
    chosen = backend(on_gpu, int(os.environ.get("LOCAL_WORLD_SIZE", world)), num_gpus, share_gpu)
    if on_gpu:
        torch.cuda.set_device(local % num_gpus)
    if world > 1:
        own_gpu = torch.device("cuda", local) if chosen == "nccl" else None
        dist.init_process_group(chosen, timeout=timedelta(seconds=timeout_s), device_id=own_gpu)
    return rank, world, local


def backend(on_gpu: bool, local_world: int, num_gpus: int, share_gpu: bool) -> str:
    """nccl or gloo for a machine's ranks and GPUs; raises ValueError where ranks would share a GPU unasked."""
    if not on_gpu:
        return "gloo"
    if num_gpus == 0:
        raise ValueError("no GPU here: use the cpu")
    if local_world <= num_gpus:
        return "nccl"
    if share_gpu:
        return "gloo"
    raise ValueError(
        f"{local_world} ranks on a machine with {num_gpus} GPU{'s' * (num_gpus > 1)}: use --nproc_per_node {num_gpus}, "
        "or ODIT_SHARE_GPU=1 to let ranks share one (through gloo, slow)"
    )


def warm_up(mesh: Mesh) -> None:
    """Uses each group once, so that a broken link shows at start-up and not in the middle of a step."""
    for axis in (mesh.dp, mesh.sp, mesh.all):
        if axis.size == 1:
            continue
        one = torch.ones(1, device="cuda" if dist.get_backend(axis.group) == "nccl" else "cpu")
        try:
            dist.all_reduce(one, group=axis.group)
            total = int(one.item())
        except RuntimeError as error:
            raise RuntimeError(f"axis {axis.name} over ranks {axis.ranks} does not answer: {error}") from error
        assert total == axis.size, f"axis {axis.name} counts {total} ranks and has {axis.size}"


def stop() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _axis(name: str, rank: int, members: list[tuple[int, ...]], timeout_s: float) -> Axis:
    """This rank's axis out of all of that name; every rank makes every group, in this order."""
    mine = None
    for ranks in members:
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s)) if len(ranks) > 1 else None
        if rank in ranks:
            mine = Axis(name, len(ranks), ranks.index(rank), group, ranks)
    assert mine is not None
    return mine


def _nearest(world: int, asked: int) -> str:
    """The divisors of ``world`` on both sides of ``asked``."""
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    below = [d for d in divisors if d < asked][-1:]
    return " or ".join(map(str, below + [d for d in divisors if d > asked][:1]))


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count != 1)}"
