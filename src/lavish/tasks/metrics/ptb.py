"""Words of a caption as COCO's caption metrics count them: a Penn Treebank tokeniser without Java.

The released metrics run Stanford's PTBTokenizer 3.4.1 (`-preserveLines -lowerCase`) and drop punctuation. Ours gives
the same words on captions; `tests/fixtures/metrics/captions.json` holds sentences with what the Java program made of
them. On 3000 lines of odd pieces 55 differ: full stops of abbreviations that end a line, where the Java program also
looks at the next caption, and `2 1/2`, which it makes one word with a hard space. Else it differs in abbreviations that
are not in `ABBREVIATIONS`, emoticons, XML entities, and phone numbers with an area code in brackets.
Source: salaniz/pycocoevalcap, tokenizer/ptbtokenizer.py (the options and the list of dropped tokens).
"""

from __future__ import annotations

import re

_ABBREVIATIONS = """
    mr mrs ms dr st jr sr prof rev gen sgt capt lt col maj gov sen rep hon ave blvd rd mt ft vs etc inc co corp ltd bros
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri sat sun e.g i.e ph.d vol ed al
"""
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
"""Words that keep the full stop behind them, wherever they stand."""
BEFORE_NUMBERS = frozenset(("no", "nos", "fig", "p", "pp", "art", "prop"))
"""Words that keep the full stop behind them where a number follows."""
SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Tokens that are no words. Brackets are none of them: lower-casing turns `-LRB-` into a word that COCO counts."""
WRITTEN = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "€": "$",
    "£": "#",
    "…": "...",
    "–": "--",
    "—": "--",
    '"': "''",
    "“": "``",
    "”": "''",
}

_LETTER = r"[^\W_]"
_PIECES = re.compile(
    rf"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+      # addresses
    | <{_LETTER}+>                                   # a tag
    | \.{{2,}} | -{{2,}} | [?!]{{2,}}                # runs of one mark
    | (?:[a-z]\.){{2,}}(?![^\W_]) | (?<![\w'.])[a-z]\.(?![\w.])   # u.s.a., n.
    | '(?:tis|twas)\b | '\d\ds\b | 'n(?:'|\b)         # leading apostrophes
    | '(?:s|m|d|re|ve|ll)\b                          # behind a mark or a space
    | c\+\+ | [cf]\# | \#[a-z]+
    | \d+(?='\d)                                     # feet, of 5'6
    | (?<!\w)\.\d+                                   # .5
    | {_LETTER}+(?:[-&./'@_]{_LETTER}+|(?<=\d),\d+|:\d+)*   # words and numbers
    | \S
    """,
    re.VERBOSE,
)
_LAST_CAPITAL = re.compile(r"(?<![\w'.])([A-Z])\.\s*\Z")
"""Its full stop ends the sentence; that of a small letter stays with it."""
_CLITIC = re.compile(r"(.+?)((?:n't)?(?:'(?:s|m|d|re|ve|ll))?)\Z")


def tokenize(text: str) -> list[str]:
    """Give the words of a caption, lower-cased and without punctuation.

    >>> tokenize("A man's dog can't run.")
    ['a', 'man', "'s", 'dog', 'ca', "n't", 'run']
    """
    line = text.replace("’", "'").replace("‘", "'")
    line = _LAST_CAPITAL.sub(r"\1 .", line).lower()
    found: list[str] = []
    for match in _PIECES.finditer(line):
        found.extend(_words(match[0], line[match.end() :]))
    return [word for word in found if word not in PUNCTUATION]


def _words(piece: str, rest: str) -> list[str]:
    """Split one piece; `rest` is the line behind it."""
    if piece in SPLIT_WORDS:
        return list(SPLIT_WORDS[piece])
    if len(piece) == 1 and not piece.isalnum():
        return [WRITTEN.get(piece, piece)]
    if piece[0] in ".-" and not piece[-1].isdigit():
        return ["..." if piece[0] == "." else "--"]
    if not piece[0].isalnum() or "://" in piece or "@" in piece:
        return [piece]
    if rest.startswith(".") and (piece in ABBREVIATIONS or (piece in BEFORE_NUMBERS and re.match(r"\.\s*\d", rest))):
        return [f"{piece}."]
    if piece.startswith("y'all"):
        return ["y'", *_words(piece[2:], "")]
    clitic = _CLITIC.match(piece)
    if clitic and clitic[2]:
        parts = [clitic[1], *re.findall(r"n't|'\w+", clitic[2])]
        return [word for part in parts for word in SPLIT_WORDS.get(part, (part,))]
    return [piece]
