"""Reading the weights of public models, against the packages that write them [1, 2]; damaged files; copy_strict.

Tensors must be equal to the bit. Every random choice has its seed in the test.

[1] transformers, modeling_utils.py, `save_pretrained`: safetensors files and their index
[2] torch, serialization.py, `torch.save`: both containers
"""

import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import InputError
from models.weights import WEIGHT_FILE_NAMES, copy_strict, read_tensors, weight_files
from tests.common.helpers import damaged, refused
from tests.tiny import bits

INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
KINDS = ["model.safetensors", "zip.pth", "old.bin", *INDEX.values()]


def random_tensors(dtype=torch.float32, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (7, 5), "norm.weight": (5,), "norm.bias": (5,), "out.weight": (3, 5), "out.bias": (3,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def tiny_model() -> nn.Module:
    """A module with the names and shapes of random_tensors()."""
    return nn.Sequential(OrderedDict(embed=nn.Embedding(7, 5), norm=nn.LayerNorm(5), out=nn.Linear(5, 3)))


def write(path: Path, tensors: dict[str, Tensor], count: int = 3) -> Path:
    """Writes tensors in the format that the file's name tells, an index with `count` shards; returns the path."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".json":
        suffix = path.suffixes[-3]
        weight_map = {name: f"part-{i * count // len(tensors)}{suffix}" for i, name in enumerate(tensors)}
        for shard in set(weight_map.values()):
            write(path.with_name(shard), {name: t for name, t in tensors.items() if weight_map[name] == shard})
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization="old" not in path.name)
    return path


# ---------------------------------------------------------------------- files of other packages


def test_shards_of_transformers(tmp_path):
    """Seed 0; they do not contain the tied head."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=3, tie_word_embeddings=True)
    theirs = LlamaForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    tensors, where = read_tensors(tmp_path)
    expected = theirs.state_dict()
    del expected["lm_head.weight"]
    assert bits(tensors) == bits(expected)
    assert where.name == INDEX["safetensors"]
    assert sorted(weight_files(tmp_path)) == sorted(p for p in tmp_path.iterdir() if p.name.startswith("model"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["w.pth", "w.bin", "old.pt"])
def test_files_of_torch(tmp_path, dtype, name):
    """A module's state dict, an OrderedDict; its parameters; views with other layouts."""
    module = tiny_model().to(dtype)
    base = torch.arange(24.0).reshape(4, 6).to(dtype)
    views = {"base": base, "transposed": base.T, "strided": base[1:, ::2], "empty": base[:0], "scalar": base[2, 3]}
    for content in (module.state_dict(), dict(module.named_parameters()), views):
        found, where = read_tensors(write(tmp_path / name, content))
        assert bits(found) == bits({name: tensor.detach() for name, tensor in content.items()})
        assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in found.values())
        assert weight_files(tmp_path / name) == [where] == [tmp_path / name]
    assert found["transposed"].data_ptr() == found["base"].data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_memory_mapped_stay_unchanged_and_may_be_replaced(tmp_path, kind):
    """Tensors lie in the mapped pages of their files, but for torch's older container, so no copy takes memory. Writing
    to a tensor does not change the file; replacing the file does not change loaded tensors."""
    path = write(tmp_path / "a" / kind, random_tensors())
    before = {p: p.read_bytes() for p in weight_files(path)}
    tensors, _ = read_tensors(path)
    if Path("/proc/self/maps").exists():  # of Linux
        mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        spans = [range(*(int(end, 16) for end in words[0].split("-"))) for words in mappings]
        for tensor in tensors.values():
            assert any(tensor.data_ptr() in span for span in spans) == (kind != "old.bin")
    tensors["out.bias"].fill_(7.0)
    assert before == {p: p.read_bytes() for p in weight_files(path)}
    for p in before:
        (tmp_path / "other").write_bytes(bytes(len(before[p])))
        os.replace(tmp_path / "other", p)
    assert bits(tensors) == bits(random_tensors() | {"out.bias": torch.full((3,), 7.0)})


def test_the_order_of_preference_in_a_folder(tmp_path):
    """Files are added from the last to the first of the order, and each new one is read. A folder without any is an
    error, and so is a link that leads nowhere."""
    assert WEIGHT_FILE_NAMES[::2] == ("model.safetensors", "pytorch_model.bin")
    for i, name in enumerate(reversed(WEIGHT_FILE_NAMES)):
        write(tmp_path / name, random_tensors(seed=i))
        found, where = read_tensors(tmp_path)
        assert where == tmp_path / name
        assert bits(found) == bits(random_tensors(seed=i))
    (folder := tmp_path / "folder").mkdir()
    with refused(f"{folder}: expected one of"):
        read_tensors(folder)
    (folder / "pytorch_model.bin").symlink_to("nowhere")
    with refused(str(folder / "pytorch_model.bin"), "expected a file"):
        read_tensors(folder)


# ---------------------------------------------------------------------------------- refused files


class MakesAFolder:
    def __reduce__(self):
        return os.mkdir, ("ran",)


PICKLES = {
    "code": {"w": torch.ones(2), "x": MakesAFolder()},
    "numbers as names": {0: torch.ones(3)},
    "empty": {},
    "a state of training": {"model": {"w": torch.ones(3)}, "epoch": 3},
    "sparse": {"w": torch.eye(3).to_sparse()},
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_of_anything_but_tensors_are_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    with refused("w.pth: "):
        read_tensors(write(Path("w.pth"), PICKLES[case]))
    assert os.listdir() == ["w.pth"]


def test_uninitialized_memory_is_refused(tmp_path):
    """The older container lists its storages. If the list is empty, torch allocates them but fills none."""
    content = write(tmp_path / "old.pt", {"w": torch.ones(4096)}).read_bytes()
    keys = content.rfind(b"\x80\x02]q\x00")
    (tmp_path / "old.pt").write_bytes(content[:keys] + b"\x80\x02]q\x00.")
    assert torch.load(tmp_path / "old.pt")["w"].shape == (4096,)  # torch accepts it
    with refused(str(tmp_path / "old.pt"), "16384 bytes of tensors, more than the file has"):
        read_tensors(tmp_path / "old.pt")


@pytest.mark.parametrize("shard", ["../part-0.bin", "/part-0.bin", "\0part-0.bin", "part-0.pt", "missing.bin", 3])
def test_indexes_with_shards_elsewhere_are_refused(tmp_path, shard):
    index = write(tmp_path / "m" / INDEX["bin"], random_tensors())
    (tmp_path / "part-0.bin").write_bytes((tmp_path / "m" / "part-0.bin").read_bytes())
    index.write_text(json.dumps({"weight_map": {"w": "part-0.bin", "v": shard}}))
    with refused(str(tmp_path / "m")):
        read_tensors(tmp_path / "m")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_load_or_are_refused_in_one_line(tmp_path, kind):
    """300 files of each format, seeds 0 to 299: the right names and shapes, or an InputError; both must occur."""
    path = write(tmp_path / "m" / kind, random_tensors())
    files = {p: p.read_bytes() for p in weight_files(path)}
    refusals = 0
    for seed in range(300):
        victim = sorted(files)[seed % len(files)]
        (tmp_path / "new").write_bytes(damaged(files[victim], seed))
        os.replace(tmp_path / "new", victim)  # a memory-mapped file must not be shortened in place
        model = tiny_model()
        try:
            copy_strict(model, read_tensors(path)[0], {name: name for name in model.state_dict()}, tmp_path)
            assert all(parameter.clone().is_floating_point() for parameter in model.parameters())  # reads every byte
        except InputError as error:
            assert str(tmp_path) in str(error) and str(error).isprintable()
            refusals += 1
        victim.write_bytes(files[victim])
    assert 10 <= refusals <= 290


# ----------------------------------------------------------------------------------- copy_strict


class Small(nn.Module):
    """Linear, norm with integer buffer, tied head, and a buffer that is not persistent."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 7, bias=False)
        self.register_buffer("table", torch.ones(3), persistent=False)


def source_and_names() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors for Small under other names, seed 0; the head shares the tensor of the embedding."""
    torch.manual_seed(0)
    tensors = {f"src.{name}": value.clone() for name, value in Small().state_dict().items()}
    names = {name: f"src.{name}" for name in Small().state_dict()}
    del tensors[names["head.weight"]]
    names["head.weight"] = "src.embed.weight"
    return tensors, names


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copy_strict(device):
    """Reference: torch's load_state_dict on a second module. Floats keep their dtype."""
    tensors, names = source_and_names()
    tensors["src.body.0.weight"] = tensors["src.body.0.weight"].half()
    with torch.device(device):
        module = Small()
    module.body[0].bias.requires_grad_(False)
    copy_strict(module, tensors | dict.fromkeys(["logit_scale", "classifier.bias"], torch.ones(1)), names, "f")
    reference = Small()
    reference.body[0].weight.data = reference.body[0].weight.data.half()
    reference.load_state_dict({name: tensors[source] for name, source in names.items()})
    assert bits(module.state_dict()) == bits(reference.state_dict())
    for name, value in module.state_dict().items():
        assert value.data_ptr() == tensors[names[name]].data_ptr(), "copied"
    assert module.head.weight is module.embed.weight
    assert module.embed.weight.requires_grad and not module.body[0].bias.requires_grad
    assert module.table.device.type == device


BIAS, COUNT = "src.body.0.bias", "src.body.1.num_batches_tracked"
OTHERS = "embeddings.mask_tokens, head.weight, logit_scale_2"  # almost names that are ignored
MISFITS = {  # a change of the tensors and names, words of the error
    "missing": (lambda t, n: t.pop(BIAS), "missing: src.body.0.bias"),
    "unexpected": (lambda t, n: t.update(dict.fromkeys(["logit_scale", *OTHERS.split(", ")], t[BIAS])),
                   f"unexpected: {OTHERS}"),
    "shape": (lambda t, n: t.update({BIAS: torch.ones(4, 5)}), "bias is [4, 5] of floats, expected [4] of floats for"),
    "integers": (lambda t, n: t.update({BIAS: t[BIAS].int()}), "is [4] of torch.int32, expected [4] of floats"),
    "floats": (lambda t, n: t.update({COUNT: torch.tensor(0.0)}), "is [] of floats, expected [] of torch.int64"),
    "no name": (lambda t, n: (t.pop(BIAS), n.pop("body.0.bias")), "without a counterpart: body.0.bias"),
    "no target": (lambda t, n: n.update({"body.9.bias": BIAS}), "without a counterpart: body.9.bias"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_copy_strict_names_what_does_not_fit(case):
    """The module stays unchanged."""
    tensors, names = source_and_names()
    change, words = MISFITS[case]
    change(tensors, names)
    module = Small()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with refused("m/model.safetensors: ", words):
        copy_strict(module, tensors, names, "m/model.safetensors")
    assert bits(module.state_dict()) == bits(before)
