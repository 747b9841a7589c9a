"""Interrupted runs, against the uninterrupted run of the same seed: weights, log and scores bit for bit (one thread).

A run, in a forked process, kills itself at its n-th step or at its n-th write to the disk.
"""

import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from common import files
from common.errors import InputError
from models.safetensors import read_safetensors
from tests.scripts import STEPS, ActAtCall, assert_one_line_error, run_forked
from training import run as run_module
from training.config import parse_args
from training.frozen_models import backbone_hashes
from training.inputs import cached_inputs
from video_data.batches import epoch_batches
from video_data.datasets import read_dataset

SAVE_OFTEN = ["--save-every", 2, "--token-dropout", 0.5]  # of 12 steps; validations are after 6 and 12


@pytest.fixture(scope="session")
def uninterrupted(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run_forked(train, *flags, *SAVE_OFTEN, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def contents(run: Path) -> tuple:
    """Everything in the folder of a run except its speed."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("clips/s", None)
        row.pop("elapsed")
    tensors = [(run / which / "adapter.safetensors").read_bytes() for which in ("best", "last")]
    state = torch.load(run / "last/state.pt", weights_only=True)
    moments = {key: value.tolist() for n, one in state["optimizer"]["state"].items() for key, value in one.items()}
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    names += [path.read_text() for path in sorted(run.glob("val/*.json"))]
    return rows, tensors, state["step"], state["best"], moments, json.loads((run / "test.json").read_text()), names


WRITES = [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (files._RecordingFile, "write"),
          (run_module, "append_row")]  # fmt: skip


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="session")
def writes(flags, tmp_path_factory) -> int:
    """The number of writes of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("count")
    with pytest.MonkeyPatch.context() as patch:
        ActAtCall(patch, WRITES, 0, kill_self, folder / "n")
        assert run_forked(train, *flags, *SAVE_OFTEN, "--out", folder / "run").returncode == 0
    return int((folder / "n").read_text())


@pytest.mark.parametrize("seed", range(10))
def test_a_killed_run_resumes_to_the_same_result(seed, flags, uninterrupted, writes, tmp_path):
    """SIGKILL at a random step (4 runs) or at a random write (6), every third run twice; seeds 0 to 9."""
    rng, out = random.Random(seed), tmp_path / "run"
    for turn in range(1 + (seed % 3 == 0)):
        functions, total = (STEPS, 12) if seed % 5 < 2 else (WRITES, writes)
        with pytest.MonkeyPatch.context() as patch:
            ActAtCall(patch, functions, rng.randint(1, total // (1 + turn)), kill_self)
            started = (out / "config.json").exists()
            done = run_forked(train, *(["--resume", out] if started else [*flags, *SAVE_OFTEN, "--out", out]))
        assert done.returncode in ({-signal.SIGKILL, 0} if turn else {-signal.SIGKILL}), done.stderr
        assert not (out / "config.json").exists() or read_safetensors(run_module.checkpoint_path(out, "last"))
    started = (out / "config.json").exists()
    done = run_forked(train, *(["--resume", out] if started else [*flags, *SAVE_OFTEN, "--out", out]))
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(uninterrupted)


def test_a_kill_at_each_write_of_a_checkpoint_leaves_the_old_or_the_new_one(uninterrupted, tmp_path):
    """SIGKILL before the n-th write, n = 1, 2, ... What is read then, and after `lock_run`, is a complete checkpoint:
    the old one up to some n, the new one from then on."""
    captioner, _ = evaluate.load_run(uninterrupted, "last")
    old, found = (uninterrupted / "last/adapter.safetensors").read_bytes(), []
    for n in range(1, 100):
        out = tmp_path / str(n)
        shutil.copytree(uninterrupted, out)
        if not (child := os.fork()):
            try:
                with pytest.MonkeyPatch.context() as patch:
                    ActAtCall(patch, WRITES, n, kill_self)
                    run_module.save_checkpoint(out / "last", captioner, {"new": "1"}, {"step": 99})
                os._exit(0)
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (-signal.SIGKILL, 0)
        before = run_module.checkpoint_path(out, "last")
        new = before.read_bytes() != old
        assert torch.load(before.with_name("state.pt"), weights_only=True)["step"] == (99 if new else 12)
        os.close(run_module.lock_run(out))
        after = run_module.checkpoint_path(out, "last")
        assert after == out / "last/adapter.safetensors" and (after.read_bytes() != old) == new
        assert {path.name for path in out.iterdir()} == {path.name for path in uninterrupted.iterdir()}
        found.append(new)
        if ended == 0:
            break
    assert n > 8 and found == sorted(found) and {*found} == {False, True}


def test_a_checkpoint_and_a_row_are_flushed_before_what_follows(uninterrupted, tmp_path, monkeypatch):
    """Each file's data, its rename, its folder; then the two folders' renames and theirs. A row: its data."""
    captioner, _ = evaluate.load_run(uninterrupted, "last")
    shutil.copytree(uninterrupted / "last", tmp_path / "last")
    calls = []
    for name in ("fsync", "replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    run_module.save_checkpoint(tmp_path / "last", captioner, {}, {"step": 1})
    assert calls == ["fsync", "replace", "fsync"] * 3 + ["rename", "rename", "fsync"]
    calls.clear()
    run_module.append_row(tmp_path / "log.jsonl", {"step": 1})
    assert calls == ["fsync"]


@pytest.mark.parametrize("seed", range(4))
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(seed, flags, uninterrupted, tmp_path):
    """ENOSPC after a random number of bytes, from one write or from all that follow; seeds 0 to 3."""
    out, room = tmp_path / "run", random.Random(seed).randint(60_000, 200_000)  # a checkpoint and config.json: 40,000

    class Disk(io.FileIO):
        def write(self, data):
            nonlocal room
            size = memoryview(data).nbytes
            if size > room:
                room = 0 if seed % 2 else 10**9  # from then on every write fails, or none
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            room -= size
            return super().write(data)

    class FullFile(files._RecordingFile, Disk):
        """Its write is that of `Disk`."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_RecordingFile", FullFile)
        done = run_forked(train, *flags, *SAVE_OFTEN, "--out", out)
    assert_one_line_error(done, str(out), "No space left on device")
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders <= {"best", "last", "val"} and read_safetensors(out / "last/adapter.safetensors")
    assert run_forked(train, "--resume", out).returncode == 0
    assert contents(out) == contents(uninterrupted)


def test_a_log_that_cannot_be_written_is_one_line(flags, uninterrupted, tmp_path, monkeypatch):
    """Half a row is written, then the disk is full: `--resume` ends as the uninterrupted run did."""
    out, plain = tmp_path / "run", builtins.open

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half_full(path, mode="r", *rest, **options):
        file = plain(path, mode, *rest, **options)
        full = str(path).endswith("log.jsonl") and mode == "a" and Path(path).read_text().count("\n") == 3
        return Half(file) if full else file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "open", half_full, raising=False)
        assert_one_line_error(run_forked(train, *flags, *SAVE_OFTEN, "--out", out), "log.jsonl", "No space left")
    assert not (out / "log.jsonl").read_text().endswith("\n")
    assert run_forked(train, "--resume", out).returncode == 0
    assert contents(out) == contents(uninterrupted)


def test_a_run_has_one_writer(flags, uninterrupted, tmp_path):
    """While the lock is held, neither a resumed run nor a new one changes a file."""
    out, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(uninterrupted, out)
    new.mkdir()
    before = contents(out)
    locks = run_module.lock_run(out), run_module.lock_run(new)
    assert_one_line_error(run_forked(train, "--resume", out), str(out), "another process")
    assert_one_line_error(run_forked(train, *flags, "--out", new), str(new), "another process")
    for lock in locks:
        os.close(lock)
    assert contents(out) == before and [path.name for path in new.iterdir()] == ["lock"]
    assert run_forked(train, "--resume", out).returncode == 0


def test_a_folder_without_config_is_no_run_yet(flags, uninterrupted, tmp_path):
    """After a kill before config.json is written, a new run may use the folder, and `--resume` is refused."""
    out = tmp_path / "run"
    shutil.copytree(uninterrupted / "last", out / "last")
    (out / "lock").touch()
    assert_one_line_error(run_forked(train, "--resume", out), str(out), "config.json")
    assert run_forked(train, *flags, *SAVE_OFTEN, "--out", out).returncode == 0
    assert contents(out) == contents(uninterrupted)


def test_a_loss_that_is_not_finite_names_step_and_clips(flags, tmp_path):
    """Infinity among the cached features of training clip 7: its first step is named, and it alone of its batch."""
    words = [*flags, *SAVE_OFTEN, "--cache-features", "--last-blocks", 1]
    assert run_forked(train, *words, "--out", tmp_path / "good").returncode == 0
    args = parse_args([*map(str, words), "--out", str(tmp_path / "unused")])
    captioner, stored = evaluate.load_run(tmp_path / "good")
    dataset = read_dataset("shapes", args.data, args.shapes_sizes)
    hashes = backbone_hashes({part: Path(stored[part]) for part in ("vit", "lm")})
    features = cached_inputs(args, dataset, captioner, hashes, torch.device("cpu"))["train"]
    features.write(7, np.full_like(features[7], 0x7F80))  # the bits of infinity in bf16
    done = run_forked(train, *words, "--out", tmp_path / "bad")
    batches = list(epoch_batches(12, 4, 4, 0))
    step = next(number for number, batch in enumerate(batches, 1) if 7 in [clip for clip, _ in batch])
    assert_one_line_error(done, f"step {step}: the loss is nan", f"not finite: {dataset.splits['train'][7].id}; ")
    good, bad = (torch.load(tmp_path / run / "last/state.pt", weights_only=True) for run in ("good", "bad"))
    assert good["step"] == 12 and bad["step"] == (step - 1) // 2 * 2


def test_half_a_checkpoint_is_refused(uninterrupted, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    (out / "last/state.pt").unlink()
    assert_one_line_error(run_forked(train, "--resume", out), "state.pt")
    shutil.copytree(uninterrupted, tmp_path / "other")
    (tmp_path / "other/last/adapter.safetensors").unlink()
    assert_one_line_error(run_forked(train, "--resume", tmp_path / "other"), "adapter.safetensors")


def test_a_run_past_its_last_step_is_refused(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    config = json.loads((uninterrupted / "config.json").read_text())
    config["flags"]["epochs"] = 2
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    done = run_forked(train, "--resume", tmp_path / "run")
    assert_one_line_error(done, "config.json: its flags or --epochs make 6 steps", "step 12")
    assert (tmp_path / "run/log.jsonl").read_bytes() == (uninterrupted / "log.jsonl").read_bytes()


def test_a_damaged_state_is_refused(uninterrupted, tmp_path):
    """40 times three random bytes changed (seeds 0 to 39), which may do no harm; empty and cut files; another shape."""
    good, optimizer = (uninterrupted / "last/state.pt").read_bytes(), None
    captioner, _ = evaluate.load_run(uninterrupted, "last")

    def load(content: bytes) -> None:
        (tmp_path / "state.pt").write_bytes(content)
        run_module.load_state(tmp_path / "state.pt", optimizer, torch.device("cpu"))

    for seed in range(40):
        optimizer = torch.optim.AdamW(captioner.trained().values(), fused=True)
        rng, content = random.Random(seed), bytearray(good)
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            load(bytes(content))
        except InputError as error:
            assert str(error).startswith(f"{tmp_path}/state.pt: not the state of this run: ")
    state = torch.load(io.BytesIO(good), weights_only=True)
    moments = state["optimizer"]["state"][0]
    wrapped = [state | {"optimizer": state["optimizer"] | {"state": state["optimizer"]["state"] | {
        0: moments | {name: [moments[name]]}}}} for name in moments]  # fmt: skip
    others = state | {"step": -1}, {"step": 1, "best": 0.0}, state | {"optimizer": 3}, state | {"best": None}
    for damaged in (*wrapped, *others):
        torch.save(damaged, file := io.BytesIO())
        optimizer = torch.optim.AdamW(captioner.trained().values(), fused=True)
        with pytest.raises(InputError, match="not the state of this run: ."):
            load(file.getvalue())
    for content in (b"", good[:100], good[:-100]):
        with pytest.raises(InputError, match="not the state of this run: ."):
            load(content)
    (tmp_path / "state.pt").unlink()
    os.mkfifo(tmp_path / "state.pt")  # reading it would wait for ever
    with pytest.raises(InputError, match="state.pt: not the state of this run: .*expected a file"):
        run_module.load_state(tmp_path / "state.pt", optimizer, torch.device("cpu"))
    (tmp_path / "state.pt").unlink()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(p[None]) for p in captioner.trained().values()], fused=True)
    with pytest.raises(InputError, match="a moment is .*, expected"):
        load(good)


@pytest.mark.parametrize(("name", "script"), [("last/state.pt", train), ("last/adapter.safetensors", train),
                                              ("best/adapter.safetensors", train),
                                              ("best/adapter.safetensors", evaluate)])  # fmt: skip
def test_a_flipped_bit_of_a_checkpoint_is_noticed(uninterrupted, tmp_path, name, script):
    """One bit in the middle of the file, where the tensors are; a checkpoint of version 0.6 has no checksums."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    path = tmp_path / "run" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    words = (script, tmp_path / "run") if script is evaluate else (script, "--resume", tmp_path / "run")
    log = (tmp_path / "run/log.jsonl").read_bytes()
    assert_one_line_error(run_forked(*words), f"{path}: is damaged")
    assert "best" in name or (tmp_path / "run/log.jsonl").read_bytes() == log
    path.with_name("sha256.json").unlink()
    assert run_forked(*words).returncode == 0


def test_a_best_checkpoint_that_is_no_more_is_found_before_the_log_is_cut(uninterrupted, tmp_path):
    """It is read again after training."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run/best/adapter.safetensors").unlink()
    (tmp_path / "run/best/sha256.json").unlink()
    assert_one_line_error(run_forked(train, "--resume", tmp_path / "run"), "best/adapter.safetensors")
    assert (tmp_path / "run/log.jsonl").read_bytes() == (uninterrupted / "log.jsonl").read_bytes()


def test_a_folder_in_the_place_of_a_result_is_found_before_the_log_is_cut(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run/test.json").unlink()
    (tmp_path / "run/test.json").mkdir()
    done = run_forked(train, "--resume", tmp_path / "run", "--epochs", 9)
    assert_one_line_error(done, "test.json: expected a file, found a folder")
    assert (tmp_path / "run/log.jsonl").read_bytes() == (uninterrupted / "log.jsonl").read_bytes()


def test_a_damaged_row_of_the_log_is_named_unless_it_is_the_last(uninterrupted, tmp_path):
    """Rows that are no object, without a step or with one that is no number, and bad bytes: nothing is deleted."""
    path = tmp_path / "log.jsonl"
    rows = (uninterrupted / "log.jsonl").read_bytes().splitlines()
    for bad in (b"[]", b"3", b'{"a": 1}', b'{"step": null}', b'{"step": 1, "loss": 2', b"\xff\xfe",
                b'{"step": 1, "lo\xffss": 2}', b'{"step": 1, "elapsed": "x"}'):  # fmt: skip
        damaged = b"\n".join([rows[0], bad, *rows[1:]])
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"log\.jsonl: line 2"):
            run_module.truncate_log(path, 12)
        assert path.read_bytes() == damaged
        path.write_bytes(b"\n".join([*rows[:3], bad]))
        run_module.truncate_log(path, 12)
        assert path.read_bytes() == b"\n".join(rows[:3]) + b"\n"


def test_a_run_resumes_with_data_that_moved(flags, uninterrupted, tmp_path):
    """`--data` beside `--resume` is stored in config.json."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.copytree(flags[-1], tmp_path / "moved", copy_function=shutil.copy2)
    assert run_forked(train, "--resume", tmp_path / "run", "--data", tmp_path / "moved").returncode == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["flags"]["data"] == str(tmp_path / "moved")
    assert contents(tmp_path / "run")[:-2] == contents(uninterrupted)[:-2]


def test_an_unknown_precision_is_refused(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["flags"]["precision"] = "fp8"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config.json: flags: precision is 'fp8'"):
        evaluate.load_run(tmp_path / "run")
