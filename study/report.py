"""The tables of docs/study.md, from the files in results/."""

import statistics
from collections.abc import Sequence

from common.errors import InputError
from common.files import replace_atomically
from study.runs import ROOT, RunKey, chosen_lr, load_results
from study.tables import TABLES, Table

PAGE = ROOT / "docs/study.md"
SCORES = {"BLEU-4": "Bleu_4", "METEOR": "METEOR", "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr", "shapes": "shapes right",
          "motion": "motion right", "of one": "motion_one right", "of two": "motion_two right"}  # fmt: skip
COSTS = {"s a step": ("seconds per step", 1), "GB, peak": ("peak bytes", 1e9), "MB, file": ("adapter bytes", 1e6)}


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """"306.2 ± 1.3": the mean and the standard deviation over the seeds."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def score_of(run: dict, name: str) -> float:
    """A score of the test split, times 100. METEOR's name depends on its tables."""
    found = [value for key, value in run["test"].items() if key.partition("[")[0] == name]
    return 100 * found[0]


def format_table(table: Table, results: dict[RunKey, dict]) -> str:
    """The two tables of one comparison, scores and costs, as Markdown. Rows without runs are left out."""
    if not results:
        return "No run yet."
    scores, costs = [], []
    for row in table.rows:
        lr = chosen_lr(table, results, row)
        runs = [run for key, run in sorted(results.items(), key=str) if key.row == row and key.lr == lr]
        if not runs:
            continue
        share = f"{100 * runs[0]['trained'] / runs[0]['total']:.2f} %"
        has_steps = runs[0]["seconds per step"] is not None
        columns = [mean_and_spread([score_of(run, key) for run in runs]) for key in SCORES.values()]
        rate = f"{lr:g}" if has_steps else ""
        scores.append([row, f"{runs[0]['trained']:,}", share, rate, str(len(runs)), *columns])
        values = [[run[key] / unit for run in runs if run[key] is not None] for key, unit in COSTS.values()]
        costs.append([row, *(mean_and_spread(column, 2) if column else "" for column in values)])
    machines = sorted({f"{run['machine']}, {run['date']}" for run in results.values()})
    lines = [f"Flags of every run: `{table.flags}`. Machine: {'; '.join(machines)}.", ""]
    lines += table_lines(["trained", "parameters", "share", "`--lr`", "seeds", *SCORES], scores)
    lines += ["", *table_lines(["", *COSTS], costs)]
    return "\n".join(lines)


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begins -->", f"<!-- {name}: ends -->"


def write_page(name: str) -> None:
    """Puts the tables of one comparison into its place in docs/study.md."""
    page, (begin, end) = PAGE.read_text(), markers(name)
    if begin not in page or end not in page:
        raise InputError(f"{PAGE}: expected the lines {begin} and {end}")
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    tables = format_table(TABLES[name], load_results(name, TABLES[name]))
    with replace_atomically(PAGE) as file:
        file.write(f"{before}{begin}\n\n{tables}\n\n{end}{after}".encode())
