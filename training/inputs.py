"""The cached inputs of a run: frames, or the frozen ViT's outputs of training and validation clips instead."""

from common.config import Config
from video_data import batches
from video_data.batches import ClipCache
from video_data.datasets import VideoDataset


def plan_caches(config: Config, dataset: VideoDataset, captioner,
                fingerprints: dict[str, str]) -> dict[str, dict[str, ClipCache]]:
    """{"frames": {split: cache}, "features": {split: cache}} of the splits of a dataset, as they are on the disk now.

    Features are empty without --cache-features. A method that trains nothing gets no training clips. The fingerprints
    are those of the frozen models, on which the block outputs depend.
    """
    root, preprocessing = batches.cache_folder(config.dataset, config.data), captioner.vit.preprocessing
    counts = {split: config.stored_frames if split == "train" else config.frames for split in dataset.splits
              if not (split == "train" and config.method == "none")}
    frames = {split: batches.frames_cache(dataset.splits[split], root, split, count, preprocessing,
                                          captioner.states_times)
              for split, count in counts.items()}
    feature_splits = ("train", "val") if config.cache_features else ()  # the test split is read once
    key = [fingerprints, config.precision, captioner.first_block, len(captioner.vit.blocks), *captioner.deepstack]
    return {"frames": frames, "features": {
        split: batches.features_cache(frames[split], key, captioner.block_outputs_shape(counts[split]))
        for split in feature_splits}}


def cached_inputs(config: Config, dataset: VideoDataset, captioner,
                  fingerprints: dict[str, str]) -> dict[str, ClipCache]:
    """{split: cache}: uint8 frames, or with --cache-features the bf16 block outputs of training and validation clips.

    Everything is decoded here, the test split too: a clip that cannot be decoded must not be found after training. The
    size of all that is missing is reported, and compared with the free disk space, before the first clip is decoded.
    Raises InputError.
    """
    caches = plan_caches(config, dataset, captioner, fingerprints)
    batches.check_space({what: list(group.values()) for what, group in caches.items()})
    frames, features = caches["frames"], caches["features"]
    for split, cache in frames.items():
        batches.fill_frames(cache, dataset.splits[split], captioner.vit.preprocessing)
    device = captioner.prefix_scale.device
    for split, cache in features.items():
        batches.fill_features(cache, frames[split],
                              lambda batch: captioner.block_outputs(batch.to(device)).bfloat16().cpu(),
                              (config.micro_batch_size or config.batch_size) * config.frames)
    return frames | features
