"""The mesh: what is refused and with which numbers, who sits where, and that groups are what the axes say."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed

from odit.parallel import collectives
from odit.parallel import mesh as m

REFUSED = {  # (world, dp, sp): words of the message
    (8, None, 3): "--parallel.sp 3 does not divide 8 ranks: use 2 or 4, or start 9 ranks with torchrun",
    (8, None, 16): "--parallel.sp 16 does not divide 8 ranks: use 8, or start 16 ranks with torchrun",
    (6, None, 4): "--parallel.sp 4 does not divide 6 ranks: use 3 or 6, or start 8 ranks with torchrun",
    (7, None, 2): "--parallel.sp 2 does not divide 7 ranks: use 1 or 7, or start 8 ranks with torchrun",
    (1, None, 2): "--parallel.sp 2 does not divide 1 rank: use 1, or start 2 ranks with torchrun",
    (8, 3, 2): "makes 6 ranks and there are 8: use --parallel.dp 4, or start 6 ranks",
    (8, 2, 2): "makes 4 ranks and there are 8: use --parallel.dp 4 or --parallel.sp 4, or start 4 ranks",
    (4, 8, 1): "makes 8 ranks and there are 4: use --parallel.dp 4, or start 8 ranks",
    (1, 2, 1): "makes 2 ranks and there are 1: use --parallel.dp 1, or start 2 ranks with torchrun",
    (4, 0, 1): "--parallel.dp 0: it must be at least 1",
    (4, None, 0): "--parallel.sp 0: it must be at least 1",
    (4, -2, 2): "--parallel.dp -2: it must be at least 1",
}


@pytest.mark.parametrize("asked", REFUSED, ids=str)
def test_a_wrong_mesh_is_refused_with_the_nearest_that_works(asked):
    with pytest.raises(ValueError) as caught:
        m.check_mesh(*asked)
    assert REFUSED[asked] in str(caught.value)


@pytest.mark.parametrize("world", range(1, 13))
def test_every_divisor_is_served_and_dp_is_what_is_left(world):
    for sp in range(1, world + 1):
        if world % sp == 0:
            assert m.check_mesh(world, None, sp) == m.check_mesh(world, world // sp, sp) == (world // sp, sp)
        else:
            with pytest.raises(ValueError):
                m.check_mesh(world, None, sp)


def test_one_rank_has_no_group():
    mesh = m.make_mesh(1, 0, None, 1)
    assert mesh == m.single() and not dist.is_initialized()
    assert all(mesh[name] == m.Axis(name, 1, 0, None, (0,)) for name in m.AXES)
    with pytest.raises(KeyError, match="no mesh axis 'tp': dp, sp, all, ring, ulysses, pictures or cfg"):
        mesh["tp"]
    m.warm_up(mesh)
    m.stop()


def seats_on_a_rank(mesh) -> dict:
    m.warm_up(mesh)
    seats = {}
    for axis in (mesh[name] for name in m.AXES):
        assert (axis.group is None) == (axis.size == 1)
        members = dist.get_process_group_ranks(axis.group) if axis.group is not None else [mesh.rank]
        assert members == list(axis.ranks) and axis.ranks[axis.rank] == mesh.rank and len(members) == axis.size
        assert axis.group is None or axis.group is not dist.group.WORLD
        seats[axis.name] = (axis.size, axis.rank, axis.ranks)
    return seats | {"own": mesh.sp.group is not mesh.all.group, "rank": (mesh.rank, mesh.world)}


@pytest.mark.parametrize(
    "world, sp", [(w, s) for w in (1, 2, 3, 4) for s in (1, 2, 3, 4) if w % s == 0], scope="session"
)
def test_rank_order_is_dp_major(ranks, world, sp):
    for rank, seats in enumerate(ranks.run(world, seats_on_a_rank, sp=sp)):
        i, j = divmod(rank, sp)
        assert seats["rank"] == (rank, world)
        assert seats["dp"] == (world // sp, i, tuple(d * sp + j for d in range(world // sp)))
        assert seats["sp"] == (sp, j, tuple(i * sp + s for s in range(sp)))
        assert seats["all"] == (world, rank, tuple(range(world)))
        assert seats["own"] or world == 1


def test_axes_within_axes(ranks):
    """Eight ranks as dp 2 x sp 4, sp as ring 2 x ulysses 2, dp as one picture of a guidance pair."""
    for rank, seats in enumerate(ranks.run(8, seats_on_a_rank, sp=4, ulysses=2, cfg=2)):
        half, token = divmod(rank, 4)
        round_, head = divmod(token, 2)
        base = half * 4
        assert seats["ring"] == (2, round_, (base + head, base + head + 2))
        assert seats["ulysses"] == (2, head, (base + 2 * round_, base + 2 * round_ + 1))
        assert seats["cfg"] == seats["dp"] == (2, half, (token, 4 + token))
        assert seats["pictures"] == (1, 0, (rank,))


def test_backend():
    assert m.backend(False, 8, 0, False) == "gloo"
    assert m.backend(True, 4, 4, False) == m.backend(True, 1, 4, True) == "nccl"
    assert m.backend(True, 4, 1, True) == "gloo"
    with pytest.raises(
        ValueError, match="8 ranks on a machine with 4 GPUs: use --nproc_per_node 4, or ODIT_SHARE_GPU=1"
    ):
        m.backend(True, 8, 4, False)
    with pytest.raises(ValueError, match="no GPU here"):
        m.backend(True, 1, 0, False)


START = """
import warnings; warnings.simplefilter("error")
import os, sys
from odit.parallel import mesh as m
rank, world, local = m.start("cpu", timeout_s=60)
mesh = m.make_mesh(world, rank, None, int(sys.argv[1]), timeout_s=60)
m.warm_up(mesh)
print(rank, world, local, mesh.dp.size, mesh.sp.size)
m.stop()
"""


def test_start_under_torchrun():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as torchrun: the launcher keeps the store
        "GLOO_SOCKET_IFNAME": "lo",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", START, "2"],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert [out.strip() for out, _ in told] == ["0 2 0 1 2", "1 2 1 1 2"]


def test_start_of_one_rank_makes_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert m.start("cpu") == (0, 1, 0) and not dist.is_initialized()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert m.start("cpu") == (0, 1, 0) and not dist.is_initialized()


def test_groups_are_left_alone_while_an_error_leaves(monkeypatch):
    ended = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("group"))
    with pytest.raises(KeyError), contextlib.ExitStack() as stack:
        stack.callback(m.stop)
        raise KeyError
    assert not ended
    with contextlib.ExitStack() as stack:
        stack.callback(m.stop)
    assert ended == ["group"]


def test_only_errors_of_collectives_and_of_the_store_are_told_as_such():
    for error in (ValueError("a"), RuntimeError("b"), torch.OutOfMemoryError("c")):
        assert m.broken(error) is None
    words = "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:15. This is typically"
    told = "the group of all ranks broke (Connection closed by peer [127.0.0.1]:15)"
    assert m.broken(dist.DistStoreError(words)) == told


def reduce_what_gloo_cannot(mesh) -> str | None:
    try:
        collectives.all_reduce_(torch.ones(1, dtype=torch.int16), mesh.sp)
    except RuntimeError as error:
        return m.broken(error)
    return None


def test_a_broken_axis_is_named(ranks):
    told = [words.split(" (")[0] for words in ranks.run(4, reduce_what_gloo_cannot, dp=2, sp=2)]
    assert told == 2 * ["axis sp over ranks 0, 1 broke"] + 2 * ["axis sp over ranks 2, 3 broke"]


@pytest.mark.parametrize(
    "asked, name",
    [
        ((2,), "rank 2"),
        ((0, 1, 3), "ranks 0, 1, 3"),
        (range(8), "ranks 0 to 7"),
        ((0, 1, 2, 3, 5), "ranks 0, 1, 2, 3, 5"),
    ],
)
def test_names_of_ranks(asked, name):
    assert m.name_ranks(asked) == name


# ------------------------------------------------------------------------------------------- the pool of the tests


def raise_on_rank_1(mesh):
    if mesh.rank == 1:
        raise ValueError("the words of rank 1")
    return mesh.rank


def pid_on_a_rank(mesh) -> int:
    return os.getpid()


def test_pool_tells_which_rank_failed_and_goes_on(ranks):
    before = ranks.run(2, pid_on_a_rank)
    with pytest.raises(
        RankFailed, match=r"raise_on_rank_1.* failed on rank 1 of 2(.|\n)*ValueError: the words of rank 1"
    ):
        ranks.run(2, raise_on_rank_1)
    assert ranks.run(2, pid_on_a_rank) == before
    assert ranks.run(2, seats_on_a_rank, sp=2)[1]["sp"] == (2, 1, (0, 1))


def rank_1_leaves_others_waiting(mesh):
    if mesh.rank != 1:
        dist.all_reduce(torch.ones(1), group=mesh.all.group)


def rank_1_dies(mesh):
    if mesh.rank == 1:
        os._exit(7)


@pytest.mark.parametrize(
    "fn, words",
    [
        (
            rank_1_leaves_others_waiting,
            r"did not end in 1.0 s on 2 ranks\nrank 0(.|\n)*in rank_1_leaves_others_waiting",
        ),
        (rank_1_dies, r"rank_1_dies.* failed on rank 1 of 2(.|\n)*exit code 7"),
    ],
    ids=["hang", "death"],
)
def test_pool_names_a_rank_that_hangs_or_dies_and_is_rebuilt(ranks, fn, words):
    before = ranks.run(2, pid_on_a_rank)
    with pytest.raises(RankFailed, match=words):
        ranks.run(2, fn, timeout_s=1.0)
    for pid in before:
        assert not Path(f"/proc/{pid}").exists()
    assert ranks.run(2, seats_on_a_rank)[0]["rank"] == (0, 2)
