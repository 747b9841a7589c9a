"""README.md and docs/: every command, flag, path and link in them exists."""

import importlib.util
import os
import pkgutil
import re
from pathlib import Path

import pytest

import evaluate
from common import config
from metrics import __main__ as metrics_command
from tests.pages import differences, run_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"train": config.make_parser(), "evaluate": evaluate.make_parser(), "metrics": metrics_command.make_parser()}
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "data", "results"}
COMMAND = re.compile(r"(?:python3? -m ([\w.]+)|(?<![\w/.])(\w+)\.py)((?:\s+[^\s|>&;]+)*)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@every_page
def test_commands_and_their_flags_exist(page):
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
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


@pytest.mark.parametrize("name", ["README.md", "docs/tour.md"])
def test_the_python_of_a_page_prints_what_the_page_says(name, tmp_path, monkeypatch):
    """In a folder that holds the demo only; numbers within 8% or 0.1."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / name).read_text()
    found = run_page(page)
    assert "```python" in page and not differences(found, page)
    assert len(found.splitlines()) == len(page.splitlines())


EXERCISES = re.findall(r"Empty `([\w.]+)`.*?pytest (\S+)", (ROOT / "docs/exercises.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("name, check", EXERCISES, ids=[name for name, _ in EXERCISES])
def test_the_check_of_an_exercise_fails_while_the_body_is_empty(name, check):
    """In a fork of this process, which has imported everything already."""
    if not (child := os.fork()):
        code = 0
        try:
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            empty, (owner, _, attribute) = (lambda *_, **__: None), name.rpartition(".")
            if not (function := pkgutil.resolve_name(name)).__closure__:  # `super()` is one
                function.__code__ = empty.__code__  # wherever it was imported
            setattr(pkgutil.resolve_name(owner), attribute, empty)
            code = pytest.main([str(ROOT / check), "-q", "-x", "-p", "no:cacheprovider"])
        finally:
            os._exit(int(code))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == pytest.ExitCode.TESTS_FAILED


def test_there_are_ten_exercises():
    assert len(EXERCISES) == 10
