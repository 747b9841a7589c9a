"""The Penn Treebank tokenizer that caption metrics assume.

COCO caption scoring tokenises with Stanford's PTBTokenizer (English, lower-cased, one caption a
line) and then drops punctuation tokens. That tokenizer is a lexer: at each place every rule is
tried, the rule that reads the most text wins, the earlier of two that read as much. This file is
such a lexer; `ptb_rules.py` holds the rules.

What surprises, all of it the reference's behaviour:
- Brackets survive: "(x)" becomes "-lrb- x -rrb-", and as tokens are lower-cased before punctuation
  is dropped, the list of punctuation (which names them in capitals) never matches them.
- Runs such as "!!" or "?!" or "***" are tokens of their own and stay.
- Captions of one file are one text: "vitamin C." ends in "c." or in "c ." depending on the word
  that opens the next caption, and the very last caption has nothing after it.
One thing is not kept: a line break of any kind inside a caption makes the reference shift all later
captions by one; here it is a space.

References
[1] Marcus, Santorini and Marcinkiewicz, Building a Large Annotated Corpus of English: The Penn
    Treebank, Computational Linguistics 19(2), 1993.
[2] Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325,
    2015 (section 3: tokenisation of captions).
"""

import re
from functools import cache

from .inputs import LINE_BREAKS
from .ptb_rules import NOTHING, OTHER_SPACE, RULES, SHAPES

PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
BLANK = " \t\u00a0\n" + OTHER_SPACE + NOTHING
# A caption of plain words needs no rules: no word of it is split, and spaces end every context.
PLAIN = re.compile("[a-z ]*")
SPLIT = re.compile("cannot|gonna|gotta|wanna|lemme|gimme")


@cache
def compiled(pattern, flags):
    pattern = re.compile(pattern, flags)
    return pattern.match, "after" in pattern.groupindex


@cache
def rules_for(char):
    """The rules that can start with `char` (of a shape), in order of precedence."""
    return [(*compiled(pattern, flags), action) for starts, pattern, flags, action in RULES if re.match(starts, char)]


def read_token(text, shape, at):
    """The token at `at`: (list of tokens, where the next one starts)."""
    longest, end, make = 0, at + 1, None
    for match, has_context, action in rules_for(shape[at]):
        found = match(shape, at)
        if found and found.end() - at > longest:
            longest, end, make = found.end() - at, found.end(), action
            if has_context and found.start("after") >= 0:
                end = found.start("after")
    if not longest:
        return [], at + 1
    part = text[at:end]
    return (make(part) if make else [part]), end


def tokenize_line(line, after="\nx"):
    """Tokens of one caption; `after` is what follows it in the file (empty: the file ends here)."""
    text = line + after
    shape = text if text.isascii() else text.translate(SHAPES)
    tokens, at, end = [], 0, len(line)
    while at < end:
        if shape[at] in BLANK:
            at += 1
        else:
            found, at = read_token(text, shape, at)
            tokens.extend(found)
    return [token.lower() for token in tokens]


def tokenize(lines):
    """Tokens of every caption of a file: list of str -> list of lists of str."""
    lines = [LINE_BREAKS.sub(" ", line) for line in lines]
    results, after, known = [], "", {}
    for line in reversed(lines):
        if PLAIN.fullmatch(line) and not SPLIT.search(line):
            tokens = line.split()
        else:
            # Only a dot looks beyond the next character, and no further than the next word.
            key = line, after if line.rstrip().endswith(".") else after[:1]
            if key not in known:
                known[key] = tokenize_line(line, key[1])
            tokens = known[key]
        results.append(tokens)
        after = "\n" + (line + after)[:40] if line.strip() else "\n" + after
    return results[::-1]


def captions(lines):
    """Captions as the metrics see them: list of str -> list of str, punctuation tokens removed."""
    return [" ".join([token for token in tokens if token not in PUNCTUATION]) for tokens in tokenize(lines)]
