"""Benchmarks of models for `bench.py`: the same random weights in transformers' classes and in ours, by turns.

Both run on the threads that torch takes, after one turn each that does not count. A ratio is theirs / ours in wall
time, the median of as many as there are turns; above 1 it speaks for ours.
"""

import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from devices import DTYPES

CONFIGS = Path(__file__).resolve().parent / "tests/configs"


def by_turns(what: str, ours, theirs, repeats: int, warm: bool = False, **figures) -> dict:
    """Unless both are `warm` already, one turn each does not count."""
    times = []
    for _ in range(repeats + (not warm)):
        pair = []
        for function in (theirs, ours):
            begun = time.perf_counter()
            function()
            pair.append(time.perf_counter() - begun)
        times.append(pair)
    times = times[-repeats:]
    ratios = sorted(a / b for a, b in times)
    return {
        "what": what, "wall s": statistics.median(b for _, b in times), "runs": repeats,
        "theirs, wall s": statistics.median(a for a, _ in times), "ratio": statistics.median(ratios),
        "ratios from": ratios[0], "to": ratios[-1],
    } | figures  # fmt: skip


def assert_alike(found: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """In fp32 within 1e-4 of the outputs' spread; in bf16, where the order of sums decides, on average no farther from
    the fp32 outputs `exact` of the same weights than theirs, and a tenth."""
    if found.dtype == torch.float32:
        far = (found - theirs).abs().max() / theirs.std()
        assert far < 1e-4, f"outputs differ by {far:.2g} of their spread"
    ours_off, theirs_off = ((x.float() - exact).abs().mean() for x in (found, theirs))
    assert ours_off <= 1.1 * theirs_off + 1e-4 * exact.std(), f"off by {ours_off:.2g}, theirs by {theirs_off:.2g}"


# ------------------------------------------------------------------------------------- one pass


def clip_b16(dtype: str):
    """-> theirs, ours: random models of CLIP ViT-B/16's shape."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from vit import ViT

    torch.manual_seed(0)
    published = json.loads((CONFIGS / "clip-vit-base-patch16.json").read_text())["vision_config"]
    theirs = CLIPVisionModel(CLIPVisionConfig(**published)).eval().requires_grad_(False).to(DTYPES[dtype])
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = ViT.from_pretrained(folder, DTYPES[dtype]).eval().requires_grad_(False)
    return theirs, ours


def vit_row(dtype: str, repeats: int) -> dict:
    """CLIP ViT-B/16, 16 frames."""
    theirs, ours = clip_b16(dtype)
    pixels = torch.randn(16, 3, 224, 224).to(DTYPES[dtype])
    mine, other = ours(pixels), theirs(pixels).last_hidden_state
    assert_alike(mine, other, theirs.float()(pixels.float()).last_hidden_state)
    theirs.to(DTYPES[dtype])
    return by_turns(f"ViT-B/16, 16 frames, {dtype}", lambda: ours(pixels), lambda: theirs(pixels), repeats)


def llama_160m(dtype: str):
    """-> theirs, ours: random models of Llama-160m's shape whose logits spread like a trained model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lm import CausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**json.loads((CONFIGS / "llama-160m.json").read_text()))
    theirs = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in theirs.named_parameters():
        weight.normal_(1.0 if "norm" in name else 0.0, 0.04)
    theirs.model.embed_tokens.weight.normal_(0, 1.0)
    theirs.lm_head.weight.normal_(0, 0.12)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        # Read again, not .to(bf16), which would round the rotary frequencies too.
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval().requires_grad_(False)
        ours = CausalLM.from_pretrained(folder, DTYPES[dtype]).requires_grad_(False)
    return theirs, ours


def lm_row(dtype: str, repeats: int) -> dict:
    """Logits of 8 texts of 64 tokens."""
    theirs, ours = llama_160m(dtype)
    ids = torch.randint(0, 32000, (8, 64), generator=torch.Generator().manual_seed(1))

    def mine():
        return ours(ours.embed(ids))

    def other():
        return theirs(ids, use_cache=False).logits

    found, expected = mine(), other()
    assert_alike(found, expected, theirs.float()(ids).logits)
    theirs.to(DTYPES[dtype])
    return by_turns(f"Llama-160m, logits of 8 x 64 tokens, {dtype}", mine, other, repeats)


def compare_vit(repeats: int) -> list[dict]:
    return [vit_row(dtype, repeats) for dtype in DTYPES]


def compare_lm(repeats: int) -> list[dict]:
    return [lm_row(dtype, repeats) for dtype in DTYPES]


# ------------------------------------------------------------------------------------- decoding


def draw_eos(theirs, ours, spread: float) -> None:
    """Draws EOS's row of both heads; the larger its spread, the more texts end early."""
    row = torch.randn(ours.config.width, generator=torch.Generator().manual_seed(0)) * spread
    for head in (theirs.lm_head, ours.head):
        head.weight[ours.config.eos_id] = row


def beam_scores(lm, prefix: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """What beam search makes as large as it can: each text's log-probability a token, EOS among them."""
    scores = []
    for x, ids in zip(prefix.to(lm.embed.weight.dtype), rows, strict=True):
        target = torch.tensor([*ids, lm.config.eos_id][:30])
        logits = lm(torch.cat([x, lm.embed(target[:-1])])[None])[0, len(x) - 1 :]
        scores.append(-F.cross_entropy(logits, target))
    return torch.stack(scores)


def decoding_row(theirs, ours, dtype: str, texts: int, beams: int, repeats: int) -> dict:
    """At most 30 new tokens after each of as many prefixes of 24 embeddings as there are `texts`.

    All token ids must be equal, but those of beams in bf16: there the two add up in another order, so that sooner or
    later another token is ahead. How many texts are equal is told, and the mean score in fp32 has to be as good within
    5 %.
    """
    from decode import generate

    eos = ours.config.eos_id
    prefix = torch.randn(texts, 24, 768, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    asked = {"attention_mask": torch.ones(texts, 24, dtype=torch.long), "do_sample": False, "num_beams": beams,
             "max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": eos}  # fmt: skip

    def mine():
        return generate(ours, prefix, 30, beams=beams)

    def other():
        rows = theirs.generate(inputs_embeds=prefix, **asked).tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]

    found, expected = mine(), other()
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    if equal < texts:
        assert (dtype, beams) == ("bf16", 5), f"{beams} beams, {dtype}: only {equal} of {texts} texts are equal"
        exact = copy.deepcopy(ours).float()
        a, b = (beam_scores(exact, prefix, rows).mean() for rows in (found, expected))
        assert a >= b - 0.05 * b.abs(), f"{beams} beams, {dtype}: mean score {a:.3f}, theirs {b:.3f}"
    lengths = sorted(map(len, found))
    what = f"Llama-160m, {beams} beams, {texts} texts of {lengths[0]} to {lengths[-1]} tokens, {dtype}"
    return by_turns(what, mine, other, repeats, warm=True, equal=f"{equal} of {texts}")


def compare_decoding(repeats: int) -> list[dict]:
    """Greedy and five beams, without early ends and with; five beams also of fewer texts at a time."""
    rows = []
    for dtype in DTYPES:
        models = llama_160m(dtype)
        for spread, kinds in ((0.12, ((16, 1), (16, 5), (8, 5))), (0.4, ((16, 1), (16, 5)))):
            draw_eos(*models, spread)
            rows += [decoding_row(*models, dtype, texts, beams, repeats) for texts, beams in kinds]
    return rows
