"""The tables of `tables.toml`, their runs in results/, and the page docs/study-tables.md that is written from both.

A run is a JSON object: its flags, learning rate and seed, its scores and costs, and when, where and by which version it
was made. Tables of one store share their runs: rows with the same flags are trained once. Beside results/STORE.json,
results/STORE.clips.json.gz has what each run says of each test clip, and the CIDEr of that; not of the runs of version
0.12.0.
"""

import gzip
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev, variance

import numpy as np

from common.files import read_json, replace_atomically, write_json

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs/study-tables.md", ROOT / "results"
CONTENT = tomllib.loads(Path(__file__).with_name("tables.toml").read_text("utf-8"))
SCORES = {"BLEU-4": "Bleu_4", "METEOR": "METEOR", "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr", "shapes": "shapes right",
          "motion": "motion right", "of one": "motion_one right", "of two": "motion_two right"}
COMPARED = "CIDEr", "shapes", "motion"
COSTS = {"s per step": ("seconds per step", 1), "minutes": ("seconds", 60), "MB, file": ("adapter bytes", 1e6)}


@dataclass(frozen=True)
class Row:
    """What is trained with several learning rates at seed 0, and with the best of them at the other seeds."""

    label: str
    flags: str  # of `train.py`, after those of the store
    command: str  # the store's flags and the row's
    commit: str  # one that can train it if today's code cannot, or ""
    lrs: Sequence[float]
    seeds: int  # how many of them it gets at most
    runs: dict[tuple[float, int], dict]  # those that are done, by learning rate and seed

    @property
    def trains(self) -> bool:
        return "--method none" not in self.flags

    @property
    def best_lr(self) -> float | None:
        """The rate with the highest validation CIDEr at seed 0; None while a run is missing."""
        if any((lr, 0) not in self.runs for lr in self.lrs):
            return None
        return max(self.lrs, key=lambda lr: self.runs[lr, 0]["val"]["CIDEr"])

    @property
    def best_runs(self) -> list[dict]:
        """The runs with the best rate, by seed."""
        return [self.runs[lr, seed] for lr, seed in sorted(self.runs) if lr == self.best_lr]


def read_runs(store: str) -> list[dict]:
    """The runs in results/STORE.json."""
    path = RESULTS / f"{store}.json"
    return read_json(path)["runs"] if path.exists() else []


def clips_path(store: str) -> Path:
    return RESULTS / f"{store}.clips.json.gz"


def read_clips(store: str) -> dict[str, dict]:
    """What runs say of test clips, by `key_of` a run: {"captions": {id: caption}, "CIDEr": [of each, times 100]}."""
    path = clips_path(store)
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}


def add_clips(store: str, key: str, clips: dict) -> None:
    """Adds what is said of test clips to results/STORE.clips.json.gz."""
    content = json.dumps(dict(sorted((read_clips(store) | {key: clips}).items())))
    with replace_atomically(clips_path(store)) as file:
        file.write(gzip.compress(content.encode(), mtime=0))


def add_run(store: str, run: dict, clips: dict) -> None:
    """Adds a run to results/STORE.json, whose order does not depend on when a run ended, and what it says of the test
    clips."""
    add_clips(store, key_of(run), clips)
    runs = sorted([*read_runs(store), run], key=lambda run: (run["flags"], run["lr"], run["seed"]))
    write_json(RESULTS / f"{store}.json", {"runs": runs})


def key_of(run: dict) -> str:
    return f"{run['flags']} --lr {run['lr']:g} --seed {run['seed']}"


def read_rows(name: str) -> list[Row]:
    """The rows of a table, with their runs."""
    table = CONTENT["tables"][name]
    store, results, rows = CONTENT["stores"][table["store"]], read_runs(table["store"]), []
    for row in table["rows"]:
        command = f"{store['flags']} {row['flags']}"
        runs = {(run["lr"], run["seed"]): run for run in results if run["flags"] == command}
        lrs = row.get("lrs") or table.get("lrs") or CONTENT["lrs"]
        rows.append(Row(row["label"], row["flags"], command, row.get("commit", ""), lrs, row.get("seeds", 3), runs))
    return rows


# ---------------------------------------------------------------------------------------- the page


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """"306.2 ± 1.3": the mean and the standard deviation over the seeds."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def compare(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The mean of a minus that of b, and the standard error of that; not a number if one of them has one value."""
    error = sum(variance(x) / len(x) for x in (a, b)) ** 0.5 if min(len(a), len(b)) > 1 else math.nan
    return mean(a) - mean(b), error


def format_difference(mean: float, error: float) -> str:
    """"-3.1 ± 1.2"."""
    return f"{mean:+.1f}" + ("" if math.isnan(error) else f" ± {error:.1f}")


def scores(runs: Sequence[dict], column: str) -> list[float]:
    """A score of the test split, times 100. The name of METEOR may go on with its tables, "METEOR[exact]"."""
    return [100 * next(value for name, value in run["test"].items() if name.partition("[")[0] == SCORES[column])
            for run in runs]


def mean_and_error(values: Sequence[float], sign: str = "") -> str:
    """"23.1 ± 0.9": the mean and its standard error, over the clips."""
    return f"{np.mean(values):{sign}.1f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}"


def difference_over_clips(clips: dict[str, dict], a: Sequence[dict], b: Sequence[dict]) -> str:
    """Of CIDEr, between two rows' means over seeds."""
    first, second = (np.mean([clips[key_of(run)]["CIDEr"] for run in runs], axis=0) for runs in (a, b))  # (clips,)
    return mean_and_error(first - second, "+")


def to_markdown(rows: list[dict[str, str]]) -> str:
    """A table of rows, whose keys are its head."""
    head = list(dict.fromkeys(column for row in rows for column in row))
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([row.get(column, "") for column in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_rate(row: Row, lr: float) -> str:
    """"0.002 ↓": the arrow says that no lower rate was worse at seed 0, in this table or another with the same runs."""
    if len(row.lrs) == 1:
        return f"{lr:g}" if row.trains else ""
    ciders = {x: run["val"]["CIDEr"] for (x, seed), run in row.runs.items() if seed == 0}
    worse = [x for x in ciders if ciders[x] < ciders[lr]]
    return f"{lr:g}{'' if any(x < lr for x in worse) else ' ↓'}{'' if any(x > lr for x in worse) else ' ↑'}"


def format_table(name: str) -> str:
    """One comparison as two tables of Markdown: scores; differences from the reference row, costs and flags."""
    table, rows = CONTENT["tables"][name], [row for row in read_rows(name) if row.best_runs]
    reference = next((row.best_runs for row in rows if row.label == table["reference"]), None)
    if reference is None:
        return f"No run of {table['reference']} is done yet."
    clips, upper, lower = read_clips(table["store"]), [], []
    measured = {score.partition("[")[0] for score in reference[0]["test"]}
    columns = [column for column, score in SCORES.items() if score in measured]
    for row in rows:
        runs = row.best_runs
        upper.append({"trained": row.label, "parameters": f"{runs[0]['trained']:,}",
                      "share": f"{100 * runs[0]['trained'] / runs[0]['total']:.2f}%",
                      "`--lr`": format_rate(row, runs[0]["lr"]), "seeds": str(len(runs)),
                      **{column: mean_and_spread(scores(runs, column)) for column in columns}})
        differences = {column: format_difference(*compare(scores(runs, column), scores(reference, column)))
                       for column in columns if column in COMPARED}
        if all(key_of(run) in clips for run in runs + reference):
            differences["CIDEr, over clips"] = difference_over_clips(clips, runs, reference)
        costs = {cost: [run[key] / unit for run in runs if run.get(key)] for cost, (key, unit) in COSTS.items()}
        lower.append({f"compared with {table['reference']}": row.label,
                      **(dict.fromkeys(differences, "") if row.label == table["reference"] else differences),
                      **{cost: mean_and_spread(values, 2) if values else "" for cost, values in costs.items()},
                      "flags of the row": f"`{row.flags}`" + (f" of {row.commit}" if row.commit else "")})
    made = sorted({f"{run['machine']}, {run['date']}" for row in rows for run in row.best_runs})
    head = f"Flags of every row: `{CONTENT['stores'][table['store']]['flags']}`. {'; '.join(made)}."
    return "\n\n".join([head, to_markdown(upper), to_markdown(lower)])


def format_controls() -> str:
    """What changed frames leave of a captioner's CIDEr (study/controls.py)."""
    found, rows = read_clips("controls"), []
    for row in (row for row in CONTENT["controls"]["rows"] if row["flags"] in found):
        own, *others = ciders = {name: np.array(x["CIDEr"]) for name, x in found[row["flags"]].items()}
        rows.append({"captions of": row["label"], "clips": f"{len(ciders[own]):,}", own: mean_and_error(ciders[own]),
                     **{name: mean_and_error(ciders[name] - ciders[own], "+") for name in others},
                     "flags": f"`{row['flags']}`"})
    return f"{CONTENT['controls']['text']}\n\n{to_markdown(rows)}"


def format_page() -> str:
    texts = {name: (table["title"], format_table(name)) for name, table in CONTENT["tables"].items()}
    texts["controls"] = CONTENT["controls"]["title"], format_controls()
    parts = (f"## {title}\n\n`.venv/bin/python -m study {name}`\n\n{text}\n" for name, (title, text) in texts.items())
    return "\n".join([CONTENT["intro"].lstrip(), *parts])
