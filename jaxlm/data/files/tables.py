"""Files of examples to a list of dicts of a task's columns: .tsv .csv .jsonl .parquet .conll, or text in parallel.

A file is what its content says; its name decides only where that says nothing. The first line of a table is a header
where it has the names of the task's columns, or those of data.columns.
"""

import difflib
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxlm.cli import did_you_mean
from jaxlm.config.tasks import GROUP, TASKS, TEXT_COLUMNS
from jaxlm.data.files import conll, delimited, dialogues, example_files, json_records, parquet
from jaxlm.data.files.paths import parts_of, paths_of
from jaxlm.errors import DataError

LOGGER = logging.getLogger("jaxlm")
SHOWN = 10  # problems
ENOUGH = 20  # lines, to tell that the first one is unlike the others
MOST_WORDS = 3  # in the name of a column
USUAL_NAMES = {  # of columns, by other people; only to suggest
    "words": conll.WORD_NAMES,
    "tags": conll.TAG_NAMES,
    "text": ("sentence", "review", "body", "content", "comment", "message", "tweet"),
    "label": ("class", "category", "sentiment", "target", "kind", "rating", "score"),
}
ROW_NUMBERS = ("", "id", "idx", "index", "unnamed: 0")


class Chosen(NamedTuple):
    """Which columns of a file are which."""

    columns: dict  # of the task, or of the form -> a name, or an index into a record
    form: dialogues.Form | None = None
    start: int = 0  # number of the first record that is an example


@dataclass
class Found:
    """What was read so far: the examples, where each is from, what is wrong, and what is to be told."""

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
    """(the examples, each a dict of the task's columns; where each is from). Raises DataError of all that is wrong.

    Warns, in one line each, of what a file was taken for where its name does not say so.
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


def shortened(said: list[str]) -> list[str]:
    """The lines, each "PLACE: WHAT", those of the same WHAT once, and SHOWN at most."""
    first = {}
    repeats = Counter()
    for line in said:
        what = line.partition(": ")[2] or line
        first.setdefault(what, line)
        repeats[what] += 1
    lines = []
    for what, line in first.items():
        again = repeats[what] - 1
        lines.append(f"{line} (and so in {again:,} more)" if again else line)
    if len(lines) > SHOWN:
        return [*lines[:SHOWN], f"and {len(lines) - SHOWN:,} more"]
    return lines


# ---------------------------------------------------------------- a file


def read_file(path: str, found: Found) -> None:
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
    elif TASKS[found.task].answer != "tags" or not add_sentences(file, text, found):
        add_table(file, text, found)


def add_parquet(file: example_files.Opened, found: Found) -> None:
    table = parquet.open_parquet(file)
    chosen = choose_named(file.path, table.schema_arrow.names, found.task, found.given)
    names = list(dict.fromkeys(chosen.columns.values()))
    values = parquet.read_columns(file.path, table, names)
    records = [dict(zip(names, row)) for row in zip(*values.values())]
    add_records(file.path, records, range(1, len(records) + 1), chosen, found)


def add_json(file: example_files.Opened, text: str, found: Found) -> None:
    pairs = list(json_records.read(file.path, text, found.bad))
    if not pairs:
        return
    if file.suffix not in json_records.NAMES:
        found.notes.append(f"{file.path}: read as JSON, by its content")
    names = list(dict.fromkeys(name for record, _ in pairs for name in record))
    try:
        chosen = choose_named(file.path, names, found.task, found.given)
    except DataError as error:
        record, _ = pairs[0]
        if len(pairs) == 1:
            hint = json_records.within(file.path, record)
        else:
            hint = ""
        if not hint and not found.given:
            hint = json_records.inside(file.path, record, max(2, len(needed_of(found.task))))
        raise DataError(f"{file.path}: {hint}" if hint else str(error)) from None
    add_records(
        file.path, [record for record, _ in pairs], [line for _, line in pairs], chosen, found
    )


def add_sentences(file: example_files.Opened, text: str, found: Found) -> bool:
    """Adds the sentences of a file with a word a line; False where it is another."""
    sentences = conll.read(file.path, text, file.suffix, found.given, found.bad)
    if sentences is None:
        return False
    for example, line in zip(sentences.examples, sentences.lines):
        found.add(example, f"{file.path}:{line}")
    found.notes.append(f"{file.path}: {sentences.told()}")
    return True


def add_table(file: example_files.Opened, text: str, found: Found) -> None:
    style = delimited.style_of(
        text, file.suffix, lambda cells: is_header(cells, found.task, found.given)
    )
    if style is None:
        raise DataError(f"{file.path}: not a file of examples; they are {example_files.KINDS}")
    pairs = list(delimited.read(file.path, text, style, found.bad))
    if not pairs:
        return
    if delimited.OWN.get(file.suffix) != style.delimiter:
        found.notes.append(f"{file.path}: read with {style.name} between its columns")
    add_cells(file.path, [cells for cells, _ in pairs], [line for _, line in pairs], style, found)


def add_cells(
    path: str, records: list[list[str]], lines, style: delimited.Style | None, found: Found
) -> None:
    """Adds the rows of a table."""
    if not records:
        return
    chosen = choose_cells(path, records, style, found)
    width = len(records[0])
    quotes = " that has no quotes" if style and style.quotes else ""
    more = f" ({style.name} within a text{quotes}?)" if style else ""
    if style:
        fewer = " (a column left out, or a new line within a text?)"
    else:
        fewer = ""
    whole = []
    places = []
    for record, line in zip(records[chosen.start :], lines[chosen.start :]):
        if len(record) == width:
            whole.append(record)
            places.append(line)
        else:
            hint = more if len(record) > width else fewer
            found.bad.append(
                f"{path}:{line}: {len(record)} columns, the first line has {width}{hint}"
            )
    before = len(found.examples)
    add_records(path, whole, places, chosen, found)
    if TASKS[found.task].answer == "tags":
        conll.refuse_words(path, found.examples[before:], places)


def add_records(path: str, records: list, lines, chosen: Chosen, found: Found) -> None:
    """Adds the examples of records, dicts or lists of cells, by the columns that were chosen."""
    columns = chosen.columns
    form = chosen.form
    needed = [role for role in columns if role in (form.needed if form else needed_of(found.task))]
    for record, line in zip(records, lines):
        place = f"{path}:{line}"
        if isinstance(record, dict):
            get = record.get
        else:
            get = record.__getitem__
        example = {}
        for role, key in columns.items():
            value = get(key)
            if not is_missing(value) and (value != "" or role in needed):
                example[role] = value
        absent = [str(columns[role]) for role in needed if role not in example]
        if absent:
            found.bad.append(f"{place}: no {' and no '.join(absent)}")
            continue
        if form or TASKS[found.task].is_chat:
            try:
                if form:
                    example = form.example(example)
                else:
                    example = dialogues.own_columns(example, found.task)
            except ValueError as error:
                found.bad.append(f"{place}: {error}")
                continue
        note_numbers(example, place, found)
        found.add(example, place)
    if form:
        found.notes.append(f"{path}: taken for {form.name}")


def note_numbers(example: dict, place: str, found: Found) -> None:
    for role in TEXT_COLUMNS:
        if isinstance(example.get(role), (bool, int, float)):
            found.notes.append(f"{place}: its {role} is a number, which is taken as text")


def is_missing(value) -> bool:
    return value is None or (isinstance(value, float) and value != value)


# ---------------------------------------------------------------- which column is which


def columns_given(columns: str, task: str) -> dict[str, str]:
    """config.data.columns as {column of the task: name or number}. Raises DataError."""
    roles = roles_of(task)
    given = {}
    for item in columns.replace(",", " ").split():
        role, _, name = item.partition("=")
        if role not in roles:
            hint = did_you_mean(role, roles)
            raise DataError(
                f"config.data.columns={columns}: task {task} has no column {role!r}{hint} (it has: {' '.join(roles)})"
            )
        given[role] = name or role
    return given


def roles_of(task: str) -> list[str]:
    """The columns of a task, also those that may be missing."""
    return list(TASKS[task].column_names)


def needed_of(task: str) -> list[str]:
    return list(TASKS[task].required_columns)


def is_header(cells: list[str], task: str, given: dict[str, str]) -> bool:
    """Whether these first cells of a table are names of columns."""
    known = [cell.strip().casefold() for cell in cells]
    named = [name.casefold() for name in given.values() if not name.isdecimal()]
    if named:
        return set(named) <= {*known, *map(typed, known)}
    if len(set(known)) != len(known):
        return False
    wanted = set(needed_of(task) or roles_of(task)[-1:])
    form = not given and dialogues.form_of(known, task) is not None
    messages = "messages" in known and "messages" in roles_of(task)
    return wanted <= set(known) or form or messages


def choose_cells(
    path: str, records: list[list[str]], style: delimited.Style | None, found: Found
) -> Chosen:
    """Which columns of a table are which. Raises DataError."""
    task = found.task
    given = found.given
    cells = [cell.strip() for cell in records[0]]
    named = any(not name.isdecimal() for name in given.values())
    header = named or is_header(cells, task, given)
    if header:
        names = cells
    else:
        names = [str(place) for place in range(len(cells))]
    if not header and not given:
        suspect_header(path, records, task, style)
        given = in_order(path, cells, task, style)
        if style is not None and looks_like_names(records):
            found.notes.append(
                f"{path}: its first line, {' | '.join(cells)[:80]}, is taken as an example; if it has the names of the "
                f'columns, say --config.data.columns="{suggestion(cells, task)}" (in evaluate: --columns)'
            )
    chosen = choose_named(path, names, task, given)
    places = {role: names.index(name) for role, name in chosen.columns.items()}
    return Chosen(places, chosen.form, int(header))


def in_order(
    path: str, cells: list[str], task: str, style: delimited.Style | None
) -> dict[str, str]:
    """The columns of a table without a header, by place. Raises DataError where there are more or fewer."""
    needed = needed_of(task)
    if "messages" in roles_of(task):
        roles = {1: ["messages"], 2: ["prompt", "response"]}.get(len(cells), [])
        fits = 0 < len(cells) <= len(roles)
    else:
        roles = roles_of(task)
        fits = len(cells) == max(len(needed), 1)
    if not fits:
        raise DataError(unclear(path, cells, task, header=False) + other_delimiter(cells, style))
    return {role: str(place) for place, role in enumerate(roles[: len(cells)])}


def other_delimiter(cells: list[str], style: delimited.Style | None) -> str:
    """What may stand between the columns of a table that seems to have but one."""
    others = [mark for mark in delimited.DELIMITERS if mark in cells[0]]
    if len(cells) > 1 or style is None or not others:
        return ""
    return (
        f"; with {style.name} between columns there is one. If {delimited.DELIMITERS[others[0]]} is meant, put the "
        "names of the columns in the first line"
    )


def choose_named(path: str, names: list[str], task: str, given: dict[str, str]) -> Chosen:
    """Which columns of these names are which. Raises DataError."""
    folded = {name.casefold(): name for name in reversed(names)}
    if TASKS[task].answer == "span" and "answer_start" in folded:  # SQuAD's name for it
        folded.setdefault("start", folded["answer_start"])
    if not given and TASKS[task].is_chat and not dialogues.is_native(names, task):
        form = dialogues.form_of(names, task)
        if form:
            roles = [role for role in (*form.needed, *form.optional) if role in folded]
            return Chosen({role: folded[role] for role in roles}, form)
    given = {role: column_called(name, names) for role, name in given.items()}
    needed = needed_of(task)
    wanted = dict.fromkeys(needed if given else roles_of(task))
    chosen = {role: folded[role] for role in wanted if role in folded} | given
    if chosen and GROUP in folded:
        chosen = {GROUP: folded[GROUP]} | chosen
    for role, name in given.items():  # by place, although there are names
        if name not in names and name.isdecimal() and int(name) < len(names):
            chosen[role] = names[int(name)]
    missing = [
        chosen.get(role, role) for role in [*needed, *given] if chosen.get(role) not in names
    ]
    half = "messages" in roles_of(task) and not given and is_half(chosen, names)
    if missing or not chosen or half:
        raise DataError(unclear(path, names, task, list(dict.fromkeys(missing))))
    return Chosen(chosen)


def typed(name: str) -> str:
    """How the name of a column is typed in data.columns, whose items end at spaces and commas."""
    return re.sub(r"[\s,]+", "_", name.strip())


def column_called(name: str, names: list[str]) -> str:
    """The column that was typed as this name; the name itself where there is none."""
    if name in names:
        return name
    return next((column for column in names if typed(column) == name), name)


def is_half(chosen: dict[str, str], names: list[str]) -> bool:
    """Whether of a dialogue only the prompt was found, or only the response, beside columns that may be the prompt."""
    if "messages" in chosen or {"prompt", "response"} <= set(chosen):
        return False
    return "response" not in chosen or len(names) > 1


def unclear(
    path: str, names: list[str], task: str, missing: list[str] = (), header: bool = True
) -> str:
    """Why it is not clear which column is which, and what to type. header: whether these are names, not a first row."""
    needed = needed_of(task)
    shown = ", ".join(repr(name if len(name) <= 24 else name[:24] + "...") for name in names[:12])
    if not missing and len(names) < len(needed):
        return f"{path}: its first line has {len(names)} of the {len(needed)} columns {', '.join(needed)}"
    if missing:
        what = f"no column {' and no column '.join(missing)}"
    else:
        what = "it is not clear which column is which"
    hint = did_you_mean(missing[0], names) if missing else ""
    if missing and len(names) < len(needed):
        return f"{path}: {what}{hint}; it has {shown}, and needed are {', '.join(needed)}"
    roles = likely_roles(len(names), task)
    alike = named_alike(names, roles)
    if TASKS[task].is_preference and not {"chosen", "rejected"} & set(
        alike
    ):  # any guess would prefer the wrong side
        return f"{path}: {what}{hint}; it has {shown}, and needed are {', '.join(needed)}"
    named = header or len(alike) == len(roles)
    if named:
        columns = suggestion(names, task)
    else:
        columns = by_place(len(names), task)
    return (
        f"{path}: {what}{hint}; it has {shown}. Say so, by name or by place from 0: "
        f'--config.data.columns="{columns}" (in evaluate: --columns)'
    )


def likely_roles(num_columns: int, task: str) -> list[str]:
    """The columns of a task that a table with so many has."""
    if "messages" in roles_of(task):
        if num_columns > 1:
            return ["prompt", "response"]
        return ["messages"]
    return needed_of(task)[:num_columns]


def by_place(num_columns: int, task: str) -> str:
    """data.columns for a table whose columns are in the task's order."""
    return " ".join(f"{role}={place}" for place, role in enumerate(likely_roles(num_columns, task)))


def suggestion(names: list[str], task: str) -> str:
    """data.columns for these columns, as likely as their names allow."""
    roles = likely_roles(len(names), task)
    taken = named_alike(names, roles)
    for role in roles:
        left = [name for name in names if name not in taken.values()]
        if role not in taken and left:
            taken[role] = min(left, key=numbers_rows)
    order = [role for role in roles if role in taken]
    if all(typed(taken[role]).isidentifier() for role in order):
        return " ".join(f"{role}={typed(taken[role])}" for role in order)
    return " ".join(f"{role}={names.index(taken[role])}" for role in order)


def numbers_rows(name: str) -> bool:
    """Whether a column is likely to say which row this is, and nothing else."""
    name = name.strip().casefold()
    return name in ROW_NUMBERS or name.endswith(("_id", " id"))


def named_alike(names: list[str], roles: list[str]) -> dict[str, str]:
    """The columns whose names are those of a task, or like them."""
    folded = {name.casefold(): name for name in reversed(names)}
    taken = {role: folded[role] for role in roles if role in folded}
    for role, name in dialogues.likely_columns(names, roles).items():
        taken.setdefault(role, name)
    for role, others in USUAL_NAMES.items():
        known = [folded[name] for name in others if name in folded]
        if role in roles and known:
            taken.setdefault(role, known[0])
    for role in roles:
        left = [name for name in folded if folded[name] not in taken.values()]
        near = difflib.get_close_matches(role, left, n=1)
        if role not in taken and near:
            taken[role] = folded[near[0]]
    return taken


def suspect_header(
    path: str, records: list[list[str]], task: str, style: delimited.Style | None
) -> None:
    """Refuses a first line that would be learned as an example although it looks like a header of other names."""
    cells = [cell.strip() for cell in records[0]]
    doubtful = style is not None and style.quotes and all(cell.isidentifier() for cell in cells)
    if TASKS[task].labels_examples and len(cells) > 1:
        others = [record[1].strip() for record in records[1:] if len(record) > 1]
        if TASKS[task].answer == "number":
            of_numbers = len(others) > 0 and all(map(delimited.is_number, others[:100]))
            doubtful |= of_numbers and not delimited.is_number(cells[1])
        else:
            doubtful |= (
                len(others) >= 10 and cells[1] not in others and len(set(others)) <= len(others) / 2
            )
    if doubtful and len(cells) >= len(needed_of(task)):
        places = by_place(len(cells), task)
        raise DataError(
            f"{path}: its first line, {' | '.join(cells)[:80]}, looks like a header: say which column is which with "
            f'--config.data.columns="{suggestion(cells, task)}"; or, if it is an example, "{places}" '
            "(in evaluate: --columns)"
        )


def looks_like_names(records: list[list[str]]) -> bool:
    """Whether the first line has names alone, and none of the next ones."""
    names = [all(map(is_name, record)) for record in records[: ENOUGH + 1]]
    return len(names) > ENOUGH and names[0] and not any(names[1:])


def is_name(cell: str) -> bool:
    """Whether this may be the name of a column: a few words of letters."""
    return typed(cell).isidentifier() and len(cell.split()) <= MOST_WORDS
