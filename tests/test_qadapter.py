"""The Q-Adapter, against slow plain versions and against the frozen ViT.

References: the equations in qadapter.py's docstring, as `naive_gated_cross_attention` writes them out and as
`naive_write` does here; the bits of the ViT without an adapter. ViTs are tiny and random. "Bit for bit" compares the
numbers' bytes.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import qadapter
from models.vit import ViT, ViTConfig
from qadapter import (
    GatedCrossAttention,
    QAdapter,
    frozen_block_outputs,
    interpolate_time_embed,
    naive_gated_cross_attention,
    random_visibility,
)

WIDTH, DEPTH, SIDE = 24, 4, 16
WRITE_BACK = [False, True]


def tiny_vit(seed: int) -> ViT:
    torch.manual_seed(seed)
    vit = ViT(ViTConfig(image_size=SIDE, patch_size=8, width=WIDTH, depth=DEPTH, heads=3, mlp_width=32,
                        activation="gelu", norm_eps=1e-5))  # fmt: skip
    return vit.requires_grad_(False)


def clips(batch: int, frames: int, seed: int) -> torch.Tensor:
    """Normalised pixels (B, T, 3, S, S)."""
    return torch.randn(batch, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Adds noise to every parameter, also to those that start at zero or one, and to m and s, which stays positive."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for buffer in module.buffers():
            buffer.add_(torch.rand_like(buffer))


def record_block_outputs(vit: ViT, run) -> list[torch.Tensor]:
    """The outputs of the ViT's blocks while `run()` runs."""
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for block in vit.blocks]
    run()
    for hook in hooks:
        hook.remove()
    return outputs


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


# ----------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("gate", ["normed", "sigmoid", "channel", "patch", "none"])
@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("batch, frames, patches, queries, heads", [(2, 3, 5, 4, 2), (1, 1, 7, 1, 4), (3, 2, 1, 6, 1)])
def test_the_block_equals_its_naive_version(gate, self_attention, per_frame, changes, batch, frames, patches, queries,
                                            heads):  # fmt: skip
    """Seeds 0 and 1, tolerance 1e-5; frame vectors and gate weights are random, so each term counts."""
    torch.manual_seed(0)
    block = GatedCrossAttention(WIDTH, 8, heads, gate, False, self_attention, per_frame=per_frame, changes=changes)
    randomize(block, 1)
    q, e = torch.randn(batch, queries, WIDTH), torch.randn(frames, WIDTH)
    z = torch.randn(batch, frames, patches, WIDTH) * 3 + 1
    found, gates, after = block(q, z, e)
    assert after is z
    assert gates.shape == {"channel": (batch, queries, WIDTH), "patch": (batch, frames * patches)}.get(
        gate, (batch, queries))  # fmt: skip
    torch.testing.assert_close(found, naive_gated_cross_attention(block, q, z, e), rtol=0, atol=1e-5)
    for other in (naive_gated_cross_attention(block, q, z, e * 0), naive_gated_cross_attention(block, q * 0.9, z, e)):
        assert (found - other).abs().max() > 1e-3


@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("per_frame", [False, True])
def test_hidden_tokens_are_hidden_as_in_the_naive_version(self_attention, per_frame):
    """Seeds 70 to 72, tolerance 1e-5. In eval mode nothing is hidden, and the result is that without dropout."""
    torch.manual_seed(70)
    block = GatedCrossAttention(WIDTH, 8, 2, "normed", False, self_attention, per_frame=per_frame, token_dropout=0.5)
    randomize(block, 71)
    q, e, z = torch.randn(3, 4, WIDTH), torch.randn(2, WIDTH), torch.randn(3, 2, 5, WIDTH)
    torch.manual_seed(72)
    found = block(q, z, e)[0]
    torch.manual_seed(72)
    visible = random_visibility(3, 2, 5, 0.5, z.device)
    torch.testing.assert_close(found, naive_gated_cross_attention(block, q, z, e, visible), rtol=0, atol=1e-5)
    whole = naive_gated_cross_attention(block, q, z, e)
    assert (found - whole).abs().max() > 1e-2
    torch.testing.assert_close(block.eval()(q, z, e)[0], whole, rtol=0, atol=1e-5)


def test_the_share_of_hidden_tokens_is_the_dropout():
    """Seed 73: of 2.1e5 tokens 30 % are hidden, within 4 standard errors (0.4 %), alike at each place (4 %). A frame
    never loses all, also with 2 tokens and 0.9, where 81 % would."""
    torch.manual_seed(73)
    visible = random_visibility(1000, 10, 21, 0.3, torch.device("cpu")).view(10000, 21).float()
    assert abs(visible.mean().item() - 0.7) < 0.004 and (visible.mean(0) - 0.7).abs().max() < 0.04
    few = random_visibility(1000, 10, 2, 0.9, torch.device("cpu")).view(10000, 2)
    assert few.any(1).all() and abs(few[:, 1].float().mean().item() - 0.1) < 0.012


@pytest.mark.parametrize("tokens", [1, 7, 12, 10**6])
def test_processing_images_in_chunks_changes_nothing(tokens, monkeypatch):
    """ViT seed 30, pixels seed 31, tolerance 1e-6, against all 6 images of 5 tokens at once; each once, in order."""
    vit, pixels = tiny_vit(30), clips(2, 3, 31)
    adapter = QAdapter(WIDTH, DEPTH, queries=3, rank=4, heads=2, frames=3, last_blocks=2)
    whole = record_block_outputs(vit, lambda: vit(pixels.flatten(0, 1)))
    expected = torch.stack(whole[-2:], dim=1).unflatten(0, (2, 3))
    monkeypatch.setitem(qadapter.VIT_TOKENS_PER_PASS, "cpu", tokens)
    run = partial(frozen_block_outputs, vit, pixels, adapter.first)
    sizes = [len(z) for z in record_block_outputs(vit, run)[::DEPTH]]
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-6)
    assert sizes == {1: [1] * 6, 7: [1] * 6, 12: [2] * 3, 10**6: [6]}[tokens]


@pytest.mark.parametrize("gate", ["normed", "sigmoid"])
def test_the_gate_sees_the_query_and_its_read(gate):
    """g = sigmoid([LN(Q) ; LN(A)] W_g + b_g), or without LN, A from the same block without its gate. Seeds 2 and 3,
    tolerance 1e-5."""
    torch.manual_seed(2)
    block = GatedCrossAttention(WIDTH, 8, 2, gate, write_back=False, self_attention=False)
    randomize(block, 3)
    q, z, e = torch.randn(2, 4, WIDTH), torch.randn(2, 3, 5, WIDTH), torch.randn(3, WIDTH)
    found, gates, _ = block(q, z, e)
    layer, block.gate = block.gate, None
    ungated, ones, _ = block(q, z, e)
    assert torch.equal(ones, torch.ones(2, 4))
    a = ungated - q
    pair = [block.norm(q), F.layer_norm(a, (WIDTH,))] if gate == "normed" else [q, a]
    expected = torch.sigmoid(torch.cat(pair, -1) @ layer.weight[0] + layer.bias)
    assert expected.std() > 0.01
    torch.testing.assert_close(gates, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, q + expected[..., None] * a, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate", ["normed", "sigmoid", "channel", "patch"])
@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_gates_start_at_the_sigmoid_of_their_bias(gate, bias):
    """Seed 55, bit for bit."""
    torch.manual_seed(55)
    block = GatedCrossAttention(WIDTH, 8, 2, gate, write_back=False, self_attention=False, gate_bias=bias)
    _, gates, _ = block(torch.randn(2, 4, WIDTH), torch.randn(2, 3, 5, WIDTH), torch.randn(3, WIDTH))
    assert torch.equal(gates, torch.tensor(bias).sigmoid().expand_as(gates))


def test_changes_are_since_the_frame_before():
    """Seeds 59 and 60. One frame, and a clip of equal frames, have none: without their weights no bit is another."""
    torch.manual_seed(59)
    block = GatedCrossAttention(WIDTH, 8, 2, "normed", False, False)
    randomize(block, 60)
    queries, z, e = torch.randn(1, 6, WIDTH), torch.randn(1, 1, 5, WIDTH), torch.randn(3, WIDTH)
    still, moving = z.expand(-1, 3, -1, -1), torch.randn(1, 3, 5, WIDTH)
    with_changes = [block(queries, clip, e[: clip.shape[1]])[0] for clip in (z, still, moving)]
    block.kv_change = None
    without = [block(queries, clip, e[: clip.shape[1]])[0] for clip in (z, still, moving)]
    assert [torch.equal(a, b) for a, b in zip(with_changes, without, strict=True)] == [True, True, False]


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("self_attention", [False, True])
def test_per_frame_a_query_depends_on_one_frame(self_attention, changes):
    """Seeds 56 and 57: of 6 queries and 3 frames, 0 and 1 read frame 0, and so on, with `changes` also the frame
    before; other frames change no bit."""
    torch.manual_seed(56)
    block = GatedCrossAttention(WIDTH, 8, 2, "normed", False, self_attention, per_frame=True, changes=changes)
    randomize(block, 57)
    queries, z, e = torch.randn(1, 6, WIDTH), torch.randn(1, 3, 5, WIDTH), torch.randn(3, WIDTH)
    before, _, _ = block(queries, z, e)
    for t in range(3):
        other = z.clone()
        other[:, t] += torch.randn(5, WIDTH)
        changed = (block(queries, other, e)[0] - before).abs().amax(-1)[0]
        assert (changed > 1e-4).tolist() == [t in (i // 2, i // 2 - changes) for i in range(6)]


def test_the_kinds_of_frame_vectors():
    """Seed 58: a ramp has rank 1 and ends at plus and minus one direction; random ones have full rank; none are zero
    and not trained."""
    torch.manual_seed(58)
    kinds = ("ramp", "random", "none")
    ramp, random, none = (QAdapter(WIDTH, DEPTH, frames=5, time_embed=kind).time_embed for kind in kinds)
    assert torch.linalg.matrix_rank(ramp) == 1 and torch.equal(ramp[0], -ramp[-1]) and ramp.std() > 0.2
    assert torch.linalg.matrix_rank(random) == 5 and 0.7 < random.std() < 1.3
    assert not none.any() and not none.requires_grad and ramp.requires_grad and random.requires_grad


def naive_write(block: GatedCrossAttention, queries: torch.Tensor, patches: torch.Tensor,
                time_embed: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Patches (T, P, D) of one clip after they read its new queries (N, D), one patch and one head at a time."""
    new = patches.clone()
    normed_queries = block.norm(queries)  # (N, D)
    wk, wv = block.write_kv.weight.chunk(2)
    for t, frame in enumerate(patches):
        for p, patch in enumerate(frame):
            x, heads = (F.layer_norm(patch, patch.shape) - block.mean) / block.std + time_embed[t], []
            for hq, hk, hv in zip(*(w.chunk(block.heads) for w in (block.write_q.weight, wk, wv)), strict=True):
                logits = (normed_queries @ hk.T) @ (hq @ x) / len(hq) ** 0.5  # (N,)
                heads.append(logits.softmax(-1) @ (normed_queries @ hv.T))
            new[t, p] = patch + block.write_o.weight @ torch.cat(heads)
    return new


@pytest.mark.parametrize("self_attention", [False, True])
def test_write_back_equals_its_naive_version(self_attention):
    """Seeds 5 and 6, tolerance 1e-5: queries change as without write-back, and the patches read the new queries."""
    torch.manual_seed(5)
    block = GatedCrossAttention(WIDTH, 8, 2, "sigmoid", write_back=True, self_attention=self_attention)
    randomize(block, 6)
    q, z, e = torch.randn(2, 4, WIDTH), torch.randn(2, 3, 5, WIDTH), torch.randn(3, WIDTH)
    found, _, after = block(q, z, e)
    torch.testing.assert_close(found, naive_gated_cross_attention(block, q, z, e), rtol=0, atol=1e-5)
    expected = torch.stack([naive_write(block, a, b, e) for a, b in zip(found, z, strict=True)])
    assert (expected - z).abs().max() > 0.1
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
@pytest.mark.parametrize("last_blocks", [0, 2])
def test_the_adapter_is_a_chain_of_naive_blocks(gate, last_blocks):
    """Seeds 7 to 9, tolerance 1e-5: the queries pass from block to block and read the outputs of the frozen ViT."""
    vit = tiny_vit(7)
    adapter = QAdapter(WIDTH, DEPTH, queries=5, rank=8, heads=2, frames=3, last_blocks=last_blocks, gate=gate)
    randomize(adapter, 8)
    pixels = clips(2, 3, 9)
    outputs = record_block_outputs(vit, lambda: vit(pixels.flatten(0, 1)))
    q = adapter.queries.expand(2, -1, -1)
    for block, z in zip(adapter.blocks, outputs[-len(adapter.blocks) :], strict=True):
        q = naive_gated_cross_attention(block, q, z.unflatten(0, (2, 3)), adapter.time_embed)
    torch.testing.assert_close(adapter(vit, pixels), adapter.norm(q), rtol=0, atol=1e-5)


def test_channel_statistics_are_those_of_the_given_clips():
    """X without E has mean 0 and standard deviation 1 in every channel, over all tokens of all clips. Seed 40, float64
    by hand, tolerance 1e-5. Channels that hardly vary, here those of the second block, are divided by 0.1."""
    torch.manual_seed(40)
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3, last_blocks=2)
    scale = torch.stack([torch.linspace(0.5, 2, WIDTH), torch.full([WIDTH], 0.02)])[:, None]  # (L, 1, D)
    outputs = torch.randn(5, 3, 2, 7, WIDTH) * scale + torch.randn(2, 1, WIDTH)  # (B, T, L, P, D)
    adapter.measure_channels(outputs)
    for i, block in enumerate(adapter.blocks):
        z = outputs[:, :, i].double().flatten(0, 2)
        x = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        std = x.std(0)
        assert std.max() < 0.1 if i else std.min() > 0.1
        torch.testing.assert_close(block.mean.double(), x.mean(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(block.std.double(), std.clamp(min=0.1), rtol=0, atol=1e-5)
    assert {"blocks.0.mean", "blocks.1.std"} <= adapter.state_dict().keys()


# --------------------------------------------------------------------------- the frozen ViT


@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("last_blocks", [0, 1])
def test_without_write_back_the_vit_is_unchanged_bit_for_bit(last_blocks, self_attention):
    """Seeds 10 to 12: random adapter weights, and every block's output has the bits of the ViT run alone."""
    vit = tiny_vit(10)
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3, last_blocks=last_blocks,
                       self_attention=self_attention)  # fmt: skip
    randomize(adapter, 11)
    pixels = clips(2, 3, 12)
    alone = record_block_outputs(vit, lambda: vit(pixels.flatten(0, 1)))
    beside = record_block_outputs(vit, lambda: adapter(vit, pixels))
    assert len(alone) == len(beside) == DEPTH
    assert all(map(same_bits, alone, beside))


def test_without_write_back_the_vit_needs_no_gradients():
    """Seeds 13 and 14, with a ViT whose parameters require gradients."""
    vit = tiny_vit(13).requires_grad_(True)
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3)
    outputs = record_block_outputs(vit, lambda: adapter(vit, clips(2, 3, 14)).square().sum().backward())
    assert not any(z.requires_grad for z in outputs)
    assert all(p.grad is None for p in vit.parameters())
    assert all(p.grad is not None for p in adapter.parameters())


def test_no_grad_is_respected():
    """Seeds 13 and 14: under no_grad the adapter records no graph; after it, it does again."""
    vit, adapter = tiny_vit(13), QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3)
    with torch.no_grad():
        assert not adapter(vit, clips(1, 3, 14)).requires_grad
    assert adapter(vit, clips(1, 3, 14)).requires_grad


@pytest.mark.parametrize("last_blocks", [0, 3])
def test_write_back_starts_as_the_frozen_vit_bit_for_bit(last_blocks):
    """Seeds 15 and 16: at step 0 the blocks' outputs have the bits of the ViT run alone."""
    vit = tiny_vit(15)
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3, last_blocks=last_blocks, write_back=True)
    pixels = clips(2, 3, 16)
    alone = record_block_outputs(vit, lambda: vit(pixels.flatten(0, 1)))
    adapted = record_block_outputs(vit, lambda: adapter(vit, pixels))
    assert all(map(same_bits, alone, adapted))


def test_write_back_changes_the_patches_of_every_deeper_block():
    """Seeds 17 to 19: write projections random; the first block is unchanged, the others differ by over 1e-3."""
    vit = tiny_vit(17)
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3, write_back=True)
    randomize(adapter, 18)
    pixels = clips(2, 3, 19)
    alone = record_block_outputs(vit, lambda: vit(pixels.flatten(0, 1)))
    adapted = record_block_outputs(vit, lambda: adapter(vit, pixels))
    assert same_bits(alone[0], adapted[0])
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(alone[1:], adapted[1:], strict=True))


def test_write_back_sends_gradients_through_the_vit():
    """Seeds 20 to 22: write projections act only through deeper frozen blocks, and they get gradients."""
    vit = tiny_vit(20)
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3, write_back=True)
    randomize(adapter, 21)
    adapter(vit, clips(2, 3, 22)).pow(3).sum().backward()
    for block in adapter.blocks[:-1]:
        for layer in (block.write_q, block.write_kv, block.write_o):
            assert layer.weight.grad.abs().max() > 1e-6
    assert all(p.grad is not None for p in adapter.parameters())
    assert all(p.grad is None for p in vit.parameters())


def test_write_back_learns_from_step_0_although_its_projection_is_zero():
    """Seeds 23 and 24: the zero projection itself gets a gradient."""
    vit, adapter = tiny_vit(23), QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3, write_back=True)
    adapter(vit, clips(2, 3, 24)).pow(3).sum().backward()
    assert all(block.write_o.weight.grad.abs().max() > 1e-6 for block in adapter.blocks[:-1])


@pytest.mark.parametrize("last_blocks", [1, 2, 3, 4])
def test_write_back_keeps_no_graph_below_the_first_adapted_block(last_blocks):
    """Seeds 25 and 26: a block's output requires gradients only behind an adapted block."""
    vit = tiny_vit(25)
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3, last_blocks=last_blocks, write_back=True)
    outputs = record_block_outputs(vit, lambda: adapter(vit, clips(2, 3, 26)))
    assert [z.requires_grad for z in outputs] == [i > DEPTH - last_blocks for i in range(DEPTH)]


def test_write_projections_exist_with_write_back_except_after_the_last_block():
    adapters = [QAdapter(WIDTH, DEPTH, write_back=write_back) for write_back in WRITE_BACK]
    found = [[block.write_o is not None for block in adapter.blocks] for adapter in adapters]
    assert found == [[False] * 4, [True, True, True, False]]


# ------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("write_back", WRITE_BACK)
@pytest.mark.parametrize("frames", [1, 8, 32])
def test_n_tokens_for_any_number_of_frames(frames, write_back):
    """Seeds 27 and 28: made for 8 frames."""
    vit, adapter = tiny_vit(27), QAdapter(WIDTH, DEPTH, queries=6, rank=8, frames=8, write_back=write_back)
    assert adapter(vit, clips(2, frames, 28)).shape == (2, 6, WIDTH)


def test_frame_vectors_are_interpolated():
    """Seed 29, tolerance 1e-6. The same number of frames: unchanged. One frame: the mean of the middle two. Twice as
    many: a quarter of the way from each learned vector to its two neighbours."""
    e = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(29))
    assert interpolate_time_embed(e, 8) is e
    torch.testing.assert_close(interpolate_time_embed(e, 1)[0], (e[3] + e[4]) / 2, rtol=0, atol=1e-6)
    twice = interpolate_time_embed(e, 16)
    torch.testing.assert_close(twice[1:-1:2], 0.75 * e[:-1] + 0.25 * e[1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(twice[2::2], 0.25 * e[:-1] + 0.75 * e[1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
@pytest.mark.parametrize("last_blocks, adapted", [(0, 4), (1, 1), (3, 3), (4, 4)])
def test_the_last_k_blocks_are_adapted_and_report_a_mean_gate_each(last_blocks, adapted, gate):
    """Seeds 30 to 32: other blocks are not read, gates lie in (0, 1), without a gate they are 1."""
    vit = tiny_vit(30)
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3, last_blocks=last_blocks, gate=gate)
    randomize(adapter, 31)
    read_outputs = []
    outputs = record_block_outputs(vit, lambda: vit(clips(2, 3, 32).flatten(0, 1)))
    def record(_module, inputs, output) -> None:
        read_outputs.append((inputs[1].flatten(0, 1), output[1]))

    for block in adapter.blocks:
        block.register_forward_hook(record)
    adapter(vit, clips(2, 3, 32))
    assert len(adapter.blocks) == len(read_outputs) == adapted
    assert all(map(same_bits, (z for z, _ in read_outputs), outputs[DEPTH - adapted :]))
    assert not adapter.gates.requires_grad
    assert torch.equal(adapter.gates, torch.stack([gates for _, gates in read_outputs]))
    statistics = adapter.gate_statistics()
    assert statistics["gates"] == pytest.approx([gates.mean().item() for gates in adapter.gates])
    saturated = [((gates < 0.02) | (gates > 0.98)).float().mean().item() for gates in adapter.gates]
    assert statistics["saturated"] == pytest.approx(saturated)
    if gate == "none":
        assert torch.equal(adapter.gates, torch.ones_like(adapter.gates))
    else:
        assert all(((gates > 0) & (gates < 1)).all() and gates.std() > 0.01 for _, gates in read_outputs)


@pytest.mark.parametrize("write_back", WRITE_BACK)
def test_the_order_of_frames_matters(write_back):
    """Seeds 33 to 35: the reversed clip gives other tokens, also where only changes tell it, and without frame vectors
    and changes the same ones (1e-5)."""
    vit, adapter = tiny_vit(33), QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=5, write_back=write_back)
    randomize(adapter, 34)
    pixels = clips(2, 5, 35)
    with torch.no_grad():
        assert (adapter(vit, pixels) - adapter(vit, pixels.flip(1))).abs().max() > 1e-2
        adapter.time_embed.zero_()
        assert (adapter(vit, pixels) - adapter(vit, pixels.flip(1))).abs().max() > 1e-2
        for block in adapter.blocks:
            block.kv_change.weight.zero_()
        torch.testing.assert_close(adapter(vit, pixels), adapter(vit, pixels.flip(1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("write_back", WRITE_BACK)
def test_clips_of_a_batch_do_not_see_each_other(write_back):
    """Seeds 36 to 38, tolerance 1e-5: a batch gives the outputs of its clips alone."""
    vit = tiny_vit(36)
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=3, write_back=write_back, self_attention=True)
    randomize(adapter, 37)
    pixels = clips(3, 3, 38)
    alone = torch.cat([adapter(vit, clip[None]) for clip in pixels])
    torch.testing.assert_close(adapter(vit, pixels), alone, rtol=0, atol=1e-5)


def test_the_queries_see_every_frame():
    """Seeds 39 and 40: a change of any one frame reaches every query."""
    vit, adapter, pixels = tiny_vit(39), QAdapter(WIDTH, DEPTH, queries=4, rank=8, frames=6), clips(1, 6, 40)
    with torch.no_grad():
        before = adapter(vit, pixels)
        for t in range(6):
            other = pixels.clone()
            other[:, t] *= -1
            assert ((adapter(vit, other) - before).abs().amax(-1) > 1e-4).all()


# -------------------------------------------------------------------------------- looking inside


@pytest.mark.parametrize("write_back", WRITE_BACK)
@pytest.mark.parametrize("self_attention", [False, True])
def test_the_attention_is_the_one_that_was_used(write_back, self_attention):
    """Seeds 50 to 52, tolerance 1e-5: the weights of each head, applied to the block's own values, are what it read;
    that is, with the block's gates, what each query gained. They sum to 1, with the queries' part where it has keys."""
    vit, frames = tiny_vit(50), 3
    adapter = QAdapter(WIDTH, DEPTH, queries=4, rank=8, heads=2, frames=frames, last_blocks=2, write_back=write_back,
                       self_attention=self_attention)  # fmt: skip
    randomize(adapter, 51)
    seen = []
    for block in adapter.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append((block, args, out)))
    with torch.no_grad(), adapter.looking_inside():
        alone = adapter(vit, clips(2, frames, 52))
    attention = adapter.attention(frames)
    assert attention.shape == (2, 2, 2, 4, frames, 5)  # 5 tokens: a class token and 2 x 2 patches
    for (block, (queries, z, e), (after, gates, _)), weights in zip(seen, attention, strict=True):
        y = (F.layer_norm(z, z.shape[-1:]) - block.mean) / block.std
        changes = torch.cat([torch.zeros_like(y[:, :1]), y.diff(dim=1)], dim=1)
        keys, total = weights.flatten(-2), weights.sum((-2, -1))
        values = (y + e[:, None]) @ block.kv.weight[8:].T + changes @ block.kv_change.weight[8:].T
        values = values.flatten(1, 2)  # (B, T*P, r)
        if self_attention:
            keys = block.attention
            values = torch.cat([values, block.norm(queries) @ block.kv.weight[8:].T], dim=1)
            assert (total < 0.999).any()
        torch.testing.assert_close(keys.sum(-1), torch.ones(2, 2, 4), rtol=0, atol=1e-6)
        read = (keys @ values.unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2) @ block.o.weight.T
        torch.testing.assert_close(after, queries + gates[..., None] * read, rtol=0, atol=1e-5)
    before = [block.attention for block in adapter.blocks]
    assert same_bits(adapter(vit, clips(2, frames, 52)), alone)  # nothing else is changed, and nothing more is kept
    assert all(block.attention is kept for block, kept in zip(adapter.blocks, before, strict=True))


def test_the_attention_follows_a_token_that_moves():
    """Seeds 53 and 54, tolerance 1e-6: tokens of a frame in another order are read alike, each in its new place.
    Without changes, which are another token's then."""
    torch.manual_seed(53)
    block = GatedCrossAttention(WIDTH, 8, 2, "normed", write_back=False, self_attention=False, changes=False)
    randomize(block, 54)
    block.keep_attention = True
    queries, z, e = torch.randn(1, 4, WIDTH), torch.randn(1, 3, 6, WIDTH), torch.randn(3, WIDTH)
    block(queries, z, e)
    first = block.attention.unflatten(-1, (3, 6))
    moved = z.clone()
    moved[:, 1] = z[:, 1, [0, 2, 3, 4, 5, 1]]  # what was at 1 is at 5
    block(queries, moved, e)
    second = block.attention.unflatten(-1, (3, 6))
    torch.testing.assert_close(second[..., 1, 5], first[..., 1, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(second[..., 0, :], first[..., 0, :], rtol=0, atol=1e-6)
    assert (second[..., 1, 1] - first[..., 1, 1]).abs().max() > 1e-3
