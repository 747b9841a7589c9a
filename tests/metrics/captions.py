"""Captions for the tests: recorded ones with pycocoevalcap's output (golden/), and random strings from a seed."""

import json
import random
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
CORPORA = ("msvdlike", "vttlike", "hard", "single")
COLLISION = "hard066"  # an id in "hard": two of its words share a 32-bit hash and are equal to the Java program
TOLERANCE = 1e-9


def golden(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def random_strings(count: int, seed: int) -> list[str]:
    """Strings of 0 to 40 pieces, every second one with any character that Python allows, the others in ASCII."""
    rng = random.Random(seed)
    pieces = ["n't", "'s", "http://", "www.", ".com", "etc.", "1/2", ":-)", "&amp;", "<b>", "--", "...", "can", "ot"]
    ascii_characters = [chr(code) for code in range(128)]

    def random_piece(any_character: bool) -> str:
        draw = rng.random()
        if draw < 0.2:
            return rng.choice(pieces)
        if any_character and draw < 0.6:
            return chr(rng.choice((rng.randrange(0x300), rng.randrange(0x3000), rng.randrange(0x110000))))
        return " " if draw < 0.7 else rng.choice(ascii_characters)

    return ["".join(random_piece(i % 2 == 1) for _ in range(rng.randrange(41))) for i in range(count)]
