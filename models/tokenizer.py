"""Text to token ids and back, with the sentencepiece model [1] of a language model.

Encoded texts always continue another text: captions follow the prompt, the prompt follows the visual tokens. Llama's
sentencepiece model marks the first word of a text as a new word ("▁a"). Gemma's does not, which would join a caption to
the last word of the prompt; so for such models a space is put before each text.

References
[1] https://github.com/google/sentencepiece; `add_dummy_prefix` in its doc/options.md
"""

from pathlib import Path

import sentencepiece

from common.errors import InputError
from models.lm_checkpoints import read_lm_config


class Tokenizer:
    """Encodes texts that continue another text. Raises InputError for a model that cannot encode such texts."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self.processor = processor
        whole, first = processor.encode("b a"), processor.encode("b")
        prefixes = [prefix for prefix in ("", " ") if first + processor.encode(prefix + "a") == whole]
        if not prefixes:
            raise InputError("a sentencepiece model that cannot encode a text as the continuation of another one")
        self.prefix = prefixes[0]

    def __len__(self) -> int:
        return self.processor.vocab_size()

    def bos_id(self) -> int:
        """-1 if the model has none."""
        return self.processor.bos_id()

    def encode(self, texts: str | list[str]) -> list:
        """A text -> its ids; a list of texts -> the ids of each."""
        if isinstance(texts, str):
            return self.processor.encode(self.prefix + texts)
        return self.processor.encode([self.prefix + text for text in texts])

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Ids of several texts -> the texts, one line each. Ids beyond the tokenizer's vocabulary are skipped: some
        language models have more tokens than their tokenizer."""
        texts = self.processor.decode([[i for i in row if i < len(self)] for row in rows])
        return [" ".join(text.split()) for text in texts]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads `tokenizer.model` from a language model's folder.

    Raises InputError if there is none, or if it has more pieces than the language model has tokens.
    """
    path = Path(folder) / "tokenizer.model"
    if not path.is_file():
        found = "none"
        if (path.parent / "tokenizer.json").is_file():
            found = ("only tokenizer.json: use a language model with a tokenizer.model, such as TinyLlama, "
                     "JackFram/llama-160m, Llama 2, Mistral v0.1 or Gemma 3")  # fmt: skip
        raise InputError(f"{path}: expected a sentencepiece model, found {found}")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: not a sentencepiece model: {error}") from error
    if (count := processor.vocab_size()) > (vocab := read_lm_config(path.parent / "config.json")["vocab"]):
        raise InputError(f"{path}: has {count} pieces, expected at most the {vocab} tokens of its config.json")
    try:
        return Tokenizer(processor)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
