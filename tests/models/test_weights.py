"""Reading the weights of public models, against the packages that write them [1-3] and with damaged files; copy_strict.

Tensors must be equal to the bit. Peak memory is that of the process minus that of a process without a model. Every
random choice has its seed in the test.

[1] transformers, modeling_utils.py, `save_pretrained`: safetensors files
[2] huggingface_hub, serialization/_torch.py, `save_torch_state_dict`: shards in both formats
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
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import InputError
from models import weights
from models.safetensors import write_safetensors
from models.weights import copy_strict, read_tensors, weight_files
from tests.common.helpers import ROOT, refused
from tests.models.helpers import assert_bit_equal

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def random_tensors(dtype=torch.float32, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (7, 5), "norm.weight": (5,), "norm.bias": (5,), "out.weight": (3, 5), "out.bias": (3,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def tiny_model() -> nn.Module:
    """A module with the names and shapes of random_tensors()."""
    return nn.Sequential(OrderedDict(embed=nn.Embedding(7, 5), norm=nn.LayerNorm(5), out=nn.Linear(5, 3)))


def write_shards(folder: Path, kind: str, tensors: dict[str, Tensor] | None = None, count=3) -> Path:
    """Writes an index and `count` shards; consecutive tensors share a shard."""
    tensors = random_tensors() if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    weight_map = {name: f"part-{i * count // len(tensors)}.{kind}" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        (safetensors.torch.save_file if kind == "safetensors" else torch.save)(part, folder / shard)
    (folder / INDEX[kind]).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / INDEX[kind]


# ---------------------------------------------------------------------- files of other packages


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_files_of_transformers(tmp_path, dtype, shard_size):
    """Seed 0; these files do not contain the tied head."""
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
def test_files_of_huggingface_hub(tmp_path, dtype, safe):
    """A shared tensor stays shared in a pickle. Safetensors files cannot share tensors, so it is left out there."""
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
def test_files_of_torch(tmp_path, dtype, suffix, zipped):
    """A module's state dict, an OrderedDict; its parameters; views with other layouts."""
    path = tmp_path / f"w{suffix}"
    module = tiny_model().to(dtype)
    base = torch.arange(24.0).reshape(4, 6).to(dtype)
    for content in (
        module.state_dict(),
        dict(module.named_parameters()),
        {"base": base, "transposed": base.T, "rows": base[1:3], "strided": base[:, ::2], "empty": base[:0],
         "scalar": base[2, 3]},
    ):  # fmt: skip
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        found, where = read_tensors(path)
        assert where == path and weight_files(path) == [path]
        assert_bit_equal(found, {name: tensor.detach() for name, tensor in content.items()})
        assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in found.values())


@pytest.mark.parametrize("extra", [{}, {"epoch": 3, "optimizer": {"state": {0: torch.ones(2)}, "lr": 0.1}}])
@pytest.mark.parametrize("name", weights.WRAPPERS)
def test_weights_inside_a_training_checkpoint(tmp_path, name, extra):
    torch.save({name: random_tensors(), **extra}, tmp_path / "w.pt")
    assert_bit_equal(read_tensors(tmp_path / "w.pt")[0], random_tensors())


def test_a_zip_of_another_program(tmp_path):
    """Its data is not aligned, but the tensors must be. A compressed zip, which cannot be memory-mapped, is refused."""
    torch.save(random_tensors(), tmp_path / "w.pt")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{method}.pt"
        with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(path, "w", method) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
    found, _ = read_tensors(tmp_path / f"{zipfile.ZIP_STORED}.pt")
    assert_bit_equal(found, random_tensors())
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())
    with refused(str(path), "without compression"):
        read_tensors(path)


def pickle_bytes(content) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def write_random_tensors(folder: Path, kind: str) -> Path:
    """Writes random_tensors() in one of the formats; returns the path for read_tensors."""
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
def test_files_stay_unchanged_and_may_be_replaced(tmp_path, kind):
    """Writing to a tensor does not change the file; replacing the file does not change loaded tensors."""
    path = write_random_tensors(tmp_path / "a", kind)
    before = {p: p.read_bytes() for p in weight_files(path)}
    tensors, _ = read_tensors(path)
    tensors["out.bias"].fill_(7.0)
    assert before == {p: p.read_bytes() for p in weight_files(path)}
    for p in before:
        (tmp_path / "other").write_bytes(bytes(len(before[p])))
        os.replace(tmp_path / "other", p)
    assert_bit_equal(tensors, random_tensors() | {"out.bias": torch.full((3,), 7.0)})


# ---------------------------------------------------------------------------------- refused files


class Call:
    """Unpickling it calls `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


WIDE = torch.ones(1, 3).expand(4, 3)
SPARSE = torch.eye(3).to_sparse()
PICKLES = {  # the content, and words of the error
    "code": ({"w": torch.ones(2), "x": Call(os.mkdir, "ran")}, "mkdir; no code in it was run: use a safetensors"),
    "a module": (nn.Linear(2, 2), "torch.nn.modules.linear.Linear; no code"),
    "a tensor": (torch.ones(3), "expected {name: tensor}, or just one such under 'state_dict' or 'model', found a Ten"),
    "a list": ([torch.ones(3)], "found a list"),
    "a number beside a tensor": ({"w": torch.ones(3), "epoch": 3}, "found a dict"),
    "numbers as names": ({0: torch.ones(3)}, "found a dict"),
    "empty": ({}, "found a dict"),
    "two state dicts": ({"model": {"w": torch.ones(3)}, "ema": {"w": torch.ones(3)}}, "a dict with 'model', 'ema'"),
    "another key": ({"teacher": {"w": torch.ones(3)}}, "a dict with 'teacher'"),
    "overlap": ({"w": WIDE}, "'w': expected a dense tensor of numbers, found elements that overlap: shape [4, 3]"),
    "windows": ({"w": torch.ones(9).unfold(0, 3, 2)}, "shape [4, 3], strides [2, 1]"),
    "sparse": ({"w": SPARSE}, "layout torch.sparse_coo"),
    "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, "torch.complex64"),
    "no data": ({"w": torch.ones(2, device="meta")}, "torch.float32 on meta"),
    "too much memory": ({"w": Call(bytearray, 2**62)}, "MemoryError"),
    "a huge number of bytes": ({"w": Call(bytearray, 2**70)}, "OverflowError"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_anything_but_tensors_are_refused(tmp_path, monkeypatch, name, zipped):
    monkeypatch.chdir(tmp_path)
    content, word = PICKLES[name]
    torch.save(content, "w.pt", _use_new_zipfile_serialization=zipped)
    with refused("w.pt: ", word):
        read_tensors("w.pt")
    assert os.listdir() == ["w.pt"]


def test_a_torchscript_archive_is_refused(tmp_path):
    """OpenAI published CLIP in this format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with refused(str(tmp_path / "w.pt"), "TorchScript", "not run", "safetensors"):
        read_tensors(tmp_path / "w.pt")


def test_uninitialized_memory_is_refused(tmp_path):
    """The older container lists its storages. If the list is empty, torch allocates them but fills none."""
    torch.save({"w": torch.ones(4096)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.pt").read_bytes()
    keys = content.rfind(b"\x80\x02]q\x00")
    (tmp_path / "w.pt").write_bytes(content[:keys] + b"\x80\x02]q\x00.")
    assert torch.load(tmp_path / "w.pt")["w"].shape == (4096,)  # torch accepts it
    with refused(str(tmp_path / "w.pt"), "expected 16384 bytes of tensors"):
        read_tensors(tmp_path / "w.pt")


INDEXES = {  # a change of the index's weight_map, and a word of the error
    "a list": (lambda m: [], "field 'weight_map': expected an object"),
    "no tensor": (lambda m: {}, "at least one tensor"),
    "a number": (lambda m: m | {"norm.bias": 3}, "'norm.bias': expected the name of a "),
    "parent folder": (lambda m: {n: f"../{s}" for n, s in m.items()}, "file in the same folder, found '../part-0"),
    "absolute": (lambda m: {n: f"/{s}" for n, s in m.items()}, "file in the same folder, found '/part-0"),
    "a NUL character": (lambda m: {n: f"\0{s}" for n, s in m.items()}, "file in the same folder"),
    "a line break": (lambda m: {n: f"{s}\n" for n, s in m.items()}, "file in the same folder"),
    "another suffix": (lambda m: {n: Path(s).stem + ".pt" for n, s in m.items()}, "same folder, found 'part-0.pt'"),
    "missing shard": (lambda m: m | {"x": "part-1a" + Path(m["norm.bias"]).suffix}, "shard 3 of 4 is missing"),
    "missing tensor": (lambda m: m | {"x": m["norm.bias"]}, "missing: x; unexpected: none"),
    "unexpected tensor": (
        lambda m: {n: s for n, s in m.items() if n != "out.weight"}, "missing: none; unexpected: out.weight",
    ),
    "another shard": (lambda m: m | {"out.weight": m["embed.weight"]}, "missing: out.weight; unexpected: none"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEX)
@pytest.mark.parametrize("name", INDEXES)
def test_indexes_that_do_not_fit_are_refused(tmp_path, name, kind):
    index = write_shards(tmp_path / "m", kind)
    change, word = INDEXES[name]
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": change(content["weight_map"])}))
    with refused(str(tmp_path / "m"), word):
        read_tensors(tmp_path / "m")


@pytest.mark.parametrize("kind", INDEX)
def test_an_error_names_the_damaged_or_missing_shard(tmp_path, kind):
    write_shards(tmp_path, kind)
    shard = tmp_path / f"part-1.{kind}"
    shard.write_bytes(shard.read_bytes()[:-9])
    with refused(str(shard)):
        read_tensors(tmp_path)
    shard.unlink()
    for function in (read_tensors, weight_files):
        with refused(INDEX[kind], f"shard 2 of 3 is missing: expected the file part-1.{kind}"):
            function(tmp_path)


def test_the_order_of_preference_in_a_folder(tmp_path):
    """Files are added from the last to the first of the order, and each new one is read. What has the name of one, but
    is not a file, is an error."""
    assert weights.WEIGHT_FILE_NAMES[::2] == ("model.safetensors", "pytorch_model.bin")
    for i, name in enumerate(reversed(weights.WEIGHT_FILE_NAMES)):
        tensors = random_tensors(seed=i)
        if name.endswith(".json"):
            write_shards(tmp_path, name.split(".")[1], tensors)
        else:
            content = safetensors.torch.save(tensors) if name == "model.safetensors" else pickle_bytes(tensors)
            (tmp_path / name).write_bytes(content)
        found, where = read_tensors(tmp_path)
        assert where == tmp_path / name
        assert_bit_equal(found, tensors)
    for create in (os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)):
        for name in weights.WEIGHT_FILE_NAMES:
            folder = tmp_path / f"{create.__name__}-{name}"
            folder.mkdir(exist_ok=True)
            create(folder / name)
            with refused(str(folder / name), "expected a file"):
                read_tensors(folder)


def test_a_path_without_weights_is_refused(tmp_path):
    with refused(str(tmp_path), *weights.WEIGHT_FILE_NAMES, "found none of them"):
        read_tensors(tmp_path)
    for name in ("tf_model.h5", "model.onnx", "flax_model.msgpack", "consolidated.00.pth", "README.md", "a.gguf"):
        (tmp_path / name).touch()
    with refused("none of them, but a.gguf, consolidated.00.pth, flax_model.msgpack"):
        weight_files(tmp_path)
    for name in ("README.md", "a.gguf", "nowhere"):
        with refused(str(tmp_path / name), "expected a model's folder or a file *.safetensors, *.bin, *.pt, *.pth"):
            read_tensors(tmp_path / name)
    for name in ("nowhere.bin", "nowhere.safetensors"):
        with refused(str(tmp_path / name), "expected a file, found none"):
            read_tensors(tmp_path / name)


def damaged(content: bytes, seed: int) -> bytes:
    """Cut short; bits flipped anywhere, in the first or in the last kilobyte; a piece lost or doubled."""
    rng, content = random.Random(seed), bytearray(content)
    kind = seed % 5
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 4:
        start = rng.randrange(len(content))
        piece = content[start : start + rng.randrange(1, 64)]
        content[start : start + len(piece)] = piece * rng.choice([0, 2])
        return bytes(content)
    first, last = [(0, len(content)), (0, 1000), (len(content) - 1000, len(content))][kind - 1]
    for _ in range(rng.choice([1, 2, 8, 40])):
        content[rng.randrange(max(first, 0), min(last, len(content)))] ^= 1 << rng.randrange(8)
    return bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_load_or_are_refused_in_one_line(tmp_path, kind):
    """300 files of each format, seeds 0 to 299: the right names and shapes, or an InputError; both must occur."""
    path = write_random_tensors(tmp_path / "m", kind)
    files = {p: p.read_bytes() for p in weight_files(path)}
    outcomes = {"loaded": 0, "refused": 0}
    for seed in range(300):
        victim = sorted(files)[seed % len(files)]
        (tmp_path / "new").write_bytes(damaged(files[victim], seed))
        os.replace(tmp_path / "new", victim)  # a memory-mapped file must not be shortened in place
        model = tiny_model()
        try:
            tensors, where = read_tensors(path)
            copy_strict(model, tensors, {name: name for name in model.state_dict()}, where)
            assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in random_tensors().items()}
            assert all(tensor.clone().dtype in weights.DTYPE_NAMES for tensor in tensors.values())  # reads every byte
            outcomes["loaded"] += 1
        except InputError as error:
            assert str(tmp_path) in str(error) and str(error).isprintable()
            outcomes["refused"] += 1
        victim.write_bytes(files[victim])
    assert min(outcomes.values()) >= 10, outcomes


# ----------------------------------------------------------------------------------- copy_strict


class Small(nn.Module):
    """Linear, norm with integer buffer, tied head, and a buffer that is not persistent."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 7, bias=False)
        self.register_buffer("table", torch.ones(3), persistent=False)


def source_and_names() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors for Small under other names, seed 0; the head shares the tensor of the embedding."""
    torch.manual_seed(0)
    tensors = {f"src.{name}": value.clone() for name, value in Small().state_dict().items()}
    names = {name: f"src.{name}" for name in Small().state_dict()}
    del tensors[names["head.weight"]]
    names["head.weight"] = "src.embed.weight"
    return tensors, names


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copy_strict(device):
    """Reference: torch's load_state_dict on a second module."""
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


def test_copy_strict_keeps_the_dtype_of_the_tensors():
    tensors, names = source_and_names()
    halves = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    module = Small()
    copy_strict(module, halves, names, "f")
    assert module.embed.weight.dtype == torch.float16
    assert module.body[1].num_batches_tracked.dtype == torch.int64


def assert_refused(tensors, names, *words, ignored=()):
    """copy_strict raises an InputError with these words and leaves the module unchanged."""
    module = Small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with refused("m/model.safetensors", *words):
        copy_strict(module, tensors, names, "m/model.safetensors", ignored)
    assert_bit_equal(module.state_dict(), before)


def test_copy_strict_names_missing_tensors():
    tensors, names = source_and_names()
    del tensors["src.body.0.bias"]
    assert_refused(tensors, names, "missing: src.body.0.bias")


def test_copy_strict_names_unexpected_tensors():
    tensors, names = source_and_names()
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    assert_refused(tensors, names, "unexpected: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more")
    assert_refused(tensors, names, "unexpected: extra.6", ignored=[f"extra.{i}" for i in range(6)])
    copy_strict(Small(), tensors, names, "f", ignored=[f"extra.{i}" for i in range(9)])


def test_copy_strict_names_misshapen_tensors():
    tensors, names = source_and_names()
    tensors["src.body.0.weight"] = torch.zeros(4, 5)
    tensors["src.body.1.num_batches_tracked"] = torch.zeros(1, dtype=torch.int64)
    assert_refused(
        tensors, names,
        "src.body.0.weight is [4, 5], expected [4, 4] for body.0.weight",
        "src.body.1.num_batches_tracked is [1], expected [] for",
    )  # fmt: skip


def test_copy_strict_names_integers_instead_of_floats():
    tensors, names = source_and_names()
    tensors["src.body.0.bias"] = tensors["src.body.0.bias"].int()
    tensors["src.body.1.num_batches_tracked"] = torch.tensor(0.0)
    assert_refused(tensors, names, "torch.int32, expected torch.float32", "expected torch.int64")


def test_copy_strict_names_faults_of_the_name_map():
    tensors, names = source_and_names()
    del names["body.0.bias"], tensors["src.body.0.bias"]
    assert_refused(tensors, names, "no tensor named for: body.0.bias")
    tensors, names = source_and_names()
    names["body.9.bias"] = "src.body.0.bias"
    assert_refused(tensors, names, "not in the model: body.9.bias")


# --------------------------------------------------------------------------------------- memory

# Loads each file of the command line in its own process, as from_pretrained does. Prints [peak memory, memory at the
# end that is not memory-mapped] in MB, minus those of a process that loads nothing.
MEASURE = """
import json, os, sys, torch
from torch import nn
from models.weights import copy_strict, read_tensors

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024 / 1e6

def load(path):
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(48))
    tensors, where = read_tensors(path)
    copy_strict(model, tensors, {name: name for name in model.state_dict()}, where)
    del tensors
    model.to(torch.float32)
    assert sum(parameter.min().item() for parameter in model.parameters()) == 48 * 49 / 2
    return anonymous()

def measure(path):
    if (child := os.fork()) == 0:
        print(load(path) if path else anonymous(), file=open("anonymous", "w"))
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, path
    return [usage.ru_maxrss * 1024 / 1e6, float(open("anonymous").read())]

torch.ones(1024, dtype=torch.float16).to(torch.float32).sum()
base = measure(None)
print(json.dumps([[a - b for a, b in zip(measure(path), base)] for path in sys.argv[1:]]))
"""


def test_loading_never_holds_two_copies_in_memory(tmp_path):
    """48 matrices, 201 MB as fp32, 101 MB as fp16. Loading fp16 as fp32 needs 201 MB and memory-mapped pages, which
    are freed with the last tensor of a file, so shard by shard."""
    paths = []
    for dtype, single in ((torch.float32, "zip.bin"), (torch.float16, "old.bin")):
        tensors = {f"{i}.weight": torch.full((1024, 1024), i + 1.0, dtype=dtype) for i in range(48)}
        folder = tmp_path / str(dtype)
        write_shards(folder, "safetensors", tensors, 8)
        safetensors.torch.save_file(tensors, folder / "one.safetensors")
        torch.save(tensors, folder / single, _use_new_zipfile_serialization=single == "zip.bin")
        paths += [folder, folder / "one.safetensors", folder / single]
    del tensors
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], cwd=tmp_path, env=environment,
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    peaks, anonymous = zip(*json.loads(result.stdout), strict=True)
    size = 48 * 4 * 1024**2 / 1e6
    assert max(peaks[:3]) <= 1.15 * size, peaks  # fp32, in all formats
    assert max(anonymous[:3]) <= 0.05 * size, anonymous  # all of it is memory-mapped
    assert max(anonymous[3:]) <= 1.05 * size, anonymous
    assert max(peaks[3], peaks[5]) <= 1.15 * size, peaks
    assert peaks[4] <= 1.6 * size, peaks
