"""Text generation after a prefix of embeddings: greedy search, beam search and samples.

Beam search keeps the n most likely hypotheses of each text, extends each by every token and keeps the n most likely
again. A hypothesis that ends in EOS is finished and frees its place. The best finished one wins: its score is the sum
of its tokens' log-probabilities, EOS among them, divided by their number [2]. The estimate that stops the search is the
reference's [1] for its default settings, length_penalty=1 and early_stopping=False.

The prefix runs once per text. Then each beam has its own row of the key-value cache; a step moves the rows to where
their hypotheses are. Finished texts leave the batch. `naive_generate` and `naive_beam_search`, at the end, are the same
algorithms without a cache.

Shapes: B texts, R of them not finished, S positions of the prefix, C width, V vocabulary, n beams.

References
[1] transformers, generation/utils.py, `_beam_search`: which finished hypotheses count, and when to stop.
[2] Division by the length, https://arxiv.org/abs/1609.08144, section 7, here in the simpler form of [1].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import InputError
from models.lm import CausalLM, KVCache, VisualPlaces

TEMPERATURE = 0.7  # of `sample`: at 1, a small frozen language model hardly writes a sentence


@torch.inference_mode()
def generate(lm: CausalLM, prefix: Tensor, beams: int = 1, max_new_tokens: int = 30,
             places: VisualPlaces | None = None) -> list[list[int]]:
    """Returns the new token ids of each text after prefix embeddings (B, S, C), without EOS. They equal those of [1].

    With one beam the search is greedy. places: of the prefix. Raises InputError for logits that are not finite;
    `Captioner.check_length` refuses, before any work, more beams or positions than there are.
    """
    prefix = prefix.to(lm.embed.weight.dtype)
    if beams == 1:
        texts = write_texts(lm, prefix, lambda logits: logits.argmax(-1), max_new_tokens, places)
    else:
        texts = beam_search(lm, prefix, beams, max_new_tokens, places)
    return [ids[:-1] if ids[-1] in lm.config.eos_ids else ids for ids in texts]


def next_logits(lm: CausalLM, x: Tensor, cache: KVCache) -> Tensor:
    """Embeddings (R, S, C), which follow the cache -> float32 logits of the next token (R, V)."""
    logits = lm.head(lm.hidden(x, cache)[:, -1].contiguous()).float()
    if not logits.sum().isfinite():  # argmax and topk take NaN for the maximum
        raise InputError(f"language model: its logits after {cache.length} positions are not finite, in {x.dtype}")
    return logits


def write_texts(lm: CausalLM, prefix: Tensor, choose: Callable[[Tensor], Tensor], max_new: int,
                places: VisualPlaces | None, count: int = 1) -> list[list[int]]:
    """Returns `count` texts after each prefix (B, S, C), with the EOS of those that end.

    choose: from logits (R, V), the token that each of R texts goes on with (R,).
    """
    cache = KVCache(lm.config, len(prefix) * count, prefix.shape[1] + max_new - 1, prefix, places)
    logits = next_logits(lm, prefix, cache)  # (B, V)
    if count > 1:
        rows = torch.arange(len(prefix), device=prefix.device).repeat_interleave(count)
        logits = logits[rows]  # (R, V)
        cache.select_rows(rows)
    texts: list[list[int]] = [[] for _ in range(len(logits))]
    running = texts  # the texts of the rows
    for length in range(1, max_new + 1):
        tokens = choose(logits).tolist()
        for text, token in zip(running, tokens, strict=True):
            text.append(token)
        active = [row for row, token in enumerate(tokens) if token not in lm.config.eos_ids]
        if not active or length == max_new:
            break
        if len(active) < len(tokens):
            running = [running[row] for row in active]
            cache.select_rows(torch.tensor(active, device=prefix.device))
        last = torch.tensor([[text[-1]] for text in running], device=prefix.device)
        logits = next_logits(lm, lm.embed(last), cache)  # (R, V)
    return texts


@torch.no_grad()
def sample(lm: CausalLM, prefix: Tensor, count: int, max_new_tokens: int = 30,
           places: VisualPlaces | None = None) -> list[list[list[int]]]:
    """Draws `count` texts after each prefix (B, S, C), token by token, from softmax(logits / TEMPERATURE). Returns
    their ids, with the EOS of those that end."""

    def draw(logits: Tensor) -> Tensor:
        cumulative = (logits / TEMPERATURE).softmax(-1).cumsum(-1)  # (R, V)
        drawn = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, drawn)[:, 0]  # torch.multinomial takes ten times as long

    prefix = prefix.to(lm.embed.weight.dtype)
    texts = write_texts(lm, prefix, draw, max_new_tokens, places, count)
    return [texts[i : i + count] for i in range(0, len(texts), count)]


class Hypothesis(NamedTuple):
    score: float  # sum of its tokens' log-probabilities, of a finished one divided by their number
    ids: list[int]
    row: int = 0  # of the cache: where all of its tokens but the last are


def beam_search(lm: CausalLM, prefix: Tensor, beams: int, max_new: int,
                places: VisualPlaces | None) -> list[list[int]]:
    """Returns the best finished hypothesis of each text, with its EOS."""
    start, eos_ids = prefix.shape[1], lm.config.eos_ids
    cache = KVCache(lm.config, len(prefix) * beams, start + max_new - 1, prefix, places)
    running = [[Hypothesis(0.0, [])] for _ in prefix]  # of each text, best first
    finished: list[list[Hypothesis]] = [[] for _ in prefix]
    active, x = list(range(len(prefix))), prefix  # the texts that go on, and what follows the cache
    for length in range(1, max_new + 1):
        log_probs = next_logits(lm, x, cache).log_softmax(-1)  # (Rn, V); a text has one row in the first step
        # All EOS of all beams may come first, and n other candidates are needed.
        candidates = best_candidates([running[text] for text in active], log_probs, (1 + len(eos_ids)) * beams)
        searched, active = active, []
        for text, best in zip(searched, candidates, strict=True):
            running[text] = [h for h in best if h.ids[-1] not in eos_ids][:beams]
            # As in [1], candidates beyond the first n do not count as finished.
            ended = [h for h in best[:beams] if h.ids[-1] in eos_ids or length == max_new]
            finished[text] += [Hypothesis(h.score / length, h.ids) for h in ended]
            finished[text] = sorted(finished[text], key=lambda h: -h.score)[:beams]
            # It goes on until the n-th best finished one is at least as good as the best running one would be now.
            if len(finished[text]) < beams or running[text][0].score / length > finished[text][-1].score:
                active.append(text)
        if not active or length == max_new:
            break
        following = [h for text in active for h in running[text]]
        # The prefix is copied to new rows after the first step, and moves up where a text has left.
        moved_from = start if length > 1 and len(active) == len(searched) else 0
        cache.select_rows(torch.tensor([h.row for h in following], device=x.device), moved_from)
        x = lm.embed(torch.tensor([h.ids[-1:] for h in following], device=x.device))  # (Rn, 1, C)
    return [hypotheses[0].ids for hypotheses in finished]


def best_candidates(running: list[list[Hypothesis]], log_probs: Tensor, count: int) -> list[list[Hypothesis]]:
    """R lists of n hypotheses and the log-probabilities of their next tokens (Rn, V) -> for each text the `count` best
    hypotheses of one token more, best first."""
    n, vocab = len(running[0]), log_probs.shape[1]
    scores = torch.tensor([h.score for beams in running for h in beams], device=log_probs.device)  # (Rn,)
    scores = (log_probs + scores[:, None]).unflatten(0, (-1, n)).flatten(1)  # (R, nV)
    best, indices = (tensor.tolist() for tensor in scores.topk(min(count, n * vocab)))  # (R, count)
    candidates = []
    for text, beams in enumerate(running):
        pairs = zip(best[text], (divmod(i, vocab) for i in indices[text]), strict=True)
        candidates.append([Hypothesis(score, [*beams[k].ids, token], text * n + k) for score, (k, token) in pairs])
    return candidates


# ------------------------------------------------------------- the same without a cache, slow, for reading


@torch.no_grad()
def naive_generate(lm: CausalLM, prefix: Tensor, max_new_tokens: int, eos_id: int) -> list[list[int]]:
    """Greedy search, text by text; each step runs the whole text again."""
    texts = []
    for x in prefix[:, None]:  # (1, S, C)
        ids: list[int] = []
        while len(ids) < max_new_tokens and (best := int(lm(x)[0, -1].argmax())) != eos_id:
            ids.append(best)
            x = torch.cat([x, lm.embed(torch.tensor([[best]], device=x.device))], dim=1)
        texts.append(ids)
    return texts


@torch.no_grad()
def naive_beam_search(lm: CausalLM, prefix: Tensor, beams: int, max_new_tokens: int, eos_id: int) -> list[int]:
    """Beam search for one text after a prefix (S, C); hypotheses are (score, ids) in plain lists."""
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
        finished = sorted(finished + [(score / length, ids) for score, ids in ended], reverse=True)[:beams]
        if len(finished) == beams and running[0][0] / length <= finished[-1][0]:
            break
    best = finished[0][1]
    return best[:-1] if best[-1] == eos_id else best
