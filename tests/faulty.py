"""experiments/train.py with something wrong: ``python tests/faulty.py FAULT=VALUE ARGUMENTS``."""

import math
import os
import sys
import time

from conftest import script

from odit import health, storage

train_script = script("train")


def nan(rank):
    """From the second step on, this rank reads a NaN."""
    whole = train_script.loader.batches

    def poisoned(*args, **kwargs):
        for number, batch in enumerate(whole(*args, **kwargs)):
            if number and os.environ["RANK"] == rank:
                batch.x.view(-1)[0] = math.nan
            yield batch

    train_script.loader.batches = poisoned


def slow(seconds):
    """Storage takes its time for each file of a checkpoint."""
    create = storage.Disk.create

    def late(disk, path):
        if "checkpoints" in path.parts:
            time.sleep(float(seconds))
        return create(disk, path)

    storage.Disk.create = late


def stuck(step):
    """Storage takes nothing any more once this step's save has made its folder."""
    make = storage.Disk.make_folder

    def last(disk, path):
        make(disk, path)
        if path.name.startswith(f".step_{int(step):08d}"):
            for name in ("create", "write", "sync", "sync_path", "make_folder", "rename", "remove", "remove_folder"):
                setattr(storage.Disk, name, lambda *args: time.sleep(1000))

    storage.Disk.make_folder = last


def validating(seconds):
    """Validation takes its time on all ranks."""
    whole = train_script.validate.validate

    def late(*args):
        time.sleep(float(seconds))
        return whole(*args)

    train_script.validate.validate = late


fault, value = sys.argv.pop(1).split("=")
{"nan": nan, "slow": slow, "stuck": stuck, "validating": validating}[fault](value)
health.run(train_script.cli)
