"""Benchmark of the scorers beside pycocoevalcap, as whole processes, Java included.

Captions are those of MSVD's and MSR-VTT's test splits where the environment variable QADAPTER_REAL names a folder that
has them, else captions of random `shapes` scenes in the same numbers.

`python -m bench.scorers SCORER FILE` is the measured process. So that it imports neither torch nor the other's scorers,
these imports are inside functions.
"""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import ROOT, peak_memory
from video_data.annotations import read_msrvtt, read_msvd

SIZES = {"MSVD size": (670, 42), "MSR-VTT size": (2990, 21)}  # videos, captions per video
ENDINGS = ("",) * 9 + (".", "!", "...", ", it seems", " - don't miss it")
TOLERANCE = 1e-9

Captions = dict[str, list[str]]  # by video
Scores = dict[str, list[float]]  # metric -> [corpus score, score of each video, ...]


# ---------------------------------------------------------------------------------------- captions
