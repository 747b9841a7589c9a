"""Loading a tokenizer, and sentencepiece's: with the tiny backbone's model and two models trained here on a few words.

One of the latter marks the first word of a text, as Llama's does; the other marks only spaces, as Gemma's does. The
reference is sentencepiece. `test_bpe.py` tests the tokenizers that tokenizer.json describes.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from models.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.common.helpers import ROOT, refused
from tests.models.test_bpe import make_tokenizer_json
from tests.models.test_lm import LLAMA

TINY_LM = ROOT / "backbones" / "tiny-lm"
TEXTS = ["a dog runs", "the cat sat on a mat", "a man is cooking", "two dogs and a cat"]


def train_model(**options) -> bytes:
    model, texts = io.BytesIO(), iter(TEXTS * 20)
    options |= {"model_writer": model, "vocab_size": 26, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, **options)
    return model.getvalue()


def write(folder: Path, vocab: int = 500, tokenizer_json: object = None, tokenizer_model: bytes | None = None,
          **fields: object) -> Path:
    """A folder with the config.json of a Llama, with other fields in it, and one of the files of a tokenizer."""
    (folder / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": vocab, "bos_token_id": 5} | fields))
    for name, content in (("tokenizer.json", tokenizer_json), ("tokenizer.model", tokenizer_model)):
        if content is not None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("marks_first_word", [True, False])
def test_encoded_texts_continue_other_texts(marks_first_word):
    """The ids of a text are those it has after other words, and decode to the same text; other ids are skipped."""
    model = train_model(add_dummy_prefix=marks_first_word, remove_extra_whitespaces=marks_first_word)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(processor)
    rows = [tokenizer.encode(text) for text in TEXTS]
    for text, ids in zip(TEXTS, rows, strict=True):
        assert tokenizer.encode("the cat") + ids == tokenizer.encode("the cat " + text)
        assert processor.decode(tokenizer.encode("a mat") + ids).strip() == "a mat " + text
    assert tokenizer.decode([*rows, [26, *rows[0], 99], []]) == [*TEXTS, TEXTS[0], ""]
    assert (len(tokenizer), tokenizer.start) == (26, [1])


def test_the_tiny_backbone_encodes_as_sentencepiece_does():
    """Decoded texts have one line; sentencepiece itself decodes the byte tokens of line breaks to several."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TINY_LM / "tokenizer.model"))
    tokenizer, ids = load_tokenizer(TINY_LM), processor.encode("a red circle")
    assert tokenizer.encode("a red circle") == ids
    breaks = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in (0x0A, 0x0D, 0x0B, 0x0C)]
    assert tokenizer.decode([[ids[0], *breaks, *ids[1:], breaks[0]]]) == ["a red circle"]


def test_unusable_models_are_refused(tmp_path):
    """No file, damaged ones, and sentencepiece's default without a dummy prefix, which removes a leading space."""
    with refused(f"{write(tmp_path)}/tokenizer.json: expected a file, found none"):
        load_tokenizer(tmp_path)
    for name, data in (("json", b"x"), ("model", b"x"), ("model", train_model(add_dummy_prefix=False))):
        write(tmp_path, **{f"tokenizer_{name}": data})
        with refused(f"{tmp_path}/tokenizer.{name}: ", "a text as the continuation" if len(data) > 1 else "damaged"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    """A BPE of 401 tokens and 5 added ones, which may lack a row; the tiny backbone's model of 448, which counts if
    there are both, also in an MLLM."""
    tokenizer = load_tokenizer(write(tmp_path, 406, tokenizer_json=make_tokenizer_json("tiny Qwen")))
    assert len(tokenizer) == 406 and len(tokenizer.encode_with_added("<image><image>")) == 1
    tokenizer = load_tokenizer(write(tmp_path, 405))
    assert len(tokenizer) == 405 and tokenizer.encode_with_added("<image><image>") == [404, 404]
    with refused("tokenizer.json: has 401 tokens, expected at most the 400 of its config.json"):
        load_tokenizer(write(tmp_path, 400))
    shutil.copy(TINY_LM / "tokenizer.model", tmp_path)
    assert len(load_tokenizer(write(tmp_path, 448))) == 448
    text = LLAMA | {"vocab_size": 447}
    mllm = {"model_type": "smolvlm", "image_token_id": 9, "text_config": text}
    for config in (text, mllm | {"vision_config": {"model_type": "smolvlm_vision"}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with refused("tokenizer.model: has 448 tokens, expected at most the 447 of its config.json"):
            load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------- BOS


def test_bos_of_a_bpe(tmp_path):
    """The post-processor's, else that of config.json, but none of Qwen, whose texts do not begin with it."""
    content = make_tokenizer_json("tiny Llama 3")
    first = {token["content"]: token["id"] for token in content["added_tokens"]}["<|endoftext|>"]
    sequence = content["post_processor"]
    byte_level, template = sequence["processors"]
    empty = template | {"single": template["single"][1:], "special_tokens": {}}  # transformers 5 writes it for SmolLM2

    def load(post_processor: dict | None, **fields: object) -> list[int]:
        content["post_processor"] = post_processor
        return load_tokenizer(write(tmp_path, tokenizer_json=content, **fields)).start

    assert [load(each) for each in (sequence, template, byte_level, empty, None)] == [[first], [first], [5], [5], [5]]
    assert load(None, bos_token_id=None) == []
    qwen = {"model_type": "qwen2", "eos_token_id": 2}
    assert [load(each, **qwen) for each in (sequence, byte_level)] == [[first], []]
