"""The cached inputs of a run: the frames of every split, and for training the frozen ViT's outputs in their place."""

import argparse

import torch

from video_data.cache import ClipCache, cached_features, cached_frames
from video_data.datasets import VideoDataset, cache_folder

CANDIDATE_FRAMES = 16  # frames stored of a training clip; a step draws T of them


def cached_inputs(args: argparse.Namespace, dataset: VideoDataset, captioner, hashes: dict[str, str],
                  device: torch.device) -> dict[str, ClipCache]:  # fmt: skip
    """{split: cache}: uint8 frames, or with --cache-features the bf16 block outputs of the training clips.

    Everything is decoded here, the test split too: a clip that cannot be decoded must not be found after training.
    `hashes` are those of the backbones, on which the block outputs depend. Raises InputError.
    """
    root, preprocessing = cache_folder(args.cache, args.dataset, args.data), captioner.vit.preprocessing

    def frames(split: str, count: int) -> ClipCache:
        return cached_frames(dataset.splits[split], root, split, count, preprocessing, args.workers)

    caches = {
        "train": frames("train", max(CANDIDATE_FRAMES, 2 * args.frames)),
        "val": frames("val", args.frames), "test": frames("test", args.frames),
    }  # fmt: skip
    if args.cache_features:
        key = [hashes, args.precision, captioner.adapter.first]
        caches["train"] = cached_features(
            caches["train"], key, lambda batch: captioner.block_outputs(batch.to(device)).cpu(),
            args.batch_size * args.frames,
        )  # fmt: skip
    return caches
