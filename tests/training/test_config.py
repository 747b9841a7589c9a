"""Flags, those of older runs, and the flags of a run that is resumed."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from common.errors import InputError
from training.config import DEFAULTS_IN_OLDER_RUNS, parse_args, read_run_config
from training.presets import PRESETS
from video_data.datasets import DATASETS


def test_flags_that_older_runs_lack_have_the_value_they_had_in_effect(tmp_path):
    old = {"queries": 4, "frames": 12}
    (tmp_path / "config.json").write_text(json.dumps({"flags": old}))
    flags = read_run_config(tmp_path)[1]
    assert flags == DEFAULTS_IN_OLDER_RUNS | old | {"candidate_frames": 24} and flags["no_changes"] is True
    assert flags["token_dropout"] == 0


def test_every_dataset_has_defaults(tmp_path, monkeypatch):
    """The flags that a preset fills, for each dataset; a flag overrides its own alone."""
    monkeypatch.chdir(tmp_path)  # where no run is
    assert PRESETS.keys() == set(DATASETS)
    for name, preset in PRESETS.items():
        args = vars(parse_args(["--dataset", name, "--lr", "0.5"]))
        assert {key: args[key] for key in asdict(preset)} == asdict(preset) | {"lr": 0.5}
        assert args["epochs"] is None
    assert [parse_args(words).token_dropout for words in ([], ["--token-dropout", "0"])] == [0.3, 0]
    args = parse_args(["--epochs", "3"])
    assert (args.epochs, args.passes, args.candidate_frames) == (3, None, 16)
    assert parse_args(["--cache-features", "--frames", "4"]).candidate_frames == 4
    with pytest.raises(InputError, match="--candidate-frames 7: expected at least --frames 8"):
        parse_args(["--candidate-frames", "7"])
    with pytest.raises(InputError, match="--speed"):
        parse_args(["--speed", "7"])


def test_a_resumed_run_keeps_its_flags(tmp_path):
    """Only ALLOWED_WITH_RESUME may be given beside --resume; a value changed by hand is checked like a flag."""
    words = ["--epochs", "3", "--write-back", "--shapes-sizes", "5", "6", "7", "--lr", "0.5", "--out", str(tmp_path)]
    args = vars(parse_args(words))
    flags = {name: value for name, value in args.items() if name != "resume"}
    path = tmp_path / "config.json"
    flags["data"] = args["data"] = Path("-odd")  # a name that begins with a dash
    path.write_text(json.dumps({"flags": flags}, default=str))
    resume = ["--resume", str(tmp_path)]
    resumed = parse_args([*resume])
    assert vars(resumed) == args | {"resume": tmp_path, "out": tmp_path}
    assert parse_args([*resume, "--epochs", "9"]).epochs == 9
    with pytest.raises(InputError, match="--lr: a run keeps its own flags"):
        parse_args([*resume, "--lr=1"])
    path.write_text(json.dumps({"flags": flags | {"method": "none"}}, default=str))
    with pytest.raises(InputError, match="--epochs: .* is of --method none"):
        parse_args([*resume, "--epochs", "9"])
    path.write_text(json.dumps({"flags": flags | {"visual": "both"}}, default=str))
    with pytest.raises(InputError, match="config.json: flags: --visual: expected --mllm"):
        parse_args(resume)
    path.write_text(json.dumps({"flags": flags | {"epochs": 0}}, default=str))
    with pytest.raises(InputError, match="config.json: flags: .*--epochs.*at least 1"):
        parse_args(resume)
    del flags["epochs"]
    path.write_text(json.dumps({"flags": flags}, default=str))
    with pytest.raises(InputError, match="config.json: flags: expected a field 'epochs'"):
        parse_args(resume)


@pytest.mark.parametrize("words", [
    ["--shapes-sizes", "2147483647", "1", "1"], ["--shapes-sizes", "1000001", "1", "1"], ["--epochs", "2147483647"],
    ["--passes", "1e300"], ["--gate-bias", "1e300"],
])  # fmt: skip
def test_sizes_that_no_run_has_are_refused(words, tmp_path):
    with pytest.raises(InputError, match=f"{words[0]}: .*at most"):
        parse_args([*words, "--out", str(tmp_path)])


@pytest.mark.parametrize(("name", "value"), [
    
    ("dataset", "x"), ("dataset", []), ("image_size", 0), ("image_size", "8"),
])  # fmt: skip
def test_a_flag_of_a_run_that_was_changed_by_hand_is_named_with_its_file(name, value, tmp_path):
    flags = vars(parse_args(["--out", str(tmp_path)])) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags}, default=str))
    with pytest.raises(InputError, match=f"config.json: .*{name}"):
        read_run_config(tmp_path)
