"""Benchmarks of this project beside other tools on the same input: `python -m bench`.

Where another tool computes the same, its output is compared with ours before any figure is printed. A ratio is theirs /
ours; above 1, ours needs less. The output is a JSON object for the machine and one for each row of figures.
"""

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from bench import models, scorers, training_step, video
from bench.measure import new_process
from common import cli

BENCHMARKS = {  # name -> a function of the number of repeats that returns rows of figures
    "metrics": scorers.compare_metrics,
    "vit": models.compare_vit,
    "lm": models.compare_lm,
    "decode-text": models.compare_generation,
    "loading": models.measure_loading,
    "decode": video.compare_reading,
    "train": training_step.compare_training,
    "cost": training_step.measure_cost,
}
PACKAGES = ("numpy", "torch", "transformers", "peft", "pycocoevalcap", "av")


def main() -> None:
    parser = cli.Parser("Measures this project beside tools that compute the same.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, default=list(BENCHMARKS),
                        help="which benchmarks to run")  # fmt: skip
    parser.add_argument("--repeats", type=cli.at_least(1), default=3, help="runs of each; the median counts")
    args = parser.parse_args()
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[:1]
    machine = {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(machine | {name: version(name) for name in PACKAGES}), flush=True)
    for name in args.only:
        with new_process() as pool:  # none inherits the memory of another
            for row in pool.submit(BENCHMARKS[name], args.repeats).result():
                rounded = {key: round(cell, 3) if isinstance(cell, float) else cell for key, cell in row.items()}
                print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    cli.run(main)
