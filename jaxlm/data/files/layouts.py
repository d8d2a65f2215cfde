"""How documents lie in a file, by what is in it: one document, JSON lines, a list, a table, parquet.

A name decides only where the content doesn't: what is no JSON by its first lines is not JSON lines, unless it is called
so; a table is what is called .csv or .tsv.
"""

import csv
import difflib
import json
import re
import shlex
from dataclasses import dataclass, replace
from itertools import chain, islice

import pyarrow as pa
import pyarrow.parquet

from jaxlm.data.files import encodings, formats, json_records, parquet
from jaxlm.data.files.delimited import excel_delimiter, is_number, likely_delimiters, reader

# By name; the others are text.
KINDS = {**dict.fromkeys(json_records.NAMES, "jsonl"), ".parquet": "parquet"}
# What names a language is never JSON lines, whatever it begins with.
CODE = ".rst .tex .html .py .c .h .cc .cpp .cu .js .ts .java .go .rs .sh".split()
TABLES = (".csv", ".tsv")
TABLE_BYTES = 1 << 20  # of a table looked at, to see how it is quoted
MOST_BYTES = 16 << 20  # looked at where the first JSON object is that long
FIRST_LINES = 8  # of a file that isn't called JSON ...
JSON_SHARE = 0.75  # ... of which as many are objects, where it is JSON lines
SAMPLE = 100  # records looked at for their keys
SHOWN = 12  # columns in a message
MOST_OF_NAME = 40  # characters that the name of a column has at most, shown or believed to be one
NEEDS_QUOTES = re.compile(r'["\t\n]')  # a cell of a .tsv
JSON_START = re.compile(r'\s*(\{\s*["}]|\[)')
# Names that text has in public data sets.
USUAL_KEYS = "text content body sentence document article review passage message msg comment story description".split()


@dataclass(frozen=True)
class Layout:
    """How documents lie in a file."""

    kind: str = "text"  # a key of readers.READERS
    words: str = "plain text"
    problem: str = ""  # why it is not read, and what to type
    delimiter: str = ""  # of a table
    quoted: bool = True  # whether quotes in a table hold cells together

    @property
    def documents(self) -> str:
        """What is one document, for people."""
        words = {"text": "one document", "parquet": "one document a row"}
        return words.get(self.kind, "one document a record")

    @property
    def field(self) -> str:
        if self.kind in ("json", "jsonl"):
            return "key"
        return "column"


TEXT = Layout()
LINES = Layout("jsonl", "JSON lines")


def detect(path: str, suffix: str, compression: str, head: bytes, key: str) -> Layout:
    """The layout of a file that begins with `head` (see formats.first_bytes) and whose name ends with `suffix` but for
    its compression. The text of a record is under `key`."""
    if formats.is_parquet(head) and not compression:
        return Layout("parquet", "parquet", problem=_parquet_problem(path, key))
    if suffix in CODE:
        return TEXT
    if JSON_START.match(_text(head)):
        found = _detect_json(path, suffix, compression, head, key)
        if found:
            return found
    if suffix in TABLES:
        return _detect_table(path, suffix, compression, key)
    by_name = {"jsonl": LINES, "parquet": Layout("parquet", "parquet")}
    return by_name.get(KINDS.get(suffix), TEXT)


def _text(head: bytes) -> str:
    return head.decode(formats.encoding(head) or "utf-8", errors="replace").removeprefix("\ufeff")


# ---------------------------------------------------------------- JSON


def _detect_json(path: str, suffix: str, compression: str, head: bytes, key: str) -> Layout | None:
    """The layout of what begins as JSON does, or None where it is none; looks on while no object has come to its
    end."""
    size = formats.HEAD_BYTES
    while True:
        whole = len(head) < size
        text = _text(head).strip()
        look = _objects_in if text.startswith("{") else _list_in
        found, records = look(text, whole, suffix)
        if found or whole or size >= MOST_BYTES:
            break
        size *= 16
        head = formats.first_bytes(path, compression, size)
    if found and records and not any(key in record for record in records):
        return replace(found, problem=_no_key(path, compression, key, records, found))
    if not found and suffix == ".json":
        return replace(LINES, problem=_not_json(path, compression, text, whole))
    return found


def _objects_in(text: str, whole: bool, suffix: str) -> tuple[Layout | None, list[dict]]:
    """(what a text is that starts with an object, the objects seen); None where it is not clear."""
    called_json = KINDS.get(suffix) == "jsonl"
    lines = [line for line in text.split("\n") if line.strip()]
    if not whole:
        lines.pop()
    if not lines:
        return None, []
    parsed = list(map(json_records.parse_object, lines))
    records = [record for record in parsed if record is not None]
    if parsed[0] is not None:
        first = parsed[:FIRST_LINES]
        num_objects = len(first) - first.count(None)
        if called_json or num_objects >= JSON_SHARE * len(first):
            return LINES, records
        return TEXT, []
    if len(records) >= JSON_SHARE * len(lines):  # only the first line is broken, and a few more
        return LINES, records
    records, clean = _leading(text)
    sure = called_json or len(records) > 1 or (whole and clean)
    if not records or not sure:
        return None, []
    return Layout("json", "JSON objects"), records


def _list_in(text: str, whole: bool, suffix: str) -> tuple[Layout | None, list[dict]]:
    """(what a text is that starts with "[", the objects seen); None where it is not clear, or not JSON."""
    if not json_records.begins_list(text):
        return None, []
    records, clean = _leading(text)
    if records:
        return Layout("json", "a JSON list"), records
    if clean and KINDS.get(suffix) == "jsonl":
        return Layout("json", "an empty JSON list"), []
    return None, []


def _leading(text: str) -> tuple[list[dict], bool]:
    """(the first objects of a text, whether nothing else follows)."""
    records = []
    try:
        for value in islice(json_records.stream_values([text]), SAMPLE):
            if not isinstance(value, dict):
                return records, False
            records.append(value)
    except (ValueError, RecursionError):
        return records, False
    return records, True


def _not_json(path: str, compression: str, text: str, whole: bool) -> str:
    """Why a .json that is no JSON lines and no list of objects is not read."""
    if text.startswith("["):
        strings = re.match(r'\[\s*"', text)
        element = "{text: .}" if strings else "{text: tostring}"
        command = f"jq -c '.[] | {element}'"
        what = "strings" if strings else "other things"
        typed = formats.shell_line(path, compression, command, path + ".jsonl")
        return f"a JSON list of {what}, not of objects; write a record a line: {typed}"
    first = text.partition("\n")[0]
    if first == text or first.rstrip().endswith("}"):
        return ""  # lines of which the first is broken, or very long: reported with its number
    if whole:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"broken JSON: {error}"
    typed = formats.shell_line(path, compression, "jq -c .", path + ".jsonl")
    return (
        f"a JSON object above {MOST_BYTES >> 20} MiB on many lines; write a record a line: {typed}"
    )


def _no_key(path: str, compression: str, key: str, records: list[dict], found: Layout) -> str:
    lengths = {}
    for record in records[:SAMPLE]:
        for name, value in record.items():
            length = len(value) if isinstance(value, str) else 0
            lengths[name] = lengths.get(name, 0) + length
    problem = f"{found.words} with {missing_key('key', key, lengths)}"
    for name, value in records[0].items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and len(records) == 1:
            command = f"jq -c '.[{json.dumps(name)}][]'"
            typed = formats.shell_line(path, compression, command, path + ".jsonl")
            return f"{problem}; {name!r} is a list of records, so write one a line: {typed}"
    return problem


def missing_key(what: str, key: str, lengths: dict[str, int]) -> str:
    """That there is no such key (or column), which there are, and which may be meant. lengths: of the text under each,
    0 where it is none."""
    names = list(map(str, lengths))
    shown = ", ".join(names[:SHOWN]) or "none"
    if len(names) > SHOWN:
        shown += f" and {len(names) - SHOWN:,} more"
    message = f"no {what} {key!r}; there are {shown}"
    texts = [str(name) for name, length in lengths.items() if length]
    if not texts:
        return f"{message}; nothing in it is text"
    return f"{message}; say where the text is: --text_key={_likeliest(key, texts, lengths)}"


def _likeliest(key: str, names: list[str], lengths: dict[str, int]) -> str:
    folded = {name.strip().casefold(): name for name in reversed(names)}
    near = difflib.get_close_matches(key.casefold(), list(folded), n=1, cutoff=0.75)
    for name in [*near, *USUAL_KEYS]:
        if name in folded:
            return folded[name]
    return max(names, key=lengths.get)


# ---------------------------------------------------------------- tables


def _detect_table(path: str, suffix: str, compression: str, key: str) -> Layout:
    """The layout of what is called a table: what stands between its columns is seen by its header."""
    head = formats.first_bytes(path, compression, TABLE_BYTES)
    text = _text(head)
    whole = len(head) < TABLE_BYTES
    named, start = excel_delimiter(text)
    text = text[start:]
    headers = {}
    for delimiter in [named] if named else likely_delimiters(suffix):
        rows, _ = _rows(text, whole, delimiter, quoted=True, most=1)
        header = list(map(str.strip, rows[0])) if rows else []
        headers[delimiter] = header
        if header.count(key) > 1:
            problem = (
                f"a table with several columns {key!r}; give each another name in its first line"
            )
            return Layout("table", "a table", problem)
        if key in header:
            quoted = delimiter != "\t" or _is_quoted(text, whole, key)
            return Layout("table", "a table", delimiter=delimiter, quoted=quoted)
    delimiter = max(headers, key=lambda each: len(headers[each]))
    if not headers[delimiter]:
        return Layout("table", "a table", delimiter=delimiter)  # empty
    rows, _ = _rows(text, whole, delimiter, quoted=True, most=SAMPLE)
    problem = _no_column(path, compression, rows, delimiter, key)
    return Layout("table", "a table", problem, delimiter)


def _rows(
    text: str, whole: bool, delimiter: str, quoted: bool, most: int
) -> tuple[list[list[str]], bool]:
    """(the first rows of a table, whether all of them are as the rules of quotes want)."""
    lines = text.split("\n")
    if not whole:
        lines.pop()
    rows = []
    try:
        for row in reader((line + "\n" for line in lines), delimiter, quoted):
            if row:
                rows.append(row)
            if len(rows) == most:
                break
    except csv.Error:
        return rows, not whole and bool(rows)  # the last row may be cut
    return rows, True


def _is_quoted(text: str, whole: bool, key: str) -> bool:
    """Whether quotes hold the cells of a .tsv together: where the name of its column has them, or where all rows are
    then as wide, and a cell needs its quotes. Elsewhere quotes are a part of the text."""
    header, _ = _rows(text, whole, "\t", quoted=False, most=1)
    if key not in map(str.strip, header[0]):
        return True
    rows, right = _rows(text, whole, "\t", quoted=True, most=1 << 20)
    if not right or len(set(map(len, rows))) > 1:
        return False
    unquoted, _ = _rows(text, whole, "\t", quoted=False, most=1 << 20)
    plain = set(chain.from_iterable(unquoted))
    return any(map(NEEDS_QUOTES.search, set(chain.from_iterable(rows)) - plain))


def _no_column(path: str, compression: str, rows: list[list[str]], delimiter: str, key: str) -> str:
    """Why a table has no column of this name, and what to type. rows: the first ones, with the header if any."""
    header = list(map(str.strip, rows[0]))
    if all(map(_is_name, header)):
        return f"a table with {missing_key('column', key, _lengths(header, rows[1:]))}"
    lengths = _lengths(header, rows)
    names = [f"column{i}" for i in range(len(header))]
    names[header.index(max(lengths, key=lengths.get))] = key
    shown = ", ".join(repr(cell[:MOST_OF_NAME]) for cell in header[:SHOWN])
    first_line = delimiter.join(names).replace("\t", "\\t")
    plain = formats.DECOMPRESS[compression]
    new = shlex.quote(formats.before_suffix(path, ".named"))
    typed = f"{{ printf '{first_line}\\n'; {plain} {shlex.quote(path)}; }} > {new}"
    return (
        f"a table whose first line is no header: it has {shown}; "
        f"write the names of its columns first: {typed}"
    )


def _is_name(cell: str) -> bool:
    """Whether this may be the name of a column."""
    return bool(cell) and len(cell) <= MOST_OF_NAME and not is_number(cell)


def _lengths(header: list[str], rows: list[list[str]]) -> dict[str, int]:
    """How much text is in each column of a table; numbers are none."""
    lengths = dict.fromkeys(header, 0)
    for row in rows:
        for name, cell in zip(header, row):
            if not is_number(cell):
                lengths[name] += len(cell)
    return lengths


# ---------------------------------------------------------------- parquet


def _parquet_problem(path: str, key: str) -> str:
    """Why a parquet file has no text under a key; "" too for a broken file, which reading it reports."""
    cells = []
    try:
        with pa.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if key not in schema.names:
                lengths = {field.name: int(parquet.is_text(field.type)) for field in schema}
                return f"parquet with {missing_key('column', key, lengths)}"
            if not parquet.is_bytes(schema.field(schema.names.index(key)).type):
                return ""
            for batch in islice(file.iter_batches(batch_size=SAMPLE, columns=[key]), 1):
                cells = batch.column(0).cast(pa.large_binary()).drop_null().to_pylist()
    except (OSError, pa.ArrowException):
        return ""
    found = encodings.diagnose(b"\n".join(cells)[: formats.HEAD_BYTES])
    if found:
        return f"parquet whose column {key!r} has bytes that are {found.reason}"
    return ""
