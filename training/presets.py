"""The defaults of each dataset. A flag overrides any of them.

| dataset | why |
|---|---|
| shapes | small models: large batches are cheap; the six captions of a clip say the same, so one of them is enough;
           weight decay and token dropout keep the adapter from learning the clips by heart (docs/log.md) |
| msvd   | 41 captions a clip: five share one encoding of the clip; 8 frames, since clips last 10 seconds |
| msrvtt | 20 captions a clip, four of them share an encoding; 12 frames, since clips last 15 seconds and have cuts |
| folder | nothing is known: a clip may have one caption only, and a small dataset needs more passes |

Passes are over the training *captions*; the epochs, which are passes over the clips, follow from them. The learning
rate is one for all: steps are scaled with the width (`optimizer.py`). Captions of real videos are searched with five
beams, as published results are; on `shapes` that lowers CIDEr.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    frames: int
    captions_per_clip: int  # K, in a step
    batch_size: int  # clips
    passes: float  # over the training captions
    lr: float
    weight_decay: float
    token_dropout: float
    beams: int  # of the search on the test split


PRESETS = {
    #                frames  K  batch  passes    lr  decay  dropout  beams
    "shapes": Preset(     8, 1,    64,   1.35, 5e-3,   0.2,     0.3,     1),
    "msvd":   Preset(     8, 5,    32,      6, 5e-3,  0.01,     0.0,     5),
    "msrvtt": Preset(    12, 4,    64,      4, 5e-3,  0.01,     0.0,     5),
    "folder": Preset(     8, 1,    16,     10, 5e-3,  0.01,     0.0,     5),
}  # fmt: skip


def epochs_of_passes(passes: float, captions: int, clips: int, captions_per_clip: int) -> int:
    """Epochs that show `passes` times the number of training captions; at least one.

    An epoch shows `captions_per_clip` captions of each clip.
    """
    return max(1, round(passes * captions / (clips * captions_per_clip)))
