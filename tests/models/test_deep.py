"""Visual vectors in every block of the language model. Reference: hooks that add the equation's terms to the inputs of
blocks, for one clip and one caption; seeds 0 and 1, float32, within 1e-5."""

import pytest
import torch

from models.deep import STEP, TEXT
from models.generation import generate
from tests.tiny import EOS, T, clips, labels, make, randomized, record_block_outputs


def reference_hidden(captioner, prefix: torch.Tensor, vectors: torch.Tensor, start: int) -> torch.Tensor:
    """Last hidden states (1, S, C) of embeddings that begin with a prefix; its vectors (N, D) stand at `start`."""
    deep, hooks = captioner.deep, []
    rank = deep.up.shape[1]
    for i, block in enumerate(captioner.lm.blocks[1:]):
        down = deep.down.weight[i * rank : (i + 1) * rank]  # D_l: (r, D)

        def add(_, inputs, i=i, down=down):
            x = inputs[0].clone()
            for p in range(deep.prefix.shape[1]):
                x[0, p] += deep.sizes[i] * deep.prefix[i, p]
            for n, vector in enumerate(vectors):
                x[0, start + n] += deep.sizes[i] * STEP * (down @ vector) @ deep.up[i]
            return x, *inputs[1:]

        hooks.append(block.register_forward_pre_hook(add))
    hidden = captioner.lm.hidden(prefix)
    for hook in hooks:
        hook.remove()
    return hidden


@pytest.fixture(scope="module", params=["no write-back", "linear"])
def captioner(request):
    captioner = randomized(request.param, 0, deep_rank=3)
    if captioner.adapter is not None:
        captioner.measure_channels(clips(2, T, 1))
    return captioner.eval()


def visual_vectors(captioner, frames: torch.Tensor) -> torch.Tensor:
    """LN(Q) of a clip (N, D), or its pooled features with their frame vectors (T, D)."""
    queries, z = captioner.run_encoder(frames)
    return captioner.vit.pool(z[0]) + captioner.time_embed if queries is None else queries[0]


@torch.no_grad()
def test_the_loss_and_the_captions_are_those_of_hooks(captioner):
    """Two captions of each of two clips, packed behind one prefix; greedy ids of each clip, without a cache."""
    frames, ids = clips(2, T, 1), labels(["a cat", "a dog runs"], ["rain", "the sun"])
    expected = torch.zeros(())
    (_, prefixes, places), = captioner.prefixes(frames)
    found = generate(captioner.lm, prefixes, max_new_tokens=6, places=places)
    for clip in range(2):
        vectors = visual_vectors(captioner, frames[clip : clip + 1])
        prefix, start = captioner.prefix(frames[clip : clip + 1]), len(captioner.prompt(T)[0])
        for caption in ids[clip]:
            caption = caption[caption >= 0]
            x = torch.cat([prefix, captioner.lm.embed(caption[:-1])[None]], dim=1)
            hidden = reference_hidden(captioner, x, vectors, start)[0, prefix.shape[1] - 1 :]
            expected += torch.nn.functional.cross_entropy(captioner.lm.head(hidden), caption, reduction="sum")
        written: list[int] = []
        for _ in range(6):
            x = torch.cat([prefix, captioner.lm.embed(torch.tensor([written], dtype=torch.long))], dim=1)
            token = int(captioner.lm.head(reference_hidden(captioner, x, vectors, start)[0, -1]).argmax())
            if token == EOS:
                break
            written.append(token)
        assert found[clip] == written
    torch.testing.assert_close(captioner(frames, ids), expected, rtol=1e-5, atol=0)


def test_at_first_nothing_is_added_and_everything_learns():
    """The loss of a captioner without `deep`, bit for bit; after a step of U all of it has a gradient."""
    frames, ids = clips(2, T, 1), labels(["a cat"], ["rain"])
    plain, deep = make("no write-back", 0), make("no write-back", 0, deep_rank=3)
    deep.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(frames, ids), deep(frames, ids))
    deep.deep.up.data += 0.1
    deep(frames, ids).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in deep.deep.parameters())


def test_sizes_are_those_of_a_text(captioner):
    """Root mean square of what each block but the first reads of TEXT, its first token left out."""
    x = captioner.lm.embed(torch.tensor([captioner.tokenizer.encode(TEXT)]))
    outputs = record_block_outputs(captioner.lm, lambda: captioner.lm.hidden(x))
    expected = torch.stack([z[0, 1:].square().mean().sqrt() for z in outputs[:-1]])
    torch.testing.assert_close(captioner.deep.sizes, expected, rtol=1e-5, atol=0)
