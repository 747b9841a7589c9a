"""Two processes (gloo) against one process with the same seed and batch size.

torchrun starts them, or, to save time, this process does, with the environment that torchrun would set.
Reference: the run of one process. Losses within 1e-5: the sum of two halves is rounded differently.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from common.errors import InputError
from tests.scripts import ENVIRONMENT, ROOT, STEPS, ActAtCall, read_log, run_forked
from training import distributed
from training.distributed import ProcessGroup

# With seed 1 the best validation is not the last.
TWENTY_STEPS = ["--shapes-sizes", 22, 5, 7, "--batch-size", 5, "--epochs", 5, "--precision", "fp32", "--cache-features",
                "--seed", 1, "--no-changes"]  # fmt: skip  # with these the best step is not the last one

TRAIN = "import runpy; runpy.run_path('train.py', run_name='__main__')"
LATE_RANK_0 = "import os, time; time.sleep(2 * (os.environ['LOCAL_RANK'] == '0'))\n"
STOP_IN_STEP_4 = """
import os, signal, time, pytest
from tests.scripts import STEPS, ActAtCall

def stop_torchrun():  # and go on when the signal has come back
    received = []
    handler = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    os.kill(os.getppid(), signal.SIGTERM)
    while not received:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, handler)
    handler(signal.SIGTERM, None)

if os.environ["RANK"] == "0":
    ActAtCall(pytest.MonkeyPatch(), STEPS, 4, stop_torchrun)
"""


def torchrun(*words, first: str = "") -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc-per-node 2 train.py`; each process runs the Python code `first` before it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python",
               sys.executable, "-c", first + TRAIN, *map(str, words)]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT | {"PYTHONWARNINGS": ""}, text=True,
                          capture_output=True, timeout=120)  # fmt: skip


def fork_two(*words, **options) -> subprocess.CompletedProcess:
    """`train.py` in two forks of this process, in the environment that torchrun sets."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # where they meet
    shared = {"TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost",
              "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return run_forked(train, *words, environments=environments, **options)


@pytest.fixture(scope="module")
def two_flags(flags, tmp_path_factory) -> list:
    return [*flags, *TWENTY_STEPS, "--data", tmp_path_factory.mktemp("parallel") / "shapes"]


@pytest.fixture(scope="module")
def two_run(two_flags, tmp_path_factory) -> Path:
    """A run of two processes, which also make the dataset and its caches. 5 clips a step are 3 and 2."""
    out = tmp_path_factory.mktemp("runs") / "two"
    done = torchrun(*two_flags, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20/20") == 1 and done.stdout.count("\ntest: ") == 1
    return out


def test_two_processes_train_as_one(two_run, two_flags, tmp_path):
    """20 losses within 1e-5; the same captions and scores of the test split."""
    done = run_forked(train, *two_flags, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in read_log(run) if "loss" in row] for run in (tmp_path / "one", two_run)]
    assert len(losses[0]) == 20
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-5)
    assert len(set(losses[0])) == 20
    tests = [json.loads((run / "test.json").read_text()) for run in (tmp_path / "one", two_run)]
    assert tests[0] == tests[1] and len(set(tests[0]["captions"].values())) == 7
    best, last = ((two_run / which / "adapter.safetensors").read_bytes() for which in ("best", "last"))
    assert best != last  # or the captions could be of either


def test_micro_batches_of_two_processes_train_as_whole_batches(two_run, two_flags, tmp_path):
    """3 and 2 clips of a step in micro-batches of 2: 20 losses within 1e-5 of those of whole batches."""
    done = fork_two(*two_flags, "--out", tmp_path / "micro", "--micro-batch-size", 2)
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in read_log(run) if "loss" in row] for run in (tmp_path / "micro", two_run)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-5)


def test_two_processes_stop_together_and_resume(two_run, two_flags, tmp_path):
    """SIGTERM to torchrun, which forwards it, in step 4; `--resume` with two processes gives the same bits."""
    out = tmp_path / "stopped"
    done = torchrun(*two_flags, "--out", out, first=STOP_IN_STEP_4)
    assert done.returncode != 0 and f"--resume {out}" in done.stdout
    assert torch.load(out / "last/state.pt", weights_only=True)["step"] == 4
    done = fork_two("--resume", out)
    assert done.returncode == 0 and "resuming after step 4" in done.stdout, done.stderr
    for which in ("best", "last"):
        name = f"{which}/adapter.safetensors"
        assert (out / name).read_bytes() == (two_run / name).read_bytes()
    assert [row.get("loss") for row in read_log(out)] == [row.get("loss") for row in read_log(two_run)]


def test_a_signal_to_one_process_stops_both(two_run, two_flags, tmp_path, monkeypatch):
    """SIGTERM, twice, to the second process alone, in step 4: both stop after it, and `--resume` gives the same
    bits."""
    out = tmp_path / "stopped"

    def interrupt() -> None:
        for _ in range(2 * int(os.environ["RANK"])):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        ActAtCall(patch, STEPS, 4, interrupt)
        done = fork_two(*two_flags, "--out", out)
    assert done.returncode > 0 and "Traceback" not in done.stderr, done.stderr
    assert torch.load(out / "last/state.pt", weights_only=True)["step"] == 4 == read_log(out)[-1]["step"]
    assert fork_two("--resume", out).returncode == 0
    assert (out / "last/adapter.safetensors").read_bytes() == (two_run / "last/adapter.safetensors").read_bytes()


def test_an_error_is_reported_once(two_flags, tmp_path):
    for run in (partial(torchrun, first=LATE_RANK_0), fork_two):
        done = run(*two_flags, "--out", tmp_path / "run", "--batch-size", 1)
        assert done.returncode != 0 and done.stderr.count("error: --batch-size 1: expected at least 2") == 1
    assert len(done.stderr.splitlines()) == 1
    done = fork_two(*two_flags, "--out", tmp_path / "run", "--data", ROOT)  # only rank 0 finds that
    assert done.returncode == 2 and done.stderr.startswith(f"error: {ROOT}: "), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device, gpus, message", [
    ("cuda:0", 8, "--device cuda:0: several processes"), ("mps", 0, "--device mps: several processes"),
    ("auto", 1, "at most one process for each of this machine's 1 GPUs"),
])  # fmt: skip
def test_each_process_needs_a_device(device, gpus, message, monkeypatch):
    """The second of two processes, by torchrun's environment; refused before it waits for the first."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert distributed.init_process_group(device, 4) == ProcessGroup()  # not torchrun's variables
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=message):
        distributed.init_process_group(device, 4)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rank_0_first_then_one_process_of_each_machine(processes, monkeypatch):
    """Two machines of `processes`, as threads at a barrier: rank 0, then the other machine's first, then all."""
    order, barrier = [], threading.Barrier(2 * processes)
    monkeypatch.setattr(ProcessGroup, "barrier", lambda _: barrier.wait(10))

    def work(rank: int) -> None:
        with ProcessGroup(rank, 2 * processes, rank % processes).rank0_first():
            order.append(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2 * processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[:2] == [0, processes] and sorted(order) == list(range(2 * processes))


def test_shards_are_gathered_in_order(monkeypatch):
    """Seven items over three ranks: 3, 2 and 2."""
    items, groups = list("abcdefg"), [ProcessGroup(rank, 3) for rank in range(3)]
    shards = [group.shard(items) for group in groups]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    monkeypatch.setattr(ProcessGroup, "all_gather", lambda _, local: shards)
    assert groups[1].gather_shards(shards[1]) == items


def test_a_single_process_exchanges_nothing():
    group, weight = ProcessGroup(), torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    group.all_reduce_gradients([weight])
    group.broadcast([weight])
    assert weight.grad.tolist() == [1, 2, 3] and group.all_reduce(5) == 5 and group.gather_shards([1, 2]) == [1, 2]
