"""Tables in text: .csv and .tsv, and what stands between their columns, by the header or by the lines themselves.

A .tsv has no quotes: a tab always ends a column, a line the example. Elsewhere quotes are those of the csv module.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from jaxlm.data.files.example_files import lines_of

OWN = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".txt": "\t"}  # what is expected by name
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
LOOKED_AT = 50  # records
LONGEST_LOOK = 1 << 20  # characters
ENOUGH = 5  # records that have to agree where there is no header
EXCEL_LINE = re.compile(r'\A"?sep=(.)"?\r?\n', re.IGNORECASE)  # by which Excel tells its delimiter


class Style(NamedTuple):
    """How a table is written."""

    delimiter: str
    quotes: bool
    start: int = 0  # characters before the table

    @property
    def name(self) -> str:
        return DELIMITERS.get(self.delimiter, repr(self.delimiter))


def style_of(text: str, suffix: str, is_header: Callable[[list[str]], bool]) -> Style | None:
    """How the table in a text is written; None where neither name nor header tells. is_header: of the first cells."""
    told = EXCEL_LINE.match(text)
    if told:
        return Style(told[1], True, told.end())
    own = OWN.get(suffix)
    first = text.partition("\n")[0]
    if own is None:
        own = "\t" if "\t" in first else ""
    plain = own == "\t" and suffix != ".csv"
    samples = {own: sample(text, Style(own, not plain))} if own else {}
    for delimiter in DELIMITERS:
        if delimiter not in samples and delimiter in text:
            samples[delimiter] = sample(text, Style(delimiter, True))
    for delimiter, records in samples.items():
        if records and len(records[0]) > 1 and is_header(records[0]):
            return Style(delimiter, delimiter != own or not plain)
    if not own:
        return None
    if not agree(samples[own]):
        others = [other for other, records in samples.items() if other != own and agree(records)]
        if len(others) == 1 and len(samples[others[0]]) >= ENOUGH:
            return Style(others[0], True)
    return Style(own, not plain)


def sample(text: str, style: Style) -> list[list[str]]:
    """The first records of a text in a style, as far as they can be read."""
    if len(text) > LONGEST_LOOK:
        text = text[:LONGEST_LOOK].rpartition("\n")[0]
    if not style.quotes:
        lines = []
        for line in islice(io.StringIO(text, newline="\n"), 4 * LOOKED_AT):
            if line.strip():
                lines.append(line)
        return [line.rstrip("\r\n").split(style.delimiter) for line in lines[:LOOKED_AT]]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=style.delimiter)
    records = []
    try:
        for record in islice(reader, LOOKED_AT):
            if record:
                records.append(record)
    except csv.Error:
        return records
    return records


def agree(records: list[list[str]]) -> bool:
    """Whether all have as many columns, and more than one."""
    widths = {len(record) for record in records}
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
    csv.field_size_limit(1 << 30)
    before = line
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=style.delimiter, strict=True)
    try:
        for record in reader:
            if record:
                yield record, line
            line = reader.line_num + before
    except csv.Error as error:
        bad.append(f"{path}:{line}: {error}; a quote inside of a quoted text is written twice")


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
