"""The cached inputs of a run: frames, or in their place the frozen ViT's outputs for training and validation."""

import argparse

import torch

from video_data.batches import (
    ClipCache,
    cache_folder,
    cached_features,
    cached_frames,
    check_space,
    features_cache,
    frames_cache,
)
from video_data.datasets import VideoDataset

FEATURE_SPLITS = "train", "val"  # the test split is read once


def cached_inputs(args: argparse.Namespace, dataset: VideoDataset, captioner, hashes: dict[str, str],
                  device: torch.device) -> dict[str, ClipCache]:  # fmt: skip
    """{split: cache}: uint8 frames, or with --cache-features the bf16 block outputs of training and validation clips.

    Everything is decoded here, the test split too: a clip that cannot be decoded must not be found after training. The
    size of all that is missing is reported, and compared with the free disk space, before the first clip is decoded.
    A method that trains nothing gets no training clips. `hashes` are those of the frozen models, on which the block
    outputs depend. Raises InputError.
    """
    root, preprocessing = cache_folder(args.dataset, args.data), captioner.vit.preprocessing
    counts = {"train": args.candidate_frames, "val": args.frames, "test": args.frames}
    if captioner.config.method == "none":
        del counts["train"]
    caches = {split: frames_cache(dataset.splits[split], root, split, count, preprocessing)
              for split, count in counts.items()}  # fmt: skip
    planned = {"frames": list(caches.values())}
    if args.cache_features:
        key = [hashes, args.precision, captioner.first_block]
        feature_shapes = {split: captioner.block_outputs_shape(counts[split]) for split in FEATURE_SPLITS}
        planned["features"] = [features_cache(caches[split], key, feature_shapes[split]) for split in FEATURE_SPLITS]
    check_space(planned, root)

    for split, count in counts.items():
        caches[split] = cached_frames(dataset.splits[split], root, split, count, preprocessing)
    if args.cache_features:
        for split in FEATURE_SPLITS:
            caches[split] = cached_features(
                caches[split], key, feature_shapes[split],
                lambda batch: captioner.block_outputs(batch.to(device)).cpu(),
                (args.micro_batch_size or args.batch_size) * args.frames,
            )  # fmt: skip
    return caches
