"""Runs on a multimodal language model (MLLM): training, resuming, two processes, scoring, your own videos, planning.

The MLLM is made of the two tiny backbones of `conftest.py` and a random projector, in LLaVA's layout. References: an
uninterrupted run, a run of one process, and the run that trains nothing.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train
from backbones.pretrain import PUBLISHED
from common.cli import printable
from common.errors import InputError
from common.files import read_json, sha256_of, write_json
from models.mllm import MLLM
from models.mllm_checkpoints import mllm_tensor_names
from models.safetensors import read_metadata, read_safetensors, write_safetensors
from tests.conftest import TWELVE_STEPS
from tests.scripts import assert_one_line_error, read_log, run_forked
from tests.training.test_distributed import fork_two
from training.frozen_models import backbone_hashes
from training.run import check_checkpoint


def make_mllm(folder: Path, backbones: Path, seed: int) -> Path:
    """Writes an MLLM in LLaVA's layout, with the weights of two backbones and a projector of the seed."""
    vision, text = (read_json(backbones / part / "config.json") for part in ("vit", "lm"))
    folder.mkdir()
    write_json(folder / "config.json", {
        "model_type": "llava", "vision_config": vision, "text_config": text | {"max_position_embeddings": 400},
        "image_token_index": text["vocab_size"] - 1, "vision_feature_layer": -1,
        "tie_word_embeddings": text["tie_word_embeddings"],
    })  # fmt: skip
    shutil.copy(backbones / "lm/tokenizer.model", folder)
    shutil.copy(backbones / "vit/preprocessor_config.json", folder)
    config = MLLM.from_config(folder).config
    torch.manual_seed(seed)
    model = MLLM(config)
    projector = {f"projector.{name}": p.detach() for name, p in model.projector.named_parameters()}
    names = mllm_tensor_names(model, PUBLISHED)
    tensors = {names[name]: p for name, p in projector.items()}
    for part, prefix in (("vit", "vision_tower."), ("lm", "language_model.")):
        weights = read_safetensors(backbones / part / "model.safetensors")
        tensors |= {prefix + name: tensor.float() for name, tensor in weights.items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mllm(backbones, tmp_path_factory) -> Path:
    return make_mllm(tmp_path_factory.mktemp("mllm") / "one", backbones, 0)


@pytest.fixture(scope="module")
def mllm_flags(mllm, flags) -> list:
    """Twelve steps that adapt what an MLLM reads of each frame."""
    return [*TWELVE_STEPS, "--mllm", mllm, "--data", flags[-1], "--visual", "frames", "--write-back", "--grid", 2,
            "--token-dropout", 0]  # fmt: skip


@pytest.fixture(scope="module")
def mllm_run(mllm_flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mllm"
    done = run_forked(train, *mllm_flags, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def untimed(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("elapsed", "clips/s")} for row in read_log(run)]


def test_a_run_of_no_steps_scores_what_another_run_starts_from(mllm, mllm_run, flags, tmp_path):
    """`--method none`: its validation is step 0 of the run, bit for bit; evaluate.py gives its test scores again."""
    out = tmp_path / "none"
    done = run_forked(train, *TWELVE_STEPS, "--mllm", mllm, "--data", flags[-1], "--method", "none", "--grid", 2,
                      "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trained: 0.00 %" in done.stdout and "steps of" not in done.stdout
    assert f"run: {out}" in done.stdout and "train it longer" not in done.stdout
    none, trained = (json.loads((run / "val/0.json").read_text()) for run in (out, mllm_run))
    assert none == trained and len(set(none["captions"].values())) > 1
    assert [row["step"] for row in read_log(out)] == [0, 0]
    assert none != json.loads((mllm_run / "val/12.json").read_text())
    again = run_forked(evaluate, out, "--device", "cpu", "--save", tmp_path / "test.json")
    assert again.returncode == 0, again.stderr
    assert read_json(tmp_path / "test.json") == read_json(out / "test.json")["captions"]
    expected = {name: (out / name).read_bytes() for name in ("test.json", "val/0.json")}
    (out / "test.json").unlink()  # as if it had been killed
    assert run_forked(train, "--resume", out).returncode == 0
    assert {name: (out / name).read_bytes() for name in expected} == expected and len(read_log(out)) == 2


def test_a_stopped_run_resumes_to_the_bit(mllm_flags, mllm_run, tmp_path, monkeypatch):
    """Reference: the uninterrupted run."""
    save, out = train.Run.save, tmp_path / "run"

    def save_and_stop(self, which, captioner, step, *rest):
        save(self, which, captioner, step, *rest)
        if which == "last" and step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", save_and_stop)
        assert run_forked(train, *mllm_flags, "--out", out).returncode == 130
    done = run_forked(train, "--resume", out)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 6" in done.stdout
    for which in ("best", "last"):
        found, expected = (run / which / "adapter.safetensors" for run in (out, mllm_run))
        assert found.read_bytes() == expected.read_bytes()
    assert untimed(out) == untimed(mllm_run)


def test_two_processes_train_the_same(mllm_flags, mllm_run, tmp_path):
    """Reference: the run of one process, losses within 1e-5; the same test captions."""
    done = fork_two(*mllm_flags, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    found, expected = ([row["loss"] for row in read_log(run) if "loss" in row] for run in (tmp_path / "two", mllm_run))
    assert len(expected) == 12 and found == pytest.approx(expected, rel=0, abs=1e-5)
    captions = [read_json(run / "test.json")["captions"] for run in (tmp_path / "two", mllm_run)]
    assert captions[0] == captions[1]


def test_your_own_videos_are_captioned(mllm_run, flags):
    """Reference: the captions of the test split."""
    captions = read_json(mllm_run / "test.json")["captions"]
    video = Path(flags[-1]) / "test/00002.mp4"
    done = run_forked(evaluate, mllm_run, "--video", video, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == printable(f"{video}: {captions['test/00002.mp4']}")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "preprocessor_config.json"])
def test_another_mllm_is_refused(name, mllm, mllm_run, tmp_path):
    """The same folder with one file changed at its end."""
    shutil.copytree(mllm, tmp_path / "other")
    run = tmp_path / "run"
    shutil.copytree(mllm_run, run)
    with open(tmp_path / "other" / name, "ab") as file:
        file.write(b" ")
    config = read_json(run / "config.json")
    write_json(run / "config.json", config | {"flags": config["flags"] | {"mllm": str(tmp_path / "other")}})
    stored = read_metadata(mllm_run / "last/adapter.safetensors")[f"mllm/{name}"]
    assert stored == sha256_of(mllm / name) != sha256_of(tmp_path / "other" / name)
    hashes = backbone_hashes({"mllm": tmp_path / "other"})
    with pytest.raises(InputError, match=f"was trained with another mllm/{name}"):
        check_checkpoint(run / "last/adapter.safetensors", hashes, config["adapter"])
    if name == "preprocessor_config.json":  # the others cannot be loaded at all
        assert_one_line_error(run_forked(train, "--resume", run), f"was trained with another mllm/{name}")
        assert_one_line_error(run_forked(evaluate, run, "--device", "cpu"), f"was trained with another mllm/{name}")


@pytest.mark.parametrize("method", ["linear", "lora-lm", "qadapter"])
def test_features_of_the_frozen_vit_are_cached(method, mllm, flags, tmp_path):
    """Reference: the run without --cache-features, within 1e-5; its features are rounded to bf16, so both run in it."""
    words = [*TWELVE_STEPS, "--mllm", mllm, "--data", flags[-1], "--method", method, "--precision", "bf16",
             "--candidate-frames", 8, "--epochs", 1]  # fmt: skip
    for name, extra in (("cached", ["--cache-features"]), ("frames", [])):
        done = run_forked(train, *words, *extra, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert untimed(tmp_path / "cached") == untimed(tmp_path / "frames")


def test_flags_that_do_not_fit_are_one_line(mllm, flags, tmp_path):
    words = [*flags, "--out", tmp_path / "out"]
    assert_one_line_error(run_forked(train, *words, "--mllm", mllm), "--vit: was given with --mllm")
    assert_one_line_error(run_forked(train, *words, "--visual", "both"), "expected --mllm too")
    words = [*TWELVE_STEPS, "--mllm", mllm, "--data", flags[-1], "--out", tmp_path / "out"]
    assert_one_line_error(run_forked(train, *words, "--visual", "frames"), "expected --write-back too")
    assert_one_line_error(run_forked(train, *words, "--method", "lora", "--visual", "both"),
                          "expected --method qadapter, found lora")  # fmt: skip
    assert_one_line_error(run_forked(train, *words, "--grid", 2), "--grid: expected --visual frames or both")
    assert_one_line_error(run_forked(train, *words, "--mllm", ""), "--mllm: expected a folder")
    assert_one_line_error(run_forked(train, *words, "--instruction", "\udcff"), "contains a lone surrogate")
    assert_one_line_error(run_forked(train, *words, "--instruction", "a video " * 200), "of the prompt")
    pair = [*flags, "--out", tmp_path / "out", "--instruction", "What is it?"]
    assert_one_line_error(run_forked(train, *pair), "--instruction: expected --mllm too")
    assert_one_line_error(run_forked(train, *words, "--image-size", 64), "--image-size: was given with --mllm")
    assert_one_line_error(run_forked(train, *words, "--method", "none", "--plan"), "has no steps")
    assert_one_line_error(run_forked(train, *words, "--method", "lora", "--cache-features"), "--cache-features")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--visual", "both"], ["--method", "lora-lm", "--cache-features"]])
def test_a_plan_names_the_projector(words, mllm, flags, tmp_path):
    done = run_forked(train, *TWELVE_STEPS, "--mllm", mllm, "--data", flags[-1], "--plan", *words)
    assert done.returncode == 0, done.stderr
    assert "frozen projector" in done.stdout and "memory of a step on cpu" in done.stdout
    assert not (tmp_path / "out").exists()
