"""The study: its tables as data, which runs come next, what is kept of them, and the page that is written from them.

References: results/; statistics by hand; the files of tiny runs; the captions of MSR-VTT (with QADAPTER_REAL).
"""

import json
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
import train
from common.config import parse_args, read_config
from common.files import read_json
from study import __main__ as study
from study import figure, tables
from tests.scripts import run_forked, succeed
from training.distributed import ProcessGroup
from video_data import shapes
from video_data.annotations import SPLITS, read_msrvtt

ROWS = {(name, row.label): row for name in tables.CONTENT["tables"] for row in tables.read_rows(name)}


def row_of(*runs: tuple[float, int, float], **changes) -> tables.Row:
    """A row with three learning rates and some runs: rate, seed, validation CIDEr."""
    done = {(lr, seed): {"val": {"CIDEr": cider}} for lr, seed, cider in runs}
    row = tables.Row("a", "--rank 8", "--dataset shapes --rank 8", "", (0.1, 0.2, 0.4), 3, done)
    return replace(row, **changes)


@pytest.mark.parametrize("command", sorted({row.command for row in ROWS.values() if row.trains and not row.commit
                                            and "data/dinov2-small" not in row.command}))  # that is not in here
def test_todays_flags_train_as_many_parameters_as_the_published_runs(command):
    """Counted on the meta device. Reference: results/."""
    published = {run["trained"] for row in ROWS.values() if row.command == command for run in row.best_runs}
    config = parse_args([*command.split(), "--plan", "--precision", "fp32"])
    captioner, _ = train.load_captioner(config, torch.device("cpu"), ProcessGroup())
    assert {sum(p.numel() for p in captioner.trained().values())} == published


def test_every_published_run_is_in_a_table():
    for store in tables.CONTENT["stores"]:
        results = json.loads((tables.RESULTS / f"{store}.json").read_text())["runs"]
        found = [run for (name, _), row in ROWS.items() for run in row.runs.values()
                 if tables.CONTENT["tables"][name]["store"] == store]
        assert all(run in found for run in results)
    assert all(len(row.best_runs) == (row.seeds if row.trains else 1) for row in ROWS.values())
    assert study.missing_runs(list(ROWS.values()), [0, 1, 2]) == []


def test_what_runs_say_of_clips_is_what_was_scored():
    """The mean over clips is the run's CIDEr, but for rounding to 0.1; each clip has a caption. Of the runs of version
    0.12.0 captions were not kept."""
    for store in tables.CONTENT["stores"]:
        clips, runs = tables.read_clips(store), tables.read_runs(store)
        assert clips.keys() == {tables.key_of(run) for run in runs if run["version"] != "0.12.0"}
        for run in (run for run in runs if tables.key_of(run) in clips):
            found = clips[tables.key_of(run)]
            assert np.mean(found["CIDEr"]) == pytest.approx(100 * run["test"]["CIDEr"], abs=0.05)
            assert len(found["captions"]) == len(found["CIDEr"]) and all(found["captions"].values())


def test_kept_captions_of_real_video_have_the_scores_that_are_kept(real):
    """Of the first run of each method, and of the best captioner, whose weights are rounded since. Reference: the
    captions that people wrote, in the official file; METEOR is left out to save time."""
    annotations = read_msrvtt(real / "msrvtt")
    clips, runs = tables.read_clips("msrvtt"), tables.read_runs("msrvtt")
    kept = [(clips[tables.key_of(run)]["captions"], run["test"]) for run in runs if run["seed"] == 0]
    best = read_json(tables.RESULTS / "msrvtt-half/test.json")
    for captions, expected in [*kept, (best["captions"], best["scores"])]:
        references = {clip: annotations.captions[clip] for clip in captions}
        found = metrics.score(references, captions, metrics=("BLEU", "ROUGE_L", "CIDEr")).corpus
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-9)


def references_of_shapes(folder: str) -> dict[str, list[str]]:
    """A caption of each test clip of a folder, drawn again."""
    clips = tables.CONTENT["clips"][folder]
    rngs = {f"test/{i:05d}.mp4": np.random.default_rng([clips.get("seed", 1), SPLITS.index("test"), i])
            for i in range(clips["sizes"][2])}
    return {name: [shapes.describe(shapes.draw_scene(rng), rng)] for name, rng in rngs.items()}


def test_kept_captions_of_shapes_are_as_right_as_is_kept():
    """Reference: the scenes, drawn again; clips with distractors or rests are left out. To 1e-9."""
    folders = {"mllm": "data/study", "pair": "data/study-pair", "neutral": "data/study-pair", "binding": "data/binding"}
    for store, folder in folders.items():
        clips, references = tables.read_clips(store), references_of_shapes(folder)
        for run in (run for run in tables.read_runs(store) if tables.key_of(run) in clips):
            if not any(name in run["flags"] for name in ("study-distractors", "study-sparse")):
                found = shapes.attribute_accuracy(references, clips[tables.key_of(run)]["captions"])
                expected = {name: run["test"][f"{name} right"] for name in found}
                assert found == pytest.approx(expected, rel=0, abs=1e-9)


@pytest.mark.parametrize("store, folder", [("neutral", "data/study-pair"), ("binding", "data/binding")])
def test_binding_is_what_docs_say(store, folder):
    """How many captions with these models that could show a swap, of colours or of motions, do not or do."""
    counts, references = Counter(), references_of_shapes(folder)
    for clips in tables.read_clips(store).values():
        for key, caption in clips["captions"].items():
            pair, found = shapes.parse_claims(references[key][0]), shapes.parse_claims(caption)
            words, said = ([*zip(*(noun.split() for noun, _ in claims), strict=True)] for claims in (pair, found))
            if [*map(sorted, words)] == [*map(sorted, said)] and all(len({*part}) == 2 for part in words):
                counts["nouns"] += 1
                counts["bound nouns"] += sorted(noun for noun, _ in found) == sorted(noun for noun, _ in pair)
            nouns, motions = zip(*pair, strict=True)
            if nouns == tuple(noun for noun, _ in found) and len({*nouns}) == len({*motions}) == 2:
                said = [motion for _, motion in found]
                counts["motions"] += sorted(said) == sorted(motions)
                counts["swapped motions"] += said == [*reversed(motions)]
    text = " ".join((tables.ROOT / "docs/study.md").read_text().split())
    assert "in {bound nouns:,} of {nouns:,} captions that could show a swap".format(**counts) in text
    assert "of {motions:,} that name the right two motions, {swapped motions} swap them".format(**counts) in text


def test_the_kept_run_can_be_read():
    """Its flags are those of today."""
    config = read_config(tables.RESULTS / "msrvtt-half")
    assert (config.method, config.epochs) == ("qadapter", (3, 3, 2))


def test_the_page_and_the_figure_are_those_of_the_results():
    assert tables.PAGE.read_text() == tables.format_page()
    assert figure.FIGURE.read_text() == figure.draw_ablations()


def test_the_best_rate_of_seed_0_gets_the_other_seeds():
    begun, ready = row_of((0.2, 0, 3.0), (0.4, 0, 2.0)), row_of((0.1, 0, 1.0), (0.2, 0, 3.0), (0.4, 0, 2.0))
    assert study.missing_runs([begun], [0, 1]) == [(begun, 0.1, 0)]
    assert study.missing_runs([ready], [0, 1, 5]) == [(ready, 0.2, 1), (ready, 0.2, 5)]
    assert study.missing_runs([row_of(commit="f059ffe")], [0, 1]) == []  # today's code cannot train it
    assert tables.format_rate(row_of(lrs=(0.1,)), 0.1) == "0.1"


def test_means_and_differences():
    """By hand: variances 1 and 8 of three and two values; the standard error is sqrt(1/3 + 8/2)."""
    assert tables.mean_and_spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0" and tables.mean_and_spread([1.23], 2) == "1.23"
    mean, error = tables.compare([1.0, 2.0, 3.0], [8.0, 12.0])
    assert (mean, error) == (-8.0, pytest.approx((1 / 3 + 8 / 2) ** 0.5))
    assert tables.format_difference(mean, error) == "-8.0 ± 2.1"
    assert tables.format_difference(*tables.compare([1.0, 2.0, 3.0], [8.0])) == "-6.0"
    assert tables.scores([{"test": {"CIDEr": 3.0, "METEOR[exact]": 0.5}}], "METEOR") == [50.0]


def test_what_is_kept_of_a_run(tmp_path):
    """A log of validations before training and after 3 and 6 steps; the median speed is that of the middle row."""
    rows = [{"step": 0, "val": {"CIDEr": 1.1}, "elapsed": 2.5},
            *({"step": i, "clips/s": speed, "gates": [i / 6]} for i, speed in ((1, 10), (2, 40), (3, 20))),
            {"step": 3, "val": {"CIDEr": 0.9}}, {"step": 6, "val": {"CIDEr": 0.5}},
            {"step": 6, "test": {"CIDEr": 0.3}, "elapsed": 7.0}]
    config = {"version": "1", "versions": {"torch": "2"}, "models": {}, "config": {"batch_size": 5, "epochs": [2]},
              "trained": 1, "total": 2}
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "best").mkdir()
    (tmp_path / "best/adapter.safetensors").write_bytes(b"12345")
    row, expected = row_of(), {
        "version": "1", "versions": {"torch": "2"}, "lr": 0.1, "seed": 4, "steps": 6, "best step": 3,
        "val": {"CIDEr": 0.9}, "test": {"CIDEr": 0.3}, "seconds": 4.5, "seconds per step": 0.25, "adapter bytes": 5,
        "trained": 1, "total": 2, "gates": [0.5]}
    found = study.read_run(tmp_path, (row, 0.1, 4))
    assert found == found | expected and found["flags"] == row.command


@pytest.fixture
def run_study(tmp_path, monkeypatch, capsys):
    """A function that runs `python -m study` with other tables in a folder of its own, and returns the commands that
    it prints."""
    for owner, name in ((tables, "RESULTS"), (study, "RUNS")):
        monkeypatch.setattr(owner, name, tmp_path / name)
    for name in ("PAGE", "FIGURE"):
        monkeypatch.setattr(study, name, tmp_path / name)
    (tmp_path / "RESULTS").mkdir()

    def run(content: dict, *words: str) -> list[list[str]]:
        for owner in (study, tables):
            monkeypatch.setattr(owner, "CONTENT", {"intro": "", "clips": {}, "tables": {}} | content)
        monkeypatch.setattr("sys.argv", ["study", *words])
        study.main()
        return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_a_study_is_run_once_and_goes_on(flags, tmp_path, run_study):
    """A tiny table of two seeds takes two rounds. A stopped run is resumed, a finished one not run again."""
    rows = [{"label": "a", "flags": "--variant no-changes"}, {"label": "b", "flags": "--method none"}]
    content = {"lrs": [0.02], "controls": {"title": "C", "text": "", "rows": []},
               "stores": {"x": {"flags": " ".join(map(str, flags)).replace("--lr 0.02", "")}},
               "tables": {"tiny": {"title": "Tiny", "store": "x", "reference": "a", "rows": rows}}}

    def printed() -> list[list[str]]:
        """The words after `python train.py` of the commands."""
        commands = run_study(content, "tiny", "--seeds", "0", "1")
        assert all(command[:2] == [sys.executable, "train.py"] for command in commands)
        return [command[2:] for command in commands]

    folder = tmp_path / "RUNS/x/variant-no-changes-0.02-1"
    for expected in ([("no-changes", "0"), ("none", "0")], [("no-changes", "1")]):
        commands = printed()
        assert [(words[-7], words[-3]) for words in commands] == expected
        assert all(run_forked(train, *words).returncode == 0 for words in commands)
    (folder / "test.json").unlink()  # as if it had been stopped before the test split
    assert printed() == [["--resume", str(folder)]]
    succeed(train, "--resume", folder)
    assert printed() == []
    stored = (tmp_path / "RESULTS/x.json").read_text()
    assert [(run["flags"].rpartition("--")[2], run["seed"], run["steps"]) for run in json.loads(stored)["runs"]] == [
        ("method none", 0, 0), ("variant no-changes", 0, 12), ("variant no-changes", 1, 12)]
    assert "| b | 0 | 0.00% |  | 1 |" in (tmp_path / "PAGE").read_text()
    (tmp_path / "RESULTS/x.json").unlink()
    assert printed() == [] and (tmp_path / "RESULTS/x.json").read_text() == stored


def test_controls_are_kept_and_shown(tmp_path, run_study):
    """By hand: 10, 20, 30 have a standard deviation of 10; 0, -10 and -5, which the second control adds, 5."""
    content = {"controls": {"title": "C", "text": "T", "rows": [{"label": "a", "flags": "RUN --x"}]}}
    (*command, path), = run_study(content, "controls")
    assert command == [sys.executable, "-m", "study.controls", "RUN", "--x", "--save"]
    Path(path).write_text(json.dumps({"own": {"CIDEr": [10, 20, 30]}, "other": {"CIDEr": [10, 10, 25]}}))
    assert run_study(content, "controls") == []
    assert (tmp_path / "PAGE").read_text().endswith(
        "T\n\n| captions of | clips | own | other | flags |\n| --- | ---: | ---: | ---: | ---: |\n"
        "| a | 3 | 20.0 ± 5.8 | -5.0 ± 2.9 | `RUN --x` |\n")
