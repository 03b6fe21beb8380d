"""The tests' own test: with any one guard of saving or loading taken away, the test that is named beside it fails."""

import dataclasses
import re

import pytest
import states
import test_checkpoint as checkpoints
import test_checkpoint_damage as damage
import test_checkpoint_layouts as layouts
import test_storage as disks

from odit import checkpoint, manifest, plan, saver, saving, shards, storage
from odit.models import dit
from odit.models.config import Shape

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


def flipped_weights(path, whole):
    run = dataclasses.replace(states.one_rank().run, model=dit.Config(width=8, depth=2, heads=2, patch=2))
    saved = plan.compose(run, Shape(1, (8, 8), 10)), None
    checkpoints.test_a_flipped_bit_in_a_weights_file_is_refused(saved, path)


SYNC_FOLDER = "    disk.sync_path(temporary)\n    delete"
FIRST_FOLDERS = "    disk.sync_path(path.parent)\n\n\ndef remove"
SYNC_ONE = "        if sync:\n            disk.sync_path(temporary)\n"
SYNC_NAME = "        if sync:\n            disk.sync_path(path.parent)\n"
RENAME_ONE = "        disk.rename(temporary, path)\n"
SYNC_ASIDE = "        disk.sync_path(aside.parent)\n"
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
WRITE = "    write_file(temporary / MANIFEST, [text], disk)\n    disk.sync_path(temporary)\n"
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
    "nor one file that another writes": (
        storage,
        SYNC_ONE,
        "",
        alone(disks.test_a_power_cut_while_one_file_is_written, "data is torn"),
    ),
    "nor its name": (storage, SYNC_NAME, "", alone(disks.test_a_power_cut_while_one_file_is_written, "forced alone")),
    "nor what is set aside": (
        saving,
        SYNC_ASIDE,
        "",
        alone(disks.test_a_power_cut_while_checkpoints_are_set_aside, "forced alone"),
    ),
    # the order
    "the rename before the manifest": (
        saving,
        WRITE + COMMIT,
        COMMIT + WRITE.replace("temporary", "final"),
        cut("data is torn"),
    ),
    "one file's name is forced before its rename": (
        storage,
        RENAME_ONE + SYNC_NAME,
        SYNC_NAME + RENAME_ONE,
        alone(disks.test_a_power_cut_while_one_file_is_written, "forced alone"),
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
    "hashes in a weights file": (
        checkpoint,
        '        shards.check_cells(path, name, cell, told[name]["hashes"], whole, wide, x, "the one in its header")\n',
        "",
        flipped_weights,
    ),
    "the hash of a weights file's header": (
        checkpoint,
        'manifest.unseal(text.encode(), path) if "tensors" in told or "hash" in told else told',
        '{name: value for name, value in told.items() if name != "hash"}',
        flipped_weights,
    ),
    # checks
    "gaps": (manifest, "    if held != size:\n", "    if held > size:\n", damaged("manifest: gap")),
    "gaps at a save": (
        saving,
        "        manifest.check_cover(temporary / MANIFEST, name, entry)\n",
        "        pass\n",
        alone(disks.test_a_save_that_lacks_a_piece_commits_nothing, 2),
    ),
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


@pytest.fixture
def slips(monkeypatch):
    """What saves have met that no disk and no guard raises: states.save returns it, and a test may fail of it."""
    met, save = [], states.save

    def noting(*args, **kwargs):
        found = save(*args, **kwargs)
        errors = [error for error in found if isinstance(error, Exception)]
        met.extend(e for e in errors if not isinstance(e, OSError) or re.search(r"Error on rank \d", str(e)))
        return found

    monkeypatch.setattr(states, "save", noting)
    return met


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_test_of_a_guard_fails_without_it(mutate, slips, tmp_path, whole_one, mutant):
    """By an assertion, not by a slip of the mutant; and not where a line is replaced by itself."""
    module, line, instead, test = MUTANTS[mutant]
    for folder in ("whole", "mutant"):
        (tmp_path / folder).mkdir()
    mutate(module, line, line)
    test(tmp_path / "whole", whole_one)
    mutate(module, line, instead)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(tmp_path / "mutant", whole_one)
    assert not slips
