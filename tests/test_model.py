"""The captioner on tiny random models, against slower computations of the same.

References: the loss over all positions with torch's cross_entropy and ignore_index, one caption a pass;
greedy decoding without a cache; and the frozen models' own tensors, compared bit for bit. The tokenizer
is a stub: a letter is a token, so a caption can be read off its ids.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from common.files import sha256_of
from model import PROMPT, AdapterConfig, Captioner
from models import caption_loss
from models.generation import generate, naive_beam_search, naive_generate
from models.lm import CausalLM, LMConfig
from models.names import CLIP, lm_tensor_names, tensor_names
from models.safetensors import read_metadata, read_safetensors, write_safetensors
from models.vit import ViT, ViTConfig

IGNORE_INDEX = -100
DEPTH, SIDE, LETTERS, EOS = 3, 16, " abcdefghijklmnopqrstuvwxyz", 2
CONFIGS = {
    "no write-back": AdapterConfig(queries=5, rank=8, frames=4),
    "write-back": AdapterConfig(queries=5, rank=8, frames=4, write_back=True, query_self_attention=True),
    "last two, no gate": AdapterConfig(queries=5, rank=8, frames=4, write_back=True, last_blocks=2, gate="none"),
    "linear": AdapterConfig(method="linear", frames=4),
    "lora": AdapterConfig(method="lora", rank=2, frames=4),
    "lora-lm": AdapterConfig(method="lora-lm", rank=2, frames=4),
    "adapter": AdapterConfig(method="adapter", rank=2, frames=4),
    "prompt": AdapterConfig(method="prompt", queries=2, frames=4),
    "full": AdapterConfig(method="full", frames=4),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


class Letters:
    """The part of sentencepiece's interface that a captioner uses; ids 0 to 2 are unknown, BOS, EOS."""

    def bos_id(self) -> int:
        return 1

    def encode(self, text: str) -> list[int]:
        return [3 + LETTERS.index(letter) for letter in text]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(LETTERS[i - 3] if i >= 3 else "?" for i in row) for row in rows]


def make(name: str, seed: int = 0, tied: bool = False, randomized: bool = True,
         dtype: torch.dtype = torch.float32, **fields) -> Captioner:  # fmt: skip
    """A captioner of a config with some other fields; if randomized, what starts at zero (gates, write projections,
    LoRA's B) is random instead."""
    torch.manual_seed(seed)
    vit = ViT(ViTConfig(image_size=SIDE, patch_size=8, width=24, depth=DEPTH, heads=3, mlp_width=32,
                        activation="quick_gelu", norm_eps=1e-5))  # fmt: skip
    lm = CausalLM(LMConfig(vocab=30, width=20, depth=2, heads=4, kv_heads=2, head_width=6, mlp_width=28,
                           rope_theta=10000.0, norm_eps=1e-5, max_positions=96, tied=tied, bos_id=1,
                           eos_id=EOS))  # fmt: skip
    captioner = Captioner(vit.to(dtype), lm.to(dtype), Letters(), replace(CONFIGS[name], **fields))
    with torch.no_grad():
        for parameter in captioner.trained().values():
            if randomized and not parameter.any():
                parameter.normal_(0, 0.2)
    return captioner


def clips(batch: int, frames: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (batch, frames, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed),
                         dtype=torch.uint8)  # fmt: skip


def captions(*groups: list[str]) -> torch.Tensor:
    """Each clip's captions -> labels (B, K, L), ending in EOS and padded."""
    rows = [[torch.tensor([*Letters().encode(text), EOS]) for text in group] for group in groups]
    flat = [ids for row in rows for ids in row]
    flat = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=IGNORE_INDEX)
    return flat.unflatten(0, (len(groups), -1))


LABELS = captions(["a cat", "two dogs run", ""], ["red", "a red ball moves", "it rolls away"])


def bits(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().view(torch.int32) for name, p in parameters.items()}


def changed(captioner: Captioner, before: dict[str, torch.Tensor]) -> set[str]:
    after = bits(dict(captioner.named_parameters()))
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(after[name], before[name])}


def gradients(captioner: Captioner, run) -> dict[str, torch.Tensor]:
    captioner.zero_grad()
    run().backward()
    return {name: p.grad.clone() for name, p in captioner.trained().items()}


# ---------------------------------------------------------------------------------------- the loss


@every_config
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_cross_entropy_over_the_whole_text(name, tied):
    """Model seed 0, frames seed 1, relative tolerance 1e-5: all positions' logits, everything but captions ignored."""
    captioner, frames = make(name, tied=tied), clips(2, 4, 1)
    loss, expected, expected_count = captioner(frames, LABELS), 0.0, 0
    lm = captioner.lm
    for clip, group in zip(frames, LABELS, strict=True):
        visual = captioner.encode(clip[None])[0]  # (1, N, C)
        for padded in group:
            row = padded.clone().clamp(min=EOS)
            before, prompt = torch.tensor([[1]]), torch.tensor([Letters().encode(PROMPT)])
            x = torch.cat([lm.embed(before), visual, lm.embed(prompt), lm.embed(row[None])], dim=1)
            labels = torch.full((x.shape[1],), IGNORE_INDEX)
            labels[-len(padded) :] = padded
            expected = expected + F.cross_entropy(lm(x)[0, :-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
            expected_count += int((padded != IGNORE_INDEX).sum())
    assert expected_count == 6 + 13 + 1 + 4 + 17 + 14
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@every_config
def test_k_captions_in_one_pass_are_k_passes(name):
    """Model seed 2, frames seed 3. Summed losses within a relative 1e-4, gradients within 1e-5 of a tensor's largest
    (a key's bias, whose gradient is zero but for rounding: within 1e-8)."""
    captioner, frames = make(name, 2), clips(2, 4, 3)
    together = captioner(frames, LABELS)
    separate = [captioner(frames[b : b + 1], LABELS[b : b + 1, k : k + 1]) for b in range(2) for k in range(3)]
    torch.testing.assert_close(together, sum(separate), rtol=1e-4, atol=0)
    found = gradients(captioner, lambda: captioner(frames, LABELS))
    expected = gradients(captioner, lambda: sum(captioner(frames, LABELS[:, k : k + 1]) for k in range(3)))
    for key in found:
        within = 1e-5 * float(expected[key].abs().max())
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=max(within, 1e-8), msg=key)


@pytest.mark.parametrize("name", ["no write-back", "write-back"])
def test_token_dropout_is_random_in_training_and_off_otherwise(name):
    """Frames seed 60, dropout seeds 61 and 62: two losses differ by more than 1e-4; in eval mode, and without
    gradients, they are equal to the bit, and so is the loss of the same weights without dropout."""
    captioner, frames, labels = make(name, token_dropout=0.5), clips(2, 4, 60), captions(["ab"], ["c"])

    def losses() -> list[float]:
        found = []
        for seed in (61, 62):
            torch.manual_seed(seed)
            found.append(captioner(frames, labels).item())
        return found

    first, second = losses()
    assert abs(first - second) > 1e-4
    whole = make(name)(frames, labels).item()
    with torch.no_grad():
        assert losses() == [whole] * 2, "as captions are generated, and queries are looked at"
    captioner.eval()
    assert losses() == [whole] * 2


@every_config
def test_padding_changes_nothing(name):
    """Model seed 4, frames seed 5. The loss within a relative 1e-6."""
    captioner, frames = make(name, 4), clips(2, 4, 5)
    loss = captioner(frames, LABELS)
    longer = captioner(frames, F.pad(LABELS, (0, 9), value=IGNORE_INDEX))
    torch.testing.assert_close(longer, loss, rtol=1e-6, atol=0)


def test_a_clip_is_encoded_once_for_all_its_captions():
    """Model seed 6, frames seed 7: one run of the ViT over the frames of both clips."""
    captioner, runs = make("no write-back", 6), []
    captioner.vit.blocks[0].register_forward_hook(lambda _m, inputs, _o: runs.append(len(inputs[0])))
    captioner(clips(2, 4, 7), LABELS)
    assert runs == [8]


def test_the_head_runs_on_caption_positions_only():
    """Model seed 6, frames seed 7: as many rows as there are caption tokens and EOS, no padding among them."""
    captioner, rows = make("no write-back", 6), []
    captioner.lm.head.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[:-1].numel()))
    captioner(clips(2, 4, 7), LABELS)
    assert rows == [(LABELS >= 0).sum()]


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 11])
def test_cross_entropy_in_chunks_is_that_of_all_logits(chunk_size, monkeypatch):
    """Reference: F.cross_entropy of all logits. 10 tokens, 7 words, seed 44: loss and gradient within a relative 1e-6.
    No more than chunk_size rows go through the head at once."""
    monkeypatch.setattr(caption_loss, "LOGITS_PER_CHUNK", 7 * chunk_size)
    torch.manual_seed(44)
    head, ids, rows = torch.nn.Linear(5, 7, bias=False).requires_grad_(False), torch.randint(7, (10,)), []
    x = torch.randn(10, 5, requires_grad=True)
    expected = F.cross_entropy(head(x), ids, reduction="sum")
    head.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    found = caption_loss.FrozenHeadCrossEntropy.apply(x, ids, head, 7)
    assert sum(rows) == 10 and max(rows) == min(chunk_size, 10)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(3 * loss, x)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert caption_loss.FrozenHeadCrossEntropy.apply(x, ids, head, 7) == found


@every_config
def test_a_step_does_not_wait_for_the_device(name):
    """The meta device, which has no numbers, raises where any would be read back. Labels are on the CPU."""
    captioner = make(name).to("meta")
    loss = captioner(clips(2, 4, 45).to("meta"), LABELS)
    loss.backward()
    assert loss.device.type == "meta" and all(p.grad is not None for p in captioner.trained().values())


# --------------------------------------------------------------------------------------- precision, compiling


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "full"])
def test_only_frozen_weights_are_bf16(name):
    """Model seed 40, frames seed 41: loss within 2 % of fp32's, gradients of the trained fp32 tensors point the same
    way (cosine above 0.95 for those whose gradient is not rounding alone)."""
    full, half, frames = make(name, 40), make(name, 40, dtype=torch.bfloat16), clips(2, 4, 41)
    half.load_state_dict(full.state_dict())
    assert {p.dtype for key, p in half.named_parameters() if key in half.trained()} == {torch.float32}
    assert {p.dtype for key, p in half.named_parameters() if key not in half.trained()} == {torch.bfloat16}
    losses = [captioner(frames, LABELS) for captioner in (full, half)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert losses[0] != losses[1] and losses[1].dtype == torch.float32
    found, expected = (gradients(captioner, lambda c=captioner: c(frames, LABELS)) for captioner in (half, full))
    largest = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in expected.items():
        assert found[key].dtype == torch.float32
        if gradient.abs().max() > 1e-2 * largest:
            assert F.cosine_similarity(found[key].flatten(), gradient.flatten(), dim=0) > 0.95, key


def test_the_loss_on_block_outputs_is_that_on_frames():
    """Model seed 42, frames seed 43: in bf16 the two are equal bit for bit."""
    captioner = make("no write-back", 42, dtype=torch.bfloat16)
    frames = clips(2, 4, 43)
    outputs = captioner.block_outputs(frames)
    assert outputs.dtype == torch.bfloat16
    assert captioner(outputs, LABELS) == captioner(frames, LABELS)


@pytest.mark.parametrize("name", ["no write-back", "write-back", "lora-lm"])
def test_compiling_changes_neither_names_nor_results(name, tmp_path):
    """Model seed 44, frames seed 45; dynamo's capture, run eagerly. Loss and gradients within 1e-5; the same file."""
    plain, compiled, frames = make(name, 44), make(name, 44), clips(2, 4, 45)
    names = list(compiled.state_dict())
    compiled.compile_blocks(backend="eager")
    torch.testing.assert_close(compiled(frames, LABELS), plain(frames, LABELS), rtol=1e-5, atol=0)
    found, expected = (gradients(one, lambda one=one: one(frames, LABELS)) for one in (compiled, plain))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)
    assert list(compiled.state_dict()) == names and compiled.trained().keys() == plain.trained().keys()
    for captioner, file in ((plain, "a"), (compiled, "b")):
        captioner.save(tmp_path / file, {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert compiled.caption(frames, 6) == plain.caption(frames, 6)


# ---------------------------------------------------------------------------- what is trained


def expected_names(name: str, captioner: Captioner) -> set[str]:
    """The trained tensors, spelled out."""
    connector = {"connector.weight", "connector.bias"}
    if name == "full":
        return set(dict(captioner.named_parameters()))
    if name == "linear":
        return connector | {"time_embed"}
    if name in ("lora", "lora-lm"):
        blocks = [f"vit.blocks.{i}" for i in range(DEPTH)]
        if name == "lora-lm":
            blocks = [f"lm.blocks.{i}" for i in range(len(captioner.lm.blocks))]
        layers = [f"{block}.attn.{x}" for block in blocks for x in "qv"]
        return connector | {"time_embed"} | {f"{layer}.lora_{x}" for layer in layers for x in "ab"}
    if name == "prompt":
        return connector | {"time_embed"} | {f"vit.blocks.{i}.prompts" for i in range(DEPTH)}
    if name == "adapter":
        layers = [f"vit.blocks.{i}.mlp.adapter_{layer}" for i in range(DEPTH) for layer in ("down", "up")]
        return connector | {"time_embed"} | {f"{layer}.{x}" for layer in layers for x in ("weight", "bias")}
    config = CONFIGS[name]
    names = connector | {f"adapter.{x}" for x in ("queries", "time_embed", "norm.weight", "norm.bias")}
    adapted = config.last_blocks or DEPTH
    for i in range(adapted):
        parts = ["norm.weight", "norm.bias", "q.weight", "kv.weight", "kv_change.weight", "o.weight"]
        parts += ["gate.weight", "gate.bias"] if config.gate != "none" else []
        parts += [f"write_{x}.weight" for x in ("q", "kv", "o")] if config.write_back and i < adapted - 1 else []
        names |= {f"adapter.blocks.{i}.{part}" for part in parts}
    return names


@every_config
@pytest.mark.parametrize("tied", [False, True])
def test_training_changes_the_trained_tensors_and_no_bit_of_others(name, tied):
    """Model seed 8, frames seeds 9 to 11, from the true initialisation: three steps of AdamW with weight decay.

    The optimizer is given every parameter of the model, so only the absence of a gradient protects the frozen ones.
    """
    captioner = make(name, 8, tied, randomized=False)
    expected, before = expected_names(name, captioner), bits(dict(captioner.named_parameters()))
    assert captioner.trained().keys() == expected
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        (captioner(clips(2, 4, 9 + step), LABELS) / 55).backward()
        assert {key for key, p in captioner.named_parameters() if p.grad is not None} == expected
        optimizer.step()
    assert changed(captioner, before) == expected


def test_full_trains_every_tensor_of_both_models():
    """Model seed 0: no tensor is left out; a tied head counts once."""
    for tied in (False, True):
        captioner = make("full", tied=tied)
        assert all(p.requires_grad for p in captioner.parameters())
        assert ("lm.head.weight" in captioner.trained()) != tied
        assert {"vit.cls", "vit.post_norm.bias", "lm.embed.weight", "time_embed"} <= captioner.trained().keys()


def write_backbones(folder: Path, captioner: Captioner) -> None:
    """Writes the two models of a captioner as public folders."""
    vit, lm = captioner.vit.config, captioner.lm.config
    configs = {
        "vit": {"model_type": "clip_vision_model", "image_size": vit.image_size, "patch_size": vit.patch_size,
                "hidden_size": vit.width, "num_hidden_layers": vit.depth, "num_attention_heads": vit.heads,
                "intermediate_size": vit.mlp_width},
        "lm": {"model_type": "llama", "vocab_size": lm.vocab, "hidden_size": lm.width, "num_hidden_layers": lm.depth,
               "num_attention_heads": lm.heads, "num_key_value_heads": lm.kv_heads, "head_dim": lm.head_width,
               "intermediate_size": lm.mlp_width, "max_position_embeddings": lm.max_positions},
    }  # fmt: skip
    names_of_both = tensor_names(captioner.vit, CLIP, "vision_model."), lm_tensor_names(captioner.lm)
    for name, module, names in zip(("vit", "lm"), (captioner.vit, captioner.lm), names_of_both, strict=True):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(configs[name]))
        tensors = {names[key]: tensor for key, tensor in module.state_dict().items() if key in names}
        write_safetensors(folder / name / "model.safetensors", tensors)


@every_config
def test_training_changes_no_file_of_the_backbones(name, tmp_path):
    """Model seed 25, frames seeds 26 to 28. Parameters are mapped from the files: `full` must not write there."""
    write_backbones(tmp_path, make("linear", 25))
    files = [tmp_path / part / "model.safetensors" for part in ("vit", "lm")]
    before = [sha256_of(file) for file in files]
    vit, lm = ViT.from_pretrained(tmp_path / "vit"), CausalLM.from_pretrained(tmp_path / "lm")
    captioner = Captioner(vit, lm, Letters(), CONFIGS[name])
    optimizer = torch.optim.AdamW(captioner.trained().values(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        captioner(clips(2, 4, 26 + step), LABELS).backward()
        optimizer.step()
    assert [sha256_of(file) for file in files] == before
    names_of_both = tensor_names(vit, CLIP, "vision_model."), lm_tensor_names(lm)
    for file, module, names in zip(files, (vit, lm), names_of_both, strict=True):
        stored, current = read_safetensors(file), dict(module.named_parameters())
        equal = {torch.equal(current[key].view(torch.int32), stored[names[key]].view(torch.int32)) for key in names}
        assert equal == {name != "full"}


@every_config
def test_frozen_models_stay_in_eval_mode(name):
    captioner = make(name)
    captioner.train()
    for part in (captioner.vit, captioner.lm):
        assert {module.training for module in part.modules()} == {name == "full"}
    assert captioner.connector.training
    assert not any(module.training for module in captioner.eval().modules())


def test_which_methods_keep_activations_of_the_vit():
    """Model seed 12, frames seed 13: linear and the adapter keep none of a ViT block; all keep those of the LM."""
    for name, requires_grad in (("no write-back", False), ("linear", False), ("lora", True), ("full", True),
                                ("adapter", True), ("prompt", True)):  # fmt: skip
        captioner, outputs = make(name, 12), []
        captioner.vit.blocks[-1].register_forward_hook(lambda _m, _i, output, s=outputs: s.append(output.requires_grad))
        captioner.lm.blocks[-1].register_forward_hook(lambda _m, _i, output, s=outputs: s.append(output.requires_grad))
        captioner(clips(2, 4, 13), LABELS)
        assert outputs == [requires_grad, True], name


# ------------------------------------------------------------------------------------- visual tokens


@every_config
@pytest.mark.parametrize("frames", [1, 4, 8, 32])
def test_the_number_of_visual_tokens(name, frames):
    """Model seed 14, frames seed 15: N for the adapter, T for the other methods."""
    captioner = make(name, 14)
    count = 5 if CONFIGS[name].method == "qadapter" else frames
    assert captioner.encode(clips(2, frames, 15))[0].shape == (2, count, 20)


@pytest.mark.parametrize("name", ["linear", "lora", "adapter", "prompt", "full"])
def test_the_visual_tokens_of_the_other_methods(name):
    """Model seed 16, frames seed 17, tolerance 1e-5: connector(pooled + E) at the embeddings' scale, frame by frame."""
    captioner, frames = make(name, 16), clips(2, 4, 17)
    found = captioner.encode(frames)[0]
    scale = captioner.lm.embed.weight.square().mean().sqrt()
    for b in range(2):
        for t in range(4):
            z = captioner.vit.run_blocks(captioner.vit.normalize(frames[b, t : t + 1]))
            feature = captioner.vit.pool(z)[0] + captioner.time_embed[t]
            torch.testing.assert_close(found[b, t], captioner.connector(feature) * scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "lora"])
@pytest.mark.parametrize("grid", [1, 2])
def test_patches_as_visual_tokens(name, grid):
    """Model seed 16, frames seed 17, tolerance 1e-5: connector(mean of normed patches + E) for each square of a frame,
    row by row, frame by frame."""
    captioner, frames = make(name, 16, grid=grid), clips(2, 4, 17)
    found = captioner.encode(frames)[0]
    scale, vit, side = captioner.lm.embed.weight.square().mean().sqrt(), captioner.vit, captioner.vit.config.grid
    assert found.shape[1] == captioner.num_visual_tokens(4) == 4 * grid * grid and side % grid == 0
    for b in range(2):
        expected = []
        for t in range(4):
            z = vit.run_blocks(vit.normalize(frames[b, t : t + 1]))[0]  # (P, D)
            patches = vit.post_norm(z[len(z) - side * side :]).view(side, side, -1)
            step = side // grid
            for i in range(0, side, step):
                for j in range(0, side, step):
                    feature = patches[i : i + step, j : j + step].mean((0, 1)) + captioner.time_embed[t]
                    expected.append(captioner.connector(feature) * scale)
        torch.testing.assert_close(found[b], torch.stack(expected), rtol=0, atol=1e-5)


@every_config
def test_the_prefix_is_bos_then_visual_tokens_then_the_prompt(name):
    """Model seed 18, frames seed 19, bit for bit."""
    captioner, frames = make(name, 18), clips(2, 4, 19)
    visual, prefix = captioner.encode(frames)[0], captioner.prefix(frames)
    embed, prompt = captioner.lm.embed.weight, Letters().encode("a video of")
    assert prefix.shape[1] == 1 + visual.shape[1] + len(prompt)
    for row, tokens in zip(prefix, visual, strict=True):
        assert torch.equal(row, torch.cat([embed[1:2], tokens, embed[prompt]]))


def test_without_bos_the_visual_tokens_come_first():
    """Model seed 18, frames seed 19, bit for bit: Qwen's tokenizers have no BOS."""
    captioner, frames = make("linear", 18), clips(2, 4, 19)
    expected, captioner.tokenizer.bos_id = captioner.prefix(frames)[:, 1:], lambda: -1
    captioner = Captioner(captioner.vit, captioner.lm, captioner.tokenizer, captioner.config)
    captioner.load_state_dict(make("linear", 18).state_dict())
    assert torch.equal(captioner.prefix(frames), expected)
    assert captioner.prefix_length(4) == expected.shape[1]
    assert captioner(frames, LABELS).isfinite()


@every_config
def test_captions_are_greedy_text_after_the_prefix(name):
    """Model seed 35, frames seed 21: that of the naive decoder, and the same for each clip alone.

    Clips of four brightnesses and large attention weights, so that the random model's captions differ.
    """
    captioner, frames = make(name, 35), clips(4, 4, 21)
    for i in range(4):
        frames[i, :, :i] //= 4
        frames[i, :, i:] |= 128
    with torch.no_grad():
        for block in captioner.lm.blocks:
            block.attn.q.weight *= 5
            block.attn.o.weight *= 5
        expected = Letters().decode(naive_generate(captioner.lm, captioner.prefix(frames), 12, EOS))
    assert captioner.caption(frames, 12) == expected
    assert [captioner.caption(clip[None], 12)[0] for clip in frames] == expected
    assert len(set(expected)) >= 3
    prefixes = captioner.prefix(frames)
    expected = [naive_beam_search(captioner.lm, prefix, 6, 3, 2.0, EOS) for prefix in prefixes]
    assert captioner.caption(frames, 6, beams=3, length_penalty=2.0) == Letters().decode(expected)
    expected = generate(captioner.lm, prefixes, 12, 12)
    assert captioner.caption(frames, 12, min_new_tokens=12) == Letters().decode(expected)


# ------------------------------------------------------------------------------------------ files


@every_config
def test_save_and_load(name, tmp_path):
    """Model seeds 22 and 23 for what is trained, one backbone; bit for bit: tensors, loss, captions, metadata."""
    ours, path, frames = make(name, 22), tmp_path / "adapter.safetensors", clips(2, 4, 24)
    ours.save(path, {"method": name})
    assert read_safetensors(path).keys() == ours.saved().keys()
    assert read_metadata(path) == {"method": name}
    other = make(name, 22)
    with torch.no_grad():
        torch.manual_seed(23)
        for tensor in other.saved().values():
            tensor.add_(torch.rand_like(tensor))
    assert changed(other, bits(dict(ours.named_parameters()))) == ours.trained().keys()
    other.load(path)
    assert not changed(other, bits(dict(ours.named_parameters())))
    assert all(torch.equal(tensor, other.saved()[name]) for name, tensor in ours.saved().items())
    with torch.no_grad():
        assert torch.equal(other(frames, LABELS), ours(frames, LABELS))
    assert other.caption(frames) == ours.caption(frames)
    assert all(p.requires_grad for p in other.trained().values())


def test_files_of_version_0_4_have_no_channel_statistics(tmp_path):
    """They load with m = 0 and s = 1, with which the adapter was trained. Some of the statistics are not enough."""
    name = next(name for name, config in CONFIGS.items() if config.method == "qadapter")
    ours, captioner, path = make(name, 22), make(name, 23), tmp_path / "adapter.safetensors"
    write_safetensors(path, ours.trained(), {})
    captioner.load(path)
    assert all(torch.equal(tensor, captioner.trained()[name]) for name, tensor in ours.trained().items())
    assert all(not block.mean.any() and block.std.eq(1).all() for block in captioner.adapter.blocks)
    write_safetensors(path, ours.trained() | {"adapter.blocks.0.mean": torch.zeros(24)}, {})
    assert_refused(captioner, path, "adapter.blocks")


def test_statistics_of_frames_are_those_of_their_block_outputs():
    """Both are given to the same captioner; tolerance 2e-2: block outputs are rounded to bf16. Model seed 22."""
    name = next(name for name, config in CONFIGS.items() if config.method == "qadapter")
    captioner, frames = make(name, 22), clips(3, 4, 24)
    captioner.measure_channels(frames)
    measured = [buffer.clone() for buffer in captioner.adapter.buffers()]
    captioner.measure_channels(captioner.block_outputs(frames))
    assert measured[0].abs().max() > 0.1
    torch.testing.assert_close(measured, list(captioner.adapter.buffers()), rtol=2e-2, atol=2e-2)


def assert_refused(captioner: Captioner, path, *words: str) -> None:
    """Loading raises an InputError of one line that names the file and holds the words; nothing changes."""
    before = bits(dict(captioner.named_parameters()))
    with pytest.raises(InputError) as error:
        captioner.load(path)
    text = str(error.value)
    assert text.isprintable(), text
    for word in (str(path), *words):
        assert word in text, text
    assert not changed(captioner, before)


@every_config
def test_a_file_of_another_method_is_refused(name, tmp_path):
    for other in CONFIGS.keys() - {name}:
        path = tmp_path / f"{other}.safetensors"
        make(other).save(path, {})
        assert_refused(make(name), path, "tensors")


@every_config
def test_a_missing_extra_or_misshapen_tensor_is_refused(name, tmp_path):
    captioner, path = make(name), tmp_path / "adapter.safetensors"
    good = {key: p.detach() for key, p in captioner.saved().items()}
    write_safetensors(path, {key: t for key, t in good.items() if key != "connector.bias"})
    assert_refused(captioner, path, "connector.bias")
    write_safetensors(path, good | {"connector.scale": torch.ones(1)})
    assert_refused(captioner, path, "connector.scale")
    write_safetensors(path, good | {"connector.weight": torch.zeros(20, 25)})
    assert_refused(captioner, path, "connector.weight", "[20, 25]", "[20, 24]")


def test_a_missing_or_broken_file_is_refused(tmp_path):
    assert_refused(make("linear"), tmp_path / "none.safetensors")
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"\x00" * 7)
    assert_refused(make("linear"), path)
