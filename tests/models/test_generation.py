"""Generation, against transformers' `generate` [1] on tiny random Llama models: token ids must be equal.

Models go through real files. The standard deviation of their heads is large enough that some tokens are clearly more
likely than others. EOS is a token that the model generates, so that texts end at many lengths; the tests count which
situations occur. The cached search is also compared with the naive one beside it, and, if the environment variable
QADAPTER_REAL names a folder of public files, greedy search with the output of the author's own program [2].

[1] transformers, generation/utils.py (`_sample`, `_beam_search`) and generation/logits_process.py
[2] run.c of https://github.com/karpathy/llama2.c, with its model stories260K
"""

import os
import random
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

from models.generation import (
    BeamSearch,
    GenerationConfig,
    Hypothesis,
    generate,
    naive_beam_search,
    naive_generate,
)
from models.lm import CausalLM
from tests.common.helpers import refused
from tests.models import test_lm

disable_progress_bar()

EARLY_STOPPING = [False, True, "never"]
PENALTIES = [-1.0, 0.0, 0.6, 1.0, 2.0]


def make(folder: Path, seed: int, vocab: int = 24, **fields) -> tuple[LlamaForCausalLM, CausalLM]:
    """A random reference model, and ours from the folder that it saves."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=(4, 2, 1)[seed % 3], num_hidden_layers=2,
                 intermediate_size=40, max_position_embeddings=64, tie_word_embeddings=False) | fields  # fmt: skip
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **shape)).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.4 if "head" in name or "embed" in name else 0.2)
    theirs.save_pretrained(folder)
    return theirs, CausalLM.from_pretrained(folder)


def random_prefix(rows: int, length: int, seed: int, width: int = 32) -> torch.Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))


def reference(theirs: LlamaForCausalLM, prefix: torch.Tensor, max_new: int, min_new: int, beams: int, penalty: float,
              early_stopping: bool | str, eos: tuple[int, ...]) -> tuple[list[list[int]], int]:  # fmt: skip
    """The reference's new ids without EOS, and its number of steps."""
    beam_options = dict(length_penalty=penalty, early_stopping=early_stopping) if beams > 1 else {}
    output = theirs.generate(
        inputs_embeds=prefix, attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long), do_sample=False,
        max_new_tokens=max_new, min_new_tokens=min_new, num_beams=beams, eos_token_id=list(eos), pad_token_id=eos[0],
        return_dict_in_generate=True, output_scores=True, **beam_options,
    )  # fmt: skip
    rows = output.sequences.tolist()  # padded after EOS
    rows = [row[: min((row.index(e) for e in eos if e in row), default=len(row))] for row in rows]
    return rows, len(output.scores)


def record_calls(lm: CausalLM) -> list[tuple[int, int]]:
    """A list that gets the rows and positions of each call of the model."""
    calls: list[tuple[int, int]] = []
    lm.blocks[0].register_forward_hook(lambda _module, args, _output: calls.append(tuple(args[0].shape[:2])))
    return calls


# -------------------------------------------------------------------------------- equal token ids


def test_200_models_generate_the_ids_of_the_reference(tmp_path):
    """Models, prefixes and options from seeds 0 to 199. 1 to 5 beams, one or two EOS tokens."""
    counts = dict.fromkeys(("empty row", "row with EOS", "row without EOS", "both in a batch", "min_new_tokens matters",
                            "finished beats running", "beams matter", "penalty matters", "True matters",
                            "never matters", "greedy", "two EOS"), 0)  # fmt: skip
    for seed in range(200):
        rng = random.Random(seed)
        theirs, lm = make(tmp_path, seed, rng.randint(11, 60))
        prefix = random_prefix(rng.randint(1, 5), rng.choice([1, 4, 9]), seed)
        max_new, beams, early_stopping = rng.choice([1, 5, 9, 18]), rng.randint(1, 5), rng.choice(EARLY_STOPPING)
        penalty = rng.choice([2.0, *PENALTIES] if early_stopping == "never" else PENALTIES)
        min_new = rng.choice([0, 0, rng.randint(1, max_new)])
        generated = [token for row in generate(lm, prefix, max_new, beams=beams, eos_id=-1) for token in row]
        eos = tuple(dict.fromkeys(rng.choices(generated, k=rng.choice([1, 1, 2]))))
        expected, steps = reference(theirs, prefix, max_new, min_new, beams, penalty, early_stopping, eos)
        ours = partial(generate, lm, prefix, max_new, min_new_tokens=min_new, beams=beams, length_penalty=penalty,
                       early_stopping=early_stopping, eos_id=eos if len(eos) > 1 else eos[0])  # fmt: skip
        assert ours() == expected, f"seed {seed}"

        lengths = [len(row) for row in expected]
        counts["empty row"] += 0 in lengths
        counts["row with EOS"] += any(0 < n < max_new for n in lengths)
        counts["row without EOS"] += max_new in lengths
        counts["both in a batch"] += min(lengths) < max_new and max_new in lengths
        counts["min_new_tokens matters"] += min_new > 0 and ours(min_new_tokens=0) != expected
        counts["finished beats running"] += beams > 1 and steps == max_new and max(lengths) < max_new - 1
        counts["beams matter"] += beams > 1 and ours(beams=1) != expected
        counts["penalty matters"] += beams > 1 and ours(length_penalty=penalty - 2) != expected
        if beams > 1 and early_stopping is not False:
            counts[f"{early_stopping} matters"] += ours(early_stopping=False) != expected
        counts["greedy"] += beams == 1
        counts["two EOS"] += len(eos) > 1 and min(lengths) < max_new
    assert min(counts.values()) >= 3, counts


ROPE = {"rope_type": "default", "rope_theta": 1e6}
SMALL_LMS = {
    "qwen2": partial(Qwen2Config, rope_parameters=ROPE),
    "qwen2, tied": partial(Qwen2Config, rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen3": partial(Qwen3Config, rope_parameters=ROPE, head_dim=8),
    "qwen3, tied": partial(Qwen3Config, rope_parameters=ROPE, head_dim=8, tie_word_embeddings=True),
    "llama 3.2": partial(LlamaConfig, rope_parameters=ROPE | test_lm.LLAMA3, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", SMALL_LMS)
def test_small_public_families_equal_the_reference(tmp_path, name):
    """Models of seeds 600 to 604, written by `save_pretrained`: logits within 1e-5 of the largest one; then greedy and
    3-beam ids, of which some depend on the number of beams, and some end early. EOS is id 2."""
    with_eos = beams_matter = 0
    for seed in range(600, 605):
        torch.manual_seed(seed)
        # Weights of the usual 0.02 would repeat one id for ever.
        theirs = AutoModelForCausalLM.from_config(SMALL_LMS[name](
            vocab_size=20, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.5,
        )).eval().requires_grad_(False)  # fmt: skip
        for parameter_name, parameter in theirs.named_parameters():
            if parameter.ndim == 1:  # fresh norms are 1 and fresh biases 0, which hides a confusion
                parameter.normal_(float("norm" in parameter_name), 0.3)
        theirs.save_pretrained(tmp_path)
        lm, ids = CausalLM.from_pretrained(tmp_path), torch.randint(3, 20, (3, 7))
        prefix = lm.embed(ids).detach()
        with torch.no_grad():
            found, expected = lm(prefix), theirs(ids).logits
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        greedy, beams = (generate(lm, prefix, 12, beams=beams) for beams in (1, 3))
        for count, rows in ((1, greedy), (3, beams)):
            assert rows == reference(theirs, prefix, 12, 0, count, 1.0, False, (2,))[0], f"seed {seed}"
        with_eos += min(map(len, greedy)) < 12
        beams_matter += greedy != beams
    assert with_eos >= 1 and beams_matter >= 1, (with_eos, beams_matter)


@pytest.mark.parametrize("family", ["mistral", "qwen2, window", "qwen3, window", "gemma"])
def test_models_with_windows_generate_the_ids_of_the_reference(tmp_path, family):
    """Models and options from seeds 400 to 409; a window of 7 positions, 14 to 26 positions in all, 1 to 5 beams."""
    with_eos = 0
    for seed in range(400, 410):
        rng = random.Random(seed)
        theirs = test_lm.make(tmp_path, test_lm.CASES[family], seed)
        lm, max_new, beams = CausalLM.from_pretrained(tmp_path), 14, rng.randint(1, 5)
        penalty = rng.choice(PENALTIES)
        prefix = lm.embed(test_lm.random_ids(3, rng.choice([1, 5, 12]), seed))
        generated = [token for row in generate(lm, prefix, max_new, beams=beams, eos_id=-1) for token in row]
        eos = (rng.choice(generated),)
        expected, _ = reference(theirs, prefix.detach(), max_new, 0, beams, penalty, False, eos)
        found = generate(lm, prefix, max_new, beams=beams, length_penalty=penalty, eos_id=eos)
        assert found == expected, f"seed {seed}"
        with_eos += min(map(len, expected)) < max_new
    assert with_eos >= 3


def test_a_search_is_finished_when_the_reference_s_is():
    """2000 random cases, seed 0, of two running and two finished scores, against `_check_early_stop_heuristic` [1]."""
    rng, outcomes = random.Random(0), set()
    for _ in range(2000):
        length, penalty, early_stopping = rng.randint(1, 11), rng.choice(PENALTIES), rng.choice([False, "never"])
        best, sums = -rng.uniform(1, 9), sorted((-rng.uniform(1, 9) for _ in range(2)), reverse=True)
        finished = [score / length**penalty for score in sums]
        continues = GenerationMixin._check_early_stop_heuristic(
            torch.ones(1, 1, dtype=torch.bool), torch.tensor([[best, best - 1]]), torch.tensor([finished]),
            torch.ones(1, 2, dtype=torch.bool), length, 12, 0, early_stopping, penalty)  # fmt: skip
        running = [Hypothesis(best, 0, []), Hypothesis(best - 1, 1, [])]
        search = BeamSearch(running, [(score, []) for score in finished])
        config = GenerationConfig(12, 0, 2, penalty, early_stopping, frozenset())
        assert search.is_finished(length, config) != bool(continues)
        outcomes.add((early_stopping, penalty > 0, bool(continues)))
    assert len(outcomes) == 8


def test_the_cached_search_equals_the_naive_search(tmp_path):
    """Models, prefixes and options from seeds 300 to 319; a batch of three rows."""
    with_eos = 0
    for seed in range(300, 320):
        rng = random.Random(seed)
        _, lm = make(tmp_path, seed, 12)
        prefix, max_new = random_prefix(3, 4, seed), rng.choice([2, 6])
        beams, penalty = rng.randint(2, 4), rng.choice(PENALTIES)
        eos = rng.choice(generate(lm, prefix, max_new, beams=beams, eos_id=-1)[0])
        found = generate(lm, prefix, max_new, beams=beams, length_penalty=penalty, eos_id=eos)
        assert found == [naive_beam_search(lm, row, max_new, beams, penalty, eos) for row in prefix], f"seed {seed}"
        assert generate(lm, prefix, max_new, eos_id=eos) == naive_generate(lm, prefix, max_new, eos), f"seed {seed}"
        with_eos += min(map(len, found)) < max_new
    assert with_eos >= 5


def test_the_default_eos_is_that_of_the_config(tmp_path):
    """Model seed 0, prefix seed 13. If a row's third token becomes EOS, the row has two tokens."""
    prefix = random_prefix(4, 5, 13)
    _, lm = make(tmp_path, 0, 50)
    without_eos = naive_generate(lm, prefix, 8, eos_id=-1)
    row = next(i for i, ids in enumerate(without_eos) if ids[2] not in ids[:2])
    eos = without_eos[row][2]
    _, lm = make(tmp_path, 0, 50, eos_token_id=eos)
    found = generate(lm, prefix, 8)
    assert found[row] == without_eos[row][:2]
    assert not any(eos in ids for ids in found)
    assert generate(lm, prefix, 8, eos_id=-1) == without_eos


def test_half_precision_generates_texts_as_likely(tmp_path):
    """Model seed 0, prefix seed 1: log-probabilities, computed in fp32, within 0.2 of those of the fp32 texts."""
    _, lm = make(tmp_path, 0)
    prefix, eos = random_prefix(4, 5, 1), 3

    def log_likelihoods(rows: list[list[int]]) -> torch.Tensor:
        sums = []
        for x, ids in zip(prefix, rows, strict=True):
            logits = lm(torch.cat([x, lm.embed(torch.tensor(ids[:-1], dtype=torch.long))])[None])[0, len(x) - 1 :]
            sums.append(-F.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        return torch.stack(sums)

    with torch.no_grad():
        for beams in (1, 4):
            best = log_likelihoods(generate(lm, prefix, 8, 8, beams, eos_id=eos))
            for dtype in (torch.bfloat16, torch.float16):
                _, half = make(tmp_path, 0)
                found = generate(half.to(dtype), prefix.to(dtype), 8, 8, beams, eos_id=eos)
                assert generate(half, prefix, 8, 8, beams, eos_id=eos) == found  # also with an fp32 prefix
                torch.testing.assert_close(log_likelihoods(found), best, rtol=0, atol=0.2)


# ---------------------------------------------------------------------------------- amount of work


def test_the_prefix_runs_once_a_row_and_each_step_one_position(tmp_path):
    """Model seed 1, prefix seed 2, without EOS: all beams of the three rows run until the last token but one."""
    _, lm = make(tmp_path, 1)
    calls = record_calls(lm)
    for beams in (1, 5):
        calls.clear()
        assert [len(row) for row in generate(lm, random_prefix(3, 7, 2), 6, beams=beams, eos_id=-1)] == [6] * 3
        assert calls == [(3, 7)] + [(3, beams)] * 5


def test_finished_rows_leave_the_batch(tmp_path):
    """Model seed 3, prefix seed 4: each row alone, then all together; a step runs only unfinished rows."""
    _, lm = make(tmp_path, 3)
    prefix, calls = random_prefix(8, 6, 4), record_calls(lm)
    for beams in (1, 3):
        without_eos = generate(lm, prefix, 12, beams=beams, eos_id=-1)
        eos = without_eos[0][2], without_eos[1][4], without_eos[2][6]
        steps, expected = [], []
        for row in prefix[:, None]:
            calls.clear()
            expected += generate(lm, row, 12, beams=beams, early_stopping=True, eos_id=eos)
            steps.append(len(calls))
        calls.clear()
        assert generate(lm, prefix, 12, beams=beams, early_stopping=True, eos_id=eos) == expected
        assert len(set(steps)) >= 3, steps
        rows = [sum(n > i for n in steps) for i in range(max(steps))]
        assert calls == [(rows[0], 6)] + [(n, beams) for n in rows[1:]]


def test_no_rows_or_no_tokens_need_no_work(tmp_path):
    _, lm = make(tmp_path, 0)
    calls = record_calls(lm)
    for beams in (1, 3):
        assert generate(lm, random_prefix(3, 5, 0), 0, beams=beams) == [[], [], []]
        assert generate(lm, random_prefix(3, 5, 0)[:0], beams=beams) == []
    assert not calls


# ------------------------------------------------------------------------------------ public files


def stories260k() -> Path:
    if "QADAPTER_REAL" not in os.environ:
        pytest.skip("QADAPTER_REAL is not set")
    return Path(os.environ["QADAPTER_REAL"]) / "stories260K"


def test_stories260k_generates_the_story_of_its_author():
    """200 greedy tokens after BOS: the text is equal to the output of [2]."""
    folder = stories260k()
    lm = CausalLM.from_pretrained(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    # [2] stops at BOS, not at EOS.
    (ids,) = generate(lm, lm.embed(torch.tensor([[lm.config.bos_id]])), 200, eos_id=lm.config.bos_id)
    assert len(ids) == 200
    assert processor.decode(ids) == (folder / "expected_greedy_200.txt").read_text()


def test_stories260k_searches_as_the_reference_does():
    """Four prefixes, five beams, 40 tokens, a full stop as EOS."""
    folder = stories260k()
    theirs, lm = LlamaForCausalLM.from_pretrained(folder).eval(), CausalLM.from_pretrained(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = "Once upon a time", "The big dog was", "Lily and Tom saw", "He had a ball"
    ids = torch.tensor([[1, *processor.encode(text)[:4]] for text in texts])
    prefix, full_stop = lm.embed(ids).detach(), processor.encode("a.")[-1]
    for penalty in (0.0, 1.0, 2.0):
        expected, _ = reference(theirs, prefix, 40, 3, 5, penalty, False, (full_stop,))
        assert generate(lm, prefix, 40, 3, 5, penalty, eos_id=full_stop) == expected
        assert 3 <= min(map(len, expected)) < 40


# ---------------------------------------------------------------------------------------- errors


def test_too_few_positions_are_refused_before_any_work(tmp_path):
    """The model has 12 positions, and all may be used: the last token is generated but not read."""
    _, lm = make(tmp_path, 0, max_position_embeddings=12)
    x, calls = random_prefix(1, 10, 0), record_calls(lm)
    for beams in (1, 3):
        assert len(generate(lm, x, 3, beams=beams, eos_id=-1)[0]) == 3
        calls.clear()
        with refused("10 positions before a caption and 3 of its 4 tokens, without the last, need 13, it has 12"):
            generate(lm, x, 4, beams=beams, eos_id=-1)
        assert not calls


@pytest.mark.parametrize("options", [
    {"max_new_tokens": -1}, {"min_new_tokens": -1}, {"min_new_tokens": 31}, {"beams": 0}, {"beams": 24},
    {"beams": 23, "eos_id": (1, 2)}, {"length_penalty": float("nan")}, {"length_penalty": float("inf")},
    {"early_stopping": "soon"},
])  # fmt: skip
def test_invalid_options_are_refused(tmp_path, options):
    """The model has 24 tokens, so 23 beams are possible with one EOS token."""
    _, lm = make(tmp_path, 0)
    generate(lm, random_prefix(1, 2, 0), 3, beams=23)
    with refused(next(iter(options))):
        generate(lm, random_prefix(1, 2, 0), **options)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused(tmp_path, value, beams):
    """A single such weight of the head, of a token that would not be generated."""
    _, lm = make(tmp_path, 0)
    prefix = random_prefix(2, 3, 0)
    generated = sum(generate(lm, prefix, 5, beams=beams), [])
    with torch.no_grad():
        lm.head.weight[next(i for i in range(24) if i not in generated)] = value
    with refused("not finite"):
        generate(lm, prefix, 5, beams=beams)
