"""`python -m study TABLE`: trains the runs of a table, keeps them in results/, and writes docs/study.md.

What is in results/ already is not run again, so a study that was stopped goes on.
"""

import os

from common import cli
from common.errors import InputError
from study.report import read_page, write_page
from study.runs import first_runs, later_runs, load_results, lock_results, run_all, trains
from study.tables import SEEDS, TABLES


def describe(name: str, seeds: tuple[int, ...], jobs: int) -> str:
    """How many runs there are, how many are done, and the hours that the others will take."""
    table = TABLES[name]
    results = load_results(table)
    firsts = first_runs(table)
    rows_that_train = sum(trains(flags) for flags in table.rows.values())
    total = len(firsts) + rows_that_train * sum(seed != SEEDS[0] for seed in seeds)
    planned = {*firsts, *later_runs(table, results, seeds)}
    done = [results[key] for key in planned if key in results]
    hours = "unknown before the first run"
    if done:
        mean = sum(run["seconds"] for run in done) / len(done)
        hours = f"about {(total - len(done)) * mean / jobs / 3600:.1f}, if all runs are alike"
    return f"{name}: {total} runs, {len(done)} of them done; hours left: {hours}"


def main() -> int:
    parser = cli.Parser("Trains the runs of a table of the study and writes docs/study.md.")
    parser.prog = "python -m study"
    parser.add_argument("table", choices=list(TABLES), help="which table")
    parser.add_argument("--seeds", type=cli.at_least(0), nargs="+", default=list(SEEDS), help="of weights and batches")
    parser.add_argument("--jobs", type=cli.at_least(1), default=1, help="runs at a time; they share the cores")
    parser.add_argument("--dry-run", action="store_true", help="tell runs and hours, and run nothing")
    args = parser.parse_args()
    args.seeds = sorted(set(args.seeds))
    if SEEDS[0] not in args.seeds:
        raise InputError(f"--seeds: expected {SEEDS[0]} among them, with which learning rates are chosen")
    print(describe(args.table, tuple(args.seeds), args.jobs))
    if args.dry_run:
        return 0
    table = TABLES[args.table]
    lock_results(table)  # until the process ends
    read_page()  # before hours of training: without its markers nothing could be written
    results = load_results(table)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    run_all(table, first_runs(table), results, args.jobs, threads)
    run_all(table, later_runs(table, results, tuple(args.seeds)), results, args.jobs, threads)
    write_page(table.store)
    return 0


if __name__ == "__main__":
    cli.run(main)
