"""Which column of a file of examples is which of the task's: by data.columns, by the header, by names alike, by place.

Where that is not clear it is refused, with the data.columns to type.
"""

import difflib
import re
from itertools import chain
from typing import NamedTuple

from jaxlm.cli import did_you_mean
from jaxlm.config.tasks import GROUP, TASKS
from jaxlm.data.files import delimited, dialogues, word_columns
from jaxlm.errors import DataError

ENOUGH = 5  # lines, to see that the first one is unlike the others
MOST_WORDS = 3  # in the name of a column
SHOWN_COLUMNS = 12
SHOWN_CHARS = 80  # of a first line
USUAL_NAMES = {  # of columns, by other people; only to suggest
    "words": tuple(chain.from_iterable(word_columns.WORD_NAMES)),
    "tags": tuple(chain.from_iterable(word_columns.TAG_NAMES)),
    "text": ("sentence", "review", "body", "content", "comment", "message", "tweet"),
    "label": ("class", "category", "sentiment", "target", "kind", "rating", "score"),
}
ROW_NUMBERS = ("", "id", "idx", "index", "unnamed: 0")
MANY_LABELS = 10  # of a column that is believed to hold labels
NUMBERS_SEEN = 100  # cells, to believe that a column holds numbers


class Chosen(NamedTuple):
    """Which columns of a file are which."""

    columns: dict  # of the task, or of the form -> a name, or an index into a record
    form: dialogues.Form | None = None
    start: int = 0  # number of the first record that is an example


def columns_given(columns: str, task: str) -> dict[str, str]:
    """config.data.columns as {column of the task: name or number}. Raises DataError where the task has no such."""
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


def by_folded_name(names: list[str]) -> dict[str, str]:
    """{name in lower case: name}; of several alike, the first."""
    return {name.casefold(): name for name in reversed(names)}


def stripped(cells: list[str]) -> list[str]:
    return list(map(str.strip, cells))


# ---------------------------------------------------------------- named columns


def choose_named(path: str, names: list[str], task: str, given: dict[str, str]) -> Chosen:
    """Which columns of these names are which. Raises DataError where that is not clear."""
    folded = by_folded_name(names)
    if TASKS[task].answer == "span" and "answer_start" in folded:  # SQuAD's name for it
        folded.setdefault("start", folded["answer_start"])
    form = form_of(names, task, given)
    if form:
        return Chosen(pick(folded, (*form.needed, *form.optional)), form)
    needed = needed_of(task)
    chosen = pick(folded, needed if given else roles_of(task))
    for role, name in given.items():
        chosen[role] = column_called(name, names)
    if chosen and GROUP in folded:
        chosen = {GROUP: folded[GROUP]} | chosen
    missing = []
    for role in dict.fromkeys([*needed, *given]):
        if chosen.get(role) not in names:
            missing.append(chosen.get(role, role))
    half = "messages" in roles_of(task) and not given and is_half(chosen, names)
    if missing or not chosen or half:
        raise DataError(unclear(path, names, task, list(dict.fromkeys(missing))))
    return Chosen(chosen)


def form_of(names: list[str], task: str, given: dict[str, str]) -> dialogues.Form | None:
    """The way in which others write such examples, where the columns are not the task's own."""
    if given or not TASKS[task].is_chat or dialogues.is_native(names, task):
        return None
    return dialogues.form_of(names, task)


def pick(folded: dict[str, str], roles) -> dict[str, str]:
    """{role: its column}, of the roles that are there."""
    return {role: folded[role] for role in roles if role in folded}


def column_called(name: str, names: list[str]) -> str:
    """The column that was typed as this name, or as its place; the name itself where there is none."""
    if name in names:
        return name
    for column in names:
        if as_typed(column) == name:
            return column
    if name.isdecimal() and int(name) < len(names):
        return names[int(name)]
    return name


def as_typed(name: str) -> str:
    """How the name of a column is typed in data.columns, whose items end at spaces and commas."""
    return re.sub(r"[\s,]+", "_", name.strip())


def is_half(chosen: dict[str, str], names: list[str]) -> bool:
    """Whether of a dialogue only the prompt was found, or only the response, beside columns that may be the prompt."""
    if "messages" in chosen or {"prompt", "response"} <= set(chosen):
        return False
    return "response" not in chosen or len(names) > 1


# ---------------------------------------------------------------- tables: is the first line a header?


def is_header(cells: list[str], task: str, given: dict[str, str]) -> bool:
    """Whether these first cells of a table are names of columns."""
    known = word_columns.folded(cells)
    named = word_columns.names_in(given)
    if named:
        return named <= {*known, *map(as_typed, known)}
    if len(set(known)) != len(known):
        return False
    wanted = set(needed_of(task) or roles_of(task)[-1:])
    if wanted <= set(known) or ("messages" in known and "messages" in roles_of(task)):
        return True
    return not given and dialogues.form_of(known, task) is not None


def choose_cells(
    path: str,
    records: list[list[str]],
    style: delimited.Style | None,
    task: str,
    given: dict[str, str],
) -> tuple[Chosen, list[str]]:
    """(which columns of a table are which, what is to be said of it).

    Raises DataError where that is not clear.
    """
    notes = []
    cells = stripped(records[0])
    header = bool(word_columns.names_in(given)) or is_header(cells, task, given)
    names = cells
    if not header:
        names = list(map(str, range(len(cells))))
    if not header and not given:
        refuse_likely_header(path, records, task, style)
        given = in_order(path, cells, task, style)
        if style is not None and looks_like_names(records):
            notes.append(
                f"{path}: its first line, {' | '.join(cells)[:SHOWN_CHARS]}, is taken as an example; if it has the "
                f'names of the columns, say --config.data.columns="{suggestion(cells, task)}" (in evaluate: --columns)'
            )
    chosen = choose_named(path, names, task, given)
    places = {role: names.index(name) for role, name in chosen.columns.items()}
    return Chosen(places, chosen.form, int(header)), notes


def in_order(
    path: str, cells: list[str], task: str, style: delimited.Style | None
) -> dict[str, str]:
    """The columns of a table without a header, by place. Raises DataError where there are more or fewer."""
    roles = roles_of(task)
    fits = len(cells) == max(len(needed_of(task)), 1)
    if "messages" in roles_of(task):
        roles = {1: ["messages"], 2: ["prompt", "response"]}.get(len(cells), [])
        fits = bool(roles)
    if not fits:
        raise DataError(unclear(path, cells, task, header=False) + other_delimiter(cells, style))
    return {role: str(place) for place, role in enumerate(roles[: len(cells)])}


def other_delimiter(cells: list[str], style: delimited.Style | None) -> str:
    """What may stand between the columns of a table that seems to have but one."""
    if len(cells) > 1 or style is None:
        return ""
    for mark, name in delimited.DELIMITERS.items():
        if mark in cells[0]:
            return (
                f"; with {style.name} between columns there is one. If {name} is meant, put the names of the columns "
                "in the first line"
            )
    return ""


def refuse_likely_header(
    path: str, records: list[list[str]], task: str, style: delimited.Style | None
) -> None:
    """Raises DataError where the first line would be learned as an example although it looks like a header."""
    cells = stripped(records[0])
    if len(cells) < len(needed_of(task)):
        return
    quoted_names = style is not None and style.quotes and all(map(str.isidentifier, cells))
    if quoted_names or (TASKS[task].labels_examples and has_unlike_label(records, task)):
        raise DataError(
            f"{path}: its first line, {' | '.join(cells)[:SHOWN_CHARS]}, looks like a header: say which column is "
            f'which with --config.data.columns="{suggestion(cells, task)}"; or, if it is an example, '
            f'"{by_place(len(cells), task)}" (in evaluate: --columns)'
        )


def has_unlike_label(records: list[list[str]], task: str) -> bool:
    """Whether the label of the first row is of another kind than those of all others."""
    if len(records[0]) < 2:
        return False
    first = records[0][1].strip()
    others = [record[1].strip() for record in records[1:] if len(record) > 1]
    if TASKS[task].answer == "number":
        of_numbers = bool(others) and all(map(delimited.is_number, others[:NUMBERS_SEEN]))
        return of_numbers and not delimited.is_number(first)
    few_kinds = len(others) >= MANY_LABELS and len(set(others)) <= len(others) / 2
    return few_kinds and first not in others


def looks_like_names(records: list[list[str]]) -> bool:
    """Whether the first line has names alone, and none of the next ones."""
    if len(records) <= ENOUGH or not all(map(is_name, records[0])):
        return False
    return not any(all(map(is_name, record)) for record in records[1 : ENOUGH + 1])


def is_name(cell: str) -> bool:
    """Whether this may be the name of a column: a few words of letters."""
    return as_typed(cell).isidentifier() and len(cell.split()) <= MOST_WORDS


# ---------------------------------------------------------------- what to type


def unclear(
    path: str, names: list[str], task: str, missing: list[str] = (), header: bool = True
) -> str:
    """Why it is not clear which column is which, and what to type. header: whether these are names, not a first row."""
    needed = needed_of(task)
    if not missing and len(names) < len(needed):
        return f"{path}: its first line has {len(names)} of the {len(needed)} columns {', '.join(needed)}"
    what = "it is not clear which column is which"
    if missing:
        what = f"no column {' and no column '.join(missing)}{did_you_mean(missing[0], names)}"
    shown = ", ".join(map(shortened_name, names[:SHOWN_COLUMNS]))
    roles = likely_roles(len(names), task)
    alike = named_alike(names, roles)
    # Of dpo any guess would prefer the wrong side.
    is_guess = TASKS[task].is_preference and not {"chosen", "rejected"} & set(alike)
    if is_guess or (missing and len(names) < len(needed)):
        return f"{path}: {what}; it has {shown}, and needed are {', '.join(needed)}"
    if header or len(alike) == len(roles):
        columns = suggestion(names, task)
    else:
        columns = by_place(len(names), task)
    return (
        f"{path}: {what}; it has {shown}. Say so, by name or by place from 0: "
        f'--config.data.columns="{columns}" (in evaluate: --columns)'
    )


def shortened_name(name: str) -> str:
    if len(name) <= 24:
        return repr(name)
    return repr(name[:24] + "...")


def likely_roles(num_columns: int, task: str) -> list[str]:
    """The columns of a task that a table with so many has."""
    if "messages" not in roles_of(task):
        return needed_of(task)[:num_columns]
    if num_columns > 1:
        return ["prompt", "response"]
    return ["messages"]


def by_place(num_columns: int, task: str) -> str:
    """data.columns for a table whose columns are in the task's order."""
    return " ".join(f"{role}={place}" for place, role in enumerate(likely_roles(num_columns, task)))


def suggestion(names: list[str], task: str) -> str:
    """data.columns for these columns, as likely as their names allow."""
    roles = likely_roles(len(names), task)
    taken = named_alike(names, roles)
    for role in roles:
        left = without(names, taken)
        if role not in taken and left:
            taken[role] = min(left, key=numbers_rows)
    by_name = []
    places = []
    for role in roles:
        if role in taken:
            by_name.append(f"{role}={as_typed(taken[role])}")
            places.append(f"{role}={names.index(taken[role])}")
    if all(map(str.isidentifier, map(as_typed, taken.values()))):
        return " ".join(by_name)
    return " ".join(places)


def numbers_rows(name: str) -> bool:
    """Whether a column is likely to say which row this is, and nothing else."""
    name = name.strip().casefold()
    return name in ROW_NUMBERS or name.endswith(("_id", " id"))


def named_alike(names: list[str], roles: list[str]) -> dict[str, str]:
    """The columns whose names are those of a task, or like them."""
    folded = by_folded_name(names)
    taken = pick(folded, roles)
    for role, name in dialogues.likely_columns(names, roles).items():
        taken.setdefault(role, name)
    for role, others in USUAL_NAMES.items():
        known = list(pick(folded, others).values())
        if role in roles and known:
            taken.setdefault(role, known[0])
    for role in roles:
        left = by_folded_name(without(names, taken))
        near = difflib.get_close_matches(role, left, n=1)
        if role not in taken and near:
            taken[role] = left[near[0]]
    return taken


def without(names: list[str], taken: dict[str, str]) -> list[str]:
    """The columns that are not taken yet."""
    return [name for name in names if name not in taken.values()]
