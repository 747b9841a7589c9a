"""Datasets of captioned videos: annotations, decoding, the caches on disk, and batches for training."""

from video_data.datasets import load
from video_data.video import read_frames

__all__ = ["load", "read_frames"]
