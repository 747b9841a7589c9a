"""The tokenizer, against sentencepiece: with the tiny backbone's model and two models trained here on a few words.

One of the latter marks the first word of a text, as Llama's does; the other marks only spaces, as Gemma's does.
"""

import io
import json
import shutil

import pytest
import sentencepiece

from models.tokenizer import Tokenizer, load_tokenizer
from tests.common.helpers import ROOT, refused
from tests.models.test_lm import LLAMA

TINY_LM = ROOT / "backbones" / "tiny-lm"
TEXTS = ["a dog runs", "the cat sat on a mat", "a man is cooking", "two dogs and a cat"]


def train_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=26,
                                             minloglevel=2, **options)  # fmt: skip
    return model.getvalue()


def train_processor(marks_first_word: bool) -> sentencepiece.SentencePieceProcessor:
    model = train_model(add_dummy_prefix=marks_first_word, remove_extra_whitespaces=marks_first_word)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize("marks_first_word", [True, False])
def test_encoded_texts_continue_other_texts(marks_first_word):
    """The ids of a text are those it has after other words, and decode to the same text."""
    processor = train_processor(marks_first_word)
    tokenizer = Tokenizer(processor)
    rows = tokenizer.encode(TEXTS)
    assert [tokenizer.encode(text) for text in TEXTS] == rows
    for text, ids in zip(TEXTS, rows, strict=True):
        assert tokenizer.encode("the cat") + ids == tokenizer.encode("the cat " + text)
        assert processor.decode(tokenizer.encode("a mat") + ids).strip() == "a mat " + text
    assert tokenizer.decode(rows) == TEXTS
    assert tokenizer.decode([]) == [] and tokenizer.encode([]) == [] and tokenizer.decode([[]]) == [""]
    assert (len(tokenizer), tokenizer.bos_id()) == (26, 1)


def test_a_model_that_cannot_continue_a_text_is_refused(tmp_path):
    """Without a dummy prefix, sentencepiece by default removes the leading space that would mark a new word."""
    (tmp_path / "tokenizer.model").write_bytes(train_model(add_dummy_prefix=False))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with refused(f"{tmp_path / 'tokenizer.model'}: a sentencepiece model that cannot encode a text as the contin"):
        load_tokenizer(tmp_path)


def test_ids_beyond_the_vocabulary_are_skipped():
    tokenizer = Tokenizer(train_processor(True))
    ids = tokenizer.encode("a dog runs")
    assert tokenizer.decode([[26, *ids[:2], 99, *ids[2:]], [26]]) == ["a dog runs", ""]


def test_decoded_texts_have_one_line():
    """Sentencepiece itself decodes the byte tokens of line breaks to several lines."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TINY_LM / "tokenizer.model"))
    breaks = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in (0x0A, 0x0D, 0x0B, 0x0C)]
    ids = processor.encode("a red circle")
    ids = [ids[0], *breaks, *ids[1:], breaks[0]]
    assert len(processor.decode(ids).splitlines()) > 3
    assert load_tokenizer(TINY_LM).decode([ids]) == ["a red circle"]


def test_the_tiny_backbone_encodes_as_sentencepiece_does():
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TINY_LM / "tokenizer.model"))
    texts = ["a red circle moves left", "a video of"]
    assert load_tokenizer(TINY_LM).encode(texts) == processor.encode(texts)


def test_missing_and_damaged_files_are_named(tmp_path):
    with refused("tokenizer.model: expected a sentencepiece model, found none"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with refused("tokenizer.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_another_kind_of_tokenizer_is_refused_with_alternatives(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with refused("tokenizer.model: ", " only tokenizer.json: use ", "TinyLlama", "Gemma 3"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_more_pieces_than_the_model_has_tokens_is_refused(tmp_path):
    """The tiny backbone's tokenizer of 448 pieces with a config.json of 448, 500 and 447 tokens."""
    shutil.copy(TINY_LM / "tokenizer.model", tmp_path)
    for vocab in (448, 500):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": vocab}))
        assert len(load_tokenizer(tmp_path)) == 448
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 447}))
    with refused("tokenizer.model: has 448 pieces, expected at most the 447 tokens"):
        load_tokenizer(tmp_path)
