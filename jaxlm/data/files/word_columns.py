"""Which columns of a file with a word a line hold the words, the tags and the numbers of the sentences."""

import re
from itertools import chain
from typing import NamedTuple

from jaxlm.errors import DataError

PLAIN_ID = re.compile(r"[0-9]+")
SPAN_TAG = re.compile(r"O|[BIESLUM]-\S+")
# The names of columns. Those that come first win over the others.
WORD_NAMES = (("word", "words"), ("token", "tokens", "form", "text"))
TAG_NAMES = (
    ("tag", "tags"),
    ("label", "labels", "ner", "ner_tag", "ner_tags", "pos", "pos_tag", "upos"),
)
ALL_WORD_NAMES = frozenset(chain.from_iterable(WORD_NAMES))
ALL_TAG_NAMES = frozenset(chain.from_iterable(TAG_NAMES))
# Names of a column with the number of the sentence, without what is no letter; such numbers where there are no names.
SENTENCE_NAMES = ("sentence", "sentenceid", "sentenceidx", "sentenceindex", "sentencenumber",
                  "sentenceno", "sent", "sentid", "sentidx", "sid")  # fmt: skip
SENTENCE_NUMBER = re.compile(r"sent(ence)?[ :_#-]*[0-9]+", re.IGNORECASE)
ENOUGH = 20  # words, before their number of kinds says anything


class Token(NamedTuple):
    """A line of a word."""

    cells: list[str]
    line: int


def folded(names: list[str]) -> list[str]:
    return [name.strip().casefold() for name in names]


def cells_at(place: int, tokens: list[Token]) -> list[str]:
    """One column of these tokens."""
    return [token.cells[place] for token in tokens]


def column_name(place: int, names: list[str]) -> str:
    if place < len(names):
        return names[place]
    return str(place)


def is_header(cells: list[str], given: dict[str, str]) -> bool:
    """Whether a first line names columns: those that were given, or one of words and one of tags."""
    known = folded(cells)
    wanted = names_in(given)
    if wanted:
        return wanted <= set(known)
    return (
        not ALL_WORD_NAMES.isdisjoint(known)
        and not ALL_TAG_NAMES.isdisjoint(known)
        and len(set(known)) == len(known)
    )


def names_in(given: dict[str, str]) -> set[str]:
    """The columns that were given by name, not by place."""
    return {name.casefold() for name in given.values() if not name.isdecimal()}


def row_columns(names: list[str], given: dict[str, str]) -> list[str]:
    """The columns of the sentence's number, the word and its tag, of a table with names; [] where it lacks one."""
    known = folded(names)
    number = sentence_column(known, [])
    word = column_called(given.get("words", ""), known, WORD_NAMES)
    tag = column_called(given.get("tags", ""), known, TAG_NAMES)
    places = [number, word, tag]
    if None in places or max(places) >= len(names):
        return []
    return [names[place] for place in places]


def sentence_column(names: list[str], tokens: list[Token]) -> int | None:
    """The column that says of which sentence a word is, by its name, or by "Sentence: 1" where there are no names."""
    for place, name in enumerate(names):
        if re.sub("[^a-z]", "", name) in SENTENCE_NAMES:
            return place
    if names:
        return None
    filled = set(map(str.strip, cells_at(0, tokens))) - {""}
    if filled and all(map(SENTENCE_NUMBER.fullmatch, filled)):
        return 0
    return None


def find_columns(
    path: str,
    tokens: list[Token],
    width: int,
    names: list[str],
    given: dict[str, str],
    number: int | None = None,
) -> tuple[int, int]:
    """The columns of the words and of the tags. Raises DataError where they are not clear.

    number: the column with the numbers of the sentences, which is neither.
    """
    if given:
        return given_columns(path, width, names, given)
    word = column_among(names, WORD_NAMES)
    tag = column_among(names, TAG_NAMES)
    if word is not None and tag is not None:
        refuse_empty(path, tokens, tag, names)
        return word, tag
    last = width - 1
    if number is not None or names or not tokens or not is_plain(tokens, width):
        raise DataError(unclear(path, tokens, names, number))
    return 0, last


def given_columns(
    path: str, width: int, known: list[str], given: dict[str, str]
) -> tuple[int, int]:
    """The columns of data.columns. Raises DataError where one is not there."""
    places = []
    for role, groups in (("words", WORD_NAMES), ("tags", TAG_NAMES)):
        name = given.get(role, role).casefold()
        usual = column_among(known, groups)
        if name in known:
            places.append(known.index(name))
        elif name.isdecimal() and int(name) < width:
            places.append(int(name))
        elif role not in given and usual is not None:
            places.append(usual)
        else:
            listed = f": {' '.join(known)}" if known else ""
            has = f"its lines have {width} columns{listed}"
            raise DataError(f"{path}: no column {name}; {has}. {columns_hint(0, width - 1)}")
    return places[0], places[1]


def column_called(name: str, names: list[str], groups: tuple) -> int | None:
    """The column of this name or place; without a name, the one that has a usual name."""
    if name.casefold() in names:
        return names.index(name.casefold())
    if name.isdecimal():
        return int(name)
    return column_among(names, groups)


def column_among(known: list[str], groups: tuple) -> int | None:
    """The one column that has one of these names, of the first group that is there; of CoNLL-U upos, not xpos."""
    for wanted in groups:
        found = [place for place, name in enumerate(known) if name in wanted]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def refuse_empty(path: str, tokens: list[Token], tag: int, names: list[str]) -> None:
    """Raises DataError where the column of the tags has none."""
    if tokens and set(cells_at(tag, tokens)) == {"_"}:
        raise DataError(
            f"{path}: its column {names[tag]} has no tags, only _. {columns_hint(1, tag + 1)}"
        )


def is_plain(tokens: list[Token], width: int) -> bool:
    """Whether the first column has the words, and the last the tags, as far as their values show."""
    first = cells_at(0, tokens)
    last = cells_at(-1, tokens)
    of_spans = all(map(SPAN_TAG.fullmatch, last))
    if all(map(SPAN_TAG.fullmatch, first)):
        return False
    if width > 2:
        return of_spans and not all(map(PLAIN_ID.fullmatch, first))
    if of_spans or len(tokens) < ENOUGH:
        return True
    kinds = len(set(last))
    return kinds <= len(set(first)) and kinds <= len(tokens) / 2


def unclear(path: str, tokens: list[Token], names: list[str], number: int | None) -> str:
    """Why it is not clear which column is which, and what to type."""
    cells = names or tokens[0].cells
    shown = ", ".join(f"{place}: {cell[:24]!r}" for place, cell in enumerate(cells[:12]))
    return (
        f"{path}: it has a word a line, but it is not clear in which column the words and the tags are; its columns "
        f"are {shown}. {columns_hint(*likely_columns(tokens, number))}"
    )


def likely_columns(tokens: list[Token], number: int | None) -> tuple[int, int]:
    """The columns that look most like words and tags. number: the one that numbers the sentences."""
    columns = list(zip(*(token.cells for token in tokens)))
    candidates = []
    span_tags = []
    for place, column in enumerate(columns):
        if place == number or all(map(PLAIN_ID.fullmatch, column)):
            continue
        candidates.append(place)
        if all(map(SPAN_TAG.fullmatch, column)):
            span_tags.append(place)
    word = next((place for place in candidates if place not in span_tags), 0)
    if span_tags:
        return word, span_tags[0]
    others = [place for place in candidates if place != word]
    tag = min(others, key=lambda place: len(set(columns[place])), default=len(columns) - 1)
    return word, tag


def columns_hint(word: int, tag: int) -> str:
    return f'Say so by place from 0: --config.data.columns="words={word} tags={tag}" (in evaluate: --columns)'
