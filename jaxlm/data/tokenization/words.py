"""The words of a text, for the tokenizer of words: where they are, and how they become a text again."""

import re
import sys
import unicodedata
from functools import cache, lru_cache

SPLITS = ("spaces", "punctuation", "characters")

# Scripts that have no space between two words, and Hangul, in which particles follow a word without one.
APART = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005\u3007\u3040-\u30ff\u3130-\u318f"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
WIDE = "\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b"  # marks that have their own space
NO_SPACE_BEFORE = (
    ".,;:!?%)]}/\u060c\u061b\u061f\u0964\u2019\u201d\u00bb\u2026\u300d\u300f\uff09" + WIDE
)
NO_SPACE_AFTER = "([{/\u00bf\u00a1$\u00a3\u20ac#\u2018\u201c\u00ab\u300c\u300e\uff08" + WIDE
QUOTES = ('"', "'")
SHORT_FORMS = ("s", "d", "m", "re", "ve", "ll")  # of text that comes with "it 's"


@cache
def marks() -> str:
    """The combining marks of Unicode, joiners and the soft hyphen, as the inside of a regular expression's []."""
    ranges = []
    is_before = False
    for character in map(chr, range(sys.maxunicode + 1)):
        is_mark = unicodedata.category(character).startswith("M")
        if is_mark and not is_before:
            ranges.append(f"{character}-{character}")
        elif is_mark:
            ranges[-1] = ranges[-1][:-1] + character
        is_before = is_mark
    return "".join(ranges) + "\u200c\u200d\u00ad"


@cache
def pattern(split: str) -> re.Pattern:
    """Of a word, in text without white space."""
    mark = f"[{marks()}]"
    letter = rf"(?:[^\W_]|{mark})"
    kinds = [
        r"(?:https?://|www\.)[!-~]*[A-Za-z0-9/=&_~-]",
        r"[A-Za-z0-9._+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+",
        r"</?\w+/?>",  # <unk>, <br/>
        rf"(?<!\S)['\u2019](?:{'|'.join(SHORT_FORMS)})(?!{letter})",
        r"(?:[^\W\d_]\.){2,}(?!\w)",  # U.S.
    ]
    if split == "characters":
        kinds.append(f"[{APART}]{mark}*")
        letter = rf"(?:(?![{APART}])[^\W_]|{mark})"
    between = [
        r"(?<=\d)[.,:](?=\d)",  # 3.14
        rf"['\u2019_](?={letter})",  # don't
        rf"(?<!\d)[-\u2010\u2011](?={letter})",  # well-known, but not 1990-1992
        r"(?<=\d)-(?=[^\W\d_])",  # 20-year
    ]
    kinds += [
        rf"{letter}+(?:(?:{'|'.join(between)}){letter}+)*",
        r"[\U0001f1e6-\U0001f1ff]{2}",  # a flag
        r"([-.!?=*~'`_#])\1+",  # ... and --
        rf"[^\w\s\u200b\ufeff](?:{mark}|[\U0001f3fb-\U0001f3ff]|(?<=\u200d)[^\w\s])*",
        "_",
    ]
    return re.compile("|".join(kinds))


@lru_cache(maxsize=200_000)
def _spans_inside(part: str, split: str) -> tuple[tuple[int, int], ...]:
    return tuple(map(re.Match.span, pattern(split).finditer(part)))


def word_spans(text: str, split: str) -> list[tuple[int, int]]:
    """(first character, one past the last) of each word.

    split: spaces (a word is what stands between white space), punctuation (marks and symbols are words of their own;
    3.14, don't, well-known, U.S., addresses and emoji stay whole), or characters (besides, so is each character of a
    script without spaces between its words).
    """
    parts = list(map(re.Match.span, re.finditer(r"\S+", text)))
    if split == "spaces":
        return parts
    spans = []
    for begin, end in parts:
        inside = _spans_inside(text[begin:end], split)
        spans += [(begin + first, begin + last) for first, last in inside]
    return spans


def words_in(text: str, split: str) -> list[str]:
    """The words of a text; see `word_spans`."""
    if split == "spaces":
        return text.split()
    return [text[begin:end] for begin, end in word_spans(text, split)]


def characters_apart(text: str) -> list[str]:
    """A text in parts: each character of a script without spaces, with its marks, is a part of its own."""
    return list(filter(None, re.split(f"([{APART}][{marks()}]*)", text)))


def text_of(words: list[str], split: str) -> str:
    """The words as a text that reads well. A space depends on the words before it and after it, never on later ones."""
    if split == "spaces":
        return " ".join(words)
    text = words[:1]
    opened = set(words[:1]) & set(QUOTES)
    for i in range(1, len(words)):
        if _space_before(words, i, opened, split):
            text.append(" ")
        text.append(words[i])
        if words[i] in QUOTES:
            opened ^= {words[i]}
    return "".join(text)


def _space_before(words: list[str], i: int, opened: set[str], split: str) -> bool:
    """Whether there is a space between words i - 1 and i. opened: quotation marks that are not closed before i."""
    before = words[i - 1]
    word = words[i]
    if word in opened or before in opened:
        return False
    if before[-1] == word[0]:
        return True  # two marks in a row would become one word
    if word[0] in NO_SPACE_BEFORE or before in tuple(NO_SPACE_AFTER):
        return False
    if word[0] in "'\u2019" and word[1:] in SHORT_FORMS:
        return False
    if word == "-":
        return not before[-1].isdigit()
    if before == "-" and word[0].isdigit() and i > 1:
        return not words[i - 2][-1].isdigit()
    if split == "characters":
        return not (re.match(f"[{APART}]", before) and re.match(f"[{APART}]", word))
    return True
