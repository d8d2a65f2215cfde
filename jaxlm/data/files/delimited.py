"""Tables in text: .csv and .tsv, their rows, and what stands between their columns, by the header or by the lines.

A .tsv of examples has no quotes: a tab always ends a column, a line the example. Elsewhere quotes are those of
Python's csv module.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from jaxlm.data.files.example_files import lines_of

OWN = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}  # what is expected by name
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
LOOKED_AT = 50  # records
LONGEST_LOOK = 1 << 20  # characters
ENOUGH = 5  # records that have to agree where there is no header
EXCEL_LINE = re.compile(r'\A"?sep=(.)"?\r?\n', re.IGNORECASE)  # in which Excel names its delimiter
MOST_OF_CELL = 32 << 20  # characters; beyond, a quote is not closed
TWICE = "a quote inside of a quoted text is written twice"


class Style(NamedTuple):
    """How a table is written."""

    delimiter: str
    quotes: bool
    start: int = 0  # characters before the table

    @property
    def name(self) -> str:
        return DELIMITERS.get(self.delimiter, repr(self.delimiter))


def likely_delimiters(suffix: str) -> list[str]:
    """All delimiters, the one that is expected by name first."""
    own = OWN.get(suffix, "")
    return list(filter(None, dict.fromkeys([own, *DELIMITERS])))


def excel_delimiter(text: str) -> tuple[str, int]:
    """(the delimiter that a first line names for Excel or "", how many characters that line has)."""
    found = EXCEL_LINE.match(text)
    if found:
        return found[1], found.end()
    return "", 0


def is_excel_line(row: list[str]) -> bool:
    """Whether this row is the line in which Excel names its delimiter, and no header."""
    if len(row) == 2:
        return row[0].lower() == "sep=" and not row[1]
    return len(row) == 1 and EXCEL_LINE.match(row[0] + "\n") is not None


def reader(lines: Iterable[str], delimiter: str, quoted: bool = True, strict: bool = True):
    """The rows of a table, as csv.reader has them.

    Raises csv.Error at a row that breaks the rules of quotes (`strict`); the next row goes on.
    """
    csv.field_size_limit(MOST_OF_CELL)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=strict)


def style_of(text: str, suffix: str, is_header: Callable[[list[str]], bool]) -> Style | None:
    """How the table in a text is written; None where neither name nor header says so. is_header: of the first cells."""
    named, start = excel_delimiter(text)
    if named:
        return Style(named, True, start)
    own = OWN.get(suffix, "")
    if suffix not in OWN and "\t" in text.partition("\n")[0]:
        own = "\t"
    plain = own == "\t" and suffix != ".csv"
    samples = {}
    for delimiter in filter(None, dict.fromkeys([own, *DELIMITERS])):
        quotes = delimiter != own or not plain
        if delimiter == own or delimiter in text:
            records = sample(text, Style(delimiter, quotes))
            samples[delimiter] = records
            if records and len(records[0]) > 1 and is_header(records[0]):
                return Style(delimiter, quotes)
    if not own:
        return None
    if not agree(samples.pop(own)):
        others = [other for other, records in samples.items() if agree(records)]
        if len(others) == 1 and len(samples[others[0]]) >= ENOUGH:
            return Style(others[0], True)
    return Style(own, not plain)


def sample(text: str, style: Style) -> list[list[str]]:
    """The first records of a text in a style, as far as they can be read."""
    if len(text) > LONGEST_LOOK:
        text = text[:LONGEST_LOOK].rpartition("\n")[0]
    records = []
    if not style.quotes:
        for line in islice(io.StringIO(text, newline="\n"), 4 * LOOKED_AT):
            if line.strip():
                records.append(line.rstrip("\r\n").split(style.delimiter))
        return records[:LOOKED_AT]
    rows = reader(io.StringIO(text, newline=""), style.delimiter, strict=False)
    try:
        for row in islice(rows, LOOKED_AT):
            if row:
                records.append(row)
    except csv.Error:
        pass  # what was read until then is enough
    return records


def agree(records: list[list[str]]) -> bool:
    """Whether all have as many columns, and more than one."""
    widths = set(map(len, records))
    return len(widths) == 1 and widths.pop() > 1


def read(path: str, text: str, style: Style, bad: list[str]) -> Iterator[tuple[list[str], int]]:
    """The records, each with its line. Adds to `bad` what is wrong with the file."""
    before = text[: style.start].count("\n")
    if style.quotes:
        yield from read_quoted(path, text[style.start :], style, before + 1, bad)
        return
    for number, line in enumerate(lines_of(text[style.start :]), before + 1):
        if line.strip(" "):
            yield line.split(style.delimiter), number


def read_quoted(
    path: str, text: str, style: Style, line: int, bad: list[str]
) -> Iterator[tuple[list[str], int]]:
    """`read` where quotes hold cells together. line: that of the beginning of the text."""
    before = line
    rows = reader(io.StringIO(text, newline=""), style.delimiter)
    try:
        for record in rows:
            if record:
                yield record, line
            line = rows.line_num + before
    except csv.Error as error:
        bad.append(f"{path}:{line}: {error}; {TWICE}")


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
