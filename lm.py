"""The frozen voice: a Llama-type causal language model and its key-value cache.

Letters: B rows, S positions, C width, V vocabulary, h heads, g key-value heads, d width of a head.

References
[1] Llama, https://arxiv.org/abs/2302.13971; names and order: transformers' modeling_llama.py.
[2] Rotary embeddings, https://arxiv.org/abs/2104.09864.
[3] Grouped queries, https://arxiv.org/abs/2305.13245.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights import InputError, copy_strict, field, read_json, read_safetensors


@dataclass(frozen=True)
class LMConfig:
    """Shape of a Llama-type language model."""

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

    @classmethod
    def from_json(cls, path: Path) -> "LMConfig":
        config = read_json(path)
        kind = field(config, "model_type", str, path)
        if kind != "llama":
            raise InputError(f"{path}: model_type is {kind!r}, supported language models: llama")
        for name, plain in (("hidden_act", "silu"), ("rope_scaling", None), ("attention_bias", False),
                            ("mlp_bias", False)):  # fmt: skip
            if config.get(name, plain) != plain:
                raise InputError(f"{path}: {name} is {config[name]!r}, only {plain!r} is supported")
        rope = field(config, "rope_parameters", dict, path, {})  # transformers 5 keeps the theta in here
        if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", "rope_theta"}:
            raise InputError(f"{path}: rope_parameters is {rope!r}, only a theta of rope_type 'default' is supported")
        width, heads = field(config, "hidden_size", int, path), field(config, "num_attention_heads", int, path)
        kv_heads = field(config, "num_key_value_heads", int, path, heads)
        if min(width, heads, kv_heads) < 1 or heads % kv_heads:
            raise InputError(f"{path}: num_attention_heads is {heads}, expected a multiple of num_key_value_heads")
        return cls(
            vocab=field(config, "vocab_size", int, path),
            width=width,
            depth=field(config, "num_hidden_layers", int, path),
            heads=heads,
            kv_heads=kv_heads,
            head_width=field(config, "head_dim", int, path, width // heads),
            mlp_width=field(config, "intermediate_size", int, path),
            rope_theta=field({**config, **rope}, "rope_theta", float, path, 10000.0),
            norm_eps=field(config, "rms_norm_eps", float, path, 1e-6),
            max_positions=field(config, "max_position_embeddings", int, path, 2048),
            tied=field(config, "tie_word_embeddings", bool, path, False),
            bos_id=field(config, "bos_token_id", int, path, 1),
            eos_id=field(config, "eos_token_id", int, path, 2),
        )


class KVCache:
    """Keys and values of the positions seen so far, for every block; room for `rows` rows of `size` positions."""

    def __init__(self, config: LMConfig, rows: int, size: int, like: Tensor):
        shape = (config.depth, 2, rows, config.kv_heads, size, config.head_width)
        self.store = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, g, S, d) after the first `length` positions; returns all so far (B, g, length+S, d)."""
        rows, end = len(k), self.length + k.shape[2]
        self.store[block, 0, :rows, :, self.length : end] = k
        self.store[block, 1, :rows, :, self.length : end] = v
        return self.store[block, 0, :rows, :, :end], self.store[block, 1, :rows, :, :end]

    def reorder(self, rows: Tensor, start: int = 0) -> None:
        """Makes row i what row rows[i] was, from position `start` on; they may become more, or fewer."""
        for half in self.store.flatten(0, 1):  # a block's keys, or its values: (rows, g, size, d)
            seen = half[:, :, start : self.length]
            seen[: len(rows)] = seen[rows]


def rotary_angles(config: LMConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (S, d) float32, of each position's turn of each pair of channels."""
    half = torch.arange(0, config.head_width, 2, device=positions.device, dtype=torch.float32)
    turns = torch.outer(positions.float(), config.rope_theta ** (-half / config.head_width))
    turns = torch.cat([turns, turns], dim=-1)  # channel i is paired with i + d/2, not with i + 1
    return turns.cos(), turns.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class LMAttention(nn.Module):
    def __init__(self, config: LMConfig, index: int):
        super().__init__()
        self.index, self.d = index, config.head_width
        self.q = nn.Linear(config.width, config.heads * self.d, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * self.d, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * self.d, bias=False)
        self.o = nn.Linear(config.heads * self.d, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, h, S, d), (B, g, S, d)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)  # (B, g, length+S, d)
        # With a cache S is either the whole prefix or one position, which may see all before it.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
        return self.o(x.transpose(1, 2).flatten(2))  # (B, S, C)


class LMBlock(nn.Module):
    def __init__(self, config: LMConfig, index: int):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, config.norm_eps)
        self.attn = LMAttention(config, index)
        self.norm2 = nn.RMSNorm(config.width, config.norm_eps)
        self.gate = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, cache)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class CausalLM(nn.Module):
    """A Llama-type language model on embeddings: `lm(lm.embed(ids))` -> logits."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(LMBlock(config, i) for i in range(config.depth))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def hidden(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings (B, S, C) -> last hidden states (B, S, C), so that a caller can choose what to decode."""
        start = cache.length if cache is not None else 0
        assert start == 0 or x.shape[1] == 1, "after the prefix, one position a step"
        if start + x.shape[1] > self.config.max_positions:
            raise InputError(f"language model: {start + x.shape[1]} positions, it has {self.config.max_positions}")
        cos, sin = rotary_angles(self.config, torch.arange(start, start + x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings (B, S, C) -> logits of each next token (B, S, V)."""
        return self.head(self.hidden(x, cache))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "CausalLM":
        """Loads `config.json` and `model.safetensors` of a Llama-layout folder; all tensors or an error."""
        folder = Path(folder)
        config = LMConfig.from_json(folder / "config.json")
        with torch.device("meta"):
            lm = cls(config)
        path = folder / "model.safetensors"
        tensors = read_safetensors(path)
        head, embed = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if config.tied and head is not None and embed is not None and head.dtype == embed.dtype and head.equal(embed):
            del tensors["lm_head.weight"]  # some public files hold the tied tensor twice
        copy_strict(lm, tensors, lm_names(config), path)
        return lm.to(dtype)


def lm_names(config: LMConfig) -> dict[str, str]:
    """Our parameter name -> the name in a public Llama checkpoint; a tied head has no tensor of its own."""
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    names["head.weight"] = names["embed.weight"] if config.tied else "lm_head.weight"
    pairs = {
        "norm1": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "norm2": "post_attention_layernorm",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    for i in range(config.depth):
        names |= {f"blocks.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in pairs.items()}
    return names
