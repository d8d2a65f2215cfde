"""How documents lie in a file, by what is in it: one document, JSON lines, a list, a table, parquet.

A name decides only where the content doesn't: what is no JSON by its first lines is not JSON lines, unless it is called
so; a table is what is called .csv or .tsv.
"""

import csv
import difflib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import pyarrow as pa
import pyarrow.parquet

from jaxlm.data.files import encodings, formats
from jaxlm.data.files.delimited import EXCEL_LINE, is_number

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}  # by name; the others are text
# What names a language is never JSON lines, whatever it begins with.
CODE = ".rst .tex .html .py .c .h .cc .cpp .cu .js .ts .java .go .rs .sh".split()
DELIMITERS = {
    ".csv": ",;\t|",
    ".tsv": "\t,;|",
}  # of tables; the first is usual, the others are taken by the header
TABLE_BYTES = 1 << 20  # of a table looked at, to see how it is quoted
MOST_BYTES = 16 << 20  # looked at where the first JSON object is that long
OBJECT_CHARS = 32 << 20  # of one JSON object of a list at most, so that memory is bounded
FIRST_LINES = 8  # of a file that isn't called JSON ...
JSON_SHARE = 0.75  # ... of which as many are objects, where it is JSON lines
SAMPLE = 100  # records looked at for their keys
SHOWN = 12  # columns in a message
MOST_OF_NAME = 40  # characters that the name of a column has at most, shown or believed to be one
JSON_START = re.compile(r'\s*(\{\s*["}]|\[)')
BETWEEN = re.compile(r"\s*")
BETWEEN_IN_LIST = re.compile(r"[\s,]*")
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
        return {"text": "one document", "parquet": "one document a row"}.get(
            self.kind, "one document a record"
        )

    @property
    def field(self) -> str:
        if self.kind in ("json", "jsonl"):
            return "key"
        return "column"


TEXT = Layout()
LINES = Layout("jsonl", "JSON lines")


def see(path: str, suffix: str, compression: str, head: bytes, key: str) -> Layout:
    """The layout of a file that begins with `head` (see formats.beginning) and whose name ends with `suffix` but for
    its compression. The text of a record is under `key`."""
    if head.startswith(formats.PARQUET) and not compression:
        return Layout("parquet", "parquet", problem=_parquet_problem(path, key))
    if suffix in CODE:
        return TEXT
    if JSON_START.match(_text(head)):
        found = _see_json(path, suffix, compression, head, key)
        if found:
            return found
    if suffix in DELIMITERS:
        return _see_table(path, suffix, compression, key)
    by_name = {"jsonl": LINES, "parquet": Layout("parquet", "parquet")}
    return by_name.get(KINDS.get(suffix), TEXT)


def _text(head: bytes) -> str:
    return head.decode(formats.encoding(head) or "utf-8", errors="replace").removeprefix("\ufeff")


# ---------------------------------------------------------------- JSON


def _see_json(path: str, suffix: str, compression: str, head: bytes, key: str) -> Layout | None:
    """The layout of what begins as JSON does, or None where it is none; looks on while no object has come to its
    end."""
    size = formats.HEAD_BYTES
    while True:
        whole = len(head) < size
        text = _text(head).strip()
        if text.startswith("{"):
            found, records = _objects_in(text, whole, suffix)
        else:
            found, records = _list_in(text, whole, suffix)
        if found and records and not any(key in record for record in records):
            return replace(found, problem=_no_key(path, compression, key, records, found))
        if found or whole or size >= MOST_BYTES:
            break
        size *= 16
        head = formats.beginning(path, compression, size)
    if not found and suffix == ".json":
        problem = _not_json(path, compression, text, whole)
        if problem:
            return replace(LINES, problem=problem)
        return LINES
    return found


def _objects_in(text: str, whole: bool, suffix: str) -> tuple[Layout | None, list[dict]]:
    """(what a text is that starts with an object, the objects seen); None where it is not clear."""
    called_json = KINDS.get(suffix) == "jsonl"
    lines = [line for line in text.split("\n") if line.strip()]
    if not whole:
        lines.pop()
    if not lines:
        return None, []
    parsed = [_object(line) for line in lines]
    records = [record for record in parsed if record is not None]
    if parsed and parsed[0] is not None:
        first = parsed[:FIRST_LINES]
        num_objects = sum(record is not None for record in first)
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
    if not re.match(r"\[\s*[{\]]", text):
        return None, []
    records, clean = _leading(text)
    if clean and not records and KINDS.get(suffix) == "jsonl":
        return Layout("json", "an empty JSON list"), []
    if records:
        return (Layout("json", "a JSON list"), records)
    return (None, [])


def _object(line: str) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return value
    return None


def _leading(text: str) -> tuple[list[dict], bool]:
    """(the first objects of a text, whether nothing else follows)."""
    records = []
    try:
        for value in islice(values([text]), SAMPLE):
            if not isinstance(value, dict):
                return records, False
            records.append(value)
    except (ValueError, RecursionError):
        return records, False
    return records, True


def values(blocks: Iterable[str]) -> Iterator[object]:
    """The elements of a JSON list, or JSON values that follow one another, from text that comes in blocks.

    Raises: ValueError where it is broken, breaks off, or has a value above OBJECT_CHARS.
    """
    decoder = json.JSONDecoder()
    blocks = iter(blocks)
    buffer = _more("", blocks)[0]
    at = 0
    at = BETWEEN.match(buffer).end()
    in_list = buffer.startswith("[", at)
    closed = False
    ended = False
    at += in_list
    while True:
        between = BETWEEN_IN_LIST if in_list and not closed else BETWEEN
        at = between.match(buffer, at).end()
        if in_list and not closed and buffer.startswith("]", at):
            closed = True
            at += 1
            continue
        if closed and at < len(buffer):
            raise ValueError("something follows the end of the list")
        error = None
        if at < len(buffer):
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as broken:
                error = broken.msg
            else:
                if end < len(buffer) or ended:  # else a number may go on
                    yield value
                    at = end
                    continue
        if ended or len(buffer) - at > OBJECT_CHARS:
            break
        buffer, ended = _more(buffer[at:], blocks)
        at = 0
    if error:
        raise ValueError(f"broken JSON: {error}")
    if in_list and not closed:
        raise ValueError("the list has no end")


def _more(rest: str, blocks: Iterator[str]) -> tuple[str, bool]:
    """(twice as much text or more, so that a long value is tried a few times only; whether it was the last)."""
    got = [rest]
    size = len(rest)
    for block in blocks:
        got.append(block)
        size += len(block)
        if size > 2 * len(rest):
            return "".join(got), False
    return "".join(got), True


def _not_json(path: str, compression: str, text: str, whole: bool) -> str:
    """Why a .json that is no JSON lines and no list of objects is not read."""
    if text.startswith("["):
        strings = re.match(r'\[\s*"', text)
        element = "{text: .}" if strings else "{text: tostring}"
        command = f"jq -c '.[] | {element}'"
        what = "strings" if strings else "other things"
        typed = formats.typed(path, compression, command, path + ".jsonl")
        return f"a JSON list of {what}, not of objects; write a record a line: {typed}"
    first = text.partition("\n")[0]
    if first == text or first.rstrip().endswith("}"):
        return ""  # lines of which the first is broken, or very long: told with its number
    if whole:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"broken JSON: {error}"
    typed = formats.typed(path, compression, "jq -c .", path + ".jsonl")
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
            typed = formats.typed(path, compression, command, path + ".jsonl")
            return f"{problem}; {name!r} is a list of records, so write one a line: {typed}"
    return problem


def missing_key(what: str, key: str, lengths: dict[str, int]) -> str:
    """That there is no such key (or column), which there are, and which may be meant. lengths: of the text under each,
    0 where it is none."""
    names = list(map(str, lengths))
    if len(names) > SHOWN:
        more = f" and {len(names) - SHOWN:,} more"
    else:
        more = ""
    message = f"no {what} {key!r}; there are {', '.join(names[:SHOWN]) or 'none'}{more}"
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


def _see_table(path: str, suffix: str, compression: str, key: str) -> Layout:
    head = formats.beginning(path, compression, TABLE_BYTES)
    text = _text(head)
    whole = len(head) < TABLE_BYTES
    told = EXCEL_LINE.match(text)
    delimiters = [told[1]] if told else DELIMITERS[suffix]
    text = text[told.end() :] if told else text
    headers = {}
    for delimiter in delimiters:
        rows, _ = _rows(text, whole, delimiter, quoted=True, most=1)
        headers[delimiter] = [cell.strip() for cell in rows[0]] if rows else []
        if headers[delimiter].count(key) > 1:
            problem = (
                f"a table with several columns {key!r}; give each another name in its first line"
            )
            return Layout("table", "a table", problem)
        if key in headers[delimiter]:
            quoted = delimiter != "\t" or _is_quoted(text, whole)
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


def tells_delimiter(row: list[str]) -> bool:
    """Whether this row is the line by which Excel tells its delimiter, and no header."""
    if len(row) == 2:
        return row[0].lower() == "sep=" and not row[1]
    return len(row) == 1 and EXCEL_LINE.match(row[0] + "\n") is not None


def reader(lines: Iterable[str], delimiter: str, quoted: bool):
    """The rows of a table. Raises: csv.Error at a row that breaks the rules of quotes; the next row goes on."""
    csv.field_size_limit(OBJECT_CHARS)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)


def _is_quoted(text: str, whole: bool) -> bool:
    """Whether quotes hold the cells of a .tsv together: where all rows are then as wide, and a cell needs its quotes,
    or the first row has them everywhere. Elsewhere quotes are a part of the text."""
    rows, right = _rows(text, whole, "\t", quoted=True, most=1 << 20)
    if not right or any(len(row) != len(rows[0]) for row in rows):
        return False
    unquoted, _ = _rows(text, whole, "\t", quoted=False, most=1 << 20)
    plain = set()
    for row in unquoted:
        for cell in row:
            plain.add(cell)
    new = []
    for row in rows:
        for cell in row:
            if cell not in plain:
                new.append(cell)
    needed = any(mark in cell for cell in new for mark in '"\t\n')
    return needed or all(cell.startswith('"') for cell in unquoted[0])


def _no_column(path: str, compression: str, rows: list[list[str]], delimiter: str, key: str) -> str:
    header = [cell.strip() for cell in rows[0]]
    if all(name and len(name) <= MOST_OF_NAME and not is_number(name) for name in header):
        return f"a table with {missing_key('column', key, _lengths(header, rows[1:]))}"
    lengths = _lengths(header, rows)
    names = [f"column{i}" for i in range(len(header))]
    names[header.index(max(lengths, key=lengths.get))] = key
    shown = ", ".join(repr(cell[:MOST_OF_NAME]) for cell in header[:SHOWN])
    plain = formats.DECOMPRESS[compression]
    typed = f"{{ printf '{delimiter.join(names)}\\n'; {plain} {shlex.quote(path)}; }}".replace(
        "\t", "\\t"
    )
    new = shlex.quote(formats.before_suffix(path, ".named"))
    return (
        f"a table whose first line is no header: it has {shown}; "
        f"write the names of its columns first: {typed} > {new}"
    )


def _lengths(header: list[str], rows: list[list[str]]) -> dict[str, int]:
    """How much text is in each column of a table; numbers are none."""
    lengths = dict.fromkeys(header, 0)
    for row in rows:
        for name, cell in zip(header, row):
            lengths[name] += 0 if is_number(cell) else len(cell)
    return lengths


# ---------------------------------------------------------------- parquet


def _parquet_problem(path: str, key: str) -> str:
    """Why a parquet file has no text under a key; "" too for a broken file, which reading it will tell."""
    try:
        with pa.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if key not in schema.names:
                lengths = {field.name: int(is_text(field.type)) for field in schema}
                return f"parquet with {missing_key('column', key, lengths)}"
            if not is_bytes(schema.field(schema.names.index(key)).type):
                return ""
            batch = next(file.iter_batches(batch_size=SAMPLE, columns=[key]), None)
            if batch:
                cells = batch.column(0).cast(pa.large_binary()).drop_null().to_pylist()
            else:
                cells = []
    except (OSError, pa.ArrowException):
        return ""
    found = encodings.doubt(b"\n".join(cells)[: formats.HEAD_BYTES])
    if found:
        return f"parquet whose column {key!r} has bytes that are {found.reason}"
    return ""


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type of Arrow's are text, or bytes that may be."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    strings = (
        pa.types.is_string(kind),
        pa.types.is_large_string(kind),
        pa.types.is_string_view(kind),
    )
    return any(strings) or is_bytes(kind)


def is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)
