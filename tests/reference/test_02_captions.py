"""The captioner on a separate ViT and language model, against slower computations of the same.

References: torch's cross_entropy over all positions, one caption per pass; greedy decoding without a cache; the frozen
models' own tensors, bit for bit. Models are tiny and random, a letter is a token (`tests/tiny.py`).
"""

import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from model import Captioner
from models import caption_loss
from models.generation import TEMPERATURE, naive_generate
from models.pair import PROMPT
from models.safetensors import checksum, read_safetensors, write_safetensors
from tests import tiny
from tests.tiny import CONFIGS, EOS, IGNORE, LABELS, Letters, N, T, bits, clips, make, randomized

every_config = pytest.mark.parametrize("name", CONFIGS)


def gradients(captioner: Captioner, run) -> dict[str, torch.Tensor]:
    captioner.zero_grad()
    run().backward()
    return {name: p.grad.clone() for name, p in captioner.trained().items()}


# ---------------------------------------------------------------------------------------- the loss


@every_config
def test_the_loss_is_the_cross_entropy_of_one_caption_at_a_time(name):
    """Model seed 0, frames seed 1, relative tolerance 1e-5: logits of all positions, all but the captions ignored."""
    captioner, frames, expected = randomized(name), clips(2, T, 1), 0.0
    lm, prompt = captioner.lm, torch.tensor([Letters().encode(PROMPT)])
    for clip, group in zip(frames, LABELS, strict=True):
        visual = captioner.encode(clip[None])[0]  # (1, N, C)
        for padded in group:
            row = padded.clamp(min=EOS)
            x = torch.cat([lm.embed(torch.tensor([[1]])), visual, lm.embed(prompt), lm.embed(row[None])], dim=1)
            targets = torch.full((x.shape[1],), IGNORE)
            targets[-len(padded) :] = padded
            expected += F.cross_entropy(lm(x)[0, :-1], targets[1:], ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(captioner(frames, LABELS), expected, rtol=1e-5, atol=0)
    longer = F.pad(LABELS, (0, 9), value=IGNORE)
    torch.testing.assert_close(captioner(frames, longer), expected, rtol=1e-5, atol=0)


@every_config
def test_k_captions_in_one_pass_are_k_passes(name):
    """Model seed 2, frames seed 3. Gradients within 1e-5 of a tensor's largest, and 5e-8 of the largest of all (a key's
    bias has none but rounding). The ViT runs once over the frames, the head on caption tokens and EOS only."""
    captioner, frames, images, rows = randomized(name, 2), clips(2, T, 3), [], []
    expected = gradients(captioner, lambda: sum(captioner(frames, LABELS[:, k : k + 1]) for k in range(3)))
    captioner.vit.blocks[0].register_forward_hook(lambda _m, inputs, _o: images.append(len(inputs[0])))
    captioner.lm.head.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[:-1].numel()))
    found = gradients(captioner, lambda: captioner(frames, LABELS))
    assert images == [2 * T] and rows == [(LABELS >= 0).sum()]
    sizes = {key: float(gradient.abs().max()) for key, gradient in expected.items()}
    for key in found:
        within = 1e-5 * sizes[key] + 5e-8 * max(sizes.values())
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=within, msg=key)


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 11])
def test_cross_entropy_in_chunks_is_that_of_all_logits(chunk_size, monkeypatch):
    """Reference: F.cross_entropy of all logits, of samples with weights and a temperature. 10 tokens, 7 words, seed 4:
    loss and gradient within a relative 1e-6. No more than chunk_size rows go through the head at once."""
    monkeypatch.setattr(caption_loss, "LOGITS_PER_CHUNK", 7 * chunk_size)
    torch.manual_seed(4)
    head, ids, rows = torch.nn.Linear(5, 7, bias=False).requires_grad_(False), torch.randint(7, (10,)), []
    x = torch.randn(10, 5, requires_grad=True)
    weights = torch.randn(10)
    expected = (F.cross_entropy(head(x), ids, reduction="sum"),
                weights @ F.cross_entropy(head(x) / TEMPERATURE, ids, reduction="none"))
    head.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    for total, of_tokens in zip(expected, (None, weights), strict=True):
        found = caption_loss.FrozenHeadCrossEntropy.apply(x, ids, head, of_tokens)
        torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(3 * loss, x)[0] for loss in (found, total)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    assert sum(rows) == 20 and max(rows) == min(chunk_size, 10)


@every_config
def test_a_step_does_not_wait_for_the_device(name):
    """The meta device, which has no numbers, raises where any would be read back. Labels are on the CPU."""
    captioner = make(name).to("meta")
    captioner(clips(2, T, 8).to("meta"), LABELS).backward()
    assert all(p.grad is not None for p in captioner.trained().values())


# --------------------------------------------------------------------------------- what is trained


@every_config
def test_training_changes_what_is_trained_and_no_bit_of_the_rest(name):
    """Model seed 9, from the true initialization, frames seeds 10 to 12. What is frozen stays in eval mode."""
    captioner = make(name, 9)
    everything = dict(captioner.named_parameters())
    expected = everything.keys() - tiny.frozen_names(name)
    assert captioner.trained().keys() == expected == tiny.changed_by_training(captioner, weight_decay=0.1)
    assert {key for key, p in everything.items() if p.grad is not None} == expected
    assert {module.training for part in (captioner.vit, captioner.lm) for module in part.modules()} == {name == "full"}


def test_which_methods_keep_activations_of_the_vit():
    """Frames seed 13: linear, lora-lm and the Q-Adapter keep none of a ViT block; all keep those of the LM."""
    for name in CONFIGS:
        captioner, outputs = make(name), []
        for part in (captioner.vit, captioner.lm):
            part.blocks[-1].register_forward_hook(lambda _m, _i, output, s=outputs: s.append(output.requires_grad))
        captioner(clips(2, T, 13), LABELS)
        assert outputs == [name not in ("no write-back", "linear", "lora-lm"), True], name


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "full"])
def test_only_frozen_weights_are_bf16(name):
    """Model seed 14, frames seed 15: loss within 2% of fp32's, gradients of the trained fp32 tensors point the same
    way (cosine above 0.95 for those whose gradient is not rounding alone)."""
    full, half, frames = randomized(name, 14), make(name, 14, dtype=torch.bfloat16), clips(2, T, 15)
    half.load_state_dict(full.state_dict())
    assert {p.dtype for key, p in half.named_parameters() if key in half.trained()} == {torch.float32}
    assert {p.dtype for key, p in half.named_parameters() if key not in half.trained()} == {torch.bfloat16}
    losses = [captioner(frames, LABELS) for captioner in (full, half)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert losses[0] != losses[1] and losses[1].dtype == torch.float32
    found, expected = (gradients(captioner, lambda c=captioner: c(frames, LABELS)) for captioner in (half, full))
    largest = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in expected.items():
        if gradient.abs().max() > 1e-2 * largest:
            assert F.cosine_similarity(found[key].flatten(), gradient.flatten(), dim=0) > 0.95, key


def test_channel_statistics_of_cached_block_outputs_are_those_of_frames():
    """Model seed 16, in float32, frames seed 17; a cache stores bf16. Losses: test_03_mllm.py."""
    captioner, frames = make("no write-back", 16), clips(2, T, 17)
    captioner.measure_channels(frames)
    found = bits(dict(captioner.adapter.named_buffers()))
    captioner.measure_channels(captioner.block_outputs(frames).bfloat16())
    assert bits(dict(captioner.adapter.named_buffers())) == found and captioner.adapter.blocks[0].mean.any()


# ------------------------------------------------------------------ what the language model reads


@every_config
@pytest.mark.parametrize("frames", [1, T, 12])
def test_the_prefix_is_bos_then_visual_tokens_then_the_prompt(name, frames):
    """Model seed 18, frames seed 19, bit for bit: N visual tokens for the adapter, T for the other methods. Qwen's
    tokenizers have no BOS."""
    captioner, pixels = make(name, 18), clips(2, frames, 19)
    visual, prefix = captioner.encode(pixels)[0], captioner.prefix(pixels)
    assert visual.shape == (2, N if CONFIGS[name].method == "qadapter" else frames, captioner.lm.config.width)
    embed, prompt = captioner.lm.embed.weight, Letters().encode("a video of")
    for row, tokens in zip(prefix, visual, strict=True):
        assert torch.equal(row, torch.cat([embed[1:2], tokens, embed[prompt]]))
    captioner.tokenizer.start = []
    assert torch.equal(captioner.prefix(pixels), prefix[:, 1:])
    assert captioner.prefix_length(frames) == prefix.shape[1] - 1


@pytest.mark.parametrize("name", ["linear", "lora", "adapter", "prompt", "full"])
@pytest.mark.parametrize("grid", [0, 1, 2])
def test_the_visual_tokens_of_the_other_methods(name, grid):
    """Model seed 20, frames seed 21, within 1e-5: connector(pooled feature + E) at the embeddings' scale, frame by
    frame; with a grid, the mean of the normed patches of each square, row by row, instead of the feature."""
    captioner, frames = (make if name == "full" else randomized)(name, 20, grid=grid), clips(2, T, 21)
    found, vit, side = captioner.encode(frames)[0], captioner.vit, captioner.vit.config.grid[0]
    assert found.shape[1] == captioner.num_visual_tokens(T) == T * max(1, grid**2)
    for b in range(2):
        expected = []
        for t in range(T):
            z = vit.post_norm(vit.run_blocks(vit.normalize(frames[b, t : t + 1]))[0])  # (P, D), a class token first
            square, step = z[1:].view(side, side, -1), side // max(grid, 1)
            features = [square[i : i + step, j : j + step].mean((0, 1))
                        for i in range(0, side, step) for j in range(0, side, step)] if grid else [z[0]]
            expected += [captioner.connector(feature + captioner.time_embed[t]) for feature in features]
        scale = captioner.lm.embed.weight.square().mean().sqrt()
        torch.testing.assert_close(found[b], torch.stack(expected) * scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "adapter", "prompt", "st-adapter"])
def test_which_methods_mix_the_frames_of_a_clip(name):
    """Model seed 24, frames seed 25. Another first frame changes what ST-Adapter says of the second one, and of no
    other clip; the image methods encode each frame alone."""
    captioner, frames = randomized(name, 24), clips(2, T, 25)
    before = captioner.encode(frames)[0]
    frames[0, 0] //= 2
    changed = (captioner.encode(frames)[0] != before).any(-1)  # (B, T)
    assert changed[0, 0] and changed[0, 1] == (name == "st-adapter") and not changed[1].any()


@every_config
def test_captions_are_greedy_text_after_the_prefix(name):
    """Model seed 22, frames seed 23: those of the naive decoder, and the same for each clip alone. Clips of four
    brightnesses and large attention weights, so that the random model's captions differ."""
    captioner, frames = randomized(name, 22), clips(4, T, 23)
    for i in range(4):
        frames[i, :, :i] //= 4
        frames[i, :, i:] |= 128
    with torch.no_grad():
        for block in captioner.lm.blocks:
            block.attn.q.weight *= 5
            block.attn.o.weight *= 5
        expected = Letters().decode(naive_generate(captioner.lm, captioner.prefix(frames), 12, EOS))
    assert captioner.caption(frames, max_new_tokens=12) == expected and len(set(expected)) >= 3
    assert [captioner.caption(clip[None], max_new_tokens=12)[0] for clip in frames] == expected


# ------------------------------------------------------------------------------------------ files


@every_config
def test_a_checkpoint_holds_what_is_trained_bit_for_bit(name, tmp_path):
    """Model seed 24, frames seed 25. Tensors of another name or shape, and of every other config, are refused, and then
    nothing changes; so is a flipped bit."""
    ours, other, path, frames = randomized(name, 24), make(name, 24), tmp_path / "a.safetensors", clips(2, T, 25)
    ours.save(path)
    assert read_safetensors(path).keys() == ours.checkpoint_tensors().keys()
    untouched = bits(dict(other.named_parameters()))
    tensors, content = read_safetensors(path), bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    without = {key: tensor for key, tensor in tensors.items() if key != "connector.bias"}
    for i, wrong in enumerate((without, tensors | {"x": torch.ones(1)}, without | {"connector.bias": torch.ones(9)})):
        write_safetensors(tmp_path / f"wrong {i}", wrong, {"sha256": checksum(wrong)})
    make(next(key for key in CONFIGS if key != name)).save(tmp_path / "wrong 3")
    for i in range(4):
        with pytest.raises(InputError, match=f"wrong {i}: tensor .* this model expects"):
            other.load(tmp_path / f"wrong {i}")
        assert bits(dict(other.named_parameters())) == untouched
    with pytest.raises(InputError, match="flipped: is damaged"):
        other.load(tmp_path / "flipped")
    assert bits(dict(other.named_parameters())) == untouched
    other.load(path)
    assert bits(other.checkpoint_tensors()) == bits(ours.checkpoint_tensors()) == bits(tensors)
    with torch.no_grad():
        assert other(frames, LABELS) == ours(frames, LABELS)
