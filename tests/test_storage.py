"""Writing whole or not at all: what a power cut, a full disk or a failing one leaves of a save."""

import errno
import itertools
import os
import random
import subprocess
import threading

import pytest
import states

from odit import checkpoint, health, record, saving, storage
from odit.storage import Disk, StorageError

SMALL = {name: states.DECLARED[name] for name in ("scalar", "prime", "two")}
BEFORE, NEW = 7, 9
LAYOUT = {"zero": 2, "keep": 1, "declared": SMALL}  # keep 1: the one before is deleted in the same save
CALLS = ("create", "write", "sync", "close", "sync_path", "make_folder", "rename", "remove", "remove_folder")


def newest(out):
    """The step of the newest checkpoint, which is read whole; every folder that looks like one must be."""
    assert all(saving.is_whole(saving.folder_of(out, step)) for step in saving.steps(out))
    path = checkpoint.find("latest", out)
    if path is None:
        return None
    composed = states.plan_of(out, declared=SMALL)
    state, _ = checkpoint.read(path, composed)
    assert states.is_state(composed, state, state.step)
    return state.step


# ---------------------------------------------------------------------------------------------------------- a power cut


class File:
    """What is written of a file, and what of it is on the disk."""

    def __init__(self):
        self.now, self.forced = b"", b""


class Folder:
    """Names in a folder, and those that are on the disk."""

    def __init__(self):
        self.now, self.forced = {}, {}


class Volatile(Disk):
    """A disk that loses in a power cut what was not forced to it; writes below ``root`` as any other besides.

    After each call ``look(self)`` is called.
    """

    def __init__(self, root, look=lambda disk: None):
        self.root, self.top, self.look = root, Folder(), look
        self.open, self.lock = {}, threading.RLock()

    def at(self, path):
        node = self.top
        for name in path.relative_to(self.root).parts:
            node = node.now[name]
        return node

    def force_all(self, node=None):
        node = node or self.top
        node.forced = dict(node.now) if isinstance(node, Folder) else node.now
        for child in node.now.values() if isinstance(node, Folder) else ():
            self.force_all(child)

    def create(self, path):
        handle = super().create(path)
        self.open[handle] = self.at(path.parent).now[path.name] = File()
        return handle

    def write(self, handle, data):
        super().write(handle, data)
        self.open[handle].now += bytes(data)

    def sync(self, handle):
        self.open[handle].forced = self.open[handle].now

    def close(self, handle):
        super().close(handle)
        del self.open[handle]

    def sync_path(self, path):
        node = self.at(path)
        node.forced = dict(node.now) if isinstance(node, Folder) else node.now

    def make_folder(self, path):
        super().make_folder(path)
        self.at(path.parent).now[path.name] = Folder()

    def rename(self, old, new):
        super().rename(old, new)
        self.at(new.parent).now[new.name] = self.at(old.parent).now.pop(old.name)

    def remove(self, path):
        super().remove(path)
        del self.at(path.parent).now[path.name]

    def remove_folder(self, path):
        super().remove_folder(path)
        del self.at(path.parent).now[path.name]

    def after_cut(self, root, names, data):
        """Puts what a power cut leaves below ``root``: ``names(folder)`` and ``data(file)`` choose what was in time."""

        def put(path, node):
            if isinstance(node, File):
                path.write_bytes(data(node))
                return
            path.mkdir()
            for name, child in names(node).items():
                put(path / name, child)

        put(root, self.top)


def watched(name):
    def call(disk, *args):
        with disk.lock:
            result = getattr(Volatile, name)(disk, *args)
            disk.look(disk)
            return result

    return call


class Watched(Volatile):
    """Looks after every call."""


for call in CALLS:
    setattr(Watched, call, watched(call))

CUTS = {
    "forced alone": (lambda draws, f: f.forced, lambda draws, f: f.forced),
    "names are quick, data late": (lambda draws, f: f.now, lambda draws, f: f.forced),
    "data is torn": (lambda draws, f: f.now, lambda draws, f: f.forced or f.now[: len(f.now) // 2]),
    "data is quick, names late": (lambda draws, f: f.forced, lambda draws, f: f.now),
    "as it comes": (lambda draws, f: draws.choice([f.now, f.forced]), lambda draws, f: draws.choice([f.now, f.forced])),
    "some removals late": (
        lambda draws, f: {**{name: f.forced[name] for name in f.forced if draws.random() < 0.5}, **f.now},
        lambda draws, f: f.forced,
    ),
}


def after_cuts(folder, cut, before, act, read, times=lambda root: 1):
    """What ``read`` finds in what a power cut leaves before, after each call of ``act(root, disk)``, and at its end.

    ``before(root, disk)`` is what was done in peace; ``times(root)`` cuts are tried after a call.
    """
    root, left, draws = folder / "disk", [], random.Random(cut)
    names, data = CUTS[cut]

    def look(disk):
        for _ in range(times(root)):
            left.append(folder / f"left{len(left)}")
            disk.after_cut(left[-1], lambda f: names(draws, f), lambda f: data(draws, f))

    root.mkdir()
    disk = Watched(root)
    before(root, disk)
    look(disk)
    disk.look = look
    act(root, disk)
    look(disk)
    return [read(state) for state in left]


def assert_one_after_the_other(found, old, new, cut):
    """Old and new are all that a power cut leaves; first old, at the end new, and none comes back."""
    assert set(found) == {old, new} and (found[0], found[-1]) == (old, new)
    assert cut == "as it comes" or found == sorted(found, key=[old, new].index)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_power_cut_at_any_moment_of_a_save(tmp_path, world, cut):
    """The newest checkpoint is the one before or the new one; the new one from the moment on in which save returns."""

    def save(root, disk, step=NEW):
        folder = saving.folder_of(root / "run", step)
        assert states.save(root / "run", step, world, [disk] * world, **LAYOUT) == [folder] * world
        assert saving.steps(root / "run") == [step]

    def before(root, disk):
        save(root, disk, BEFORE)
        disk.after_cut(tmp_path / "first", lambda f: f.forced, lambda f: f.forced)
        assert newest(tmp_path / "first" / "run") == BEFORE

    def times(root):
        return 16 if cut == "some removals late" and NEW in saving.steps(root / "run") else 1

    found = after_cuts(tmp_path, cut, before, save, lambda left: newest(left / "run"), times)
    assert_one_after_the_other(found, BEFORE, NEW, cut)


@pytest.mark.parametrize("cut", CUTS)
def test_a_power_cut_while_checkpoints_are_set_aside(tmp_path, cut):
    """The later one is there whole or is not, and is not from the moment on in which ``set_aside`` returns."""

    def before(root, disk):
        for step in (BEFORE, NEW):
            states.save(root / "run", step, 1, [disk], **(LAYOUT | {"keep": 2}))

    def act(root, disk):
        saving.set_aside(root / "run", BEFORE, disk)
        assert saving.is_whole(root / "run" / "checkpoints" / f"abandoned_step_{NEW:08d}")

    assert_one_after_the_other(
        after_cuts(tmp_path, cut, before, act, lambda left: newest(left / "run")), NEW, BEFORE, cut
    )


@pytest.mark.parametrize("cut", CUTS)
def test_a_power_cut_while_one_file_is_written(tmp_path, cut):
    """It is the one before or the new one, the new one when ``whole`` ends, though its writer forces nothing."""

    def written(data):
        def act(root, disk):
            with storage.whole(root / "run" / "file", disk) as temporary:
                handle = disk.create(temporary)
                disk.write(handle, data)
                disk.close(handle)

        return act

    def read(left):
        file = left / "run" / "file"
        return file.read_bytes() if file.exists() else None

    found = after_cuts(tmp_path, cut, written(b"the old"), written(b"the new"), read)
    assert_one_after_the_other(found, b"the old", b"the new", cut)


# ----------------------------------------------------------------------------------------- disks that fail, or are full


class Failing(Disk):
    """Fails at its n-th call and, if it stays ill, at all later ones; counts calls."""

    def __init__(self, at=None, code=errno.EIO, ill=False):
        self.at, self.code, self.ill, self.count = at, code, ill, 0

    def come(self):
        self.count += 1
        if self.at is not None and (self.count == self.at or (self.ill and self.count > self.at)):
            raise OSError(self.code, os.strerror(self.code))


def failing(name):
    def call(disk, *args):
        if name != "close":
            disk.come()
        return None if name in ("sync", "sync_path") else getattr(Disk, name)(disk, *args)

    return call


for call in CALLS:
    setattr(Failing, call, failing(call))


@pytest.mark.parametrize("ill", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_call_that_fails_fails_the_save_on_all_ranks(tmp_path, rank, ill, capsys):
    """But where the new checkpoint is whole and the one before cannot be deleted."""
    out, stays = (
        tmp_path / "run",
        f"{saving.folder_of(tmp_path / 'run', BEFORE)} cannot be deleted (Input/output error)",
    )
    states.save(out, BEFORE, 2, **LAYOUT)
    for at in itertools.count(1):
        disks = [Failing(at if r == rank else None, ill=ill) for r in range(2)]
        first, second = states.save(out, NEW, 2, disks, **LAYOUT)
        if disks[rank].count < at:
            break  # there is no such call
        told = capsys.readouterr().err
        if stays in told:
            assert rank == 0 and first == second == saving.folder_of(out, NEW) and newest(out) == NEW
        else:
            assert isinstance(first, StorageError) and isinstance(second, StorageError) and str(first) == str(second)
            assert "EIO: Input/output error" in str(first) and str(out) in str(first) and "\n" not in str(first)
            assert newest(out) in (BEFORE, NEW)
        if newest(out) == NEW:
            saving.delete(saving.folder_of(out, NEW))
            states.save(out, BEFORE, 2, **LAYOUT)
    assert (
        at > 4
        and (stays in told) == (rank == 0)
        and states.save(out, NEW, 2, **LAYOUT)[0] == saving.folder_of(out, NEW)
    )
    assert os.listdir(out / "checkpoints") == [f"step_{NEW:08d}"]


class Full(Disk):
    """Has room for some bytes."""

    def __init__(self, room):
        self.room, self.lock = room, threading.Lock()

    def write(self, handle, data):
        with self.lock:
            fits = min(self.room, len(data))
            self.room -= fits
        super().write(handle, memoryview(data)[:fits])
        if fits < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def free(self, path):
        return self.room


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_at_twenty_levels(tmp_path, world):
    out = tmp_path / "run"
    states.save(out, BEFORE, world, **LAYOUT)
    size = sum(file.stat().st_size for file in saving.folder_of(out, BEFORE).iterdir())
    for level in range(20):
        found = states.save(out, NEW, world, [Full(size * level // 20)] * world, **LAYOUT)
        assert all(isinstance(error, StorageError) for error in found) and len({str(error) for error in found}) == 1
        pattern = (
            r"step_00000009 cannot be written \(ENOSPC: No space left on device\): \d+ bytes are needed, \d+ are free"
        )
        with pytest.raises(StorageError, match=pattern):
            raise found[0]
        assert newest(out) == BEFORE and os.listdir(out / "checkpoints") == [f"step_{BEFORE:08d}"]
    assert health.exit_code(found[0]) == 6
    states.save(out, NEW, world, [Full(size + 100)] * world, **LAYOUT)
    assert newest(out) == NEW


@pytest.fixture
def tmpfs(tmp_path):
    """A small file system in memory, where this user may mount one."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_tmpfs_at_twenty_levels(tmpfs):
    out = tmpfs / "run"
    states.save(out, BEFORE, 2, **LAYOUT)
    (tmpfs / "last").write_bytes(bytes(4096))
    failed = 0
    for level in range(20):
        room = 1024 * level * 2
        with open(tmpfs / "filling", "wb") as file:
            free = Disk().free(tmpfs) - room
            file.write(bytes(max(0, free)))
        found = states.save(out, NEW, 2, **LAYOUT)
        (tmpfs / "filling").unlink()
        if isinstance(found[0], StorageError):
            failed += 1
            assert "ENOSPC" in str(found[0]) and str(found[0]) == str(found[1]) and newest(out) == BEFORE
        else:
            assert newest(out) == NEW
            saving.delete(saving.folder_of(out, NEW))
            states.save(out, BEFORE, 2, **LAYOUT)
    assert failed > 5


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOENT, errno.ESTALE, errno.EACCES])
def test_storage_that_is_read_only_or_gone(tmp_path, code):
    out = tmp_path / "run"
    states.save(out, BEFORE, **LAYOUT)
    (error,) = states.save(out, NEW, disks=[Failing(1, code, ill=True)], **LAYOUT)
    assert isinstance(error, StorageError) and errno.errorcode[code] in str(error) and newest(out) == BEFORE


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES])
def test_storage_of_which_nothing_can_be_asked(tmp_path, monkeypatch, code):
    """The sentence comes all the same, which all ranks are told."""
    out, real = tmp_path / "run", os.stat
    states.save(out, BEFORE, **LAYOUT)

    def gone(path, *args, **kwargs):
        if str(path).startswith(str(out)):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", gone)
        (error,) = states.save(out, NEW, disks=[Failing(1, code, ill=True)], **LAYOUT)
    assert isinstance(error, StorageError) and errno.errorcode[code] in str(error), error
    assert str(error).endswith("are free: use another --out") and newest(out) == BEFORE


def test_an_error_that_is_not_the_disks_fails_all_ranks_too(tmp_path):
    class Wrong(Disk):
        def write(self, handle, data):
            raise RuntimeError("a mistake")

    found = states.save(tmp_path, NEW, 2, [Disk(), Wrong()], **LAYOUT)
    assert [str(error) for error in found] == 2 * [
        f"{saving.folder_of(tmp_path, NEW)} was not written (RuntimeError on rank 1: a mistake)"
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_that_lacks_a_piece_commits_nothing(tmp_path, world):
    """As by a layout in which no rank owns it."""
    states.save(tmp_path, BEFORE, world, **LAYOUT)
    job, lost = saving.job, "ema/two"

    def lacking(*args):
        found = job(*args)
        return found._replace(pieces={name: x for name, x in found.pieces.items() if name != lost})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "job", lacking)
        found = states.save(tmp_path, NEW, world, **LAYOUT)
    told = f".step_{NEW:08d}.tmp/manifest.json: the pieces of {lost} hold 0 of its 6 elements"
    assert all(isinstance(error, StorageError) and told in str(error) for error in found), found
    assert newest(tmp_path) == BEFORE and os.listdir(tmp_path / "checkpoints") == [f"step_{BEFORE:08d}"]


# ------------------------------------------------------------------------------------------------------------ the parts


def test_only_whole_checkpoints_count_for_retention(tmp_path):
    for step in (3, 5, 7):
        states.save(tmp_path, step, **(LAYOUT | {"keep": 9}))
    for step in (5, 7):
        (saving.folder_of(tmp_path, step) / "state-00000-of-00001.safetensors").unlink()
    states.save(tmp_path, 9, **(LAYOUT | {"keep": 2}))
    assert {3, 9} <= set(saving.steps(tmp_path))
    states.save(tmp_path, 11, **(LAYOUT | {"keep": 2}))
    assert 3 not in saving.steps(tmp_path) and {9, 11} <= set(saving.steps(tmp_path))


def test_a_step_that_is_there_stays_and_a_broken_one_is_replaced(tmp_path):
    (path,) = states.save(tmp_path, 9, **LAYOUT)
    before = (path / "manifest.json").stat()
    states.save(tmp_path, 9, **LAYOUT)
    assert (path / "manifest.json").stat().st_ino == before.st_ino
    (path / "state-00000-of-00001.safetensors").unlink()
    states.save(tmp_path, 9, **LAYOUT)
    assert newest(tmp_path) == 9 and os.listdir(tmp_path / "checkpoints") == ["step_00000009"]


def test_what_cannot_be_cleared_away_is_let_be(tmp_path, capsys):
    """As a file that a reader on another machine holds open; what is in the new one's own way is not."""

    class Held(Disk):
        def remove(self, path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    left = tmp_path / "checkpoints" / ".step_00000003.old"
    left.mkdir(parents=True)
    (left / "x").write_text("x")
    (path,) = states.save(tmp_path, 9, 1, [Held()], **LAYOUT)
    assert newest(tmp_path) == 9 and left.exists()
    assert capsys.readouterr().err == f"{left} cannot be deleted (Device or resource busy) and stays for now\n"
    left.rename(left.with_name(".step_00000011.tmp"))
    (error,) = states.save(tmp_path, 11, 1, [Held()], **LAYOUT)
    assert isinstance(error, StorageError) and "EBUSY" in str(error)
    states.save(tmp_path, 11, **LAYOUT)
    assert os.listdir(path.parent) == ["step_00000011"]


def test_what_killed_saves_left_is_cleared_away(tmp_path):
    for name in (".step_00000005.tmp", ".step_00000003.old", ".abandoned_step_00000004.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "x").write_text("x")
    (tmp_path / "checkpoints" / ".mine").mkdir()
    states.save(tmp_path, 9, **LAYOUT)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [".mine", "step_00000009"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    record.write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    disk = Failing()
    storage.write_json(path, {"a": 2}, disk=disk)
    assert disk.count == 6  # create, write and sync; sync again, for writers that do not; rename; sync of its name
    for at in range(1, 7):
        with pytest.raises(OSError):
            storage.write_json(path, {"a": 1}, disk=Failing(at))
        assert path.read_text() in ('{\n  "a": 1\n}\n', '{\n  "a": 2\n}\n') and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(TypeError):
        storage.write_json(path, {"a": object()})
    assert os.listdir(tmp_path) == ["a.json"]


def test_removing_follows_no_link(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_text("x")
    (tmp_path / "gone" / "below").mkdir(parents=True)
    (tmp_path / "gone" / "below" / "link").symlink_to(tmp_path / "kept")
    storage.remove_tree(tmp_path / "gone")
    storage.remove_tree(tmp_path / "never there")
    assert os.listdir(tmp_path) == ["kept"] and (tmp_path / "kept" / "x").exists()
