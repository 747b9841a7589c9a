"""The training data of the tiny models, and the tiny MLLM.

References: the scenes of `shapes` that the data are drawn from; the tiny ViT's own tensors.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from backbones import neutral, pretrain, stills
from models.generation import generate
from models.lm import CausalLM
from models.mllm import MLLM
from models.tokenizer import load_tokenizer
from models.vit import ViT
from video_data import shapes

BACKBONES = Path(pretrain.__file__).parent
TINY_MLLM, TOKENIZER = MLLM.from_pretrained(BACKBONES / "tiny-mllm").eval(), load_tokenizer(BACKBONES / "tiny-mllm")


def nouns(scene) -> list[str]:
    return sorted(f"{shape.colour} {shape.kind}" for shape in scene)


def named(caption: str) -> list[str]:
    return [noun for noun, _ in shapes.parse_claims(caption)]


def test_captions_of_a_batch_name_what_its_stills_show():
    """100 prompts of two stills, found again by their features in 20 albums of seed 0; no motion is named."""
    data = stills.AlbumData(TINY_MLLM.vit, TOKENIZER, 20, seed=0)
    features, labels = data.batch(100, 2)
    captions = TOKENIZER.decode([[i for i in row if i >= 0] for row in labels.tolist()])
    for pair, caption in zip(features.half(), captions, strict=True):
        (album, first), (_, second) = ((data.features == still).flatten(2).all(2).nonzero()[0] for still in pair)
        visible = data.seen[album][first] | data.seen[album][second]
        assert named(caption) == nouns(shape for shape, v in zip(data.scenes[album], visible, strict=True) if v)
    assert {motion for caption in captions for _, motion in shapes.parse_claims(caption)} == {""}


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 8])
def test_the_tiny_mllm_names_the_shapes_of_stills(count):
    """19 of 20 scenes that it has not seen. Its ViT is tiny-vit, bit for bit."""
    vit = ViT.from_pretrained(BACKBONES / "tiny-vit").state_dict()
    assert all(torch.equal(tensor, vit[name]) for name, tensor in TINY_MLLM.vit.state_dict().items())
    scenes, images = [], []
    for index in range(20):
        rng = np.random.default_rng([1, index])
        scene = shapes.draw_scene(rng)
        while any(shape.motion == "blink" for shape in scene):  # it may be out of sight
            scene = shapes.draw_scene(rng)
        scenes.append(scene)
        images.append(shapes.render(scene, np.full(count, 0.5), rng)[0])
    frames = torch.from_numpy(np.stack(images)).permute(0, 1, 4, 2, 3)  # (B, T, 3, S, S)
    visual = TINY_MLLM.connect(TINY_MLLM.vit(TINY_MLLM.vit.normalize(frames).flatten(0, 1))).unflatten(0, (20, count))
    ids = [torch.tensor(ids, dtype=torch.long) for ids in TINY_MLLM.prompt(TOKENIZER, count)]
    captions = TOKENIZER.decode(generate(TINY_MLLM.lm, TINY_MLLM.merge(ids, visual.unbind(1)), max_new_tokens=20))
    assert sum(named(caption) == nouns(scene) for caption, scene in zip(captions, scenes, strict=True)) >= 19


def test_models_are_made_again_bit_for_bit(tmp_path):
    """One step of each stage, of the tiny MLLM and of the neutral models; another seed gives other tensors."""
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = shutil.copytree(BACKBONES, tmp_path / name)
        pretrain.pretrain_mllm(folder / "tiny-mllm", folder, albums=3, texts=20, steps=(1, 1), batch_size=2, seed=seed)
        pretrain.pretrain_vit(folder / "neutral-vit", 8, 1, 4, seed, patches=False)
        vit = ViT.from_pretrained(folder / "neutral-vit")
        neutral.pretrain_lm(folder / "neutral-lm", vit, texts=200, albums=2, steps=(1, 1), batch_size=2, seed=seed)
        MLLM.from_pretrained(folder / "tiny-mllm"), CausalLM.from_pretrained(folder / "neutral-lm")
        parts = "tiny-mllm", "neutral-vit", "neutral-lm"
        files.append([(folder / part / "model.safetensors").read_bytes() for part in parts])
    assert files[0] == files[1] and all(a != c for a, c in zip(files[0], files[2], strict=True))
