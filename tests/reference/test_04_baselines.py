"""LoRA, AdaptFormer, deep prompts and ST-Adapter, against their equations and against the frozen ViT.

References: eq. 3 of LoRA, https://arxiv.org/abs/2106.09685; eq. 3 to 5 of AdaptFormer, https://arxiv.org/abs/2205.13535;
eq. 3 of visual prompt tuning, https://arxiv.org/abs/2203.12119; ST-Adapter, https://arxiv.org/abs/2206.13559, with the
three-dimensional convolution of its authors' code. Float64, within 1e-12.
"""

import pytest
import torch

from common.config import Config
from models.baselines import AdaptedMLP, LoRALinear, PromptedBlock, SpaceTimeBlock, add_baseline, set_frames
from models.vit import ViT, ViTBlock
from tests.tiny import DEPTH, SIDE, VIT, WIDTH, randomize, same_bits

CLOSE = dict(rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_lora(bias):
    """x (W + B A)^T + b; step 0 is the frozen layer bit for bit. Seed 1."""
    torch.manual_seed(1)
    base = torch.nn.Linear(10, 7, bias=bias, dtype=torch.float64)
    lora, x = LoRALinear(base, 3).double(), torch.randn(4, 5, 10, dtype=torch.float64)
    assert same_bits(lora(x), base(x)) and lora.weight is base.weight and lora.bias is base.bias
    assert lora.lora_a.std() > 0.1 and not lora.lora_b.any()  # one of the two must not be zero
    randomize(lora, 2)
    expected = x @ (lora.weight + lora.lora_b @ lora.lora_a).T + (lora.bias if bias else 0)
    torch.testing.assert_close(lora(x), expected, **CLOSE)


def test_adaptformer():
    """z' = z + attention, then MLP(LN(z')) + 0.1 relu(LN(z') W_down + b) W_up + z'; step 0 is the frozen block bit for
    bit. Seed 3."""
    torch.manual_seed(3)
    block, z = ViTBlock(VIT).double(), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    mlp, first = block.mlp, block(z)
    block.mlp = adapter = AdaptedMLP(mlp, 6).double()
    assert same_bits(block(z), first)
    randomize(adapter, 4)
    y = block.norm1(z)
    residual = z + block.attn(y, y)
    y = block.norm2(residual)
    hidden = (y @ adapter.adapter_down.weight.T + adapter.adapter_down.bias).clamp(min=0)
    expected = mlp(y) + 0.1 * (hidden @ adapter.adapter_up.weight.T + adapter.adapter_up.bias) + residual
    torch.testing.assert_close(block(z), expected, **CLOSE)


def test_deep_prompts():
    """The block on P + N tokens by hand, head by head; the last N rows are dropped. Seed 5."""
    torch.manual_seed(5)
    block, z = ViTBlock(VIT).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    prompted = PromptedBlock(block, 4, WIDTH, 8).double()
    for image, out in zip(z, prompted(z), strict=True):
        tokens = torch.cat([image, prompted.prompts])
        y, attn, heads = block.norm1(tokens), block.attn, []
        for q, k, v in zip(*(layer(y).chunk(attn.heads, dim=-1) for layer in (attn.q, attn.k, attn.v)), strict=True):
            heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
        x = tokens + attn.out(torch.cat(heads, -1))
        torch.testing.assert_close(out, (x + block.mlp(block.norm2(x)))[:5], **CLOSE)


def test_st_adapter():
    """Each clip of T = 3 frames by itself, as a video of r channels on the grid of patches; the class token passes by.
    Step 0 is the frozen block bit for bit. Seed 8."""
    torch.manual_seed(8)
    block, clips = ViTBlock(VIT).double(), torch.randn(2, 3, 5, WIDTH, dtype=torch.float64)  # (B, T, P, D)
    adapted = SpaceTimeBlock(block, 6, WIDTH, class_tokens=1).double()
    adapted.frames = 3
    assert same_bits(adapted(clips.flatten(0, 1)), block(clips.flatten(0, 1)))
    randomize(adapted, 9)
    conv = torch.nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0), groups=6, dtype=torch.float64)
    conv.weight.data, conv.bias.data = adapted.st_time.weight[..., None, None], adapted.st_time.bias
    for clip, out in zip(clips, adapted(clips.flatten(0, 1)).unflatten(0, (2, 3)), strict=True):
        video = adapted.st_down(clip[:, 1:]).permute(2, 0, 1).unflatten(2, (2, 2))  # (r, T, 2, 2)
        added = adapted.st_up(conv(video[None])[0].flatten(2).permute(1, 2, 0))  # (T, 4, D)
        torch.testing.assert_close(out, block(torch.cat([clip[:, :1], clip[:, 1:] + added], dim=1)), **CLOSE)


ADDED = {  # to each block
    "lora": {f"attn.{x}.lora_{y}" for x in "qv" for y in "ab"}, "prompt": {"prompts"},
    "adapter": {f"mlp.adapter_{x}.{y}" for x in ("down", "up") for y in ("weight", "bias")},
    "st-adapter": {f"st_{x}.{y}" for x in ("down", "time", "up") for y in ("weight", "bias")},
}


@pytest.mark.parametrize("method", ADDED)
def test_every_block_of_a_vit_gets_its_own(method):
    """Seeds 6 and 7. The frozen tensors keep their names; adapters and LoRA change no bit at first; prompts start
    between plus and minus sqrt(6 / (3 * 4 * 4 + width)), as VPT's. In bf16 all of them get float32 gradients."""
    torch.manual_seed(6)
    vit, pixels = ViT(VIT).requires_grad_(False), torch.randn(2, 3, SIDE, SIDE)
    before, frozen = vit(pixels), {name: id(p) for name, p in vit.named_parameters()}
    add_baseline(vit, None, Config(method=method, rank=3, queries=200))
    set_frames(vit, 2)
    after = {name: p for name, p in vit.named_parameters()}
    assert same_bits(vit(pixels), before) == (method != "prompt")
    added = {f"blocks.{i}.{name}" for i in range(DEPTH) for name in ADDED[method]}
    assert {name for name, p in after.items() if p.requires_grad} == added
    assert {name: id(p) for name, p in after.items() if name not in added} == frozen
    if method == "prompt":
        bound = (6 / (3 * 4 * 4 + WIDTH)) ** 0.5
        for block in vit.blocks:
            assert 0.99 * bound < block.prompts.abs().max() <= bound and block.prompts.mean().abs() < 0.03
    randomize(vit, 7)
    for name, p in after.items():
        p.data = p.data if name in added else p.data.bfloat16()
    vit(pixels.bfloat16()).float().square().sum().backward()
    assert all(after[name].grad.dtype == torch.float32 and after[name].grad.any() for name in added)
