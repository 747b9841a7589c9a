"""The tables of `tables.toml`, their runs in results/, and the page docs/study-tables.md that is written from both.

A run is a JSON object: its flags, learning rate and seed, its scores and costs, and when, where and by which version it
was made. Tables of one store share their runs: rows with the same flags are trained once.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev, variance

from common.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs/study-tables.md", ROOT / "results"
CONTENT = tomllib.loads(Path(__file__).with_name("tables.toml").read_text("utf-8"))
SCORES = {"BLEU-4": "Bleu_4", "METEOR": "METEOR", "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr", "shapes": "shapes right",
          "motion": "motion right", "of one": "motion_one right", "of two": "motion_two right"}
COMPARED = "CIDEr", "shapes", "motion"
COSTS = {"s per step": ("seconds per step", 1), "minutes": ("seconds", 60), "GB, peak": ("peak bytes", 1e9),
         "MB, file": ("adapter bytes", 1e6)}


@dataclass(frozen=True)
class Row:
    """What is trained with several learning rates at seed 0, and with the best of them at the other seeds."""

    label: str
    flags: str | None  # of `train.py`, after those of the store; None: the row needs version 0.12.0
    published: str  # of version 0.12.0
    command: str | None  # the store's flags and the row's
    lrs: Sequence[float]
    runs: dict[tuple[float, int], dict]  # those that are done, by learning rate and seed

    @property
    def trains(self) -> bool:
        return "--method none" not in self.published

    @property
    def best_lr(self) -> float | None:
        """The rate with the highest validation CIDEr at seed 0; None while a run is missing."""
        if any((lr, 0) not in self.runs for lr in self.lrs):
            return None
        return max(self.lrs, key=lambda lr: self.runs[lr, 0]["val CIDEr"])

    @property
    def best_runs(self) -> list[dict]:
        """The runs with the best rate, by seed."""
        return [self.runs[lr, seed] for lr, seed in sorted(self.runs) if lr == self.best_lr]


def read_runs(store: str) -> list[dict]:
    """The runs in results/STORE.json."""
    path = RESULTS / f"{store}.json"
    return read_json(path)["runs"] if path.exists() else []


def add_run(store: str, run: dict) -> None:
    """Adds a run to results/STORE.json, whose order does not depend on when a run ended."""
    runs = sorted([*read_runs(store), run], key=lambda run: (run["flags"], run["lr"], run["seed"]))
    write_json(RESULTS / f"{store}.json", {"runs": runs})


def read_rows(name: str) -> list[Row]:
    """The rows of a table, with their runs."""
    table = CONTENT["tables"][name]
    store, results, rows = CONTENT["stores"][table["store"]], read_runs(table["store"]), []
    for row in table["rows"]:
        flags, published = row.get("flags"), row.get("published", row.get("flags"))
        command, old_command = flags and f"{store['flags']} {flags}", f"{store['published']} {published}"
        runs = {(run["lr"], run["seed"]): run for run in results if run["flags"] in (command, old_command)}
        lrs = row.get("lrs") or table.get("lrs") or CONTENT["lrs"]
        rows.append(Row(row["label"], flags, published, command, lrs, runs))
    return rows


# ---------------------------------------------------------------------------------------- the page


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """"306.2 ± 1.3": the mean and the standard deviation over the seeds."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def difference(a: Sequence[float], b: Sequence[float]) -> str:
    """"-3.1 ± 1.2": the mean of a minus that of b, and the standard error of that."""
    error = f" ± {sum(variance(x) / len(x) for x in (a, b)) ** 0.5:.1f}" if min(len(a), len(b)) > 1 else ""
    return f"{mean(a) - mean(b):+.1f}{error}"


def scores(runs: Sequence[dict], column: str) -> list[float]:
    """A score of the test split, times 100. The name of METEOR may go on with its tables, "METEOR[exact]"."""
    return [100 * next(value for name, value in run["test"].items() if name.partition("[")[0] == SCORES[column])
            for run in runs]


def format_rate(row: Row, lr: float) -> str:
    """"0.002 ↓": the arrow says that no lower rate was worse at seed 0, in this table or another with the same runs."""
    if len(row.lrs) == 1:
        return f"{lr:g}" if row.trains else ""
    worse = [x for x, seed in row.runs if seed == 0 and row.runs[x, 0]["val CIDEr"] < row.runs[lr, 0]["val CIDEr"]]
    return f"{lr:g}{'' if any(x < lr for x in worse) else ' ↓'}{'' if any(x > lr for x in worse) else ' ↑'}"


def format_table(name: str) -> str:
    """One comparison as two tables of Markdown: scores; differences from the reference row, costs and flags."""
    table = CONTENT["tables"][name]
    upper = [["trained", "parameters", "share", "`--lr`", "seeds", *SCORES]]
    lower = [[f"compared with {table['reference']}", *COMPARED, *COSTS, "flags of the row", "of version 0.12.0"]]
    rows = [row for row in read_rows(name) if row.best_runs]
    reference = next((row.best_runs for row in rows if row.label == table["reference"]), None)
    for row in rows:
        runs = row.best_runs
        compared = reference and row.label != table["reference"]
        costs = [[run[key] / unit for run in runs if run.get(key)] for key, unit in COSTS.values()]
        upper.append([row.label, f"{runs[0]['trained']:,}", f"{100 * runs[0]['trained'] / runs[0]['total']:.2f}%",
                      format_rate(row, runs[0]["lr"]), str(len(runs)),
                      *(mean_and_spread(scores(runs, column)) for column in SCORES)])
        lower.append([row.label,
                      *(difference(scores(runs, x), scores(reference, x)) if compared else "" for x in COMPARED),
                      *(mean_and_spread(values, 2) if values else "" for values in costs),
                      f"`{row.flags}`" if row.flags else "by the tag", f"`{row.published}`"])
    for lines in (upper, lower):
        lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    made = sorted({f"{run['machine']}, {run['date']}" for row in rows for run in row.best_runs})
    store = CONTENT["stores"][table["store"]]
    head = f"Flags of every row: `{store['flags']}`, of version 0.12.0: `{store['published']}`. {'; '.join(made)}."
    return "\n\n".join([head, *("\n".join(f"| {' | '.join(line)} |" for line in lines) for lines in (upper, lower))])


def format_page() -> str:
    parts = (f"## {table['title']}\n\n`.venv/bin/python -m study {name}`\n\n{format_table(name)}\n"
             for name, table in CONTENT["tables"].items())
    return "\n".join([CONTENT["intro"].lstrip(), *parts])
