"""Benchmarks of models: the same random weights in transformers' classes and in ours, in alternation.

Outputs are compared first. Both run with torch's default number of threads.

Letters: B rows, S positions of a prefix, C width of the language model.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.measure import ROOT, compare_in_turns, measure, new_process
from models.generation import generate
from models.lm import CausalLM
from models.vit import ViT
from training.devices import DTYPES

CONFIGS = ROOT / "tests/models/configs"
TOLERANCE = {"fp32": 2e-5, "bf16": 0.05}  # in bf16 the order of sums matters


def load_both(model: nn.Module, our_class: type, dtype: str) -> tuple[nn.Module, nn.Module]:
    """A model of transformers -> it and ours, both loaded from its files in `dtype`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = type(model).from_pretrained(folder, dtype=DTYPES[dtype])
        ours = our_class.from_pretrained(folder, DTYPES[dtype])
    return theirs.eval().requires_grad_(False), ours.eval().requires_grad_(False)


def make_clip_b16(dtype: str) -> tuple[nn.Module, ViT]:
    """-> theirs, ours: random models of the shape of CLIP ViT-B/16."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = json.loads((CONFIGS / "clip-vit-base-patch16.json").read_text())["vision_config"]
    return load_both(CLIPVisionModel(CLIPVisionConfig(**config)), ViT, dtype)


@torch.no_grad()
def make_llama_160m(dtype: str) -> tuple[nn.Module, CausalLM]:
    """-> theirs, ours: random models of the shape of Llama-160m, with logits that vary like a trained model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**json.loads((CONFIGS / "llama-160m.json").read_text())))
    for name, weight in model.named_parameters():
        weight.normal_(1.0 if "norm" in name else 0.0, 0.04)
    model.model.embed_tokens.weight.normal_(0, 1.0)
    model.lm_head.weight.normal_(0, 0.12)
    return load_both(model, CausalLM, dtype)


def assert_close(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """The largest difference is below `tolerance` times the largest number."""
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"{what}: differs by {error:.2g} of the largest number"


def compare_forward(what: str, make_models: Callable, x: Tensor, run_ours: Callable, run_theirs: Callable,
                    repeats: int) -> list[dict]:  # fmt: skip
    rows = []
    for dtype in DTYPES:
        theirs, ours = make_models(dtype)
        inputs = x.to(DTYPES[dtype]) if x.is_floating_point() else x
        functions = partial(run_ours, ours, inputs), partial(run_theirs, theirs, inputs)
        assert_close(what, *(function() for function in functions), TOLERANCE[dtype])
        rows.append(compare_in_turns(f"{what}, {dtype}", *functions, repeats))
    return rows


def compare_vit(repeats: int) -> list[dict]:
    pixels = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    return compare_forward("ViT-B/16, 16 frames", make_clip_b16, pixels, lambda vit, x: vit(x),
                           lambda vit, x: vit(x).last_hidden_state, repeats)  # fmt: skip


def compare_lm(repeats: int) -> list[dict]:
    ids = torch.randint(0, 32000, (8, 64), generator=torch.Generator().manual_seed(1))
    return compare_forward("Llama-160m, logits of 8 x 64 tokens", make_llama_160m, ids,
                           lambda lm, ids: lm(lm.embed(ids)),
                           lambda lm, ids: lm(ids, use_cache=False).logits, repeats)  # fmt: skip


def generation_row(theirs: nn.Module, ours: CausalLM, dtype: str, rows: int, beams: int, repeats: int) -> dict:
    """At most 30 new tokens after each of B = `rows` prefixes of S = 24 embeddings.

    All token ids must be equal, except with beams in bf16: the two add in different orders, so at some point another
    token has the best score. There equal texts are only counted.
    """
    eos = ours.config.eos_id
    prefix = torch.randn(rows, 24, 768, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])  # (B, S, C)
    our_generate = partial(generate, ours, prefix, beams)
    their_generate = partial(theirs.generate, inputs_embeds=prefix, attention_mask=torch.ones(rows, 24),
                             do_sample=False, num_beams=beams, max_new_tokens=30, eos_token_id=eos,
                             pad_token_id=eos)  # fmt: skip
    texts = our_generate()
    expected = [ids[: ids.index(eos)] if eos in ids else ids for ids in their_generate().tolist()]
    equal = sum(a == b for a, b in zip(texts, expected, strict=True))
    if dtype == "fp32" or beams == 1:
        assert equal == rows, f"{beams} beams, {dtype}: only {equal} of {rows} texts are equal"
    shortest, *_, longest = sorted(map(len, texts))
    what = f"Llama-160m, {beams} beams, {rows} texts of {shortest} to {longest} tokens, {dtype}"
    return compare_in_turns(what, our_generate, their_generate, repeats) | {"equal": f"{equal} of {rows}"}


def compare_generation(repeats: int) -> list[dict]:
    """Greedy search and five beams, for texts that do not end early and for texts that do."""
    rows = []
    for dtype in DTYPES:
        theirs, ours = make_llama_160m(dtype)
        eos_row = torch.randn(ours.config.width, generator=torch.Generator().manual_seed(0))
        for scale, sizes in ((0.12, ((16, 1), (16, 5), (8, 5))), (0.4, ((16, 1), (16, 5)))):
            for head in (theirs.lm_head, ours.head):  # the larger the scale, the more texts end early
                head.weight[ours.config.eos_id] = scale * eos_row
            rows += [generation_row(theirs, ours, dtype, texts, beams, repeats) for texts, beams in sizes]
    return rows


def sum_weights(folder: str) -> float:
    return sum(p.sum().item() for p in CausalLM.from_pretrained(folder).parameters())


def measure_loading(repeats: int) -> list[dict]:
    """Loading about 1 GB from one file and from shards. Measured once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=1024, num_hidden_layers=14, num_attention_heads=16, intermediate_size=3072)
    model, rows = LlamaForCausalLM(config), []
    expected = sum(p.sum().item() for p in model.parameters())
    for label, shard_size in (("one file", "9GB"), ("shards", "300MB")):
        with tempfile.TemporaryDirectory() as folder, new_process() as pool:
            model.save_pretrained(folder, max_shard_size=shard_size)
            size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 2**20
            total, figures = pool.submit(measure, sum_weights, folder).result()
        assert abs(total - expected) < 1e-4 * abs(expected), f"{label}: the weights sum to {total}, not {expected}"
        rows.append({"what": f"loading {size:.0f} MB, {label}", "MB / size": figures["MB"] / size} | figures)
    return rows
