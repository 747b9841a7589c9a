"""README.md and docs/: every command, flag, path and link in them exists."""

import importlib.util
import re
from pathlib import Path

import pytest

import evaluate
from common import config
from metrics import __main__ as metrics_command

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"train": config.make_parser(), "evaluate": evaluate.make_parser(), "metrics": metrics_command.make_parser()}
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "data", "results"}
COMMAND = re.compile(r"(?:python3? -m ([\w.]+)|(?<![\w/.])(\w+)\.py)((?:\s+[^\s|>&;]+)*)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@every_page
def test_commands_and_their_flags_exist(page):
    for line in "".join(code_blocks(page)).replace("\\\n", " ").splitlines():
        for module, script, words in COMMAND.findall(line.split(" #")[0]):
            name = module or script
            assert name.startswith("torch.") or importlib.util.find_spec(name), f"no module {name}: {line}"
            if name in PARSERS:
                unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", words)) - set(PARSERS[name]._option_string_actions)
                assert not unknown, line


@every_page
def test_paths_exist(page):
    """Those in the project's folders, as inline code; `*` stands for any name."""
    for span in re.findall(r"`([\w./*-]+/[\w./*-]*)`", prose(page)):
        if span.split("/")[0] in FOLDERS and not span.startswith("backbones/.cache"):
            assert list(ROOT.glob(span.rstrip("/"))), span


@every_page
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose(page)):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor
