"""The log of a run, `log.jsonl`: in each line a JSON object, as `train.py` writes it. And a run's files, which no
output may replace."""

import os
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import bounded, field, open_to_read, parse_object


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """A row, whose known fields have the right types. Raises an InputError that starts with `where`."""
    row = parse_object(line, where)
    bounded(row, "step", int, where, 1 if "loss" in row else 0, 2**53)
    field(row, "elapsed", float, where, 0.0)
    if "loss" in row:
        bounded(row, "loss", float, where, 0, 1e9)
    for name in ("gates", "saturated"):
        for value in field(row, name, list, where, []):
            bounded({name: value}, name, float, where, 0, 1)
    for name in {"val", "test"} & row.keys():
        scores = field(row, name, dict, where)
        for metric in {"CIDEr", *scores}:
            bounded(scores, metric, float, f"{where}: {name}", 0, 1e3)
    return row


def read_log(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each row as it is written, and as an object. The last row is left out if it is damaged: a process that was
    killed may have written half of it. Raises InputError for any other row that is damaged."""
    with open_to_read(path) as file:
        lines = file.read().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append((line, parse_row(line, f"{path}: line {number}")))
        except InputError:
            if number < len(lines):
                raise
    return rows


def check_output(flag: str, path: Path, run: Path) -> None:
    """Raises InputError for a path that no file can be written to, and for the files of the run."""
    files = {(run / name).resolve() for name in ("config.json", "log.jsonl", "test.json", "lock")}
    if flag != "--report":
        files.add((run / "report.html").resolve())
    folders = {(run / name).resolve() for name in ("best", "last", "val")}
    target = path.resolve()  # where a link leads, which may be missing
    if target in files or folders & {target, *target.parents}:
        raise InputError(f"{flag} {path}: is a file of the run, expected another one")
    is_file = path.is_file() or not path.exists()
    if not (is_file and target.parent.is_dir() and os.access(target.parent, os.W_OK)):
        raise InputError(f"{flag} {path}: expected the name of a file in a folder that can be written to")
