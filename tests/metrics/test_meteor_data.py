"""METEOR's tables: reading them, compiling the paraphrases, the cache of the compiled file, damaged and missing files.

All tests use small tables and a cache folder of their own.
"""

import gzip
import io
import os
import re
import zipfile
from pathlib import Path

import pytest

from metrics import InputError, meteor_data, meteor_paraphrases, score
from tests.metrics.small_tables import PAIRS


def reload(**options):
    meteor_data.last_loaded.clear()
    return meteor_data.load(**options)


def compiled_files(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.*"))


def decode_pairs(paraphrases) -> list[tuple[str, str]]:
    """The entries of compiled Paraphrases as strings, recovered through `find_phrases`."""
    captions = [text.split() for pair in PAIRS for text in pair]
    caption, start, length, node = paraphrases.find_phrases(captions)
    phrases = {n: " ".join(captions[c][s : s + k]) for c, s, k, n in zip(caption, start, length, node, strict=True)}
    return [(phrases[left], phrases[right]) for left, right in zip(paraphrases.left, paraphrases.right, strict=True)]


def test_compiled_once_and_reused(small_tables, tmp_path, monkeypatch):
    messages = []
    assert decode_pairs(reload(progress=messages.append).paraphrases) == PAIRS
    (compiled,) = compiled_files(tmp_path)  # and nothing beside it
    assert str(compiled) in messages[0]
    monkeypatch.setattr(meteor_paraphrases, "compile_table", lambda path: pytest.fail("compiled again"))
    assert decode_pairs(reload(progress=messages.append).paraphrases) == PAIRS and len(messages) == 1


def test_damage_is_detected_and_repaired(small_tables, tmp_path):
    """The compiled file cut in half, empty, or with a flipped bit in the middle."""
    reload()
    (compiled,) = compiled_files(tmp_path)
    content = compiled.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for data in (content[:middle], b"", flipped):
        compiled.write_bytes(data)
        assert decode_pairs(reload().paraphrases) == PAIRS and compiled.read_bytes() == content
    compiled.unlink()
    os.mkfifo(compiled)  # reading it would wait for ever
    assert decode_pairs(reload().paraphrases) == PAIRS and compiled.read_bytes() == content


def test_changed_source_is_compiled_again(small_tables):
    """The second time without a newline at its end."""
    reload()
    text = gzip.decompress((small_tables / meteor_data.PARAPHRASES).read_bytes())
    (small_tables / meteor_data.PARAPHRASES).write_bytes(gzip.compress(b"0.5\nkid\nexile\n" + text.removesuffix(b"\n")))
    assert decode_pairs(reload().paraphrases) == [("kid", "exile"), *PAIRS]


def test_failed_write_leaves_no_file_and_the_tables_load(small_tables, tmp_path, monkeypatch):
    def fail_replace(*_):
        raise OSError(28, "No space left on device")

    messages = []
    monkeypatch.setattr(meteor_paraphrases.os, "replace", fail_replace)
    assert decode_pairs(reload(progress=messages.append).paraphrases) == PAIRS
    assert compiled_files(tmp_path) == [] and "No space left" in messages[-1]


def odd_zip() -> bytes:
    """A file in it is compressed in a way that Python does not know."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("function/english.words", "1\nthe\n")
    return re.sub(b"(PK\x03\x04.{4}|PK\x01\x02.{6})\x08", b"\\1\x09", buffer.getvalue(), flags=re.S)


@pytest.mark.parametrize(("name", "content"), [
    (meteor_data.JAR, b"no zip"),
    (meteor_data.JAR, odd_zip()),
    (meteor_data.PARAPHRASES, gzip.compress(b"0.5\nleft\n", mtime=0)),
    (meteor_data.PARAPHRASES, gzip.compress(b"0.5\nleft\nright\n" * 50, mtime=0)[:-9]),
    (meteor_data.PARAPHRASES, gzip.compress(b"", mtime=0)),
])
def test_damaged_tables_are_named(small_tables, tmp_path, name, content):
    (small_tables / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        reload()
    assert str(caught.value).startswith(str(small_tables / name)) and "\n" not in str(caught.value)
    assert compiled_files(tmp_path) == []


@pytest.mark.parametrize(("missing", "left"), [(meteor_data.PARAPHRASES, "synonym"), (meteor_data.JAR, "paraphrase")])
def test_remaining_matchers_name_the_score(small_tables, missing, left):
    (small_tables / missing).unlink()
    scores = score({"v": ["a lot of cars"]}, {"v": "many automobiles"}, metrics=["METEOR"])
    assert list(scores.corpus) == list(scores.per_video["v"]) == [f"METEOR[exact,stem,{left}]"]
    assert f"meteor:1.5[exact,stem,{left}]" in scores.signature
