"""The tables of the study: what is compared with what, by the flags of `train.py`.

Each row is trained with its learning rates at the first seed. The rate with the highest validation CIDEr is taken for
the other seeds, too; a table shows the runs of that rate. Every row of a table has, unless its flags say otherwise, the
same clips and the same steps. The clips are of another seed than those of the demo and of most trials.
"""

from dataclasses import dataclass, field

LRS = 0.002, 0.005, 0.0125
FULL_LRS = 0.0002, 0.0005, 0.00125  # of `full`: Adam's steps on millions of weights add up
SEEDS = 0, 1, 2


@dataclass(frozen=True)
class Table:
    """Runs to compare, by the flags of `train.py`."""

    flags: str  # of every run
    rows: dict[str, str]  # label: flags
    reference: str  # the row that the others are compared with
    store: str  # the file in results/; tables of the same `flags` share one
    lrs: tuple[float, ...] = LRS
    row_lrs: dict[str, tuple[float, ...]] = field(default_factory=dict)  # of rows that need others

    def rates(self, row: str) -> tuple[float, ...]:
        """The learning rates that a row tries."""
        return self.row_lrs.get(row, self.lrs)


# Every row sees the same frames of a clip in each epoch: those that --cache-features can store.
MLLM = ("--dataset shapes --shapes-sizes 3000 200 500 --shapes-seed 1 --data data/study --eval-every 2 "
        "--candidate-frames 8 --mllm backbones/tiny-mllm --epochs 8 --weight-decay 0.01 --token-dropout 0")  # fmt: skip
PAIR = ("--dataset shapes --shapes-sizes 6000 200 500 --shapes-seed 1 --data data/study-pair --candidate-frames 8 "
        "--epochs 4 --eval-every 1 --token-dropout 0")  # fmt: skip
VERSION_07 = "--heads 8 --no-changes"  # the Q-Adapter of that version
CACHED = "--cache-features"  # alone: the Q-Adapter of train.py, without its token dropout

# Each method's flags, and those that give it half as many trained parameters as the Q-Adapter has, as many, and four
# times as many. At rank 121 LoRA's two matrices hold more numbers than the 128 x 128 matrix that they change.
SIZES = {
    "`lora-lm`": (f"--method lora-lm {CACHED}", {"half": "--rank 12", "equal": "--rank 35", "fourfold": "--rank 166"}),
    "`lora`": ("--method lora", {"half": "--rank 9", "equal": "--rank 25", "fourfold": "--rank 121"}),
    "`adapter`": ("--method adapter", {"half": "--rank 17", "equal": "--rank 50", "fourfold": "--rank 241"}),
    "Q-Adapter": (CACHED, {"half": "--rank 10 --heads 1", "equal": "", "fourfold": "--rank 160"}),
}


def of_size(size: str) -> dict[str, str]:
    """The rows of SIZES in one of its sizes."""
    return {row: f"{flags} {sizes[size]}".strip() for row, (flags, sizes) in SIZES.items()}


METHODS = {"`linear`": f"--method linear {CACHED}", **of_size("equal"),
           "Q-Adapter with write-back": "--write-back --rank 22 --heads 2", "`full`": "--method full"}  # fmt: skip
# The learning rates of `methods` and, where the lowest or the highest was the best, one beyond it
FOUR_LRS = {"`linear`": (*LRS, 0.03), "`lora-lm`": (*LRS, 0.03), "`adapter`": (*LRS, 0.03),
            "Q-Adapter": (0.0008, *LRS), "Q-Adapter with write-back": (0.0008, *LRS),
            "`full`": (*FULL_LRS, 0.003)}  # fmt: skip
CHOSEN = {"`linear`": 0.0125, "`lora-lm`": 0.0125, "`lora`": 0.005, "`adapter`": 0.0125, "Q-Adapter": 0.002,
          "Q-Adapter with write-back": 0.002, "`full`": 0.00125}  # learning rates by validation in the table `methods`
LOWER = {"`lora-lm`": 0.005, "`lora`": 0.002, "`adapter`": 0.005, "Q-Adapter": 0.0008}  # of larger ranks
# By the seconds a step in the table `methods`, all steps together take within 15 % as long as 4 epochs of `lora`.
LONGER = {"`linear`": "--epochs 56 --eval-every 14", "`lora-lm`": "--epochs 48 --eval-every 12",
          "Q-Adapter": "--epochs 28 --eval-every 7",
          "Q-Adapter with write-back": "--epochs 6 --eval-every 2"}  # fmt: skip


def at_chosen_rates(rows: dict[str, str], more: dict[str, float] | None = None) -> Table:
    """Rows of methods in other sizes or of other lengths, with the learning rates of `methods`, and `more`."""
    rates = {row: (CHOSEN[row],) if more is None else (more[row], CHOSEN[row]) for row in rows}
    return Table(PAIR, rows, "Q-Adapter", store="pair", row_lrs=rates)


def ablation(rows: dict[str, str], default: str) -> Table:
    """Rows of flags besides those of the Q-Adapter; `default` is the label of the Q-Adapter as it is. One rate."""
    flags = {row: f"{CACHED} {words}" for row, words in rows.items()}
    return Table(PAIR, {default: CACHED} | flags, default, store="pair", lrs=(0.005,))


TABLES = {
    "mllm": Table(
        MLLM,
        {
            "nothing (zero-shot)": "--method none",
            "`linear`": f"--method linear {CACHED}",
            "`lora-lm`": f"--method lora-lm {CACHED}",
            "`lora`": "--method lora",
            "Q-Adapter, queries": f"--visual queries {CACHED}",
            "the same of version 0.7": f"--visual queries {CACHED} {VERSION_07}",
            "Q-Adapter of version 0.7, frames with write-back": f"--visual frames --write-back {VERSION_07}",
            "Q-Adapter of version 0.7, both": f"--visual both {CACHED} {VERSION_07}",
        },
        reference="Q-Adapter, queries",
        store="mllm",
    ),
    "methods": Table(
        PAIR,
        {"nothing": "--method none", **METHODS,
         "`prompt`, 16 a block": "--method prompt --queries 16"},  # as many parameters are 101 a block: 7 times as slow
        reference="Q-Adapter",
        store="pair",
        row_lrs={"`full`": FULL_LRS},
    ),
    "fourth-rate": Table(PAIR, METHODS, "Q-Adapter", store="pair", row_lrs=FOUR_LRS),
    "patches": Table(
        PAIR,
        {"Q-Adapter": CACHED}
        | {f"{row} and all patches": f"{METHODS[row]} --grid 4" for row in ("`linear`", "`lora-lm`", "`lora`")},
        reference="Q-Adapter",
        store="pair",
    ),
    "half": at_chosen_rates(of_size("half")),
    "fourfold": at_chosen_rates(of_size("fourfold"), more=LOWER),
    "equal-time": at_chosen_rates(METHODS | {row: f"{METHODS[row]} {words}" for row, words in LONGER.items()}),
    "queries": ablation({str(n): f"--queries {n}" for n in (1, 4, 8, 32)}, "16"),
    "rank": ablation({str(n): f"--rank {n}" for n in (8, 16, 64)}, "32"),
    "heads": ablation({str(n): f"--heads {n}" for n in (1, 2, 8)}, "4"),
    "blocks": ablation({"the last": "--last-blocks 1", "the last two": "--last-blocks 2", "all": "--last-blocks 0"},
                       "the last three"),
    "resampler": ablation(
        {"the last block, no gate": "--last-blocks 1 --gate none",
         "the last block, no gate, no changes": "--last-blocks 1 --gate none --no-changes",
         "the same, as many parameters": "--last-blocks 1 --gate none --no-changes --rank 144"},
        "Q-Adapter",
    ),
    "gate": ablation(
        {"none": "--gate none", "a number a query, of plain inputs": "--gate sigmoid",
         "a number a channel": "--gate channel", "a number a token of the ViT": "--gate patch",
         "a number a query, bias 2 at first": "--gate-bias 2", "a number a query, bias -2 at first": "--gate-bias -2"},
        "a number a query",
    ),
    "time": ablation(
        {"random frame vectors": "--time-embed random", "no frame vectors": "--time-embed none",
         "no changes since the frame before": "--no-changes",
         "no changes, as many parameters": "--no-changes --rank 48",
         "neither": "--time-embed none --no-changes",
         "each query attends to one frame, no changes": "--per-frame --no-changes"},
        "a ramp of frame vectors, and changes",
    ),
    "frames": ablation({str(n): f"--frames {n} --candidate-frames {n}" for n in (1, 2, 4, 16)}, "8"),
    "decay": ablation({str(n): f"--weight-decay {n}" for n in (0.01, 0.05, 0.5)}, "0.2"),
    "dropout": ablation({str(p): f"--token-dropout {p}" for p in (0.1, 0.3, 0.5)}, "0"),
    "captions": ablation(
        {"4 a clip": "--captions-per-clip 4", "4 a clip, half of the epochs": "--captions-per-clip 4 --epochs 2"},
        "1 a clip",
    ),
    "clips": ablation(
        {str(n): f"--shapes-sizes {n} 200 500 --data data/study-{n} --epochs {24000 // n} --eval-every {6000 // n}"
         for n in (500, 1500)},
        "6000",
    ),
}  # fmt: skip
