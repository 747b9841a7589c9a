"""The language model: every family and option against transformers [1], with tiny random models in real files.

A case is a config.json as published. transformers reads the same file and computes attention in its eager form. All
its parameters are random, those of norms too, so that no two tensors can be confused; they are saved to a file, which
our model loads. Inputs are longer than every window and than the pretraining length of scaled models.

[1] transformers: models/llama, models/mistral, models/qwen2, models/qwen3 and models/gemma3, modeling_rope_utils.py,
    masking_utils.py
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.lm import CausalLM, KVCache
from tests.common.helpers import refused
from tests.models.helpers import assert_near, write_weights

LENGTH = 60
LLAMA = json.loads("""{
    "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 40, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 1000.0
}""")
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 7}
QWEN2 = LLAMA | {"model_type": "qwen2", "bos_token_id": None, "eos_token_id": 2, "head_dim": 8, "sliding_window": 7}
QWEN3 = QWEN2 | {"model_type": "qwen3", "head_dim": 16}
GEMMA = {name: value for name, value in LLAMA.items() if name != "hidden_act"} | json.loads("""{
    "model_type": "gemma3_text", "hidden_size": 36, "num_hidden_layers": 3, "num_key_value_heads": 1,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 7,
    "sliding_window_pattern": 2, "rope_theta": 5000.0, "rope_local_base_freq": 50.0
}""")
LLAMA3_WITHOUT_LENGTH = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = LLAMA3_WITHOUT_LENGTH | {"original_max_position_embeddings": 32}
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "gemma": GEMMA}
CASES = FAMILIES | {
    "llama, tied, one key-value head": LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama, wide heads, ungrouped": LLAMA | {"hidden_size": 20, "num_attention_heads": 2, "rope_theta": 1e6},
    "llama, narrow heads, large epsilon": LLAMA | {"hidden_size": 48, "head_dim": 6, "rms_norm_eps": 0.5},
    "llama, biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": LLAMA | {"rope_scaling": LLAMA3},
    "llama3, length outside": LLAMA | {"original_max_position_embeddings": 16, "rope_scaling": LLAMA3},
    "llama3, length missing": LLAMA | {"rope_scaling": LLAMA3_WITHOUT_LENGTH},
    "mistral, no window": MISTRAL | {"sliding_window": None, "rope_scaling": LLAMA3},
    "qwen2, tied": QWEN2 | {"tie_word_embeddings": True, "num_key_value_heads": 1, "use_sliding_window": False},
    "qwen3, biases": QWEN3 | {"attention_bias": True, "layer_types": [FULL, FULL]},
    "gemma, layer_types": GEMMA | {"layer_types": [FULL, SLIDING, SLIDING]},
    "gemma, linear": GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}
every_case = pytest.mark.parametrize("case", CASES)
every_family = pytest.mark.parametrize("case", FAMILIES)


def make(folder: Path, config: dict, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0):
    """Returns transformers' random model for a config.json, and writes it to the folder as published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    # Created in float32: creating it in the config's dtype would round Gemma's embedding scale.
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **options)
    theirs = theirs.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    mean = 0.0 if config["model_type"] == "gemma3_text" else 1.0  # Gemma's norms multiply by 1 + weight
    for name, parameter in theirs.named_parameters():
        std = scale * parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.normal_(mean if "norm" in name else 0.0, std, generator=generator)
        parameter.copy_(parameter.to(dtype))  # not theirs.to(dtype), which would also round the rotary frequencies
    write_weights(folder, {name: tensor.to(dtype) for name, tensor in published_tensors(theirs).items()})
    return theirs


def published_tensors(theirs) -> dict[str, torch.Tensor]:
    """The model's tensors as in a published file, without a tied head."""
    tensors = {name: t.contiguous() for name, t in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def random_ids(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same(ours: CausalLM, theirs, ids: torch.Tensor) -> None:
    """The outputs of every block, the last hidden states and the logits are equal within 1e-5."""
    outputs = []
    for block in ours.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    hidden = ours.hidden(ours.embed(ids))
    logits, expected = ours.head(hidden), theirs(ids, output_hidden_states=True)
    # The reference's last hidden states are those after the final norm.
    for x, y in zip(outputs[:-1], expected.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert_near(hidden, expected.hidden_states[-1])
    assert_near(logits, expected.logits)


@every_case
def test_blocks_and_logits_equal_the_reference(tmp_path, case):
    """Model seed 0, token ids seed 1, tolerance 1e-5: as published, and as transformers 5 saves it, whose config.json
    has the new spelling."""
    theirs = make(tmp_path / "published", CASES[case])
    ours = CausalLM.from_pretrained(tmp_path / "published")
    assert_same(ours, theirs, random_ids(2, LENGTH, 1))
    theirs.save_pretrained(tmp_path / "saved")
    assert "rope_theta" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert CausalLM.from_config(tmp_path / "saved").config == ours.config


@every_case
@torch.no_grad()
def test_the_cache_does_not_change_logits(tmp_path, case):
    """Model seed 4, token ids seed 5, tolerance 1e-5: a prefix shorter or longer than the window, then single steps."""
    make(tmp_path, CASES[case], seed=4)
    lm, ids = CausalLM.from_pretrained(tmp_path), random_ids(2, 24, 5)
    x = lm.embed(ids)
    whole = lm(x)
    for prefix in (3, 12):
        cache = KVCache(lm.config, 2, 24, x)
        steps = [lm(x[:, :prefix], cache)] + [lm(x[:, i : i + 1], cache) for i in range(prefix, 24)]
        assert cache.length == 24
        assert_near(torch.cat(steps, dim=1), whole)


@every_family
@torch.no_grad()
def test_branches_are_computed_as_separate_rows(tmp_path, case):
    """Model seed 4, token ids seeds 5 to 7, tolerance 1e-5: two continuations of one prefix side by side, of which
    `visible` shows each its own tokens only. The prefix has 5 positions, the window 7, a continuation 9."""
    make(tmp_path, CASES[case], seed=4)
    lm, prefix = CausalLM.from_pretrained(tmp_path), random_ids(2, 5, 5)
    a, b = random_ids(2, 9, 6), random_ids(2, 9, 7)
    rows = [lm(lm.embed(torch.cat([prefix, branch], dim=1)))[:, 5:] for branch in (a, b)]
    x = lm.embed(torch.cat([prefix, a, b], dim=1))
    positions = torch.tensor([*range(14), *range(5, 14)]).expand(2, -1)
    visible = torch.ones(23, 23).tril().bool()
    visible[14:, 5:14] = False
    found = lm.head(lm.hidden(x, positions=positions, visible=visible.expand(2, -1, -1)))[:, 5:]
    assert_near(found, torch.cat(rows, dim=1))


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, case, dtype):
    """Model seed 10, token ids seed 9. A half-precision file computes in float32 within 1e-5 of the reference; a model
    in half precision rounds where the reference does: embeddings are equal to the bit (Gemma's scale, here the root of
    40, must be rounded), logits, with the same attention kernel, within 0.1% of their standard deviation."""
    theirs = make(tmp_path, CASES[case] | {"hidden_size": 40, "num_attention_heads": 4}, 10, dtype)
    ours = CausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same(ours, theirs, random_ids(2, LENGTH, 9))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="sdpa").eval()
    ours, ids = CausalLM.from_pretrained(tmp_path, dtype), torch.arange(50)[None]
    assert {p.dtype for p in ours.parameters()} == {dtype}
    with torch.no_grad():
        x = ours.embed(ids)
        assert torch.equal(x, theirs.get_input_embeddings()(ids))
        found, expected = ours(x), theirs(ids).logits
    assert (found.float() - expected.float()).abs().max() < 0.001 * expected.float().std()


@every_family
def test_embedding_rms(tmp_path, case):
    """Model seed 11, tolerance 1e-6: over the outputs of `embed` for the whole vocabulary."""
    make(tmp_path, CASES[case], 11)
    lm = CausalLM.from_pretrained(tmp_path)
    expected = lm.embed(torch.arange(50)).square().mean().sqrt()
    torch.testing.assert_close(lm.embedding_rms(), expected.detach(), rtol=0, atol=1e-6)


def test_positions_beyond_the_maximum_are_refused(tmp_path):
    """The maximum is 12 positions, with and without a cache, whatever the scaling."""
    make(tmp_path, CASES["linear"] | {"max_position_embeddings": 12})
    lm = CausalLM.from_pretrained(tmp_path)
    x = lm.embed(random_ids(1, 13, 0))
    cache = KVCache(lm.config, 1, 13, x)
    lm(x[:, :12], cache)
    for call in (lambda: lm(x), lambda: lm(x[:, 12:], cache)):
        with refused("13 positions, it has 12"):
            call()
