"""Captions of the nearest clips. References: CIDEr of a scored pair, and clips whose neighbour is known."""

from collections import Counter

import torch

import metrics
from metrics.plain import document_frequencies
from study import nearest
from tests.scripts import succeed


def test_vectors_have_the_directions_of_cider():
    """Four clips of one caption, equally long and without a repeated word, so that nothing is clipped or
    penalized. Reference: CIDEr of a caption against another one, with the same idf, within 1e-6."""
    captions = ["the man plays a red guitar", "the man plays a blue drum", "two dogs run on green grass",
                "a dog plays on green grass"]
    frequencies = document_frequencies([[caption] for caption in captions])
    vectors = [nearest.caption_vector(caption, frequencies, 4) for caption in captions]
    hypotheses = {str(i): captions[(i + 1) % 4] for i in range(4)}
    scores = metrics.score({str(i): [caption] for i, caption in enumerate(captions)}, hypotheses, metrics=("CIDEr",))
    for i in range(4):
        cosine = sum(x * vectors[(i + 1) % 4].get(gram, 0) for gram, x in vectors[i].items()) / 4
        assert abs(10 * cosine - scores.per_video[str(i)]["CIDEr"]) < 1e-6


def test_the_caption_that_agrees_with_similar_clips_wins():
    """Of three clips the last is far away: its caption counts for little, although it is in the clip twice."""
    captions = [["a cat sleeps here", "a cat is asleep"], ["a cat sleeps here now"], ["rain", "rain"]]
    vectors = [[nearest.caption_vector(caption, Counter(), 3) for caption in clip] for clip in captions]
    indices, similar = torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.8, 0.1])
    assert nearest.most_agreed(captions, vectors, similar, indices) == "a cat sleeps here"
    assert nearest.most_agreed(captions, vectors, torch.tensor([0.1, 0.1, 0.9]), indices) == "rain"


def test_a_clip_is_most_similar_to_itself():
    """30 random clips, seed 0, of 8 numbers, and of 50, in which centred clips have no component in one direction: each
    clip's cosine with itself is 1, with one that differs by 1% above 0.9, and with no other above 0.999. One training
    clip has no direction at all."""
    torch.manual_seed(0)
    for width in (8, 50):
        clips = torch.randn(30, width) * torch.logspace(2, -1, width)
        cosines = nearest.similarities(clips, clips)
        torch.testing.assert_close(cosines.diagonal(), torch.ones(30), rtol=0, atol=1e-5)
        assert (cosines.argmax(1) == torch.arange(30)).all() and cosines.fill_diagonal_(0).max() < 0.999
        noisy = clips * (1 + 0.01 * torch.randn_like(clips))
        assert nearest.similarities(noisy, clips).diagonal().min() > 0.9
    assert nearest.similarities(clips, clips[:1]).tolist() == [[0.0]] * 30


def test_a_run_s_split_is_captioned_from_its_training_clips(finished_run, tmp_path):
    assert "val: BLEU-1" in succeed(nearest, finished_run, "--split", "val", "--save", tmp_path / "c.json")
    assert len((tmp_path / "c.json").read_text().splitlines()) >= 4
