"""The Q-Adapter against its equations, and the frozen ViT beside it.

References: the equations in qadapter.py's docstring, as `naive_gated_cross_attention` writes them out and as
`naive_write` does here, in float64; the ViT without an adapter, bit for bit.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qadapter
from common.config import Config
from models.vit import ViT
from qadapter import HEADS, GatedCrossAttention, QAdapter, naive_gated_cross_attention, split_heads
from tests.tiny import DEPTH, SIDE, VIT, WIDTH, make, randomize, record_block_outputs, same_bits

CLOSE = dict(rtol=0, atol=1e-12)  # float64


def make_block(seed: int, write_back: bool = False, **fields) -> GatedCrossAttention:
    """A block in float64, all of whose numbers are random."""
    torch.manual_seed(seed)
    block = GatedCrossAttention(WIDTH, Config(rank=8, **fields), write_back).double()
    randomize(block, seed)
    return block


def make_inputs(seed: int, batch: int = 2, frames: int = 3, patches: int = 5,
                queries: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, N, D), a block's output (B, T, P, D), frame vectors (T, D)."""
    torch.manual_seed(seed)
    q, z = torch.randn(batch, queries, WIDTH), 3 * torch.randn(batch, frames, patches, WIDTH) + 1
    return q.double(), z.double(), torch.randn(frames, WIDTH).double()


def naive(block: GatedCrossAttention, q: Tensor, z: Tensor, e: Tensor) -> Tensor:
    return torch.stack([naive_gated_cross_attention(block, a, b, e) for a, b in zip(q, z, strict=True)])


def tiny_adapter(seed: int, **fields) -> tuple[ViT, QAdapter, Tensor]:
    """A frozen ViT, an adapter as it starts, and normalized pixels (2, 3, 3, S, S)."""
    torch.manual_seed(seed)
    vit = ViT(VIT).requires_grad_(False)
    adapter = QAdapter(WIDTH, DEPTH, Config(**dict(queries=4, rank=8, frames=3, last_blocks=0) | fields))
    return vit, adapter, torch.randn(2, 3, 3, SIDE, SIDE)


def run(vit: ViT, adapter: QAdapter, pixels: Tensor) -> Tensor:
    """LN(Q_L) with or without write-back."""
    if adapter.write_back:
        return adapter.read_and_write(vit, pixels)[0]
    outputs = vit.block_outputs(pixels.flatten(0, 1), range(adapter.first, len(vit.blocks)))
    return adapter.read_outputs(outputs.unflatten(0, pixels.shape[:2]))


# ----------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("batch, frames, patches, queries", [(2, 3, 5, 4), (1, 1, 7, 1), (3, 2, 1, 6)])
def test_the_block_equals_its_equations(batch, frames, patches, queries):
    """Seeds 0 and 1, within 1e-12; each of frame vectors, queries and statistics counts."""
    block, (q, z, e) = make_block(0), make_inputs(1, batch, frames, patches, queries)
    found, gates, after = block(q, z, e)
    torch.testing.assert_close(found, naive(block, q, z, e), **CLOSE)
    assert after is z and gates.shape == (batch, queries)
    assert (found - naive(block, q, z, 0 * e)).abs().max() > 1e-3
    block.mean += 1
    assert (found - naive(block, q, z, e)).abs().max() > 1e-3


def test_the_gate_decides_how_much_of_a_read_is_kept():
    """g = sigmoid([LN(Q) ; LN(A)] W_g + b_g), A from the same block without its gate; a new gate is 1/2. Seed 2."""
    block, (q, z, e) = make_block(2), make_inputs(3)
    found, gates, _ = block(q, z, e)
    layer, block.gate = block.gate, None
    ungated, ones, _ = block(q, z, e)
    a = ungated - q
    expected = torch.sigmoid(torch.cat([block.norm(q), F.layer_norm(a, (WIDTH,))], -1) @ layer.weight[0] + layer.bias)
    torch.testing.assert_close(gates, expected, **CLOSE)
    torch.testing.assert_close(found, q + expected[..., None] * a, **CLOSE)
    assert expected.std() > 0.01 and torch.equal(ones, torch.ones_like(ones))
    new = GatedCrossAttention(WIDTH, Config(rank=8), False).double()
    assert torch.equal(new(q, z, e)[1], torch.full((2, 4), 0.5).double())


def naive_write(block: GatedCrossAttention, queries: Tensor, patches: Tensor, e: Tensor) -> Tensor:
    """Patches (T, P, D) of one clip after they read its new queries (N, D), one patch and one head at a time."""
    new, normed = patches.clone(), block.norm(queries)  # (N, D)
    wk, wv = block.write_kv.weight.chunk(2)
    for t, frame in enumerate(patches):
        for p, patch in enumerate(frame):
            x, heads = (F.layer_norm(patch, patch.shape) - block.mean) / block.std + e[t], []
            for hq, hk, hv in zip(*(w.chunk(HEADS) for w in (block.write_q.weight, wk, wv)), strict=True):
                logits = (normed @ hk.T) @ (hq @ x) / len(hq) ** 0.5  # (N,)
                heads.append(logits.softmax(-1) @ (normed @ hv.T))
            new[t, p] = patch + block.write_o.weight @ torch.cat(heads)
    return new


def test_write_back_equals_its_equations():
    """Seeds 4 and 5, within 1e-12: queries change as without write-back, and the patches read the new queries."""
    block, (q, z, e) = make_block(4, write_back=True), make_inputs(5)
    found, _, after = block(q, z, e)
    torch.testing.assert_close(found, naive(block, q, z, e), **CLOSE)
    expected = torch.stack([naive_write(block, a, b, e) for a, b in zip(found, z, strict=True)])
    assert (expected - z).abs().max() > 0.1
    torch.testing.assert_close(after, expected, **CLOSE)


def test_hidden_tokens_are_not_read():
    """Seeds 6 to 8, within 1e-12. Reference: a softmax over the visible tokens alone, clip by clip. In eval mode and
    without gradients nothing is hidden."""
    block, (q, z, e) = make_block(6, gate="none", token_dropout=0.5), make_inputs(7)
    torch.manual_seed(8)
    found = block(q, z, e)[0]
    torch.manual_seed(8)
    visible = qadapter.random_visibility(2, 3, 5, 0.5, z.device)
    k, v = block.keys_and_values(F.layer_norm(z, (WIDTH,)), e)
    for b in range(2):
        hq, hk, hv = (split_heads(x[None])[0] for x in (block.q(block.norm(q[b])), k[b, visible[b]], v[b, visible[b]]))
        read = (hq @ hk.mT / hq.shape[-1] ** 0.5).softmax(-1) @ hv  # (h, N, d)
        torch.testing.assert_close(found[b], q[b] + block.o(read.transpose(0, 1).flatten(1)), **CLOSE)
    with torch.no_grad():
        whole = block(q, z, e)[0]
    assert torch.equal(block.eval()(q, z, e)[0], whole) and (found - whole).abs().max() > 1e-2


def test_the_share_of_hidden_tokens_is_the_dropout():
    """Seed 9: of 2.1e5 tokens 30% are hidden, within 4 standard errors (0.4%), alike at each place (4%). A frame
    never loses all, also with 2 tokens and 0.9, where 81% would."""
    torch.manual_seed(9)
    visible = qadapter.random_visibility(1000, 10, 21, 0.3, torch.device("cpu")).view(10000, 21).float()
    assert abs(visible.mean() - 0.7) < 0.004 and (visible.mean(0) - 0.7).abs().max() < 0.04
    few = qadapter.random_visibility(1000, 10, 2, 0.9, torch.device("cpu")).view(10000, 2)
    assert few.any(1).all() and abs(few[:, 1].float().mean() - 0.1) < 0.012


@pytest.mark.parametrize("last_blocks", [0, 2])
def test_the_adapter_is_a_chain_of_blocks(last_blocks):
    """Seeds 10 and 11, within 1e-5 in float32: the queries pass from block to block, each reads its block of the
    frozen ViT; the statistics of the gates are those of the last pass."""
    vit, adapter, pixels = tiny_adapter(10, last_blocks=last_blocks)
    randomize(adapter, 11)
    outputs = record_block_outputs(vit, lambda: vit(pixels.flatten(0, 1)))
    q = adapter.queries.expand(2, -1, -1)
    for block, z in zip(adapter.blocks, outputs[-len(adapter.blocks) :], strict=True):
        q = naive(block, q, z.unflatten(0, (2, 3)), adapter.time_embed)
    assert len(adapter.blocks) == (last_blocks or DEPTH)
    torch.testing.assert_close(run(vit, adapter, pixels), adapter.norm(q), rtol=0, atol=1e-5)
    adapter.last_gates[0, 0] = torch.tensor([0.01, 0.5, 0.5, 0.99])
    statistics = adapter.gate_statistics()
    assert statistics["gates"] == pytest.approx(adapter.last_gates.mean((1, 2)).tolist())
    assert statistics["saturated"][0] > 0


def test_channel_statistics_are_those_of_the_given_clips():
    """LN(Z) of all tokens of all clips, in float64 by hand, within 1e-5; seed 12. Channels that hardly vary, here those
    of the second block, are divided by 0.1."""
    _, adapter, _ = tiny_adapter(12, last_blocks=2)
    scale = torch.stack([torch.linspace(0.5, 2, WIDTH), torch.full([WIDTH], 0.02)])[:, None]  # (L, 1, D)
    outputs = torch.randn(5, 3, 2, 7, WIDTH) * scale + torch.randn(2, 1, WIDTH)  # (B, T, L, P, D)
    adapter.measure_channels(outputs)
    for i, block in enumerate(adapter.blocks):
        z = outputs[:, :, i].double().flatten(0, 2)
        x = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        assert x.std(0).max() < 0.1 if i else x.std(0).min() > 0.1
        torch.testing.assert_close(block.mean.double(), x.mean(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(block.std.double(), x.std(0).clamp(min=0.1), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------- the frozen ViT


@pytest.mark.parametrize("write_back", [False, True])
def test_step_0_leaves_the_vit_bit_for_bit(write_back):
    """Model seed 13: the outputs of the frozen ViT's blocks beside a new adapter, which reads just these (1e-5);
    without write-back also beside a random one, and then nothing of the ViT requires gradients."""
    vit, adapter, pixels = tiny_adapter(13, write_back=write_back)
    outputs = vit.block_outputs(pixels.flatten(0, 1), range(DEPTH)).unflatten(0, (2, 3))
    torch.testing.assert_close(run(vit, adapter, pixels), adapter.read_outputs(outputs), rtol=0, atol=1e-5)
    alone = record_block_outputs(vit, lambda: vit(pixels.flatten(0, 1)))
    if not write_back:
        randomize(adapter, 14)
        vit.requires_grad_(True)
    beside = record_block_outputs(vit, lambda: run(vit, adapter, pixels).square().sum().backward())
    assert len(alone) == len(beside) == DEPTH and all(map(same_bits, alone, beside))
    assert all(p.grad is None for p in vit.parameters())
    assert write_back or not any(z.requires_grad for z in beside)


@pytest.mark.parametrize("last_blocks, visual", [(0, "queries"), (2, "queries"), (1, "queries"), (2, "frames")])
def test_write_back_changes_every_deeper_block(last_blocks, visual):
    """Seeds 15 and 16: up to the first adapted block the ViT is unchanged, and no activation is kept; behind it all
    differs. After the last block nothing is written, unless its patches are read."""
    vit, adapter, pixels = tiny_adapter(15, write_back=True, last_blocks=last_blocks, visual=visual)
    randomize(adapter, 16)
    alone = record_block_outputs(vit, lambda: vit(pixels.flatten(0, 1)))
    adapted = record_block_outputs(vit, lambda: adapter.read_and_write(vit, pixels))
    for i, (a, b) in enumerate(zip(alone, adapted, strict=True)):
        assert same_bits(a, b) == (i <= adapter.first) and b.requires_grad == (i > adapter.first)
    last = adapter.read_and_write(vit, pixels)[1].flatten(0, 1)
    assert same_bits(last, adapted[-1]) == (visual == "queries")
    assert [block.write_o is not None for block in adapter.blocks] == (
        [True] * (len(adapter.blocks) - 1) + [visual == "frames"])


def test_write_back_learns_through_the_frozen_blocks():
    """Seed 17: at step 0 the zero projections get a gradient; once they are random, all write projections do."""
    vit, adapter, pixels = tiny_adapter(17, write_back=True)
    run(vit, adapter, pixels).pow(3).sum().backward()
    assert all(block.write_o.weight.grad.abs().max() > 1e-6 for block in adapter.blocks[:-1])
    randomize(adapter, 18)
    run(vit, adapter, pixels).pow(3).sum().backward()
    layers = [layer for block in adapter.blocks[:-1] for layer in (block.write_q, block.write_kv, block.write_o)]
    assert all(layer.weight.grad.abs().max() > 1e-6 for layer in layers)
    assert all(p.grad is None for p in vit.parameters())


# ----------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("write_back", [False, True])
def test_frames_and_their_order_count_and_clips_do_not_see_each_other(write_back):
    """Seeds 19 and 20. N tokens for any number of frames; the reversed clip gives other tokens, also where only changes
    tell it, and without frame vectors and changes the same ones (1e-5); a batch gives what its clips give alone."""
    vit, adapter, pixels = tiny_adapter(19, write_back=write_back)
    randomize(adapter, 20)
    with torch.no_grad():
        assert run(vit, adapter, pixels[:, :1].expand(-1, 32, -1, -1, -1)).shape == (2, 4, WIDTH)
        whole = run(vit, adapter, pixels)
        for b in range(2):
            torch.testing.assert_close(run(vit, adapter, pixels[b : b + 1])[0], whole[b], rtol=0, atol=1e-5)
        for t in range(3):
            other = pixels.clone()
            other[:, t] *= -1
            assert ((run(vit, adapter, other) - whole).abs().amax(-1) > 1e-4).all()
        assert (whole - run(vit, adapter, pixels.flip(1))).abs().max() > 1e-2
        adapter.time_embed.zero_()
        assert (run(vit, adapter, pixels) - run(vit, adapter, pixels.flip(1))).abs().max() > 1e-2
        for block in adapter.blocks:
            block.kv_change.weight.zero_()
        torch.testing.assert_close(run(vit, adapter, pixels), run(vit, adapter, pixels.flip(1)), rtol=0, atol=1e-5)


def test_frame_vectors_are_interpolated():
    """Seed 21, within 1e-6. One frame: the mean of the middle two. Twice as many: a quarter of the way from each
    learned vector to its two neighbours. They start as a ramp along one direction."""
    e = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(21))
    assert qadapter.interpolate_time_embed(e, 8) is e
    torch.testing.assert_close(qadapter.interpolate_time_embed(e, 1)[0], (e[3] + e[4]) / 2, rtol=0, atol=1e-6)
    twice = qadapter.interpolate_time_embed(e, 16)
    torch.testing.assert_close(twice[1:-1:2], 0.75 * e[:-1] + 0.25 * e[1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(twice[2::2], 0.25 * e[:-1] + 0.75 * e[1:], rtol=0, atol=1e-6)
    ramp = make("no write-back").adapter.time_embed
    assert torch.linalg.matrix_rank(ramp) == 1 and torch.equal(ramp[0], -ramp[-1]) and ramp.std() > 0.2
