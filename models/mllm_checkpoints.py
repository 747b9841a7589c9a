"""Public multimodal language models (MLLMs): their configs, tensors and preprocessing, as `mllm.py` needs them.

Four layouts, told apart by `model_type` in config.json, in the format of transformers [1]:

    layout            vision encoder   taken from it                       language model   published models
    llava             CLIP, SigLIP     the output of any block             Llama, Qwen 2    LLaVA 1.5, LLaVA interleave
    llava_onevision   SigLIP           the output of any block             Qwen 2           LLaVA-OneVision, for videos
    idefics3          SigLIP           the last output, after a norm       Llama            SmolVLM
    smolvlm           SigLIP           the last output, after a norm       Llama            SmolVLM2

A config has a vision_config and a text_config. They leave out what is the default of their class, which can be a lot:
LLaVA 1.5 states three fields of its Llama.

Blocks behind the one whose output is taken change nothing. Our model does not have them; their tensors are ignored.
Configs are dicts of the fields of `mllm.MLLMConfig`.

References
[1] transformers, models/{llava,llava_onevision,idefics3,smolvlm}: configuration_*.py for defaults and tying,
    modeling_*.py for the names of tensors; conversion_mapping.py for their other spellings.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import InputError
from common.files import bounded, field, read_json
from common.preprocessing import (
    VIDEO_PREPROCESSORS,
    Preprocessing,
    read_lanczos_preprocessing,
    read_preprocessing,
)
from models.lm_checkpoints import lm_tensor_names, parse_lm_config, read_lm_config
from models.vit_checkpoints import VISION_DEFAULTS, parse_vit_config, read_folder_preprocessing, vit_tensor_names
from models.vit_names import expand
from models.weights import drop_tied_copy, read_tensors

# --------------------------------------------------------------------------------------- configs

IDEFICS3_VISION = {"idefics3_vision": "idefics3", "smolvlm_vision": "idefics3", "idefics3": "idefics3"}


@dataclass(frozen=True)
class Layout:
    """What a layout supports. The first of `vision` and of `text` is the default model_type."""

    vision: dict[str, str]  # model_type: family of `vit_checkpoints`
    text: tuple[str, ...]
    image_token: tuple[str, int]  # the field and its default
    feature_layer: int = -1  # default of vision_feature_layer
    select_strategy: str = "full"  # default of vision_feature_select_strategy


LAYOUTS = {
    "llava": Layout({"clip_vision_model": "clip", "siglip_vision_model": "siglip"}, ("llama", "qwen2"),
                    ("image_token_index", 32000), -2, "default"),
    "llava_onevision": Layout({"siglip_vision_model": "siglip"}, ("qwen2",), ("video_token_index", 151647)),
    "idefics3": Layout(IDEFICS3_VISION, ("llama",), ("image_token_id", 128257)),
    "smolvlm": Layout(IDEFICS3_VISION, ("llama",), ("image_token_id", 128257)),
}  # fmt: skip
TEXT_DEFAULTS = {  # of fields that a language model on its own must state
    "llama": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    ),
    "qwen2": dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
    ),
}  # fmt: skip
# Fields with a single supported value, which is also their default.
SUPPORTED_LLAVA = dict(projector_hidden_act="gelu", multimodal_projector_bias=True)
SUPPORTED_TEXT = dict(use_resampler=False, qk_layer_norms=False, rope_interleaved=False)  # of SmolVLM's Llama


def read_mllm_config(path: Path) -> dict[str, Any]:
    """Reads a public config.json. Raises InputError for every field whose value would need other computations."""
    config = read_json(path)
    name = field(config, "model_type", str, path)
    if name not in LAYOUTS:
        raise InputError(f"{path}: model_type is {name!r}, supported multimodal models: {', '.join(LAYOUTS)}")
    layout, is_llava = LAYOUTS[name], name.startswith("llava")
    family, vit = _read_vision(config, layout, path)
    lm_kind, lm = _read_text(config, layout, is_llava, path)
    token, default = layout.image_token
    fields = dict(
        layout=name, vit_family=family, lm_family=lm_kind, vit=vit, lm=lm,
        image_token_id=bounded(config, token, int, path, 0, lm["vocab"] - 1, default),
    )  # fmt: skip
    if not is_llava:
        return fields | {"shuffle": _read_shuffle(config, vit, path)}
    _check_supported(config, SUPPORTED_LLAVA, path)
    depth = _read_feature_depth(config, layout, vit["depth"], path)
    return fields | dict(
        vit=vit | dict(depth=depth, final_norm=False, pooling_head=False), unused_blocks=vit["depth"] - depth,
        class_token=_read_class_token(config, layout, family, path),
    )  # fmt: skip


def _check_supported(config: dict[str, Any], supported: dict[str, Any], where: str | Path) -> None:
    for name, value in supported.items():
        if config.get(name) not in (None, value):
            raise InputError(f"{where}: {name} is {config[name]!r:.200}, only {value!r} is supported")


def _read_kind(config: dict[str, Any], supported: tuple[str, ...], where: str) -> str:
    kind = field(config, "model_type", str, where, supported[0])
    if kind not in supported:
        raise InputError(f"{where}: model_type is {kind!r}, expected {' or '.join(supported)}")
    return kind


def _read_vision(config: dict[str, Any], layout: Layout, path: Path) -> tuple[str, dict[str, Any]]:
    """The ViT's family, and its config with all of its blocks."""
    vision, where = field(config, "vision_config", dict, path), f"{path}: vision_config"
    family = layout.vision[_read_kind(vision, tuple(layout.vision), where)]
    return family, parse_vit_config(vision, family, where, VISION_DEFAULTS[family])


def _read_text(config: dict[str, Any], layout: Layout, is_llava: bool, path: Path) -> tuple[str, dict[str, Any]]:
    """The model_type of the language model and its config.

    tie_word_embeddings counts outside text_config; in LLaVA's layouts it may be in either. Texts end with the EOS of
    generation_config.json, else with that of text_config.
    """
    text, where = field(config, "text_config", dict, path), f"{path}: text_config"
    kind = _read_kind(text, layout.text, where)
    _check_supported(text, SUPPORTED_TEXT, where)
    tied = field(config, "tie_word_embeddings", bool, path, False)
    if is_llava:
        tied = tied or field(text, "tie_word_embeddings", bool, where, False)
    defaults = {name: value for name, value in TEXT_DEFAULTS[kind].items() if text.get(name) is None}
    text = text | defaults | {"model_type": kind, "tie_word_embeddings": tied}
    generation = path.with_name("generation_config.json")
    if generation.is_file() and read_json(generation).get("eos_token_id") is not None:
        text.pop("eos_token_id", None)
    return kind, parse_lm_config(text, where, generation)


def _read_shuffle(config: dict[str, Any], vit: dict[str, Any], path: Path) -> int:
    shuffle, side = bounded(config, "scale_factor", int, path, 1, 2**10, 2), vit["image_size"] // vit["patch_size"]
    if side % shuffle:
        raise InputError(f"{path}: scale_factor is {shuffle}, expected a divisor of {side}, the patches in a row")
    return shuffle


def _read_feature_depth(config: dict[str, Any], layout: Layout, depth: int, path: Path) -> int:
    """The number of blocks up to the one whose output is taken: vision_feature_layer, or, if it is negative, counted
    from the end: -1 is the last block."""
    layer = field(config, "vision_feature_layer", int, path, layout.feature_layer)
    blocks = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= blocks <= depth:
        raise InputError(f"{path}: vision_feature_layer is {layer}, expected 1 to {depth} or -{depth} to -1")
    return blocks


def _read_class_token(config: dict[str, Any], layout: Layout, family: str, path: Path) -> bool:
    """Whether the class token becomes a visual token, too. "default" leaves out the first token of an image. SigLIP
    has no class token, so it would lose a patch."""
    strategy = field(config, "vision_feature_select_strategy", str, path, layout.select_strategy)
    supported = ("default", "full") if family == "clip" else ("full",)
    if strategy not in supported:
        raise InputError(f"{path}: vision_feature_select_strategy is {strategy!r}, expected {' or '.join(supported)}")
    return family == "clip" and strategy == "full"


def read_text_config(path: Path) -> dict[str, Any]:
    """The fields of `lm.LMConfig` from the config.json of a language model or of an MLLM. Raises InputError."""
    if read_json(path).get("model_type") in LAYOUTS:
        return read_mllm_config(path)["lm"]
    return read_lm_config(path)


# --------------------------------------------------------------------------------- preprocessing


def read_mllm_preprocessing(folder: Path, config: dict[str, Any]) -> Preprocessing:
    """What the folder's files say about the frames of videos. Raises InputError if it does not fit config.json."""
    path, size = folder / "preprocessor_config.json", config["vit"]["image_size"]
    if config["layout"] == "llava":
        if not path.is_file():
            raise InputError(f"{path}: expected a file, without which the frames' size and colours are not known")
        if field(read_json(path), "do_pad", bool, path, False):
            raise InputError(f"{path}: do_pad is true, only false is supported")
        return read_folder_preprocessing(folder, config["vit_family"], config["vit"])
    if config["layout"] == "llava_onevision":
        files = [folder / name for name in VIDEO_PREPROCESSORS]
        path = next(filter(Path.is_file, files), files[0])
        preprocessing = read_preprocessing(path, Preprocessing(384, 384, squash=True))  # CLIP's mean, as in [1]
    else:
        preprocessing = read_lanczos_preprocessing(path)
    if preprocessing.size != size:
        raise InputError(f"{path}: its frames are {preprocessing.size} pixels wide, expected {size}, the image_size of "
                         "config.json")  # fmt: skip
    return preprocessing


def check_mllm_config(folder: Path) -> None:
    """Raises InputError unless the folder's configs, without its weights, are of a supported MLLM."""
    read_mllm_preprocessing(folder, read_mllm_config(folder / "config.json"))


# ----------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Spelling:
    """How a checkpoint spells the names of its tensors."""

    vit: str  # prefix, in place of "vision_model."
    lm: str  # prefix, in place of "model."
    head: str
    projector: str  # prefix
    newline: str = ""


def find_spelling(layout: str, tensors: dict[str, Tensor]) -> Spelling:
    """LLaVA's layouts have several spellings: published files, transformers 4 and transformers 5 differ."""
    if not layout.startswith("llava"):
        return Spelling("model.vision_model.", "model.text_model.", "lm_head.weight",
                        "model.connector.modality_projection.proj.")  # fmt: skip
    root, lm, head = "", "language_model.model.", "language_model.lm_head.weight"
    if any(name.startswith("model.language_model.") for name in tensors):
        root, lm, head = "model.", "model.language_model.", "lm_head.weight"
    vit = f"{root}vision_tower."
    if any(name.startswith(f"{vit}vision_model.") for name in tensors):
        vit += "vision_model."
    return Spelling(vit, lm, head, f"{root}multi_modal_projector.", f"{root}image_newline")


def mllm_tensor_names(config, spelling: Spelling) -> dict[str, str]:
    """For an `mllm.MLLMConfig`: our parameter name -> the name in a checkpoint."""
    vit = expand(vit_tensor_names(config.vit_family, {}), config.vit.depth)
    names = {f"vit.{ours}": spelling.vit + theirs.removeprefix("vision_model.") for ours, theirs in vit.items()}
    for ours, theirs in lm_tensor_names(config.lm).items():
        is_head = theirs == "lm_head.weight"
        names[f"lm.{ours}"] = spelling.head if is_head else spelling.lm + theirs.removeprefix("model.")
    if not config.layout.startswith("llava"):
        return names | {"projector.linear.weight": f"{spelling.projector}weight"}
    names |= expand({f"projector.linear{i}.*": f"{spelling.projector}linear_{i}.*" for i in (1, 2)}, 0)
    return names | ({"newline": spelling.newline} if config.layout == "llava_onevision" else {})


def read_mllm_checkpoint(folder: Path, config) -> tuple[dict[str, Tensor], dict[str, str], Path, list[str]]:
    """The arguments of `copy_strict` for an `mllm.MLLMConfig`: tensors, names, the file that errors name, and ignored
    tensors. These are the unused blocks, the unused pooling head, and tables of old files. Raises InputError."""
    tensors, where = read_tensors(folder)
    spelling = find_spelling(config.layout, tensors)
    if config.lm.tied:
        drop_tied_copy(tensors, spelling.head, f"{spelling.lm}embed_tokens.weight")
    blocks = range(config.vit.depth, config.vit.depth + config.unused_blocks)
    prefixes = tuple(f"{spelling.vit}encoder.layers.{i}." for i in blocks)
    if config.vit_family == "siglip":
        prefixes += (f"{spelling.vit}head.",)
    tables = [f"{spelling.lm}layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.lm.depth)]
    tables.append(f"{spelling.vit}embeddings.position_ids")
    ignored = [name for name in tensors if name.startswith(prefixes) or name in tables]
    return tensors, mllm_tensor_names(config, spelling), where, ignored
