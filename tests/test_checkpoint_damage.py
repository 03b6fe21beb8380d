"""Damaged checkpoints: whatever is changed of one, it is refused by name, and nothing of it is loaded."""

import json
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import states
from safetensors.torch import load, save

from odit import checkpoint, manifest
from odit.health import CheckpointError, Damaged

STEP, STALE = 9, 7
FILES = [f"state-{rank:05d}-of-00002.safetensors" for rank in range(2)]
MANIFEST = manifest.MANIFEST
SOME, MANY = 3, 80  # damages of a kind by default and in the slow case
LINK, FOLDER, ELSEWHERE = "link", "folder", "elsewhere"  # what stands in a file's place


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of a whole checkpoint by two ranks, its files' bytes, those of an older one by the same layout)."""
    out = tmp_path_factory.mktemp("written")
    for step in (STALE, STEP):
        states.save(out, step, world=2, zero=2)
    folders = [out / "checkpoints" / f"step_{step:08d}" for step in (STEP, STALE)]
    found = [{name: (folder / name).read_bytes() for name in (*FILES, MANIFEST)} for folder in folders]
    return folders[0], *found


# ---------------------------------------- kinds of damage: (draws, files, stale files) -> what is changed, by file name


def told_of(files):
    """A manifest as a dict, without its hash."""
    told = json.loads(files[MANIFEST])
    del told["hash"]
    return told


def resealed(change):
    """Damage to what a manifest tells, under a hash that fits."""

    def damage(draws, files, stale):
        told = told_of(files)
        name = draws.choice([n for n, t in told["tensors"].items() if len(t["pieces"]) == 2])
        change(draws, told, told["tensors"][name]["pieces"], name)
        return {MANIFEST: manifest.to_bytes(told)}

    return damage


def of_bytes(change):
    """Damage to the bytes of a file: ``change(draws, bytes) -> bytes``."""

    def on(*names):
        def damage(draws, files, stale):
            name = draws.choice(names)
            return {name: change(draws, bytearray(files[name]))}

        return damage

    return on


def header_end(data):
    return 8 + int.from_bytes(data[:8], "little")


@of_bytes
def flip(draws, data):
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return data


@of_bytes
def flip_data(draws, data):
    data[draws.randrange(header_end(data), len(data))] ^= 1 << draws.randrange(8)
    return data


@of_bytes
def flip_header(draws, data):
    data[draws.randrange(8, header_end(data))] ^= 1 << draws.randrange(8)
    return data


@of_bytes
def flip_length(draws, data):
    data[draws.randrange(8)] ^= 1 << draws.randrange(8)
    return data


@of_bytes
def cut(draws, data):
    return data[: draws.randrange(1, len(data))]


@of_bytes
def extend(draws, data):
    return data + draws.randbytes(draws.randrange(1, 100))


@of_bytes
def blanks(draws, data):
    return data + b"\n" * draws.randrange(1, 5)


@of_bytes
def zero_some(draws, data):
    start = draws.randrange(header_end(data), len(data) - 64)
    return data[:start] + bytes(64) + data[start + 64 :]


@of_bytes
def zero_all(draws, data):
    return bytes(len(data))


@of_bytes
def nothing(draws, data):
    return b""


@of_bytes
def drop_a_byte(draws, data):
    del data[draws.randrange(len(data))]
    return data


@of_bytes
def put_a_byte(draws, data):
    data.insert(draws.randrange(len(data) + 1), draws.randrange(256))
    return data


@of_bytes
def exchange_bytes(draws, data):
    i = draws.randrange(len(data))
    j = draws.choice([j for j, byte in enumerate(data) if byte != data[i]])
    data[i], data[j] = data[j], data[i]
    return data


@of_bytes
def double_line(draws, data):
    """A key that is there twice."""
    lines = bytes(data).split(b"\n")
    n = draws.choice([n for n, line in enumerate(lines) if line.endswith(b",") and b":" in line])
    return b"\n".join([*lines[: n + 1], *lines[n:]])


@of_bytes
def as_pickle(draws, data):
    return pickle.dumps({"param/prime": [draws.random()] * 7})


def exchanged(draws, files, stale):
    return {FILES[0]: files[FILES[1]], FILES[1]: files[FILES[0]]}


def of_another_step(draws, files, stale):
    name = draws.choice(FILES)
    return {name: stale[name]}


def manifest_of_another_step(draws, files, stale):
    return {MANIFEST: stale[MANIFEST]}


def all_of_another_step(draws, files, stale):
    return stale


def other_header(change):
    """Damage to the header of a file that leaves its length: ``change(draws, header as text) -> text``."""

    def damage(draws, files, stale):
        name = draws.choice(FILES)
        data = files[name]
        end = header_end(data)
        text = data[8:end].decode()
        changed = change(draws, text).encode()
        assert len(changed) == len(text.encode()) and changed != text.encode()
        return {name: data[:8] + changed + data[end:]}

    return damage


@other_header
def other_name(draws, text):
    name = draws.choice(re.findall(r'"([a-z.]+/[^"]+)"', text))
    return text.replace(f'"{name}"', f'"{name[:-1]}_"')


@other_header
def other_dtype(draws, text):
    return text.replace('"F32"', '"I32"', draws.randrange(1, 5))


@other_header
def other_shape(draws, text):
    return text.replace("[1,3]", "[3,1]", 1)


@other_header
def exchanged_names(draws, text):
    """Each of two moments in the other's place."""
    path = draws.choice(re.findall(r'"adamw\.m/([^"]+)"', text))
    text = text.replace(f'"adamw.m/{path}"', "\0").replace(f'"adamw.v/{path}"', f'"adamw.m/{path}"')
    return text.replace("\0", f'"adamw.v/{path}"')


def header_blanks(draws, files, stale):
    """Other blanks at the end of a header: nothing that the library minds."""
    name = draws.choice([name for name in FILES if files[name][header_end(files[name]) - 1 :][:1] == b" "])
    end = header_end(files[name])
    return {name: files[name][: end - 1] + b"\n" + files[name][end:]}


def another_count(draws, files, stale):
    """A digit of the manifest that nothing else tells."""
    field = draws.choice([b'"updates": 9', b'"note": 9'])
    return {MANIFEST: files[MANIFEST].replace(field, field[:-1] + b"%d" % draws.randrange(9))}


@other_header
def doubled_name(draws, text):
    path = draws.choice(re.findall(r'"adamw\.m/([^"]+)"', text))
    return text.replace(f'"adamw.m/{path}"', f'"adamw.v/{path}"')


def resealed_header(change):
    """The same where the manifest's word on the header follows: shapes and dtypes are held to the manifest's too."""

    def damage(draws, files, stale):
        ((name, data),) = change(draws, files, stale).items()
        told = told_of(files)
        told["files"][name]["header"] = manifest.hash_of(data[: header_end(data)])
        return {name: data, MANIFEST: manifest.to_bytes(told)}

    return damage


def exchanged_pieces(draws, files, stale):
    """The bytes of one tensor in another's place, in a file that is whole otherwise."""
    name = draws.choice(FILES)
    tensors = load(files[name])
    a, b = draws.choice([(f"{x}/{p}", f"{y}/{p}") for x, y in (("param", "ema"), ("ema", "adamw.v")) for p in PATHS])
    tensors[a], tensors[b] = tensors[b], tensors[a]
    return {name: save(tensors)}


PATHS = ["two", "blocks.0.qkv", "blocks.0.out"]  # in both files


def place(what):
    """Something else in a file's place."""

    def on(*names):
        return lambda draws, files, stale: {draws.choice(names): what}

    return on


@resealed
def gap(draws, told, pieces, name):
    del pieces[draws.randrange(2)]


@resealed
def overlap(draws, told, pieces, name):
    pieces[1]["offsets"] = pieces[0]["offsets"]


@resealed
def twice(draws, told, pieces, name):
    pieces.append(pieces[draws.randrange(2)])


@resealed
def outside(draws, told, pieces, name):
    piece = draws.choice(pieces)
    dim = draws.randrange(len(piece["offsets"]))
    size = told["tensors"][name]["shape"][dim]
    piece["offsets"][dim] = draws.choice([size, 1 + size - piece["shape"][dim]])  # beyond the end, or over it


@resealed
def below_zero(draws, told, pieces, name):
    piece = draws.choice(pieces)
    piece["offsets"][draws.randrange(len(piece["offsets"]))] = -1


@resealed
def pieces_exchanged(draws, told, pieces, name):
    pieces[0]["file"], pieces[1]["file"] = pieces[1]["file"], pieces[0]["file"]


@resealed
def hashes_exchanged(draws, told, pieces, name):
    pieces[0]["hashes"], pieces[1]["hashes"] = pieces[1]["hashes"], pieces[0]["hashes"]


@resealed
def no_hashes(draws, told, pieces, name):
    draws.choice(pieces)["hashes"] = draws.choice(["", None, "z" * 32, "0" * 31])


@resealed
def renamed(draws, told, pieces, name):
    told["tensors"][name + "_"] = told["tensors"].pop(name)


@resealed
def moved_to_another_role(draws, told, pieces, name):
    path = draws.choice(["prime", "two"])
    told["tensors"][f"param/{path}"], told["tensors"][f"ema/{path}"] = (
        told["tensors"][f"ema/{path}"],
        told["tensors"][f"param/{path}"],
    )


@resealed
def missing_tensor(draws, told, pieces, name):
    del told["tensors"][name]


@resealed
def transposed(draws, told, pieces, name):
    entry = told["tensors"]["param/two"]
    for value in (entry, *entry["pieces"]):
        for field in ("shape", "offsets", "cell"):
            value[field] = value.get(field, [])[::-1]


@resealed
def manifest_dtype(draws, told, pieces, name):
    told["tensors"][name]["dtype"] = draws.choice(["int32", "float64", None])


@resealed
def no_cells(draws, told, pieces, name):
    told["tensors"][name]["cell"] = draws.choice([[0] * len(told["tensors"][name]["shape"]), [], None, "x"])


@resealed
def other_size(draws, told, pieces, name):
    told["files"][draws.choice(FILES)]["size"] += draws.choice([-1, 1, 0.5])


@resealed
def no_file(draws, told, pieces, name):
    del told["files"][draws.choice(FILES)]


@resealed
def other_kinds(draws, told, pieces, name):
    field = draws.choice(["tensors", "files", "step", "updates", "loss_scale"])
    told[field] = draws.choice([None, [], "x", -1, [1, 2, 3]])


@resealed
def newer_format(draws, told, pieces, name):
    told["format"] = draws.choice([3, 1, 2.0, True, "2", None])


@resealed
def other_step(draws, told, pieces, name):
    told["step"] += draws.choice([-1, 1])


def file_named(make):
    @resealed
    def damage(draws, told, pieces, name):
        old = draws.choice(FILES)
        new = make(draws, old)
        told["files"][new] = told["files"].pop(old)
        for entry in told["tensors"].values():
            for piece in entry["pieces"]:
                piece["file"] = new if piece["file"] == old else piece["file"]

    return damage


def sealed_twice(draws, files, stale):
    """A key twice, under a hash that fits."""
    text = files[MANIFEST].decode().replace('\n "updates"', f'\n "updates": {draws.randrange(9)},\n "updates"')
    head, tail = re.fullmatch(r'(.*,\n "hash": ")[0-9a-f]{32}("\n}\n)', text, re.DOTALL).groups()
    return {MANIFEST: (head + manifest.hash_of((head + tail).encode()) + tail).encode()}


DAMAGE = {
    "manifest: a bit": flip(MANIFEST),
    "manifest: short": cut(MANIFEST),
    "manifest: long": extend(MANIFEST),
    "manifest: blanks at its end": blanks(MANIFEST),
    "manifest: a byte less": drop_a_byte(MANIFEST),
    "manifest: a byte more": put_a_byte(MANIFEST),
    "manifest: bytes exchanged": exchange_bytes(MANIFEST),
    "manifest: a line twice": double_line(MANIFEST),
    "manifest: zeros": zero_all(MANIFEST),
    "manifest: empty": nothing(MANIFEST),
    "manifest: a link": place(LINK)(MANIFEST),
    "manifest: a folder": place(FOLDER)(MANIFEST),
    "manifest: of another step": manifest_of_another_step,
    "manifest: another count": another_count,
    "manifest: a key twice": sealed_twice,
    "manifest: gap": gap,
    "manifest: overlap": overlap,
    "manifest: a piece twice": twice,
    "manifest: a piece outside": outside,
    "manifest: a piece before the start": below_zero,
    "manifest: pieces exchanged": pieces_exchanged,
    "manifest: hashes exchanged": hashes_exchanged,
    "manifest: no hashes": no_hashes,
    "manifest: a tensor renamed": renamed,
    "manifest: roles exchanged": moved_to_another_role,
    "manifest: a tensor missing": missing_tensor,
    "manifest: transposed": transposed,
    "manifest: dtype": manifest_dtype,
    "manifest: cells": no_cells,
    "manifest: size": other_size,
    "manifest: a file missing": no_file,
    "manifest: fields": other_kinds,
    "manifest: format": newer_format,
    "manifest: step": other_step,
    "manifest: ..": file_named(lambda draws, old: f"../step_{STEP:08d}/{old}"),
    "manifest: absolute": file_named(lambda draws, old: f"/tmp/{old}"),
    "manifest: ./": file_named(lambda draws, old: f"./{old}"),
    "manifest: below": file_named(lambda draws, old: f"a/{old}"),
    "manifest: hidden": file_named(lambda draws, old: draws.choice([".", "..", "", ".hidden", "a\\b", "a\0", "a\n"])),
    "file: a bit": flip(*FILES),
    "file: a bit of data": flip_data(*FILES),
    "file: a bit of the header": flip_header(*FILES),
    "file: header length": flip_length(*FILES),
    "file: short": cut(*FILES),
    "file: long": extend(*FILES),
    "file: a byte less": drop_a_byte(*FILES),
    "file: a byte more": put_a_byte(*FILES),
    "file: bytes exchanged": exchange_bytes(*FILES),
    "file: some zeros": zero_some(*FILES),
    "file: zeros": zero_all(*FILES),
    "file: empty": nothing(*FILES),
    "file: missing": place(None)(*FILES),
    "file: a link": place(LINK)(*FILES),
    "file: a link elsewhere": place(ELSEWHERE)(*FILES),
    "file: a folder": place(FOLDER)(*FILES),
    "file: a pickle": as_pickle(*FILES),
    "file: of another step": of_another_step,
    "file: the other's": exchanged,
    "file: pieces exchanged": exchanged_pieces,
    "file: a tensor renamed": other_name,
    "file: dtype": other_dtype,
    "file: shape": other_shape,
    "file: names exchanged": exchanged_names,
    "file: a name twice": doubled_name,
    "file: other blanks in the header": header_blanks,
    "both: all of another step": all_of_another_step,
    "both: a tensor renamed": resealed_header(other_name),
    "both: dtype": resealed_header(other_dtype),
    "both: shape": resealed_header(other_shape),
    "both: names exchanged": resealed_header(exchanged_names),
}
TENSOR = (
    {"both: a tensor renamed", "both: dtype", "both: shape", "both: names exchanged", "file: a bit of data"}
    | {
        f"manifest: {what}"
        for what in (
            *("gap", "overlap", "a piece twice", "a piece outside", "a piece before the start", "pieces exchanged"),
            *("hashes exchanged", "no hashes", "a tensor renamed", "roles exchanged", "a tensor missing", "transposed"),
            *("dtype", "cells"),
        )
    }
    | {"file: pieces exchanged", "file: of another step", "file: some zeros"}
)


def put(folder: Path, name: str, what) -> None:
    """Puts bytes, or something else, in a file's place."""
    path = folder / name
    path.unlink(missing_ok=True)
    if what in (LINK, ELSEWHERE):
        other = folder.parent / f"step_{STALE:08d}" / name if what == ELSEWHERE else folder.parent / f"real_{name}"
        path.symlink_to(other)
    elif what == FOLDER:
        path.mkdir()
    elif what is not None:
        path.write_bytes(what)


def restore(folder: Path, files: dict, names) -> None:
    for name in names:
        if (folder / name).is_dir():
            (folder / name).rmdir()
        put(folder, name, files[name])


def damages(written, kind: str, times: int) -> list[dict]:
    """What is changed, by file, in up to so many different damages of a kind; of some kinds there are but few."""
    _, files, stale = written
    found = []
    for number in range(times):
        changes = DAMAGE[kind](random.Random(f"{kind} {number}"), files, stale)
        changes = {name: what for name, what in changes.items() if what != files[name]}
        assert changes, f"{kind} changed nothing"
        if changes not in found:
            found.append(changes)
    return found


def read_damaged(written, changes):
    """The state, or the CheckpointError, that comes of a damage, which is undone."""
    folder, files, _ = written
    for name in (*FILES, MANIFEST):
        (folder.parent / f"real_{name}").write_bytes(files[name])
    for name, what in changes.items():
        put(folder, name, what)
    try:
        return checkpoint.read(folder, states.plan_of(folder))[0]
    except CheckpointError as error:
        return error
    finally:
        restore(folder, files, changes)


def names_the_file(text: str, changes) -> bool:
    """Whether a refusal names a file that was changed; or one that a changed manifest tells wrongly, and the manifest.

    What contradicts a manifest whose own hash fits may be either.
    """
    return any(name in text for name in changes) or (
        MANIFEST in changes and any(name in text for name in FILES) and re.search("the manifest('s| says)", text)
    )


@pytest.mark.parametrize("times", [SOME, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name(written, kind, times):
    for changes in damages(written, kind, times):
        found = read_damaged(written, changes)
        assert isinstance(found, CheckpointError), (kind, "was loaded")
        text = str(found)
        assert "\n" not in text and names_the_file(text, changes), text
        if kind in TENSOR:
            assert re.search(r"(param|adamw\.[mv]|ema)/\w+", text), text


@pytest.mark.parametrize("times, least", [(SOME, 150), pytest.param(MANY, 2000, marks=pytest.mark.slow)])
def test_there_are_many_damages_of_many_kinds(written, times, least):
    """Which the test above goes through, all different."""
    assert len(DAMAGE) >= 25 and sum(len(damages(written, kind, times)) for kind in DAMAGE) >= least


def test_what_is_not_damaged_loads(written):
    folder, *_ = written
    composed = states.plan_of(folder)
    assert states.is_state(composed, checkpoint.read(folder, composed)[0], STEP)
    checkpoint.verify(folder)


def test_verify_sees_a_bit_anywhere_in_any_file(written):
    folder, files, _ = written
    for number in range(20):
        ((name, data),) = flip(*FILES)(random.Random(number), files, None).items()
        put(folder, name, data)
        try:
            with pytest.raises(Damaged, match=re.escape(name)):
                checkpoint.verify(folder)
        finally:
            restore(folder, files, [name])


def test_a_renamed_folder_is_read_as_what_it_is(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "best")
    assert checkpoint.read(tmp_path / "best", states.plan_of(tmp_path))[0].step == STEP
