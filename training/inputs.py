"""The cached inputs of a run: frames, or the frozen ViT's outputs of training and validation clips instead."""

import torch

from common.config import Config
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


def cached_inputs(config: Config, dataset: VideoDataset, captioner, fingerprints: dict[str, str],
                  device: torch.device) -> dict[str, ClipCache]:
    """{split: cache}: uint8 frames, or with --cache-features the bf16 block outputs of training and validation clips.

    Everything is decoded here, the test split too: a clip that cannot be decoded must not be found after training. The
    size of all that is missing is reported, and compared with the free disk space, before the first clip is decoded. A
    method that trains nothing gets no training clips. The fingerprints are those of the frozen models, on which the
    block outputs depend. Raises InputError.
    """
    root, preprocessing = cache_folder(config.dataset, config.data), captioner.vit.preprocessing
    counts = {"train": config.stored_frames, "val": config.frames, "test": config.frames}
    if config.method == "none":
        del counts["train"]
    caches = {split: frames_cache(dataset.splits[split], root, split, count, preprocessing)
              for split, count in counts.items()}
    planned = {"frames": list(caches.values())}
    if config.cache_features:
        key = [fingerprints, config.precision, captioner.first_block]
        shapes = {split: captioner.block_outputs_shape(counts[split]) for split in FEATURE_SPLITS}
        planned["features"] = [features_cache(caches[split], key, shapes[split]) for split in FEATURE_SPLITS]
    check_space(planned, root)

    for split, count in counts.items():
        caches[split] = cached_frames(dataset.splits[split], root, split, count, preprocessing)
    if config.cache_features:
        for split in FEATURE_SPLITS:
            caches[split] = cached_features(caches[split], key, shapes[split],
                                            lambda batch: captioner.block_outputs(batch.to(device)).bfloat16().cpu(),
                                            (config.micro_batch_size or config.batch_size) * config.frames)
    return caches
