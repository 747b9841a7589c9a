"""What the tiny ViT and the tiny multimodal language model learn from: still images of `shapes`.

The ViT predicts at each patch the colour and kind of the shape that covers it and where that shape's centre is, how
large it is and how it is rotated; at the class token which shapes are present.

The multimodal model sees albums. An album holds stills of one scene. In half of the albums nothing moves. In the others
each still has the shapes at another place, in another size and at another angle, and some are out of sight. A prompt
shows one or several stills of an album, in random order; the answer says which shapes they show. So the model learns
that it may see one shape in many images, and nothing of motion.

Shapes: n images or albums, A stills per album, T stills in a prompt, S side in pixels, P tokens of the ViT per still, D
their width, B albums in a batch, L tokens of the longest caption with its EOS.
"""

from dataclasses import replace
from itertools import compress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.texts import pad, text_loss
from models.mllm import MLLM
from models.tokenizer import Tokenizer
from models.vit import ViT
from video_data import shapes

COLOURS, KINDS = list(shapes.COLOURS), list(shapes.KINDS)
PATCH = 16  # pixels
NO_SHAPE = -1
STILLS = 8  # A: as many as the frames of a clip
VISIBLE = 12  # pixels of a shape that count as seeing it
OPENINGS = (("", "a"), ("there is ", "a"), ("", "the"), ("", "one"), ("we see ", "a"))  # of a caption; an article

# --------------------------------------------------------------------------------------- for the ViT


def draw_still(index: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """An image (S, S, 3) uint8 and its targets.

    classes (P-1, 2): colour and kind of the shape that covers most of each patch, or -1. geometry (P-1, 5) of that
    shape: centre from the image's centre in patches, log radius, cosine and sine of the angle times the shape's
    symmetry. presence (colours * kinds,) of each shape in the image.
    """
    rng = np.random.default_rng([seed, 9, index])
    scene, u = shapes.draw_scene(rng), rng.uniform(0, 1, 1)
    frames, masks = shapes.render(scene, u, rng)
    side = shapes.SIDE // PATCH
    share = masks[:, 0].reshape(len(scene), side, PATCH, side, PATCH).mean((2, 4)).reshape(len(scene), -1)
    classes = np.full((side * side, 2), NO_SHAPE, np.int64)
    geometry = np.zeros((side * side, 5), np.float32)
    presence = np.zeros((len(COLOURS), len(KINDS)), np.float32)
    for i, shape in enumerate(scene):
        covered = (share[i] > 0.05) & (share[i] == share.max(0))  # (P-1,)
        x, y, radius, angle, _ = (float(v[0]) for v in shape.state_at(u))
        colour, kind = COLOURS.index(shape.colour), KINDS.index(shape.kind)
        presence[colour, kind] = covered.any()
        turn = angle * shapes.SYMMETRY.get(shape.kind, 0)
        classes[covered] = colour, kind
        geometry[covered] = x / PATCH - side / 2, y / PATCH - side / 2, np.log(radius / 9), np.cos(turn), np.sin(turn)
    return frames[0], classes, geometry, presence.reshape(-1)


class StillHeads(nn.Module):
    """Linear heads on the ViT's tokens, discarded after pretraining."""

    def __init__(self, width: int):
        super().__init__()
        self.colour, self.kind = (nn.Linear(width, len(names) + 1) for names in (COLOURS, KINDS))
        self.geometry = nn.Linear(width, 5)
        self.presence = nn.Linear(width, len(COLOURS) * len(KINDS))

    def patch_loss(self, tokens: Tensor, classes: Tensor, geometry: Tensor) -> Tensor:
        """Tokens (n, P, D) and targets of `draw_still` -> the loss of the patches."""
        patches, covered = tokens[:, 1:], classes[..., 0] != NO_SHAPE  # (n, P-1, D), (n, P-1)
        return (F.cross_entropy(self.colour(patches).flatten(0, 1), classes[..., 0].flatten() + 1)
                + F.cross_entropy(self.kind(patches).flatten(0, 1), classes[..., 1].flatten() + 1)
                + 4 * F.mse_loss(self.geometry(patches[covered]), geometry[covered]))

    def class_token_loss(self, tokens: Tensor, presence: Tensor) -> Tensor:
        """Tokens (n, P, D) and a target of `draw_still` -> the loss of the class token."""
        return 20 * F.binary_cross_entropy_with_logits(self.presence(tokens[:, 0]), presence)


# ------------------------------------------------------------------------------------- for the MLLM


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


def name_shapes(scene: list[shapes.Shape], rng: np.random.Generator) -> str:
    """A caption with random wording that names one or two shapes in random order."""
    nouns = [f"{scene[i].colour} {scene[i].kind}" for i in rng.permutation(len(scene))]
    opening, article = OPENINGS[rng.integers(len(OPENINGS))]
    return (opening + " and ".join(f"{article} {noun}" for noun in nouns)).replace("a orange", "an orange")


class AlbumData:
    """Albums as the frozen ViT sees them, and their captions as token ids."""

    @torch.no_grad()
    def __init__(self, vit: ViT, tokenizer: Tokenizer, count: int, seed: int):
        self.rng, self.tokenizer = np.random.default_rng([seed, 11]), tokenizer
        self.features = torch.empty(count, STILLS, *vit.position.shape, dtype=torch.half)  # (n, A, P, D)
        self.scenes, self.seen = [], []
        for i in range(count):
            stills, scene, seen = draw_album(i, seed)
            self.features[i] = vit(vit.normalize(torch.from_numpy(stills).permute(0, 3, 1, 2)))
            self.scenes.append(scene)
            self.seen.append(seen)

    def batch(self, size: int, stills: int) -> tuple[Tensor, Tensor]:
        """Features (B, T, P, D) of T random stills of B random albums; captions of what they show, ids (B, L)."""
        albums = self.rng.integers(len(self.scenes), size=size)
        order = np.stack([self.rng.permutation(STILLS)[:stills] for _ in albums])  # (B, T)
        labels, eos = [], self.tokenizer.processor.eos_id()
        for album, chosen in zip(albums, order, strict=True):
            visible = compress(self.scenes[album], self.seen[album][chosen].any(0))
            labels.append([*self.tokenizer.encode(name_shapes([*visible], self.rng)), eos])
        return self.features[albums[:, None], order].float(), pad(labels)

    def loss(self, mllm: MLLM, size: int, stills: int) -> Tensor:
        """Cross-entropy of the captions of a batch, each after the model's own prompt with T stills."""
        features, labels = self.batch(size, stills)
        visual = mllm.connect(features.flatten(0, 1)).unflatten(0, (size, stills)).unbind(1)  # T times (B, P', C)
        texts = [torch.tensor(ids, dtype=torch.long) for ids in mllm.prompt(self.tokenizer, stills)]
        return text_loss(mllm.lm, mllm.merge(texts, visual), labels)
