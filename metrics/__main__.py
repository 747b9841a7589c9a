"""python -m metrics --references refs.json --hypotheses predictions.json

Prints a table of scores times 100, as papers print them (CIDEr too), or with --json one object of unscaled scores.
Bad input ends with one line on standard error and exit code 2.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from . import METRICS, TOKENIZERS, InputError, inputs, score


class Progress:
    """Prints progress on standard error once the work takes longer than two seconds.

    A terminal shows one line that is rewritten; elsewhere only the final state is printed.
    """

    def __init__(self):
        self.start_time = self.last_time = time.monotonic()

    def __call__(self, text, done=None, total=None):
        now = time.monotonic()
        if done is None:
            print(text, file=sys.stderr, flush=True)
        elif now - self.start_time > 2 and (now - self.last_time > 0.2 or done == total):
            end = "\r" if sys.stderr.isatty() and done < total else "\n"
            if end == "\r" or done == total:
                print(f"{text} {done}/{total}", end=end, file=sys.stderr, flush=True)
            self.last_time = now


def format_table(scores):
    """Scores x100, one per line, and the signature."""
    width = max(map(len, scores.corpus))
    lines = [f"{name:<{width}}  {100 * value:6.2f}" for name, value in scores.corpus.items()]
    return "\n".join([*lines, scores.signature])


# --- the CSV of per-video scores ----------------------------------------------------------------------------------


def check_writable(path, *inputs):
    """Raises InputError if no CSV can be written to `path`, or if it is one of the inputs. Called before the scores are
    computed."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError
        if not path.exists() or path.is_file():
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"--per-video {path}: expected a file in an existing folder that can be written to") from error
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise InputError(f"--per-video {path}: is one of the inputs, expected another file")


def write_rows(file, per_video):
    names = list(next(iter(per_video.values())))
    writer = csv.writer(file)
    writer.writerow(["id", *names])
    for key, scores in per_video.items():
        writer.writerow([key, *[scores[name] for name in names]])


def write_csv(path, per_video):
    """Writes one row of unscaled scores per video. Raises OSError.

    A regular file is replaced atomically. Anything else, such as a pipe, is written to directly.
    """
    path, options = Path(os.path.realpath(path)), {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    if path.exists() and not path.is_file():
        with open(path, "w", **options) as file:
            return write_rows(file, per_video)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", **options) as file:
            write_rows(file, per_video)
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def current_umask():
    """The permission bits that new files do not get."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


# --- the command --------------------------------------------------------------------------------------------------


def warn(text):
    """Prints on the standard error. What takes it may be full; the exit code tells an error, too."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def make_parser():
    parser = Parser(
        prog="python -m metrics",
        allow_abbrev=False,
        description="BLEU, METEOR, ROUGE-L and CIDEr of captions, as video captioning papers report them (equal to"
        " pycocoevalcap's scores; no Java).",
    )
    parser.add_argument("--references", required=True, help="JSON: {id: [caption, ...]} or COCO annotations")
    parser.add_argument("--hypotheses", required=True, help="JSON: {id: caption}, {id: [caption]} or COCO results")
    parser.add_argument(
        "--tokenizer",
        choices=TOKENIZERS,
        default="ptb",
        help="ptb (what papers use), or none for captions that are already tokenized",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, unscaled")
    parser.add_argument("--per-video", metavar="FILE", help="write each video's scores as CSV")
    parser.add_argument("--subset", action="store_true", help="score only the videos that have a hypothesis")
    parser.add_argument("--strict", action="store_true", help="fail if METEOR's tables are missing")
    parser.add_argument("--meteor-data", metavar="DIR", help="folder of meteor-1.5.jar and paraphrase-en.gz")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS, help="which to compute (all)")
    return parser


def main(argv=None):
    """Runs the command; returns its exit code."""
    for name in ("stdin", "stdout", "stderr"):  # None if the caller has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    try:
        args = make_parser().parse_args(argv)
        if args.per_video:
            check_writable(args.per_video, args.references, args.hypotheses)
        scores = score(
            inputs.read_references(args.references),
            inputs.read_hypotheses(args.hypotheses),
            tokenizer=args.tokenizer,
            meteor_data=args.meteor_data,
            strict=args.strict,
            subset=args.subset,
            metrics=args.metrics,
            names=(args.references, args.hypotheses),
            progress=Progress(),
        )
        for note in scores.notes:
            warn(note)
        as_json = json.dumps({**scores.corpus, "signature": scores.signature})
        failure = None
        try:
            print(as_json if args.json else format_table(scores), flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk: one of the two outputs must not lose the other
            failure = error
        if args.per_video:
            try:
                write_csv(args.per_video, scores.per_video)
            except OSError as error:  # which names a temporary file
                raise InputError(f"--per-video {args.per_video}: {error.strerror or error}") from error
        if failure:
            raise failure
    except InputError as error:
        warn(f"error: {error}")
        return 2
    except BrokenPipeError:  # the reader, e.g. `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        warn(f"error: {InputError(str(error.filename or 'output'))}: {error.strerror}")
        return 2
    except MemoryError:
        warn("error: out of memory")
        return 2
    except KeyboardInterrupt:
        warn("stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
