"""JSON objects and their fields. A missing field or a wrong type raises an InputError that names file and field."""

import json
import math
from pathlib import Path
from reprlib import repr as short  # at most a line, however long or deep the value is
from typing import Any

from common.errors import InputError
from common.files import open_to_read, replace_atomically

REQUIRED = object()
TYPE_NAMES = {
    int: "a whole number", float: "a number", str: "a string", bool: "true or false",
    list: "a list", dict: "an object",
}  # fmt: skip


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name!r:.200} occurs twice in one object")
        result[name] = value
    return result


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes. Raises an InputError that starts with `where` for anything else."""
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_reject_duplicates)
    # ValueError: not UTF-8, not JSON (the message has line and column), a number of 5000 digits.
    # RecursionError: a hundred thousand brackets.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {short(value)}")
    return value


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError for anything else, and for a name that occurs twice."""
    with open_to_read(path) as file:
        return parse_object(file.read(), str(path))


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a JSON object atomically. Raises InputError when the disk refuses."""
    with replace_atomically(path) as file:
        file.write((json.dumps(content, indent=1, default=str) + "\n").encode())


def field(
    config: dict[str, Any], name: str, kind: type, where: str | Path, default: Any = REQUIRED
) -> Any:
    """config[name], checked to be of `kind`: int, float, str, bool, list or dict.

    A whole number is accepted as a float and returned as one. true and false are not numbers. Without
    a default the field is required; with one, null counts as absent, as in public configs.
    Raises an InputError that starts with `where`: the file, or the file and the part of it.
    """
    value = config.get(name)
    if value is None and default is not REQUIRED:
        return default
    if name not in config:
        raise InputError(f"{where}: field {name!r} is missing, expected {TYPE_NAMES[kind]}")
    if kind is float and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise InputError(f"{where}: field {name!r}: expected {TYPE_NAMES[kind]}, found {short(value)}")
    return value


def bounded(config: dict[str, Any], name: str, kind: type, where: str | Path, least: float, most: float,
            default: Any = REQUIRED) -> Any:  # fmt: skip
    """A number from `least` to `most`, read as `field` reads it."""
    value = field(config, name, kind, where, default)
    if not least <= value <= most:
        limit = f"at least {least:g}" if value < least else f"at most {most:g}"
        raise InputError(f"{where}: {name} is {short(value)}, expected {limit}")
    return value
