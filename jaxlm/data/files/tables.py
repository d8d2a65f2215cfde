"""Files of examples to a list of dicts of a task's columns: .tsv .csv .jsonl .parquet .conll, or text in parallel.

A file is what its content says; its name decides only where that says nothing. The first line of a table is a header
where it has the names of the task's columns, or those of data.columns.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from jaxlm.config.tasks import TASKS, TEXT_COLUMNS
from jaxlm.data.files import conll, delimited, dialogues, example_files, json_records, parquet
from jaxlm.data.files.columns import (
    Chosen,
    choose_cells,
    choose_named,
    columns_given,
    is_header,
    needed_of,
)
from jaxlm.data.files.paths import parts_of, paths_of
from jaxlm.data.files.repeats import shortened
from jaxlm.data.files.word_columns import Token, row_columns
from jaxlm.errors import DataError

LOGGER = logging.getLogger("jaxlm")


@dataclass
class Found:
    """What was read so far: the examples, where each is from, what is wrong, and what a person should know."""

    task: str
    given: dict[str, str]  # data.columns
    examples: list[dict] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, example: dict, place: str) -> None:
        self.examples.append(example)
        self.places.append(place)


def read_examples(spec: str, task: str, columns: str) -> tuple[list[dict], list[str]]:
    """(the examples, each a dict of the task's columns; where each is from, "PATH:LINE").

    Warns, in one line each, of what a file was taken for where its name does not say so. Raises DataError of all that
    is wrong with the files.
    """
    found = Found(task, columns_given(columns, task))
    for path in paths_of(spec):
        num_examples = len(found.examples)
        num_bad = len(found.bad)
        try:
            read_file(path, found)
        except DataError as error:
            found.bad.append(str(error))
        if len(found.examples) == num_examples and len(found.bad) == num_bad:
            found.bad.append(f"{path}: there are no examples in this file")
    refuse(found.bad)
    for line in shortened(found.notes):
        LOGGER.warning(line)
    return found.examples, found.places


def refuse(bad: list[str]) -> None:
    """Raises DataError where there are problems, each "PLACE: WHAT"; what is the same in many places is said once."""
    if bad:
        count = "1 problem" if len(bad) == 1 else f"{len(bad):,} problems"
        raise DataError(f"{count} in the examples:\n  " + "\n  ".join(shortened(bad)))


# ---------------------------------------------------------------- a file


def read_file(path: str, found: Found) -> None:
    """Adds what a file holds. Raises DataError where it can't be read."""
    parts = parts_of(path)
    if len(parts) > 1:
        records = example_files.parallel(path, parts)
        add_cells(path, records, range(1, len(records) + 1), None, found)
        return
    file = example_files.opened(path)
    if file.is_parquet:
        add_parquet(file, found)
        return
    text = example_files.read_text(file)
    if json_records.is_json(text, file.suffix):
        add_json(file, text, found)
    elif TASKS[found.task].answer != "tags" or not add_words(file, text, found):
        add_table(file, text, found)


def add_parquet(file: example_files.Opened, found: Found) -> None:
    table = parquet.open_parquet(file)
    names = table.schema_arrow.names
    columns = word_columns(names, found)
    if columns:
        records = parquet_rows(file.path, table, columns)
        if add_word_rows(file.path, records, range(1, len(records) + 1), columns, found):
            return
    chosen = choose_named(file.path, names, found.task, found.given)
    names = list(dict.fromkeys(chosen.columns.values()))
    records = parquet_rows(file.path, table, names)
    add_records(file.path, records, range(1, len(records) + 1), chosen, found)


def parquet_rows(path: str, table, names: list[str]) -> list[dict]:
    values = parquet.read_columns(path, table, names)
    return [dict(zip(names, row)) for row in zip(*values.values())]


def add_json(file: example_files.Opened, text: str, found: Found) -> None:
    records = []
    lines = []
    for record, line in json_records.read(file.path, text, found.bad):
        records.append(record)
        lines.append(line)
    if not records:
        return
    if file.suffix not in json_records.NAMES:
        found.notes.append(f"{file.path}: read as JSON, by its content")
    names = list(dict.fromkeys(chain.from_iterable(records)))
    columns = word_columns(names, found)
    if columns and add_word_rows(file.path, records, lines, columns, found):
        return
    try:
        chosen = choose_named(file.path, names, found.task, found.given)
    except DataError as error:
        hint = nested_hint(file.path, records, found)
        raise DataError(f"{file.path}: {hint}" if hint else str(error)) from None
    add_records(file.path, records, lines, chosen, found)


def nested_hint(path: str, records: list[dict], found: Found) -> str:
    """What to type where the columns lie deeper in the objects; "" where they don't."""
    hint = ""
    if len(records) == 1:
        hint = json_records.within(path, records[0])
    if not hint and not found.given:
        hint = json_records.inside(path, records[0], max(2, len(needed_of(found.task))))
    return hint


def add_words(file: example_files.Opened, text: str, found: Found) -> bool:
    """Adds the sentences of a text with a word a line; False where it has other lines."""
    sentences = conll.read(file.path, text, file.suffix, found.given, found.bad)
    return add_sentences(file.path, sentences, found)


def word_columns(names: list[str], found: Found) -> list[str]:
    """See row_columns; [] for other tasks."""
    if TASKS[found.task].answer == "tags":
        return row_columns(names, found.given)
    return []


def add_word_rows(
    path: str, records: list[dict], lines: Sequence[int], columns: list[str], found: Found
) -> bool:
    """Adds the sentences of records with a word each and the number of its sentence; False where they are others."""
    rows = []
    for record, line in zip(records, lines):
        rows.append(Token([as_cell(record.get(name)) for name in columns], line))
    return add_sentences(path, conll.read_rows(path, rows, columns, found.bad), found)


def add_sentences(path: str, sentences: conll.Sentences | None, found: Found) -> bool:
    if sentences is None:
        return False
    for example, line in zip(sentences.examples, sentences.lines):
        found.add(example, f"{path}:{line}")
    found.notes.append(f"{path}: {sentences.summary()}")
    return True


def add_table(file: example_files.Opened, text: str, found: Found) -> None:
    style = delimited.style_of(
        text, file.suffix, lambda cells: is_header(cells, found.task, found.given)
    )
    if style is None:
        raise DataError(f"{file.path}: not a file of examples; they are {example_files.KINDS}")
    records = []
    lines = []
    for cells, line in delimited.read(file.path, text, style, found.bad):
        records.append(cells)
        lines.append(line)
    if not records:
        return
    if delimited.OWN.get(file.suffix) != style.delimiter:
        found.notes.append(f"{file.path}: read with {style.name} between its columns")
    add_cells(file.path, records, lines, style, found)


def add_cells(
    path: str,
    records: list[list[str]],
    lines: Sequence[int],
    style: delimited.Style | None,
    found: Found,
) -> None:
    """Adds the rows of a table."""
    if not records:
        return
    chosen, notes = choose_cells(path, records, style, found.task, found.given)
    found.notes += notes
    width = len(records[0])
    whole = []
    places = []
    for record, line in zip(records[chosen.start :], lines[chosen.start :]):
        if len(record) == width:
            whole.append(record)
            places.append(line)
        else:
            hint = width_hint(len(record) - width, style)
            found.bad.append(
                f"{path}:{line}: {len(record)} columns, the first line has {width}{hint}"
            )
    add_records(path, whole, places, chosen, found)


def width_hint(surplus: int, style: delimited.Style | None) -> str:
    """What may be wrong with a row that has `surplus` columns too many, or (below 0) too few."""
    if style is None:
        return ""
    if surplus < 0:
        return " (a column left out, or a new line within a text?)"
    quotes = " that has no quotes" if style.quotes else ""
    return f" ({style.name} within a text{quotes}?)"


# ---------------------------------------------------------------- records


def add_records(path: str, records: list, lines: Sequence[int], chosen: Chosen, found: Found):
    """Adds the examples of records, dicts or lists of cells, by the columns that were chosen."""
    form = chosen.form
    convert = converter(form, found.task)
    required = form.needed if form else TASKS[found.task].required_columns
    needed = [role for role in chosen.columns if role in required]
    before = len(found.examples)
    for record, line in zip(records, lines):
        place = f"{path}:{line}"
        example = take_columns(record, chosen.columns, needed)
        absent = [str(chosen.columns[role]) for role in needed if role not in example]
        if absent:
            found.bad.append(f"{place}: no {' and no '.join(absent)}")
            continue
        try:
            example = convert(example)
        except ValueError as error:
            found.bad.append(f"{place}: {error}")
            continue
        note_numbers(example, place, found)
        found.add(example, place)
    if form:
        found.notes.append(f"{path}: taken for {form.name}")
    if TASKS[found.task].answer == "tags" and records:
        in_text = isinstance(records[0], list)
        conll.refuse_words(path, found.examples[before:], lines[0], in_text)


def converter(form: dialogues.Form | None, task: str) -> Callable[[dict], dict]:
    """What makes the task's columns of those of a file; it raises ValueError of what is no such example."""
    if form:
        return form.example
    if TASKS[task].is_chat:
        return lambda example: dialogues.own_columns(example, task)
    return lambda example: example


def take_columns(record: dict | list, columns: dict, needed: list[str]) -> dict:
    """{role: value} of a record, without what is missing, and without empty text that isn't needed."""
    get = record.get if isinstance(record, dict) else record.__getitem__
    example = {}
    for role, key in columns.items():
        value = get(key)
        if not is_missing(value) and (value != "" or role in needed):
            example[role] = value
    return example


def note_numbers(example: dict, place: str, found: Found) -> None:
    for role in TEXT_COLUMNS:
        if isinstance(example.get(role), (bool, int, float)):
            found.notes.append(f"{place}: its {role} is a number, which is taken as text")


def is_missing(value) -> bool:
    """Whether a value is None or not a number."""
    return value is None or (isinstance(value, float) and value != value)


def as_cell(value) -> str:
    """The value as a table in text has it."""
    if is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
