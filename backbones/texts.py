"""What the tiny language models learn from: documents, and captions after mixed keyword embeddings.

A document is a caption; a caption after a paraphrase or after keywords ("circle red left"); or keywords repeated in
another order. None comes from a clip.

Shapes: n texts, N positions of mixed keywords, C width of the language model, L tokens of the longest text with its
EOS.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.lm import CausalLM
from models.pair import PROMPT
from video_data import shapes
from video_data.batches import IGNORE_INDEX

KEYWORDS = [*shapes.COLOURS, *shapes.KINDS, *shapes.MOTIONS]  # each is one token


def keywords(scene, rng: np.random.Generator) -> str:
    """The keywords of each shape, with the shapes in random order: "circle red left square blue up"."""
    return " ".join(rng.permutation([f"{shape.kind} {shape.colour} {shape.motion}" for shape in scene]))


def document(rng: np.random.Generator) -> tuple[str, str]:
    """A random prefix and its continuation. They are tokenized separately, like prompt and caption in training.

    Of six documents one is a caption alone, one a caption after a paraphrase, two are captions after repeated keywords,
    and two are repeated keywords only.
    """
    scene, style = shapes.draw_scene(rng), rng.integers(6)
    prefix = []
    if style == 1:
        prefix = [shapes.describe(scene, rng)]
    elif style in (2, 3):
        prefix = [keywords(scene, rng) for _ in range(rng.integers(1, 5))]
    elif style > 3:
        many = [shapes.draw_shape(rng) for _ in range(rng.integers(3, 7))]
        return keywords(many, rng), " ".join(keywords(many, rng) for _ in range(rng.integers(1, 4)))
    return " ".join([*prefix, PROMPT]), shapes.describe(scene, rng)


def mix_keyword_embeddings(embed: nn.Embedding, keyword_ids: Tensor, all_ids: Tensor,
                           generator: torch.Generator) -> Tensor:
    """Keyword ids (n, 2, 3) of two shapes per text -> N embeddings per text that mix them, (n, N, C); N is random.

    Each position is the sum of one shape's three keywords in random proportions; in half of the texts some of the other
    shape's keywords leak in. All keywords, `all_ids`, and noise are added with small random weights.

    Visual tokens look like that while an adapter learns. A frozen language model that knows clean keywords only is hard
    to reach: the adapter would have to produce exact embeddings first. The proportions were found by trial.
    """
    n, count = len(keyword_ids), int(torch.randint(4, 25, (1,), generator=generator))

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    # The shape at each position: they alternate, are random, or come one after the other.
    position, order = torch.arange(count), torch.randint(3, (n, 1), generator=generator)
    random = torch.randint(2, (n, count), generator=generator)
    shape = torch.where(order == 0, position % 2, torch.where(order == 1, random, 2 * position // count))
    shape = shape ^ torch.randint(2, (n, 1), generator=generator)  # (n, N)
    leak = 0.4 * uniform(n, 1) * (uniform(n, 1) < 0.5)
    share = torch.stack([torch.where(shape == i, 1, leak) for i in (0, 1)], dim=-1)  # (n, N, 2)
    # With an exponent near 0 the three keywords weigh the same; near 3 one dominates.
    weight = uniform(n, count, 3) ** (3 * uniform(n, 1, 1))
    weight = weight / weight.sum(-1, keepdim=True) * (0.5 + 2 * uniform(n, count, 1))  # (n, N, 3)
    mixed = torch.einsum("nps,npw,nswc->npc", share, weight, embed(keyword_ids))  # (n, N, C)
    # Detached: noise and stray keywords carry no information, so embeddings must not learn from them.
    rms = embed.weight.detach().square().mean().sqrt()
    noise = 0.5 * rms * uniform(n, 1, 1) * torch.randn(n, count, embed.embedding_dim, generator=generator)
    stray = 0.1 * uniform(n, 1, 1) * torch.randn(n, count, len(all_ids), generator=generator)
    return mixed + noise + stray @ embed(all_ids).detach()


def pad(rows: list[list[int]]) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=IGNORE_INDEX)


def text_loss(lm: CausalLM, prefix: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of texts, padded ids (n, L), after prefixes, embeddings (n, any, C)."""
    x = torch.cat([prefix, lm.embed(labels[:, :-1].clamp(min=0))], dim=1)
    logits = lm.head(lm.hidden(x)[:, -labels.shape[1] :])  # (n, L, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)


class TextData:
    """Documents, and as many captions after mixed keyword embeddings. These are between `before` and `after`, ids."""

    def __init__(self, tokenizer, documents: list[tuple[str, str]], rng: np.random.Generator, seed: int,
                 before: list[int], after: list[int]):
        self.bos, eos = torch.tensor([tokenizer.bos_id()]), tokenizer.eos_id()
        self.documents = [[*tokenizer.encode(prefix), *tokenizer.encode(text), eos] for prefix, text in documents]
        scenes = [shapes.draw_scene(rng) for _ in documents]
        self.captions = [[*tokenizer.encode(shapes.describe(scene, rng)), eos] for scene in scenes]
        ids = {word: tokenizer.piece_to_id("\u2581" + word) for word in KEYWORDS}
        assert tokenizer.unk_id() not in ids.values(), "every keyword is a token"
        self.all_ids = torch.tensor(list(ids.values()))
        # A single shape stands in both places, so it leaks into itself.
        self.keyword_ids = torch.tensor([[[ids[shape.colour], ids[shape.kind], ids[shape.motion]]
                                          for shape in (scene * 2)[:2]] for scene in scenes])
        self.before, self.after = torch.tensor(before), torch.tensor(after)
        self.generator = torch.Generator().manual_seed(seed)

    def loss(self, lm: CausalLM, documents: int, captions: int) -> tuple[Tensor, Tensor]:
        """The losses of random documents, and of random captions, each after mixed keywords of its scene."""
        keys = torch.randint(len(self.documents), (documents,), generator=self.generator)
        prefix = lm.embed(self.bos).expand(documents, -1, -1)  # (n, 1, C)
        document_loss = text_loss(lm, prefix, pad([self.documents[i] for i in keys]))
        keys = torch.randint(len(self.captions), (captions,), generator=self.generator)
        visual = mix_keyword_embeddings(lm.embed, self.keyword_ids[keys], self.all_ids, self.generator)  # (n, N, C)
        before, after = (lm.embed(ids).expand(captions, -1, -1) for ids in (self.before, self.after))
        prefix = torch.cat([before, visual, after], dim=1)  # (n, any, C)
        return document_loss, text_loss(lm, prefix, pad([self.captions[i] for i in keys]))
