"""python -m metrics --references refs.json --hypotheses predictions.json

Prints a table with scores times 100, as papers do (CIDEr too), or with --json one object with
unscaled values. Bad input ends with one line on standard error and exit code 2.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from . import METRICS, TOKENIZERS, InputError, inputs, score


class Progress:
    """A line on standard error that appears once something takes longer than two seconds.

    On a terminal it is written over and over; elsewhere only its last state is.
    """

    def __init__(self):
        self.start = self.last = time.monotonic()

    def __call__(self, text, done=None, total=None):
        now = time.monotonic()
        if done is None:
            print(text, file=sys.stderr, flush=True)
        elif now - self.start > 2 and (now - self.last > 0.2 or done == total):
            end = "\r" if sys.stderr.isatty() and done < total else "\n"
            if end == "\r" or done == total:
                print(f"{text} {done}/{total}", end=end, file=sys.stderr, flush=True)
            self.last = now


def table(scores):
    """Scores x100, one a line, and the signature."""
    width = max(map(len, scores.corpus))
    lines = [f"{name:<{width}}  {100 * value:6.2f}" for name, value in scores.corpus.items()]
    return "\n".join([*lines, scores.signature])


def check_writable(path):
    """Raises InputError for a path that no CSV can be written to, before the work is done and not after."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--per-video {path}: expected a file in a folder that is there")


def write_rows(file, per_video):
    names = list(next(iter(per_video.values())))
    writer = csv.writer(file)
    writer.writerow(["id", *names])
    for key, values in per_video.items():
        writer.writerow([key, *[values[name] for name in names]])


def write_csv(path, per_video):
    """One row a video, unscaled; written beside and renamed, but straight into what is no file, such as a pipe."""
    path, how = Path(os.path.realpath(path)), {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    if path.exists() and not path.is_file():
        with open(path, "w", **how) as file:
            return write_rows(file, per_video)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", **how) as file:
            write_rows(file, per_video)
        os.chmod(beside, 0o666 & ~current_umask())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.unlink(beside)


def current_umask():
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def arguments(argv):
    parser = Parser(
        prog="python -m metrics",
        allow_abbrev=False,
        description="BLEU, METEOR, ROUGE-L and CIDEr of captions, as video captioning papers report"
        " them (equal to pycocoevalcap's figures; no Java).",
    )
    parser.add_argument("--references", required=True, help="JSON: {id: [caption, ...]} or COCO annotations")
    parser.add_argument(
        "--hypotheses",
        required=True,
        help="JSON: {id: caption}, {id: [caption]} or COCO results",
    )
    parser.add_argument(
        "--tokenizer",
        choices=TOKENIZERS,
        default="ptb",
        help="ptb (what papers use), or none for captions that are tokenised already",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, unscaled")
    parser.add_argument("--per-video", metavar="FILE", help="write each video's scores as CSV")
    parser.add_argument("--subset", action="store_true", help="score only the videos that have a hypothesis")
    parser.add_argument("--strict", action="store_true", help="fail where METEOR's tables are missing")
    parser.add_argument("--meteor-data", metavar="DIR", help="folder of meteor-1.5.jar and paraphrase-en.gz")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS, help="which to compute (all)")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command; returns its exit code."""
    try:
        given = arguments(argv)
        if given.per_video:
            check_writable(given.per_video)
        scores = score(
            inputs.read_references(given.references),
            inputs.read_hypotheses(given.hypotheses),
            tokenizer=given.tokenizer,
            meteor_data=given.meteor_data,
            strict=given.strict,
            subset=given.subset,
            metrics=given.metrics,
            names=(given.references, given.hypotheses),
            tell=Progress(),
        )
        if given.per_video:
            write_csv(given.per_video, scores.per_video)
        for note in scores.notes:
            print(note, file=sys.stderr)
        print(json.dumps({**scores.corpus, "signature": scores.signature}) if given.json else table(scores), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
