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
from reprlib import repr as short

import sentencepiece

from common.errors import InputError
from common.files import read_json
from models.bpe import BPETokenizer
from models.mllm_checkpoints import read_text_config
from models.tokenizer_json import read_bpe_config


class SentencePieceTokenizer:
    """Encodes texts that continue another text. Raises InputError for a model that cannot encode such texts."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, bos_id: int | None = None):
        """bos_id: for a model that has none."""
        self.processor, self._bos_id = processor, -1 if bos_id is None else bos_id
        whole, first = processor.encode("b a"), processor.encode("b")
        prefixes = [prefix for prefix in ("", " ") if first + processor.encode(prefix + "a") == whole]
        if not prefixes:
            raise InputError("a sentencepiece model that cannot encode a text as the continuation of another one")
        self.prefix = prefixes[0]

    def __len__(self) -> int:
        return self.processor.vocab_size()

    def bos_id(self) -> int:
        """The token that texts begin with, -1 if there is none."""
        return self.processor.bos_id() if self.processor.bos_id() >= 0 else self._bos_id

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


Tokenizer = SentencePieceTokenizer | BPETokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads `tokenizer.model` or `tokenizer.json` from the folder of a language model or of an MLLM.

    Raises InputError if there is neither, or if the tokenizer has more tokens than the language model.
    """
    folder = Path(folder)
    path, load = folder / "tokenizer.model", load_sentencepiece
    if not path.is_file():
        path, load = folder / "tokenizer.json", load_bpe
    if not path.is_file():
        raise InputError(f"{folder}: expected tokenizer.model or tokenizer.json, found neither")
    config = read_text_config(folder / "config.json")
    tokenizer = load(path, config["bos_id"])
    if len(tokenizer) > config["vocab"]:
        raise InputError(f"{path}: has {len(tokenizer)} tokens, expected at most the {config['vocab']} of its "
                         "config.json")  # fmt: skip
    return tokenizer


def load_sentencepiece(path: Path, bos_id: int | None) -> SentencePieceTokenizer:
    """bos_id, that of config.json, counts if the model has none."""
    try:
        return SentencePieceTokenizer(sentencepiece.SentencePieceProcessor(model_file=str(path)), bos_id)
    except RuntimeError as error:
        raise InputError(f"{path}: not a sentencepiece model: {error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def load_bpe(path: Path, bos_id: int | None) -> BPETokenizer:
    """BOS is the token that a post-processor puts before each text, else the one of tokenizer_config.json.

    bos_id, that of config.json, counts if there is no tokenizer_config.json. Qwen's config.json names a BOS although no
    text begins with one; its tokenizer_config.json says null.
    """
    config = read_bpe_config(path)
    if config.bos_id is None:
        settings = path.with_name("tokenizer_config.json")
        config = replace(config, bos_id=read_bos_token(settings, config.added) if settings.is_file() else bos_id)
    return BPETokenizer(config)


def read_bos_token(path: Path, added: dict[str, int]) -> int | None:
    """The `bos_token` of a tokenizer_config.json: null, a token, or an object with its content."""
    token = read_json(path).get("bos_token")
    name = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    if not isinstance(name, str) or name not in added:
        raise InputError(f"{path}: bos_token is {short(token)}, expected an added token of tokenizer.json")
    return added[name]
