"""The tables and figures of docs/study.md, from the files in results/."""

import os
import statistics
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from common.errors import InputError
from common.files import acquire_lock, replace_atomically
from study.figures import PANELS, draw
from study.runs import ROOT, RUNS, RunKey, chosen_lr, load_results, trains
from study.tables import TABLES, Table

PAGE = ROOT / "docs/study.md"
SCORES = {"BLEU-4": "Bleu_4", "METEOR": "METEOR", "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr", "shapes": "shapes right",
          "motion": "motion right", "of one": "motion_one right", "of two": "motion_two right"}  # fmt: skip
DIFFERENCES = ("CIDEr", "shapes", "motion")
COSTS = {"s a step": ("seconds per step", 1), "minutes": ("seconds", 60), "GB, peak": ("peak bytes", 1e9),
         "MB, file": ("adapter bytes", 1e6)}  # fmt: skip


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """"306.2 ± 1.3": the mean and the standard deviation over the seeds."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, its first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def score_of(run: dict, name: str) -> float:
    """A score of the test split, times 100. METEOR's name depends on its tables."""
    found = [value for key, value in run["test"].items() if key.partition("[")[0] == name]
    if not found:
        raise InputError(f"results: {run['flags']}, seed {run['seed']}: test: expected the score {name}")
    return 100 * found[0]


def reported_runs(table: Table, results: dict[RunKey, dict]) -> dict[str, list[dict]]:
    """{row: its runs with the rate that was chosen}; rows without such runs are left out."""
    found = {}
    for row, flags in table.rows.items():
        lr = chosen_lr(table, results, flags)
        runs = [run for key, run in sorted(results.items(), key=str) if key.flags == flags and key.lr == lr]
        found |= {row: runs} if runs else {}
    return found


def difference(a: Sequence[float], b: Sequence[float]) -> str:
    """"-3.1 ± 1.2": the mean of a minus that of b, and the standard error of that."""
    mean = f"{statistics.mean(a) - statistics.mean(b):+.1f}"
    if min(len(a), len(b)) < 2:
        return mean
    return f"{mean} ± {sum(statistics.variance(x) / len(x) for x in (a, b)) ** 0.5:.1f}"


def format_rate(table: Table, row: str, run: dict) -> str:
    """"0.005"; an arrow says that it is the lowest or the highest that was tried, and a better one may lie beyond."""
    if not trains(table.rows[row]):
        return ""
    rates, lr = table.rates(row), run["lr"]
    arrow = " ↓" if lr == min(rates) else " ↑" if lr == max(rates) else ""
    return f"{lr:g}{arrow if len(rates) > 1 else ''}"


def format_costs(runs: Sequence[dict]) -> list[str]:
    """A cell for each of COSTS, empty where it was not measured."""
    values = [[run[key] / unit for run in runs if run[key] is not None] for key, unit in COSTS.values()]
    return [mean_and_spread(column, 2) if column else "" for column in values]


def format_machines(runs: Sequence[dict]) -> str:
    """"1 thread(s) of X, 2 at a time, 2026-01-01 and 2026-01-02": each machine with its days."""
    days = sorted({(run["machine"], run["date"]) for run in runs})
    groups = groupby(days, itemgetter(0))
    return "; ".join(f"{machine}, {' and '.join(day for _, day in group)}" for machine, group in groups)


def format_table(table: Table, results: dict[RunKey, dict]) -> str:
    """The three tables of one comparison, as Markdown: scores, differences from the row `reference`, costs."""
    rows = reported_runs(table, results)
    scores, differences, costs = [], [], []
    for row, runs in rows.items():
        share = f"{100 * runs[0]['trained'] / runs[0]['total']:.2f} %"
        columns = [mean_and_spread([score_of(run, key) for run in runs]) for key in SCORES.values()]
        rate = format_rate(table, row, runs[0])
        scores.append([row, f"{runs[0]['trained']:,}", share, rate, str(len(runs)), *columns])
        if row != table.reference and table.reference in rows:
            pairs = [[[score_of(run, SCORES[name]) for run in side] for side in (runs, rows[table.reference])]
                     for name in DIFFERENCES]  # fmt: skip
            differences.append([row, *(difference(*pair) for pair in pairs)])
        costs.append([row, *format_costs(runs), f"`{table.rows[row]}`"])
    lines = [f"Common flags: `{table.flags}`. Machine: {format_machines(sum(rows.values(), []))}.", ""]
    lines += table_lines(["trained", "parameters", "share", "`--lr`", "seeds", *SCORES], scores)
    if differences:
        lines += ["", *table_lines([f"minus {table.reference}", *DIFFERENCES], differences)]
    lines += ["", *table_lines(["", *COSTS, "flags of the row"], costs)]
    return "\n".join(lines)


def figure_path(name: str) -> Path:
    """The figure of a table, beside the page."""
    return PAGE.with_name(f"study-{name}.svg")


def format_figure(table: Table, results: dict[RunKey, dict]) -> str:
    """The SVG of one comparison."""
    rows = reported_runs(table, results)
    return draw({row: {name: [score_of(run, SCORES[name]) for run in runs] for name in PANELS}
                 for row, runs in rows.items()})  # fmt: skip


def is_begun(table: Table, results: dict[RunKey, dict]) -> bool:
    """Whether the row `reference` has others to compare it with. Tables share rows, so some may be of others' runs."""
    rows = reported_runs(table, results)
    return table.reference in rows and len(rows) > 1


def format_part(name: str, table: Table, results: dict[RunKey, dict]) -> str:
    """What stands between the markers of one comparison."""
    if not is_begun(table, results):
        return "No run yet."
    picture = f"![CIDEr, shapes and motion of each row]({figure_path(name).name})"
    return f"{picture}\n\n{format_table(table, results)}"


def markers(name: str) -> tuple[str, str]:
    """The lines around a table in the page."""
    return f"<!-- {name}: begins -->", f"<!-- {name}: ends -->"


def read_page() -> str:
    """docs/study.md. Raises InputError where it is not text, or lacks the place of a table."""
    try:
        page = PAGE.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{PAGE}: expected a page in UTF-8: {error}") from error
    for begin, end in map(markers, TABLES):
        if begin not in page or end not in page:
            raise InputError(f"{PAGE}: expected the lines {begin} and {end}")
    return page


def write_page(store: str) -> None:
    """Puts the tables whose runs are in results/STORE.json into their places in docs/study.md, and their figures beside
    the page."""
    RUNS.mkdir(parents=True, exist_ok=True)
    lock = acquire_lock(RUNS / "page.lock", wait=True)  # the study of another store may end at this moment
    try:
        page = read_page()
        for name, table in TABLES.items():
            if table.store != store:
                continue
            begin, end = markers(name)
            before, _, rest = page.partition(begin)
            results = load_results(table)
            page = f"{before}{begin}\n\n{format_part(name, table, results)}\n\n{end}{rest.partition(end)[2]}"
            if is_begun(table, results):
                with replace_atomically(figure_path(name)) as file:
                    file.write(format_figure(table, results).encode())
        with replace_atomically(PAGE) as file:
            file.write(page.encode())
    finally:
        os.close(lock)
