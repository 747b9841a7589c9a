"""LoRA, AdaptFormer and deep prompts, against their equations and against the frozen ViT.

References: eq. 3 of LoRA, https://arxiv.org/abs/2106.09685; eq. 3 to 5 of AdaptFormer, https://arxiv.org/abs/2205.13535;
eq. 3 of visual prompt tuning, https://arxiv.org/abs/2203.12119. "Bit for bit" compares the numbers' bytes.
"""

import pytest
import torch

from models.baselines import AdaptedMLP, LoRALinear, PromptedBlock, add_adapters, add_lora, add_prompts
from models.vit import ViT, ViTBlock, ViTConfig

WIDTH, DEPTH, SIDE = 24, 4, 16


def tiny_vit(seed: int) -> ViT:
    torch.manual_seed(seed)
    return ViT(ViTConfig(SIDE, 8, WIDTH, DEPTH, 3, 32, "gelu", 1e-5)).requires_grad_(False)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def new_tensors(vit: ViT, add) -> set[str]:
    """The names of the trained tensors after `add(vit)`; the frozen tensors keep their names."""
    before = {name: id(p) for name, p in vit.named_parameters()}
    add(vit)
    names = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert {name: id(p) for name, p in vit.named_parameters() if name not in names} == before
    return names


# -------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("bias", [True, False])
def test_lora_starts_as_its_base_layer_and_is_the_published_sum(bias):
    """x (W + B A)^T + b. Seed 41; step 0 exactly, then tolerance 1e-6 in float64."""
    torch.manual_seed(41)
    base = torch.nn.Linear(10, 7, bias=bias)
    lora, x = LoRALinear(base, 3), torch.randn(4, 5, 10)
    assert same_bits(lora(x), base(x))
    assert lora.weight is base.weight and lora.bias is base.bias
    assert (lora.lora_a.shape, lora.lora_b.shape) == ((3, 10), (7, 3))
    assert lora.lora_a.std() > 0.1 and not lora.lora_b.any()  # one of the two must not be zero
    torch.nn.init.normal_(lora.lora_b)
    lora, x = lora.double(), x.double()
    expected = x @ (lora.weight + lora.lora_b @ lora.lora_a).T + (lora.bias if bias else 0)
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- AdaptFormer


def test_a_block_with_an_adapter_is_the_published_sum():
    """z' = z + attention, then MLP(LN(z')) + 0.1 relu(LN(z') W_down + b) W_up + z', float64, within 1e-12; seed 44."""
    torch.manual_seed(44)
    block = ViTBlock(tiny_vit(44).config).double()
    z, mlp = torch.randn(3, 5, WIDTH, dtype=torch.float64), block.mlp
    expected_first = block(z)
    block.mlp = adapter = AdaptedMLP(mlp, 6).double()
    assert same_bits(block(z), expected_first)
    torch.nn.init.normal_(adapter.adapter_up.weight)
    torch.nn.init.normal_(adapter.adapter_up.bias)
    y = block.norm1(z)
    residual = z + block.attn(y, y)
    y = block.norm2(residual)
    hidden = (y @ adapter.adapter_down.weight.T + adapter.adapter_down.bias).clamp(min=0)
    expected = mlp(y) + 0.1 * (hidden @ adapter.adapter_up.weight.T + adapter.adapter_up.bias) + residual
    torch.testing.assert_close(block(z), expected, rtol=0, atol=1e-12)


LORA = [f"attn.{name}.lora_{x}" for name in "qv" for x in "ab"]
ADAPTER = [f"mlp.adapter_{layer}.{x}" for layer in ("down", "up") for x in ("weight", "bias")]


@pytest.mark.parametrize(
    "add, parts", [(lambda vit: add_lora(vit.blocks, 2), LORA), (lambda vit: add_adapters(vit, 3), ADAPTER)]
)
def test_every_block_is_adapted_and_nothing_changes_at_first(add, parts):
    """Seeds 45 and 46, bit for bit."""
    vit, pixels = tiny_vit(45), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(46))
    before = vit(pixels)
    assert new_tensors(vit, add) == {f"blocks.{i}.{part}" for i in range(DEPTH) for part in parts}
    assert same_bits(vit(pixels), before)


# ------------------------------------------------------------------------------------ deep prompts


def test_prompts_are_tokens_of_one_block():
    """The block on P + N tokens by hand, head by head, float64, within 1e-12; the last N rows are dropped; seed 47."""
    torch.manual_seed(47)
    block = ViTBlock(tiny_vit(47).config).double()
    prompted, z = PromptedBlock(block, 4, WIDTH, 8).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    found = prompted(z)
    assert found.shape == z.shape
    for image, out in zip(z, found, strict=True):
        tokens = torch.cat([image, prompted.prompts])
        y, attn = block.norm1(tokens), block.attn
        heads = []
        for q, k, v in zip(*(layer(y).chunk(attn.heads, dim=-1) for layer in (attn.q, attn.k, attn.v)), strict=True):
            heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
        x = tokens + attn.out(torch.cat(heads, -1))
        expected = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(out, expected[:5], rtol=0, atol=1e-12)


def test_prompts_are_new_in_every_block_and_start_uniform():
    """Seed 48: between plus and minus sqrt(6 / (3 * 8 * 8 + width)), as VPT's; 200 prompts fill that range."""
    vit = tiny_vit(48)
    names = new_tensors(vit, lambda vit: add_prompts(vit, 200))
    assert names == {f"blocks.{i}.prompts" for i in range(DEPTH)}
    bound = (6 / (3 * 64 + WIDTH)) ** 0.5
    for block in vit.blocks:
        largest = block.prompts.abs().max().item()
        assert 0.99 * bound < largest <= bound and block.prompts.mean().abs() < 0.02
    assert len({block.prompts.sum().item() for block in vit.blocks}) == DEPTH


@pytest.mark.parametrize("add", [lambda vit: add_adapters(vit, 3), lambda vit: add_prompts(vit, 3)])
def test_gradients_reach_the_first_block_in_bf16(add):
    """Seed 49: frozen weights bf16, trained ones float32."""
    vit = tiny_vit(49).bfloat16()
    names = new_tensors(vit, add)
    for name, p in vit.named_parameters():
        if name in names and not p.any():
            p.data.normal_()
    vit(torch.randn(2, 3, SIDE, SIDE).bfloat16()).float().square().sum().backward()
    for name in names:
        grad = vit.get_parameter(name).grad
        assert grad.dtype == torch.float32 and grad.any(), name
