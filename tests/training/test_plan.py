"""What a run will take. References: the batches and cache files of real runs, loaded models, and on the CPU the tensors
that autograd saves in a real step of tiny models (backbones of `conftest.py`, seed 0).
"""

import math
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode

import train
from common.errors import InputError
from common.files import write_json
from model import AdapterConfig, Captioner
from models.lm import CausalLM
from models.tokenizer import load_tokenizer
from models.vit import ViT
from tests.models.helpers import CONFIGS
from tests.scripts import run_forked
from training import memory, plan
from training.frozen_models import meta_pair
from training.inputs import cached_inputs
from video_data.batches import epoch_batches
from video_data.datasets import read_dataset

CPU, GPU = torch.device("cpu"), torch.device("cuda")
B, T, K, L = 4, 4, 3, 12
METHODS = {
    "no write-back": AdapterConfig(queries=5, rank=8, frames=T, last_blocks=1),
    "write-back": AdapterConfig(queries=5, rank=8, frames=T, last_blocks=0, write_back=True),
    "linear": AdapterConfig(method="linear", frames=T),
    "lora": AdapterConfig(method="lora", rank=2, frames=T),
    "lora-lm": AdapterConfig(method="lora-lm", rank=2, frames=T),
    "adapter": AdapterConfig(method="adapter", rank=2, frames=T),
    "prompt": AdapterConfig(method="prompt", queries=2, frames=T),
    "full": AdapterConfig(method="full", frames=T),
}
METHODS_AND_DTYPES = [(name, dtype) for name in METHODS for dtype in (torch.float32, torch.bfloat16)
                      if (name, dtype) != ("full", torch.bfloat16)]  # fmt: skip


def make_args(**flags) -> Namespace:
    """The flags that a plan reads."""
    defaults = {"batch_size": B, "micro_batch_size": None, "captions_per_clip": K, "epochs": 2, "frames": T,
                "candidate_frames": T if flags.get("cache_features") else 16, "cache_features": False,
                "speed": None}  # fmt: skip
    return Namespace(**defaults | flags)


def make_meta_captioner(backbones: Path, config: AdapterConfig, dtype: torch.dtype = torch.float32) -> Captioner:
    vit, lm = meta_pair(backbones / "vit", backbones / "lm", dtype)
    with torch.device("meta"):
        return Captioner(vit, lm, load_tokenizer(backbones / "lm"), config)


def make_captioner(backbones: Path, config: AdapterConfig, dtype: torch.dtype = torch.float32) -> Captioner:
    vit, lm = ViT.from_pretrained(backbones / "vit", dtype), CausalLM.from_pretrained(backbones / "lm", dtype)
    return Captioner(vit, lm, load_tokenizer(backbones / "lm"), config)


def make_batch(captioner: Captioner, clips: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    size = captioner.vit.config.image_size
    frames = torch.randint(256, (clips, T, 3, size, size), dtype=torch.uint8)
    return frames, torch.randint(3, 400, (clips, K, L))


# -------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("clips,batch_size,epochs", [(12, 4, 3), (13, 4, 3), (5, 5, 1), (7, 2, 10)])
def test_steps_are_those_of_the_batches(clips, batch_size, epochs):
    """Reference: epoch_batches itself, exact. Each clip has 2 captions, of which a step shows 3."""
    batches = list(epoch_batches(clips, batch_size, epochs, seed=0))
    found = plan.make_schedule(clips, 2 * clips, batch_size, 3, epochs)
    assert (found.steps, found.clips_seen) == (len(batches), sum(map(len, batches)))
    assert found.passes == pytest.approx(3 * sum(map(len, batches)) / (2 * clips))


def test_warnings():
    """By hand: MSVD's 1200 clips and 48774 captions in batches of 64, 16 epochs of one caption a clip, see 18 batches
    of 64 an epoch: 0.378 of the captions."""
    schedule = plan.make_schedule(1200, 48774, 64, 1, 16)
    assert schedule == plan.Schedule(288, 18432, pytest.approx(0.3779, abs=1e-4))
    (line,) = plan.schedule_warnings(schedule.passes, None)
    assert "only 0.38 of a pass over the training captions" in line
    assert plan.schedule_warnings(1.0, 86400) == plan.schedule_warnings(5.0, None) == []
    (line,) = plan.schedule_warnings(1.0, 1.5 * 86400)
    assert "1.5 days" in line
    assert len(plan.schedule_warnings(0.5, 1e6)) == 2


# ---------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("features", [False, True])
def test_caches_have_the_planned_sizes(backbones, tmp_path, features):
    """Reference: the files that training makes for 3, 2 and 2 clips, exact."""
    dataset = read_dataset("shapes", tmp_path, [3, 2, 2])
    args = make_args(dataset="shapes", data=tmp_path, cache=None, workers=1, precision="fp32", cache_features=features)
    config = METHODS["no write-back"]
    expected = plan.cache_bytes(args, dataset.counts(), make_meta_captioner(backbones, config))
    cached_inputs(args, dataset, make_captioner(backbones, config), {}, CPU)
    found = {}
    for folder in (tmp_path / ".cache").iterdir():
        name = f"{folder.name.partition('-')[0]} {'features' if '-features-' in folder.name else 'frames'}"
        found[name] = sum(path.stat().st_size for path in folder.iterdir())
    assert found == expected
    assert len(found) == (5 if features else 3)


# -------------------------------------------------------------------------------- the meta device


def shapes(module: torch.nn.Module) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image_size", [None, 32])
def test_models_without_weights_have_the_shapes_of_loaded_ones(backbones, dtype, image_size):
    """References: both models as training loads them; tied heads are one tensor in both."""
    vit, lm = meta_pair(backbones / "vit", backbones / "lm", dtype, image_size)
    assert shapes(vit) == shapes(ViT.from_pretrained(backbones / "vit", dtype, image_size))
    assert shapes(lm) == shapes(CausalLM.from_pretrained(backbones / "lm", dtype))
    assert all(tensor.is_meta for model in (vit, lm) for tensor in model.parameters())


@pytest.mark.parametrize("name,count", [("tinyllama-1.1b", 1_100_048_384), ("smollm2-135m", 134_515_008),
                                        ("qwen3-0.6b", 596_049_920)])  # fmt: skip
def test_published_models_have_their_number_of_parameters(backbones, tmp_path, name, count):
    """References: the counts of the published safetensors files; a tied head counts once."""
    (tmp_path / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    _, lm = meta_pair(backbones / "vit", tmp_path, torch.bfloat16)
    assert memory.frozen_bytes(lm.requires_grad_(False)) == 2 * count


@pytest.mark.parametrize("name,size,tokens", [("dinov2-small", 224, 257), ("siglip-base-patch16-224", 224, 196)])
def test_published_vits_have_the_size_of_their_preprocessing(backbones, tmp_path, name, size, tokens):
    """References: DINOv2 has positions for 518 pixels and is used at 224, in patches of 14; SigLIP has no class token.
    A preprocessor_config.json overrides the size."""
    (tmp_path / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    vit, _ = meta_pair(tmp_path, backbones / "lm", torch.float32)
    assert (vit.config.image_size, len(vit.position)) == (size, tokens)
    if name == "dinov2-small":
        write_json(tmp_path / "preprocessor_config.json", {"size": {"shortest_edge": 320},
                                                           "crop_size": {"height": 280, "width": 280}})  # fmt: skip
        assert len(meta_pair(tmp_path, backbones / "lm", torch.float32)[0].position) == 401


def test_an_image_size_that_does_not_fit_is_refused(backbones):
    with pytest.raises(InputError, match="expected a multiple of the patch size"):
        meta_pair(backbones / "vit", backbones / "lm", torch.float32, 33)


# ---------------------------------------------------------------------------------------- memory


def test_the_counter_counts_what_lives():
    """By hand: float32 tensors of 1000 numbers on the meta device; views are the memory of what they view."""
    x = torch.empty(1000, device="meta")
    with memory.MemoryCounter([x]) as counter:
        y = 2 * x
        view, excluded_view = y[10:], x.view(10, 100)
        assert counter.bytes == counter.peak == 4000
        z = (y + 1) + 1  # three at once
        assert (counter.bytes, counter.peak) == (8000, 12000)
        del y, view
        assert (counter.bytes, counter.next_phase(), counter.peak) == (4000, 12000, 4000)
        del z, excluded_view
        assert counter.bytes == 0
    assert _get_current_dispatch_mode() is None


class SavedTensors(saved_tensors_hooks):
    """The tensors that autograd saves, as long as the graph keeps them."""

    def __init__(self):
        self.saved = []
        super().__init__(self.save, lambda tensor: tensor)

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved.append(weakref.ref(tensor))
        return tensor

    def bytes_without(self, module: torch.nn.Module) -> int:
        """Bytes of the tensors, without parameters and buffers; shared memory counts once."""
        kept = [tensor for reference in self.saved if (tensor := reference()) is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        frozen = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
        return sum(size for address, size in storages.items() if address not in frozen)


@pytest.mark.parametrize("name,dtype", METHODS_AND_DTYPES)
def test_kept_activations_are_those_that_autograd_saves(backbones, name, dtype):
    """Reference: the tensors that autograd saves in a real forward pass on the CPU, within 15 %: local variables of the
    forward pass live as long, and are counted by the plan only."""
    found = memory.step_memory(make_meta_captioner(backbones, METHODS[name], dtype), make_args(), CPU, L)
    captioner = make_captioner(backbones, METHODS[name], dtype)
    saved = SavedTensors()
    with saved:
        loss = captioner(*make_batch(captioner))
    expected = saved.bytes_without(captioner)
    assert loss.requires_grad
    assert found.encoder_kept + found.lm_kept == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("name,dtype", METHODS_AND_DTYPES)
def test_peaks_are_those_of_a_step_on_the_cpu(backbones, name, dtype):
    """Reference: the tensors of a real step, counted at its two largest moments, within 1 %."""
    found = memory.step_memory(make_meta_captioner(backbones, METHODS[name], dtype), make_args(), CPU, L)
    captioner, peaks = make_captioner(backbones, METHODS[name], dtype), []
    frames, labels = make_batch(captioner)
    for parameter in captioner.trained().values():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in captioner.trained().values()]
    with memory.MemoryCounter([frames, labels, *captioner.parameters(), *captioner.buffers(), *gradients]) as counter:
        with memory.call_before_and_after(captioner, lambda: peaks.append(counter.next_phase())):
            captioner(frames, labels).backward()
    assert found.encoder_peak == pytest.approx(peaks[0], rel=0.01)
    assert found.lm_peak == pytest.approx(max(peaks[1], counter.peak), rel=0.01)


def test_a_model_chooses_as_on_the_cpu():
    """By hand: the device that is reported, and where tensors are made and moved."""
    x, labels = torch.empty(3, device="meta"), torch.zeros(3, dtype=torch.long)
    with memory.PretendCPU():
        assert x.device.type == "cpu"
        assert torch.zeros(2, device=x.device).is_meta and labels.to(x.device).is_meta
    assert x.device.type == "meta" and torch.zeros(2, device="cpu").device.type == "cpu"


def test_what_a_step_consists_of(backbones):
    """By hand, from the shapes: ViT of width 16 on 17 tokens of 64 x 64 pixels, of whose 2 blocks one is adapted."""
    config = METHODS["no write-back"]
    captioner = make_meta_captioner(backbones, config, torch.bfloat16)
    whole = memory.step_memory(captioner, make_args(), CPU, L)
    assert whole.vit == 2 * sum(tensor.numel() for tensor in captioner.vit.parameters())
    assert whole.lm == 2 * sum(tensor.numel() for tensor in captioner.lm.parameters())
    assert whole.trained == 16 * sum(tensor.numel() for tensor in captioner.trained().values())
    assert (whole.inputs, whole.block_outputs) == (3 * B * T * 3 * 64**2, 2 * B * T * 17 * 16)
    activations = max(whole.encoder_peak, whole.lm_peak)
    assert whole.peak == whole.vit + whole.lm + whole.trained + whole.inputs + round(1.15 * activations)
    features = memory.step_memory(captioner, make_args(cache_features=True), CPU, L)
    assert (features.inputs, features.block_outputs) == (3 * B * T * 17 * 16 * 2, 0)
    assert features.lm_kept == whole.lm_kept and features.encoder_kept <= whole.encoder_kept
    micro = memory.step_memory(captioner, make_args(micro_batch_size=1), CPU, L)
    assert micro.inputs == whole.inputs and micro.lm_kept < 0.3 * whole.lm_kept
    gpu = memory.step_memory(captioner, make_args(micro_batch_size=1), GPU, L)
    assert gpu.inputs == T * 3 * 64**2
    assert gpu.fragmentation == 0 and gpu.lm_kept < micro.lm_kept  # attention weights are kept on the CPU in bf16 only
    assert captioner.lm_hidden == captioner.lm.hidden
    assert memory.step_memory(captioner, make_args(), CPU, L, processes=3) == memory.step_memory(
        captioner, make_args(batch_size=math.ceil(B / 3)), CPU, L)  # fmt: skip


# -------------------------------------------------------------------------------------- the plan


def test_the_plan_is_printed(backbones, tmp_path):
    """The numbers of the functions above, in aligned lines; nothing is written."""
    dataset = read_dataset("shapes", tmp_path, [9, 2, 2])
    files = sorted(tmp_path.rglob("*"))
    captioner = make_meta_captioner(backbones, METHODS["no write-back"])
    schedule = plan.make_schedule(9, 54, 4, 3, 2)

    def text_of(**flags) -> str:
        return plan.format_plan(make_args(**flags), dataset, schedule, captioner, CPU, 2 * L, caption_tokens=L)

    args = make_args(micro_batch_size=2, speed=2.0)
    assert "4 steps of 4 clips, 2 epochs" in plan.format_schedule(schedule, args)
    text = text_of(micro_batch_size=2, speed=2.0)
    assert "time of the steps: 0:08 at 2 clips/s" in text
    usual, longest = (memory.step_memory(captioner, args, CPU, length) for length in (L, 2 * L))
    for size in (sum(plan.cache_bytes(args, dataset.counts(), captioner).values()), usual.vit, usual.lm_kept,
                 usual.peak, longest.peak):  # fmt: skip
        assert plan.format_bytes(size) in text
    lines = text.splitlines()
    table = lines[[i for i, line in enumerate(lines) if "encoder  language model" in line][0] :][:11]
    assert len({len(line) for line in table}) == 1
    assert "warning: the run sees only 0.89 of a pass" in text
    assert "warning: the run takes" in text_of(speed=1e-4)
    assert "time of the steps: unknown" in text_of()
    assert sorted(tmp_path.rglob("*")) == files


def test_plan_of_shapes_that_are_not_made(flags, tmp_path):
    """`train.py --plan` prints the plan of the run that `finished_run` is, and makes neither dataset nor run."""
    words = [*flags[:-1], tmp_path / "shapes", "--out", tmp_path / "run", "--plan", "--speed", 4]
    done = run_forked(train, *words)
    assert done.returncode == 0, done.stderr
    assert "12 steps of 4 clips, 4 epochs" in done.stdout and "time of the steps: 0:12 at 4 clips/s" in done.stdout
    assert list(tmp_path.iterdir()) == []
