"""Qwen3-VL against transformers [1], every stage from frames to captions.

Tiny random models in real files, seed 0. The reference's patches come by squares of 2 x 2, ours row by row.

[1] transformers, models/qwen3_vl, and its video processor
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

import evaluate
from common.config import Config
from common.errors import InputError
from common.files import read_json
from common.preprocessing import HALF, Preprocessing
from model import Captioner
from models.generation import generate
from models.mllm import MLLM, shuffle_pixels
from models.qwen3_vl import Qwen3VL
from models.tokenizer import load_bpe
from tests import tiny
from tests.common.helpers import refused
from tests.models.helpers import CONFIGS, change_json, last_field
from tests.models.test_internvl import check_run, write_tokenizer
from tests.models.test_mllm import assert_same
from tests.models.test_vit import randomize
from tests.video_data.test_video import write_video

WIDTH, PATCH, SIDE = 32, 32, 448  # 14 x 14 patches
VISION = dict(depth=3, hidden_size=WIDTH, num_heads=4, intermediate_size=64, patch_size=PATCH, spatial_merge_size=2,
              temporal_patch_size=2, out_hidden_size=24, num_position_embeddings=36, deepstack_visual_indexes=[0, 2])
ROPE = dict(rope_type="default", mrope_section=[4, 2, 2], mrope_interleaved=True)
TEXT = dict(vocab_size=99, hidden_size=24, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=3, head_dim=16, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
VIDEO = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "patch_size": PATCH, "temporal_patch_size": 2,
         "merge_size": 2, "image_mean": HALF, "image_std": HALF}


def make(folder: Path, vocab: int = 99, saved: bool = False) -> nn.Module:
    """Saves a random model with its config in the published form, or as `saved`; returns it."""
    text = TEXT | {"vocab_size": vocab, "rope_parameters": ROPE | {"rope_theta": 1e4}}
    config = Qwen3VLConfig(text_config=text, vision_config=VISION, image_token_id=96, video_token_id=97,
                           vision_start_token_id=94, vision_end_token_id=95, tie_word_embeddings=True)
    theirs = randomize(Qwen3VLForConditionalGeneration(config), 0)
    theirs.save_pretrained(folder)
    change_json(folder / "video_preprocessor_config.json", **VIDEO)
    if saved:
        return theirs
    text = TEXT | {"vocab_size": vocab, "model_type": "qwen3_vl_text", "rope_theta": 1e4, "rope_scaling": ROPE}
    published = {"model_type": "qwen3_vl", "tie_word_embeddings": True, "text_config": text}
    published |= {"vision_config": VISION | {"model_type": "qwen3_vl"}}
    (folder / "config.json").write_text(json.dumps(published))
    return theirs


@pytest.fixture(scope="module", params=["published", "saved"])
def models(request, tmp_path_factory) -> tuple[nn.Module, MLLM, Path]:
    """The config.json as published, or as transformers 5 writes it; the names of tensors are the same."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    theirs = make(folder, saved=request.param == "saved")
    return theirs, MLLM.from_pretrained(folder), folder


def reference_inputs(frames: int, shape=(SIDE, SIDE)) -> tuple[Tensor, list[list[int]], dict[str, Tensor]]:
    """Random frames uint8 (T, 3, *shape), texts around their pairs, and both as the reference gets them. A single frame
    is an image, which it puts in twice."""
    clip = torch.randint(256, (frames, 3, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    processor = Qwen3VLVideoProcessor(patch_size=PATCH, temporal_patch_size=2, merge_size=2, image_mean=HALF,
                                      image_std=HALF, do_resize=False, do_sample_frames=False)
    pixels = processor([torch.cat([clip, clip]) if frames == 1 else clip], return_tensors="pt")
    pairs, token, kind = (frames + 1) // 2, *((96, 1) if frames == 1 else (97, 2))
    texts = [[1, 5, 94], *([95, 7, 8 + i, 94] for i in range(pairs - 1)), [95, 11, 12]]
    tokens = [token] * (shape[0] * shape[1] // (2 * PATCH) ** 2)
    ids = torch.tensor([sum((text + tokens for text in texts[:-1]), []) + texts[-1]])
    pixels, grid = pixels["pixel_values_videos"], pixels["video_grid_thw"]
    is_token = ids == token
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": is_token.long() * kind}
    if frames == 1:
        return clip, texts, inputs | {"pixel_values": pixels, "image_grid_thw": grid}
    return clip, texts, inputs | {"pixel_values_videos": pixels, "video_grid_thw": grid}


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", [(SIDE, SIDE), (192, 320)], ids=["square", "wide"])
@torch.no_grad()
def test_every_stage_equals_the_reference(models, frames, shape):
    """Each block's output, the merged tokens and those of DeepStack, positions, logits, greedy and 3-beam ids."""
    theirs, ours, folder = models
    if shape != (SIDE, SIDE):
        ours = MLLM.from_pretrained(folder, image_size=shape)
    clip, texts, inputs = reference_inputs(frames, shape)
    pixels, grid = (value for name, value in inputs.items() if "pixel" in name or "grid" in name)
    results: list = []
    outputs = tiny.record_block_outputs(theirs.model.visual, lambda: results.append(
        theirs.model.visual(pixels, grid_thw=grid)))
    steps = ours.vit.normalize(clip)
    assert steps.shape == (ours.vit.num_steps(frames), 6, *shape) and ours.vit.preprocessing.shape == shape
    found = ours.vit.block_outputs(steps, range(3))
    for i, output in enumerate(outputs):  # whose patches (n * P, D) come by squares
        assert_same(shuffle_pixels(found[:, i], ours.vit.config.grid, 2).unflatten(-1, (4, -1)).flatten(0, 2), output)
    tokens = ours.frame_tokens(ours.vit.run_blocks(steps, ours.deepstack), 0)  # (pairs, P', 3C)
    expected = results[0].pooler_output, *results[0].deepstack_features
    for part, output in zip(tokens.chunk(3, -1), expected, strict=True):
        assert_same(part.flatten(0, 1), output)

    ids, visual = [torch.tensor(text) for text in texts], list(tokens[:, None])
    x, places = ours.merge(ids, visual), ours.places(ids, visual)
    assert ours.places(ids, [x]) is None  # vectors of this width are queries, which are read as text
    grids = {name: value for name, value in inputs.items() if "grid" in name}
    positions, delta = theirs.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
    found = places.rotary_positions(torch.arange(x.shape[1]))
    assert found.equal(positions[:, 0]) and places.shift == int(delta) < 0
    assert_same(ours.lm.head(ours.lm.hidden(x, places=places)), theirs(**inputs).logits)
    for beams in (1, 3):
        theirs.model.rope_deltas = None  # else kept from the last call
        expected = theirs.generate(**inputs, num_beams=beams, max_new_tokens=12, do_sample=False)[0, x.shape[1] :]
        found = generate(ours.lm, x, beams, 12, places=places)[0]
        assert found == [i for i in expected.tolist() if i != 2] and len(found) > 3


def test_an_image_size_that_does_not_fit_is_refused(models):
    with pytest.raises(InputError, match="--image-size 128 100: expected multiples of 64"):
        MLLM.from_config(models[2], [128, 100])
    with pytest.raises(InputError, match="--image-size 64: expected none; the size of LLaVA is fixed"):
        MLLM.from_config("backbones/tiny-mllm", [64])
    assert MLLM.from_config(models[2], [SIDE]).vit.preprocessing == models[1].vit.preprocessing  # the same caches


@torch.no_grad()
def test_losses_of_captions_equal_the_reference(models):
    """Two captions of different lengths behind one prefix, within 1e-5; one alone."""
    theirs, ours, _ = models
    clip, texts, inputs = reference_inputs(4)
    ours = captioner(models, texts, method="none")
    captions, losses = [[9, 10, 2], [13, 14, 15, 16, 2]], []
    for caption in captions:
        ids = torch.cat([inputs["input_ids"], torch.tensor([caption])], dim=1)
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, len(caption), dtype=torch.long)], dim=1)
        changed = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        logits = theirs(**changed).logits[0, -len(caption) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(caption), reduction="sum"))
    labels = torch.tensor([[captions[0] + [-100] * 2, captions[1]]])
    torch.testing.assert_close(ours(clip[None], labels), sum(losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours(clip[None], labels[:, 1:]), losses[1], rtol=1e-5, atol=0)


def test_the_published_model(tmp_path):
    """Qwen3-VL-2B on the meta device: 2,127,532,032 parameters, but 28 x 28 instead of 48 x 48 learned positions."""
    shutil.copy(CONFIGS / "qwen3-vl-2b.json", tmp_path / "config.json")
    change_json(tmp_path / "video_preprocessor_config.json", **VIDEO | {"patch_size": 16})
    ours = MLLM.from_config(tmp_path)
    assert sum(p.numel() for p in ours.parameters()) + (48 * 48 - 28 * 28) * 1024 == 2_127_532_032
    assert (ours.deepstack, ours.lm.config.mrope) == ((5, 11, 17), (24, 20, 20))
    assert ours.vit.preprocessing == Preprocessing(448, 448, True, "bicubic", HALF, HALF)


@pytest.mark.parametrize("part, fields", [
    ("vision_config", {"spatial_merge_size": 4}), ("text_config", {"model_type": "qwen3"}),
    ("vision_config", {"deepstack_visual_indexes": []}), ("vision_config", {"deepstack_visual_indexes": [1, 3]}),
    ("text_config", {"rope_scaling": {"mrope_section": [4]}}),
    ("text_config", {"rope_scaling": {"mrope_interleaved": False}}),
])
def test_another_model_is_refused(models, tmp_path, part, fields):
    config = read_json(models[2] / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | {part: config[part] | fields}))
    change_json(tmp_path / "video_preprocessor_config.json", **VIDEO)
    with refused(str(tmp_path / "config.json"), last_field(fields)):
        MLLM.from_config(tmp_path)


# ------------------------------------------------------------------------------------ the captioner


def captioner(models, texts: list[list[int]] | None = None, **fields) -> Captioner:
    backbone = copy.copy(models[1])
    backbone.prompt = lambda _tokenizer, frames, times=None: texts or [[5]] * (frames + 1)
    return Captioner(backbone, tiny.Letters(), Config(**dict(queries=5, rank=8, frames=4, last_blocks=2) | fields))


def test_queries_read_pairs_of_frames(models):
    """Also from a cache, in bf16: an even and an odd number of frames; a change of one frame changes its own step."""
    torch.manual_seed(0)
    ours = captioner(models)
    clip = torch.randint(256, (1, 5, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    labels = torch.tensor([[[9, 10, 2]]])
    for frames in (clip[:, :4], clip):
        outputs = ours.block_outputs(frames)
        assert outputs.shape[1:] == ours.block_outputs_shape(frames.shape[1])
        with torch.no_grad():
            assert ours(outputs, labels) == ours(frames, labels)
    changed = clip.clone()
    changed[:, 3] ^= 255
    equal = [a.equal(b) for a, b in zip(ours.block_outputs(clip)[0], ours.block_outputs(changed)[0], strict=True)]
    assert equal == [True, False, True]
    ours(clip, labels).backward()
    assert all(p.grad is not None for p in ours.trained().values())


@pytest.mark.parametrize("indices", [[0], [0, 10], [0, 10, 30, 204, 215, 4000], [0, 37, 74, 110, 147, 184, 221]])
def test_prompts_equal_the_processors(tiny_qwen3_vl, indices):
    """A tiny tokenizer of Qwen's kind, frames with these numbers at 20 per second: times are rounded as Python does,
    0.25 to 0.2; of an odd number of frames the last time counts twice; a single frame is an image. The template's
    <|video_pad|> is here without the tokens around it, as transformers 4 replaced it; transformers 5 leaves a second
    pair of them."""
    path, is_image = tiny_qwen3_vl / "tokenizer.json", len(indices) == 1
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    pixels = np.zeros((len(indices), 64, 64, 3), np.uint8)
    visual = "<|vision_start|><|image_pad|><|vision_end|>" if is_image else "<|video_pad|>"
    text = f"<|im_start|>user\n{visual}Describe the video.<|im_end|>\n<|im_start|>assistant\n"
    processor = transformers.Qwen3VLProcessor(transformers.Qwen2VLImageProcessor(), theirs, Qwen3VLVideoProcessor())
    metadata = VideoMetadata(total_num_frames=4001, fps=20, frames_indices=indices)
    videos = {"videos": [pixels], "video_metadata": [metadata], "do_sample_frames": False, "do_resize": False}
    expected = processor(text=text, **{"images": pixels[0]} if is_image else videos)["input_ids"][0]
    layout = Qwen3VL(tiny.MLLMS["qwen3_vl"][1])
    ids = layout.prompt(load_bpe(path, None), len(indices), [*(i / 20 for i in indices), 200.05])
    token = theirs.convert_tokens_to_ids("<|image_pad|>" if is_image else "<|video_pad|>")
    count = list(expected).count(token) // (len(ids) - 1)
    assert sum((text + [token] * count for text in ids[:-1]), []) + ids[-1] == list(expected)


@pytest.fixture(scope="module")
def tiny_qwen3_vl(tmp_path_factory) -> Path:
    make(folder := tmp_path_factory.mktemp("qwen3_vl"), 410)
    write_tokenizer(folder, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return folder


@pytest.mark.parametrize("words", [
    ["--method", "linear", "--cache-features", "--frames", 3, "--image-size", 128, 192],
    ["--visual", "frames", "--write-back", "--grid", 3, "--frames", 4]])
def test_a_run_resumes_bit_for_bit(tiny_qwen3_vl, words, flags, tmp_path):
    check_run(tiny_qwen3_vl, words, flags, tmp_path)


@pytest.mark.parametrize("window", [None, 0.9])
def test_captions_of_own_videos_state_the_times_in_the_file(tiny_qwen3_vl, tmp_path, monkeypatch, window):
    """Without a run, of a whole video and of windows, which count from the start of the file. 20 frames, 0.1 s apart,
    and the centres of four segments."""
    path, stated = write_video(tmp_path / "a.mp4", range(0, 200, 10)), []
    monkeypatch.setattr(Qwen3VL, "prompt_texts", lambda self, frames, times, real=Qwen3VL.prompt_texts: (
        stated.append(list(times)) or real(self, frames, times)))
    ours, _ = evaluate.load_run(None, torch.device("cpu"), mllm=str(tiny_qwen3_vl))
    rows = list(evaluate.caption_videos(ours, [path], replace(ours.config, frames=4), window))
    expected = {None: [[0.2, 0.7, 1.2, 1.7, 2]], 0.9: [[0.1, 0.3, 0.5, 0.7, 2], [1, 1.2, 1.4, 1.6, 2],
                                                       [1.8, 1.8, 1.9, 1.9, 2]]}[window]
    found = [times for times in stated if times[-1] == pytest.approx(2)]  # but the default, of lengths: 4 seconds
    assert found == [pytest.approx(times) for times in expected] and len(rows) == len(expected)
