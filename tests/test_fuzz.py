"""A few cases of the fuzz driver, seed 0, and what it finds in commands that are wrong."""

import random
import shutil
import sys
import time
from types import SimpleNamespace

import pytest

from common.errors import InputError
from tests import fuzz


@pytest.fixture(scope="module")
def world(backbones, flags, finished_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for name, folder in (("vit", backbones / "vit"), ("lm", backbones / "lm"), ("data", flags[-1]),
                         ("run", finished_run)):  # fmt: skip
        shutil.copytree(folder, root / name)
    return fuzz.complete_world(fuzz.World(root))


def test_some_cases_end_as_they_should(world, tmp_path):
    """Seven of each family. The time limit is generous: other tests run beside this one."""
    results = [fuzz.fuzz_one(world, 0, number, tmp_path, seconds=120) for number in range(42)]
    assert not [found for _, found, _ in results if found]
    assert {code for _, _, code in results} == {0, 2}, "some are refused, some are not"


def bad_flag(*made):
    for path in made:
        path.mkdir()
    raise InputError("--x: is bad")


@pytest.mark.parametrize(("fault", "main"), [
    ("a traceback", lambda folder: 1 // 0), ("exit code 3", lambda folder: 3),
    ("no line of error", lambda folder: 2), ("a hang", lambda folder: time.sleep(9)),
    ("a late refusal, out exists", lambda folder: bad_flag(folder / "out")),
    ("harm to a file that", lambda folder: (folder / "kept").write_text("other") and 0),
    ("the run was refused", lambda folder: (folder / "log").write_text("other") and bad_flag()),
    ("", lambda folder: bad_flag()), ("", lambda folder: print("good", file=sys.stderr)),
])  # fmt: skip
def test_faults_are_found(fault, main, tmp_path, monkeypatch):
    def make_case(rng, world, folder):
        for name in ("kept", "log"):
            (folder / name).write_text("text")
        script = SimpleNamespace(main=lambda: main(folder), __name__="script")
        return fuzz.Case(script, [], kept=[folder / "kept"], kept_if_refused=[folder / "log"], made=[folder / "out"])

    monkeypatch.setattr(fuzz, "FAMILIES", {"one": make_case})
    family, found, _ = fuzz.fuzz_one(None, 0, 0, tmp_path, seconds=2 if fault == "a hang" else 60)
    assert family == "one" and fault in found and bool(found) == bool(fault)


def test_a_case_is_the_same_each_time(world, tmp_path):
    """Words and damage follow from the seed and the number; the folders differ."""
    cases = []
    for name in ("a", "b"):
        for family, make in fuzz.FAMILIES.items():
            (folder := tmp_path / name / family).mkdir(parents=True)
            case = make(random.Random("0 7"), world, folder)
            cases.append([str(word).replace(str(folder), "") for word in (*case.words, case.changed)])
    half = len(cases) // 2
    assert cases[:half] == cases[half:]
