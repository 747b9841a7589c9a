"""Public models' files, against the packages that write them [1-3], and against damage.

No tolerance: bits are equal or they are not. Peak memory is what the system counts, over that of the same
process without a model. Every random choice has its seed in the test.

[1] transformers, modeling_utils.py, `save_pretrained`; it writes safetensors files only
[2] huggingface_hub, serialization/_torch.py, `save_torch_state_dict`: shards of either kind
[3] torch, serialization.py, `torch.save`: both containers
"""

import io
import json
import os
import random
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from test_weights import assert_bit_equal, one_line
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import checkpoint
from checkpoint import read_tensors, weight_files
from weights import InputError, copy_strict, write_safetensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def random_tensors(dtype=torch.float32, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (7, 5), "norm.weight": (5,), "norm.bias": (5,), "out.weight": (3, 5), "out.bias": (3,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def tiny_model() -> nn.Module:
    """Takes random_tensors() by their own names."""
    return nn.Sequential(OrderedDict(embed=nn.Embedding(7, 5), norm=nn.LayerNorm(5), out=nn.Linear(5, 3)))


def write_shards(folder: Path, kind: str, tensors: dict[str, Tensor] | None = None, count=3) -> Path:
    """An index and `count` shards, each some tensors that follow one another."""
    tensors = random_tensors() if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    weight_map = {name: f"part-{i * count // len(tensors)}.{kind}" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        (safetensors.torch.save_file if kind == "safetensors" else torch.save)(part, folder / shard)
    (folder / INDEX[kind]).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / INDEX[kind]


# ------------------------------------------------------------------- reference: who writes them


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_what_transformers_saves(tmp_path, dtype, shard_size):
    """Seed 0; the tied head has no tensor of its own in these files."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    theirs = LlamaForCausalLM(config).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    tensors, where = read_tensors(tmp_path)
    expected = theirs.state_dict()
    del expected["lm_head.weight"]
    assert_bit_equal(tensors, expected)
    assert where.name == ("model.safetensors" if shard_size == "1GB" else INDEX["safetensors"])
    written = sorted(p for p in tmp_path.iterdir() if p.name.startswith("model"))
    assert sorted(weight_files(tmp_path)) == written and (len(written) == 1) == (shard_size == "1GB")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("safe", [True, False])
def test_what_the_hub_shards(tmp_path, dtype, safe):
    """A shared tensor stays shared in a pickle; a safetensors file cannot say that, so there is none in it."""
    tensors = random_tensors(dtype)
    if not safe:
        tensors["tied.weight"] = tensors["embed.weight"]
    size = 20 * dtype.itemsize
    huggingface_hub.save_torch_state_dict(tensors, tmp_path, max_shard_size=size, safe_serialization=safe)
    found, where = read_tensors(tmp_path)
    assert_bit_equal(found, tensors)
    assert where == tmp_path / INDEX["safetensors" if safe else "bin"]
    files = weight_files(tmp_path)
    assert files == [where, *sorted(p for p in tmp_path.iterdir() if p != where)] and len(files) > 3
    if not safe:
        assert found["tied.weight"].data_ptr() == found["embed.weight"].data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves(tmp_path, dtype, suffix, zipped):
    """Of a module: an OrderedDict; parameters by themselves; views, as they were laid out."""
    path = tmp_path / f"w{suffix}"
    module = tiny_model().to(dtype)
    base = torch.arange(24.0).reshape(4, 6).to(dtype)
    for content in (
        module.state_dict(),
        dict(module.named_parameters()),
        {"whole": base, "turned": base.T, "part": base[1:3], "gaps": base[:, ::2], "none": base[:0], "one": base[2, 3]},
    ):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        found, where = read_tensors(path)
        assert where == path and weight_files(path) == [path]
        assert_bit_equal(found, {name: tensor.detach() for name, tensor in content.items()})
        assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("extra", [{}, {"epoch": 3, "optimizer": {"state": {0: torch.ones(2)}, "lr": 0.1}}])
@pytest.mark.parametrize("name", checkpoint.WRAPPERS)
def test_weights_beside_a_training_state(tmp_path, name, extra):
    torch.save({name: random_tensors(), **extra}, tmp_path / "w.pt")
    assert_bit_equal(read_tensors(tmp_path / "w.pt")[0], random_tensors())


def test_a_zip_that_another_program_packed(tmp_path):
    """Its data begin anywhere: tensors must be aligned all the same. Compressed it is refused, not read as noise."""
    torch.save(random_tensors(), tmp_path / "w.pt")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{method}.pt"
        with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(path, "w", method) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
    found, _ = read_tensors(tmp_path / f"{zipfile.ZIP_STORED}.pt")
    assert_bit_equal(found, random_tensors())
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())
    with pytest.raises(InputError) as error:
        read_tensors(path)
    one_line(error, str(path), "without compression")


def saved(content) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def make(folder: Path, kind: str) -> Path:
    """One of the kinds of file -> what to read."""
    if kind in INDEX:
        write_shards(folder, kind)
        return folder
    folder.mkdir(exist_ok=True)
    if kind == "one.safetensors":
        write_safetensors(folder / kind, random_tensors())
    else:
        torch.save(random_tensors(), folder / kind, _use_new_zipfile_serialization=kind == "zip.pth")
    return folder / kind


KINDS = ["one.safetensors", "zip.pth", "old.pth", "safetensors", "bin"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_do_not_change_and_may_be_replaced(tmp_path, kind):
    """Writing to a tensor stays in memory; another model renamed into place does not reach one that is open."""
    path = make(tmp_path / "a", kind)
    before = {p: p.read_bytes() for p in weight_files(path)}
    tensors, _ = read_tensors(path)
    tensors["out.bias"].fill_(7.0)
    assert before == {p: p.read_bytes() for p in weight_files(path)}
    for p in before:
        (tmp_path / "other").write_bytes(bytes(len(before[p])))
        os.replace(tmp_path / "other", p)
    assert_bit_equal(tensors, random_tensors() | {"out.bias": torch.full((3,), 7.0)})


# ------------------------------------------------------------------------------ what is refused


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


WIDE = torch.ones(1, 3).expand(4, 3)
SPARSE = torch.eye(3).to_sparse()
PICKLES = {  # what is saved, and a word of the message
    "code": ({"w": torch.ones(2), "x": Call(os.mkdir, "ran")}, "mkdir; no code in it was run: use a safetensors"),
    "a module": (nn.Linear(2, 2), "torch.nn.modules.linear.Linear; no code"),
    "a tensor": (torch.ones(3), "expected {name: tensor}, or just one such under 'state_dict' or 'model', found a Ten"),
    "a list": ([torch.ones(3)], "found a list"),
    "a number in it": ({"w": torch.ones(3), "epoch": 3}, "found a dict"),
    "numbers for names": ({0: torch.ones(3)}, "found a dict"),
    "nothing": ({}, "found a dict"),
    "two of them": ({"model": {"w": torch.ones(3)}, "ema": {"w": torch.ones(3)}}, "a dict with 'model', 'ema'"),
    "under another name": ({"teacher": {"w": torch.ones(3)}}, "a dict with 'teacher'"),
    "overlap": ({"w": WIDE}, "'w': expected a dense tensor of numbers, found elements that overlap: shape [4, 3]"),
    "windows": ({"w": torch.ones(9).unfold(0, 3, 2)}, "shape [4, 3], strides [2, 1]"),
    "sparse": ({"w": SPARSE}, "layout torch.sparse_coo"),
    "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, "torch.complex64"),
    "no data": ({"w": torch.ones(2, device="meta")}, "torch.float32 on meta"),
    "much memory": ({"w": Call(bytearray, 2**62)}, "MemoryError"),
    "more memory": ({"w": Call(bytearray, 2**70)}, "OverflowError"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_anything_else(tmp_path, monkeypatch, name, zipped):
    monkeypatch.chdir(tmp_path)
    content, word = PICKLES[name]
    torch.save(content, "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError) as error:
        read_tensors("w.pt")
    one_line(error, "w.pt: ", word)
    assert os.listdir() == ["w.pt"]


def test_a_torchscript_archive(tmp_path):
    """As CLIP was first published."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(InputError) as error:
        read_tensors(tmp_path / "w.pt")
    one_line(error, str(tmp_path / "w.pt"), "TorchScript", "not run", "safetensors")


def test_memory_that_no_byte_fills(tmp_path):
    """The older container lists the keys of its storages: with an empty list torch fills none."""
    torch.save({"w": torch.ones(4096)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.pt").read_bytes()
    keys = content.rfind(b"\x80\x02]q\x00")
    (tmp_path / "w.pt").write_bytes(content[:keys] + b"\x80\x02]q\x00.")
    assert torch.load(tmp_path / "w.pt")["w"].shape == (4096,)  # it does take it
    with pytest.raises(InputError) as error:
        read_tensors(tmp_path / "w.pt")
    one_line(error, str(tmp_path / "w.pt"), "expected 16384 bytes of tensors")


INDEXES = {  # what replaces the index's weight_map, and a word of the message
    "a list": (lambda m: [], "field 'weight_map': expected an object"),
    "no tensor": (lambda m: {}, "at least one tensor"),
    "a number": (lambda m: m | {"norm.bias": 3}, "'norm.bias': expected the name of a "),
    "up": (lambda m: {n: f"../{s}" for n, s in m.items()}, "file beside it, found '../part-0"),
    "absolute": (lambda m: {n: f"/{s}" for n, s in m.items()}, "file beside it, found '/part-0"),
    "a NUL": (lambda m: {n: f"\0{s}" for n, s in m.items()}, "file beside it"),
    "the other kind": (lambda m: {n: Path(s).stem + ".pt" for n, s in m.items()}, "file beside it, found 'part-0.pt'"),
    "missing shard": (lambda m: m | {"x": "part-1a" + Path(m["norm.bias"]).suffix}, "shard 3 of 4 is missing"),
    "missing tensor": (lambda m: m | {"x": m["norm.bias"]}, "lacks: x; has too: none"),
    "surplus tensor": (lambda m: {n: s for n, s in m.items() if n != "out.weight"}, "lacks: none; has too: out.weight"),
    "another shard": (lambda m: m | {"out.weight": m["embed.weight"]}, "lacks: out.weight; has too: none"),
}


@pytest.mark.parametrize("kind", INDEX)
@pytest.mark.parametrize("name", INDEXES)
def test_indexes_that_do_not_fit(tmp_path, name, kind):
    index = write_shards(tmp_path / "m", kind)
    change, word = INDEXES[name]
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": change(content["weight_map"])}))
    with pytest.raises(InputError) as error:
        read_tensors(tmp_path / "m")
    one_line(error, str(tmp_path / "m"), word)


@pytest.mark.parametrize("kind", INDEX)
def test_an_error_names_the_shard(tmp_path, kind):
    write_shards(tmp_path, kind)
    shard = tmp_path / f"part-1.{kind}"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(InputError) as error:
        read_tensors(tmp_path)
    one_line(error, str(shard))
    shard.unlink()
    for function in (read_tensors, weight_files):
        with pytest.raises(InputError) as error:
            function(tmp_path)
        one_line(error, INDEX[kind], f"shard 2 of 3 is missing: expected the file part-1.{kind}")


def test_the_order_in_a_folder(tmp_path):
    """From the last to the first, each new one is taken; then what stands in its place and is no file is an error."""
    assert checkpoint.IN_FOLDER[::2] == ("model.safetensors", "pytorch_model.bin")
    for i, name in enumerate(reversed(checkpoint.IN_FOLDER)):
        tensors = random_tensors(seed=i)
        if name.endswith(".json"):
            write_shards(tmp_path, name.split(".")[1], tensors)
        else:
            content = safetensors.torch.save(tensors) if name == "model.safetensors" else saved(tensors)
            (tmp_path / name).write_bytes(content)
        found, where = read_tensors(tmp_path)
        assert where == tmp_path / name
        assert_bit_equal(found, tensors)
    for place in (os.mkfifo, os.mkdir, lambda p: os.symlink("nowhere", p)):
        for name in checkpoint.IN_FOLDER:
            folder = tmp_path / f"{place.__name__}-{name}"
            folder.mkdir(exist_ok=True)
            place(folder / name)
            with pytest.raises(InputError) as error:
                read_tensors(folder)
            one_line(error, str(folder / name), "expected a file")


def test_nothing_to_read(tmp_path):
    with pytest.raises(InputError) as error:
        read_tensors(tmp_path)
    one_line(error, str(tmp_path), *checkpoint.IN_FOLDER, "found none of them")
    for name in ("tf_model.h5", "model.onnx", "flax_model.msgpack", "consolidated.00.pth", "README.md", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(InputError) as error:
        weight_files(tmp_path)
    one_line(error, "none of them, but a.gguf, consolidated.00.pth, flax_model.msgpack")
    for name in ("README.md", "a.gguf", "nowhere"):
        with pytest.raises(InputError) as error:
            read_tensors(tmp_path / name)
        one_line(error, str(tmp_path / name), "expected a model's folder or a file *.safetensors, *.bin, *.pt, *.pth")
    for name in ("nowhere.bin", "nowhere.safetensors"):
        with pytest.raises(InputError) as error:
            read_tensors(tmp_path / name)
        one_line(error, str(tmp_path / name), "expected a file, found none")


def damaged(content: bytes, seed: int) -> bytes:
    """Cut, bytes changed anywhere, in the first or in the last kilobyte, a piece lost or doubled."""
    rng, content = random.Random(seed), bytearray(content)
    way = seed % 5
    if way == 0:
        return bytes(content[: rng.randrange(len(content))])
    if way == 4:
        start = rng.randrange(len(content))
        piece = content[start : start + rng.randrange(1, 64)]
        content[start : start + len(piece)] = piece * rng.choice([0, 2])
        return bytes(content)
    first, last = [(0, len(content)), (0, 1000), (len(content) - 1000, len(content))][way - 1]
    for _ in range(rng.choice([1, 2, 8, 40])):
        content[rng.randrange(max(first, 0), min(last, len(content)))] ^= 1 << rng.randrange(8)
    return bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_ends_in_one_line(tmp_path, kind):
    """300 files of each kind, seeds 0 to 299: the model's names and shapes, or InputError; both must occur."""
    path = make(tmp_path / "m", kind)
    files = {p: p.read_bytes() for p in weight_files(path)}
    outcomes = {"loaded": 0, "refused": 0}
    for seed in range(300):
        victim = sorted(files)[seed % len(files)]
        (tmp_path / "new").write_bytes(damaged(files[victim], seed))
        os.replace(tmp_path / "new", victim)  # shortening a mapped file in place is another matter
        model = tiny_model()
        try:
            tensors, where = read_tensors(path)
            copy_strict(model, tensors, {name: name for name in model.state_dict()}, where)
            assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in random_tensors().items()}
            assert all(tensor.clone().dtype in checkpoint.DTYPE_NAMES for tensor in tensors.values())  # reads each byte
            outcomes["loaded"] += 1
        except InputError as error:
            assert str(tmp_path) in str(error) and str(error).isprintable()
            outcomes["refused"] += 1
        victim.write_bytes(files[victim])
    assert min(outcomes.values()) >= 10, outcomes


# --------------------------------------------------------------------------------------- memory

# Loads each file of the command line in a process of its own, as from_pretrained does, and prints
# [peak, at the end what is not of a file] in MB, over those of a process that loads nothing.
MEASURE = """
import json, os, sys, torch
from torch import nn
from checkpoint import read_tensors
from weights import copy_strict

def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024 / 1e6

def load(path):
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(48))
    tensors, where = read_tensors(path)
    copy_strict(model, tensors, {name: name for name in model.state_dict()}, where)
    del tensors
    model.to(torch.float32)
    assert sum(parameter.min().item() for parameter in model.parameters()) == 48 * 49 / 2
    return own()

def measure(path):
    if (child := os.fork()) == 0:
        print(load(path) if path else own(), file=open("own", "w"))
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, path
    return [usage.ru_maxrss * 1024 / 1e6, float(open("own").read())]

torch.ones(1024, dtype=torch.float16).to(torch.float32).sum()
base = measure(None)
print(json.dumps([[a - b for a, b in zip(measure(path), base)] for path in sys.argv[1:]]))
"""


def test_never_two_copies_in_memory(tmp_path):
    """48 matrices, 201 MB as fp32, 101 MB as fp16. From fp16 the model takes its 201 MB, and no more that
    the system could not take back: the mapped file's pages go with its last tensor, so shards go one by one."""
    paths = []
    for dtype, single in ((torch.float32, "zip.bin"), (torch.float16, "old.bin")):
        tensors = {f"{i}.weight": torch.full((1024, 1024), i + 1.0, dtype=dtype) for i in range(48)}
        folder = tmp_path / str(dtype)
        write_shards(folder, "safetensors", tensors, 8)
        safetensors.torch.save_file(tensors, folder / "one.safetensors")
        torch.save(tensors, folder / single, _use_new_zipfile_serialization=single == "zip.bin")
        paths += [folder, folder / "one.safetensors", folder / single]
    del tensors
    environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], cwd=tmp_path, env=environment,
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    peaks, own = zip(*json.loads(result.stdout), strict=True)
    size = 48 * 4 * 1024**2 / 1e6
    assert max(peaks[:3]) <= 1.15 * size, peaks  # fp32, of all kinds
    assert max(own[:3]) <= 0.05 * size, own  # it lies in the file and nowhere else
    assert max(own[3:]) <= 1.05 * size, own
    assert max(peaks[3], peaks[5]) <= 1.15 * size, peaks
    assert peaks[4] <= 1.6 * size, peaks
