"""Tables of pictures or clips with captions or labels: CSV, JSONL, parquet, data sets of the datasets library."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from odit.data import clips
from odit.data.dataset import DataError
from odit.data.items import Items

SUFFIXES = (".csv", ".jsonl", ".parquet")


class Table(Items):
    """The rows of a table, in its order, one sample each.

    With ``tokenize`` a row's y is what that makes of its caption: of one of them, drawn by draw id, where the cell is a
    list; "" is the null condition. Without it y is the label: the place of its value among the sorted distinct ones
    (among the names, where a data set states them), or 0 in a table without labels, which has no classes.
    """

    def __init__(
        self,
        source: Path | str,
        size: tuple[int, ...],
        held_out: float,
        tokenize: Callable[[list[str]], Any] | None = None,
        *,
        path_column: str = "path",
        caption_column: str = "caption",
        label_column: str = "label",
        interval: int = 1,
        subset: str = "train",
    ):
        """Opens a table; raises DataError.

        Args:
            source: a file with one of the suffixes above, a folder for ``datasets.load_from_disk``, or a name for
                ``datasets.load_dataset``; of several splits, ``subset`` is read.
            size: (H, W) of pictures or (T, H, W) of clips, whose frames are ``interval`` apart. The suffix of a path
                tells clips from pictures; see ``clips.read_item`` for one among the others.
            path_column: holds paths, relative to the table's folder, or pictures themselves (data sets, parquet).
        """
        self.source = str(source)
        needed = [path_column, caption_column] if tokenize else [path_column]
        opened = _open(self.source, path_column, needed, label_column, subset)
        self.rows = opened.rows
        num = len(self.rows)
        if not num:
            raise DataError(f"data.path {self.source!r} has no rows")
        super().__init__(num, size, held_out, tokenize, interval)
        self.captions: list[list[str]] = []
        if tokenize:
            captions = opened.columns[caption_column]
            self.captions = [_captions(self.source, i, caption_column, found) for i, found in enumerate(captions)]
        elif label_column in opened.columns:
            labels = opened.columns[label_column]
            self.y_N, self.class_names = number_labels(labels, opened.class_names, lambda i: _row(self.source, i))

    def item(self, row: int) -> clips.Item:
        """Says where a row's picture or clip is."""
        return self.rows.item(row)

    def captions_of(self, row: int) -> list[str]:
        """Captions of a row."""
        return self.captions[row]

    def fingerprint(self) -> str:
        """Hashes paths, file sizes, captions or labels, and the sample's shape."""
        digest = hashlib.blake2b(f"{self.shape} {self.interval}".encode(), digest_size=16)
        for line in self.rows.digest_lines():
            digest.update(line + b"\n")
        digest.update(json.dumps([self.captions, self.class_names, self.y_N.tolist()]).encode())
        return digest.hexdigest()


# What rows say


def as_captions(found: Any) -> list[str] | None:
    """Takes text or a list of texts as captions; None for anything else, and for text that has no UTF-8 form."""
    found = [found] if isinstance(found, str) else found
    right = isinstance(found, list) and found and all(isinstance(text, str) and _is_whole(text) for text in found)
    return found if right else None


def _is_whole(text: str) -> bool:
    """False where a surrogate lost its other half, as where an emoji was cut."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _captions(source: str, row: int, column: str, found: Any) -> list[str]:
    captions = as_captions(found)
    if captions is None:
        what = "no caption" if found is None or found == [] else f"the caption {found!r}"
        raise DataError(f"{_row(source, row)} has {what} in {column!r}: use text, a list of texts, or '' for none")
    return captions


def _row(source: str, row: int) -> str:
    return f"data.path {source!r}: row {row + 1}"


def number_labels(
    labels: Sequence[Any], names: Sequence[str] | None, where: Callable[[int], str]
) -> tuple[Tensor, list[str]]:
    """Numbers labels by their sorted distinct values: int64 (N,) and the names; integers sort as numbers, as text too.

    Args:
        names: what the labels are numbers in already, if the data says so.
        where: tells the place of a label for an error.
    """
    for i, label in enumerate(labels):
        if not isinstance(label, int | str) or isinstance(label, bool):
            what = "no label" if label is None else f"the label {label!r}"
            raise DataError(f"{where(i)} has {what}: use an integer or a name")
        if names is not None and not (isinstance(label, int) and 0 <= label < len(names)):
            raise DataError(f"{where(i)} has the label {label!r}: use one of 0 ... {len(names) - 1}")
    if names is not None:
        return torch.tensor(labels, dtype=torch.int64), list(names)
    texts = [str(label) for label in labels]
    numbers = all(re.fullmatch(r"-?[0-9]+", text) for text in texts)
    ordered = sorted(set(texts), key=(lambda text: (int(text), text)) if numbers else None)
    number = {text: i for i, text in enumerate(ordered)}
    return torch.tensor([number[text] for text in texts], dtype=torch.int64), ordered


# Where rows are


class Rows(Protocol):
    """The pictures and clips of a table."""

    def __len__(self) -> int: ...

    def item(self, row: int) -> clips.Item:
        """Says where a row's bytes are."""
        ...

    def digest_lines(self) -> Iterator[bytes]:
        """Yields bytes a row that change with its content."""
        ...


class Files:
    """Rows that are paths."""

    def __init__(self, folder: Path, paths: list[str]):
        self.folder, self.paths = folder, paths

    def __len__(self) -> int:
        return len(self.paths)

    def item(self, row: int) -> clips.Item:
        path = self.folder / self.paths[row]
        return clips.Item(str(path), path)

    def digest_lines(self) -> Iterator[bytes]:
        for name in self.paths:
            path = self.folder / name
            yield os.fsencode(name) + b"\0" + str(path.stat().st_size if path.exists() else -1).encode()


class Cells:
    """Rows of a data set whose cells are pictures, undecoded: {"bytes", "path"}."""

    def __init__(self, source: str, folder: Path, dataset, column: str):
        self.source, self.folder, self.dataset, self.column = source, folder, dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, row: int) -> clips.Item:
        cell = self.dataset[row][self.column] or {}
        data, path = cell.get("bytes"), cell.get("path") or ""
        if data is None and path:
            return clips.Item(str(self.folder / path), self.folder / path)
        return clips.Item(f"{self.source}: row {row + 1}", self.folder, data=data or b"", clip=clips.is_clip(path))

    def digest_lines(self) -> Iterator[bytes]:
        import pyarrow.compute

        pc: Any = pyarrow.compute  # its functions are made at run time

        for cells in self.dataset.with_format("arrow").iter(1000):
            column = cells[self.column].combine_chunks()
            sizes = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
            for name, size in zip(pc.struct_field(column, "path").to_pylist(), sizes, strict=True):
                yield f"{name} {size}".encode(errors="surrogateescape")


def extra(module: str, source: Path | str) -> Any:
    """Imports what reads ``source`` and comes with odit[hub] alone; raises DataError where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise DataError(f"data.path {str(source)!r} needs {package}: pip install 'odit[hub]'") from None


class _Opened:
    """A table's rows, its other columns, and the names of its classes if it states them."""

    def __init__(self, rows: Rows, columns: dict[str, list], class_names: list[str] | None = None):
        self.rows, self.columns, self.class_names = rows, columns, class_names


def _open(source: str, path_column: str, needed: list[str], label_column: str, subset: str) -> _Opened:
    suffix, path = Path(source).suffix.lower(), Path(source)
    if suffix not in SUFFIXES:
        return _open_dataset(source, path_column, needed, label_column, subset)
    if not path.is_file():
        found = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"data.path {source!r} {found}: give a table ({' '.join(SUFFIXES)})")
    try:
        if suffix == ".parquet" and (dataset := _parquet_with_cells(path, path_column)) is not None:
            return _from_dataset(source, path.parent, dataset, path_column, needed, label_column)
        read = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[suffix]
        columns = read(path, [*needed, label_column])
    except OSError as error:
        raise DataError(f"data.path {source!r} cannot be read ({error.strerror or error})") from None
    except (csv.Error, ValueError) as error:  # pyarrow's and json's errors are ValueErrors too
        if isinstance(error, DataError):
            raise
        raise DataError(f"data.path {source!r} is not {suffix[1:]} ({_one_line(error)})") from None
    _check_columns(source, needed, list(columns))
    return _Opened(Files(path.parent, _paths(source, path_column, columns[path_column])), columns)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _check_columns(source: str, needed: list[str], there: list[str]) -> None:
    for column in needed:
        if column not in there:
            columns = ", ".join(repr(name) for name in there) or "none"
            raise DataError(f"data.path {source!r} has no column {column!r}: there are {columns}")


def _paths(source: str, column: str, found: list) -> list[str]:
    for i, name in enumerate(found):
        if not isinstance(name, str) or not name:
            raise DataError(f"{_row(source, i)} has {name!r} in {column!r}: use a path")
    return found


def _read_csv(path: Path, wanted: list[str]) -> dict[str, list]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, strict=True)
        names = list(rows.fieldnames or [])
        columns: dict[str, list] = {name: [] for name in names}
        for i, row in enumerate(rows):
            if None in row:
                num = len(names) + len(row[None])
                raise DataError(f"{_row(str(path), i)} has {num} fields, but {len(names)} columns have names")
            for name in names:
                columns[name].append(row[name] if name in wanted else None)
    return columns


def _read_jsonl(path: Path, wanted: list[str]) -> dict[str, list]:
    with path.open(encoding="utf-8") as file:
        rows = [_json_row(path, i, line) for i, line in enumerate(file) if line.strip()]
    names = list(dict.fromkeys(name for row in rows for name in row)) if rows else wanted
    return {name: [row.get(name) for row in rows] if name in wanted else [] for name in names}


def _json_row(path: Path, i: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {i + 1}: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"data.path {str(path)!r}: line {i + 1} is no object: use one such as {{'path': ...}} a line")
    return row


def _read_parquet(path: Path, wanted: list[str]) -> dict[str, list]:
    parquet = extra("pyarrow.parquet", path)
    names = parquet.read_schema(path).names
    columns = parquet.read_table(path, columns=[name for name in names if name in wanted]).to_pydict()
    return {name: columns.get(name, []) for name in names}


def _parquet_with_cells(path: Path, column: str):
    """Opens a parquet file whose cells are pictures as a data set, which maps them from its cache; None for paths."""
    schema = extra("pyarrow.parquet", path).read_schema(path)
    if column not in schema.names or not extra("pyarrow.types", path).is_struct(schema.field(column).type):
        return None
    return extra("datasets", path).Dataset.from_parquet(str(path))


def _open_dataset(source: str, path_column: str, needed: list[str], label_column: str, subset: str) -> _Opened:
    named = not Path(source).exists()
    if Path(source).is_file() or (named and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)):
        found = "does not exist" if named else f"is not a table by its suffix ({' '.join(SUFFIXES)})"
        raise DataError(f"data.path {source!r} {found}: give a table, a saved data set's folder or a data set's name")
    datasets = extra("datasets", source)
    try:
        dataset = datasets.load_dataset(source) if named else datasets.load_from_disk(source)
    except Exception as error:  # these raise whatever their back ends do
        how = "found, neither as a file nor as a data set" if named else "opened as a saved data set"
        raise DataError(f"data.path {source!r} cannot be {how} ({_one_line(error)})") from None
    if isinstance(dataset, dict):
        if subset not in dataset:
            raise DataError(f"data.path {source!r} has no split {subset!r}: there are {', '.join(map(str, dataset))}")
        dataset = dataset[subset]
    folder = Path() if named else Path(source)
    return _from_dataset(source, folder, dataset, path_column, needed, label_column)


def _from_dataset(source: str, folder: Path, dataset, path_column: str, needed, label_column: str) -> _Opened:
    datasets = extra("datasets", source)
    _check_columns(source, needed, dataset.column_names)
    wanted = [name for name in dict.fromkeys([*needed[1:], label_column]) if name in dataset.column_names]
    columns = dataset.select_columns(wanted)[:] if wanted else {}
    class_names = getattr(dataset.features.get(label_column), "names", None)
    feature = dataset.features[path_column]
    cells = dataset.select_columns([path_column])
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        rows: Rows = Files(folder, _paths(source, path_column, cells[:][path_column]))
    elif isinstance(feature, datasets.Image | datasets.Video):
        rows = Cells(source, folder, cells.cast_column(path_column, type(feature)(decode=False)), path_column)
    elif isinstance(feature, dict) and {"bytes", "path"} <= set(feature):
        rows = Cells(source, folder, cells, path_column)
    else:
        raise DataError(f"data.path {source!r} has {feature} in {path_column!r}: use pictures or paths")
    return _Opened(rows, columns, class_names)
