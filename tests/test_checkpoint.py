"""Checkpoints: exact round trips, whole or not at all, and a refusal that says what is wrong."""

import contextlib
import dataclasses
import errno
import filecmp
import json
import os
import shutil
import threading
import time
from concurrent import futures

import pytest
import states
import torch
from conftest import script
from safetensors.torch import load_file, save_file
from safetensors.torch import save as library_save

from odit import checkpoint, manifest, random, saving, shards, train, tree
from odit import source as sources
from odit.config_json import to_json
from odit.health import CheckpointError, Damaged
from odit.parallel import mesh as meshes
from odit.saver import Saver
from odit.storage import Disk, StorageError

KEY = random.key(1)


def state_of(plan, step=7):
    state = train.init_state(plan, KEY)
    noisy = [tree.map(lambda p, i=i: torch.full_like(p, i + 0.1), state.params) for i in range(3)]
    opt = state.opt._replace(m=noisy[0], v=noisy[1], count=torch.tensor(5))
    return state._replace(step=step, opt=opt, ema=noisy[2], loss_scale=train.LossScale(8.0, 3))


@pytest.fixture
def saved(tiny, make_plan):
    plan = make_plan(tiny)
    return plan, checkpoint.save(plan, state_of(plan), {"note": "x"})


def test_round_trip_is_bit_exact(saved):
    plan, path = saved
    state, manifest = checkpoint.load(path, plan)
    expected = state_of(plan)
    assert (state.step, int(state.opt.count), state.loss_scale, manifest["note"]) == (7, 5, (8.0, 3), "x")
    for a, b in [(state.params, expected.params), (state.opt.v, expected.opt.v), (state.ema, expected.ema)]:
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b)))


def test_only_the_newest_are_kept_and_no_rubbish_stays(tiny, make_plan):
    plan = make_plan(tiny)
    for step in (1, 2, 3, 4):
        checkpoint.save(plan, state_of(plan, step), {})
    checkpoint.save(plan, state_of(plan, 4), {})
    assert sorted(p.name for p in (tiny.out / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]


def damage_bit(path):
    data = bytearray((path / "state-00000-of-00001.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "state-00000-of-00001.safetensors").write_bytes(data)


def damage_format(path):
    told = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**told, "format": 99}))


def damage_step(path):
    told = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**told, "updates": 99}, indent=1) + "\n")


DAMAGE = {
    "step": (damage_step, "manifest.json was changed after it was written"),
    "no files": (lambda p: (p / "manifest.json").write_text('{"format": 2}'), "was changed after it was written"),
    "of before": (lambda p: (p / "manifest.json").write_text('{"format": 1}'), "has format 1, this version reads 2"),
    "bit": (damage_bit, "state-00000-of-00001.safetensors was changed after it was written"),
    "short": (
        lambda p: os.truncate(p / "state-00000-of-00001.safetensors", 1000),
        "has 1000 bytes, the manifest says",
    ),
    "missing": (
        lambda p: (p / "state-00000-of-00001.safetensors").unlink(),
        "state-00000-of-00001.safetensors is missing",
    ),
    "manifest": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "format": (damage_format, "has format 99, this version reads 2"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_and_latest_steps_back(saved, kind):
    plan, path = saved
    newest = checkpoint.save(plan, state_of(plan, 9), {})
    damage, message = DAMAGE[kind]
    damage(newest)
    with pytest.raises(Damaged, match=message):
        checkpoint.load(checkpoint.find(str(newest), plan.run.out), plan)
    if kind == "bit":  # only reading all of it shows that
        assert checkpoint.find("latest", plan.run.out) == newest
        assert checkpoint.find("latest", plan.run.out, [newest]) == path
        return
    with pytest.warns(UserWarning, match="stepping back past a broken checkpoint"):
        assert checkpoint.find("latest", plan.run.out) == path


def test_what_is_not_there_is_said(saved):
    plan, path = saved
    with pytest.raises(CheckpointError, match=r"is no checkpoint \(no manifest.json\); steps in .*: 7"):
        checkpoint.find(str(path.with_name("step_00000008")), plan.run.out)
    (path / "state-00000-of-00001.safetensors").unlink()
    message = r"no checkpoint in .* is whole \(steps 7\): use another --out"
    with pytest.warns(UserWarning, match="stepping back"), pytest.raises(CheckpointError, match=message):
        checkpoint.find("latest", plan.run.out)
    shutil.rmtree(path)
    assert checkpoint.find("latest", plan.run.out) is None


def test_another_model_is_refused_with_both_shapes(saved, make_plan):
    plan, path = saved
    wider = make_plan(plan.run, model=dataclasses.replace(plan.run.model, width=64))
    with pytest.raises(CheckpointError, match=r"param/patch.w .* has shape \(32, 4\), this model wants \(64, 4\)"):
        checkpoint.load(path, wider)
    shallower = make_plan(plan.run, model=dataclasses.replace(plan.run.model, depth=1))
    with pytest.raises(CheckpointError, match=r"tensors this model has not, the first is param/blocks\.1"):
        checkpoint.load(path, shallower)
    deeper = make_plan(plan.run, model=dataclasses.replace(plan.run.model, depth=3))
    with pytest.raises(CheckpointError, match=r"has no tensor param/blocks\.2"):
        checkpoint.load(path, deeper)


def test_weights_file(saved, tmp_path):
    plan, path = saved
    ema = state_of(plan).ema
    checkpoint.save_weights(tmp_path / "w.safetensors", ema, {"step": 7})
    assert checkpoint.read_about(tmp_path / "w.safetensors") == {"step": 7}
    for source in (tmp_path / "w.safetensors", path):
        loaded = checkpoint.load_weights(source, plan)
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(loaded), tree.leaves(ema)))
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish rubbish rubbish")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is no safetensors file"):
        checkpoint.read_about(tmp_path / "bad.safetensors")


def test_a_weights_file_on_a_full_disk(saved, tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(
        StorageError, match=r"w\.safetensors cannot be written \(ENOSPC.*\d+ bytes are needed, \d+ are free"
    ):
        checkpoint.save_weights(path, state_of(saved[0]).ema, {"step": 7}, disk=states.FullDisk())
    assert not list(tmp_path.glob("*w.safetensors*"))


def test_a_flipped_bit_in_a_weights_file_is_refused(saved, tmp_path):
    """Anywhere: of data by file and tensor, even where a box of it is read; of the header whatever it hits."""
    plan, _ = saved
    path, ema = tmp_path / "w.safetensors", state_of(plan).ema
    checkpoint.save_weights(path, ema, {"config": {"steps": 20}, "step": 7})
    good, head = path.read_bytes(), int.from_bytes(path.read_bytes()[:8], "little") + 8
    layout = json.loads(good[8:head])
    for name in ("ema/patch.w", "ema/blocks.1.mlp.fc2.w"):
        start, end = layout[name]["data_offsets"]
        for at in (start, (start + end) // 2, end - 1):
            path.write_bytes(flipped(good, head + at))
            with pytest.raises(Damaged, match=rf"{name} in .*w\.safetensors was changed after it was written"):
                checkpoint.load_weights(path, plan)
    weights = checkpoint.open_weights(path)  # the file of the last round
    shape = weights.shapes["blocks.1.mlp.fc2.w"]
    with pytest.raises(Damaged, match=r"ema/blocks\.1\.mlp\.fc2\.w"):
        weights.read("blocks.1.mlp.fc2.w", (shape[0] - 1, shape[1] - 1), (1, 1))
    for at in range(0, head, 7):
        path.write_bytes(flipped(good, at))
        try:
            told, loaded = checkpoint.read_about(path), checkpoint.load_weights(path, plan)
        except CheckpointError:
            continue
        assert told == {"config": {"steps": 20}, "step": 7}  # in the name of a field that nobody reads
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(loaded), tree.leaves(ema)))


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_weights_file_without_hashes_loads_with_a_note(saved, tmp_path):
    plan, _ = saved
    path, ema = tmp_path / "w.safetensors", state_of(plan).ema
    about = {"config": to_json(plan.run), "shape": dataclasses.asdict(plan.shape), "step": 7}
    checkpoint.save_weights(path, ema, about)
    assert sources.open_source(path).note == []
    metadata = {"weights": "ema", "odit": json.dumps(about)}
    save_file({f"ema/{name}": leaf for name, leaf in tree.items(ema)}, path, metadata)
    opened = sources.open_source(path)
    assert opened.note == [f"{path} carries no hashes: a changed byte in it would not show"]
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(opened.load(plan)), tree.leaves(ema)))


def test_files_are_the_librarys_byte_for_byte(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for metadata in (None, {"format": "pt"}):
        told = shards.write_tensors(tmp_path / "x.safetensors", tensors, metadata)
        data = (tmp_path / "x.safetensors").read_bytes()
        assert data == library_save(tensors, metadata)
        assert (told.size, told.hash) == (len(data), manifest.hash_of(data))
    strided = {"a": torch.arange(12.0).view(3, 4).T, "b": torch.zeros(()).expand(5)}
    shards.write_tensors(tmp_path / "y.safetensors", strided)
    assert all(torch.equal(x, strided[name]) for name, x in load_file(tmp_path / "y.safetensors").items())


SHAPES = {"b": (5, 7), "a": (), "blocks.10.w": (3,), "blocks.2.w": (2, 2), "empty": (0, 3), "é": (1,)}


# ----------------------------------------------------------------------------------------------------------- many ranks


def test_what_one_rank_finds_is_raised_on_all(ranks, tmp_path):
    """And saves by processes, through their store, one after another."""
    assert ranks.run(2, write_on, tmp_path) == [[7, 9], [7, 9]]
    file = saving.folder_of(tmp_path, 9) / "state-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # of what rank 1 alone reads
    file.write_bytes(data)
    told = ranks.run(2, refused_on, tmp_path)
    assert (
        told[0]
        == told[1]
        == [
            f"Damaged: param/two in {file} was changed after it was written: its hash is not the manifest's",
            "7 CheckpointError: of rank 0",
        ]
    )


def on(mesh, out):
    return dataclasses.replace(states.plan_of(out, mesh.world, mesh.rank, zero=3), mesh=mesh)


def write_on(mesh, out):
    composed = on(mesh, out)
    for step in (7, 9):
        checkpoint.save(composed, states.state_of(composed, step), {})
    return checkpoint.steps(out)


def refused_on(mesh, out):
    composed, told = on(mesh, out), []
    try:
        checkpoint.load(saving.folder_of(out, 9), composed)
    except CheckpointError as error:
        told.append(f"{type(error).__name__}: {error}")
    state, _ = checkpoint.load(saving.folder_of(out, 7), composed)
    assert states.is_state(composed, state, 7)
    try:
        assert checkpoint.on_rank_0(mesh.all, lambda: mesh.rank + 7) == 7
        checkpoint.on_rank_0(mesh.all, fail)
    except CheckpointError as error:
        told.append(f"{state.step} {type(error).__name__}: {error}")
    return told


def fail():
    raise CheckpointError("of rank 0")


# ----------------------------------------------------------------------------------------------- saving beside training


class Gated(Disk):
    """Writes nothing until it may; may fail then."""

    def __init__(self, code=None):
        self.gate, self.code = threading.Event(), code

    def create(self, path):
        assert self.gate.wait(10)
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        return super().create(path)


def move_(state):
    """An update in place."""
    for leaf in tree.leaves([state.params, state.opt.m, state.opt.v, state.ema]):
        leaf.add_(1.0)


def test_later_updates_do_not_leak_into_a_save(tmp_path):
    """And its bytes are those of a save that is waited for."""
    composed, disk = states.plan_of(tmp_path / "a"), Gated()
    state = states.state_of(composed, 7)
    with Saver(composed, background=True, disk=disk) as saver:
        saver.save(state, {"note": 7})
        move_(state)
        saver.at_step(8)
        assert not checkpoint.steps(tmp_path / "a")
        disk.gate.set()
    loaded, _ = checkpoint.load(saving.folder_of(tmp_path / "a", 7), composed)
    assert states.is_state(composed, loaded, 7)
    other = states.plan_of(tmp_path / "b")
    with Saver(other, background=False) as saver:
        saver.save(states.state_of(other, 7), {"note": 7})
        assert checkpoint.steps(tmp_path / "b") == [7]
    names = ["manifest.json", "state-00000-of-00001.safetensors"]
    folders = [saving.folder_of(tmp_path / name, 7) for name in "ab"]
    assert filecmp.cmpfiles(*folders, names, shallow=False) == (names, [], [])


def test_one_save_is_in_flight(tmp_path):
    composed, disk = states.plan_of(tmp_path), Gated()
    with Saver(composed, background=True, disk=disk) as saver:
        saver.save(states.state_of(composed, 7), {})
        timer = threading.Timer(0.1, disk.gate.set)
        timer.start()
        saver.save(states.state_of(composed, 9), {})
        assert 7 in checkpoint.steps(tmp_path)
        timer.join()
    assert checkpoint.steps(tmp_path) == [7, 9]
    for step in (7, 9):
        assert states.is_state(composed, checkpoint.load(saving.folder_of(tmp_path, step), composed)[0], step)


def test_an_error_comes_at_the_next_step_where_it_is_waited_for_and_at_the_end(tmp_path):
    composed = states.plan_of(tmp_path)

    def failed():
        disk = Gated(errno.ENOSPC)
        saver = Saver(composed, background=True, disk=disk)
        saver.save(states.state_of(composed, 7), {})
        saver.at_step(8)  # nothing has happened yet
        disk.gate.set()
        return saver

    saver = failed()
    saver.flight.thread.join()
    with pytest.raises(StorageError, match="ENOSPC"):
        saver.at_step(9)
    saver.at_step(10)  # once
    with pytest.raises(StorageError, match="ENOSPC"):
        failed().save(states.state_of(composed, 9), {})
    with pytest.raises(StorageError, match="ENOSPC"), failed():
        pass
    with pytest.raises(ValueError, match="the first error"), failed():
        raise ValueError("the first error")


def test_all_ranks_raise_after_the_same_step(tmp_path, monkeypatch):
    """Whenever the threads end: steps keep ranks together, here by a barrier in each."""
    world, raised = 3, {}
    store, barrier, disks = states.Store(world), threading.Barrier(world), [Gated(errno.EIO) for _ in range(world)]
    monkeypatch.setattr(saving.meshes, "store", lambda: store)

    def run(rank):
        composed = states.plan_of(tmp_path, world, rank, zero=2)
        saver = Saver(composed, background=True, disk=disks[rank])
        saver.save(states.state_of(composed, 7), {})
        for step in range(8, 2000):
            barrier.wait()
            if step == 10 + 3 * rank:
                disks[rank].gate.set()
            try:
                saver.at_step(step)
            except StorageError as error:
                raised[rank] = (step, str(error))
                return

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(raised) == world and len(set(raised.values())) == 1 and raised[0][0] > 16


def test_who_has_lost_the_others_does_not_wait_for_them(tmp_path):
    composed, disk = states.plan_of(tmp_path), Gated()
    saver = Saver(composed, background=True, disk=disk)
    with pytest.raises(meshes.RanksLost), saver:
        saver.save(states.state_of(composed, 7), {})
        raise meshes.RanksLost("rank 1")
    assert not checkpoint.steps(tmp_path)
    disk.gate.set()
    saver.flight.join()


def test_a_rank_that_says_nothing_is_waited_for_in_vain_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setenv("ODIT_TIMEOUT_S", "0.1")
    store = torch.distributed.HashStore()
    composed = states.plan_of(tmp_path, 2, 0, zero=2)
    job = saving.job(composed, states.state_of(composed, 7), {})
    with pytest.raises(meshes.RanksLost, match=r"rank 0 waited 0\.1\d* s for rank 1 to write its part of a checkpoint"):
        saving.write(job, saving.Talk(store, 0, 2))


@pytest.mark.parametrize("slowest, commits", [(2**40, False), (64.0, True)])
def test_a_save_has_time_by_its_bytes(tmp_path, monkeypatch, slowest, commits):
    """However short a step is: one that takes longer than a step, but not longer than slow storage, is waited for."""
    store = torch.distributed.HashStore()
    monkeypatch.setenv("ODIT_TIMEOUT_S", "0.1")
    monkeypatch.setattr(saving, "SLOWEST", slowest)

    class Slow(Disk):
        def sync(self, handle):
            time.sleep(0.4)
            super().sync(handle)

    def save(rank):
        composed = states.plan_of(tmp_path, 2, rank, zero=2)
        job = saving.job(composed, states.state_of(composed, 7), {})
        saving.write(job, saving.Talk(store, rank, 2), (Slow(), Disk())[rank])

    with futures.ThreadPoolExecutor() as pool:
        errors = [rank.exception() for rank in [pool.submit(save, rank) for rank in range(2)]]
    assert [type(error) for error in errors] == [type(None), type(None) if commits else meshes.RanksLost]
    assert checkpoint.steps(tmp_path) == [7]  # by rank 0, which nobody has told


def test_long_words_go_through_a_store_in_parts(monkeypatch):
    monkeypatch.setattr(saving, "PART", 3)
    store = torch.distributed.HashStore()
    first, second = (saving.Talk(store, rank, 2) for rank in range(2))
    first.tell("a", {"b": "é" * 10})
    assert second.hear("a", "") == {"b": "é" * 10} and first.name == second.name == "checkpoint/1"
    second.forget("a")
    assert saving.Talk(store, 1, 2).name == "checkpoint/2"
    with contextlib.suppress(Exception):
        assert not store.check(["checkpoint/1/a/0"])


@pytest.mark.gpu
def test_on_a_gpu_a_copy_is_taken_before_the_next_update(tmp_path):
    """Of a state of 400 MB, moved in place right after it was handed over."""
    from odit import param

    declared = {"w": param.Param((5000, 5000), "DX", param.zeros)}
    composed = dataclasses.replace(states.plan_of(tmp_path, declared=declared), device=torch.device("cuda"))
    trees = [{"w": torch.full((5000, 5000), float(n), device="cuda")} for n in range(4)]
    opt = train.optim.AdamState(trees[1], trees[2], torch.tensor(7))
    state = train.TrainState(7, trees[0], opt, trees[3], train.LossScale(1.0, 0))
    with Saver(composed, background=True) as saver:
        saver.save(state, {})
        move_(state)
    loaded, _ = checkpoint.load(saving.folder_of(tmp_path, 7), dataclasses.replace(composed, device="cpu"))
    for n, t in enumerate((loaded.params, loaded.opt.m, loaded.opt.v, loaded.ema)):
        assert torch.equal(t["w"].cpu(), torch.full((5000, 5000), float(n)))


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_steps_back_past_a_flipped_bit(tiny, capsys):
    """Which reading alone shows: the sizes are right."""
    train_script, run = script("train"), dataclasses.replace(tiny, checkpoint_every=1, stop_at=2, validate_every=50)
    train_script.main(run)
    expected = (saving.folder_of(run.out, 2) / "state-00000-of-00001.safetensors").read_bytes()
    damage_bit(saving.folder_of(run.out, 2))
    with pytest.warns(UserWarning, match="stepping back past a broken checkpoint: .* was changed after it was written"):
        train_script.main(dataclasses.replace(run, resume="latest"))
    assert f"resumed from {saving.folder_of(run.out, 1)} at step 1" in capsys.readouterr().out
    assert (saving.folder_of(run.out, 2) / "state-00000-of-00001.safetensors").read_bytes() == expected
    assert (run.out / "checkpoints" / "abandoned_step_00000002").is_dir()


def test_a_run_on_a_full_disk_ends_with_what_is_wrong(tiny, monkeypatch):
    """And leaves the checkpoint before."""
    train_script, run = script("train"), dataclasses.replace(tiny, checkpoint_every=1, stop_at=1)
    train_script.main(run)
    monkeypatch.setattr(Saver.__init__, "__defaults__", (full(),))
    with pytest.raises(
        StorageError, match=r"cannot be written \(ENOSPC: No space left on device\): \d+ bytes are needed"
    ):
        train_script.main(dataclasses.replace(run, stop_at=4, resume="latest"))
    assert checkpoint.steps(run.out) == [1]


def full():
    disk = Gated(errno.ENOSPC)
    disk.gate.set()
    return disk
