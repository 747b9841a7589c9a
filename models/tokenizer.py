"""Text to token ids and back, with the tokenizer of a public language model.

A folder holds a sentencepiece model [1], `tokenizer.model`, or else a byte-level BPE, `tokenizer.json` (`bpe.py`).

Encoded texts always continue another text: captions follow the prompt, the prompt follows the visual tokens. Llama's
sentencepiece model marks the first word of a text as a new word ("▁a"). Gemma's does not, which would join a caption to
the last word of the prompt, and neither does a BPE; so there a space is put before each text.

References
[1] https://github.com/google/sentencepiece; `add_dummy_prefix` in its doc/options.md
"""

from dataclasses import replace
from pathlib import Path

import sentencepiece

from common.errors import InputError, reading
from common.files import field, read_json
from models import hub
from models.bpe import BPETokenizer, load_bpe
from models.lm_checkpoints import parse_lm_config


class SentencePieceTokenizer:
    """Encodes texts that continue another text. Raises InputError for a model that cannot encode such texts."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self.processor = processor
        self.start = [i for i in (processor.bos_id(),) if i >= 0]  # what whole texts begin with: BOS, or nothing
        whole, first = processor.encode("b a"), processor.encode("b")
        self.prefix = next((prefix for prefix in ("", " ") if first + processor.encode(prefix + "a") == whole), None)
        if self.prefix is None:
            raise InputError("a sentencepiece model that cannot encode a text as the continuation of another one")

    def __len__(self) -> int:
        return self.processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(self.prefix + text)

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Ids of several texts -> the texts, one line each. Ids beyond the tokenizer's vocabulary are skipped: some
        language models have more tokens than their tokenizer."""
        texts = self.processor.decode([[i for i in row if i < len(self)] for row in rows])
        return [" ".join(text.split()) for text in texts]


Tokenizer = SentencePieceTokenizer | BPETokenizer


def load_tokenizer(folder_or_id: str | Path) -> Tokenizer:
    """Loads `tokenizer.model`, else `tokenizer.json`, of a language model or an MLLM: a folder or hub id.

    Raises InputError if there is neither, or if the tokenizer has more tokens than the language model.
    """
    folder = hub.resolve(folder_or_id)
    published = read_json(path := folder / "config.json")
    config = parse_lm_config(field(published, "text_config", dict, path, published), path, path)  # of an MLLM, or alone
    vocab = config["vocab"]
    if (path := folder / "tokenizer.model").is_file():
        with reading(path):
            tokenizer = SentencePieceTokenizer(sentencepiece.SentencePieceProcessor(model_file=str(path)))
    else:
        tokenizer = load_bpe(path := folder / "tokenizer.json", config["bos_id"])
        # InternVL 3 has no row for its last added token, which no prompt contains.
        tokenizer = replace(tokenizer, added={token: i for token, i in tokenizer.added.items() if i < vocab})
    if len(tokenizer) > vocab:
        raise InputError(f"{path}: has {len(tokenizer)} tokens, expected at most the {vocab} of its config.json")
    return tokenizer
