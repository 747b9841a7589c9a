"""Text and token ids: the sentencepiece model [1] that comes with a language model.

What is encoded here never stands at a text's beginning: a caption follows the prompt, the prompt follows the visual
tokens. Llama's sentencepiece model marks the first word as a word all the same ("▁a"); Gemma's does not, and would glue
a caption to the prompt before it, so there each text is given the space that it follows.

References
[1] https://github.com/google/sentencepiece; `add_dummy_prefix` in its doc/options.md
"""

from pathlib import Path

import sentencepiece

from lm_public import LMConfig
from weights import InputError


class Tokenizer:
    """Words in the middle of a text -> ids, and back. Raises InputError for a model with which that cannot be done."""

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor):
        self.pieces = pieces
        whole, first = pieces.encode("b a"), pieces.encode("b")
        spaces = [space for space in ("", " ") if first + pieces.encode(space + "a") == whole]
        if not spaces:
            raise InputError("a sentencepiece model in which no text continues another as words of their own")
        self.space = spaces[0]

    def __len__(self) -> int:
        return self.pieces.vocab_size()

    def bos_id(self) -> int:
        """-1 where the model has none."""
        return self.pieces.bos_id()

    def encode(self, texts: str | list[str]) -> list:
        """A text -> its ids; several -> the ids of each."""
        if isinstance(texts, str):
            return self.pieces.encode(self.space + texts)
        return self.pieces.encode([self.space + text for text in texts])

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Ids of several texts -> the texts, each one line. Ids beyond the tokenizer's, which some models have, are no
        text."""
        texts = self.pieces.decode([[i for i in row if i < len(self)] for row in rows])
        return [" ".join(text.split()) for text in texts]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """`tokenizer.model` of a language model's folder.

    Raises InputError where there is none, or one with more pieces than the language model has tokens.
    """
    path = Path(folder) / "tokenizer.model"
    if not path.is_file():
        found = "none"
        if (path.parent / "tokenizer.json").is_file():
            found = ("only tokenizer.json: use a language model that comes with the former, such as TinyLlama, "
                     "JackFram/llama-160m, Llama 2, Mistral v0.1 or Gemma 3")  # fmt: skip
        raise InputError(f"{path}: expected a sentencepiece model, found {found}")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: not a sentencepiece model: {error}") from error
    if (count := pieces.vocab_size()) > (vocab := LMConfig.from_json(path.parent / "config.json").vocab):
        raise InputError(f"{path}: has {count} pieces, expected at most the {vocab} tokens of its config.json")
    try:
        return Tokenizer(pieces)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
