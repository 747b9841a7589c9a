"""Multimodal language models: every family against transformers [1], with tiny random models in real files.

A case is a family with a vision encoder and a language model. All parameters are random, so that no two tensors can be
confused. Each file is loaded in the spelling that transformers 5 writes, in that of the published files, and in those
of the modules of transformers 4 and 5.

[1] transformers, models/{llava,llava_onevision,idefics3,smolvlm,internvl}/modeling_*.py
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from models.mllm import MLLM
from tests.models.helpers import change_json, write_weights
from tests.models.test_vit import randomize, read_weights

IMAGE = 98  # the image token
TEXT = json.loads("""{
    "vocab_size": 99, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 100, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0
}""")
LLAMA, QWEN2 = TEXT | {"model_type": "llama"}, TEXT | {"model_type": "qwen2"}
QWEN3 = TEXT | {"model_type": "qwen3", "head_dim": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"patch_size": 14}
CLIP = VISION | {"model_type": "clip_vision_model", "image_size": 42}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "image_size": 45, "vision_use_head": False}  # 3 left over
IDEFICS3 = {"hidden_size": 16, "image_size": 32, "num_attention_heads": 2, "patch_size": 4}  # 8 x 8 patches
INTERNVIT = VISION | {"model_type": "internvl_vision", "image_size": [84, 84], "attention_bias": True}  # 6 x 6 patches
INTERNVIT |= {"patch_size": [14, 14]}
VIDEO_FILE = "video_processor/preprocessor_config.json"
SQUASH = {"size": {"height": 45, "width": 45}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TWO_STEPS = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "resample": 1}


@dataclass(frozen=True)
class Case:
    name: str  # in the names of its classes in transformers
    fields: dict  # of its config
    image_side: int
    pixels: str  # the name that transformers gives to pixels
    preprocessing: tuple[str, dict]  # the file and its content


def llava(vision: dict, text: dict, **fields) -> Case:
    fields |= {"vision_config": vision, "text_config": text, "image_token_index": IMAGE}
    file = ("preprocessor_config.json", {} if vision is CLIP else SQUASH)
    return Case("Llava", fields, vision["image_size"], "pixel_values", file)


def idefics3(name: str) -> Case:
    fields = {"vision_config": IDEFICS3, "text_config": LLAMA, "image_token_id": IMAGE, "scale_factor": 4}
    return Case(name, fields, 32, "pixel_values", ("preprocessor_config.json", TWO_STEPS))


def internvl(text: dict, tied: bool = False) -> Case:
    fields = {"vision_config": INTERNVIT, "text_config": text, "image_token_id": IMAGE, "tie_word_embeddings": tied}
    size = {"size": {"height": 84, "width": 84}}
    return Case("InternVL", fields, 84, "pixel_values", ("preprocessor_config.json", size))


TIED = QWEN2 | {"tie_word_embeddings": True}
ONEVISION = {"vision_config": SIGLIP, "text_config": TIED, "image_token_index": 97, "video_token_index": IMAGE}
BLOCK_1 = {"vision_feature_layer": 1, "vision_feature_select_strategy": "default"}
BLOCK_2 = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
LAST = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
CASES = {
    "llava, clip": llava(CLIP, LLAMA, **BLOCK_2),
    "llava, clip, first block": llava(CLIP, LLAMA, **BLOCK_1),
    "llava, siglip": llava(SIGLIP, TIED, **LAST),
    "llava_onevision": Case("LlavaOnevision", ONEVISION, 45, "pixel_values_videos", (VIDEO_FILE, SQUASH)),
    "idefics3": idefics3("Idefics3"),
    "smolvlm": idefics3("SmolVLM"),
    "internvl, qwen2": internvl(QWEN2 | {"rope_parameters": DYNAMIC}),
    "internvl, qwen3": internvl(QWEN3),
    "internvl, tied": internvl(QWEN2, tied=True),
}
every_case = pytest.mark.parametrize("reference", CASES, indirect=True)


@dataclass
class Reference:
    """A model of transformers with its inputs and outputs for two images."""

    case: Case
    folder: Path  # as transformers 5 saves it
    model: nn.Module
    pixels: Tensor  # (2, 3, S, S)
    texts: list[Tensor]  # before, between and after the images, ids
    image_tokens: Tensor  # (2, P', C)
    embeddings: Tensor  # (1, L, C), the language model's input
    logits: Tensor


def save_model(folder: Path, case: Case) -> nn.Module:
    """Saves a random model, seed 0, and its preprocessing; returns it."""
    config, model = (getattr(transformers, case.name + x) for x in ("Config", "ForConditionalGeneration"))
    model = randomize(model(config(**json.loads(json.dumps(case.fields)))), 0)
    model.save_pretrained(folder)
    (folder / case.preprocessing[0]).parent.mkdir(exist_ok=True)
    change_json(folder / case.preprocessing[0], **case.preprocessing[1])
    return model


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory) -> Reference:
    """Saves a model and runs it on random pixels, seed 1."""
    folder, case = tmp_path_factory.mktemp("mllm"), CASES[request.param]
    model = save_model(folder, case)
    inner = model.model
    lm = inner.text_model if hasattr(inner, "text_model") else inner.language_model
    inputs = []
    lm.register_forward_pre_hook(lambda _module, _args, kw: inputs.append(kw["inputs_embeds"]), with_kwargs=True)
    pixels = torch.randn(2, 3, case.image_side, case.image_side, generator=torch.Generator().manual_seed(1))
    # The images of one text: LLaVA's and InternVL's have no batch dimension.
    has_batch = case.name not in ("Llava", "InternVL")
    images = {case.pixels: pixels[None] if has_batch else pixels}
    is_video = case.pixels == "pixel_values_videos"
    features = (inner.get_video_features if is_video else inner.get_image_features)(**images).pooler_output
    features = torch.cat(list(features))
    image_tokens = features[: len(features) - is_video].unflatten(0, (2, -1))
    slots, texts = [IMAGE] * image_tokens.shape[1], [[1, 5], [] if is_video else [6], [7, 8]]
    ids = torch.tensor([[*texts[0], *slots, *texts[1], *slots, *[IMAGE] * is_video, *texts[2]]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits
    texts = [torch.tensor(text, dtype=torch.long) for text in texts]
    return Reference(case, folder, model, pixels, texts, image_tokens, inputs[0], logits)


def respell(tensors: dict[str, Tensor], spelling: str) -> dict[str, Tensor]:
    """Tensors as transformers 5 saves them, in one of the other spellings."""
    renamed = {}
    for name, tensor in tensors.items():
        if spelling in ("published", "modules of 4") and "lambda_1" not in str(tensors.keys()):  # InternVL: as saved
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if spelling != "published" and name.startswith("language_model."):
            name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_", "lm_")
        elif spelling != "published" and not name.startswith(("model.", "lm_head")):
            name = f"model.{name}"
        renamed[name] = tensor
    return renamed


@pytest.fixture(params=["saved", "published", "modules of 4", "modules of 5"])
def folder(request, reference, tmp_path) -> Path:
    """The reference's files with their tensors in one of the spellings."""
    shutil.copytree(reference.folder, tmp_path, dirs_exist_ok=True)
    if request.param != "saved":
        write_weights(tmp_path, respell(read_weights(reference.folder), request.param))
    return tmp_path


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@every_case
@torch.no_grad()
def test_a_model_equals_the_reference(reference, folder):
    """Visual tokens, the language model's input and logits. Bit for bit, rows do not depend on each other: here the
    second has the images in reverse order."""
    ours = MLLM.from_pretrained(folder)
    ours_eps, theirs_eps = ({m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
                            for model in (ours, reference.model))
    assert ours_eps == theirs_eps  # the tolerance would hide 1e-5 instead of 1e-6
    tokens = ours.connect(ours.vit(reference.pixels))
    assert_same(tokens, reference.image_tokens)
    assert tokens.equal(ours.connect(ours.vit.finish(ours.vit.run_blocks(reference.pixels))))
    assert tokens.shape[1] == ours.num_frame_tokens(0) == ours.grid[0] ** 2
    embeddings = ours.merge(reference.texts, [tokens[:1], tokens[1:]])
    assert_same(embeddings, reference.embeddings, 1e-6)
    assert_same(ours.lm(embeddings), reference.logits)
    two_rows = ours.merge(reference.texts, [tokens, tokens.flip(0)])
    assert two_rows[:1].equal(embeddings)
    assert two_rows[1:].equal(ours.merge(reference.texts, [tokens[1:], tokens[:1]]))
