"""A picture of a run's captions for the README: `python -m bench.picture RUN [--out docs/captions.png]`.

It shows the first two test clips with one shape and the first two with two: their frames as the model saw them, the
caption from RUN/test.json and one reference. If all these captions are correct, the last clip is replaced by the first
one whose caption is wrong, so that the picture also shows a mistake.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common import cli
from common.errors import InputError
from common.files import field, read_json, replace_atomically
from evaluate import load_run
from video_data import shapes
from video_data.datasets import Clip, read_dataset
from video_data.video import read_frames

# Pixels. All captions of shapes fit into the last.
SIDE, GAP, MARGIN, LINE, LABEL_WIDTH, TEXT_WIDTH = 96, 4, 16, 21, 115, 610
ROW = SIDE + 6 + 2 * LINE
TEXT, GREY, RED = "#1f2328", "#656d76", "#b3261e"


def is_correct(clip: Clip, caption: str) -> bool:
    return shapes.parse_claims(clip.captions[0]) == shapes.parse_claims(caption)


def select_clips(clips: list[Clip], captions: dict[str, str]) -> list[Clip]:
    """The four clips to show, as the module's docstring says."""
    one, two = ([clip for clip in clips if len(shapes.parse_claims(clip.captions[0])) == n] for n in (1, 2))
    chosen = one[:2] + two[:2]
    wrong = next((clip for clip in clips if not is_correct(clip, captions[clip.id])), None)
    if wrong is not None and all(is_correct(clip, captions[clip.id]) for clip in chosen):
        chosen[-1] = wrong
    return chosen


def draw_clip(canvas: Image.Image, top: int, frames: Tensor, clip: Clip, caption: str) -> None:
    """Draws a row: frames uint8 (T, 3, S, S), below them the caption and a reference."""
    for i, pixels in enumerate(frames.permute(0, 2, 3, 1).numpy()):
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        canvas.paste(image, (MARGIN + i * (SIDE + GAP), top))
    draw, font, y = ImageDraw.Draw(canvas), ImageFont.load_default(15), top + SIDE + 6
    label, colour = ("caption", TEXT) if is_correct(clip, caption) else ("caption, wrong", RED)
    for line in (label, caption, colour), ("reference", clip.captions[0], GREY):
        draw.text((MARGIN, y), line[0], GREY, font)
        draw.text((MARGIN + LABEL_WIDTH, y), line[1], line[2], font)
        y += LINE


def main() -> None:
    parser = cli.Parser("Draws test clips of a run on shapes with their captions.")
    parser.add_argument("run", type=cli.path, metavar="RUN", help="a folder that train.py made")
    parser.add_argument("--out", type=cli.path, default=Path("docs/captions.png"), help="the PNG file to write")
    args = parser.parse_args()
    captioner, flags = load_run(args.run)
    if flags["dataset"] != "shapes":
        raise InputError(f"{args.run}: expected a run on shapes, found one on {flags['dataset']}")
    captions = field(read_json(args.run / "test.json"), "captions", dict, args.run / "test.json")
    sizes = flags["shapes_sizes"]
    clips = read_dataset("shapes", Path(flags["data"]), sizes, splits=["test"]).splits["test"]
    if missing := [clip.id for clip in clips if clip.id not in captions]:
        raise InputError(f"{args.run / 'test.json'}: captions: expected {len(clips)}, found none of {missing[0]}")
    chosen = select_clips(clips, captions)
    width = max(flags["frames"] * (SIDE + GAP) - GAP, LABEL_WIDTH + TEXT_WIDTH)
    height = len(chosen) * (ROW + 24) - 24
    canvas = Image.new("RGB", (2 * MARGIN + width, 2 * MARGIN + height), "white")
    for i, clip in enumerate(chosen):
        frames = read_frames(clip.path, flags["frames"], captioner.vit.preprocessing)
        draw_clip(canvas, MARGIN + i * (ROW + 24), frames, clip, captions[clip.id])
    with replace_atomically(args.out) as file:
        canvas.save(file, "png", optimize=True)


if __name__ == "__main__":
    cli.run(main)
