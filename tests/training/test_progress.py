"""Progress of a run on a fake clock. Reference: the moment at which a simulated run of constant speed does end."""

import time

import pytest

from common.cli import format_seconds
from training.progress import Progress

VALIDATION_STEPS, BATCH_SIZE, TEST_RATIO = [4, 8, 10], 6, 2.5


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 5000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def simulate(clock: Clock, progress: Progress, step: int) -> list[tuple[float, float, str]]:
    """A step takes 2 s, a validation 20 s, the test split 50 s. Returns time, speed and line of each step."""
    updates = []
    while step < VALIDATION_STEPS[-1]:
        clock.now += 2
        step += 1
        updates.append((clock.now, *progress.update(step)))
        if step in VALIDATION_STEPS:
            with progress.validation():
                clock.now += 20
    clock.now += 20 * TEST_RATIO
    return updates


def test_the_time_left_includes_validations_and_the_test_split(clock):
    """Began 100 s ago. After the validation of step 0, each line says when the run ends."""
    progress = Progress(0, VALIDATION_STEPS, BATCH_SIZE, clock.now - 100, TEST_RATIO)
    with progress.validation():
        clock.now += 20
    updates = simulate(clock, progress, 0)
    assert len(updates) == 10
    for now, speed, line in updates:
        assert speed == 3
        assert line == f"3 clips/s  elapsed {format_seconds(now - 4900)}  left {format_seconds(clock.now - now)}"
    assert progress.elapsed() == clock.now - 4900


def test_a_resumed_run_says_that_it_has_not_measured_a_validation(clock):
    """Resumed after step 5 of 10, with 300 s before. Validations are after steps 8 and 10."""
    progress = Progress(5, VALIDATION_STEPS, BATCH_SIZE, clock.now - 300, TEST_RATIO)
    lines = [line for _, _, line in simulate(clock, progress, 5)]
    assert lines[0] == "3 clips/s  elapsed 5:02  left 0:08 without validation"
    assert [line.endswith(" without validation") for line in lines] == [True] * 3 + [False] * 2
    assert lines[3] == "3 clips/s  elapsed 5:28  left 1:12"  # a step, a validation, the test split
