"""Public language models: their config.json, as `lm.py` needs it.

Six families, in the format of transformers: `llama`, `mistral`, `qwen2`, `qwen3`, the language models of Qwen3-VL,
`qwen3_vl_text`, and those of Gemma 3, `gemma3_text`. Both spellings of rotary embeddings are read: transformers 4
writes `rope_theta`, `rope_scaling` and Gemma's `rope_local_base_freq` side by side, transformers 5 puts all of them
into `rope_parameters`.

References
[1] transformers: configuration_llama.py, configuration_mistral.py, configuration_qwen2.py, configuration_qwen3.py,
    configuration_gemma3.py; modeling_rope_utils.py
"""

from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from common.errors import InputError, reading
from common.files import field, one_of, read_json
from models.names import read_columns, read_fields

LM_FIELDS = read_columns("""
    ours          config.json             llama mistral qwen2  qwen3  qwen3_vl_text gemma3_text
    vocab         vocab_size              32000 32000   151936 151936 151936        262208
    width         hidden_size             4096  4096    4096   4096   4096          2304
    depth         num_hidden_layers       32    32      32     32     32            26
    heads         num_attention_heads     32    32      32     32     32            8
    kv_heads      num_key_value_heads     0     8       32     32     32            4
    head_width    head_dim                0     0       0      128    128           256
    mlp_width     intermediate_size       11008 14336   22016  22016  22016         9216
    max_positions max_position_embeddings 2048  131072  32768  32768  128000        131072
    norm_eps      rms_norm_eps            1e-6  1e-6    1e-6   1e-6   1e-6          1e-6
    rope_theta    rope_theta              1e4   1e4     1e4    1e4    5e5           1e6
    local_theta   rope_local_base_freq    -     -       -      -      -             1e4
    query_scalar  query_pre_attn_scalar   -     -       -      -      -             256.0
    tied          tie_word_embeddings     False False   False  False  False         True
    mlp_bias      mlp_bias                False -       -      -      -             -
    o_bias        attention_bias          False -       -      False  False         False
    qk_norm       -                       False False   False  True   True          True
    gemma         -                       False False   False  False  False         True
""")  # defaults of [1]; 0: as many as heads, width / heads
FAMILIES = tuple(LM_FIELDS)[2:]
TOKENS = {"llama": (1, 2), "mistral": (1, 2), "gemma3_text": (2, 1)}
TOKENS |= dict.fromkeys(("qwen2", "qwen3", "qwen3_vl_text"), (None, None))
# Fields with a single supported value, which is also their default.
OFF = ("use_resampler", "qk_layer_norms", "rope_interleaved", "use_bidirectional_attention", "use_sliding_window")
WHOLE = {"partial_rotary_factor": 1.0}
SILU = {"hidden_act": "silu"}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA |= dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"))
LENGTH = "original_max_position_embeddings"
ROPE_FIELDS = dict.fromkeys(("default", "dynamic", "linear"), ())  # of each kind, besides its factor
ROPE_FIELDS["llama3"] = LENGTH, "low_freq_factor", "high_freq_factor"
LAYER_TYPES = ("full_attention", "sliding_attention")
MOST = 2**24  # positions
MROPE = "mrope_section", "mrope_interleaved"


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies of rotary embeddings are divided by a factor; see `lm.frequencies`."""

    factor: float
    original_positions: int = 0  # L, the length in pretraining; with 0 all frequencies are divided
    low: float = 1.0  # channel pairs with fewer rotations in L positions are divided by the factor
    high: float = 2.0  # pairs with more rotations are kept


def parse_lm_config(published: dict[str, Any], where: str | Path, path: Path) -> dict[str, Any]:
    """The content of a public config.json `path`, or its part `where` -> the fields of `lm.LMConfig`. Raises InputError
    for other families and for every field whose value would need other computations."""
    family = one_of(published, "model_type", FAMILIES, where)
    check_supported(published, dict.fromkeys(OFF, False) | WHOLE | (GEMMA if family == "gemma3_text" else SILU), where)
    config = read_fields(published, LM_FIELDS, family, where)
    with reading(where):
        config["kv_heads"] = config["kv_heads"] or config["heads"]
        config["head_width"] = config["head_width"] or config["width"] // config["heads"]
        config["qkv_bias"] = family == "qwen2" or config.get("o_bias", False)
        config |= _read_tokens(published, family, config["vocab"], where, path.with_name("generation_config.json"))
        config |= _read_rope(published, config, where)
        return config | _read_windows(published, family, config["depth"], where)


def check_supported(config: dict[str, Any], supported: dict[str, Any], where: str | Path) -> None:
    for name, value in supported.items():
        if config.get(name) not in (None, value):
            raise InputError(f"{where}: {name} is {short(config[name])}, only {value!r} is supported")


def _read_tokens(published: dict[str, Any], family: str, vocab: int, where: str | Path, generation: Path) -> dict:
    """BOS, None if there is none, and every EOS: those of generation_config.json, else of config.json, as in [1].
    Qwen's config.json names a BOS, although no text begins with one."""
    bos, eos = TOKENS[family]
    if bos is not None:
        bos = field({"bos_token_id": bos} | published, "bos_token_id", int, where, None, 0, vocab - 1)  # null: no token
    if generation.is_file() and (others := read_json(generation).get("eos_token_id")) is not None:
        eos, where = others, generation
    elif published.get("eos_token_id") is not None:
        eos = published["eos_token_id"]
    eos = [field({"eos_token_id": i}, "eos_token_id", int, where, least=0, most=vocab - 1)
           for i in (eos if isinstance(eos, list) else [eos])]
    if not eos:
        raise InputError(f"{where}: eos_token_id: expected a token, found none")
    return {"bos_id": bos, "eos_ids": tuple(eos)}


def _read_rope(published: dict[str, Any], config: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """Theta and scaling, and of Gemma the theta of local blocks."""
    parts = field(published, "rope_parameters", dict, where, {})
    if not config["gemma"]:
        parts = {"full_attention": parts}
    check_supported(parts, dict.fromkeys(parts.keys() - set(LAYER_TYPES)), f"{where}: rope_parameters")
    rope, local = (field(parts, name, dict, where, {}) for name in LAYER_TYPES)
    rope = field(published, "rope_scaling", dict, where, {}) or rope
    found = {"rope_theta": field(rope, "rope_theta", float, where, config["rope_theta"], 1, 1e12)}
    if published["model_type"] == "qwen3_vl_text":  # Qwen3-VL: positions are time, row and column
        check_supported(rope, {"mrope_interleaved": True}, where)
        found["mrope"] = tuple(field(rope, "mrope_section", list, where, [24, 20, 20]))
        if len(found["mrope"]) != 3 or sum(found["mrope"]) != config["head_width"] // 2:
            raise InputError(f"{where}: mrope_section is {short(found['mrope'])}, expected three numbers whose sum is "
                             f"{config['head_width'] // 2}, half of head_dim")
        rope = {name: value for name, value in rope.items() if name not in MROPE}
    found["rope_scaling"] = _read_scaling(rope, published, config, where, tuple(ROPE_FIELDS))
    if config["gemma"]:
        _read_scaling(local, published, config, f"{where}: sliding_attention", ("default",))
        found["local_theta"] = field(local, "rope_theta", float, where, config["local_theta"], 1, 1e12)
    return found


def _read_scaling(rope: dict, published: dict, config: dict, where: str | Path, kinds: tuple) -> RopeScaling | None:
    """None if frequencies are not scaled. "dynamic" scales them in texts beyond max_positions, which are refused."""
    kind = one_of(rope, "rope_type", kinds, where, rope.get("type", "default"))
    known = {"type", "rope_type", "rope_theta", "factor", *ROPE_FIELDS[kind]}
    check_supported(rope, dict.fromkeys(rope.keys() - known) | WHOLE, f"{where}: rope_type {kind}")
    if kind in ("default", "dynamic"):
        return None
    factor = field(rope, "factor", float, where, least=1, most=1e6)
    if kind == "linear":
        return RopeScaling(factor)
    length = field(rope, LENGTH, int, where, config["max_positions"], 1, MOST)
    length = field(published, LENGTH, int, where, length, 1, MOST)  # counts more than the nested field, as in [1]
    low = field(rope, "low_freq_factor", float, where, least=1e-3, most=1e6)
    return RopeScaling(factor, length, low, field(rope, "high_freq_factor", float, where, least=low + 1e-3, most=1e6))


def _read_windows(published: dict[str, Any], family: str, depth: int, where: str | Path) -> dict[str, Any]:
    """The window of local blocks, in positions, and for each block whether it is local: of Gemma's all but every sixth,
    of Mistral's all, unless its window is null; no other family has windows."""
    is_gemma, is_mistral = family == "gemma3_text", family == "mistral"
    has_window = is_gemma or (is_mistral and published.get("sliding_window", 0) is not None)
    window = field(published, "sliding_window", int, where, 4096, 1, MOST) if has_window else None
    period = field(published, "sliding_window_pattern", int, where, 6, 1, MOST) if is_gemma else depth + 1
    types = [LAYER_TYPES[has_window and (i + 1) % period > 0] for i in range(depth)]
    if not is_mistral:
        types = field(published, "layer_types", list, where, types)
    allowed = LAYER_TYPES if has_window else LAYER_TYPES[:1]
    if len(types) != depth or any(t not in allowed for t in types):
        raise InputError(f"{where}: layer_types: expected {depth} times {' or '.join(allowed)}, found {short(types)}")
    return {"window": window, "local": tuple(t == "sliding_attention" for t in types) if window else ()}
