"""Text generation after a prefix of embeddings: greedy search and beam search.

Beam search [1] keeps the `beams` most likely hypotheses of each row, extends each by every token and keeps the most
likely again. A hypothesis that ends in EOS is finished and frees its place. The best finished one wins: its score is
the sum of its tokens' log-probabilities, EOS among them, divided by (their number)^length_penalty [2].

The prefix is run once per row. All beams of a row share one row of the cache, as a tree [3]: the prefix, then a slot
for each token of each beam. A beam attends to the prefix, its own slots and those of its ancestors. So no slot is
copied or moved when beams are selected; slots of dropped beams stay, but are visible to none. Finished rows leave the
batch. `naive_beam_search`, at the end, is the same algorithm in plain steps.

Letters: B rows, S positions of the prefix, C width, V vocabulary, n beams, R rows that are not finished.

References
[1] transformers, generation/utils.py, `_beam_search`: which finished hypotheses count, and when to stop.
[2] The length penalty, https://arxiv.org/abs/1609.08144, section 7, here in the simpler form of [1].
[3] Attention over a tree of tokens, masked to ancestors: https://arxiv.org/abs/2305.09781, section 4.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import InputError
from models.lm import CausalLM, KVCache, LMConfig


@dataclass(frozen=True)
class GenerationConfig:
    max_new_tokens: int
    min_new_tokens: int  # EOS is not allowed before
    beams: int
    length_penalty: float  # above 0 favours long texts, below 0 short ones: log-probabilities are negative
    early_stopping: bool | str  # True: stop at `beams` finished hypotheses; False, "never": see BeamSearch.is_finished
    eos_ids: frozenset[int]


def make_generation_config(lm_config: LMConfig, prefix_length: int, max_new_tokens: int = 30, min_new_tokens: int = 0,
                           beams: int = 1, length_penalty: float = 1.0, early_stopping: bool | str = False,
                           eos_id: int | tuple[int, ...] | None = None) -> GenerationConfig:  # fmt: skip
    """Checks the settings of `generate` for a prefix of `prefix_length` positions. Raises InputError."""
    eos_ids = lm_config.eos_ids if eos_id is None else eos_id
    eos_ids = frozenset(eos_ids if isinstance(eos_ids, tuple | list) else [eos_ids]) & frozenset(range(lm_config.vocab))
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("beams", beams, 1)):
        if value < least:
            raise InputError(f"{name}: {value}, expected at least {least}")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise InputError(f"min_new_tokens: {min_new_tokens}, expected from 0 to max_new_tokens, {max_new_tokens}")
    if beams > (most := lm_config.vocab - len(eos_ids)):
        raise InputError(f"beams: {beams}, expected at most {most}, the vocabulary without EOS")
    if not -10 <= length_penalty <= 10:
        raise InputError(f"length_penalty: {length_penalty}, expected a number from -10 to 10")
    if early_stopping not in (False, True, "never"):
        raise InputError(f"early_stopping: {early_stopping!r}, expected False, True or 'never'")
    needed = prefix_length + max_new_tokens - 1  # the last token is not fed back
    if needed > lm_config.max_positions:
        raise InputError(f"language model: {prefix_length} positions before a caption and {max_new_tokens - 1} of its "
                         f"{max_new_tokens} tokens, without the last, need {needed}, it has {lm_config.max_positions}; "
                         "--frames and --max-new-tokens may be lower")  # fmt: skip
    return GenerationConfig(max_new_tokens, min_new_tokens, beams, length_penalty, early_stopping, eos_ids)


@torch.inference_mode()
def generate(lm: CausalLM, prefix: Tensor, max_new_tokens: int = 30, min_new_tokens: int = 0, beams: int = 1,
             length_penalty: float = 1.0, early_stopping: bool | str = False,
             eos_id: int | tuple[int, ...] | None = None) -> list[list[int]]:  # fmt: skip
    """Generates after prefix embeddings (B, S, C): the new token ids of each row, without EOS. They equal those of [1].

    With one beam the search is greedy and ignores length_penalty and early_stopping. eos_id is one or several tokens;
    None: all of the model's config. Raises InputError for wrong settings or too few positions, before any work, and
    for logits that are not finite.
    """
    config = make_generation_config(lm.config, prefix.shape[1], max_new_tokens, min_new_tokens, beams, length_penalty,
                                    early_stopping, eos_id)  # fmt: skip
    if not len(prefix) or not max_new_tokens:
        return [[] for _ in prefix]
    search = greedy_search if beams == 1 else beam_search
    return search(lm, prefix.to(lm.embed.weight.dtype), config)


def next_logits(lm: CausalLM, x: Tensor, cache: KVCache, **tree: Tensor) -> Tensor:
    """Embeddings (R, S, C), which follow the cache -> float32 logits of the next token: after the last position
    (R, 1, V), or with `positions` and `visible` for `CausalLM.hidden` after each position (R, S, V)."""
    x = lm.hidden(x, cache, **tree)
    logits = lm.head(x if tree else x[:, -1:].contiguous()).float()
    if not logits.sum().isfinite():  # argmax and topk take NaN for the maximum
        raise InputError(f"language model: its logits after {len(cache)} positions are not finite, in {x.dtype}")
    return logits


def greedy_search(lm: CausalLM, prefix: Tensor, config: GenerationConfig) -> list[list[int]]:
    """Takes the most likely token at each step."""
    cache = KVCache(lm.config, len(prefix), prefix.shape[1] + config.max_new_tokens, prefix)
    outputs: list[list[int]] = [[] for _ in prefix]
    running, x = outputs, prefix  # the outputs of the rows of x
    for length in range(1, config.max_new_tokens + 1):
        logits = next_logits(lm, x, cache)[:, 0]  # (R, V)
        if length <= config.min_new_tokens:
            logits[:, list(config.eos_ids)] = -torch.inf
        tokens = logits.argmax(-1).tolist()
        active = [row for row, token in enumerate(tokens) if token not in config.eos_ids]
        for row in active:
            running[row].append(tokens[row])
        if not active or length == config.max_new_tokens:
            break
        if len(active) < len(running):
            running = [running[row] for row in active]
            cache.select_rows(torch.tensor(active, device=x.device))
        x = lm.embed(torch.tensor([tokens[row] for row in active], device=x.device))[:, None]  # (R, 1, C)
    return outputs


# ------------------------------------------------------------------------------------ beam search


class Hypothesis(NamedTuple):
    score: float  # sum of log-probabilities
    parent: int  # index of its beam in the step before
    ids: list[int]


@dataclass
class BeamSearch:
    """The search of one row."""

    running: list[Hypothesis]  # best first
    finished: list[tuple[float, list[int]]]  # (score with length penalty, ids), best first

    def advance(self, candidates: list[tuple[float, int, int]], length: int, config: GenerationConfig) -> None:
        """Takes the best candidates (score, beam, next token) of `length` tokens, best first, enough for all beams."""
        parents, self.running = self.running, []
        for rank, (score, parent, token) in enumerate(candidates):
            ids = [*parents[parent].ids, token]
            if token in config.eos_ids or length == config.max_new_tokens:
                if rank < config.beams:  # as in [1]: others do not count as finished
                    self.finished.append((score / length**config.length_penalty, ids))
            elif len(self.running) < config.beams:
                self.running.append(Hypothesis(score, parent, ids))
        self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis[0])[: config.beams]

    def is_finished(self, length: int, config: GenerationConfig) -> bool:
        """Whether the best running hypothesis cannot become one of the best finished ones, as [1] estimates it.

        The estimate takes all further tokens for certain, so only the length can change the score. early_stopping False
        takes the present length, and may stop too soon if length_penalty is above 0. "never" then takes max_new_tokens.
        """
        if length == config.max_new_tokens:
            return True
        if len(self.finished) < config.beams or config.early_stopping is True:
            return len(self.finished) == config.beams
        longest = config.early_stopping == "never" and config.length_penalty > 0
        final_length = config.max_new_tokens if longest else length
        return self.running[0].score / final_length**config.length_penalty <= self.finished[-1][0]


def top_candidates(log_probs: Tensor, scores: Tensor, count: int) -> list[list[tuple[float, int, int]]]:
    """Log-probabilities (R, n, V) after beams with scores (R, n) -> each row's best (score, beam, token)."""
    # A row's best are among the best of each beam, so only those are added up and sorted.
    best, tokens = log_probs.topk(min(count, log_probs.shape[2]))  # (R, n, k)
    k = best.shape[2]
    best, indices = (best + scores[:, :, None]).flatten(1).topk(min(count, scores.shape[1] * k))  # (R, count)
    beams, tokens = indices // k, tokens.flatten(1).take_along_dim(indices, 1)
    return [list(zip(*row, strict=True)) for row in zip(best.tolist(), beams.tolist(), tokens.tolist(), strict=True)]


def beam_search(lm: CausalLM, prefix: Tensor, config: GenerationConfig) -> list[list[int]]:
    start, device = prefix.shape[1], prefix.device
    cache = KVCache(lm.config, len(prefix), start + config.beams * (config.max_new_tokens - 1), prefix)
    searches = [BeamSearch([Hypothesis(0.0, 0, [])], []) for _ in prefix]
    running, x, tree = searches, prefix, {}
    visible = torch.ones(len(prefix), 1, start, dtype=torch.bool, device=device)  # (R, n, slots)
    new_slots = torch.eye(config.beams, dtype=torch.bool, device=device)  # each beam sees its own new slot
    for length in range(1, config.max_new_tokens + 1):
        log_probs = next_logits(lm, x, cache, **tree).log_softmax(-1)  # (R, n, V); n is 1 in the first step
        if length <= config.min_new_tokens:
            log_probs[..., list(config.eos_ids)] = -torch.inf
        scores = torch.tensor([[beam.score for beam in search.running] for search in running], device=device)
        # For each beam all EOS tokens may come first, and `beams` other candidates are needed.
        candidates = top_candidates(log_probs, scores, (1 + len(config.eos_ids)) * config.beams)
        for search, best in zip(running, candidates, strict=True):
            search.advance(best, length, config)
        active = [row for row, search in enumerate(running) if not search.is_finished(length, config)]
        if not active:
            break
        if len(active) < len(running):
            running = [running[row] for row in active]
            rows = torch.tensor(active, device=device)
            cache.select_rows(rows)
            visible = visible[rows]
        parents = torch.tensor([[beam.parent for beam in search.running] for search in running], device=device)
        visible = visible.take_along_dim(parents[:, :, None], 1)
        visible = torch.cat([visible, new_slots.expand(len(active), -1, -1)], dim=2)
        tree = {"visible": visible, "positions": torch.full((config.beams,), start + length - 1, device=device)}
        last = torch.tensor([[beam.ids[-1] for beam in search.running] for search in running], device=device)  # (R, n)
        x = lm.embed(last)  # (R, n, C)
    winners = [search.finished[0][1] for search in searches]
    return [ids[:-1] if ids[-1] in config.eos_ids else ids for ids in winners]


# ------------------------------------------------------------- the same without a cache, slow, for reading


@torch.no_grad()
def naive_generate(lm: CausalLM, prefix: Tensor, max_new_tokens: int, eos_id: int) -> list[list[int]]:
    """Greedy search, row by row; each step runs the whole text again."""
    rows = []
    for x in prefix[:, None]:  # (1, S, C)
        ids: list[int] = []
        while len(ids) < max_new_tokens and (best := int(lm(x)[0, -1].argmax())) != eos_id:
            ids.append(best)
            x = torch.cat([x, lm.embed(torch.tensor([[best]], device=x.device))], dim=1)
        rows.append(ids)
    return rows


@torch.no_grad()
def naive_beam_search(lm: CausalLM, prefix: Tensor, max_new_tokens: int, beams: int, length_penalty: float,
                      eos_id: int) -> list[int]:  # fmt: skip
    """Beam search for one row (S, C); hypotheses are (score, ids) in plain lists."""
    running, finished = [(0.0, [])], []
    for length in range(1, max_new_tokens + 1):
        candidates = []
        for score, ids in running:
            x = torch.cat([prefix, lm.embed(torch.tensor(ids, dtype=torch.long, device=prefix.device))])
            log_probs = lm(x[None])[0, -1].float().log_softmax(-1).tolist()
            candidates += [(score + log_prob, [*ids, token]) for token, log_prob in enumerate(log_probs)]
        candidates.sort(reverse=True)
        running = [(score, ids) for score, ids in candidates if ids[-1] != eos_id][:beams]
        ended = [(score, ids) for score, ids in candidates[:beams] if ids[-1] == eos_id or length == max_new_tokens]
        finished += [(score / length**length_penalty, ids) for score, ids in ended]
        finished = sorted(finished, reverse=True)[:beams]
        if len(finished) == beams and running[0][0] / length**length_penalty <= finished[-1][0]:
            break
    best = finished[0][1]
    return best[:-1] if best[-1] == eos_id else best


def check_length(config, prefix_length: int, max_new_tokens: int, beams: int) -> None:
    make_generation_config(config, prefix_length, max_new_tokens, 0, beams, 1.0)
