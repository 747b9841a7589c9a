"""Speed and remaining time of a training run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from common.cli import format_seconds


class Progress:
    """Counts clips and seconds between log lines; pauses, such as validation, do not count."""

    def __init__(self, step: int, steps: int, batch_size: int, start_time: float):
        self.steps, self.batch_size, self.start_time = steps, batch_size, start_time
        self.last_step, self.last_time = step, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.last_time += time.monotonic() - start

    def update(self, step: int) -> tuple[float, str]:
        """-> clips per second since the last call, and a line with it, the time since the start and the time left."""
        now = time.monotonic()
        speed = (step - self.last_step) * self.batch_size / (now - self.last_time)
        left = (self.steps - step) * self.batch_size / speed
        self.last_step, self.last_time = step, now
        return speed, (f"{speed:.0f} clips/s  elapsed {format_seconds(now - self.start_time)}  "
                       f"left {format_seconds(left)}")  # fmt: skip
