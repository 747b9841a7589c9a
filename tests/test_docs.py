"""README.md and docs/: every path, command, flag, name and link in them exists, and the README stays short."""

import importlib.util
import io
import re
import runpy
import sys
from contextlib import redirect_stdout
from dataclasses import astuple
from pathlib import Path

import pytest

from training.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("train", "evaluate", "metrics", "bench", "bench.picture", "bench.shapes_ceiling",
            "bench.widths", "backbones.pretrain", "study", "tests.fuzz")  # fmt: skip
TORCHRUN_FLAGS = {"--standalone", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
CHROMIUM_FLAGS = {"--headless", "--hide-scrollbars", "--window-size", "--screenshot"}
SUFFIXES = (".py", ".md", ".txt", ".json", ".jsonl", ".csv", ".pkl", ".zip", ".png", ".svg", ".yml", ".cff", ".toml",
            ".pt", ".bin", ".model", ".safetensors")  # fmt: skip
MADE_BY_RUNS = ("runs/", "data/", "best/", "last/", "val/", "log.jsonl", "test.json", "adapter.safetensors", "state.pt",
                "sha256.json")  # fmt: skip
OF_USERS = {  # annotations, models and captions that readers have
    "AllVideoDescriptions.txt", "raw-captions.pkl", "MSR_Video_Description_Corpus.csv", "youtube_mapping.txt",
    "train_list.txt", "val_list.txt", "test_list.txt", "msvd_data.zip", "MSRVTT_data.json",
    "train_val_videodatainfo.json", "test_videodatainfo.json", "captions.json", "refs.json", "predictions.json",
    "config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model",
    "tokenizer.json", "tokenizer_config.json", "generation_config.json",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # by runpy
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read_prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def code_spans(page: Path) -> list[str]:
    """The inline code of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", read_prose(page))]


def commands(page: Path) -> list[tuple[str, str]]:
    """(module, arguments) of each `python -m MODULE ...` and `MODULE.py ...` of a page."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + code_spans(page)
    found = []
    for part in (part for line in lines for part in line.split("&&")):
        if match := re.search(r"python3? -m ([\w.]+)(.*)|(?:^|\s)([\w/]+)\.py(?:\s(.*))?$", part):
            found.append((match[1] or match[3].replace("/", "."), match[2] or match[4] or ""))
    return found


def find_flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


@pytest.fixture(scope="module")
def help_flags() -> dict[str, set[str]]:
    """{program: the flags that its --help lists}."""
    flags = {}
    for program in PROGRAMS:
        output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), pytest.raises(SystemExit):
            patch.setattr(sys, "argv", [program, "--help"])
            runpy.run_module(program, run_name="__main__")
        output.seek(0)
        flags[program] = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", output.read(), re.MULTILINE))
    return flags


@pytest.fixture(scope="module")
def words() -> set[str]:
    """Every word of the program's source files."""
    files = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")) if path.parent.name != "tests"]
    return {word for path in files for word in re.findall(r"\w+", path.read_text())}


@every_page
def test_paths_exist(page):
    for span in code_spans(page):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span) or span in OF_USERS or span.startswith(MADE_BY_RUNS):
            continue
        if span.endswith(("/", *SUFFIXES)) or ("/" in span and (ROOT / span.split("/")[0]).is_dir()):
            assert (ROOT / span).exists(), span


@every_page
def test_commands_exist_and_accept_their_flags(page, help_flags):
    for module, arguments in commands(page):
        assert importlib.util.find_spec(module), f"no module {module}"
        if module in help_flags:
            assert find_flags(arguments) <= help_flags[module], f"{module} {arguments}"


@every_page
def test_flags_exist(page, help_flags):
    unknown = find_flags(page.read_text()) - set.union(TORCHRUN_FLAGS, CHROMIUM_FLAGS, *help_flags.values())
    assert not unknown


@every_page
def test_names_exist(page, words):
    """`function()`, `Class`, `Class.method` and `CONSTANT` are words of the source files."""
    for span in code_spans(page):
        if re.fullmatch(r"[A-Z]\w+(\.\w+)?|\w+\(\)", span):
            missing = set(re.findall(r"\w+", span)) - words
            assert not missing, span


@every_page
def test_links_resolve(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", read_prose(page)):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor


def test_the_defaults_of_datasets_are_the_presets():
    """docs/runs.md has a row for each dataset of `training.presets`, with the same numbers."""
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| "
                      r"([\d.]+) \| (\d+) \|$",
                      (ROOT / "docs/runs.md").read_text(), re.MULTILINE)  # fmt: skip
    presets = {name: astuple(preset) for name, preset in PRESETS.items()}
    assert {name: tuple(map(float, values)) for name, *values in rows} == presets


def test_the_readme_is_short():
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120 and not line.startswith("python3 -m venv ")]
