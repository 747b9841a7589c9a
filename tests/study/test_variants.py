"""The variants beside their equations, those of the Q-Adapter one clip, query, head and frame at a time.

Seed 0, float64, tolerance 1e-9.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Config
from common.errors import InputError
from model import Captioner, variant_of
from qadapter import HEADS, GatedCrossAttention, QAdapter
from study.variants import VARIANTS
from tests.tiny import LABELS, clips, randomized
from tests.tiny import make as make_captioner

N, T, P, D, R = 6, 4, 5, 16, 8  # T is that of tests/tiny.py, too
CONFIG = Config(queries=N, rank=R, frames=T, last_blocks=1)
CONFIG2 = replace(CONFIG, last_blocks=2)
NO_CHANGES = "no-changes", "per-frame", "no-time-no-changes"


def make(name: str | None) -> QAdapter:
    """The Q-Adapter or a variant, on one block, with weights as after some training."""
    torch.manual_seed(0)
    adapter = (VARIANTS[name] if name else QAdapter)(D, 1, CONFIG).double()
    adapter.measure_channels(torch.randn(3, T, 1, P, D, dtype=torch.float64) * 3 + 1)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return adapter


def naive(name: str | None, adapter: QAdapter, z: Tensor) -> Tensor:
    """The last block's output of a clip (T, P, D) -> LN(Q) (N, D) by the equations in qadapter.py and the variant's."""
    block, zero = adapter.blocks[0], torch.zeros(P, D, dtype=torch.float64)
    z = torch.zeros_like(z) if name == "blind" else z
    mean, std = (0, 1) if name == "raw-channels" else (block.mean, block.std)
    y = (F.layer_norm(z, (D,)) - mean) / std  # (T, P, D)
    rows = []
    for query in range(N):
        q = adapter.queries[query]
        heads = []
        for h in (slice(i * R // HEADS, (i + 1) * R // HEADS) for i in range(HEADS)):
            values, logits = [], []
            for t in range(T):
                if name == "per-frame" and t != query * T // N:
                    continue
                now = y[t] + (0 if "no-time" in str(name) else adapter.time_embed[t])  # (P, D)
                k, v = now @ block.kv.weight[:R][h].T, now @ block.kv.weight[R:][h].T  # (P, d)
                if name not in NO_CHANGES:
                    change = y[t] - y[t - 1] if t else zero
                    k = k + change @ block.kv_change.weight[:R][h].T
                    v = v + change @ block.kv_change.weight[R:][h].T
                if name == "gate-patch":
                    v = v * torch.sigmoid(now @ block.gate.weight.T + block.gate.bias)
                if name == "gate-head":
                    v = v * torch.sigmoid(block.gate(block.norm(q)))[h.start * HEADS // R]
                if name == "gate-rank":
                    v = v * torch.sigmoid(block.gate(block.norm(q)))[h]
                logits.append(k @ (block.q.weight[h] @ block.norm(q)) / (R // HEADS) ** 0.5)
                values.append(v)
            heads.append(torch.cat(logits).softmax(0) @ torch.cat(values))
        a = block.o.weight @ torch.cat(heads)  # (D,)
        normed, normed_a, layer = block.norm(q), F.layer_norm(a, (D,)), block.gate
        if name in ("gate-patch", "gate-head", "gate-rank", "gate-write"):
            g = 1
        else:
            g = torch.sigmoid(layer(torch.cat([normed, normed_a])))
        rows.append(q + g * a)
    return adapter.norm(torch.stack(rows))


@pytest.mark.parametrize("name", [None, *(name for name in VARIANTS if not issubclass(VARIANTS[name], Captioner))])
def test_a_variant_is_its_equations(name):
    adapter, z = make(name), torch.randn(2, T, 1, P, D, dtype=torch.float64)
    found = adapter.read_outputs(z)
    torch.testing.assert_close(found, torch.stack([naive(name, adapter, clip[:, 0]) for clip in z]), rtol=0, atol=1e-9)
    assert adapter.last_gates.shape == (1, 2, N)
    found.square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters() if p.requires_grad)


def test_a_gate_of_what_is_written():
    """Each token plus sigmoid((Y + E) w + b) times what write-back adds without that gate. What the queries read is
    ungated. In a captioner the gates get gradients; the last block, after which nothing reads patches, has none."""
    torch.manual_seed(0)
    block = VARIANTS["gate-write"].Block(D, CONFIG, write_back=True).double()
    for parameter in block.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    block.mean.normal_()
    block.std.uniform_(0.5, 2)
    z, queries, time = (torch.randn(*s, dtype=torch.float64) for s in ((2, T, P, D), (2, N, D), (T, D)))
    new, gates, written = block(queries, z, time)
    usual = GatedCrossAttention.write(block, F.layer_norm(z, (D,)), new, z, time)
    y = (F.layer_norm(z, (D,)) - block.mean) / block.std
    gate = torch.sigmoid((y + time[:, None]) @ block.gate.weight.T + block.gate.bias)
    torch.testing.assert_close(written, z + gate * (usual - z), rtol=0, atol=1e-9)
    assert (gates == 1).all()
    captioner = randomized("write-back", 1, variant="gate-write")
    captioner(clips(2, T, 2), LABELS).backward()
    *written, last = [block.gate for block in captioner.adapter.blocks]
    assert last is None and all(gate.weight.grad.any() for gate in written)


@pytest.mark.parametrize("method, layers", [("lora", 6), ("lora-lm", 7)])
def test_lora_in_all_linear_layers(method, layers):
    """Model seed 1, frames seed 2. Every linear layer of every block, and no other, has an update that gets a
    gradient. While the new updates are zero, the loss is that of the method, within 1e-5."""
    captioner, usual = (randomized(method, 1, variant=variant) for variant in ("all-linear", None))
    for name, parameter in captioner.trained().items():
        parameter.data = usual.trained()[name].data if name in usual.trained() else parameter.data * ("lora_a" in name)
    torch.testing.assert_close(captioner(clips(2, T, 2), LABELS), usual(clips(2, T, 2), LABELS), rtol=1e-5, atol=0)
    captioner(clips(2, T, 2), LABELS).backward()
    blocks = (captioner.vit if method == "lora" else captioner.lm).blocks
    linear = [layer for layer in blocks.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linear) == layers * len(blocks)
    assert all(layer.lora_b.grad is not None and layer.weight.grad is None for layer in linear)
    assert sum("lora" in name for name in captioner.trained()) == 2 * len(linear)


def test_the_projector_of_an_mllm_is_trained():
    """Model seed 1, frames seed 2. Step 0 is the MLLM, bit for bit. Its projector gets gradients beside LoRA, in
    float32 although it is bf16."""
    captioner, usual = (make_captioner("lora-lm", 1, "llava", variant=name) for name in ("train-projector", None))
    assert torch.equal(captioner(clips(2, T, 2), LABELS), usual(clips(2, T, 2), LABELS))
    captioner = randomized("lora-lm", 1, "llava", torch.bfloat16, variant="train-projector")
    captioner(clips(2, T, 2), LABELS).backward()
    trained = {name: p for name, p in captioner.trained().items() if "lora" not in name}
    names = (name for name, _ in usual.backbone.projector.named_parameters())
    assert trained.keys() == {f"backbone.projector.trained.{name}" for name in names}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained.values())


def test_same_block_reads_the_last_block_each_time():
    """Seed 0, two reads: the Q-Adapter with the outputs of that block in place of both."""
    torch.manual_seed(0)
    z = torch.randn(2, T, 2, P, D)
    same, usual = VARIANTS["same-block"](D, 2, CONFIG2), QAdapter(D, 2, CONFIG2)
    same.load_state_dict(usual.state_dict())
    repeated = z[:, :, [1, 1]]
    for adapter, outputs in ((same, z), (usual, repeated)):
        adapter.measure_channels(outputs)
    assert torch.equal(same.read_outputs(z), usual.read_outputs(repeated))


def test_with_changes():
    """Model seed 1, frames seed 2, within 1e-5: connector(token + E + W (token - the one before)), frame by frame. It
    trains beside frozen models in bf16, too. Step 0 of LoRA from an MLLM is the MLLM, bit for bit."""
    lora, usual = (make_captioner("lora-lm", 1, "llava", variant=name) for name in ("with-changes", None))
    assert lora(clips(2, T, 2), LABELS) == usual(clips(2, T, 2), LABELS)
    new = lora.trained().keys() - usual.trained().keys()
    assert new == {"time_embed", "change.weight", "connector.weight", "connector.bias"}
    randomized("linear", 1, dtype=torch.bfloat16, variant="with-changes")(clips(2, T, 2), LABELS).backward()
    captioner, frames = randomized("linear", 1, variant="with-changes", grid=2), clips(2, T, 2)
    tokens = captioner.backbone.frame_tokens(captioner.run_encoder(frames)[1].flatten(0, 1), 2).unflatten(0, (2, T))
    for found, clip in zip(captioner.encode(frames)[0].unflatten(1, (T, 4)), tokens, strict=True):
        for t in range(T):
            change = clip[t] - clip[t - 1] if t else torch.zeros_like(clip[0])
            read = clip[t] + captioner.time_embed[t] + change @ captioner.change.weight.T
            torch.testing.assert_close(found[t], captioner.connector(read) * captioner.prefix_scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant, message", [("all-linear", "--method lora"), ("train-projector", "--mllm")])
def test_a_variant_of_other_models_is_refused(variant, message):
    with pytest.raises(InputError, match=f"--variant {variant}: expected {message}"):
        make_captioner("linear", variant=variant)


@pytest.mark.parametrize("fields, message", [
    ({"variant": "gate-head", "gate": "none"}, "gate-head: expected without --gate none"),
    ({"variant": "blind", "write_back": True}, "blind: expected without --write-back"),
    ({"variant": "gate-write"}, "gate-write: expected with --write-back"),
    ({"variant": "with-changes", "method": "none"}, "expected no variant for --method none"),
    ({"variant": "blind", "method": "linear"}, "expected one of .*, all-linear, .* for --method linear")])
def test_a_variant_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        variant_of(Captioner, Config(**fields))
