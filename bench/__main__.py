"""`python -m bench`: speed and memory of this project beside other libraries that do the same work.

The output is a JSON object for the machine and one for each comparison, with medians and ratios, theirs / ours: the
median, the lowest, the highest. Above 1, ours needs less.
"""

import json
import os
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path

from bench.measure import compare, cpu_name
from bench.work import BENCHMARKS
from common import cli
from common.files import write_json

PACKAGES = "numpy", "torch", "transformers", "peft", "pycocoevalcap"
REPEATS = 3  # turns of each side


def main() -> None:
    parser = cli.Parser("Measures this project beside libraries that do the same.", "python -m bench [--only train]")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, default=list(BENCHMARKS),
                        help=f"what to measure: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the output too")
    args = parser.parse_args()
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(),
               **{name: version(name) for name in PACKAGES}}
    print(json.dumps(machine))
    rows = []
    for what, tolerance, make in (benchmark for name in args.only for benchmark in BENCHMARKS[name]):
        rows.append(compare(what, partial(make, "ours"), partial(make, "theirs"), tolerance, REPEATS))
        print(json.dumps(rows[-1]))
    if args.json:
        write_json(args.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
