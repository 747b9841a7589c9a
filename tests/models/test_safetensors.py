"""Reading and writing safetensors files, against the safetensors package and with damaged files.

Tensors must be equal to the bit. Every random choice has its seed in the test.
"""

import json
import math
import os
import random
import struct

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from common.errors import InputError
from models.safetensors import DTYPES, MAX_HEADER, read_metadata, read_safetensors, write_safetensors
from tests.common.helpers import refused, run_python
from tests.models.helpers import assert_bit_equal


def examples() -> dict[str, torch.Tensor]:
    """A tensor of each dtype (seed 0); special floats; no elements, no axes, many axes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer.{name}": (torch.randn(3, 5, generator=generator) * 50).to(dtype) for name, dtype in DTYPES.items()
    }
    tensors["special"] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    tensors["empty"] = torch.zeros(0, 4, dtype=torch.float16)
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.float64)
    tensors["deep"] = torch.ones((1,) * 9, dtype=torch.bfloat16)
    tensors["größe / 'x'"] = torch.tensor([True])
    return tensors


def container(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------- reference: safetensors


def test_reads_files_of_the_package(tmp_path):
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(examples(), path, metadata={"format": "pt", "a": "ü\n"})
    assert_bit_equal(read_safetensors(path), examples())
    assert read_metadata(path) == {"format": "pt", "a": "ü\n"}


def test_the_package_reads_our_files(tmp_path):
    path = tmp_path / "ours.safetensors"
    write_safetensors(path, examples(), {"format": "pt", "a": "ü\n"})
    assert_bit_equal(safetensors.torch.load_file(path), examples())
    assert_bit_equal(read_safetensors(path), examples())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "ü\n"} == read_metadata(path)


@pytest.mark.parametrize("tensors", [{}, {"ü": torch.arange(7.0)}])
def test_same_bytes_as_the_package(tmp_path, tensors):
    write_safetensors(tmp_path / "a", tensors)
    safetensors.torch.save_file(tensors, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_metadata(tmp_path / "a") == {}


def test_equal_input_gives_equal_bytes(tmp_path):
    write_safetensors(tmp_path / "a", examples(), {"x": "1", "y": "2"})
    reordered = dict(reversed(examples().items()))
    write_safetensors(tmp_path / "b", reordered, {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_written_tensors_are_aligned(tmp_path):
    write_safetensors(tmp_path / "a", examples())
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for item in json.loads(content[8 : 8 + length]).values():
        assert item["data_offsets"][0] % DTYPES[item["dtype"]].itemsize == 0


def test_layouts_and_gradients(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "strided": base[::2, 1::2], "wide": base[:1].expand(3, 6)}
    tensors["parameter"] = nn.Parameter(base)
    write_safetensors(tmp_path / "a", tensors)
    expected = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    assert_bit_equal(safetensors.torch.load_file(tmp_path / "a"), expected)


def test_unaligned_data(tmp_path):
    """A header without padding, as in the package's older files. Reference: the package."""
    tensors = {"w": torch.arange(5.0), "v": torch.arange(3, dtype=torch.bfloat16)}
    raw = safetensors.torch.save(tensors)
    length = int.from_bytes(raw[:8], "little")
    for spaces in range(8):
        text = raw[8 : 8 + length].rstrip() + b" " * spaces
        path = tmp_path / f"{spaces}"
        path.write_bytes(container(text, raw[8 + length :]))
        read = read_safetensors(path)
        assert_bit_equal(read, tensors)
        assert all(t.data_ptr() % t.dtype.itemsize == 0 for t in read.values())


def test_order_of_header_and_data_may_differ(tmp_path):
    """Valid, but easily refused by mistake: an empty tensor at the offset of another one."""
    header = {"b": entry("U8", [2], 1, 3), "a": entry("U8", [1], 0, 1), "e": entry("U8", [0], 0, 0)}
    (tmp_path / "f").write_bytes(container(header, bytes([7, 8, 9])))
    read = read_safetensors(tmp_path / "f")
    assert {name: t.tolist() for name, t in read.items()} == {"b": [8, 9], "a": [7], "e": []}
    assert_bit_equal(read, safetensors.torch.load_file(tmp_path / "f"))


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}])
def test_the_writer_refuses_metadata_that_is_not_text(tmp_path, metadata):
    with pytest.raises(ValueError):
        write_safetensors(tmp_path / "a", {}, metadata)


@pytest.mark.parametrize("tensors", [{"c": torch.zeros(2, dtype=torch.complex64)}, {"__metadata__": torch.zeros(2)}])
def test_the_writer_refuses_unsupported_tensors(tmp_path, tensors):
    with pytest.raises(ValueError, match=next(iter(tensors))):
        write_safetensors(tmp_path / "a", tensors)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ damaged and malicious files

F32 = entry("F32", [2], 0, 8)
REFUSED = {  # the fault: (bytes of the file, a word of the error)
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"\0" * 7, "7 bytes"),
    "length beyond the file": (struct.pack("<Q", 100) + b"{}", "header of at most 2"),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", "header of at most 2"),
    "length 0": (b"\0" * 8, "JSON object"),
    "not UTF-8": (container(b'{"\xff": 1}'), "UTF-8"),
    "UTF-16": (container('{"a": 1}'.encode("utf-16")), "JSON"),
    "not JSON": (container(b'{"a": '), "line 1 column 7"),
    "a list": (container(b"[]"), "JSON object"),
    "space before": (container(b" {}"), "JSON object"),
    "deep": (container(b'{"a": ' + b"[" * 200_000), "JSON"),
    "deep dtype": (
        container(b'{"w":{"shape":[2],"data_offsets":[0,8],"dtype":' + b"[" * 900 + b"]" * 900 + b"}}", bytes(8)),
        "dtype",
    ),
    "long number": (container(b'{"a": ' + b"9" * 5000 + b"}"), "digits"),
    "name twice": (
        container(b'{"w":%s,"w":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
        "'w' occurs twice",
    ),
    "field twice": (
        container(b'{"w":{"dtype":"F32","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
        "'dtype' occurs twice",
    ),
    "metadata a list": (container({"__metadata__": []}), "__metadata__"),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry a string": (container({"w": "F32"}), "'w'"),
    "no offsets": (container({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)), "data_offsets"),
    "one more field": (container({"w": F32 | {"x": 1}}, bytes(8)), "data_offsets"),
    "8-bit floats": (container({"w": entry("F8_E4M3", [8], 0, 8)}, bytes(8)), "F8_E4M3"),
    "dtype a list": (container({"w": F32 | {"dtype": ["F32"]}}, bytes(8)), "dtype"),
    "negative size": (container({"w": entry("F32", [-2], 0, 8)}, bytes(8)), "[-2]"),
    "size true": (container({"w": entry("U8", [True], 0, 1)}, bytes(1)), "[True]"),
    "size 2.0": (container({"w": entry("F32", [2.0], 0, 8)}, bytes(8)), "[2.0]"),
    "size a word": (container({"w": entry("F32", ["2"], 0, 8)}, bytes(8)), "['2']"),
    "shape a number": (container({"w": F32 | {"shape": 2}}, bytes(8)), "shape"),
    "2**96 elements": (container({"w": entry("U8", [2**32] * 3, 0, 0)}), "2**63"),
    "2**64 elements, which overflow to 0": (container({"w": entry("U8", [2**32] * 2, 0, 0)}), "2**63"),
    "0 x 2**80": (container({"w": entry("U8", [0, 2**40, 2**40], 0, 0)}), "2**63"),
    "65 axes": (container({"w": entry("U8", [1] * 65, 0, 1)}, bytes(1)), "64"),
    "offsets behind the file": (container({"w": entry("F32", [2], 8, 16)}, bytes(8)), "hole"),
    "offsets backwards": (container({"w": entry("F32", [2], 8, 0)}, bytes(8)), "[8, 0]"),
    "offset negative": (container({"w": entry("F32", [2], -8, 0)}, bytes(8)), "[-8, 0]"),
    "offset true": (container({"w": entry("U8", [1], False, True)}, bytes(1)), "[False, True]"),
    "three offsets": (container({"w": F32 | {"data_offsets": [0, 8, 8]}}, bytes(8)), "[0, 8, 8]"),
    "size and offsets differ": (container({"w": entry("F32", [3], 0, 8)}, bytes(8)), "+ 12]"),
    "hole": (container({"a": F32, "b": entry("F32", [2], 12, 20)}, bytes(20)), "hole"),
    "overlap": (container({"a": F32, "b": entry("F32", [2], 4, 12)}, bytes(12)), "overlap"),
    "equal offsets": (container({"a": F32, "b": F32}, bytes(8)), "overlap"),
    "cut short": (container({"w": F32}, bytes(7)), "cut short"),
    "bytes left over": (container({"w": F32}, bytes(9)), "left over"),
    "bytes and no tensor": (container({}, bytes(1)), "left over"),
    "terminal escapes": (container({"\x1b[2J\r\n\u202e\ud800": entry("X", [], 0, 0)}), r"\x1b[2J"),
    "a name of a megabyte": (container({"n" * 1_000_000: entry("X", [], 0, 0)}), "nnn"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_invalid_files_are_refused(tmp_path, fault):
    content, word = REFUSED[fault]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (read_safetensors, read_metadata):
        with refused(str(path), word):
            read(path)


def test_a_header_above_the_limit_is_refused(tmp_path):
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1) + b"{}")
        file.truncate(MAX_HEADER + 100)  # sparse: takes no space
    with refused(str(path), str(MAX_HEADER)):
        read_safetensors(path)


def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe"):
        with refused(str(path), "expected a file"):
            read_safetensors(path)


def damaged(good: bytes, seed: int) -> bytes:
    """A safetensors file with one of five kinds of damage."""
    rng = random.Random(seed)
    length = int.from_bytes(good[:8], "little")
    header, data = good[8 : 8 + length], good[8 + length :]
    match seed % 5:
        case 0:  # a few bytes of the header
            bad = bytearray(good)
            for _ in range(rng.randint(1, 3)):
                bad[8 + rng.randrange(length)] = rng.randrange(256)
            return bytes(bad)
        case 1:  # a character of JSON's syntax, so that the header often stays JSON
            bad = bytearray(good)
            bad[8 + rng.randrange(length)] = rng.choice(b'0123456789"{}[],:')
            return bytes(bad)
        case 2:  # cut short
            return good[: rng.randrange(len(good))]
        case 3:  # a wrong header length
            wrong = rng.choice([rng.randrange(len(good)), length + rng.randint(-9, 9), 2**63])
            return struct.pack("<Q", wrong) + good[8:]
        case _:  # a field of a tensor is that of another tensor, or invalid, or reversed
            entries = json.loads(header)
            name, other = rng.sample(sorted(entries), 2)
            key = rng.choice(["dtype", "shape", "data_offsets"])
            invalid = [-1, True, None, 1.5, 2**64, "F64", [], [0, 0], [2**62] * 2, [3, 5, 1], {}]
            choices = [entries[other][key], rng.choice(invalid), entries[name][key][::-1]]
            entries[name][key] = rng.choice(choices)
            return container(entries, data)


def naive_read(content: bytes) -> dict[str, torch.Tensor]:
    """The format in plain steps, without checks: the reference for damaged files."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, item in header.items():
        begin, end = item["data_offsets"]
        part = torch.tensor(list(content[8 + length :][begin:end]), dtype=torch.uint8)
        tensors[name] = part.view(DTYPES[item["dtype"]]).reshape(item["shape"])
    return tensors


def test_300_damaged_files(tmp_path):
    """Seeds 0 to 299: an InputError of one line, or exactly the tensors of naive_read."""
    path = tmp_path / "damaged.safetensors"
    good = safetensors.torch.save(examples())
    errors = 0
    for seed in range(300):
        content = damaged(good, seed)
        path.write_bytes(content)
        try:
            tensors = read_safetensors(path)
        except InputError as error:
            errors += 1
            assert str(path) in str(error) and str(error).isprintable(), (seed, str(error))
        else:
            assert_bit_equal(tensors, naive_read(content))
    assert 200 < errors < 295, errors  # both occur


# ------------------------------------------------------------------------------------ memory


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_reading_maps_the_file_without_copies(tmp_path):
    """200 MB of tensors need less than 20 MB until they are used. Writing to a tensor does not change the file."""
    path = tmp_path / "big.safetensors"
    count, size = 50, 4_000_000
    header = {f"w{i}": entry("F32", [size // 4], i * size, (i + 1) * size) for i in range(count)}
    with open(path, "wb") as file:
        text = json.dumps(header).encode()
        file.write(container(text + b" " * (-len(text) % 8)))
        file.truncate(file.tell() + count * size)
    code = """
import os, sys
from pathlib import Path
from models.safetensors import read_safetensors
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
tensors = read_safetensors(sys.argv[1])
mapped = resident()
for t in tensors.values(): t.sum()
touched = resident()
tensors["w0"].fill_(1)
del t
print(mapped - before, touched - before, read_safetensors(sys.argv[1])["w0"].any().item())
"""
    mapped, touched, changed = run_python(code, path).split()
    assert int(mapped) < 20e6
    assert int(touched) > 150e6  # so the measurement works
    assert changed == "False"


# --------------------------------------------------------------------------------- replacing


def test_replacing_a_memory_mapped_file(tmp_path):
    path = tmp_path / "w"
    write_safetensors(path, {"w": torch.ones(10_000)})
    old = read_safetensors(path)
    write_safetensors(path, {"w": torch.zeros(10_000)})
    assert old["w"].eq(1).all() and read_safetensors(path)["w"].eq(0).all()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with refused(f"cannot write {tmp_path / 'missing' / 'w'}: "):
        write_safetensors(tmp_path / "missing" / "w", {})
