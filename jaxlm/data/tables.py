"""Files of examples to a list of dicts: .tsv .csv .jsonl .parquet, each also .gz, or text files in parallel."""

import csv
import glob
import gzip
import io
import json
from pathlib import Path

import pyarrow.parquet

from jaxlm.cli import did_you_mean
from jaxlm.errors import DataError
from jaxlm.keys import ROLES

SHOWN = 10  # problems


def read_table(spec: str) -> tuple[list[str] | None, list[list | dict]]:
    """(header, records) of files: lists of cells, or dicts of .jsonl and .parquet. A .tsv's first line is a record."""
    header, records = None, []
    for path in paths_of(spec):
        if "+" in path and not Path(path).exists():
            columns = [read_text(part).splitlines() for part in path.split("+")]
            if len({len(column) for column in columns}) > 1:
                counts = ", ".join(f"{part} {len(column):,}" for part, column in zip(path.split("+"), columns))
                raise DataError(f"{path}: files in parallel must have as many lines each ({counts})")
            records += [list(cells) for cells in zip(*columns)]
            continue
        kind = Path(path.removesuffix(".gz")).suffix
        if kind == ".parquet":
            records += pyarrow.parquet.read_table(path).to_pylist()
        elif kind in (".jsonl", ".json"):
            records += [
                parse_line(path, i, line) for i, line in enumerate(read_text(path).splitlines(), 1) if line.strip()
            ]
        elif kind == ".csv":
            records += list(csv.reader(io.StringIO(read_text(path))))
        elif kind in (".tsv", ".txt"):
            records += [line.split("\t") for line in read_text(path).split("\n") if line.strip()]
        else:
            raise DataError(
                f"{path}: not a file of examples; they are .tsv, .csv, .jsonl, .parquet (.gz), or a.de+b.en"
            )
    return header, records


def paths_of(spec: str) -> list[str]:
    paths = []
    for item in spec.split(","):
        found = sorted(glob.glob(item.strip())) if "+" not in item else [item.strip()]
        if not found:
            raise DataError(f"there is no file {item.strip()}")
        paths += found
    return paths


def read_text(path: str) -> str:
    try:
        data = Path(path).read_bytes()
        return (gzip.decompress(data) if path.endswith(".gz") else data).decode()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None


def parse_line(path: str, number: int, line: str) -> dict:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not an object")
        return record
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON: {error}") from None


def read_examples(spec: str, task: str, columns: str) -> list[dict]:
    """The examples of these files, each a dict of the task's columns. Raises DataError that lists what is wrong."""
    _, records = read_table(spec)
    roles = [role.rstrip("?") for role in ROLES[task]]
    needed = [role for role in ROLES[task] if not role.endswith("?")]
    if not records:
        raise DataError(f"{spec}: there are no examples")
    chosen = {}
    for item in columns.replace(",", " ").split():
        role, _, name = item.partition("=")
        if role not in roles:
            hint = did_you_mean(role, roles)
            raise DataError(f"config.data.columns={columns}: {task} has no column {role!r}{hint} ({' '.join(roles)})")
        chosen[role] = name or role
    first, start = records[0], 0
    if isinstance(first, list):
        named = chosen and not all(name.isdecimal() for name in chosen.values())
        if named or set(needed) <= {cell.strip() for cell in first}:
            names, start = [cell.strip() for cell in first], 1
        else:
            names = [str(i) for i in range(len(first))]
            chosen = chosen or dict(zip(roles, names))
    else:
        names = list(dict.fromkeys(name for record in records[:100] for name in record))
    chosen = chosen or {role: role for role in roles if role in names}
    missing = [chosen.get(role, role) for role in needed if chosen.get(role) not in names]
    if missing:
        raise DataError(
            f"{spec}: no column {', '.join(missing)}; it has {' '.join(names)}. Say which is which with "
            f'--config.data.columns="{" ".join(f"{role}=..." for role in needed)}"'
        )
    examples, bad = [], []
    for number, record in enumerate(records[start:], start + 1):
        if isinstance(record, list):
            if len(record) != len(names):
                bad.append(f"record {number}: {len(record)} columns instead of {len(names)}")
                continue
            record = dict(zip(names, record))
        example = {role: record[name] for role, name in chosen.items() if record.get(name) is not None}
        absent = [role for role in needed if role not in example]
        if absent:
            bad.append(f"record {number}: no {', '.join(absent)}")
        examples.append(example)
    refuse(spec, bad)
    return examples


def refuse(spec: str, bad: list[str]) -> None:
    if bad:
        more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        raise DataError(f"{spec}: {len(bad):,} bad examples:\n  " + "\n  ".join(bad[:SHOWN] + more))
