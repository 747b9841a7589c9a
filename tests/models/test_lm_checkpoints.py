"""Public configs of language models: parameter counts, refused values, and tensors that must be there.

References: transformers, which reads the same config.json; the parameter counts of the models' pages [1]. Parameters
of published shapes are counted on the meta device.

[1] https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0, JackFram/llama-160m, meta-llama/Llama-3.2-1B,
    mistralai/Mistral-7B-v0.1, google/gemma-3-270m, google/gemma-3-1b-it, HuggingFaceTB/SmolLM2-135M,
    Qwen/Qwen2.5-0.5B, Qwen/Qwen3-0.6B: "Model size" and the index files
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.lm import CausalLM, LMConfig
from models.names import lm_tensor_names
from tests.common.helpers import refused
from tests.models.helpers import CONFIGS, last_field, write_weights
from tests.models.test_lm import FAMILIES, LLAMA, LLAMA3, make, published_tensors

PARAMETERS = {
    "tinyllama-1.1b": 1_100_048_384, "llama-160m": 162_417_408, "llama-3.2-1b-instruct": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096, "smollm2-135m": 134_515_008, "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920, "gemma-3-270m": 268_098_176, "gemma-3-1b-it": 999_885_952,
}


def read(folder: Path, config: dict) -> LMConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return CausalLM.from_config(folder).config


def assert_read_alike(ours: LMConfig, theirs) -> None:
    """Whatever does not show in the shapes of tensors."""
    eos = theirs.eos_token_id
    assert ours.eos_ids == tuple(eos if isinstance(eos, list) else [eos])
    assert ours.bos_id == (None if theirs.model_type.startswith("qwen") else theirs.bos_token_id)
    assert ours.max_positions == theirs.max_position_embeddings
    assert (ours.norm_eps, ours.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.window == getattr(theirs, "sliding_window", None)
    assert ours.query_scalar == getattr(theirs, "query_pre_attn_scalar", None)
    rope = theirs.rope_parameters
    if ours.gemma:
        assert ours.local_theta == rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    assert ours.rope_theta == rope["rope_theta"]
    if ours.window and not isinstance(theirs, type(AutoConfig.for_model("mistral"))):  # which has no layer_types
        assert ours.local == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
        assert 0 < sum(ours.local) < ours.depth


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_public_model_has_the_published_parameters(tmp_path, name):
    """The count of [1] and of transformers; the names, shapes and other fields of transformers."""
    shutil.copy(CONFIGS / f"{name}.json", tmp_path / "config.json")
    ours, config = CausalLM.from_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    for model in (ours, theirs):
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]  # a tied head counts once
    names, shapes = lm_tensor_names(ours), {n: p.shape for n, p in theirs.state_dict().items()}
    if ours.config.tied:
        assert shapes.pop("lm_head.weight") == ours.head.weight.shape
    assert {names[n]: p.shape for n, p in ours.state_dict().items()} == shapes
    assert_read_alike(ours.config, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_fields_have_the_defaults_of_transformers(tmp_path, family):
    """A config of nothing but the family, and Qwen's EOS, which has no default."""
    config = {"model_type": FAMILIES[family]["model_type"]} | ({"eos_token_id": 7} if "qwen" in family else {})
    ours, theirs = read(tmp_path, config), AutoConfig.from_pretrained(tmp_path)
    assert_read_alike(ours, theirs)
    assert ours.window == getattr(theirs, "sliding_window", None)
    sizes = (theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers, theirs.intermediate_size)
    assert (ours.vocab, ours.width, ours.depth, ours.mlp_width) == sizes
    assert ours.head_width == (getattr(theirs, "head_dim", None) or ours.width // ours.heads)
    assert ours.qkv_bias == (family == "qwen2") and not ours.o_bias and not ours.mlp_bias


def rope(**fields) -> dict:
    return {"rope_scaling": fields}


REFUSED = [  # a family, fields of its config, and a word of the message, if that is not the name of the last field
    ("llama", {"model_type": "gemma3"}, "llama or mistral or qwen2 or qwen3 or qwen3_vl_text or gemma3_text"),
    ("llama", rope(factor=4.0, type="yarn")), ("llama", rope(**LLAMA3, attention_factor=0.7)),
    ("llama", rope(**LLAMA3 | {"low_freq_factor": 4.0}), "high_freq_factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ("llama", {"partial_rotary_factor": 0.5}), ("llama", {"hidden_act": "gelu"}),
    ("llama", {"num_key_value_heads": 3}, "kv_heads=3"), ("llama", {"head_dim": 7}, "head_width=7"),
    ("llama", {"eos_token_id": [2, "3"]}), ("llama", {"eos_token_id": []}), ("llama", {"num_hidden_layers": 2**40}),
    ("qwen2", {"eos_token_id": None}), ("qwen2", {"use_sliding_window": True}),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}), ("qwen3", {"layer_types": ["full_attention"]}),
    ("gemma", {"attn_logit_softcapping": 50.0}), ("gemma", {"use_bidirectional_attention": True}),
    ("gemma", {"tie_word_embeddings": False}), ("gemma", {"rope_parameters": {"rope_type": "default"}}),
    ("gemma", {"rope_parameters": {"sliding_attention": {"factor": 2.0, "rope_type": "linear"}}}),
]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_unsupported_values_are_refused(tmp_path, case):
    family, fields, *words = case
    with refused(str(tmp_path / "config.json"), *(words or [last_field(fields)])):
        read(tmp_path, FAMILIES[family] | fields)


def test_tokens_that_begin_and_end_a_text(tmp_path):
    """null means no BOS, unlike a missing field. The EOS of generation_config.json count, else those of config.json."""
    for config, expected in ((LLAMA, 1), (LLAMA | {"bos_token_id": None}, None)):
        assert read(tmp_path, config).bos_id == AutoConfig.from_pretrained(tmp_path).bos_token_id == expected
    cases = [(None, {}, (2,)), (None, {"eos_token_id": 7}, (7,)),  # the first is the family's default
             (3, {"eos_token_id": [7, 3]}, (7, 3)), ([5, 3], {"eos_token_id": None}, (5, 3))]
    for eos, generation, expected in cases:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        assert read(tmp_path, LLAMA | {"eos_token_id": eos}).eos_ids == expected
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 50}))
    with refused(str(tmp_path / "generation_config.json"), "'eos_token_id'"):
        read(tmp_path, LLAMA)


def test_a_tied_head_may_be_in_the_file_with_equal_values(tmp_path):
    """Some public files contain it beside the embeddings; with other values it would be another model."""
    tensors = published_tensors(make(tmp_path, LLAMA | {"tie_word_embeddings": True}))
    embed = tensors["model.embed_tokens.weight"]
    write_weights(tmp_path, tensors | {"lm_head.weight": embed.clone()})
    ours = CausalLM.from_pretrained(tmp_path)
    assert ours.head.weight is ours.embed.weight and torch.equal(ours.embed.weight, embed)
    for other in (embed + 1e-3, embed.half()):
        write_weights(tmp_path, tensors | {"lm_head.weight": other})
        with refused(str(tmp_path / "model.safetensors"), "unexpected", "lm_head.weight"):
            CausalLM.from_pretrained(tmp_path)
