"""`python -m study TABLE`: prints the commands that make what is missing of a table, for a shell to run:

    .venv/bin/python -m study mllm | sh                                              one run after the other
    .venv/bin/python -m study mllm | tr '\\n' '\\0' | xargs -0 -n 1 -P 2 sh -c      two at a time

Before that, it keeps finished runs in results/ and writes docs/study-tables.md and docs/ablations.svg. It takes two
rounds: a row's other seeds get the best learning rate of seed 0. Nothing is printed when a table is complete. A run
that was stopped goes on where it was. One that is in results/ is not run again, published ones among them: take those
out to train them anew.
"""

import re
import shlex
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

from bench.measure import cpu_name
from common import cli
from common.config import Config
from common.files import read_json, read_json_lines
from study.figure import FIGURE, draw_ablations
from study.scenes import KINDS
from study.tables import CONTENT, PAGE, Row, add_clips, add_run, format_page, read_clips, read_rows
from video_data.shapes import make_dataset

RUNS = Path("runs/study")

Key = tuple[Row, float, int]  # of a run: its row, learning rate and seed


def missing_runs(rows: list[Row], seeds: list[int]) -> list[Key]:
    """What to train next: all rates at seed 0, and once they are there the best one at the other seeds."""
    missing = []
    for row in (row for row in rows if not row.commit):
        firsts, later = [(lr, 0) for lr in row.lrs], [(row.best_lr, seed) for seed in seeds[: row.seeds] if row.trains]
        missing += [(row, *key) for key in (firsts if row.best_lr is None else later) if key not in row.runs]
    return missing


def path_of(store: str, flags: str) -> Path:
    return RUNS / store / re.sub(r"[^\w.]+", "-", flags).strip("-")


def folder_of(store: str, key: Key) -> Path:
    row, lr, seed = key
    return path_of(store, f"{row.flags} {lr:g} {seed}")


def command_of(store: str, key: Key) -> str:
    """The command that trains a run, or goes on with it."""
    (row, lr, seed), folder = key, folder_of(store, key)
    words = ["--resume", folder]
    if not (folder / "config.json").exists():
        words = [*row.command.split(), "--lr", f"{lr:g}", "--seed", seed, "--out", folder]
    return shlex.join(map(str, [sys.executable, "train.py", *words]))


def read_run(folder: Path, key: Key) -> dict:
    """What results/ keeps of a finished run, from the files in its folder."""
    row, lr, seed = key
    config, rows = read_json(folder / "config.json"), read_json_lines(folder / "log.jsonl")
    epochs = Config(epochs=config["config"]["epochs"]).phase_epochs
    first = rows[-1]["step"] * epochs[0] // sum(epochs)  # step of captions: those of words are faster
    speeds = [row["clips/s"] for row in rows if "clips/s" in row and row["step"] > first]
    validations = [row for row in rows if "val" in row]
    best = max(validations[1:] or validations, key=lambda row: row["val"]["CIDEr"])  # step 0's weights are not kept
    return {"version": config["version"], "flags": row.command, "lr": lr, "seed": seed,
            "date": time.strftime("%Y-%m-%d"), "machine": cpu_name(), "versions": config["versions"],
            "steps": rows[-1]["step"], "best step": best["step"], "val": best["val"],
            "models": config["models"], "test": rows[-1]["test"],
            "seconds": rows[-1]["elapsed"] - validations[0]["elapsed"],
            "seconds per step": config["config"]["batch_size"] / median(speeds) if speeds else None,
            "adapter bytes": (folder / "best/adapter.safetensors").stat().st_size,
            "trained": config["trained"], "total": config["total"],
            "gates": next((row["gates"] for row in reversed(rows) if "gates" in row), [])}  # means in the last batch


def read_clip_results(folder: Path) -> dict:
    """What results/ keeps of the test clips of a finished run."""
    test = read_json(folder / "test.json")
    return {"captions": test["captions"], "CIDEr": [round(100 * test["CIDEr"][clip], 1) for clip in test["captions"]]}


def commands_of_table(name: str, seeds: list[int]) -> list[str]:
    """Commands of the runs that results/ lacks, for which clips are made; finished ones are kept there."""
    store = CONTENT["tables"][name]["store"]
    while finished := [key for key in missing_runs(read_rows(name), seeds)
                       if (folder_of(store, key) / "test.json").exists()]:
        for key in finished:
            add_run(store, read_run(folder_of(store, key), key), read_clip_results(folder_of(store, key)))
    keys = missing_runs(read_rows(name), seeds)
    with redirect_stdout(sys.stderr):  # stdout is for the shell
        for folder, clips in CONTENT["clips"].items():
            if any(folder in row.command.split() for row, _, _ in keys):
                make_dataset(Path(folder), clips["sizes"], clips.get("seed", 1), KINDS[clips["kind"]])
    return [command_of(store, key) for key in keys]


def commands_of_controls() -> list[str]:
    """Commands of the controls that results/ lacks; finished ones are kept there."""
    commands = []
    for flags in (row["flags"] for row in CONTENT["controls"]["rows"] if row["flags"] not in read_clips("controls")):
        path = path_of("controls", f"{flags}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            add_clips("controls", flags, read_json(path))
        else:
            commands.append(shlex.join([sys.executable, "-m", "study.controls", *flags.split(), "--save", str(path)]))
    return commands


def main() -> None:
    parser = cli.Parser("Prints the commands that make what is missing of a table.", "python -m study TABLE | sh")
    parser.add_argument("table", choices=[*CONTENT["tables"], "controls"], help="which table of study/tables.toml")
    parser.add_argument("--seeds", type=cli.number(int, 0), nargs="+", default=[0, 1, 2],
                        help="of weights and batches; the learning rate is chosen at seed 0 in any case")
    args = parser.parse_args()
    is_controls = args.table == "controls"
    commands = commands_of_controls() if is_controls else commands_of_table(args.table, sorted({*args.seeds}))
    PAGE.write_text(format_page(), "utf-8")
    FIGURE.write_text(draw_ablations(), "utf-8")
    print("".join(f"{command}\n" for command in commands), end="")


if __name__ == "__main__":
    cli.run(main)
