"""Tars in the manner of webdataset, read at random: key.jpg or key.mp4 beside key.txt, key.json or key.cls.

A sample is a run of members with one key, as the webdataset library groups them; samples are numbered through the tars
in the order of their names. That library streams tars and shuffles in a buffer: which samples a run has seen then hangs
on the number of readers, and a resumed run cannot go on where it was. Here the members' places are listed once, and any
sample is read by its offset: the keyed order, exact resume and replaced samples are those of every dataset.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from odit.data import clips, pictures
from odit.data.dataset import BadSample, DataError
from odit.data.items import Items
from odit.data.table import as_captions, number_labels

BLOCK = tarfile.BLOCKSIZE


class Sample(NamedTuple):
    """Where the members of one sample are."""

    tar: int
    """Index of the tar."""
    key: str
    members: dict[str, tuple[int, int]]
    """Suffix, in lower case and with its dot -> (offset, length) in the tar."""


class Tars(Items):
    """The samples of tars.

    With ``tokenize`` a sample's y is what that makes of its caption: key.txt, or "caption" in key.json (text, or a list
    of texts, one of them drawn by draw id). Without it y is the label, numbered by the sorted distinct contents of
    key.cls, or 0 where no sample has one: there are no classes then.
    """

    def __init__(
        self,
        pattern: Path | str,
        size: tuple[int, ...],
        held_out: float,
        tokenize: Callable[[list[str]], Any] | None = None,
        *,
        interval: int = 1,
    ):
        """Lists the tars that ``pattern`` names (globs and braces, as in ``cc3m-{000..331}.tar``); raises DataError.

        ``size`` and ``interval`` are as in ``odit.data.table.Table``.
        """
        self.pattern = str(pattern)
        self.tars = find_tars(self.pattern)
        self.samples = [Sample(i, *found) for i, tar in enumerate(self.tars) for found in list_samples(tar)]
        num = len(self.samples)
        if not num:
            raise DataError(f"data.path {self.pattern!r} holds no samples: none of its tars has a file key.suffix")
        super().__init__(num, size, held_out, tokenize, interval)
        if tokenize is None and any(".cls" in sample.members for sample in self.samples):
            labels = [self._label(sample) for sample in self.samples]
            self.y_N, self.class_names = number_labels(labels, None, lambda row: self._name(self.samples[row]))

    def captions_of(self, row: int) -> list[str]:
        """Captions of a sample; raises BadSample for a sample without one."""
        return self._captions(self.samples[row])

    def fingerprint(self) -> str:
        """Hashes the keys, suffixes and places of all members, labels, and the sample's shape."""
        digest = hashlib.blake2b(f"{self.shape} {self.interval}".encode(), digest_size=16)
        for sample in self.samples:
            digest.update(json.dumps([Path(self.tars[sample.tar]).name, sample.key, sample.members]).encode())
        digest.update(json.dumps([self.class_names, self.y_N.tolist()]).encode())
        return digest.hexdigest()

    def item(self, row: int) -> clips.Item:
        """Says where a sample's picture or clip is; raises BadSample for a sample without one."""
        sample = self.samples[row]
        for suffix, part in sample.members.items():
            if suffix in pictures.EXTENSIONS + clips.EXTENSIONS:
                return clips.Item(self._name(sample), Path(self.tars[sample.tar]), part, clip=clips.is_clip(suffix))
        raise BadSample(self._name(sample), f"no picture or clip among {' '.join(sample.members)}")

    def _name(self, sample: Sample) -> str:
        return f"{self.tars[sample.tar]}:{sample.key}"

    def _text(self, sample: Sample, suffix: str) -> str | None:
        if suffix not in sample.members:
            return None
        name = self._name(sample)
        data = pictures.read_bytes(Path(self.tars[sample.tar]), sample.members[suffix], name)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise BadSample(name, f"its {suffix} is not UTF-8") from None

    def _label(self, sample: Sample) -> str | None:
        try:
            label = self._text(sample, ".cls")
        except BadSample as error:
            raise DataError(f"data.path {self.pattern!r}: {error}") from None
        return None if label is None else label.strip()

    def _captions(self, sample: Sample) -> list[str]:
        found: Any = self._text(sample, ".txt")
        if found is None and (text := self._text(sample, ".json")) is not None:
            try:
                content = json.loads(text)
            except ValueError as error:
                raise BadSample(self._name(sample), f"its .json cannot be read ({error})") from None
            found = content.get("caption") if isinstance(content, dict) else None
        captions = as_captions(found)
        if captions is None:
            raise BadSample(self._name(sample), 'no caption: neither .txt nor "caption" in .json is text')
        return captions


def find_tars(pattern: str) -> list[str]:
    """Lists the tars that a pattern of globs and braces names, sorted; raises DataError where one names none."""
    patterns = [pattern]
    if "{" in pattern:
        from braceexpand import braceexpand

        try:
            patterns = list(braceexpand(pattern))
        except ValueError as error:
            raise DataError(f"data.path {pattern!r} is no pattern ({error})") from None
    found = set()
    for one in patterns:
        there = [one] if Path(one).is_file() else glob.glob(one, recursive=True)  # the name first: it may hold brackets
        if not there:
            raise DataError(f"data.path {pattern!r}: there is no {one!r}")
        found.update(there)
    return sorted(found)


def list_samples(tar: str) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yields the key and members of each sample of a tar; raises DataError for one that is damaged or cut short."""
    key, members = None, {}
    for name, part in _list_members(tar):
        found = re.fullmatch(r"((?:.*/|)[^.]+)([.][^/]*)", name)  # at the first dot of the base name
        if not found or re.match(r"__[^/]*__($|/)", name):  # the latter describe the tar
            continue
        if found[1] != key:
            if key is not None:
                yield key, members
            key, members = found[1], {}
        suffix = found[2].lower()
        if suffix in members:
            raise DataError(f"data.path: {tar} holds {name!r} twice: remove one of them")
        members[suffix] = part
    if key is not None:
        yield key, members


def _list_members(tar: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields (name, (offset, length)) of each file."""
    try:
        with open(tar, "rb") as file:
            size, end = os.fstat(file.fileno()).st_size, 0
            if size == 0:
                raise DataError(f"data.path: {tar} has zero bytes")
            for member in _headers(tar, file):
                end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isreg() else 0)
                if end > size:
                    raise DataError(f"data.path: {tar} is truncated: {member.name!r} ends beyond its {size} bytes")
                if member.isreg():
                    yield member.name, (member.offset_data, member.size)
            # tarfile takes a damaged header for the end; the real one is a block of zeros
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise DataError(f"data.path: {tar} is truncated or damaged: byte {end} is neither a member nor the end")
    except OSError as error:
        raise DataError(f"data.path: {tar} cannot be read ({error.strerror})") from None


def _headers(tar: str, file) -> Iterator[tarfile.TarInfo]:
    try:
        archive: Any = tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise DataError(f"data.path: {tar} is no tar ({error}); a compressed one cannot be read at random") from None
    try:
        for member in archive:
            archive.members = []  # it would keep them all
            yield member
    except tarfile.TarError as error:
        raise DataError(f"data.path: {tar} is truncated or damaged ({error})") from None
