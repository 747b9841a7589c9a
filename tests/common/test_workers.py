"""Worker pools: what happens after Ctrl-C, an exception, and the death of a worker or of the parent."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from common.workers import worker_pool


def run_in_child(work: Callable[[], object]) -> int:
    """Starts `work` in a forked process, whose exit code is 0 if `work` returns. -> its process id."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def has_ended(pid: int, seconds: float) -> bool:
    """Whether the process ends within `seconds`. Orphans that are zombies count as ended: nobody may reap them."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)


def log_and_sleep(log: Path, seconds: float) -> None:
    """A task that appends its process id to `log`."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)


def wait_for_pids(log: Path, count: int) -> list[int]:
    while not log.exists() or len(log.read_text().split()) < count:
        time.sleep(0.01)
    return [int(word) for word in log.read_text().split()]


def run_sleeping_pool(log: Path, workers: int, tasks: int = 10, seconds: float = 60, method: str = "fork") -> None:
    multiprocessing.set_start_method(method, force=True)
    with worker_pool(workers) as pool:
        futures = [pool.submit(log_and_sleep, log, seconds) for _ in range(tasks)]
        for future in futures:
            future.result()


def worker_state(_: int) -> tuple[int, bool]:
    return torch.get_num_threads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_workers_use_one_torch_thread_and_ignore_ctrl_c():
    with worker_pool(2) as pool:
        assert list(pool.map(worker_state, range(4))) == [(1, True)] * 4
        workers = [process.pid for process in pool._processes.values()]
    assert len(workers) == 2 and all(has_ended(pid, 1) for pid in workers)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def sum_of_squares(count: int) -> float:
    return torch.arange(count, dtype=torch.float64).square().sum().item()


def test_workers_forked_from_a_process_with_torch_threads_do_not_deadlock():
    """The parent has used a pool of 4 OpenMP threads, which its forked children do not have."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        expected = sum_of_squares(1_000_000)
        with worker_pool(3) as pool:
            futures = [pool.submit(sum_of_squares, 1_000_000) for _ in range(12)]
            assert [future.result(timeout=60) for future in futures] == pytest.approx([expected] * 12)
    finally:
        torch.set_num_threads(before)


def test_an_exception_kills_the_workers_and_cancels_pending_tasks(tmp_path):
    """Tasks of 60 s in two workers; the exception leaves the block within 3 s."""
    log = tmp_path / "log"
    start_time = time.monotonic()
    with pytest.raises(ZeroDivisionError), worker_pool(2) as pool:
        futures = [pool.submit(log_and_sleep, log, 60) for _ in range(10)]
        workers = wait_for_pids(log, 2)
        raise ZeroDivisionError
    assert time.monotonic() - start_time < 3
    assert all(has_ended(pid, 1) for pid in workers) and wait_for_pids(log, 2) == workers
    assert all(future.done() for future in futures)


@pytest.mark.parametrize("receivers", ["parent and workers", "parent"])
def test_ctrl_c_ends_at_once_and_workers_print_nothing(tmp_path, capfd, receivers):
    """A terminal sends SIGINT to all. Here the workers get it first, so they have time to print a traceback."""
    log = tmp_path / "log"

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run_sleeping_pool(log, workers=2)
        except KeyboardInterrupt:
            os._exit(130)

    parent = run_in_child(work)
    workers = wait_for_pids(log, 2)
    start_time = time.monotonic()
    if receivers == "parent and workers":
        for pid in workers:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.1)
    os.kill(parent, signal.SIGINT)
    assert exit_code(parent) == 130 and time.monotonic() - start_time < 3
    assert all(has_ended(pid, 1) for pid in workers)
    assert "".join(capfd.readouterr()) == "" and wait_for_pids(log, 2) == workers


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_end_when_the_parent_is_killed(tmp_path, method):
    """SIGKILL while four workers run tasks of 60 s: the last one ends first, then the one forked before it."""
    log = tmp_path / "log"
    parent = run_in_child(lambda: run_sleeping_pool(log, workers=4, method=method))
    workers = wait_for_pids(log, 4)
    assert len(set(workers)) == 4
    os.kill(parent, signal.SIGKILL)
    assert exit_code(parent) == -signal.SIGKILL
    assert all(has_ended(pid, 5) for pid in workers)


def test_idle_workers_end_when_the_parent_is_killed(tmp_path):
    log = tmp_path / "log"

    def work():
        with worker_pool(3) as pool:
            list(pool.map(log_and_sleep, [log] * 3, [0.5] * 3))
            time.sleep(60)

    parent = run_in_child(work)
    workers = wait_for_pids(log, 3)
    time.sleep(1)
    os.kill(parent, signal.SIGKILL)
    assert exit_code(parent) == -signal.SIGKILL and all(has_ended(pid, 5) for pid in workers)


def test_a_worker_that_dies_is_an_input_error():
    """As when the system is out of memory and kills one."""
    with pytest.raises(InputError, match="a worker process died"), worker_pool(2) as pool:
        list(pool.map(os._exit, [9, 9]))
