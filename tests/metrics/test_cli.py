"""`python -m metrics`: what it prints and writes, and that every bad input is one line and exit code 2.

The scores themselves are held to pycocoevalcap 1.2 in test_metrics.py; here they are compared with `score()`.
METEOR's tables are small ones made for the tests.
"""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_meteor import small  # noqa: F401 (a fixture)

import metrics
from metrics import meteor_data
from metrics.__main__ import Progress, main

ROOT = Path(metrics.__file__).parent.parent
REFS = {"v1": ["A man runs.", "A kid is running fast."], "v2": ["The dog barks at the cat."], "v3": ["A lot of cars."]}
HYPS = {"v1": "a youngster is running", "v2": "the dog barks", "v3": "many automobiles"}
SIGNATURE = f"videos:3|refs:1-2|tok:ptb|meteor:1.5+syn+para|cider:d,n4,s6|v:{metrics.VERSION}"

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def files(tmp_path):
    """Files of REFS and HYPS: (flags that name them, the two paths)."""
    paths = []
    for name, content in ("refs.json", REFS), ("hyps.json", HYPS):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(content), encoding="utf-8")
    return ["--references", str(paths[0]), "--hypotheses", str(paths[1])], *paths


def run(capsys, *flags):
    """(exit code, standard output, standard error) of the command, run in this process."""
    code = main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    return code, out, err


def command(*flags, cwd=ROOT, **environment):
    """The same in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "metrics", *map(str, flags)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


# --- what it prints and writes ------------------------------------------------------------------------------------


def test_table_is_times_100(files, capsys):
    code, out, err = run(capsys, *files[0])
    expected = metrics.score(REFS, HYPS)
    *rows, signature = out.splitlines()
    assert code == 0 and signature == expected.signature == SIGNATURE
    assert [row.split() for row in rows] == [[name, f"{100 * x:.2f}"] for name, x in expected.corpus.items()]
    assert len(rows) == 7 and len(err.splitlines()) == 1 and "compiling METEOR's paraphrases" in err
    assert run(capsys, *files[0]) == (0, out, "")


def test_json_is_unscaled(files, capsys):
    code, out, _ = run(capsys, *files[0], "--json")
    expected = metrics.score(REFS, HYPS)
    assert code == 0 and json.loads(out) == expected.corpus | {"signature": SIGNATURE}


def test_per_video(files, capsys, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("an older file")
    assert run(capsys, *files[0], "--per-video", path)[0] == 0
    with open(path, encoding="utf-8", newline="") as file:
        rows = {row.pop("id"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    assert rows == metrics.score(REFS, HYPS).per_video
    assert not [other for other in tmp_path.iterdir() if other.name.startswith("rows.csv") and other != path]
    assert path.stat().st_mode & 0o777 == files[1].stat().st_mode & 0o777
    code, out, err = run(capsys, *files[0], "--per-video", tmp_path / "none" / "rows.csv")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "rows.csv: expected a file" in err
    assert run(capsys, *files[0], "--per-video", tmp_path)[0] == 2


def test_per_video_into_a_pipe_or_through_a_link(files, capsys, tmp_path):
    """A pipe stays a pipe and gets the rows; a link stays a link and its target is replaced."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        assert run(capsys, *files[0], "--per-video", tmp_path / "pipe")[0] == 0
        assert len(reader.stdout.read().splitlines()) == 1 + len(HYPS)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "target.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    assert run(capsys, *files[0], "--per-video", tmp_path / "link.csv")[0] == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "target.csv").read_text().startswith("id,")


def test_a_reader_that_closes_early_is_no_traceback(files):
    """Standard output is a pipe that nobody reads: exit code 141, nothing on standard error."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "metrics", *files[0]], cwd=ROOT, stdout=write, stderr=subprocess.PIPE,
                          text=True)  # fmt: skip
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr


def test_any_id_can_be_written(capsys, tmp_path, files):
    """JSON may hold half a character, which no file in UTF-8 can."""
    files[1].write_text('{"\\ud800": ["a man"], "\\u043a\\u043e\\u0442": ["a dog"]}')
    files[2].write_text('{"\\ud800": "a man", "\\u043a\\u043e\\u0442": "a cat"}')
    assert run(capsys, *files[0], "--per-video", tmp_path / "rows.csv")[0] == 0
    lines = (tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines] == ["id", "\\ud800", "кот"]


def test_subset(files, capsys):
    files[2].write_text(json.dumps({"v2": "the dog barks", "v1": "a man runs"}))
    code, out, err = run(capsys, *files[0])
    assert (code, out) == (2, "") and "id 'v3' has no hypothesis" in err
    code, out, err = run(capsys, *files[0], "--subset")
    assert code == 0 and out.splitlines()[-1] == SIGNATURE.replace("videos:3", "videos:2/3")
    assert "scored 2 of 3 videos" in err.splitlines()


def test_tokenizer_none(files, capsys):
    _, out, _ = run(capsys, *files[0], "--tokenizer", "none", "--json")
    found = json.loads(out)
    assert found["signature"] == SIGNATURE.replace("tok:ptb", "tok:none")
    assert found["ROUGE_L"] < metrics.score(REFS, HYPS).corpus["ROUGE_L"]


def test_chosen_metrics_touch_no_tables(files, capsys, monkeypatch):
    monkeypatch.setattr(meteor_data, "locate", lambda given: pytest.fail("looked for METEOR's tables"))
    code, out, _ = run(capsys, *files[0], "--metrics", "CIDEr", "BLEU")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[:-1]] == [f"Bleu_{n}" for n in "1234"] + [
        "CIDEr"
    ]
    assert "meteor" not in out.splitlines()[-1]


def test_coco_files(files, capsys):
    """COCO's annotations and results, ids as numbers, give the same scores."""
    _, expected, _ = run(capsys, *files[0])
    texts = [(int(key[1]), text) for key, group in REFS.items() for text in group]
    files[1].write_text(json.dumps({"annotations": [{"image_id": i, "caption": text} for i, text in texts]}))
    files[2].write_text(json.dumps([{"image_id": int(key[1]), "caption": text} for key, text in HYPS.items()]))
    assert run(capsys, *files[0])[:2] == (0, expected)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_are_utf8(files, capsys, encoding):
    """With the mark that some editors write, and without."""
    files[1].write_text(json.dumps({"кот": ["señora", "x"], "b": ["y"]}, ensure_ascii=False), encoding=encoding)
    files[2].write_text(json.dumps({"кот": "señora", "b": "y"}, ensure_ascii=False), encoding=encoding)
    code, out, _ = run(capsys, *files[0], "--json")
    assert code == 0 and json.loads(out)["ROUGE_L"] == 1.0


def test_progress_waits_two_seconds(capsys, monkeypatch):
    progress = Progress()
    progress("METEOR", 3, 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "start", progress.start - 2.1)
    progress("METEOR", 2, 3)  # not a terminal: only the end is shown
    progress("METEOR", 3, 3)
    assert capsys.readouterr().err == "METEOR 3/3\n"


# --- METEOR's tables ----------------------------------------------------------------------------------------------


def test_meteor_data_names_a_folder(files, capsys, small, monkeypatch):  # noqa: F811
    _, expected, _ = run(capsys, *files[0])
    monkeypatch.setenv("METEOR_DATA", str(small / "elsewhere"))
    code, out, err = run(capsys, *files[0])
    assert (code, out) == (2, "") and err.startswith(f"error: {small / 'elsewhere'}: has neither")
    assert run(capsys, *files[0], "--meteor-data", small)[:2] == (0, expected)


def test_missing_tables_are_named_and_strict_refuses(files, capsys, monkeypatch):
    monkeypatch.delenv("METEOR_DATA")
    monkeypatch.setattr(meteor_data.importlib.util, "find_spec", lambda name: None)
    code, out, err = run(capsys, *files[0])
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and "METEOR[exact,stem]" in names and "METEOR" not in names
    assert "|meteor:1.5[exact,stem]|" in out.splitlines()[-1]
    assert len(err.splitlines()) == 1 and "install pycocoevalcap" in err and "--meteor-data" in err
    code, out, strict_err = run(capsys, *files[0], "--strict")
    assert (code, out, strict_err) == (2, "", f"error: {err}")


# --- bad input ----------------------------------------------------------------------------------------------------


def twice(content: dict) -> str:
    """JSON in which the first id stands twice."""
    first = json.dumps(dict([next(iter(content.items()))]))
    return first[:-1] + ", " + json.dumps(content)[1:]


@pytest.mark.parametrize(
    ("which", "content", "says"),
    [
        ("hyps", json.dumps(HYPS | {"v9": "a"}), "id 'v9' has no references in"),
        ("hyps", json.dumps({"v1": "a"}), "id 'v2', 'v3' has no hypothesis"),
        ("hyps", twice(HYPS), "id 'v1' occurs twice"),
        ("refs", twice(REFS), "id 'v1' occurs twice"),
        (
            "hyps",
            json.dumps([{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]),
            "id '1' occurs twice",
        ),
        ("hyps", json.dumps([{"image_id": 1}]), "[0]: expected an object with image_id and caption"),
        ("refs", json.dumps(REFS | {"v2": []}), ", id 'v2': has no references"),
        ("refs", json.dumps(REFS | {"v2": ["a", 5]}), ", id 'v2', caption 2: is a int, expected a string"),
        ("hyps", json.dumps(HYPS | {"v3": None}), ", id 'v3': is a NoneType, expected a string"),
        ("refs", "{}", ": has no videos"),
        ("refs", "", ": is empty, expected JSON"),
        ("hyps", " \n", ": is empty, expected JSON"),
        ("refs", "[1, 2]", ": is a list, expected {id:"),
        ("hyps", "3", ": is a int, expected {id:"),
        ("hyps", '{"v1": ', ": line 1, column 8: Expecting value, expected JSON"),
        ("refs", b"\xff\xfe", ": byte 0 is not UTF-8"),
        ("refs", pickle.dumps(REFS), ": is a pickle"),
        ("hyps", pickle.dumps(HYPS), ": is a pickle"),
        ("hyps", pickle.dumps(HYPS, protocol=0), ", expected JSON"),
        ("hyps", None, ": No such file or directory"),
        pytest.param("refs", "[" * 100_000, ": maximum recursion depth exceeded", id="deep"),
        pytest.param("refs", "1" * 5000, ", expected JSON", id="long number"),
    ],
)
def test_bad_files_are_one_line(files, capsys, which, content, says):
    path = files[1] if which == "refs" else files[2]
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    code, out, err = run(capsys, *files[0])
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}") and says in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--stric"], "unrecognized arguments: --stric"),
        (["--tokenizer", "moses"], "--tokenizer: invalid choice: 'moses'"),
        (["--metrics", "SPICE"], "--metrics: invalid choice: 'SPICE'"),
        (["--per-video"], "--per-video: expected one argument"),
    ],
)
def test_bad_flags_are_one_line(files, capsys, flags, says):
    code, out, err = run(capsys, *files[0], *flags)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    assert run(capsys)[0] == 2


def test_as_a_process(files):
    """The exit codes and streams of the real command, help included; Unicode whatever the locale."""
    done = command(*files[0])
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == SIGNATURE
    files[2].write_text(json.dumps(HYPS | {"кот": "x"}, ensure_ascii=False), encoding="utf-8")
    done = command(*files[0], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    done = command("--help")
    assert done.returncode == 0 and all(flag in done.stdout for flag in ("--strict", "--subset", "--per-video"))


def test_the_folder_works_alone(files, tmp_path):
    """Copied to another place, without the rest of the project and in another process."""
    shutil.copytree(ROOT / "metrics", tmp_path / "other" / "metrics", ignore=shutil.ignore_patterns("__pycache__"))
    done = command(*files[0], cwd=tmp_path / "other", PYTHONPATH="")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == SIGNATURE
    where = subprocess.run(
        [sys.executable, "-c", "import metrics, sys; print(metrics.__file__, *sys.modules)"],
        cwd=tmp_path / "other", env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    path, *modules = where.stdout.split()
    assert Path(path).parent == tmp_path / "other" / "metrics"
    assert not {"torch", "pycocoevalcap", "av", "weights", "cli"} & set(modules)
