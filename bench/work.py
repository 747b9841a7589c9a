"""What is measured: the same work by our code and by transformers, peft or pycocoevalcap.

Each function prepares a work for one side, "ours" or "theirs", and returns it as a function without arguments. Models
have the shapes of CLIP ViT-B/16 and Llama-160m and random weights, the same on both sides.

Shapes: B clips, T frames, S side in pixels, K captions per clip, L tokens of a caption, R = B*K rows, C width of the
language model.
"""

import math
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

import metrics
from bench.measure import Work
from common.config import Config
from common.preprocessing import CLIP_MEAN, CLIP_STD
from model import Captioner, CausalLM, Pair, ViT, generate
from training.devices import DTYPES, keep_freed_memory
from video_data import shapes

B, T, K, L, S, RANK = 2, 8, 4, 15, 224, 32
EOS = 2
CONFIGS = Path(__file__).resolve().parents[1] / "tests/models/configs"
TOKENIZER = SimpleNamespace(start=[1], encode=lambda text: [10, 11, 12])  # what a captioner needs of one


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def random_ids(*shape: int) -> Tensor:
    return torch.randint(3, 32000, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def load(kind: type, side: str, dtype: str) -> nn.Module:
    """Our ViT or CausalLM, or that of transformers, from the same files."""
    from transformers import CLIPConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind is ViT:
        model = CLIPVisionModel(CLIPConfig.from_json_file(CONFIGS / "clip-vit-base-patch16.json").vision_config)
    else:
        model = LlamaForCausalLM(LlamaConfig.from_json_file(CONFIGS / "llama-160m.json"))
        for name, weight in model.named_parameters():  # logits that vary like a trained model's
            std = {"model.embed_tokens.weight": 1.0, "lm_head.weight": 0.12}.get(name, 0.04)
            weight.normal_(1.0 if "norm" in name else 0.0, std)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = (kind.from_pretrained(folder, DTYPES[dtype]) if side == "ours"
                 else type(model).from_pretrained(folder, dtype=DTYPES[dtype]))
    return model.eval().requires_grad_(False)


def run_vit(dtype: str, side: str) -> Work:
    """The last hidden states of 16 frames."""
    vit, pixels = load(ViT, side, dtype), random_tensor(16, 3, S, S).to(DTYPES[dtype])
    return lambda: vit(pixels) if side == "ours" else vit(pixels).last_hidden_state


def run_lm(dtype: str, side: str) -> Work:
    """The logits of 8 x 64 tokens."""
    lm, ids = load(CausalLM, side, dtype), random_ids(8, 64)
    return lambda: lm(lm.embed(ids)) if side == "ours" else lm(ids, use_cache=False).logits


def search(dtype: str, beams: int, side: str) -> Work:
    """At most 30 tokens after each of 16 prefixes of 24 embeddings, then EOS (16, 30)."""
    lm, prefix = load(CausalLM, side, dtype), random_tensor(16, 24, 768).to(DTYPES[dtype])
    if side == "ours":
        return lambda: torch.tensor([ids + [EOS] * (30 - len(ids)) for ids in generate(lm, prefix, beams=beams)])
    write = partial(lm.generate, inputs_embeds=prefix, attention_mask=torch.ones(16, 24), do_sample=False,
                    num_beams=beams, max_new_tokens=30, pad_token_id=EOS)
    return lambda: F.pad(write(), (0, 30), value=EOS)[:, :30]


class PeftCaptioner(nn.Module):
    """Theirs: LoRA in the queries and values of the ViT or of the language model; each caption is a row.

    Neither frame vectors nor a scale of visual tokens: here the former are zero, and embeddings have a size of 1.
    """

    def __init__(self, vit: nn.Module, lm: nn.Module, adapted: str):
        from peft import LoraConfig, get_peft_model

        super().__init__()
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
        self.vit = get_peft_model(vit, lora) if adapted == "ViT" else vit
        self.lm = get_peft_model(lm, lora) if adapted == "language model" else lm
        self.connector = nn.Linear(768, 768)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Pixels (R, T, 3, S, S), labels (R, L) -> the loss, summed over the tokens."""
        pooled = self.vit(pixel_values=pixels.flatten(0, 1)).pooler_output.unflatten(0, pixels.shape[:2])
        visual = self.connector(pooled.float())  # (R, T, C)
        embed = self.lm.get_input_embeddings()
        texts = embed(torch.tensor(TOKENIZER.start + TOKENIZER.encode(""))).expand(len(pixels), -1, -1)
        x = torch.cat([texts[:, :1], visual.to(texts.dtype), texts[:, 1:], embed(labels)], dim=1)
        padded = F.pad(labels, (x.shape[1] - L, 0), value=-100)
        return self.lm(inputs_embeds=x, labels=padded, use_cache=False).loss * labels.numel()


def step(method: str, adapted: str, side: str) -> Work:
    """A training step in bf16 on B clips with K captions each: a method of ours against LoRA in the adapted model. The
    result is the connector's gradient. `lora` is the same model as LoRA in the ViT."""
    vit, lm = load(ViT, side, "bf16"), load(CausalLM, side, "bf16")
    frames, labels = (255 * random_tensor(B, T, 3, S, S).sigmoid()).byte(), random_ids(B, K, L)
    if side == "ours":
        keep_freed_memory()  # as train.py
        model = Captioner(Pair(vit, lm), TOKENIZER, Config(method=method, rank=RANK, frames=T))
        if model.time_embed is not None:
            nn.init.zeros_(model.time_embed)
    else:
        model = PeftCaptioner(vit, lm, adapted)
        frames = normalize(frames / 255, CLIP_MEAN, CLIP_STD).bfloat16().repeat_interleave(K, dim=0)  # (R, T, 3, S, S)
        labels = labels.flatten(0, 1)  # (R, L)
    nn.init.zeros_(model.connector.bias)
    model.connector.weight.data.copy_(random_tensor(768, 768) / 768**0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def work() -> Tensor:
        optimizer.zero_grad()
        (model(frames, labels) / labels.numel()).backward()
        gradient = model.connector.weight.grad.clone()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return gradient

    return work


def score(videos: int, count: int, side: str) -> Work:
    """The scores of one caption per video, with `count` references, of scenes of `shapes`. Theirs starts Java."""
    rng = np.random.default_rng(0)
    scenes = {f"video{i}": shapes.draw_scene(rng) for i in range(videos)}
    texts = {video: [shapes.describe(scene, rng) for _ in range(count + 1)] for video, scene in scenes.items()}
    references, captions = ({video: x[part] for video, x in texts.items()} for part in (slice(1, None), slice(1)))

    def ours() -> list[float]:
        return [*metrics.score(references, captions, strict=True).corpus.values()]

    def theirs() -> list[float]:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        words = [PTBTokenizer().tokenize({video: [{"caption": text} for text in x] for video, x in group.items()})
                 for group in (references, captions)]
        bleu, _ = Bleu(4).compute_score(*words, verbose=0)
        return [*bleu, *(scorer.compute_score(*words)[0] for scorer in (Meteor(), Rouge(), Cider()))]

    scores = ours if side == "ours" else theirs
    return lambda: torch.tensor(scores(), dtype=torch.float64)


INF = math.inf  # for different works, and for beams in bf16, which may part
BENCHMARKS = [  # the name for --only, what it is, how far the results may differ, the work of a side
    ("train", "a step of the Q-Adapter against LoRA in the ViT", INF, partial(step, "qadapter", "ViT")),
    ("train", "a step of lora against LoRA in the ViT", 0.1, partial(step, "lora", "ViT")),
    ("train", "a step of the Q-Adapter against LoRA in the LM", INF, partial(step, "qadapter", "language model")),
    ("vit", "ViT-B/16, 16 frames, fp32", 2e-5, partial(run_vit, "fp32")),
    ("vit", "ViT-B/16, 16 frames, bf16", 0.05, partial(run_vit, "bf16")),
    ("lm", "Llama-160m, logits of 8 x 64 tokens, fp32", 2e-5, partial(run_lm, "fp32")),
    ("lm", "Llama-160m, logits of 8 x 64 tokens, bf16", 0.05, partial(run_lm, "bf16")),
    ("search", "Llama-160m, 16 texts, greedy, fp32", 0, partial(search, "fp32", 1)),
    ("search", "Llama-160m, 16 texts, greedy, bf16", INF, partial(search, "bf16", 1)),
    ("search", "Llama-160m, 16 texts, 5 beams, fp32", 0, partial(search, "fp32", 5)),
    ("search", "Llama-160m, 16 texts, 5 beams, bf16", INF, partial(search, "bf16", 5)),
    ("metrics", "scores of 670 videos with 41 captions", 1e-9, partial(score, 670, 41)),
    ("metrics", "scores of 2,990 videos with 20 captions", 1e-9, partial(score, 2990, 20)),
]
