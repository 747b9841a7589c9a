"""Tokenizers against sentencepiece itself, on the demo's model and on two that are trained here on a few words.

Of the latter one marks a text's first word as Llama's does, the other, as Gemma's, marks spaces only.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from test_lm_families import LLAMA

from tokens import Tokenizer, load_tokenizer
from weights import InputError

TINY_LM = Path(__file__).parent.parent / "backbones" / "tiny-lm"
TEXTS = ["a dog runs", "the cat sat on a mat", "a man is cooking", "two dogs and a cat"]


def trained(marks_first_word: bool) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=26, minloglevel=2,
        add_dummy_prefix=marks_first_word, remove_extra_whitespaces=marks_first_word,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("marks_first_word", [True, False])
def test_a_text_s_first_word_is_the_word_that_it_is_elsewhere(marks_first_word):
    """The pieces after a text's first words are the pieces of those words, and come back as they were."""
    pieces = trained(marks_first_word)
    tokenizer = Tokenizer(pieces)
    rows = tokenizer.encode(TEXTS)
    assert [tokenizer.encode(text) for text in TEXTS] == rows
    for text, ids in zip(TEXTS, rows, strict=True):
        assert tokenizer.encode("the cat") + ids == tokenizer.encode("the cat " + text)
        assert pieces.decode(tokenizer.encode("a mat") + ids).strip() == "a mat " + text
    assert tokenizer.decode(rows) == TEXTS
    assert tokenizer.decode([]) == [] and tokenizer.encode([]) == [] and tokenizer.decode([[]]) == [""]
    assert (len(tokenizer), tokenizer.bos_id()) == (26, 1)


def test_a_model_that_cannot_continue_a_text_is_refused(tmp_path):
    """Sentencepiece's own default takes the space away with which a model without a dummy prefix would begin a word."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=26,
                                             minloglevel=2, add_dummy_prefix=False)  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(InputError, match=r"tokenizer\.model: a sentencepiece model in which no text continues"):
        load_tokenizer(tmp_path)


def test_an_id_beyond_the_tokenizer_s_has_no_text():
    tokenizer = Tokenizer(trained(True))
    ids = tokenizer.encode("a dog runs")
    assert tokenizer.decode([[26, *ids[:2], 99, *ids[2:]], [26]]) == ["a dog runs", ""]


def test_a_text_is_one_line():
    """Sentencepiece's own text of byte tokens that are line breaks has several."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TINY_LM / "tokenizer.model"))
    breaks = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in (0x0A, 0x0D, 0x0B, 0x0C)]
    ids = pieces.encode("a red circle")
    ids = [ids[0], *breaks, *ids[1:], breaks[0]]
    assert len(pieces.decode(ids).splitlines()) > 3
    assert load_tokenizer(TINY_LM).decode([ids]) == ["a red circle"]


def test_the_demo_s_texts_are_encoded_as_sentencepiece_does():
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TINY_LM / "tokenizer.model"))
    texts = ["a red circle moves left", "a video of"]
    assert load_tokenizer(TINY_LM).encode(texts) == pieces.encode(texts)


def test_a_tokenizer_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.model: expected a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_folder_with_another_kind_of_tokenizer_says_what_to_use_instead(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.model: .* only tokenizer\.json: use .* TinyLlama.* Gemma 3$"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_may_have_no_more_pieces_than_the_model_has_tokens(tmp_path):
    """The demo's tokenizer of 448 pieces beside a config.json of 448, 500 and 447 tokens."""
    shutil.copy(TINY_LM / "tokenizer.model", tmp_path)
    for vocab in (448, 500):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": vocab}))
        assert len(load_tokenizer(tmp_path)) == 448
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 447}))
    with pytest.raises(InputError, match=r"tokenizer\.model: has 448 pieces, expected at most the 447 tokens"):
        load_tokenizer(tmp_path)
