"""Saves killed at each operation of each of 1, 2 and 4 ranks and at random times (kills.py, which forks).

ODIT_KILLS sets how many random times the slow case takes a world; 460 make it more than 2,000 points.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

POINTS = {1: 75, 2: 242, 4: 330}  # by world: of operations, half writes and deaths of one rank alone among them
CASES = {"some": (12, 5), "all": (1, int(os.environ.get("ODIT_KILLS", "460")))}  # every n-th of them, random times


@pytest.mark.parametrize("case", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_checkpoint_before_or_the_new_one(tmp_path, case):
    every, times = CASES[case]
    options = ["--every", str(every), "--random", str(times)]
    command = [sys.executable, Path(__file__).with_name("kills.py"), tmp_path, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bad"] == []
    assert found["points"] >= sum(-(-num // every) + times for num in POINTS.values()), "saves have fewer operations"
    kills, worlds = (("killed", "killed_after"), POINTS) if case == "all" else (("killed",), (2, 4))
    wanted = {" ".join(map(str, kind)) for kind in itertools.product(kills, worlds, (7, 9))}
    assert wanted <= set(found["found"]), "some kills came all before, or all after, the new one was there"
