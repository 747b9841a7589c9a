"""Public language models: their config.json and the names of their tensors, as `lm.py` needs them.

Five families, in the format of transformers: `llama`, `mistral`, `qwen2`, `qwen3`, and the text models of Gemma 3,
`gemma3_text`.
Both spellings of rotary embeddings are read: transformers 4 writes `rope_theta`, `rope_scaling` and Gemma's
`rope_local_base_freq` side by side, transformers 5 puts all of them into `rope_parameters`.

References
[1] transformers: configuration_llama.py, configuration_mistral.py, configuration_qwen2.py, configuration_qwen3.py,
    configuration_gemma3.py
"""

from pathlib import Path
from reprlib import repr as short
from typing import Any

from common.errors import InputError
from common.files import bounded, field, read_json
from models.rope import RopeScaling, read_rope_scaling

QWEN = dict(
    max_position_embeddings=32768, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    rope_theta=1e4, num_attention_heads=32, num_key_value_heads=32, sliding_window=4096, max_window_layers=28,
)  # fmt: skip

# The values of fields that a family's config leaves out; null counts as left out, except for token ids and windows.
DEFAULTS = {
    "llama": dict(
        max_position_embeddings=2048, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, rope_theta=1e4,
    ),
    "mistral": dict(
        max_position_embeddings=131072, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, rope_theta=1e4, num_key_value_heads=8, sliding_window=4096,
    ),
    "qwen2": QWEN,
    "qwen3": QWEN | dict(head_dim=128),
    "gemma3_text": dict(
        max_position_embeddings=131072, rms_norm_eps=1e-6, bos_token_id=2, eos_token_id=1,
        tie_word_embeddings=True, rope_theta=1e6, rope_local_base_freq=1e4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096,
        sliding_window_pattern=6,
    ),
}  # fmt: skip

# Fields with a single supported value, which is also their default.
SUPPORTED = {
    "llama": dict(hidden_act="silu", partial_rotary_factor=1.0),
    "mistral": dict(
        hidden_act="silu", partial_rotary_factor=1.0, attention_bias=False, mlp_bias=False, layer_types=None,
    ),
    "qwen2": dict(hidden_act="silu", partial_rotary_factor=1.0, mlp_bias=False),
    "qwen3": dict(hidden_act="silu", partial_rotary_factor=1.0, mlp_bias=False),
    "gemma3_text": dict(
        hidden_activation="gelu_pytorch_tanh", partial_rotary_factor=1.0, attn_logit_softcapping=None,
        final_logit_softcapping=None, use_bidirectional_attention=False, tie_word_embeddings=True, mlp_bias=False,
    ),
}  # fmt: skip


def read_lm_config(path: Path) -> dict[str, Any]:
    """Reads a public config.json; returns the fields of `lm.LMConfig`.

    Raises InputError for other families and for every field whose value would need other computations.
    """
    return parse_lm_config(read_json(path), path, path.with_name("generation_config.json"))


def parse_lm_config(published: dict[str, Any], where: str | Path, generation: Path) -> dict[str, Any]:
    """The same from the content of a config. Raises an InputError that starts with `where`.

    generation: the generation_config.json, which need not exist.
    """
    kind = field(published, "model_type", str, where)
    if kind not in DEFAULTS:
        raise InputError(f"{where}: model_type is {kind!r}, supported language models: {', '.join(DEFAULTS)}")
    for name, value in SUPPORTED[kind].items():
        if published.get(name) not in (None, value):
            raise InputError(f"{where}: {name} is {published[name]!r}, only {value!r} is supported")
    config = DEFAULTS[kind] | {name: value for name, value in published.items() if value is not None}
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "max_position_embeddings")  # fmt: skip
    vocab, width, depth, heads, mlp_width, max_positions = (_at_least_one(config, name, where) for name in names)
    kv_heads = _at_least_one({"num_key_value_heads": heads} | config, "num_key_value_heads", where)
    if heads % kv_heads:
        raise InputError(f"{where}: num_attention_heads is {heads}, expected a multiple of num_key_value_heads")
    head_width = _at_least_one({"head_dim": width // heads} | config, "head_dim", where)
    if head_width % 2:
        raise InputError(f"{where}: heads are {head_width} wide, rotary embeddings need an even width")
    bos_id, (eos_id, *other_eos_ids) = _token_ids(published, kind, vocab, where, generation)
    rope_theta, rope_scaling, local_theta = _rope(config, kind, where)
    window, local = _windows(published, config, kind, depth, where)
    attention_bias = field(config, "attention_bias", bool, where, False)
    query_scalar = bounded(config, "query_pre_attn_scalar", float, where, 1e-3, 1e9) if kind == "gemma3_text" else None
    return dict(
        vocab=vocab, width=width, depth=depth, heads=heads, kv_heads=kv_heads, head_width=head_width,
        mlp_width=mlp_width, rope_theta=rope_theta, rope_scaling=rope_scaling, max_positions=max_positions,
        norm_eps=bounded(config, "rms_norm_eps", float, where, 0, 1),
        tied=field(config, "tie_word_embeddings", bool, where),
        bos_id=bos_id, eos_id=eos_id, other_eos_ids=tuple(other_eos_ids),
        qkv_bias=attention_bias or kind == "qwen2", o_bias=attention_bias and kind != "qwen2",
        mlp_bias=field(config, "mlp_bias", bool, where, False),
        qk_norm=kind in ("qwen3", "gemma3_text"), window=window, local=local, local_theta=local_theta,
        gemma=kind == "gemma3_text", query_scalar=query_scalar,
    )  # fmt: skip


def _at_least_one(config: dict[str, Any], name: str, where: str | Path) -> int:
    return bounded(config, name, int, where, 1, 1000 if name == "num_hidden_layers" else 2**24)


def _theta(config: dict[str, Any], where: str | Path) -> float:
    return bounded(config, "rope_theta", float, where, 1.01, 1e12)


def _token_ids(published: dict[str, Any], kind: str, vocab: int, where: str | Path,
               generation: Path) -> tuple[int | None, list[int]]:  # fmt: skip
    """BOS, None if there is none, and every EOS.

    The EOS of generation_config.json count if config.json has none, or if they are several; they then follow that of
    config.json.
    """
    config = DEFAULTS[kind] | published  # null is no token, not the default
    bos = None if config["bos_token_id"] is None else bounded(config, "bos_token_id", int, where, 0, vocab - 1)
    eos, generation_eos = _eos_ids(published, vocab, where), []
    if generation.is_file():
        generation_eos = _eos_ids(read_json(generation), vocab, generation)
    if not eos or len(generation_eos) > 1:
        eos = list(dict.fromkeys(eos + generation_eos))
    if not (eos := eos or _eos_ids(config, vocab, where)):
        raise InputError(f"{where}: field 'eos_token_id' is missing, here and in generation_config.json, expected a "
                         "whole number")  # fmt: skip
    return bos, eos


def _eos_ids(config: dict[str, Any], vocab: int, where: str | Path) -> list[int]:
    """One id or a list; null or missing: []."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if value == [] or any(type(i) is not int or not 0 <= i < vocab for i in ids):
        raise InputError(f"{where}: eos_token_id is {short(value)}, expected whole numbers below vocab_size {vocab}")
    return ids


def _rope(config: dict[str, Any], kind: str, where: str | Path) -> tuple[float, RopeScaling | None, float | None]:
    """Theta, scaling, and the theta of local blocks if they have their own."""
    rope = field(config, "rope_parameters", dict, where, {})
    if "rope_scaling" in config and rope:
        raise InputError(f"{where}: has rope_scaling and rope_parameters, expected one of them")
    if kind != "gemma3_text":
        rope = rope | field(config, "rope_scaling", dict, where, {})
        return _theta(config | rope, where), read_rope_scaling(rope, config, where), None
    if unexpected := sorted(rope.keys() - {"full_attention", "sliding_attention"}):
        raise InputError(f"{where}: rope_parameters has {unexpected[0]!r}, expected full_attention and "
                         "sliding_attention")  # fmt: skip
    local = {"rope_theta": config["rope_local_base_freq"]} | field(rope, "sliding_attention", dict, where, {})
    if read_rope_scaling(local, config, where) is not None:
        kind = local["rope_type"]
        raise InputError(f"{where}: sliding_attention has rope_type {kind!r}, only 'default' is supported")
    rope = field(rope, "full_attention", dict, where, {}) | field(config, "rope_scaling", dict, where, {})
    return _theta(config | rope, where), read_rope_scaling(rope, config, where), _theta(local, where)


def _windows(published: dict[str, Any], config: dict[str, Any], kind: str, depth: int,
             where: str | Path) -> tuple[int | None, tuple[bool, ...]]:  # fmt: skip
    """The window of local blocks, in positions, and for each block whether it is local. Without a window: None, ()."""
    if kind == "llama":
        return None, ()
    has_window = kind == "gemma3_text" or published.get("sliding_window", 0) is not None  # Gemma: null is the default
    if kind == "gemma3_text":
        period = _at_least_one(config, "sliding_window_pattern", where)
        local = [i % period > 0 for i in range(1, depth + 1)]
    elif kind == "mistral":
        local = [has_window] * depth
    else:
        has_window = has_window and field(config, "use_sliding_window", bool, where, False)
        first = bounded(config, "max_window_layers", int, where, 0, 2**24)
        local = [has_window and i >= first for i in range(depth)]
    types = ["sliding_attention" if is_local else "full_attention" for is_local in local]
    types = field(config, "layer_types", list, where, types)
    if len(types) != depth or any(t not in ("sliding_attention", "full_attention") for t in types):
        raise InputError(f"{where}: layer_types: expected {depth} times sliding_attention or full_attention, found "
                         f"{short(types)}")  # fmt: skip
    local = tuple(t == "sliding_attention" for t in types)
    if not has_window:
        if any(local):
            raise InputError(f"{where}: layer_types has sliding_attention, expected full_attention without a window")
        return None, ()
    return _at_least_one(config, "sliding_window", where), local


def lm_tensor_names(config) -> dict[str, str]:
    """For an `lm.LMConfig`: our parameter name -> the name in a public checkpoint. A tied head shares a name."""
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    names["head.weight"] = names["embed.weight"] if config.tied else "lm_head.weight"
    pairs = {
        "norm1": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "norm2": "post_attention_layernorm",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    if config.qk_norm:
        pairs |= {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    if config.gemma:
        pairs |= {
            "norm1_out": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm",
            "norm2_out": "post_feedforward_layernorm",
        }  # fmt: skip
    biased = ["attn.q", "attn.k", "attn.v"] * config.qkv_bias + ["attn.o"] * config.o_bias
    biased += ["gate", "up", "down"] * config.mlp_bias
    for i in range(config.depth):
        names |= {f"blocks.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight" for ours, theirs in pairs.items()}
        names |= {f"blocks.{i}.{ours}.bias": f"model.layers.{i}.{pairs[ours]}.bias" for ours in biased}
    return names
