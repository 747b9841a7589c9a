"""Two processes (gloo) against one process with the same seed and batch. torchrun starts them, or, where only they are
of interest, this process with what torchrun would have told them.

Reference: the run of one process. Losses within 1e-5: sums of two halves are rounded elsewhere.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import ALONE, ROOT, quick

import parallel
import train
from parallel import Ranks
from weights import InputError

# 20 steps; with seed 2 the best validation is not the last.
LONG = ["--clips", 22, 5, 7, "--batch-size", 5, "--epochs", 5, "--precision", "fp32", "--cache-features", "--seed", 2]


def torchrun(*words, stop_at: str | None = None) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc-per-node 2 train.py`; SIGTERM to it when a line begins with `stop_at`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               "train.py", *map(str, words)]  # fmt: skip
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | ALONE | {"PYTHONWARNINGS": ""}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    said = []
    for line in child.stdout:
        said.append(line)
        if stop_at and line.startswith(stop_at):
            child.send_signal(signal.SIGTERM)
            stop_at = None
    errors = child.stderr.read()
    return subprocess.CompletedProcess(command, child.wait(120), "".join(said), errors)


def both(*words, **options) -> subprocess.CompletedProcess:
    """`train.py` in two processes split off this one, in the environment that torchrun makes for them."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # where they meet
    shared = {"TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    return quick(train, *words, environments=[shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"], **options)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def given(flags, tmp_path_factory) -> list:
    return [*flags, *LONG, "--data", tmp_path_factory.mktemp("parallel") / "shapes"]


@pytest.fixture(scope="module")
def two(given, tmp_path_factory) -> Path:
    """A run of two processes, which also make the dataset and its caches. 5 clips a step are 3 and 2."""
    out = tmp_path_factory.mktemp("runs") / "two"
    done = torchrun(*given, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20/20") == 1 and done.stdout.count("\ntest: ") == 1
    return out


def test_two_processes_train_as_one(two, given, tmp_path):
    """20 losses within 1e-5; the same captions and scores of the test split."""
    done = quick(train, *given, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in rows(run) if "loss" in row] for run in (tmp_path / "one", two)]
    assert len(losses[0]) == 20
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-5)
    assert len(set(losses[0])) == 20
    tests = [json.loads((run / "test.json").read_text()) for run in (tmp_path / "one", two)]
    assert tests[0] == tests[1] and len(set(tests[0]["captions"].values())) == 7
    best, last = ((two / which / "adapter.safetensors").read_bytes() for which in ("best", "last"))
    assert best != last  # or the captions could be of either


def test_two_processes_stop_together_and_go_on(two, given, tmp_path):
    """SIGTERM to torchrun, which hands it on; `--resume` with two again gives the same bits."""
    out = tmp_path / "stopped"
    done = torchrun(*given, "--out", out, stop_at="step 2/")
    assert done.returncode != 0 and f"--resume {out}" in done.stdout
    step = torch.load(out / "last/state.pt", weights_only=True)["step"]
    assert 2 <= step < 20
    done = both("--resume", out)
    assert done.returncode == 0 and f"going on after step {step}" in done.stdout, done.stderr
    for which in ("best", "last"):
        name = f"{which}/adapter.safetensors"
        assert (out / name).read_bytes() == (two / name).read_bytes()
    assert [row.get("loss") for row in rows(out)] == [row.get("loss") for row in rows(two)]


def test_a_signal_to_one_stops_both(two, given, tmp_path):
    """SIGTERM, twice, to the second process alone: both stop after one step, and `--resume` gives the same bits."""
    out = tmp_path / "stopped"

    def interrupt(children: list[int]) -> None:
        begun = time.monotonic()
        while not (out / "log.jsonl").exists() or len(rows(out)) < 2:
            assert time.monotonic() - begun < 60
            time.sleep(0.005)
        os.kill(children[1], signal.SIGTERM)
        time.sleep(0.005)
        os.kill(children[1], signal.SIGTERM)

    done = both(*given, "--out", out, meanwhile=interrupt)
    assert done.returncode > 0 and "Traceback" not in done.stderr, done.stderr
    step = torch.load(out / "last/state.pt", weights_only=True)["step"]
    assert 2 <= step < 20 and rows(out)[-1]["step"] == step
    assert both("--resume", out).returncode == 0
    assert (out / "last/adapter.safetensors").read_bytes() == (two / "last/adapter.safetensors").read_bytes()


def test_what_is_wrong_is_said_once(given, tmp_path):
    for run in (torchrun, both):
        done = run(*given, "--out", tmp_path / "run", "--batch-size", 1)
        said = "error: --batch-size 1: expected one at least for each of 2"
        assert done.returncode != 0 and done.stderr.count(said) == 1
    assert len(done.stderr.splitlines()) == 1
    done = both(*given, "--out", tmp_path / "run", "--data", ROOT)  # only rank 0 comes to see that
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "holds something else" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device, gpus, said", [
    ("cuda:0", 8, "--device cuda:0: several processes"), ("mps", 0, "--device mps: several processes"),
    ("auto", 1, "at most a process for each of this machine's 1 GPUs"),
])  # fmt: skip
def test_a_device_for_each_process(device, gpus, said, monkeypatch):
    """The second of two processes, by torchrun's environment; refused before it waits for the first."""
    places = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    assert parallel.join(device) == Ranks()  # without torchrun these are somebody else's
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=said):
        parallel.join(device)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_process_a_machine_and_before_them_the_very_first(count, monkeypatch):
    """Two machines of `count` processes, threads that wait at a barrier: rank 0, then the other machine's, then all."""
    entered, barrier = [], threading.Barrier(2 * count)
    monkeypatch.setattr(Ranks, "wait", lambda _: barrier.wait(10))

    def work(rank: int) -> None:
        with Ranks(rank, 2 * count, rank % count).one_first():
            entered.append(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2 * count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entered[:2] == [0, count] and sorted(entered) == list(range(2 * count))


def test_shares_are_dealt_and_gathered_in_order(monkeypatch):
    """Seven items among three ranks: 3, 2 and 2."""
    items, ranks = list("abcdefg"), [Ranks(rank, 3) for rank in range(3)]
    shares = [rank.share(items) for rank in ranks]
    assert [len(share) for share in shares] == [3, 2, 2]
    monkeypatch.setattr(Ranks, "all", lambda _, mine: shares)
    assert ranks[1].gather(shares[1]) == items


def test_one_process_alone_exchanges_nothing():
    ranks, weight = Ranks(), torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    ranks.add_gradients([weight])
    ranks.spread([weight])
    assert weight.grad.tolist() == [1, 2, 3] and ranks.add(5) == 5 and ranks.gather([1, 2]) == [1, 2]
