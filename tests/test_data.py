"""Order, reading, bad samples, workers: what a batch holds is a function of (key, step) and the data alone."""

import ast
import functools
import io
import itertools
import math
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from odit import data, metrics, random
from odit.data import ahead, folder, loader, pictures
from odit.data.dataset import READ_KEY, sample_ids, split

KEY, ROOT = random.key(5), Path(__file__).parents[1]


class Numbers:
    """Sample i is the number i, in a picture of 1 x 1 x 2; ids in ``bad`` cannot be read."""

    shape, num_classes, class_names = (1, 1, 2), 7, [str(i) for i in range(7)]

    def __init__(self, num: int, bad=(), held_out: float = 0.0):
        self.bad = set(bad)
        self.train_ids, self.held_out_ids = split(num, held_out)

    def read(self, ids, key=READ_KEY):
        ids = sample_ids(ids)
        for i in ids.tolist():
            if i in self.bad:
                raise data.BadSample(f"{i}.png", "broken")
        return torch.stack((ids, ids + 0.5), -1).float()[:, None, None], ids % 7

    def fingerprint(self):
        return "numbers"


def take(dataset, **settings) -> list[data.Batch]:
    return list(loader.batches(dataset, KEY, **{"global_batch": 6, "stop": 5, **settings}))


def same(first: list[data.Batch], second: list[data.Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


# Order


@pytest.mark.parametrize(("num", "global_batch"), [(20, 6), (7, 16), (1, 3), (64, 64)])
def test_each_sample_comes_once_an_epoch_and_batches_run_on(num, global_batch):
    dataset = Numbers(num, held_out=0.25)
    n = len(dataset.train_ids)
    epochs = 4 * global_batch
    steps = epochs * n // global_batch
    ids = torch.cat([b.ids_B for b in take(dataset, global_batch=global_batch, stop=steps)])
    assert len(ids) == epochs * n == len(ids.unique())
    for epoch, row in enumerate(ids.reshape(epochs, n)):
        assert torch.equal(row >> 32, torch.full((n,), epoch))
        assert torch.equal((row & 0xFFFFFFFF).sort().values, dataset.train_ids)


def test_order_is_the_keyed_permutation_of_each_epoch():
    """The many-epochs-in-one-call look-up against one plain call an epoch."""
    train_ids = torch.arange(100, 123)
    got = loader.draw_ids(train_ids, KEY, torch.arange(23 * 5))
    for epoch in range(5):
        place = random.permutation(random.fold_in(KEY, "order", epoch), 23, torch.arange(23))
        assert torch.equal(got[23 * epoch : 23 * (epoch + 1)], (epoch << 32) + train_ids[place])


def test_epochs_and_keys_differ():
    first, second = loader.draw_ids(torch.arange(50), KEY, torch.arange(100)).reshape(2, 50) & random.MASK
    other = loader.draw_ids(torch.arange(50), random.key(6), torch.arange(50))
    ascending = torch.arange(50)
    for a, b in itertools.combinations((first, second, other, ascending), 2):
        assert int((a == b).sum()) < 10


@pytest.mark.parametrize(("start", "chunk"), [(9, 1), (4, 13), (1, 2**14)])
def test_resume_gives_the_same_batches(monkeypatch, start, chunk):
    whole = take(Numbers(20), stop=11, flip=True)
    monkeypatch.setattr(loader, "ORDER_CHUNK", chunk)
    assert same(take(Numbers(20), start=start, stop=11, flip=True), whole[start:])


@pytest.mark.parametrize("num", [2, 3, 4])
def test_shares_make_up_the_global_batch(num):
    dataset = Numbers(29, bad=[3, 17])
    whole = take(dataset, global_batch=12, flip=True)
    shares = [take(dataset, global_batch=12, flip=True, part=(rank, num)) for rank in range(num)]
    joined = [data.Batch(*(torch.cat(t) for t in zip(*parts, strict=True))) for parts in zip(*shares, strict=True)]
    assert same(joined, whole)


def test_unequal_shares_are_refused():
    with pytest.raises(ValueError, match="10 cannot be cut into 3"):
        loader.batches(Numbers(20), KEY, global_batch=10, stop=1, part=(0, 3))


def test_no_global_generator_moves():
    before = torch.random.get_rng_state()
    numpy_before = numpy.random.get_state()[1].copy()
    dataset = data.open_dataset(data.Config())
    take(dataset)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (numpy_before == numpy.random.get_state()[1]).all()


# Flips


def test_flips_belong_to_the_draw_id():
    plain = take(Numbers(20), stop=100)
    flipped = take(Numbers(20), stop=100, flip=True)
    ids, x = (torch.cat([b[i] for b in flipped]) for i in (0, 1))
    assert torch.equal(ids, torch.cat([b.ids_B for b in plain]))
    chosen = x[:, 0, 0, 0] > x[:, 0, 0, 1]
    straight = torch.cat([b.x for b in plain])
    assert torch.equal(torch.where(chosen[:, None, None, None], x.flip(-1), x), straight)
    assert 240 < int(chosen.sum()) < 360  # 600 fair draws: 300 +- 5 sigma
    expected = [bool(random.uniform(random.fold_in(KEY, "flip"), (), ids[i : i + 1]) < 0.5) for i in range(40)]
    assert chosen[:40].tolist() == expected
    # The same sample is mirrored in some epochs and not in others
    of_one = chosen[(ids & random.MASK) == 3]
    assert 0 < int(of_one.sum()) < len(of_one)


# Bad samples


def test_bad_samples_are_replaced_and_counted_once():
    bad, said = [3, 11, 12], []
    good = take(Numbers(20), stop=30)
    got = take(Numbers(20, bad), stop=30, on_bad=lambda *line: said.append(line))
    assert sorted(said) == [("11.png", "broken"), ("12.png", "broken"), ("3.png", "broken")]
    stand_ins = set()
    for a, b in zip(good, got, strict=True):
        assert torch.equal(a.ids_B, b.ids_B)
        was_bad = torch.isin(sample_ids(a.ids_B), torch.tensor(bad))
        assert torch.equal(a.x[~was_bad], b.x[~was_bad])
        content = b.x[was_bad][:, 0, 0, 0].long()
        assert not torch.isin(content, torch.tensor(bad)).any()
        assert torch.equal(content % 7, b.y[was_bad])  # the label comes with the picture
        stand_ins |= set(content.tolist())
    assert len(stand_ins) > 5  # not always the same one


def test_replacement_does_not_depend_on_the_batch():
    dataset = Numbers(20, [3, 11, 12])
    by_six = take(dataset, global_batch=6, stop=20)
    by_ten = take(dataset, global_batch=10, stop=12)
    a, b = (torch.cat([batch.x for batch in batches]) for batches in (by_six, by_ten))
    assert torch.equal(a, b)


def test_replacements_are_never_held_out():
    dataset = Numbers(40, range(0, 40, 4), held_out=0.5)
    seen = torch.cat([b.x[:, 0, 0, 0].long() for b in take(dataset, stop=40)])
    assert not torch.isin(seen, dataset.held_out_ids).any()


@pytest.mark.parametrize(
    ("num", "num_bad", "budget", "stops"),
    [
        (100, 10, 0.0, False),  # ten are always allowed
        (100, 11, 0.0, True),
        (100, 11, 0.01, True),
        (100, 20, 0.5, False),
        (100, 100, 1.0, True),  # no attempt ever succeeds
        (5, 5, 0.01, True),
    ],
)
def test_budget(num, num_bad, budget, stops):
    dataset = Numbers(num, range(num_bad))
    settings = {"global_batch": 50, "stop": 6, "bad_budget": budget}  # three epochs: a file counts once
    if not stops:
        assert len(take(dataset, **settings)) == 6
        return
    with pytest.raises(data.DataError, match="bad_budget") as error:
        take(dataset, **settings)
    assert f"{num_bad} bad samples" in str(error.value) or num_bad == num
    assert "0.png: broken" in str(error.value)
    assert str(error.value).count(".png: broken") >= min(num, 11)


def test_budget_is_of_distinct_samples():
    """A share that meets the bad samples little by little, over epochs, still sees that they are too many."""
    settings = {"global_batch": 50, "part": (0, 10), "stop": 400, "bad_budget": 0.11}
    with pytest.raises(data.DataError, match="12 bad samples among 100 read"):
        take(Numbers(100, range(12)), **settings)


# Worker processes


def test_workers_change_nothing(tmp_path):
    """Real pictures, some of them bad, read by 0, 1 and 2 processes; closing an iterator ends them."""
    write_pictures(tmp_path, 16)
    for i, name in enumerate(sorted(p.name for p in tmp_path.iterdir())[:3]):
        (tmp_path / name).write_bytes(b"" if i else b"no picture")
    dataset = folder.Folder(tmp_path, 8, 0.1)
    said: dict[int, list] = {0: [], 1: [], 2: []}
    before, others = torch.random.get_rng_state(), set(multiprocessing.active_children())  # such as the pool of ranks

    def start(workers: int, stop: int):
        on_bad = lambda *line: said[workers].append(line)  # noqa: E731
        return loader.batches(
            dataset, KEY, global_batch=6, start=2, stop=stop, workers=workers, flip=True, on_bad=on_bad
        )

    expected, two, one = list(start(0, 8)), start(2, 8), start(1, 1000)
    assert same([next(two) for _ in range(6)], expected) and next(two, None) is None
    assert set(multiprocessing.active_children()) == others
    assert same([next(one) for _ in range(6)], expected)
    assert len(set(multiprocessing.active_children()) - others) == 1
    one.close()
    assert set(multiprocessing.active_children()) == others
    assert said[0] and said[0] == said[1] == said[2]
    assert torch.equal(before, torch.random.get_rng_state())


class Broken(Numbers):
    """Cannot be read; one of its errors cannot be pickled."""

    def __init__(self, kind: str):
        super().__init__(9)
        self.kind = kind

    def read(self, ids, key=READ_KEY):
        class Local(Exception):
            pass

        raise {"data": data.DataError, "key": KeyError, "local": Local}[self.kind]("shard 3 cannot be read")


@pytest.mark.parametrize(
    "kind, told",
    [("data", "^shard 3 cannot be read$"), ("key", "^'shard 3"), ("local", "^Local: shard 3 cannot be read$")],
)
def test_an_error_in_a_worker_is_raised_as_it_is_and_keeps_no_process(kind, told):
    """Python waits at its end for processes that are there, for ever: these do not heed its SIGTERM."""
    others = set(multiprocessing.active_children())
    batches = loader.batches(Broken(kind), KEY, global_batch=2, stop=9, workers=1)
    with pytest.raises({"data": data.DataError, "key": KeyError, "local": RuntimeError}[kind], match=told) as found:
        next(batches)
    assert set(multiprocessing.active_children()) == others, found
    assert ", in read\n" in str(found.value.__cause__) and ", in read" not in str(found.value)


@pytest.mark.parametrize("number, memory", [(signal.SIGKILL, "memory"), (signal.SIGBUS, "shared memory")])
def test_a_killed_worker_is_told_where_its_share_is_due(number, memory):
    """And nowhere else: a signal handler would raise in the middle of whatever the trainer does. It ends the others."""
    others = set(multiprocessing.active_children())
    batches = loader.batches(Numbers(9), KEY, global_batch=2, stop=10**6, workers=2)
    next(batches)
    (one, two) = set(multiprocessing.active_children()) - others
    os.kill(one.pid, number)
    one.join()
    time.sleep(0.1)
    told = rf"^a process that reads data was killed \({number.name}\): with too little {memory} \S* ?use fewer --data.w"
    with pytest.raises(data.DataError, match=told) as found:
        for _ in batches:
            pass
    assert set(multiprocessing.active_children()) == others and two.exitcode == -signal.SIGKILL, found


class Slow(Numbers):
    """One of its shares takes for ever."""

    def read(self, ids, key=READ_KEY):
        time.sleep(1000 if 3 in ids else 0)
        return super().read(ids, key)


def test_a_worker_that_hangs_ends_the_run(monkeypatch):
    others, read = set(multiprocessing.active_children()), []
    batches = ahead.read_ahead(functools.partial(loader.read_share, Slow(9), KEY), torch.arange(9).split(1), 2)
    read += [int(next(batches).ids_B), int(next(batches).ids_B)]  # processes need longer to start
    monkeypatch.setattr(ahead, "TIMEOUT_S", 2)
    with pytest.raises(data.DataError, match=r"^a process that reads data took more than 2 s") as found:
        for reading in batches:
            read.append(int(reading.ids_B))
    assert read == [0, 1, 2] and set(multiprocessing.active_children()) == others, found


class Refusing:
    """Cannot be pickled, by an error of the kind that a connection has."""

    def __reduce__(self):
        raise ConnectionError("refused")


def refuse(share):
    return Refusing() if share == 1 else share


def test_what_cannot_be_sent_is_told_in_its_turn():
    reading = ahead.read_ahead(refuse, range(3), 1)
    assert next(reading) == 0
    with pytest.raises(data.DataError, match=r"cannot be sent \(ConnectionError: refused\): with too little"):
        next(reading)


def test_a_worker_that_ends_by_itself():
    with pytest.raises(data.DataError, match=r"^a process that reads data ended with code 3 \(what it said, "):
        next(ahead.read_ahead(os._exit, [3], 1))


def test_shares_and_what_they_come_to_may_be_large():
    """More than a pipe holds, both at once; and closed while they wait, nothing is left open."""
    share = bytes(10**6)
    assert list(ahead.read_ahead(bytes.hex, 7 * [share], 1)) == 7 * [share.hex()]
    files = len(os.listdir("/proc/self/fd"))
    for read, asked in ((bytes.hex, share), (torch.neg, torch.ones(10))):
        reading = ahead.read_ahead(read, 50 * [asked], 2)
        next(reading)
        reading.close()
    assert len(os.listdir("/proc/self/fd")) <= files


KILLED_AS_IT_STARTS = """
import functools, os, signal
if __name__ == "__mp_main__":
    os.kill(os.getpid(), signal.SIGKILL)
from odit.data import ahead
def second(first, share):
    return share
if __name__ == "__main__":
    next(ahead.read_ahead(functools.partial(second, bytes(10**6)), range(3), 1))
"""


def test_a_worker_that_is_killed_before_it_takes_a_large_data_set(tmp_path):
    (tmp_path / "script.py").write_text(KILLED_AS_IT_STARTS)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "script.py"], stderr=-1, text=True, timeout=180, env=env)
    assert done.stderr.splitlines()[-1].endswith(
        "DataError: a process that reads data was killed (SIGKILL): with too little memory use fewer --data.workers"
    )


SCRIPT = """
import os, signal, sys, time
from odit.data import ahead
signal.signal(signal.SIGUSR1, lambda *_: None)
for _ in range(2):
    made = list(ahead.read_ahead(int, range(9), 1))
    os.killpg(0, signal.SIGUSR1)  # as a launcher does, to all processes of a job
reading = ahead.read_ahead(time.sleep, [0, 1000], 1)
next(reading)
sys.exit(made[-1])
"""


def test_a_script_that_leaves_an_iterator_open_ends():
    """At once, though a process is busy; and a signal to the job ends no process that multiprocessing keeps."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], stderr=-1, text=True, timeout=180, start_new_session=True)
    assert (done.returncode, done.stderr) == (8, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_worker_that_just_starts(monkeypatch, number):
    """As a signal to the whole job sends it: the trainer is to save and leave, and reads on until then."""
    start, pids = SpawnProcess.start, []

    def signalled(process):
        start(process)
        os.kill(process.pid, number)
        pids.append(process.pid)

    monkeypatch.setattr(SpawnProcess, "start", signalled)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    batches = loader.batches(Numbers(9), KEY, global_batch=2, stop=50, workers=1)
    next(batches)
    os.kill(pids[0], number)  # and where it reads
    assert len(list(batches)) == 49 and len(pids) == 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


# Folders


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = random.bits(random.key(seed), (height, width, 3)) % 256
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def write_pictures(path, num: int, classes=()) -> None:
    for i in range(num):
        parent = path / classes[i % len(classes)] if classes else path
        parent.mkdir(exist_ok=True)
        suffix = ("png", "jpg", "JPEG", "webp", "bmp")[i % 5]
        picture(i, 20 + i, 17 + i % 3).save(parent / f"{i:03}.{suffix}", format=None)


def test_folder_of_classes(tmp_path):
    write_pictures(tmp_path, 12, ["cat", "ape", "dog"])
    (tmp_path / ".cache").mkdir()
    (tmp_path / "ape" / "._1.png").write_bytes(b"hidden")
    (tmp_path / "ape" / "notes.txt").write_text("no picture")
    (tmp_path / "dog" / "more").mkdir()
    picture(99, 9, 9).save(tmp_path / "dog" / "more" / "z.gif")
    dataset = data.open_dataset(data.Config("folder", tmp_path, image_size=8, held_out=0.25))
    assert dataset.class_names == ["ape", "cat", "dog"] and dataset.num_classes == 3 and dataset.shape == (3, 8, 8)
    assert len(dataset.train_ids) == 10 and len(dataset.held_out_ids) == 3
    x, y = dataset.read(torch.arange(13))
    assert x.dtype == torch.float32 and x.shape == (13, 3, 8, 8) and y.tolist() == [0] * 4 + [1] * 4 + [2] * 5
    assert x.min() >= -1 and x.max() <= 1
    assert torch.equal(x[1], folder.read_picture(tmp_path / "ape" / "004.bmp", 8))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_in_a_header_is_that_of_the_picture_as_it_is_shown(kind, orientation):
    """Of a turned TIFF Pillow tells the size of what is shown, of others that of what is stored."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture(0, 20, 10).save(file, kind, exif=exif)
    shown = pictures.to_rgb(Image.open(file)).size[::-1]
    assert pictures.picture_size("a", file) == shown == ((10, 20) if orientation == 1 else (20, 10))


def test_flat_folder_has_no_classes(tmp_path):
    write_pictures(tmp_path, 5)
    (tmp_path / "nothing").mkdir()
    dataset = data.open_dataset(data.Config("folder", tmp_path, image_size=8))
    assert dataset.num_classes == 0 and dataset.class_names == []
    assert dataset.read(range(5))[1].tolist() == [0] * 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "holds no pictures"),
        (lambda p: (p / "a.txt").write_text("x"), "holds no pictures"),
        (lambda p: (p / "empty").mkdir(), "holds no pictures"),
        (lambda p: (write_pictures(p, 2), write_pictures(p, 2, ["a"])), "beside sub-folders"),
        (lambda p: (write_pictures(p, 2, ["b"]), (p / "a").mkdir()), "1 sub-folders without pictures.*'a'"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(data.DataError, match=f"data.path.*{words}"):
        data.open_dataset(data.Config("folder", tmp_path, image_size=8))


def test_missing_folder(tmp_path):
    with pytest.raises(data.DataError, match=r"data\.path.*does not exist"):
        data.open_dataset(data.Config("folder", tmp_path / "x", image_size=8))
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match=r"data\.path.*is not a folder"):
        data.open_dataset(data.Config("folder", tmp_path / "file", image_size=8))


def box_halve(pixels: numpy.ndarray) -> numpy.ndarray:
    """Averages over the boxes that split each side evenly into n // 2, in fp64, rounded to a byte a pass."""
    for axis in (1, 0):
        pixels = numpy.moveaxis(pixels, axis, 0)
        n = len(pixels)
        if n % 2 == 0:
            pixels = numpy.floor((pixels[0::2] + pixels[1::2]) / 2 + 0.5)
        else:
            # Pillow's box filter over a support of n / (n // 2) pixels: those whose centres lie within, weighted alike
            support = n / (n // 2)
            rows = []
            for i in range(n // 2):
                inside = [j for j in range(n) if -0.5 < (j + 0.5 - (i + 0.5) * support) / support <= 0.5]
                rows.append(numpy.floor(pixels[inside].mean(0) + 0.5))
            pixels = numpy.stack(rows)
        pixels = numpy.moveaxis(pixels, 0, axis)
    return pixels


def bicubic(pixels: numpy.ndarray, out: tuple[int, int]) -> numpy.ndarray:
    """Keys' cubic (a = -0.5), stretched by the scale when shrinking, one axis at a time, in fp64."""

    def kernel(t):
        t = abs(t)
        if t < 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0

    for axis, size in ((1, out[1]), (0, out[0])):
        n = pixels.shape[axis]
        scale = n / size
        stretch = max(1.0, scale)
        weights = numpy.array(
            [[kernel((j + 0.5 - (i + 0.5) * scale) / stretch) for j in range(n)] for i in range(size)]
        )
        weights /= weights.sum(1, keepdims=True)
        pixels = numpy.moveaxis(numpy.tensordot(weights, pixels, (1, axis)), 0, axis)
        pixels = numpy.clip(numpy.floor(pixels + 0.5), 0, 255)
    return pixels


@pytest.mark.parametrize(
    ("width", "height"), [(8, 8), (13, 9), (9, 15), (16, 16), (40, 33), (35, 71), (100, 17), (5, 7), (64, 130)]
)
def test_centre_crop_is_adms_rule(width, height):
    size = 8
    image = picture(width, width, height)
    pixels = numpy.asarray(image).astype(numpy.float64)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = box_halve(pixels)
    scale = size / min(pixels.shape[:2])
    pixels = bicubic(pixels, (round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)))
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    expected = pixels[top : top + size, left : left + size].transpose(2, 0, 1)
    difference = numpy.abs(folder.centre_crop(image, size).numpy().astype(numpy.float64) - expected)
    assert difference.max() <= 1  # Pillow weights in fixed point: a rounding may fall the other way
    assert difference.mean() < 0.25  # ties are frequent where two bytes are averaged, three times over for the last


def test_crop_takes_the_middle():
    image = Image.new("RGB", (31, 8))
    for column in range(31):
        image.paste((column, 0, 0), (column, 0, column + 1, 8))
    assert folder.centre_crop(image, 8)[0, 0].tolist() == list(range(11, 19))


def png16(path, levels: numpy.ndarray) -> None:
    """Writes a 16-bit PNG by hand: grey (H, W) or RGB (H, W, 3)."""
    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2 if levels.ndim == 3 else 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def save_exif_turned(path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # white top becomes white right
    image.save(path, exif=exif)


def save_palette(path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(path)


CONVERSIONS = {
    # name: (writer, expected (left pixel, right pixel) as bytes)
    "l.png": (lambda p: Image.new("L", (8, 8), 77).save(p), [(77,) * 3] * 2),
    "one.png": (lambda p: Image.new("1", (8, 8), 1).save(p), [(255,) * 3] * 2),
    "palette.png": (save_palette, [(200, 100, 50)] * 2),
    "palette.gif": (save_palette, [(200, 100, 50)] * 2),
    "alpha.png": (lambda p: Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save(p), [(255, 204, 204)] * 2),
    "clear.png": (lambda p: Image.new("LA", (8, 8), (0, 0)).save(p), [(255,) * 3] * 2),
    "key.png": (lambda p: Image.new("RGB", (8, 8), (9, 8, 7)).save(p, transparency=(9, 8, 7)), [(255,) * 3] * 2),
    "cmyk.jpg": (lambda p: Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(p, quality=100), [(0, 255, 255)] * 2),
    "cmyk.tif": (lambda p: Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(p), [(255, 0, 0)] * 2),
    "grey16.png": (lambda p: png16(p, numpy.full((8, 8), 0x80FF)), [(0x80,) * 3] * 2),
    "rgb16.png": (lambda p: png16(p, numpy.full((8, 8, 3), 0x4012)), [(0x40,) * 3] * 2),
    "turned.jpg": (save_exif_turned, [(0, 0, 0), (255, 255, 255)]),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_modes_become_rgb(tmp_path, name):
    write, expected = CONVERSIONS[name]
    write(tmp_path / name)
    x = folder.read_picture(tmp_path / name, 8)
    got = (x[:, 3, 0], x[:, 3, 7])
    for pixel, wanted in zip(got, expected, strict=True):
        # JPEG may be off by a level or two
        assert torch.allclose((pixel + 1) * 127.5, torch.tensor(wanted).float(), atol=2 if "jpg" in name else 1e-4)


def truncated(path, image: Image.Image) -> None:
    image.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def huge_header(path, width: int, height: int) -> None:
    picture(0, 8, 8).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


BAD = {
    "truncated.jpg": (lambda p: truncated(p, picture(0, 64, 64)), "cannot be decoded"),
    "truncated.png": (lambda p: truncated(p, picture(0, 64, 64)), "cannot be decoded"),
    "truncated.webp": (lambda p: truncated(p, picture(0, 64, 64)), "."),
    "zero.jpg": (lambda p: p.write_bytes(b""), "zero bytes"),
    "text.png": (lambda p: p.write_text("this is not an image\n" * 20), "not an image"),
    "pixels.png": (lambda p: huge_header(p, 8001, 8000), "8001 x 8000 is more than 64,000,000"),
    "warned.png": (lambda p: huge_header(p, 10000, 10000), "more than 64,000,000"),
    "bomb.png": (lambda p: huge_header(p, 60000, 60000), "more than 64,000,000"),
    "long.png": (lambda p: picture(0, 169, 8).save(p), "169 x 8 is longer than 20:1"),
    "tall.png": (lambda p: picture(0, 8, 169).save(p), "8 x 169 is longer than 20:1"),
    "float.tif": (lambda p: Image.new("F", (8, 8), 0.5).save(p), "no stated range"),
    "wide.tif": (lambda p: Image.new("I", (8, 8), 70000).save(p), "do not fit 16 bits"),
    "gone.png": (lambda p: p.symlink_to("nowhere"), "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures(tmp_path, name, recwarn):
    write, reason = BAD[name]
    write(tmp_path / name)
    with pytest.raises(data.BadSample, match=reason) as error:
        folder.read_picture(tmp_path / name, 8)
    assert error.value.path == str(tmp_path / name) and "\n" not in error.value.reason
    assert not recwarn.list


def test_the_longest_and_largest_that_pass(tmp_path):
    picture(0, 160, 8).save(tmp_path / "long.png")
    assert folder.read_picture(tmp_path / "long.png", 8).shape == (3, 8, 8)
    huge_header(tmp_path / "edge.png", 8000, 8000)  # 64,000,000 exactly: passes the header, fails in the decoder
    with pytest.raises(data.BadSample, match="cannot be decoded"):
        folder.read_picture(tmp_path / "edge.png", 8)


def test_folder_with_every_bad_picture(tmp_path):
    """Bad pictures of all kinds among good ones: the run goes on within a budget and stops beyond it."""
    write_pictures(tmp_path, 40)
    for name, (write, _) in BAD.items():
        if name != "gone.png":  # a dangling link is not listed as a file
            write(tmp_path / name)
    dataset = folder.Folder(tmp_path, 8, 0.0)
    said = []
    first = take(dataset, global_batch=26, stop=4, bad_budget=0.5, on_bad=lambda *line: said.append(line))
    assert {path.rsplit("/", 1)[1] for path, _ in said} == set(BAD) - {"gone.png"} and len(said) == len(BAD) - 1
    assert same(first, take(dataset, global_batch=26, stop=4, bad_budget=0.5))
    with pytest.raises(data.DataError, match=r"text\.png: not an image"):
        take(dataset, global_batch=26, stop=4, bad_budget=0.1)


# Fingerprints and splits


def test_fingerprint_follows_the_files(tmp_path):
    write_pictures(tmp_path, 4, ["a", "b"])

    def fingerprint(size: int = 8) -> str:
        return data.open_dataset(data.Config("folder", tmp_path, image_size=size)).fingerprint()

    seen = [fingerprint(), fingerprint(16)]
    assert fingerprint() == seen[0]
    picture(9, 30, 30).save(tmp_path / "a" / "new.png")
    seen.append(fingerprint())
    (tmp_path / "a" / "new.png").rename(tmp_path / "b" / "new.png")
    seen.append(fingerprint())
    (tmp_path / "b" / "new.png").write_bytes(b"shorter")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


def test_fingerprint_of_digits_and_synthetic():
    digits = data.open_dataset(data.Config())
    before = digits.fingerprint()
    assert before == data.open_dataset(data.Config(held_out=0.5)).fingerprint()
    digits.x_NCHW[5, 0, 0, 0] += 0.125
    assert digits.fingerprint() != before
    small, other = (data.open_dataset(data.Config("synthetic", num_classes=n)).fingerprint() for n in (10, 11))
    assert small != other


@pytest.mark.parametrize(
    ("num", "held_out", "expected"), [(1797, 1 / 6, 300), (10, 0.0, 0), (3, 0.1, 0), (100, 0.5, 50)]
)
def test_split(num, held_out, expected):
    train, held = split(num, held_out)
    assert len(held) == expected
    assert torch.equal(torch.cat((train, held)).sort().values, torch.arange(num))
    assert torch.equal(train, train.sort().values)
    if expected > 20:
        assert not torch.equal(held, torch.arange(expected))  # spread, not the first ones
        assert abs(float(held.double().mean()) / num - 0.5) < 0.1


def test_split_that_leaves_nothing():
    with pytest.raises(data.DataError, match=r"data\.held_out 0\.9 of 2 samples"):
        split(2, 0.9)


def test_digits():
    dataset = data.open_dataset(data.Config(held_out=1 / 6))
    assert dataset.shape == (1, 8, 8) and dataset.num_classes == 10 and len(dataset.train_ids) == 1497
    x, y = dataset.read(range(1797))
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() == -1 and x.max() == 1 and torch.equal((x + 1) * 8, ((x + 1) * 8).round())
    assert y.unique().tolist() == list(range(10))
    # The zero's middle is empty and the one's is not
    assert x[y == 0].mean(0)[0, 3:5, 3:5].mean() < -0.5 < 0 < x[y == 1].mean(0)[0, 3:5, 3:5].mean()


def test_synthetic():
    dataset = data.open_dataset(data.Config("synthetic"))
    assert dataset.shape == (4, 32, 32) and dataset.num_classes == 1000
    x, y = dataset.read([5, 2**20 - 1, 5])
    assert torch.equal(x[0], x[2]) and y[0] == y[2] and not torch.equal(x[0], x[1])
    assert torch.equal(dataset.read([2**20 - 1])[0][0], x[1])
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05
    small = data.open_dataset(data.Config("synthetic", image_size=2, channels=3, num_classes=5))
    x, y = small.read(range(200))
    assert x.shape == (200, 3, 2, 2) and y.unique().tolist() == list(range(5))
    assert data.open_dataset(data.Config("synthetic", num_classes=0)).read([1])[1].tolist() == [0]


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "web"}, "data.source is 'web'"),
        ({"path": "/x"}, "data.path is '/x', which data.source digits has no use for: leave it out or use folder"),
        ({"image_size": 32}, "data.image_size is 32 but digits are 8 x 8"),
        ({"channels": 1}, "data.channels is 1, which data.source digits"),
        ({"num_classes": 10}, "data.num_classes is 10, which data.source digits"),
        ({"flip": True}, "data.flip is on"),
        ({"source": "folder", "image_size": 8}, "data.path is not given"),
        ({"source": "folder", "path": "/x"}, "data.image_size is not given"),
        ({"source": "folder", "path": "/x", "image_size": 0}, "data.image_size is 0"),
        ({"source": "folder", "path": "/x", "image_size": 8, "channels": 3}, "data.channels is 3, .* use synthetic"),
        ({"source": "folder", "path": "/x", "image_size": 8, "num_classes": 3}, "data.num_classes is 3"),
        ({"source": "synthetic", "path": "/x"}, "data.path is '/x'"),
        ({"source": "synthetic", "channels": 0}, "data.channels is 0: use 1 or more"),
        ({"source": "synthetic", "image_size": -1}, "data.image_size is -1"),
        ({"source": "synthetic", "num_classes": -1}, "data.num_classes is -1: use 0 or more"),
        ({"held_out": 1.0}, "data.held_out is 1.0"),
        ({"held_out": -0.1}, "data.held_out is -0.1"),
        ({"held_out": math.nan}, "data.held_out is nan"),
        ({"workers": -1}, "data.workers is -1"),
        ({"bad_budget": 1.5}, "data.bad_budget is 1.5"),
        ({"bad_budget": math.nan}, "data.bad_budget is nan"),
    ],
)
def test_refusals(settings, words):
    for refuse in (data.check, data.open_dataset):
        with pytest.raises(ValueError, match=words) as error:
            refuse(data.Config(**settings))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_size": 8, "held_out": 1 / 6, "workers": 2},
        {"source": "folder", "path": "/not/looked/at", "image_size": 32, "flip": True},
        {"source": "synthetic", "channels": 16, "image_size": 5, "num_classes": 0},
    ],
)
def test_accepted_settings(settings):
    data.check(data.Config(**settings))


def test_import_is_cheap():
    """Libraries that take a second to load are imported where they are used."""
    files = [*Path(data.__file__).parent.glob("*.py"), Path(metrics.__file__)]
    for statement in (s for file in files for s in ast.parse(file.read_text()).body):
        names = [a.name for a in statement.names] if isinstance(statement, ast.Import) else []
        names += [statement.module] if isinstance(statement, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"PIL", "sklearn", "scipy", "numpy"}, ast.unparse(statement)
