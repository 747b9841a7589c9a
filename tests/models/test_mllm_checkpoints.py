"""Public multimodal language models: configs and parameter counts, ignored tensors, preprocessing, and refused files.

References
[1] transformers, models/{llava,llava_onevision,idefics3,smolvlm,internvl}: defaults, names and shapes of tensors.
[2] The sizes of the published files: 14,126,854,144 bytes for LLaVA 1.5 in fp16, 471 tensors for SmolVLM2-256M.
[3] SmolVLMVideoProcessor of transformers.
"""

import json
from pathlib import Path

import av
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from common.preprocessing import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from models import mllm as mllm_module
from models.mllm import MLLM
from tests.common.helpers import refused
from tests.models.helpers import CONFIGS, change_json, last_field
from tests.models.test_mllm import CASES, SQUASH, VIDEO_FILE, save_model
from tests.models.test_vit import read_weights
from tests.tiny import bits
from video_data.video import VideoReformatter, frame_to_rgb

LLAVA, INTERLEAVE, ONEVISION = "llava-1.5-7b", "llava-interleave-qwen-0.5b", "llava-onevision-qwen2-0.5b"
SMOLVLM, INTERNVL = "smolvlm2-256m", "internvl3-1b"
PUBLISHED = {  # name: parameters, tensors, visual tokens per image
    LLAVA: (7_063_427_072, 686, 576),
    INTERLEAVE: (864_031_264, 715, 729),
    SMOLVLM: (256_484_928, 471, 64),
    ONEVISION: (893_675_552, 716, 196),
    INTERNVL: (938_193_024, 733, 256),
    "internvl3.5-1b": (1_060_897_792, 753, 256),
}


def squash(size: int) -> dict:
    return SQUASH | {"size": {"height": size, "width": size}}


SIZES = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, "do_image_splitting": True}
VIDEO = {"video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}}}
OF_SMOLVLM = SIZES | VIDEO | {"resample": 1, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_pad": True}
OF_LLAVA = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "resample": 3}
OF_INTERNVL = {"size": {"height": 448, "width": 448}, "crop_size": None, "do_center_crop": None, "resample": 3}
OF_INTERNVL |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "crop_to_patches": False, "max_patches": 12}
FILES = {  # name: its preprocessor_config.json
    LLAVA: OF_LLAVA,
    INTERLEAVE: squash(384),
    ONEVISION: squash(384) | {"do_center_crop": None, "do_pad": True},
    SMOLVLM: OF_SMOLVLM,
    **dict.fromkeys((INTERNVL, "internvl3.5-1b"), OF_INTERNVL),
}


def make_folder(folder: Path, name: str, preprocessing: dict | None = None, **changes) -> Path:
    """The configs of a published model, changed, and a generation_config.json with EOS 2."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    for part, fields in changes.items():
        config[part] = config[part] | fields if isinstance(fields, dict) and part in config else fields
    (folder / "config.json").write_text(json.dumps(config))
    change_json(folder / "generation_config.json", eos_token_id=2)
    path = folder / (VIDEO_FILE if name == ONEVISION else "preprocessor_config.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(FILES[name] if preprocessing is None else preprocessing))
    return path


# -------------------------------------------------------------------------- configs and counts


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_public_config_has_the_published_parameters(tmp_path, name):
    """On the meta device: the count of [2], the names and shapes of [1]. Only unused blocks are not in our model."""
    count, tensors, tokens = PUBLISHED[name]
    make_folder(tmp_path, name)
    ours = MLLM.from_config(tmp_path)
    config = ours.config
    with torch.device("meta"):
        # Of a new InternVL, transformers ties the head; the published files have one.
        untied = {"tie_word_embeddings": False} if name.startswith("internvl") else {}
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path, **untied))
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert config.lm.rope_theta == theirs.config.text_config.rope_parameters["rope_theta"]
    in_blocks = sum(p.numel() for p in ours.vit.blocks[0].parameters())
    assert sum(p.numel() for p in ours.parameters()) + config.unused_blocks * in_blocks == count
    names = ours.names_in(theirs.state_dict())
    shapes = {names[ours_name]: p.shape for ours_name, p in ours.state_dict().items()}
    stored = {n: p for n, p in theirs.state_dict().items() if not config.lm.tied or n != "lm_head.weight"}
    expected = {n: p.squeeze().shape for n, p in stored.items()}  # InternVL's class token is (1, 1, D)
    assert len(expected) == tensors
    unused = {n for n in expected if config.unused_blocks and n.startswith("model.vision_tower.encoder.layers.23.")}
    assert shapes == {n: shape for n, shape in expected.items() if n not in unused}
    assert len(unused) == 16 * config.unused_blocks == (16 if name == LLAVA else 0)
    visual = ours.connect(ours.vit(torch.empty(2, 3, config.vit.image_size, config.vit.image_size, device="meta")))
    assert visual.shape == (2, tokens, config.lm.width) and ours.num_frame_tokens(0) == tokens


@pytest.mark.parametrize("name", [LLAVA, SMOLVLM])
def test_missing_fields_have_the_defaults_of_transformers(tmp_path, name):
    """Those outside of vision_config and text_config."""
    make_folder(tmp_path, name)
    change_json(tmp_path / "config.json", scale_factor=None, tie_word_embeddings=None)
    ours, theirs = MLLM.from_config(tmp_path).config, AutoConfig.from_pretrained(tmp_path)
    assert (ours.shuffle, ours.lm.tied) == (getattr(theirs, "scale_factor", 1), theirs.tie_word_embeddings)


@pytest.mark.parametrize("name", [INTERLEAVE, SMOLVLM])
def test_the_head_is_tied_where_transformers_ties_it(tmp_path, name):
    """tie_word_embeddings outside and inside of text_config: LLaVA reads both, SmolVLM only the one outside."""
    for outside, inside in ((True, True), (True, False), (False, True), (False, False)):
        make_folder(tmp_path, name, tie_word_embeddings=outside, text_config={"tie_word_embeddings": inside})
        tied = AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
        assert MLLM.from_config(tmp_path).config.lm.tied == tied == (outside or (inside and "llava" in name))


REFUSED = [  # a model, a part of its config, and a word of the message, if that is not the name of the last field
    (LLAVA, {"model_type": "llava_next"}, "llava or llava_onevision or idefics3 or smolvlm or internvl"),
    (LLAVA, {"vision_config": {"model_type": "pixtral"}}), (LLAVA, {"vision_config": {"hidden_act": "relu"}}),
    (LLAVA, {"text_config": []}), (LLAVA, {"text_config": {"hidden_act": "gelu"}}, "text_config: hidden_act"),
    (LLAVA, {"vision_feature_layer": [-2, -1]}), (LLAVA, {"vision_feature_layer": 0}),
    (LLAVA, {"vision_feature_layer": -25}), (LLAVA, {"vision_feature_select_strategy": "full"}, "expected default"),
    (INTERLEAVE, {"vision_feature_select_strategy": "default"}, "expected full"),
    (LLAVA, {"projector_hidden_act": "relu"}), (ONEVISION, {"text_config": {"model_type": "llama"}}, "expected qwen2"),
    (ONEVISION, {"vision_config": {"model_type": "clip_vision_model"}}, "expected siglip_vision_model"),
    (SMOLVLM, {"scale_factor": 5}, "5 x 5"), (SMOLVLM, {"text_config": {"use_resampler": True}}),
    *((INTERNVL, {"vision_config": fields}) for fields in (
        {"attention_bias": False}, {"norm_type": "rms_norm"}, {"use_mean_pooling": False}, {"image_size": [448, 336]})),
    (INTERNVL, {"vision_config": {"patch_size": 64}}, "2 x 2"),  # of a grid of 7 x 7
    (INTERNVL, {"text_config": {"model_type": "llama"}}), (INTERNVL, {"downsample_ratio": 0.25}),
    (INTERNVL, {"vision_feature_layer": -2}),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_an_unsupported_config_is_refused(tmp_path, case):
    name, changes, *words = case
    make_folder(tmp_path, name, **changes)
    with refused(str(tmp_path / "config.json"), *(words or [last_field(changes)])):
        MLLM.from_config(tmp_path)


# -------------------------------------------------------------------------------- ignored tensors


SAVED = "llava, clip", "llava_onevision", "smolvlm"


@pytest.fixture(scope="module")
def saved(request, tmp_path_factory) -> Path:
    """The folder of a random model; its name begins with that of its case."""
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder, CASES[request.param])
    return folder


def load(folder: Path, tensors: dict[str, Tensor]) -> MLLM:
    """Loads a model with these tensors instead of those in its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mllm_module, "read_tensors", lambda path: (dict(tensors), path / "model.safetensors"))
        return MLLM.from_pretrained(folder)


@pytest.mark.parametrize("saved", [*SAVED, "internvl, qwen3"], indirect=True)
def test_no_other_tensors_are_ignored(saved):
    """A block more than in the config, and a norm behind the blocks, which InternVL does not have."""
    tensors = read_weights(saved)
    block = next(name for name in tensors if "encoder" in name and "fc1.bias" in name).replace(".0.", ".20.")
    for name in (block, "vision_tower.layernorm.weight"):
        with refused(str(saved / "model.safetensors"), "unexpected", name):
            load(saved, tensors | {name: torch.zeros(2)})


@pytest.mark.parametrize("saved", SAVED, indirect=True)
def test_tensors_that_change_nothing_are_ignored(saved):
    """Tables of old files, SigLIP's pooling head, the tensors of unused blocks whatever their shape."""
    tensors = read_weights(saved)
    k = next(name for name in tensors if "layers.1.self_attn.k_proj.weight" in name and "encoder" not in name)
    positions = next(name for name in tensors if "position_embedding" in name)
    others = {name: torch.zeros(2) for name in tensors  # LLaVA with CLIP uses two of its three blocks
              if "clip" in saved.name and name.startswith("vision_tower.encoder.layers.2.")}
    others[k.replace("k_proj.weight", "rotary_emb.inv_freq")] = torch.ones(3)
    others[positions.replace("position_embedding.weight", "position_ids")] = torch.arange(9)[None]
    if "onevision" in saved.name:
        others["vision_tower.head.mlp.fc1.bias"] = torch.zeros(2)
    assert bits(load(saved, tensors | others).state_dict()) == bits(MLLM.from_pretrained(saved).state_dict())


# ---------------------------------------------------------------------------------- preprocessing


IMAGES_ONLY = {name: value for name, value in OF_SMOLVLM.items() if name != "video_sampling"}
PREPROCESSING = [  # those of published files and the defaults of transformers' processors
    (LLAVA, OF_LLAVA, Preprocessing(336, 336, False, "bicubic", CLIP_MEAN, CLIP_STD)),
    (LLAVA, {}, Preprocessing(336, 336, False, "bicubic", CLIP_MEAN, CLIP_STD)),
    (INTERLEAVE, squash(384), Preprocessing(384, 384, True, "bicubic", HALF, HALF)),
    (ONEVISION, FILES[ONEVISION], Preprocessing(384, 384, True, "bicubic", HALF, HALF)),
    (ONEVISION, {"size": squash(384)["size"]}, Preprocessing(384, 384, True, "bicubic", CLIP_MEAN, CLIP_STD)),
    (SMOLVLM, OF_SMOLVLM, Preprocessing(512, 512, True, "lanczos", HALF, HALF, 512)),
    (INTERNVL, OF_INTERNVL, Preprocessing(448, 448, True, "bicubic", IMAGENET_MEAN, IMAGENET_STD)),
    (INTERNVL, {"size": OF_INTERNVL["size"]}, Preprocessing(448, 448, True, "bicubic", CLIP_MEAN, CLIP_STD)),
    (SMOLVLM, IMAGES_ONLY, Preprocessing(512, 512, True, "lanczos", HALF, HALF, 2048)),
]


@pytest.mark.parametrize("name, fields, expected", PREPROCESSING)
def test_preprocessing_is_that_of_the_folder(tmp_path, name, fields, expected):
    """It must be there: the defaults of transformers are not those of the published models."""
    path = make_folder(tmp_path, name, fields)
    assert MLLM.from_config(tmp_path).vit.preprocessing == expected
    path.unlink()
    with refused("preprocessor_config.json"):
        MLLM.from_config(tmp_path)
    if name in (LLAVA, INTERLEAVE):
        change_json(tmp_path / "processor_config.json", image_processor=fields, patch_size=14)  # of transformers 5
        assert MLLM.from_config(tmp_path).vit.preprocessing == expected


REFUSED_PREPROCESSING = [
    (LLAVA, {"size": 224, "crop_size": 224}, "224"),
    (LLAVA, {"do_pad": True}, "do_pad"),
    (ONEVISION, squash(378), "378 pixels"),
    (SMOLVLM, OF_SMOLVLM | {"resample": 3}, "'resample'"),
    (SMOLVLM, OF_SMOLVLM | {"max_image_size": {"longest_edge": 364}}, "364"),
    (SMOLVLM, OF_SMOLVLM | {"video_sampling": {"fps": 1}}, "'video_size'"),
    (SMOLVLM, OF_SMOLVLM | {"do_rescale": False}, "do_rescale"),
]


@pytest.mark.parametrize("name, fields, word", REFUSED_PREPROCESSING)
def test_unsupported_preprocessing_is_refused(tmp_path, name, fields, word):
    path = make_folder(tmp_path, name, fields)
    with refused(str(path), word):
        MLLM.from_config(tmp_path)


@pytest.mark.parametrize("height, width", [(90, 200), (233, 101), (700, 520), (2, 1100), (1100, 30)])
def test_frames_become_the_pixels_of_transformers(tmp_path, height, width):
    """SmolVLM's two steps on random frames, seed 0, as [3] preprocesses them; other mean and std in each channel."""
    fields = OF_SMOLVLM | {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    make_folder(tmp_path, SMOLVLM, fields)
    vit, generator = MLLM.from_config(tmp_path).vit, torch.Generator().manual_seed(0)
    picture = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    found = vit.normalize(torch.tensor(frame_to_rgb(frame, vit.preprocessing, VideoReformatter())).permute(2, 0, 1))
    del fields["size"]  # transformers 5 lets it replace video_sampling.video_size
    processor = transformers.SmolVLMVideoProcessor(**fields)
    expected = processor(videos=[picture[None]], return_tensors="pt")["pixel_values"].view(found.shape)
    levels = (found - expected).abs() * 255 * torch.tensor(vit.preprocessing.std)[:, None, None]
    assert levels.max() <= 1e-3
