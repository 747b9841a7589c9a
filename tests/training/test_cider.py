"""Training on the CIDEr of the captioner's own captions. References: `plain_cider` of all training clips,
log-probabilities of each caption by itself, a search without a cache, and runs."""

import os
import signal
from pathlib import Path

import pytest
import torch

import train
from common.config import Config
from metrics.plain import plain_cider
from models import generation
from models.generation import TEMPERATURE
from tests.scripts import act_at_call, contents, losses, run_forked, succeed
from tests.tiny import EOS, LETTERS, T, clips, randomized
from training import cider, words
from training.phases import make_phases
from video_data.annotations import Clip
from video_data.batches import Batch

CAPTIONS = ("A cat sleeps.", "the cat is asleep"), ("two dogs run", "dogs run fast"), ("a red ball",)
CLIPS = [Clip(name, Path(name), captions) for name, captions in zip("abc", CAPTIONS, strict=True)]
DRAWN = [["a cat sleeps", "the dogs", "the cat is red", "a", "cat"],
         ["dogs run", "two dogs run", "a cat", "run", "ball"]]


def ids_of(text: str) -> list[int]:
    return [3 + LETTERS.find(letter) for letter in text] + [EOS]


@pytest.fixture
def captioner():
    return randomized("no write-back", 0)


def test_the_loss_is_minus_the_cider_of_the_samples(captioner, monkeypatch):
    """Five captions of clips b and a. The gradient: that of -(r - mean of the other r) log p, within 1e-4."""
    frames, found = clips(2, T, 1), [[ids_of(text) for text in row] for row in DRAWN[::-1]]
    monkeypatch.setattr(cider, "sample", lambda *args, **kwargs: found)
    references = [[text.lower().strip(".") for text in clip.captions] for clip in CLIPS]
    expected, value = 0, 0
    for row, clip, texts in ((0, 1, DRAWN[1]), (1, 0, DRAWN[0])):
        ciders = []
        for text in texts:
            hypotheses = ["x"] * 3
            hypotheses[clip] = text
            ciders.append(plain_cider(references, hypotheses)[1][clip])
        for m, text in enumerate(texts):
            prefix = captioner.prefix(frames[row : row + 1])
            ids = torch.tensor(ids_of(text))
            x = torch.cat([prefix, captioner.lm.embed(ids[:-1])[None]], dim=1)
            log_p = (captioner.lm(x)[0, prefix.shape[1] - 1 :] / TEMPERATURE).log_softmax(-1)
            baseline = (sum(ciders) - ciders[m]) / 4
            expected = expected - (ciders[m] - baseline) * log_p.gather(1, ids[:, None]).sum()
        value -= sum(ciders)
    gradients = torch.autograd.grad(expected, list(captioner.trained().values()))
    compute_loss, batch = cider.CiderLoss(CLIPS), Batch(frames, None, None, [1, 0])
    loss = compute_loss(captioner, batch)
    assert compute_loss.terms(batch) == 10 and loss.item() == pytest.approx(value, rel=1e-5) and value < -3
    loss.backward()
    for parameter, gradient in zip(captioner.trained().values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@torch.no_grad()
def test_samples_are_those_without_a_cache(captioner):
    """Two prefixes, three texts of each, seed 0: one number for each text in each step. A token's share of the numbers
    from 0 to 1 is its probability."""
    prefix = captioner.prefix(clips(2, T, 1))
    torch.manual_seed(0)
    found = generation.sample(captioner.lm, prefix, 3, 8)
    torch.manual_seed(0)
    texts: list[list[int]] = [[] for _ in range(6)]
    for _ in range(8):
        running = [i for i, text in enumerate(texts) if EOS not in text]
        logits = []
        for i in running:
            ids = torch.tensor([texts[i]], dtype=torch.long)
            logits.append(captioner.lm(torch.cat([prefix[i // 3][None], captioner.lm.embed(ids)], dim=1))[0, -1])
        if not running:
            break
        for i, row, number in zip(running, logits, torch.rand(len(running)), strict=True):
            shares = (row.double() / TEMPERATURE).softmax(-1)
            texts[i].append(next(k for k in range(len(shares)) if shares[: k + 1].sum() >= number))
    assert found == [texts[:3], texts[3:]] and len({tuple(text) for text in texts}) == 6


def test_each_phase_has_its_steps_and_rates():
    """By hand: 100 steps an epoch, one of words, two of captions, one of CIDEr with a fifth of the rate. Each begins at
    1/50 of its peak and has it after 50 steps; three quarters through, half a cosine is half done."""
    config = Config(epochs=(1, 2, 1), lr=0.1)
    captions = [[[3, 4]], [[5, 6]], [[7, 8]]] * 10
    found = make_phases(config, 400, randomized("no write-back", 0), CLIPS, captions)
    assert [(p.name, p.first, p.end) for p in found] == [("words", 0, 100), ("captions", 100, 300), ("CIDEr", 300, 400)]
    for phase, peak in zip(found, (0.1, 0.1, 0.02), strict=True):
        quarter = (phase.end - phase.first) // 4
        rates = [phase.learning_rate(step) / peak for step in (phase.first, phase.first + 50, phase.end - quarter)]
        assert rates == pytest.approx([1 / 50, 1, 1 / 2])
    found = make_phases(Config(epochs=(1, 0, 1)), 4, randomized("no write-back", 0), CLIPS, captions)
    assert [next(p.name for p in found if step < p.end) for step in range(4)] == ["words"] * 2 + ["CIDEr"] * 2


def test_a_run_of_all_phases_resumes(flags, tmp_path, monkeypatch):
    """An epoch of words, 2 of captions, 4 of CIDEr; killed in each, the run goes on to the same bits."""
    monkeypatch.setattr(words, "MIN_CLIPS", 1)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    base = [*flags, "--token-dropout", 0.5, "--epochs", 1, 2, 4, "--eval-every", 6]
    succeed(train, *base, "--out", tmp_path / "whole")
    found, words_next = losses(tmp_path / "whole"), [*base, "--out", tmp_path / "killed"]
    assert len(found) == 3 * 7 and (found[:9] > 0).all() and (found[9:] <= 0).all() and found[9:].mean() < 0
    assert {path.name for path in (tmp_path / "whole/val").iterdir()} == {"0.json", "9.json", "21.json"}
    for step in (2, 5, 8):  # of the process
        with act_at_call(torch.optim.AdamW, "step", step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            assert run_forked(train, *words_next).returncode == -signal.SIGKILL
        words_next = ["--resume", tmp_path / "killed"]
    succeed(train, *words_next)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
