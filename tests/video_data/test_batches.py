"""Training examples and batches against enumeration."""

from pathlib import Path

import numpy as np
import pytest
import torch

from video_data import batches
from video_data.cache import ClipCache
from video_data.datasets import Clip


class CharTokenizer:
    """One token per character."""

    def encode(self, text):
        return [ord(c) for c in text]


def make_examples(folder: Path, num_captions=2, seed=0) -> batches.TrainingExamples:
    """3 clips with 6 cached frames of 2 x 2; all pixels of frame j of clip i are 6 i + j."""
    clips = [Clip(f"{i}", Path(f"{i}.mp4"), (f"caption {i}", "another", "a third")) for i in range(3)]
    cache = ClipCache(folder, ["0", "1", "2"], (6, 3, 2, 2), np.uint8)
    for i in range(3):
        levels = np.arange(6 * i, 6 * i + 6, dtype=np.uint8)
        cache.write(i, levels[:, None, None, None] * np.ones((3, 2, 2), np.uint8))
    return batches.TrainingExamples(clips, cache, CharTokenizer(), 3, num_captions, seed, eos_id=7, max_tokens=40)


def test_captions_are_sampled_without_replacement(tmp_path):
    """K = 2 of 3 captions: over 3 epochs each occurs twice, and none twice before all have occurred."""
    examples = make_examples(tmp_path)
    for clip in range(3):
        sampled = [tuple(ids) for epoch in range(3) for ids in examples.sample_captions(clip, epoch)]
        captions = {tuple(ids) for ids in examples.captions[clip]}
        assert set(sampled[:3]) == set(sampled[3:]) == captions and len(captions) == 3
    assert all(ids[-1] == 7 and len(ids) <= 10 for ids in examples.captions[0])


def test_examples_and_batches(tmp_path):
    """Each frame comes from its own segment of the candidates. Rows are padded with -100. Examples are reproducible."""
    examples = make_examples(tmp_path)
    for epoch in range(10):
        frames, _ = examples[2, epoch]
        levels = frames[:, 0, 0, 0].tolist()
        assert all(level in (12 + 2 * k, 13 + 2 * k) for k, level in enumerate(levels))
        assert np.array_equal(frames, examples[2, epoch][0])
    frames, labels = batches.collate([examples[0, 0], examples[1, 0]])
    assert frames.shape == (2, 3, 3, 2, 2) and labels.shape[:2] == (2, 2)
    sampled = examples.sample_captions(0, 0) + examples.sample_captions(1, 0)
    for row, ids in zip(labels.flatten(0, 1).tolist(), sampled, strict=True):
        assert row == ids + [-100] * (len(row) - len(ids))


def test_randomness_is_the_documented_one(tmp_path):
    """Frames and captions recomputed from the generators [seed, 2, clip, epoch] and [seed, 1, clip, cycle]."""
    examples = make_examples(tmp_path, num_captions=1, seed=5)
    for clip, epoch in ((0, 0), (2, 4)):
        frames, captions = examples[clip, epoch]
        positions = (np.arange(3) + np.random.default_rng([5, 2, clip, epoch]).uniform(0, 1, 3)) / 3
        assert frames[:, 0, 0, 0].tolist() == [6 * clip + int(p * 6) for p in positions]
        permutation = np.random.default_rng([5, 1, clip, epoch // 3]).permutation(3)
        assert captions == [examples.captions[clip][permutation[epoch % 3]]]


def test_features_of_a_cache_on_disk_become_bf16(tmp_path):
    """The uint16 bits of 6 bf16 feature vectors."""
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = ClipCache(tmp_path, ["key"], (6, 5), np.uint16)
    cache.write(0, features.view(torch.uint16).numpy())
    clips = [Clip("a", Path("a.mp4"), ("a caption",))]
    examples = batches.TrainingExamples(clips, cache, CharTokenizer(), 3, 1, seed=0, eos_id=7, max_tokens=40)
    sampled, _ = batches.collate([examples[0, 0]])
    assert sampled.dtype == torch.bfloat16 and sampled.shape == (1, 3, 5)
    assert all(any(torch.equal(vector, f) for f in features) for vector in sampled[0])


def test_captions_are_normalized_and_long_ones_truncated_and_counted():
    """At most 40 tokens and EOS; punctuation inside a caption stays."""
    captions = ('  "A man  said: hi, there!" ', "ab" * 30, "c" * 40, "d" * 41)
    clips, cache = [Clip("a", Path("a.mp4"), captions)], ClipCache(Path("unused"), ["key"], (6, 1), np.uint8)
    examples = batches.TrainingExamples(clips, cache, CharTokenizer(), 3, 1, seed=0, eos_id=7, max_tokens=40)
    assert ["".join(map(chr, ids[:-1])) for ids in examples.captions[0]] == [
        "a man said: hi, there", "ab" * 20, "c" * 40, "d" * 40,
    ]  # fmt: skip
    assert examples.num_truncated == 2 and {ids[-1] for ids in examples.captions[0]} == {7}


def test_prefetch_keeps_the_order_and_loads_at_most_one_more():
    """The next item is requested before this one is used, but not a second one. An error is raised in its place."""
    requested = []

    def load(key: int) -> int:
        requested.append(key)
        return 6 // (3 - key)

    results = []
    with pytest.raises(ZeroDivisionError):
        for value in batches.prefetch(load, range(9)):
            results.append(value)
            assert len(requested) <= len(results) + 1
    assert results == [2, 3, 6] and requested[:4] == [0, 1, 2, 3]
    assert list(batches.prefetch(load, [])) == [] and list(batches.prefetch(load, [1, 2])) == [3, 6]


def test_epoch_batches_contain_each_clip_once_per_epoch_and_can_start_in_the_middle():
    every = list(batches.epoch_batches(10, 3, 2, seed=5))
    assert len(every) == 6
    for epoch in (0, 1):
        keys = [key for batch in every[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for _, e in keys} == {epoch} and len({clip for clip, _ in keys}) == 9
        permutation = np.random.default_rng([5, 3, epoch]).permutation(10)
        assert [clip for clip, _ in keys] == permutation[:9].tolist()
    assert [clip for clip, _ in every[0]] != [clip for clip, _ in every[3]]
    assert list(batches.epoch_batches(10, 3, 2, seed=5, first_step=4)) == every[4:]
