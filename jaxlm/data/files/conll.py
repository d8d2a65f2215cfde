"""Files of tagged words as CoNLL has them: a word a line, with its columns, and a blank line between sentences.

Read are a word and a tag; the columns of CoNLL-2003 (word first, tag last); CoNLL-U (Nivre et al. 2020), its FORM and
UPOS. Lines that begin with -DOCSTART-, and comments (#) before a sentence, are left out.
"""

import csv
import re
from collections import Counter
from typing import NamedTuple

from jaxlm.data.files.example_files import lines_of
from jaxlm.errors import DataError

SUFFIXES = (
    ".conll",
    ".conllu",
    ".conllx",
    ".conllup",
    ".conll03",
    ".bio",
    ".iob",
    ".iob2",
    ".bioes",
    ".bilou",
)
DOCUMENT = "-DOCSTART-"
UNIVERSAL = "id form lemma upos xpos feats head deprel deps misc".split()  # the columns of CoNLL-U
PLAIN_ID = re.compile(r"[0-9]+")
ANY_ID = re.compile(
    r"[0-9]+([-.][0-9]+)?"
)  # 3-4: words written together; 3.1: one that is not in the text
SPACES = re.compile(r"[ \t]+")
OF_SPAN = re.compile(r"O|[BIESLUM]-\S+")
WORD_NAMES = ("word", "words", "token", "tokens", "form", "text")
TAG_NAMES = (
    "tag",
    "tags",
    "label",
    "labels",
    "ner",
    "ner_tag",
    "ner_tags",
    "pos",
    "pos_tag",
    "upos",
)
SEVERAL_SHARE = (
    0.1  # of lines with spaces in a cell after the word: fewer are odd words, more are sentences
)
ENOUGH = 20  # words, before their number of kinds says anything
WHOLE_SENTENCES = (
    "or write a sentence a line: its words joined by spaces, a tab, its tags joined by spaces"
)


class Token(NamedTuple):
    """A line of a word."""

    cells: list[str]
    line: int


class Sentences(NamedTuple):
    """What a file holds: examples, the line at which each begins, and in which columns its words and tags were."""

    examples: list[dict]
    lines: list[int]
    columns: str

    def told(self) -> str:
        words = sum(len(example["words"]) for example in self.examples)
        return f"{len(self.examples):,} sentences, {words:,} words, read as a word a line ({self.columns})"


def read(
    path: str, text: str, suffix: str, given: dict[str, str], bad: list[str]
) -> Sentences | None:
    """The sentences of a text with a word a line, or None where it has a sentence a line.

    given: columns by name or place. Adds lines of too many or too few columns to `bad`. Raises DataError of what is
    not clear.
    """
    blocks = blocks_of(lines_of(text))
    names = global_columns(text)
    most = most_begin_with_comments(blocks)
    blocks = [without_comments(block, most) for block in blocks]
    blocks = [block for block in blocks if block]
    if not blocks:
        return None
    split = splitter(blocks, suffix)
    sentences = []
    for block in blocks:
        sentences.append([Token(split(line), number) for number, line in block])
    header = header_of(sentences, given)
    if header:
        names = [cell.casefold() for cell in header]
        del sentences[0][0]
        sentences = [sentence for sentence in sentences if sentence]
    tokens = [token for sentence in sentences for token in sentence]
    if not tokens or not is_tokens(tokens, text, suffix, given):
        return None
    width = Counter(len(token.cells) for token in tokens).most_common(1)[0][0]
    universal = not names and width == len(UNIVERSAL) and is_universal(tokens)
    if universal:
        names = UNIVERSAL
    if names[:1] == ["id"]:
        sentences = [[token for token in sentence if is_word(token)] for sentence in sentences]
    sentences = whole_lines(path, sentences, width, bad)
    tokens = [token for sentence in sentences for token in sentence]
    word, tag = places_of(path, tokens, width, names, given)
    examples = []
    for sentence in sentences:
        examples.append(
            {
                "words": [token.cells[word] for token in sentence],
                "tags": [token.cells[tag] for token in sentence],
            }
        )
    columns = f"words={named(word, names)} tags={named(tag, names)}"
    return Sentences(examples, [sentence[0].line for sentence in sentences], columns)


def named(place: int, names: list[str]) -> str:
    if place < len(names):
        return names[place]
    return str(place)


def blocks_of(lines: list[str]) -> list[list[tuple[int, str]]]:
    """(number, line) of the lines between blank ones, and between documents."""
    blocks = []
    block = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith(DOCUMENT):
            block.append((number, line))
        elif block:
            blocks.append(block)
            block = []
    if block:
        blocks.append(block)
    return blocks


def most_begin_with_comments(blocks: list[list[tuple[int, str]]]) -> bool:
    """A sentence may begin with the word #, but not most of them."""
    comments = sum(block[0][1].startswith("# ") for block in blocks)
    return 2 * comments > len(blocks)


def without_comments(block: list[tuple[int, str]], most: bool) -> list[tuple[int, str]]:
    """A block without the comments that it begins with. most: most blocks do."""
    start = 0
    for _, line in block:
        after = block[start + 1][1] if start + 1 < len(block) else ""
        comment = most and line.startswith("# ") and "\t" not in after
        if not line.startswith("#") or not (comment or is_unlike(line, after)):
            break
        start += 1
    return block[start:]


def is_unlike(line: str, after: str) -> bool:
    """Whether a line that begins with # is no word: it has other columns than the line after it."""
    if "\t" in after or not after:
        return line.count("\t") != after.count("\t")
    return len(SPACES.split(line)) != len(SPACES.split(after)) or after.startswith("#")


def global_columns(text: str) -> list[str]:
    """The columns that CoNLL-U Plus names in its first line."""
    first = text.partition("\n")[0]
    _, found, names = first.partition("global.columns =")
    if found:
        return names.casefold().split()
    return []


def splitter(blocks: list[list[tuple[int, str]]], suffix: str):
    """What divides a line into columns: tabs, else commas in a .csv, else spaces."""
    lines = [line for block in blocks for _, line in block]
    tabs = sum("\t" in line for line in lines)
    if 2 * tabs > len(lines):
        return lambda line: line.split("\t")
    for mark in (",", ";"):
        if suffix == ".csv" and 2 * sum(mark in line for line in lines) > len(lines):
            return lambda line: next(csv.reader([line], delimiter=mark))
    return lambda line: SPACES.split(line.strip(" \t"))


def header_of(sentences: list[list[Token]], given: dict[str, str]) -> list[str]:
    """The first line where it names columns: those that were given, or one of words and one of tags."""
    cells = [cell.strip() for cell in sentences[0][0].cells]
    known = [cell.casefold() for cell in cells]
    wanted = [name.casefold() for name in given.values() if not name.isdecimal()]
    if wanted:
        if set(wanted) <= set(known):
            return cells
        return []
    has_words = set(known) & set(WORD_NAMES)
    has_tags = set(known) & set(TAG_NAMES)
    if has_words and has_tags and len(set(known)) == len(known):
        return cells
    return []


def is_tokens(tokens: list[Token], text: str, suffix: str, given: dict[str, str]) -> bool:
    """Whether each line is one word. Not so where a cell has the tags of several, with spaces between."""
    if suffix in SUFFIXES:
        return True
    several = sum(any(len(cell.split()) > 1 for cell in token.cells[1:]) for token in tokens)
    width = len(tokens[0].cells)
    if width < 2 or (width <= 3 and several > SEVERAL_SHARE * len(tokens)):
        return False
    blank = re.search(r"\S[^\n]*\n\s*\n", text) is not None
    return blank or DOCUMENT in text or is_universal(tokens)


def is_universal(tokens: list[Token]) -> bool:
    """Whether these are lines of CoNLL-U, but for a few that are broken."""
    like = sum(
        len(token.cells) == len(UNIVERSAL) and bool(ANY_ID.fullmatch(token.cells[0]))
        for token in tokens
    )
    return like > 0.9 * len(tokens)


def is_word(token: Token) -> bool:
    """Whether a line of CoNLL-U is a word by itself, not several written together, nor one that is left out."""
    return bool(PLAIN_ID.fullmatch(token.cells[0])) or not ANY_ID.fullmatch(token.cells[0])


def whole_lines(
    path: str, sentences: list[list[Token]], width: int, bad: list[str]
) -> list[list[Token]]:
    """The sentences whose lines have all columns; the lines of others are added to `bad`."""
    whole = []
    for sentence in sentences:
        wrong = [token for token in sentence if len(token.cells) != width]
        for token in wrong:
            bad.append(
                f"{path}:{token.line}: {len(token.cells)} columns, the other lines of words have {width}"
            )
        if sentence and not wrong:
            whole.append(sentence)
    return whole


def places_of(
    path: str, tokens: list[Token], width: int, names: list[str], given: dict[str, str]
) -> tuple[int, int]:
    """The columns of the words and of the tags. Raises DataError where they are not clear."""
    known = [name.casefold() for name in names]
    if given:
        return given_places(path, width, known, given)
    word = unique(known, WORD_NAMES)
    tag = unique(known, TAG_NAMES)
    if word is not None and tag is not None:
        refuse_empty(path, tokens, tag, names)
        return word, tag
    last = width - 1
    if known or not tokens or not is_plain(tokens, width):
        raise DataError(unclear(path, tokens, names))
    return 0, last


def unique(known: list[str], wanted: tuple[str, ...]) -> int | None:
    """The one column that has one of these names; of CoNLL-U upos, not xpos."""
    found = [place for place, name in enumerate(known) if name in wanted]
    if len(found) == 1:
        return found[0]
    return None


def refuse_empty(path: str, tokens: list[Token], tag: int, names: list[str]) -> None:
    if tokens and all(token.cells[tag] == "_" for token in tokens):
        raise DataError(
            f"{path}: its column {names[tag]} has no tags, only _. {columns_hint(1, tag + 1)}"
        )


def given_places(path: str, width: int, known: list[str], given: dict[str, str]) -> tuple[int, int]:
    places = []
    for role in ("words", "tags"):
        name = given.get(role, role).casefold()
        if name in known:
            places.append(known.index(name))
        elif name.isdecimal() and int(name) < width:
            places.append(int(name))
        else:
            has = f"its lines have {width} columns" + (f": {' '.join(known)}" if known else "")
            raise DataError(f"{path}: no column {name}; {has}. {columns_hint(0, width - 1)}")
    return places[0], places[1]


def is_plain(tokens: list[Token], width: int) -> bool:
    """Whether the first column has the words, and the last the tags, as far as their values show."""
    first = [token.cells[0] for token in tokens]
    last = [token.cells[-1] for token in tokens]
    of_spans = all(map(OF_SPAN.fullmatch, last))
    if all(map(OF_SPAN.fullmatch, first)) or (all(map(PLAIN_ID.fullmatch, first)) and width > 2):
        return False
    if width > 2:
        return of_spans
    if of_spans or len(tokens) < ENOUGH:
        return True
    kinds = len(set(last))
    return kinds <= len(set(first)) and kinds <= len(tokens) / 2


def unclear(path: str, tokens: list[Token], names: list[str]) -> str:
    cells = names or tokens[0].cells
    shown = ", ".join(f"{place}: {cell[:24]!r}" for place, cell in enumerate(cells[:12]))
    return (
        f"{path}: it has a word a line, but it is not clear in which column the words and the tags are; its columns "
        f"are {shown}. {columns_hint(*likely_places(tokens))}"
    )


def likely_places(tokens: list[Token]) -> tuple[int, int]:
    """The columns that look most like words and tags."""
    columns = list(zip(*(token.cells for token in tokens)))
    spans = [place for place, column in enumerate(columns) if all(map(OF_SPAN.fullmatch, column))]
    numbers = [
        place for place, column in enumerate(columns) if all(map(PLAIN_ID.fullmatch, column))
    ]
    words = [place for place in range(len(columns)) if place not in spans + numbers] or [0]
    others = [place for place in range(len(columns)) if place not in (words[0], *numbers)]
    by_kinds = sorted(others, key=lambda place: len(set(columns[place])))
    return words[0], [*spans, *by_kinds, len(columns) - 1][0]


def columns_hint(word: int, tag: int) -> str:
    return f'Say so by place from 0: --config.data.columns="words={word} tags={tag}" (in evaluate: --columns)'


def refuse_words(path: str, examples: list[dict], lines: list[int]) -> None:
    """Raises DataError where every row of a table has one word and one tag: sentences that fell apart."""
    if len(examples) < 2:
        return
    for example in examples:
        if (
            len(str(example.get("words", "")).split()) != 1
            or len(str(example.get("tags", "")).split()) != 1
        ):
            return
    raise DataError(
        f"{path}:{lines[0]}: each of its {len(examples):,} rows is one word, and no blank line ends a sentence: put a "
        f"blank line after each sentence, {WHOLE_SENTENCES}"
    )


def words_of(
    path: str, text: str, suffix: str, given: dict[str, str], tags: tuple[str, ...]
) -> list[list[str]]:
    """The words of the sentences of a text that is to be tagged, with a word a line; [] where it has other lines.

    tags: those of the model. A text may have tags already, if they are among these.
    """
    blocks = blocks_of(lines_of(text))
    if len(blocks) > 1 and all(len(line.split()) == 1 for block in blocks for _, line in block):
        return [[line.strip() for _, line in block] for block in blocks]
    try:
        sentences = read(path, text, suffix, given, bad := [])
    except DataError:
        return []
    if (
        bad
        or sentences is None
        or any(not set(example["tags"]) <= set(tags) for example in sentences.examples)
    ):
        return []
    return [example["words"] for example in sentences.examples]
