"""Training as a user runs it, on a dataset of a few clips and tiny random models.

References: other runs of the same seed, bit for bit (one thread); the files themselves. How a run resumes, and what two
processes do, is in tests/reference.
"""

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import evaluate
import train
from common.config import Config, parse_args
from common.errors import InputError
from common.files import acquire_lock, fingerprint_of, read_json, write_json
from models import hub
from models.safetensors import read_safetensors
from tests import scripts
from tests.scripts import ROOT, TWELVE_STEPS, act_at_call, assert_error, contents, losses, read_log, run_forked, succeed
from training import frozen_models
from training.distributed import ProcessGroup
from video_data import shapes
from video_data.batches import Batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mllm_run(flags, tmp_path_factory) -> Path:
    """Three steps that adapt what an MLLM reads of each frame."""
    out = tmp_path_factory.mktemp("runs") / "mllm"
    succeed(train, *mllm_flags(flags), "--visual", "frames", "--write-back", "--grid", 2, "--out", out)
    return out


def mllm_flags(flags: list) -> list:
    return [*TWELVE_STEPS, "--mllm", ROOT / "backbones/tiny-mllm", "--data", flags[-1], "--frames", 2, "--epochs", 1]


# ------------------------------------------------------------------------------------ what a run is


def test_the_files_and_the_output_of_a_run(finished_run, backbones):
    config = read_json(finished_run / "config.json")
    assert [text.split()[0] for text in config["splits"].values()] == ["12", "4", "6"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (config["versions"]["commit"] or "").removesuffix("-dirty") == head  # both empty outside of a repository
    assert all(os.path.isabs(config["config"][name]) for name in ("data", "vit", "lm"))
    files = {f"{path.parent.name}/{path.name}" for name in ("vit", "lm") for path in (backbones / name).iterdir()}
    assert config["models"] == {name: fingerprint_of(backbones / name) for name in files}
    rows = read_log(finished_run)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["step"] for row in rows if "val" in row] == [0, 6, 12]
    assert all(len(row["gates"]) == 2 and row["clips/s"] > 0 and row["lr"] > 0 for row in steps)
    assert [row["elapsed"] for row in rows] == sorted(row["elapsed"] for row in rows)
    output, run = (finished_run / "stdout.txt").read_text(), shlex.quote(str(finished_run))
    python = shlex.quote(sys.executable.removeprefix(f"{Path.cwd()}/"))
    assert output.count("reference  ") == 5 and "left 0:0" in output
    assert f"sum{config['trained']:21,}{config['total']:14,}   trained: " in output
    assert output.endswith(f"look at its captions:  {run}/report.html\n"
                           f"caption your videos:   {python} evaluate.py {run} --video FILE\n"
                           f"train it longer:       {python} train.py --resume {run} --epochs 8\n")
    assert sorted(path.name for path in finished_run.iterdir()) == [
        "best", "config.json", "last", "lock", "log.jsonl", "report.html", "stdout.txt", "test.json", "val"]
    assert [path.name for path in sorted((finished_run / "last").iterdir())] == ["adapter.safetensors", "state.pt"]
    for row in (row for row in rows if "val" in row):
        stored = read_json(finished_run / f"val/{row['step']}.json")
        assert stored["scores"] == row["val"] and len(stored["captions"]) == 4
        assert all(f"  {name}: {caption}" in output for name, caption in list(stored["captions"].items())[:2])
    test = read_json(finished_run / "test.json")
    assert len(set(test["captions"].values())) == 6 and test["scores"]["CIDEr"] > 0, "captions tell clips apart"
    assert {"Bleu_4", "ROUGE_L", "CIDEr", "shapes right"} <= set(test["scores"])


def test_another_seed_gives_another_run(finished_run, flags, tmp_path):
    """That the same seed gives the same run is in tests/reference/test_06_resume.py."""
    succeed(train, *flags, "--out", tmp_path / "other", "--seed", 1)
    assert not losses(tmp_path / "other").equal(losses(finished_run))


def test_a_batch_is_processed_in_micro_batches():
    """5 clips in micro-batches of 2, or at once. Reference: the sum of the passes' losses, by 10 tokens, and its
    gradient; a loss of 3 w for each clip. See tests/reference/test_07_processes.py for runs."""
    weight, parts = torch.nn.Parameter(torch.tensor(2.0)), []

    def loss(captioner, batch):
        parts.append("".join(batch.clips))
        return 3 * weight * len(batch.frames)

    captioner, batch = torch.nn.ParameterList([weight]), Batch(torch.zeros(5, 1), None, None, [*"abcde"])
    assert train.accumulate_gradients(captioner, batch, loss, 10, 2) == 5 * 3 * 2 / 10 and weight.grad == 5 * 3 / 10
    assert train.accumulate_gradients(captioner, batch, loss, 10, None) == 3 and parts == ["ab", "cd", "e", "abcde"]


@pytest.mark.parametrize("words", [
    "--method none", "--method linear --cache-features --grid 2", "--method lora", "--method lora-lm",
    "--method adapter", "--method st-adapter --grid 2", "--method prompt", "--method full", "--write-back --gate none",
    "--precision bf16 --cache-features", "--deep-rank 4", "--mllm --deep-rank 4",
    "--image-size 128", "--mllm", "--mllm --method none --grid 2"])
def test_every_kind_of_run_is_evaluated_as_it_was_trained(words, finished_run, flags, tmp_path):
    """evaluate.py gives the captions and the CIDEr of the end of training, bit for bit."""
    base, out = mllm_flags(flags) if "--mllm" in words else [*flags, "--epochs", 1], tmp_path / "run"
    output = succeed(train, *base, *words.replace("--mllm", "").split(), "--out", out)
    assert len(losses(out)) == output.count("step 3/3") * 3 == (0 if "--method none" in words else 3)
    output = succeed(evaluate, out, "--save", tmp_path / "p.json", "--device", "cpu")
    test = read_json(out / "test.json")
    assert read_json(tmp_path / "p.json") == test["captions"]
    assert f"CIDEr {100 * test['scores']['CIDEr']:.1f}" in output and test["signature"] in output
    assert all(x.dtype == torch.float32 for x in read_safetensors(out / "last/adapter.safetensors").values())


def test_a_run_without_training_scores_and_resumes(flags, tmp_path):
    """`--method none` of an MLLM; that others start from its captions is in tests/reference/test_03_mllm.py."""
    output = succeed(train, *mllm_flags(flags), "--method", "none", "--grid", 2, "--out", tmp_path / "none")
    assert "trained: 0.00%" in output and "longer" not in output
    expected = {name: (tmp_path / "none" / name).read_bytes() for name in ("test.json", "val/0.json")}
    (tmp_path / "none/test.json").unlink()  # as if it had been killed
    succeed(train, "--resume", tmp_path / "none")
    assert {name: (tmp_path / "none" / name).read_bytes() for name in expected} == expected
    assert [row["step"] for row in read_log(tmp_path / "none")] == [0, 0]


def test_clips_of_your_own_are_trained_on(finished_run, flags, tmp_path):
    """A folder with captions.json. `--data` may move."""
    folder = shutil.copytree(flags[-1], tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    succeed(train, *flags, "--dataset", "folder", "--data", folder, "--epochs", 1, "--out", tmp_path / "run")
    folder.rename(tmp_path / "moved")
    assert_error(run_forked(evaluate, tmp_path / "run"), "expected the folder of the dataset")
    succeed(train, "--resume", tmp_path / "run", "--data", tmp_path / "moved", "--epochs", 2)
    assert "|data:folder val" in succeed(evaluate, tmp_path / "run", "--split", "val")  # in the folder that is stored


def test_other_data_than_those_of_the_run_are_noticed(finished_run, flags, tmp_path):
    """Another caption in the test split. What else is compared, see tests/video_data/test_datasets.py; that a score
    says so, tests/test_evaluate.py."""
    data = shutil.copytree(flags[-1], tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    content = read_json(data / "captions.json")
    content["test"]["test/00000.mp4"][0] = "a red circle"
    write_json(data / "captions.json", content)
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = contents(run)
    done = run_forked(train, "--resume", run, "--data", data)
    assert_error(done, f"{data}: expected the same ids, captions", "test: not the data of the run, 6 clips")
    assert contents(run) == before


def test_a_finished_run_is_trained_longer(finished_run, tmp_path):
    """6 epochs instead of 4: 18 steps, the first 12 are not done again; the run keeps the new number."""
    out = shutil.copytree(finished_run, tmp_path / "r")
    succeed(train, "--resume", out, "--epochs", 6)
    rows, before = read_log(out), [row for row in read_log(finished_run) if "test" not in row]
    assert rows[: len(before)] == before and [row["step"] for row in rows if "loss" in row] == [*range(1, 19)]
    assert read_json(out / "config.json")["config"]["epochs"] == [6]
    assert torch.load(out / "last/state.pt", weights_only=True)["step"] == 18
    assert_error(run_forked(train, "--resume", out, "--epochs", 2), "make 6 steps", "is at step 18")


@pytest.mark.parametrize("words", [[], ["--mllm"]])
def test_a_plan_trains_nothing(words, flags, tmp_path, monkeypatch):
    """The dataset of shapes, here of 22 clips, is made; neither a cache nor a run is."""
    monkeypatch.setattr(shapes, "make_dataset", partial(shapes.make_dataset, sizes=(12, 4, 6)))
    base = mllm_flags(flags) if words else [*flags, "--cache-features"]
    output = succeed(train, *base, "--data", tmp_path / "shapes", "--out", tmp_path / "run", "--plan")
    assert "steps of 4 clips" in output and "memory of a step on cpu" in output
    assert ("train features" in output) == (not words)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"] and not (tmp_path / "shapes/.cache").exists()


# --------------------------------------------------------------------------------------- the models


def test_default_models_and_pinned_commits(monkeypatch):
    """An MLLM, of the device, on msvd and msrvtt; a flag about a ViT or a language model asks for a pair, which is the
    default of the others. A run stores the commit of a hub id."""
    clip = "openai/clip-vit-base-patch16"
    for device, lm, mllm in ((CPU, "JackFram/llama-160m", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"),
                             (torch.device("cuda"), frozen_models.TINYLLAMA, "OpenGVLab/InternVL3_5-1B-HF")):
        expected = {"msvd": (mllm, None, None), "msrvtt --visual frames --write-back": (mllm, None, None),
                    "msvd --mllm m": ("m", None, None), "msrvtt --vit v": (None, "v", lm),
                    "msvd --lm l": (None, clip, "l"), "msrvtt --image-size 336": (None, clip, lm),
                    "msvd --vit-blocks 9": (None, clip, lm), "folder": (None, clip, lm),
                    "shapes": (None, "backbones/tiny-vit", "backbones/tiny-lm")}
        for words, names in expected.items():
            config = frozen_models.with_default_models(parse_args(["--dataset", *words.split()]), device)
            assert (config.mllm, config.vit, config.lm) == names, words
    config = frozen_models.with_default_models(Config(dataset="folder"), device)
    checks = {}
    monkeypatch.setattr(hub, "resolve", lambda name, check: checks.update({name: check}) or Path("/cache") / name)
    monkeypatch.setattr(hub, "pin_revision", lambda name, folder: f"{name}@abc")
    config, folders = frozen_models.resolve_models(config)
    assert config.vit == "openai/clip-vit-base-patch16@abc" and config.lm == f"{frozen_models.TINYLLAMA}@abc"
    assert folders["lm"] == Path("/cache") / frozen_models.TINYLLAMA and None not in checks.values()


@pytest.mark.parametrize("part, name", [("lm", "model.safetensors"), ("vit", "preprocessor_config.json"),
                                        ("mllm", "preprocessor_config.json"), ("lm", "generation_config.json")])
def test_a_run_of_other_models_is_refused(part, name, finished_run, mllm_run, backbones, tmp_path):
    """A copy of the folder is taken; with another last byte in one file, or a new file, it is named and refused."""
    run = shutil.copytree(mllm_run if part == "mllm" else finished_run, tmp_path / "run")
    model = shutil.copytree(ROOT / "backbones/tiny-mllm" if part == "mllm" else backbones / part, tmp_path / "model")
    succeed(evaluate, run, f"--{part}", model, "--split", "val", "--device", "cpu")
    content = (model / name).read_bytes() if (model / name).exists() else b"{}"
    (model / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if name.endswith("s") else content + b" ")
    done = run_forked(evaluate, run, f"--{part}", model, "--device", "cpu")
    assert_error(done, f"{run}/config.json: the run was trained with another model", f"{part}/{name}")
    config = read_json(run / "config.json")
    write_json(run / "config.json", config | {"config": config["config"] | {part: str(model)}})
    assert_error(run_forked(train, "--resume", run), "another model", f"{part}/{name}")


# ------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    """One bit of a tensor."""
    state = torch.load(path, weights_only=True)["tensors"] if path.suffix == ".pt" else read_safetensors(path)
    content = bytearray(path.read_bytes())
    content[content.index(state["adapter.queries"].detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    """A moment of the optimizer lacks a number."""
    state = torch.load(path, weights_only=True)
    moments = state["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].flatten()[:-1].clone()
    torch.save(state, path)


DAMAGE = {
    "short": shorten,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]), "flipped": flip, "gone": Path.unlink,
    "a pipe": lambda path: path.unlink() or os.mkfifo(path),  # reading it would wait for ever
    "no number": lambda path: path.write_bytes(b'{"step": null, "elapsed": 1}\n' + path.read_bytes()),
    "no phase": lambda path: path.write_bytes(path.read_bytes().replace(b'"phase"', b'"?"')),
    "for ever": lambda path: path.write_bytes(re.sub(rb'"elapsed": [^}]+', b'"elapsed": 1e300', path.read_bytes())),
}
OF_ALL = "cut", "gone", "a pipe"
DAMAGED = [*((script, name, kind) for kind in (*OF_ALL, "flipped") for script, name in (
               (train, "last/state.pt"), (train, "best/adapter.safetensors"), (evaluate, "best/adapter.safetensors"))),
           *((script, "config.json", kind) for script in (train, evaluate) for kind in OF_ALL),
           (train, "last/state.pt", "short"), (train, "lock", "a pipe"),
           *((train, "log.jsonl", kind) for kind in ("no number", "for ever", "no phase", "a pipe"))]


@pytest.mark.parametrize("script, name, kind", DAMAGED, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_file_of_a_run_is_named_and_nothing_is_changed(script, name, kind, finished_run, tmp_path):
    """Exit code 2, and one line; all files stay as they are."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    DAMAGE[kind](run / name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = run_forked(script, *([run] if script is evaluate else ["--resume", run]), "--device", "cpu")
    assert_error(done, str(run), name)
    assert len(done.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("n", [4, 7, 9, 12])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(n, finished_run, flags, tmp_path, monkeypatch):
    """From the n-th file on, no file may grow beyond 8,000 bytes: a checkpoint is larger. Reference: the run on a disk
    with space."""
    out = tmp_path / "run"
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    with act_at_call(os, "fsync", 2 * n, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))):
        done = run_forked(train, *flags, "--out", out)
    assert_error(done, f"cannot write {out}/", "File too large")
    assert not list(out.rglob(".*.tmp"))
    succeed(train, "--resume", out)
    assert contents(out)["files"] == contents(finished_run)["files"]


def test_a_run_has_one_writer(finished_run, flags, tmp_path):
    """While the lock is held, neither a resumed run nor a new one changes a file."""
    out = shutil.copytree(finished_run, tmp_path / "run")
    (new := tmp_path / "new").mkdir()
    before = contents(out)
    locks = [acquire_lock(folder / "lock", wait=False) for folder in (out, new)]
    assert_error(run_forked(train, "--resume", out), str(out), "another process")
    assert_error(run_forked(train, *flags, "--out", new), str(new), "another process")
    for lock in locks:
        os.close(lock)
    assert contents(out) == before and [path.name for path in new.iterdir()] == ["lock"]


def take_step(weight: torch.nn.Parameter, factor, step: int = 4, rank: int = 0) -> None:
    """Step number step + 1 of one process, whose loss is factor() times the weight."""
    captioner = Mock(config=Config(), parameters=lambda: iter([weight]))
    loss = Mock(side_effect=lambda *_: factor() * weight, terms=lambda _: 1)
    batch, optimizer = Batch(torch.zeros(3), None, None, "abc"), torch.optim.SGD([weight], 0.1)
    train.backward_and_step(captioner, optimizer, step, batch, loss, ProcessGroup(rank))


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_changes_no_weight(factor):
    weight = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(InputError, match="step 5: the loss is .*; last/ is unchanged"):
        take_step(weight, lambda: factor)
    assert weight == 1


def test_each_step_and_process_draws_other_numbers():
    """Hidden tokens and samples are drawn from them. The first step, done again, draws the same."""
    drawn = []
    for step, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        take_step(torch.nn.Parameter(torch.tensor(1.0)), lambda: drawn.append(torch.rand(1).item()) or 1.0, step, rank)
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["best/adapter.safetensors", "log.jsonl", "thesis.txt", "config.json"])
def test_a_folder_with_other_files_is_not_trained_into(flags, tmp_path, name):
    """Weights of a run whose config.json is lost, a thesis, another run: refused at once, and still there."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    done = run_forked(train, *flags, "--out", tmp_path / "out", "--data", tmp_path / "new")
    assert_error(done, f"{tmp_path}/out: holds")
    assert path.read_text() == "precious" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("words, message", [
    (["--queries", 300], "--queries, .* 256 positions at most"), (["--variant", "nope"], "one of gate-patch"),
    (["--last-blocks", 3], "--last-blocks 3: the ViT has 2 blocks"), (["--beams", 1000], "1000"),
    (["--vit", "gone"], "gone: expected a folder"), (["--image-size", 100], "size 16"),
    (["--batch-size", 64], "--batch-size 64: the dataset has only 12"), (["--grid", 2, "--method", "none"], "--grid 2"),
    (["--out", "/dev/null/x"], "--out /dev/null/x: cannot be written"),
])
def test_a_flag_that_does_not_fit_is_refused_before_a_run_is_made(words, message, flags, tmp_path):
    scripts.refuse(train, [*flags, "--out", tmp_path / "out", *words], message)
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line_for_a_user(flags, tmp_path):
    command = [sys.executable, "train.py", *map(str, flags), "--out", tmp_path / "none", "--lr", "nan"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | scripts.ENVIRONMENT, capture_output=True, text=True)
    assert_error(done, "--lr", "nan")


def test_compiled_blocks_compute_the_same(flags, monkeypatch):
    """The gradients of two clips, K 2, within 1e-5 of those of plain blocks; captions are not compiled. The graphs run
    without a C++ compiler here, which takes a minute."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend="eager", **how))
    torch.manual_seed(0)
    frames, found = torch.randint(256, (2, 8, 3, 64, 64), dtype=torch.uint8), {}
    labels = torch.randint(3, 100, (2, 2, 5))
    for words in ([], ["--compile"]):
        torch.manual_seed(1)
        config = replace(parse_args([*map(str, flags), *words]), precision="fp32")
        captioner, _ = train.load_captioner(config, torch.device("cpu"), ProcessGroup())
        captioner(frames, labels).backward()
        assert all((block._compiled_call_impl is not None) == bool(words) for block in captioner.lm.blocks)
        found[len(words)] = [parameter.grad for parameter in captioner.trained().values()], captioner.caption(frames)
    for plain, compiled in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5 * plain.abs().max())
    assert found[0][1] == found[1][1]
