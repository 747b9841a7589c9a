"""The training data of the tiny backbones, and the tiny MLLM itself."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from torch import nn

from backbones import lm_data, mllm_data, pretrain, pretrain_mllm
from models.generation import generate
from models.mllm import MLLM
from models.mllm_prompts import INSTRUCTION
from models.tokenizer import SentencePieceTokenizer, load_tokenizer
from models.vit import ViT
from video_data import shapes
from video_data.batches import IGNORE_INDEX

BACKBONES = Path(pretrain.__file__).parent


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


# ---------------------------------------------------------------------------------------- tiny-mllm


def nouns(scene) -> list[str]:
    return sorted(f"{shape.colour} {shape.kind}" for shape in scene)


def named(caption: str) -> list[str]:
    return [noun for noun, _ in shapes.parse_claims(caption)]


def test_an_album_shows_one_scene_at_rest_or_at_random_places():
    resting = 0
    for index in range(20):
        stills, scene, seen = mllm_data.draw_album(index, seed=0)
        assert stills.shape == (8, 64, 64, 3) and seen.shape == (8, len(scene)) and seen.any(1).all()
        difference = abs(stills[1:].astype(int) - stills[0]).max((0, 3))  # (S, S)
        resting += difference.max() < 60  # camera noise
        # What moves is bright, and one shape covers a small part of the image: the background is the same.
        assert np.median(difference) < 60
    assert 5 < resting < 15


def test_captions_of_stills_name_the_shapes_and_no_motion():
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = shapes.draw_scene(rng)
        claims = shapes.parse_claims(mllm_data.name_shapes(scene, rng))
        assert claims == [(noun, "") for noun in nouns(scene)]


def test_captions_of_a_batch_name_what_its_stills_show(tiny_mllm, tokenizer):
    data, partly_seen = mllm_data.AlbumData(tiny_mllm, tokenizer, 20, seed=0), 0
    features, labels = data.batch(100, 2)
    captions = tokenizer.decode([[i for i in row if i != IGNORE_INDEX] for row in labels.tolist()])
    for stills, caption in zip(features, captions, strict=True):
        same = (data.features == stills[0].half()).flatten(2).all(2).nonzero()  # album and still
        album, first = same[0].tolist()
        second = (data.features[album] == stills[1].half()).flatten(1).all(1).nonzero().flatten().tolist()
        visible = data.seen[album][first] | data.seen[album][second[0]]
        partly_seen += not visible.all()
        assert named(caption) == nouns(shape for shape, v in zip(data.scenes[album], visible, strict=True) if v)
    assert partly_seen


def test_added_words_are_one_token_each_and_change_no_other_id():
    old = (BACKBONES / "tiny-lm/tokenizer.model").read_bytes()
    new = pretrain_mllm.add_words(old, pretrain_mllm.WORDS)
    old, new = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in (old, new))
    for i, word in enumerate(pretrain_mllm.WORDS):
        assert new.encode(word) == [len(old) + i] and new.decode([len(old) + i]) == word
    rng = np.random.default_rng(0)
    texts = [shapes.describe(shapes.draw_scene(rng), rng) for _ in range(50)]
    assert new.encode([*texts, "Other words: 1, 2."]) == old.encode([*texts, "Other words: 1, 2."])


@pytest.fixture(scope="module")
def tiny_mllm() -> MLLM:
    return MLLM.from_pretrained(BACKBONES / "tiny-mllm").eval()


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return load_tokenizer(BACKBONES / "tiny-mllm")


def test_the_tiny_mllm_has_the_tiny_vit_and_a_token_for_images(tiny_mllm, tokenizer):
    vit = ViT.from_pretrained(BACKBONES / "tiny-vit").state_dict()
    for name, tensor in tiny_mllm.vit.state_dict().items():
        assert torch.equal(tensor, vit[name]), name
    assert tiny_mllm.config.image_token_id == len(tokenizer) == tiny_mllm.config.lm.vocab - 1
    assert tiny_mllm.config.tokens_per_image == 16


@torch.no_grad()
@pytest.mark.parametrize("stills", [1, 8])
def test_the_tiny_mllm_names_the_shapes_of_stills(tiny_mllm, tokenizer, stills):
    scenes, images = [], []
    for index in range(20):
        rng = np.random.default_rng([1, index])  # no scene of the training
        scene = shapes.draw_scene(rng)
        while any(shape.motion == "blink" for shape in scene):  # it may be out of sight
            scene = shapes.draw_scene(rng)
        scenes.append(scene)
        images.append(shapes.render(scene, np.full(stills, 0.5), rng)[0])
    frames = torch.from_numpy(np.stack(images)).permute(0, 1, 4, 2, 3)  # (B, T, 3, S, S)
    visual = tiny_mllm.image_tokens(tiny_mllm.vit.normalize(frames).flatten(0, 1)).unflatten(0, (20, stills))
    prompt = tiny_mllm.prompt(tokenizer, stills, INSTRUCTION)
    texts = [torch.tensor(ids, dtype=torch.long) for ids in prompt]
    captions = tokenizer.decode(generate(tiny_mllm.lm, tiny_mllm.merge(texts, visual.unbind(1)), max_new_tokens=20))
    right = [named(caption) == nouns(scene) for caption, scene in zip(captions, scenes, strict=True)]
    assert sum(right) >= 19, captions
    assert {motion for caption in captions for _, motion in shapes.parse_claims(caption)} == {""}


def test_a_tiny_mllm_is_made_again_bit_for_bit(tmp_path):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(seed)
        pretrain_mllm.pretrain_mllm(tmp_path / name, BACKBONES, albums=3, texts=20, steps=(1, 1), batch_size=2,
                                    seed=seed)  # fmt: skip
        MLLM.from_pretrained(tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
