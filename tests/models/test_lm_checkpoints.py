"""Public configs of language models: what they count to, what is refused, and which tensors must be there.

References: transformers, which reads the same config.json, for sizes and ids; the parameter totals that the
models' pages give [1], counted here without a weight in memory, on the meta device.

[1] https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0, JackFram/llama-160m, meta-llama/Llama-3.2-1B,
    mistralai/Mistral-7B-v0.1, google/gemma-3-270m, google/gemma-3-1b-it: "Model size" and the index files
"""

import json
from pathlib import Path

import pytest
import torch
from test_lm_families import CONFIGS, GEMMA, LLAMA, LLAMA3, MISTRAL, YARN, make, new, published, write
from transformers import AutoConfig, AutoModelForCausalLM

from lm import CausalLM, LMConfig, lm_names
from model import AdapterConfig, Captioner
from tokens import load_tokenizer
from vit import ViT, ViTConfig
from weights import InputError

TOTALS = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-160m": 162_417_408,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b-it": 999_885_952,
}
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA}
every_family = pytest.mark.parametrize("family", FAMILIES)
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())  # a tied head counts once


def read(folder: Path, config: dict) -> LMConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return LMConfig.from_json(folder / "config.json")


def refusal(call, *words: str) -> None:
    """The call raises an InputError of one line that holds the words."""
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert text.isprintable(), text
    for word in words:
        assert word in text, text


# ------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize("name", TOTALS)
def test_a_public_config_has_as_many_parameters_as_published(tmp_path, name):
    """Nothing random: [1] and transformers count the same, and every parameter has its public name and shape."""
    path = CONFIGS / f"{name}.json"
    config = LMConfig.from_json(path)
    with torch.device("meta"):
        ours = CausalLM(config)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert count(ours) == count(theirs) == TOTALS[name]
    names, shapes = lm_names(config), {n: p.shape for n, p in theirs.state_dict().items()}
    if config.tied:
        assert shapes.pop("lm_head.weight") == ours.head.weight.shape
    assert {names[n]: p.shape for n, p in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("name", TOTALS)
def test_a_public_config_is_read_as_transformers_reads_it(name):
    """Nothing random: ids, positions, epsilon, and which blocks are local."""
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
def test_what_a_config_leaves_out_is_transformers_default(tmp_path, family):
    """Only what has no common value is said: the sizes."""
    sizes = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    config = {name: FAMILIES[family][name] for name in sizes}
    config |= {"num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 12}
    ours, theirs = read(tmp_path, config), AutoConfig.from_pretrained(tmp_path)
    assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.head_width, ours.norm_eps) == (theirs.head_dim, theirs.rms_norm_eps)
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
    assert not ours.attention_bias and not ours.mlp_bias


def test_the_default_q_adapter_on_public_backbones_trains_under_one_and_a_half_percent():
    """Nothing random: CLIP B/16 and TinyLlama on the meta device; at most 1.4 % of all parameters are trained."""
    shape = ViTConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_width=3072,
                      activation="quick_gelu", norm_eps=1e-5)  # fmt: skip
    with torch.device("meta"):
        vit = ViT(shape)
        lm = CausalLM(LMConfig.from_json(CONFIGS / "tinyllama-1.1b.json"))
        tokenizer = load_tokenizer(Path(__file__).parent.parent / "backbones" / "tiny-lm")
        captioner = Captioner(vit, lm, tokenizer, AdapterConfig())
    trained = sum(p.numel() for p in captioner.trained().values())
    assert count(captioner) == count(vit) + count(lm) + trained
    assert trained == 1_899_011 and trained <= 0.014 * count(captioner)  # the README has the figure


# ---------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("kind", ["gemma3", "gemma2", "qwen2", "gpt2"])
def test_another_family_is_refused_by_name_with_what_is_supported(tmp_path, kind):
    refusal(lambda: read(tmp_path, LLAMA | {"model_type": kind}), str(tmp_path / "config.json"),
            repr(kind), "llama, mistral, gemma3_text")  # fmt: skip


@pytest.mark.parametrize("family, fields, words", [
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, ("'longrope'", "default, linear, dynamic")),
    ("llama", {"rope_scaling": {"type": "linear"}}, ("'factor'", "missing")),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, ("0.5", "at least 1")),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.7}}, ("mscale", "'linear'")),
    ("llama", {"rope_scaling": LLAMA3 | {"attention_factor": 0.7}}, ("attention_factor", "'llama3'")),
    ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, ("between 4.0 and 4.0",)),
    ("llama", {"rope_scaling": {"type": "yarn", "mscale_all_dim": 1.0, **YARN}}, ("mscale_all_dim", "'yarn'")),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     ("partial_rotary_factor", "0.5")),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ("full_attention",)),
    ("llama", {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3}, ("rope_scaling and rope_parameters",)),
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
    ("gemma", {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping is 50.0",)),
    ("gemma", {"final_logit_softcapping": 30.0}, ("final_logit_softcapping is 30.0",)),
    ("gemma", {"use_bidirectional_attention": True}, ("use_bidirectional_attention is True",)),
    ("gemma", {"tie_word_embeddings": False}, ("tie_word_embeddings is False",)),
    ("gemma", {"hidden_activation": "gelu"}, ("hidden_activation is 'gelu'",)),
    ("gemma", {"layer_types": TYPES[:2]}, ("layer_types", "3 times")),
    ("gemma", {"layer_types": ["chunked_attention"] * 3}, ("layer_types", "chunked_attention")),
    ("gemma", {"rope_parameters": {"rope_type": "default"}}, ("rope_parameters", "'rope_type'")),
    ("gemma", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     ("sliding_attention", "'linear'")),
])  # fmt: skip
def test_what_would_compute_something_else_is_refused(tmp_path, family, fields, words):
    refusal(lambda: read(tmp_path, FAMILIES[family] | fields), str(tmp_path / "config.json"), *words)


def test_one_end_of_text_stays_a_number_and_several_are_kept_in_order(tmp_path):
    one, more = read(tmp_path, LLAMA), read(tmp_path, LLAMA | {"eos_token_id": [7, 3, 9]})
    assert (one.eos_id, one.eos_ids) == (2, (2,))
    assert (more.eos_id, more.eos_ids) == (7, (7, 3, 9))


def test_a_mistral_s_null_means_no_window(tmp_path):
    """Unlike a missing field, which stands for 4096."""
    config = read(tmp_path, MISTRAL | {"sliding_window": None})
    assert (config.window, config.local) == (AutoConfig.from_pretrained(tmp_path).sliding_window, ()) == (None, ())


def test_both_spellings_of_gemma_s_two_thetas_are_one_config(tmp_path):
    new_spelling = new(GEMMA, full_attention={"rope_type": "default", "rope_theta": 5000.0},
                       sliding_attention={"rope_type": "default", "rope_theta": 50.0})  # fmt: skip
    assert read(tmp_path, new_spelling | {"layer_types": TYPES}) == read(tmp_path, GEMMA)


def test_positions_stop_where_the_config_says_whatever_the_scaling(tmp_path):
    """64 positions; a dynamic scaling would begin to act on the 65th."""
    make(tmp_path, LLAMA | dict(rope_scaling={"type": "dynamic", "factor": 2.0}))
    lm = CausalLM.from_pretrained(tmp_path)
    refusal(lambda: lm(lm.embed(torch.zeros(1, 65, dtype=torch.long))), "65 positions, it has 64")


# ---------------------------------------------------------------------------------------- tensors

ONE_OF_EACH = {
    "llama": "model.layers.1.mlp.down_proj.bias",
    "mistral": "model.layers.1.self_attn.k_proj.weight",
    "gemma": "model.layers.2.pre_feedforward_layernorm.weight",
}


@pytest.fixture
def folder(tmp_path, family):
    """A folder of the family, its tensors, and the name of one that the family has for its own."""
    biased = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    theirs = make(tmp_path, FAMILIES[family] | biased)
    return tmp_path, published(theirs), ONE_OF_EACH[family]


@every_family
def test_a_missing_tensor_is_named(folder, family):
    path, tensors, name = folder
    write(path, {k: v for k, v in tensors.items() if k != name})
    refusal(lambda: CausalLM.from_pretrained(path), str(path / "model.safetensors"), "missing", name)


@every_family
def test_an_extra_tensor_is_named(folder, family):
    path, tensors, _ = folder
    name = "model.layers.0.self_attn.q_norm.bias"
    write(path, tensors | {name: torch.zeros(16)})
    refusal(lambda: CausalLM.from_pretrained(path), str(path / "model.safetensors"), "unexpected", name)


@every_family
def test_a_misshapen_tensor_is_named_with_both_shapes(folder, family):
    path, tensors, name = folder
    shape = list(tensors[name].shape)
    write(path, tensors | {name: torch.zeros(shape[0] + 1, *shape[1:])})
    refusal(lambda: CausalLM.from_pretrained(path), name, str([shape[0] + 1, *shape[1:]]), str(shape))


@every_family
def test_rotary_frequencies_in_old_files_are_passed_over(folder, family):
    """Under their own name in every block, and under no other."""
    path, tensors, _ = folder
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    write(path, tensors | old)
    CausalLM.from_pretrained(path)
    for name in ("model.layers.9.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.other"):
        write(path, tensors | old | {name: torch.ones(8)})
        refusal(lambda: CausalLM.from_pretrained(path), "unexpected", name)


@pytest.mark.parametrize("config, name", [
    (LLAMA | {"rope_theta": 1.0}, "rope_theta"), (LLAMA | {"rope_theta": -1}, "rope_theta"),
    (LLAMA | {"rms_norm_eps": -1}, "rms_norm_eps"), (LLAMA | {"vocab_size": 2**62}, "vocab_size"),
    (LLAMA | {"hidden_size": 2**70}, "hidden_size"), (LLAMA | {"num_hidden_layers": 2**40}, "num_hidden_layers"),
    (LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10**400}}, "original_max_position"),
    (LLAMA | {"rope_scaling": dict(type="yarn", beta_slow=1e-320, beta_fast=1e-310, **YARN)}, "beta_slow"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 1e300}}, "factor"),
    (GEMMA | {"query_pre_attn_scalar": -3}, "query_pre_attn_scalar"),
    (GEMMA | {"rope_local_base_freq": 0}, "rope_theta"),
])  # fmt: skip
def test_a_number_that_no_model_has_is_named(tmp_path, config, name):
    refusal(lambda: read(tmp_path, config), str(tmp_path / "config.json"), name, "expected at")
