"""Runs that are cut short, against the uninterrupted run of the same seed: weights, log and scores bit for bit (one
thread). A run is killed by itself, in a forked process, at its n-th step or its n-th write to the disk.
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
from test_train import one_line_error, quick

import runs
import train
import weights
from weights import InputError, read_safetensors

SHORT = ["--save-every", 2]  # of 12 steps; validations are after 6 and 12


@pytest.fixture(scope="session")
def whole(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    done = quick(train, *flags, *SHORT, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def left(run: Path) -> tuple:
    """All that a run leaves, but how fast it was."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("clips/s", None)
    kept = [(run / which / "adapter.safetensors").read_bytes() for which in ("best", "last")]
    state = torch.load(run / "last/state.pt", weights_only=True)
    moments = {key: value.tolist() for n, one in state["optimizer"]["state"].items() for key, value in one.items()}
    names = sorted(path.name for path in run.iterdir())
    return rows, kept, state["step"], state["best"], moments, json.loads((run / "test.json").read_text()), names


class Killed:
    """Counts the calls of some functions in this process and its forked ones; the n-th calls `end` first."""

    def __init__(self, monkeypatch, functions: list[tuple[object, str]], n: int, end, counted: Path | None = None):
        self.calls, self.n, self.end, self.counted = 0, n, end, counted
        for owner, name in functions:
            monkeypatch.setattr(owner, name, self.counting(getattr(owner, name)))

    def counting(self, function):
        def call(*args, **options):
            self.calls += 1
            if self.counted:
                self.counted.write_bytes(str(self.calls).encode())
            if self.calls == self.n:
                self.end()
            return function(*args, **options)

        return call


STEPS = [(torch.optim.AdamW, "step")]
WRITES = [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (weights._Target, "write"),
          (runs, "add_row")]  # fmt: skip


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="session")
def writes(flags, tmp_path_factory) -> int:
    """How many writes a whole run is."""
    folder = tmp_path_factory.mktemp("count")
    with pytest.MonkeyPatch.context() as patch:
        Killed(patch, WRITES, 0, kill_self, folder / "n")
        assert quick(train, *flags, *SHORT, "--out", folder / "run").returncode == 0
    return int((folder / "n").read_text())


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_goes_on_as_if_nothing_had_been(seed, flags, whole, writes, tmp_path):
    """SIGKILL at a random step (8 runs) or at a random write (12), every third run twice; seeds 0 to 19."""
    rng, out = random.Random(seed), tmp_path / "run"
    for turn in range(1 + (seed % 3 == 0)):
        at, most = (STEPS, 12) if seed % 5 < 2 else (WRITES, writes)
        with pytest.MonkeyPatch.context() as patch:
            Killed(patch, at, rng.randint(1, most // (1 + turn)), kill_self)
            begun = (out / "config.json").exists()
            done = quick(train, *(["--resume", out] if begun else [*flags, *SHORT, "--out", out]))
        assert done.returncode in ({-signal.SIGKILL, 0} if turn else {-signal.SIGKILL}), done.stderr
        assert not (out / "config.json").exists() or read_safetensors(runs.checkpoint(out, "last"))
    begun = (out / "config.json").exists()
    done = quick(train, *(["--resume", out] if begun else [*flags, *SHORT, "--out", out]))
    assert done.returncode == 0, done.stderr
    assert left(out) == left(whole)


def test_a_kill_at_each_moment_of_a_checkpoint_leaves_the_old_or_the_new(whole, tmp_path):
    """SIGKILL before the n-th write, n = 1, 2, ..., until none is left: what is read then, and after `take`, is a whole
    checkpoint, the old one at first and from some n on the new one."""
    captioner, _ = runs.load_run(whole, "last")
    old, found = (whole / "last/adapter.safetensors").read_bytes(), []
    for n in range(1, 100):
        out = tmp_path / str(n)
        shutil.copytree(whole, out)
        if not (child := os.fork()):
            try:
                with pytest.MonkeyPatch.context() as patch:
                    Killed(patch, WRITES, n, kill_self)
                    runs.save_checkpoint(out / "last", captioner, {"new": "1"}, {"step": 99})
                os._exit(0)
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (-signal.SIGKILL, 0)
        before = runs.checkpoint(out, "last")
        new = before.read_bytes() != old
        assert torch.load(before.with_name("state.pt"), weights_only=True)["step"] == (99 if new else 12)
        os.close(runs.take(out))
        after = runs.checkpoint(out, "last")
        assert after == out / "last/adapter.safetensors" and (after.read_bytes() != old) == new
        assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
        found.append(new)
        if ended == 0:
            break
    assert n > 8 and found == sorted(found) and {*found} == {False, True}


def test_a_checkpoint_and_a_row_are_on_the_disk_before_what_follows(whole, tmp_path, monkeypatch):
    """Each file's data, its rename, its folder; then the two folders' renames and theirs. A row: its data."""
    captioner, _ = runs.load_run(whole, "last")
    shutil.copytree(whole / "last", tmp_path / "last")
    calls = []
    for name in ("fsync", "replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    runs.save_checkpoint(tmp_path / "last", captioner, {}, {"step": 1})
    assert calls == ["fsync", "replace", "fsync"] * 2 + ["rename", "rename", "fsync"]
    calls.clear()
    runs.add_row(tmp_path / "log.jsonl", {"step": 1})
    assert calls == ["fsync"]


@pytest.mark.parametrize("seed", range(6))
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(seed, flags, whole, tmp_path):
    """ENOSPC after a random number of bytes, from one write or from all that follow; seeds 0 to 5."""
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

    class Target(weights._Target, Disk):
        """The write of `_Target` is that to `Disk`."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_Target", Target)
        done = quick(train, *flags, *SHORT, "--out", out)
    one_line_error(done, str(out), "No space left on device")
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders <= {"best", "last"} and read_safetensors(out / "last/adapter.safetensors")
    assert quick(train, "--resume", out).returncode == 0
    assert left(out) == left(whole)


def test_a_log_that_cannot_be_written_is_one_line(flags, whole, tmp_path, monkeypatch):
    """Half a row is written, then the disk is full: `--resume` ends as the whole run did."""
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
        patch.setattr(runs, "open", half_full, raising=False)
        one_line_error(quick(train, *flags, *SHORT, "--out", out), "log.jsonl", "No space left")
    assert not (out / "log.jsonl").read_text().endswith("\n")
    assert quick(train, "--resume", out).returncode == 0
    assert left(out) == left(whole)


def test_a_run_has_one_writer(flags, whole, tmp_path):
    """While the lock is held neither a run that goes on nor one that begins there changes a file."""
    out, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(whole, out)
    new.mkdir()
    before = left(out)
    files = runs.take(out), runs.take(new)
    one_line_error(quick(train, "--resume", out), str(out), "another process")
    one_line_error(quick(train, *flags, "--out", new), str(new), "another process")
    for file in files:
        os.close(file)
    assert left(out) == before and [path.name for path in new.iterdir()] == ["lock"]
    assert quick(train, "--resume", out).returncode == 0


def test_a_folder_without_config_is_no_run_yet(flags, whole, tmp_path):
    """What a kill before config.json leaves is written over by a run that begins there, and refused to `--resume`."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "config.json").unlink()
    one_line_error(quick(train, "--resume", out), str(out), "config.json")
    assert quick(train, *flags, *SHORT, "--out", out).returncode == 0
    assert left(out) == left(whole)


def test_a_loss_that_is_not_finite_names_step_and_clips(flags, tmp_path):
    """Infinity among the kept features of one training clip: its first step is named, and it alone of its batch."""
    kept = ["--cache-features", "--last-blocks", 1, "--cache", tmp_path / "kept"]
    assert quick(train, *flags, *SHORT, *kept, "--out", tmp_path / "good").returncode == 0
    path = next((tmp_path / "kept").rglob("*.features"))
    features = np.memmap(path, np.uint16, "r+").reshape(12, -1)
    features[7] = 0x7F80
    features.flush()
    done = quick(train, *flags, *SHORT, *kept, "--out", tmp_path / "bad")
    batches = list(train.data.order(12, 4, 4, 0))
    step = next(number for number, batch in enumerate(batches, 1) if 7 in [clip for clip, _ in batch])
    clips = json.loads((Path(flags[-1]) / "captions.json").read_text())["train"]
    one_line_error(done, f"step {step}: the loss is nan", f"not finite: {sorted(clips)[7]}; ")
    good, bad = (torch.load(tmp_path / run / "last/state.pt", weights_only=True) for run in ("good", "bad"))
    assert good["step"] == 12 and bad["step"] == (step - 1) // 2 * 2


def test_a_lost_half_of_a_checkpoint_is_refused(flags, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "last/state.pt").unlink()
    one_line_error(quick(train, "--resume", out), "state.pt")
    shutil.copytree(whole, tmp_path / "other")
    (tmp_path / "other/last/adapter.safetensors").unlink()
    one_line_error(quick(train, "--resume", tmp_path / "other"), "adapter.safetensors")


def test_a_run_that_is_past_its_end_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    config = json.loads((whole / "config.json").read_text())
    config["flags"]["epochs"] = 2
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    one_line_error(quick(train, "--resume", tmp_path / "run"), "config.json: flags: make 6 steps", "step 12")
    assert (tmp_path / "run/log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_a_damaged_state_is_refused(flags, whole, tmp_path):
    """Nothing in it; 40 times three random bytes changed (seeds 0 to 39), which may also do no harm; another shape."""
    good, optimizer = (whole / "last/state.pt").read_bytes(), None
    captioner, _ = runs.load_run(whole, "last")

    def load(content: bytes) -> None:
        (tmp_path / "state.pt").write_bytes(content)
        runs.load_state(tmp_path / "state.pt", optimizer, torch.device("cpu"))

    for seed in range(40):
        optimizer = torch.optim.AdamW(captioner.trained().values(), fused=True)
        rng, content = random.Random(seed), bytearray(good)
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            load(bytes(content))
        except InputError as error:
            assert str(error).startswith(f"{tmp_path}/state.pt: not the state of this run: ")
    for content in (b"", good[:100], good[:-100]):
        with pytest.raises(InputError, match="not the state of this run: ."):
            load(content)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(p[None]) for p in captioner.trained().values()], fused=True)
    with pytest.raises(InputError, match="a moment is .*, expected"):
        load(good)


def test_a_run_goes_on_with_data_that_moved(flags, whole, tmp_path):
    """`--data` beside `--resume` is what the run's config says from then on."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(flags[-1], tmp_path / "moved", copy_function=shutil.copy2)
    assert quick(train, "--resume", tmp_path / "run", "--data", tmp_path / "moved").returncode == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["flags"]["data"] == str(tmp_path / "moved")
    assert left(tmp_path / "run")[:-2] == left(whole)[:-2]


def test_a_precision_that_is_none_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["flags"]["precision"] = "fp8"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config.json: flags: precision is 'fp8'"):
        runs.load_run(tmp_path / "run")
