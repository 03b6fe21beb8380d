"""Tables and tars: each row is the picture or clip it names, with its caption or label, in the order of the file."""

import contextlib
import csv
import gc
import io
import json
import os
import pickle
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_clips import write_clip

from odit import data, random
from odit.data import BadSample, DataError, clips, decoding, items, loader, pictures, table, tars
from odit.data.table import Table
from odit.data.tars import Tars

KEY = random.key(3)
CAPTIONS = ["a cat", "", "ein Hund, «groß»", "four"]


def tokenize(captions: list[str]) -> dict[str, torch.Tensor]:
    """Bytes, as far as 32 go."""
    rows = [list(text.encode()[:32]) for text in captions]
    tokens = torch.tensor([row + [0] * (32 - len(row)) for row in rows])
    return {"tokens": tokens, "mask": torch.tensor([[i < len(row) for i in range(32)] for row in rows])}


def says(y, row: int) -> str:
    return bytes(y["tokens"][row][y["mask"][row]].tolist()).decode(errors="replace")


def write_picture(path: Path, k: int) -> Path:
    image = Image.linear_gradient("L").resize((40 + k, 30)).convert("RGB")
    image.paste((50 * k % 256, 255 - 30 * k % 256, 0), (0, 0, 20, 30))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def four(tmp_path) -> Path:
    """Four pictures in a folder of their own, not in the order of their names."""
    for k, name in enumerate(["d.png", "a.png", "c.webp", "b.bmp"]):
        write_picture(tmp_path / "pictures" / name, k)
    return tmp_path


NAMES = [f"pictures/{name}" for name in ("d.png", "a.png", "c.webp", "b.bmp")]


def write_csv(path: Path, columns: dict[str, list]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def write_jsonl(path: Path, columns: dict[str, list]) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_saved(path: Path, columns: dict[str, list], **features) -> Path:
    import datasets

    dataset = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    dataset.save_to_disk(str(path))
    return path


WRITE = {"rows.csv": write_csv, "rows.jsonl": write_jsonl, "rows.parquet": write_parquet, "saved": write_saved}


def write_table(folder: Path, name: str, columns: dict[str, list]) -> Path:
    if name == "saved":  # paths are relative to the folder that was saved
        columns = {k: [f"../{v}" for v in values] if k == "path" else values for k, values in columns.items()}
    return WRITE[name](folder / name, columns)


# Rows


@pytest.mark.parametrize("name", WRITE)
def test_rows_are_what_the_table_says(four, name):
    path = write_table(four, name, {"path": NAMES, "caption": CAPTIONS, "label": [3, 10, 3, 7]})
    dataset = Table(path, (16, 24), 0.25, tokenize)
    assert dataset.shape == (3, 16, 24) and dataset.num_classes == 0 and dataset.class_names == []
    assert len(dataset.train_ids) == 3 and len(dataset.held_out_ids) == 1
    x, y = dataset.read([2, 0, 1, 3, 2])
    assert x.dtype == torch.float32 and [says(y, i) for i in range(5)] == [CAPTIONS[i] for i in (2, 0, 1, 3, 2)]
    assert torch.equal(x, torch.stack([pictures.read_picture(four / NAMES[i], (16, 24)) for i in (2, 0, 1, 3, 2)]))
    labelled = Table(path, (16, 24), 0.0)
    assert labelled.class_names == ["3", "7", "10"] and labelled.read(range(4))[1].tolist() == [0, 2, 0, 1]
    assert labelled.num_classes == 3 and torch.equal(labelled.read([2])[0], x[:1])
    assert pickle.loads(pickle.dumps(dataset)).read([1])[1]["mask"].sum() == 0


def test_a_table_without_labels_has_no_classes(four):
    dataset = Table(write_csv(four / "a.csv", {"file": NAMES}), (8, 8), 0.0, path_column="file")
    assert dataset.num_classes == 0 and dataset.read(range(4))[1].tolist() == [0] * 4


def test_absolute_paths_stay(four):
    path = write_csv(four / "a.csv", {"path": [four / NAMES[0]]})
    (four / "elsewhere").mkdir()
    moved = path.rename(four / "elsewhere" / "a.csv")
    assert torch.equal(Table(moved, (8, 8), 0.0).read([0])[0][0], pictures.read_picture(four / NAMES[0], 8))


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["dog", "ape", "dog"], ["ape", "dog"], [1, 0, 1]),
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),
        (["10", "9", "-1"], ["-1", "9", "10"], [2, 1, 0]),
        (["10", "9", "x"], ["10", "9", "x"], [0, 1, 2]),
    ],
)
def test_labels_are_numbered_in_order(labels, names, numbers):
    y_N, found = table.number_labels(labels, None, str)
    assert found == names and y_N.tolist() == numbers and y_N.dtype == torch.int64


@pytest.mark.parametrize(
    ("label", "names", "words"),
    [
        (None, None, "row has no label"),
        (1.5, None, "row has the label 1.5: use an integer or a name"),
        (True, None, "row has the label True"),
        (2, ["a", "b"], "row has the label 2: use one of 0 ... 1"),
        (-1, ["a", "b"], "row has the label -1"),
    ],
)
def test_labels_out_of_range(label, names, words):
    with pytest.raises(DataError, match=words):
        table.number_labels([0, label], names, lambda _: "row")


def test_one_of_several_captions_is_drawn_by_draw_id(four):
    some = [["a", "b", "c", "d"], "one", ["x", "y"], ["z"]]
    dataset = Table(write_jsonl(four / "a.jsonl", {"path": NAMES, "caption": some}), (8, 8), 0.0, tokenize)
    ids = torch.arange(400) * 2**32 + torch.arange(400) % 4
    captions = items.choose_captions([dataset.captions[int(i) % 4] for i in ids], KEY, ids)
    assert all(text in (dataset.captions[int(i) % 4]) for text, i in zip(captions, ids, strict=True))
    counts = [captions[0::4].count(letter) for letter in "abcd"]
    assert sum(counts) == 100 and min(counts) > 10
    y = dataset.read(ids[:8], KEY)[1]
    assert [says(y, i) for i in range(8)] == captions[:8]
    alone = [says(dataset.read(ids[i : i + 1], KEY)[1], 0) for i in range(8)]
    assert alone == captions[:8]  # no matter what else is in the batch
    assert items.choose_captions([dataset.captions[int(i) % 4] for i in ids], random.key(4), ids) != captions


# Clips


def test_clips_of_a_table(tmp_path):
    names = [write_clip(tmp_path / f"{k}.mp4", num=20 + k, g=6).name for k in range(3)]
    dataset = Table(write_csv(tmp_path / "a.csv", {"path": names}), (4, 8, 12), 0.0, interval=2)
    assert dataset.shape == (3, 4, 8, 12)
    ids = torch.tensor([1, 0, 2, (5 << 32) + 1])
    x, _ = dataset.read(ids, KEY)
    at = random.uniform(random.fold_in(KEY, "start of the span"), (), ids).tolist()
    for i, row in enumerate((1, 0, 2, 1)):
        assert torch.equal(x[i], clips.read_clip(tmp_path / names[row], (4, 8, 12), 2, at[i], dataset.decoder))
        assert torch.equal(x[i], dataset.read(ids[i : i + 1], KEY)[0][0])
    assert not torch.equal(x[0], x[3])  # another epoch, another span
    frame = Table(tmp_path / "a.csv", (8, 12), 0.0).read(ids, KEY)[0][0]
    assert torch.equal(frame, clips.read_clip(tmp_path / names[1], (1, 8, 12), 1, at[0], dataset.decoder)[:, 0])


def decoders() -> set[int]:
    """Processes of this machine that decode."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found |= {int(path.parent.name)} if os.fsencode(decoding.__file__) in path.read_bytes() else set()
    return found


def test_workers_read_the_same_clips(tmp_path):
    """With a decoder in the worker, and bad clips among the good."""
    names = [write_clip(tmp_path / f"{k}.mp4", num=12, g=4).name for k in range(6)] + ["text.mp4", "short.mp4"]
    (tmp_path / "text.mp4").write_text("no video" * 100)
    write_clip(tmp_path / "short.mp4", num=3)
    path = write_csv(tmp_path / "a.csv", {"path": names, "caption": [f"clip {name}" for name in names]})
    said: dict[int, list] = {0: [], 1: []}
    before = decoders()

    def read(workers: int) -> list[data.Batch]:
        dataset = Table(path, (4, 8, 8), 0.0, tokenize, interval=2)
        on_bad = lambda *line: said[workers].append(line)  # noqa: E731
        return list(loader.batches(dataset, KEY, global_batch=4, stop=4, workers=workers, on_bad=on_bad))

    for a, b in zip(read(0), read(1), strict=True):
        assert torch.equal(a.ids_B, b.ids_B) and torch.equal(a.x, b.x)
        assert torch.equal(a.y["tokens"], b.y["tokens"]) and torch.equal(a.y["mask"], b.y["mask"])
    assert said[0] == said[1] and {path.rsplit("/")[-1] for path, _ in said[0]} == {"text.mp4", "short.mp4"}
    until = time.monotonic() + 20
    while not decoders() <= before:  # a decoder ends when its parent has
        assert time.monotonic() < until
        time.sleep(0.02)


def test_sizes_are_those_of_what_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (400, 10)).save(tmp_path / "long.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no video" * 100)
    write_clip(tmp_path / "a.mp4", num=11)
    write_clip(tmp_path / "b.mkv", num=12)
    names = ["turned.jpg", "a.png", "long.png", "text.png", "text.mp4", "a.mp4", "b.mkv", "gone.png"]
    dataset = Table(write_csv(tmp_path / "a.csv", {"path": names}), (8, 8), 0.0)
    sizes = dataset.sizes()
    expected = [[1, 40, 30], [1, 30, 40], [0] * 3, [0] * 3, [0] * 3, [11, 36, 64], [12, 36, 64], [0] * 3]
    assert sizes.dtype == torch.int64 and sizes.tolist() == expected
    assert dataset.sizes() is sizes  # looked at once


# Data sets of the datasets library


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """The library, its cache in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


@pytest.mark.parametrize("how", ["saved", "hub", "parquet"])
def test_pictures_in_cells(four, quiet, monkeypatch, how):
    saved = four / "saved"
    columns = {"image": [str(four / name) for name in NAMES], "caption": CAPTIONS, "label": [1, 0, 1, 2]}
    classes = quiet.ClassLabel(names=["x", "y", "z", "never"])
    dataset = quiet.Dataset.from_dict(columns).cast_column("image", quiet.Image()).cast_column("label", classes)
    held = dataset.map(lambda row: row, features=dataset.features)  # writes pictures' bytes
    source = str(saved)
    if how == "parquet":
        source = str(four / "rows.parquet")
        held.to_parquet(source)
    else:
        quiet.DatasetDict({"train": held, "test": held.select([0])}).save_to_disk(source)
    if how == "hub":
        loaded = quiet.load_from_disk(source)
        monkeypatch.setattr(quiet, "load_dataset", lambda name: loaded if name == "owner/cats" else None)
        source = "owner/cats"
    x, y = Table(source, (8, 8), 0.0, tokenize, path_column="image").read(range(4))
    assert torch.equal(x, torch.stack([pictures.read_picture(four / name, 8) for name in NAMES]))
    assert [says(y, i) for i in range(4)] == [text for text in CAPTIONS]
    labelled = Table(source, (8, 8), 0.0, path_column="image")
    assert labelled.class_names == ["x", "y", "z", "never"] and labelled.read(range(4))[1].tolist() == [1, 0, 1, 2]
    assert labelled.sizes().tolist() == [[1, 30, 40 + k] for k in range(4)]
    assert torch.equal(pickle.loads(pickle.dumps(labelled)).read([2])[0], x[2:3])
    assert len({labelled.fingerprint(), Table(source, (8, 9), 0.0, path_column="image").fingerprint()}) == 2
    if how == "saved":
        assert len(Table(source, (8, 8), 0.0, path_column="image", subset="test").train_ids) == 1
        with pytest.raises(DataError, match="has no split 'dev': there are train, test"):
            Table(source, (8, 8), 0.0, path_column="image", subset="dev")
        with pytest.raises(DataError, match="in 'label': use pictures or paths"):
            Table(source, (8, 8), 0.0, path_column="label")


def test_bad_cells(tmp_path, quiet):
    clip = write_clip(tmp_path / "a.mp4", num=5).read_bytes()
    cells = [None, {"bytes": b"no picture", "path": "a.png"}, {"bytes": b"", "path": None}]
    cells += [{"bytes": clip, "path": "a.mp4"}, {"bytes": clip[:300], "path": "b.mp4"}]
    dataset = quiet.Dataset.from_dict({"path": cells})
    dataset.save_to_disk(str(tmp_path / "saved"))
    opened = Table(tmp_path / "saved", (8, 8), 0.0)
    for row, words in enumerate(["zero bytes", "not an image", "zero bytes", None, "not a video"]):
        if words is None:
            assert opened.read([row])[0].shape == (1, 3, 8, 8)
            continue
        with pytest.raises(BadSample, match=rf"saved: row {row + 1}: {words}"):
            opened.read([row])


# Tables that cannot be used


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


BAD = {
    # what: (writer of a table, what is said of it)
    "missing": (lambda p: p / "a.csv", r"a\.csv' does not exist"),
    "missing folder": (lambda p: p / "saved", r"saved' does not exist"),
    "folder.csv": (lambda p: (p / "a.csv").mkdir() or p / "a.csv", "is not a file"),
    "suffix": (lambda p: text(p / "a.txt", "path\nx"), "is not a table by its suffix"),
    "no data set": (lambda p: p / ".", "cannot be opened as a saved data set"),
    "empty.csv": (lambda p: text(p / "a.csv", ""), r"no column 'path': there are none"),
    "header.csv": (lambda p: text(p / "a.csv", "path,caption\n"), "has no rows"),
    "empty.jsonl": (lambda p: text(p / "a.jsonl", "\n"), "has no rows"),
    "column.csv": (lambda p: text(p / "a.csv", "file,text\na,b\n"), "no column 'path': there are 'file', 'text'"),
    "column.jsonl": (lambda p: text(p / "a.jsonl", '{"path": "x"}\n'), "no column 'caption': there are 'path'"),
    "column.parquet": (lambda p: write_parquet(p / "a.parquet", {"z": [1]}), "no column 'path': there are 'z'"),
    "binary.csv": (lambda p: (p / "a.csv").write_bytes(b"\xff\xfe\x00") and p / "a.csv", "is not csv"),
    "quote.csv": (lambda p: text(p / "a.csv", 'path,caption\n"a"b,c\n'), "is not csv"),
    "short.csv": (lambda p: text(p / "a.csv", "path,caption\na,b\nc\n"), "row 2 has no caption in 'caption'"),
    "long.csv": (lambda p: text(p / "a.csv", "path,caption\na,b,c,d\n"), "row 1 has 4 fields, but 2 columns"),
    "no path.csv": (lambda p: text(p / "a.csv", "path,caption\n,b\n"), "row 1 has '' in 'path'"),
    "text.jsonl": (lambda p: text(p / "a.jsonl", '{"path": "a", "caption": "b"}\nword\n'), "is not jsonl .line 2"),
    "list.jsonl": (lambda p: text(p / "a.jsonl", "[1]\n"), "line 1 is no object"),
    "null.jsonl": (lambda p: text(p / "a.jsonl", '{"path": "a", "caption": null}'), "row 1 has no caption"),
    "none.jsonl": (lambda p: text(p / "a.jsonl", '{"path": "a", "caption": []}'), "row 1 has no caption"),
    "number.jsonl": (lambda p: text(p / "a.jsonl", '{"path": "a", "caption": 7}'), "row 1 has the caption 7"),
    "numbers.jsonl": (lambda p: text(p / "a.jsonl", '{"path": "a", "caption": ["a", 7]}'), "has the caption"),
    "half.jsonl": (lambda p: text(p / "a.jsonl", '{"path": "a", "caption": "nice \\ud83d"}'), "row 1 has the caption"),
    "text.parquet": (lambda p: text(p / "a.parquet", "path\n"), "is not parquet"),
    "null.parquet": (
        lambda p: write_parquet(p / "a.parquet", {"path": ["a", "b"], "caption": ["", None]}),
        "row 2 has no caption in 'caption': use text, a list of texts, or '' for none",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_tables_that_cannot_be_used(tmp_path, name):
    write, words = BAD[name]
    with pytest.raises(DataError, match=f"data.path '.*{words}") as error:
        Table(write(tmp_path), (8, 8), 0.0, tokenize)
    assert "\n" not in str(error.value)


def test_classes_that_were_asked_for_must_be_there(tmp_path):
    path = text(tmp_path / "a.csv", "path,class\na.png,x\nb.png,y\n")
    found = data.open_dataset(data.Config("table", path, 8, label="class", held_out=0.0))
    assert found.class_names == ["x", "y"]
    with pytest.raises(DataError, match=r"data.label is 'clas' but .* holds no classes under that name"):
        data.open_dataset(data.Config("table", path, 8, label="clas", held_out=0.0))


def test_a_data_set_that_is_not_found(quiet, monkeypatch):
    def fail(name):
        raise FileNotFoundError(f"Couldn't find {name}\nanywhere")

    monkeypatch.setattr(quiet, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"'owner/none' cannot be found, neither as a file nor .* find owner/none anywhere"
    ):
        Table("owner/none", (8, 8), 0.0)


def test_missing_labels_name_the_row(four):
    with pytest.raises(DataError, match="row 2 has no label"):
        Table(text(four / "a.jsonl", '{"path": "a", "label": 1}\n{"path": "b"}\n'), (8, 8), 0.0)


def test_bad_rows_are_bad_samples(four):
    (four / "empty.png").write_bytes(b"")
    (four / "text.png").write_text("no picture")
    (four / "text.mp4").write_text("no video" * 100)
    names = [NAMES[0], "empty.png", "text.png", "text.mp4", "gone.png", "gone.mp4"]
    path = write_csv(four / "a.csv", {"path": names})
    dataset = Table(path, (8, 8), 0.0)
    for row, words in enumerate(
        [None, "zero bytes", "not an image", "not a video", "cannot be read", "cannot be read"]
    ):
        if words:
            with pytest.raises(BadSample, match=words) as error:
                dataset.read([0, row])
            assert error.value.path == str(four / names[row])
    with pytest.raises(BadSample, match="a picture, but clips of 2 frames are asked for"):
        Table(path, (2, 8, 8), 0.0).read([0])
    got = list(loader.batches(dataset, KEY, global_batch=6, stop=2, bad_budget=1.0))
    assert all(torch.equal(x, dataset.read([0])[0][0]) for batch in got for x in batch.x)


def test_fingerprint_of_a_table(four):
    def fingerprint(captions=CAPTIONS, names=NAMES, size=(8, 8), **settings) -> str:
        path = write_csv(four / "a.csv", {"path": names, "caption": captions})
        return Table(path, size, 0.0, tokenize, **settings).fingerprint()

    seen = [fingerprint(), fingerprint(size=(8, 9)), fingerprint(interval=2), fingerprint(names=NAMES[::-1])]
    assert fingerprint() == seen[0]
    seen.append(fingerprint(captions=["a cat", "", "ein Hund", "four"]))
    write_picture(four / NAMES[2], 9)
    seen.append(fingerprint())
    (four / NAMES[2]).unlink()
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


# Tars


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def encoded(k: int, suffix: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + k, 16), (k * 20 % 256, 255 - k, 7)).save(file, {"jpg": "JPEG"}.get(suffix, suffix))
    return file.getvalue()


def write_tars(folder: Path, num: int = 3, each: int = 4) -> str:
    for t in range(num):
        files = {"__meta__/about.json": b"{}", "__meta__": b""}
        for i in range(each):
            key, suffix = f"part/{t}{i:03}", ("png", "jpg", "webp", "PNG")[i % 4]
            files[f"{key}.txt"] = f"picture {t} {i}".encode()
            files[f"{key}.{suffix}"] = encoded(t * each + i, suffix.lower())
            files[f"{key}.cls"] = b"%d\n" % (i * 5)
        write_tar(folder / f"x-{t:02}.tar", files)
    return str(folder / f"x-{{00..{num - 1:02}}}.tar")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_tars_are_what_webdataset_reads(tmp_path):
    import webdataset

    pattern = write_tars(tmp_path)
    dataset = Tars(pattern, (8, 10), 0.25, tokenize)
    stream = webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False)
    expected = list(stream)
    del stream
    gc.collect()  # it leaves its files open
    assert len(expected) == len(dataset.samples) == 12 and len(dataset.held_out_ids) == 3
    x, y = dataset.read(range(12))
    for i, sample in enumerate(expected):
        name = next(k for k in sample if k in ("png", "jpg", "webp"))
        assert dataset.samples[i].key == sample["__key__"] and says(y, i) == sample["txt"].decode()
        assert torch.equal(x[i], pictures.decode_picture("", sample[name], (8, 10)))
    labelled = Tars(str(tmp_path / "*.tar"), (8, 10), 0.0)
    assert labelled.class_names == ["0", "5", "10", "15"] and labelled.num_classes == 4
    assert labelled.read(range(12))[1].tolist() == [int(s["cls"]) // 5 for s in expected]
    assert torch.equal(pickle.loads(pickle.dumps(labelled)).read([7])[0], x[7:8])
    assert dataset.sizes().tolist() == [[1, 16, 20 + k] for k in range(12)]


def test_members_with_long_names_and_several_dots(tmp_path):
    long = "d" * 120 + "/" + "k" * 120
    files = {f"{long}.png": encoded(1), f"{long}.seg.png": encoded(2), "b.mask.png": encoded(3), "b.png": encoded(4)}
    dataset = Tars(write_tar(tmp_path / "a.tar", files), (8, 8), 0.0)
    assert [sample.key for sample in dataset.samples] == [long, "b"]
    x, _ = dataset.read([0, 1])
    assert torch.equal(x, torch.stack([pictures.decode_picture("", encoded(k), 8) for k in (1, 4)]))


def test_captions_in_json_and_clips_in_tars(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", num=20, g=6)
    files = {
        "a.mp4": clip.read_bytes(),
        "a.json": json.dumps({"caption": ["one", "two"]}).encode(),
        "b.mp4": clip.read_bytes(),
        "b.json": json.dumps({"caption": "three"}).encode(),
    }
    dataset = Tars(write_tar(tmp_path / "a.tar", files), (3, 8, 8), 0.0, tokenize, interval=2)
    ids = torch.tensor([0, 1 << 32, 2 << 32, 1])
    x, y = dataset.read(ids, KEY)
    at = random.uniform(random.fold_in(KEY, "start of the span"), (), ids).tolist()
    for i in range(4):
        assert torch.equal(x[i], clips.read_clip(clip, (3, 8, 8), 2, at[i], dataset.decoder))
    assert says(y, 3) == "three" and {says(dataset.read([i << 32], KEY)[1], 0) for i in range(9)} == {"one", "two"}
    assert dataset.sizes().tolist() == [[20, 36, 64]] * 2


def test_bad_members_are_bad_samples(tmp_path):
    files = {
        "a.png": encoded(1)[:40],
        "a.txt": b"x",
        "b.txt": b"x",
        "c.png": encoded(1),
        "d.png": encoded(1),
        "d.json": b"{",
        "e.png": encoded(1),
        "e.json": b'{"caption": 3}',
        "f.png": encoded(1),
        "f.txt": b"\xff",
        "g.png": b"",
        "g.txt": b"x",
        "h.mp4": b"no video" * 99,
        "h.txt": b"x",
    }
    dataset = Tars(write_tar(tmp_path / "a.tar", files), (8, 8), 0.0, tokenize)
    words = [
        "cannot be decoded|not an image",
        "no picture or clip among .txt",
        "no caption",
        "its .json cannot be read",
    ]
    words += ["no caption", "its .txt is not UTF-8", "zero bytes", "not a video"]
    for row, reason in enumerate(words):
        with pytest.raises(BadSample, match=reason) as error:
            dataset.read([row])
        assert error.value.path == f"{tmp_path}/a.tar:{'abcdefgh'[row]}" and "\n" not in error.value.reason


def cut_tar(folder: Path, num: int) -> None:
    path = write_tar(folder / "a.tar", {"a.png": encoded(1), "b.png": encoded(2), "c.png": bytes(2000)})
    path.write_bytes(path.read_bytes()[:num])


def damage_tar(folder: Path) -> None:
    path = write_tar(folder / "a.tar", {"a.png": encoded(1), "b.png": encoded(2)})
    content = bytearray(path.read_bytes())
    content[1024 + 148 : 1024 + 156] = b"x" * 8  # the second header's checksum
    path.write_bytes(content)


BAD_TARS = {
    "none": (lambda p: None, r"there is no '.*a\.tar'"),
    "zero": (lambda p: (p / "a.tar").write_bytes(b""), "has zero bytes"),
    "text": (lambda p: (p / "a.tar").write_text("no tar" * 1000), "is no tar"),
    "compressed": (lambda p: tarfile.open(p / "a.tar", "w:gz").close(), "is no tar .*compressed"),
    "cut header": (lambda p: cut_tar(p, 1200), "a.tar is truncated"),
    "cut member": (lambda p: cut_tar(p, 3000), "a.tar is truncated: 'c.png' ends beyond its 3000 bytes"),
    "no end": (lambda p: cut_tar(p, 512 * 9), "a.tar is truncated or damaged: byte 4608"),
    "damaged": (damage_tar, "a.tar is truncated or damaged: byte 1024"),
    "no samples": (lambda p: write_tar(p / "a.tar", {"README": b"x"}), "holds no samples"),
    "twice": (lambda p: write_tar(p / "a.tar", {"a.png": b"", "a.PNG": b""}), "holds 'a.PNG' twice"),
    "no label": (lambda p: write_tar(p / "a.tar", {"a.cls": b"1", "a.png": b"", "b.png": b""}), "a.tar:b has no label"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_tars_that_cannot_be_used(tmp_path, name):
    write, words = BAD_TARS[name]
    write(tmp_path)
    with pytest.raises(DataError, match=words) as error:
        Tars(tmp_path / "a.tar", (8, 8), 0.0)
    assert "\n" not in str(error.value)


def test_patterns_name_tars(tmp_path):
    for name in ("b.tar", "a.tar", "c[1].tar"):
        write_tar(tmp_path / name, {})
    found = tars.find_tars(f"{tmp_path}/{{b,a}}.tar")
    assert [Path(name).name for name in found] == ["a.tar", "b.tar"]
    assert tars.find_tars(f"{tmp_path}/c[1].tar") == [f"{tmp_path}/c[1].tar"]
    for pattern, words in [
        ("{a,x}.tar", r"there is no '.*x\.tar'"),
        ("z*.tar", "there is no"),
        ("{a..tar", "is no pattern"),
    ]:
        with pytest.raises(DataError, match=words):
            tars.find_tars(f"{tmp_path}/{pattern}")


def test_fingerprint_of_tars(tmp_path):
    seen = []
    for files in ({"a.png": encoded(1)}, {"b.png": encoded(1)}, {"a.png": encoded(1) + b"x"}, {"a.jpg": encoded(1)}):
        path = write_tar(tmp_path / "a.tar", files)
        seen.append(Tars(path, (8, 8), 0.0).fingerprint())
        assert Tars(path, (8, 8), 0.0).fingerprint() == seen[-1]
    seen.append(Tars(path, (8, 9), 0.0).fingerprint())
    assert len(set(seen)) == len(seen)
