"""Plain captions only, for now: lower-case words, punctuation dropped."""

import re


def captions(lines):
    return [" ".join(re.findall(r"[^\s.,;:!?\"()`]+", line.lower())) for line in lines]
