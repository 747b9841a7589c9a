"""Benchmarks of a training step beside a captioner made of transformers' models and peft's LoRA.

Both sides have CLIP ViT-B/16 and Llama-160m with the same random weights, frozen in bf16, and a connector. With LoRA in
the ViT's attention theirs is the same model as `--method lora`, so loss and gradients are compared first. With LoRA in
the language model theirs has less to do: its ViT runs without gradients. Its frames are normalized beforehand, and each
caption has a row of its own.

Letters: B clips, T frames, K captions a clip, L tokens of a caption, S side in pixels, R = B*K rows, C width of the
language model.
"""

import statistics
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import compare_in_turns, elapsed, new_process, peak_memory, release_freed_memory
from bench.models import assert_close, make_clip_b16, make_llama_160m
from model import AdapterConfig, Captioner
from models.lm import CausalLM
from models.vit import ViT
from training.devices import keep_freed_memory
from video_data.batches import IGNORE_INDEX

B, T, K, L, S, RANK = 2, 8, 4, 15, 224, 32
TOKENIZER = SimpleNamespace(bos_id=lambda: 1, encode=lambda text: [10, 11, 12])  # what a captioner needs of one
KINDS = ("ours qadapter", "ours lora", "peft vit", "peft lm")
PAIRS = (("ours qadapter", "peft vit"), ("ours lora", "peft vit"), ("ours qadapter", "peft lm"))


def make_batch(clips: int = B, frames: int = T, captions: int = K) -> tuple[Tensor, Tensor]:
    """-> random frames uint8 (B, T, 3, S, S) and labels (B, K, L)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (clips, frames, 3, S, S), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(3, 32000, (clips, captions, L), generator=generator)


def make_peft_batch(vit: ViT, frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Our batch -> theirs: normalized pixels (R, T, 3, S, S), labels (R, L)."""
    pixels = vit.normalize(frames).to(vit.position.dtype)
    return pixels.repeat_interleave(labels.shape[1], 0), labels.flatten(0, 1)


def make_captioner(vit: ViT, lm: CausalLM, method: str, queries: int = 16) -> Captioner:
    return Captioner(vit, lm, TOKENIZER, AdapterConfig(method, rank=RANK, frames=T, queries=queries))


class PeftCaptioner(nn.Module):
    """Theirs. The model `adapted`, "vit" or "lm", has LoRA in its queries and values."""

    def __init__(self, vit: nn.Module, lm: nn.Module, adapted: str):
        from peft import LoraConfig, get_peft_model

        super().__init__()
        self.adapted, self.vit, self.lm = adapted, vit, lm
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
        setattr(self, adapted, get_peft_model(getattr(self, adapted), lora))
        self.connector = nn.Linear(768, 768)
        self.time_embed = nn.Parameter(torch.zeros(T, 768))
        self.prefix_scale = lm.get_input_embeddings().weight.float().square().mean().sqrt()
        self.prefix_ids = torch.tensor([TOKENIZER.bos_id(), *TOKENIZER.encode("")])

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Pixels (R, T, 3, S, S), labels (R, L) -> the loss, summed over the tokens as that of `Captioner` is."""
        with torch.set_grad_enabled(self.adapted == "vit"):
            pooled = self.vit(pixel_values=pixels.flatten(0, 1)).pooler_output.unflatten(0, pixels.shape[:2])
        visual = self.connector(pooled.float() + self.time_embed) * self.prefix_scale  # (R, T, C)
        embed = self.lm.get_input_embeddings()
        prefix = embed(self.prefix_ids).expand(len(pixels), -1, -1)
        x = torch.cat([prefix[:, :1], visual.to(prefix.dtype), prefix[:, 1:], embed(labels)], dim=1)
        tokens = int((labels >= 0).sum())
        labels = F.pad(labels, (x.shape[1] - labels.shape[1], 0), value=IGNORE_INDEX)
        return self.lm(inputs_embeds=x, labels=labels, use_cache=False).loss * tokens


def assert_same_model() -> None:
    """In fp32, one clip with 2 captions: loss and gradients are the same, ours and theirs with LoRA in the ViT."""
    (their_vit, vit), (their_lm, lm) = make_clip_b16("fp32"), make_llama_160m("fp32")
    captioner, peft = make_captioner(vit, lm, "lora"), PeftCaptioner(their_vit, their_lm, "vit")
    pairs = [(captioner.time_embed, peft.time_embed), (captioner.connector.weight, peft.connector.weight),
             (captioner.connector.bias, peft.connector.bias)]  # fmt: skip
    for block, layer in zip(vit.blocks, peft.vit.base_model.model.encoder.layers, strict=True):
        for ours, theirs in (block.attn.q, layer.self_attn.q_proj), (block.attn.v, layer.self_attn.v_proj):
            pairs += [(ours.lora_a, theirs.lora_A.default.weight), (ours.lora_b, theirs.lora_B.default.weight)]
    for ours, theirs in pairs:
        ours.data += 0.02 * torch.randn_like(ours)  # so that no LoRA is zero
        theirs.data.copy_(ours)
    batch = make_batch(clips=1, captions=2)
    loss, expected = captioner(*batch), peft(*make_peft_batch(vit, *batch))
    loss.backward()
    expected.backward()
    assert_close("loss", loss, expected, 1e-5)
    for ours, theirs in pairs:
        assert_close(f"gradient of {list(ours.shape)}", ours.grad, theirs.grad, 1e-3)


def make_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """-> a function that takes a training step as train.py does."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (model(*batch) / int((batch[1] >= 0).sum())).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


@cache
def make_step_of_kind(kind: str) -> Callable[[], None]:
    """A step in bf16; `kind` is "ours METHOD" or "peft vit|lm"."""
    (their_vit, vit), (their_lm, lm) = make_clip_b16("bf16"), make_llama_160m("bf16")
    side, name = kind.split()
    if side == "peft":
        model, batch = PeftCaptioner(their_vit, their_lm, name), make_peft_batch(vit, *make_batch())
    else:
        keep_freed_memory()
        model, batch = make_captioner(vit, lm, name), make_batch()
    del their_vit, vit, their_lm, lm
    release_freed_memory()  # of the models: it is not the step's
    return make_step(model, batch)


def take_step(kind: str) -> float:
    """-> the peak memory of this process during a step, in MiB."""
    step = make_step_of_kind(kind)
    peak_memory(reset=True)
    step()
    return peak_memory()


def compare_training(repeats: int) -> list[dict]:
    """Steps of each pair in alternation, each kind in its own process."""
    assert_same_model()
    pools = {kind: new_process() for kind in KINDS}
    steps = {kind: lambda kind=kind: pools[kind].submit(take_step, kind).result() for kind in KINDS}
    for _ in range(2):  # the first turn warms up
        memory = {kind: step() for kind, step in steps.items()}
    rows = []
    for ours, theirs in PAIRS:
        row = compare_in_turns(f"a step, {ours} beside {theirs}", steps[ours], steps[theirs], repeats)
        rates = {"captions/s": B * K / row["wall s"], "theirs, captions/s": B * K / row["theirs, wall s"]}
        rows.append(row | rates | {"MB": memory[ours], "theirs, MB": memory[theirs]})
    return rows


def measure_cost(repeats: int) -> list[dict]:
    """The time of a step with one clip as frames, queries or captions grow."""
    keep_freed_memory()
    vit, lm = make_clip_b16("bf16")[1], make_llama_160m("bf16")[1]
    rows = []
    for name, values in (("frames", (1, 2, 4, 8, 16, 32, 64)), ("queries", (1, 4, 16, 64)), ("captions", (1, 4, 16))):
        for value in values:
            counts = {"frames": T, "queries": 16, "captions": K} | {name: value}
            captioner = make_captioner(vit, lm, "qadapter", counts["queries"])
            step = make_step(captioner, make_batch(1, counts["frames"], counts["captions"]))
            step()  # warms up
            seconds = statistics.median(elapsed(step) for _ in range(max(3, repeats)))
            rows.append({"what": f"a step, {value} {name}", "ms": 1e3 * seconds})
    return rows
