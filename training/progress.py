"""Speed, elapsed and remaining time of a training run."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.cli import format_seconds


def format_speed(speed: float) -> str:
    """Clips per second, at least three significant digits: "4.03 clips/s", "556 clips/s"."""
    return f"{speed:.0f} clips/s" if speed >= 100 else f"{speed:.3g} clips/s"


class Progress:
    """Measures the steps' speed, without pauses such as validations, and estimates the time left of the whole run.

    The time left is that of the steps, of the validations after `validation_steps`, and of the test split. A validation
    is expected to take as long as the last one did, and the test split as long as `test_ratio` validations. A run that
    was resumed measures its first validation later; until then, the estimate says that it is without them.
    """

    def __init__(self, step: int, validation_steps: Sequence[int], batch_size: int, start_time: float,
                 test_ratio: float):  # fmt: skip
        """`start_time`: when the run began, on the clock time.monotonic. The last validation step is the last step."""
        self.validation_steps, self.batch_size = validation_steps, batch_size
        self.start_time, self.test_ratio = start_time, test_ratio
        self.last_step, self.last_time = step, time.monotonic()
        self.validation_seconds: float | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block is no part of the steps."""
        start = time.monotonic()
        yield
        self.last_time += time.monotonic() - start

    @contextmanager
    def validation(self) -> Iterator[None]:
        """A pause that is measured as a validation."""
        start = time.monotonic()
        with self.paused():
            yield
        self.validation_seconds = time.monotonic() - start

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.start_time

    def update(self, step: int) -> tuple[float, str]:
        """-> clips per second since the last call, and a line with it, the elapsed time and the time left.

        Called before the validation of the same step, which counts as time left.
        """
        now = time.monotonic()
        speed = (step - self.last_step) * self.batch_size / (now - self.last_time)
        left = (self.validation_steps[-1] - step) * self.batch_size / speed
        note = " without validation"
        if self.validation_seconds is not None:
            validations = sum(validation_step >= step for validation_step in self.validation_steps)
            left, note = left + (validations + self.test_ratio) * self.validation_seconds, ""
        self.last_step, self.last_time = step, now
        return speed, (f"{format_speed(speed)}  elapsed {format_seconds(self.elapsed())}  "
                       f"left {format_seconds(left)}{note}")  # fmt: skip
