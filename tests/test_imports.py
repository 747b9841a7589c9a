"""Which package may import which, read from the import statements of every file. A wing is a folder, with or without
an `__init__.py`; the model loads variants of the Q-Adapter, which are experiments, by their name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVERYTHING = {
    "common", "models", "video_data", "metrics", "training", "qadapter", "model", "evaluate", "train", "bench",
    "backbones", "study", "report",
}
ALLOWED = {
    "common": set(),
    "metrics": set(),
    "qadapter": set(),
    "models": {"common"},
    "video_data": {"common"},
    "model": {"common", "models", "qadapter"},
    "training": {"common", "metrics", "models", "video_data"},
    "report": {"common", "metrics", "qadapter"},
    "evaluate": EVERYTHING - {"train", "bench", "backbones", "study"},
    "train": EVERYTHING - {"bench", "backbones", "study"},
    "bench": EVERYTHING,
    "backbones": EVERYTHING,
    "study": EVERYTHING,
}


def imported(path: Path) -> set[str]:
    """The packages that a file imports anywhere, in functions too; without relative imports, which metrics/ has."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package):
    files = (ROOT / package).rglob("*.py") if (ROOT / package).is_dir() else [ROOT / f"{package}.py"]
    found = set().union(*map(imported, files)) & EVERYTHING
    assert found - {package} <= ALLOWED[package]
