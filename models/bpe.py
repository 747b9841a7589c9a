"""Byte-level byte-pair encoding [1, 2]: text to token ids and back, as a public `tokenizer.json` [3] says.

A regular expression cuts a text into pieces, and no token crosses their borders. A piece starts as the sequence of its
UTF-8 bytes, each written as a printable character: a space is "Ġ". Then two neighbours are merged, again and again. The
file lists the pairs that may be merged, in the order in which they were learned; the first in the list is merged first.
The symbols that remain are the tokens.

    " two dogs"  ->  " two", " dogs"
    " two"       ->  Ġ t w o  ->  Ġt w o  ->  Ġt wo  ->  Ġtwo  ->  its id

Three kinds of files are supported; a field whose value would need other computations is refused.

    SmolLM2, SmolVLM     digits one by one, then GPT-2's regular expression
    Qwen 2, 2.5, 3       Unicode's normal form C, a regular expression of their own
    Llama 3 to 3.2       a similar one; `ignore_merges`; a post-processor puts the BOS token first

References
[1] https://arxiv.org/abs/1508.07909; of bytes: GPT-2, https://github.com/openai/gpt-2/blob/master/src/encoder.py
[2] The structure follows minbpe, https://github.com/karpathy/minbpe
[3] The format, and the reference of the tests: https://github.com/huggingface/tokenizers
"""

import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from itertools import count, groupby, pairwise
from pathlib import Path
from reprlib import repr as short

from common.errors import InputError, reading
from common.files import read_json

# ------------------------------------------------------------------------------------- bytes


def byte_characters() -> list[str]:
    """The character that stands for each byte: itself if it is printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


CHARACTERS = byte_characters()
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}

# ----------------------------------------------------------------------------------- pieces

# As in the files. The matches of each of them cover the whole text.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # the same with up to three digits at once
DIGITS = r"\p{N}|[^\p{N}]+"  # `Digits` with individual_digits
SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Python's \s also has U+001C to U+001F


@cache
def unicode_ranges(category: str) -> str:
    """All characters of a general category, such as L for letters, as ranges for the brackets of a regular expression.

    A newer Unicode than Python's assigns a category to more characters.
    """
    runs = groupby(range(sys.maxunicode + 1), key=lambda code: unicodedata.category(chr(code))[0] == category)
    codes = [list(run) for is_member, run in runs if is_member]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in codes)


@cache
def compile_pattern(pattern: str) -> re.Pattern:
    r"""One of the patterns above for Python's `re`, which has no \p and another \s."""

    def expand(match: re.Match) -> str:
        brackets = match[0] if match[0].startswith("[") else f"[{match[0]}]"
        brackets = brackets.replace(r"[\S]", r"[^\s]").replace(r"\s", SPACES)
        return brackets.replace(r"\p{L}", unicode_ranges("L")).replace(r"\p{N}", unicode_ranges("N"))

    return re.compile(re.sub(r"\[.*?\]|\\p\{.\}|\\s|\\S", expand, pattern))


# ------------------------------------------------------------------------------------ merges


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merges the pair of lowest rank, of equal pairs the leftmost, until no pair has a rank."""
    symbols = list(symbols)
    while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


# --------------------------------------------------------------------------------- tokenizer


@dataclass(eq=False, repr=False)
class BPETokenizer:
    """Encodes texts that continue another text, as `SentencePieceTokenizer` does, and whole texts with added tokens."""

    vocab: dict[str, int]  # token, in the characters of its bytes -> id
    ranks: dict[tuple[str, str], int]  # pair of tokens -> its place in the list of merges
    patterns: list[re.Pattern]  # each one cuts the pieces of the one before
    nfc: bool  # whether texts are brought to Unicode's normal form C
    ignore_merges: bool  # whether a piece that is a token is taken as it is
    added: dict[str, int]  # tokens outside the merges, such as "<|im_end|>", as plain text -> id
    special: set[int]  # those of `added` that are not part of texts
    start: list[int]  # what whole texts begin with: BOS, or nothing

    def __post_init__(self):
        longest_first = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")  # (?!) matches nothing
        self.tokens = {i: bytes(map(BYTES.get, token)) for token, i in self.vocab.items()}
        self.tokens |= {i: token.encode() for token, i in self.added.items()}
        self.piece_ids: dict[str, list[int]] = {}  # of all pieces so far: most words of captions occur often

    def __len__(self) -> int:
        return max(self.tokens, default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text that continues another one: a space comes first.

        Added tokens in it count as plain text, so that no caption contains a control token.
        """
        return self._encode_plain(" " + text)

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Ids of several texts -> the texts, one line each. Special tokens and ids without a token are skipped."""
        texts = [self.decode_with_added([i for i in row if i not in self.special]) for row in rows]
        return [" ".join(text.split()) for text in texts]

    def encode_with_added(self, text: str) -> list[int]:
        """The ids of a whole text. Added tokens in it are recognized: for prompts with control tokens."""
        ids = []
        for part in self.added_pattern.split(text):
            ids += [self.added[part]] if part in self.added else self._encode_plain(part)
        return ids

    def decode_with_added(self, ids: list[int]) -> str:
        """The whole text, with added tokens. Bytes that are no UTF-8, as of a character cut in two, become U+FFFD."""
        return b"".join(self.tokens.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def _encode_plain(self, text: str) -> list[int]:
        pieces = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for pattern in self.patterns:
            pieces = [part for piece in pieces for part in pattern.findall(piece)]
        return [i for piece in pieces for i in self._encode_piece(piece)]

    def _encode_piece(self, piece: str) -> list[int]:
        if piece not in self.piece_ids:
            vocab, symbols = self.vocab, [CHARACTERS[byte] for byte in piece.encode()]
            if self.ignore_merges and (token := "".join(symbols)) in vocab:
                symbols = [token]
            else:  # SmolLM2 has no tokens for some rare bytes: they are dropped
                symbols = merge([symbol for symbol in symbols if symbol in vocab], self.ranks)
            self.piece_ids[piece] = [vocab[symbol] for symbol in symbols]
        return self.piece_ids[piece]


# ---------------------------------------------------------------------------- tokenizer.json

ANY: list = []  # the field has no effect on ids, or is checked later
CUTS = {DIGITS: {"type": "Digits", "individual_digits": True}}  # the first pre-tokenizer, by its pattern
CUTS |= {p: {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in (QWEN, LLAMA3)}


def check_fields(found: dict, supported: dict[str, list], where: str = "") -> None:
    """Raises InputError unless each field of an object has one of the supported values.

    null, false and "" switch something off, and so does a missing field: all of them count as None. A field that
    `supported` does not list has to be off.
    """
    for name in supported | found:
        value, values = found.get(name) or None, supported.get(name, [None])
        if values is not ANY and value not in values:
            raise InputError(f"{where}{name}: found {short(value)}, supported: {' or '.join(map(short, values))}")


def load_bpe(path: Path, bos_id: int | None) -> BPETokenizer:
    """Loads a tokenizer.json. Raises InputError for every field whose value would need other computations.

    BOS is the token that a post-processor puts before each text, else bos_id, that of config.json.
    """
    file = read_json(path)
    with reading(path):
        return parse_bpe(file, bos_id)


def parse_bpe(file: dict, bos_id: int | None) -> BPETokenizer:
    parts = "added_tokens", "pre_tokenizer", "post_processor", "decoder", "model"
    check_fields(file, {"version": ["1.0"], "normalizer": [None, {"type": "NFC"}]} | dict.fromkeys(parts, ANY))
    model, (cut, byte_level) = file["model"], file["pre_tokenizer"]["pretokenizers"]
    check_fields(model, {"type": ["BPE"], "vocab": ANY, "merges": ANY, "ignore_merges": [None, True]}, "model.")
    found = {"pretokenizers[0]": cut, "decoder": file["decoder"]["type"]}
    check_fields(found, {"pretokenizers[0]": [*CUTS.values()], "decoder": ["ByteLevel"]})
    check_fields(byte_level, {"type": ["ByteLevel"], "trim_offsets": ANY, "use_regex": [None, True]}, "byte_level.")
    patterns = [p for p in CUTS if CUTS[p] == cut] + ([] if byte_level.get("use_regex") is False else [GPT2])
    added = read_added_tokens(file["added_tokens"], model["vocab"])
    return BPETokenizer(
        vocab=model["vocab"],
        ranks=read_merges(model["merges"], model["vocab"]),
        patterns=[compile_pattern(pattern) for pattern in patterns],
        nfc=bool(file.get("normalizer")),
        ignore_merges=bool(model.get("ignore_merges")),
        added=added,
        special={entry["id"] for entry in file["added_tokens"] if entry.get("special")},
        start=read_start(file.get("post_processor"), added, bos_id),
    )


def read_added_tokens(entries: list[dict], vocab: dict[str, int]) -> dict[str, int]:
    """Checks the ids of both. Added tokens may be in the vocabulary too, with the same id."""
    for i, entry in enumerate(entries):
        check_fields(entry, {"content": ANY, "id": ANY, "special": [None, True]}, f"added_tokens[{i}].")
    added, ids, tokens = [(entry["content"], entry["id"]) for entry in entries], {}, {}
    for token, i in [*vocab.items(), *added]:
        is_pair = token and type(i) is int and i >= 0
        if not is_pair or ids.setdefault(token, i) != i or tokens.setdefault(i, token) != token:
            raise InputError(f"token {short(token)}: its id is {short(i)}, expected a text and an id of its own")
    if not BYTES.keys() >= set("".join(vocab)):
        raise InputError("model.vocab: expected tokens in the characters of their bytes")
    return dict(added)


def read_merges(entries: list, vocab: dict[str, int]) -> dict[tuple[str, str], int]:
    """The place of each pair. A pair is a list, or a text with a space between the two."""
    pairs = [tuple(entry.split(" ")) if isinstance(entry, str) else tuple(entry) for entry in entries]
    for left, right in pairs:
        if not {left, right, left + right} <= vocab.keys():
            raise InputError(f"model.merges: found {left!r:.100}, {right!r:.100}, expected parts of a token")
    return {pair: rank for rank, pair in enumerate(pairs)}


def read_start(post_processor: dict | None, added: dict[str, int], default: int | None) -> list[int]:
    """The token that the post-processor puts before each text, else the default, if there is one."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    parts = (post_processor or {"processors": []}).get("processors", [post_processor])
    # ByteLevel only trims offsets, and a template of nothing but the text adds nothing to it.
    templates = [part for part in parts if part["type"] != "ByteLevel" and part.get("single") != [text]]
    if not templates:
        return [] if default is None else [default]
    (template,) = templates
    name = template["single"][0]["SpecialToken"]["id"]
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, text]
    tokens = {name: {"id": name, "ids": [added[name]], "tokens": [name]}}
    supported = {"type": ["TemplateProcessing"], "single": [single], "special_tokens": [tokens], "pair": ANY}
    check_fields(template, supported, "post_processor.")
    return [added[name]]
