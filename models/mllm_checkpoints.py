"""Public multimodal language models (MLLMs): their configs, tensors and preprocessing, as `mllm.py` needs them.

Four families, told apart by `model_type` in config.json, in the format of transformers [1]:

    family            vision encoder   taken from it                       language model   published models
    llava             CLIP, SigLIP     the output of any block             Llama, Qwen 2    LLaVA 1.5, LLaVA interleave
    llava_onevision   SigLIP           the output of any block             Qwen 2           LLaVA-OneVision, for videos
    idefics3          SigLIP           the last output, after a norm       Llama            SmolVLM
    smolvlm           SigLIP           the last output, after a norm       Llama            SmolVLM2

A config has a vision_config and a text_config. They leave out what is the default of their class, which can be a lot:
LLaVA 1.5 states three fields of its Llama.

Blocks behind the one whose output is taken change nothing. Our model does not have them, and their tensors are ignored.
Configs are dicts of the fields of `mllm.MLLMConfig`.

References
[1] transformers, models/{llava,llava_onevision,idefics3,smolvlm}: configuration_*.py for defaults and tying,
    modeling_*.py for the names of tensors; conversion_mapping.py for their other spellings.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common import preprocessing
from common.errors import InputError
from common.files import field, one_of, read_json
from models.lm_checkpoints import check_supported, parse_lm_config, read_lm_config
from models.names import VITS, find_prefix, lm_tensor_names, tensor_names
from models.vit_checkpoints import check_frame_size, default_preprocessing, parse_vit_config
from models.weights import copy_strict, drop_tied_copy

# --------------------------------------------------------------------------------------- configs

CLIP, SIGLIP = {"clip_vision_model": "clip"}, {"siglip_vision_model": "siglip"}  # model_type: family of a ViT
IDEFICS3 = dict.fromkeys(("idefics3_vision", "smolvlm_vision", "idefics3"), "idefics3")
MLLM_FAMILIES = {  # what the model_types of vision_config and of text_config may be
    "llava": (CLIP | SIGLIP, ["llama", "qwen2"]),
    "llava_onevision": (SIGLIP, ["qwen2"]),
    "idefics3": (IDEFICS3, ["llama"]),
    "smolvlm": (IDEFICS3, ["llama"]),
}


def read_mllm_config(path: Path) -> dict[str, Any]:
    """Reads a public config.json. Raises InputError for every field whose value would need other computations."""
    config = read_json(path)
    family = one_of(config, "model_type", MLLM_FAMILIES, path)
    vision_types, text_types = MLLM_FAMILIES[family]
    vision, where = field(config, "vision_config", dict, path), f"{path}: vision_config"
    vit = parse_vit_config(vision, vision_types[one_of(vision, "model_type", vision_types, where)], where)
    lm_family, lm = _read_text(config, family, text_types, path)
    fields = {"family": family, "lm_family": lm_family}
    if family.startswith("llava"):
        check_supported(config, {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}, path)
        depth = vit["depth"]
        layer = field(config, "vision_feature_layer", int, path)
        blocks = layer if layer >= 0 else depth + 1 + layer  # up to the one whose output is taken; -1 is the last one
        if not 1 <= blocks <= depth:
            raise InputError(f"{path}: vision_feature_layer is {layer}, expected 1 to {depth} or -{depth} to -1")
        # "default" leaves out the first token of an image: CLIP's class token, but of SigLIP it would be a patch.
        one_of(config, "vision_feature_select_strategy", ("default" if vit["class_token"] else "full",), path)
        fields["unused_blocks"] = depth - blocks
        vit |= {"depth": blocks, "final_norm": False, "pooling_head": False}
    else:
        fields["shuffle"] = field(config, "scale_factor", int, path, 2, 1, 2**10)
    return fields | {"vit": vit, "lm": lm}


def _read_text(config: dict[str, Any], family: str, types: list[str], path: Path) -> tuple[str, dict[str, Any]]:
    """The model_type of the language model and its config. tie_word_embeddings counts outside text_config; in LLaVA's
    families it may be in either."""
    text, where = field(config, "text_config", dict, path), f"{path}: text_config"
    kind = one_of(text, "model_type", types, where)
    tied = field(config, "tie_word_embeddings", bool, path, False)
    if family.startswith("llava"):
        tied = tied or field(text, "tie_word_embeddings", bool, where, False)
    text = text | {"model_type": kind, "tie_word_embeddings": tied}
    return kind, parse_lm_config(text, where, path.with_name("generation_config.json"))


def read_text_config(path: Path) -> dict[str, Any]:
    """The fields of `lm.LMConfig` from the config.json of a language model or of an MLLM. Raises InputError."""
    if read_json(path).get("model_type") in MLLM_FAMILIES:
        return read_mllm_config(path)["lm"]
    return read_lm_config(path)


def read_mllm_preprocessing(folder: Path, config: dict[str, Any]) -> preprocessing.Preprocessing:
    """What the folder's files say about the frames of videos. Raises InputError if it does not fit config.json."""
    path = preprocessing.preprocessor_file(folder, video=config["family"] == "llava_onevision")
    if config["family"] == "llava":
        check_supported(preprocessing.read_processor(path), {"do_pad": False}, path)
        default = default_preprocessing("clip" if config["vit"]["class_token"] else "siglip", config["vit"])
        found = preprocessing.read_preprocessing(path, default)
    elif config["family"] == "llava_onevision":
        default = preprocessing.Preprocessing(384, 384, squash=True)  # CLIP's mean, as in [1]
        found = preprocessing.read_preprocessing(path, default)
    else:
        found = preprocessing.read_lanczos_preprocessing(path)
    check_frame_size(found, config["vit"], path)
    return found


# --------------------------------------------------------------------------------------- tensors

PROJECTORS = {"linear1.*": "linear_1.*", "linear2.*": "linear_2.*", "linear.weight": "modality_projection.proj.weight"}


def mllm_tensor_names(mllm: nn.Module, file: Iterable[str]) -> dict[str, str]:
    """Returns {our tensor: theirs} of a `mllm.MLLM`, with the prefixes that the names in a file have. LLaVA's published
    files, transformers 4 and transformers 5 differ."""
    vit_prefix = find_prefix(file, "embeddings.patch_embedding.weight")
    projector_prefix = find_prefix(file, "linear_1.weight") or find_prefix(file, "modality_projection.proj.weight")
    parts = {
        "vit": tensor_names(mllm.vit, VITS["clip"], vit_prefix),
        "projector": tensor_names(mllm.projector, PROJECTORS, projector_prefix),
        "lm": lm_tensor_names(mllm.lm, file),
    }
    names = {f"{part}.{ours}": theirs for part, pairs in parts.items() for ours, theirs in pairs.items()}
    if mllm.newline is not None:
        names["newline"] = find_prefix(file, "image_newline") + "image_newline"
    return names


def copy_mllm_tensors(mllm: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Assigns the tensors of the file `path`. Those of unused blocks and of an unused pooling head are ignored. Raises
    InputError as `copy_strict`."""
    config, names = mllm.config, mllm_tensor_names(mllm, tensors)
    if config.lm.tied:
        drop_tied_copy(tensors, names["lm.embed.weight"])
    prefix = find_prefix(tensors, "embeddings.patch_embedding.weight")
    blocks = range(config.vit.depth, config.vit.depth + config.unused_blocks)
    unused = (f"{prefix}head.", *(f"{prefix}encoder.layers.{i}." for i in blocks))
    copy_strict(mllm, {name: x for name, x in tensors.items() if not name.startswith(unused)}, names, path)
