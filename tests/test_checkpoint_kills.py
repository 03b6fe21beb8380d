"""Saves killed at each operation of each of 1, 2 and 4 ranks and at random times (kills.py, which forks).

ODIT_KILLS sets how many random times the slow case takes a world: 600 make it more than 2,000 points.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "some": (["--every", "12", "--random", "5"], 50),
    "all": (["--random", os.environ.get("ODIT_KILLS", "60")], 400),
}


@pytest.mark.parametrize("case", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_checkpoint_before_or_the_new_one(tmp_path, case):
    args, least = CASES[case]
    command = [sys.executable, Path(__file__).with_name("kills.py"), tmp_path, *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bad"] == [] and found["points"] >= least
    assert any(key.endswith(" 9") for key in found["found"]) and any(key.endswith(" 7") for key in found["found"])
