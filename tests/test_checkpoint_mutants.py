"""The tests' own test: with any one guard of saving or loading taken away, the test that is named beside it fails."""

import pytest
import test_checkpoint_damage as damage
import test_checkpoint_layouts as layouts
import test_storage as disks

from odit import checkpoint, manifest, saver, saving, shards, storage

whole_one = damage.written  # a fixture: under its own name, tests here could not take it as an argument
MODULES = (storage, manifest, shards, saving, saver, checkpoint)


@pytest.fixture
def mutate():
    """Puts another line in the place of one that is there once, in a module and in all that have names of it."""
    kept = [(module, dict(vars(module))) for module in MODULES]

    def put(module, line, instead):
        with open(module.__file__) as file:
            source = file.read()
        assert source.count(line) == 1, f"{line!r} stands {source.count(line)} times in {module.__name__}"
        old = dict(vars(module))
        exec(compile(source.replace(line, instead), module.__file__, "exec"), vars(module))
        new = {id(old[name]): value for name, value in vars(module).items() if name in old and value is not old[name]}
        for other in MODULES:
            for name, value in vars(other).items() if other is not module else ():
                if id(value) in new:
                    setattr(other, name, new[id(value)])

    yield put
    for module, names in kept:
        vars(module).clear()
        vars(module).update(names)


def cut(how):
    return lambda path, whole: disks.test_a_power_cut_at_any_moment_of_a_save(path, 1, how)


def damaged(kind, times=3):
    return lambda path, whole: damage.test_damage_is_refused_by_name(whole, kind, times)


def alone(test, *args):
    return lambda path, whole: test(path, *args)


SYNC_FOLDER = "    disk.sync_path(temporary)\n    delete"
FIRST_FOLDERS = "    disk.sync_path(path.parent)\n\n\ndef remove"
SYNC_RENAME = "    disk.sync_path(final.parent)\n"
COMMIT = f"""    delete(final, disk)  # what has that name and is not whole
    disk.rename(temporary, final)
{SYNC_RENAME}"""
PRUNE = """    older = [folder_of(job.out, step, job.place) for step in steps(job.out, job.place) if step <= job.step]
    kept = [folder for folder in older if is_whole(folder)]
    for folder in kept[: -job.keep]:
        with _let_be(folder):
            delete(folder, disk)
"""
EARLY = PRUNE.replace("[: -job.keep]", "[: len(kept) - job.keep + 1]")
HIDE = """    disk.rename(folder, doomed)
    disk.sync_path(folder.parent)
    remove_tree(doomed, disk)
"""
WRITE = "    write_file(temporary / MANIFEST, [text], disk)\n"
VERDICT = '    _done(talk.hear("verdict", "rank 0 to commit a checkpoint"))\n'
CLEAR = "                remove_tree(temporary, disk)\n"
LINKS = "path.is_symlink() or (path.exists() and not path.is_file())"
STORED = '(dtype, shape) != ("F32", piece.box.shape)'

# name -> (module, what stands there, what stands there instead, the test that fails)
MUTANTS = {
    # forcing to the disk
    "files are not forced": (storage, "        disk.sync(handle)\n", "", cut("forced alone")),
    "nor the hidden folder's names": (saving, SYNC_FOLDER, "    delete", cut("forced alone")),
    "nor the rename": (saving, SYNC_RENAME, "", cut("forced alone")),
    "nor the first folders": (storage, FIRST_FOLDERS, "\n\ndef remove", cut("forced alone")),
    # the order
    "the rename before the manifest": (
        saving,
        WRITE,
        COMMIT + WRITE.replace("temporary", "final"),
        cut("data is torn"),
    ),
    "deletion before the rename": (saving, COMMIT + PRUNE, EARLY + COMMIT, cut("forced alone")),
    "deletion before the rename is forced": (
        saving,
        COMMIT + PRUNE,
        COMMIT.replace(SYNC_RENAME, PRUNE),
        cut("forced alone"),
    ),
    "deletion without a rename": (saving, HIDE, "    remove_tree(folder, disk)\n", cut("some removals late")),
    "deletion before its rename is forced": (
        saving,
        "    disk.sync_path(folder.parent)\n",
        "",
        cut("some removals late"),
    ),
    "no hidden name": (saving, '/ f".step_{job.step:08d}.tmp"', '/ f"step_{job.step + 100:08d}"', cut("data is torn")),
    # what is kept, and who knows
    "broken ones count": (
        saving,
        "in older if is_whole(folder)]",
        "in older]",
        alone(disks.test_only_whole_checkpoints_count_for_retention),
    ),
    "a step that is there is written again": (
        saving,
        "    if is_whole(final):\n",
        "    if False:\n",
        alone(disks.test_a_step_that_is_there_stays_and_a_broken_one_is_replaced),
    ),
    "leavings stay": (
        saving,
        '(tmp|old)", name)',
        '(none)", name)',
        alone(disks.test_what_killed_saves_left_is_cleared_away),
    ),
    "the others do not hear of a failure": (saving, VERDICT, "", alone(disks.test_a_full_disk_at_twenty_levels, 2)),
    "what a failed save wrote stays": (
        saving,
        CLEAR,
        "                pass\n",
        alone(disks.test_a_full_disk_at_twenty_levels, 1),
    ),
    # hashes
    "the manifest's hash": (
        manifest,
        "hash_of(sealed[1] + sealed[3]).encode() != sealed[2]",
        "False",
        damaged("manifest: another count"),
    ),
    "cells' hashes": (
        shards,
        "as_bytes(x[part.within(box)])) != told:",
        "as_bytes(x)) == 0:",
        damaged("file: a bit of data"),
    ),
    "headers' hashes": (
        shards,
        "+ file.read(size)) != told.header:",
        "+ file.read(size)) == 0:",
        damaged("file: other blanks in the header"),
    ),
    "files' hashes": (
        shards,
        "if digest.hexdigest() != told.hash:",
        "if False:",
        lambda path, whole: damage.test_verify_sees_a_bit_anywhere_in_any_file(whole),
    ),
    # checks
    "gaps": (manifest, "    if held != size:\n", "    if held > size:\n", damaged("manifest: gap")),
    "overlaps": (manifest, "np.argwhere(np.triu(shared, 1))[:1]", "[]", damaged("manifest: overlap")),
    "pieces outside": (
        manifest,
        "if any(b > n for b, n in zip(box.ends, shape)):",
        "if False:",
        damaged("manifest: a piece outside", 9),
    ),
    "doubled keys": (manifest, "if len(found) < len(pairs):", "if False:", damaged("manifest: a key twice")),
    "plain names": (manifest, 'r"[A-Za-z0-9][A-Za-z0-9_.-]*"', 'r".*"', damaged("manifest: ..")),
    "links": (manifest, LINKS, "False", damaged("file: a link")),
    "a linked manifest": (
        manifest,
        "        if path.is_symlink():\n",
        "        if False:\n",
        damaged("manifest: a link"),
    ),
    "sizes": (
        manifest,
        "    if path.stat().st_size != told.size:\n",
        "    if False:\n",
        damaged("manifest: size", 9),
    ),
    "the folder's step": (
        manifest,
        'if named and int(named[1]) != value["step"]:',
        "if False:",
        damaged("manifest: step"),
    ),
    "the format": (
        manifest,
        "    if told != FORMAT or type(told) is not int:\n",
        "    if False:\n",
        damaged("manifest: format", 9),
    ),
    "dtypes": (shards, STORED, "shape != piece.box.shape", damaged("both: dtype", 9)),
    "dtypes told": (manifest, 'if told.get("dtype") != DTYPE:', "if False:", damaged("manifest: dtype")),
    # reading no more than is needed
    "whole pieces are read": (
        shards,
        "manifest.whole_cells(entry.cell, common, piece.box)",
        "piece.box",
        lambda path, whole: layouts.assert_read(layouts.write(path, (1, 0, "none")), (3, 3, "none")),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_test_of_a_guard_fails_without_it(mutate, tmp_path, whole_one, mutant):
    module, line, instead, test = MUTANTS[mutant]
    for folder in ("whole", "mutant"):
        (tmp_path / folder).mkdir()
    test(tmp_path / "whole", whole_one)
    mutate(module, line, instead)
    with pytest.raises(BaseException) as failed:
        test(tmp_path / "mutant", whole_one)
    assert not isinstance(failed.value, (KeyboardInterrupt, SystemExit, NameError, SyntaxError)), failed.value
