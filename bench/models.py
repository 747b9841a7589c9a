"""Benchmarks of models: the same random weights in transformers' classes and in ours, in alternation.

Outputs are compared first. Both run with torch's default number of threads.

Letters: B rows, S positions of a prefix.
"""

import copy
import json
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.processes import ROOT
from bench.timing import compare_in_turns
from models.generation import generate
from models.lm import CausalLM
from models.vit import ViT
from training.devices import DTYPES

CONFIGS = ROOT / "tests/models/configs"
MAX_NEW_TOKENS = 30


def assert_outputs_agree(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """In fp32: within 1e-4 of the standard deviation of the outputs.

    In bf16, where the order of sums matters: on average at most a tenth farther from the fp32 outputs `exact` of the
    same weights than theirs are.
    """
    if ours.dtype == torch.float32:
        error = (ours - theirs).abs().max() / theirs.std()
        assert error < 1e-4, f"outputs differ by {error:.2g} of their standard deviation"
    our_error, their_error = ((x.float() - exact).abs().mean() for x in (ours, theirs))
    limit = 1.1 * their_error + 1e-4 * exact.std()
    assert our_error <= limit, f"our mean error is {our_error:.2g}, theirs is {their_error:.2g}"


# --------------------------------------------------------------------------------- forward passes


def make_clip_b16(dtype: str) -> tuple[nn.Module, ViT]:
    """-> theirs, ours: random models of the shape of CLIP ViT-B/16."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(**json.loads((CONFIGS / "clip-vit-base-patch16.json").read_text())["vision_config"])
    theirs = CLIPVisionModel(config).eval().requires_grad_(False).to(DTYPES[dtype])
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = ViT.from_pretrained(folder, DTYPES[dtype]).eval().requires_grad_(False)
    return theirs, ours


def make_llama_160m(dtype: str) -> tuple[nn.Module, CausalLM]:
    """-> theirs, ours: random models of the shape of Llama-160m, with logits that vary like a trained model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**json.loads((CONFIGS / "llama-160m.json").read_text()))
    theirs = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in theirs.named_parameters():
        weight.normal_(1.0 if "norm" in name else 0.0, 0.04)
    theirs.model.embed_tokens.weight.normal_(0, 1.0)
    theirs.lm_head.weight.normal_(0, 0.12)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        # Loaded again: .to(bf16) would also round the rotary frequencies.
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval().requires_grad_(False)
        ours = CausalLM.from_pretrained(folder, DTYPES[dtype]).requires_grad_(False)
    return theirs, ours


def vit_row(dtype: str, repeats: int) -> dict:
    """CLIP ViT-B/16 on 16 frames."""
    theirs, ours = make_clip_b16(dtype)
    pixels = torch.randn(16, 3, 224, 224).to(DTYPES[dtype])
    outputs = ours(pixels), theirs(pixels).last_hidden_state
    assert_outputs_agree(*outputs, theirs.float()(pixels.float()).last_hidden_state)
    theirs.to(DTYPES[dtype])
    return compare_in_turns(f"ViT-B/16, 16 frames, {dtype}", lambda: ours(pixels), lambda: theirs(pixels), repeats)


def lm_row(dtype: str, repeats: int) -> dict:
    """Logits of 8 texts of 64 tokens."""
    theirs, ours = make_llama_160m(dtype)
    ids = torch.randint(0, 32000, (8, 64), generator=torch.Generator().manual_seed(1))

    def our_logits() -> Tensor:
        return ours(ours.embed(ids))

    def their_logits() -> Tensor:
        return theirs(ids, use_cache=False).logits

    outputs = our_logits(), their_logits()
    assert_outputs_agree(*outputs, theirs.float()(ids).logits)
    theirs.to(DTYPES[dtype])
    return compare_in_turns(f"Llama-160m, logits of 8 x 64 tokens, {dtype}", our_logits, their_logits, repeats)


def compare_vit(repeats: int) -> list[dict]:
    return [vit_row(dtype, repeats) for dtype in DTYPES]


def compare_lm(repeats: int) -> list[dict]:
    return [lm_row(dtype, repeats) for dtype in DTYPES]


# ------------------------------------------------------------------------------------- generation


def randomize_eos(theirs: nn.Module, ours: CausalLM, std: float) -> None:
    """Sets the row of EOS in both heads to random values; the larger their std, the more texts end early."""
    row = torch.randn(ours.config.width, generator=torch.Generator().manual_seed(0)) * std
    for head in (theirs.lm_head, ours.head):
        head.weight[ours.config.eos_id] = row


def mean_log_probability(lm: CausalLM, prefix: Tensor, texts: list[list[int]]) -> Tensor:
    """The score that beam search maximises, averaged over texts: log-probability per token, EOS included."""
    scores = []
    for x, ids in zip(prefix.to(lm.embed.weight.dtype), texts, strict=True):
        labels = torch.tensor([*ids, lm.config.eos_id][:MAX_NEW_TOKENS])
        logits = lm(torch.cat([x, lm.embed(labels[:-1])])[None])[0, len(x) - 1 :]
        scores.append(-F.cross_entropy(logits, labels))
    return torch.stack(scores).mean()


def generation_row(theirs: nn.Module, ours: CausalLM, dtype: str, rows: int, beams: int, repeats: int) -> dict:
    """At most 30 new tokens after each of B = `rows` prefixes of S = 24 embeddings.

    All token ids must be equal, except with beams in bf16: the two add in different orders, so at some point another
    token has the best score. There the mean score in fp32 must be at most 5 % worse than theirs.
    """
    eos = ours.config.eos_id
    prefix = torch.randn(rows, 24, 768, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])  # (B, S, C)
    options = {"attention_mask": torch.ones(rows, 24, dtype=torch.long), "do_sample": False, "num_beams": beams,
               "max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": eos, "pad_token_id": eos}  # fmt: skip

    def our_texts() -> list[list[int]]:
        return generate(ours, prefix, MAX_NEW_TOKENS, beams=beams)

    def their_texts() -> list[list[int]]:
        texts = theirs.generate(inputs_embeds=prefix, **options).tolist()
        return [ids[: ids.index(eos)] if eos in ids else ids for ids in texts]

    texts, expected = our_texts(), their_texts()
    equal = sum(a == b for a, b in zip(texts, expected, strict=True))
    if equal < rows:
        assert dtype == "bf16" and beams > 1, f"{beams} beams, {dtype}: only {equal} of {rows} texts are equal"
        exact = copy.deepcopy(ours).float()
        our_score, their_score = (mean_log_probability(exact, prefix, group) for group in (texts, expected))
        limit = their_score - 0.05 * their_score.abs()
        assert our_score >= limit, f"{beams} beams, {dtype}: mean score {our_score:.3f}, theirs {their_score:.3f}"
    lengths = sorted(map(len, texts))
    what = f"Llama-160m, {beams} beams, {rows} texts of {lengths[0]} to {lengths[-1]} tokens, {dtype}"
    return compare_in_turns(what, our_texts, their_texts, repeats, warm_up=False, equal=f"{equal} of {rows}")


def compare_generation(repeats: int) -> list[dict]:
    """Greedy search and five beams, for texts that do not end early and for texts that do."""
    rows = []
    for dtype in DTYPES:
        theirs, ours = make_llama_160m(dtype)
        for eos_std, sizes in ((0.12, ((16, 1), (16, 5), (8, 5))), (0.4, ((16, 1), (16, 5)))):
            randomize_eos(theirs, ours, eos_std)
            rows += [generation_row(theirs, ours, dtype, texts, beams, repeats) for texts, beams in sizes]
    return rows
