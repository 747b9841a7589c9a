"""Public configs of language models: parameter counts, refused values, and tensors that must be there.

References: transformers, which reads the same config.json; the parameter counts of the models' pages [1]. Parameters
of published shapes are counted on the meta device.

[1] https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0, JackFram/llama-160m, meta-llama/Llama-3.2-1B,
    mistralai/Mistral-7B-v0.1, google/gemma-3-270m, google/gemma-3-1b-it, HuggingFaceTB/SmolLM2-135M,
    Qwen/Qwen2.5-0.5B, Qwen/Qwen3-0.6B: "Model size" and the index files
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model import AdapterConfig, Captioner
from models.lm import CausalLM, LMConfig
from models.lm_checkpoints import lm_tensor_names
from models.tokenizer import load_tokenizer
from models.vit import ViT, ViTConfig
from tests.common.helpers import ROOT, refused
from tests.models.helpers import CONFIGS, write_weights
from tests.models.test_lm import (
    GEMMA,
    LLAMA,
    LLAMA3,
    MISTRAL,
    QWEN2,
    QWEN3,
    WINDOW,
    make,
    new_spelling,
    published_tensors,
)

PARAMETERS = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-160m": 162_417_408,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "smollm2-135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b-it": 999_885_952,
}
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "gemma": GEMMA}
every_family = pytest.mark.parametrize("family", FAMILIES)
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())  # a tied head counts once


def read(folder: Path, config: dict) -> LMConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return LMConfig.from_json(folder / "config.json")


# ------------------------------------------------------------------------------- published models


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_public_config_has_the_published_parameters(name):
    """The count of [1] and of transformers; the names and shapes of transformers."""
    path = CONFIGS / f"{name}.json"
    config = LMConfig.from_json(path)
    with torch.device("meta"):
        ours = CausalLM(config)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert count_parameters(ours) == count_parameters(theirs) == PARAMETERS[name]
    names, shapes = lm_tensor_names(config), {n: p.shape for n, p in theirs.state_dict().items()}
    if config.tied:
        assert shapes.pop("lm_head.weight") == ours.head.weight.shape
    assert {names[n]: p.shape for n, p in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_public_config_is_read_as_transformers_reads_it(name):
    """Token ids, positions, epsilon, tying, and which blocks are local."""
    path = CONFIGS / f"{name}.json"
    ours, theirs = LMConfig.from_json(path), AutoConfig.from_pretrained(path)
    eos = theirs.eos_token_id
    assert ours.eos_ids == tuple(eos if isinstance(eos, list) else [eos]) and ours.eos_id == ours.eos_ids[0]
    assert (ours.bos_id, ours.max_positions) == (theirs.bos_token_id, theirs.max_position_embeddings)
    assert (ours.norm_eps, ours.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.window == getattr(theirs, "sliding_window", None)
    if ours.gemma:
        assert ours.local == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
        assert 0 < sum(ours.local) < ours.depth


@every_family
def test_missing_fields_have_the_defaults_of_transformers(tmp_path, family):
    """A config of nothing but the sizes, which have no defaults, and Qwen's EOS, which has none either."""
    sizes = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    config = {name: FAMILIES[family][name] for name in sizes}
    heads = {"num_attention_heads": 8} if "qwen" not in family else {"eos_token_id": 7}
    config |= heads | {"hidden_size": 64, "num_hidden_layers": 30}
    ours, theirs = read(tmp_path, config), AutoConfig.from_pretrained(tmp_path)
    assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.head_width == getattr(theirs, "head_dim", 64 // theirs.num_attention_heads)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert (ours.max_positions, ours.tied) == (theirs.max_position_embeddings, theirs.tie_word_embeddings)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert ours.window == getattr(theirs, "sliding_window", None)
    rope = theirs.rope_parameters
    if family == "gemma":
        assert ours.query_scalar == theirs.query_pre_attn_scalar
        assert ours.local == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
        assert ours.local_theta == rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    assert ours.rope_theta == rope["rope_theta"] and ours.rope_scaling is None
    assert ours.qkv_bias == (family == "qwen2") and not ours.o_bias and not ours.mlp_bias
    if "qwen" in family:
        windowed = read(tmp_path, config | {"use_sliding_window": True})
        types = AutoConfig.from_pretrained(tmp_path).layer_types
        assert windowed.window == 4096 and windowed.local == tuple(kind == "sliding_attention" for kind in types)
        assert sum(windowed.local) == 2


def test_the_default_q_adapter_trains_less_than_1_4_percent_of_public_backbones():
    """CLIP B/16 and TinyLlama on the meta device."""
    shape = ViTConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_width=3072,
                      activation="quick_gelu", norm_eps=1e-5)  # fmt: skip
    with torch.device("meta"):
        vit = ViT(shape)
        lm = CausalLM(LMConfig.from_json(CONFIGS / "tinyllama-1.1b.json"))
        captioner = Captioner(vit, lm, load_tokenizer(ROOT / "backbones" / "tiny-lm"), AdapterConfig())
    trained = sum(p.numel() for p in captioner.trained().values())
    assert count_parameters(captioner) == count_parameters(vit) + count_parameters(lm) + trained
    assert trained == 2_046_467 and trained <= 0.014 * count_parameters(captioner)  # as in the README


# ---------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("kind", ["gemma3", "gemma2", "qwen2_moe", "gpt2"])
def test_another_family_is_refused_with_the_supported_ones(tmp_path, kind):
    with refused(str(tmp_path / "config.json"), repr(kind), "llama, mistral, qwen2, qwen3, gemma3_text"):
        read(tmp_path, LLAMA | {"model_type": kind})


@pytest.mark.parametrize("family, fields, words", [
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, ("'longrope'", "default, linear, llama3")),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ("'yarn'", "default, linear, llama3")),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ("'dynamic'", "default, linear, llama3")),
    ("llama", {"rope_scaling": {"type": "linear"}}, ("'factor'", "missing")),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, ("0.5", "at least 1")),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.7}}, ("mscale", "'linear'")),
    ("llama", {"rope_scaling": LLAMA3 | {"attention_factor": 0.7}}, ("attention_factor", "'llama3'")),
    ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, ("low_freq_factor is 4.0", "less than")),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     ("partial_rotary_factor", "0.5")),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ("full_attention",)),
    ("llama", {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3}, ("rope_scaling and rope_parameters",)),
    ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor is 0.5",)),
    ("llama", {"hidden_act": "gelu"}, ("hidden_act is 'gelu'",)),
    ("llama", {"num_key_value_heads": 3}, ("num_attention_heads is 4", "multiple")),
    ("llama", {"head_dim": 7}, ("7 wide", "even")),
    ("llama", {"num_hidden_layers": 0}, ("num_hidden_layers is 0",)),
    ("llama", {"eos_token_id": []}, ("eos_token_id is []",)),
    ("llama", {"eos_token_id": [2, 50]}, ("[2, 50]", "below vocab_size 50")),
    ("llama", {"eos_token_id": [2, "3"]}, ("eos_token_id", "'3'")),
    ("llama", {"bos_token_id": -1}, ("bos_token_id is -1",)),
    ("mistral", {"sliding_window": 0}, ("sliding_window is 0",)),
    ("mistral", {"sliding_window": "all"}, ("'sliding_window'", "'all'")),
    ("mistral", {"attention_bias": True}, ("attention_bias is True",)),
    ("mistral", {"layer_types": ["full_attention"] * 2}, ("layer_types",)),
    ("mistral", {"hidden_act": "gelu"}, ("hidden_act is 'gelu'",)),
    ("qwen2", {"eos_token_id": None}, ("'eos_token_id'", "generation_config.json")),
    ("qwen2", {"use_sliding_window": 1}, ("'use_sliding_window'", "true or false")),
    ("qwen2", WINDOW | {"max_window_layers": -1}, ("max_window_layers is -1",)),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, ("layer_types", "without a window")),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, ("'yarn'",)),
    ("qwen3", {"layer_types": ["full_attention"]}, ("layer_types", "2 times")),
    ("qwen3", {"hidden_act": "gelu"}, ("hidden_act is 'gelu'",)),
    ("qwen3", {"mlp_bias": True}, ("mlp_bias is True",)),
    ("qwen3", {"head_dim": 7}, ("7 wide", "even")),
    ("gemma", {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping is 50.0",)),
    ("gemma", {"final_logit_softcapping": 30.0}, ("final_logit_softcapping is 30.0",)),
    ("gemma", {"use_bidirectional_attention": True}, ("use_bidirectional_attention is True",)),
    ("gemma", {"tie_word_embeddings": False}, ("tie_word_embeddings is False",)),
    ("gemma", {"hidden_activation": "gelu"}, ("hidden_activation is 'gelu'",)),
    ("gemma", {"layer_types": LAYER_TYPES[:2]}, ("layer_types", "3 times")),
    ("gemma", {"layer_types": ["chunked_attention"] * 3}, ("layer_types", "chunked_attention")),
    ("gemma", {"rope_parameters": {"rope_type": "default"}}, ("rope_parameters", "'rope_type'")),
    ("gemma", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     ("sliding_attention", "'linear'")),
])  # fmt: skip
def test_unsupported_values_are_refused(tmp_path, family, fields, words):
    with refused(str(tmp_path / "config.json"), *words):
        read(tmp_path, FAMILIES[family] | fields)


@pytest.mark.parametrize("config, name", [
    (LLAMA | {"rope_theta": 1.0}, "rope_theta"), (LLAMA | {"rope_theta": -1}, "rope_theta"),
    (LLAMA | {"rms_norm_eps": -1}, "rms_norm_eps"), (LLAMA | {"vocab_size": 2**62}, "vocab_size"),
    (LLAMA | {"hidden_size": 2**70}, "hidden_size"), (LLAMA | {"num_hidden_layers": 2**40}, "num_hidden_layers"),
    (LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10**400}}, "original_max_position"),
    (LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": 1e-320}}, "low_freq_factor"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 1e300}}, "factor"),
    (GEMMA | {"query_pre_attn_scalar": -3}, "query_pre_attn_scalar"),
    (GEMMA | {"rope_local_base_freq": 0}, "rope_theta"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(tmp_path, config, name):
    with refused(str(tmp_path / "config.json"), name, "expected at"):
        read(tmp_path, config)


@pytest.mark.parametrize("name", ["model_type", "vocab_size", "hidden_size", "intermediate_size"])
def test_a_missing_field_is_named(tmp_path, name):
    with refused(str(tmp_path / "config.json"), repr(name), "missing"):
        read(tmp_path, {field: value for field, value in LLAMA.items() if field != name})


def test_several_eos_tokens_keep_their_order(tmp_path):
    one, several = read(tmp_path, LLAMA), read(tmp_path, LLAMA | {"eos_token_id": [7, 3, 9]})
    assert (one.eos_id, one.eos_ids) == (2, (2,))
    assert (several.eos_id, several.eos_ids) == (7, (7, 3, 9))


def test_eos_tokens_of_generation_config(tmp_path):
    """They count if config.json has none, or if they are several."""
    other = tmp_path / "generation_config.json"
    llama = {name: value for name, value in LLAMA.items() if name != "eos_token_id"}
    for config, generation, expected in [
        (llama, {}, (2,)),  # the family's default
        (llama, {"eos_token_id": 7}, (7,)),
        (llama | {"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
        (llama | {"eos_token_id": 3}, {"eos_token_id": 7}, (3,)),
        (llama | {"eos_token_id": 3}, {"eos_token_id": [7, 3]}, (3, 7)),
        (llama | {"eos_token_id": [5, 3]}, {"eos_token_id": [7, 3, 4]}, (5, 3, 7, 4)),
        (llama | {"eos_token_id": [5, 3]}, {"eos_token_id": None}, (5, 3)),
        (QWEN2 | {"eos_token_id": None}, {"eos_token_id": [9, 8]}, (9, 8)),
    ]:
        other.write_text(json.dumps(generation))
        assert read(tmp_path, config).eos_ids == expected
    for eos in (50, -1, "2", [], [True], [[2]]):
        other.write_text(json.dumps({"eos_token_id": eos}))
        with refused(str(other), "eos_token_id is", "below vocab_size 50"):
            read(tmp_path, LLAMA)


def test_null_means_no_bos(tmp_path):
    """Unlike a missing field, which means the family's default."""
    for config, expected in ((LLAMA, 1), (LLAMA | {"bos_token_id": None}, None), (QWEN2, None)):
        assert read(tmp_path, config).bos_id == AutoConfig.from_pretrained(tmp_path).bos_token_id == expected


def test_null_means_no_window_for_mistral(tmp_path):
    """Unlike a missing field, which means 4096."""
    config = read(tmp_path, MISTRAL | {"sliding_window": None})
    assert (config.window, config.local) == (AutoConfig.from_pretrained(tmp_path).sliding_window, ()) == (None, ())


def test_both_spellings_of_gemma_give_one_config(tmp_path):
    spelled = new_spelling(GEMMA, full_attention={"rope_type": "default", "rope_theta": 5000.0},
                           sliding_attention={"rope_type": "default", "rope_theta": 50.0})  # fmt: skip
    assert read(tmp_path, spelled | {"layer_types": LAYER_TYPES}) == read(tmp_path, GEMMA)


# ---------------------------------------------------------------------------------------- tensors


@pytest.fixture
def saved(tmp_path, family):
    """A folder with a model of the family, and its tensors."""
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {"attention_bias": family == "qwen3"}
    biases = {} if family == "mistral" else biases
    return tmp_path, published_tensors(make(tmp_path, FAMILIES[family] | biases))


@every_family
def test_every_missing_tensor_is_named(saved, family):
    folder, tensors = saved
    for name in tensors:
        write_weights(folder, {other: tensor for other, tensor in tensors.items() if other != name})
        with refused(str(folder / "model.safetensors"), "missing", name):
            CausalLM.from_pretrained(folder)


@every_family
def test_an_unexpected_tensor_is_named(saved, family):
    folder, tensors = saved
    for name in ("model.layers.0.self_attn.q_norm.bias", "model.layers.9.self_attn.q_proj.weight"):
        write_weights(folder, tensors | {name: torch.zeros(16)})
        with refused(str(folder / "model.safetensors"), "unexpected", name):
            CausalLM.from_pretrained(folder)


@every_family
def test_every_misshapen_tensor_is_named_with_both_shapes(saved, family):
    folder, tensors = saved
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        wrong = [shape[0] + 1, *shape[1:]]
        write_weights(folder, tensors | {name: torch.zeros(wrong)})
        with refused(str(folder / "model.safetensors"), name, str(wrong), str(shape)):
            CausalLM.from_pretrained(folder)


@every_family
def test_rotary_frequencies_of_old_files_are_ignored(saved, family):
    folder, tensors = saved
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    write_weights(folder, tensors | old)
    CausalLM.from_pretrained(folder)
    for name in ("model.layers.9.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.other"):
        write_weights(folder, tensors | old | {name: torch.ones(8)})
        with refused("unexpected", name):
            CausalLM.from_pretrained(folder)


def test_a_tied_head_may_be_in_the_file_with_equal_values(tmp_path):
    """Some public files contain it beside the embeddings; with other values it would be another model."""
    tensors = published_tensors(make(tmp_path, LLAMA | {"tie_word_embeddings": True}))
    embed = tensors["model.embed_tokens.weight"]
    write_weights(tmp_path, tensors | {"lm_head.weight": embed.clone()})
    ours = CausalLM.from_pretrained(tmp_path)
    assert ours.head.weight is ours.embed.weight and torch.equal(ours.embed.weight, embed)
    for other in (embed + 1e-3, embed[1:].clone(), embed.half()):
        write_weights(tmp_path, tensors | {"lm_head.weight": other})
        with refused(str(tmp_path / "model.safetensors"), "unexpected", "lm_head.weight"):
            CausalLM.from_pretrained(tmp_path)
