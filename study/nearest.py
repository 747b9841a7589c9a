"""A floor that trains nothing: `python -m study.nearest RUN` takes captions from similar clips of the training split.

A clip is one vector: the class token, if any, and the mean patch of the blocks that the run's adapter reads, averaged
over frames, in the principal directions of the training clips. All captions of the K most similar training clips are
candidates, and the one that agrees most with the others is the clip's caption [1]. They agree as far as CIDEr's vectors
of n-grams have the same direction, each weighted by its clip's similarity. A captioner that scores less has learned
less from the frozen features than can be looked up.

Shapes: V clips, F numbers per clip, S similar clips.

References
[1] Devlin et al., Exploring Nearest Neighbor Approaches for Image Captioning, arXiv 1505.04467
"""

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from common import cli
from common.config import DEVICES
from common.errors import InputError
from common.files import write_json
from evaluate import check_outputs, format_scores, load_run, read_run_dataset, score_captions
from metrics.plain import ORDERS, document_frequencies, tf_idf
from training import devices
from training.frozen_models import fingerprint_models
from training.inputs import cached_inputs
from video_data.batches import normalize_caption, to_tensor

# Chosen on 744 validation clips of MSR-VTT.
SIMILAR, SHARPNESS, DIRECTIONS = 100, 10.0, 256  # S; a weight is exp(SHARPNESS cos); principal directions


def pooled(captioner, cache) -> Tensor:
    """The clips of a cache of frames or features, one vector each (V, F)."""
    vectors, device, has_class = [], next(captioner.parameters()).device, int(captioner.vit.config.class_token)
    for i in range(len(cache)):
        outputs = to_tensor(cache[i])[None].to(device)
        outputs = captioner.block_outputs(outputs) if outputs.dtype == torch.uint8 else outputs  # (1, T, J, P, D)
        outputs = outputs[0].float().mean(0)  # (J, P, D)
        parts = outputs.split([has_class, outputs.shape[1] - has_class], dim=1)
        vectors.append(torch.cat([part.mean(1) for part in parts if part.shape[1]], dim=-1).flatten().cpu())
    return torch.stack(vectors)


def similarities(clips: Tensor, training: Tensor) -> Tensor:
    """Cosines of clips (V, F) and training clips (V', F) -> (V, V'), in principal directions of the standardized
    training clips. A direction's values are divided by the square root of their standard deviation."""
    mean, std = training.mean(0), training.std(0, correction=0) + 1e-6
    training, clips = (training - mean) / std, (clips - mean) / std
    _, singular, directions = torch.linalg.svd(training, full_matrices=False)
    used = singular > 1e-3 * singular.max().clamp(min=1e-3)  # in the others training clips have rounding errors alone
    used[DIRECTIONS:] = False
    basis = directions[used].T / singular[used].sqrt()
    training, clips = (torch.nn.functional.normalize(x @ basis, dim=-1) for x in (training, clips))
    return clips @ training.T


def caption_vector(caption: str, frequencies: Counter, clips: int) -> dict[tuple, float]:
    """Count times idf of each n-gram, as in CIDEr; for each n a vector of length 1."""
    parts = [tf_idf(normalize_caption(caption), n, frequencies, clips) for n in ORDERS]
    norms = [math.hypot(*part.values()) or 1.0 for part in parts]
    return {gram: x / norm for part, norm in zip(parts, norms, strict=True) for gram, x in part.items()}


def most_agreed(captions: list[list[str]], vectors: list[list[dict]], similar: Tensor, indices: Tensor) -> str:
    """Of the captions of the clips `indices` (S,) the one that agrees most with all of them.

    captions, vectors: of all training clips, a list for each; similar: cosines (S,).
    """
    total: Counter = Counter()
    for weight, i in zip((SHARPNESS * (similar - similar.max())).exp().tolist(), indices.tolist(), strict=True):
        for vector in vectors[i]:
            for gram, value in vector.items():
                total[gram] += weight * value
    candidates = [(sum(value * total[gram] for gram, value in vector.items()), caption)
                  for i in indices.tolist() for caption, vector in zip(captions[i], vectors[i], strict=True)]
    return max(candidates)[1]


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0], "python -m study.nearest RUN [--split val] [--save captions.json]")
    parser.add_argument("run", type=cli.path, metavar="RUN", help="a folder that train.py made")
    parser.add_argument("--data", type=cli.path, help="the dataset's folder (default: as in training)")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--save", type=cli.path, metavar="FILE", help="write {id: caption} as JSON")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    args = parser.parse_args()
    captioner, folders = load_run(args.run, devices.select_device(args.device))
    config = replace(captioner.config, data=args.data or captioner.config.data)
    if config.method in ("lora", "adapter", "st-adapter", "prompt", "full"):
        raise InputError(f"{args.run}: expected a run with a frozen ViT, --method {config.method} changes it")
    if config.method == "none":  # of which training clips are not cached
        config = replace(config, method="linear")
    check_outputs(args, [*folders.values(), config.data], [])
    dataset = read_run_dataset(args.run, config)
    print(dataset)
    inputs = cached_inputs(config, dataset, captioner, fingerprint_models(folders))
    cosines = similarities(pooled(captioner, inputs[args.split]), pooled(captioner, inputs["train"]))
    captions = [list(clip.captions) for clip in dataset.splits["train"]]
    frequencies = document_frequencies([[*map(normalize_caption, clip)] for clip in captions])
    vectors = [[caption_vector(caption, frequencies, len(captions)) for caption in clip] for clip in captions]
    found = {clip.id: most_agreed(captions, vectors, *row.topk(min(SIMILAR, len(row))))
             for clip, row in zip(dataset.splits[args.split], cosines, strict=True)}
    result = score_captions(dataset, args.split, found, ("BLEU", "METEOR", "ROUGE_L", "CIDEr"))
    print(f"{args.split}: {format_scores(result.scores)}\n{result.signature}")
    if args.save:
        write_json(args.save, found)


if __name__ == "__main__":
    cli.run(main)
