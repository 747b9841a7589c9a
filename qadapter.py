"""The Q-Adapter: query tokens that read a frozen ViT through a gate.

This is our reading of the abstract of [1]; nothing else of that paper was used. N learnable queries flow alongside
the blocks of the ViT. After each adapted block they attend to all patches of all frames at once, and a gating layer
decides, query by query, how much of what they read is kept:

    Y  = (LN(Z) - m) / s                              Z: the block's output; this LN has no scale and no shift; m, s:
                                                      mean and standard deviation of each channel of LN(Z) in the
                                                      first training clips
    X  = [Y_t + E_t ; Y_t - Y_(t-1)]                  E: one vector per frame; the second half is the change since the
                                                      frame before, at the same place, and zero in the first frame
    A  = softmax((LN(Q) W_q)(X W_k)^T / sqrt(d)) (X W_v) W_o
    g  = sigmoid([LN(Q) ; LN(A)] W_g + b_g)           the gating layer: one number per query
    Q <- Q + g * A

The gate reads normalized vectors, so its logits grow neither with the width of the ViT nor with the size of a read.
By default Z is not changed, so the ViT needs no gradients. With write-back the patches also read the gated queries,
through a projection that starts at zero: deeper frozen blocks then work on adapted patches, and gradients pass through
the ViT.

Shapes: B clips, T frames of S x S pixels, T' frames in training, P tokens per frame (class token and patches), D ViT
width, N queries Q, Q_J after the last block, A what they read, J adapted blocks, r rank, h heads, d = r/h; n and m
count any queries and keys. Z, Y, E and X are those above; z is LN(Z) in `GatedCrossAttention`, Z elsewhere.

References
[1] Q-Adapter, https://arxiv.org/abs/2510.10022 (abstract only).
[2] PatchDropout, https://arxiv.org/abs/2208.07220: a ViT that is trained on random patches of each image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4  # h
MIN_STD = 0.1  # of a channel; LN(Z) has 1 over all channels


class CastLinear(nn.Linear):
    """A trained layer beside a frozen model: float32 weights, cast to the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def zero_linear(inputs: int, outputs: int) -> CastLinear:
    """A layer that starts at zero."""
    layer = CastLinear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def split_heads(x: Tensor) -> Tensor:
    """Splits the width r of (B, n, r) into heads."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, n, r) -> (B, h, n, d)


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, n, r) queries to (B, m, r) keys and values, in h heads. Returns (B, n, r).

    mask, to be broadcast to (B, h, n, m): which keys each query sees; None: all.
    """
    x = F.scaled_dot_product_attention(*map(split_heads, (q, k, v)), mask)  # (B, h, n, d)
    return x.transpose(1, 2).flatten(2)  # (B, n, r)


def random_visibility(batch: int, frames: int, tokens: int, dropout: float, device: torch.device) -> Tensor:
    """Which tokens of each clip its queries see in a training step, each with the probability 1 - dropout [2].

    Returns bool (B, T*P). If a frame would lose all, its first is seen: a softmax over nothing is not a number.
    """
    visible = torch.rand(batch, frames, tokens, device=device) >= dropout  # (B, T, P)
    visible[:, :, 0] |= ~visible.any(dim=2)
    return visible.flatten(1)


def init_time_embed(frames: int, width: int) -> Tensor:
    """Initial frame vectors (T, D): time from -1 to 1 along one random direction.

    Their scale is that of LN(Z), not a ViT's usual 0.02: frames must be told apart from the first step on. Along a
    ramp, one direction of W_k makes a head attend to early or to late frames; the difference of two such heads is
    motion.
    """
    return torch.linspace(-1, 1, frames)[:, None] * torch.randn(width)


def interpolate_time_embed(time_embed: Tensor, frames: int) -> Tensor:
    """Frame vectors (T', D), those of the frames in training, interpolated linearly in time -> (T, D)."""
    if frames == len(time_embed):
        return time_embed
    return F.interpolate(time_embed.T[None], size=frames, mode="linear", align_corners=False)[0].T


class GatedCrossAttention(nn.Module):
    """The adapter of one ViT block: the queries' cross-attention, its gate and, with write-back, the patches' own.

    config: has the fields rank, gate and token_dropout, see `QAdapter`.
    """

    def __init__(self, width: int, config, write_back: bool):
        super().__init__()
        rank, self.token_dropout = config.rank, config.token_dropout
        self.register_buffer("mean", torch.zeros(width))  # m and s, see `QAdapter.measure_channels`
        self.register_buffer("std", torch.ones(width))
        self.norm = nn.LayerNorm(width)
        self.q = CastLinear(width, rank, bias=False)
        # W_k and W_v in one layer, and their rows for the two halves of X apart: X W = (Y + E) W' + change W''
        self.kv = CastLinear(width, 2 * rank, bias=False)
        self.kv_change = CastLinear(width, 2 * rank, bias=False)
        self.o = CastLinear(rank, width, bias=False)
        self.gate = self.make_gate(width) if config.gate == "normed" else None
        self.write_q = self.write_kv = self.write_o = None
        if write_back:
            self.write_q = CastLinear(width, rank, bias=False)
            self.write_kv = CastLinear(width, 2 * rank, bias=False)
            self.write_o = CastLinear(rank, width, bias=False)
            nn.init.zeros_(self.write_o.weight)  # step 0 is the frozen ViT, bit for bit

    def make_gate(self, width: int) -> nn.Module:
        """The gating layer. It starts at zero, so every gate starts at 1/2. Its name gives it a tenth of the rate."""
        return zero_linear(2 * width, 1)

    def forward(self, queries: Tensor, tokens: Tensor, time_embed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, D), the tokens of a block's output (B, T, P, D), frame vectors (T, D) -> new queries, gates
        (B, N), new tokens.

        z and what is projected from it alone have the dtype of the ViT; from where E is added on, all is float32.
        """
        z = F.layer_norm(tokens, tokens.shape[-1:])  # (B, T, P, D)
        normed_queries = self.norm(queries)  # (B, N, D)
        read = self.read(z, normed_queries, time_embed)  # A: (B, N, D)
        gates = self.compute_gates(normed_queries, read)  # (B, N, 1)
        queries = queries + gates * read
        if self.write_q is not None:
            tokens = self.write(z, queries, tokens, time_embed)
        return queries, gates.squeeze(-1), tokens

    def read(self, z: Tensor, normed_queries: Tensor, time_embed: Tensor) -> Tensor:
        """What LN(Q), (B, N, D), reads of z = LN(Z), (B, T, P, D). Returns A (B, N, D)."""
        q = self.q(normed_queries)  # (B, N, r)
        k, v = self.keys_and_values(z, time_embed)  # (B, T*P, r)
        return self.o(multi_head_attention(q, k, v, self.mask(z)))  # (B, N, D)

    def compute_gates(self, normed_queries: Tensor, read: Tensor) -> Tensor:
        """How much each query keeps of its read (B, N, D). Returns (B, N, 1)."""
        if self.gate is None:
            return read.new_ones(*read.shape[:2], 1)
        return self.gate(torch.cat([normed_queries, F.layer_norm(read, read.shape[-1:])], dim=-1)).sigmoid()

    def keys_and_values(self, z: Tensor, time_embed: Tensor) -> tuple[Tensor, Tensor]:
        """X W_k and X W_v for z = LN(Z), (B, T, P, D). Returns two (B, T*P, r)."""
        kv = self.project(self.kv, z, time_embed) + self.project_changes(z)  # (B, T, P, 2r)
        return kv.flatten(1, 2).chunk(2, dim=-1)

    def project(self, layer: CastLinear, z: Tensor, time_embed: Tensor) -> Tensor:
        """((z - m) / s + E) W for z = LN(Z), (B, T, P, D) -> (B, T, P, r or 2r).

        It is computed as z W/s + (E - m/s) W, whose sum is r wide, not D.
        """
        constant = layer(time_embed - self.mean / self.std)  # (T, r)
        return F.linear(z, (layer.weight / self.std).to(z.dtype)) + constant[:, None]

    def project_changes(self, z: Tensor) -> Tensor:
        """(Y_t - Y_(t-1)) W for z = LN(Z), (B, T, P, D) -> (B, T, P, 2r), zero in the first frame. m cancels.

        The projections are subtracted, not the tokens: in bf16 small changes of large values would be rounded away.
        """
        projected = F.linear(z, (self.kv_change.weight / self.std).to(z.dtype))  # (B, T, P, 2r)
        return projected - torch.cat([projected[:, :1], projected[:, :-1]], dim=1)

    def mask(self, z: Tensor) -> Tensor | None:
        """Which of the T*P tokens the queries see (B, 1, 1, T*P). None: all, as always but in a training step."""
        if not (self.token_dropout and self.training and torch.is_grad_enabled()):  # CIDEr's samples see all
            return None
        return random_visibility(*z.shape[:3], self.token_dropout, z.device)[:, None, None]

    def write(self, z: Tensor, queries: Tensor, tokens: Tensor, time_embed: Tensor) -> Tensor:
        """Write-back: tokens (B, T, P, D), whose LN is z, attend to the queries (B, N, D). Returns new tokens."""
        q = self.project(self.write_q, z, time_embed).flatten(1, 2)  # (B, T*P, r)
        kv = self.write_kv(self.norm(queries))  # (B, N, 2r)
        read = multi_head_attention(q, *kv.chunk(2, dim=-1))  # (B, T*P, r)
        return tokens + self.write_o(read.to(z.dtype)).view_as(tokens)  # (B, T, P, D)


def naive_gated_cross_attention(block: GatedCrossAttention, q: Tensor, z: Tensor, time_embed: Tensor) -> Tensor:
    """The equations at the top of this file for one clip, one head at a time, with a gate: slow, for reading.

    Queries (N, D), a block's output (T, P, D), frame vectors (T, D) -> new queries (N, D), without write-back.
    """
    y = (F.layer_norm(z, z.shape[-1:]) - block.mean) / block.std  # (T, P, D)
    change = torch.zeros_like(y)
    for t in range(1, len(y)):
        change[t] = y[t] - y[t - 1]
    x = torch.cat([y + time_embed[:, None], change], dim=-1).flatten(0, 1)  # (T*P, 2D)
    wk, wv = torch.cat([block.kv.weight, block.kv_change.weight], dim=-1).chunk(2)  # (r, 2D) each
    normed_q, heads = block.norm(q), []
    for hq, hk, hv in zip(*(w.chunk(HEADS) for w in (block.q.weight, wk, wv)), strict=True):  # d rows each
        logits = (normed_q @ hq.T) @ (x @ hk.T).T / len(hq) ** 0.5  # (N, T*P)
        heads.append(logits.softmax(-1) @ (x @ hv.T))  # (N, d)
    a = torch.cat(heads, dim=-1) @ block.o.weight.T  # (N, D)
    g = torch.sigmoid(block.gate(torch.cat([normed_q, F.layer_norm(a, a.shape[-1:])], dim=-1)))  # (N, 1)
    return q + g * a


class QAdapter(nn.Module):
    """Queries, frame vectors and one gated block per adapted ViT block.

    width, depth: D and the number of blocks of the ViT. config has the fields
    queries N; rank r, a multiple of h; frames T; last_blocks: how many of the last blocks are adapted, 0 means all;
    gate: "normed", or "none" for g = 1; write_back: patches read the queries too, and with visual "frames" after the
    last block as well, since the caller reads them; token_dropout: the share of the tokens that is hidden from the
    queries in training, at random, for each block and clip [2].
    """

    Block = GatedCrossAttention  # other gates: study/variants.py

    def __init__(self, width: int, depth: int, config):
        super().__init__()
        self.write_back = config.write_back
        self.first = depth - (config.last_blocks or depth)  # index of the first adapted block
        self.queries = nn.Parameter(torch.randn(config.queries, width))
        self.time_embed = nn.Parameter(init_time_embed(config.frames, width))
        last_written = depth if config.visual == "frames" else depth - 1  # else nothing would read what is written
        self.blocks = nn.ModuleList(
            self.Block(width, config, write_back=config.write_back and i < last_written)
            for i in range(self.first, depth)
        )
        self.norm = nn.LayerNorm(width)
        self.last_gates: Tensor | None = None  # (J, B, N), of the last forward pass

    @torch.no_grad()
    def measure_channels(self, outputs: Tensor) -> None:
        """Sets m and s of each block from the outputs (B, T, J, P, D) of the frozen ViT for some clips.

        In public ViTs a few channels are many times as large as the others, and most have a mean far from zero. Steps
        of Adam are alike for all channels, so without this the small ones are learned slowly.
        """
        for block, z in zip(self.blocks, outputs.unbind(2), strict=True):  # (B, T, P, D)
            std, mean = torch.std_mean(F.layer_norm(z.float(), z.shape[-1:]).flatten(0, 2), dim=0)  # (D,)
            block.mean.copy_(mean)
            block.std.copy_(std.clamp(min=MIN_STD))

    def read_outputs(self, outputs: Tensor) -> Tensor:
        """Block outputs (B, T, J, P, D), just computed or from a cache -> LN(Q_J), (B, N, D). Without write-back."""
        time_embed = interpolate_time_embed(self.time_embed, outputs.shape[1])  # (T, D)
        queries, all_gates = self.queries.expand(len(outputs), -1, -1), []  # (B, N, D)
        for block, z in zip(self.blocks, outputs.unbind(2), strict=True):  # (B, T, P, D)
            queries, gates, _ = block(queries, z, time_embed)
            all_gates.append(gates.detach())
        self.last_gates = torch.stack(all_gates)
        return self.norm(queries)

    def read_and_write(self, vit: nn.Module, pixels: Tensor, deepstack=()) -> tuple[Tensor, Tensor]:
        """Normalized pixels (B, T, 3, S, S) -> LN(Q_J), (B, N, D), and the output of the last block (B, T, P, D), with
        those of the blocks `deepstack` beside it, if there are any.

        With write-back: each ViT block works on what the queries wrote before it.
        """
        batch, frames = pixels.shape[:2]
        time_embed = interpolate_time_embed(self.time_embed, frames)  # (T, D)
        queries, all_gates, kept = self.queries.expand(batch, -1, -1), [], []  # (B, N, D)
        z = vit.embed(pixels.flatten(0, 1))  # (B*T, P, D)
        for i, vit_block in enumerate(vit.blocks):
            z = vit_block(z)  # below the first adapted block nothing requires gradients, so no activation is kept
            if i >= self.first:
                queries, gates, z = self.blocks[i - self.first](queries, z.unflatten(0, (batch, frames)), time_embed)
                z = z.flatten(0, 1)
                all_gates.append(gates.detach())
            if i in deepstack:
                kept.append(z)
        self.last_gates = torch.stack(all_gates)
        z = torch.cat([z, *kept], dim=-1) if kept else z
        return self.norm(queries), z.unflatten(0, (batch, frames))

    def gate_statistics(self) -> dict[str, list[float]]:
        """Of the last forward pass, per adapted block: the mean gate, and the share of saturated gates (below 0.02 or
        above 0.98), which hardly get a gradient."""
        saturated = (self.last_gates < 0.02) | (self.last_gates > 0.98)
        return {name: x.float().flatten(1).mean(1).tolist()
                for name, x in (("gates", self.last_gates), ("saturated", saturated))}
