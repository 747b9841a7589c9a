"""The words before the captions. References: counts by hand, a loop over words and tokens, and runs."""

import math

import pytest
import torch

import train
from common.errors import InputError
from tests.scripts import fork_two, losses, run_forked
from training import words


def test_words_and_their_shares(monkeypatch):
    """By hand: of four clips, 7 is in two, 8 in one, 9 in all; a word needs two clips, and less than 0.6 of them."""
    monkeypatch.setattr(words, "MIN_CLIPS", 2)
    captions = [[[7, 9], [7, 7, 5, 9]], [[7, 9]], [[5, 9]], [[8, 9]]]
    ids, targets = words.count_words(captions)
    assert ids.tolist() == [5, 7]
    # idf of both is log(4 / 2): the first clip has 7 in two captions and 5 in one; the last has none.
    torch.testing.assert_close(targets, torch.tensor([[1 / 3, 2 / 3], [0, 1], [1, 0], [0, 0]]))
    with pytest.raises(InputError, match="--epochs: words: expected tokens .* found 0"):
        words.count_words(captions[2:])


def test_scores_are_those_of_a_loop():
    """Seed 0, 2 clips of 3 tokens, 5 words, in float64 within 1e-4: the function rounds to float32."""
    torch.manual_seed(0)
    visual, embeddings, prior = torch.randn(2, 3, 6), torch.randn(5, 6), torch.rand(5)
    for clip, found in zip(visual, words.word_scores(visual, embeddings, prior), strict=True):
        for w in range(5):
            direction = (embeddings[w] - embeddings.mean(0)).double()
            cosines = [v.double() @ direction / v.double().norm() / direction.norm() for v in clip]
            expected = math.log(prior[w]) + math.log(sum(math.exp(words.SHARPNESS * c) for c in cosines))
            assert found[w].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", [["--cache-features"], ["--method", "linear", "--grid", 2, "--batch-size", 6]])
def test_words_are_learnt_before_captions(method, flags, tmp_path, monkeypatch):
    """40 epochs of 12 clips: the loss falls by a tenth. Two processes give the same losses within a relative
    1e-5."""
    monkeypatch.setattr(words, "MIN_CLIPS", 1)
    base = [*flags, *method, "--epochs", 40, 1]
    done = [run_forked(train, *base, "--out", tmp_path / "one"), fork_two(*base, "--out", tmp_path / "two")]
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    steps = len(one) // 41  # of an epoch
    assert one[39 * steps : 40 * steps].mean() < 0.9 * one[:steps].mean()
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
