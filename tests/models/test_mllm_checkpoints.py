"""Public multimodal language models: configs and parameter counts, strict loading, preprocessing, and refused files.

References
[1] transformers, models/{llava,llava_onevision,idefics3,smolvlm}: defaults, names and shapes of tensors.
[2] The sizes of the published files: 14,126,854,144 bytes for LLaVA 1.5 in fp16, 489 tensors for SmolVLM2-500M.
[3] transformers' image processors that use PIL, and its video processors.
"""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from common.preprocessing import CLIP_MEAN, CLIP_STD, HALF, Preprocessing
from models import mllm_checkpoints
from models.mllm import MLLM, MLLMConfig
from models.mllm_checkpoints import (
    Spelling,
    check_mllm_config,
    find_spelling,
    mllm_tensor_names,
    read_mllm_config,
    read_mllm_preprocessing,
    read_text_config,
)
from tests.common.helpers import refused
from tests.models.helpers import CONFIGS, assert_bit_equal, change_json
from tests.models.test_mllm import CASES, IDEFICS3, SQUASH, TWO_STEPS, VIDEO_FILE, save_model
from tests.models.test_vit import read_weights
from video_data.video import VideoReformatter, frame_to_rgb

PUBLISHED = {  # name: parameters, tensors, visual tokens an image
    "llava-1.5-7b": (7_063_427_072, 686, 576),
    "llava-interleave-qwen-0.5b": (864_031_264, 715, 729),
    "smolvlm2-256m": (256_484_928, 471, 64),
    "smolvlm2-500m": (507_482_304, 489, 64),
    "llava-onevision-qwen2-0.5b": (893_675_552, 716, 196),
}
MODULES = {  # the spelling of the modules of transformers 5
    "llava": Spelling("model.vision_tower.", "model.language_model.", "lm_head.weight", "model.multi_modal_projector.",
                      "model.image_newline"),
    "smolvlm": find_spelling("smolvlm", {}),
}  # fmt: skip


def config_folder(folder: Path, name: str, **changes) -> Path:
    """A folder with a published config, changed, and a generation_config.json with EOS 2."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    for part, fields in changes.items():
        config[part] = config[part] | fields if isinstance(fields, dict) and part in config else fields
    (folder / "config.json").write_text(json.dumps(config))
    change_json(folder / "generation_config.json", eos_token_id=2)
    return folder


# -------------------------------------------------------------------------- configs and counts


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_public_config_has_the_published_parameters(tmp_path, name):
    """On the meta device: the count of [2], the names and shapes of [1]. Only unused blocks are not in our model."""
    count, tensors, tokens = PUBLISHED[name]
    config = MLLMConfig.from_dict(read_mllm_config(config_folder(tmp_path, name) / "config.json"))
    with torch.device("meta"):
        ours = MLLM(config)
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(p.numel() for p in theirs.parameters()) == count
    in_blocks = sum(p.numel() for p in ours.vit.blocks[0].parameters())
    assert sum(p.numel() for p in ours.parameters()) + config.unused_blocks * in_blocks == count
    names = mllm_tensor_names(config, MODULES.get(config.layout, MODULES["llava"]))
    shapes = {names[ours_name]: p.shape for ours_name, p in ours.state_dict().items()}
    expected = {n: p.shape for n, p in theirs.state_dict().items() if not config.lm.tied or n != "lm_head.weight"}
    assert len(expected) == tensors
    unused = {n for n in expected if config.unused_blocks and n.startswith("model.vision_tower.encoder.layers.23.")}
    assert shapes == {n: shape for n, shape in expected.items() if n not in unused}
    assert len(unused) == 16 * config.unused_blocks == (16 if name == "llava-1.5-7b" else 0)
    visual = ours.image_tokens(torch.empty(2, 3, config.vit.image_size, config.vit.image_size, device="meta"))
    assert visual.shape == (2, tokens, config.lm.width) and config.tokens_per_image == tokens
    texts = [torch.zeros(n, dtype=torch.long, device="meta") for n in (3, 1, 4)]
    has_newline = config.layout == "llava_onevision"
    assert ours.merge(texts, visual[:, None].unbind(0)).shape == (1, 8 + 2 * tokens + has_newline, config.lm.width)


def test_llava_15_ends_with_block_22():
    """The last three of 24 blocks, without the one that changes nothing, are blocks 20 to 22."""
    config = MLLMConfig.from_dict(read_mllm_config(CONFIGS / "llava-1.5-7b.json"))
    assert (config.vit.depth, config.unused_blocks) == (23, 1)
    assert not config.vit.final_norm and config.vit.class_token and not config.class_token


@pytest.mark.parametrize("layout, text_kind, vision_kind", [
    ("llava", "llama", "clip_vision_model"), ("llava", "qwen2", "siglip_vision_model"), ("llava", None, None),
    ("llava_onevision", "qwen2", "siglip_vision_model"), ("llava_onevision", None, None),
    ("idefics3", "llama", "idefics3"), ("smolvlm", None, None), ("smolvlm", "llama", "smolvlm_vision"),
])  # fmt: skip
def test_missing_fields_have_the_defaults_of_transformers(tmp_path, layout, text_kind, vision_kind):
    """Configs of the kinds, or not even those, and of what has no usable default: the sizes of Idefics3's ViT, the EOS
    of Qwen 2, the image token of an MLLM with a small vocabulary, LLaVA's choice of all tokens of a SigLIP."""
    text = {"model_type": text_kind} if text_kind else {}
    vision = {"model_type": vision_kind} if vision_kind else {}
    config = {"model_type": layout, "text_config": text, "vision_config": vision}
    if layout in ("idefics3", "smolvlm"):
        vision |= {"hidden_size": 16, "image_size": 32, "num_attention_heads": 2, "patch_size": 4}
        config["image_token_id"] = 7
    if layout == "llava_onevision" or text_kind == "qwen2":
        text["eos_token_id"] = 7
        config["vision_feature_select_strategy"] = "full"
    elif layout == "llava":
        text["vocab_size"] = 32064
    change_json(tmp_path / "config.json", **config)
    ours = MLLMConfig.from_dict(read_mllm_config(tmp_path / "config.json"))
    theirs = AutoConfig.from_pretrained(tmp_path)
    text, vision, vit, lm = theirs.text_config, theirs.vision_config, ours.vit, ours.lm
    assert (lm.vocab, lm.width, lm.depth, lm.heads, lm.kv_heads, lm.mlp_width) == (
        text.vocab_size, text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads,
        text.intermediate_size)  # fmt: skip
    assert (lm.norm_eps, lm.max_positions, lm.tied) == (
        text.rms_norm_eps, text.max_position_embeddings, theirs.tie_word_embeddings)  # fmt: skip
    assert lm.rope_theta == text.rope_parameters["rope_theta"] and lm.eos_ids == (text.eos_token_id,)
    assert (vit.image_size, vit.patch_size, vit.width, vit.heads, vit.mlp_width, vit.activation, vit.norm_eps) == (
        vision.image_size, vision.patch_size, vision.hidden_size, vision.num_attention_heads, vision.intermediate_size,
        vision.hidden_act, vision.layer_norm_eps)  # fmt: skip
    assert vit.depth + ours.unused_blocks == vision.num_hidden_layers
    if layout in ("idefics3", "smolvlm"):
        assert ours.shuffle == theirs.scale_factor and ours.unused_blocks == 0
    else:
        assert ours.unused_blocks == -1 - theirs.vision_feature_layer
        token = theirs.video_token_index if layout == "llava_onevision" else theirs.image_token_index
        assert ours.image_token_id == token


@pytest.mark.parametrize("name", ["llava-interleave-qwen-0.5b", "smolvlm2-256m"])
def test_the_head_is_tied_where_transformers_ties_it(tmp_path, name):
    """tie_word_embeddings outside and inside of text_config: LLaVA reads both, SmolVLM only the one outside."""
    for outside in (True, False):
        for inside in (True, False):
            config_folder(tmp_path, name, tie_word_embeddings=outside, text_config={"tie_word_embeddings": inside})
            theirs = AutoConfig.from_pretrained(tmp_path)
            assert read_mllm_config(tmp_path / "config.json")["lm"]["tied"] == theirs.tie_word_embeddings
            assert theirs.tie_word_embeddings == (outside or (inside and "llava" in name))


def test_texts_end_where_generation_config_says(tmp_path):
    """It counts even if text_config says something else."""
    path, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    config_folder(tmp_path, "llava-interleave-qwen-0.5b")
    for content, expected in (({"eos_token_id": 5}, (5,)), ({"eos_token_id": [9, 5]}, (9, 5)), ({}, (151645,))):
        generation.write_text(json.dumps(content))
        lm = MLLMConfig.from_dict(read_mllm_config(path)).lm
        assert lm.eos_ids == expected
        assert read_text_config(path) == read_mllm_config(path)["lm"]
    generation.write_text(json.dumps({"eos_token_id": 152000}))
    with refused(str(generation), "eos_token_id is 152000", "152000"):
        read_mllm_config(path)
    generation.unlink()
    assert MLLMConfig.from_dict(read_mllm_config(path)).lm.eos_ids == (151645,)


@pytest.mark.parametrize("name, changes, words", [
    ("llava-1.5-7b", {"model_type": "llava_next"}, ["'llava_next'", "llava, llava_onevision, idefics3, smolvlm"]),
    ("llava-1.5-7b", {"model_type": 3}, ["'model_type'", "a string"]),
    ("llava-1.5-7b", {"vision_config": None}, ["'vision_config'", "an object"]),
    ("llava-1.5-7b", {"text_config": []}, ["'text_config'", "an object"]),
    ("llava-1.5-7b", {"vision_config": {"model_type": "pixtral"}}, [
        "vision_config: model_type is 'pixtral'", "clip_vision_model or siglip_vision_model"]),
    ("llava-1.5-7b", {"vision_config": {"hidden_size": "1024"}}, ["vision_config", "'hidden_size'", "whole number"]),
    ("llava-1.5-7b", {"vision_config": {"hidden_act": "relu"}}, ["vision_config: hidden_act is 'relu'"]),
    ("llava-1.5-7b", {"text_config": {"model_type": "mistral"}}, [
        "text_config: model_type is 'mistral'", "llama or qwen2"]),
    ("llava-1.5-7b", {"text_config": {"hidden_act": "gelu"}}, ["text_config: hidden_act is 'gelu'"]),
    ("llava-1.5-7b", {"text_config": {"num_key_value_heads": 5}}, ["text_config", "multiple of num_key_value_heads"]),
    ("llava-1.5-7b", {"vision_feature_layer": [-2, -1]}, ["'vision_feature_layer'", "a whole number"]),
    ("llava-1.5-7b", {"vision_feature_layer": 0}, ["vision_feature_layer is 0", "1 to 24 or -24 to -1"]),
    ("llava-1.5-7b", {"vision_feature_layer": -25}, ["vision_feature_layer is -25", "1 to 24 or -24 to -1"]),
    ("llava-1.5-7b", {"vision_feature_select_strategy": "cls"}, [
        "vision_feature_select_strategy is 'cls'", "default or full"]),
    ("llava-interleave-qwen-0.5b", {"vision_feature_select_strategy": "default"}, [
        "vision_feature_select_strategy is 'default'", "expected full"]),
    ("llava-1.5-7b", {"projector_hidden_act": "relu"}, ["projector_hidden_act is 'relu'", "'gelu'"]),
    ("llava-1.5-7b", {"multimodal_projector_bias": False}, ["multimodal_projector_bias is False", "True"]),
    ("llava-1.5-7b", {"image_token_index": 32064}, ["image_token_index is 32064", "at most 32063"]),
    ("llava-1.5-7b", {"tie_word_embeddings": "no"}, ["'tie_word_embeddings'", "true or false"]),
    ("llava-onevision-qwen2-0.5b", {"text_config": {"model_type": "llama"}}, [
        "text_config: model_type is 'llama'", "expected qwen2"]),
    ("llava-onevision-qwen2-0.5b", {"vision_config": {"model_type": "clip_vision_model"}}, [
        "vision_config: model_type is 'clip_vision_model'", "siglip_vision_model"]),
    ("llava-onevision-qwen2-0.5b", {"video_token_index": -1}, ["video_token_index is -1", "at least 0"]),
    ("smolvlm2-256m", {"scale_factor": 5}, ["scale_factor is 5", "divisor of 32"]),
    ("smolvlm2-256m", {"scale_factor": 0}, ["scale_factor is 0", "at least 1"]),
    ("smolvlm2-256m", {"vision_config": {"image_size": None}}, ["vision_config", "'image_size'"]),
    ("smolvlm2-256m", {"vision_config": {"hidden_size": None}}, ["vision_config", "'hidden_size'"]),
    ("smolvlm2-256m", {"vision_config": {"model_type": "siglip"}}, ["vision_config: model_type is 'siglip'"]),
    ("smolvlm2-256m", {"text_config": {"use_resampler": True}}, ["text_config: use_resampler is True", "False"]),
    ("smolvlm2-256m", {"text_config": {"qk_layer_norms": True}}, ["text_config: qk_layer_norms is True"]),
    ("smolvlm2-256m", {"text_config": {"rope_interleaved": True}}, ["text_config: rope_interleaved is True"]),
    ("smolvlm2-256m", {"image_token_id": None, "text_config": {"vocab_size": 100}}, ["image_token_id is 128257"]),
])  # fmt: skip
def test_an_unsupported_config_is_refused(tmp_path, name, changes, words):
    config_folder(tmp_path, name, **changes)
    with refused(str(tmp_path / "config.json"), *words):
        check_mllm_config(tmp_path)


# --------------------------------------------------------------------------------- strict loading


SMALL_IDEFICS3 = CASES["idefics3"].fields | {"vision_config": IDEFICS3 | dict(num_hidden_layers=2, intermediate_size=8)}
SAVED = {
    "clip": CASES["llava, clip"], "siglip": CASES["llava_onevision"],
    "idefics3": replace(CASES["idefics3"], fields=SMALL_IDEFICS3),
}  # fmt: skip


@pytest.fixture(scope="module", params=SAVED)
def saved(request, tmp_path_factory) -> Path:
    """The folder of a random model; its name begins with that of the family of its ViT."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder, SAVED[request.param])
    return folder


def load(folder: Path, tensors: dict[str, Tensor]) -> MLLM:
    """Loads a model with these tensors in place of those in its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mllm_checkpoints, "read_tensors", lambda path: (dict(tensors), path / "model.safetensors"))
        return MLLM.from_pretrained(folder)


def is_unused(saved: Path, name: str) -> bool:
    """Whether a tensor belongs to the last of the three blocks, of which the model with CLIP uses two."""
    return saved.name.startswith("clip") and name.startswith("vision_tower.encoder.layers.2.")


def test_every_missing_tensor_is_named(saved):
    tensors = read_weights(saved)
    for name in tensors:
        if not is_unused(saved, name):
            with refused(str(saved / "model.safetensors"), "missing", name):
                load(saved, {other: tensor for other, tensor in tensors.items() if other != name})


def test_every_misshapen_tensor_is_named(saved):
    tensors = read_weights(saved)
    for name, tensor in tensors.items():
        if not is_unused(saved, name):
            wrong = torch.cat([tensor, tensor[:1]])
            with refused(str(saved / "model.safetensors"), name, str(list(wrong.shape)), str(list(tensor.shape))):
                load(saved, tensors | {name: wrong})


def test_an_unexpected_tensor_is_named(saved):
    """Also a block more than in the config, and the pooling head of a ViT that has none."""
    tensors = read_weights(saved)
    vision, text = (next(name.rpartition("layers.1.")[0] for name in tensors if f"{part}layers.1." in name)
                    for part in ("encoder.", "model."))  # fmt: skip
    names = ["more", f"{vision}layers.3.mlp.fc1.bias", f"{text}layers.2.mlp.up_proj.weight", f"{text}norm.bias"]
    names += [f"{vision.removesuffix('encoder.')}head.probe"] * (not saved.name.startswith("siglip"))
    for name in names:
        with refused(str(saved / "model.safetensors"), "unexpected", name):
            load(saved, tensors | {name: torch.zeros(2)})


def test_tensors_that_change_nothing_are_ignored(saved):
    """Tables of old files, SigLIP's pooling head, the tensors of unused blocks whatever their shape."""
    tensors = read_weights(saved)
    expected = MLLM.from_pretrained(saved).state_dict()
    k = next(name for name in tensors if "layers.1.self_attn.k_proj.weight" in name and "encoder" not in name)
    positions = next(name for name in tensors if "position_embedding" in name)
    others = {k.replace("k_proj.weight", "rotary_emb.inv_freq"): torch.ones(3),
              positions.replace("position_embedding.weight", "position_ids"): torch.arange(9)[None]}  # fmt: skip
    others |= {name: torch.zeros(2) for name in tensors if is_unused(saved, name)}
    if saved.name.startswith("siglip"):
        others |= {"vision_tower.head.probe": torch.zeros(1, 1, 32), "vision_tower.head.mlp.fc1.bias": torch.zeros(2)}
    assert_bit_equal(load(saved, tensors | others).state_dict(), expected)


def test_a_tied_head_may_be_in_the_file_with_equal_values(tmp_path):
    save_model(tmp_path, CASES["llava, siglip"])
    tensors = read_weights(tmp_path)
    embed = tensors["language_model.model.embed_tokens.weight"]
    ours = load(tmp_path, tensors | {"language_model.lm_head.weight": embed.clone()})
    assert ours.lm.head.weight is ours.lm.embed.weight and ours.lm.embed.weight.equal(embed)
    with refused("unexpected", "language_model.lm_head.weight"):
        load(tmp_path, tensors | {"language_model.lm_head.weight": embed + 1e-3})


# ---------------------------------------------------------------------------------- preprocessing


def write_preprocessing(folder: Path, name: str, file: str, **fields) -> Path:
    config_folder(folder, name)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(fields))
    return folder / file


def read(folder: Path) -> Preprocessing:
    return read_mllm_preprocessing(folder, read_mllm_config(folder / "config.json"))


def squash(size: int) -> dict:
    return SQUASH | {"size": {"height": size, "width": size}}


SMOLVLM2 = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, "resample": 1,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_image_splitting": True, "do_pad": True,
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}}}  # fmt: skip
LANCZOS = Preprocessing(512, 512, True, "lanczos", HALF, HALF, 512)


@pytest.mark.parametrize("name, file, fields, expected", [
    ("llava-1.5-7b", "preprocessor_config.json", {"size": {"shortest_edge": 336}, "crop_size": 336, "resample": 3},
     Preprocessing(336, 336, False, "bicubic", CLIP_MEAN, CLIP_STD)),
    ("llava-1.5-7b", "preprocessor_config.json", {}, Preprocessing(336, 336, False, "bicubic", CLIP_MEAN, CLIP_STD)),
    ("llava-interleave-qwen-0.5b", "preprocessor_config.json", squash(384),
     Preprocessing(384, 384, True, "bicubic", HALF, HALF)),
    ("llava-onevision-qwen2-0.5b", VIDEO_FILE, squash(384) | {"do_center_crop": None, "do_pad": True},
     Preprocessing(384, 384, True, "bicubic", HALF, HALF)),
    ("llava-onevision-qwen2-0.5b", "video_preprocessor_config.json", {"size": squash(384)["size"]},
     Preprocessing(384, 384, True, "bicubic", CLIP_MEAN, CLIP_STD)),
    ("smolvlm2-256m", "preprocessor_config.json", SMOLVLM2, LANCZOS),
    ("smolvlm2-256m", "preprocessor_config.json", {n: v for n, v in SMOLVLM2.items() if n != "video_sampling"},
     Preprocessing(512, 512, True, "lanczos", HALF, HALF, 2048)),
])  # fmt: skip
def test_preprocessing_is_that_of_the_folder(tmp_path, name, file, fields, expected):
    """Those of the published files, and the defaults of transformers' processors."""
    write_preprocessing(tmp_path, name, file, **fields)
    assert read(tmp_path) == expected
    with torch.device("meta"):
        assert MLLM.from_config(tmp_path).vit.preprocessing == expected


@pytest.mark.parametrize("name, file, fields, words", [
    ("llava-1.5-7b", "preprocessor_config.json", {"size": 224, "crop_size": 224}, ["224", "336", "image_size"]),
    ("llava-1.5-7b", "preprocessor_config.json", {"do_pad": True}, ["do_pad is true"]),
    ("llava-onevision-qwen2-0.5b", VIDEO_FILE, squash(378), ["378 pixels", "384"]),
    ("smolvlm2-256m", "preprocessor_config.json", SMOLVLM2 | {"resample": 3}, ["resample is 3", "LANCZOS"]),
    ("smolvlm2-256m", "preprocessor_config.json", SMOLVLM2 | {"max_image_size": None}, ["'max_image_size'"]),
    ("smolvlm2-256m", "preprocessor_config.json", SMOLVLM2 | {"max_image_size": {"longest_edge": 364}}, ["364", "512"]),
    ("smolvlm2-256m", "preprocessor_config.json", SMOLVLM2 | {"video_sampling": {"fps": 1}}, [
        "video_sampling", "'video_size'"]),
    ("smolvlm2-256m", "preprocessor_config.json", SMOLVLM2 | {"do_rescale": False}, ["do_rescale is false"]),
    ("smolvlm2-256m", "preprocessor_config.json", TWO_STEPS | {"size": {"height": 9}, "max_image_size": {}}, [
        "max_image_size: field 'longest_edge' is missing"]),
])  # fmt: skip
def test_unsupported_preprocessing_is_refused(tmp_path, name, file, fields, words):
    path = write_preprocessing(tmp_path, name, file, **fields)
    with refused(str(path), *words):
        read(tmp_path)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-onevision-qwen2-0.5b", "smolvlm2-256m"])
def test_missing_preprocessing_is_refused(tmp_path, name):
    """The defaults of transformers are not those of the published models."""
    with refused("video_preprocessor_config.json" if "onevision" in name else "/preprocessor_config.json"):
        read(config_folder(tmp_path, name))


PROCESSORS = {  # what reads the file in [3], the largest difference in grey levels, whether frames are noise
    "llava-1.5-7b": (transformers.CLIPImageProcessorPil, 4, False),
    "llava-interleave-qwen-0.5b": (transformers.SiglipImageProcessorPil, 4, False),
    "smolvlm2-256m": (transformers.SmolVLMImageProcessorPil, 2, True),
    "smolvlm2, frames": (transformers.SmolVLMVideoProcessor, 0, True),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_frames_become_the_pixels_of_transformers(tmp_path, name):
    """Random frames, seed 0, as [3] preprocesses them. FFmpeg's resize differs from PIL's by up to 4 levels of smooth
    frames; LANCZOS by up to 1 level a step from PIL's, and not at all from torchvision's."""
    processor, tolerance, noise = PROCESSORS[name]
    fields = {"llava-1.5-7b": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
              "llava-interleave-qwen-0.5b": squash(384)}.get(name, SMOLVLM2)  # fmt: skip
    write_preprocessing(tmp_path, name.replace("2, frames", "2-256m"), "preprocessor_config.json", **fields)
    with torch.device("meta"):
        vit = MLLM.from_config(tmp_path).vit
    if name == "smolvlm2-256m":  # as frames of videos: to 512, and no parts
        fields = fields | {"size": {"longest_edge": 512}, "do_image_splitting": False}
    elif name == "smolvlm2, frames":  # transformers 5 lets `size` replace video_sampling.video_size
        fields = {name: value for name, value in deepcopy(fields).items() if name != "size"}
    processor, generator = processor(**fields), torch.Generator().manual_seed(0)
    for height, width in ((90, 200), (233, 101), (120, 121), (700, 520), (512, 512)):
        picture = torch.rand(1, 3, *((height, width) if noise else (5, 5)), generator=generator) * 200 + 20
        picture = F.interpolate(picture, (height, width), mode="bicubic").clamp(0, 255).byte()[0]
        frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        found = frame_to_rgb(frame, vit.preprocessing, VideoReformatter())
        found = vit.normalize(torch.from_numpy(np.ascontiguousarray(found.transpose(2, 0, 1))))
        images = {"videos": [picture[None]]} if "Video" in type(processor).__name__ else {"images": [picture]}
        expected = next(iter(processor(**images, return_tensors="pt").values())).view(found.shape)
        levels = (found - expected).abs() * 255 * torch.tensor(vit.preprocessing.std)[:, None, None]
        assert levels.max() <= tolerance + 1e-3
