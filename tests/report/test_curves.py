"""The drawing of a run's log. References: the rows of log.jsonl, and XML."""

import re
from xml.etree import ElementTree

import pytest

from common import run_log
from common.errors import InputError
from report import curves
from tests.scripts import read_log


def test_the_lines_are_those_of_the_log(finished_run):
    """A point for each row: 12 losses, gates and saturated shares of two blocks, scores of 3 validations; an SVG a
    panel, and blocks have the numbers of the page."""
    found = curves.curves_of(finished_run, 5)
    lines = [element.get("points").split() for element in ElementTree.fromstring(f"<a>{found}</a>").iter()
             if "polyline" in element.tag]  # fmt: skip
    assert [len(points) for points in lines] == [12, 12, 12, 12, 12, 3, 3, 3, 3]
    losses = [row["loss"] for row in read_log(finished_run) if "loss" in row]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert found.count("<svg") == 5 and re.findall('bold"[^>]*>([0-9]+)<', found) == ["5", "6", "5", "6"]
    assert sorted(range(12), key=losses.__getitem__) == sorted(range(12), key=lambda i: (-heights[i], losses[i]))


def test_a_half_written_last_row_is_left_out(tmp_path):
    rows = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.0}']
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([*rows, '{"step": 3, "lo']))
    assert [row["step"] for _, row in run_log.read_log(path)] == [1, 2]
    for bad in (b"3", b"[]", b"\xff", b'{"step": 1', b'{"step": 2, "val": 3}'):
        path.write_bytes(b"\n".join([bad, *(row.encode() for row in rows)]))
        with pytest.raises(InputError, match="log.jsonl: line 1"):
            curves.curves_of(tmp_path, 4)


def test_a_loss_of_zero_and_rows_of_fewer_gates_are_drawn(tmp_path):
    rows = ['{"step": 1, "loss": 0, "gates": [0.5, 0.5]}', '{"step": 2, "loss": 0, "gates": [0.5]}',
            '{"step": 2, "val": {"CIDEr": 0}}']  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    assert curves.curves_of(tmp_path, 4).startswith("<svg")


def test_a_validation_without_some_scores_is_drawn(tmp_path):
    rows = ['{"step": 1, "loss": 1}', '{"step": 1, "val": {"CIDEr": 1}}',
            '{"step": 2, "val": {"CIDEr": 1, "shapes right": 0.5}}']  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    assert ">shapes</text>" in curves.curves_of(tmp_path, 4)


def test_a_run_without_training_has_no_curves(tmp_path):
    assert curves.curves_of(tmp_path, 1) == ""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert curves.curves_of(tmp_path, 1) == ""
