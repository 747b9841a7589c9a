"""A picture of a run's captions for the README: `python -m bench.picture RUN [--clips N] [--out docs/captions.png]`.

It shows the first N/2 test clips with one shape and the first N/2 with two: their frames as the model saw them, the
caption from RUN/test.json and one reference. If all these captions are correct, the last clip is replaced by the first
one whose caption is wrong, so that the picture also shows a mistake.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common import cli
from common.errors import InputError
from common.files import replace_atomically
from common.json_fields import field, read_json
from evaluate import load_run
from video_data import shapes
from video_data.datasets import Clip, read_dataset
from video_data.video import read_frames

# Pixels. All captions of shapes fit into the last.
SIDE, GAP, MARGIN, LINE, ROW_GAP, LABEL_WIDTH, TEXT_WIDTH = 96, 4, 16, 21, 24, 115, 610
TEXT, GREY, RED, WHITE = "#1f2328", "#656d76", "#b3261e", "white"


def is_correct(clip: Clip, caption: str) -> bool:
    return shapes.attribute_accuracy({clip.id: clip.captions}, {clip.id: caption})["motion"] == 1


def select_clips(clips: list[Clip], captions: dict[str, str], count: int) -> list[Clip]:
    """The clips to show, as the module's docstring says."""
    one = [clip for clip in clips if len(shapes.parse_claims(clip.captions[0])) == 1]
    two = [clip for clip in clips if len(shapes.parse_claims(clip.captions[0])) == 2]
    chosen = one[: count - count // 2] + two[: count // 2]
    wrong = next((clip for clip in clips if not is_correct(clip, captions[clip.id])), None)
    if wrong is not None and all(is_correct(clip, captions[clip.id]) for clip in chosen):
        chosen[-1] = wrong
    return chosen


def draw_clip(canvas: Image.Image, top: int, frames, clip: Clip, caption: str) -> None:
    """Draws a row: frames uint8 (T, 3, S, S), below them the caption and a reference."""
    for i, pixels in enumerate(frames.permute(0, 2, 3, 1).numpy()):
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        canvas.paste(image, (MARGIN + i * (SIDE + GAP), top))
    correct = is_correct(clip, caption)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    rows = [("caption" if correct else "caption, wrong", caption, TEXT if correct else RED),
            ("reference", clip.captions[0], GREY)]  # fmt: skip
    for i, (label, text, colour) in enumerate(rows):
        y = top + SIDE + 6 + i * LINE
        draw.text((MARGIN, y), label, GREY, font)
        draw.text((MARGIN + LABEL_WIDTH, y), text, colour, font)


def main() -> None:
    parser = cli.Parser("Draws test clips of a run on shapes with their captions.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that train.py made")
    parser.add_argument("--clips", type=cli.at_least(1, 100), default=4, help="how many clips to show")
    parser.add_argument("--data", type=Path, help="the dataset's folder; unset: as in training")
    parser.add_argument("--out", type=Path, default=Path("docs/captions.png"), help="the PNG file to write")
    args = parser.parse_args()
    captioner, flags = load_run(args.run)
    if flags["dataset"] != "shapes":
        raise InputError(f"{args.run}: expected a run on shapes, found one on {flags['dataset']}")
    captions = field(read_json(args.run / "test.json"), "captions", dict, args.run / "test.json")
    data = args.data or Path(flags["data"])
    clips = read_dataset("shapes", data, flags["shapes_sizes"], splits=["test"]).splits["test"]
    chosen = select_clips(clips, captions, args.clips)
    row_height = SIDE + 6 + 2 * LINE
    width = 2 * MARGIN + max(flags["frames"] * (SIDE + GAP) - GAP, LABEL_WIDTH + TEXT_WIDTH)
    height = 2 * MARGIN + len(chosen) * (row_height + ROW_GAP) - ROW_GAP
    canvas = Image.new("RGB", (width, height), WHITE)
    for i, clip in enumerate(chosen):
        frames = read_frames(clip.path, flags["frames"], captioner.vit.preprocessing)
        draw_clip(canvas, MARGIN + i * (row_height + ROW_GAP), frames, clip, captions[clip.id])
    with replace_atomically(args.out) as file:
        canvas.save(file, "png", optimize=True)


if __name__ == "__main__":
    cli.run(main)
