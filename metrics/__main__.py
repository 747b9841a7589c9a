"""python -m metrics --references refs.json --hypotheses predictions.json

Prints a table of scores times 100, as papers print them (CIDEr too), or with --json one object of unscaled scores.
Bad input ends with one line on standard error and exit code 2.
"""

import argparse
import csv
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from . import METRICS, TOKENIZERS, InputError, inputs, printed_name, score


def warn(text):
    """Prints on the standard error. What takes it may be full; the exit code tells an error, too."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def format_table(scores):
    """Scores x100, one per line, and the signature."""
    rows = {printed_name(name): value for name, value in scores.corpus.items()}
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {100 * value:6.2f}" for name, value in rows.items()]
    return "\n".join([*lines, scores.signature])


def check_output(path, *sources):
    """Raises InputError before the work for a --per-video that cannot be a file or is one of the `sources`."""
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise InputError(f"--per-video {path}: expected a file in an existing folder")
    if os.path.realpath(path) in map(os.path.realpath, sources):
        raise InputError(f"--per-video {path}: is one of the inputs, expected another file")


def write_csv(path, per_video):
    """Writes one row of unscaled scores per video. Raises InputError."""
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", *next(iter(per_video.values()))])
            writer.writerows([key, *scores.values()] for key, scores in per_video.items())
    except OSError as error:  # on a full disk it does not name the file
        raise InputError(f"--per-video {path}: {error.strerror}") from error


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def make_parser():
    text = "BLEU, METEOR, ROUGE-L and CIDEr of captions, equal to pycocoevalcap's scores; no Java."
    example = "python -m metrics --references refs.json --hypotheses predictions.json"
    parser = Parser(prog="python -m metrics", usage=example, allow_abbrev=False, description=text)
    flag = parser.add_argument
    flag("--references", required=True, help="JSON: {id: [caption, ...]} or COCO annotations")
    flag("--hypotheses", required=True, help="JSON: {id: caption}, {id: [caption]} or COCO results")
    flag("--tokenizer", choices=TOKENIZERS, default="ptb",
         help="ptb: as papers do; none: the captions are tokenized already (default: ptb)")
    flag("--json", action="store_true", help="print one JSON object, with scores from 0 to 1 (CIDEr: 0 to 10)")
    flag("--per-video", metavar="FILE", help="write the scores of each video as CSV, unscaled")
    flag("--subset", action="store_true", help="score only the videos that have a hypothesis")
    flag("--strict", action="store_true", help="fail if METEOR's tables are missing")
    flag("--meteor-data", metavar="DIR", help="folder of meteor-1.5.jar and paraphrase-en.gz")
    flag("--metrics", nargs="+", choices=METRICS, default=METRICS, help="which to compute (default: all)")
    return parser


def run(argv):
    """Reads, scores, prints and writes. Raises InputError and OSError."""
    args = make_parser().parse_args(argv)
    if args.per_video:
        check_output(args.per_video, args.references, args.hypotheses)
    references, hypotheses = inputs.read_references(args.references), inputs.read_hypotheses(args.hypotheses)
    options = {name: getattr(args, name) for name in ("tokenizer", "meteor_data", "strict", "subset", "metrics")}
    names = args.references, args.hypotheses
    scores = score(references, hypotheses, names=names, progress=warn, **options)
    for note in scores.notes:
        warn(note)
    as_json = json.dumps({**scores.corpus, "signature": scores.signature})
    try:
        if args.per_video:
            write_csv(args.per_video, scores.per_video)
    finally:  # a full disk under one of the two outputs must not lose the other
        print(as_json if args.json else format_table(scores), flush=True)


def main(argv=None):
    """Runs the command; returns its exit code."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if the caller has closed it
    try:
        run(argv)
    except BrokenPipeError:  # the reader, e.g. `head`, has closed the pipe
        return 141
    except (InputError, OSError, MemoryError) as error:
        warn(f"error: {str(error) or 'out of memory'}")
        return 2
    except KeyboardInterrupt:
        warn("stopped")
        return 130
    return 0


if __name__ == "__main__":
    os._exit(main())  # all is flushed; sys.exit would write again what a full disk did not take, and fail
