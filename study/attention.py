"""Where the queries look: `python -m study.attention RUN` measures it on the test clips of `shapes`.

The abstract says that queries and a gate extract "sparse, caption-relevant features". On `shapes`, captions speak of
the shapes alone, and each scene can be drawn again, which gives the part of each patch that each shape covers. Columns
of the table, means over the clips:

    named      captions that name the shapes, and
    motion     those that are right about motion, too, if this block's read is left out (g = 0)
    tokens     how many tokens a head of a query looks at: exp(entropy of its attention)
    shapes     of the attention to patches, mean over the heads, the share on shapes, where a patch counts by the part
               of it that shapes cover; mean over the queries
    by gate    the same, queries weighted by their gates, because a gate decides how much of a read is kept
    ratio      "by gate" divided by the share of all patches that shapes cover
    top        "shapes" if a head looked at as many patches, evenly, and at those that shapes cover most
    purity     of clips of two shapes: the larger shape's part of a query's attention to shapes, mean over the queries,
               weighted by that attention; 0.5: both alike, 1: one alone
    gate, sd   mean, and standard deviation of a query's gate between clips, mean over the queries
    gA/Q       rms(g A) / rms(Q): how large is what a block adds, beside what it is added to

The first row is even attention to all tokens, and captions with all reads; the last one has captions with every gate at
its block's mean.

Shapes: B clips, T frames, S side in pixels, P tokens of the ViT per frame, p of them patches, D ViT width, J adapted
blocks, N queries, h heads.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from common import cli
from common.errors import InputError, reading
from evaluate import BATCH_SIZE, load_run, read_run_dataset
from qadapter import GatedCrossAttention
from report.attention import record_attention
from video_data import read_frames, shapes
from video_data.video import frames_at, sample_positions

COLUMNS = "named", "motion", "tokens", "shapes", "by gate", "ratio", "top", "purity", "gate", "sd", "gA/Q"


def covered_parts(path: Path, captions: tuple[str, ...], seed: int, frames: int, vit) -> Tensor:
    """The part of each patch that each shape covers and no other hides (2, T, p), zero for one that is not there.
    Raises InputError if the seed does not draw a scene with these captions."""
    with reading(path):
        _, masks, expected = shapes.draw_clip(path, seed)
    if [*captions] != expected:
        raise InputError(f"{path}: expected the captions of a scene that --seed {seed} draws")
    indices, _ = frames_at([i / shapes.RATE for i in range(shapes.FRAMES)], sample_positions(frames))
    size, resize = vit.preprocessing.size, vit.preprocessing.resize
    crop = slice((resize - size) // 2, (resize + size) // 2)
    seen = F.interpolate(torch.from_numpy(masks[:, indices]), (resize, resize), mode="bilinear")[..., crop, crop]
    parts = F.adaptive_avg_pool2d(seen, vit.config.grid).flatten(2)  # (1 or 2, T, p)
    return F.pad(parts, (0, 0, 0, 0, 0, 2 - len(parts)))  # (2, T, p)


def attention_to_shapes(weights: Tensor, parts: Tensor) -> Tensor:
    """Attention (J, B, h, N, T, P) and the covered parts of patches (B, 2, T, p) -> of the attention to patches, mean
    over the heads, the share on each shape (J, B, N, 2)."""
    on_patches = weights.mean(2)[..., -parts.shape[-1] :]  # (J, B, N, T, p), without class token
    return torch.einsum("jbntp,bstp->jbns", on_patches / on_patches.sum((-1, -2), keepdim=True), parts)


def purity(on_shapes: Tensor) -> Tensor:
    """The share on each shape (..., N, 2) -> the larger one's part, mean over queries, weighted by that share (...)."""
    return on_shapes.amax(-1).sum(-1) / on_shapes.sum((-1, -2))


@torch.no_grad()
def measure(captioner, frames: Tensor, parts: Tensor) -> tuple[Tensor, ...]:
    """Of frames uint8 (B, T, 3, S, S) and their covered parts: tokens, shapes, by gate and purity as in the table, mean
    squares of g A and of Q, (J, B) each; gates (J, B, N)."""
    squares: list[Tensor] = []

    def record(module, inputs: tuple, outputs: tuple) -> None:
        if isinstance(module, GatedCrossAttention):
            squares.append(torch.stack([outputs[0] - inputs[0], inputs[0]]).square().mean((2, 3)))  # (2, B)

    with register_module_forward_hook(record):
        maps = record_attention(captioner, frames)
    weights = maps.weights / maps.weights.sum((-1, -2), keepdim=True)  # two frames may share a step of the ViT
    read, query = torch.stack(squares, dim=1)  # (J, B)
    tokens = torch.special.entr(weights).sum((-1, -2)).exp().mean((2, 3))  # (J, B)
    on_shapes = attention_to_shapes(weights, parts)  # (J, B, N, 2)
    by_gate = (maps.gates * on_shapes.sum(-1)).sum(-1) / maps.gates.sum(-1)  # (J, B)
    return tokens, on_shapes.sum(-1).mean(-1), by_gate, purity(on_shapes), read, query, maps.gates


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0], "python -m study.attention RUN [--data DIR]")
    parser.add_argument("run", type=cli.path, metavar="RUN", help="a folder that train.py made")
    parser.add_argument("--data", type=cli.path, help="the dataset's folder (default: as in training)")
    parser.add_argument("--seed", type=cli.number(int, 0), default=0, help="of the dataset's scenes (default: 0)")
    args = parser.parse_args()
    captioner, _ = load_run(args.run, torch.device("cpu"))
    vit, config = captioner.vit, replace(captioner.config, data=args.data or captioner.config.data)
    if config.method != "qadapter" or config.dataset != "shapes" or config.write_back:
        raise InputError(f"{args.run}: expected a run of --method qadapter on --dataset shapes without --write-back")
    clips = read_run_dataset(args.run, config, ["test"]).splits["test"]
    parts = torch.stack([covered_parts(clip.path, clip.captions, args.seed, config.frames, vit) for clip in clips])
    frames = torch.stack([read_frames(clip.path, config.frames, vit.preprocessing) for clip in clips]).split(BATCH_SIZE)
    found = [measure(captioner, *batch) for batch in zip(frames, parts.split(BATCH_SIZE), strict=True)]
    tokens, on_any, by_gate, pure, read, query, gates = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
    references = {clip.id: clip.captions for clip in clips}
    areas = parts.sum((2, 3))  # of each shape (clips, 2)
    two = areas.amin(1) > 0  # (clips,): which of them have two shapes
    covered = parts.sum(1).flatten(1).sort(descending=True)[0]  # (clips, T*p), the most covered patches first
    area = covered.mean()

    def show(name: str, *numbers: float) -> None:
        """Prints a row of the table, which begins with the share of captions that are right now."""
        captions = [caption for batch in frames for caption in captioner.caption(batch)]
        right = shapes.attribute_accuracy(references, dict(zip(references, captions, strict=True)))
        print(f"{name:8}" + "".join(f"{x:9.3g}" for x in (right["shapes"], right["motion"], *numbers)))

    print(f"{len(clips)} clips, {two.sum()} of two shapes\n{'':8}" + "".join(f"{name:>9}" for name in COLUMNS))
    show("even", config.frames * len(vit.position), area, area, 1, area, purity(areas[two, None]).mean())
    for j, block in enumerate(captioner.adapter.blocks):
        with block.register_forward_hook(lambda _, inputs, outputs: (inputs[0], *outputs[1:])):  # g = 0
            show(f"block {captioner.adapter.first + j + 1}", tokens[j].mean(), on_any[j].mean(), by_gate[j].mean(),
                 by_gate[j].mean() / area, covered[:, : tokens[j].mean().round().int()].mean(), pure[j, two].mean(),
                 gates[j].mean(), gates[j].std(0, False).mean(), (read[j].mean() / query[j].mean()).sqrt())
    for block, mean in zip(captioner.adapter.blocks, gates.mean((1, 2)), strict=True):
        block.compute_gates = lambda normed_queries, _, mean=mean: mean.expand(*normed_queries.shape[:2], 1)
    show("mean g")


if __name__ == "__main__":
    cli.run(main)
