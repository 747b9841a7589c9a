"""Public language models -> the shape and the tensors of our CausalLM (`lm.py`).

Three families, each as transformers writes it: `llama`, `mistral`, and the text models of Gemma 3,
`gemma3_text`. Both spellings of rotary embeddings are read: transformers 4 keeps `rope_theta`,
`rope_scaling` and Gemma's `rope_local_base_freq` side by side, transformers 5 all of them in `rope_parameters`.

References
[1] transformers: configuration_llama.py, configuration_mistral.py, configuration_gemma3.py
"""

from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from rope import Scaling, read_scaling
from weights import InputError, bounded, field, read_json

# What a family's config means where it says nothing; null is taken for that.
DEFAULTS = {
    "llama": dict(
        max_position_embeddings=2048, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, rope_theta=1e4,
    ),
    "mistral": dict(
        max_position_embeddings=131072, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, rope_theta=1e4, num_key_value_heads=8, sliding_window=4096,
    ),
    "gemma3_text": dict(
        max_position_embeddings=131072, rms_norm_eps=1e-6, bos_token_id=2, eos_token_id=1,
        tie_word_embeddings=True, rope_theta=1e6, rope_local_base_freq=1e4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096,
        sliding_window_pattern=6,
    ),
}  # fmt: skip

# Fields of which only one value is computed here; it is also what their absence means.
ONLY = {
    "llama": dict(hidden_act="silu", partial_rotary_factor=1.0),
    "mistral": dict(
        hidden_act="silu", partial_rotary_factor=1.0, attention_bias=False, mlp_bias=False, layer_types=None,
    ),
    "gemma3_text": dict(
        hidden_activation="gelu_pytorch_tanh", partial_rotary_factor=1.0, attn_logit_softcapping=None,
        final_logit_softcapping=None, use_bidirectional_attention=False, tie_word_embeddings=True, mlp_bias=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LMConfig:
    """Shape of a language model; the defaults make it a plain Llama."""

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    tied: bool
    bos_id: int
    eos_id: int
    other_eos_ids: tuple[int, ...] = ()  # some models end a text in more than one way
    rope_scaling: Scaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None  # positions that a local block sees, its own included
    local: tuple[bool, ...] = ()  # which blocks are local; (): none
    local_theta: float | None = None  # of local blocks, never scaled; None: they turn like the others
    gemma: bool = False  # Gemma 3's blocks, norms and embeddings in place of Llama's
    query_scalar: float | None = None  # logits are divided by its root; None: by that of head_width

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        return self.eos_id, *self.other_eos_ids

    @classmethod
    def from_json(cls, path: Path) -> "LMConfig":
        """Raises InputError for another family and for whatever would be computed differently."""
        published = read_json(path)
        kind = field(published, "model_type", str, path)
        if kind not in DEFAULTS:
            raise InputError(f"{path}: model_type is {kind!r}, supported language models: {', '.join(DEFAULTS)}")
        for name, only in ONLY[kind].items():
            if published.get(name) not in (None, only):
                raise InputError(f"{path}: {name} is {published[name]!r}, only {only!r} is supported")
        config = DEFAULTS[kind] | {name: value for name, value in published.items() if value is not None}
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                 "max_position_embeddings")  # fmt: skip
        vocab, width, depth, heads, mlp_width, max_positions = (_at_least_one(config, name, path) for name in names)
        kv_heads = _at_least_one({"num_key_value_heads": heads} | config, "num_key_value_heads", path)
        if heads % kv_heads:
            raise InputError(f"{path}: num_attention_heads is {heads}, expected a multiple of num_key_value_heads")
        head_width = _at_least_one({"head_dim": width // heads} | config, "head_dim", path)
        if head_width % 2:
            raise InputError(f"{path}: heads are {head_width} wide, rotary embeddings need an even width")
        bos_id, *eos_ids = _token_ids(config, vocab, path)
        theta, scaling, local_theta = _rope(config, kind, path)
        window, local = _windows(published, config, kind, depth, path)
        return cls(
            vocab, width, depth, heads, kv_heads, head_width, mlp_width, theta,
            norm_eps=bounded(config, "rms_norm_eps", float, path, 0, 1),
            max_positions=max_positions,
            tied=field(config, "tie_word_embeddings", bool, path),
            bos_id=bos_id,
            eos_id=eos_ids[0],
            other_eos_ids=tuple(eos_ids[1:]),
            rope_scaling=scaling,
            attention_bias=field(config, "attention_bias", bool, path, False),
            mlp_bias=field(config, "mlp_bias", bool, path, False),
            window=window,
            local=local,
            local_theta=local_theta,
            gemma=kind == "gemma3_text",
            query_scalar=bounded(config, "query_pre_attn_scalar", float, path, 1e-3, 1e9) if "gemma" in kind else None,
        )  # fmt: skip


def _at_least_one(config: dict[str, Any], name: str, path: Path) -> int:
    return bounded(config, name, int, path, 1, 1000 if name == "num_hidden_layers" else 2**24)


def _theta(config: dict[str, Any], path: Path) -> float:
    return bounded(config, "rope_theta", float, path, 1.01, 1e12)


def _token_ids(config: dict[str, Any], vocab: int, path: Path) -> list[int]:
    """BOS, then every EOS, of which public configs give one or a list."""
    eos = config["eos_token_id"]
    ids = [config["bos_token_id"], *(eos if isinstance(eos, list) else [eos])]
    if len(ids) < 2 or any(type(i) is not int or not 0 <= i < vocab for i in ids):
        raise InputError(f"{path}: bos_token_id is {config['bos_token_id']!r}, eos_token_id is {short(eos)}, expected "
                         f"whole numbers below vocab_size {vocab}")  # fmt: skip
    return ids


def _rope(config: dict[str, Any], kind: str, path: Path) -> tuple[float, Scaling | None, float | None]:
    """Theta and scaling, and the theta of local blocks where they have their own."""
    rope = field(config, "rope_parameters", dict, path, {})
    if "rope_scaling" in config and rope:
        raise InputError(f"{path}: has rope_scaling and rope_parameters, expected one of them")
    if kind != "gemma3_text":
        rope = rope | field(config, "rope_scaling", dict, path, {})
        return _theta(config | rope, path), read_scaling(rope, config, path), None
    if odd := sorted(rope.keys() - {"full_attention", "sliding_attention"}):
        raise InputError(f"{path}: rope_parameters has {odd[0]!r}, expected full_attention and sliding_attention")
    local = {"rope_theta": config["rope_local_base_freq"]} | field(rope, "sliding_attention", dict, path, {})
    if read_scaling(local, config, path) is not None:
        raise InputError(f"{path}: sliding_attention has rope_type {local['rope_type']!r}, only 'default' is supported")
    rope = field(rope, "full_attention", dict, path, {}) | field(config, "rope_scaling", dict, path, {})
    theta, local_theta = _theta(config | rope, path), _theta(local, path)
    return theta, read_scaling(rope, config, path), local_theta


def _windows(published: dict[str, Any], config: dict[str, Any], kind: str, depth: int,
             path: Path) -> tuple[int | None, tuple[bool, ...]]:  # fmt: skip
    """How many positions a local block sees, and which blocks are local."""
    if kind == "llama":
        return None, ()
    if kind == "mistral":
        if "sliding_window" in published and published["sliding_window"] is None:  # here null says: no window
            return None, ()
        return _at_least_one(config, "sliding_window", path), (True,) * depth
    every = _at_least_one(config, "sliding_window_pattern", path)
    types = ["sliding_attention" if i % every else "full_attention" for i in range(1, depth + 1)]
    types = field(config, "layer_types", list, path, types)
    if len(types) != depth or any(t not in ("sliding_attention", "full_attention") for t in types):
        raise InputError(f"{path}: layer_types: expected {depth} times sliding_attention or full_attention, found "
                         f"{short(types)}")  # fmt: skip
    return _at_least_one(config, "sliding_window", path), tuple(t == "sliding_attention" for t in types)


def lm_names(config: LMConfig) -> dict[str, str]:
    """Our parameter name -> the name in a public checkpoint; a tied head has no tensor of its own."""
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    names["head.weight"] = names["embed.weight"] if config.tied else "lm_head.weight"
    pairs = {
        "norm1": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "norm2": "post_attention_layernorm",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    if config.gemma:
        pairs |= {
            "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
            "norm1_out": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm",
            "norm2_out": "post_feedforward_layernorm",
        }  # fmt: skip
    biased = ["attn.q", "attn.k", "attn.v", "attn.o"] * config.attention_bias + ["gate", "up", "down"] * config.mlp_bias
    for i in range(config.depth):
        names |= {f"blocks.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in pairs.items()}
        names |= {f"blocks.{i}.{a}.bias": f"model.layers.{i}.{pairs[a]}.bias" for a in biased}
    return names
