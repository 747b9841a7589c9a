"""Reads the byte-level BPE of a public `tokenizer.json` [1] for `bpe.py`, and refuses everything that is not computed.

Three kinds of files are supported:

    SmolLM2, SmolVLM     digits one by one, then GPT-2's regular expression
    Qwen 2, 2.5, 3       Unicode's normal form C, a regular expression of their own
    Llama 3 to 3.2       a similar one; `ignore_merges`; a post-processor puts the BOS token first

References
[1] The format: https://github.com/huggingface/tokenizers
"""

import unicodedata
from pathlib import Path
from reprlib import repr as short
from typing import Any

from common.errors import InputError
from common.files import bounded, field, read_json
from models.bpe import BYTES, DIGITS, GPT2, LLAMA3, QWEN, BPEConfig

# The supported values: a tuple has alternatives, ... is anything, [x, ...] a list of x; a missing field counts as null.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": ..., "trim_offsets": ..., "use_regex": ...}
BOS_TEMPLATE = {
    "type": "TemplateProcessing", "pair": ..., "special_tokens": ...,
    "single": [{"SpecialToken": {"id": ..., "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}  # fmt: skip
SUPPORTED = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [
        {"id": ..., "content": ..., "special": (False, True), "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}, ...,
    ],
    "normalizer": (None, {"type": "NFC"}),
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        ({"type": "Digits", "individual_digits": True},
         {"type": "Split", "pattern": {"Regex": (QWEN, LLAMA3)}, "behavior": "Isolated", "invert": False}),
        BYTE_LEVEL | {"add_prefix_space": False, "use_regex": (None, True, False)},
    ]},
    "post_processor": (
        None, BYTE_LEVEL, BOS_TEMPLATE, {"type": "Sequence", "processors": [BYTE_LEVEL, BOS_TEMPLATE]},
    ),
    "decoder": BYTE_LEVEL,
    "model": {
        "type": "BPE", "vocab": ..., "merges": ..., "ignore_merges": (None, False, True), "dropout": None,
        "unk_token": None, "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
        "fuse_unk": (None, False), "byte_fallback": (None, False),
    },
}  # fmt: skip


def difference(found: Any, supported: Any, name: str = "") -> tuple[str, str] | None:
    """The first field whose value is not supported, with a message; None if all are."""
    if supported is ...:
        return None
    if isinstance(supported, tuple):
        differences = [difference(found, alternative, name) for alternative in supported]
        if None in differences:
            return None
        deepest = max(differences, key=lambda pair: len(pair[0]))
        expected = ", ".join(map(short, supported))
        return deepest if deepest[0] != name else (name, f"found {short(found)}, supported: {expected}")
    if isinstance(found, list) and isinstance(supported, list) and supported[-1] is ...:
        supported = supported[:1] * len(found)
    if isinstance(found, dict) and isinstance(supported, dict):
        parts = [(found.get(key), supported.get(key), f"{name}.{key}") for key in supported | found]
    elif isinstance(found, list) and isinstance(supported, list) and len(found) == len(supported):
        parts = [(*pair, f"{name}[{i}]") for i, pair in enumerate(zip(found, supported, strict=True))]
    elif type(found) is type(supported) and found == supported:
        return None
    else:
        return name, f"found {short(found)}, supported: {short(supported)}"
    return next(filter(None, (difference(*part) for part in parts)), None)


def read_bpe_config(path: Path) -> BPEConfig:
    """Reads a tokenizer.json. Raises InputError for every field whose value would need other computations."""
    file = read_json(path)
    if unsupported := difference(file, SUPPORTED):
        raise InputError(f"{path}: {unsupported[0][1:]}: {unsupported[1]}")
    model, (cut, byte_level) = file["model"], file["pre_tokenizer"]["pretokenizers"]
    patterns = [DIGITS if cut["type"] == "Digits" else cut["pattern"]["Regex"]]
    vocab = read_vocab(model, path)
    added = read_added_tokens(file["added_tokens"], vocab, path)
    return BPEConfig(
        vocab=vocab, ranks=read_merges(model, vocab, path), added=added,
        patterns=patterns if byte_level.get("use_regex") is False else [*patterns, GPT2],
        nfc=file.get("normalizer") is not None, ignore_merges=bool(model.get("ignore_merges")),
        special=frozenset(entry["id"] for entry in file["added_tokens"] if entry["special"]),
        bos_id=read_bos_id(file.get("post_processor"), added, path),
    )  # fmt: skip


def read_vocab(model: dict[str, Any], path: Path) -> dict[str, int]:
    vocab, ids = field(model, "vocab", dict, f"{path}: model"), set()
    for token, i in vocab.items():
        if type(i) is not int or i < 0 or i in ids or not BYTES.keys() >= set(token):
            raise InputError(f"{path}: model.vocab: {short(token)} has id {short(i)}, expected a token in the "
                             "characters of its bytes, and an id of its own")  # fmt: skip
        ids.add(i)
    return vocab


def read_merges(model: dict[str, Any], vocab: dict[str, int], path: Path) -> dict[tuple[str, str], int]:
    ranks = {}
    for i, entry in enumerate(field(model, "merges", list, f"{path}: model")):  # "a b" or ["a", "b"]
        match entry.split(" ") if isinstance(entry, str) else entry:
            case [str(left), str(right)] if left in vocab and right in vocab and left + right in vocab:
                ranks.setdefault((left, right), i)
        if len(ranks) <= i:
            raise InputError(f"{path}: model.merges[{i}]: found {short(entry)}, expected two tokens that make up a "
                             "third one, each pair once")  # fmt: skip
    return ranks


def read_added_tokens(entries: list[dict], vocab: dict[str, int], path: Path) -> dict[str, int]:
    """Added tokens may be in the vocabulary too, with the same id."""
    tokens, added = {i: token for token, i in vocab.items()}, {}
    for n, entry in enumerate(entries):
        where = f"{path}: added_tokens[{n}]"
        content, i = field(entry, "content", str, where), bounded(entry, "id", int, where, 0, 2**24)
        is_text = content and not any(unicodedata.category(character) == "Cs" for character in content)
        if not is_text or content in added or tokens.setdefault(i, content) != content or vocab.get(content, i) != i:
            raise InputError(f"{where}: content is {short(content)}, id is {i}, expected a text and an id that no "
                             "other token has")  # fmt: skip
        added[content] = i
    return added


def read_bos_id(post_processor: dict | None, added: dict[str, int], path: Path) -> int | None:
    """The token that the post-processor puts before each text."""
    template = (post_processor or {}).get("processors", [post_processor])[-1]
    if template is None or template["type"] == "ByteLevel":
        return None
    name, tokens = template["single"][0]["SpecialToken"]["id"], template.get("special_tokens")
    bos_id = added.get(name) if isinstance(name, str) else None
    if bos_id is None or tokens != {name: {"id": name, "ids": [bos_id], "tokens": [name]}}:
        raise InputError(f"{path}: post_processor: special_tokens: found {short(tokens)}, expected {short(name)} with "
                         "the id of this added token")  # fmt: skip
    return bos_id
