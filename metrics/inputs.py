"""What is scored: captions from JSON files or dicts, checked and paired by id.

References are {id: [caption, ...]} or a COCO annotation file, hypotheses {id: caption},
{id: [caption]} or COCO results. Ids are compared as text, so that 7 and "7" are one video. Whatever
does not fit is an InputError of one line that names the input, the id and what was expected.
"""

import json
import re
from pathlib import Path

# The reference tokenises all captions as lines of one file, where a line break inside a caption
# shifts every later caption to the wrong video. Here it is a space.
LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
NAMES = ("references", "hypotheses")


class InputError(ValueError):
    """Bad input; the text names the file, the field or id and what was expected."""


def shown(ids, limit=3):
    """'a', 'b', 'c' and 7 more."""
    ids = [repr(str(i)) for i in ids]
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


# --- files ----------------------------------------------------------------------------------------


def without_duplicates(path):
    """A hook for json: keys that occur twice in one object are an error, not silently dropped."""

    def hook(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{path}: id {key!r} occurs twice, expected once")
            found[key] = value
        return found

    return hook


def read_json(path):
    """The contents of a JSON file. Raises InputError."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a JSON file") from error
    if not raw.strip():
        raise InputError(f"{path}: is empty, expected JSON")
    if raw[:1] == b"\x80":
        raise InputError(f"{path}: is a pickle, which can run code when it is read; expected JSON")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=without_duplicates(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8, expected UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path}: {where}: {error.msg}, expected JSON") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise InputError(f"{path}: {error}, expected JSON") from error


def entry(path, field, item, number):
    """(id, caption) of one COCO annotation or result."""
    if not isinstance(item, dict) or "image_id" not in item or "caption" not in item:
        raise InputError(f"{path}: {field}[{number}]: expected an object with image_id and caption")
    if type(item["image_id"]) not in (int, str):
        raise InputError(f"{path}: {field}[{number}]: image_id is {item['image_id']!r}, expected a number or a string")
    return item["image_id"], item["caption"]


def read_references(path):
    """{id: [caption, ...]} of a file: that itself, or COCO's {"annotations": [...]}."""
    data = read_json(path)
    if not isinstance(data, dict):
        expected = "{id: [caption, ...]} or COCO annotations"
        raise InputError(f"{path}: is a {type(data).__name__}, expected {expected}")
    annotations = data.get("annotations")
    if not isinstance(annotations, list) or not any(isinstance(a, dict) for a in annotations):
        return data
    found = {}
    for number, item in enumerate(annotations):
        key, caption = entry(path, "annotations", item, number)
        found.setdefault(str(key), []).append(caption)
    return found


def read_hypotheses(path):
    """{id: caption} of a file: {id: caption}, {id: [caption]} or COCO's list of results."""
    data = read_json(path)
    if isinstance(data, dict):
        return data
    if not isinstance(data, list):
        kind = type(data).__name__
        raise InputError(f"{path}: is a {kind}, expected {{id: caption}} or a list of COCO results")
    found = {}
    for number, item in enumerate(data):
        key, caption = entry(path, "", item, number)
        if str(key) in found:
            raise InputError(f"{path}: id {str(key)!r} occurs twice, expected one caption a video")
        found[str(key)] = caption
    return found


# --- checks ---------------------------------------------------------------------------------------


def caption_text(caption, where):
    """A caption as one line."""
    if not isinstance(caption, str):
        raise InputError(f"{where}: is a {type(caption).__name__}, expected a string")
    return LINE_BREAKS.sub(" ", caption)


def keyed(captions, name, expected):
    """[(id as text, id, value)] of a dict of captions."""
    if not isinstance(captions, dict):
        raise InputError(f"{name}: is a {type(captions).__name__}, expected {expected}")
    found = [(str(key), key, value) for key, value in captions.items()]
    if len({text for text, _, _ in found}) < len(found):
        seen = [text for text, _, _ in found]
        twice = [text for text in dict.fromkeys(seen) if seen.count(text) > 1]
        raise InputError(f"{name}: id {shown(twice)} occurs twice, expected once")
    return found


def reference_list(value, where):
    """The captions of one video, as lines."""
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: is a {type(value).__name__}, expected a list of captions")
    if not value:
        raise InputError(f"{where}: has no references, expected at least one")
    return [caption_text(text, f"{where}, caption {n}") for n, text in enumerate(value, 1)]


def hypothesis_text(value, where):
    """The one caption of a video, as a line."""
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise InputError(f"{where}: has {len(value)} captions, expected one")
        value = value[0]
    return caption_text(value, where)


def pair(references, hypotheses, subset=False, names=NAMES):
    """Checked captions in the order of the references: (ids, lists of str, list of str).

    ids are the references' own keys. With `subset`, videos that have no hypothesis are left out.
    """
    expected = "{id: [caption, ...]}", "{id: caption}"
    wanted = keyed(references, names[0], expected[0])
    given = {text: value for text, _, value in keyed(hypotheses, names[1], expected[1])}
    if not wanted:
        raise InputError(f"{names[0]}: has no videos, expected at least one")
    strangers = given.keys() - {text for text, _, _ in wanted}
    if strangers:
        listed = shown([text for text in given if text in strangers])
        raise InputError(f"{names[1]}: id {listed} has no references in {names[0]}")
    missing = [text for text, _, _ in wanted if text not in given]
    if missing and (not subset or len(missing) == len(wanted)):
        raise InputError(
            f"{names[1]}: id {shown(missing)} has no hypothesis, expected one for each of"
            f" {len(wanted)} videos (a subset has to be asked for)"
        )
    ids, refs, hyps = [], [], []
    for text, key, value in wanted:
        if text in given:
            ids.append(key)
            refs.append(reference_list(value, f"{names[0]}, id {text!r}"))
            hyps.append(hypothesis_text(given[text], f"{names[1]}, id {text!r}"))
    return ids, refs, hyps
