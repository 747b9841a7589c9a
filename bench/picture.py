"""A picture of a run's captions for the README: `python -m bench.picture RUN [--out docs/captions.png]`.

It shows the first two test clips with one shape and the first two with two: their frames as the model saw them, the
caption from RUN/test.json and one reference. If all four captions are right, the last clip gives way to the first one
whose caption is wrong, so that the picture also shows a mistake.
"""

from pathlib import Path

import torch
from torchvision.io import encode_png

from common import cli
from common.files import read_json, replace_atomically
from evaluate import load_run
from report.show import draw_clip
from video_data.datasets import Clip, read_dataset
from video_data.shapes import parse_claims
from video_data.video import read_frames


def is_right(clip: Clip, caption: str) -> bool:
    return parse_claims(clip.captions[0]) == parse_claims(caption)


def select_clips(clips: list[Clip], captions: dict[str, str]) -> list[Clip]:
    """The four clips to show, as the module's docstring says."""
    one, two = ([clip for clip in clips if len(parse_claims(clip.captions[0])) == n][:2] for n in (1, 2))
    wrong = [clip for clip in clips if not is_right(clip, captions[clip.id])]
    if wrong and not any(clip in wrong for clip in one + two):
        two[-1] = wrong[0]
    return one + two


def main() -> None:
    parser = cli.Parser("Draws test clips of a run on shapes with their captions.", "python -m bench.picture RUN")
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that train.py made")
    parser.add_argument("--out", type=Path, default=Path("docs/captions.png"), help="the PNG file to write")
    args = parser.parse_args()
    captioner, _ = load_run(args.run, torch.device("cpu"), {})
    config, captions, pictures = captioner.config, read_json(args.run / "test.json")["captions"], []
    for clip in select_clips(read_dataset("folder", config.data, splits=["test"]).splits["test"], captions):
        verdict = "right" if is_right(clip, captions[clip.id]) else "WRONG"
        text = f"{captions[clip.id]} [{verdict}; a reference: {clip.captions[0]}]"
        pictures.append(draw_clip(read_frames(clip.path, config.frames, captioner.vit.preprocessing), text, None, 0))
    with replace_atomically(args.out) as file:
        file.write(encode_png(torch.cat(pictures, dim=1)).numpy().tobytes())  # (3, height, width)


if __name__ == "__main__":
    cli.run(main)
