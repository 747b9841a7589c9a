"""Flags: today's names, those of version 0.1, and the flags of a run that is resumed."""

import json

import pytest

from common.errors import InputError
from training.config import make_parser, parse_args, upgrade_flags


@pytest.mark.parametrize("old, new", [
    (["--clips", "5", "6", "7"], ["--shapes-sizes", "5", "6", "7"]), (["--talk"], ["--query-self-attention"]),
    (["--reading", "write"], ["--write-back"]), (["--reading", "read"], []),
])  # fmt: skip
def test_old_names_of_flags_are_accepted_and_hidden(old, new):
    assert parse_args(old) == parse_args(new)
    assert not old or old[0] not in make_parser().format_help()


def test_flags_of_version_0_1_are_upgraded():
    """Renamed flags and fields; flags that did not exist yet get the value they had in effect."""
    old = {"dataset": "shapes", "clips": [1, 2, 3], "reading": "write", "talk": False}
    new = upgrade_flags(old)
    assert (new["shapes_sizes"], new["write_back"], new["query_self_attention"]) == ([1, 2, 3], True, False)
    assert new["precision"] == "fp32" and new["save_every"] == 200 and not {"clips", "reading", "talk"} & new.keys()
    assert upgrade_flags(new) == new
    assert upgrade_flags({"queries": 4, "reading": "read", "talk": True}) == {
        "queries": 4, "write_back": False, "query_self_attention": True,
    }  # fmt: skip


def test_a_resumed_run_keeps_its_flags(tmp_path):
    """Only what RESUMABLE lists may be given beside --resume; a value changed by hand is checked like a flag."""
    args = vars(parse_args(["--epochs", "3", "--write-back", "--shapes-sizes", "5", "6", "7", "--lr", "0.5"]))
    flags = {name: value for name, value in args.items() if name != "resume"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"flags": flags}, default=str))
    resume = ["--resume", str(tmp_path)]
    resumed = parse_args([*resume, "--workers", "2"])
    assert vars(resumed) == args | {"resume": tmp_path, "out": tmp_path, "workers": 2}
    with pytest.raises(InputError, match="--lr: a run keeps its own flags"):
        parse_args([*resume, "--lr=1"])
    path.write_text(json.dumps({"flags": flags | {"epochs": 0}}, default=str))
    with pytest.raises(InputError, match="config.json: flags: .*--epochs.*at least 1"):
        parse_args(resume)
    del flags["epochs"]
    path.write_text(json.dumps({"flags": flags}, default=str))
    with pytest.raises(InputError, match="config.json: flags: expected a field 'epochs'"):
        parse_args(resume)
