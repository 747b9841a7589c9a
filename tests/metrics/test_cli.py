"""`python -m metrics`: its output and files; bad input gives one line and exit code 2.

Scores are compared with `metrics.score`, which test_score.py compares with pycocoevalcap. METEOR's tables are small.
"""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import metrics
from metrics import __main__ as program
from metrics import meteor_data
from metrics.__main__ import Progress, main

ROOT = Path(metrics.__file__).parent.parent
REFS = {"v1": ["A man runs.", "A kid is running fast."], "v2": ["The dog barks at the cat."], "v3": ["A lot of cars."]}
HYPS = {"v1": "a youngster is running", "v2": "the dog barks", "v3": "many automobiles"}
SIGNATURE = f"videos:3|refs:1-2|tok:ptb|meteor:1.5+syn+para|cider:d,n4,s6|v:{metrics.VERSION}"

pytestmark = pytest.mark.usefixtures("small_tables", "stopped_clock")


@pytest.fixture
def stopped_clock(monkeypatch):
    """However slow the machine is, the command takes no time, and so reports no progress."""
    monkeypatch.setattr(program, "time", SimpleNamespace(monotonic=lambda: 0.0))


@pytest.fixture
def files(tmp_path):
    """(flags that name the files, path of REFS, path of HYPS)."""
    paths = []
    for name, content in ("refs.json", REFS), ("hyps.json", HYPS):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(content), encoding="utf-8")
    return ["--references", str(paths[0]), "--hypotheses", str(paths[1])], *paths


def run_main(capsys, *flags):
    """(exit code, standard output, standard error) of the command, run in this process."""
    code = main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    return code, out, err


def run_process(*flags, cwd=ROOT, **environment):
    """The command in a process of its own (CompletedProcess)."""
    return subprocess.run(
        [sys.executable, "-m", "metrics", *map(str, flags)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


# --- output -------------------------------------------------------------------------------------------------------


def test_table_is_scaled_by_100(files, capsys):
    code, out, err = run_main(capsys, *files[0])
    expected = metrics.score(REFS, HYPS)
    *rows, signature = out.splitlines()
    assert code == 0 and signature == expected.signature == SIGNATURE
    assert [row.split() for row in rows] == [[name, f"{100 * x:.2f}"] for name, x in expected.corpus.items()]
    assert len(rows) == 7 and len(err.splitlines()) == 1 and "compiling METEOR's paraphrases" in err
    assert run_main(capsys, *files[0]) == (0, out, "")


def test_json_is_unscaled(files, capsys):
    code, out, _ = run_main(capsys, *files[0], "--json")
    expected = metrics.score(REFS, HYPS)
    assert code == 0 and json.loads(out) == expected.corpus | {"signature": SIGNATURE}


def test_per_video(files, capsys, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("an existing file")
    assert run_main(capsys, *files[0], "--per-video", path)[0] == 0
    with open(path, encoding="utf-8", newline="") as file:
        rows = {row.pop("id"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    assert rows == metrics.score(REFS, HYPS).per_video
    assert not [other for other in tmp_path.iterdir() if other.name.startswith("rows.csv") and other != path]
    assert path.stat().st_mode & 0o777 == files[1].stat().st_mode & 0o777
    code, out, err = run_main(capsys, *files[0], "--per-video", tmp_path / "none" / "rows.csv")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "rows.csv: expected a file" in err
    assert run_main(capsys, *files[0], "--per-video", tmp_path)[0] == 2
    before = files[1].read_bytes()
    (tmp_path / "link.json").symlink_to(files[1])
    code, out, err = run_main(capsys, *files[0], "--per-video", tmp_path / "link.json")
    assert (code, out) == (2, "") and "is one of the inputs" in err and files[1].read_bytes() == before


def test_scores_are_printed_though_their_file_cannot_be_written(files, capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "rows.csv"))

    monkeypatch.setattr(program, "write_csv", full)
    code, out, err = run_main(capsys, *files[0], "--per-video", tmp_path / "rows.csv")
    assert code == 2 and "CIDEr" in out and "No space left" in err


def test_per_video_to_a_pipe_or_a_link(files, capsys, tmp_path):
    """A pipe receives the rows and stays a pipe. A link stays a link and its target is replaced."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        assert run_main(capsys, *files[0], "--per-video", tmp_path / "pipe")[0] == 0
        assert len(reader.stdout.read().splitlines()) == 1 + len(HYPS)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "target.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    assert run_main(capsys, *files[0], "--per-video", tmp_path / "link.csv")[0] == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "target.csv").read_text().startswith("id,")


def test_closed_pipe(files):
    """Standard output is a pipe without a reader: exit code 141, no traceback."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "metrics", *files[0]], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert process.returncode == 141 and "Traceback" not in process.stderr


def test_ids_that_utf8_cannot_encode(capsys, tmp_path, files):
    """JSON may contain a lone surrogate."""
    files[1].write_text('{"\\ud800": ["a man"], "\\u043a\\u043e\\u0442": ["a dog"]}')
    files[2].write_text('{"\\ud800": "a man", "\\u043a\\u043e\\u0442": "a cat"}')
    assert run_main(capsys, *files[0], "--per-video", tmp_path / "rows.csv")[0] == 0
    lines = (tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines] == ["id", "\\ud800", "кот"]


def test_subset(files, capsys):
    files[2].write_text(json.dumps({"v2": "the dog barks", "v1": "a man runs"}))
    code, out, err = run_main(capsys, *files[0])
    assert (code, out) == (2, "") and "id 'v3' has no hypothesis" in err
    code, out, err = run_main(capsys, *files[0], "--subset")
    assert code == 0 and out.splitlines()[-1] == SIGNATURE.replace("videos:3", "videos:2/3")
    assert "scored 2 of 3 videos" in err.splitlines()


def test_tokenizer_none(files, capsys):
    _, out, _ = run_main(capsys, *files[0], "--tokenizer", "none", "--json")
    scores = json.loads(out)
    assert scores["signature"] == SIGNATURE.replace("tok:ptb", "tok:none")
    assert scores["ROUGE_L"] < metrics.score(REFS, HYPS).corpus["ROUGE_L"]


def test_metrics_without_meteor_need_no_tables(files, capsys, monkeypatch):
    monkeypatch.setattr(meteor_data, "find_files", lambda folder: pytest.fail("looked for METEOR's tables"))
    code, out, _ = run_main(capsys, *files[0], "--metrics", "CIDEr", "BLEU")
    names = [line.split()[0] for line in out.splitlines()[:-1]]
    assert code == 0 and names == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr"]
    assert "meteor" not in out.splitlines()[-1]


def test_coco_files(files, capsys):
    """COCO's annotations and results, with ids as numbers, give the same scores."""
    _, expected, _ = run_main(capsys, *files[0])
    texts = [(int(key[1]), text) for key, group in REFS.items() for text in group]
    files[1].write_text(json.dumps({"annotations": [{"image_id": i, "caption": text} for i, text in texts]}))
    files[2].write_text(json.dumps([{"image_id": int(key[1]), "caption": text} for key, text in HYPS.items()]))
    assert run_main(capsys, *files[0])[:2] == (0, expected)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_files_are_utf8(files, capsys, encoding):
    """With and without a byte order mark."""
    files[1].write_text(json.dumps({"кот": ["señora", "x"], "b": ["y"]}, ensure_ascii=False), encoding=encoding)
    files[2].write_text(json.dumps({"кот": "señora", "b": "y"}, ensure_ascii=False), encoding=encoding)
    code, out, _ = run_main(capsys, *files[0], "--json")
    assert code == 0 and json.loads(out)["ROUGE_L"] == 1.0


def test_progress_waits_two_seconds(capsys, monkeypatch):
    progress = Progress()
    progress("METEOR", 3, 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "start_time", progress.start_time - 2.1)
    progress("METEOR", 2, 3)  # not a terminal: only the final state is printed
    progress("METEOR", 3, 3)
    assert capsys.readouterr().err == "METEOR 3/3\n"


# --- METEOR's tables ----------------------------------------------------------------------------------------------


def test_meteor_data_flag(files, capsys, small_tables, monkeypatch):
    _, expected, _ = run_main(capsys, *files[0])
    monkeypatch.setenv("METEOR_DATA", str(small_tables / "elsewhere"))
    code, out, err = run_main(capsys, *files[0])
    assert (code, out) == (2, "") and err.startswith(f"error: {small_tables / 'elsewhere'}: has neither")
    assert run_main(capsys, *files[0], "--meteor-data", small_tables)[:2] == (0, expected)


def test_missing_tables_are_named_or_an_error_if_strict(files, capsys, monkeypatch):
    monkeypatch.delenv("METEOR_DATA")
    monkeypatch.setattr(meteor_data.importlib.util, "find_spec", lambda name: None)
    code, out, err = run_main(capsys, *files[0])
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and "METEOR[exact,stem]" in names and "METEOR" not in names
    assert "|meteor:1.5[exact,stem]|" in out.splitlines()[-1]
    assert len(err.splitlines()) == 1 and "install pycocoevalcap" in err and "--meteor-data" in err
    code, out, strict_err = run_main(capsys, *files[0], "--strict")
    assert (code, out, strict_err) == (2, "", f"error: {err}")


# --- bad input ----------------------------------------------------------------------------------------------------


def with_duplicate_id(content: dict) -> str:
    """JSON in which the first id occurs twice."""
    first = json.dumps(dict([next(iter(content.items()))]))
    return first[:-1] + ", " + json.dumps(content)[1:]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("hyps", json.dumps(HYPS | {"v9": "a"}), "id 'v9' has no references in"),
        ("hyps", json.dumps({"v1": "a"}), "id 'v2', 'v3' has no hypothesis"),
        ("hyps", with_duplicate_id(HYPS), "id 'v1' occurs twice"),
        ("refs", with_duplicate_id(REFS), "id 'v1' occurs twice"),
        (
            "hyps",
            json.dumps([{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}]),
            "id '1' occurs twice",
        ),
        ("hyps", json.dumps([{"image_id": 1}]), "[0]: expected an object with image_id and caption"),
        ("refs", json.dumps(REFS | {"v2": []}), ", id 'v2': has no references"),
        ("refs", json.dumps(REFS | {"v2": ["a", 5]}), ", id 'v2', caption 2: expected a string, found int"),
        ("hyps", json.dumps(HYPS | {"v3": None}), ", id 'v3': expected a string, found NoneType"),
        ("refs", "{}", ": has no videos"),
        ("refs", "", ": is empty, expected JSON"),
        ("hyps", " \n", ": is empty, expected JSON"),
        ("refs", "[1, 2]", ": expected {id: [caption, ...]} or COCO annotations, found list"),
        ("hyps", "3", ": expected {id: caption} or a list of COCO results, found int"),
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
def test_bad_files_give_one_line(files, capsys, file, content, message):
    path = files[1] if file == "refs" else files[2]
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    code, out, err = run_main(capsys, *files[0])
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}") and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--stric"], "unrecognized arguments: --stric"),
        (["--tokenizer", "moses"], "--tokenizer: invalid choice: 'moses'"),
        (["--metrics", "SPICE"], "--metrics: invalid choice: 'SPICE'"),
        (["--per-video"], "--per-video: expected one argument"),
    ],
)
def test_bad_flags_give_one_line(files, capsys, flags, message):
    code, out, err = run_main(capsys, *files[0], *flags)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert run_main(capsys)[0] == 2


def test_as_a_process(files):
    """Exit codes and streams of the real command and of --help; Unicode in any locale."""
    process = run_process(*files[0])
    assert process.returncode == 0 and process.stdout.splitlines()[-1] == SIGNATURE
    files[2].write_text(json.dumps(HYPS | {"кот": "x"}, ensure_ascii=False), encoding="utf-8")
    process = run_process(*files[0], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (process.returncode, process.stdout) == (2, "") and len(process.stderr.splitlines()) == 1
    assert "Traceback" not in process.stderr
    process = run_process("--help")
    assert process.returncode == 0 and all(flag in process.stdout for flag in ("--strict", "--subset", "--per-video"))


def test_folder_works_alone(files, tmp_path):
    """Copied elsewhere, without the rest of the project."""
    shutil.copytree(ROOT / "metrics", tmp_path / "other" / "metrics", ignore=shutil.ignore_patterns("__pycache__"))
    process = run_process(*files[0], cwd=tmp_path / "other", PYTHONPATH="")
    assert process.returncode == 0 and process.stdout.splitlines()[-1] == SIGNATURE
    imported = subprocess.run(
        [sys.executable, "-c", "import metrics, sys; print(metrics.__file__, *sys.modules, sep='\\n')"],
        cwd=tmp_path / "other", env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    path, *modules = imported.stdout.splitlines()
    assert Path(path).parent == tmp_path / "other" / "metrics"
    assert not {"torch", "pycocoevalcap", "av", "common", "models", "video_data", "training"} & set(modules)


@pytest.mark.parametrize("device", ["/dev/zero", "pipe"])
def test_what_might_never_end_is_not_read(files, capsys, tmp_path, device):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / device  # an absolute path stays as it is
    code, out, err = run_main(capsys, "--references", path, "--hypotheses", files[2])
    assert (code, out, err) == (2, "", f"error: {path}: is a pipe or a device, expected a JSON file\n")


def test_an_error_is_one_line_whatever_is_in_a_name(capsys, tmp_path, files):
    code, _, err = run_main(capsys, "--references", tmp_path / "a\nb\x1b[31m", "--hypotheses", files[2])
    assert code == 2 and err == f"error: {tmp_path}/a\\nb\\x1b[31m: No such file or directory, expected a JSON file\n"
    files[1].write_text(json.dumps({"x" * 10**6: 3}))
    assert len(run_main(capsys, *files[0])[2]) < 3000


def test_the_rows_are_checked_before_the_work_and_named_if_the_disk_is_full(files, capsys):
    """/proc takes no files, although its owner may write; /dev/full takes nothing."""
    code, out, err = run_main(capsys, *files[0], "--per-video", "/proc/rows.csv")
    assert (code, out) == (2, "") and err.startswith("error: --per-video /proc/rows.csv: expected a file in")
    code, out, err = run_main(capsys, *files[0], "--metrics", "BLEU", "--per-video", "/dev/full")
    assert code == 2 and "Bleu_4" in out and err == "error: --per-video /dev/full: No space left on device\n"


@pytest.mark.parametrize(("closed", "has_output"), [(">&-", False), ("2>&-", True), ("<&-", True)])
def test_streams_that_are_closed(files, closed, has_output):
    command = ["bash", "-c", f'"$0" -m metrics --metrics BLEU "$@" {closed}', sys.executable, *files[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and ("Bleu_4" in done.stdout) == has_output


def test_a_full_stream_loses_no_other_output(files, tmp_path):
    """The rows are written though the scores cannot be; an error that cannot be printed has its exit code."""
    words = [*map(str, files[0]), "--per-video", str(tmp_path / "rows.csv")]
    command = ["bash", "-c", '"$0" -m metrics --metrics BLEU "$@" >/dev/full', sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "No space left on device" in done.stderr
    assert (tmp_path / "rows.csv").read_text().startswith("id,")
    command = ["bash", "-c", '"$0" -m metrics --references gone --hypotheses gone 2>/dev/full', sys.executable]
    assert subprocess.run(command, cwd=ROOT).returncode == 2


def test_a_caption_of_too_many_letters_is_named(files, capsys):
    files[2].write_text(json.dumps(HYPS | {"v1": "n't" * 4000}))
    code, _, err = run_main(capsys, *files[0], "--metrics", "BLEU")
    assert code == 2 and "has 12,000 characters, expected at most 10,000" in err
