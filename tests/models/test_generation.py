"""Generation, against transformers' `generate` [1] on tiny random models: token ids must be equal.

Models go through real files. The standard deviation of their heads is large enough that some tokens are clearly more
likely than others. EOS is a token that the model generates, so that texts end at many lengths; the tests count which
situations occur. The cached search is also compared with the naive one beside it, and, if the environment variable
QADAPTER_REAL names a folder of public files, greedy search with the output of the author's own program [2].

[1] transformers, generation/utils.py (`_sample`, `_beam_search`)
[2] run.c of https://github.com/karpathy/llama2.c, with its model stories260K
"""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from models.generation import generate, naive_beam_search, naive_generate
from models.lm import CausalLM
from tests.common.helpers import refused
from tests.models import test_lm

disable_progress_bar()


def make(folder: Path, seed: int, vocab: int = 24, positions: int = 64) -> tuple[nn.Module, CausalLM]:
    """A random reference model with large weights, and ours from the folder that it saves."""
    fields = {"vocab_size": vocab, "num_key_value_heads": (4, 2, 1)[seed % 3], "max_position_embeddings": positions}
    theirs = test_lm.make(folder, test_lm.LLAMA | fields, seed, scale=2.0)
    return theirs, CausalLM.from_pretrained(folder)


def random_prefix(rows: int, length: int, seed: int) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def set_eos(lm: CausalLM, *eos: int) -> None:
    lm.config = replace(lm.config, eos_ids=eos)


def reference(theirs: nn.Module, prefix: Tensor, beams: int, max_new: int, eos: list[int]) -> tuple[list, int]:
    """The reference's new ids without EOS, and its number of steps."""
    options = {"do_sample": False, "eos_token_id": eos, "pad_token_id": eos[0], "return_dict_in_generate": True}
    options |= {"attention_mask": torch.ones(prefix.shape[:2], dtype=torch.long), "output_scores": True}
    output = theirs.generate(inputs_embeds=prefix, num_beams=beams, max_new_tokens=max_new, **options)
    rows = output.sequences.tolist()  # padded after EOS
    rows = [row[: min((row.index(e) for e in eos if e in row), default=len(row))] for row in rows]
    return rows, len(output.scores)


def record_calls(lm: CausalLM) -> list[tuple[int, int]]:
    """A list that gets the rows and positions of each call of the model."""
    calls: list[tuple[int, int]] = []
    lm.blocks[0].register_forward_hook(lambda _module, args, _output: calls.append(tuple(args[0].shape[:2])))
    return calls


# -------------------------------------------------------------------------------- equal token ids


def test_120_models_generate_the_ids_of_the_reference(tmp_path):
    """Models, prefixes and options from seeds 0 to 119: 1 to 5 beams, one to three EOS. As many steps, too."""
    counts = Counter()
    for seed in range(120):
        rng = random.Random(seed)
        theirs, lm = make(tmp_path, seed, rng.randint(11, 20))
        prefix, calls = random_prefix(5, rng.choice([1, 4, 9]), seed), record_calls(lm)
        max_new, beams = rng.choice([1, 5, 9, 18]), rng.randint(1, 5)
        set_eos(lm)
        generated = sum(generate(lm, prefix, beams, max_new), [])
        eos = list(dict.fromkeys(rng.choices(generated, k=rng.choice([1, 1, 3]))))
        expected, steps = reference(theirs, prefix, beams, max_new, eos)
        set_eos(lm, *eos)
        calls.clear()
        assert generate(lm, prefix, beams, max_new) == expected and len(calls) == steps, f"seed {seed}"

        lengths = [len(row) for row in expected]
        counts["empty row"] += 0 in lengths
        counts["row with EOS"] += any(0 < n < max_new for n in lengths)
        counts["both in a batch"] += min(lengths) < max_new and max_new in lengths
        counts["finished beats running"] += beams > 1 and steps == max_new and max(lengths) < max_new - 1
        counts["beams matter"] += beams > 1 and generate(lm, prefix, 1, max_new) != expected
        counts["several EOS"] += len(eos) > 1 and min(lengths) < max_new
    assert len(counts) == 6 and min(counts.values()) >= 2, counts


@pytest.mark.parametrize("family", ["mistral", "qwen2, tied", "qwen3", "gemma", "llama3"])
def test_other_families_generate_the_ids_of_the_reference(tmp_path, family):
    """Models and options from seeds 400 to 409; windows of 7 positions, 14 to 26 positions in all, 1 to 5 beams."""
    with_eos = 0
    for seed in range(400, 410):
        rng = random.Random(seed)
        theirs = test_lm.make(tmp_path, test_lm.CASES[family], seed)
        lm, beams = CausalLM.from_pretrained(tmp_path), rng.randint(1, 5)
        prefix = lm.embed(test_lm.random_ids(3, rng.choice([1, 5, 12]), seed)).detach()
        set_eos(lm)
        eos = rng.choice(sum(generate(lm, prefix, beams, 14), []))
        expected, _ = reference(theirs, prefix, beams, 14, [eos])
        set_eos(lm, eos)
        assert generate(lm, prefix, beams, 14) == expected, f"seed {seed}"
        with_eos += min(map(len, expected)) < 14
    assert with_eos >= 3


def test_the_cached_search_equals_the_naive_search(tmp_path):
    """Models, prefixes and options from seeds 300 to 319; a batch of three rows."""
    with_eos = 0
    for seed in range(300, 320):
        rng = random.Random(seed)
        _, lm = make(tmp_path, seed, 12)
        prefix, max_new, beams = random_prefix(3, 4, seed), rng.choice([2, 6]), rng.randint(2, 4)
        set_eos(lm)
        eos = rng.choice(generate(lm, prefix, beams, max_new)[0])
        set_eos(lm, eos)
        found = generate(lm, prefix, beams, max_new)
        assert found == [naive_beam_search(lm, row, beams, max_new, eos) for row in prefix], f"seed {seed}"
        assert generate(lm, prefix, 1, max_new) == naive_generate(lm, prefix, max_new, eos), f"seed {seed}"
        with_eos += min(map(len, found)) < max_new
    assert with_eos >= 5


# ---------------------------------------------------------------------------------- amount of work


def test_finished_texts_leave_the_batch(tmp_path):
    """Model and prefix seed 4: each text alone, then all together. The prefix runs once per text, and each step one
    position of the beams of unfinished texts. No texts and no tokens need no work."""
    _, lm = make(tmp_path, 4, 30)
    prefix, calls = random_prefix(16, 6, 4), record_calls(lm)
    for beams in (1, 3):
        set_eos(lm)
        rows = generate(lm, prefix, beams, 12)
        set_eos(lm, rows[0][2], rows[1][4], rows[2][6])
        steps, expected = [], []
        for row in prefix[:, None]:
            calls.clear()
            expected += generate(lm, row, beams, 12)
            steps.append(len(calls))
        calls.clear()
        assert generate(lm, prefix, beams, 12) == expected and len(set(steps)) >= 3
        assert calls == [(16, 6)] + [(beams * sum(n > i for n in steps), 1) for i in range(1, max(steps))]


# ------------------------------------------------------------------------------------ public files


def test_stories260k_generates_the_story_of_its_author(real):
    """200 greedy tokens after BOS: the text is equal to the output of [2]."""
    folder = real / "stories260K"
    lm = CausalLM.from_pretrained(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    set_eos(lm, lm.config.bos_id)  # where [2] stops
    (ids,) = generate(lm, lm.embed(torch.tensor([[lm.config.bos_id]])), 1, 200)
    assert len(ids) == 200
    assert processor.decode(ids) == (folder / "expected_greedy_200.txt").read_text()


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused(tmp_path, value, beams):
    """A single such weight of the head, of a token that would not be generated."""
    _, lm = make(tmp_path, 0)
    prefix = random_prefix(2, 3, 0)
    generated = sum(generate(lm, prefix, beams, 5), [])
    with torch.no_grad():
        lm.head.weight[next(i for i in range(24) if i not in generated)] = value
    with refused("not finite"):
        generate(lm, prefix, beams, 5)
