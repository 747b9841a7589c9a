"""Training and evaluation as a user runs them, on a dataset of a few clips and tiny random backbones.

References: an uninterrupted run with the same seed (bit for bit, one thread); the files themselves.
Backbones: transformers' own CLIPVisionModel and LlamaForCausalLM would do as well; ours are written
with `pretrain.save`, which test_vit.py and test_lm.py hold to the public layout.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest
import safetensors.torch
import test_corpora
import torch
from test_hub import COMMIT, Server

import cli
import evaluate
import flags as flags_of_train
import hub
import runs
import shapes
import sources
import train
from devices import DTYPES
from lm import CausalLM
from tokens import load_tokenizer
from vit import ViT
from weights import InputError, read_safetensors

ROOT = Path(__file__).parent.parent
ALONE = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}


def python(*words, **options) -> subprocess.CompletedProcess:
    """A script in an interpreter of its own."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | ALONE, capture_output=True, text=True, **options)


def split_off(script, words: Sequence, out, err, environment: dict) -> int:
    """Begins a script in a process split off this one, which has imported everything already; -> its number."""
    if not (child := os.fork()):
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        sys.argv = [script.__name__, *map(str, words)]
        os.environ.update(environment)
        os.chdir(ROOT)
        warnings.simplefilter("error")
        code = 1
        try:
            cli.run(script.main)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def codes_of(children: list[int], patience: float = 120) -> list[int]:
    """The exit codes of processes; one that still runs 5 seconds after another failed is killed."""
    codes, last = {}, time.monotonic() + patience
    try:
        while len(codes) < len(children):
            for child in children:
                if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                    codes[child] = os.waitstatus_to_exitcode(ended[1])
                    last = min(last, time.monotonic() + 5) if codes[child] else last
            if time.monotonic() > last:
                break
            time.sleep(0.005)
    finally:
        for child in children:
            if child not in codes:
                os.kill(child, signal.SIGKILL)
                codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [codes[child] for child in children]


def quick(script, *words, environments: Sequence[dict] = ({},), meanwhile=None) -> subprocess.CompletedProcess:
    """A script in a process split off this one, or in one for each of these environments at once. `meanwhile` is called
    with their numbers. -> the first exit code that is not 0, and what all of them print."""
    with TemporaryFile("w+b", buffering=0) as out, TemporaryFile("w+b", buffering=0) as err:
        children = [split_off(script, words, out, err, environment) for environment in environments]
        try:
            if meanwhile:
                meanwhile(children)
        finally:
            codes = codes_of(children)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess([script.__name__, *words], next(filter(None, codes), 0), *texts)


@pytest.fixture(scope="session")
def run(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = python("train.py", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out


def one_line_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and, last on stderr, one line that names what is wrong; no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert lines[-1].startswith("error: ") and all(w in lines[-1] for w in words), done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_leaves_what_it_promises(run):
    config = json.loads((run / "config.json").read_text())
    assert config["splits"] == {"train": 12, "val": 4, "test": 6} and config["flags"]["epochs"] == 4
    assert all(len(sha) == 64 for sha in config["sha256"].values())
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(len(row["gates"]) == 2 and row["clips/s"] > 0 and row["lr"] >= 0 for row in steps)
    assert [row["step"] for row in rows if "val" in row] == [6, 12]
    for which in ("best", "last"):
        names = set(read_safetensors(run / which / "adapter.safetensors"))
        assert names and all(n.startswith(("adapter.", "connector.")) for n in names)
    assert (run / "last/state.pt").exists() and not (run / "best/state.pt").exists()
    said = (run / "stdout.txt").read_text()
    assert said.count("reference  ") == 5 and "trained: " in said and "left 0:0" in said
    test = json.loads((run / "test.json").read_text())
    assert len(set(test["captions"].values())) == 6 and test["scores"]["CIDEr"] > 0, "captions tell clips apart"
    assert (run / "best/adapter.safetensors").read_bytes() != (run / "last/adapter.safetensors").read_bytes()
    assert {"Bleu_4", "ROUGE_L", "CIDEr", "shapes right"} <= set(test["scores"])


def test_the_backbones_are_not_changed(run, flags, backbones):
    """The checkpoint holds no tensor of theirs, and their files are what the run's config says they were."""
    from weights import sha256_of

    told = json.loads((run / "config.json").read_text())["sha256"]
    files = {f"{path.parent.name}/{path.name}" for name in ("vit", "lm") for path in (backbones / name).iterdir()}
    assert told.keys() == files and all(sha256_of(backbones / name) == sha for name, sha in told.items())


def test_bf16_trains_what_fp32_trains(run, flags, tmp_path):
    """Frozen weights in bf16: trained ones stay fp32, losses are within 2 % of those of fp32, and differ; evaluation
    computes as training did."""
    out = tmp_path / "r"
    done = quick(train, *flags, "--precision", "bf16", "--out", out)
    assert done.returncode == 0 and "frozen weights in bf16 (--precision)" in done.stdout, done.stderr
    assert {tensor.dtype for tensor in read_safetensors(out / "last/adapter.safetensors").values()} == {torch.float32}
    losses = [[json.loads(line).get("loss") for line in (r / "log.jsonl").read_text().splitlines()] for r in (run, out)]
    losses = [torch.tensor([loss for loss in group if loss]) for group in losses]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)
    assert not losses[0].equal(losses[1])
    assert {p.dtype for p in runs.load_run(out)[0].lm.parameters()} == {torch.bfloat16}
    assert quick(evaluate, out, "--save", tmp_path / "p.json", "--device", "cpu").returncode == 0
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads((out / "test.json").read_text())["captions"]
    one_line_error(quick(train, *flags, "--precision", "bf16", "--out", tmp_path / "n", "--method", "full"), "bf16")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run, flags, tmp_path):
    """One thread: weights and logged losses equal bit for bit."""
    for out, seed in ((tmp_path / "same", 0), (tmp_path / "other", 1)):
        assert quick(train, *flags, "--out", out, "--seed", seed).returncode == 0
    weights = [(r / "last/adapter.safetensors").read_bytes() for r in (run, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


def test_ctrl_c_leaves_last_whole_and_resume_ends_where_the_whole_run_ended(run, flags, tmp_path):
    """SIGINT after the third step's report; then `--resume`: final weights and log equal the uninterrupted run's."""
    out = tmp_path / "stopped"
    command = [sys.executable, "train.py", *map(str, flags), "--out", str(out)]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)  # fmt: skip
    for line in child.stdout:
        if line.startswith("step 3/"):
            child.send_signal(signal.SIGINT)
            break
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in errors
    state = torch.load(out / "last/state.pt", weights_only=True)
    assert 3 <= state["step"] < 12 and read_safetensors(out / "last/adapter.safetensors")
    assert sorted(p.name for p in out.iterdir() if p.is_dir())[-1] == "last"

    assert quick(train, "--resume", out).returncode == 0
    assert (out / "last/adapter.safetensors").read_bytes() == (run / "last/adapter.safetensors").read_bytes()
    logs = [[json.loads(line) for line in (r / "log.jsonl").read_text().splitlines()] for r in (out, run)]
    for row in logs[0] + logs[1]:
        row.pop("clips/s", None)
    assert logs[0] == logs[1]


def test_evaluate_gives_the_scores_that_training_gave(run, tmp_path):
    done = quick(evaluate, run, "--save", tmp_path / "p.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    test = json.loads((run / "test.json").read_text())
    assert json.loads((tmp_path / "p.json").read_text()) == test["captions"]
    assert f"CIDEr {100 * test['scores']['CIDEr']:.1f}" in done.stdout


def test_kept_features_are_block_outputs_and_are_refused_where_they_change(run, flags, tmp_path):
    """A clip's features against the ViT's, rounded to bf16: at most one rounding apart (rtol 2^-7), the ViT in bf16
    also computing otherwise for another number of frames. `write` and the rivals change the ViT's work."""
    root = Path(flags[-1])
    frames = np.memmap(root / "train-16x64.frames", np.uint8, "r", shape=(12, 16, 3, 64, 64))
    for precision, dtype in DTYPES.items():
        done = quick(train, *flags, "--out", tmp_path / precision, "--last-blocks", 1, "--cache-features",
                     "--precision", precision)  # fmt: skip
        assert done.returncode == 0, done.stderr
        kept = np.memmap(root / "train-16x64-last1.features", np.uint16, "r", shape=(12, 16, 1, 17, 16))
        vit = ViT.from_pretrained(json.loads((run / "config.json").read_text())["flags"]["vit"], dtype)
        with torch.no_grad():
            z = vit(vit.normalise(torch.from_numpy(np.array(frames[3]))).to(dtype))  # (16, P, D)
        found = torch.from_numpy(kept[3, :, 0].copy()).view(torch.bfloat16)
        torch.testing.assert_close(found, z.bfloat16(), rtol=2**-7, atol=1e-2 if precision == "bf16" else 1e-6)
    for more in (("--reading", "write"), ("--method", "linear")):
        done = quick(train, *flags, "--out", tmp_path / "n", "--cache-features", *more)
        one_line_error(done, "--cache-features")


def test_what_a_crash_can_leave_is_gone_on_with_or_named(run, flags, tmp_path):
    """A half-written log row, a swap cut short; then a lost state, another shape and a folder that is taken."""
    out = tmp_path / "r"
    shutil.copytree(run, out)
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 1')
    (out / "last").rename(out / "last.old")
    done = quick(train, "--resume", out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sum("test" in row for row in rows) == 1
    config = json.loads((out / "config.json").read_text())
    changed = config | {"adapter": config["adapter"] | {"heads": 4}}
    (out / "config.json").write_text(json.dumps(changed))
    one_line_error(quick(evaluate, out), "adapter.safetensors", "config.json")
    one_line_error(quick(train, "--resume", out), "adapter.safetensors")
    del config["flags"]["epochs"]
    (out / "config.json").write_text(json.dumps(config))
    one_line_error(quick(train, "--resume", out), "config.json", "'epochs'")
    (out / "last/state.pt").write_bytes(b"PK")
    (out / "config.json").write_text((run / "config.json").read_text())
    one_line_error(quick(train, "--resume", out), "state.pt")
    one_line_error(quick(train, *flags, "--out", tmp_path / "nan", "--lr", 1e30), "the loss is")
    assert read_safetensors(tmp_path / "nan/last/adapter.safetensors")


@pytest.mark.parametrize("method", ["linear", "lora", "full"])
def test_the_rivals_run_and_their_checkpoints_hold_what_they_train(method, flags, tmp_path):
    done = quick(train, *flags, "--out", tmp_path / "r", "--method", method, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    names = set(read_safetensors(tmp_path / "r/best/adapter.safetensors"))
    assert {"frames", "connector.weight", "connector.bias"} <= names
    assert any(".lora_" in n for n in names) == (method == "lora")
    assert ("lm.embed.weight" in names) == (method == "full")
    assert quick(evaluate, tmp_path / "r").returncode == 0


def test_the_decoding_flags_reach_the_decoder(run, tmp_path):
    """A split's captions with each flag are those of `Captioner.caption` told the same; some differ from greedy's."""
    captioner, config = runs.load_run(run)
    cache = np.memmap(next(Path(config["flags"]["data"]).glob("test-*.frames")), np.uint8, "c")
    frames = torch.from_numpy(cache.reshape(6, config["flags"]["frames"], 3, *[captioner.vit.config.image_size] * 2))
    greedy, told = captioner.caption(frames), set()
    for asked in ({"beams": 3, "length_penalty": -2.0}, {"min_new_tokens": 7, "max_new_tokens": 9}):
        flags = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
        done = quick(evaluate, run, "--save", tmp_path / "p.json", "--device", "cpu", *flags)
        assert done.returncode == 0, done.stderr
        found = list(json.loads((tmp_path / "p.json").read_text()).values())
        assert found == captioner.caption(frames, **asked)
        told.add(found != greedy)
    assert True in told


def test_your_own_videos_good_and_bad(run, flags, tmp_path):
    """Ten files, two of them bad: eight captions, two named, exit code 2."""
    clips = sorted((Path(flags[-1]) / "test").glob("*.mp4"))
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.mp4").write_bytes(clips[i % len(clips)].read_bytes())
    (folder / "3bad.mp4").write_bytes(b"")
    (folder / "5bad.mp4").write_bytes(b"not a video")
    done = quick(evaluate, run, "--video", folder, "--save", tmp_path / "c.json")
    one_line_error(done, "2 of 10 videos")
    assert len(done.stdout.splitlines()) == 8 and "3bad.mp4" in done.stderr and "5bad.mp4" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "c.json").read_text().splitlines()]
    assert [Path(row["video"]) for row in rows] == sorted(folder.iterdir())
    said = [f"{row['video']}: {row['caption']}" for row in rows if "caption" in row]
    assert said == done.stdout.splitlines()
    assert [Path(row["video"]).name for row in rows if "error" in row] == ["3bad.mp4", "5bad.mp4"]
    names = f"{folder}/0.mp4\n\n{folder}/1.mp4\n"
    done = python("evaluate.py", run, "--video", "-", "--frames", 3, input=names)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2


def test_real_videos_are_captioned_or_named(run, real):
    """Every file of clips/ and of MSVD: 16 and 3; the empty one, the text and the sound are the bad ones."""
    done = quick(evaluate, run, "--video", real / "clips", real / "msvd/YouTubeClips")
    one_line_error(done, "3 of 19 videos")
    assert len(done.stdout.splitlines()) == 16
    assert all(name in done.stderr for name in ("WrongFile.mp4", "audio_only.mp4", "empty.mp4"))


def test_what_the_user_gets_wrong_is_one_line(run, flags, backbones, tmp_path, monkeypatch):
    """In this process, whose `cli.run` turns an InputError into exit code 2; three of them also as a user sees it."""

    def refused(main, given, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, given)])
        with pytest.raises(InputError) as error:
            main()
        assert str(error.value).isprintable() and all(word in str(error.value) for word in words), error.value

    out = ["--out", tmp_path / "none"]
    one_line_error(python("train.py", *flags, *out, "--frames", 0), "--frames", "at least 1")
    refused(train.main, [*flags, *out, "--lr", "nan"], "--lr")
    refused(train.main, [*flags, *out, "--weight-decay", -1], "--weight-decay", "at least 0")
    refused(train.main, [*flags, *out, "--queries", 300], "300 visual tokens", "256")
    refused(train.main, [*flags, *out, "--data", ROOT], "holds something else than shapes")
    refused(train.main, [*flags, *out, "--clips", 3, 4, 6], "holds", "another folder")
    refused(train.main, ["--resume", run, "--epochs", 9], "--epochs", "its own flags")
    refused(train.main, [*flags, *out, "--colour", "red"], "--colour")
    refused(train.main, [*flags, *out, "--vit", tmp_path / "gone"], "gone", "expected a folder")
    refused(train.main, [*flags, *out, "--vit", backbones / "lm"], "config.json", "model_type")
    refused(train.main, [*flags, *out, "--rank", 5], "--rank 5", "--heads 2")
    refused(train.main, [*flags, *out, "--last-blocks", 3], "--last-blocks 3", "2")
    refused(train.main, [*flags, *out, "--batch-size", 64], "--batch-size 64", "12")
    refused(train.main, [*flags, "--out", run], str(run), "--resume")
    refused(train.main, ["--resume", tmp_path / "gone"], "gone", "state.pt")
    one_line_error(python("evaluate.py", tmp_path / "gone"), "gone", "config.json")
    one_line_error(quick(evaluate, run, "--video", tmp_path / "gone.mp4"), "gone.mp4")
    refused(evaluate.main, [run, "--device", "abacus"], "abacus")
    refused(evaluate.main, [run, "--save", tmp_path / "gone/p.json"], "gone/p.json")
    refused(evaluate.main, [run, "--save", tmp_path], str(tmp_path), "name of a file")
    refused(train.main, [*flags, "--out", "/dev/null/x"], "--out /dev/null/x")
    refused(train.main, [*flags, *out, "--vit", ""], "expected a folder")
    refused(train.main, [*flags, *out, "--image-size", 800000], "--image-size", "4096")
    refused(evaluate.main, [run, "--beams", 0], "--beams", "at least 1")
    refused(evaluate.main, [run, "--length-penalty", "nan"], "--length-penalty", "nan")
    refused(evaluate.main, [run, "--length-penalty", 11], "length_penalty", "11")
    refused(evaluate.main, [run, "--beams", 400], "beams: 400", "399 tokens")
    refused(evaluate.main, [run, "--min-new-tokens", 31], "min_new_tokens: 31", "30")
    refused(evaluate.main, [run, "--max-new-tokens", 2000], "2000 new tokens", "256")
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_of_other_backbones_is_refused(flags, backbones, tmp_path):
    lm = copy_of(backbones / "lm", tmp_path)
    done = quick(train, *flags, "--epochs", 1, "--out", tmp_path / "r", "--lm", lm)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "lm/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    one_line_error(quick(evaluate, tmp_path / "r"), "adapter.safetensors", "another lm/model.safetensors")


def copy_of(folder: Path, to: Path) -> Path:
    (to / folder.name).mkdir()
    for file in folder.iterdir():
        (to / folder.name / file.name).write_bytes(file.read_bytes())
    return to / folder.name


def test_the_committed_backbones_load_and_stay_small():
    """The two folders in backbones/: loaded strictly, at most 8 MB together, the tokenizer knows every word."""

    vit, lm = ViT.from_pretrained(ROOT / "backbones/tiny-vit"), CausalLM.from_pretrained(ROOT / "backbones/tiny-lm")
    tokenizer = load_tokenizer(ROOT / "backbones/tiny-lm")
    assert vit.config.image_size == shapes.SIDE and lm.config.vocab == len(tokenizer)
    assert sum(f.stat().st_size for f in (ROOT / "backbones").rglob("*")) < 8e6
    caption = shapes.describe(shapes.draw_scene(np.random.default_rng(0)), np.random.default_rng(0))
    ids = tokenizer.encode(caption)
    assert tokenizer.decode([ids]) == [caption] and tokenizer.pieces.unk_id() not in ids


def test_backbones_come_from_the_hub_and_in_shards(run, flags, backbones, tmp_path, monkeypatch):
    """The same files behind hub ids, the language model's cut into shards: the run's own weights, bit for bit.

    The server is one of this machine; after training it is gone, and evaluation asks nothing of it.
    """
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    server.publish({p.name: p.read_bytes() for p in (backbones / "vit").iterdir()}, repo="owner/vit")
    files = {p.name: p.read_bytes() for p in (backbones / "lm").iterdir()}
    tensors = read_safetensors(backbones / "lm/model.safetensors")
    del files["model.safetensors"]
    shards = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for name, held in shards.items():
        files[name] = safetensors.torch.save({n: tensors[n].contiguous() for n in held})
    names = {n: shard for shard, held in shards.items() for n in held}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": names}).encode()
    server.publish(files, repo="owner/lm", revision="v1.0")
    done = quick(train, *flags, "--vit", "owner/vit", "--lm", "owner/lm@v1.0", "--out", tmp_path / "run")
    server.close()
    assert done.returncode == 0, done.stderr
    assert same_tensors(run / "last/adapter.safetensors", tmp_path / "run/last/adapter.safetensors")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert [config["flags"][name] for name in ("vit", "lm")] == [f"owner/vit@{COMMIT}", f"owner/lm@{COMMIT}"]
    told = config["sha256"]
    assert {"lm/a.safetensors", "lm/b.safetensors", "lm/model.safetensors.index.json"} < told.keys()
    assert quick(evaluate, tmp_path / "run").returncode == 0


LAYOUTS = {"msvd": lambda folder: test_corpora.msvd(folder, 12), "msrvtt": test_corpora.msrvtt,
           "folder": test_corpora.own}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_dataset_trains_and_is_scored(run, flags, tmp_path, monkeypatch, capsys, name):
    """Made folders in each layout, their videos those of the demo: scores at the end, the same from evaluate.py."""
    folder, made = tmp_path / "data", flags[flags.index("--data") + 1] / "train"
    folder.mkdir()
    LAYOUTS[name](folder)
    for empty, clip in zip((p for p in sources.walk(folder) if not p.stat().st_size), made.glob("*.mp4"), strict=False):
        empty.write_bytes(clip.read_bytes())

    def say(script, *words) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        assert script.main() == 0
        return capsys.readouterr().out

    out = tmp_path / "run"
    said = say(train, *flags, "--dataset", name, "--data", folder, "--cache", tmp_path / "kept", "--out", out,
               "--batch-size", 2, "--epochs", 1)  # fmt: skip
    test, config = json.loads((out / "test.json").read_text()), json.loads((out / "config.json").read_text())
    assert test["scores"]["CIDEr"] >= 0 and test["signature"] in said and f"|data:{name} test" in test["signature"]
    assert ("670 are standard" in test["signature"]) == (name == "msvd")
    assert ("test: 3 clips, 670 are standard" in config["differences"]) == (name == "msvd")
    assert not list(folder.rglob("*.frames")) and len(list((tmp_path / "kept").rglob("*.frames"))) == 3
    assert test["signature"] in say(evaluate, out)
    assert f"|data:{name} val" in say(evaluate, out, "--split", "val")


def test_public_models_are_the_default_of_real_datasets():
    """A folder's name is the id's; TinyLlama where there is a GPU."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert flags_of_train.backbones("shapes", gpu) == ("backbones/tiny-vit", "backbones/tiny-lm")
    for name in ("msvd", "msrvtt", "folder"):
        assert flags_of_train.backbones(name, cpu) == ("openai/clip-vit-base-patch16", "JackFram/llama-160m")
        assert flags_of_train.backbones(name, gpu)[1] == "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"


def test_another_image_size_is_kept_by_the_run(flags, tmp_path):
    """128 pixels for the made ViT's 64: 64 patches a frame in place of 16, in training and in evaluation."""
    done = quick(train, *flags, "--epochs", 1, "--image-size", 128, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    captioner, _ = runs.load_run(tmp_path / "run")
    assert captioner.vit.position.shape == (65, 16)
    one_line_error(quick(train, *flags, "--image-size", 100, "--out", tmp_path / "r"), "100", "patch size 16")


def same_tensors(one: Path, other: Path) -> bool:
    one, other = read_safetensors(one), read_safetensors(other)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_stopping_takes_no_longer_than_a_step(flags, tmp_path):
    """SIGTERM counts as Ctrl-C: exit code 130 within 20 seconds, last/ whole."""
    command = [sys.executable, "train.py", *map(str, flags), "--out", str(tmp_path / "r"), "--epochs", "500"]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | ALONE, stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("step 2/"):
            break
    child.terminate()
    begun = time.monotonic()
    child.communicate(timeout=60)
    assert child.returncode == 130 and time.monotonic() - begun < 20
    assert torch.load(tmp_path / "r/last/state.pt", weights_only=True)["step"] >= 2
