"""Byte-level BPE, against the `tokenizers` package [1]: ids and decoded texts must be equal.

Three tiny tokenizers are trained here, one of each supported kind. With the environment variable QADAPTER_REAL, which
names a folder of public files, the tokenizers of SmolLM2, SmolVLM2, Qwen 2.5, Qwen 3 and Llama 3.2 are tested too.

[1] https://github.com/huggingface/tokenizers, which comes with transformers
"""

import json
import random
import unicodedata
from functools import reduce
from operator import getitem
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from models.bpe import load_bpe
from tests.common.helpers import refused

TINY = ["tiny SmolLM2", "tiny Qwen", "tiny Llama 3"]
REAL = ["smollm2", "smolvlm2", "qwen2.5", "qwen3", "llama3.2"]
# As in the public files.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")
CORPUS = (
    "A man isn't riding 2 horses; he'll fall, they've said.|two dogs run across the grass, and a cat sleeps|"
    "def f(x):\n\treturn x + 12345  # ok\r\n|日本語の動画。 café naïve Ünïcode|собака бежит по траве|½ ² Ⅷ ٣ 🙂|"
    "a video of the the the man man man in in  spaces   here"
).split("|") * 3

# ------------------------------------------------------------------------------ tokenizers to compare


def make_tokenizer_json(kind: str) -> dict:
    """A tokenizer.json of 401 tokens, as `tokenizers` trains it, and five added tokens, two of them not special."""
    trained = tokenizers.Tokenizer(BPE())
    if kind == "tiny SmolLM2":  # an alphabet without most bytes
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        pattern = tokenizers.Regex(LLAMA3 if kind == "tiny Llama 3" else QWEN)
        steps = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        trained.normalizer = tokenizers.normalizers.NFC() if kind == "tiny Qwen" else None
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>"] if kind == "tiny SmolLM2" else []  # in the vocabulary
    options = {} if special else {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False, **options)
    trained.train_from_iterator(CORPUS, trainer)
    content = json.loads(trained.to_str())
    model = content["model"]
    model["vocab"]["Ġzebra"] = len(model["vocab"])  # no merge leads to it, so it is a token only with ignore_merges
    model["ignore_merges"] = kind == "tiny Llama 3"
    if kind == "tiny Qwen":
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<image><image>"][len(special) :]
    for i, token in enumerate(added, start=len(model["vocab"])):
        content["added_tokens"].append({"id": i, "content": token, "special": "image" not in token} | flags)
    if kind == "tiny Llama 3":
        bos = "<|endoftext|>", len(model["vocab"])
        template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[bos])
        trained.post_processor = processors.Sequence([processors.ByteLevel(), template])
        content["post_processor"] = json.loads(trained.to_str())["post_processor"]
    return content


@pytest.fixture(scope="module", params=TINY + REAL)
def case(request, tmp_path_factory) -> SimpleNamespace:
    """A tokenizer of ours, theirs, and theirs without added tokens."""
    if request.param in REAL:
        path = request.getfixturevalue("real") / "tokenizers" / request.param / "tokenizer.json"
    else:
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        path.write_text(json.dumps(make_tokenizer_json(request.param)))
    plain = json.dumps(json.loads(path.read_text()) | {"added_tokens": [], "post_processor": None})
    plain, theirs = tokenizers.Tokenizer.from_str(plain), tokenizers.Tokenizer.from_file(str(path))
    return SimpleNamespace(ours=load_bpe(path, None), theirs=theirs, plain=plain)


def reference_ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# ------------------------------------------------------------------------------------ random texts

WORDS = [*CORPUS[0].split(), *CORPUS[1].split(), "zebra", "'s", "'LL", "'ſ", "isn’t", "İstanbul", "ﬁn", "e\u0301"]
WORDS += [" " + word for word in WORDS]
SPACES = [*"  \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\u200b\ufeff\u180e", "\r\n"]
ALPHABETS = (
    "abcXYZ éàüñçß жшяё ابجد कखगिी 日本語動画 한국어ᄒ กขค \u0300\u0301\u0327\u0338 0123456789 ½²Ⅷ٣५ "
    ".,;:!?'’\"()[]{}<>|/\\-_#@$%^&*+=~` 🙂👩\u200d👧🏽\ufe0f \x00\x04\x13\x7f\x9f"
).split(" ")
# Of Python's Unicode, which must not be newer than that of `tokenizers`.
ASSIGNED = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]


def random_text(rng: random.Random, added: list[str]) -> str:
    """One to ten parts: words, spaces, characters of one alphabet or of all, added tokens, and pieces of them."""
    pools = [WORDS, SPACES, *rng.sample(ALPHABETS, 2), ASSIGNED, added + [token[:-1] for token in added]]
    parts = [rng.choices(rng.choice(pools), k=rng.randint(1, 4)) for _ in range(rng.randint(1, 10))]
    return "".join(text for part in parts for text in part)


def test_random_texts_have_the_ids_of_the_reference(case):
    """300 texts, seed 0: whole, with added tokens, and as the continuation of a text, without. Decoded, they are equal,
    too."""
    rng, added = random.Random(0), case.ours.added
    for _ in range(300):
        text = random_text(rng, list(added))
        ids, plain = reference_ids(case.theirs, text), case.ours.encode(text)
        assert case.ours.encode_with_added(text) == ids, repr(text)
        assert case.ours.decode_with_added(ids) == case.theirs.decode(ids, skip_special_tokens=False), repr(text)
        assert plain == reference_ids(case.plain, " " + text), repr(text)
        assert not set(plain) & set(added.values()), repr(text)


def test_random_ids_have_the_text_of_the_reference(case):
    """1,000 rows, seed 1, with bytes of cut characters and ids beyond the vocabulary."""
    rng, size = random.Random(1), len(case.ours)
    assert size == case.theirs.get_vocab_size() == max(case.theirs.get_vocab().values()) + 1
    single_bytes = [i for i, token in case.ours.tokens.items() if len(token) == 1]
    pools = [range(size + 20), single_bytes, list(case.ours.added.values())]
    for _ in range(1000):
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 15))]
        assert case.ours.decode_with_added(ids) == case.theirs.decode(ids, skip_special_tokens=False), ids
        line = " ".join(case.theirs.decode(ids, skip_special_tokens=True).split())
        assert case.ours.decode([ids, []]) == [line, ""], ids


# ---------------------------------------------------------------------------------- files refused


STEP, TEMPLATE = "pre_tokenizer.pretokenizers.", "post_processor.processors.1"
QWEN3_5 = QWEN.replace(r"\p{L}+", r"[\p{L}\p{M}]+")
BOS, TEXT = ({name: {"id": i, "type_id": 0}} for name, i in (("SpecialToken", "<|endoftext|>"), ("Sequence", "A")))
UNSUPPORTED = [  # part of a file like Llama 3's; values of its fields, one at a time; words of the message
    ("", {"version": "2.0", "truncation": {"max_length": 5}, "normalizer": {"type": "NFKC"}}, None),
    ("", {"pre_tokenizer": {"type": "Whitespace"}}, "pretokenizers"),
    (STEP + "0", {"behavior": "Removed", "pattern": {"Regex": QWEN3_5}}, "pretokenizers[0]"),
    (STEP + "1", {"add_prefix_space": True, "type": "Digits"}, "byte_level"),
    ("model", {"type": "Unigram", "unk_token": "<unk>", "byte_fallback": True, "end_of_word_suffix": "</w>"}, None),
    ("model.vocab", {"Ġ": -1, "Ġa": True, "a": 0}, "expected a text and an id of its own"),
    ("model.vocab", {"a b": 9999}, "characters of their bytes"),
    ("model.merges", {0: ["Ġ", "unknown"], 1: ["b", "a"]}, "expected parts of a token"),
    ("model.merges", {0: "Ġ a b", 3: None}, "damaged"),
    ("added_tokens.1", {"lstrip": True, "normalized": True}, None),
    ("added_tokens.0", {"id": 7, "content": "<|im_end|>"}, "expected a text and an id of its own"),
    ("decoder", {"type": "WordPiece"}, "decoder"),
    (TEMPLATE, {"single": [BOS, TEXT, BOS]}, "post_processor.single: found"),
    (TEMPLATE + ".single.0.SpecialToken", {"id": "<s>"}, "<s>"),
    (TEMPLATE + ".special_tokens.<|endoftext|>", {"ids": [3, 4]}, "special_tokens"),
]


@pytest.mark.parametrize("part, fields, words", UNSUPPORTED)
def test_unsupported_fields_are_named(tmp_path, part, fields, words):
    file, keys = tmp_path / "tokenizer.json", [int(key) if key.isdecimal() else key for key in part.split(".") if key]
    for name, value in fields.items():
        content = make_tokenizer_json("tiny Llama 3")
        reduce(getitem, keys, content)[name] = value
        file.write_text(json.dumps(content))
        with refused(f"{file}: ", words or name):
            load_bpe(file, None)
