"""The group of processes. References: by hand. That two processes train as one is in tests/reference."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common.errors import InputError
from tests.scripts import ROOT, fork_two
from training import distributed
from training.distributed import ProcessGroup


def test_an_error_of_the_flags_or_the_data_is_one_line(flags, tmp_path):
    """The first is found by each process, the second by one of them alone."""
    done = fork_two(*flags, "--out", tmp_path / "run", "--batch-size", 1)
    assert done.returncode == 2 and "error: --batch-size 1: expected at least 2" in done.stderr
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {"error"}
    done = fork_two(*flags, "--out", tmp_path / "run", "--data", ROOT)
    assert done.returncode == 2 and f"error: {ROOT}: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device, gpus, message", [
    ("mps", 0, "--device mps: several processes"),
    ("auto", 1, "at most one process for each of this machine's 1 GPUs"),
])
def test_each_process_needs_a_device(device, gpus, message, monkeypatch):
    """The second of two processes, by torchrun's environment; refused before it waits for the first."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert distributed.init_process_group(device, 4) == ProcessGroup()  # not torchrun's variables
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=message):
        distributed.init_process_group(device, 4)


def test_one_process_of_each_machine_comes_first(monkeypatch):
    """Two machines of two processes, as threads at a barrier: the first of each machine, then all."""
    order, barrier = [], threading.Barrier(4)
    monkeypatch.setattr(ProcessGroup, "barrier", lambda _: barrier.wait(10))

    def work(rank: int) -> None:
        with ProcessGroup(rank, 4, local_rank=rank % 2).first_of_machine():
            order.append(rank)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert set(order[:2]) == {0, 2} and sorted(order) == [0, 1, 2, 3]
