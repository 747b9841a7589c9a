"""The cases of the fuzz driver (`tests/fuzz.py`): good files, damage to them, and families of commands.

All that is random is drawn from the generator that a function gets.
"""

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import evaluate
import train
from metrics import __main__ as metrics_command
from tests.scripts import TWELVE_STEPS
from training import config as train_config

DEEP = "<deep>"  # becomes a hundred thousand brackets in a file
ODD_VALUES = (None, True, False, [], {}, "", "x", "\x1b[31m\n", "\ud800", "\0", "../x", "a" * 100_000, 0, 1, -1, 3, 0.5,
              2**31, 2**63, 10**30, -(10**30), float("nan"), float("inf"), [[]], {"a": 1}, [1, "a"], DEEP)  # fmt: skip
ODD_BYTES = (b"", b"{}", b"[]", b"3", b"null", b"\xff\xfe", b"\x80\x04.", b'{"a": 1}', b"\0" * 100, b"PK\x03\x04")
ODD_ROWS = (b"[]", b"3", b'{"a": 1}', b'{"step": null}', b'{"step": -1}', b'{"step": 1, "elapsed": "x"}', b"\xff",
            b'{"step": 2, "val": 3}', b'{"step": 1, "loss": {}}', b"", b'{"step": 1', b'{"step": 1e400}',
            b'{"step": 0, "val": {"CIDEr": 1}}', b'{"step": 99, "loss": 1, "gates": []}')  # fmt: skip
ODD_WORDS = ("", "x", "0", "-1", "1", "2", "3", "5", "0.5", "nan", "inf", "1e400", "1e-300", "\u0663", " 3", "1_000",
             "0x10", "1e300", "9" * 20, "\udcff", "a\nb", "--", "-", "/dev/null", "/dev/zero", ".", "gone/x",
             "run", "file", "\x1b[31m")  # fmt: skip
LARGE_WORDS = ("100", "4096", "65536", "1000000", "2147483648")  # with --plan: valid ones of them take long
ODD_TEXTS = ("a man runs", "", " ", "\0", "\ud800", "\u2028", "|||", "...", "p.m. p.m", "\U0001f642", "((((",
             "it's n't", "1,000.50 " * 300, "the " * 300, "x" * 120_000, "x," * 1000, "-" * 5000, "'" * 300,
             "a.b." * 500)  # fmt: skip


@dataclass(frozen=True)
class World:
    """Good files, which cases copy: `vit`, `lm`, `mllm`, `data` (shapes), `run`, `folder`, `msvd`, `msrvtt`."""

    root: Path

    def copy(self, name: str, case: Path) -> Path:
        return shutil.copytree(self.root / name, case / name)


@dataclass
class Case:
    """A command and what may come of it."""

    script: object  # a module with `main`
    words: list
    changed: str = ""  # what was damaged
    kept: list[Path] = field(default_factory=list)  # may not change
    kept_if_refused: list[Path] = field(default_factory=list)
    made: list[Path] = field(default_factory=list)  # do not exist after the refusal of a flag


# ----------------------------------------------------------------------------------------- damage


def damage_tree(rng: random.Random, tree) -> str:
    """Changes one value somewhere in lists and dicts; -> what."""
    path, value = [], tree
    while True:
        container, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        path.append(key)
        value = container[key]
        if not (isinstance(value, dict | list) and value) or rng.random() < 0.2:
            break
    kind = rng.choice(["odd", "odd", "odd", "delete", "wrap", "scale", "rename"])
    if kind == "delete":
        del container[key]
    elif kind == "wrap":
        container[key] = [value]
    elif kind == "scale" and type(value) in (int, float):
        container[key] = value * rng.choice([-1, 2, 1000, 0, 0.5])
    elif kind == "rename" and isinstance(container, dict):
        container[rng.choice(["x", "", str(key).upper(), "\ud800"])] = container.pop(key)
    else:
        container[key] = value = rng.choice(ODD_VALUES)
        kind = repr(value)[:40]
    return f"{path}: {kind}"


def to_json(tree) -> bytes:
    text = json.dumps(tree).replace("Infinity", "1e400")
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


def damage_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    kind = rng.choice(["flip", "flip", "cut", "insert", "replace"])
    at = rng.randrange(len(content) or 1)
    if kind == "flip" and content:
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :], f"bit of byte {at}"
    if kind == "cut":
        return content[:at], f"cut to {at} bytes"
    odd = rng.choice(ODD_BYTES)
    return (odd if kind == "replace" else content[:at] + odd + content[at:]), f"{kind} {odd[:20]!r} at {at}"


def damage_safetensors(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """The header's JSON."""
    end = 8 + int.from_bytes(content[:8], "little")
    tree = json.loads(content[8:end])
    changed = damage_tree(rng, tree)
    header = to_json(tree)
    return len(header).to_bytes(8, "little") + header + content[end:], f"header {changed}"


def damage_state(rng: random.Random, path: Path) -> str:
    tree = torch.load(path, weights_only=True)
    changed = damage_tree(rng, tree)
    torch.save(tree, path)
    return changed


def damage_file(rng: random.Random, path: Path) -> str:
    """Damages a file by its kind, or puts something else in its place; -> what was done."""
    kind, content = rng.random(), path.read_bytes()
    if kind < 0.1:
        path.unlink()
        other = rng.choice(["nothing", "folder", "pipe", "link"])
        actions = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("gone")}
        actions.get(other, lambda: None)()
        return f"{path.name}: {other} in its place"
    if kind < 0.7 and path.suffix == ".json":
        tree = json.loads(content)
        changed = damage_tree(rng, tree) if tree else "empty"
        content = to_json(tree)
    elif kind < 0.7 and path.suffix == ".jsonl":
        rows = content.splitlines()
        at, row = rng.randrange(len(rows) + 1), rng.choice(ODD_ROWS)
        content, changed = b"\n".join([*rows[:at], row, *rows[at:]]) + b"\n", f"row {row!r} at {at}"
    elif kind < 0.7 and path.suffix == ".pt":
        return f"{path.name}: {damage_state(rng, path)}"
    elif kind < 0.7 and path.suffix == ".safetensors":
        content, changed = damage_safetensors(rng, content)
    else:
        content, changed = damage_bytes(rng, content)
    path.write_bytes(content)
    return f"{path.name}: {changed}"


# --------------------------------------------------------------------------------------- families


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)


def run_case(rng: random.Random, world: World, case: Path) -> Case:
    """A run's folder with one or two damaged files: evaluated, used for a video, or resumed."""
    run = world.copy("run", case)
    names = "config.json", "config.json", "log.jsonl", "best/adapter.safetensors", "last/adapter.safetensors"
    names += "last/state.pt", "last/state.pt", "best/sha256.json", "test.json"
    chosen = {rng.choice(names) for _ in range(rng.choice([1, 1, 2]))}
    changed = [damage_file(rng, run / name) for name in sorted(chosen)]
    if rng.random() < 0.7:  # checkpoints of older versions have none
        for path in sorted(run.glob("*/sha256.json")):
            path.unlink() if path.is_file() else None
    clip = min((world.root / "data/val").glob("*.mp4"))
    if rng.random() < 0.5:
        words = rng.choice([["--split", "val"], ["--video", clip], ["--video", clip, "--window", 0.5]])
        words += rng.choice([[], ["--report", "page.html"], ["--save", "p.json"], ["--weights", "last"]])
        return Case(evaluate, [run, *words], "; ".join(changed), kept=[run, clip])
    words = ["--resume", run, "--device", "cpu", *rng.choice([[], [], ["--epochs", 5]])]
    return Case(train, words, "; ".join(changed), kept_if_refused=[run / "config.json", run / "log.jsonl"])


def data_case(rng: random.Random, world: World, case: Path) -> Case:
    """A dataset's folder with damaged captions or splits: planned, or trained on for a step."""
    name = rng.choice(["folder", "msvd", "msrvtt", "data"])
    folder = world.copy(name, case)
    texts = [path for path in files_of(folder) if path.suffix in (".json", ".txt", ".csv", ".pkl")]
    paths = texts if rng.random() < 0.8 else files_of(folder)
    path = rng.choice(paths)
    words = ["--dataset", "shapes" if name == "data" else name, "--data", folder, *TWELVE_STEPS, "--batch-size", 1]
    words += ["--epochs", 1, "--vit", world.root / "vit", "--lm", world.root / "lm", "--out", case / "out"]
    words += rng.choice([[], ["--allow-missing"]]) + rng.choice([["--plan"], ["--method", "none"]])
    texts = [] if name == "data" else texts  # shapes that are not complete are made again
    return Case(train, words, damage_file(rng, path), kept=texts)


def model_case(rng: random.Random, world: World, case: Path) -> Case:
    """A model's folder with one or two damaged files: planned, or run without training."""
    name = rng.choice(["vit", "lm", "mllm"])
    folder = world.copy(name, case)
    changed = [damage_file(rng, path) for path in rng.sample(files_of(folder), rng.choice([1, 1, 2]))]
    words = [*TWELVE_STEPS, "--data", world.root / "data", "--out", case / "out", "--batch-size", 6, "--epochs", 1]
    models = {"vit": world.root / "vit", "lm": world.root / "lm"} if name != "mllm" else {}
    for part, path in (models | {name: folder}).items():
        words += [f"--{part}", path]
    return Case(train, [*words, *rng.choice([["--plan"], ["--method", "none"]])], "; ".join(changed), kept=[folder])


def odd_caption(rng: random.Random) -> str:
    return " ".join(rng.choice(ODD_TEXTS) for _ in range(rng.choice([1, 1, 1, 2])))


def metric_files(rng: random.Random, case: Path) -> tuple[Path, Path]:
    """References and predictions of one to four videos."""
    ids = rng.sample(["v1", "2", "", "\ud800", "a\nb", "\x1b[0m"], rng.randint(1, 4))
    references = {key: [odd_caption(rng) for _ in range(rng.choice([1, 1, 2, 5]))] for key in ids}
    predictions = {key: odd_caption(rng) for key in ids}
    if rng.random() < 0.3:
        predictions = [{"image_id": key, "caption": text} for key, text in predictions.items()]
    (case / "refs.json").write_text(json.dumps(references))
    (case / "hyps.json").write_text(json.dumps(predictions))
    return case / "refs.json", case / "hyps.json"


def metric_case(rng: random.Random, world: World, case: Path) -> Case:
    """References and predictions with odd texts; in half of the cases one file is damaged too."""
    files = metric_files(rng, case)
    changed = damage_file(rng, rng.choice(files)) if rng.random() < 0.5 else "odd texts"
    words = ["--references", files[0], "--hypotheses", files[1]]
    outputs = case / "rows.csv", files[0], case, case / "gone/rows.csv", Path("/dev/full")
    words += rng.choice([[], ["--per-video", rng.choice(outputs)]]) + rng.choice([[], ["--json"], ["--subset"]])
    words += rng.choice([[], ["--tokenizer", "none"], ["--metrics", "BLEU", "METEOR"]])
    return Case(metrics_command, words, changed, kept=[path for path in files if path.is_file()])


def odd_flags(rng: random.Random, parser: argparse.ArgumentParser, large: bool, slow: set[str]) -> list[str]:
    """One to three flags of a parser, with values from the odd words or from their choices."""
    words = []
    actions = [a for a in parser._actions if a.option_strings and a.dest not in {"help", *slow}]
    for action in rng.sample(actions, rng.choice([1, 1, 2, 3])):
        count = {None: 1, "+": rng.choice([1, 2]), 0: 0}.get(action.nargs, action.nargs)
        pool = list(action.choices) if action.choices and rng.random() < 0.8 else ODD_WORDS + LARGE_WORDS * 2 * large
        words += [action.option_strings[0], *(rng.choice(pool) for _ in range(count))]
    return words


def flag_case(rng: random.Random, world: World, case: Path) -> Case:
    """Good files and odd flags."""
    (case / "file").write_text("text")
    script = rng.choice([train, train, evaluate, metrics_command])
    if script is metrics_command:
        files = metric_files(rng, case)
        (case / "refs.json").write_text('{"v1": ["a man runs"]}')
        (case / "hyps.json").write_text('{"v1": "a man"}')
        parser = metrics_command.make_parser()
        words = ["--references", files[0], "--hypotheses", files[1], *odd_flags(rng, parser, True, set())]
        return Case(script, words, kept=[*files])
    if script is evaluate:
        run, clip = world.copy("run", case), min((world.root / "data/val").glob("*.mp4"))
        words = [run, *rng.choice([["--split", "val"], ["--video", clip]])]
        words += odd_flags(rng, evaluate.make_parser(), False, {"device"})
        return Case(script, words, kept=[run, clip], made=[case / "gone", case / "x"])
    plan, new = rng.random() < 0.5, rng.random() < 0.5
    words = [*TWELVE_STEPS, "--vit", world.root / "vit", "--lm", world.root / "lm", "--out", case / "out"]
    words += ["--data", case / "new", "--shapes-sizes", 4, 2, 2] if new else ["--data", world.root / "data"]
    words += ["--epochs", 1, "--cache", case / "cache", *["--plan"] * plan]
    slow = {"compile", "device"}
    slow |= set() if plan else {"passes", "epochs", "image_size", "frames", "candidate_frames"}
    words += odd_flags(rng, train_config.make_parser(), plan, slow)
    made = [case / name for name in ("new", "cache", "out", "gone", "x")]
    return Case(script, words, kept=[case / "file"], made=made)


def output_case(rng: random.Random, world: World, case: Path) -> Case:
    """An output that is an input of the same command: a file of the run, of the dataset or of a model, or a video."""
    run, data = world.copy("run", case), world.copy("data", case)
    clip = min((data / "val").glob("*.mp4"))
    os.link(clip, case / "link.png")
    run_files = [path for path in files_of(run) if path.name != "stdout.txt"]  # which the tests have added
    inside = [*run_files, clip, case / "link.png"]
    script = rng.choice([train, evaluate, evaluate])
    if script is train:
        if rng.random() < 0.5:
            (run / "config.json").unlink()
        words = [*TWELVE_STEPS, "--data", data, "--vit", world.root / "vit", "--lm", world.root / "lm"]
        words += ["--epochs", 1, "--out", rng.choice([run, data, run / "best", data / "val", case])]
        words += rng.choice([[], ["--method", "none"]])
    else:
        words = [run, *rng.choice([["--video", clip], ["--video", clip, clip]])]
        words += [rng.choice(["--save", "--report", "--show"]), rng.choice(inside)]
        if rng.random() < 0.3:
            inside = [*run_files, *files_of(data)]
            words = [run, "--split", "val", "--data", data, rng.choice(["--save", "--report"]), rng.choice(inside)]
    kept = [path for path in inside if path != run / "report.html"]  # which --report may replace
    return Case(script, words, kept=[*kept, *sorted(data.glob("*/*.mp4"))])


FAMILIES: dict[str, Callable[[random.Random, World, Path], Case]] = {
    "run": run_case, "data": data_case, "model": model_case, "metrics": metric_case, "flags": flag_case,
    "outputs": output_case,
}  # fmt: skip
