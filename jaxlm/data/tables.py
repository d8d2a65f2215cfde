"""Files of examples to a list of dicts: .tsv .csv .jsonl .json .parquet, each also .gz, or text files in parallel.

The first line of a .tsv or .csv is a header where it has the names of the task's columns, or those of data.columns.
A .tsv has no quotes: a tab always ends a column, a line the example.
"""

import csv
import glob
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jaxlm.cli import did_you_mean, near_path
from jaxlm.errors import DataError
from jaxlm.keys import GROUP, LABELLED, ROLES

SHOWN = 10  # problems
KINDS = ".tsv, .csv, .jsonl or .parquet, each also .gz, or a.de+b.en"


def read_examples(spec: str, task: str, columns: str) -> tuple[list[dict], list[str]]:
    """(the examples, each a dict of the task's columns; where each is from). Raises DataError of all that is wrong."""
    given, examples, places, bad = columns_given(columns, task), [], [], []
    for path in paths_of(spec):
        records, lines = read_records(path, bad)
        if not records:
            if not any(problem.startswith(path) for problem in bad):
                bad.append(f"{path}: there are no examples in this file")
            continue
        try:
            chosen, start = choose(path, records, task, given)
        except DataError as error:
            bad.append(str(error))
            continue
        needed = [role for role in chosen if role in ROLES[task]]  # the others have a mark
        width, kind = len(records[0]), Path(path.removesuffix(".gz")).suffix
        hint = {".tsv": "a tab within a text", ".csv": "a comma within a text that has no quotes"}.get(kind)
        for record, line in zip(records[start:], lines[start:]):
            place = f"{path}:{line}"
            if isinstance(record, list) and len(record) != width:
                bad.append(f"{place}: {len(record)} columns, the first line has {width}{f' ({hint}?)' if hint else ''}")
                continue
            get = record.get if isinstance(record, dict) else record.__getitem__
            example = {role: get(key) for role, key in chosen.items()}
            example = {k: v for k, v in example.items() if not is_missing(v) and (v != "" or k in needed)}
            if absent := [role for role in needed if role not in example]:
                bad.append(f"{place}: no {' and no '.join(str(chosen[role]) for role in absent)}")
            examples.append(example)
            places.append(place)
    refuse(bad)
    return examples, places


def is_missing(value) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def refuse(bad: list[str]) -> None:
    """Raises DataError where there are problems, each "PLACE: WHAT"; what is the same in many places is said once."""
    if bad:
        what_of = lambda problem: problem.partition(": ")[2] or problem
        first, repeats = {}, Counter(map(what_of, bad))
        for problem in bad:
            first.setdefault(what_of(problem), problem)
        again = lambda what: f" (and so in {repeats[what] - 1:,} more)" if repeats[what] > 1 else ""
        lines = [problem + again(what) for what, problem in first.items()]
        more = [f"and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
        count = "1 problem" if len(bad) == 1 else f"{len(bad):,} problems"
        raise DataError(f"{count} in the examples:\n  " + "\n  ".join(lines[:SHOWN] + more))


# ---------------------------------------------------------------- which column is which


def columns_given(columns: str, task: str) -> dict[str, str]:
    """config.data.columns as {column of the task: name or number}. Raises DataError."""
    roles, given = [role.rstrip("?") for role in ROLES[task]], {}
    for item in columns.replace(",", " ").split():
        role, _, name = item.partition("=")
        if role not in roles:
            hint = did_you_mean(role, roles)
            raise DataError(
                f"config.data.columns={columns}: task {task} has no column {role!r}{hint} (it has: {' '.join(roles)})"
            )
        given[role] = name or role
    return given


def choose(path: str, records: list, task: str, given: dict[str, str]) -> tuple[dict, int]:
    """({column of the task: key or index into a record}, number of the first example). Raises DataError."""
    roles = [role.rstrip("?") for role in ROLES[task]]
    needed = [role for role in ROLES[task] if role in roles]
    cells = None
    if isinstance(records[0], list):
        cells = [cell.strip() for cell in records[0]]
        known = [cell.casefold() for cell in cells]
        named = [name for name in given.values() if not name.isdecimal()]
        header = bool(named) or (set(needed or roles[-1:]) <= set(known) and len(set(known)) == len(known))
        names = cells if header else [str(i) for i in range(len(cells))]
        if not header and not given:
            suspect_header(path, records, task)
            inorder = {1: ["messages"], 2: ["prompt", "response"]}.get(len(cells), []) if task == "sft" else roles
            if not max(len(needed), 1) <= len(cells) <= (len(inorder) if task == "sft" else len(needed)):
                raise DataError(unclear(path, cells, roles, needed))
            given = dict(zip(inorder, names))
    else:
        header, names = False, list(dict.fromkeys(name for record in records for name in record))
    folded = {name.casefold(): name for name in reversed(names)}
    wanted = dict.fromkeys(needed if given else roles)
    chosen = {role: folded[role] for role in wanted if role in folded} | given
    if chosen and GROUP in folded:
        chosen = {GROUP: folded[GROUP]} | chosen
    for role, name in given.items():  # by place, although there are names
        if name not in names and name.isdecimal() and int(name) < len(names):
            chosen[role] = names[int(name)]
    missing = [chosen.get(role, role) for role in [*needed, *given] if chosen.get(role) not in names]
    if missing or not chosen:
        raise DataError(unclear(path, cells if header else names, roles, needed, list(dict.fromkeys(missing))))
    return {role: names.index(name) if cells else name for role, name in chosen.items()}, int(header)


def unclear(path: str, cells: list[str], roles: list[str], needed: list[str], missing: list[str] = ()) -> str:
    shown = ", ".join(repr(cell if len(cell) <= 24 else cell[:24] + "...") for cell in cells[:12])
    if not missing and len(cells) < len(needed):
        return f"{path}: its first line has {len(cells)} of the {len(needed)} columns {', '.join(needed)}"
    what = f"no column {' and no column '.join(missing)}" if missing else "it is not clear which column is which"
    hint = did_you_mean(missing[0], cells) if missing else ""
    if missing and len(cells) < len(needed):
        return f"{path}: {what}{hint}; it has {shown}, and needed are {', '.join(needed)}"
    named = missing and len(cells) >= len(needed or roles) and not any(" " in cell for cell in cells)
    example = " ".join(f"{role}={cells[i] if named else i}" for i, role in enumerate(needed or roles))
    return (
        f"{path}: {what}{hint}; it has {shown}. Say so, by name or by place from 0: "
        f'--config.data.columns="{example}" (in evaluate: --columns)'
    )


def suspect_header(path: str, records: list[list[str]], task: str) -> None:
    """Refuses a first line that would be learned as an example although it looks like a header of other names."""
    cells = [cell.strip() for cell in records[0]]
    doubtful = path.removesuffix(".gz").endswith(".csv") and all(cell.isidentifier() for cell in cells)
    if task in LABELLED and len(cells) > 1:
        others = [record[1].strip() for record in records[1:] if len(record) > 1]
        if task == "regress":
            doubtful |= not is_number(cells[1]) and len(others) > 0 and all(map(is_number, others[:100]))
        else:
            doubtful |= len(others) >= 10 and cells[1] not in others and len(set(others)) <= len(others) / 2
    if doubtful:
        roles = [role.rstrip("?") for role in ROLES[task]]
        by_name = " ".join(f"{role}={cell.replace(' ', '_')}" for role, cell in zip(roles, cells))
        by_place = " ".join(f"{role}={i}" for i, role in enumerate(roles[: len(cells)]))
        raise DataError(
            f"{path}: its first line, {' | '.join(cells)[:80]}, looks like a header: say which column is which with "
            f'--config.data.columns="{by_name}"; or, if it is an example, "{by_place}"'
        )


def is_number(text: str) -> bool:
    try:
        float(text)
        return True
    except ValueError:
        return False


# ---------------------------------------------------------------- files


def paths_of(spec: str) -> list[str]:
    """The files of "a.tsv,b*.tsv" or "*.de+*.en". Raises DataError that names what is not there."""
    paths, missing = [], []
    items = [spec] if os.path.exists(spec) else filter(None, map(str.strip, spec.split(",")))
    for item in items:
        parts = parts_of(item)
        found = [[part] if os.path.exists(part) else sorted(glob.glob(part, recursive=True)) for part in parts]
        missing += [part for part, files in zip(parts, found) if not files]
        if len({len(files) for files in found}) > 1 and all(found):
            counts = ", ".join(f"{part}: {len(files)}" for part, files in zip(parts, found))
            raise DataError(f"{item}: as many files on each side are needed ({counts})")
        paths += ["+".join(files) for files in zip(*found)]
    if missing or not paths:
        folder = Path(missing[0]).parent if missing else Path()
        where = "" if folder.is_dir() else f"; there is no directory {folder}"
        near = near_path(missing[0]) if missing else ""
        raise DataError(f"there is no file {', '.join(missing) or repr(spec)}{where}{near}")
    return paths


def absolute(spec: str) -> str:
    """The same files, whatever the working directory is."""
    items = [spec] if os.path.exists(spec) else filter(None, map(str.strip, spec.split(",")))
    return ",".join("+".join(os.path.abspath(part) for part in parts_of(item)) for item in items)


def parts_of(item: str) -> list[str]:
    """The files of "a.de+b.en", in parallel. A path that exists is one file, and b.en may lie beside a.de."""
    if "+" not in item or os.path.exists(item):
        return [item]
    first, *others = item.split("+")
    parts = [first]
    for other in others:
        beside = os.path.join(os.path.dirname(first), other)
        here = os.path.exists(other) or glob.glob(other, recursive=True)
        there = os.path.exists(beside) or glob.glob(beside, recursive=True)
        parts.append(beside if there and not here else other)
    return parts


def read_records(path: str, bad: list[str]) -> tuple[list, list[int]]:
    """(records, line of each) of a file: lists of cells, or dicts. Adds to `bad` what is wrong with it."""
    kind = Path(path.removesuffix(".gz")).suffix
    try:
        if "+" in path and not os.path.exists(path):
            records = parallel(path)
            return records, list(range(1, len(records) + 1))
        if kind not in READERS:
            what = "a directory, " if os.path.isdir(path) else ""
            raise DataError(f"{path}: {what}not a file of examples; they are {KINDS}")
        pairs = list(READERS[kind](path, bad))
    except DataError as error:
        bad.append(str(error))
        pairs = []
    return [record for record, _ in pairs], [line for _, line in pairs]


def parallel(path: str) -> list[list[str]]:
    parts = path.split("+")
    columns = [lines_of(read_text(part)) for part in parts]
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(f"{part} has {len(column):,}" for part, column in zip(parts, columns))
        raise DataError(f"{path}: files in parallel must have as many lines each: {counts}")
    return [list(cells) for cells in zip(*columns)]


def lines_of(text: str) -> list[str]:
    """Its lines: only a line feed ends one, with or without a carriage return."""
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_bytes(path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
        return gzip.decompress(data) if path.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None


def read_text(path: str) -> str:
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 text ({error.reason}); convert it: "
            f"iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 {path} > NEW, if that is what it is"
        ) from None


def read_parquet(path: str, bad: list[str]) -> Iterator[tuple[dict, int]]:
    import pyarrow.parquet  # late: its threads make an arena of malloc's, see jaxlm/process.py

    try:
        records = pyarrow.parquet.read_table(pyarrow.BufferReader(read_bytes(path))).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}") from None
    yield from zip(records, range(1, len(records) + 1))


def read_json(path: str, bad: list[str]) -> Iterator[tuple[dict, int]]:
    """An object on each line, or one list of objects."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        pairs = ((record, i) for i, record in enumerate(parse(path, text, bad) or [], 1))
    else:
        lines = enumerate(lines_of(text), 1)
        pairs = ((parse(f"{path}:{i}", line, bad), i) for i, line in lines if line.strip())
    for record, i in pairs:
        if isinstance(record, dict):
            yield record, i
        elif record is not None:
            bad.append(f'{path}:{i}: not a JSON object, such as {{"text": ..., "label": ...}}')


def parse(place: str, text: str, bad: list[str]):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        bad.append(f"{place}: not JSON: {error}")
        return None


def read_csv(path: str, bad: list[str]) -> Iterator[tuple[list[str], int]]:
    csv.field_size_limit(1 << 30)
    reader, line = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), 1
    try:
        for record in reader:
            if record:
                yield record, line
            line = reader.line_num + 1
    except csv.Error as error:
        bad.append(f"{path}:{line}: {error}; a quote inside of a quoted text is written twice")


def read_tsv(path: str, bad: list[str]) -> Iterator[tuple[list[str], int]]:
    for i, line in enumerate(lines_of(read_text(path)), 1):
        if line.strip(" "):
            yield line.split("\t"), i


READERS = {".parquet": read_parquet, ".jsonl": read_json, ".json": read_json, ".csv": read_csv}
READERS |= {".tsv": read_tsv, ".txt": read_tsv}
