"""The frozen voice: a causal language model and its key-value cache.

One class for three families. Mistral [4] is a Llama [1] whose blocks see only a window of positions.
Gemma 3 [5] mixes local blocks, which see a window, with global ones; it also normalises queries, keys
and what a block adds, gates its MLP with GELU for SiLU, and multiplies its embeddings.

Letters: B rows, S positions, C width, V vocabulary, h heads, g key-value heads, d width of a head.

References
[1] https://arxiv.org/abs/2302.13971; names and order: transformers' modeling_llama.py
[2] Rotary embeddings, https://arxiv.org/abs/2104.09864: rope.py
[3] Grouped queries, https://arxiv.org/abs/2305.13245
[4] https://arxiv.org/abs/2310.06825; modeling_mistral.py
[5] https://arxiv.org/abs/2503.19786; modeling_gemma3.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hub
from checkpoint import read_tensors
from lm_public import LMConfig, lm_names
from rope import rotary_angles, rotate
from weights import InputError, copy_strict

__all__ = ["CausalLM", "KVCache", "LMConfig", "lm_names"]


class KVCache:
    """Keys and values of what a model has read, for every block; slots for `size` positions of each of `rows` rows."""

    def __init__(self, config: LMConfig, rows: int, size: int, like: Tensor):
        shape = (config.depth, 2, rows, config.kv_heads, size, config.head_width)
        self.store = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.positions = torch.empty(0, dtype=torch.long, device=like.device)  # of the slots in use

    def __len__(self) -> int:
        return len(self.positions)

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, g, S, d) to the last S slots in use; returns all that are in use (B, g, slots, d)."""
        rows, end = len(k), len(self)
        self.store[block, 0, :rows, :, end - k.shape[2] : end] = k
        self.store[block, 1, :rows, :, end - k.shape[2] : end] = v
        return self.store[block, 0, :rows, :, :end], self.store[block, 1, :rows, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Makes row i what row rows[i] was."""
        for half in self.store.flatten(0, 1):  # a block's keys, or its values: (rows, g, size, d)
            seen = half[:, :, : len(self)]
            seen[: len(rows)] = seen[rows]


def attention_mask(queries: Tensor, keys: Tensor, seen: Tensor | None, window: int | None,
                   dtype: torch.dtype) -> Tensor:  # fmt: skip
    """0 where a query may look, else -inf. Positions of queries (S,) and of keys (slots,) -> (S, slots), and with what
    is `seen` (B, S, slots) -> (B, 1, S, slots). A window lets a query see itself and the window - 1 positions before.
    """
    back = queries[:, None] - keys
    may = back >= 0 if seen is None else seen[:, None]
    if window is not None:
        may = may & (back < window)
    return torch.zeros(may.shape, dtype=dtype, device=may.device).masked_fill(~may, -torch.inf)


class RMSNorm(nn.RMSNorm):
    """Rounds to the input's dtype before it multiplies, as [1] does and torch does not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, None, self.eps).to(x.dtype) * self.weight


class GemmaRMSNorm(nn.RMSNorm):
    """Holds the distance of each weight from 1, and multiplies before it rounds to the input's dtype."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class GemmaEmbedding(nn.Embedding):
    """Embeddings times the root of their width, which is rounded to their dtype first."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype).item()


class LMAttention(nn.Module):
    def __init__(self, config: LMConfig, index: int):
        super().__init__()
        self.index, self.d = index, config.head_width
        self.scale = (config.query_scalar or config.head_width) ** -0.5
        self.q = nn.Linear(config.width, config.heads * self.d, config.attention_bias)
        self.k = nn.Linear(config.width, config.kv_heads * self.d, config.attention_bias)
        self.v = nn.Linear(config.width, config.kv_heads * self.d, config.attention_bias)
        self.o = nn.Linear(config.heads * self.d, config.width, config.attention_bias)
        self.q_norm = GemmaRMSNorm(self.d, config.norm_eps) if config.gemma else nn.Identity()
        self.k_norm = GemmaRMSNorm(self.d, config.norm_eps) if config.gemma else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)  # (B, h, S, d), (B, g, S, d)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)  # (B, g, slots, d)
        # Without a mask S is either all there is or one position after it, which may see it all.
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and q.shape[2] > 1, scale=self.scale,
                                           enable_gqa=True)  # fmt: skip
        return self.o(x.transpose(1, 2).flatten(2))  # (B, S, C)


class LMBlock(nn.Module):
    """x + attention, x + gated MLP; Gemma also normalises what the two add."""

    def __init__(self, config: LMConfig, index: int):
        super().__init__()
        norm = GemmaRMSNorm if config.gemma else RMSNorm
        self.norm1 = norm(config.width, config.norm_eps)
        self.attn = LMAttention(config, index)
        self.norm1_out = norm(config.width, config.norm_eps) if config.gemma else nn.Identity()
        self.norm2 = norm(config.width, config.norm_eps)
        self.gate = nn.Linear(config.width, config.mlp_width, config.mlp_bias)
        self.up = nn.Linear(config.width, config.mlp_width, config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, config.mlp_bias)
        self.norm2_out = norm(config.width, config.norm_eps) if config.gemma else nn.Identity()
        self.act = nn.GELU("tanh") if config.gemma else nn.SiLU()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.norm1_out(self.attn(self.norm1(x), cos, sin, mask, cache))
        y = self.norm2(x)
        return x + self.norm2_out(self.down(self.act(self.gate(y)) * self.up(y)))


class CausalLM(nn.Module):
    """A language model on embeddings: `lm(lm.embed(ids))` -> logits."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embed = (GemmaEmbedding if config.gemma else nn.Embedding)(config.vocab, config.width)
        self.blocks = nn.ModuleList(LMBlock(config, i) for i in range(config.depth))
        self.norm = (GemmaRMSNorm if config.gemma else RMSNorm)(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def hidden(self, x: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
               seen: Tensor | None = None) -> Tensor:  # fmt: skip
        """Embeddings (B, S, C) -> last hidden states (B, S, C), so that a caller can choose what to decode.

        With a cache they follow what it holds. Each sees all before it, unless the caller says what: `seen`
        (B, S, slots), True for the slots, of the cache or else of x, that one looks at, and `positions` (S,) of x.
        """
        config, before = self.config, 0 if cache is None else len(cache)
        if positions is None:
            assert not before or x.shape[1] == 1, "after the prefix, one position a step"
            if (end := before + x.shape[1]) > config.max_positions:
                raise InputError(f"language model: {end} positions, it has {config.max_positions}")
            positions = torch.arange(before, end, device=x.device)
        keys = positions if cache is None else torch.cat([cache.positions, positions])
        if cache is not None:
            cache.positions = keys
        mask = None if seen is None else attention_mask(positions, keys, seen, None, x.dtype)
        d = config.head_width
        far = near = (*rotary_angles(positions, d, config.rope_theta, config.rope_scaling, x.dtype), mask)
        if config.local_theta is not None:
            near = (*rotary_angles(positions, d, config.local_theta, None, x.dtype), mask)
        if config.window is not None and len(keys) > config.window:
            near = (*near[:2], attention_mask(positions, keys, seen, config.window, x.dtype))
        for block, local in zip(self.blocks, config.local or [False] * config.depth, strict=True):
            x = block(x, *(near if local else far), cache)
        return self.norm(x)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings (B, S, C) -> logits of each next token (B, S, V)."""
        return self.head(self.hidden(x, cache))

    @torch.no_grad()
    def embedding_rms(self) -> Tensor:
        """Root mean square of what `embed` returns, over the vocabulary; float32 ()."""
        scale = self.config.width**0.5 if self.config.gemma else 1.0
        rows = torch.linalg.vector_norm(self.embed.weight, dim=1, dtype=torch.float32)  # (V,), no copy of all
        return scale * (rows.square().mean() / self.config.width).sqrt()

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "CausalLM":
        """Loads `config.json` and the weights of a folder or hub id; all tensors or an InputError that names one."""
        folder = hub.local(folder)
        config = LMConfig.from_json(folder / "config.json")
        with torch.device("meta"):
            lm = cls(config)
        tensors, path = read_tensors(folder)
        if config.tied and same(tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")):
            del tensors["lm_head.weight"]  # some public files hold the tied tensor twice
        # Old files also hold the frequencies of the rotary embeddings.
        ignored = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.depth)]
        copy_strict(lm, tensors, lm_names(config), path, ignored)
        tensors.clear()  # so that each goes as soon as it has been converted
        return lm.to(dtype)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.equal(b)
