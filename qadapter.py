"""The Q-Adapter: query tokens that read a frozen ViT through a gate.

This is our reading of the abstract of [1], the only part of that paper we could read. N learnable queries
flow alongside the blocks of the ViT. After each adapted block they attend to all patches of all frames at
once, and a gating layer decides, query by query, how much of what they read is kept:

    Y  = (LN(Z) - m) / s                              Z: the block's output; this LN has no scale and no shift; m, s:
                                                      mean and standard deviation of each channel of LN(Z) in the
                                                      first training clips
    X  = [Y_t + E_t ; Y_t - Y_(t-1)]                  E: one vector per frame; the second half is the change since the
                                                      frame before, at the same place, and zero in the first frame
    A  = softmax((LN(Q) W_q)(X W_k)^T / sqrt(d)) (X W_v) W_o
    g  = sigmoid([LN(Q) ; LN(A)] W_g + b_g)           the gating layer
    Q <- Q + g * A

The gate reads normalized vectors, so that its logits grow neither with the width of the ViT nor with the size
of a read (`gate` "normed"; "sigmoid" reads Q and A as they are). "channel" has a gate for each channel of a query,
g = sigmoid(LN(Q) * w + LN(A) * w' + b), and "patch" one for each token, sigmoid((Y + E) w + b), which scales its value;
with "patch" g is 1. By default Z is not changed, so the ViT needs no gradients. With write-back the patches also read
the gated queries, through a projection that starts at zero: deeper frozen blocks then work on adapted patches, and
gradients pass through the ViT.

Letters: B clips, T frames of S x S pixels, P tokens per frame (class token and patches), D ViT width,
N queries Q, Q_L after the last block, A what they read, L adapted blocks, r rank, h heads, d = r/h;
n and m count any queries and keys, T' is another number of frames. Z, Y, E and X are those above; x is
LN(Z) in the code, but X in its naive version.

References
[1] Q-Adapter, https://arxiv.org/abs/2510.10022 (abstract only).
[2] Flamingo's Perceiver resampler (https://arxiv.org/abs/2204.14198, sec. 3.1): queries among the keys.
[3] PatchDropout, https://arxiv.org/abs/2208.07220: a ViT that is trained on random patches of each image.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_STD = 0.1  # of a channel; LN(Z) has 1 over all channels
VIT_TOKENS_PER_PASS = {"cpu": 3200, "gpu": 102400}  # 16 and 519 images of ViT-B/16


class CastLinear(nn.Linear):
    """A trained layer beside a frozen model: float32 weights, cast to the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, n, r) queries to (B, m, r) keys and values, split into heads -> (B, n, r).

    mask, to be broadcast to (B, h, n, m): which keys each query sees; None: all.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, h, n|m, d)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, n, r)


@torch.no_grad()
def attention_weights(q: Tensor, k: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """The weights of `multi_head_attention`, same mask: queries (B, n, r), keys (B, m, r) -> (B, h, n, m), whose rows
    sum to 1."""
    q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))  # (B, h, n|m, d)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, h, n, m)
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)


def same_frame(queries: int, frames: int, tokens: int, device: torch.device) -> Tensor:
    """Which of T*P tokens each of N queries sees where it sees one frame only: query i has frame i T / N, rounded down
    -> (N, T*P)."""
    frame_of_query = torch.arange(queries, device=device) * frames // queries  # (N,)
    return frame_of_query[:, None] == torch.arange(frames, device=device).repeat_interleave(tokens)


def random_visibility(batch: int, frames: int, tokens: int, dropout: float, device: torch.device) -> Tensor:
    """Which of the T*P tokens of each clip its queries see in a training step, each with the probability 1 - dropout
    -> bool (B, T*P). Where a frame would lose all, its first is seen: a softmax over nothing is not a number. [3]"""
    visible = torch.rand(batch, frames, tokens, device=device) >= dropout  # (B, T, P)
    visible[:, :, 0] |= ~visible.any(dim=2)
    return visible.flatten(1)


def init_time_embed(frames: int, width: int, kind: str = "ramp") -> Tensor:
    """Initial frame vectors -> (T, D). By default time from -1 to 1 along one random direction; "random": a random
    vector for each frame; "none": zeros.

    Their scale is that of LN(Z), not a ViT's usual 0.02: frames must be told apart from the first step on. Along a
    ramp, one direction of W_k makes a head attend to early or to late frames; the difference of two such heads is
    motion.
    """
    if kind == "random":
        return torch.randn(frames, width)
    ramp = torch.linspace(-1, 1, frames)[:, None] * torch.randn(width)
    return ramp if kind == "ramp" else torch.zeros_like(ramp)


def interpolate_time_embed(time_embed: Tensor, frames: int) -> Tensor:
    """Frame vectors for another number of frames, by linear interpolation in time: (T', D) -> (T, D)."""
    if frames == len(time_embed):
        return time_embed
    return F.interpolate(time_embed.T[None], size=frames, mode="linear", align_corners=False)[0].T


@torch.no_grad()
def frozen_block_outputs(vit: nn.Module, pixels: Tensor, first: int) -> Tensor:
    """Normalized pixels (B, T, 3, S, S) -> the frozen outputs of the blocks from number `first` on (B, T, L, P, D).

    The ViT processes the images in chunks: all at once would need more memory and, on a CPU, a quarter more time.
    """
    images = pixels.flatten(0, 1)  # (B*T, 3, S, S)
    tokens, width = vit.position.shape
    outputs = images.new_empty(len(images), len(vit.blocks) - first, tokens, width)  # (B*T, L, P, D)
    chunk_size = max(1, VIT_TOKENS_PER_PASS["cpu" if images.device.type == "cpu" else "gpu"] // tokens)
    for chunk, out in zip(images.split(chunk_size), outputs.split(chunk_size), strict=True):
        z = vit.embed(chunk)  # (chunk, P, D)
        for i, block in enumerate(vit.blocks):
            z = block(z)
            if i >= first:
                out[:, i - first] = z
    return outputs.unflatten(0, pixels.shape[:2])


class ChannelGate(nn.Module):
    """A gate for each channel, from that channel of the query and of its read: sigmoid(q w + a w' + b)."""

    def __init__(self, width: int):
        super().__init__()
        self.of_query, self.of_read = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, pair: Tensor) -> Tensor:
        """(B, N, 2D) -> (B, N, D)."""
        query, read = pair.chunk(2, dim=-1)
        return query * self.of_query + read * self.of_read + self.bias


def make_gate(kind: str, width: int, bias: float) -> nn.Module | None:
    """The gating layer. Its weights start at zero, so that every gate starts at sigmoid(bias)."""
    if kind == "none":
        return None
    if kind == "channel":
        gate = ChannelGate(width)
    else:
        gate = CastLinear(width if kind == "patch" else 2 * width, 1)
        nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, bias)
    return gate


class GatedCrossAttention(nn.Module):
    """The adapter of one ViT block: the queries' cross-attention, its gate and, with write-back, the patches' own."""

    def __init__(self, width: int, rank: int, heads: int, gate: str, write_back: bool, self_attention: bool,
                 gate_bias: float = 0.0, per_frame: bool = False, changes: bool = True,
                 token_dropout: float = 0.0):  # fmt: skip
        super().__init__()
        self.token_dropout = token_dropout
        self.heads, self.self_attention, self.per_frame = heads, self_attention, per_frame
        self.keep_attention, self.attention = False, None  # see `QAdapter.looking_inside`
        self.register_buffer("mean", torch.zeros(width))  # m and s, see `measure_channels`
        self.register_buffer("std", torch.ones(width))
        self.norm = nn.LayerNorm(width)
        self.q = CastLinear(width, rank, bias=False)
        # W_k and W_v in one layer, and their rows for the two halves of X apart: X W = (Y + E) W' + change W''
        self.kv = CastLinear(width, 2 * rank, bias=False)
        self.kv_change = CastLinear(width, 2 * rank, bias=False) if changes else None
        self.o = CastLinear(rank, width, bias=False)
        self.gate_kind, self.gate = gate, make_gate(gate, width, gate_bias)
        self.write_q = self.write_kv = self.write_o = None
        if write_back:
            self.write_q = CastLinear(width, rank, bias=False)
            self.write_kv = CastLinear(width, 2 * rank, bias=False)
            self.write_o = CastLinear(rank, width, bias=False)
            nn.init.zeros_(self.write_o.weight)  # step 0 is the frozen ViT, bit for bit

    def forward(self, queries: Tensor, patches: Tensor, time_embed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, D), patches (B, T, P, D), frame vectors (T, D) -> new queries, gates, patches.

        Gates are (B, N), a number a query; (B, N, D) with gates of channels, (B, T*P) with gates of tokens. Tensors of
        T*P rows and width D, and the projected changes, keep the dtype of the patches. The others of width r or 2r
        become float32 when the frame vectors are added, and everything else is float32.
        """
        x = F.layer_norm(patches, patches.shape[-1:])  # (B, T, P, D)
        normed_queries = self.norm(queries)  # (B, N, D)
        q = self.q(normed_queries)  # (B, N, r)
        kv = self.project(self.kv, x, time_embed)  # (B, T, P, 2r)
        if self.kv_change is not None:
            kv = kv + self.project_changes(x)
        k, v = kv.flatten(1, 2).chunk(2, dim=-1)  # (B, T*P, r)
        if self.gate_kind == "patch":
            gates = self.project(self.gate, x, time_embed).flatten(1, 2).sigmoid()  # (B, T*P, 1)
            v = gates * v
        mask = same_frame(q.shape[1], *patches.shape[1:3], q.device) if self.per_frame else None  # (N, T*P)
        if self.token_dropout and self.training and torch.is_grad_enabled():  # never while captions are generated
            visible = random_visibility(*patches.shape[:3], self.token_dropout, q.device)[:, None, None]
            mask = visible if mask is None else mask & visible  # (B, 1, 1 or N, T*P)
        if self.self_attention:
            own_k, own_v = self.kv(normed_queries).chunk(2, dim=-1)  # (B, N, r)
            k, v = torch.cat([k, own_k], dim=1), torch.cat([v, own_v], dim=1)  # (B, T*P+N, r)
            mask = None if mask is None else F.pad(mask, (0, q.shape[1]), value=True)
        if self.keep_attention:
            self.attention = attention_weights(q, k, self.heads, mask)  # (B, h, N, T*P or T*P+N)
        read = self.o(multi_head_attention(q, k, v, self.heads, mask))  # (B, N, D)
        if self.gate_kind != "patch":
            gates = self.query_gates(queries, normed_queries, read)  # (B, N, 1 or D)
            read = gates * read
        queries = queries + read
        if self.write_q is not None:
            patches = self.write(x, queries, patches, time_embed)
        return queries, gates.squeeze(-1), patches

    def query_gates(self, queries: Tensor, normed_queries: Tensor, read: Tensor) -> Tensor:
        """What each query keeps of its read (B, N, D): a number, or one for each channel -> (B, N, 1 or D)."""
        if self.gate is None:
            return queries.new_ones(*queries.shape[:2], 1)
        pair = (queries, read) if self.gate_kind == "sigmoid" else (normed_queries, F.layer_norm(read, read.shape[-1:]))
        return self.gate(torch.cat(pair, dim=-1)).sigmoid()

    def project(self, layer: CastLinear, x: Tensor, time_embed: Tensor) -> Tensor:
        """((x - m) / s + E) W for x = LN(Z), (B, T, P, D) -> (B, T, P, r, 2r or 1).

        It is computed as x W/s + (E - m/s) W, whose sum is r wide, not D.
        """
        constant = layer(time_embed - self.mean / self.std)  # (T, r)
        return F.linear(x, (layer.weight / self.std).to(x.dtype)) + constant[:, None]

    def project_changes(self, x: Tensor) -> Tensor:
        """(Y_t - Y_(t-1)) W for x = LN(Z), (B, T, P, D) -> (B, T, P, 2r), zero in the first frame. m cancels.

        Where the ViT computes in bf16, small changes of large values are rounded: the projections are subtracted.
        """
        projected = F.linear(x, (self.kv_change.weight / self.std).to(x.dtype))  # (B, T, P, 2r)
        return projected - torch.cat([projected[:, :1], projected[:, :-1]], dim=1)

    def write(self, x: Tensor, queries: Tensor, patches: Tensor, time_embed: Tensor) -> Tensor:
        """Write-back: patches (B, T, P, D), whose LN is x, attend to the queries (B, N, D) -> new patches."""
        q = self.project(self.write_q, x, time_embed).flatten(1, 2)  # (B, T*P, r)
        kv = self.write_kv(self.norm(queries))  # (B, N, 2r)
        read = multi_head_attention(q, *kv.chunk(2, dim=-1), self.heads)  # (B, T*P, r)
        return patches + self.write_o(read.to(x.dtype)).view_as(patches)  # (B, T, P, D)


def naive_gated_cross_attention(block: GatedCrossAttention, queries: Tensor, patches: Tensor, time_embed: Tensor,
                                visible: Tensor | None = None) -> Tensor:  # fmt: skip
    """The equations at the top of this file, one clip and one head at a time: slow, for reading.

    -> the new queries (B, N, D), without write-back. m keys: all tokens, and the queries if they attend to each other.
    visible (B, T*P): of `random_visibility`; None: all.
    """
    outputs, kind = [], block.gate_kind
    for b, (q, z) in enumerate(zip(queries, patches, strict=True)):  # (N, D), (T, P, D)
        y = (F.layer_norm(z, z.shape[-1:]) - block.mean) / block.std  # (T, P, D)
        change = torch.zeros_like(y)
        for t in range(1, len(y)):
            change[t] = y[t] - y[t - 1]
        y_and_time, normed_q = (y + time_embed[:, None]).flatten(0, 1), block.norm(q)  # (T*P, D)
        keys = x = torch.cat([y_and_time, change.flatten(0, 1)], -1)  # (T*P, 2D)
        if block.self_attention:
            keys = torch.cat([x, F.pad(normed_q, (0, x.shape[1] // 2))])  # (m, 2D): a query has no frame before
        token_gates = torch.ones(len(keys), 1)
        if kind == "patch":
            token_gates[: len(x)] = torch.sigmoid(block.gate(y_and_time))
        seen = torch.ones(len(q), len(keys), dtype=torch.bool)
        if block.per_frame:
            for i in range(len(q)):
                for j in range(len(x)):  # the frame of query i, the frame of token j
                    seen[i, j] = i * len(z) // len(q) == j // z.shape[1]
        if visible is not None:
            seen[:, : len(x)] &= visible[b]
        w_change = block.kv.weight * 0 if block.kv_change is None else block.kv_change.weight
        wk, wv = torch.cat([block.kv.weight, w_change], -1).chunk(2)  # (r, 2D) each
        heads = []
        for hq, hk, hv in zip(*(w.chunk(block.heads) for w in (block.q.weight, wk, wv)), strict=True):  # d rows each
            logits = (normed_q @ hq.T) @ (keys @ hk.T).T / len(hq) ** 0.5  # (N, m)
            heads.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ (token_gates * (keys @ hv.T)))  # (N, d)
        a = torch.cat(heads, -1) @ block.o.weight.T  # (N, D)
        pair = [q, a] if kind == "sigmoid" else [normed_q, F.layer_norm(a, a.shape[-1:])]
        g = 1 if kind in ("none", "patch") else torch.sigmoid(block.gate(torch.cat(pair, -1)))  # (N, 1), (N, D)
        outputs.append(q + g * a)
    return torch.stack(outputs)  # (B, N, D)


class QAdapter(nn.Module):
    """Queries, frame vectors and one gated block per adapted ViT block.

    width, depth: D and the number of blocks of the ViT. queries N, rank r (a multiple of heads), frames T.
    last_blocks: how many of the last blocks are adapted; 0 means all. time_embed: how the frame vectors start.
    gate: normed | sigmoid | channel | patch | none; a number a query of normalized or plain inputs, a number a channel,
    a number a token of the ViT. gate_bias: its logit at the start. per_frame: each query attends to one frame only.
    write_back: patches read the queries too; write_last: after the last block as well, for a caller that reads them.
    self_attention: the queries are among their own keys [2]. changes: X has its second half. token_dropout: the share
    of the tokens that is hidden from the queries while they are trained, at random, for each block and clip [3].
    """

    def __init__(self, width: int, depth: int, queries: int = 16, rank: int = 32, heads: int = 4,
                 frames: int = 8, last_blocks: int = 0, gate: str = "normed", write_back: bool = False,
                 self_attention: bool = False, write_last: bool = False, gate_bias: float = 0.0,
                 time_embed: str = "ramp", per_frame: bool = False, changes: bool = True,
                 token_dropout: float = 0.0):  # fmt: skip
        super().__init__()
        self.write_back = write_back
        self.first = depth - (last_blocks or depth)  # index of the first adapted block
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.time_embed = nn.Parameter(init_time_embed(frames, width, time_embed), time_embed != "none")
        self.blocks = nn.ModuleList(
            # Without `write_last` nothing would read what is written back after the last block.
            GatedCrossAttention(width, rank, heads, gate, write_back=write_back and (write_last or i < depth - 1),
                                self_attention=self_attention, gate_bias=gate_bias, per_frame=per_frame,
                                changes=changes, token_dropout=token_dropout)
            for i in range(self.first, depth)
        )
        self.norm = nn.LayerNorm(width)
        self.gates: Tensor | None = None  # (L, B, N), see `GatedCrossAttention.forward`; of the last forward pass

    @torch.no_grad()
    def measure_channels(self, outputs: Tensor) -> None:
        """Sets m and s of each block from the outputs (B, T, L, P, D) of the frozen ViT for some clips.

        In public ViTs a few channels are many times as large as the others, and most have a mean far from zero. Steps
        of Adam are alike for all channels, so without this the small ones are learned slowly.
        """
        for block, z in zip(self.blocks, outputs.unbind(2), strict=True):  # (B, T, P, D)
            std, mean = torch.std_mean(F.layer_norm(z.float(), z.shape[-1:]).flatten(0, 2), dim=0)  # (D,)
            block.mean.copy_(mean)
            block.std.copy_(std.clamp(min=MIN_STD))

    def read(self, outputs: Tensor) -> Tensor:
        """Block outputs (B, T, L, P, D), just computed or from a cache -> LN(Q_L), (B, N, D). Without write-back."""
        time_embed = interpolate_time_embed(self.time_embed, outputs.shape[1])  # (T, D)
        queries, all_gates = self.queries.expand(len(outputs), -1, -1), []  # (B, N, D)
        for block, z in zip(self.blocks, outputs.unbind(2), strict=True):  # (B, T, P, D)
            queries, gates, _ = block(queries, z, time_embed)
            all_gates.append(gates.detach())
        self.gates = torch.stack(all_gates)
        return self.norm(queries)

    def read_and_write(self, vit: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized pixels (B, T, 3, S, S) -> LN(Q_L), (B, N, D), and the output of the last block (B, T, P, D).

        With write-back: each ViT block works on what the queries wrote before it.
        """
        batch, frames = pixels.shape[:2]
        time_embed = interpolate_time_embed(self.time_embed, frames)  # (T, D)
        queries, all_gates = self.queries.expand(batch, -1, -1), []  # (B, N, D)
        z = vit.embed(pixels.flatten(0, 1))  # (B*T, P, D)
        for i, block in enumerate(vit.blocks):
            z = block(z)  # below the first adapted block nothing requires gradients, so no activation is kept
            if i >= self.first:
                queries, gates, z = self.blocks[i - self.first](queries, z.unflatten(0, (batch, frames)), time_embed)
                z = z.flatten(0, 1)
                all_gates.append(gates.detach())
        self.gates = torch.stack(all_gates)
        return self.norm(queries), z.unflatten(0, (batch, frames))

    @contextmanager
    def looking_inside(self) -> Iterator[None]:
        """While it is open, each forward pass keeps the weights of its attention, for `attention`."""
        for block in self.blocks:
            block.keep_attention = True
        try:
            yield
        finally:
            for block in self.blocks:
                block.keep_attention = False

    def attention(self, frames: int) -> Tensor:
        """Of the last pass `looking_inside`, on clips of T = `frames` frames: how much each query read of each token,
        by block and head (L, B, h, N, T, P). It sums to 1 over T and P, or to less with queries among the keys."""
        weights = torch.stack([block.attention for block in self.blocks])  # (L, B, h, N, T*P or T*P+N)
        if self.blocks[0].self_attention:
            weights = weights[..., : -len(self.queries)]
        return weights.unflatten(-1, (frames, -1))

    def gate_statistics(self) -> dict[str, list[float]]:
        """Of the last forward pass, per adapted block: the mean gate, and the share of saturated gates (below 0.02 or
        above 0.98), which hardly get a gradient."""
        saturated = (self.gates < 0.02) | (self.gates > 0.98)
        return {"gates": self.gates.flatten(1).mean(1).tolist(),
                "saturated": saturated.float().flatten(1).mean(1).tolist()}  # fmt: skip

    def forward(self, vit: nn.Module, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, T, 3, S, S) -> LN(Q_L), (B, N, D), whatever T is."""
        if self.write_back:
            return self.read_and_write(vit, pixels)[0]
        return self.read(frozen_block_outputs(vit, pixels, self.first))
