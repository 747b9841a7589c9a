"""The captioner on multimodal language models (MLLMs): tiny random ones of three layouts.

References: `MLLM.embed`, which tests/models/test_mllm.py holds equal to transformers; plain loops; and the frozen
models' own tensors, compared bit for bit. The tokenizer is a stub: a letter is a token.
"""

import pytest
import torch

from common.errors import InputError
from model import AdapterConfig, Captioner, average_grid
from models.lm import LMConfig
from models.mllm import MLLM, MLLMConfig
from models.safetensors import write_safetensors
from models.vit import ViTConfig

LETTERS, EOS, IMAGE, WIDTH = " abcdefghijklmnopqrstuvwxyz:\n.", 2, 39, 20
VIT = ViTConfig(image_size=16, patch_size=4, width=24, depth=3, heads=2, mlp_width=32, activation="gelu",
                norm_eps=1e-5)  # fmt: skip
LM = LMConfig(vocab=40, width=WIDTH, depth=2, heads=2, kv_heads=1, head_width=10, mlp_width=32, rope_theta=1e4,
              norm_eps=1e-5, max_positions=200, tied=True, bos_id=1, eos_id=EOS)  # fmt: skip
SIGLIP = dict(class_token=False, pre_norm=False, patch_bias=True)
LAYOUTS = {  # 16 patches a frame, and 16, 4, 17 and 4 visual tokens
    "llava": MLLMConfig("llava", ViTConfig(**vars(VIT)), LM, "clip", "llama", IMAGE),
    "llava_onevision": MLLMConfig(
        "llava_onevision", ViTConfig(**vars(VIT) | SIGLIP), LM, "siglip", "qwen2", IMAGE),
    "class token": MLLMConfig("llava", ViTConfig(**vars(VIT)), LM, "clip", "llama", IMAGE, class_token=True),
    "smolvlm": MLLMConfig(
        "smolvlm", ViTConfig(**vars(VIT) | SIGLIP | {"final_norm": True}), LM, "idefics3", "llama", IMAGE, shuffle=2),
}  # fmt: skip
TOKENS = {"llava": 16, "llava_onevision": 4, "class token": 17, "smolvlm": 4}
SMALL = dict(queries=5, rank=8, frames=3, last_blocks=2)
CONFIGS = {
    "none": AdapterConfig(method="none", frames=3),
    "linear": AdapterConfig(method="linear", frames=3),
    "lora": AdapterConfig(method="lora", rank=2, frames=3),
    "lora-lm": AdapterConfig(method="lora-lm", rank=2, frames=3),
    "adapter": AdapterConfig(method="adapter", rank=2, frames=3),
    "full": AdapterConfig(method="full", frames=3),
    "queries": AdapterConfig(**SMALL),
    "queries, write-back": AdapterConfig(**SMALL, write_back=True),
    "frames": AdapterConfig(**SMALL, visual="frames", write_back=True),
    "both": AdapterConfig(**SMALL, visual="both"),
    "both, write-back": AdapterConfig(**SMALL, visual="both", write_back=True),
}
LIKE_THE_MLLM = ["linear", "lora", "lora-lm", "adapter", "full", "frames"]  # at step 0
CACHEABLE = ["none", "linear", "lora-lm", "queries", "both"]
LABELS = torch.tensor([[[3, 4, EOS], [5, EOS, -100]], [[6, EOS, -100], [7, 8, EOS]]])
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_config = pytest.mark.parametrize("name", CONFIGS)


class Letters:
    """A letter is a token, 5 + its place; it stands for itself and for a sentencepiece processor."""

    def __init__(self):
        self.processor = self

    def encode(self, text: str) -> list[int]:
        return [5 + max(0, LETTERS.find(letter.lower())) for letter in text]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(LETTERS[i - 5] for i in ids if 5 <= i < 5 + len(LETTERS)) for ids in rows]

    def bos_id(self) -> int:
        return 1


@pytest.fixture(autouse=True)
def prompt_of_letters(monkeypatch):
    """Prompts as texts of letters: those of Qwen and SmolVLM need tokens that the stub lacks."""

    def prompt(self, tokenizer, frames: int, instruction: str) -> list[list[int]]:
        texts = ["user:", *[f"{i}." for i in range(frames - 1)], instruction]
        return [tokenizer.encode(text) for text in texts]

    monkeypatch.setattr(MLLM, "prompt", prompt)


def clips(count: int, frames: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, 3, 16, 16), generator=generator, dtype=torch.uint8)


def make(layout: str, name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Captioner:
    """A captioner on a random MLLM, which depends on the layout and the seed only."""
    torch.manual_seed(seed)
    mllm = MLLM(LAYOUTS[layout]).to(dtype)
    with torch.no_grad():
        for parameter in mllm.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return Captioner(mllm.vit, mllm.lm, Letters(), CONFIGS[name], mllm)


def perturb(captioner: Captioner, seed: int) -> Captioner:
    """Adds noise to what is trained, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in captioner.trained().values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return captioner


def bits(captioner: Captioner) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in captioner.named_parameters()}


# ------------------------------------------------------------------ what the language model reads


@every_layout
def test_without_training_the_prefix_is_the_input_of_the_mllm(layout):
    """Model seed 1, frames seed 2, within 1e-6. Reference: `MLLM.embed` of ids with image tokens in place."""
    captioner, frames = make(layout, "none", 1), clips(1, 3, 2)
    newline = [IMAGE] if layout == "llava_onevision" else []
    first, *rest = captioner.mllm.prompt(Letters(), 3, captioner.config.instruction)
    ids = first + sum(([IMAGE] * TOKENS[layout] + newline * (i == 2) + text for i, text in enumerate(rest)), [])
    pixels = captioner.vit.normalize(frames[0])
    expected = captioner.mllm.embed(torch.tensor([ids]), pixels)
    torch.testing.assert_close(captioner.prefix(frames), expected, rtol=0, atol=1e-6)
    assert captioner.prefix_length(3) == len(ids)


@every_layout
@pytest.mark.parametrize("name", LIKE_THE_MLLM)
def test_step_0_is_the_mllm(layout, name):
    """Model seed 3, frames seed 4, bit for bit, with gradients; a perturbed captioner differs."""
    captioner, frames = make(layout, name, 3), clips(2, 3, 4)
    with torch.no_grad():
        expected = make(layout, "none", 3)(frames, LABELS)
    assert captioner(frames, LABELS) == expected
    assert captioner.caption(frames, 5) == make(layout, "none", 3).caption(frames, 5)
    assert abs(perturb(captioner, 5)(frames, LABELS) - expected) > 1e-3


@every_layout
def test_queries_stand_in_place_of_an_image(layout):
    """Model seed 6, frames seed 7, bit for bit: LLaVA's projector maps them, else a connector of their own."""
    captioner, frames = perturb(make(layout, "queries", 6), 8), clips(2, 3, 7)
    pixels = captioner.vit.normalize(frames)
    with torch.no_grad():
        queries = captioner.adapter(captioner.vit, pixels)
        if layout == "smolvlm":
            expected = captioner.connector(queries) * captioner.lm.embedding_rms()
        else:
            expected = captioner.mllm.projector(queries)
        assert (captioner.connector is None) == (layout != "smolvlm")
        (found,) = captioner.encode(frames)
    assert torch.equal(found, expected)
    before, after = captioner.mllm.prompt(Letters(), 1, captioner.config.instruction)
    prefix = captioner.prefix(frames)
    start = len(before)
    assert torch.equal(prefix[:, start : start + 5], expected) and captioner.prefix_length(3) == prefix.shape[1]
    assert torch.equal(prefix[0, -len(after) :], captioner.lm.embed(torch.tensor(after)))


@every_layout
@pytest.mark.parametrize("name", ["both", "both, write-back"])
def test_with_both_the_queries_follow_the_last_frame(layout, name):
    """Model seed 9, frames seed 10, bit for bit."""
    captioner, frames = perturb(make(layout, name, 9), 11), clips(2, 3, 10)
    groups = captioner.encode(frames)
    count = TOKENS[layout]
    assert [group.shape for group in groups] == [(2, count, WIDTH)] * 2 + [(2, count + 5, WIDTH)]
    queries, z = captioner.look(frames)
    assert torch.equal(groups[2][:, count:], captioner.project_queries(queries))
    tokens = captioner.mllm.connect(captioner.vit.finish(z[:, 2]))
    torch.testing.assert_close(groups[2][:, :count], tokens, rtol=0, atol=1e-6)
    assert captioner.num_visual_tokens(3) == 3 * count + 5
    assert captioner.prefix(frames).shape[1] == captioner.prefix_length(3)


@every_layout
@pytest.mark.parametrize("name", ["both", "both, write-back"])
def test_with_both_the_queries_start_as_zeros_behind_the_frames(layout, name):
    """Model seed 30, frames seed 31, bit for bit: the groups of `--method none`, and zeros behind the last."""
    captioner, frames = make(layout, name, 30), clips(2, 3, 31)
    groups, expected = captioner.encode(frames), make(layout, "none", 30).encode(frames)
    count = TOKENS[layout]
    for group, tokens in zip(groups, expected, strict=True):
        assert torch.equal(group[:, :count], tokens) and not group[:, count:].any()
    assert captioner.query_scale.item() == 0


def test_an_adapter_without_the_scale_of_the_queries_is_read_with_1(tmp_path):
    """Model seed 32: version 0.6 had none."""
    captioner = perturb(make("llava", "both", 32), 33)
    write_safetensors(tmp_path / "old", {k: v for k, v in captioner.saved().items() if k != "query_scale"})
    captioner.load(tmp_path / "old")
    assert captioner.query_scale.item() == 1


def test_linear_adds_a_layer_of_tokens_and_times():
    """Model seed 26, frames seed 27, within 1e-5. Reference: a loop over clips, frames and tokens."""
    captioner, frames = perturb(make("llava", "linear", 26), 28), clips(2, 3, 27)
    groups, scale = captioner.encode(frames), captioner.lm.embedding_rms()
    tokens = captioner.mllm.image_tokens(captioner.vit.normalize(frames).flatten(0, 1)).unflatten(0, (2, 3))
    weight, bias = captioner.connector.weight, captioner.connector.bias
    for b in range(2):
        for t in range(3):
            for n in range(16):
                added = weight @ (tokens[b, t, n] / scale + captioner.time_embed[t]) + bias
                expected = tokens[b, t, n] + scale * added
                torch.testing.assert_close(groups[t][b, n], expected, rtol=0, atol=1e-5)


def test_the_instruction_is_that_of_the_config():
    """Model seed 29: the text after the last frame."""
    whole = make("llava", "none", 29)
    config = AdapterConfig(method="none", frames=3, instruction="name it")
    captioner = Captioner(whole.vit, whole.lm, Letters(), config, whole.mllm)
    assert captioner.texts(3)[-1].tolist() == Letters().encode("name it") != whole.texts(3)[-1].tolist()


def test_write_back_reaches_the_tokens_of_every_frame():
    """Model seed 12, frames seed 13: what is written after the last block alone changes what is read of each frame."""
    captioner, frames = make("llava", "frames", 12), clips(1, 3, 13)
    expected = captioner.encode(frames)
    with torch.no_grad():
        captioner.adapter.blocks[-1].write_o.weight += 0.1
    for found, before in zip(captioner.encode(frames), expected, strict=True):
        assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize("side,grid", [(4, 2), (4, 3), (5, 2), (3, 3), (4, 1)])
def test_tokens_are_averaged_on_their_grid(side, grid):
    """Tokens seed 14, within 1e-6. Reference: plain loops over cells from floor(i side / g) to ceil((i+1) side / g)."""
    tokens = torch.randn(2, 3, side * side, 4, generator=torch.Generator().manual_seed(14))
    found = average_grid(tokens, grid)
    square = tokens.unflatten(2, (side, side))
    edges = [(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
    expected = [square[:, :, a:b, c:d].mean((2, 3)) for a, b in edges for c, d in edges]
    torch.testing.assert_close(found, torch.stack(expected, dim=2), rtol=0, atol=1e-6)


def test_a_grid_shortens_the_prefix():
    """Model seed 15, frames seed 16: 4 tokens a frame in place of 16, and they are averages."""
    whole = make("llava", "none", 15)
    config = AdapterConfig(method="none", frames=3, grid=2)
    small, frames = Captioner(whole.vit, whole.lm, Letters(), config, whole.mllm), clips(1, 3, 16)
    groups = small.encode(frames)
    assert [group.shape[1] for group in groups] == [4] * 3
    torch.testing.assert_close(groups[1], average_grid(whole.encode(frames)[1][:, None], 2)[:, 0], rtol=0, atol=1e-6)
    assert small.prefix_length(3) == whole.prefix_length(3) - 36 == small.prefix(frames).shape[1]


# ---------------------------------------------------------------------------- what is trained


def expected_names(layout: str, name: str, captioner: Captioner) -> set[str]:
    """The trained tensors, spelled out."""
    if name == "full":
        return {key for key, _ in captioner.named_parameters()}
    if name == "none":
        return set()
    if name == "linear":
        return {"time_embed", "connector.weight", "connector.bias"}
    if name.startswith("lora"):
        blocks = [f"vit.blocks.{i}" for i in range(3)] if name == "lora" else [f"lm.blocks.{i}" for i in range(2)]
        return {f"{block}.attn.{x}.lora_{y}" for block in blocks for x in "qv" for y in "ab"}
    if name == "adapter":
        layers = [f"vit.blocks.{i}.mlp.adapter_{layer}" for i in range(3) for layer in ("down", "up")]
        return {f"{layer}.{x}" for layer in layers for x in ("weight", "bias")}
    names = {f"adapter.{key}" for key, _ in captioner.adapter.named_parameters()}
    if name == "frames":  # queries are only written
        names -= {"adapter.norm.weight", "adapter.norm.bias"}
    has_connector = layout == "smolvlm" and name != "frames"
    names |= {"connector.weight", "connector.bias"} if has_connector else set()
    return names | ({"query_scale"} if name.startswith("both") else set())


@every_layout
@every_config
def test_training_changes_what_is_trained_and_no_bit_of_the_rest(layout, name):
    """Model seed 17, frames seeds 18 and 19, from the true initialisation: steps of AdamW over all parameters.

    The optimizer is given every parameter, so only the absence of a gradient protects the frozen ones. LLaVA does not
    read the ViT's last norm.
    """
    captioner = make(layout, name, 17)
    expected, before = expected_names(layout, name, captioner), bits(captioner)
    assert captioner.trained().keys() == expected
    if name == "none":
        return
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-2, weight_decay=0)
    for step in range(2):
        optimizer.zero_grad()
        (captioner(clips(2, 3, 18 + step), LABELS) / 10).backward()
        optimizer.step()
    changed = {key for key, content in bits(captioner).items() if content != before[key]}
    unread = {"vit.post_norm.weight", "vit.post_norm.bias"} if name == "full" and layout != "smolvlm" else set()
    assert changed == expected - unread
    assert not any(module.training for module in (captioner.vit, captioner.lm, captioner.mllm)) or name == "full"


@every_layout
@pytest.mark.parametrize("name", CACHEABLE)
def test_the_loss_on_block_outputs_is_that_on_frames(layout, name):
    """Model seed 20, frames seed 21: in bf16 the two are equal bit for bit, and so are captions."""
    captioner, frames = perturb(make(layout, name, 20, torch.bfloat16), 22), clips(2, 3, 21)
    outputs = captioner.block_outputs(frames)
    assert outputs.dtype == torch.bfloat16 and outputs.shape == (2, *captioner.block_outputs_shape(3))
    assert captioner.config.vit_unchanged
    with torch.no_grad():
        assert captioner(outputs, LABELS) == captioner(frames, LABELS)
    assert captioner.caption(outputs, 5) == captioner.caption(frames, 5)


@every_config
def test_saving_and_loading_restores_what_is_trained(name, tmp_path):
    """Model seed 23, frames seed 24: another captioner of the same MLLM gives the same loss, bit for bit."""
    captioner, frames = perturb(make("smolvlm", name, 23), 25), clips(2, 3, 24)
    captioner.save(tmp_path / "adapter.safetensors", {})
    other = make("smolvlm", name, 23)
    other.load(tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert other(frames, LABELS) == captioner(frames, LABELS)


@every_config
def test_the_table_counts_each_parameter_once(name):
    """Reference: the captioner's parameters, counted by torch."""
    captioner = make("llava_onevision", name)
    total = sum(p.numel() for p in captioner.parameters())
    trained = sum(p.numel() for p in captioner.trained().values())
    *_, last = captioner.parameter_table().splitlines()
    assert last.split()[1:3] == [f"{trained:,}", f"{total:,}"]


# ---------------------------------------------------------------------------- refusals


def refused_config(layout: str | None, **fields) -> str:
    whole = make(layout or "llava", "none")
    with pytest.raises(InputError) as error:
        Captioner(whole.vit, whole.lm, Letters(), AdapterConfig(frames=3, **fields), whole.mllm if layout else None)
    return str(error.value)


def test_what_does_not_fit_is_refused():
    assert "--grid 5: expected at most 4, the side" in refused_config("llava", method="none", grid=5)
    assert "--grid 2: expected 0, this MLLM's tokens" in refused_config("class token", method="none", grid=2)
    assert "--visual: expected an --mllm" in refused_config(None, visual="both")
    assert "--grid 5: expected at most 4, the side" in refused_config(None, method="linear", grid=5)
    assert "--grid 1: expected 0, no frames are read" in refused_config(None, method="none", grid=1)
    assert "--grid 1: expected 0, no frames are read" in refused_config(None, grid=1)
    assert "--visual frames: expected --write-back" in refused_config("llava", visual="frames")
    assert "positions, the language model has 200" in refused_config("llava", visual="both", queries=100)
