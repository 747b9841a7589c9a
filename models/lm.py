"""The language model: a causal transformer and its key-value cache.

One class for six families. Mistral [4] is a Llama [1] whose blocks attend within a sliding window. Qwen 2 [6] has
biases in the projections of queries, keys and values; Qwen 3 [7] normalizes queries and keys instead. Gemma 3 [5]
mixes local blocks, which have a window, with global ones; it also normalizes queries, keys and the outputs of
attention and MLP, uses GELU instead of SiLU in its gated MLP, and scales its embeddings. Qwen3-VL's [8] is a Qwen 3
that is also told where its visual tokens are, `VisualPlaces`.

Shapes: B rows, S positions, C width, V vocabulary, h heads, g key-value heads, d head width, P positions of a prefix.

References
[1] https://arxiv.org/abs/2302.13971; names and order of operations: transformers' modeling_llama.py
[2] Rotary embeddings, https://arxiv.org/abs/2104.09864; scaled: https://arxiv.org/abs/2306.15595, and apply_scaling in
    models/llama3/model.py of https://github.com/meta-llama/llama-models
[3] Grouped queries, https://arxiv.org/abs/2305.13245
[4] https://arxiv.org/abs/2310.06825; modeling_mistral.py
[5] https://arxiv.org/abs/2503.19786; modeling_gemma3.py
[6] https://arxiv.org/abs/2407.10671; modeling_qwen2.py
[7] https://arxiv.org/abs/2505.09388; modeling_qwen3.py
[8] https://arxiv.org/abs/2511.21631; modeling_qwen3_vl.py
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError, reading
from common.files import read_json
from models import hub
from models.lm_checkpoints import RopeScaling, parse_lm_config
from models.names import lm_tensor_names
from models.weights import copy_strict, drop_tied_copy, read_tensors


@dataclass(frozen=True)
class LMConfig:
    """Shape of a language model; the defaults are a plain Llama's."""

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
    bos_id: int | None  # None: texts have no first token of their own
    eos_ids: tuple[int, ...]  # every token that ends a text; the first ends captions in training
    rope_scaling: RopeScaling | None = None
    mrope: tuple[int, ...] = ()  # pairs of channels that turn with time, row and column; (): with one position
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys are normalized, head by head
    window: int | None = None  # of local blocks, in positions: the query's own and those before it
    local: tuple[bool, ...] = ()  # whether each block is local; (): all are global
    local_theta: float | None = None  # rope_theta of local blocks, which are not scaled; None: as in global blocks
    gemma: bool = False  # Gemma 3's blocks, norms and embeddings instead of Llama's
    query_scalar: float | None = None  # attention logits are divided by its square root; None: head_width

    @property
    def eos_id(self) -> int:
        return self.eos_ids[0]

    def __post_init__(self):
        if self.heads % self.kv_heads or self.head_width % 2:  # rotary embeddings need pairs of channels
            raise InputError(f"does not fit together: {self}")


class VisualPlaces(NamedTuple):
    """What a language model is told of a prefix with visual tokens besides its embeddings: Qwen3-VL's [8], or of
    `--deep-rank` (models/deep.py)."""

    positions: Tensor | None  # (3, P): time, row and column, which are equal in texts; None: those of a text
    shift: int  # from the number of tokens before a text that follows to its position
    deepstack: list[Tensor]  # (B, P or less, C), added to the outputs of the first blocks

    def rotary_positions(self, positions: Tensor) -> Tensor:
        """Positions as attention counts them (..., S), of the prefix and of texts behind it -> (3, ..., S)."""
        length = self.positions.shape[1]
        texts = (positions[..., length:] + self.shift).expand(3, *positions.shape[:-1], -1)
        prefix = self.positions.view(3, *[1] * (positions.dim() - 1), length)
        return torch.cat([prefix.expand(*texts.shape[:-1], -1), texts], dim=-1)


class KVCache:
    """Keys and values of every block: `size` slots for each of `rows` rows, with dtype and device of `like`."""

    def __init__(self, config: LMConfig, rows: int, size: int, like: Tensor, places: VisualPlaces | None = None):
        self.places = places  # of the prefix, the first call's x
        shape = (config.depth, 2, rows, config.kv_heads, size, config.head_width)
        self.store = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0  # slots in use, the same in every row

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, g, S, d) to the last S slots in use; returns all slots in use (B, g, slots, d)."""
        slots = self.store[block, :, : len(k), :, : self.length]  # (2, B, g, slots, d)
        slots[0, :, :, -k.shape[2] :], slots[1, :, :, -k.shape[2] :] = k, v
        return slots[0], slots[1]

    def select_rows(self, rows: Tensor, start: int = 0) -> None:
        """Row i becomes the old row rows[i]; others are dropped. Slots before `start` stay as they are."""
        for keys_or_values in self.store.flatten(0, 1):  # of one block: (rows, g, size, d)
            used = keys_or_values[:, :, start : self.length]
            used[: len(rows)] = used.index_select(0, rows)


def frequencies(theta: float, d: int, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians by which each pair of channels is rotated from one position to the next, float32 (d/2,).

    Pair i has f = theta^(-2i/d): the first pairs rotate fast and encode short distances, the last ones long distances.
    Scaling lowers them, so that positions beyond the length L of the pretraining meet angles that the model knows:

        f' = f (keep + (1 - keep) / factor)

    "linear" keeps none: all positions are divided by the factor. In "llama3", keep grows from 0 to 1 with the pair's
    rotations in L positions, between `low` and `high` rotations: fast pairs keep their frequency.
    """
    pairs = torch.arange(d // 2, dtype=torch.float32, device=device)
    unscaled = theta ** (-2 * pairs / d)
    if scaling is None:
        return unscaled
    rotations = scaling.original_positions * unscaled / (2 * math.pi)
    keep = ((rotations - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return unscaled * (keep + (1 - keep) / scaling.factor)


def rotary_cos_sin(positions: Tensor, d: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype,
                   mrope: tuple[int, ...] = ()):
    """Returns cosine and sine (..., S, d) of the angles of positions (..., S); the sine negated in the first half.

    With mrope, positions are (3, ..., S), and pairs of channels take theirs by turns, time, row, column, time, ... [8].
    """
    positions = positions.float()[..., None]
    if mrope:
        pairs = torch.arange(d // 2, device=positions.device)
        row, column = ((pairs % 3 == axis) & (pairs < 3 * mrope[axis]) for axis in (1, 2))
        positions = torch.where(row, positions[1], torch.where(column, positions[2], positions[0]))  # (..., S, d/2)
    angles = positions * frequencies(theta, d, scaling, positions.device)  # (..., S, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads (B, h, S, d) by the angles of their positions. Channel i is paired with i + d/2, not with i + 1."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attention_mask(queries: Tensor, keys: Tensor, visible: Tensor | None, window: int | None, dtype: torch.dtype):
    """Additive attention mask: 0 where a query may attend, else -inf.

    Positions of queries (S,) and keys (slots,) give a causal mask (S, slots). Those of a batch, (B, S) and (B, slots),
    come with `visible` (B, S, slots), which decides instead, and the mask is (B, 1, S, slots). A window limits both to
    the query's position and the window - 1 before.
    """
    distance = queries[..., None] - keys[..., None, :]  # (S, slots) or (B, S, slots)
    allowed = distance >= 0 if visible is None else visible
    if window is not None:
        allowed = allowed & (distance < window)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -torch.inf)
    return mask if visible is None else mask[:, None]


class RMSNorm(nn.RMSNorm):
    """Rounds to the input's dtype before the multiplication, as [1] does and torch does not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, None, self.eps).to(x.dtype) * self.weight


class GemmaRMSNorm(nn.RMSNorm):
    """Multiplies by 1 + weight, and rounds to the input's dtype after that."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class GemmaEmbedding(nn.Embedding):
    """Embeddings times the square root of their width, which is rounded to their dtype first."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype).item()


class LMAttention(nn.Module):
    """Grouped-query attention [3] with rotary embeddings [2]."""

    def __init__(self, config: LMConfig, index: int):
        super().__init__()
        self.index, self.d = index, config.head_width
        self.scale = (config.query_scalar or config.head_width) ** -0.5
        self.q = nn.Linear(config.width, config.heads * self.d, config.qkv_bias)
        self.k = nn.Linear(config.width, config.kv_heads * self.d, config.qkv_bias)
        self.v = nn.Linear(config.width, config.kv_heads * self.d, config.qkv_bias)
        self.o = nn.Linear(config.heads * self.d, config.width, config.o_bias)
        norm = GemmaRMSNorm if config.gemma else RMSNorm
        self.q_norm = norm(self.d, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = norm(self.d, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = apply_rotary(self.q_norm(q), cos, sin)  # (B, h, S, d)
        k = apply_rotary(self.k_norm(k), cos, sin)  # (B, g, S, d)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)  # (B, g, slots, d)
        # Without a mask the S queries are all positions, or a single new one, which may attend to every slot.
        is_causal = mask is None and q.shape[2] > 1
        x = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=self.scale, enable_gqa=True)
        return self.o(x.transpose(1, 2).flatten(2))  # (B, S, C)


class LMBlock(nn.Module):
    """Attention and a gated MLP, each with a pre-norm and a residual; Gemma also normalizes their outputs."""

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
    """A causal language model on embeddings: `lm(lm.embed(ids))` -> logits."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.embed = (GemmaEmbedding if config.gemma else nn.Embedding)(config.vocab, config.width)
        self.blocks = nn.ModuleList(LMBlock(config, i) for i in range(config.depth))
        self.norm = (GemmaRMSNorm if config.gemma else RMSNorm)(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def hidden(self, x: Tensor, cache: KVCache | None = None, positions=None, visible=None,
               places: VisualPlaces | None = None) -> Tensor:
        """Embeddings (B, S, C) -> last hidden states (B, S, C), for callers that apply the head to some of them.

        With a cache, x follows the cached positions: one position a call, after the first call. Attention is causal,
        unless the caller gives, without a cache, the `positions` (B, S) of x and `visible` (B, S, S): True where one
        attends to another. `places`: of the prefix with which x begins; a cache has its own. Without positions, raises
        InputError beyond config.max_positions.
        """
        config, start = self.config, 0 if cache is None else cache.length
        if (end := start + x.shape[1]) > config.max_positions and positions is None:
            raise InputError(f"language model: {end} positions, it has {config.max_positions}")
        keys = torch.arange(end, device=x.device) if positions is None else positions
        positions = keys[..., start:]
        of_heads = positions if visible is None else positions[:, None]  # (S,) or (B, 1, S)
        if cache is not None:
            cache.length, places = end, cache.places
        mrope, deepstack = (), []
        if places is not None and start:
            of_heads = of_heads + places.shift
        elif places is not None:
            deepstack = places.deepstack
            if places.positions is not None:
                of_heads, mrope = places.rotary_positions(of_heads), config.mrope
        mask = None if visible is None else attention_mask(positions, keys, visible, None, x.dtype)
        rope = rotary_cos_sin(of_heads, config.head_width, config.rope_theta, config.rope_scaling, x.dtype, mrope)
        local_rope, local_mask = rope, mask
        if config.local_theta is not None:
            local_rope = rotary_cos_sin(of_heads, config.head_width, config.local_theta, None, x.dtype)
        if config.window is not None and end > config.window:
            local_mask = attention_mask(positions, keys, visible, config.window, x.dtype)
        for i, (block, local) in enumerate(zip(self.blocks, config.local or [False] * config.depth, strict=True)):
            x = block(x, *local_rope, local_mask, cache) if local else block(x, *rope, mask, cache)
            if i < len(deepstack):
                x = x + F.pad(deepstack[i], (0, 0, 0, x.shape[1] - deepstack[i].shape[1])).to(x.dtype)
        return self.norm(x)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings (B, S, C) -> logits of each next token (B, S, V)."""
        return self.head(self.hidden(x, cache))

    @torch.no_grad()
    def embedding_rms(self) -> Tensor:
        """Root mean square of the outputs of `embed` over the vocabulary; float32 ()."""
        scale = self.config.width**0.5 if self.config.gemma else 1.0
        # In parts: on a CPU each makes a float32 copy.
        parts = self.embed.weight.split(2**14)
        norms = torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) for rows in parts])  # (V,)
        return scale * (norms.square().mean() / self.config.width).sqrt()

    @classmethod
    def from_config(cls, folder: str | Path) -> "CausalLM":
        """The model of a folder on the meta device, from its configs alone. Raises InputError."""
        path = Path(folder) / "config.json"
        fields = parse_lm_config(read_json(path), path, path)
        with reading(path), torch.device("meta"):
            return cls(LMConfig(**fields))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "CausalLM":
        """Loads `config.json` and the weights of a folder or hub id.

        Missing, unexpected and misshapen tensors raise an InputError that names them.
        """
        folder = hub.resolve(folder, check=cls.from_config)
        lm = cls.from_config(folder)
        tensors, path = read_tensors(folder)
        names = lm_tensor_names(lm, tensors)
        if lm.config.tied:
            drop_tied_copy(tensors, names["embed.weight"])
        copy_strict(lm, tensors, names, path)
        tensors.clear()  # so that each tensor is freed as soon as it has been converted
        return lm.to(dtype)
