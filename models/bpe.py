"""Byte-level byte-pair encoding [1, 2]: text to token ids and back, as a public `tokenizer.json` [3] says.

A regular expression cuts a text into pieces, and no token crosses their borders. A piece starts as the sequence of its
UTF-8 bytes, each written as a printable character: a space is "Ġ". Then two neighbours are merged, again and again. The
file lists the pairs that may be merged, in the order in which they were learned; the first in the list is merged first.
The symbols that remain are the tokens.

    " two dogs"  ->  " two", " dogs"
    " two"       ->  Ġ t w o  ->  Ġt w o  ->  Ġt wo  ->  Ġtwo  ->  its id

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
    symbols, none = list(symbols), len(ranks)
    pair_ranks = [ranks.get(pair, none) for pair in pairwise(symbols)]
    while (lowest := min(pair_ranks, default=none)) < none:
        i = pair_ranks.index(lowest)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        del pair_ranks[i]
        for j in range(max(i - 1, 0), min(i + 1, len(pair_ranks))):  # the pairs to both sides of the new symbol
            pair_ranks[j] = ranks.get((symbols[j], symbols[j + 1]), none)
    return symbols


# --------------------------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class BPEConfig:
    """The contents of a tokenizer.json; `tokenizer_json.py` reads them."""

    vocab: dict[str, int]  # token, in the characters of its bytes -> id
    ranks: dict[tuple[str, str], int]  # pair of tokens -> its place in the list of merges
    patterns: list[str]  # each one cuts the pieces of the one before
    nfc: bool  # whether texts are brought to Unicode's normal form C
    ignore_merges: bool  # whether a piece that is a token is taken as it is
    added: dict[str, int]  # tokens outside the merges, such as "<|im_end|>", as plain text -> id
    special: frozenset[int]  # those of `added` that are not part of texts
    bos_id: int | None  # the token that is put before each text


class BPETokenizer:
    """Encodes texts that continue another text, as `SentencePieceTokenizer` does, and whole texts with added tokens."""

    def __init__(self, config: BPEConfig):
        self.config, self.patterns = config, [compile_pattern(pattern) for pattern in config.patterns]
        longest_first = sorted(map(re.escape, config.added), key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")  # (?!) matches nothing
        self.tokens = {i: bytes(map(BYTES.get, token)) for token, i in config.vocab.items()}
        self.tokens |= {i: token.encode() for token, i in config.added.items()}
        self.piece_ids: dict[str, list[int]] = {}  # of all pieces so far: most words of captions occur often

    def __len__(self) -> int:
        return max(self.tokens, default=-1) + 1

    def bos_id(self) -> int:
        """-1 if texts have no first token of their own."""
        return -1 if self.config.bos_id is None else self.config.bos_id

    def encode(self, texts: str | list[str]) -> list:
        """A text -> its ids; a list of texts -> the ids of each. They continue another text: a space comes first.

        Added tokens in a text count as plain text, so that no caption contains a control token.
        """
        if isinstance(texts, str):
            return self._encode_plain(" " + texts)
        return [self._encode_plain(" " + text) for text in texts]

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Ids of several texts -> the texts, one line each. Special tokens and ids without a token are skipped."""
        texts = [self.decode_with_added([i for i in row if i not in self.config.special]) for row in rows]
        return [" ".join(text.split()) for text in texts]

    def encode_with_added(self, text: str) -> list[int]:
        """The ids of a whole text. Added tokens in it are recognized: for prompts with control tokens."""
        ids = []
        for part in self.added_pattern.split(text):
            ids += [self.config.added[part]] if part in self.config.added else self._encode_plain(part)
        return ids

    def decode_with_added(self, ids: list[int]) -> str:
        """The whole text, with added tokens. Bytes that are no UTF-8, as of a character cut in two, become U+FFFD."""
        return b"".join(self.tokens.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def _encode_plain(self, text: str) -> list[int]:
        pieces = [unicodedata.normalize("NFC", text) if self.config.nfc else text]
        for pattern in self.patterns:
            pieces = [part for piece in pieces for part in pattern.findall(piece)]
        return [i for piece in pieces for i in self._encode_piece(piece)]

    def _encode_piece(self, piece: str) -> list[int]:
        if piece not in self.piece_ids:
            vocab, symbols = self.config.vocab, [CHARACTERS[byte] for byte in piece.encode()]
            if self.config.ignore_merges and (token := "".join(symbols)) in vocab:
                symbols = [token]
            else:  # SmolLM2 has no tokens for some rare bytes: they are dropped
                symbols = merge([symbol for symbol in symbols if symbol in vocab], self.config.ranks)
            self.piece_ids[piece] = [vocab[symbol] for symbol in symbols]
        return self.piece_ids[piece]
