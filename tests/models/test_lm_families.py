"""Every family and switch of the language model, against transformers [1] on tiny random models, through real files.

A case is a config.json as published. Transformers reads the same file, in the eager form of its attention;
every parameter of its model is drawn anew, the norms' too, and goes through a weights file into ours.
Inputs are longer than any window and than the positions that a scaled model was first trained on.

[1] transformers: models/llama, models/mistral and models/gemma3, modeling_rope_utils.py, masking_utils.py
"""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from lm import CausalLM, KVCache, LMConfig
from rope import frequencies

CONFIGS = Path(__file__).parent / "configs"
LENGTH = 60
LLAMA = dict(
    model_type="llama", vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=40, max_position_embeddings=64, rms_norm_eps=1e-5,
    hidden_act="silu", rope_theta=1000.0,
)  # fmt: skip
MISTRAL = LLAMA | dict(model_type="mistral", sliding_window=7)
GEMMA = dict(
    model_type="gemma3_text", vocab_size=50, hidden_size=36, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, intermediate_size=40, max_position_embeddings=64, rms_norm_eps=1e-5,
    hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=24, sliding_window=7, sliding_window_pattern=2,
    rope_theta=5000.0, rope_local_base_freq=50.0,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
YARN = dict(factor=4.0, original_max_position_embeddings=16)
SLOW = dict(beta_fast=0.9, beta_slow=0.05, attention_factor=1.3)


def new(config: dict, **rope) -> dict:
    """The same config as transformers 5 would spell it, with these rope_parameters."""
    gone = ("rope_theta", "rope_local_base_freq", "sliding_window_pattern")
    return {k: v for k, v in config.items() if k not in gone} | {"rope_parameters": rope}


CASES = {
    "llama": LLAMA,
    "llama, biases": LLAMA | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, attention's biases": LLAMA | dict(attention_bias=True),
    "linear": LLAMA | dict(rope_scaling={"type": "linear", "factor": 2.5}),
    "linear, new": new(LLAMA, rope_type="linear", factor=2.5, rope_theta=1000.0),
    "llama3": LLAMA | dict(rope_scaling=LLAMA3),
    "llama3, new": new(LLAMA, rope_theta=700.0, **LLAMA3),
    "yarn": LLAMA | dict(rope_scaling=dict(type="yarn", finetuned=True, **YARN)),
    "yarn, new": new(LLAMA, rope_type="yarn", rope_theta=700.0, **YARN, **SLOW),
    "yarn, no whole pairs": LLAMA | dict(rope_scaling=dict(rope_type="yarn", truncate=False, **YARN, **SLOW)),
    "yarn, a ramp of no width": LLAMA | dict(rope_theta=1e9, rope_scaling=dict(rope_type="yarn", factor=4.0,
                                             original_max_position_embeddings=4)),  # fmt: skip
    "yarn, positions in the first level": LLAMA | dict(original_max_position_embeddings=16,
                                                       rope_scaling=dict(rope_type="yarn", factor=4.0)),  # fmt: skip
    "yarn, positions nowhere": LLAMA | dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "dynamic": LLAMA | dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "mistral": MISTRAL,
    "mistral, window of one": MISTRAL | dict(sliding_window=1),
    "mistral, no window": MISTRAL | dict(sliding_window=None),
    "mistral, default window": {k: v for k, v in MISTRAL.items() if k != "sliding_window"},
    "mistral, llama3": MISTRAL | dict(rope_scaling=LLAMA3, tie_word_embeddings=True),
    "gemma": GEMMA,
    "gemma, layers by name": GEMMA | dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    "gemma, new": new(
        GEMMA | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        full_attention={"rope_type": "default", "rope_theta": 3000.0},
        sliding_attention={"rope_type": "default", "rope_theta": 30.0},
    ),
    "gemma, linear": GEMMA | dict(rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma, linear, new": new(
        GEMMA | dict(layer_types=["sliding_attention", "full_attention", "full_attention"], num_key_value_heads=2),
        full_attention={"rope_type": "linear", "rope_theta": 3000.0, "factor": 8.0},
        sliding_attention={"rope_type": "default", "rope_theta": 30.0},
    ),
    "gemma, biases": GEMMA | dict(attention_bias=True, num_key_value_heads=4),
    "gemma, all global": GEMMA | dict(layer_types=["full_attention"] * 3),
}
every_case = pytest.mark.parametrize("case", CASES)
every_family = pytest.mark.parametrize("case", ["llama", "mistral", "gemma"])


def make(folder: Path, config: dict, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Transformers' model of a config.json, random in every parameter, and the folder with it as published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    # Made in float32, not in the config's dtype and then turned into it: Gemma's scale would stay rounded.
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
    )
    theirs = theirs.eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    centre = 0.0 if config["model_type"] == "gemma3_text" else 1.0  # a Gemma's norms multiply by 1 + weight
    for name, parameter in theirs.named_parameters():
        spread = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.normal_(centre if "norm" in name else 0.0, spread, generator=draw)
        parameter.copy_(parameter.to(dtype))  # not theirs.to(dtype), which rounds the rotary frequencies too
    write(folder, {name: t.to(dtype) for name, t in published(theirs).items()})
    return theirs


def published(theirs) -> dict[str, torch.Tensor]:
    """The model's tensors as in a published file: a tied head has none of its own."""
    tensors = {name: t.contiguous() for name, t in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def some_ids(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_same(ours: CausalLM, theirs, ids: torch.Tensor, within: float = 1e-5) -> None:
    """Every block's output, then the logits, so that a failure names the first block that differs."""
    outputs = []
    for block in ours.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        logits, expected = ours(ours.embed(ids)), theirs(ids, output_hidden_states=True)
    # The reference's last hidden states are normalised already, and the logits stand for them.
    for i, (x, y) in enumerate(zip(outputs[:-1], expected.hidden_states[1:-1], strict=True)):
        torch.testing.assert_close(x, y, rtol=0, atol=within, msg=lambda text, i=i: f"after block {i}: {text}")
    assert expected.logits.std() > 0.1  # so the tolerance, an absolute one, means something
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=within)


# ------------------------------------------------------------------------------ the same figures


@every_case
def test_blocks_and_logits_are_the_reference_s(tmp_path, case):
    """Model seed 0, token ids seed 1, tolerance 1e-5."""
    theirs = make(tmp_path, CASES[case])
    assert_same(CausalLM.from_pretrained(tmp_path), theirs, some_ids(2, LENGTH, 1))


@every_case
def test_a_folder_that_transformers_saved_is_the_same_model(tmp_path, case):
    """Model seed 2, token ids seed 3, tolerance 1e-5: transformers 5 writes another config.json for the same model."""
    theirs = make(tmp_path / "published", CASES[case], seed=2)
    theirs.save_pretrained(tmp_path / "saved")
    assert "rope_theta" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    ours = CausalLM.from_pretrained(tmp_path / "saved")
    assert ours.config == LMConfig.from_json(tmp_path / "published" / "config.json")
    assert_same(ours, theirs, some_ids(2, LENGTH, 3))


@every_case
def test_a_cache_changes_nothing(tmp_path, case):
    """Model seed 4, token ids seed 5, tolerance 1e-5: a prefix longer or shorter than the window, then one a step."""
    make(tmp_path, CASES[case], seed=4)
    lm, ids = CausalLM.from_pretrained(tmp_path), some_ids(2, 24, 5)
    with torch.no_grad():
        x = lm.embed(ids)
        whole = lm(x)
        for first in (3, 12):
            cache = KVCache(lm.config, 2, 24, x)
            steps = [lm(x[:, :first], cache)] + [lm(x[:, i : i + 1], cache) for i in range(first, 24)]
            torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-5)


@every_family
@pytest.mark.parametrize("cached", [True, False])
def test_rivals_for_a_position_are_read_as_if_each_were_alone(tmp_path, case, cached):
    """Model seed 4, token ids seeds 5 and 6, tolerance 1e-5: 9 steps of 3 rivals, of 2 texts and, with a cache, then of
    one; each rival is read as in a row of its own. The prefix is 5 positions, a window 7."""
    make(tmp_path, CASES[case], seed=4)
    lm, start, depth = CausalLM.from_pretrained(tmp_path), 5, 9
    prefix, said = some_ids(2, start, 5), some_ids(2, 3 * depth, 6)
    seen, texts = torch.ones(2, 1, start, dtype=torch.bool), [[row] for row in prefix.tolist()]
    positions = torch.tensor([*range(start), *(start + i // 3 for i in range(3 * depth))])
    masks = [torch.ones(start, start, dtype=torch.bool).tril().expand(2, -1, -1)]
    found, wanted, cache = [], [], KVCache(lm.config, 2, start + 3 * depth, lm.embed.weight)
    with torch.no_grad():
        lm(lm.embed(prefix), cache)
        for step, parents in enumerate([[0, 0, 0], *[[2, 0, 0], [1, 1, 2], [0, 2, 1], [0, 1, 2]] * 2]):
            ids = said[:, 3 * step : 3 * step + 3]
            if cached and step == 2:
                cache.keep(torch.tensor([1]))
                prefix, said, seen, ids, texts = prefix[1:], said[1:], seen[1:], ids[1:], texts[1:]
            own = torch.eye(3, dtype=torch.bool).expand(len(ids), -1, -1)
            seen = torch.cat([seen[:, parents], own], dim=2)
            masks.append(seen)
            texts = [[[*rows[parent], token] for parent, token in zip(parents, row, strict=True)]
                     for rows, row in zip(texts, ids.tolist(), strict=True)]  # fmt: skip
            wanted.append(torch.stack([lm(lm.embed(torch.tensor(rows)))[:, -1] for rows in texts]))
            if cached:
                x = lm.hidden(lm.embed(ids), cache, positions[len(cache) : len(cache) + 3], seen)
                found.append(lm.head(x))
        if not cached:
            whole = torch.cat([F.pad(mask, (0, len(positions) - mask.shape[2])) for mask in masks], dim=1)
            x = lm.hidden(lm.embed(torch.cat([prefix, said], dim=1)), None, positions, whole)
            found = lm.head(x)[:, start:].split(3, dim=1)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["mistral", "gemma"])
def test_windows_are_seen_through(tmp_path, case):
    """Model seed 6, embeddings seed 7: what reaches the last position through 7 positions a local block, and no more.

    In a Mistral of two blocks it is what stands at most 12 before, in a Gemma's global block everything.
    """
    make(tmp_path, CASES[case], seed=6)
    lm = CausalLM.from_pretrained(tmp_path)
    x = lm.embed(some_ids(1, 30, 7)).detach().requires_grad_()
    lm(x)[0, -1].sum().backward()
    reached = x.grad[0].abs().amax(-1) > 0
    assert reached.tolist() == ([False] * 17 + [True] * 13 if case == "mistral" else [True] * 30)


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_and_compute_in_float32(tmp_path, case, dtype):
    """Model seed 8, token ids seed 9, tolerance 1e-5 from the reference with its weights rounded."""
    theirs = make(tmp_path, CASES[case], 8, dtype)
    ours = CausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert (ours.head.weight is ours.embed.weight) == (case == "gemma")
    assert_same(ours, theirs, some_ids(2, LENGTH, 9))


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_rounds_where_the_reference_does(tmp_path, case, dtype):
    """Model seed 10: embeddings bit for bit (Gemma's scale, the root of 40 here, has to be rounded); logits, with the
    reference's attention by the same kernel, within 0.1 % of their spread. Both read the weights from the file."""
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
def test_the_embeddings_size_is_that_of_what_embed_returns(tmp_path, case):
    """Model seed 11, tolerance 1e-6: over the whole vocabulary."""
    make(tmp_path, CASES[case], 11)
    lm = CausalLM.from_pretrained(tmp_path)
    expected = lm.embed(torch.arange(50)).square().mean().sqrt()
    torch.testing.assert_close(lm.embedding_rms(), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "gemma-3-270m"])
def test_one_block_of_a_public_shape_at_its_full_width(tmp_path, name):
    """Model seed 12, token ids seed 13, tolerance 1e-5; Gemma's first block is local and sees 512 of 530 positions."""
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | dict(num_hidden_layers=1, vocab_size=200)
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1]
    theirs = make(tmp_path, config, seed=12)
    assert_same(CausalLM.from_pretrained(tmp_path), theirs, some_ids(1, 530 if "gemma" in name else 40, 13))


def test_the_cases_scale_every_way_there_is(tmp_path):
    """Nothing random: in the cases above some pairs are kept, some slowed down in part, some by the whole factor."""
    for case in ("llama3", "yarn, new", "yarn, no whole pairs"):
        (tmp_path / "config.json").write_text(json.dumps(CASES[case]))
        config = LMConfig.from_json(tmp_path / "config.json")
        plain, scaled = (frequencies(config.rope_theta, 16, s, "cpu") for s in (None, config.rope_scaling))
        slower = plain / scaled
        assert (slower == 1).any() and (slower > config.rope_scaling.factor - 1e-3).any(), case
        assert ((slower > 1.05) & (slower < config.rope_scaling.factor - 0.2)).any(), case
