"""The Q-Adapter: query tokens that read a frozen ViT through a gate; and LoRA, the method it is compared with.

This is our reading of the abstract of [1], the only part of that paper we could read. N learnable queries
flow alongside the blocks of the ViT. After each adapted block they attend to all patches of all frames at
once, and a gating layer decides, query by query, how much of what they read is kept:

    X  = (LN(Z) - m) / s + E_t                        Z: the block's output, E: one vector per frame; this LN has no
                                                      scale and no shift; m, s: mean and standard deviation of each
                                                      channel of LN(Z) in the first training clips
    A  = softmax((LN(Q) W_q)(X W_k)^T / sqrt(d)) (X W_v) W_o
    g  = sigmoid([LN(Q) ; LN(A)] W_g + b_g)           the gating layer
    Q <- Q + g * A

The gate reads normalized vectors, so that its logits grow neither with the width of the ViT nor with the size
of a read (`gate` "normed"; "sigmoid" reads Q and A as they are). By default Z is not changed, so the ViT needs
no gradients. With write-back the patches also read the gated queries, through a projection that starts at
zero: deeper frozen blocks then work on adapted patches, and gradients pass through the ViT.

Letters: B clips, T frames of S x S pixels, P tokens per frame (class token and patches), D ViT width,
N queries Q, Q_L after the last block, A what they read, L adapted blocks, r rank, h heads, d = r/h;
n and m count any queries and keys, T' is another number of frames.

References
[1] Q-Adapter, https://arxiv.org/abs/2510.10022 (abstract only).
[2] Flamingo's Perceiver resampler (https://arxiv.org/abs/2204.14198, sec. 3.1): queries among the keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_STD = 0.1  # of a channel; LN(Z) has 1 over all channels
VIT_TOKENS_PER_PASS = {"cpu": 3200, "gpu": 102400}  # 16 and 519 images of ViT-B/16


class CastLinear(nn.Linear):
    """A trained layer beside a frozen model: float32 weights, cast to the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of (B, n, r) queries to (B, m, r) keys and values, split into heads -> (B, n, r)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, h, n|m, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, n, r)


def init_time_embed(frames: int, width: int) -> Tensor:
    """Initial frame vectors: time from -1 to 1 along one random direction -> (T, D).

    Their scale is that of LN(Z), not a ViT's usual 0.02: frames must be told apart from the first step on. Along a
    ramp, one direction of W_k makes a head attend to early or to late frames; the difference of two such heads is
    motion.
    """
    return torch.linspace(-1, 1, frames)[:, None] * torch.randn(width)


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


class GatedCrossAttention(nn.Module):
    """The adapter of one ViT block: the queries' cross-attention, its gate and, with write-back, the patches' own."""

    def __init__(self, width: int, rank: int, heads: int, gate: str, write_back: bool, self_attention: bool):
        super().__init__()
        self.heads, self.self_attention = heads, self_attention
        self.register_buffer("mean", torch.zeros(width))  # m and s, see `measure_channels`
        self.register_buffer("std", torch.ones(width))
        self.norm = nn.LayerNorm(width)
        self.q = CastLinear(width, rank, bias=False)
        self.kv = CastLinear(width, 2 * rank, bias=False)
        self.o = CastLinear(rank, width, bias=False)
        self.normed_gate = gate == "normed"
        self.gate = nn.Linear(2 * width, 1) if gate != "none" else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)  # every gate starts at one half
            nn.init.zeros_(self.gate.bias)
        self.write_q = self.write_kv = self.write_o = None
        if write_back:
            self.write_q = CastLinear(width, rank, bias=False)
            self.write_kv = CastLinear(width, 2 * rank, bias=False)
            self.write_o = CastLinear(rank, width, bias=False)
            nn.init.zeros_(self.write_o.weight)  # step 0 is the frozen ViT, bit for bit

    def forward(self, queries: Tensor, patches: Tensor, time_embed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, D), patches (B, T, P, D), frame vectors (T, D) -> new queries, gates (B, N), patches.

        Tensors of T*P rows and width D keep the dtype of the patches. Those of width r or 2r become float32 when the
        frame vectors are added, and everything else is float32.
        """
        x = F.layer_norm(patches, patches.shape[-1:])  # (B, T, P, D)
        kv = self.project(self.kv, x, time_embed).flatten(1, 2)  # (B, T*P, 2r)
        normed_queries = self.norm(queries)  # (B, N, D)
        if self.self_attention:
            kv = torch.cat([kv, self.kv(normed_queries)], dim=1)  # (B, T*P+N, 2r)
        read = self.o(multi_head_attention(self.q(normed_queries), *kv.chunk(2, dim=-1), self.heads))  # (B, N, D)
        gates = queries.new_ones(queries.shape[:2])  # (B, N)
        if self.gate is not None:
            pair = (normed_queries, F.layer_norm(read, read.shape[-1:])) if self.normed_gate else (queries, read)
            gates = self.gate(torch.cat(pair, dim=-1)).sigmoid().squeeze(-1)  # (B, N)
        queries = queries + gates[..., None] * read
        if self.write_q is not None:
            patches = self.write(x, queries, patches, time_embed)
        return queries, gates, patches

    def project(self, layer: CastLinear, x: Tensor, time_embed: Tensor) -> Tensor:
        """((x - m) / s + E) W for x = LN(Z), (B, T, P, D) -> (B, T, P, r or 2r).

        It is computed as x W/s + (E - m/s) W, whose sum is r wide, not D.
        """
        constant = layer(time_embed - self.mean / self.std)  # (T, r)
        return F.linear(x, (layer.weight / self.std).to(x.dtype)) + constant[:, None]

    def write(self, x: Tensor, queries: Tensor, patches: Tensor, time_embed: Tensor) -> Tensor:
        """Write-back: patches (B, T, P, D), whose LN is x, attend to the queries (B, N, D) -> new patches."""
        q = self.project(self.write_q, x, time_embed).flatten(1, 2)  # (B, T*P, r)
        kv = self.write_kv(self.norm(queries))  # (B, N, 2r)
        read = multi_head_attention(q, *kv.chunk(2, dim=-1), self.heads)  # (B, T*P, r)
        return patches + self.write_o(read.to(x.dtype)).view_as(patches)  # (B, T, P, D)


def naive_gated_cross_attention(block: GatedCrossAttention, queries: Tensor, patches: Tensor,
                                time_embed: Tensor) -> Tensor:  # fmt: skip
    """The four equations at the top of this file, one clip and one head at a time: slow, for reading.

    -> the new queries (B, N, D), without write-back.
    """
    outputs = []
    for q, z in zip(queries, patches, strict=True):  # (N, D), (T, P, D)
        x = (F.layer_norm(z, z.shape[-1:]) - block.mean) / block.std + time_embed[:, None]  # (T, P, D)
        x = x.flatten(0, 1)  # (T*P, D)
        normed_q = block.norm(q)
        if block.self_attention:
            x = torch.cat([x, normed_q])  # (T*P+N, D)
        wk, wv = block.kv.weight.chunk(2)  # (r, D) each
        heads = []
        for hq, hk, hv in zip(*(w.chunk(block.heads) for w in (block.q.weight, wk, wv)), strict=True):
            logits = (normed_q @ hq.T) @ (x @ hk.T).T / len(hq) ** 0.5  # (N, T*P); hq, hk, hv: (d, D)
            heads.append(logits.softmax(-1) @ (x @ hv.T))  # (N, d)
        a = torch.cat(heads, -1) @ block.o.weight.T  # (N, D)
        pair = [normed_q, F.layer_norm(a, a.shape[-1:])] if block.normed_gate else [q, a]
        g = torch.sigmoid(block.gate(torch.cat(pair, -1))) if block.gate is not None else 1  # (N, 1)
        outputs.append(q + g * a)
    return torch.stack(outputs)  # (B, N, D)


class QAdapter(nn.Module):
    """Queries, frame vectors and one gated block per adapted ViT block.

    width, depth: D and the number of blocks of the ViT. queries N, rank r (a multiple of heads), frames T.
    last_blocks: how many of the last blocks are adapted; 0 means all. gate: normed | sigmoid | none.
    write_back: patches read the queries too; write_last: after the last block as well, for a caller that reads them.
    self_attention: the queries are among their own keys [2].
    """

    def __init__(self, width: int, depth: int, queries: int = 16, rank: int = 32, heads: int = 8,
                 frames: int = 8, last_blocks: int = 0, gate: str = "normed", write_back: bool = False,
                 self_attention: bool = False, write_last: bool = False):  # fmt: skip
        super().__init__()
        self.write_back = write_back
        self.first = depth - (last_blocks or depth)  # index of the first adapted block
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.time_embed = nn.Parameter(init_time_embed(frames, width))
        self.blocks = nn.ModuleList(
            # Without `write_last` nothing would read what is written back after the last block.
            GatedCrossAttention(width, rank, heads, gate, write_back and (write_last or i < depth - 1), self_attention)
            for i in range(self.first, depth)
        )
        self.norm = nn.LayerNorm(width)
        self.gates: Tensor | None = None  # (L, B, N), of the last forward pass

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

    def gate_statistics(self) -> dict[str, list[float]]:
        """Of the last forward pass, per adapted block: the mean gate, and the share of saturated gates (below 0.02 or
        above 0.98), which hardly get a gradient."""
        saturated = (self.gates < 0.02) | (self.gates > 0.98)
        return {"gates": self.gates.mean((1, 2)).tolist(), "saturated": saturated.float().mean((1, 2)).tolist()}

    def forward(self, vit: nn.Module, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, T, 3, S, S) -> LN(Q_L), (B, N, D), whatever T is."""
        if self.write_back:
            return self.read_and_write(vit, pixels)[0]
        return self.read(frozen_block_outputs(vit, pixels, self.first))
