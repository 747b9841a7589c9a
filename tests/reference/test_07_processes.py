"""Two processes (gloo) against one with the same seed and batch size. torchrun starts them, or, to save time, this
process does. Losses within 1e-5: the sum of two halves is rounded differently."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from tests.scripts import ENVIRONMENT, ROOT, act_at_call, fork_two, losses, read_log, succeed
from video_data import shapes

# With seed 4 the best validation is not the last, so captions of the test split tell which weights they are of.
TWENTY_STEPS = ["--batch-size", 5, "--epochs", 5, "--cache-features", "--seed", 4, "--eval-every", 1]
TRAIN = "import train; train.LOG_EVERY = 1; train.cli.run(train.main)"


@pytest.fixture(scope="module")
def two_flags(flags, tmp_path_factory) -> list:
    shapes.make_dataset(data := tmp_path_factory.mktemp("parallel"), (22, 5, 7))
    return [*flags, *TWENTY_STEPS, "--data", data]


@pytest.fixture(scope="module")
def two_run(two_flags, tmp_path_factory) -> Path:
    """A run of two processes, which also make the dataset and its caches. 5 clips a step are 3 and 2."""
    out = tmp_path_factory.mktemp("runs") / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python",
               sys.executable, "-c", TRAIN, *map(str, two_flags), "--out", str(out)]
    environment = os.environ | ENVIRONMENT | {"PYTHONWARNINGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20/20") == 1 and done.stdout.count("\ntest: ") == 1
    return out


def test_two_processes_train_as_one(two_run, two_flags, tmp_path):
    """20 losses; the same captions and scores of the test split."""
    succeed(train, *two_flags, "--out", tmp_path / "one")
    assert len(losses(two_run).unique()) == 20
    torch.testing.assert_close(losses(tmp_path / "one"), losses(two_run), rtol=0, atol=1e-5)
    tests = [json.loads((run / "test.json").read_text()) for run in (tmp_path / "one", two_run)]
    assert tests[0] == tests[1] and len(set(tests[0]["captions"].values())) > 3
    best, last = ((two_run / which / "adapter.safetensors").read_bytes() for which in ("best", "last"))
    assert best != last


def test_micro_batches_train_as_whole_batches(two_run, two_flags, tmp_path):
    """3 and 2 clips of a step in micro-batches of 2."""
    done = fork_two(*two_flags, "--out", tmp_path / "micro", "--micro-batch-size", 2)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "micro"), losses(two_run), rtol=0, atol=1e-5)


def test_a_signal_to_one_process_stops_both(two_run, two_flags, tmp_path):
    """SIGTERM, twice, to the second process alone, in step 4: both stop after it, and `--resume` gives the same
    bits."""
    out = tmp_path / "stopped"

    def interrupt() -> None:
        for _ in range(2 * int(os.environ["RANK"])):
            os.kill(os.getpid(), signal.SIGTERM)

    with act_at_call(torch.optim.AdamW, "step", 4, interrupt):
        done = fork_two(*two_flags, "--out", out)
    assert done.returncode == 130 and f"--resume {out}" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert torch.load(out / "last/state.pt", weights_only=True)["step"] == 4 == read_log(out)[-1]["step"]
    assert fork_two("--resume", out).returncode == 0
    for which in ("best", "last"):
        found, expected = (run / which / "adapter.safetensors" for run in (out, two_run))
        assert found.read_bytes() == expected.read_bytes()
    assert losses(out).equal(losses(two_run))
