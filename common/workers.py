"""Worker processes: a ProcessPoolExecutor that ends at once and leaves no process behind.

Three gaps of Python's own pool [1] are closed here. Ctrl-C also reaches the workers, and each prints a traceback.
Workers survive a parent that is killed. After an exception, the pool first finishes its pending tasks.

References
[1] https://docs.python.org/3/library/concurrent.futures.html#processpoolexecutor
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from threading import Thread

import torch

from common.errors import InputError


def _exit_with_parent() -> None:
    """Ends this process when its parent is gone.

    The sentinel is a pipe that closes with the parent. A forked worker also holds the parent's ends of the pipes of
    the workers that were forked before it. So the last worker ends first, then the one before it, and so on.
    """
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _initialize_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    torch.set_num_threads(1)  # the workers are the parallel part
    Thread(target=_exit_with_parent, daemon=True).start()


@contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` processes. If an exception leaves the block, they are killed and pending tasks are cancelled.

    A worker that dies breaks the pool: its futures raise BrokenProcessPool, which leaves the block as an InputError.
    """
    pool = ProcessPoolExecutor(count, initializer=_initialize_worker)
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited until a worker ignores SIGINT
        try:
            for _ in range(count):  # each starts a worker
                pool.submit(int)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield pool
    except BaseException as error:
        for process in list(pool._processes.values()):  # from Python 3.14 on: pool.kill_workers()
            process.kill()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise InputError("a worker process died; the system kills processes when it runs out of memory") from error
        raise
    pool.shutdown()
