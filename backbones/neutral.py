"""Makes neutral-vit and neutral-lm, two tiny models that favour no method: `python -m backbones.neutral`.

tiny-vit and tiny-lm were made for the demo, and suit queries (docs/datasets.md). These two learn as public models do:

    neutral-vit   its class token alone learns which shapes are in a still image, as CLIP's learns captions [1]
    neutral-lm    learns captions as text, then captions of stills from their patches, as LLaVA does [2]: through a
                  projector of two layers, which is thrown away, from the ViT's last block but one, since nothing trains
                  the patches of the last. It goes on with its texts meanwhile

Stills show no motion, so the language model knows motion from text alone. It has never read what queries write, and its
tokenizer has one token for each colour and each kind, so that the model has to join them.

Shapes: B albums in a batch, T stills, P tokens of the ViT per still, D their width, C width of the language model.

References
[1] https://arxiv.org/abs/2103.00020
[2] https://arxiv.org/abs/2304.08485, https://arxiv.org/abs/2310.03744
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from backbones.pretrain import STILLS_PER_PROMPT, pretrain_vit, save_weights, start_lm, train
from backbones.stills import AlbumData
from backbones.texts import pad, text_loss
from common import cli
from models.names import lm_tensor_names
from models.pair import PROMPT, Pair
from models.tokenizer import SentencePieceTokenizer
from models.vit import ViT
from video_data import shapes


def documents(count: int, rng: np.random.Generator) -> list[str]:
    """Captions, every other one after a paraphrase."""
    scenes = [shapes.draw_scene(rng) for _ in range(count)]
    return [" ".join(f"{PROMPT} {shapes.describe(scene, rng)}" for _ in range(1 + i % 2))
            for i, scene in enumerate(scenes)]


def pretrain_lm(folder: Path, vit: ViT, texts: int, albums: int, steps: tuple[int, int], batch_size: int,
                seed: int) -> None:
    """Trains tokenizer and language model of a folder: on text, then on text and on stills, of which it
    reads the patches of the ViT's last block."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 13])
    lines = documents(texts, rng)
    lm, processor = start_lm(folder, lines, ())
    tokenizer = SentencePieceTokenizer(processor)
    pair, data = Pair(vit, lm), AlbumData(vit, tokenizer, albums, seed)
    projector = nn.Sequential(nn.Linear(vit.config.width, lm.config.width), nn.GELU(),
                              nn.Linear(lm.config.width, lm.config.width))
    before, after = (torch.tensor(ids) for ids in pair.prompt(tokenizer, 1, ""))
    rows = [[*tokenizer.encode(line), processor.eos_id()] for line in lines]

    def document_loss() -> Tensor:
        chosen = rng.integers(len(rows), size=batch_size)
        return text_loss(lm, lm.embed(before).expand(batch_size, -1, -1), pad([rows[i] for i in chosen]))

    def whole_loss() -> Tensor:
        features, labels = data.batch(batch_size, int(rng.choice(STILLS_PER_PROMPT)))  # (B, T, P, D)
        visual = projector(vit.patches(features.flatten(0, 1))).unflatten(0, features.shape[:2])  # (B, T, P-1, C)
        prefix = pair.merge([before, after], [visual.flatten(1, 2)])
        return document_loss() + text_loss(lm, prefix, labels)

    train("lm, texts", [*lm.parameters()], document_loss, steps[0], peak_lr=4e-3)
    train("lm, stills", [*lm.parameters(), *projector.parameters()], whole_loss, steps[1], peak_lr=2e-3)
    save_weights(folder, lm, lm_tensor_names(lm))


def main() -> None:
    parser = cli.Parser("Makes the weights and tokenizer of the neutral tiny models.", "python -m backbones.neutral")
    parser.add_argument("--folder", type=cli.path, default=Path(__file__).parent,
                        help="holds neutral-vit and neutral-lm with their config.json; weights are replaced")
    folder = parser.parse_args().folder
    pretrain_vit(folder / "neutral-vit", count=60_000, steps=4000, batch_size=128, seed=0, patches=False)
    vit = ViT.from_pretrained(folder / "neutral-vit")
    vit.keep_blocks(vit.config.depth - 1)
    pretrain_lm(folder / "neutral-lm", vit, texts=50_000, albums=4000, steps=(1500, 1500), batch_size=32, seed=0)


if __name__ == "__main__":
    cli.run(main)
