"""Loading a tokenizer, and sentencepiece's: with the tiny backbone's model and two models trained here on a few words.

One of the latter marks the first word of a text, as Llama's does; the other marks only spaces, as Gemma's does. The
reference is sentencepiece. `test_bpe.py` tests the tokenizers that tokenizer.json describes.
"""

import io
import json
import shutil

import pytest
import sentencepiece

from models.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.common.helpers import ROOT, refused
from tests.models.helpers import change_json
from tests.models.test_bpe import change, make_tokenizer_json
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
    tokenizer = SentencePieceTokenizer(processor)
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
    tokenizer = SentencePieceTokenizer(train_processor(True))
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
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with refused(f"{tmp_path}: expected tokenizer.model or tokenizer.json, found neither"):
        load_tokenizer(tmp_path)
    for name, words in (("tokenizer.json", "expected JSON in UTF-8"), ("tokenizer.model", "not a sentencepiece model")):
        (tmp_path / name).write_bytes(b"not a model")
        with refused(f"{tmp_path / name}: {words}"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    """The tiny backbone's tokenizer of 448 pieces with a config.json of 448, 500 and 447 tokens; and a BPE."""
    shutil.copy(TINY_LM / "tokenizer.model", tmp_path)
    for vocab in (448, 500):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": vocab}))
        assert len(load_tokenizer(tmp_path)) == 448
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 447}))
    with refused("tokenizer.model: has 448 tokens, expected at most the 447 of its config.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(make_tokenizer_json("tiny Qwen")))
    assert len(load_tokenizer(tmp_path)) == 406
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 405}))
    with refused("tokenizer.json: has 406 tokens, expected at most the 405 of its config.json"):
        load_tokenizer(tmp_path)


def test_a_multimodal_model_has_the_vocabulary_of_its_language_model(tmp_path):
    shutil.copy(TINY_LM / "tokenizer.model", tmp_path)
    config = {"model_type": "llava", "vision_config": {}, "image_token_index": 9}
    for vocab in (448, 447):
        (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": {"vocab_size": vocab}}))
        if vocab == 448:
            assert load_tokenizer(tmp_path).encode("a red circle") == load_tokenizer(TINY_LM).encode("a red circle")
    with refused("tokenizer.model: has 448 tokens, expected at most the 447"):
        load_tokenizer(tmp_path)


def test_tokenizer_model_is_preferred(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 448}))
    (tmp_path / "tokenizer.json").write_text(json.dumps(make_tokenizer_json("tiny Qwen")))
    ids = load_tokenizer(tmp_path).encode("a red circle")
    shutil.copy(TINY_LM / "tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).encode("a red circle") == load_tokenizer(TINY_LM).encode("a red circle") != ids


# --------------------------------------------------------------------------------------------- BOS


def test_bos_of_a_sentencepiece_model(tmp_path):
    """That of config.json counts only if the model has none."""
    for bos_in_model, bos_in_config, expected in ((1, 5, 1), (-1, 5, 5), (-1, None, -1)):
        (tmp_path / "tokenizer.model").write_bytes(train_model(bos_id=bos_in_model))
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"bos_token_id": bos_in_config}))
        assert load_tokenizer(tmp_path).bos_id() == expected


def test_bos_of_a_bpe(tmp_path):
    """The post-processor's, else that of tokenizer_config.json, else, without this file, that of config.json."""
    config, settings = tmp_path / "config.json", tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(LLAMA | {"vocab_size": 500, "bos_token_id": 5}))
    llama = make_tokenizer_json("tiny Llama 3")
    template = llama["post_processor"]["processors"][1]
    first, image = (token["id"] for token in llama["added_tokens"] if token["content"] in ("<|endoftext|>", "<image>"))

    def load(post_processor) -> int:
        (tmp_path / "tokenizer.json").write_text(json.dumps(change(llama, ("post_processor",), post_processor)))
        return load_tokenizer(tmp_path).bos_id()

    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    assert [load(each) for each in (llama["post_processor"], template, byte_level, None)] == [first, first, 5, 5]
    config.write_text(json.dumps(LLAMA | {"vocab_size": 500, "bos_token_id": None}))
    assert [load(template), load(None)] == [first, -1]
    change_json(config, bos_token_id=5)
    for bos_token, expected in (("<image>", image), ({"content": "<image>", "lstrip": False}, image), (None, -1)):
        settings.write_text(json.dumps({"bos_token": bos_token, "add_bos_token": False}))
        assert [load(template), load(byte_level)] == [first, expected]
    settings.write_text("{}")
    assert load(None) == -1
    for bos_token in ("<s>", 5, {}, [], "a"):
        settings.write_text(json.dumps({"bos_token": bos_token}))
        with refused(f"{settings}: bos_token is", "expected an added token of tokenizer.json"):
            load(None)


@pytest.mark.parametrize("name, bos_id", [("llama3.2", 128000), ("qwen2.5", -1), ("qwen3", -1)])
def test_bos_of_public_tokenizers(real, tmp_path, name, bos_id):
    """Qwen's config.json names 151643, with which no text begins."""
    shutil.copytree(real / "tokenizers" / name, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 151936, "bos_token_id": 151643}))
    assert load_tokenizer(tmp_path).bos_id() == bos_id
