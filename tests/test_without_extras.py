"""A run where none of the libraries of fast paths is installed."""

import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).parent.parent / "experiments" / "train.py"
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("triton", "flash_attn", "quack")))  # none of them can be imported
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = "--steps 2 --validation-draws 1 --model.depth 1 --model.width 32 --model.heads 2 --sampling.steps 2"


def test_training_and_sampling_without_them(tmp_path):
    command = [
        sys.executable,
        "-c",
        WITHOUT,
        TRAIN,
        "digits",
        *SMALL.split(),
        "--device",
        "cpu",
        "--no-evaluate",
        "--out",
        tmp_path / "run",
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "kernels: reference (auto; no fused ones: Triton is not installed)" in found.stdout + found.stderr
    assert list((tmp_path / "run").rglob("*.png"))
