"""What a run leaves behind: metrics.jsonl and TensorBoard tell the same."""

import dataclasses
import errno
import math
import os

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from odit import config, health, record
from odit.storage import Disk, StorageError


def curves(out):
    """{name: {step: value}} as TensorBoard shows it."""
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: {point.step: point.value for point in board.Scalars(name)} for name in board.Tags()["scalars"]}


def test_tensorboard_shows_the_curves_of_metrics(tmp_path):
    """In 32 bits, without what is not finite and what is no number; after a resume without the steps that were lost."""
    run = dataclasses.replace(config.Run(), out=tmp_path)
    with record.Recorder(run) as recorder:
        for step in range(1, 7):
            recorder.log(step, {"loss": 1 / step, "bad": "x", "gap": math.nan if step == 2 else step})
        assert curves(tmp_path)["loss"].keys() == {1, 2, 3, 4, 5, 6}  # nothing waits for the end
    with record.Recorder(run, step=3) as recorder:
        for step in (4, 5):
            recorder.log(step, {"loss": 7.0}, prefix="validation_")
            recorder.log(step, {"loss": 2.0 * step, "gap": step})
    found, lines = curves(tmp_path), record.read_metrics(tmp_path / "metrics.jsonl")
    assert found.keys() == {"loss", "gap", "validation_loss"} and len(lines) == 7
    for name in found:
        want = {step: float(math.nan if value is None else value) for step, value in record.curve(lines, name).items()}
        assert found[name].keys() == want.keys()
        assert all(math.isclose(found[name][step], want[step], rel_tol=1e-7) for step in want)
    assert found["loss"] == {1: 1.0, 2: 0.5, 3: found["loss"][3], 4: 8.0, 5: 10.0} and 2 not in found["gap"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_pictures_in_tensorboard_are_small(tmp_path):
    """Of whatever shape; small ones as they are, and the file as it is."""
    run = dataclasses.replace(config.Run(), out=tmp_path)
    shapes = [(3, 40, 30), (1, 700, 1500), (3, 4, 5000)]
    with record.Recorder(run) as recorder:
        for step, shape in enumerate(shapes):
            recorder.board.add_image("samples", torch.linspace(-1, 1, math.prod(shape)).view(shape), step)
        path = recorder.pictures(9, torch.zeros(4, 3, 400, 400), columns=2)
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    found = [(image.height, image.width) for image in board.Images("samples")]
    assert found[:3] == [(40, 30), (233, 500), (1, 500)] and max(found[3]) <= record.SIDE
    with Image.open(path) as picture:
        assert min(picture.size) >= 800


def test_folders_and_files_that_the_system_refuses_are_told(tmp_path, monkeypatch):
    run = dataclasses.replace(config.Run(), out=tmp_path / "run")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "make_folder", full)
        with pytest.raises(StorageError, match=r"run.* cannot be written .ENOSPC.*bytes are needed"):
            record.Recorder(run)
        with pytest.raises(StorageError, match=r"tensorboard.* cannot be written .ENOSPC"):
            record.event_file(tmp_path / "tensorboard")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"metrics.jsonl"):
        record.Appended(tmp_path / "run" / "metrics.jsonl")


def test_metrics_are_cut_whole_and_on_the_disk(tmp_path):
    """A torn last line goes, of whatever bytes a crash has left there."""
    path, synced = tmp_path / "metrics.jsonl", []

    class Seen(Disk):
        def sync(self, handle):
            synced.append(os.fstat(handle).st_size)
            super().sync(handle)

    kept = b'{"step": 1, "loss": 2.0}\n'
    for torn in (b'{"step": 2, "lo', b'{"step": 2, "lo\xd3\xff', bytes(9)):
        path.write_bytes(kept + torn)
        assert record.read_metrics(path) == [{"step": 1, "loss": 2.0}]
        record.cut_metrics(path, 5, Seen())
        assert path.read_bytes() == kept
    assert synced == 3 * [len(kept)]


def test_a_lock_that_cannot_be_had_is_not_one_that_is_held(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out .*file is a file: give a folder"):
        record.Lock(tmp_path / "file")
    with pytest.raises(StorageError, match=r"below.* cannot be written .ENOTDIR"):
        record.Lock(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match=r"below.* cannot be written .ENOTDIR"):
        health.Exit.keep(tmp_path / "file" / "below", 0)
    with record.Lock(tmp_path / "run"), pytest.raises(ValueError, match="is in use by process"):
        record.Lock(tmp_path / "run")

    def without(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(record.fcntl, "flock", without)
    with pytest.raises(StorageError, match=r"\.lock cannot be locked .ENOLCK.*with flock"):
        record.Lock(tmp_path / "run")
