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
from jaxlm.data.files.word_columns import (
    PLAIN_ID,
    TAG_NAMES,
    WORD_NAMES,
    Token,
    cells_at,
    column_called,
    column_name,
    find_columns,
    folded,
    is_header,
    sentence_column,
)
from jaxlm.errors import DataError

SUFFIXES = ".conll .conllu .conllx .conllup .conll03 .bio .iob .iob2 .bioes .bilou".split()
DOCUMENT = "-DOCSTART-"
UNIVERSAL = "id form lemma upos xpos feats head deprel deps misc".split()  # the columns of CoNLL-U
# 3-4: words written together; 3.1: one that is not in the text
ANY_ID = re.compile(r"[0-9]+([-.][0-9]+)?")
SPACES = re.compile(r"[ \t]+")
# Lines with spaces in a cell after the word: fewer are odd words, more are sentences.
SEVERAL_SHARE = 0.1
MANY_RECORDS = 20  # of one word each: more are sentences that fell apart
WHOLE_SENTENCES = (
    "or write a sentence a line: its words joined by spaces, a tab, its tags joined by spaces"
)

NUMBERED = "name the columns sentence, word and tag: then the words of a sentence are put together"


class Line(NamedTuple):
    """A line of a file, and its number from 1."""

    number: int
    text: str


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
    if number is not None:
        note_empty_cells(path, flat(sentences), [word, tag], names, bad)
    return make_sentences(sentences, word, tag, names)


def read_rows(path: str, rows: list[Token], columns: list[str], bad: list[str]) -> Sentences | None:
    """The sentences of rows whose cells are those of `row_columns`; None where they don't hold a word each.

    Adds rows without a word or without a tag to `bad`.
    """
    if count_several(rows) > SEVERAL_SHARE * len(rows):
        return None
    note_empty_cells(path, rows, [1, 2], columns, bad)
    return make_sentences(by_sentence_number(rows, 0), 1, 2, columns)


def note_empty_cells(
    path: str, tokens: list[Token], places: list[int], names: list[str], bad: list[str]
) -> None:
    """Adds tokens whose cells at these places are empty to `bad`."""
    for token in tokens:
        for place in places:
            if not token.cells[place].strip():
                bad.append(f"{path}:{token.line}: no {column_name(place, names)}")


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


# ---------------------------------------------------------------- what is no file of words


def refuse_words(path: str, examples: list[dict], line: int, in_text: bool) -> None:
    """Raises DataError where every row of a table has one word and one tag: sentences that fell apart.

    in_text: whether the table is a text, which may have blank lines. A few records may well be of one word.
    """
    fewest = 2 if in_text else MANY_RECORDS
    if len(examples) < fewest or not all(map(is_one_word, examples)):
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
        return [words_alone(block) for block in blocks]
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


def words_alone(block: list[Line]) -> list[str]:
    """The words of a sentence with a word a line, and nothing else."""
    return [line.text.strip() for line in block]
