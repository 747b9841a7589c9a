"""The study: which runs a table has, what they measure, and the page that is written from them.

References: plain statistics of the standard library, the files of tiny runs, and results/ for docs/study.md.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import xml.etree.ElementTree
from dataclasses import replace

import pytest
import torch
from training.config import make_parser, parse_args

from common.errors import InputError
from study import __main__ as program
from study import figures, report, runs
from study.runs import RunKey, chosen_lr, first_runs, later_runs
from study.tables import CHOSEN, LRS, SEEDS, TABLES, Table, of_size
from train import load_captioner
from training.distributed import ProcessGroup

A, B = "--rank 8", "--method none"
TABLE = Table("--dataset shapes", {"a": A, "b": B}, reference="a", store="x")


def result(key: RunKey, cider: float, **scores) -> dict:
    test = {"Bleu_4": 0.5, "METEOR[exact,stem]": 0.4, "ROUGE_L": 0.6, "CIDEr": 4.0 - cider, "shapes right": 0.9,
            "motion right": 0.8, "motion_one right": 0.7, "motion_two right": 0.6} | scores  # fmt: skip
    trains = key.flags == A
    return {"flags": f"{TABLE.flags} {key.flags}", "lr": key.lr, "seed": key.seed, "val CIDEr": cider,
            "best step": 5, "test": test, "seconds": 90.0, "seconds per step": 0.25 if trains else None,
            "peak bytes": 2 * 10**9, "adapter bytes": 10**6, "trained": 300 * trains, "total": 10_000, "steps": 5,
            "machine": "1 thread(s) of X, 2 at a time", "date": "2026-01-01"}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_the_flags_of_every_row_are_those_of_train_py(name):
    for flags in TABLES[name].rows.values():
        assert TABLES[name].reference in TABLES[name].rows
        make_parser().parse_args([*TABLES[name].flags.split(), *flags.split()])
    names = {RunKey(flags, LRS[0], 0).folder_name for flags in TABLES[name].rows.values()}
    assert len(names) == len(TABLES[name].rows) and not any(set(" /") & set(folder) for folder in names)
    assert all(other.flags == TABLES[name].flags for other in TABLES.values() if other.store == TABLES[name].store)


def test_the_rate_of_the_best_validation_is_taken_for_the_other_seeds():
    keys = first_runs(TABLE)
    assert keys == [*(RunKey(A, lr, 0) for lr in LRS), RunKey(B, LRS[0], 0)]
    results = {key: result(key, cider) for key, cider in zip(keys, (1.0, 3.0, 2.0, 0.5), strict=True)}
    assert chosen_lr(TABLE, results, A) == LRS[1] and chosen_lr(TABLE, results, B) == LRS[0]
    assert later_runs(TABLE, results, SEEDS) == [RunKey(A, LRS[1], seed) for seed in SEEDS[1:]]
    del results[keys[0]]
    assert chosen_lr(TABLE, results, A) is None and later_runs(TABLE, results, SEEDS) == []


def test_a_table_has_means_and_spreads():
    """Reference: the module statistics."""
    results = {key: result(key, cider) for key, cider in zip(first_runs(TABLE), (1.0, 3.0, 2.0, 0.5), strict=True)}
    for key, cider in zip(later_runs(TABLE, results, SEEDS), (2.9, 3.3), strict=True):
        results[key] = result(key, cider)
    text, runs_of = report.format_table(TABLE, results), report.reported_runs(TABLE, results)
    cells = next(line for line in text.splitlines() if line.startswith("| a | 300")).split(" | ")
    ciders = [100.0, 110.0, 70.0]  # of the test split: 4 minus validation
    assert cells[8] == f"{statistics.mean(ciders):.1f} ± {statistics.stdev(ciders):.1f}"
    assert report.format_rate(TABLE, "a", runs_of["a"][0] | {"lr": LRS[0]}) == f"{LRS[0]:g} ↓"
    assert report.format_rate(TABLE, "a", runs_of["a"][0] | {"lr": LRS[2]}) == f"{LRS[2]:g} ↑"
    assert report.format_rate(replace(TABLE, lrs=LRS[:1]), "a", runs_of["a"][0] | {"lr": LRS[0]}) == f"{LRS[0]:g}"
    assert cells[2:5] == ["3.00 %", f"{LRS[1]:g}", "3"] and cells[5] == "50.0 ± 0.0"
    assert "| b | 0 | 0.00 % |  | 1 | 50.0 | 40.0 |" in text
    assert "| a | 0.25 ± 0.00 | 1.50 ± 0.00 | 2.00 ± 0.00 | 1.00 ± 0.00 | `--rank 8` |" in text
    assert "| b |  | 1.50 | 2.00 | 1.00 | `--method none` |" in text
    assert "| b | +256.7 | +0.0 | +0.0 |" in text  # b has one seed, so there is no standard error


def test_the_figure_has_a_dot_for_each_seed_and_one_for_the_mean():
    """Reference: circles by their place, 210 pixels for 100 points of "shapes": 60 and 90, mean 75; one seed, 50."""
    scores = {"CIDEr": [300.0, 350.0], "shapes": [60.0, 90.0], "motion": [0.0, 100.0]}
    svg = figures.draw({"`a`": scores, "b": {name: [50.0] for name in scores}})
    xml.etree.ElementTree.fromstring(svg)
    left = figures.LEFT + figures.LABELS + figures.WIDTH + figures.GAP
    dots = re.findall(r'<circle cx="([0-9.]+)" cy="([0-9.]+)" r="([0-9.]+)"', svg)
    first, second = (f"{figures.TOP + figures.STEP * y:.1f}" for y in (0.5, 1.5))
    for value, y, radius in ((60, first, "3"), (90, first, "3"), (75, first, "4.5"), (50, second, "4.5")):
        assert (f"{left + 2.1 * value:.1f}", y, radius) in dots
    assert len(dots) == 3 * (3 + 2) and ">75.0<" in svg and ">a<" in svg and ">400<" in svg


def test_a_difference_has_the_standard_error_of_two_means():
    """Reference: sqrt(s_a^2 / n_a + s_b^2 / n_b) by hand: variances 1 and 8, three and two values."""
    error = (1 / 3 + 8 / 2) ** 0.5
    assert report.difference([1.0, 2.0, 3.0], [8.0, 12.0]) == f"-8.0 ± {error:.1f}"
    assert report.difference([1.0, 2.0, 3.0], [8.0]) == "-6.0"


@pytest.mark.parametrize("name", TABLES)
def test_the_page_is_that_of_the_results(name):
    """Reference: results/TABLE.json."""
    begin, end = report.markers(name)
    found = report.PAGE.read_text().partition(begin)[2].partition(end)[0].strip()
    results = runs.load_results(TABLES[name])
    assert found == report.format_part(name, TABLES[name], results)
    if report.is_begun(TABLES[name], results):
        assert report.figure_path(name).read_text() == report.format_figure(TABLES[name], results)


def test_other_sizes_have_the_rates_of_the_methods():
    """Reference: results/pair.json."""
    table = TABLES["methods"]
    results = runs.load_results(table)
    for row, lr in CHOSEN.items():
        assert chosen_lr(table, results, table.rows[row]) == lr


def test_a_fourth_rate_lies_beyond_the_best_of_three():
    """Reference: the arrows of the table `methods`."""
    methods, four = TABLES["methods"], TABLES["fourth-rate"]
    results = runs.load_results(methods)
    for row, flags in four.rows.items():
        lr, new = chosen_lr(methods, results, flags), set(four.rates(row)) - set(methods.rates(row))
        assert new == set() if min(methods.rates(row)) < lr < max(methods.rates(row)) else len(new) == 1
        assert all(rate > lr if lr == max(methods.rates(row)) else rate < lr for rate in new)


@pytest.mark.parametrize("size,factor", [("half", 0.5), ("equal", 1), ("fourfold", 4)])
def test_methods_of_a_size_train_as_many_parameters(size, factor):
    """Reference: `factor` times those of the default Q-Adapter, within 5 %."""

    def trained(flags: str) -> int:
        args = parse_args([*TABLES["methods"].flags.split(), *flags.split(), "--plan", "--precision", "fp32"])
        captioner, _ = load_captioner(args, torch.device("cpu"), ProcessGroup())
        return sum(p.numel() for p in captioner.trained().values())

    expected = factor * trained("")
    assert all(abs(trained(flags) / expected - 1) < 0.05 for flags in of_size(size).values())


def test_a_study_is_run_once_and_goes_on(flags, tmp_path, monkeypatch, capsys):
    """A tiny table: one rate and one seed. A stopped run is resumed, a finished one is not run again; the figures are
    those of the runs' files."""
    words = " ".join(map(str, flags)).replace("--lr 0.02", "")
    table = replace(TABLE, flags=words, rows={"a": "--epochs 1 --eval-every 1", "b": "--method none"}, lrs=(0.02,),
                    store="tiny")
    page = tmp_path / "study.md"
    page.write_text("\n".join(["before", *report.markers("tiny"), "after"]))
    for module, name, value in ((runs, "RESULTS", tmp_path / "results"), (runs, "RUNS", tmp_path / "runs"),
                                (report, "PAGE", page), (report, "TABLES", {"tiny": table}),
                                (program, "TABLES", {"tiny": table})):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("sys.argv", ["study", "tiny", "--seeds", "0"])
    assert program.main() == 0
    stored = json.loads((tmp_path / "results/tiny.json").read_text())["runs"]
    assert [(run["flags"], run["seed"], run["steps"]) for run in stored] == [
        (f"{words} --epochs 1 --eval-every 1", 0, 3), (f"{words} --method none", 0, 0)]  # fmt: skip
    folder = runs.run_folder(table, RunKey("--epochs 1 --eval-every 1", 0.02, 0))
    assert folder != runs.run_folder(replace(table, flags=f"{words} "), RunKey("--epochs 1 --eval-every 1", 0.02, 0))
    test = json.loads((folder / "test.json").read_text())["scores"]
    assert stored[0]["test"] == test and stored[0]["trained"] > 0 == stored[1]["trained"]
    assert stored[0]["peak bytes"] > 10**8 and stored[0]["seconds per step"] > 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter") and "| b | 0 | 0.00 % |" in text
    capsys.readouterr()
    (tmp_path / "results/tiny.json").unlink()
    monkeypatch.setattr(runs.subprocess, "Popen", None)  # a run that is finished needs no process
    assert program.main() == 0
    again = json.loads((tmp_path / "results/tiny.json").read_text())["runs"]
    assert [run["test"] for run in again] == [run["test"] for run in stored]
    monkeypatch.setattr("sys.argv", ["study", "tiny", "--seeds", "0", "--dry-run"])
    assert program.main() == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "tiny: 2 runs, 2 of them done; hours left: about 0.0, if all runs are alike"


def test_a_result_of_other_flags_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    runs.store_results(TABLE, {RunKey(A, 0.1, 0): result(RunKey(A, 0.1, 0), 1.0)})
    assert list(runs.load_results(TABLE)) == [RunKey(A, 0.1, 0)]
    with pytest.raises(InputError, match="x.json: holds a run with other flags"):
        runs.load_results(replace(TABLE, flags="--dataset shapes --epochs 9"))
    (tmp_path / "x.json").write_text('{"runs": [3]}')
    with pytest.raises(InputError, match="x.json: runs: expected objects, found 3"):
        runs.load_results(TABLE)
    for name in (*runs.FIELDS, *runs.SOMETIMES):
        bad = result(RunKey(A, 0.1, 0), 1.0)
        del bad[name]
        runs.store_results(TABLE, {RunKey(A, 0.1, 0): bad})
        with pytest.raises(InputError, match=f"x.json.*{name}"):
            runs.load_results(TABLE)
    for value in ("2.5", None, float("nan")):
        bad = result(RunKey(A, 0.1, 0), 1.0)
        bad["test"] = bad["test"] | {"CIDEr": value}
        runs.store_results(TABLE, {RunKey(A, 0.1, 0): bad})
        with pytest.raises(InputError, match="x.json: test: .*CIDEr"):
            runs.load_results(TABLE)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="x.json: field 'runs' is missing"):
        runs.load_results(TABLE)


def test_figures_are_those_of_the_best_validation(tmp_path):
    """A log of validations before training and after 3 and 6 steps; the median speed is that of the middle row."""
    rows = [{"step": 0, "val": {"CIDEr": 1.1}, "elapsed": 2.5},
            *({"step": i, "clips/s": speed} for i, speed in ((1, 10), (2, 40), (3, 20))),
            {"step": 3, "val": {"CIDEr": 0.9}}, {"step": 6, "val": {"CIDEr": 0.5}},
            {"step": 6, "test": {"CIDEr": 0.3}, "elapsed": 7.0}]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"batch_size": 5}, "trained": 1, "total": 2}))
    (tmp_path / "best").mkdir()
    (tmp_path / "best/adapter.safetensors").write_bytes(b"12345")
    assert runs.read_figures(tmp_path) == {
        "steps": 6, "best step": 3, "val CIDEr": 0.9, "test": {"CIDEr": 0.3}, "seconds": 4.5, "seconds per step": 0.25,
        "adapter bytes": 5, "trained": 1, "total": 2,
    }  # fmt: skip


def test_a_stopped_run_is_resumed(tmp_path):
    folder = tmp_path / "run"
    key = RunKey(A, 0.01, 2)
    assert runs.command_of(TABLE, key, folder)[-6:] == ["--lr", "0.01", "--seed", "2", "--out", str(folder)]
    folder.mkdir()
    (folder / "config.json").touch()
    assert runs.command_of(TABLE, key, folder) == ["--resume", str(folder)]


def test_a_run_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    bad = replace(TABLE, flags=f"--dataset folder --data {tmp_path / 'none'}")
    with pytest.raises(InputError, match="the run ended with 2, see"):
        runs.train_one(bad, RunKey(A, 0.01, 0), 1, 1)


@pytest.mark.parametrize("error", [InputError("the disk is full"), KeyboardInterrupt()])
def test_nothing_more_is_started_after_an_error(monkeypatch, error):
    """Four runs, one at a time: the second fails. The pool may have begun the third, not the fourth. What ends well is
    stored."""
    begun, stored, shut_down = [], [], threading.Event()

    class Pool(runs.ThreadPoolExecutor):
        def shutdown(self, **options):
            super().shutdown(**options | {"wait": False})
            shut_down.set()
            super().shutdown()

    def train_one(table, key, threads, jobs):
        begun.append(key)
        if len(begun) == 2:
            raise error
        assert len(begun) == 1 or shut_down.wait(60)
        return result(key, 1.0)

    monkeypatch.setattr(runs, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(runs, "train_one", train_one)
    monkeypatch.setattr(runs, "store_results", lambda table, results: stored.append(len(results)))
    with pytest.raises(type(error)):
        runs.run_all(TABLE, [RunKey(A, lr, 0) for lr in (0.1, 0.2, 0.3, 0.4)], {}, 1, 1)
    assert len(begun) <= 3 and stored == list(range(1, len(begun)))


def test_one_study_of_a_store_at_a_time(tmp_path, monkeypatch):
    """Another process holds the lock. A dry run needs none."""
    for module, name, value in ((runs, "RUNS", tmp_path), (runs, "RESULTS", tmp_path),
                                (program, "TABLES", {"x": TABLE})):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    script = ("import sys, pathlib; from common.files import acquire_lock; "
              "acquire_lock(pathlib.Path(sys.argv[1]), False); print(flush=True); sys.stdin.read()")  # fmt: skip
    child = subprocess.Popen([sys.executable, "-c", script, tmp_path / "x.lock"], cwd=runs.ROOT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    child.stdout.readline()
    monkeypatch.setattr("sys.argv", ["study", "x"])
    with pytest.raises(InputError, match="x.json: expected one study of it at a time"):
        program.main()
    monkeypatch.setattr("sys.argv", ["study", "x", "--dry-run"])
    assert program.main() == 0
    child.communicate()
    os.close(runs.lock_results(TABLE))


def test_two_stores_that_end_at_once_do_not_lose_each_others_tables(tmp_path, monkeypatch):
    """Another process has read the page and writes it a second later: both changes are there."""
    page = tmp_path / "study.md"
    page.write_text("<!-- x: begins -->\n<!-- x: ends -->\n")
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    for name, value in (("PAGE", page), ("RUNS", tmp_path), ("TABLES", {"x": TABLE})):
        monkeypatch.setattr(report, name, value)
    script = ("import sys, pathlib, time; from common.files import acquire_lock; "
              "acquire_lock(pathlib.Path(sys.argv[1]), False); page = pathlib.Path(sys.argv[2]); "
              "text = page.read_text(); print(flush=True); time.sleep(1); "
              "page.write_text(text + 'of the other')")  # fmt: skip
    child = subprocess.Popen([sys.executable, "-c", script, tmp_path / "page.lock", page], cwd=runs.ROOT,
                             stdout=subprocess.PIPE)  # fmt: skip
    child.stdout.readline()
    report.write_page("x")
    child.communicate()
    assert page.read_text() == "<!-- x: begins -->\n\nNo run yet.\n\n<!-- x: ends -->\nof the other"


def test_the_first_seed_is_needed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["study", "mllm", "--seeds", "1"])
    with pytest.raises(InputError, match="expected 0 among them"):
        program.main()
