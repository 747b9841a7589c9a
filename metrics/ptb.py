"""The Penn Treebank tokenizer that caption metrics use.

COCO caption scoring tokenises with Stanford's PTBTokenizer (English, lower-cased, one caption per line) and then drops
punctuation tokens. That tokenizer is a lexer: at each position it tries every rule, and the rule that reads the most
text wins, the earlier one of two that read the same. This file is such a lexer; `ptb_rules.py` holds the rules.

Behaviour of Stanford's tokenizer that surprises, kept here:
- Brackets survive. "(x)" becomes "-lrb- x -rrb-": tokens are lower-cased before punctuation is dropped, and the list of
  punctuation names brackets in capitals.
- Runs such as "!!" or "?!" or "***" are tokens and stay.
- Captions of one file are one text. "vitamin C." ends in "c." or in "c ." depending on the first word of the next
  caption. After the very last caption the text ends.
Two things are not kept: a line break inside a caption shifts all later captions by one in pycocoevalcap; here it is a
space. And a quoted attribute of a tag, as in <a title="x, may not extend over several captions.

References
[1] Marcus, Santorini and Marcinkiewicz, Building a Large Annotated Corpus of English: The Penn Treebank, Computational
    Linguistics 19(2), 1993.
[2] Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv 1504.00325, 2015 (section 3:
    tokenisation of captions).
"""

import re
from functools import cache

from .inputs import LINE_BREAKS
from .ptb_rules import RULES, SHAPES

PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
SPACES = re.compile("[ \t\u00a0\u2000]*")
# A caption of lower-case words needs no rules unless it contains one of the words that are split.
LOWER_CASE_WORDS = re.compile("[a-z ]*")
SPLIT_WORDS = re.compile("cannot|gonna|gotta|wanna|lemme|gimme")


@cache
def rules_for(shape):
    """(match, action) of the rules that can start with the character `shape`, in order of precedence."""
    rules = [rule for rule in RULES if re.match(rule[0], shape, rule[2])]
    return [(re.compile(pattern, flags).match, action) for _, pattern, flags, action in rules]


def read_token(text, shapes, position):
    """(tokens, next position) of the longest match at `position`."""
    longest, end, longest_action = 0, position + 1, None
    for match_pattern, action in rules_for(shapes[position]):
        match = match_pattern(shapes, position)
        if match and match.end() - position > longest:
            longest, longest_action = match.end() - position, action
            end = match.start("context") if match.lastgroup else match.end()
    if not longest:
        return [], position + 1
    token = text[position:end]
    return (longest_action(token) if longest_action else [token]), end


def tokenize_line(line, following="\nx"):
    """Tokens of one caption. following: the text after it in the file, "" at the end of the file."""
    text = line + following
    shapes = text if text.isascii() else text.translate(SHAPES)
    tokens, position = [], 0
    while position < len(line):
        if shapes[position] == " ":  # the one space that starts no link
            position = SPACES.match(shapes, position).end()
        else:
            new_tokens, position = read_token(text, shapes, position)
            tokens.extend(new_tokens)
    return [token.lower() for token in tokens]


def tokenize(lines):
    """Tokens of every caption of a file: list of str -> list of lists of str."""
    lines = [LINE_BREAKS.sub(" ", line) for line in lines]
    results, following, cached_tokens = [], "", {}
    for line in reversed(lines):
        if LOWER_CASE_WORDS.fullmatch(line) and not SPLIT_WORDS.search(line):
            tokens = line.split()
        else:
            # Only a dot looks beyond the next character, and no further than the next word.
            key = line, following if line.rstrip().endswith(".") else following[:1]
            if key not in cached_tokens:
                cached_tokens[key] = tokenize_line(line, key[1])
            tokens = cached_tokens[key]
        results.append(tokens)
        following = "\n" + (line + following)[:40] if line.strip() else "\n" + following
    return results[::-1]


def tokenize_captions(lines):
    """Captions as the metrics see them: list of str -> list of str, punctuation tokens removed."""
    lines = [" ".join(tokens).rstrip() for tokens in tokenize(lines)]  # links and mail may end in other spaces
    return [" ".join([token for token in line.split(" ") if token not in PUNCTUATION]) for line in lines]
