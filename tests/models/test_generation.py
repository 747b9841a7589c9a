"""Decoding, against transformers' `generate` [1] on tiny random Llama models: the ids are equal, token for token.

Models go through real files. Their heads are drawn loud enough that a caption is some tokens likelier than others, and
EOS is a token that captions of the model hold, so that they end at many lengths; what occurs is counted. The cached
search is also held to the plain one beside it, and, where the environment variable QADAPTER_REAL names a folder of
public files, greedy decoding to what the author's own program [2] writes.

[1] transformers, generation/utils.py (`_sample`, `_beam_search`) and generation/logits_process.py
[2] run.c of https://github.com/karpathy/llama2.c, on its model stories260K
"""

import os
import random
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import test_lm_families
import torch
import torch.nn.functional as F
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from decode import Beam, Clip, Rules, generate, naive_beam_search, naive_generate
from lm import CausalLM, KVCache
from weights import InputError

disable_progress_bar()

EARLY = [False, True, "never"]
PENALTIES = [-1.0, 0.0, 0.6, 1.0, 2.0]


def make(folder: Path, seed: int, vocab: int = 24, **fields) -> tuple[LlamaForCausalLM, CausalLM]:
    """A random reference model, every parameter drawn, and ours from the folder it saves."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=(4, 2, 1)[seed % 3], num_hidden_layers=2,
                 intermediate_size=40, max_position_embeddings=64, tie_word_embeddings=False) | fields  # fmt: skip
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **shape)).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.4 if "head" in name or "embed" in name else 0.2)
    theirs.save_pretrained(folder)
    return theirs, CausalLM.from_pretrained(folder)


def inputs(rows: int, length: int, seed: int, width: int = 32) -> torch.Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))


def until(row: list[int], eos: tuple[int, ...]) -> list[int]:
    """A row of the reference's, which pads after EOS, up to its first EOS."""
    return row[: min((row.index(e) for e in eos if e in row), default=len(row))]


def expected(theirs: LlamaForCausalLM, prefix: torch.Tensor, new: int, least: int, beams: int, penalty: float,
             early: bool | str, eos: tuple[int, ...]) -> tuple[list[list[int]], int]:  # fmt: skip
    """The reference's new ids, and for how many steps it ran."""
    only_beams = dict(length_penalty=penalty, early_stopping=early) if beams > 1 else {}
    found = theirs.generate(
        inputs_embeds=prefix, attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long), do_sample=False,
        max_new_tokens=new, min_new_tokens=least, num_beams=beams, eos_token_id=list(eos), pad_token_id=eos[0],
        return_dict_in_generate=True, output_scores=True, **only_beams,
    )  # fmt: skip
    return [until(row, eos) for row in found.sequences.tolist()], len(found.scores)


def calls(lm: CausalLM) -> list[tuple[int, int]]:
    """A list to which each run of the model adds its rows and positions."""
    seen: list[tuple[int, int]] = []
    lm.blocks[0].register_forward_hook(lambda _m, args, _o: seen.append(tuple(args[0].shape[:2])))
    return seen


# --------------------------------------------------------------------------------- the same ids


def test_200_models_say_what_the_reference_says(tmp_path):
    """Model, prefix and choices from seeds 0 to 199; the ids are equal. Beams 1 to 5, one EOS token or two."""
    met = dict.fromkeys(("a row empty", "a row cut short", "a row to the end", "both in a batch", "kept going",
                         "ended beat running", "beams matter", "penalty matters", "True matters",
                         "never matters", "greedy", "two EOS met"), 0)  # fmt: skip
    for seed in range(200):
        draw = random.Random(seed)
        theirs, lm = make(tmp_path, seed, draw.randint(11, 60))
        prefix = inputs(draw.randint(1, 5), draw.choice([1, 4, 9]), seed)
        new, beams, early = draw.choice([1, 5, 9, 18]), draw.randint(1, 5), draw.choice(EARLY)
        penalty = draw.choice([2.0, *PENALTIES] if early == "never" else PENALTIES)
        least = draw.choice([0, 0, draw.randint(1, new)])
        free = [token for row in generate(lm, prefix, new, beams=beams, eos_id=-1) for token in row]
        eos = tuple(dict.fromkeys(draw.choices(free, k=draw.choice([1, 1, 2]))))
        want, steps = expected(theirs, prefix, new, least, beams, penalty, early, eos)
        said = partial(generate, lm, prefix, new, min_new_tokens=least, beams=beams, length_penalty=penalty,
                       early_stopping=early, eos_id=eos if len(eos) > 1 else eos[0])  # fmt: skip
        assert said() == want, f"seed {seed}"

        lengths = [len(row) for row in want]
        met["a row empty"] += 0 in lengths
        met["a row cut short"] += any(0 < n < new for n in lengths)
        met["a row to the end"] += new in lengths
        met["both in a batch"] += min(lengths) < new and new in lengths
        met["kept going"] += least > 0 and said(min_new_tokens=0) != want
        met["ended beat running"] += beams > 1 and steps == new and max(lengths) < new - 1
        met["beams matter"] += beams > 1 and said(beams=1) != want
        met["penalty matters"] += beams > 1 and said(length_penalty=penalty - 2) != want
        if beams > 1 and early is not False:
            met[f"{early} matters"] += said(early_stopping=False) != want
        met["greedy"] += beams == 1
        met["two EOS met"] += len(eos) > 1 and min(lengths) < new
    assert min(met.values()) >= 3, met


@pytest.mark.parametrize("family", ["mistral", "gemma"])
def test_windows_are_searched_through_as_the_reference_does(tmp_path, family):
    """Models and choices from seeds 400 to 409, a window of 7 positions, 14 to 26 in all, 1 to 5 beams: equal ids."""
    met = 0
    for seed in range(400, 410):
        draw = random.Random(seed)
        theirs = test_lm_families.make(tmp_path, test_lm_families.CASES[family], seed)
        lm, new, beams, penalty = CausalLM.from_pretrained(tmp_path), 14, draw.randint(1, 5), draw.choice(PENALTIES)
        prefix = lm.embed(test_lm_families.some_ids(3, draw.choice([1, 5, 12]), seed))
        free = [token for row in generate(lm, prefix, new, beams=beams, eos_id=-1) for token in row]
        eos = (draw.choice(free),)
        want, _ = expected(theirs, prefix.detach(), new, 0, beams, penalty, False, eos)
        assert generate(lm, prefix, new, beams=beams, length_penalty=penalty, eos_id=eos) == want, f"seed {seed}"
        met += min(map(len, want)) < new
    assert met >= 3


def test_a_clip_is_over_when_the_reference_s_is():
    """2000 draws from seed 0 of two running scores and two ended ones: [1]'s `_check_early_stop_heuristic` agrees."""
    draw, met = random.Random(0), {}
    for _ in range(2000):
        length, penalty, early = draw.randint(1, 11), draw.choice(PENALTIES), draw.choice([False, "never"])
        best, sums = -draw.uniform(1, 9), sorted((-draw.uniform(1, 9) for _ in range(2)), reverse=True)
        ended = [one / length**penalty for one in sums]
        goes_on = GenerationMixin._check_early_stop_heuristic(
            torch.ones(1, 1, dtype=torch.bool), torch.tensor([[best, best - 1]]), torch.tensor([ended]),
            torch.ones(1, 2, dtype=torch.bool), length, 12, 0, early, penalty)  # fmt: skip
        clip = Clip([Beam(best, 0, []), Beam(best - 1, 1, [])], [(score, []) for score in ended])
        assert clip.over(length, Rules(12, 0, 2, penalty, early, frozenset())) != bool(goes_on)
        met[early, penalty > 0, bool(goes_on)] = True
    assert len(met) == 8


def test_the_cached_search_is_the_plain_one(tmp_path):
    """Model, prefix and choices from seeds 300 to 319; three clips at once are three searches, with the same ids."""
    ended = 0
    for seed in range(300, 320):
        draw = random.Random(seed)
        _, lm = make(tmp_path, seed, 12)
        prefix, new = inputs(3, 4, seed), draw.choice([2, 6])
        beams, penalty = draw.randint(2, 4), draw.choice(PENALTIES)
        eos = draw.choice(generate(lm, prefix, new, beams=beams, eos_id=-1)[0])
        found = generate(lm, prefix, new, beams=beams, length_penalty=penalty, eos_id=eos)
        assert found == [naive_beam_search(lm, row, new, beams, penalty, eos) for row in prefix], f"seed {seed}"
        assert generate(lm, prefix, new, eos_id=eos) == naive_generate(lm, prefix, new, eos), f"seed {seed}"
        ended += min(map(len, found)) < new
    assert ended >= 5


def test_eos_is_the_config_s_unless_told_otherwise(tmp_path):
    """Model seed 0, prefix seed 13: with the token that a row emits third as EOS, that row has two tokens."""
    prefix = inputs(4, 5, 13)
    _, lm = make(tmp_path, 0, 50)
    free = naive_generate(lm, prefix, 8, eos_id=-1)
    row = next(i for i, ids in enumerate(free) if ids[2] not in ids[:2])
    _, lm = make(tmp_path, 0, 50, eos_token_id=free[row][2])
    found = generate(lm, prefix, 8)
    assert found[row] == free[row][:2]
    assert not any(free[row][2] in ids for ids in found)
    assert generate(lm, prefix, 8, eos_id=-1) == free


def test_half_precision_says_captions_as_likely(tmp_path):
    """Model seed 0, prefix seed 1: a caption's log-probability, in fp32, is within 0.2 of that of the fp32 model's."""
    _, lm = make(tmp_path, 0)
    prefix, eos = inputs(4, 5, 1), 3

    def likelihoods(rows: list[list[int]]) -> torch.Tensor:
        sums = []
        for x, ids in zip(prefix, rows, strict=True):
            logits = lm(torch.cat([x, lm.embed(torch.tensor(ids[:-1], dtype=torch.long))])[None])[0, len(x) - 1 :]
            sums.append(-F.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        return torch.stack(sums)

    with torch.no_grad():
        for beams in (1, 4):
            best = likelihoods(generate(lm, prefix, 8, 8, beams, eos_id=eos))
            for dtype in (torch.bfloat16, torch.float16):
                _, half = make(tmp_path, 0)
                found = generate(half.to(dtype), prefix.to(dtype), 8, 8, beams, eos_id=eos)
                assert generate(half, prefix, 8, 8, beams, eos_id=eos) == found  # and after a prefix of fp32
                torch.testing.assert_close(likelihoods(found), best, rtol=0, atol=0.2)


# ------------------------------------------------------------------------------------ how much is run


def test_the_prefix_runs_once_a_clip_and_a_step_is_one_position(tmp_path):
    """Model seed 1, prefix seed 2: nobody ends, so all five beams of the three clips run to the last token but one."""
    _, lm = make(tmp_path, 1)
    seen = calls(lm)
    for beams in (1, 5):
        seen.clear()
        assert [len(row) for row in generate(lm, inputs(3, 7, 2), 6, beams=beams, eos_id=-1)] == [6] * 3
        assert seen == [(3, 7)] + [(3, beams)] * 5


def test_clips_that_are_done_leave_the_batch(tmp_path):
    """Model seed 3, prefix seed 4, each clip alone and all together: a step runs the rows of those that still go on."""
    _, lm = make(tmp_path, 3)
    prefix, seen = inputs(8, 6, 4), calls(lm)
    for beams in (1, 3):
        free = generate(lm, prefix, 12, beams=beams, eos_id=-1)
        eos = free[0][2], free[1][4], free[2][6]
        alone, found = [], []
        for row in prefix[:, None]:
            seen.clear()
            found += generate(lm, row, 12, beams=beams, early_stopping=True, eos_id=eos)
            alone.append(len(seen))
        seen.clear()
        assert generate(lm, prefix, 12, beams=beams, early_stopping=True, eos_id=eos) == found
        assert len(set(alone)) >= 3, alone
        rows = [sum(steps > i for steps in alone) for i in range(max(alone))]
        assert seen == [(rows[0], 6)] + [(n, beams) for n in rows[1:]]


def test_a_cache_of_kept_rows_is_that_of_those_rows(tmp_path):
    """Model seed 5, embeddings seed 6, tolerance 1e-5: three rows become two, in another order."""
    _, lm = make(tmp_path, 5)
    x, rows = inputs(3, 9, 6), torch.tensor([2, 0])
    with torch.no_grad():
        cache = KVCache(lm.config, 3, 9, x)
        lm(x[:, :6], cache)
        cache.keep(rows)
        steps = [lm(x[rows, i : i + 1], cache) for i in range(6, 9)]
        torch.testing.assert_close(torch.cat(steps, dim=1), lm(x[rows])[:, 6:], rtol=0, atol=1e-5)


def test_nothing_asked_for_gives_nothing(tmp_path):
    _, lm = make(tmp_path, 0)
    seen = calls(lm)
    for beams in (1, 3):
        assert generate(lm, inputs(3, 5, 0), 0, beams=beams) == [[], [], []]
        assert generate(lm, inputs(3, 5, 0)[:0], beams=beams) == []
    assert not seen


# --------------------------------------------------------------------------------- public files


def stories() -> Path:
    if "QADAPTER_REAL" not in os.environ:
        pytest.skip("QADAPTER_REAL names no folder of public files")
    return Path(os.environ["QADAPTER_REAL"]) / "stories260K"


def test_stories260k_tells_its_author_s_story():
    """200 greedy tokens after BOS, printed as [2] prints them; characters are equal, nothing is random."""
    folder = stories()
    lm = CausalLM.from_pretrained(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    # [2] stops at BOS and not at EOS.
    (ids,) = generate(lm, lm.embed(torch.tensor([[lm.config.bos_id]])), 200, eos_id=lm.config.bos_id)
    assert len(ids) == 200
    assert pieces.decode(ids) == (folder / "expected_greedy_200.txt").read_text()


def test_stories260k_searches_as_the_reference_does():
    """Four beginnings, five beams, 40 tokens, a full stop as EOS; the ids are equal, nothing is random."""
    folder = stories()
    theirs, lm = LlamaForCausalLM.from_pretrained(folder).eval(), CausalLM.from_pretrained(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = "Once upon a time", "The big dog was", "Lily and Tom saw", "He had a ball"
    begun = torch.tensor([[1, *pieces.encode(text)[:4]] for text in texts])
    prefix, stop = lm.embed(begun).detach(), pieces.encode("a.")[-1]
    for penalty in (0.0, 1.0, 2.0):
        want, _ = expected(theirs, prefix, 40, 3, 5, penalty, False, (stop,))
        assert generate(lm, prefix, 40, 3, 5, penalty, eos_id=stop) == want
        assert 3 <= min(map(len, want)) < 40


# ---------------------------------------------------------------------------------------- errors


def test_positions_beyond_the_model_s_are_refused_before_any_work(tmp_path):
    """12 positions are all there are, and decoding may use them all: the last token is said and never read."""
    _, lm = make(tmp_path, 0, max_position_embeddings=12)
    x, seen = inputs(1, 10, 0), calls(lm)
    for beams in (1, 3):
        assert len(generate(lm, x, 3, beams=beams, eos_id=-1)[0]) == 3
        seen.clear()
        with pytest.raises(InputError, match="10 positions and 4 new tokens need 13 positions, it has 12"):
            generate(lm, x, 4, beams=beams, eos_id=-1)
        assert not seen


@pytest.mark.parametrize("asked", [
    {"max_new_tokens": -1}, {"min_new_tokens": -1}, {"min_new_tokens": 31}, {"beams": 0}, {"beams": 24},
    {"beams": 23, "eos_id": (1, 2)}, {"length_penalty": float("nan")}, {"length_penalty": float("inf")},
    {"early_stopping": "soon"},
])  # fmt: skip
def test_what_makes_no_sense_is_one_line(tmp_path, asked):
    """The model has 24 tokens: with one for EOS, 23 beams are possible."""
    _, lm = make(tmp_path, 0)
    generate(lm, inputs(1, 2, 0), 3, beams=23)
    with pytest.raises(InputError, match=next(iter(asked))) as error:
        generate(lm, inputs(1, 2, 0), **asked)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_are_refused(tmp_path, value, beams):
    """A single bad weight of the head, of a token that would not be said."""
    _, lm = make(tmp_path, 0)
    prefix = inputs(2, 3, 0)
    with torch.no_grad():
        lm.head.weight[next(i for i in range(24) if i not in sum(generate(lm, prefix, 5, beams=beams), []))] = value
    with pytest.raises(InputError, match="not finite") as error:
        generate(lm, prefix, 5, beams=beams)
    assert str(error.value).isprintable()
