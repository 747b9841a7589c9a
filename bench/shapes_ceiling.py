"""What perfect captions score on the test split of `shapes`: `python -m bench.shapes_ceiling [FOLDER]`.

The references of a clip are worded differently, so even captions without a mistake do not match all of them. Each row
scores perfect captions that all have the same wording.
"""

from pathlib import Path

import metrics
from common import cli
from common.files import field, read_json
from video_data import shapes


def perfect_captions(references: dict[str, list[str]], template: int, phrase: int) -> dict[str, str]:
    """Captions that name every shape and motion correctly, all with one template and the same phrase per motion."""
    claims = {key: shapes.parse_claims(texts[0]) for key, texts in references.items()}
    words = {key: [(noun, *shapes.MOTIONS[motion][phrase]) for noun, motion in pairs] for key, pairs in claims.items()}
    return {key: shapes.fill_template(template, parts) for key, parts in words.items()}


def main() -> None:
    parser = cli.Parser("Scores perfect captions of the test split of shapes, for each wording.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/shapes"), help="the folder of the dataset")
    path = parser.parse_args().folder / "captions.json"
    references = field(read_json(path), "test", dict, path)
    rows = []
    for i, templates in enumerate(zip(shapes.ONE_SHAPE, shapes.TWO_SHAPES, strict=True)):
        for j, verbs in enumerate(shapes.MOTIONS["up"]):
            scores = metrics.score(references, perfect_captions(references, i, j), metrics=("CIDEr",))
            rows.append((scores.corpus["CIDEr"], f"{' | '.join(templates)}, {' or '.join(verbs)}"))
    for cider, wording in sorted(rows, reverse=True):
        print(f"CIDEr {100 * cider:.1f}  {wording}")


if __name__ == "__main__":
    cli.run(main)
