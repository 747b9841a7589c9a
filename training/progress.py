"""Speed and remaining time of a training run, and signals that stop it between two steps."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.cli import format_seconds


def format_speed(speed: float) -> str:
    """Clips per second, at least three significant digits: "4.03 clips/s", "556 clips/s"."""
    return f"{speed:.0f} clips/s" if speed >= 100 else f"{speed:.3g} clips/s"


class Progress:
    """Measures the steps' speed, without validations, and estimates the time left of the whole run: that of the steps,
    of the validations and of the test split. A validation is expected to take as long as the last one, the test split
    as long as `test_ratio` validations; before the first one the estimate says that it is without them."""

    def __init__(self, step: int, validation_steps: Sequence[int], batch_size: int, start_time: float,
                 test_ratio: float):
        """start_time: when the run began, on the clock time.monotonic. The last validation step is the last step."""
        self.validation_steps, self.batch_size = validation_steps, batch_size
        self.start_time, self.test_ratio = start_time, test_ratio
        self.last_step, self.last_time = step, time.monotonic()
        self.validation_seconds: float | None = None

    @contextmanager
    def validation(self) -> Iterator[None]:
        """What happens in the block is a validation, which is no part of the steps."""
        start = time.monotonic()
        yield
        self.validation_seconds = time.monotonic() - start
        self.last_time += self.validation_seconds

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.start_time

    def update(self, step: int) -> tuple[float, str]:
        """Clips per second since the last call, and a line with it, the elapsed time and the time left. Called before
        the validation of the same step, which counts as time left."""
        now = time.monotonic()
        speed = (step - self.last_step) * self.batch_size / (now - self.last_time)
        left = (self.validation_steps[-1] - step) * self.batch_size / speed
        note = " without validation"
        if self.validation_seconds is not None:
            validations = sum(validation_step >= step for validation_step in self.validation_steps)
            left, note = left + (validations + self.test_ratio) * self.validation_seconds, ""
        self.last_step, self.last_time = step, now
        times = f"elapsed {format_seconds(self.elapsed())}  left {format_seconds(left)}{note}"
        return speed, f"{format_speed(speed)}  {times}"


@contextmanager
def deferred_interrupts(repeatable: bool) -> Iterator[list[int]]:
    """Inside the block a first Ctrl-C or SIGTERM is only appended to the yielded list: a run stops between two steps,
    never inside one. A second one interrupts at once, unless `repeatable`: torchrun sends its processes a signal that
    they have received from the terminal already."""
    received: list[int] = []

    def receive(number: int, _) -> None:
        received.append(number)
        if not repeatable:
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    yield received
    for number in (signal.SIGINT, signal.SIGTERM):  # not in a `finally`: after an exception the process ends
        signal.signal(number, signal.default_int_handler)
