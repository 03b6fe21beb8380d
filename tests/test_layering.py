"""Who may import whom (README, map of files): read from the source with ast."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PURE = {
    *("tree", "random", "param", "ops", "nn", "models", "diffusion", "optim", "data", "metrics", "convert", "config"),
    *("compiling", "finetune", "encoders", "judge", "media", "remat", "graphs", "storage", "fidelity", "rates"),
    "config_json",
}
BOTH_SIDES = {
    *("plan", "checks", "front", "checkpoint", "train", "sample", "health", "record", "evaluate", "validate", "memory"),
    *("initial", "source", "bench", "manifest", "shards", "saving", "crash", "forecast", "footprint", "pace"),
    *("ablation", "comparison", "draws", "saver", "choice", "peers"),
}
ALLOWED = {
    "kernels": {"ops", "tree", "kernels"},
    "parallel": {"ops", "tree", "param", "random", "optim", "parallel"},
}
RAW_DISTRIBUTED = {"odit/parallel/mesh.py", "odit/parallel/collectives.py"}
FILES = sorted((ROOT / "odit").rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Absolute dotted names a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Attribute):  # torch.distributed.x without an import of its own
            found |= {ast.unparse(node)} if ast.unparse(node).startswith("torch.distributed") else set()
    return found


def subject(file: Path) -> str:
    """The file's first name below odit: tree, models, parallel, ..."""
    return file.relative_to(ROOT / "odit").parts[0].removesuffix(".py")


def subjects_imported(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("odit.")}


def violations(file: Path) -> list[str]:
    """What this file may not import."""
    of, names, raw = subject(file), imports(file), str(file.relative_to(ROOT))
    bad = []
    if raw not in RAW_DISTRIBUTED:
        bad += [n for n in names if n.startswith("torch.distributed")]
    bad += [n for n in names if n.split(".")[0] == "experiments"]
    used = subjects_imported(file) - {"__version__"}
    if of in PURE:
        bad += sorted(used - PURE - {of})
    elif of in ALLOWED:
        bad += sorted(used - ALLOWED[of])
    elif of != "__init__":
        assert of in BOTH_SIDES, f"{raw}: give {of} a layer in this test"
    return bad


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_file_imports_only_its_layer(file):
    assert violations(file) == []


def test_models_do_not_know_about_ranks():
    for file in (ROOT / "odit" / "models").glob("*.py"):
        assert not words_of_ranks(file.read_text()), file.name


def words_of_ranks(source: str) -> set[str]:
    """Words of distribution in a source's code (comments aside)."""
    words = set(re.findall(r"[a-z]+", ast.unparse(ast.parse(source)).lower()))
    return {w for w in words if w.rstrip("s") in {"rank", "world", "group", "shard"}}


@pytest.mark.parametrize("line", ["f(rank=0)", "mesh.world_size", "for s in shards: pass", "def group(x): return x"])
def test_a_word_of_ranks_is_seen(line):
    assert words_of_ranks(line)


def test_a_forbidden_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("test_layering.ROOT", tmp_path)
    cases = {
        "nn.py": "import torch.distributed as dist",
        "optim.py": "from odit import train",
        "ops.py": "import torch; torch.distributed.get_rank()",
        "kernels/a.py": "import odit.nn",
    }
    for name, line in cases.items():
        file = tmp_path / "odit" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(line)
        assert violations(file), f"{name}: {line}"
