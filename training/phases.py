"""The phases of a run. Each has a loss, and the learning rate rises and falls once in each:

    --word-epochs     visual tokens learn the words of captions, without the language model    words.py
    the other epochs  captions that people wrote become likely                                 CaptionLoss
    --cider-epochs    captions that the captioner draws learn from their CIDEr                 cider.py

A loss is called with the captioner and a batch, or a part of one, and returns a sum; `terms` says of how many.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from common.config import Config
from training.cider import CiderLoss
from training.optimizer import learning_rate
from training.words import WordLoss
from video_data.annotations import Clip
from video_data.batches import Batch

CIDER_LR = 0.2  # the peak of the rate in --cider-epochs, as a share of --lr


class CaptionLoss:
    """The cross-entropy of the batch's captions."""

    def terms(self, batch: Batch) -> int:
        return int((batch.labels >= 0).sum())

    def __call__(self, captioner, batch: Batch) -> Tensor:
        return captioner(batch.frames, batch.labels, batch.times)


@dataclass(frozen=True)
class Phase:
    """The steps from `first` to `last`, which is not one of them."""

    first: int
    last: int
    peak: float  # of the learning rate
    loss: Callable

    def learning_rate(self, step: int) -> float:
        return learning_rate(step - self.first, self.last - self.first, self.peak)


def make_phases(config: Config, steps: int, captioner, clips: list[Clip],
                captions: list[list[list[int]]]) -> list[Phase]:
    """The phases of a run of so many steps, in their order. `captions`: token ids of the captions of each clip."""
    per_epoch = steps // (config.word_epochs + config.epochs)
    first, last = config.word_epochs * per_epoch, steps - config.cider_epochs * per_epoch
    phases = [Phase(first, last, config.lr, CaptionLoss())]
    if config.word_epochs:
        phases.insert(0, Phase(0, first, config.lr, WordLoss(captioner, captions)))
    if config.cider_epochs:
        phases.append(Phase(last, steps, CIDER_LR * config.lr, CiderLoss(clips)))
    return phases
