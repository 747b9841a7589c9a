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
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from models.lm import CausalLM, KVCache, LMConfig
from models.rope import frequencies
from tests.common.helpers import refused
from tests.models.helpers import CONFIGS, assert_near, write_weights

LENGTH = 60
LLAMA = dict(
    model_type="llama", vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=40, max_position_embeddings=64, rms_norm_eps=1e-5,
    hidden_act="silu", rope_theta=1000.0,
)  # fmt: skip
MISTRAL = LLAMA | dict(model_type="mistral", sliding_window=7)
QWEN2 = LLAMA | dict(model_type="qwen2", bos_token_id=None, eos_token_id=2, head_dim=8, sliding_window=7)
QWEN3 = QWEN2 | dict(model_type="qwen3", head_dim=16)
WINDOW = dict(use_sliding_window=True, num_hidden_layers=3, max_window_layers=2)
GEMMA = dict(
    model_type="gemma3_text", vocab_size=50, hidden_size=36, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, intermediate_size=40, max_position_embeddings=64, rms_norm_eps=1e-5,
    hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=24, sliding_window=7, sliding_window_pattern=2,
    rope_theta=5000.0, rope_local_base_freq=50.0,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
LLAMA3_WITHOUT_LENGTH = {name: value for name, value in LLAMA3.items() if not name.startswith("original")}


def llama(width: int, heads: int, kv_heads: int, head_width: int, tied: bool, theta: float) -> dict:
    return LLAMA | dict(hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
                        head_dim=head_width, tie_word_embeddings=tied, rope_theta=theta)  # fmt: skip


def new_spelling(config: dict, **rope) -> dict:
    """The config as transformers 5 writes it, with these rope_parameters."""
    old_fields = ("rope_theta", "rope_local_base_freq", "sliding_window_pattern")
    return {name: value for name, value in config.items() if name not in old_fields} | {"rope_parameters": rope}


CASES = {
    "llama": LLAMA,
    "llama, ungrouped": llama(32, 4, 4, 8, False, 10000.0),
    "llama, grouped, tied": llama(32, 4, 2, 8, True, 10000.0),
    "llama, 6 heads": llama(24, 6, 3, 4, False, 500000.0),
    "llama, one key-value head": llama(32, 4, 1, 8, True, 100.0),
    "llama, heads wider than the model": llama(20, 2, 1, 16, False, 1234.5),
    "llama, heads narrower than the model": llama(48, 2, 2, 6, True, 1e6),
    "llama, large epsilon": LLAMA | dict(rms_norm_eps=0.5),  # the default would be far off
    "llama, biases": LLAMA | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, attention biases": LLAMA | dict(attention_bias=True),
    "linear": LLAMA | dict(rope_scaling={"type": "linear", "factor": 2.5}),
    "linear, new": new_spelling(LLAMA, rope_type="linear", factor=2.5, rope_theta=1000.0),
    "llama3": LLAMA | dict(rope_scaling=LLAMA3),
    "llama3, new": new_spelling(LLAMA, rope_theta=700.0, **LLAMA3),
    "llama3, length outside": LLAMA | dict(original_max_position_embeddings=16, rope_scaling=LLAMA3),
    "llama3, length missing": LLAMA | dict(rope_scaling=LLAMA3_WITHOUT_LENGTH),
    "mistral": MISTRAL,
    "mistral, window of one": MISTRAL | dict(sliding_window=1),
    "mistral, no window": MISTRAL | dict(sliding_window=None),
    "mistral, default window": {name: value for name, value in MISTRAL.items() if name != "sliding_window"},
    "mistral, llama3": MISTRAL | dict(rope_scaling=LLAMA3, tie_word_embeddings=True),
    "qwen2": QWEN2,
    "qwen2, tied": QWEN2 | dict(tie_word_embeddings=True, num_key_value_heads=1, use_sliding_window=False),
    "qwen2, window": QWEN2 | WINDOW,
    "qwen2, no window": QWEN2 | WINDOW | dict(sliding_window=None),
    "qwen2, layer_types": QWEN2 | WINDOW | dict(layer_types=["sliding_attention", *["full_attention"] * 2]),
    "qwen2, attention_bias": QWEN2 | dict(attention_bias=True),  # a field that is not of this family
    "qwen2, new": new_spelling(QWEN2, rope_type="linear", factor=2.5, rope_theta=700.0),
    "qwen3": QWEN3,
    "qwen3, tied": QWEN3 | dict(tie_word_embeddings=True, hidden_size=20, rms_norm_eps=0.5),
    "qwen3, window": QWEN3 | WINDOW,
    "qwen3, biases": QWEN3 | dict(attention_bias=True),
    "qwen3, new": new_spelling(QWEN3, rope_type="default", rope_theta=700.0),
    "gemma": GEMMA,
    "gemma, layer_types": GEMMA | dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    "gemma, new": new_spelling(
        GEMMA | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        full_attention={"rope_type": "default", "rope_theta": 3000.0},
        sliding_attention={"rope_type": "default", "rope_theta": 30.0},
    ),
    "gemma, linear": GEMMA | dict(rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma, linear, new": new_spelling(
        GEMMA | dict(layer_types=["sliding_attention", "full_attention", "full_attention"], num_key_value_heads=2),
        full_attention={"rope_type": "linear", "rope_theta": 3000.0, "factor": 8.0},
        sliding_attention={"rope_type": "default", "rope_theta": 30.0},
    ),
    "gemma, biases": GEMMA | dict(attention_bias=True, num_key_value_heads=4),
    "gemma, all global": GEMMA | dict(layer_types=["full_attention"] * 3),
}
every_case = pytest.mark.parametrize("case", CASES)
every_family = pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "gemma"])


def make(folder: Path, config: dict, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Returns transformers' random model for a config.json, and writes it to the folder as published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    # Created in float32: creating it in the config's dtype would round Gemma's embedding scale.
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
    )
    theirs = theirs.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    mean = 0.0 if config["model_type"] == "gemma3_text" else 1.0  # Gemma's norms multiply by 1 + weight
    for name, parameter in theirs.named_parameters():
        std = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3
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


def assert_same(ours: CausalLM, theirs, ids: torch.Tensor) -> None:
    """The outputs of every block, the last hidden states and the logits are equal within 1e-5."""
    outputs = []
    for block in ours.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        hidden = ours.hidden(ours.embed(ids))
        logits, expected = ours.head(hidden), theirs(ids, output_hidden_states=True)
    # The reference's last hidden states are those after the final norm.
    for i, (x, y) in enumerate(zip(outputs[:-1], expected.hidden_states[1:-1], strict=True)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5, msg=lambda text, i=i: f"after block {i}: {text}")
    assert_near(hidden, expected.hidden_states[-1])
    assert_near(logits, expected.logits)


# ------------------------------------------------------------------------------ equal outputs


@every_case
def test_blocks_and_logits_equal_the_reference(tmp_path, case):
    """Model seed 0, token ids seed 1, tolerance 1e-5."""
    theirs = make(tmp_path, CASES[case])
    assert_same(CausalLM.from_pretrained(tmp_path), theirs, random_ids(2, LENGTH, 1))


@every_case
def test_a_folder_saved_by_transformers_is_the_same_model(tmp_path, case):
    """Model seed 2, token ids seed 3, tolerance 1e-5. transformers 5 writes the config in its new spelling."""
    theirs = make(tmp_path / "published", CASES[case], seed=2)
    theirs.save_pretrained(tmp_path / "saved")
    assert "rope_theta" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    ours = CausalLM.from_pretrained(tmp_path / "saved")
    assert ours.config == LMConfig.from_json(tmp_path / "published" / "config.json")
    assert_same(ours, theirs, random_ids(2, LENGTH, 3))


@every_case
def test_the_cache_does_not_change_logits(tmp_path, case):
    """Model seed 4, token ids seed 5, tolerance 1e-5: a prefix shorter or longer than the window, then single steps."""
    make(tmp_path, CASES[case], seed=4)
    lm, ids = CausalLM.from_pretrained(tmp_path), random_ids(2, 24, 5)
    with torch.no_grad():
        x = lm.embed(ids)
        whole = lm(x)
        for prefix in (3, 12):
            cache = KVCache(lm.config, 2, 24, x)
            steps = [lm(x[:, :prefix], cache)] + [lm(x[:, i : i + 1], cache) for i in range(prefix, 24)]
            assert len(cache) == 24
            assert_near(torch.cat(steps, dim=1), whole)


@every_family
@pytest.mark.parametrize("cached", [True, False])
def test_a_tree_of_tokens_is_computed_as_separate_rows(tmp_path, case, cached):
    """Model seed 4, token ids seeds 5 and 6, tolerance 1e-5: 9 steps of 3 branches for 2 rows, with a cache then for
    one row. `visible` shows each branch its own tokens only. The prefix has 5 positions, the window 7."""
    make(tmp_path, CASES[case], seed=4)
    lm, start, steps = CausalLM.from_pretrained(tmp_path), 5, 9
    prefix, tokens = random_ids(2, start, 5), random_ids(2, 3 * steps, 6)
    visible, branches = torch.ones(2, 1, start, dtype=torch.bool), [[row] for row in prefix.tolist()]
    positions = torch.tensor([*range(start), *(start + i // 3 for i in range(3 * steps))])
    masks = [torch.ones(start, start, dtype=torch.bool).tril().expand(2, -1, -1)]
    found, expected, cache = [], [], KVCache(lm.config, 2, start + 3 * steps, lm.embed.weight)
    with torch.no_grad():
        lm(lm.embed(prefix), cache)
        for step, parents in enumerate([[0, 0, 0], *[[2, 0, 0], [1, 1, 2], [0, 2, 1], [0, 1, 2]] * 2]):
            ids = tokens[:, 3 * step : 3 * step + 3]
            if cached and step == 2:
                cache.select_rows(torch.tensor([1]))
                prefix, tokens, visible, ids, branches = prefix[1:], tokens[1:], visible[1:], ids[1:], branches[1:]
            new_slots = torch.eye(3, dtype=torch.bool).expand(len(ids), -1, -1)
            visible = torch.cat([visible[:, parents], new_slots], dim=2)
            masks.append(visible)
            branches = [[[*rows[parent], token] for parent, token in zip(parents, row, strict=True)]
                        for rows, row in zip(branches, ids.tolist(), strict=True)]  # fmt: skip
            expected.append(torch.stack([lm(lm.embed(torch.tensor(rows)))[:, -1] for rows in branches]))
            if cached:
                x = lm.hidden(lm.embed(ids), cache, positions[len(cache) : len(cache) + 3], visible)
                found.append(lm.head(x))
        if not cached:
            mask = torch.cat([F.pad(mask, (0, len(positions) - mask.shape[2])) for mask in masks], dim=1)
            x = lm.hidden(lm.embed(torch.cat([prefix, tokens], dim=1)), None, positions, mask)
            found = lm.head(x)[:, start:].split(3, dim=1)
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y)


def test_select_rows_of_the_cache(tmp_path):
    """Model seed 5, token ids seed 6, tolerance 1e-5: three rows become two, in another order."""
    make(tmp_path, CASES["llama"], seed=5)
    lm, rows = CausalLM.from_pretrained(tmp_path), torch.tensor([2, 0])
    with torch.no_grad():
        x = lm.embed(random_ids(3, 9, 6))
        cache = KVCache(lm.config, 3, 9, x)
        lm(x[:, :6], cache)
        cache.select_rows(rows)
        steps = [lm(x[rows, i : i + 1], cache) for i in range(6, 9)]
        assert_near(torch.cat(steps, dim=1), lm(x[rows])[:, 6:])


def test_attention_is_causal(tmp_path):
    """Model seed 4, embeddings seed 5, bit for bit: other last positions do not change the outputs before them."""
    make(tmp_path, CASES["llama, grouped, tied"], seed=4)
    lm, x = CausalLM.from_pretrained(tmp_path), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        a, b = lm(x), lm(torch.cat([x[:, :6], x[:, 6:].flip(0)], dim=1))
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.isclose(a[:, 6:], b[:, 6:]).all(-1).any()


@pytest.mark.parametrize("case", ["mistral", "gemma"])
def test_windows_limit_which_positions_reach_the_output(tmp_path, case):
    """Model seed 6, token ids seed 7: two blocks with a window of 7 reach 12 positions back, a global block all."""
    make(tmp_path, CASES[case], seed=6)
    lm = CausalLM.from_pretrained(tmp_path)
    x = lm.embed(random_ids(1, 30, 7)).detach().requires_grad_()
    lm(x)[0, -1].sum().backward()
    reached = x.grad[0].abs().amax(-1) > 0
    assert reached.tolist() == ([False] * 17 + [True] * 13 if case == "mistral" else [True] * 30)


@pytest.mark.parametrize("case", ["llama", "llama, grouped, tied", "mistral", "qwen2", "qwen3, tied", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_and_compute_in_float32(tmp_path, case, dtype):
    """Model seed 8, token ids seed 9, tolerance 1e-5 to the reference with rounded weights."""
    theirs = make(tmp_path, CASES[case], 8, dtype)
    ours = CausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert (ours.head.weight is ours.embed.weight) == theirs.config.tie_word_embeddings
    assert_same(ours, theirs, random_ids(2, LENGTH, 9))


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_rounds_where_the_reference_does(tmp_path, case, dtype):
    """Model seed 10. Embeddings are equal to the bit: Gemma's scale, here the root of 40, must be rounded. Logits, with
    the same attention kernel, are equal within 0.1 % of their standard deviation."""
    make(tmp_path, CASES[case] | dict(hidden_size=40, num_attention_heads=4), 10, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="sdpa").eval()
    ours = CausalLM.from_pretrained(tmp_path, dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    ids = torch.arange(50)[None]
    with torch.no_grad():
        x = ours.embed(ids)
        assert torch.equal(x, theirs.get_input_embeddings()(ids))
        found, expected = ours(x), theirs(ids).logits
    assert found.dtype == dtype
    assert (found.float() - expected.float()).abs().max() < 0.001 * expected.float().std()


@every_family
def test_embedding_rms(tmp_path, case):
    """Model seed 11, tolerance 1e-6: over the outputs of `embed` for the whole vocabulary."""
    make(tmp_path, CASES[case], 11)
    lm = CausalLM.from_pretrained(tmp_path)
    expected = lm.embed(torch.arange(50)).square().mean().sqrt()
    torch.testing.assert_close(lm.embedding_rms(), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-3-270m"])
def test_one_block_of_a_public_model_at_full_width(tmp_path, name):
    """Model seed 12, token ids seed 13, tolerance 1e-5. Gemma's first block is local: 512 of 530 positions."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config |= dict(num_hidden_layers=1, vocab_size=200, bos_token_id=1, eos_token_id=2)
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1]
    theirs = make(tmp_path, config, seed=12)
    assert_same(CausalLM.from_pretrained(tmp_path), theirs, random_ids(1, 530 if "gemma" in name else 40, 13))


def test_llama3_scaling_has_three_ranges_of_frequencies(tmp_path):
    """In the cases above some frequencies are kept, some divided by the factor, and some are in between."""
    for case in ("llama3", "llama3, new"):
        (tmp_path / "config.json").write_text(json.dumps(CASES[case]))
        config = LMConfig.from_json(tmp_path / "config.json")
        unscaled, scaled = (frequencies(config.rope_theta, 16, s, "cpu") for s in (None, config.rope_scaling))
        ratio = unscaled / scaled
        assert (ratio == 1).any() and (ratio > config.rope_scaling.factor - 1e-3).any(), case
        assert ((ratio > 1.05) & (ratio < config.rope_scaling.factor - 0.2)).any(), case


# ---------------------------------------------------------------------------------------- errors


def test_positions_beyond_the_maximum_are_refused(tmp_path):
    """The maximum is 12 positions, with and without a cache, whatever the scaling."""
    make(tmp_path, CASES["linear"] | dict(max_position_embeddings=12))
    lm = CausalLM.from_pretrained(tmp_path)
    x = lm.embed(random_ids(1, 13, 0))
    lm(x[:, :12])
    with refused("13 positions, it has 12"):
        lm(x)
    cache = KVCache(lm.config, 1, 13, x)
    lm(x[:, :12], cache)
    with refused("13 positions, it has 12"):
        lm(x[:, 12:], cache)


def test_a_missing_folder_or_file_is_named(tmp_path):
    with refused(str(tmp_path / "nowhere"), "expected a folder"):
        CausalLM.from_pretrained(tmp_path / "nowhere")
    make(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").unlink()
    with refused(str(tmp_path), "model.safetensors"):
        CausalLM.from_pretrained(tmp_path)
