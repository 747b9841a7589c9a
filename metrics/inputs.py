"""Captions from JSON files or dicts, checked and paired by id.

References are {id: [caption, ...]} or a COCO annotation file; hypotheses are {id: caption}, {id: [caption]} or COCO
results. Ids are compared as text, so 7 and "7" are one video. Anything else raises an InputError of one line that
names the input, the id and what was expected.
"""

import json
import re
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

MAX_LETTERS = 10_000  # of a caption; the rules of the tokenizer take long on more
# pycocoevalcap tokenises all captions as lines of one file. There a line break inside a caption shifts every later
# caption to the wrong video; here it becomes a space.
LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
NAMES = ("references", "hypotheses")
# RuntimeError: a zip with an unknown compression or a password, JSON that is nested too deeply
DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)


class InputError(ValueError):
    """Bad input. The text, one line, names the file, the field or id, and what was expected."""

    def __init__(self, message):
        # Names and ids may hold line breaks, terminal escapes or a megabyte of text.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message if len(message) <= 2000 else message[:2000] + " ...")


@contextmanager
def reading(path, expected):
    """Turns what a missing or damaged file raises into an InputError. The block should only parse."""
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        reason = f"no field {error}" if type(error) is KeyError else getattr(error, "strerror", None) or error
        raise InputError(f"{path}: {reason}, expected {expected}") from error


# --- files --------------------------------------------------------------------------------------------------------


def unique_keys(pairs):
    """A dict of (key, value) pairs. Raises ValueError for a key that occurs twice, which `dict` would drop."""
    result = dict(pairs)
    if len(result) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"id {key!r} occurs twice")
    return result


def read_json(path):
    """The contents of a JSON file. Raises InputError."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device might never end
        raise InputError(f"{path}: is not a regular file, expected a JSON file")
    with reading(path, "a JSON file"):
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique_keys)


def read_references(path):
    """{id: [caption, ...]} from a JSON file that holds the same, or COCO's {"annotations": [...]}."""
    data = read_json(path)
    annotations = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(annotations, list) or not any(isinstance(item, dict) for item in annotations):
        return data
    references = {}
    with reading(path, "COCO annotations, objects with image_id and caption"):
        for item in annotations:
            references.setdefault(str(item["image_id"]), []).append(item["caption"])
    return references


def read_hypotheses(path):
    """{id: caption} from a JSON file: {id: caption}, {id: [caption]} or COCO's list of results."""
    data = read_json(path)
    if not isinstance(data, list):
        return data
    with reading(path, "COCO results, objects with image_id and caption, one per video"):
        return unique_keys([(str(item["image_id"]), item["caption"]) for item in data])


# --- checks -------------------------------------------------------------------------------------------------------


def format_ids(ids):
    """'a', 'b', 'c' and 7 more."""
    return ", ".join(map(repr, ids[:3])) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def check_caption(caption, where):
    """A caption as one line."""
    if not isinstance(caption, str):
        raise InputError(f"{where}: expected one string, found {type(caption).__name__}")
    if len(caption) > MAX_LETTERS:
        raise InputError(f"{where}: has {len(caption):,} characters, expected at most {MAX_LETTERS:,}")
    return LINE_BREAKS.sub(" ", caption)


def check_references(group, where):
    """The references of one video, each as one line."""
    if not isinstance(group, list | tuple) or not group:
        raise InputError(f"{where}: expected a list of at least one caption")
    return [check_caption(caption, f"{where}, caption {number}") for number, caption in enumerate(group, 1)]


def items_by_text_id(captions, name, expected):
    """{id as text: (id, value)} of a dict of captions."""
    if not isinstance(captions, dict):
        raise InputError(f"{name}: expected {expected}, found {type(captions).__name__}")
    with reading(name, "every id once"):
        return unique_keys([(str(key), (key, value)) for key, value in captions.items()])


def pair_captions(references, hypotheses, subset=False, names=NAMES):
    """Checked captions in the order of the references: (ids, lists of str, list of str).

    ids are the keys of `references`. With `subset`, videos without a hypothesis are left out. Raises InputError.
    """
    references = items_by_text_id(references, names[0], "{id: [caption, ...]} or COCO annotations")
    hypotheses = items_by_text_id(hypotheses, names[1], "{id: caption} or COCO results")
    if not references:
        raise InputError(f"{names[0]}: has no videos, expected at least one")
    if unexpected := [text_id for text_id in hypotheses if text_id not in references]:
        raise InputError(f"{names[1]}: id {format_ids(unexpected)} has no references in {names[0]}")
    scored = [text_id for text_id in references if text_id in hypotheses]
    missing = [text_id for text_id in references if text_id not in hypotheses]
    if not scored or missing and not subset:
        expected = f"one for each of {len(references)} videos (to score a subset, set subset or --subset)"
        raise InputError(f"{names[1]}: id {format_ids(missing)} has no hypothesis, expected {expected}")
    checked_references, checked_hypotheses = [], []
    for text_id in scored:
        checked_references.append(check_references(references[text_id][1], f"{names[0]}, id {text_id!r}"))
        value = hypotheses[text_id][1]
        value = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
        checked_hypotheses.append(check_caption(value, f"{names[1]}, id {text_id!r}"))
    return [references[text_id][0] for text_id in scored], checked_references, checked_hypotheses
