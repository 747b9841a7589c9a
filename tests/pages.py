"""Runs the Python of a page as one program, and puts what each block prints into the block below it.

    python -m tests.pages docs/tour.md
"""

import contextlib
import io
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```\n.*?```\n)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def run_page(text: str) -> str:
    """The page with the output of its blocks, as they print it now."""
    names: dict = {}

    def run(block: re.Match) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(block[1], names)
        printed = f"\n```\n{output.getvalue()}```\n" if output.getvalue() else ""
        return f"```python\n{block[1]}```\n{printed}"

    return BLOCK.sub(run, text)


def differences(found: str, expected: str) -> list[tuple[str, str]]:
    """Lines that differ in more than a number, or in a number by more than 0.1 and 8%: processors round differently."""
    lines = list(zip(found.splitlines(), expected.splitlines(), strict=False))
    return [(a, b) for a, b in lines if NUMBER.sub("", a) != NUMBER.sub("", b) or any(
        abs(float(x) - float(y)) > max(0.1, 0.08 * abs(float(y)))
        for x, y in zip(NUMBER.findall(a), NUMBER.findall(b), strict=False))]


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(run_page(page.read_text()))
