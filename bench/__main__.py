"""`python -m bench`: speed and memory of this project against other libraries that do the same work.

The output is a JSON object for the machine and one for each comparison, with medians and ratios, theirs / ours: the
median, the lowest, the highest. Above 1, ours needs less.
"""

import json
import os
import platform
from importlib.metadata import version

from bench.measure import compare, cpu_name
from bench.work import BENCHMARKS
from common import cli

PACKAGES = "numpy", "torch", "transformers", "peft", "pycocoevalcap"
REPEATS = 3  # turns of each side


def main() -> None:
    parser = cli.Parser("Measures this project against libraries that do the same.", "python -m bench [--only train]")
    names = list(dict.fromkeys(name for name, *_ in BENCHMARKS))
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names,
                        help=f"what to measure: {', '.join(names)} (default: all)")
    args = parser.parse_args()
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(machine | {name: version(name) for name in PACKAGES}))
    for name, what, tolerance, make in BENCHMARKS:
        if name in args.only:
            print(json.dumps(compare(what, tolerance, make, REPEATS)))


if __name__ == "__main__":
    cli.run(main)
