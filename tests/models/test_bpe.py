"""Byte-level BPE, against the `tokenizers` package [1]: ids and decoded texts must be equal.

Three tiny tokenizers are trained here, one of each supported kind. With the environment variable QADAPTER_REAL, which
names a folder of public files, the tokenizers of SmolLM2, SmolVLM2, Qwen 2.5, Qwen 3 and Llama 3.2 are tested too, also
with ids that others have published [2]. QADAPTER_TEXTS is the number of random texts for each tokenizer, QADAPTER_SEED
their seed.

[1] https://github.com/huggingface/tokenizers, which comes with transformers
[2] tests/fixtures/tokenizer_smolvlm2 of https://github.com/joyshmitz/franken_ocr
"""

import copy
import json
import os
import random
import unicodedata
from dataclasses import dataclass

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from common.errors import InputError
from models.bpe import BPETokenizer, merge
from models.tokenizer_json import read_bpe_config
from tests.common.helpers import refused

TEXTS = int(os.environ.get("QADAPTER_TEXTS", 300))
SEED = int(os.environ.get("QADAPTER_SEED", 0))
TINY = ["tiny SmolLM2", "tiny Qwen", "tiny Llama 3"]
REAL = ["smollm2", "smolvlm2", "qwen2.5", "qwen3", "llama3.2"]
# As in the public files.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = [
    "A man isn't riding 2 horses; he'll fall, they've said.", "two dogs run across the grass, and a cat sleeps",
    "def f(x):\n\treturn x + 12345  # ok\r\n", "日本語の動画。 café naïve Ünïcode", "собака бежит по траве",
    "½ ² Ⅷ ٣ 🙂", "a video of the the the man man man in in  spaces   here",
] * 3  # fmt: skip

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
    alphabet = [] if kind == "tiny SmolLM2" else pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>"] if kind == "tiny SmolLM2" else []  # in the vocabulary
    trained.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    )
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


@dataclass
class Case:
    content: dict  # of tokenizer.json
    ours: BPETokenizer
    theirs: tokenizers.Tokenizer
    plain: tokenizers.Tokenizer  # the same without added tokens


@pytest.fixture(scope="module", params=TINY + REAL)
def case(request, tmp_path_factory) -> Case:
    if request.param in REAL:
        path = request.getfixturevalue("real") / "tokenizers" / request.param / "tokenizer.json"
        content = json.loads(path.read_text())
    else:
        content = make_tokenizer_json(request.param)
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        path.write_text(json.dumps(content))
    plain = json.dumps(content | {"added_tokens": [], "post_processor": None})
    return Case(content, BPETokenizer(read_bpe_config(path)), tokenizers.Tokenizer.from_file(str(path)),
                tokenizers.Tokenizer.from_str(plain))  # fmt: skip


def reference_ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# ------------------------------------------------------------------------------------ random texts

WORDS = [*CORPUS[0].split(), *CORPUS[1].split(), "zebra", "'s", "'LL", "'ſ", "isn’t", "İstanbul", "ﬁn", "e\u0301"]
SPACES = [*"  \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\u200b\ufeff\u180e", "\r\n"]
ALPHABETS = [
    "abcXYZ", "éàüñçß", "жшяё", "ابجد", "कखगिी", "日本語動画", "한국어ᄒ", "กขค", "\u0300\u0301\u0327\u0338",
    "0123456789", "½²Ⅷ٣५", ".,;:!?'’\"()[]{}<>|/\\-_#@$%^&*+=~`", "🙂👩\u200d👧🏽\ufe0f", "\x00\x04\x13\x7f\x9f",
]  # fmt: skip
# Of Python's Unicode, which must not be newer than that of `tokenizers`.
ASSIGNED = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]


def random_text(rng: random.Random, added: list[str]) -> str:
    """One to ten parts: words, spaces, characters of one alphabet or of all, added tokens, and pieces of them."""
    parts = []
    for _ in range(rng.randint(1, 10)):
        match rng.choice("wwwssaaaart"):
            case "w":
                parts.append(" " * rng.randint(0, 1) + rng.choice(WORDS))
            case "s":
                parts += rng.choices(SPACES, k=rng.randint(1, 4))
            case "a":
                parts += rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 6))
            case "r":
                parts += rng.choices(ASSIGNED, k=rng.randint(1, 4))
            case "t":
                parts.append(rng.choice(added)[: rng.choice([None, None, -1])])
    return "".join(parts)


def test_random_texts_have_the_ids_of_the_reference(case):
    """As whole texts, with added tokens, and as the continuation of a text, without. Decoded texts are equal too."""
    rng, added = random.Random(SEED), [entry["content"] for entry in case.content["added_tokens"]]
    print(f"seed {SEED}, {TEXTS} texts")
    with_added = 0
    for _ in range(TEXTS):
        text = random_text(rng, added)
        ids, message = reference_ids(case.theirs, text), f"seed {SEED}: {text!r}"
        assert case.ours.encode_with_added(text) == ids, message
        assert case.ours.decode_with_added(ids) == case.theirs.decode(ids, skip_special_tokens=False), message
        plain = case.ours.encode(text)
        assert plain == reference_ids(case.plain, " " + text), message
        assert not set(plain) & set(case.ours.config.added.values()), message
        with_added += bool(set(ids) & set(case.ours.config.added.values()))
    assert with_added > TEXTS / 10


def test_random_ids_have_the_text_of_the_reference(case):
    """1,000 rows, seed 1, with bytes of cut characters and ids beyond the vocabulary."""
    rng, size = random.Random(1), len(case.ours)
    assert size == case.theirs.get_vocab_size() == max(case.theirs.get_vocab().values()) + 1
    single_bytes = [i for i, token in case.ours.tokens.items() if len(token) == 1]
    pools = [range(size + 20), single_bytes, list(case.ours.config.added.values())]
    for _ in range(1000):
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 15))]
        assert case.ours.decode_with_added(ids) == case.theirs.decode(ids, skip_special_tokens=False), ids
        line = " ".join(case.theirs.decode(ids, skip_special_tokens=True).split())
        assert case.ours.decode([ids, []]) == [line, ""], ids


def test_captions(case):
    """Texts continue another one, several are encoded at once, and decoded texts have one line."""
    texts = ["a man riding two horses", "the cat", "日本語"]
    rows = case.ours.encode(texts)
    assert rows == [case.ours.encode(text) for text in texts]
    prompt = case.ours.encode_with_added("a video of")
    assert prompt + rows[0] == reference_ids(case.theirs, "a video of a man riding two horses")
    assert case.ours.decode([prompt + row for row in rows]) == [f"a video of {text}" for text in texts]
    assert case.ours.decode([case.ours.encode("two\n\nlines ")]) == ["two lines"]
    assert case.ours.encode([]) == [] == case.ours.decode([])
    first = case.theirs.encode("a").ids[0]
    assert case.ours.bos_id() == (first if first in case.ours.config.added.values() else -1)


# ----------------------------------------------------------------------------------- published ids


@pytest.mark.parametrize("name", ["smolvlm2", "qwen2.5", "qwen3", "llama3.2"])
def test_published_ids(real, name):
    """15 texts that contain every special case, made with tokenizers 0.23.3; for SmolVLM2 also the 128 texts of [2]."""
    folder = real / "tokenizers"
    ours = BPETokenizer(read_bpe_config(folder / name / "tokenizer.json"))
    cases = json.loads((folder / "golden.json").read_text())["cases"]
    cases = [{"text": golden["text"]} | golden[name] for golden in cases]
    if name == "smolvlm2":
        cases += json.loads((folder / name / "expected.json").read_text())["fixtures"]
    assert len(cases) == (143 if name == "smolvlm2" else 15)
    for golden in cases:
        assert ours.encode_with_added(golden["text"]) == golden["ids"], golden["text"]
        assert ours.decode_with_added(golden["ids"]) == golden["decoded"], golden["text"]


# ------------------------------------------------------------------------------------------ merges


def naive_merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """One merge at a time, with all pairs ranked anew."""
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False)) if pair in ranks]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


def test_merges_equal_naive_ones():
    """3,000 words of a and b, seed 2, with pairs in random order: a merge can lead to a pair of lower rank."""
    rng, differs = random.Random(2), 0
    for _ in range(3000):
        tokens = ["a", "b", *("".join(rng.choices("ab", k=rng.randint(2, 4))) for _ in range(4))]
        pairs = [*dict.fromkeys((rng.choice(tokens), rng.choice(tokens)) for _ in range(rng.randint(0, 20)))]
        ranks, word = {pair: rank for rank, pair in enumerate(pairs)}, rng.choices("ab", k=rng.randint(0, 12))
        expected = naive_merge(word, ranks)
        assert merge(word, ranks) == expected, (word, ranks)
        differs += naive_merge(word, {pair: -rank for pair, rank in ranks.items()}) != expected
    assert differs > 300


# ---------------------------------------------------------------------------------- files refused


def change(content: dict, path: tuple, value: object) -> dict:
    """A copy with another value at a path of keys and indices; ... removes it."""
    content = copy.deepcopy(content)
    *parents, last = path
    target = content
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return content


STEPS = "pre_tokenizer", "pretokenizers"
TEMPLATE = "post_processor", "processors", 1
QWEN3_5 = QWEN.replace(r"\p{L}+", r"[\p{L}\p{M}]+")
UNSUPPORTED = [
    (("version",), "2.0", "version: found '2.0', supported: '1.0'"),
    (("truncation",), {"max_length": 5}, "truncation: found {'max_length': 5}, supported: None"),
    (("padding",), {}, "padding: found {}, supported: None"),
    (("something",), 1, "something: found 1, supported: None"),
    (("normalizer",), {"type": "NFKC"}, "normalizer.type: found 'NFKC', supported: 'NFC'"),
    (("normalizer",), "NFC", "normalizer: found 'NFC', supported: None, {'type': 'NFC'}"),
    (("pre_tokenizer",), None, "pre_tokenizer: found None"),
    (("pre_tokenizer", "type"), "Whitespace", "pre_tokenizer.type: found 'Whitespace', supported: 'Sequence'"),
    (STEPS, [], "pre_tokenizer.pretokenizers: found []"),
    ((*STEPS, 0, "pattern"), {"Regex": QWEN3_5}, "pre_tokenizer.pretokenizers[0].pattern.Regex: found"),
    ((*STEPS, 0, "pattern"), {"String": " "}, "pre_tokenizer.pretokenizers[0].pattern.Regex: found None"),
    ((*STEPS, 0, "behavior"), "Removed", "pretokenizers[0].behavior: found 'Removed', supported: 'Isolated'"),
    ((*STEPS, 0, "invert"), True, "pretokenizers[0].invert: found True, supported: False"),
    ((*STEPS, 0), {"type": "Digits", "individual_digits": False}, "pretokenizers[0].individual_digits: found False"),
    ((*STEPS, 0, "type"), "Punctuation", "pre_tokenizer.pretokenizers[0]"),
    ((*STEPS, 1, "add_prefix_space"), True, "pretokenizers[1].add_prefix_space: found True, supported: False"),
    ((*STEPS, 1, "use_regex"), 1, "pretokenizers[1].use_regex: found 1, supported: None, True, False"),
    (("model", "type"), "Unigram", "model.type: found 'Unigram', supported: 'BPE'"),
    (("model", "dropout"), 0.1, "model.dropout: found 0.1, supported: None"),
    (("model", "unk_token"), "<unk>", "model.unk_token: found '<unk>'"),
    (("model", "continuing_subword_prefix"), "##", "model.continuing_subword_prefix: found '##'"),
    (("model", "end_of_word_suffix"), "</w>", "model.end_of_word_suffix: found '</w>'"),
    (("model", "fuse_unk"), True, "model.fuse_unk: found True"),
    (("model", "byte_fallback"), True, "model.byte_fallback: found True"),
    (("model", "ignore_merges"), "yes", "model.ignore_merges: found 'yes'"),
    (("model", "vocab"), ..., "model: field 'vocab' is missing"),
    (("model", "vocab", "Ġ"), -1, "model.vocab: 'Ġ' has id -1"),
    (("model", "vocab", "Ġ"), True, "model.vocab: 'Ġ' has id True"),
    (("model", "vocab", "a"), 0, "has id 0, expected a token"),
    (("model", "vocab", "a b"), 9999, "model.vocab: 'a b' has id 9999"),
    (("model", "vocab", "Ġa"), ..., "model.merges["),
    (("model", "merges"), {}, "field 'merges'"),
    (("model", "merges", 0), "Ġ a b", "model.merges[0]: found 'Ġ a b'"),
    (("model", "merges", 0), ["Ġ"], "model.merges[0]: found ['Ġ']"),
    (("model", "merges", 0), [["Ġ"], "a"], "model.merges[0]"),
    (("model", "merges", 0), ["Ġ", "unknown"], "model.merges[0]: found ['Ġ', 'unknown']"),
    (("model", "merges", 0), None, "model.merges[0]: found None"),
    (("model", "merges", 3), ["Ġ", "a"], "model.merges["),
    (("added_tokens",), None, "added_tokens: found None"),
    (("added_tokens", 0), "<x>", "added_tokens[0]: found '<x>'"),
    (("added_tokens", 0, "id"), 1.5, "added_tokens[0]: field 'id'"),
    (("added_tokens", 0, "id"), 2**40, "added_tokens[0]: id is"),
    (("added_tokens", 0, "id"), 7, "added_tokens[0]: content is '<|endoftext|>', id is 7"),
    (("added_tokens", 0, "content"), "", "added_tokens[0]: content is ''"),
    (("added_tokens", 0, "content"), "a", "added_tokens[0]: content is 'a'"),
    (("added_tokens", 0, "content"), "\ud800", "added_tokens[0]: content is"),
    (("added_tokens", 1, "content"), "<|endoftext|>", "added_tokens[1]: content is '<|endoftext|>'"),
    (("added_tokens", 1, "lstrip"), True, "added_tokens[1].lstrip: found True, supported: False"),
    (("added_tokens", 1, "rstrip"), True, "added_tokens[1].rstrip: found True"),
    (("added_tokens", 1, "normalized"), True, "added_tokens[1].normalized: found True"),
    (("added_tokens", 1, "single_word"), True, "added_tokens[1].single_word: found True"),
    (("added_tokens", 1, "special"), 1, "added_tokens[1].special: found 1"),
    (("post_processor",), {"type": "RobertaProcessing"}, "post_processor.type: found 'RobertaProcessing'"),
    ((*TEMPLATE, "single", 0), {"Sequence": {"id": "A", "type_id": 0}}, "post_processor.processors[1].single[0]"),
    ((*TEMPLATE, "single", 0, "SpecialToken", "id"), "<s>", "post_processor: special_tokens"),
    ((*TEMPLATE, "single", 0, "SpecialToken", "id"), [], "post_processor: special_tokens"),
    ((*TEMPLATE, "special_tokens", "<|endoftext|>", "ids"), [3, 4], "post_processor: special_tokens"),
    (("decoder",), None, "decoder: found None"),
    (("decoder", "type"), "WordPiece", "decoder.type: found 'WordPiece', supported: 'ByteLevel'"),
]


@pytest.fixture(scope="module")
def tiny() -> dict[str, dict]:
    return {kind: make_tokenizer_json(kind) for kind in TINY}


@pytest.mark.parametrize("path, value, words", UNSUPPORTED, ids=range(len(UNSUPPORTED)))
def test_unsupported_fields_are_named(tiny, tmp_path, path, value, words):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(change(tiny["tiny Llama 3"], path, value)))
    with refused(f"{file}: ", words):
        read_bpe_config(file)


def test_a_template_at_the_end_is_refused(tiny, tmp_path):
    """A post-processor that puts a token after the text, too."""
    file = tmp_path / "tokenizer.json"
    single = tiny["tiny Llama 3"]["post_processor"]["processors"][1]["single"]
    file.write_text(json.dumps(change(tiny["tiny Llama 3"], (*TEMPLATE, "single"), [*single, single[0]])))
    with refused(f"{file}: post_processor.processors[1].single: found"):
        read_bpe_config(file)


NO_EFFECT = {"trim_offsets", "add_prefix_space", "use_regex", "pair"}  # of these `tokenizers` refuses more values


def random_damage(rng: random.Random, content: dict) -> tuple[str, bytes]:
    """The name of a top-level field and the file with a wrong value within it, or "" and the beginning of a file."""
    if rng.random() < 0.1:
        data = json.dumps(content).encode()
        return "", data[: rng.randrange(len(data))]
    path, node = [], content
    while isinstance(node, dict | list) and node and (not path or rng.random() < 0.8):
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path, node = [*path, key], node[key]
    value = rng.choice([..., None, True, -3, 2.5, 10**30, "", "a", "\n", [], {}, ["a", "b", "c"], {"type": "x"}])
    return "" if NO_EFFECT & set(path) else path[0], json.dumps(change(content, tuple(path), value)).encode()


def test_100_damaged_files_are_refused(tiny, tmp_path):
    """Seed 3. A file that is accepted nevertheless must give the ids of `tokenizers` for 30 texts."""
    rng, file, num_refused, accepted = random.Random(3), tmp_path / "tokenizer.json", 0, 0
    while num_refused < 100:
        name, data = random_damage(rng, tiny[rng.choice(TINY)])
        file.write_bytes(data)
        try:
            ours = BPETokenizer(read_bpe_config(file))
        except InputError as error:
            num_refused += 1
            assert str(error).startswith(f"{file}: ") and str(error).isprintable() and name in str(error)
            continue
        if not name:
            continue
        accepted += 1
        theirs = tokenizers.Tokenizer.from_file(str(file))
        for _ in range(30):
            text = random_text(rng, ["<|im_start|>", "<image>"])
            assert ours.encode_with_added(text) == reference_ids(theirs, text), data
    assert accepted < 50
