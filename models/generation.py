"""Decoding: what the language model says after a prefix of embeddings, by greedy choice or by beam search.

Beam search [1] keeps the `beams` likeliest beginnings of each clip's caption, prolongs each by every token and keeps
the likeliest again. A beginning that meets EOS has ended and leaves its place to the next; of all that ended, the one
with the best score wins: the sum of its tokens' log-probabilities, EOS among them, over (their number)^length_penalty.

The prefix runs once a clip. All beams of a clip share one row of the cache, a tree [3]: the prefix, and then a slot for
each token that each beam has said. A beam is told by the slots it sees, its own and those of the beams it came from, so
that nothing is copied or moved when beams are chosen. (Slots of beams that were dropped stay, unseen: a step attends to
at most `beams` slots a token.) A clip that is done leaves the batch. `naive_beam_search`, at the end, is the core of it
in plain steps.

Letters: B clips, S positions of the prefix, C width, V vocabulary, n beams, R clips that still run.

References
[1] transformers, generation/utils.py: `_beam_search`, whose rules (which of the ended count, when to stop) are kept to.
[2] The length penalty, https://arxiv.org/abs/1609.08144, section 7, here in the plain form of [1].
[3] Attention over a tree of tokens, with a mask of ancestors: https://arxiv.org/abs/2305.09781, section 4.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lm import CausalLM, KVCache, LMConfig
from weights import InputError


@dataclass(frozen=True)
class Rules:
    """How long captions get, and which of them wins."""

    max_new_tokens: int
    min_new_tokens: int  # so many before EOS is allowed
    beams: int
    length_penalty: float  # above 0 favours long captions, below 0 short ones: log-probabilities are negative
    early_stopping: bool | str  # True: stop at `beams` ended captions; False, "never": see `Clip.over`
    eos: frozenset[int]


def rules_for(config: LMConfig, length: int, max_new_tokens: int = 30, min_new_tokens: int = 0, beams: int = 1,
              length_penalty: float = 1.0, early_stopping: bool | str = False,
              eos_id: int | tuple[int, ...] | None = None) -> Rules:  # fmt: skip
    """What `generate` is to keep to after a prefix of `length` positions; InputError if the model cannot."""
    given = config.eos_ids if eos_id is None else eos_id
    eos = frozenset(given if isinstance(given, tuple | list) else [given]) & frozenset(range(config.vocab))
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("beams", beams, 1)):
        if value < least:
            raise InputError(f"{name}: {value}, expected at least {least}")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise InputError(f"min_new_tokens: {min_new_tokens}, expected from 0 to max_new_tokens, {max_new_tokens}")
    if beams > config.vocab - len(eos):
        raise InputError(f"beams: {beams}, the language model's vocabulary is {config.vocab - len(eos)} tokens and EOS")
    if not -10 <= length_penalty <= 10:
        raise InputError(f"length_penalty: {length_penalty}, expected a number from -10 to 10")
    if early_stopping not in (False, True, "never"):
        raise InputError(f"early_stopping: {early_stopping!r}, expected False, True or 'never'")
    if (needed := length + max_new_tokens - 1) > config.max_positions:  # the last token is said and never read
        raise InputError(f"language model: {length} positions and {max_new_tokens} new tokens need {needed} positions, "
                         f"it has {config.max_positions}")  # fmt: skip
    return Rules(max_new_tokens, min_new_tokens, beams, length_penalty, early_stopping, eos)


@torch.inference_mode()
def generate(lm: CausalLM, prefix: Tensor, max_new_tokens: int = 30, min_new_tokens: int = 0, beams: int = 1,
             length_penalty: float = 1.0, early_stopping: bool | str = False,
             eos_id: int | tuple[int, ...] | None = None) -> list[list[int]]:  # fmt: skip
    """Decodes after prefix embeddings (B, S, C), all rows equally long: the new ids of each row, without EOS.

    With one beam the likeliest token is taken at each step, and length_penalty and early_stopping say nothing. eos_id
    may be several tokens; None: all of the config's. The ids are those of [1]. Raises InputError if the model has too
    few positions or tokens for what is asked, before any work, and as soon as a logit is NaN or infinite.
    """
    rules = rules_for(lm.config, prefix.shape[1], max_new_tokens, min_new_tokens, beams, length_penalty, early_stopping,
                      eos_id)  # fmt: skip
    if not len(prefix) or not max_new_tokens:
        return [[] for _ in prefix]
    return (greedy if beams == 1 else beam_search)(lm, prefix.to(lm.embed.weight.dtype), rules)


def next_logits(lm: CausalLM, x: Tensor, cache: KVCache, **tree: Tensor) -> Tensor:
    """Embeddings (R, S, C) after what the cache holds -> fp32 logits (R, 1, V) of the token after the last of them, or
    (R, n, V) after each if `tree` has the `positions` and the `seen` of `CausalLM.hidden`."""
    x = lm.hidden(x, cache, **tree)
    logits = lm.head(x if tree else x[:, -1:].contiguous()).float()
    if not logits.sum().isfinite():  # argmax and topk would take a NaN for the largest
        raise InputError(f"language model: its logits after {len(cache)} positions are not finite, in {x.dtype}")
    return logits


def greedy(lm: CausalLM, prefix: Tensor, rules: Rules) -> list[list[int]]:
    cache = KVCache(lm.config, len(prefix), prefix.shape[1] + rules.max_new_tokens, prefix)
    said: list[list[int]] = [[] for _ in prefix]
    running, x = said, prefix  # a list for each row of x, in its order
    for length in range(1, rules.max_new_tokens + 1):
        logits = next_logits(lm, x, cache)[:, 0]  # (R, V)
        if length <= rules.min_new_tokens:
            logits[:, list(rules.eos)] = -torch.inf
        ids = logits.argmax(-1).tolist()
        rows = [row for row, token in enumerate(ids) if token not in rules.eos]
        for row in rows:
            running[row].append(ids[row])
        if not rows or length == rules.max_new_tokens:
            break
        if len(rows) < len(running):
            running = [running[row] for row in rows]
            cache.keep(torch.tensor(rows, device=x.device))
        x = lm.embed(torch.tensor([ids[row] for row in rows], device=x.device))[:, None]  # (R, 1, C)
    return said


class Beam(NamedTuple):
    """A beginning of a caption."""

    score: float  # sum of log-probabilities
    parent: int  # which of the clip's beams it was one token ago
    ids: list[int]


@dataclass
class Clip:
    """The search of one clip."""

    running: list[Beam]  # best first
    ended: list[tuple[float, list[int]]]  # (score, ids), best first

    def advance(self, options: list[tuple[float, int, int]], length: int, rules: Rules) -> None:
        """Takes the best (sum, beam, next token), in order, that make `length` tokens; enough to refill the beams."""
        before, self.running = self.running, []
        for rank, (score, parent, token) in enumerate(options):
            ids = [*before[parent].ids, token]
            if token in rules.eos or length == rules.max_new_tokens:
                if rank < rules.beams:  # a worse one would not have been kept, and does not count as ended either
                    self.ended.append((score / length**rules.length_penalty, ids))
            elif len(self.running) < rules.beams:
                self.running.append(Beam(score, parent, ids))
        self.ended = sorted(self.ended, key=lambda one: -one[0])[: rules.beams]

    def over(self, length: int, rules: Rules) -> bool:
        """Whether the best that runs would win no place, even if all it is still to say were certain.

        That needs a length to divide by. For early_stopping False it is the present one, which may stop too soon where
        a penalty above 0 lets scores rise with length; "never" then takes the greatest length, and is sure.
        """
        if length == rules.max_new_tokens:
            return True
        if len(self.ended) < rules.beams or rules.early_stopping is True:
            return len(self.ended) == rules.beams
        rising = rules.early_stopping == "never" and rules.length_penalty > 0
        best = self.running[0].score / (rules.max_new_tokens if rising else length) ** rules.length_penalty
        return best <= self.ended[-1][0]


def best_options(log_probs: Tensor, scores: Tensor, count: int) -> list[list[tuple[float, int, int]]]:
    """Log-probabilities (R, n, V) after beams of these scores (R, n) -> each clip's best (sum, beam, token)."""
    # Those of a clip are among those of its beams, which are fewer numbers to add up and to sort.
    best, token = log_probs.topk(min(count, log_probs.shape[2]))  # (R, n, k)
    each = best.shape[2]
    best, where = (best + scores[:, :, None]).flatten(1).topk(min(count, scores.shape[1] * each))  # (R, count)
    beam, token = where // each, token.flatten(1).take_along_dim(where, 1)
    return [list(zip(*row, strict=True)) for row in zip(best.tolist(), beam.tolist(), token.tolist(), strict=True)]


def beam_search(lm: CausalLM, prefix: Tensor, rules: Rules) -> list[list[int]]:
    start, device = prefix.shape[1], prefix.device
    cache = KVCache(lm.config, len(prefix), start + rules.beams * (rules.max_new_tokens - 1), prefix)
    clips = [Clip([Beam(0.0, 0, [])], []) for _ in prefix]
    running, x, tree = clips, prefix, {}
    own = torch.eye(rules.beams, dtype=torch.bool, device=device)  # the slot that each beam adds in a step
    seen = torch.ones(len(prefix), 1, start, dtype=torch.bool, device=device)  # (R, n, slots)
    for length in range(1, rules.max_new_tokens + 1):
        log_probs = next_logits(lm, x, cache, **tree).log_softmax(-1)  # (R, 1, V) here, (R, n, V) from then on
        if length <= rules.min_new_tokens:
            log_probs[..., list(rules.eos)] = -torch.inf
        scores = torch.tensor([[beam.score for beam in clip.running] for clip in running], device=device)
        # Each beam may put all EOS there are before the others, of which `beams` are wanted.
        options = best_options(log_probs, scores, (1 + len(rules.eos)) * rules.beams)
        for clip, best in zip(running, options, strict=True):
            clip.advance(best, length, rules)
        still = [row for row, clip in enumerate(running) if not clip.over(length, rules)]
        if not still:
            break
        if len(still) < len(running):
            running = [running[row] for row in still]
            rows = torch.tensor(still, device=device)
            cache.keep(rows)
            seen = seen[rows]
        parents = torch.tensor([[beam.parent for beam in clip.running] for clip in running], device=device)  # (R, n)
        seen = torch.cat([seen.take_along_dim(parents[:, :, None], 1), own.expand(len(still), -1, -1)], dim=2)
        tree = {"seen": seen, "positions": torch.full((rules.beams,), start + length - 1, device=device)}
        x = lm.embed(torch.tensor([[beam.ids[-1] for beam in clip.running] for clip in running], device=device))
    winners = [clip.ended[0][1] for clip in clips]
    return [ids[:-1] if ids[-1] in rules.eos else ids for ids in winners]


# ------------------------------------------------------------------- the same without a cache, slow, for reading


@torch.no_grad()
def naive_generate(lm: CausalLM, prefix: Tensor, max_new_tokens: int, eos_id: int) -> list[list[int]]:
    """Greedy decoding, one row at a time and everything anew at each step."""
    rows = []
    for x in prefix[:, None]:  # (1, S, C)
        row: list[int] = []
        while len(row) < max_new_tokens and (best := int(lm(x)[0, -1].argmax())) != eos_id:
            row.append(best)
            x = torch.cat([x, lm.embed(torch.tensor([[best]], device=x.device))], dim=1)
        rows.append(row)
    return rows


@torch.no_grad()
def naive_beam_search(lm: CausalLM, prefix: Tensor, max_new_tokens: int, beams: int, length_penalty: float,
                      eos_id: int) -> list[int]:  # fmt: skip
    """Beam search for one clip (S, C), its hypotheses (score, ids) in plain lists."""
    running, ended = [(0.0, [])], []
    for length in range(1, max_new_tokens + 1):
        options = []
        for score, ids in running:
            x = torch.cat([prefix, lm.embed(torch.tensor(ids, dtype=torch.long, device=prefix.device))])
            log_probs = lm(x[None])[0, -1].float().log_softmax(-1).tolist()
            options += [(score + more, [*ids, token]) for token, more in enumerate(log_probs)]
        options.sort(reverse=True)
        running = [(score, ids) for score, ids in options if ids[-1] != eos_id][:beams]
        stops = options[:beams] if length == max_new_tokens else [o for o in options[:beams] if o[1][-1] == eos_id]
        ended = sorted(ended + [(score / length**length_penalty, ids) for score, ids in stops], reverse=True)[:beams]
        if len(ended) == beams and running[0][0] / length**length_penalty <= ended[-1][0]:
            break
    best = ended[0][1]
    return best[:-1] if best[-1] == eos_id else best
