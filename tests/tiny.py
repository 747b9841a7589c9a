"""Tiny random models of every kind for tests: nothing is downloaded, and a letter is a token."""

from dataclasses import replace

import torch

from common.config import Config
from model import Captioner, variant_of
from models.internvl import InternVL
from models.llava import LLaVA, OneVision
from models.lm import CausalLM, LMConfig
from models.mllm import MLLMConfig
from models.pair import Pair
from models.qwen3_vl import Qwen3VL
from models.smolvlm import SmolVLM
from models.vit import ViT, ViTConfig

LETTERS, EOS, IGNORE = " abcdefghijklmnopqrstuvwxyz:.", 2, -100
SIDE, WIDTH, LM_WIDTH, DEPTH, T, N = 16, 24, 20, 3, 4, 5  # of the ViT: 17 tokens of 4 x 4 pixels
VIT = ViTConfig(image_size=SIDE, patch_size=4, width=WIDTH, depth=DEPTH, heads=3, mlp_width=32,
                activation="quick_gelu", norm_eps=1e-5)
LM = LMConfig(vocab=40, width=LM_WIDTH, depth=2, heads=4, kv_heads=2, head_width=6, mlp_width=28, rope_theta=10000.0,
              norm_eps=1e-5, max_positions=300, tied=False, bos_id=1, eos_ids=(EOS,))
NO_CLASS_TOKEN = replace(VIT, class_token=False, pre_norm=False, patch_bias=True)
INTERNVIT = replace(VIT, pre_norm=False, patch_bias=True, layer_scale=True, post_norm=False, activation="gelu")
MLLMS = {
    "llava": (LLaVA, MLLMConfig(VIT, LM, "llama")),
    "llava_onevision": (OneVision, MLLMConfig(NO_CLASS_TOKEN, LM, "qwen2")),
    "internvl": (InternVL, MLLMConfig(INTERNVIT, LM, "qwen2", shuffle=2)),
    "qwen3_vl": (Qwen3VL, MLLMConfig(replace(NO_CLASS_TOKEN, post_norm=False), replace(LM, mrope=(1, 1, 1)),
                                     "qwen3_vl_text", shuffle=2, deepstack=(1,))),
    "smolvlm": (SmolVLM, MLLMConfig(replace(NO_CLASS_TOKEN, final_norm=True), LM, "llama", shuffle=2)),
}
TOKENS = {"llava": 16, "llava_onevision": 4, "internvl": 4, "qwen3_vl": 4, "smolvlm": 4}  # per frame, or pair
SMALL = dict(queries=N, rank=8, frames=T)
CONFIGS = {
    "no write-back": Config(**SMALL),
    "write-back": Config(**SMALL, write_back=True),
    "last two, no gate": Config(**SMALL, write_back=True, last_blocks=2, gate="none"),
    **{method: Config(method=method, rank=2, queries=2, frames=T)
       for method in ("linear", "lora", "lora-lm", "adapter", "st-adapter", "prompt", "full")},
}
MLLM_CONFIGS = {
    "none": Config(method="none", frames=T),
    "queries": Config(**SMALL, last_blocks=2),
    "queries, write-back": Config(**SMALL, last_blocks=2, write_back=True),
    "frames": Config(**SMALL, last_blocks=2, write_back=True, visual="frames"),
    **{method: CONFIGS[method] for method in ("linear", "lora", "lora-lm", "adapter", "st-adapter", "prompt", "full")},
}


class Letters:
    """The part of a tokenizer that a captioner uses; ids 0 to 2 are unknown, BOS and EOS."""

    start = [1]

    def encode(self, text: str) -> list[int]:
        return [3 + max(0, LETTERS.find(letter.lower())) for letter in text]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(LETTERS[i - 3] if 3 <= i < 3 + len(LETTERS) else "?" for i in row) for row in rows]


def prompt_of_letters(tokenizer: Letters, images: int, times=None) -> list[list[int]]:
    """An MLLM's prompt without the special tokens that the stub lacks: one text more than images, all different."""
    return [tokenizer.encode(text) for text in ("user:", *(f"{'a' * i}." for i in range(images - 1)), "say it")]


def make(name: str, seed: int = 0, mllm: str | None = None, dtype: torch.dtype = torch.float32,
         **fields) -> Captioner:
    """A captioner of a pair or of an MLLM, with some other fields of the Config; its frozen models depend on the seed
    alone. What starts at zero stays there, see `randomize`."""
    torch.manual_seed(seed)
    if mllm is None:
        backbone = Pair(ViT(VIT), CausalLM(LM))
    else:
        layout, config = MLLMS[mllm]
        backbone = layout(config)
        backbone.prompt = lambda tokenizer, frames, times=None: prompt_of_letters(
            tokenizer, backbone.num_images(frames))
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    config = replace((MLLM_CONFIGS if mllm else CONFIGS)[name], **fields)
    return variant_of(Captioner, config)(backbone.to(dtype), Letters(), config)


def frozen_names(name: str, mllm: str | None = None) -> set[str]:
    """The tensors of the models that a method adapts, which stay frozen; `full` freezes none."""
    return set() if name == "full" else {key for key, _ in make("linear", mllm=mllm, method="none").named_parameters()}


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Adds noise to all that is trained, also to what starts at zero, and to m and s, which stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith(("mean", "std")):
                buffer += torch.rand(buffer.shape, generator=generator)


def randomized(name: str, seed: int = 0, *args, **fields) -> Captioner:
    captioner = make(name, seed, *args, **fields)
    randomize(captioner, seed + 100)
    return captioner


def clips(batch: int, frames: int, seed: int) -> torch.Tensor:
    """Frames uint8 (B, T, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, frames, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def labels(*groups: list[str]) -> torch.Tensor:
    """Each clip's captions -> ids (B, K, L), ending in EOS and padded."""
    rows = [torch.tensor([*Letters().encode(text), EOS]) for group in groups for text in group]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE)
    return padded.unflatten(0, (len(groups), -1))


LABELS = labels(["a cat", "two dogs run", ""], ["red", "a red ball moves", "it rolls away"])


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """The dtype, shape and bytes of each tensor: 0.0 and -0.0 differ, and NaN equals itself."""
    return {name: (x.dtype, x.shape, x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            for name, x in tensors.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bits({"": a}) == bits({"": b})


def record_block_outputs(model: torch.nn.Module, run) -> list[torch.Tensor]:
    """The outputs of a model's blocks while `run()` runs."""
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for block in model.blocks]
    run()
    for hook in hooks:
        hook.remove()
    return outputs


def changed_by_training(captioner: Captioner, weight_decay: float) -> set[str]:
    """The parameters that three steps of AdamW change. It gets all of them, so only the absence of a gradient protects
    those that are frozen."""
    everything = dict(captioner.named_parameters())
    before, optimizer = bits(everything), torch.optim.AdamW(captioner.parameters(), lr=1e-2, weight_decay=weight_decay)
    for step in range(3):
        optimizer.zero_grad()
        (captioner(clips(2, T, 10 + step), LABELS) / 10).backward()
        optimizer.step()
    after = bits(everything)
    return {key for key in before if before[key] != after[key]}
