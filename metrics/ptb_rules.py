"""The lexical rules of the PTB tokenizer: what a token is, in order of precedence.

A rule is a pattern over the *shapes* of a caption's characters. An ASCII character is its own shape; any other one has
the shape of its class (letter, capital, mark, digit, space, symbol, none). Caption and shapes have the same length, so
a match in one is a slice of the other. The group `context` of a rule, if it has one, is trailing context as in lex: it
counts when the lexer looks for the longest match, but is not part of the token.

The rules were found by running Stanford's tokenizer on many inputs and looking at its output. Each list of words below
is complete for words of letters: it was tested with all words of up to four letters and an English vocabulary, the
words with an apostrophe with all of up to two letters before it and two after it.
"""

import re
import unicodedata

# --- characters -----------------------------------------------------------------------------------------------------

LETTER, CAPITAL, MARK, SYMBOL = "\u00e9", "\u00c9", "\u0301", "\u2603"
SUPERSCRIPT, SUBSCRIPT, OTHER_SPACE = "\u00b2", "\u2082", "\u2000"
DASH, HYPHEN, SPACE, DECIMAL, DIGIT, NO_SHAPE = "\u2013", "\u2010", "\u00a0", "\u066b", "\u0661", "\0"
UNCHANGED = (
    "\x85\u00a2\u00a3\u00a4\u00ab\u00ad\u00bb\u00bc\u00bd\u00be\u0130\u0131\u017f\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f"
    "\u2026\u2039\u203a\u2044\u207a\u207b\u208a\u208b\u20a0\u20ac\u212a\u2153\u2154"
)
# Control codes that are characters in Windows-1252 are read as those characters.
WINDOWS_1252 = {0x80: "\u20ac", 0x91: "\u2018", 0x92: "\u2019", 0x93: "\u201c", 0x94: "\u201d"}
# Not letters, but parts of words: vowel signs, accents, tone marks.
MARKS = (
    "2C2-2C5 2D2-2DF 2E5-2EB 2ED 2EF-36F 375 378-379 384-385 3F6 483-487 55A-55F 591-5BD 5BF 5C1-5C2 5C4-5C5 5C7"
    " 615-61A 64B-65E 670 6D6-6E4 6E7-6ED 6FD-6FE 70F 711 730-74C 7A6-7B0 7EB-7F3 900-903 93C 93E-94E 951-955 962-963"
    " 981-983 9BC 9BE-9C4 9C7-9C8 9CB-9CD 9D7 9E2-9E3 A01-A03 A3C A3E-A4F A81-A83 ABC ABE-ACF B82 BBE-BC2 BC6-BC8"
    " BCA-BCD C01-C03 C3E-C56 D3E-D44 D46-D48 E31 E34-E3A E47-E4E EB1 EB4-EBC EC8-ECD"
)
# Tokens of one character. A character of no class is dropped and splits the text around it.
SYMBOLS = (
    "A1 A5-A9 AC AE-B1 B4 B6-B8 BF D7 F7 37E 387 589 5BE 5C0 5C3 5C6 5F3-5F4 600-603 606-60C 614 61B 61E-61F 66A 66D"
    " 6D4 700-70D 7F6-7F8 964-965 E3F E4F 1FBD 2016-2017 2020-2023 2030-2038 203B 203E-2042 207C-207E 208C-208E 20A4"
    " 2100-2101 2103-2106 2108-2109 2114 2116-2118 211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F"
    " 2155-215E 2190-2BFF 3001-3002 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1 FFE5-FFE6"
)
# Letters added to Unicode later than Stanford's tables, which do not know them.
UNKNOWN = (
    "37F 528-52F 560 588 5EF 860-86A 870-887 889-88E 8A1 8AD-8C9 978 980 9FC AF9 C34 C5A C5D C80 CDD D04 D54-D56 D5F"
    " DE6-DEF E86 E89 E8C E8E-E93 E98 EA0 EA8-EA9 EAC 13F5 13F8-13FD 16F1-16F8 170D 171F 1878 191D-191E 19B0-19C0"
    " 19C8-19C9 1B4C 1C80-1C88 1C90-1CBA 1CBD-1CBF 1CF2-1CF3 1CFA 2C2F 2C5F 312E-312F 31BB-31BF 4DB6-4DBF 9FCD-9FFF"
    " A698-A69D A78F A794-A79F A7AB-A7CA A7D0-A7D9 A7F2-A7F7 A8FD-A8FE A9E0-A9E4 A9E6-A9FE AA7E-AA7F AB30-AB5A"
    " AB5C-AB69 AB70-ABBF"
)
CODE_POINTS = {  # shape: hexadecimal ranges
    LETTER: "13A0-13F4 1885-1886",  # to Stanford's tables
    MARK: MARKS,
    SYMBOL: SYMBOLS,
    SPACE: "A0",
    OTHER_SPACE: "2000-200A 3000",
    SUPERSCRIPT: "B2-B3 B9 2070 2074-2079",
    SUBSCRIPT: "2080-2089",
    DASH: "96-97 2013-2015",
    HYPHEN: "58A 2010-2011",
    DECIMAL: "66B-66C",
    NO_SHAPE: UNKNOWN,
}
CATEGORY_SHAPES = {"Lu": CAPITAL, "Lt": LETTER, "Ll": LETTER, "Lm": LETTER, "Lo": LETTER, "Nd": DIGIT}


class Shapes(dict):
    """Code point -> shape, for `str.translate`. Characters that no table names are filled in as they occur."""

    def __missing__(self, code):
        if code < 128:
            shape = chr(code)
        elif code > 0xFFFF:  # two surrogates in Java, in no rule
            shape = NO_SHAPE
        else:
            shape = CATEGORY_SHAPES.get(unicodedata.category(chr(code)), NO_SHAPE)
        self[code] = shape
        return shape


def make_shapes():
    shapes = Shapes(WINDOWS_1252 | {ord(char): char for char in UNCHANGED})
    for shape, ranges in CODE_POINTS.items():
        for first, _, last in (part.partition("-") for part in ranges.split()):
            shapes.update(dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), shape))
    return shapes


SHAPES = make_shapes()

# --- actions: text of a match -> list of tokens ---------------------------------------------------------------------

QUOTES = {"\u2018": "`", "\u201b": "`", "\u2039": "`", "\u2019": "'", "\u203a": "'", "\u201c": "``"}
QUOTES |= {"\u00ab": "``", "\u201d": "''", "\u00bb": "''", "\x91": "`", "\x92": "'", "\x93": "``", "\x94": "''"}
BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
SINGLE_CHARACTERS = BRACKETS | {"\u00a2": "cents", "\u00a3": "#", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$"}
SINGLE_CHARACTERS |= {"\x80": "$", "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3"}
SINGLE_CHARACTERS |= {"\u2154": "2/3", "\u2026": "...", "\x85": "..."}


def replace_with(*tokens):
    return lambda text: list(tokens)


def map_characters(table):
    return lambda text: ["".join(table.get(char, char) for char in text)]


def keep_spaces(text):
    """One token; its spaces become no-break spaces."""
    return [text.replace(" ", "\u00a0")]


escape_parentheses = map_characters({"(": "-LRB-", ")": "-RRB-"})


def drop_soft_hyphens(text):
    return [text.replace("\u00ad", "") or "-"]


def plain_apostrophe(text):
    return map_characters(QUOTES)(text.replace("&apos;", "'"))


def decode_ampersand(text):
    return [re.sub("&amp;", "&", text, flags=re.I)]


def repeat_dot(text):
    """The dot belongs to an abbreviation and ends the sentence."""
    return [text, "."]


# --- rules ----------------------------------------------------------------------------------------------------------

# The last four are i, i, s and k to a rule that ignores case, in Java as in Python.
OTHER_LETTERS = "\u00e9\u00c9\u0130\u0131\u017f\u212a"
APOSTROPHE = "(?:['\u2019]|(?i:&apos;))"
MACROS = {
    "L": f"[A-Za-z{OTHER_LETTERS}]",
    "D": "[0-9\u0661]",
    "A": f"[A-Za-z0-9\u0661{OTHER_LETTERS}]",
    # a letter, or a character that counts as one inside a word
    "W": f"(?:[A-Za-z{OTHER_LETTERS}\u0301\u00ad]|&[aeiouAEIOU](?i:acute|grave|uml);)",
    "Q": APOSTROPHE,
    "P": f"(?:[`\u2018\u201b]|{APOSTROPHE})",  # all forms of apostrophe
    "H": "[-\u2010_]",
    "B": "[A-Za-z0-9]+",
    "S": "[ \t\u00a0\u2000\n\x85]",  # as context; by itself U+0085, a line break in Unicode, is the token "..."
    "Z": "[A-Za-z](?:\\.[A-Za-z])+\\.",  # initials
}
LETTERS, DIGITS, ALNUM, QUOTE = MACROS["L"], MACROS["D"], MACROS["A"], "['\u2019&]"
CURLY_QUOTES = "[`\u2018-\u201f\u2039\u203a\u00ab\u00bb]"
WORD_START = f"[A-Za-z{OTHER_LETTERS}&\u0301\u00ad]"
RULES = []


def rule(first, pattern, action=None, flags=0):
    """Appends a rule to RULES. Of two rules that read the same text the earlier one wins.

    first: pattern of the first character, so that the lexer need not try every rule everywhere. pattern: "<L>" stands
    for MACROS["L"]. action: text -> tokens; None keeps the text as one token. flags: of both patterns.
    """
    pattern = re.sub("<([A-Z])>", lambda match: MACROS[match.group(1)], pattern)
    RULES.append((first, pattern, flags, action))


WORD = "<W>(?:<W>|<D>)*(?:[.!?]<W>(?:<W>|<D>)*)*"
THING = "(?:[dDoOlL]<P><A>)?<A>+(?:<H>(?:[dDoOlL]<P><A>)?<A>+)*"
HYPHENATED = "[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:<Z>|[A-Za-z0-9\u00ad]+))+"
BEFORE_COMMA = r"(?:\.(?P<context>[,;:]))?"  # the dot belongs to the token
CLITIC = "(?:[sSmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
NUMBER = "<D>*(?:[.:,\u00ad\u066b]<D>+)+|<D>+"
LINK_END = '[^ \t\n"<>|.!?(){},-]'
DOMAIN = '[^ \t\u00a0\n"<>|(){}.]+'
PATH = '/[^ \t\n"<>|()]+' + LINK_END
WWW = r"(?i:www)\.(?:[^ \t\n\"<>|.!?(){},]++\.)+[a-zA-Z]{2,4}"
DOT_COM = "(?:[^ \t\n\"`'<>|.!?(){},-_$]++\\.)+(?i:com|net|org|edu)"

# Abbreviations keep their dot. Some can end a sentence: before a capital, a tag or the end of the file the dot is read
# twice, so "etc. Then" is "etc." "." "then".
ENDS_SENTENCE = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|calif|ala|ariz|colo|conn|ct|fla|ga|ind"
    "|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo|dak|inc|cos?|corp|ltd|plc|bhd|assn|univ"
    "|intl|sys|bldg|blvd|rd|rt|sq|esq|bros|est|etc|ext|tel|al|seq|sr|jr|ed\\.d|ph\\.d"
)
ENDS_SENTENCE_CAPITALIZED = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
INSIDE_SENTENCE = (
    "adj|adm|adv|alex|assoc|asst|attys?|ave|brig|capt|cf|cie|cmdr|col|comdr|cont'd|cpl|dept|det|drs?|elec|ens|ft|gen"
    "|govs?|hon|insp|invt|jos|lieut|lt|maj|messrs|mlle|mme|mrs?|ms|msgr|mt|natl|pfc|ph|pres|profs?|pvt|reps?|rev|sens?"
    "|sfc|sgt|spc|ste?|supts?|treas|wm"
)
BEFORE_NUMBER = "art|ca|figs?|nos?|op|pp|prop"
EXTENSIONS = (
    "bat|bmp|c|cgi|class|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt"
    "|wav|x|xml|zip"
)
# Initials end a sentence only before one of these words.
SENTENCE_STARTERS = (
    "an?|about|according|additionally|after|as|at|but|earlier|he|her|here|however|if|in|it|last|many|more|now|once|one"
    "|other|our|she|since|so|some|such|that|the|their|then|there|these|they|this|we|what|when|while|yet|you|m[rs]\\."
)
TAG = (
    r"<(?:[!?][A-Za-z-][^>\n]*|/[A-Za-z][A-Za-z0-9:._-]* *|[A-Za-z][A-Za-z0-9:._-]*"
    r"""(?: +[A-Za-z][A-Za-z0-9:._-]*(?: *= *(?:"[^"\n]*"|'[^'\n]*'))?)* */? *)>"""
)
SENTENCE_CONTEXT = f"(?P<context>\\.(?:<S>(?:<S>|[A-Z\u00c9\u0130\u212a]|{TAG})|[\\s\\S]?\\Z))"
STARTER_CONTEXT = f"(?P<context><S>+(?:(?=[A-Z])(?i:{SENTENCE_STARTERS})|{TAG})<S>+)"

rule("[cgwl]", "cannot|gonna|gotta|wanna|lemme|gimme", lambda text: [text[:3], text[3:]], re.I)
rule("'", "'t(?P<context>is|was)", None, re.I)  # what follows is read again: "'tissue" is "'t issue"
rule("<", TAG, keep_spaces)
rule("\u2013", "\u2013", replace_with("--"))
rule("&", "&(?:mdash|ndash|md);", replace_with("--"), re.I)
rule("&", "&amp;", replace_with("&"), re.I)
rule("&", "&lt;", replace_with("<"), re.I)
rule("&", "&gt;", replace_with(">"), re.I)
rule("&", "&nbsp;", replace_with(), re.I)
rule("[\t\u00a0\u2000]", "[ \t\u00a0\u2000]+", replace_with())  # a link can be longer: it may start with these
# words
rule(WORD_START, WORD + f"(?P<context><Q>{CLITIC})", drop_soft_hyphens)
rule("[A-Za-z\u00ad]", "[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*(?P<context>[nN]<P>[tT])", drop_soft_hyphens)
rule(WORD_START, WORD + BEFORE_COMMA, drop_soft_hyphens)
rule(QUOTE, "<Q>[nN]<Q>?")
rule("[dDlLjJ]", "[dDlLjJ]<Q>")
rule("['\u2019&cdnos]", "<Q>(?:em|till?|cause|[2-9]0s)|(?:dunkin|somethin|ol)<Q>|c<Q>est|cap<Q>n|ne<Q>er", None, re.I)
rule("[celnos]", "c'mon|e'er|ev'ry|li'l|nat'l|nor'easter|o<P>o|s'mores", None, re.I)
rule(QUOTE, "<Q>[0-9][0-9](?P<context><S>)")
rule("[A-HJ-XZn]", "[A-HJ-XZn]<P><L><L>+")
rule(LETTERS, "<L>+?[aeiouyAEIOUY]<P>[aeiouA-Z]<L>*")
rule("[yY]", "[yY]<Q>(?P<context><L>)")
# links, mail, names
rule("[hH]", '(?i:https?)://[^ \t\n"<>|(){}]+' + LINK_END)
rule("[wW]", f"{WWW}{PATH}|{WWW}")
# ",-_" is a range that contains all capitals and digits: so it is in Stanford's rules
rule("[^A-Z0-9,-_]", f"{DOT_COM}{PATH}|{DOT_COM}")
rule("[a-zA-Z0-9<&]", '(?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\u00a0\n"<>|(){}]*@(?:' + DOMAIN + "\\.)*" + DOMAIN + ">?")
rule("@", "@[A-Za-z_][A-Za-z_0-9]*")
rule("#", "#<W>+")
# clitics
rule(QUOTE, f"<Q>(?:{CLITIC}(?P<context>[^A-Za-z])|[sSmMdD])", plain_apostrophe)
rule("[nN]", "[nN]<P>[tT]", plain_apostrophe)
# numbers
rule(DIGITS, "<D>{1,2}[-/]<D>{1,2}[-/]<D>{2,4}")
rule("[-+.:,\u00ad\u066b0-9\u0661]", f"[-+]?(?:{NUMBER})", drop_soft_hyphens)
rule(DIGITS, r"(?:<D>{1,4}[- \u00a0])?<D>{1,4}(?:\\?/|\u2044)<D>{1,4}", keep_spaces)
AREA_CODE = r"(?:\([0-9]{2,3}\)[ \u00a0]?|\+*(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
rule("[0-9+(]", AREA_CODE + "[0-9]{3,4}[- \u00a0]?[0-9]{3,5}", lambda text: escape_parentheses(*keep_spaces(text)))
# abbreviations
ENDING_PATTERN = f"(?:(?i:{ENDS_SENTENCE})|(?=[A-Z])(?i:{ENDS_SENTENCE_CAPITALIZED})|[Pp]?[Pp][tT][ey][sS]?)"
rule("[cp]", "(?:co|pte|pty)\\.(?P<context>[ \t](?:ltd|lim))", None, re.I)
rule(LETTERS, ENDING_PATTERN + SENTENCE_CONTEXT, lambda text: [text + "."])
rule(LETTERS, rf"{ENDING_PATTERN}\.(?P<context>[\s\S]{{2}})?")
rule(LETTERS, rf"(?:(?i:{INSIDE_SENTENCE}|vs)|[Mm][ft][gG])\.")
rule("[A-Za-z]", r"[A-Za-z]\." + STARTER_CONTEXT, lambda text: [text[:1], "."])
rule("[A-Za-z]", r"[A-Za-z]\.")
rule("[A-Za-z]", "(?:<Z>|[nN][oO][nN]-[uU]\\.[sS]\\.)" + STARTER_CONTEXT, repeat_dot)
rule("[A-Za-z]", "<Z>|(?i:non-u\\.s)(?:\\.|(?P<context><S>))")
rule("[A-Za-z]", rf"(?:{BEFORE_NUMBER})\.(?P<context><S>?<D>)", None, re.I)
FILE_NAME = rf"(?:<W>|<D>)+(?:\.(?:<W>|<D>)+)*\.(?:{EXTENSIONS})(?P<context>[!,.?\s])"
rule("[0-9\u0661]|" + WORD_START, FILE_NAME, None, re.I)
rule("[\u207a\u207b\u208a\u208b\u00b2\u2082]", "[\u207a\u207b\u208a\u208b]?(?:\u00b2+|\u2082+)")
# words with hyphens and slashes
rule(ALNUM, THING + BEFORE_COMMA)
rule("[ap]", "(?:anti|pro)-", None, re.I)
rule("[A-Za-z0-9]", HYPHENATED + BEFORE_COMMA, drop_soft_hyphens)
rule("[A-Za-z0-9]", r"<B>(?:-[A-Za-z]+){0,2}(?:\\?/<B>(?:-[A-Za-z]+){0,2}){1,2}")
rule("[A-Z$]", r"[A-Z]*\$")
rule("[A-Z]", "[A-Z]+(?:(?:&(?i:amp;)|[&+])[A-Z]+)+" + BEFORE_COMMA, decode_ampersand)
rule("[cf]", r"c\+\+|[cf]#", None, re.I)
# quotes
rule('["&]', '(?:"|&quot;)(?P<context>[A-Za-z0-9$])', replace_with("``"))
rule('["&]', '"|&quot;', replace_with("''"))
rule("'", "'(?P<context>[A-Za-z][^ \t\u00a0\n])", replace_with("`"))
rule(QUOTE, f"<Q>{CLITIC}", plain_apostrophe)
rule(CURLY_QUOTES, CURLY_QUOTES + "{1,2}", map_characters(QUOTES))
rule("'", "''?")
rule("&", "&(?:HT|TL|[UL]R|Q[CLR]|odq|cdq|#[0-9]+|quot|apos);", plain_apostrophe, re.I)
# smileys
rule("[<>:;=]", r"[<>]?[:;=][-o*']?[dpDOP()@\[\]{|\\](?P<context>[^A-Za-z0-9])", escape_parentheses)
FACES = r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)"
rule("[-^x=~<>'(]", FACES, escape_parentheses)
# other signs
rule("-", "-{3,4}", replace_with("--"))
rule("-", "-{5,}|--?")
rule("[.]", r"\.{3,5}|\.(?:[ \u00a0]\.){2,4}", replace_with("..."))
rule(r"[?!#@_*\\<>]", r"[?!]+|##+|@@+|__+|\*+|(?:\\\*)+|<<|>>")
rule(".", r"[^\0-\x1f\x7f \u00a0\u2000\u2010\u066b]", map_characters(SINGLE_CHARACTERS))
