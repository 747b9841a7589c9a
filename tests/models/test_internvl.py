"""InternVL, beyond what `test_mllm.py` and `test_mllm_checkpoints.py` compare for every layout.

References
[1] transformers, models/internvl: the model, its processor, its video processor; on tiny random models, and with a
    tiny tokenizer of Qwen's kind.
"""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

import evaluate
import train
from common.preprocessing import HALF, Preprocessing
from models.internvl import InternVL
from models.mllm import MLLM, MLLMConfig
from models.tokenizer import load_bpe
from tests import tiny
from tests.models.helpers import change_json, write_weights
from tests.models.test_bpe import make_tokenizer_json
from tests.models.test_mllm import CASES, QWEN3, assert_same, internvl, save_model
from tests.models.test_mllm_checkpoints import INTERNVL, OF_INTERNVL, make_folder
from tests.models.test_vit import read_weights
from tests.scripts import TWELVE_STEPS, act_at_call, contents, fork_two, losses, run_forked, succeed

# ----------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("frames", [1, 2, 8, 12])
def test_prompts_equal_the_processors(tiny_internvl, frames):
    """The whole text of the published template for a video; a single frame is an image, which is not cut up."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names, path = names | {"video_token": "<video>"}, tiny_internvl / "tokenizer.json"
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), extra_special_tokens=names)
    processors = transformers.GotOcr2ImageProcessor(), theirs, InternVLVideoProcessor()
    processor, size = transformers.InternVLProcessor(*processors), {"height": 28, "width": 28}
    pixels = np.zeros((frames, 28, 28, 3), np.uint8)
    is_image = frames == 1
    visual = {"images": pixels[0], "images_kwargs": {"size": size, "crop_to_patches": False}} if is_image else {
        "videos": [pixels], "videos_kwargs": {"size": size, "do_sample_frames": False}}
    token = "<IMG_CONTEXT>" if is_image else "<video>"
    text = f"<|im_start|>user\n{token}\nDescribe the video.<|im_end|>\n<|im_start|>assistant\n"
    expected = processor(text=text, **visual)["input_ids"][0]
    texts = InternVL(MLLMConfig(tiny.INTERNVIT, tiny.LM, "qwen2", shuffle=2)).prompt(load_bpe(path, None), frames)
    found = sum((ids + [theirs.convert_tokens_to_ids("<IMG_CONTEXT>")] * 256 for ids in texts[:-1]), []) + texts[-1]
    assert found == torch.as_tensor(expected).flatten().tolist()


# ------------------------------------------------------------------------------------------- files


@torch.no_grad()
def test_the_file_decides_whether_the_head_is_tied(tmp_path):
    """As transformers loads it: with a head of its own, also where config.json says that it is tied, else tied."""
    save_model(tmp_path, CASES["internvl, qwen2"])
    change_json(tmp_path / "config.json", tie_word_embeddings=True)
    tensors = read_weights(tmp_path)
    assert "language_model.lm_head.weight" in tensors
    for _ in range(2):
        # Ours first: transformers replaces torch.linspace while it loads; torch keeps what its first device block sees.
        ids, ours = torch.tensor([[1, 5, 9]]), MLLM.from_pretrained(tmp_path)
        theirs = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path)
        assert_same(ours.lm(ours.lm.embed(ids)), theirs(input_ids=ids).logits)
        tensors.pop("language_model.lm_head.weight", None)
        write_weights(tmp_path, tensors)
    assert ours.lm.head.weight is ours.lm.embed.weight


def test_preprocessing_is_that_of_videos_if_there_is_one(tmp_path):
    """[1]: of a file for videos or a part of processor_config.json, else of the file about images."""
    image = make_folder(tmp_path, INTERNVL)
    video = OF_INTERNVL | {"image_mean": HALF, "image_std": HALF}
    expected = Preprocessing(448, 448, True, "bicubic", HALF, HALF)
    change_json(tmp_path / "video_preprocessor_config.json", **video)
    assert MLLM.from_config(tmp_path).vit.preprocessing == expected
    for path in (image, tmp_path / "video_preprocessor_config.json"):
        path.unlink()
    change_json(tmp_path / "processor_config.json", image_processor=OF_INTERNVL, video_processor=video)
    assert MLLM.from_config(tmp_path).vit.preprocessing == expected
    assert list(InternVLVideoProcessor.from_pretrained(tmp_path).image_mean) == list(HALF)


# ----------------------------------------------------------------------------------------- a run


def write_tokenizer(folder: Path, *tokens: str) -> Path:
    """A tokenizer of about 400 tokens, among them all bytes and control tokens: Qwen's and others."""
    tokenizer = make_tokenizer_json("tiny Qwen")
    added = tokenizer["added_tokens"]
    for token in tokens:
        added.append(added[0] | {"id": added[-1]["id"] + 1, "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def tiny_internvl(tmp_path_factory) -> Path:
    """A random model of 56 pixels, 4 visual tokens a frame."""
    folder = tmp_path_factory.mktemp("internvl")
    write_tokenizer(folder, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    case = internvl(QWEN3 | {"vocab_size": 410, "max_position_embeddings": 300})
    case.fields["vision_config"] = case.fields["vision_config"] | {"image_size": [56, 56]}
    size = {"size": {"height": 56, "width": 56}}
    save_model(folder, replace(case, preprocessing=("preprocessor_config.json", size)))
    return folder


def test_a_run_resumes_bit_for_bit(tiny_internvl, flags, tmp_path):
    check_run(tiny_internvl, ["--cache-features"], flags, tmp_path)


def check_run(folder: Path, words: list, flags: list, tmp_path: Path) -> None:
    """Three steps, stopped by a signal in the second; by two processes; a plan and a picture of it."""
    command = [*TWELVE_STEPS, "--mllm", folder, "--data", flags[-1], "--frames", 2, "--epochs", 1, "--token-dropout", 0,
               *words, "--out"]
    succeed(train, *command, tmp_path / "whole")
    with act_at_call(torch.optim.AdamW, "step", 2, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert run_forked(train, *command, tmp_path / "stopped").returncode == 130
    assert "resuming after step 2" in succeed(train, "--resume", tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    done = fork_two(*command, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "whole"), rtol=0, atol=1e-5)
    assert len(losses(tmp_path / "two").unique()) == 3
    assert "memory of a step on cpu" in succeed(train, *command, tmp_path / "plan", "--plan")
    clip = next(Path(flags[-1]).rglob("*.mp4"))
    assert clip.name in succeed(evaluate, tmp_path / "whole", "--video", clip, "--show", tmp_path / "show")
