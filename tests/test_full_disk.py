"""A full disk, or no memory for a copy of a state: one sentence with both numbers and a fix, whoever writes."""

import contextlib
import dataclasses
import errno
import os
import re
import resource

import pytest
import states
import torch
from conftest import script
from safetensors import SafetensorError
from test_storage import Full, tmpfs  # noqa: F401 (a fixture)

from odit import config, convert, health, param, record, storage, tree
from odit.data import latents
from odit.models import dit
from odit.models.config import Config, Shape
from odit.saver import Copies, Saver
from odit.storage import Disk, StorageError

FULL = r"cannot be written \(ENOSPC: No space left on device\)"
MODEL, SHAPE = Config(width=96, depth=1, heads=4, timestep_freqs="diffusers"), Shape(4, 8, 3, outputs=2)


def fill(folder, room=0):
    """Leaves so many bytes, in pages of 4 KiB."""
    with open(folder / "filling", "ab") as file:
        file.write(bytes(Disk().free(folder) - room))


def run_in(out):
    return dataclasses.replace(config.Run(), out=out)


# ------------------------------------------------------------------------------------------------------ a run's records

LONG = {"note": "x" * 500}  # grows metrics.jsonl alone
SHORT = {str(number): 0.5 for number in range(20)}  # of which TensorBoard's events take more than a line of metrics


@pytest.mark.parametrize("values, name", [(LONG, "metrics.jsonl"), (SHORT, "tensorboard/events")])
def test_records_on_a_full_tmpfs(tmpfs, values, name):  # noqa: F811
    with pytest.raises(StorageError) as failed, record.Recorder(run_in(tmpfs / "run")) as recorder:
        recorder.log(1, {})  # each file has a page
        fill(tmpfs)
        for step in range(2, 50):
            recorder.log(step, values)
    pattern = rf"{tmpfs}/run/{name}\S* {FULL}: \d+ bytes are needed, 0 are free: make room, or use another --out"
    assert re.fullmatch(pattern, str(failed.value)) and health.exit_code(failed.value) == 6


def test_records_on_a_disk_that_is_full(tmp_path):
    """To the byte: the line of metrics is written whole, in part or not, its events not."""
    line = b'{"step": 1, "loss": 0.5}\n'
    for room, name in ((0, "metrics.jsonl"), (len(line) - 1, "metrics.jsonl"), (len(line), "tensorboard/events")):
        disk, out = Full(100_000), tmp_path / str(room)
        with pytest.raises(StorageError, match=rf"{out}/{name}.* {FULL}: \d+ bytes are needed, 0 are free"):
            with record.Recorder(run_in(out), disk=disk) as recorder:
                disk.room = room
                recorder.log(1, {"loss": 0.5})
        assert (out / "metrics.jsonl").read_bytes() == line[:room]
        assert record.read_metrics(out / "metrics.jsonl") == [{"step": 1, "loss": 0.5}] * (room == len(line))


@pytest.mark.parametrize("room", [0, 4096, 8192])
def test_a_run_that_begins_on_a_full_tmpfs(tmpfs, room):  # noqa: F811
    """Whatever it writes first."""
    (tmpfs / "run").mkdir()
    fill(tmpfs, room)
    with record.Lock(tmpfs / "run"), pytest.raises(StorageError, match=FULL), record.Recorder(run_in(tmpfs / "run")):
        pass


def test_pictures_on_a_full_tmpfs(tmpfs):  # noqa: F811
    with record.Recorder(run_in(tmpfs / "run")) as recorder:
        fill(tmpfs)
        with pytest.raises(StorageError, match=rf"samples/step_00000001\.png {FULL}: \d+ bytes are needed, 0 are free"):
            recorder.pictures(1, torch.rand(8, 1, 64, 64), 2)
        assert not list((tmpfs / "run" / "samples").iterdir())


def test_a_run_whose_disk_fills_up(tiny, tmpfs, monkeypatch, capsys):  # noqa: F811
    train_script, run = script("train"), dataclasses.replace(tiny, out=tmpfs / "run", steps=200)
    run = dataclasses.replace(run, validate_every=200, sample_every=200, checkpoint_every=200)
    whole = train_script.loader.batches

    def filling(*args, **kwargs):
        for number, batch in enumerate(whole(*args, **kwargs)):
            if number == 2:
                fill(tmpfs)
            yield batch

    monkeypatch.setattr(train_script.loader, "batches", filling)
    with pytest.raises(SystemExit) as left:
        health.run(lambda: train_script.main(run))
    told = capsys.readouterr().err
    assert left.value.code == 6 and "Traceback" not in told
    assert re.search(rf"^error: {run.out}/(metrics\.jsonl|tensorboard/\S+) {FULL}: \d+ bytes are needed, 0 are", told)


# ---------------------------------------------------------------------------------------------------------------- saves


@pytest.mark.parametrize("first", [OSError(errno.ENOSPC, "No space left on device"), StorageError("a small file")])
def test_the_error_of_a_save_that_filled_the_disk_is_the_one_to_tell(tmp_path, first):
    composed = states.plan_of(tmp_path)
    saver = Saver(composed, background=True, disk=states.FullDisk())
    with pytest.raises(StorageError, match=rf"step_00000007 {FULL}: \d\d\d+ bytes are needed"), saver:
        saver.save(states.state_of(composed, 7), {})
        raise first


def test_the_first_error_is_told_where_it_is_not_of_storage_or_the_save_went_well(tmp_path):
    composed = states.plan_of(tmp_path)
    for first, disk in ((ValueError("another"), states.FullDisk()), (OSError("another"), Disk())):
        with pytest.raises(type(first), match="another"), Saver(composed, background=True, disk=disk) as saver:
            saver.save(states.state_of(composed, 7), {})
            raise first


def test_no_memory_for_the_copy_of_a_save(tmp_path):
    """Of a state that has more bytes than a process has addresses."""
    num, small = 1 << 50, states.plan_of(tmp_path)
    saver = Saver(small, background=True)
    saver.copies = Copies(states.plan_of(tmp_path, declared={"w": param.Param((num,), "D", param.zeros)}))
    told = rf"checkpoint_async needs {16 * num} bytes of host memory .* \d+ are available .*: use --no-checkpoint-asy"
    with pytest.raises(ValueError, match=told) as failed, saver:
        saver.save(states.state_of(small, 7), {})
    assert health.exit_code(failed.value) == 2


# ---------------------------------------------------------------------------------------- files that libraries write


def write_pt(folder):
    convert.write_pt(folder / "a.pt", {"a": torch.zeros(200_000)})
    return "a.pt"


def write_diffusers(folder):
    params = tree.map(lambda p: torch.zeros(p.shape), dit.declare(MODEL, SHAPE))
    convert.save_diffusers(folder, params, MODEL, SHAPE)
    return "diffusion_pytorch_model.safetensors"


def write_latents(folder):
    latents.write_tensors(folder / "a.safetensors", {"mean": torch.zeros(200_000)})
    return "a.safetensors"


def write_index(folder):
    latents.begin(folder, {"a": "x" * 400_000})
    return latents.SETTINGS


WRITERS = [write_pt, write_diffusers, write_latents, write_index]


@pytest.mark.parametrize("write", WRITERS)
def test_files_that_libraries_write_on_a_full_tmpfs(tmpfs, tmp_path, write):  # noqa: F811
    """None is left there, in part or whole."""
    name = write(tmp_path)
    size = (tmp_path / name).stat().st_size
    with pytest.raises(StorageError, match=rf"{name} {FULL}: \d+ bytes are needed, {1 << 18} are free") as failed:
        write(tmpfs)
    needed = int(re.search(r"(\d+) bytes are needed", str(failed.value))[1])
    assert size <= needed < 1.05 * size and health.exit_code(failed.value) == 6 and not os.listdir(tmpfs)


@contextlib.contextmanager
def files_of_at_most(size):
    """What the system refuses of a file beyond (EFBIG); Python has the signal ignored."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", WRITERS)
def test_files_that_the_system_refuses(tmp_path, write):
    with files_of_at_most(100_000), pytest.raises(StorageError, match=r"\(EFBIG: File too large\): \d{6,} bytes"):
        write(tmp_path)
    assert not os.listdir(tmp_path)


def test_other_errors_pass(tmp_path):
    """Also those of libraries that raise the same kinds for other reasons."""
    others = [SafetensorError("no file of mine"), RuntimeError("not a tensor"), ValueError("a mistake"), KeyError("a")]
    for error in others:
        with pytest.raises(type(error)) as failed, storage.writing(tmp_path, 1):
            raise error
        assert failed.value is error
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:  # what was met before is not its reason
        with pytest.raises(RuntimeError, match="of its own"), storage.writing(tmp_path, 1):
            raise RuntimeError("of its own")  # noqa: B904 (this is how libraries do it)
    told = StorageError("said already")
    with pytest.raises(StorageError) as failed, storage.writing(tmp_path, 1):
        raise told
    assert failed.value is told
