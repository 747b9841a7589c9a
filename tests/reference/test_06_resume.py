"""Interrupted runs, against the uninterrupted run of the same seed: weights, moments, log, captions and scores bit for
bit (one thread). A run, in a forked process, kills itself at a call of a function."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train
from tests.scripts import act_at_call, assert_error, contents, run_forked, succeed
from training.run import Run

DROPOUT = ["--token-dropout", 0.5]
KILLS = {  # where, and in which call
    "before the run has a config.json": (os, "replace", 3),
    "in a step": (torch.optim.AdamW, "step", 6),
    "in the writing of a checkpoint": (os, "fsync", 27),
    "between the two files of a checkpoint": (os, "replace", 8),
    "between two steps": (Run, "log", 6),
}


@pytest.fixture(autouse=True)
def save_often(monkeypatch):
    """Every second of the 12 steps, but not in the uninterrupted run; validations are after 0, 6 and 12."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    succeed(train, *flags, *DROPOUT, "--out", out)
    return out


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_run_resumes_bit_for_bit(where, flags, uninterrupted, tmp_path):
    """SIGKILL; `--resume` where there is a run, else the first command again."""
    out, new_run = tmp_path / "run", [*flags, *DROPOUT, "--out", tmp_path / "run"]
    with act_at_call(*KILLS[where], lambda: os.kill(os.getpid(), signal.SIGKILL)):
        assert run_forked(train, *new_run).returncode == -signal.SIGKILL
    is_run = (out / "config.json").exists()
    assert is_run == ("config.json" not in where)
    if not is_run:
        assert_error(run_forked(train, "--resume", out), str(out), "config.json")
    succeed(train, *(["--resume", out] if is_run else new_run))
    assert contents(out) == contents(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(number, flags, uninterrupted, tmp_path):
    """In the third step, which is no step that saves: exit code 130, a complete checkpoint of it, and the same end."""
    out = tmp_path / "run"
    with act_at_call(torch.optim.AdamW, "step", 3, lambda: os.kill(os.getpid(), number)):
        done = run_forked(train, *flags, *DROPOUT, "--out", out)
    assert (done.returncode, done.stderr) == (130, "stopped\n") and f"--resume {out} continues" in done.stdout
    assert torch.load(out / "last/state.pt", weights_only=True)["step"] == 3
    assert "resuming after step 3" in succeed(train, "--resume", out)
    assert contents(out) == contents(uninterrupted)


def test_half_a_row_of_the_log_is_dropped(uninterrupted, tmp_path):
    """As a killed process leaves it."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    with open(tmp_path / "run/log.jsonl", "a") as file:
        file.write('{"step": 1')
    succeed(train, "--resume", tmp_path / "run")
    assert contents(tmp_path / "run") == contents(uninterrupted)
