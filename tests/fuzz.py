"""A fuzz driver: the commands on damaged files, odd flags, and outputs that are inputs.

    python -m tests.fuzz --cases 2000 --seed 0
    python -m tests.fuzz --minutes 30 --seed 1
    python -m tests.fuzz --seed 0 --only 17       repeats a case

A case copies good files, damages one or two, and runs `train.py`, `evaluate.py` or `python -m metrics` in a fork of
this process, in a folder of its own. All that is random follows from the seed and the number of the case, but for the
sizes of files that have times in them. A case fails on any of these:

    a traceback or a warning; death by a signal; more than 30 seconds; an exit code other than 0 and 2
    exit code 2 without one line `error: ...` at the end
    a process that is left behind
    a late refusal: the line begins with a flag, and the folder of the run, of the dataset or of the cache was made
    harm: a file changed that the command only reads
"""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import train
from common import cli
from metrics import __main__ as metrics_command
from metrics import meteor_data
from models import hub
from tests.fuzz_cases import FAMILIES, Case, World, files_of
from tests.scripts import ROOT, TWELVE_STEPS, make_backbones, run_forked
from tests.video_data.test_datasets import make_folder, make_msrvtt, make_msvd

SECONDS = 30  # of a case
MEMORY = 6 * 2**30  # bytes of address space


def make_world(root: Path) -> World:
    """Two tiny backbones and a run of twelve steps, as the tests' fixtures have them."""
    make_backbones(root)
    flags = [*TWELVE_STEPS, "--vit", root / "vit", "--lm", root / "lm", "--data", root / "data", "--out", root / "run"]
    done = run_forked(train, *flags)
    assert done.returncode == 0, done.stderr
    return complete_world(World(root))


def complete_world(world: World) -> World:
    """Adds a multimodal language model, and three datasets with the videos of `data`."""
    shutil.copytree(ROOT / "backbones/tiny-mllm", world.root / "mllm")
    for name, make in (("folder", make_folder), ("msvd", lambda path: make_msvd(path, 6)), ("msrvtt", make_msrvtt)):
        (world.root / name).mkdir()
        make(world.root / name)
        videos = sorted((world.root / "data/train").glob("*.mp4"))
        for path in sorted((world.root / name).rglob("*")):
            if path.is_file() and not path.stat().st_size:
                path.write_bytes(videos.pop().read_bytes())
    return world


# ---------------------------------------------------------------------------------------- a case


def snapshot(paths: list[Path]) -> dict[Path, bytes]:
    """The content of files, and of the files in folders."""
    files = [file for path in paths for file in (files_of(path) if path.is_dir() else [path])]
    return {path: path.read_bytes() for path in files if path.is_file()}


def run_child(case: Case, folder: Path, closed: int | None) -> None:
    """The process of a case, which does not return. `closed`: a standard stream that its caller has closed."""
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT), descriptor)
            setattr(sys, name, open(descriptor, "w", closefd=False, errors="backslashreplace"))
        if closed is not None:
            os.close(closed)
            setattr(sys, ("stdin", "stdout", "stderr")[closed], None)
        sys.argv = ["command", *map(str, case.words)]
        os.environ.update(HF_ENDPOINT="http://127.0.0.1:9", COLUMNS="100")  # nothing listens there
        hub.CACHE = folder / "hub"
        os.chdir(folder)
        warnings.simplefilter("error")
        if case.script is metrics_command:
            sys.exit(metrics_command.main())
        cli.run(case.script.main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError):
                stream.flush()
        os._exit(code or 0)


def wait(child: int, seconds: float) -> int | None:
    """The exit code; None if the time is up, or if the child leaves processes behind. All of them are killed."""
    deadline, ended = time.monotonic() + seconds, (0, 0)
    while not ended[0] and time.monotonic() < deadline:
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    left, grace = True, time.monotonic() + 5 * seconds / SECONDS  # workers end when their parent has ended
    while ended[0] and left and time.monotonic() < grace:
        left = group_exists(child)
        time.sleep(0.002)
    if left:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        ended = ended if ended[0] else os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(ended[1])


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def faults(case: Case, folder: Path, code: int | None, before: list[dict], closed: int | None) -> Iterator[str]:
    """What is wrong with how a case ended."""
    errors = (folder / "stderr.txt").read_text(errors="backslashreplace")
    lines = errors.splitlines()
    last = lines[-1] if lines else ""
    if "Traceback" in errors or "Exception ignored" in errors:
        yield "a traceback"
    if code is None:
        yield "a hang, or a process left behind"
    elif code not in (0, 2):
        yield f"exit code {code}"
    elif code == 2 and closed != 2 and not last.startswith("error: "):
        yield f"no line of error at the end, but {last[:100]!r}"
    if code == 2 and re.match("error: (argument )?--", last):
        yield from (f"a late refusal, {path.name} exists" for path in case.made if path.exists())
    if snapshot(case.kept) != before[0]:
        yield "harm to a file that is only read"
    if code == 2 and "the loss is" not in last and snapshot(case.kept_if_refused) != before[1]:
        yield "harm to a file although the run was refused"


def fuzz_one(world: World, seed: int, number: int, parent: Path,
             seconds: float = SECONDS) -> tuple[str, str, int | None]:  # fmt: skip
    """Runs a case; -> its family, what is wrong ("" if nothing is), and its exit code."""
    rng, family = random.Random(f"{seed} {number}"), list(FAMILIES)[number % len(FAMILIES)]
    with TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        case = FAMILIES[family](rng, world, folder)
        closed = rng.choice([0, 1, 2]) if rng.random() < 0.03 else None
        before = [snapshot(case.kept), snapshot(case.kept_if_refused)]
        sys.stdout.flush()
        if not (child := os.fork()):
            run_child(case, folder, closed)
        code = wait(child, seconds)
        found = "; ".join(dict.fromkeys(faults(case, folder, code, before, closed)))
        if found:
            errors = (folder / "stderr.txt").read_text(errors="backslashreplace")[-3000:]
            command = " ".join(map(repr, map(str, case.words)))
            stream = "" if closed is None else f", stream {closed} closed"
            found = (f"{family}, --seed {seed} --only {number}: {found}\n  {case.script.__name__} {command}{stream}\n"
                     f"  damaged: {case.changed}\n{errors}")  # fmt: skip
    return family, found, code


def main() -> int:
    parser = cli.Parser("Runs the commands on damaged files and odd flags.")
    parser.add_argument("--minutes", type=cli.number(float, 0, above=True), help="how long; unset: until --cases")
    parser.add_argument("--cases", type=cli.at_least(1), default=2000, help="how many, unless --minutes is given")
    parser.add_argument("--seed", type=cli.at_least(0), default=0, help="of all cases")
    parser.add_argument("--first", type=cli.at_least(0), default=0, help="number of the first case")
    parser.add_argument("--only", type=cli.at_least(0), help="run this case only")
    parser.add_argument("--seconds", type=cli.number(float, 1), default=SECONDS,
                        help="limit of a case by the clock, for a busy machine; of its CPU time it is always 30")
    args = parser.parse_args()
    torch.set_num_threads(1)
    meteor_data.load()  # once, for all forks
    start_time, counts, failed = time.monotonic(), Counter(), 0
    with TemporaryDirectory() as name:
        world, end = make_world(Path(name)), 2**62 if args.minutes else args.first + args.cases
        numbers = [args.only] if args.only is not None else range(args.first, end)
        try:
            for number in numbers:
                if args.minutes and time.monotonic() - start_time > 60 * args.minutes:
                    break
                family, found, code = fuzz_one(world, args.seed, number, Path(name), args.seconds)
                counts[family, str(code)] += 1
                failed += bool(found)
                if found:
                    print(f"FAILED {found}\n")
        finally:  # after Ctrl-C too
            for family in FAMILIES:
                codes = sorted((code, count) for (name, code), count in counts.items() if name == family)
                print(f"{family}: " + ", ".join(f"{count} with exit code {code}" for code, count in codes))
            print(f"seed {args.seed}: {sum(counts.values())} cases in {time.monotonic() - start_time:.0f} s, "
                  f"{failed} failed")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
