"""What a run's captions owe to the video: `python -m study.controls RUN` captions its test split from changed frames.

If the frames of another clip score as well, the captions say what is usual; if one frame does, no motion is read; if
frames in another order do, their order is not. On `shapes`, reversed frames also have a reversed truth.

Shapes: T frames, S side in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from common import cli
from common.config import DEVICES, PRESETS
from common.errors import InputError
from common.files import write_json
from evaluate import BATCH_SIZE, caption_and_score, check_outputs, chosen_data, load_run, read_run_dataset
from study.tables import mean_and_error
from training import devices
from training.distributed import ProcessGroup
from training.inputs import cached_inputs
from video_data import shapes
from video_data.batches import ClipCache


def shuffle(frames: np.ndarray, clip: int) -> np.ndarray:
    """The frames in a random order that is not their own, if there are several."""
    rng, order = np.random.default_rng(clip), np.arange(len(frames))
    while len(frames) > 1 and (order == np.arange(len(frames))).all():
        order = rng.permutation(len(frames))
    return frames[order]


# The cache and the index of a clip -> the frames (T, 3, S, S) that are captioned.
CONTROLS: dict[str, Callable[[ClipCache, int], np.ndarray]] = {
    "the clip": lambda cache, i: cache[i],
    "frames of another clip": lambda cache, i: cache[(i + len(cache) // 2) % len(cache)],
    "the middle frame alone": lambda cache, i: np.repeat(cache[i][[cache.shape[0] // 2]], cache.shape[0], axis=0),
    "frames shuffled": lambda cache, i: shuffle(cache[i], i),
    "frames reversed": lambda cache, i: cache[i][::-1],
}


@dataclass(frozen=True)
class ChangedFrames:
    """A cache of frames that are changed when they are read."""

    cache: ClipCache
    change: Callable[[ClipCache, int], np.ndarray]
    times: ClipCache | None  # those of the clip, whichever frames are captioned

    def __getitem__(self, i: int) -> np.ndarray:
        return self.change(self.cache, i)


def main() -> None:
    parser = cli.Parser(__doc__.splitlines()[0], "python -m study.controls RUN [--save captions.json]")
    parser.add_argument("run", type=cli.path, metavar="RUN", help="a folder that train.py made")
    parser.add_argument("--dataset", choices=tuple(PRESETS), help="another dataset, of which --data is the folder")
    parser.add_argument("--data", type=cli.path, help="the dataset's folder (default: as in training)")
    parser.add_argument("--save", type=cli.path, metavar="FILE",
                        help="write {control: {captions: {id: caption}, CIDEr: [of each, times 100]}} as JSON")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    args = parser.parse_args()
    captioner, folders = load_run(args.run, devices.select_device(args.device))
    config, found = replace(captioner.config, **chosen_data(args)), {}
    check_outputs(args, [*folders.values(), config.data], [])
    dataset = read_run_dataset(args.run, config, ["test"])
    if len(dataset.splits["test"]) < 2:
        raise InputError(f"{config.data}: expected two test clips or more, since each gets the frames of another one")
    print(dataset)
    cache = cached_inputs(replace(config, cache_features=False), dataset, captioner, {})["test"]
    references = {clip.id: clip.captions for clip in dataset.splits["test"]}
    for name, change in CONTROLS.items():
        frames = ChangedFrames(cache, change, cache.times)
        result = caption_and_score(captioner, dataset, "test", frames, BATCH_SIZE, ProcessGroup(), ("CIDEr",))
        ciders = [round(100 * result.clip_scores[clip]["CIDEr"], 1) for clip in result.captions]
        found[name] = {"captions": result.captions, "CIDEr": ciders}
        row = f"{name:25}CIDEr {mean_and_error(ciders)}"
        if dataset.name == "shapes":
            right = shapes.attribute_accuracy(references, result.captions, "reversed" in name)
            row += f"   motion right {right['motion']:.1%}"
        print(row)
    if args.save:
        write_json(args.save, found)


if __name__ == "__main__":
    cli.run(main)
