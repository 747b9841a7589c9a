"""The training data of the tiny multimodal language model: albums of still images, and captions that name shapes.

An album holds stills of one scene. In half of the albums nothing moves. In the others each still has the shapes at
another place, in another size and at another angle, and some are out of sight. A prompt shows one or several stills of
an album, in random order; the answer says which shapes they show. So the model learns that it may see one shape in many
images, and nothing of motion.

Letters: n albums, A stills an album, T stills in a prompt, S side in pixels, P tokens of the ViT a still, D their
width, B albums in a batch, L tokens of the longest caption with its EOS.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.lm_data import pad
from models.mllm import MLLM
from models.mllm_prompts import INSTRUCTION
from models.tokenizer import Tokenizer
from video_data import shapes
from video_data.batches import IGNORE_INDEX

STILLS = 8  # A: as many as the frames of a clip
VISIBLE = 12  # pixels of a shape that count as seeing it
# Captions of one and of two shapes: nouns n, m.
ONE_SHAPE = ("a {n}", "there is a {n}", "the {n}", "one {n}", "we see a {n}")
TWO_SHAPES = ("a {n} and a {m}", "there is a {n} and a {m}", "the {n} and the {m}", "one {n} and one {m}",
              "we see a {n} and a {m}")  # fmt: skip


def draw_album(index: int, seed: int) -> tuple[np.ndarray, tuple[shapes.Shape, ...], np.ndarray]:
    """Stills uint8 (A, S, S, 3), their scene, and which of its shapes each shows, bool (A, shapes).

    Each still shows at least one shape.
    """
    rng = np.random.default_rng([seed, 10, index])
    scene, at_rest, camera = shapes.draw_scene(rng), rng.random() < 0.5, rng.integers(2**32)
    stills, seen = [], []
    while len(stills) < STILLS:
        u = np.full(STILLS if at_rest else 1, rng.uniform(0, 1))
        # The same random numbers draw the same background behind each still.
        images, masks = shapes.render(scene, u, np.random.default_rng(camera))
        visible = masks.sum((2, 3)).T > VISIBLE  # (stills, shapes)
        if visible.any():
            stills.extend(images)
            seen.extend(visible)
        if not at_rest:
            scene = tuple(replace(shapes.draw_shape(rng), colour=s.colour, kind=s.kind) for s in scene)
    return np.stack(stills), scene, np.stack(seen)


def name_shapes(scene: tuple[shapes.Shape, ...], rng: np.random.Generator) -> str:
    """A caption with random wording that names one or two shapes in random order."""
    nouns = [f"{scene[i].colour} {scene[i].kind}" for i in rng.permutation(len(scene))]
    templates = ONE_SHAPE if len(scene) == 1 else TWO_SHAPES
    text = templates[rng.integers(len(templates))].format(n=nouns[0], m=nouns[-1])
    return text.replace("a orange", "an orange")


class AlbumData:
    """Albums as the frozen ViT sees them, and their captions as token ids."""

    @torch.no_grad()
    def __init__(self, mllm: MLLM, tokenizer: Tokenizer, count: int, seed: int):
        self.rng, self.tokenizer = np.random.default_rng([seed, 11]), tokenizer
        self.features = torch.empty(count, STILLS, *mllm.vit.position.shape, dtype=torch.half)  # (n, A, P, D)
        self.scenes, self.seen = [], []
        for i in range(count):
            stills, scene, seen = draw_album(i, seed)
            pixels = mllm.vit.normalize(torch.from_numpy(stills).permute(0, 3, 1, 2))
            self.features[i] = mllm.vit(pixels)
            self.scenes.append(scene)
            self.seen.append(seen)
        texts = {t: mllm.prompt(tokenizer, t, INSTRUCTION) for t in range(1, STILLS + 1)}
        self.prompts = {t: [torch.tensor(ids, dtype=torch.long) for ids in rows] for t, rows in texts.items()}

    def batch(self, size: int, stills: int) -> tuple[Tensor, Tensor]:
        """Features (B, T, P, D) of T random stills of B random albums; captions of what they show, ids (B, L)."""
        albums = self.rng.integers(len(self.scenes), size=size)
        order = np.stack([self.rng.permutation(STILLS)[:stills] for _ in albums])  # (B, T)
        captions = []
        for album, chosen in zip(albums, order, strict=True):
            visible = self.seen[album][chosen].any(0)
            scene = tuple(s for s, is_visible in zip(self.scenes[album], visible, strict=True) if is_visible)
            captions.append(name_shapes(scene, self.rng))
        eos = self.tokenizer.processor.eos_id()
        labels = pad([[*self.tokenizer.encode(caption), eos] for caption in captions])
        return self.features[albums[:, None], order].float(), labels

    def loss(self, mllm: MLLM, size: int, stills: int) -> Tensor:
        """Cross-entropy of the captions of a batch, each after the model's own prompt with T stills."""
        features, labels = self.batch(size, stills)
        visual = mllm.connect(features.flatten(0, 1)).unflatten(0, (size, stills)).unbind(1)  # T times (B, P', C)
        prompt = mllm.merge(self.prompts[stills], visual)
        caption = mllm.lm.embed(labels[:, :-1].clamp(min=0))
        hidden = mllm.lm.hidden(torch.cat([prompt, caption], dim=1))[:, -labels.shape[1] :]
        return F.cross_entropy(mllm.lm.head(hidden).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
