"""The phases of a run, as many epochs of each as `--epochs W E C` says. Each has a loss, and the learning rate rises
and falls once in each:

    words      W epochs: visual tokens learn the words of captions; no language model   words.py
    captions   E epochs: captions that people wrote become likely                       CaptionLoss
    CIDEr      C epochs: captions that are drawn become likely by their CIDEr           cider.py
"""

from dataclasses import dataclass

from torch import Tensor

from common.config import Config
from training.cider import CiderLoss
from training.optimizer import learning_rate
from training.words import WordLoss
from video_data.annotations import Clip
from video_data.batches import Batch

CIDER_LR = 0.2  # the peak of CIDEr's rate, as a share of --lr


class CaptionLoss:
    """The cross-entropy of the batch's captions."""

    def terms(self, batch: Batch) -> int:
        """Of how many terms the loss of a batch is the sum."""
        return int((batch.labels >= 0).sum())

    def __call__(self, captioner, batch: Batch) -> Tensor:
        """The loss of a batch or of a part of one, summed."""
        return captioner(batch.frames, batch.labels, batch.times)


Loss = CaptionLoss | WordLoss | CiderLoss


@dataclass(frozen=True)
class Phase:
    """The steps first, ..., end - 1."""

    name: str
    first: int
    end: int
    peak: float  # of the learning rate
    loss: Loss

    def learning_rate(self, step: int) -> float:
        return learning_rate(step - self.first, self.end - self.first, self.peak)


def make_phases(config: Config, steps: int, captioner, clips: list[Clip],
                captions: list[list[list[int]]]) -> list[Phase]:
    """The phases of a run of so many steps, in their order. `captions`: token ids of the captions of each clip."""
    epochs = config.phase_epochs
    per_epoch = steps // sum(epochs)
    first, end = epochs[0] * per_epoch, steps - epochs[2] * per_epoch
    phases = [Phase("captions", first, end, config.lr, CaptionLoss())]
    if first:
        phases.insert(0, Phase("words", 0, first, config.lr, WordLoss(captioner, captions)))
    if end < steps:
        phases.append(Phase("CIDEr", end, steps, CIDER_LR * config.lr, CiderLoss(clips)))
    return phases
