"""The command line: argument types, exit codes, output. References: the strings and codes that are written here."""

import argparse
import os
import subprocess
import sys

import pytest

from common import cli
from tests.scripts import ROOT


@pytest.mark.parametrize("text, value", [
    ("0", 0), ("17", 17), ("-3", None), ("0x1", None), ("", None), ("--5", None), ("-0000000000005", None),
    ("99999999999999999999", None), ("1.5", None),
])  # fmt: skip
def test_whole_numbers(text, value):
    if value is not None:
        assert cli.at_least(0)(text) == value
        return
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number of at least 0"):
        cli.at_least(0)(text)


def test_the_limit_is_named_where_it_is_the_reason():
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1 and at most 40"):
        cli.at_least(1, 40)("41")
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1, found"):
        cli.at_least(1, 40)("0")


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "-1", "x"])
def test_numbers_are_finite(text):
    assert cli.number(float, 0)("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match="expected a finite number"):
        cli.number(float, 0)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="at least 0 and at most 5, found '6'"):
        cli.number(float, 0, 5)("6")


def test_an_empty_path_is_refused():
    assert str(cli.path("a/b")) == "a/b"
    with pytest.raises(argparse.ArgumentTypeError, match="expected a path"):
        cli.path("")


def test_a_folder_may_be_missing_but_is_no_file(tmp_path):
    (tmp_path / "file").touch()
    assert cli.folder(str(tmp_path)) == tmp_path and cli.folder(str(tmp_path / "none")) == tmp_path / "none"
    with pytest.raises(argparse.ArgumentTypeError, match="expected a folder, found the file"):
        cli.folder(str(tmp_path / "file"))


def test_the_help_shows_defaults_of_flags_that_are_set():
    parser = cli.Parser("")
    for name, default in (("a", 0), ("b", None), ("c", False)):
        parser.add_argument(f"--{name}", default=default, help=f"help of {name}")
    text = parser.format_help()
    assert "help of a (default: 0)" in text and text.count("default") == 1


@pytest.mark.parametrize("statement, code, message", [
    ("return 3", 3, ""), ("raise InputError('x: y')", 2, "error: x: y\n"),
    ("raise KeyboardInterrupt", 130, "stopped\n"),
    ("open('/none/x')", 2, "error: /none/x: No such file or directory\n"),
    ("raise InputError('a\\x1b[31m\\udcff: y')", 2, "error: a\\x1b[31m\\udcff: y\n"),
    ("raise RuntimeError('could not create a primitive')", 2, "error: out of memory: could not create a primitive\n"),
    ("raise MemoryError", 2, "error: out of memory: no more is known\n"),
    ("import torch; torch.empty(2**62, dtype=torch.uint8)", 2, "error: out of memory: [enforce fail"),
    ("import torch\n    with explain_out_of_memory('a step'): torch.empty(2**62, dtype=torch.uint8)", 2,
     "error: out of memory: a step: [enforce fail"),
])  # fmt: skip
def test_exit_codes_and_messages(statement, code, message):
    """SIGINT while the process exits changes neither."""
    script = f"""
import atexit, os, signal
from common import cli
from common.errors import InputError, explain_out_of_memory
def main():
    {statement}
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
cli.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(message) and done.stderr.count("\n") == bool(message)


def test_each_line_is_flushed_to_a_pipe():
    """The process ends without flushing anything, as after a SIGKILL: the line must have been written before."""
    script = """
import os
from common import cli
def main():
    print("device: cpu")
    print("an unfinished line", end="")
    os._exit(0)
cli.run(main)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = [sys.executable, "-c", script]
    assert subprocess.check_output(run, cwd=ROOT, env=environment, text=True) == "device: cpu\n"


@pytest.mark.parametrize(("closed", "code", "output"), [
    (">&-", 0, ""), ("2>&-", 0, "text\n"), ("<&-", 0, "text\n"), (">&- 2>&- <&-", 0, ""),
    (">/dev/full", 2, "error: input or output: No space left on device\n"),
])  # fmt: skip
def test_streams_that_are_closed_or_full(closed, code, output):
    """As a shell closes them. What is read or printed there is nothing; a file that is opened gets another number."""
    script = """
import os, sys
from common import cli
def main():
    assert sys.stdin.read() == ""
    assert open(os.devnull).fileno() > 2
    print("text")
    print("", end="", file=sys.stderr)
cli.run(main)
"""
    command = ["bash", "-c", f'"$0" -c "$1" </dev/null {closed}', sys.executable, script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (code, output)


def test_a_full_standard_error_changes_no_exit_code():
    script = """
from common import cli
from common.errors import InputError
def main():
    raise InputError("x")
cli.run(main)
"""
    command = ["bash", "-c", '"$0" -c "$1" 2>/dev/full', sys.executable, script]
    assert subprocess.run(command, cwd=ROOT).returncode == 2
