"""Captions from JSON files or dicts, checked and paired by id.

References are {id: [caption, ...]} or a COCO annotation file; hypotheses are {id: caption}, {id: [caption]} or COCO
results. Ids are compared as text, so 7 and "7" are one video. Anything else raises an InputError of one line that
names the input, the id and what was expected.
"""

import json
import re
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

MAX_LETTERS = 10_000  # of a caption; the rules of the tokenizer take long on more
# pycocoevalcap tokenises all captions as lines of one file. There a line break inside a caption shifts every later
# caption to the wrong video; here it becomes a space.
LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
NAMES = ("references", "hypotheses")


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
    except (OSError, EOFError, ValueError, KeyError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}, expected {expected}") from error


def format_ids(ids, limit=3):
    """'a', 'b', 'c' and 7 more."""
    ids = [repr(str(i)) for i in ids]
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


def type_name(value):
    return type(value).__name__


# --- files --------------------------------------------------------------------------------------------------------


def reject_duplicate_keys(path):
    """A hook for `json.loads`: a key that occurs twice in an object raises InputError instead of being dropped."""

    def object_from_pairs(pairs):
        result = {}
        for key, value in pairs:
            if key in result:
                raise InputError(f"{path}: id {key!r} occurs twice, expected once")
            result[key] = value
        return result

    return object_from_pairs


def read_json(path):
    """The contents of a JSON file. Raises InputError."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # might never end
        raise InputError(f"{path}: is a pipe or a device, expected a JSON file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a JSON file") from error
    if not raw.strip():
        raise InputError(f"{path}: is empty, expected JSON")
    if raw[:1] == b"\x80":
        raise InputError(f"{path}: is a pickle, which can run code when it is read; expected JSON")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=reject_duplicate_keys(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8, expected UTF-8") from error
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path}: {position}: {error.msg}, expected JSON") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deeply nested brackets
        raise InputError(f"{path}: {error}, expected JSON") from error


def coco_caption(path, field, item, index):
    """(id, caption) of one COCO annotation or result."""
    if not isinstance(item, dict) or "image_id" not in item or "caption" not in item:
        raise InputError(f"{path}: {field}[{index}]: expected an object with image_id and caption")
    if type(item["image_id"]) not in (int, str):
        raise InputError(f"{path}: {field}[{index}]: image_id is {item['image_id']!r}, expected a number or a string")
    return item["image_id"], item["caption"]


def read_references(path):
    """{id: [caption, ...]} from a JSON file that holds the same, or COCO's {"annotations": [...]}."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected {{id: [caption, ...]}} or COCO annotations, found {type_name(data)}")
    annotations = data.get("annotations")
    if not isinstance(annotations, list) or not any(isinstance(item, dict) for item in annotations):
        return data
    references = {}
    for index, item in enumerate(annotations):
        key, caption = coco_caption(path, "annotations", item, index)
        references.setdefault(str(key), []).append(caption)
    return references


def read_hypotheses(path):
    """{id: caption} from a JSON file: {id: caption}, {id: [caption]} or COCO's list of results."""
    data = read_json(path)
    if isinstance(data, dict):
        return data
    if not isinstance(data, list):
        raise InputError(f"{path}: expected {{id: caption}} or a list of COCO results, found {type_name(data)}")
    hypotheses = {}
    for index, item in enumerate(data):
        key, caption = coco_caption(path, "", item, index)
        if str(key) in hypotheses:
            raise InputError(f"{path}: id {str(key)!r} occurs twice, expected one caption per video")
        hypotheses[str(key)] = caption
    return hypotheses


# --- checks -------------------------------------------------------------------------------------------------------


def check_caption(caption, where):
    """A caption as one line."""
    if not isinstance(caption, str):
        raise InputError(f"{where}: expected a string, found {type_name(caption)}")
    if len(caption) > MAX_LETTERS:
        raise InputError(f"{where}: has {len(caption):,} characters, expected at most {MAX_LETTERS:,}")
    return LINE_BREAKS.sub(" ", caption)


def check_references(value, where):
    """The references of one video, each as one line."""
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: expected a list of captions, found {type_name(value)}")
    if not value:
        raise InputError(f"{where}: has no references, expected at least one")
    return [check_caption(caption, f"{where}, caption {number}") for number, caption in enumerate(value, 1)]


def check_hypothesis(value, where):
    """The hypothesis of one video, as one line."""
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise InputError(f"{where}: has {len(value)} captions, expected one")
        value = value[0]
    return check_caption(value, where)


def items_by_text_id(captions, name, expected):
    """{id as text: (id, value)} of a dict of captions."""
    if not isinstance(captions, dict):
        raise InputError(f"{name}: expected {expected}, found {type_name(captions)}")
    items = {}
    duplicates = []
    for key, value in captions.items():
        if str(key) in items and str(key) not in duplicates:
            duplicates.append(str(key))
        items[str(key)] = key, value
    if duplicates:
        raise InputError(f"{name}: id {format_ids(duplicates)} occurs twice, expected once")
    return items


def pair_captions(references, hypotheses, subset=False, names=NAMES):
    """Checked captions in the order of the references: (ids, lists of str, list of str).

    ids are the keys of `references`. With `subset`, videos without a hypothesis are left out. Raises InputError.
    """
    references = items_by_text_id(references, names[0], "{id: [caption, ...]}")
    hypotheses = items_by_text_id(hypotheses, names[1], "{id: caption}")
    if not references:
        raise InputError(f"{names[0]}: has no videos, expected at least one")
    unexpected = [text_id for text_id in hypotheses if text_id not in references]
    if unexpected:
        raise InputError(f"{names[1]}: id {format_ids(unexpected)} has no references in {names[0]}")
    missing = [text_id for text_id in references if text_id not in hypotheses]
    if missing and (not subset or len(missing) == len(references)):
        raise InputError(
            f"{names[1]}: id {format_ids(missing)} has no hypothesis, expected one for each of {len(references)}"
            " videos (to score a subset, set subset or --subset)"
        )
    ids, checked_references, checked_hypotheses = [], [], []
    for text_id, (key, value) in references.items():
        if text_id in hypotheses:
            ids.append(key)
            checked_references.append(check_references(value, f"{names[0]}, id {text_id!r}"))
            checked_hypotheses.append(check_hypothesis(hypotheses[text_id][1], f"{names[1]}, id {text_id!r}"))
    return ids, checked_references, checked_hypotheses
