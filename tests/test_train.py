"""Training as a user runs it, on a dataset of a few clips and tiny random backbones.

References: an uninterrupted run with the same seed (bit for bit, one thread); the files themselves. The backbones are
written by `backbones.pretrain`; tests/models holds that layout to transformers' CLIPVisionModel and LlamaForCausalLM.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch

import evaluate
import qadapter
import train
from common.errors import InputError
from common.files import sha256_of
from models import hub
from models.lm import CausalLM
from models.mllm import MLLM
from models.safetensors import read_safetensors
from models.tokenizer import load_tokenizer
from models.vit import ViT
from tests.models.test_hub import COMMIT, Server
from tests.scripts import (
    ENVIRONMENT,
    ROOT,
    STEPS,
    ActAtCall,
    assert_one_line_error,
    read_log,
    run_forked,
    run_python,
)
from tests.video_data import test_datasets
from training.config import default_models, parse_args
from training.devices import DTYPES
from training.frozen_models import backbone_hashes
from training.inputs import cached_inputs
from video_data import annotations, shapes
from video_data.batches import cache_folder, cached_frames
from video_data.datasets import read_dataset


def same_tensors(one: Path, other: Path) -> bool:
    one, other = read_safetensors(one), read_safetensors(other)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


# ------------------------------------------------------------------------------------ what a run is


def test_the_files_and_the_output_of_a_run(finished_run):
    config = json.loads((finished_run / "config.json").read_text())
    assert config["splits"] == {"train": 12, "val": 4, "test": 6} and config["flags"]["epochs"] == 4
    assert all(len(sha) == 64 for sha in config["sha256"].values())
    rows = read_log(finished_run)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(len(row["gates"]) == 2 and row["clips/s"] > 0 and row["lr"] >= 0 for row in steps)
    assert [row["step"] for row in rows if "val" in row] == [0, 6, 12]
    for which in ("best", "last"):
        names = set(read_safetensors(finished_run / which / "adapter.safetensors"))
        assert names and all(n.startswith(("adapter.", "connector.")) for n in names)
    assert (finished_run / "last/state.pt").exists() and not (finished_run / "best/state.pt").exists()
    output, run = (finished_run / "stdout.txt").read_text(), shlex.quote(str(finished_run))
    assert output.count("reference  ") == 5 and "trained: " in output and "left 0:0" in output
    assert output.endswith(f"look at its captions:  {run}/report.html\n"
                           f"caption your videos:   python evaluate.py {run} --video FILE\n"
                           f"train it longer:       python train.py --resume {run} --epochs 8\n")  # fmt: skip
    test = json.loads((finished_run / "test.json").read_text())
    assert len(set(test["captions"].values())) == 6 and test["scores"]["CIDEr"] > 0, "captions tell clips apart"
    best, last = (finished_run / which / "adapter.safetensors" for which in ("best", "last"))
    assert best.read_bytes() != last.read_bytes()
    assert {"Bleu_4", "ROUGE_L", "CIDEr", "shapes right"} <= set(test["scores"])


def test_the_backbones_are_not_changed(finished_run, backbones):
    """config.json has the SHA-256 of each of their files, and the files still have it."""
    stored = json.loads((finished_run / "config.json").read_text())["sha256"]
    files = {f"{path.parent.name}/{path.name}" for name in ("vit", "lm") for path in (backbones / name).iterdir()}
    assert stored.keys() == files and all(sha256_of(backbones / name) == sha for name, sha in stored.items())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished_run, flags, tmp_path):
    """One thread: weights equal bit for bit."""
    for out, seed in ((tmp_path / "same", 0), (tmp_path / "other", 1)):
        assert run_forked(train, *flags, "--out", out, "--seed", seed).returncode == 0
    runs = (finished_run, tmp_path / "same", tmp_path / "other")
    weights = [(run / "last/adapter.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] != weights[2]


def test_gates_that_are_almost_all_saturated_are_reported():
    """Two blocks; the warning needs both of them saturated. Without a gate nothing is printed."""
    gates = {"gates": [0.371, 0.006], "saturated": [0.0, 0.951]}
    assert train.format_gates(gates) == "gates 0.37 0.01 (0 95 % saturated)  "
    assert "almost all saturated" in train.format_gates(gates | {"saturated": [0.91, 0.951]})
    assert "almost all saturated" in train.format_gates({"gates": [1.0, 1.0], "saturated": [1.0, 1.0]})
    assert train.format_gates({}) == ""


def test_validation_captions_are_stored_and_two_are_printed(finished_run):
    """Each val/STEP.json has all captions and the scores of that step's log row; two captions are in the output."""
    rows = {row["step"]: row["val"] for row in read_log(finished_run) if "val" in row}
    output = (finished_run / "stdout.txt").read_text()
    for step, scores in rows.items():
        stored = json.loads((finished_run / f"val/{step}.json").read_text())
        assert stored["scores"] == scores and len(stored["captions"]) == 4
        assert all(f"  {name}: {caption}" in output for name, caption in list(stored["captions"].items())[:2])
    assert sorted(path.name for path in (finished_run / "val").iterdir()) == sorted(f"{step}.json" for step in rows)


@pytest.mark.parametrize("name", ["best/adapter.safetensors", "last/thesis.txt", "log.jsonl", "best/0.mp4"])
def test_a_folder_with_other_files_is_not_trained_into(flags, tmp_path, name):
    """Weights of a run whose config.json is lost, videos, a thesis: refused at once, and still there."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    for more in ([], ["--method", "none"]):
        with pytest.raises(InputError, match=f"--out {tmp_path}/out: holds {name.partition('/')[0]}, expected a new"):
            train.parse_args([*map(str, flags), "--out", str(tmp_path / "out"), *more])
    assert path.read_text() == "precious"


def test_a_batch_is_processed_in_micro_batches():
    """5 clips in micro-batches of 2: three passes. Reference: the sum of the passes' losses, by 10 tokens, and its
    gradient; a loss of 3 w for each clip."""
    weight, sizes = torch.nn.Parameter(torch.tensor(2.0)), []

    def loss(frames, labels):
        sizes.append((len(frames), len(labels)))
        return 3 * weight * len(frames)

    captioner = Mock(side_effect=loss, parameters=lambda: iter([weight]))
    frames, labels = torch.zeros(5, 1), torch.zeros(5, 1, 4)
    assert train.accumulate_gradients(captioner, frames, labels, 10, 2) == 5 * 3 * 2 / 10
    assert sizes == [(2, 2), (2, 2), (1, 1)] and weight.grad == 5 * 3 / 10
    assert train.accumulate_gradients(captioner, frames, labels, 10, None) == 3 and sizes[3:] == [(5, 5)]


def test_a_run_of_more_than_a_day_is_reported_before_it_starts(flags, tmp_path, monkeypatch):
    """12 steps of 9,000 s each are 1.25 days."""
    monkeypatch.setattr(train, "seconds_per_step", lambda *_: 9000)
    done = run_forked(train, *flags, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("warning: the run takes 1.2 days") < done.stdout.index("step 1/12")


def test_micro_batches_train_as_the_whole_batch(finished_run, flags, tmp_path):
    """Reference: the run with whole batches of 4 clips; micro-batches of 3 clips and 1: losses within 1e-5."""
    out = tmp_path / "micro"
    done = run_forked(train, *flags, "--out", out, "--micro-batch-size", 3)
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in read_log(run) if "loss" in row] for run in (finished_run, out)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-5)


def test_each_step_and_block_hides_other_tokens(flags, tmp_path, monkeypatch):
    """Reference: what `random_visibility` gave in 12 steps, in the two that are timed before, and in no validation."""
    drawn, draw = tmp_path / "drawn.txt", qadapter.random_visibility

    def recorded(*args) -> torch.Tensor:
        visible = draw(*args)
        with drawn.open("a") as file:
            file.write(visible.byte().numpy().tobytes().hex() + "\n")
        return visible

    monkeypatch.setattr(qadapter, "random_visibility", recorded)
    done = run_forked(train, *flags, "--token-dropout", 0.5, "--last-blocks", 2, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    masks = drawn.read_text().splitlines()
    assert len(masks) == len(set(masks)) == (12 + 2) * 2


def test_passes_over_the_captions_make_the_epochs(flags, tmp_path):
    """12 clips of 6 captions, 2 a clip in an epoch: 0.7 passes are round(0.7 * 72 / 24) = 2 epochs. Less than a pass
    is said before the first step. Both flags at once are refused."""
    words = [*flags[: flags.index("--epochs")], *flags[flags.index("--epochs") + 2 :]]
    done = run_forked(train, *words, "--passes", 0.7, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    warning = "warning: the run sees only 0.67 of a pass over the training captions"
    assert warning in done.stdout and done.stdout.index(warning) < done.stdout.index("step 1/6")
    assert json.loads((tmp_path / "r/config.json").read_text())["flags"]["epochs"] == 2
    assert_one_line_error(run_forked(train, *flags, "--passes", 2, "--out", tmp_path / "n"), "--passes")


@pytest.mark.parametrize("method", ["linear", "lora", "adapter", "prompt", "full"])
def test_the_other_methods_run_and_save_what_they_train(method, flags, tmp_path):
    done = run_forked(train, *flags, "--out", tmp_path / "r", "--method", method, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    names = set(read_safetensors(tmp_path / "r/best/adapter.safetensors"))
    assert {"time_embed", "connector.weight", "connector.bias"} <= names
    assert any(".lora_" in n for n in names) == (method == "lora")
    assert any(".adapter_down." in n for n in names) == (method == "adapter")
    assert any(n.endswith(".prompts") for n in names) == (method == "prompt")
    assert ("lm.embed.weight" in names) == (method == "full")
    assert run_forked(evaluate, tmp_path / "r").returncode == 0


def test_bf16_trains_as_fp32_does(finished_run, flags, tmp_path):
    """Frozen weights in bf16: trained ones stay fp32, losses are within 2 % of those of fp32 and differ from them;
    evaluation computes in bf16 too."""
    out = tmp_path / "r"
    done = run_forked(train, *flags, "--precision", "bf16", "--out", out)
    assert done.returncode == 0 and "frozen weights in bf16 (--precision)" in done.stdout, done.stderr
    assert {tensor.dtype for tensor in read_safetensors(out / "last/adapter.safetensors").values()} == {torch.float32}
    losses = [torch.tensor([row["loss"] for row in read_log(run) if "loss" in row]) for run in (finished_run, out)]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)
    assert not losses[0].equal(losses[1])
    assert {p.dtype for p in evaluate.load_run(out)[0].lm.parameters()} == {torch.bfloat16}
    assert run_forked(evaluate, out, "--save", tmp_path / "p.json", "--device", "cpu").returncode == 0
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads((out / "test.json").read_text())["captions"]
    done = run_forked(train, *flags, "--precision", "bf16", "--out", tmp_path / "n", "--method", "full")
    assert_one_line_error(done, "bf16")


def test_cached_features_are_block_outputs(finished_run, flags, tmp_path):
    """A clip's features against the ViT's outputs, rounded to bf16: at most one rounding apart (rtol 2^-7); in bf16 the
    ViT rounds differently for another number of frames (atol 1e-2). Methods that change the ViT's work are refused."""
    for precision, dtype in DTYPES.items():
        words = [*flags, "--last-blocks", 1, "--cache-features", "--precision", precision]
        done = run_forked(train, *words, "--out", tmp_path / precision)
        assert done.returncode == 0, done.stderr
        captioner, stored = evaluate.load_run(tmp_path / precision)
        vit = captioner.vit
        args = parse_args([*map(str, words), "--out", str(tmp_path / "unused")])
        dataset = read_dataset("shapes", args.data, args.shapes_sizes)
        clips, root = dataset.splits["train"], cache_folder("shapes", args.data)
        frames = cached_frames(clips, root, "train", 8, vit.preprocessing)
        with torch.no_grad():
            expected = vit(vit.normalize(torch.from_numpy(np.array(frames[3]))).to(dtype))  # (8, P, D)
        hashes = backbone_hashes({part: Path(stored[part]) for part in ("vit", "lm")})
        with pytest.MonkeyPatch.context() as patch:
            encode = Mock(side_effect=captioner.block_outputs)
            patch.setattr(captioner, "block_outputs", encode)
            features = cached_inputs(args, dataset, captioner, hashes, torch.device("cpu"))["train"]
        assert not encode.called  # all are cached
        last, _ = evaluate.load_run(tmp_path / precision, "last")
        val = dataset.splits["val"]
        val_frames = cached_frames(val, root, "val", 8, vit.preprocessing)
        step = max(int(path.stem) for path in (tmp_path / precision / "val").iterdir())
        stored = json.loads((tmp_path / precision / f"val/{step}.json").read_text())["captions"]
        assert list(stored.values()) == evaluate.caption_split(last, val_frames, range(len(val)), 2)
        found = torch.from_numpy(np.array(features[3])).view(torch.bfloat16)[:, 0]  # (8, P, D)
        torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=1e-2 if precision == "bf16" else 1e-6)
    for more in (("--write-back",), ("--method", "lora")):
        done = run_forked(train, *flags, "--out", tmp_path / "n", "--cache-features", *more)
        assert_one_line_error(done, "--cache-features")


def test_another_image_size_is_stored_with_the_run(flags, tmp_path):
    """128 pixels for a ViT of 64: 64 patches a frame and not 16, in training and in evaluation."""
    done = run_forked(train, *flags, "--epochs", 1, "--image-size", 128, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    captioner, _ = evaluate.load_run(tmp_path / "run")
    assert captioner.vit.position.shape == (65, 16)
    done = run_forked(train, *flags, "--image-size", 100, "--out", tmp_path / "r")
    assert_one_line_error(done, "100", "patch size 16")


# --------------------------------------------------------------------------------- stop and resume


def test_ctrl_c_and_resume_end_as_the_uninterrupted_run(finished_run, flags, tmp_path, monkeypatch):
    """SIGINT in the fourth step, then `--resume`: final weights and log equal the uninterrupted run's."""
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        ActAtCall(patch, STEPS, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        done = run_forked(train, *flags, "--out", out)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert torch.load(out / "last/state.pt", weights_only=True)["step"] == 4
    assert read_safetensors(out / "last/adapter.safetensors")
    assert {p.name for p in out.iterdir() if p.is_dir()} <= {"best", "last", "val"}

    assert run_forked(train, "--resume", out).returncode == 0
    assert (out / "last/adapter.safetensors").read_bytes() == (finished_run / "last/adapter.safetensors").read_bytes()
    logs = [read_log(run) for run in (out, finished_run)]
    seconds = [row["elapsed"] for row in logs[0]]
    assert seconds == sorted(seconds) and seconds[0] > 0, "the time goes on after a resume"
    for row in logs[0] + logs[1]:
        row.pop("clips/s", None)
        row.pop("elapsed")
    assert logs[0] == logs[1]


def test_a_finished_run_is_trained_longer(finished_run, tmp_path):
    """6 epochs in place of 4: 18 steps, the first 12 are not done again; the run keeps the new number."""
    out = tmp_path / "r"
    shutil.copytree(finished_run, out)
    done = run_forked(train, "--resume", out, "--epochs", 6)
    assert done.returncode == 0, done.stderr
    assert f"python train.py --resume {shlex.quote(str(out))} --epochs 12" in done.stdout
    rows, before = read_log(out), [row for row in read_log(finished_run) if "test" not in row]
    assert rows[: len(before)] == before and [row["step"] for row in rows if "loss" in row] == [*range(1, 19)]
    assert json.loads((out / "config.json").read_text())["flags"]["epochs"] == 6
    assert torch.load(out / "last/state.pt", weights_only=True)["step"] == 18
    assert not same_tensors(out / "last/adapter.safetensors", finished_run / "last/adapter.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_within_a_step(number, flags, tmp_path):
    """SIGTERM counts as Ctrl-C: exit code 130 within 20 seconds, last/ complete."""
    command = [sys.executable, "train.py", *map(str, flags), "--out", tmp_path / "r", "--epochs", "500"]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert any(line.startswith(b"step 2/") for line in child.stdout)
    child.send_signal(number)
    start_time = time.monotonic()
    _, errors = child.communicate(timeout=60)
    assert b"Traceback" not in errors and child.returncode == 130 and time.monotonic() - start_time < 20
    assert torch.load(tmp_path / "r/last/state.pt", weights_only=True)["step"] >= 2


def test_a_crash_is_recovered_from_or_named(finished_run, flags, tmp_path):
    """A half-written log row and an interrupted renaming are repaired; another shape, a missing flag, a damaged state
    and a diverging loss are named."""
    out = tmp_path / "r"
    shutil.copytree(finished_run, out)
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 1')
    (out / "last").rename(out / "last.old")
    done = run_forked(train, "--resume", out)
    assert done.returncode == 0, done.stderr
    assert sum("test" in row for row in read_log(out)) == 1
    config = json.loads((out / "config.json").read_text())
    changed = config | {"adapter": config["adapter"] | {"heads": 4}}
    (out / "config.json").write_text(json.dumps(changed))
    assert_one_line_error(run_forked(evaluate, out), "adapter.safetensors", "config.json")
    del config["flags"]["epochs"]
    (out / "config.json").write_text(json.dumps(config))
    assert_one_line_error(run_forked(train, "--resume", out), "config.json", "'epochs'")
    config["flags"] |= {"epochs": 4, "heads": 4}
    (out / "config.json").write_text(json.dumps(config))
    assert_one_line_error(run_forked(train, "--resume", out), "adapter.safetensors")
    (out / "last/state.pt").write_bytes(b"PK")
    (out / "config.json").write_text((finished_run / "config.json").read_text())
    assert_one_line_error(run_forked(train, "--resume", out), "state.pt")
    assert_one_line_error(run_forked(train, *flags, "--out", tmp_path / "nan", "--lr", 1e30), "the loss is")
    assert read_safetensors(tmp_path / "nan/last/adapter.safetensors")


# --------------------------------------------------------------------------------- models and data


def test_a_checkpoint_of_other_backbones_is_refused(flags, backbones, tmp_path):
    lm = tmp_path / "lm"
    shutil.copytree(backbones / "lm", lm)
    done = run_forked(train, *flags, "--epochs", 1, "--out", tmp_path / "r", "--lm", lm)
    assert done.returncode == 0, done.stderr
    content = bytearray((lm / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (lm / "model.safetensors").write_bytes(bytes(content))
    assert_one_line_error(run_forked(evaluate, tmp_path / "r"), "adapter.safetensors", "another lm/model.safetensors")


def test_the_committed_backbones_load_and_stay_small():
    """The folders in backbones/: loaded strictly, at most 12 MB together, the tokenizer knows every word."""
    vit, lm = ViT.from_pretrained(ROOT / "backbones/tiny-vit"), CausalLM.from_pretrained(ROOT / "backbones/tiny-lm")
    assert MLLM.from_pretrained(ROOT / "backbones/tiny-mllm").config.family == "llava"
    tokenizer = load_tokenizer(ROOT / "backbones/tiny-lm")
    assert vit.config.image_size == shapes.SIDE and lm.config.vocab == len(tokenizer)
    assert sum(f.stat().st_size for f in (ROOT / "backbones").rglob("*") if "__pycache__" not in f.parts) < 12e6
    caption = shapes.describe(shapes.draw_scene(np.random.default_rng(0)), np.random.default_rng(0))
    ids = tokenizer.encode(caption)
    assert tokenizer.decode([ids]) == [caption] and tokenizer.processor.unk_id() not in ids


def test_backbones_come_from_the_hub_and_in_shards(finished_run, flags, backbones, tmp_path, monkeypatch):
    """The same files behind hub ids, the language model's split into shards: the run's own weights, bit for bit.

    The server is on this machine; after training it is closed, and evaluation needs it no more.
    """
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    server.publish({p.name: p.read_bytes() for p in (backbones / "vit").iterdir()}, repo="owner/vit")
    files = {p.name: p.read_bytes() for p in (backbones / "lm").iterdir()}
    tensors = read_safetensors(backbones / "lm/model.safetensors")
    del files["model.safetensors"]
    shards = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for shard, names in shards.items():
        files[shard] = safetensors.torch.save({n: tensors[n].contiguous() for n in names})
    weight_map = {n: shard for shard, names in shards.items() for n in names}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    server.publish(files, repo="owner/lm", revision="v1.0")
    done = run_forked(train, *flags, "--vit", "owner/vit", "--lm", "owner/lm@v1.0", "--out", tmp_path / "run")
    server.close()
    assert done.returncode == 0, done.stderr
    assert same_tensors(finished_run / "last/adapter.safetensors", tmp_path / "run/last/adapter.safetensors")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert [config["flags"][name] for name in ("vit", "lm")] == [f"owner/vit@{COMMIT}", f"owner/lm@{COMMIT}"]
    assert {"lm/a.safetensors", "lm/b.safetensors", "lm/model.safetensors.index.json"} < config["sha256"].keys()
    assert run_forked(evaluate, tmp_path / "run").returncode == 0


LAYOUTS = {"msvd": lambda folder: test_datasets.make_msvd(folder, 12), "msrvtt": test_datasets.make_msrvtt,
           "folder": test_datasets.make_folder}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_dataset_trains_and_is_scored(finished_run, flags, tmp_path, monkeypatch, capsys, name):
    """Folders in each layout with videos of shapes: scores at the end, the same from evaluate.py."""
    folder, shapes_clips = tmp_path / "data", (flags[-1] / "train").glob("*.mp4")
    folder.mkdir()
    LAYOUTS[name](folder)
    empty_files = [path for path in annotations.iter_files(folder) if not path.stat().st_size]
    for empty, clip in zip(empty_files, shapes_clips, strict=False):
        empty.write_bytes(clip.read_bytes())

    def output_of(script, *words) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        assert script.main() == 0
        return capsys.readouterr().out

    out, cache = tmp_path / "run", tmp_path / "cache"
    monkeypatch.setenv("QADAPTER_FRAMES", str(cache))
    output = output_of(train, *flags, "--dataset", name, "--data", folder, "--out", out,
                       "--batch-size", 2, "--epochs", 1)  # fmt: skip
    test, config = json.loads((out / "test.json").read_text()), json.loads((out / "config.json").read_text())
    assert test["scores"]["CIDEr"] >= 0 and test["signature"] in output and f"|data:{name} test" in test["signature"]
    assert ("670 are standard" in test["signature"]) == (name == "msvd")
    assert ("test: 3 clips, 670 are standard" in config["differences"]) == (name == "msvd")
    assert not (folder / ".cache").exists()
    assert len([path for path in cache.glob("*/*") if path.is_dir()]) == 3  # one folder a split
    assert test["signature"] in output_of(evaluate, out)
    assert f"|data:{name} val" in output_of(evaluate, out, "--split", "val")


def test_public_models_are_the_default_of_real_datasets():
    """TinyLlama where there is a GPU."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert default_models("shapes", gpu) == ("backbones/tiny-vit", "backbones/tiny-lm")
    for name in ("msvd", "msrvtt", "folder"):
        assert default_models(name, cpu) == ("openai/clip-vit-base-patch16", "JackFram/llama-160m")
        assert default_models(name, gpu)[1] == "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"


# ------------------------------------------------------------------------------------------ errors


def test_each_user_error_is_one_line(finished_run, flags, backbones, tmp_path, monkeypatch):
    """In this process, where `cli.run` would turn the InputError into exit code 2; one of them as a user sees it."""

    def refused(words, *expected: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        with pytest.raises(InputError) as error:
            train.main()
        assert str(error.value).isprintable() and all(word in str(error.value) for word in expected), error.value

    out = ["--out", tmp_path / "none"]
    assert_one_line_error(run_python("train.py", *flags, *out, "--frames", 0), "--frames", "at least 1")
    refused([*flags, *out, "--lr", "nan"], "--lr")
    refused([*flags, *out, "--weight-decay", -1], "--weight-decay", "at least 0")
    refused([*flags, *out, "--queries", 300], "300 visual tokens", "256")
    refused([*flags, *out, "--data", ROOT], str(ROOT), "shapes")
    refused([*flags, *out, "--shapes-sizes", 3, 4, 6], str(flags[-1]), "another folder")
    refused(["--resume", finished_run, "--epochs", 2], "config.json", "--epochs make 6 steps", "is at step 12")
    refused([*flags, *out, "--colour", "red"], "--colour")
    refused([*flags, *out, "--vit", tmp_path / "gone"], "gone", "expected a folder")
    refused([*flags, *out, "--vit", backbones / "lm"], "config.json", "model_type")
    refused([*flags, *out, "--per-frame", "--data", tmp_path / "new"], "--per-frame", "--queries 4", "--frames 8")
    refused([*flags, *out, "--rank", 5, "--data", tmp_path / "new"], "--rank 5", "--heads 2")
    refused([*flags, *out, "--queries", 10**7, "--data", tmp_path / "new"], "--queries", "at most 4096")
    refused([*flags, *out, "--captions-per-clip", 2**31, "--data", tmp_path / "new"], "--captions-per-clip")
    refused([*flags, *out, "--cache-features", "--method", "lora", "--data", tmp_path / "new"], "--cache-features")
    refused([*flags, *out, "--last-blocks", 3, "--data", tmp_path / "new"], "--last-blocks 3")
    refused([*flags, *out, "--batch-size", 64, "--data", tmp_path / "new"], "--batch-size 64")
    refused([*flags, *out, "--beams", 400, "--data", tmp_path / "new"], "--beams 400", "399")
    (tmp_path / "file").touch()
    refused([*flags, "--out", tmp_path / "file"], "--out", "cannot be written")
    assert not (tmp_path / "new").exists()  # refused before anything was made
    refused([*flags, *out, "--last-blocks", 3], "--last-blocks 3", "2")
    refused([*flags, *out, "--batch-size", 64], "--batch-size 64", "12")
    refused([*flags, "--out", finished_run], str(finished_run), "--resume")
    refused(["--resume", tmp_path / "gone"], "gone", "config.json")
    refused(["--resume", finished_run, "--data", tmp_path / "typo"], "--data", "typo")
    refused([*flags, "--out", "/dev/null/x"], "--out /dev/null/x")
    refused([*flags, "--out", ""], "--out", "expected a path")
    refused([*flags, *out, "--vit", ""], "expected a folder")
    refused([*flags, *out, "--image-size", 800000], "--image-size", "4096")
    assert not (tmp_path / "none").exists()
