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


def module_name(path: Path) -> str:
    """"models/vit.py" -> "models.vit", "models/__init__.py" -> "models"."""
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere, in functions too; without relative imports, which metrics/ has."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= submodules if len(submodules) == len(node.names) else submodules | {node.module}
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py")) if (ROOT / package).is_dir() else [ROOT / f"{package}.py"]


MODULES = {module_name(path): path for package in ALLOWED for path in files(package)}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package):
    """And each of the project's modules that it names exists."""
    found = {name for path in files(package) for name in imports(path) if name.partition(".")[0] in EVERYTHING}
    assert {name.partition(".")[0] for name in found} - {package} <= ALLOWED[package]
    assert found <= MODULES.keys()


def test_there_is_no_circle():
    """Depth-first search over the modules."""
    graph = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_the_root_holds_the_four_modules():
    assert {path.name for path in ROOT.glob("*.py")} == {"qadapter.py", "model.py", "train.py", "evaluate.py"}
