"""Examples and batches, against counting."""

from pathlib import Path

import numpy as np
import pytest

import data


class Letters:
    """A tokenizer of letters."""

    def encode(self, texts):
        return [[ord(c) for c in text] for text in texts]


def some_examples(captions=2) -> data.Examples:
    clips = [data.Clip(f"{i}", Path(f"{i}.mp4"), (f"caption {i}", "another", "a third")) for i in range(3)]
    cache = np.arange(3 * 6, dtype=np.uint8).reshape(3, 6, 1, 1, 1) * np.ones((1, 1, 3, 2, 2), np.uint8)
    return data.Examples(clips, cache, Letters(), 3, captions, seed=0, eos_id=7)


def test_captions_are_dealt_like_cards():
    """K = 2 of 3 captions: over 3 epochs each comes twice, and none again before all have come."""
    examples = some_examples()
    for clip in range(3):
        dealt = [tuple(ids) for epoch in range(3) for ids in examples.deal(clip, epoch)]
        pack = {tuple(ids) for ids in examples.ids[clip]}
        assert set(dealt[:3]) == set(dealt[3:]) == pack and len(pack) == 3
    assert all(ids[-1] == 7 and len(ids) <= 10 for ids in examples.ids[0])


def test_examples_and_batches():
    """Frames out of their own segment of the candidates; rows padded with -100; the same key, the same example."""
    examples = some_examples()
    for epoch in range(10):
        frames, _ = examples[2, epoch]
        picked = frames[:, 0, 0, 0].tolist()
        assert all(p in (12 + 2 * k, 13 + 2 * k) for k, p in enumerate(picked))
        assert np.array_equal(frames, examples[2, epoch][0])
    frames, targets = data.collate([examples[0, 0], examples[1, 0]])
    assert frames.shape == (2, 3, 3, 2, 2) and targets.shape[:2] == (2, 2)
    for row, ids in zip(targets.flatten(0, 1).tolist(), examples.deal(0, 0) + examples.deal(1, 0), strict=True):
        assert row == ids + [-100] * (len(row) - len(ids))


def test_captions_are_cleaned_and_long_ones_cut_and_counted():
    """40 tokens and EOS are the longest; signs inside a caption stay."""
    texts = ('  "A man  said: hi, there!" ', "ab" * 30, "c" * 40, "d" * 41)
    clips = [data.Clip("a", Path("a.mp4"), texts)]
    examples = data.Examples(clips, np.zeros((1, 6, 1, 1, 1), np.uint8), Letters(), 3, 1, seed=0, eos_id=7)
    assert ["".join(map(chr, ids[:-1])) for ids in examples.ids[0]] == [
        "a man said: hi, there", "ab" * 20, "c" * 40, "d" * 40,
    ]  # fmt: skip
    assert examples.cut == 2 and {ids[-1] for ids in examples.ids[0]} == {7}


def test_what_is_loaded_ahead_is_what_is_loaded_one_by_one_and_at_most_one_more():
    """The next is asked for before this one is used, none after it; an error comes where it would have come."""
    asked = []

    def load(key: int) -> int:
        asked.append(key)
        return 6 // (3 - key)

    found = []
    with pytest.raises(ZeroDivisionError):
        for value in data.ahead(load, range(9)):
            found.append(value)
            assert len(asked) <= len(found) + 1
    assert found == [2, 3, 6] and asked[:4] == [0, 1, 2, 3]
    assert list(data.ahead(load, [])) == [] and list(data.ahead(load, [1, 2])) == [3, 6]


def test_order_covers_every_clip_once_an_epoch_and_goes_on_in_the_middle():
    batches = list(data.order(10, 3, 2, seed=5))
    assert len(batches) == 6
    for epoch in (0, 1):
        keys = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for _, e in keys} == {epoch} and len({c for c, _ in keys}) == 9
    assert [c for c, _ in batches[0]] != [c for c, _ in batches[3]]
    assert list(data.order(10, 3, 2, seed=5, first_step=4)) == batches[4:]
