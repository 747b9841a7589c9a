"""The command line: argument types, exit codes, output. References: the strings and codes that are written here."""

import argparse
import os
import subprocess
import sys
import time

import pytest

from common import cli
from tests.scripts import ROOT


@pytest.mark.parametrize("text, kind, found", [
    ("0", int, 0), ("40", int, 40), ("1e-3", float, 0.001), ("-1", int, None), ("41", int, None), ("1.5", int, None),
    ("9" * 5000, int, None), ("nan", float, None), ("x", float, None),
])
def test_numbers(text, kind, found):
    """From 0 to 40."""
    if found is not None:
        assert cli.number(kind, 0, 40)(text) == found
        return
    with pytest.raises(argparse.ArgumentTypeError, match="number from 0 to 40, found .{0,45}$"):
        cli.number(kind, 0, 40)(text)


def run_main(body: str, redirection: str = "") -> subprocess.CompletedProcess:
    """A script whose `main` has this body. Its streams are buffered as usual, and it gets a SIGINT while it
    exits, which must change nothing."""
    script = f"""
import atexit, os, signal, sys
from common import cli
from common.errors import InputError
def main():
    {body}
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
cli.run(main)
"""
    command = ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, script]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": ""}, capture_output=True, text=True)


@pytest.mark.parametrize("statement, code, message", [
    ("return 3", 3, ""), ("raise InputError('x: y')", 2, "error: x: y\n"),
    ("raise KeyboardInterrupt", 130, "stopped\n"),
    ("open('/none/x')", 2, "error: /none/x: No such file or directory\n"),
    ("raise RuntimeError('could not create a primitive')", 2, "error: out of memory"),
    ("raise RuntimeError('CUDA out of memory. Tried')", 2, "error: out of memory"),
    ("import torch; torch.empty(2**62, dtype=torch.uint8)", 2, "error: out of memory"),
    ("raise MemoryError", 2, "error: out of memory"), ("1 / 0", 1, "Traceback"), ("raise BrokenPipeError", 141, ""),
    ("raise RuntimeError('shapes differ')", 1, "Traceback"),
])
def test_exit_codes_and_messages(statement, code, message):
    done = run_main(statement)
    assert done.returncode == code and done.stderr.startswith(message)
    assert code == 1 or done.stderr.count("\n") == bool(message)


def test_each_line_is_flushed_to_a_pipe():
    """The process ends without flushing anything, as after a SIGKILL: the line must have been written before."""
    done = run_main("print('device: cpu'); print('unfinished', end=''); os._exit(0)")
    assert done.stdout == "device: cpu\n"


STREAMS = """
    assert sys.stdin.read() == ""
    assert open(os.devnull).fileno() > 2
    print("text")
    print("", end="", file=sys.stderr)
"""


@pytest.mark.parametrize(("closed", "code", "output"), [
    (">&-", 0, ""), ("2>&-", 0, "text\n"), ("<&-", 0, "text\n"), (">&- 2>&- <&-", 0, ""),
    (">/dev/full", 2, "error: input or output: No space left on device\n"),
])
def test_streams_that_are_closed_or_full(closed, code, output):
    """As a shell closes them. What is read or printed there is nothing; a file that is opened gets another number."""
    done = run_main(STREAMS, f"</dev/null {closed}")
    assert (done.returncode, done.stdout + done.stderr) == (code, output)


def test_a_full_standard_error_changes_no_exit_code():
    assert run_main("raise InputError('x')", "2>/dev/full").returncode == 2


# ------------------------------------------------------------------------------------------ time


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """[seconds], the time of a clock that moves when it is told to."""
    now = [5000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_speed_is_of_steps_and_the_time_left_of_validations_too(clock):
    """Steps 5 to 10 take 2 s each. By hand: a validation of 20 s after step 7 is in the mean pace, 26 s for
    3 steps, and not in the speed."""
    progress, updates = cli.Progress(10, done=4), {}
    for step in range(5, 11):
        clock[0] += 2
        updates[step] = progress.update(step)
        if step == 7:
            clock[0] += 20
            progress.restart(step)
    assert [speed for speed, _ in updates.values()] == [0.5] * 6
    assert (updates[5][1], updates[7][1], updates[8][1], updates[10][1]) == (10, 6, 28 / 4 * 2, 0)


def test_the_time_left_of_a_job_is_printed_now_and_then(clock, capsys):
    """100 clips, two per second: after 5 s, and not again one second later."""
    progress = cli.Progress(100)
    for done in (8, 10, 12, 20):
        clock[0] = 5000 + done / 2
        progress.report("frames", done)
    assert capsys.readouterr().out == "frames: 10/100 clips, 0:00:45 left\nframes: 20/100 clips, 0:00:40 left\n"
