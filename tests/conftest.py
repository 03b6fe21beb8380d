"""Small runs that tests share."""

import collections
import dataclasses
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import ranks  # noqa: F401 (a fixture)

from odit import config, data, param, plan, random, tree
from odit.models import dit

torch.set_num_threads(1)  # tests are small, and two threads that wait for each other are slower than one


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``every(n)`` only every n-th case runs by default; the others are slow ones."""
    seen: collections.Counter = collections.Counter()
    for item in items:
        if marker := item.get_closest_marker("every"):
            if seen[item.function] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[item.function] += 1


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.open_dataset(data.Config(source="digits", held_out=1 / 6))


@pytest.fixture
def tiny(tmp_path: Path) -> config.Run:
    """A digits run that a test can afford."""
    return dataclasses.replace(
        config.presets()["digits"][1],
        out=tmp_path / "run",
        steps=20,
        model=dit.Config(width=32, depth=2, heads=2, patch=2),
        evaluate=False,
        progress=False,
        log_every=1,
        validate_every=20,
        sample_every=20,
        validation_draws=1,
        sampling=config.Sampling(solver="euler", steps=2, guidance=config.Guidance(scale=2.0)),
    )


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is such a place; a module takes it as its ``tmp_path``.

    Whatever ended it, a process ends once the disk lets go of what it writes; that of a busy machine took 10 s.
    """
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shutil.disk_usage(shared).free < 1 << 30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix=f"{tmp_path.name}-", dir=shared, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def make_plan(digits):
    """(run, changes) -> plan on the digits."""
    return lambda run, **changes: plan.make(dataclasses.replace(run, **changes), digits)


def redraw(declared, key=random.key(11), dtype=torch.float64, std=0.1):
    """Weights with every zero-initialised leaf and bias drawn, so that no error hides behind adaLN-Zero's zeros."""

    def leaf(path, p):
        drawn = param.draw(p, path, key).to(dtype)
        noise = random.normal(random.fold_in(key, "redraw", path), p.shape).to(dtype) * std
        return noise if not drawn.any() else drawn + noise * (drawn.ndim == 1)

    return tree.map_with_path(leaf, declared)


def need(why):
    """Skips the test if there is a reason ``why`` something is not there; what is there must load and be right."""
    if why:
        assert not any(word in why for word in ("cannot", "needs", "wrong")), why
        pytest.skip(why)


def normal(key, shape, device="cpu"):
    """``random.normal`` drawn where it is used: on a GPU by the kernel with its bits (test_draws.py), as millions of
    values take a CPU seconds, and the steps of ``random.normal`` ten times the memory."""
    if torch.device(device).type == "cpu":
        return random.normal(key, shape)
    from odit.kernels import draws  # Triton is not everywhere

    return draws.normal(key, shape, device=device)


def script(name):
    """An experiment as a module; scripts are no package."""
    file = Path(__file__).parent.parent / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
