"""Files of tagged words as CoNLL has them: a word a line, with its columns, and a blank line between sentences.

Read are a word and a tag; the columns of CoNLL-2003 (word first, tag last); CoNLL-U (Nivre et al. 2020), its FORM and
UPOS; and tables with a word a row whose sentences are numbered in a column, as Kaggle's NER corpus has them. Lines that
begin with -DOCSTART-, and comments (#) before a sentence, are left out.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain, pairwise
from typing import NamedTuple

from jaxlm.data.files.example_files import lines_of
from jaxlm.errors import DataError

SUFFIXES = ".conll .conllu .conllx .conllup .conll03 .bio .iob .iob2 .bioes .bilou".split()
DOCUMENT = "-DOCSTART-"
UNIVERSAL = "id form lemma upos xpos feats head deprel deps misc".split()  # the columns of CoNLL-U
PLAIN_ID = re.compile(r"[0-9]+")
# 3-4: words written together; 3.1: one that is not in the text
ANY_ID = re.compile(r"[0-9]+([-.][0-9]+)?")
SPACES = re.compile(r"[ \t]+")
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
# Lines with spaces in a cell after the word: fewer are odd words, more are sentences.
SEVERAL_SHARE = 0.1
ENOUGH = 20  # words, before their number of kinds says anything
WHOLE_SENTENCES = (
    "or write a sentence a line: its words joined by spaces, a tab, its tags joined by spaces"
)

NUMBERED = "name the columns sentence, word and tag: then the words of a sentence are put together"


class Line(NamedTuple):
    """A line of a file, and its number from 1."""

    number: int
    text: str


class Token(NamedTuple):
    """A line of a word."""

    cells: list[str]
    line: int


Sentence = list[Token]


class Sentences(NamedTuple):
    """What a file holds: examples, the line at which each begins, and in which columns its words and tags were."""

    examples: list[dict]
    lines: list[int]
    columns: str

    def summary(self) -> str:
        words = sum(len(example["words"]) for example in self.examples)
        return f"{len(self.examples):,} sentences, {words:,} words, read as a word a line ({self.columns})"


def read(
    path: str, text: str, suffix: str, given: dict[str, str], bad: list[str]
) -> Sentences | None:
    """The sentences of a text with a word a line, or None where it has a sentence a line.

    given: columns by name or place. Adds lines of too many or too few columns to `bad`. Raises DataError where it is
    not clear in which columns the words and the tags are.
    """
    blocks = drop_comments(blocks_of(lines_of(text)))
    if not blocks:
        return None
    sentences = split_cells(blocks, suffix)
    names = global_columns(text)
    if is_header(sentences[0][0].cells, given):
        names = folded(sentences[0].pop(0).cells)
        sentences = list(filter(None, sentences))
    tokens = flat(sentences)
    if not tokens:
        return None
    number = sentence_column(names, tokens)
    if number is not None and is_word_a_row(tokens, names, given):
        sentences = by_sentence_number(tokens, number)
    elif not is_tokens(tokens, text, suffix):
        return None
    width = Counter(len(token.cells) for token in tokens).most_common(1)[0][0]
    if not names and width == len(UNIVERSAL) and is_universal(tokens):
        names = UNIVERSAL
    if names[:1] == ["id"]:
        sentences = [list(filter(is_word, sentence)) for sentence in sentences]
    sentences = whole_sentences(path, sentences, width, bad)
    if not sentences:
        return Sentences([], [], "each has a line with other columns")
    word, tag = find_columns(path, flat(sentences), width, names, given, number)
    return make_sentences(sentences, word, tag, names)


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


def read_rows(rows: list[Token], columns: list[str]) -> Sentences | None:
    """The sentences of rows whose cells are those of `row_columns`; None where they don't hold a word each."""
    if sum(any(map(has_several, row.cells[1:])) for row in rows) > SEVERAL_SHARE * len(rows):
        return None
    return make_sentences(by_sentence_number(rows, 0), 1, 2, columns)


def make_sentences(sentences: list[Sentence], word: int, tag: int, names: list[str]) -> Sentences:
    examples = []
    lines = []
    for sentence in sentences:
        examples.append({"words": cells_at(word, sentence), "tags": cells_at(tag, sentence)})
        lines.append(sentence[0].line)
    columns = f"words={column_name(word, names)} tags={column_name(tag, names)}"
    return Sentences(examples, lines, columns)


def flat(sentences: Iterable[Sentence]) -> list[Token]:
    return list(chain.from_iterable(sentences))


def folded(names: list[str]) -> list[str]:
    return [name.strip().casefold() for name in names]


def cells_at(place: int, tokens: list[Token]) -> list[str]:
    """One column of these tokens."""
    return [token.cells[place] for token in tokens]


def column_name(place: int, names: list[str]) -> str:
    if place < len(names):
        return names[place]
    return str(place)


# ---------------------------------------------------------------- lines


def blocks_of(lines: list[str]) -> list[list[Line]]:
    """The lines between blank ones, and between documents."""
    blocks = [[]]
    for number, text in enumerate(lines, 1):
        if text.strip() and not text.startswith(DOCUMENT):
            blocks[-1].append(Line(number, text))
        elif blocks[-1]:
            blocks.append([])
    return list(filter(None, blocks))


def drop_comments(blocks: list[list[Line]]) -> list[list[Line]]:
    """The blocks without the comments that they begin with, and without those that are comments alone."""
    # A sentence may begin with the word #, but not most of them.
    comments = sum(block[0].text.startswith("# ") for block in blocks)
    most = 2 * comments > len(blocks)
    kept = []
    for block in blocks:
        rest = without_comments(block, most)
        if rest:
            kept.append(rest)
    return kept


def without_comments(block: list[Line], most: bool) -> list[Line]:
    """A block without the comments that it begins with. most: most blocks do."""
    texts = [line.text for line in block] + [""]
    start = 0
    for text, after in pairwise(texts):
        comment = most and text.startswith("# ") and "\t" not in after
        if not text.startswith("#") or not (comment or has_other_columns(text, after)):
            break
        start += 1
    return block[start:]


def has_other_columns(text: str, after: str) -> bool:
    """Whether a line that begins with # is no word: it has other columns than the line after it."""
    if "\t" in after or not after:
        return text.count("\t") != after.count("\t")
    if after.startswith("#"):
        return True
    return len(SPACES.split(text)) != len(SPACES.split(after))


def global_columns(text: str) -> list[str]:
    """The columns that CoNLL-U Plus names in its first line."""
    first = text.partition("\n")[0]
    _, found, names = first.partition("global.columns =")
    if found:
        return names.casefold().split()
    return []


def split_cells(blocks: list[list[Line]], suffix: str) -> list[Sentence]:
    split = splitter(list(chain.from_iterable(blocks)), suffix)
    sentences = []
    for block in blocks:
        sentences.append([Token(split(line.text), line.number) for line in block])
    return sentences


def splitter(lines: list[Line], suffix: str) -> Callable[[str], list[str]]:
    """What divides a line into columns: tabs, else commas in a .csv, else spaces."""
    if in_most_lines("\t", lines):
        return lambda text: text.split("\t")
    for mark in (",", ";"):
        if suffix == ".csv" and in_most_lines(mark, lines):
            return lambda text: next(csv.reader([text], delimiter=mark))
    return lambda text: SPACES.split(text.strip(" \t"))


def in_most_lines(mark: str, lines: list[Line]) -> bool:
    return 2 * sum(mark in line.text for line in lines) > len(lines)


# ---------------------------------------------------------------- what the file is


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


def is_tokens(tokens: list[Token], text: str, suffix: str) -> bool:
    """Whether each line is one word. Not so where a cell has the tags of several, with spaces between."""
    if suffix in SUFFIXES:
        return True
    width = len(tokens[0].cells)
    if width < 2 or (width <= 3 and count_several(tokens) > SEVERAL_SHARE * len(tokens)):
        return False
    blank = re.search(r"\S[^\n]*\n\s*\n", text) is not None
    return blank or DOCUMENT in text or is_universal(tokens)


def count_several(tokens: list[Token]) -> int:
    """How many lines have several words in a cell after the first."""
    return sum(any(map(has_several, token.cells[1:])) for token in tokens)


def has_several(cell: str) -> bool:
    return len(cell.split()) > 1


def is_universal(tokens: list[Token]) -> bool:
    """Whether these are lines of CoNLL-U, but for a few that are broken."""
    like = 0
    for token in tokens:
        like += len(token.cells) == len(UNIVERSAL) and bool(ANY_ID.fullmatch(token.cells[0]))
    return like > 0.9 * len(tokens)


def is_word(token: Token) -> bool:
    """Whether a line of CoNLL-U is a word by itself, not several written together, nor one that is left out."""
    return bool(PLAIN_ID.fullmatch(token.cells[0])) or not ANY_ID.fullmatch(token.cells[0])


def whole_sentences(
    path: str, sentences: list[Sentence], width: int, bad: list[str]
) -> list[Sentence]:
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


# ---------------------------------------------------------------- sentences that are numbered in a column


def sentence_column(names: list[str], tokens: list[Token]) -> int | None:
    """The column that says of which sentence a word is, by its name, or by "Sentence: 1" where there are no names."""
    for place, name in enumerate(names):
        if re.sub("[^a-z]", "", name) in SENTENCE_NAMES:
            return place
    if names:
        return None
    filled = set(filter(None, (token.cells[0].strip() for token in tokens)))
    if filled and all(map(SENTENCE_NUMBER.fullmatch, filled)):
        return 0
    return None


def is_word_a_row(tokens: list[Token], names: list[str], given: dict[str, str]) -> bool:
    """Whether the cells of words and of tags hold one each, but for a few."""
    places = []
    for role, groups in (("words", WORD_NAMES), ("tags", TAG_NAMES)):
        places.append(column_called(given.get(role, ""), names, groups))
    several = 0
    for token in tokens:
        cells = [token.cells[i] for i in places if i is not None and i < len(token.cells)]
        several += any(map(has_several, cells))
    return several <= SEVERAL_SHARE * len(tokens)


def column_called(name: str, names: list[str], groups: tuple) -> int | None:
    """The column of this name or place; without a name, the one that has a usual name."""
    if name.casefold() in names:
        return names.index(name.casefold())
    if name.isdecimal():
        return int(name)
    return column_among(names, groups)


def by_sentence_number(tokens: list[Token], column: int) -> list[Sentence]:
    """The tokens in sentences: another number begins one, an empty cell goes on with the one before."""
    sentences = []
    current = None
    for token in tokens:
        number = token.cells[column].strip() if column < len(token.cells) else ""
        if not sentences or (number and number != current):
            sentences.append([])
            current = number
        sentences[-1].append(token)
    return sentences


# ---------------------------------------------------------------- which column is which


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


# ---------------------------------------------------------------- what is no file of words


def refuse_words(path: str, examples: list[dict], line: int, in_text: bool) -> None:
    """Raises DataError where every row of a table has one word and one tag: sentences that fell apart.

    in_text: whether the table is a text, which may have blank lines.
    """
    if len(examples) < 2 or not all(map(is_one_word, examples)):
        return
    what = f"{path}:{line}: each of its {len(examples):,} rows is one word"
    if in_text:
        raise DataError(
            f"{what}, and no blank line ends a sentence: put a blank line after each sentence, {WHOLE_SENTENCES}. "
            f"Where a column has the number of the sentence, {NUMBERED}"
        )
    raise DataError(
        f"{what}: give each sentence one row, with lists of its words and tags; or, where a column has the number of "
        f"the sentence, {NUMBERED}"
    )


def is_one_word(example: dict) -> bool:
    """Whether an example has one word and one tag."""
    for role in ("words", "tags"):
        value = example.get(role, "")
        if isinstance(value, (list, tuple)) or len(str(value).split()) != 1:
            return False
    return True


def words_of(
    path: str, text: str, suffix: str, given: dict[str, str], tags: tuple[str, ...]
) -> list[list[str]]:
    """The words of the sentences of a text that is to be tagged, with a word a line; [] where it has other lines.

    tags: those of the model. A text may have tags already, if they are among these.
    """
    blocks = blocks_of(lines_of(text))
    if len(blocks) > 1 and not any(has_several(line.text) for line in chain.from_iterable(blocks)):
        return [[line.text.strip() for line in block] for block in blocks]
    bad = []
    try:
        sentences = read(path, text, suffix, given, bad)
    except DataError:
        return []
    if bad or sentences is None:
        return []
    for example in sentences.examples:
        if not set(example["tags"]) <= set(tags):
            return []
    return [example["words"] for example in sentences.examples]
