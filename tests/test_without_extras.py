"""A run where none of the libraries of fast paths is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "experiments"
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("triton", "flash_attn", "quack")))  # none of them can be imported
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = "--steps 2 --validation-draws 1 --model.depth 1 --model.width 32 --model.heads 2 --sampling.steps 2"


def without(script, *args):
    command = [sys.executable, "-c", WITHOUT, SCRIPTS / script, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_training_and_sampling_without_them(tmp_path):
    found = without("train.py", "digits", *SMALL.split(), "--device", "cpu", "--no-evaluate", "--out", tmp_path / "run")
    assert found.returncode == 0, found.stderr
    assert "kernels: reference (auto; no fused ones: Triton is not installed)" in found.stdout + found.stderr
    assert list((tmp_path / "run").rglob("*.png"))


@pytest.mark.parametrize(
    "command, what",
    [
        ("plan.py dit-s-8 --gpus 1 --memory-gib 24", "a forecast of fused kernels"),
        ("bench.py kernels --device cpu", "bench.py kernels"),
        ("bench.py optimizer --device cpu", "bench.py optimizer"),
    ],
)
def test_what_needs_triton_says_so(command, what):
    found = without(*command.split())
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    assert f"error: {what} needs Triton, which is not installed: pip install triton" in found.stderr
