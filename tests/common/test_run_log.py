"""Rows of a run's log that are damaged."""

import pytest

from common.run_log import check_output, read_log
from tests.common.helpers import refused

GOOD = b'{"step": 1, "loss": 2.5, "gates": [0.5], "elapsed": 3}'
BAD = (
    b"[]", b"3", b"", b"\xff\xfe", b'{"a": 1}', b'{"step": null}', b'{"step": -1}', b'{"step": 1, "lo\xffss": 1}',
    b'{"step": 1, "elapsed": "x"}', b'{"step": 0, "loss": 1}', b'{"step": 1, "loss": {}}', b'{"step": 1, "val": 3}',
    b'{"step": 1, "val": {}}', b'{"step": 1, "val": {"CIDEr": "x"}}', b'{"step": 1, "gates": [null]}',
    b'{"step": 1, "saturated": 0.5}', b'{"step": 1e400}', b'{"step": 1',
)  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_damaged_row_is_named_unless_it_is_the_last(bad, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join([GOOD, bad, GOOD]))
    with refused(f"{path}: line 2"):
        read_log(path)
    path.write_bytes(b"\n".join([GOOD, bad]))
    assert [line for line, _ in read_log(path)] == [GOOD]


def test_an_output_is_no_file_of_the_run_and_can_be_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "none/file")
    (tmp_path / "new").symlink_to(tmp_path / "file")
    for names, words in ((("best", "best/x", "log.jsonl"), "a file of the run"),
                         (("link", "none/x"), "expected the name of a file")):  # fmt: skip
        for name in names:
            with refused(f"--save {tmp_path / name}: ", words):
                check_output("--save", tmp_path / name, tmp_path)
    check_output("--save", tmp_path / "new", tmp_path)
    check_output("--save", tmp_path / "x", tmp_path)
