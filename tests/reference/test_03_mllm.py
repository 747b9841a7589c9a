"""The captioner on multimodal language models (MLLMs) of five layouts.

References: embeddings of ids with visual tokens in the place of image tokens, as transformers does; the MLLM as it is
(`--method none`), bit for bit; plain loops. The MLLMs are tiny and random (`tests/tiny.py`).
"""

from dataclasses import replace

import pytest
import torch

from common.errors import InputError
from tests import tiny
from tests.tiny import LABELS, MLLM_CONFIGS, MLLMS, TOKENS, Letters, N, T, clips, make, randomized

IMAGE = 39  # the image token: no other id of a prompt
JOIN_PATCHES = "internvl", "qwen3_vl", "smolvlm"  # their projectors map no single vectors
every_family = pytest.mark.parametrize("family", MLLMS)


@pytest.mark.parametrize("family", [family for family in MLLMS if family != "qwen3_vl"])  # see test_qwen3_vl.py
def test_without_training_the_prefix_is_the_input_of_the_mllm(family):
    """Model seed 1, frames seed 2, within 1e-6. Reference: embeddings of ids with image tokens in place."""
    captioner, frames = make("none", 1, family), clips(1, T, 2)
    newline = [IMAGE] if family == "llava_onevision" else []
    first, *rest = captioner.backbone.prompt(Letters(), T)
    ids = first + sum(([IMAGE] * TOKENS[family] + newline * (i == T - 1) + text for i, text in enumerate(rest)), [])
    with torch.no_grad():
        expected = captioner.lm.embed(torch.tensor(ids))
        visual = captioner.backbone.connect(captioner.vit(captioner.vit.normalize(frames[0]))).flatten(0, 1)
        visual = torch.cat([visual, captioner.backbone.newline[None]]) if newline else visual
        expected[torch.tensor(ids) == IMAGE] = visual
    torch.testing.assert_close(captioner.prefix(frames)[0], expected, rtol=0, atol=1e-6)
    assert captioner.prefix_length(T) == len(ids)


@every_family
@pytest.mark.parametrize("name", ["linear", "lora", "lora-lm", "adapter", "st-adapter", "full", "frames"])
def test_step_0_is_the_mllm_bit_for_bit(family, name):
    """Model seed 3, frames seed 4: loss and captions, with gradients; a random captioner differs."""
    captioner, whole, frames = make(name, 3, family), make("none", 3, family), clips(2, T, 4)
    with torch.no_grad():
        expected = whole(frames, LABELS)
    assert captioner(frames, LABELS) == expected
    assert captioner.caption(frames, max_new_tokens=5) == whole.caption(frames, max_new_tokens=5)
    other = randomized(name, 3, family)
    if name == "st-adapter":  # a product of three small matrices
        tiny.randomize(other, 5)
    assert abs(other(frames, LABELS) - expected) > 1e-3


@every_family
def test_queries_stand_in_the_place_of_an_image(family):
    """Model seed 5, frames seed 6, bit for bit: LLaVA's projector maps them, else a connector of their own."""
    captioner, frames = randomized("queries", 5, family), clips(2, T, 6)
    with torch.no_grad():
        queries, _ = captioner.run_encoder(frames)
        if family in JOIN_PATCHES:
            expected = captioner.connector(queries) * captioner.lm.embedding_rms()
        else:
            expected = captioner.backbone.projector(queries)
    assert (captioner.connector is None) == (family not in JOIN_PATCHES)
    before, after = captioner.backbone.prompt(Letters(), 1)
    prefix = captioner.prefix(frames)
    assert torch.equal(prefix[:, len(before) : len(before) + N], expected)
    assert torch.equal(prefix[0, -len(after) :], captioner.lm.embed(torch.tensor(after)))
    assert captioner.prefix_length(T) == prefix.shape[1]


def test_linear_adds_a_layer_of_tokens_and_times():
    """Model seed 7, frames seed 8, within 1e-5. Reference: a loop over clips, frames and tokens."""
    captioner, frames = randomized("linear", 7, "llava"), clips(2, T, 8)
    groups, scale = captioner.encode(frames), captioner.lm.embedding_rms()
    tokens = captioner.vit(captioner.vit.normalize(frames).flatten(0, 1))
    tokens = captioner.backbone.connect(tokens).unflatten(0, (2, T))
    for b in range(2):
        for t in range(T):
            for n in range(16):
                added = captioner.connector.weight @ (tokens[b, t, n] / scale + captioner.time_embed[t])
                expected = tokens[b, t, n] + scale * (added + captioner.connector.bias)
                torch.testing.assert_close(groups[t][b, n], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_a_grid_averages_the_tokens_of_each_frame(grid):
    """Model seed 11, frames seed 12, within 1e-6. Reference: plain loops over cells from floor(4 i / g) to
    ceil(4 (i + 1) / g) of the 4 x 4 tokens."""
    whole, small, frames = make("none", 11, "llava"), make("none", 11, "llava", grid=grid), clips(2, T, 12)
    edges = [(i * 4 // grid, -(-(i + 1) * 4 // grid)) for i in range(grid)]
    for found, tokens in zip(small.encode(frames), whole.encode(frames), strict=True):
        square = tokens.unflatten(1, (4, 4))
        expected = [square[:, a:b, c:d].mean((1, 2)) for a, b in edges for c, d in edges]
        torch.testing.assert_close(found, torch.stack(expected, dim=1), rtol=0, atol=1e-6)
    assert small.prefix_length(T) == whole.prefix_length(T) - T * (16 - grid**2) == small.prefix(frames).shape[1]


@every_family
@pytest.mark.parametrize("name", MLLM_CONFIGS)
def test_training_changes_what_is_trained_and_no_bit_of_the_rest(family, name):
    """Model seed 13, from the true initialization, frames seeds 10 to 12; without weight decay, so each has a gradient
    that is not zero. Of `frames` the queries are only written, so LN(Q) is not trained. `full` trains LLaVA's last norm
    of the ViT, too, which nothing reads."""
    captioner = make(name, 13, family)
    norm, post_norm = ({f"{part}.{x}" for x in ("weight", "bias")} for part in ("adapter.norm", "vit.post_norm"))
    expected = dict(captioner.named_parameters()).keys() - tiny.frozen_names(name, family)
    expected -= norm if name == "frames" else set()
    assert captioner.trained().keys() == expected
    if name != "none":
        unread = post_norm if name == "full" and family.startswith("llava") else set()
        assert tiny.changed_by_training(captioner, weight_decay=0) == expected - unread


@every_family
@pytest.mark.parametrize("name", ["none", "linear", "lora-lm", "queries"])
def test_the_loss_on_cached_block_outputs_is_that_on_frames(family, name):
    """Model seed 16, frames seed 17: in bf16 the two are equal bit for bit, and so are captions."""
    captioner, frames = randomized(name, 16, family, torch.bfloat16), clips(2, T, 17)
    outputs = captioner.block_outputs(frames)
    assert captioner.config.can_cache_vit and outputs.dtype == torch.bfloat16
    with torch.no_grad():
        assert captioner(outputs, LABELS) == captioner(frames, LABELS)
    assert captioner.caption(outputs, max_new_tokens=5) == captioner.caption(frames, max_new_tokens=5)


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
@torch.no_grad()
def test_each_clip_has_its_own_times(family):
    """Model seed 18, frames seed 19: prompts of two lengths in one batch give each clip the caption that it has alone,
    and the sum of their losses within 1e-4. Queries are read without times."""
    captioner, frames = make("none", 18, family), clips(3, T, 19)
    plain = captioner.backbone.prompt

    def prompt(tokenizer, frames, times):
        first, *rest = plain(tokenizer, frames)
        stamp = "abcdefghij"[int(times[0])] * (1 + (times[0] > 5)) if times else ""
        return [first + tokenizer.encode(stamp), *rest]

    captioner.backbone.prompt = prompt
    times, labels = torch.tensor([[1.0, 2, 3, 4, 9], [8, 9, 10, 11, 12], [4, 5, 6, 7, 9]]), LABELS[[0, 1, 0]]
    alone = [captioner(frames[i : i + 1], labels[i : i + 1], times[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(captioner(frames, labels, times), sum(alone), rtol=0, atol=1e-4)
    captions = [captioner.caption(frames[i : i + 1], 2, 5, times[i : i + 1])[0] for i in range(3)]
    assert captioner.caption(frames, 2, 5, times) == captions
    assert abs(captioner(frames, labels, times) - captioner(frames, labels)) > 1e-3
    queries = make("queries", 18, family)
    assert queries(frames, labels, times) == queries(frames, labels)


@pytest.mark.parametrize("family, fields, message", [
    ("llava", dict(grid=5), "--grid 5: expected at most 4, a side"),
    ("llava", dict(frames=200), "--grid: expected 300 positions at most, .* of 41"),
    ("llava", dict(beams=40), "beams: 40, expected 1 to 39"), ("llava", dict(beams=0), "beams: 0, expected 1 to 39"),
])
def test_what_does_not_fit_the_frozen_models_is_refused(family, fields, message):
    with pytest.raises(InputError, match=message):
        make("none", 0, family, **fields)


def test_all_positions_may_be_used():
    """A caption of 4 tokens, of which the last is not read, after a prefix of S positions: S + 3 suffice."""
    captioner = make("none", 0, "llava")
    needed = captioner.prefix_length(T) + 3
    captioner.lm.config = replace(captioner.lm.config, max_positions=needed)
    captioner.caption(clips(1, T, 0), max_new_tokens=4)
    with pytest.raises(InputError, match=f"{needed} positions at most, found {needed + 1}"):
        captioner.caption(clips(1, T, 0), max_new_tokens=5)
