"""The tables of the study: what is compared with what, by the flags of `train.py`.

Each row is trained with the learning rates of its table at the first seed. The rate with the highest validation CIDEr
is taken for the other seeds, too; only the runs of that rate are reported. Every row of a table has the same clips,
which are made with a seed that no setting was chosen on, and, unless its flags say otherwise, the same steps.
"""

from dataclasses import dataclass

LRS = 0.002, 0.005, 0.0125
SEEDS = 0, 1, 2


@dataclass(frozen=True)
class Table:
    flags: str  # of every run
    rows: dict[str, str]  # label: flags
    reference: str  # the row that the others are compared with
    lrs: tuple[float, ...] = LRS


SHAPES = "--dataset shapes --shapes-sizes 3000 200 500 --shapes-seed 1 --data data/study --eval-every 2"

TABLES = {
    "mllm": Table(
        f"{SHAPES} --mllm backbones/tiny-mllm --epochs 8",
        {
            "nothing (zero-shot)": "--method none",
            "`linear`": "--method linear --cache-features",
            "`lora-lm`": "--method lora-lm --cache-features",
            "`lora`": "--method lora",
            "Q-Adapter, queries": "--visual queries --cache-features",
            "Q-Adapter, frames with write-back": "--visual frames --write-back",
            "Q-Adapter, both": "--visual both --cache-features",
        },
        reference="Q-Adapter, queries",
    ),
}  # fmt: skip
