"""The language model, against transformers' LlamaForCausalLM [1] on tiny random models, through real files.

Every parameter is drawn anew, the norms' too, so that no two tensors could be mixed up unseen.

[1] transformers, models/llama/modeling_llama.py
"""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lm import CausalLM, KVCache
from weights import InputError

# width, heads, key-value heads, width of a head, tied, rope_theta
SHAPES = [
    (32, 4, 4, 8, False, 10000.0),  # every head has its own keys
    (32, 4, 2, 8, True, 10000.0),  # grouped
    (24, 6, 3, 4, False, 500000.0),
    (32, 4, 1, 8, True, 100.0),  # one head of keys for all
    (20, 2, 1, 16, False, 1234.5),  # heads * width of a head is not the width
    (48, 2, 2, 6, True, 1e6),
]


def make(folder: Path, width, heads, kv_heads, head_width, tied, theta, seed=0, **fields) -> LlamaForCausalLM:
    """A random reference model, and the folder of it as published: rope_theta in the config's first level."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=50, num_hidden_layers=2, intermediate_size=40, max_position_embeddings=64,
                 rms_norm_eps=1e-5) | fields  # fmt: skip
    config = LlamaConfig(
        hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_width,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": theta}, **shape,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    content = config.to_dict()
    content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(content))
    write(folder, published(theirs))
    return theirs


def published(theirs: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors as in a published file: a tied head has none of its own."""
    tensors = {name: t.contiguous() for name, t in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change(folder: Path, **fields) -> None:
    """Sets fields of the config; None takes them out."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def inputs(rows: int, length: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))


def assert_near(found: torch.Tensor, expected: torch.Tensor, within: float = 1e-5) -> None:
    assert expected.std() > 0.1  # so the tolerance, an absolute one, means something
    torch.testing.assert_close(found, expected, rtol=0, atol=within)


# ------------------------------------------------------------------------------ the same figures


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_hidden_states_are_the_reference_s(tmp_path, shape):
    """Model seed 0, token ids seed 1, tolerance 1e-5."""
    theirs, ours = make(tmp_path, *shape), CausalLM.from_pretrained(tmp_path)
    ids = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        assert_near(ours(ours.embed(ids)), expected.logits)
        assert_near(ours.hidden(ours.embed(ids)), expected.hidden_states[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_changes_nothing(tmp_path, shape):
    """Model seed 2, embeddings seed 3, tolerance 1e-5: a prefix of 5 at once, then one position a step."""
    make(tmp_path, *shape, seed=2)
    lm, x = CausalLM.from_pretrained(tmp_path), inputs(3, 16, shape[0], seed=3)
    with torch.no_grad():
        cache = KVCache(lm.config, 3, 16, x)
        steps = [lm(x[:, :5], cache)] + [lm(x[:, i : i + 1], cache) for i in range(5, 16)]
        assert len(cache) == 16
        assert_near(torch.cat(steps, dim=1), lm(x))


def test_no_position_sees_a_later_one(tmp_path):
    """Model seed 4, embeddings seeds 5 and 6; bit for bit, since the same sums run over the same numbers."""
    make(tmp_path, *SHAPES[1], seed=4)
    lm, x = CausalLM.from_pretrained(tmp_path), inputs(2, 9, 32, seed=5)
    other = torch.cat([x[:, :6], inputs(2, 3, 32, seed=6)], dim=1)
    with torch.no_grad():
        a, b = lm(x), lm(other)
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.isclose(a[:, 6:], b[:, 6:]).all(-1).any()


def test_rope_theta_is_read_where_transformers_5_writes_it(tmp_path):
    """Model seed 7, token ids seed 8, tolerance 1e-5: the folder is saved by transformers itself."""
    theirs = make(tmp_path / "published", *SHAPES[3], seed=7)
    theirs.save_pretrained(tmp_path / "saved")
    assert "rope_theta" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    ours = CausalLM.from_pretrained(tmp_path / "saved")
    assert ours.config == CausalLM.from_pretrained(tmp_path / "published").config
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        assert_near(ours(ours.embed(ids)), theirs(ids).logits)


def test_the_norms_epsilon_comes_from_the_config(tmp_path):
    """Model seed 9, token ids seed 10, tolerance 1e-5; with an epsilon of 0.5 the default would be far off."""
    theirs = make(tmp_path, *SHAPES[0], seed=9, rms_norm_eps=0.5)
    ours = CausalLM.from_pretrained(tmp_path)
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(10))
    with torch.no_grad():
        assert_near(ours(ours.embed(ids)), theirs(ids).logits)


def test_what_a_config_leaves_out_is_llama_s_default(tmp_path):
    """The defaults of LlamaConfig: own keys for every head, head width, theta, epsilon, positions, ids, untied."""
    make(tmp_path, *SHAPES[0])
    names = ("num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "max_position_embeddings",
             "tie_word_embeddings", "bos_token_id", "eos_token_id", "hidden_act", "attention_bias")  # fmt: skip
    change(tmp_path, **dict.fromkeys(names))
    ours, theirs = CausalLM.from_pretrained(tmp_path).config, LlamaConfig(hidden_size=32, num_attention_heads=4)
    assert (ours.kv_heads, ours.head_width, ours.tied) == (4, 8, theirs.tie_word_embeddings)
    assert (ours.rope_theta, ours.norm_eps) == (theirs.rope_parameters["rope_theta"], theirs.rms_norm_eps)
    assert ours.max_positions == theirs.max_position_embeddings
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_half_precision_files_load_and_compute_in_float32(tmp_path, shape):
    """Model seed 11, token ids seed 12, tolerance 1e-5 from the reference with its weights rounded to fp16."""
    theirs = make(tmp_path, *shape, seed=11)
    write(tmp_path, {name: t.half() for name, t in published(theirs).items()})
    for parameter in theirs.parameters():  # not theirs.half(), which rounds the rotary frequencies too
        parameter.copy_(parameter.half())
    ours = CausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert (ours.head.weight is ours.embed.weight) == shape[4]  # still one tensor where it is tied
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(12))
    with torch.no_grad():
        assert_near(ours(ours.embed(ids)), theirs(ids).logits)


# ---------------------------------------------------------------------------------------- errors


def refusal(folder: Path, *words: str) -> None:
    """Loading raises an InputError of one line that holds the words."""
    with pytest.raises(InputError) as error:
        CausalLM.from_pretrained(folder)
    text = str(error.value)
    assert text.isprintable(), text
    for word in words:
        assert word in text, text


def test_positions_beyond_the_model_s_are_refused(tmp_path):
    """12 positions are all there are: with a cache and without."""
    make(tmp_path, *SHAPES[0], max_position_embeddings=12)
    lm, x = CausalLM.from_pretrained(tmp_path), inputs(1, 13, 32, seed=0)
    lm(x[:, :12])
    with pytest.raises(InputError, match="13 positions, it has 12"):
        lm(x)
    cache = KVCache(lm.config, 1, 13, x)
    lm(x[:, :12], cache)
    with pytest.raises(InputError, match="13 positions, it has 12"):
        lm(x[:, 12:], cache)


@pytest.mark.parametrize("name, value", [
    ("model_type", "gpt2"),
    ("partial_rotary_factor", 0.5),
    ("hidden_act", "gelu"),
])  # fmt: skip
def test_what_would_compute_something_else_is_refused(tmp_path, name, value):
    make(tmp_path, *SHAPES[0])
    change(tmp_path, **{name: value})
    refusal(tmp_path, str(tmp_path / "config.json"), name, repr(value))


@pytest.mark.parametrize("name", ["model_type", "vocab_size", "hidden_size", "intermediate_size"])
def test_a_missing_field_is_named(tmp_path, name):
    make(tmp_path, *SHAPES[0])
    change(tmp_path, **{name: None})
    refusal(tmp_path, str(tmp_path / "config.json"), repr(name), "missing")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_missing_tensor_is_named(tmp_path, name):
    theirs = make(tmp_path, *SHAPES[0])
    write(tmp_path, {k: v for k, v in published(theirs).items() if k != name})
    refusal(tmp_path, str(tmp_path / "model.safetensors"), "missing", name)


def test_a_tied_head_may_be_in_the_file_only_as_the_same_numbers(tmp_path):
    """Some public files hold it beside the embeddings; other numbers there would belong to another model."""
    theirs = make(tmp_path, *SHAPES[1])
    tensors = published(theirs)
    embed = tensors["model.embed_tokens.weight"]
    write(tmp_path, tensors | {"lm_head.weight": embed.clone()})
    ours = CausalLM.from_pretrained(tmp_path)
    assert ours.head.weight is ours.embed.weight and torch.equal(ours.embed.weight, embed)
    for other in (embed + 1e-3, embed[1:].clone(), embed.half()):
        write(tmp_path, tensors | {"lm_head.weight": other})
        refusal(tmp_path, str(tmp_path / "model.safetensors"), "unexpected", "lm_head.weight")


def test_an_extra_tensor_is_named(tmp_path):
    theirs = make(tmp_path, *SHAPES[0])
    name = "model.layers.0.self_attn.q_proj.bias"
    write(tmp_path, published(theirs) | {name: torch.zeros(32)})
    refusal(tmp_path, str(tmp_path / "model.safetensors"), "unexpected", name)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    """Keys of four heads where the config says two."""
    theirs = make(tmp_path, *SHAPES[1])
    name = "model.layers.1.self_attn.k_proj.weight"
    write(tmp_path, published(theirs) | {name: torch.zeros(32, 32)})
    refusal(tmp_path, str(tmp_path / "model.safetensors"), name, "[32, 32]", "[16, 32]")


def test_a_missing_folder_or_file_is_named(tmp_path):
    refusal(tmp_path / "nowhere", str(tmp_path / "nowhere"), "expected a folder")
    make(tmp_path, *SHAPES[0])
    (tmp_path / "model.safetensors").unlink()
    refusal(tmp_path, str(tmp_path), "model.safetensors")
