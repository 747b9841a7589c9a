"""`python -m metrics`: its output and files; bad input gives one line and exit code 2.

Scores are compared with `metrics.score`, which test_score.py compares with pycocoevalcap. METEOR's tables are small.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import metrics
from metrics import meteor_data
from metrics.__main__ import main

ROOT = Path(metrics.__file__).parent.parent
REFS = {"v1": ["A man runs.", "A kid is running fast."], "v2": ["The dog barks at the cat."], "v3": ["A lot of cars."]}
HYPS = {"v1": "a youngster is running", "v2": "the dog barks", "v3": "many automobiles"}
SIGNATURE = f"videos:3|refs:1-2|tok:ptb|meteor:1.5+syn+para|cider:d,n4,s6|v:{metrics.VERSION}"

pytestmark = pytest.mark.usefixtures("small_tables")


@pytest.fixture
def files(tmp_path):
    """(flags that name the files, path of REFS, path of HYPS)."""
    paths = tmp_path / "refs.json", tmp_path / "hyps.json"
    for path, content in zip(paths, (REFS, HYPS), strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return ["--references", str(paths[0]), "--hypotheses", str(paths[1])], *paths


def run_main(capsys, *flags):
    """(exit code, standard output, standard error) of the command, run in this process."""
    code = main([str(flag) for flag in flags])
    return code, *capsys.readouterr()


def run_shell(flags, redirection="", cwd=ROOT, **environment):
    """The command in a process of its own, whose streams are buffered as usual."""
    command = ["bash", "-c", f'"$0" -m metrics "$@" {redirection}', sys.executable, *map(str, flags)]
    env = os.environ | {"PYTHONUNBUFFERED": ""} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


# --- output -------------------------------------------------------------------------------------------------------


def test_table_is_scaled_by_100_and_json_is_not(files, capsys):
    code, out, err = run_main(capsys, *files[0])
    expected = metrics.score(REFS, HYPS)
    *rows, signature = out.splitlines()
    assert code == 0 and signature == expected.signature == SIGNATURE
    names = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]  # pycocoevalcap's are Bleu_1, ...
    expected_rows = [[name, f"{100 * x:.2f}"] for name, x in zip(names, expected.corpus.values(), strict=True)]
    assert [row.split() for row in rows] == expected_rows
    assert len(rows) == 7 and len(err.splitlines()) == 1 and "compiling METEOR's paraphrases" in err
    code, out, err = run_main(capsys, *files[0], "--json")
    assert (code, err) == (0, "") and json.loads(out) == expected.corpus | {"signature": SIGNATURE}


def test_per_video(files, capsys, tmp_path):
    """Also with an id that UTF-8 cannot encode, which JSON may contain."""
    path = tmp_path / "rows.csv"
    files[1].write_text(json.dumps(REFS | {"\ud800": ["a cat"]}))
    files[2].write_text(json.dumps(HYPS | {"\ud800": "a dog"}))
    assert run_main(capsys, *files[0], "--per-video", path)[0] == 0
    with open(path, encoding="utf-8", newline="") as file:
        rows = {row.pop("id"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    assert rows == metrics.score(REFS | {"\\ud800": ["a cat"]}, HYPS | {"\\ud800": "a dog"}).per_video
    before = files[1].read_bytes()
    (tmp_path / "link.json").symlink_to(files[1])
    for bad in (tmp_path / "none" / "rows.csv", tmp_path, tmp_path / "link.json"):
        code, out, err = run_main(capsys, *files[0], "--per-video", bad)
        assert (code, out) == (2, "") and f"--per-video {bad}: " in err and err.count("\n") == 1
    assert files[1].read_bytes() == before


def test_subset_and_tokenizer(files, capsys):
    _, out, _ = run_main(capsys, *files[0], "--tokenizer", "none", "--json")
    assert json.loads(out)["signature"] == SIGNATURE.replace("tok:ptb", "tok:none")
    assert json.loads(out)["ROUGE_L"] < metrics.score(REFS, HYPS).corpus["ROUGE_L"]
    files[2].write_text(json.dumps({"v2": "the dog barks", "v1": "a man runs"}))
    assert run_main(capsys, *files[0])[0] == 2
    code, out, err = run_main(capsys, *files[0], "--subset")
    assert code == 0 and out.splitlines()[-1] == SIGNATURE.replace("videos:3", "videos:2/3")
    assert "scored 2 of 3 videos" in err.splitlines()


def test_coco_files(files, capsys):
    """COCO's annotations and results, with ids as numbers and a byte order mark, give the same scores."""
    _, expected, _ = run_main(capsys, *files[0])
    texts = [{"image_id": int(key[1]), "caption": text} for key, group in REFS.items() for text in group]
    files[1].write_text(json.dumps({"annotations": texts}), encoding="utf-8-sig")
    files[2].write_text(json.dumps([{"image_id": int(key[1]), "caption": text} for key, text in HYPS.items()]))
    assert run_main(capsys, *files[0])[:2] == (0, expected)


def test_missing_tables_are_named_or_an_error_if_strict(files, capsys, monkeypatch, small_tables):
    _, expected, _ = run_main(capsys, *files[0])
    monkeypatch.setenv("METEOR_DATA", str(small_tables / "elsewhere"))
    code, out, err = run_main(capsys, *files[0])
    assert (code, out) == (2, "") and err.startswith(f"error: {small_tables / 'elsewhere'}: has neither")
    assert run_main(capsys, *files[0], "--meteor-data", small_tables)[:2] == (0, expected)
    monkeypatch.delenv("METEOR_DATA")
    monkeypatch.setattr(meteor_data.importlib.util, "find_spec", lambda name: None)
    code, out, err = run_main(capsys, *files[0])
    assert code == 0 and "METEOR[exact,stem]" in [line.split()[0] for line in out.splitlines()]
    assert "|meteor:1.5[exact,stem]|" in out and "install pycocoevalcap" in err
    code, out, err = run_main(capsys, *files[0], "--strict")
    assert (code, out) == (2, "") and "install pycocoevalcap" in err and err.count("\n") == 1


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [1, 2], ids=["references", "hypotheses"])
@pytest.mark.parametrize("content", [
    None, b"", b"[1, 2]", b'{"v1": ["a"], "v1": ["b"]}', b"\xff\xfe", b"[" * 100_000, b'[{"caption": "a"}]',
    b'{"annotations": [{"image_id": 1}]}', json.dumps({"x\n\x1b[31m" * 10**5: 3}).encode(),
    json.dumps({"v1": ["n't" * 4000], "v2": ["a"], "v3": ["a"]}).encode()], ids=range(10))
def test_bad_files_give_one_line(files, capsys, file, content):
    """Missing, empty, foreign, deeply nested files; an id twice; escapes; missing fields; long captions."""
    files[file].unlink()
    if content is not None:
        files[file].write_bytes(content)
    code, out, err = run_main(capsys, *files[0])
    assert (code, out) == (2, "") and err.count("\n") == 1 and len(err) < 3000 and "\x1b" not in err
    assert str(files[file]) in err


@pytest.mark.parametrize("flags", ["--stric", "--metrics SPICE", "--per-video", "--references /dev/zero"])
def test_bad_flags_give_one_line(files, capsys, flags):
    code, out, err = run_main(capsys, *files[0], *flags.split())
    assert (code, out) == (2, "") and flags.split()[-1] in err and err.count("\n") == 1


# --- a process of its own -----------------------------------------------------------------------------------------


def test_streams(files, tmp_path):
    """A full, closed or broken stream loses no other output and gives no traceback."""
    flags = [*files[0], "--metrics", "BLEU", "--per-video", tmp_path / "rows.csv"]
    done = run_shell(flags, ">/dev/full")
    assert done.returncode == 2 and "No space left on device" in done.stderr
    assert (tmp_path / "rows.csv").read_text().startswith("id,")
    done = run_shell([*flags[:-1], "/dev/full"])
    assert done.returncode == 2 and "BLEU-4" in done.stdout
    assert done.stderr == "error: --per-video /dev/full: No space left on device\n"
    assert run_shell(["--references", "gone", "--hypotheses", "gone"], "2>/dev/full").returncode == 2
    for closed, has_output in ((">&-", False), ("2>&-", True), ("<&-", True)):
        done = run_shell(flags, closed)
        assert (done.returncode, done.stderr) == (0, "") and ("BLEU-4" in done.stdout) == has_output
    done = run_shell(flags, "| true; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 141) and done.stderr == ""


def test_folder_works_alone(files, tmp_path):
    """Copied elsewhere, without the rest of the project, in a locale without Unicode; --help."""
    shutil.copytree(ROOT / "metrics", tmp_path / "other" / "metrics", ignore=shutil.ignore_patterns("__pycache__"))
    options = {"cwd": tmp_path / "other", "PYTHONPATH": "", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = run_shell(files[0], **options)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == SIGNATURE
    done = run_shell(["--help"], **options)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m metrics --references")
