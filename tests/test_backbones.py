"""The training data of the two tiny backbones."""

import numpy as np
import pytest
import sentencepiece
import torch
from torch import nn

from backbones import lm_data, pretrain
from video_data import shapes
from video_data.batches import IGNORE_INDEX


def test_targets_of_a_still_describe_its_scene():
    for index in range(20):
        image, classes, geometry, presence = pretrain.draw_still(index, seed=0)
        rng = np.random.default_rng([0, 9, index])
        scene = shapes.draw_scene(rng)
        u = rng.uniform(0, 1, 1)
        assert image.shape == (64, 64, 3) and classes.shape == (16, 2) and geometry.shape == (16, 5)
        names = {(pretrain.COLOURS.index(shape.colour), pretrain.KINDS.index(shape.kind)): shape for shape in scene}
        for (colour, kind), numbers in zip(classes, geometry, strict=True):
            if colour == pretrain.NO_SHAPE:
                assert kind == pretrain.NO_SHAPE and not numbers.any()
                continue
            x, y, radius, angle, _ = names[colour, kind].state_at(u)
            rotation = angle * shapes.SYMMETRY.get(pretrain.KINDS[kind], 0)
            expected = [x / 16 - 2, y / 16 - 2, np.log(radius / 9), np.cos(rotation), np.sin(rotation)]
            np.testing.assert_allclose(numbers, np.concatenate(expected), rtol=1e-6, atol=1e-6)
        present = {tuple(row) for row in classes if row[0] != pretrain.NO_SHAPE}
        assert {divmod(i, len(pretrain.KINDS)) for i in np.flatnonzero(presence)} == present


def test_documents_are_captions_paraphrases_and_keywords():
    rng = np.random.default_rng(0)
    documents = [lm_data.document(rng) for _ in range(600)]
    keywords = [text for _, text in documents if set(text.split()) <= set(lm_data.KEYWORDS)]
    alone = [text for prefix, text in documents if prefix == lm_data.PROMPT]
    assert 150 < len(keywords) < 250 and 60 < len(alone) < 140
    for prefix, text in documents:
        if text not in keywords:
            assert prefix.endswith(lm_data.PROMPT) and shapes.parse_claims(text)


def test_mixed_embeddings_learn_only_from_their_own_keywords():
    torch.manual_seed(0)
    embed, ids = nn.Embedding(12, 8), torch.tensor([[[0, 1, 2], [3, 4, 5]], [[0, 1, 2], [0, 1, 2]]])
    generator = torch.Generator().manual_seed(0)
    mixed = lm_data.mix_keyword_embeddings(embed, ids, torch.arange(10), generator)
    assert mixed.shape[0] == 2 and 4 <= mixed.shape[1] <= 24 and mixed.shape[2] == 8
    mixed.sum().backward()
    assert (embed.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_padding_is_trimmed_to_the_longest_row_of_a_batch():
    rows = lm_data.pad([[1], [1, 2, 3], [4, 5]])
    assert rows.tolist() == [[1, IGNORE_INDEX, IGNORE_INDEX], [1, 2, 3], [4, 5, IGNORE_INDEX]]
    assert lm_data.trim_padding(rows[[0, 2]]).tolist() == [[1, IGNORE_INDEX], [4, 5]]


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    return [lm_data.document(rng) for _ in range(300)]


def test_training_data_matches_the_tokenizer(documents):
    model = pretrain.train_tokenizer([" ".join(parts) for parts in documents])
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert len(tokenizer.encode("a red circle moves left")) == 3
    data = lm_data.LMTrainingData(tokenizer, documents, np.random.default_rng(1), seed=0)
    for row, (prefix, text) in zip(data.documents.tolist(), documents, strict=True):
        ids = [i for i in row if i != IGNORE_INDEX]
        assert (ids[0], ids[-1]) == (1, 2) and tokenizer.decode(ids[1:-1]) == f"{prefix} {text}"
    for row, keywords in zip(data.captions.tolist(), data.keyword_ids, strict=True):
        claims = shapes.parse_claims(tokenizer.decode([i for i in row if i != IGNORE_INDEX][:-1]))
        pieces = [[tokenizer.id_to_piece(i)[1:] for i in shape] for shape in keywords.tolist()]
        assert set(claims) == {(f"{colour} {kind}", motion) for colour, kind, motion in pieces}
