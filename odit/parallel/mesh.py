"""Named axes over the ranks: dp (who holds which samples) x sp (who holds which tokens), and their process groups.

Rank order is dp-major: rank = dp * sp_size + sp, so that the ranks of one sp group, which talk most, are neighbours.
Two axes may be seen as products of smaller ones: sp = ring x ulysses and, while pictures are drawn, dp = pictures x cfg
(the two halves of a guidance pair); neighbours lie along the last one. A mesh is a value handed to whoever needs it;
there is no current mesh, and an axis of size 1 has no group at all.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 600.0
MARGIN_S = 30.0  # what groups wait longer than a step may take, so that peers.Watch, which says more, comes first
JOIN_S = 60.0  # a launcher keeps its store from before the ranks start: who does not reach it has lost the launcher


class RanksLost(RuntimeError):
    """Other ranks, or the launcher, that do not answer."""


@dataclass(frozen=True)
class Axis:
    """One mesh axis as this rank sees it; ``rank`` counts within the axis, ``ranks`` are the members' world ranks."""

    name: str
    size: int
    rank: int
    group: Any  # torch.distributed.ProcessGroup; None where size == 1
    ranks: tuple[int, ...]


AXES = ("dp", "sp", "all", "ring", "ulysses", "pictures", "cfg")


@dataclass(frozen=True)
class Mesh:
    """The axes of one rank; ``all`` is dp x sp together, in world rank order."""

    rank: int
    world: int
    dp: Axis
    sp: Axis
    all: Axis
    ring: Axis
    ulysses: Axis
    pictures: Axis
    cfg: Axis

    def __getitem__(self, name: str) -> Axis:
        if name not in AXES:
            raise KeyError(f"no mesh axis {name!r}: {', '.join(AXES[:-1])} or {AXES[-1]}")
        return getattr(self, name)


def alone(name: str, rank: int = 0) -> Axis:
    """An axis of one rank."""
    return Axis(name, 1, 0, None, (rank,))


def single() -> Mesh:
    """The mesh of one rank, without any process group."""
    return Mesh(0, 1, *map(alone, AXES))


def check_mesh(world: int, dp: int | None, sp: int, cfg: int = 1) -> tuple[int, int]:
    """(dp, sp) for ``world`` ranks, with dp from what sp leaves where it is None; needs no process group.

    Raises ValueError with the nearest numbers that work.
    """
    for name, value in (("dp", dp), ("sp", sp)):
        if value is not None and value < 1:
            raise ValueError(f"--parallel.{name} {value}: it must be at least 1")
    if world % sp:
        raise ValueError(
            f"--parallel.sp {sp} does not divide {_ranks(world)}: use {_nearest(world, sp)}, "
            f"or {_start(-(-world // sp) * sp)}"
        )
    if dp is not None and dp * sp != world:
        fixes = [f"--parallel.dp {world // sp}"]
        if world % dp == 0:
            fixes.append(f"--parallel.sp {world // dp}")
        raise ValueError(
            f"--parallel.dp {dp} x --parallel.sp {sp} makes {_ranks(dp * sp)} and there are {world}: "
            f"use {' or '.join(fixes)}, or {_start(dp * sp)}"
        )
    if (samples := world // sp) % cfg:
        more = _start(-(-samples // cfg) * cfg * sp)
        raise ValueError(f"parallel.cfg {cfg} does not divide dp, which is {samples}: use 1, or {more}")
    return world // sp, sp


def make_mesh(
    world: int,
    rank: int,
    dp: int | None,
    sp: int,
    *,
    ulysses: int = 1,
    cfg: int = 1,
    timeout_s: float | None = None,
) -> Mesh:
    """Makes the axes and their groups; every rank calls this once, at the same place of the program.

    Needs an initialised process group of ``world`` ranks when world > 1. Axes of tokens (sp, ring, ulysses) never share
    a group with those of samples, so that ZeRO's traffic does not queue behind a strategy's; otherwise axes of the same
    ranks share one.

    Args:
        ulysses: size of that axis, which divides sp; ring is the rest.
        cfg: 2 where the halves of a guidance pair go to neighbours along dp, which must be even then; else 1.
    """
    num_dp, num_sp = check_mesh(world, dp, sp, cfg)
    assert num_sp % ulysses == 0, (num_sp, ulysses)
    if world == 1:
        return single()
    timeout_s = timeout_s or patience_s() + MARGIN_S
    assert dist.is_initialized() and dist.get_world_size() == world, "start() comes before make_mesh()"
    return _mesh(rank, (num_dp // cfg, cfg, num_sp // ulysses, ulysses), lambda *told: _axis(*told, timeout_s))


def pretend(world: int, dp: int | None, sp: int, *, ulysses: int = 1) -> Mesh:
    """Rank 0's mesh of a world that is not there: for plans, whose tensors hold no numbers that could move."""
    num_dp, num_sp = check_mesh(world, dp, sp)
    assert num_sp % ulysses == 0, (num_sp, ulysses)

    def axis(name: str, rank: int, members: list[tuple[int, ...]]) -> Axis:
        return Axis(name, len(members[0]), 0, None, members[0])

    return _mesh(0, (num_dp, 1, num_sp // ulysses, ulysses), axis)


def _mesh(rank: int, sizes: tuple[int, int, int, int], make: Callable[[str, int, list[tuple[int, ...]]], Axis]) -> Mesh:
    """The axes over a grid of pictures x cfg x ring x ulysses; ``make`` gets each with all its rows of ranks."""
    world = math.prod(sizes)
    grid = torch.arange(world).view(sizes)
    made: dict[tuple, Axis] = {}

    def axis(name: str, *dims: int) -> Axis:
        """The axis along these dims of the grid."""
        size = math.prod(grid.shape[d] for d in dims)
        rows = grid.permute(*(d for d in range(4) if d not in dims), *dims).reshape(-1, size)
        members = [tuple(row) for row in rows.tolist()]
        key = (name in ("sp", "ring", "ulysses"), next(row for row in members if rank in row))
        if key not in made:
            made[key] = make(name, rank, members)
        return replace(made[key], name=name)

    products = {"dp": (0, 1), "sp": (2, 3), "all": (0, 1, 2, 3)}
    factors = {"ring": (2,), "ulysses": (3,), "pictures": (0,), "cfg": (1,)}
    return Mesh(rank, world, **{name: axis(name, *dims) for name, dims in {**products, **factors}.items()})


def start(
    device: str | torch.device, timeout_s: float | None = None, *, share_gpu: bool | None = None
) -> tuple[int, int, int]:
    """(rank, world, local rank) from torchrun's environment, with the process group initialised when world > 1.

    NCCL where each rank has a GPU of its own (which becomes the current one), gloo on CPU, and gloo also where several
    ranks share a GPU, which has to be asked for: ``share_gpu`` or ODIT_SHARE_GPU=1. Without torchrun: (0, 1, 0). Under
    it this process ends with its launcher. Raises RanksLost where not all ranks come.
    """
    if "RANK" not in os.environ:
        return 0, 1, 0
    end_with_launcher()
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
        _join(rank, world, chosen, own_gpu, timeout_s or patience_s())
    return rank, world, local


def patience_s() -> float:
    """Seconds that a step may take before its job is given up: ODIT_TIMEOUT_S, or 600."""
    text = os.environ.get("ODIT_TIMEOUT_S") or str(TIMEOUT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e7:
        raise ValueError(f"ODIT_TIMEOUT_S is {text!r}: use a positive number of seconds")
    return seconds


def end_with_launcher() -> None:
    """Has the kernel kill this process when its parent ends, whatever ends that (Linux; nothing elsewhere)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended just before, and no signal comes
        os.kill(os.getpid(), signal.SIGKILL)


def _join(rank: int, world: int, backend: str, own_gpu: torch.device | None, timeout_s: float) -> None:
    """Initialises the process group over the launcher's store (rank 0's, where no launcher keeps one)."""
    kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    wait_s = min(timeout_s, JOIN_S) if kept_by_launcher else timeout_s
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timedelta(seconds=wait_s)))
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RanksLost(f"rank {rank} does not reach the store at {where} in {wait_s:g} s: {_brief(error)}") from error
    store = dist.PrefixStore(f"odit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set_timeout(timedelta(seconds=timeout_s))
    try:
        store.set(f"came/{rank}", "")
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s), device_id=own_gpu
        )
    except RuntimeError as error:
        late = [r for r in range(world) if not store.check([f"came/{r}"])]
        if late:
            raise RanksLost(f"{name_ranks(late)} of {world} did not come in {timeout_s:g} s") from error
        raise RanksLost(f"rank {rank} does not reach all {world} ranks: {_brief(error)}") from error


def store() -> Any:
    """The key-value store of a job, which outlives its groups; None on one rank."""
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None


def neighbours(rank: int, world: int) -> list[int]:
    """The other ranks that this one's launcher started: they follow one another."""
    local, num = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return [r for r in range(rank - local, rank - local + num) if 0 <= r < world and r != rank]


def process() -> str:
    """A name of this process that ``lives`` can look up on the same machine; empty where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getpid()} {_stat(os.getpid())[19]}"
    except OSError:
        return ""


def lives(name: str) -> bool:
    """Whether that process is still there; one of another machine or container is taken to be."""
    mine = process()
    if not name or name.split()[:2] != mine.split()[:2]:
        return True
    pid, began = name.split()[2:]
    try:
        fields = _stat(int(pid))
    except OSError:
        return False
    return fields[19] == began and fields[0] not in "ZX"  # neither a zombie nor dead


def _stat(pid: int) -> list[str]:
    """The fields of proc(5)'s stat from the state on: 0 is it, 19 when the process started."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_for(store: Any, key: str, seconds: float) -> bool:
    """Whether the key is set before the time is up. Blocks this connection to the store."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except dist.DistStoreError:
        return False
    return True


def broken(error: BaseException) -> str | None:
    """The axis and the words of an error that a collective or the store raised; None for any other error."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals.get("__name__", "") if frames else ""
    ours = raised_in in (__name__, "odit.parallel.collectives") or raised_in.startswith("torch.distributed")
    if not isinstance(error, dist.DistError) and not ours:
        return None
    axes = [value for frame in reversed(frames) for value in frame.f_locals.values() if isinstance(value, Axis)]
    if not axes:
        return f"the group of all ranks broke ({_brief(error)})"
    return f"axis {axes[0].name} over {name_ranks(axes[0].ranks)} broke ({_brief(error)})"


def _brief(error: Exception) -> str:
    """The first sentence of an error's first line, without the place in a C++ source."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[\S*\.\w+:\d+\] ", "", line).split(". ")[0].rstrip(". ") or type(error).__name__


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
    for axis in {id(mesh[name].group): mesh[name] for name in AXES if mesh[name].size > 1}.values():
        one = torch.ones(1, device="cuda" if dist.get_backend(axis.group) == "nccl" else "cpu")
        dist.all_reduce(one, group=axis.group)
        total = int(one.item())
        assert total == axis.size, f"axis {axis.name} counts {total} ranks and has {axis.size}"


def stop() -> None:
    """Ends the process group, if there is one; not while an error leaves: NCCL would wait for ranks that are gone."""
    if dist.is_initialized() and sys.exc_info()[0] is None:
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


def _start(count: int) -> str:
    return f"start {_ranks(count)} with torchrun"


def name_ranks(ranks: Sequence[int]) -> str:
    """'rank 2', 'ranks 0, 1, 3', and 'ranks 0 to 7' where more than four follow one another."""
    if len(ranks) > 4 and tuple(ranks) == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"
