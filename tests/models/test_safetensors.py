"""Weights on disk, against the safetensors package and against damage. No tolerance anywhere:
bits are equal or they are not. Every random choice has its seed in the test."""

import hashlib
import json
import math
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import weights
from weights import InputError, copy_strict, field, read_safetensors, write_safetensors

ROOT = Path(weights.__file__).parent


def examples() -> dict[str, torch.Tensor]:
    """One tensor of each dtype (seed 0), special floats, no elements, no axes, many axes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer.{name}": (torch.randn(3, 5, generator=generator) * 50).to(dtype)
        for name, dtype in weights.DTYPES.items()
    }
    tensors["special"] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    tensors["empty"] = torch.zeros(0, 4, dtype=torch.float16)
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.float64)
    tensors["deep"] = torch.ones((1,) * 9, dtype=torch.bfloat16)
    tensors["größe / 'x'"] = torch.tensor([True])
    return tensors


def assert_bit_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name in expected:
        a, b = found[name], expected[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        # As bytes: NaN != NaN, and 0.0 == -0.0.
        assert a.contiguous().reshape(-1).view(torch.uint8).equal(
            b.contiguous().reshape(-1).view(torch.uint8)
        ), name


def one_line(error: pytest.ExceptionInfo, *words: str):
    text = str(error.value)
    assert text.isprintable(), text
    for word in words:
        assert word in text, text


def container(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------- reference: safetensors


def test_reads_what_the_package_writes(tmp_path):
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(examples(), path, metadata={"format": "pt", "a": "ü\n"})
    assert_bit_equal(read_safetensors(path), examples())
    assert weights.read_metadata(path) == {"format": "pt", "a": "ü\n"}


def test_the_package_reads_what_we_write(tmp_path):
    path = tmp_path / "ours.safetensors"
    write_safetensors(path, examples(), {"format": "pt", "a": "ü\n"})
    assert_bit_equal(safetensors.torch.load_file(path), examples())
    assert_bit_equal(read_safetensors(path), examples())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "ü\n"} == weights.read_metadata(path)


@pytest.mark.parametrize("tensors", [{}, {"ü": torch.arange(7.0)}])
def test_same_bytes_as_the_package(tmp_path, tensors):
    write_safetensors(tmp_path / "a", tensors)
    safetensors.torch.save_file(tensors, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert weights.read_metadata(tmp_path / "a") == {}


def test_same_input_same_bytes(tmp_path):
    write_safetensors(tmp_path / "a", examples(), {"x": "1", "y": "2"})
    backwards = dict(reversed(examples().items()))
    write_safetensors(tmp_path / "b", backwards, {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_we_write_is_aligned(tmp_path):
    write_safetensors(tmp_path / "a", examples())
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for item in json.loads(content[8 : 8 + length]).values():
        assert item["data_offsets"][0] % weights.DTYPES[item["dtype"]].itemsize == 0


def test_layouts_and_gradients(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "strided": base[::2, 1::2], "wide": base[:1].expand(3, 6)}
    tensors["parameter"] = nn.Parameter(base)
    write_safetensors(tmp_path / "a", tensors)
    expected = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    assert_bit_equal(safetensors.torch.load_file(tmp_path / "a"), expected)


def test_unaligned_data(tmp_path):
    """A header without padding: the package's older files look so. Reference: the package."""
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
    """Legal and easy to refuse by mistake: an empty tensor where another one begins."""
    header = {"b": entry("U8", [2], 1, 3), "a": entry("U8", [1], 0, 1), "e": entry("U8", [0], 0, 0)}
    (tmp_path / "f").write_bytes(container(header, bytes([7, 8, 9])))
    read = read_safetensors(tmp_path / "f")
    assert {name: t.tolist() for name, t in read.items()} == {"b": [8, 9], "a": [7], "e": []}
    assert_bit_equal(read, safetensors.torch.load_file(tmp_path / "f"))


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}])
def test_writer_refuses_metadata_that_is_no_text(tmp_path, metadata):
    with pytest.raises(ValueError):
        write_safetensors(tmp_path / "a", {}, metadata)


@pytest.mark.parametrize(
    "tensors", [{"c": torch.zeros(2, dtype=torch.complex64)}, {"__metadata__": torch.zeros(2)}]
)
def test_writer_refuses_what_the_format_cannot_hold(tmp_path, tensors):
    with pytest.raises(ValueError, match=next(iter(tensors))):
        write_safetensors(tmp_path / "a", tensors)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- damage and malice

F32 = entry("F32", [2], 0, 8)
REFUSED = {  # what is wrong: (the file's bytes, a word of the message)
    "nothing": (b"", "0 bytes"),
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
        container(
            b'{"w":{"shape":[2],"data_offsets":[0,8],"dtype":' + b"[" * 900 + b"]" * 900 + b"}}",
            bytes(8),
        ),
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
    "2**64 elements that wrap to 0": (container({"w": entry("U8", [2**32] * 2, 0, 0)}), "2**63"),
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
    "the same place twice": (container({"a": F32, "b": F32}, bytes(8)), "overlap"),
    "cut short": (container({"w": F32}, bytes(7)), "cut short"),
    "bytes left over": (container({"w": F32}, bytes(9)), "left over"),
    "bytes and no tensor": (container({}, bytes(1)), "left over"),
    "terminal escapes": (container({"\x1b[2J\r\n\u202e\ud800": entry("X", [], 0, 0)}), r"\x1b[2J"),
    "a name of a megabyte": (container({"n" * 1_000_000: entry("X", [], 0, 0)}), "nnn"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refuses(tmp_path, fault):
    content, word = REFUSED[fault]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (read_safetensors, weights.read_metadata):
        with pytest.raises(InputError) as error:
            read(path)
        one_line(error, str(path), word)
        assert len(str(error.value)) < 2100


def test_input_error_is_one_short_line():
    assert str(InputError("a\nb\x1b[2J\ud800\u202eß")) == r"a\nb\x1b[2J\ud800\u202eß"
    assert len(str(InputError("n" * 1_000_000))) < 2100


def test_refuses_a_header_above_the_cap(tmp_path):
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", weights.MAX_HEADER + 1) + b"{}")
        file.truncate(weights.MAX_HEADER + 100)  # sparse: takes no space
    with pytest.raises(InputError) as error:
        read_safetensors(path)
    one_line(error, str(path), str(weights.MAX_HEADER))


@pytest.mark.parametrize("read", [read_safetensors, weights.read_json, weights.sha256_of])
def test_refuses_what_is_no_file(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe"):
        with pytest.raises(InputError) as error:
            read(path)
        one_line(error, str(path), "expected a file")


def damaged(good: bytes, seed: int) -> bytes:
    """One of five kinds of damage to a safetensors file."""
    rng = random.Random(seed)
    length = int.from_bytes(good[:8], "little")
    header, data = good[8 : 8 + length], good[8 + length :]
    match seed % 5:
        case 0:  # a few bytes of the header
            bad = bytearray(good)
            for _ in range(rng.randint(1, 3)):
                bad[8 + rng.randrange(length)] = rng.randrange(256)
            return bytes(bad)
        case 1:  # a character that JSON knows, so that the text often stays JSON
            bad = bytearray(good)
            bad[8 + rng.randrange(length)] = rng.choice(b'0123456789"{}[],:')
            return bytes(bad)
        case 2:  # cut short
            return good[: rng.randrange(len(good))]
        case 3:  # the length lies
            lie = rng.choice([rng.randrange(len(good)), length + rng.randint(-9, 9), 2**63])
            return struct.pack("<Q", lie) + good[8:]
        case _:  # a field of one tensor is another's, or hostile, or moved
            entries = json.loads(header)
            one, other = rng.sample(sorted(entries), 2)
            key = rng.choice(["dtype", "shape", "data_offsets"])
            hostile = [-1, True, None, 1.5, 2**64, "F64", [], [0, 0], [2**62] * 2, [3, 5, 1], {}]
            choices = [entries[other][key], rng.choice(hostile), entries[one][key][::-1]]
            entries[one][key] = rng.choice(choices)
            return container(entries, data)


def as_the_header_says(content: bytes) -> dict[str, torch.Tensor]:
    """The format description in its plainest form, trusting the header. Reference for damage."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, item in header.items():
        begin, end = item["data_offsets"]
        part = torch.tensor(list(content[8 + length :][begin:end]), dtype=torch.uint8)
        tensors[name] = part.view(weights.DTYPES[item["dtype"]]).reshape(item["shape"])
    return tensors


def test_300_damaged_files(tmp_path):
    """Seeds 0..299: an InputError of one line, or exactly what the header says. Never else."""
    path = tmp_path / "damaged.safetensors"
    good = safetensors.torch.save(examples())
    refused = 0
    for seed in range(300):
        content = damaged(good, seed)
        path.write_bytes(content)
        try:
            tensors = read_safetensors(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and str(error).isprintable(), (seed, str(error))
        else:
            assert_bit_equal(tensors, as_the_header_says(content))
    assert 200 < refused < 295, refused  # both outcomes were met


# ------------------------------------------------------------------------------------ memory


def run_python(code: str, *arguments: str | Path) -> str:
    """Runs code in a fresh interpreter, for what belongs to a process: its memory, its limits."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux for its memory")
def test_reading_maps_and_copies_nothing(tmp_path):
    """200 MB of tensors cost less than 20 MB until touched; writing to one spares the file."""
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
from weights import read_safetensors
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
    assert int(touched) > 150e6  # the measure itself can tell
    assert changed == "False"


# ---------------------------------------------------------------------------- atomic writing


def test_failure_inside_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    for failure in (RuntimeError("boom"), KeyboardInterrupt(), OSError("a socket, not this file")):
        with pytest.raises(type(failure)) as error:
            with weights.replace_atomically(path) as file:
                file.write(b"new" * 100_000)
                raise failure
        assert error.value is failure
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_of_the_system_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError) as error:
        write_safetensors(path, examples())
    one_line(error, f"cannot write {path}: No space left on device")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk(tmp_path):
    """A limit on file size stands for a full disk. torch.save reports it as a RuntimeError."""
    pytest.importorskip("resource")
    (tmp_path / "w").write_bytes(b"old")
    code = """
import resource, sys, torch, weights
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
def ours(): weights.write_safetensors(sys.argv[1], {"w": torch.zeros(1_000_000)})
def late(): weights.write_safetensors(sys.argv[1], {f"w{i}": torch.zeros(250) for i in range(150)})
def theirs():
    with weights.replace_atomically(sys.argv[1]) as file: torch.save(torch.zeros(1_000_000), file)
for save in ours, late, theirs:
    try: save()
    except weights.InputError as error: print(error)
"""
    lines = run_python(code, tmp_path / "w").splitlines()
    assert lines == [f"cannot write {tmp_path / 'w'}: File too large"] * 3
    assert (tmp_path / "w").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "w"]


def test_the_order_that_survives_a_power_cut(tmp_path, monkeypatch):
    """Data to the disk, then the rename, then the folder [2 in weights.py]."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    write_safetensors(tmp_path / "w", examples())
    assert calls == ["fsync", "replace", "fsync"]


def test_target_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "w", tmp_path / "folder"):
        with pytest.raises(InputError) as error:
            write_safetensors(path, {})
        one_line(error, f"cannot write {path}: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_link_stays_a_link_and_rights_follow_the_umask(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_safetensors(tmp_path / "link", examples())
    assert (tmp_path / "link").is_symlink()
    assert_bit_equal(read_safetensors(tmp_path / "real"), examples())
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_replacing_a_file_that_is_mapped(tmp_path):
    path = tmp_path / "w"
    write_safetensors(path, {"w": torch.ones(10_000)})
    old = read_safetensors(path)
    write_safetensors(path, {"w": torch.zeros(10_000)})
    assert old["w"].eq(1).all() and read_safetensors(path)["w"].eq(0).all()


def test_sha256(tmp_path):
    """Reference: hashlib over the whole, 2.5 MB of seed 0."""
    content = random.Random(0).randbytes(2_500_000)
    (tmp_path / "f").write_bytes(content)
    assert weights.sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()


# -------------------------------------------------------------------------- JSON and its fields


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "line 1 column 1"),
        (b'{\n "a": 1,\n "b" 2}', "line 3 column 6"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[1]", "[1]"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_read_json_refuses(tmp_path, content, word):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        weights.read_json(path)
    one_line(error, str(path), word)


def test_field():
    config = {"n": 3, "x": 0.5, "s": "a", "b": True, "l": [1], "d": {}, "null": None}
    for name, kind in {"n": int, "x": float, "s": str, "b": bool, "l": list, "d": dict}.items():
        assert field(config, name, kind, "f") is config[name]
    number = field(config, "n", float, "f")
    assert number == 3.0 and type(number) is float
    assert field(config, "missing", int, "f", 7) == 7
    assert field(config, "null", int, "f", None) is None
    assert field(config, "n", int, "f", 7) == 3


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (True, int, "a whole number, found True"),
        (True, float, "a number, found True"),
        (1.0, int, "a whole number, found 1.0"),
        ("1", int, "a whole number, found '1'"),
        (1, bool, "true or false, found 1"),
        (None, dict, "an object, found None"),
        ({}, list, "a list, found {}"),
        (math.nan, float, "a number, found nan"),
        (10**400, float, "a number, found 1000"),
        ("x" * 10_000, float, "a number, found 'xxx"),
    ],
)
def test_field_refuses(value, kind, expected):
    with pytest.raises(InputError) as error:
        field({"width": value}, "width", kind, "m/config.json")
    one_line(error, "m/config.json", "'width'", expected)
    assert len(str(error.value)) < 200
    if value is not None:  # a default is for absent fields, not for wrong ones
        with pytest.raises(InputError):
            field({"width": value}, "width", kind, "m/config.json", None)
    with pytest.raises(InputError, match="'width' is missing"):
        field({}, "width", kind, "m/config.json")


# ------------------------------------------------------------------------------ strict copying


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 7, bias=False)
        self.register_buffer("table", torch.ones(3), persistent=False)


def source_and_names() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors for Small under other names, seed 0; the head is tied to the embedding."""
    torch.manual_seed(0)
    tensors = {f"src.{name}": value.clone() for name, value in Small().state_dict().items()}
    names = {name: f"src.{name}" for name in Small().state_dict()}
    del tensors[names["head.weight"]]
    names["head.weight"] = "src.embed.weight"
    return tensors, names


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copy_strict(device):
    """Reference: load_state_dict of torch on a second module."""
    tensors, names = source_and_names()
    with torch.device(device):
        module = Small()
    module.body[0].bias.requires_grad_(False)
    copy_strict(module, tensors, names, "f")
    reference = Small()
    reference.load_state_dict({name: tensors[source] for name, source in names.items()})
    assert_bit_equal(module.state_dict(), reference.state_dict())
    for name, value in module.state_dict().items():
        assert value.data_ptr() == tensors[names[name]].data_ptr(), "copied"
    assert module.head.weight is module.embed.weight
    assert module.embed.weight.requires_grad and not module.body[0].bias.requires_grad
    assert module.table.device.type == device


def test_copy_strict_takes_the_dtype_of_the_file():
    tensors, names = source_and_names()
    halves = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    module = Small()
    copy_strict(module, halves, names, "f")
    assert module.embed.weight.dtype == torch.float16
    assert module.body[1].num_batches_tracked.dtype == torch.int64


def refuse(tensors, names, *words, ignored=()):
    module = Small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(InputError) as error:
        copy_strict(module, tensors, names, "m/model.safetensors", ignored)
    one_line(error, "m/model.safetensors", *words)
    assert_bit_equal(module.state_dict(), before)


def test_copy_strict_missing():
    tensors, names = source_and_names()
    del tensors["src.body.0.bias"]
    refuse(tensors, names, "missing: src.body.0.bias")


def test_copy_strict_extra():
    tensors, names = source_and_names()
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    refuse(tensors, names, "unexpected: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more")
    refuse(tensors, names, "unexpected: extra.6", ignored=[f"extra.{i}" for i in range(6)])
    copy_strict(Small(), tensors, names, "f", ignored=[f"extra.{i}" for i in range(9)])


def test_copy_strict_misshapen():
    tensors, names = source_and_names()
    tensors["src.body.0.weight"] = torch.zeros(4, 5)
    tensors["src.body.1.num_batches_tracked"] = torch.zeros(1, dtype=torch.int64)
    refuse(
        tensors, names,
        "src.body.0.weight is [4, 5], expected [4, 4] for body.0.weight",
        "src.body.1.num_batches_tracked is [1], expected [] for",
    )  # fmt: skip


def test_copy_strict_wrong_kind_of_number():
    tensors, names = source_and_names()
    tensors["src.body.0.bias"] = tensors["src.body.0.bias"].int()
    tensors["src.body.1.num_batches_tracked"] = torch.tensor(0.0)
    refuse(tensors, names, "torch.int32, expected torch.float32", "expected torch.int64")


def test_copy_strict_wrong_names():
    tensors, names = source_and_names()
    del names["body.0.bias"], tensors["src.body.0.bias"]
    refuse(tensors, names, "nothing named for: body.0.bias")
    tensors, names = source_and_names()
    names["body.9.bias"] = "src.body.0.bias"
    refuse(tensors, names, "not in the model: body.9.bias")
