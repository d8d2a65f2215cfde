"""Raw files to documents: find the files, then read them, or a stretch of one, piece by piece.

A text file of any kind is one document; a line of JSON lines, an element of a JSON list, a row of a table (.csv, .tsv)
or of parquet is one document under a key: layouts.py says which a file is. What gzip, zstd, bz2 or xz compressed is
read through, by its first bytes. What is wrong with the input is noted, never raised: the caller has to see all of it
before it decides. But a file of a format that is not read is refused at once.
"""

import csv
import dataclasses
import glob
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from jaxlm.data.files import delimited, formats, layouts, parquet
from jaxlm.data.files.formats import COMPRESSED
from jaxlm.data.files.json_records import stream_values
from jaxlm.data.files.layouts import Layout
from jaxlm.data.files.repeats import PLACES_SHOWN
from jaxlm.data.tokenization.base import replace_surrogates
from jaxlm.data.tokenization.pieces import PIECE_BYTES, Notes, Piece, decode, lines, pieces, texts
from jaxlm.errors import DataError

# What a directory is searched for; a file that is named, or matches a glob, may be any.
SUFFIXES = ".jsonl .ndjson .parquet .txt .md .rst .tex .html .py .c .h .cc .cpp .cu .js .ts .java .go .rs .sh".split()
STDLIB_SKIPS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
}
BLOCK_BYTES = 256 << 10  # of a file read at a time
BAD_SHOWN = 10  # reasons
WRONG_SHOWN = 50  # files that are refused
KINDS_SHOWN = 5  # of files that a directory has and that are left out
FORMATS_SHOWN = 8  # files each with a line; more are listed together


@dataclass(frozen=True)
class Source:
    """A file: its name for people, its absolute path, its size, and a hash that shows (nearly) every change."""

    name: str
    path: str
    bytes: int
    sha256: str
    compression: str = ""  # see formats.compression
    encoding: str = ""  # see formats.encoding
    layout: Layout = layouts.TEXT
    format: str = ""  # all of this for people

    @property
    def kind(self) -> str:
        return self.layout.kind

    @property
    def streamed(self) -> bool:
        """Whether its bytes are not those of the text, so that it has to be read from its start."""
        return bool(self.compression or self.encoding)

    @property
    def cuttable(self) -> bool:
        """Whether it can be read from the middle: where a line or a character starts, a record or a text does."""
        return self.kind in ("text", "jsonl") and not self.streamed


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a source."""

    source: Source
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


def find(inputs: Iterable[str], key: str = "text") -> list[Source]:
    """The files that the inputs (paths, directories, globs, or "stdlib") name, each once, in order. The text of a
    record is under `key`.

    Raises DataError that lists every input that names no file, or every file of a format that is not read.
    """
    named = {}
    nothing = []
    for text in inputs:
        files = _stdlib() if text == "stdlib" else _matches(text)
        if not files:
            nothing.append(text)
        for name, path in files:
            named.setdefault(os.path.realpath(path), (name, os.path.abspath(path)))
    if nothing:
        raise DataError(_no_file(nothing))
    sources = []
    wrong = []
    try:
        for name, path in named.values():
            source, reason = _inspect_file(name, path, key)
            sources.append(source)
            if reason:
                wrong.append(f"{name}: {reason}")
    except OSError as error:
        raise DataError(f"the input {error.filename} can't be read: {error.strerror}") from None
    if wrong:
        shown = ["the input has files that can't be read:", *wrong[:WRONG_SHOWN]]
        if len(wrong) > WRONG_SHOWN:
            shown.append(f"and {len(wrong) - WRONG_SHOWN:,} more")
        raise DataError("\n  ".join(shown))
    return sources


def _no_file(inputs: list[str]) -> str:
    """That these inputs name no file, what is searched for, and what was left out."""
    known = f"{' '.join(SUFFIXES)}, also {' '.join(COMPRESSED)}"
    hint = ""
    if any("," in text for text in inputs):
        hint = "; several files are several --input"
    given = ", ".join(f"--input={text!r}" for text in inputs)
    message = f"no file matches {given} (seen from {os.getcwd()}; a directory is searched for {known}){hint}"
    return "\n  ".join([message, *left_out(inputs)])


def formats_of(sources: list[Source]) -> list[str]:
    """A line for each file that says how it is read; of many files, one for those that are read alike."""
    if len(sources) <= FORMATS_SHOWN:
        return [f"{source.name}: {source.format}" for source in sources]
    alike = {}
    for source in sources:
        alike.setdefault(source.format, []).append(source.name)
    lines = []
    for text, names in alike.items():
        others = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{others}: {text}")
    return lines


def left_out(inputs: Iterable[str]) -> list[str]:
    """A line for each directory among the inputs that has files which are not searched for, with their kinds."""
    lines = []
    for text in inputs:
        root = Path(text).expanduser()
        if text == "stdlib" or not root.is_dir():
            continue
        kinds = Counter()
        for path in root.rglob("*"):
            if path.is_file() and not _is_hidden(path, root) and not _is_known(path, root):
                kinds[formats.suffix_of(path.name) or "without a suffix"] += 1
        if kinds:
            most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
            shown = ", ".join(f"{count:,} {kind}" for kind, count in most[:KINDS_SHOWN])
            more = ", and others" if len(kinds) > KINDS_SHOWN else ""
            lines.append(
                f"left out of {text}: {shown}{more}; a glob reads them: --input='{root}/**/*SUFFIX'"
            )
    return lines


def read(spans: Iterable[Span], key: str, notes: Notes) -> Iterator[Piece]:
    """The documents of a part, piece by piece; the text of a record is under `key`. Empty ones are left out."""
    for span in spans:
        for piece in READERS[span.source.kind](span, key, notes):
            if piece.text:
                yield piece
            else:
                notes.counts["empty_documents"] += 1


def beginning(source: Source) -> str:
    """The first piece of a text file."""
    return next(_read_text(Span(source, 0, source.bytes), "", Notes())).text


def _matches(text: str) -> list[tuple[str, str]]:
    """(name, path) of the files that an input names."""
    pattern = os.path.expanduser(text)
    found = [pattern]
    if not os.path.exists(pattern):
        found = sorted(glob.glob(_pattern(pattern), recursive=True))
    names = []
    for match in found:
        if not os.path.isdir(match):
            names.append(match)
            continue
        for path in sorted(Path(match).rglob("*")):
            if _is_known(path, Path(match)):
                names.append(str(path))
    return [(name, name) for name in names]


def _pattern(path: str) -> str:
    """The glob with each folder that exists taken literally, whatever characters its name has."""
    start = Path(path)
    while not start.exists():
        start = start.parent
    folder = str(start)
    if path.startswith(folder):
        return glob.escape(folder) + path.removeprefix(folder)
    return path


def _is_known(path: Path, root: Path) -> bool:
    return (
        formats.suffix_of(path.name) in SUFFIXES and not _is_hidden(path, root) and path.is_file()
    )


def _is_hidden(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return any(part.startswith(".") for part in parts)  # .git and the like


def _stdlib() -> list[tuple[str, str]]:
    """(name, path) of Python's own source files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if STDLIB_SKIPS.isdisjoint(name.split("/")):
            files.append((f"stdlib/{name}", str(root / name)))
    return files


def _inspect_file(name: str, path: str, key: str) -> tuple[Source, str]:
    """(a file, why it is not read or "").

    The hash is over all of a file of 1 MiB, and over 64 stretches of 16 KiB of a larger one.
    """
    if not os.path.isfile(path):
        reason = "a pipe or a device, which can't be read twice; write it into a file first"
        return Source(name, path, 0, ""), reason
    digest = hashlib.sha256()
    stretches = 64
    length = 16 << 10
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        compression = formats.compression(file.read(16))
        step = max(length, (size - length) // (stretches - 1))
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(length))
    source = Source(name, path, size, digest.hexdigest(), compression)
    return _with_format(source, key)


def _with_format(source: Source, key: str) -> tuple[Source, str]:
    """(a file with what it is, why it is not read or "")."""
    path = source.path
    compression = source.compression
    head = formats.first_bytes(path, compression)
    suffix = formats.suffix_of(path)
    if formats.is_parquet(head):
        suffix = "" if compression else ".parquet"
    reason = formats.refusal(path, suffix, compression, head)
    if reason:
        return source, reason
    layout = layouts.detect(path, suffix, compression, head, key)
    words = [
        layout.words,
        compression,
        formats.encoding_label(head).replace("UTF-8", ""),
        layout.documents,
    ]
    text = ", ".join(filter(None, words))
    if layout.kind != "text":
        text += f" ({layout.field} {json.dumps(key, ensure_ascii=False)})"
    found = dataclasses.replace(source, encoding=formats.encoding(head), layout=layout, format=text)
    return found, layout.problem


def _read_text(span: Span, key: str, notes: Notes) -> Iterator[Piece]:
    del key
    whole = span.stop == span.source.bytes
    for piece in pieces(_blocks(span, notes), notes, starts=span.start == 0, ends=whole):
        if piece.first and piece.text.startswith("\ufeff"):
            notes.counts["byte_order_marks"] += 1
            piece = piece._replace(text=piece.text[1:])
        yield piece


def _read_jsonl(span: Span, key: str, notes: Notes) -> Iterator[Piece]:
    name = span.source.name
    for number, line in enumerate(lines(_blocks(span, notes), notes)):
        notes.records[name] = number + 1
        if number == 0 and span.start == 0 and line.startswith(b"\xef\xbb\xbf"):
            notes.counts["byte_order_marks"] += 1
            line = line[3:]
        if not line.strip():
            continue
        try:
            text = _field(decode(line, notes), key)
        except (ValueError, RecursionError) as error:
            _bad(notes, name, number + 1, str(error))
            continue
        text, replaced = replace_surrogates(text)
        notes.counts["replaced_surrogates"] += replaced
        yield from _document(text, notes)


def _read_json(span: Span, key: str, notes: Notes) -> Iterator[Piece]:
    """A JSON list, or objects that are not one a line."""
    name = span.source.name
    number = 0
    try:
        for value in stream_values(texts(_blocks(span, notes), notes)):
            number += 1
            notes.records[name] = number
            try:
                text = _text_under(value, key)
            except ValueError as error:
                _bad(notes, name, number, str(error))
                continue
            text, replaced = replace_surrogates(text)
            notes.counts["replaced_surrogates"] += replaced
            yield from _document(text, notes)
    except (ValueError, RecursionError) as error:
        known = [file for file, _, _ in notes.broken]
        if name not in known:  # else the file breaks off, which is why
            _broken(notes, name, error)


def _read_table(span: Span, key: str, notes: Notes) -> Iterator[Piece]:
    """Each row but the first, which has the names of the columns. Its number is that of its first line."""
    name = span.source.name
    layout = span.source.layout
    ended = (line + "\n" for line in _decoded_lines(span, notes))
    rows = delimited.reader(ended, layout.delimiter, layout.quoted)
    header = []
    start = 1
    while True:
        notes.records[name] = start - 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error) or "field larger" in str(error):
                _broken(
                    notes, name, ValueError(f"the quote that opens in line {start} isn't closed")
                )
                return
            _bad(notes, name, start, _reason(error))
            row = []
        if not header and start == 1 and delimited.is_excel_line(row):
            pass
        elif row and not header:
            header = list(map(str.strip, row))
        elif row and len(row) != len(header):
            _bad(notes, name, start, f"{len(row)} columns, the first line has {len(header)}")
        elif row:
            yield from _document(row[header.index(key)], notes)
        start = rows.line_num + 1


def _reason(error: csv.Error) -> str:
    if "new-line" in str(error):
        return "a carriage return inside of a cell without quotes; a line ends with a line feed"
    return f"{error}; {delimited.TWICE}"


def _decoded_lines(span: Span, notes: Notes) -> Iterator[str]:
    for number, line in enumerate(lines(_blocks(span, notes), notes)):
        text = decode(line, notes)
        if number == 0 and text.startswith("\ufeff"):
            notes.counts["byte_order_marks"] += 1
            text = text[1:]
        yield text


def _read_parquet(span: Span, key: str, notes: Notes) -> Iterator[Piece]:
    name = span.source.name
    number = 0
    try:
        with pa.parquet.ParquetFile(span.source.path) as file:
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                kind = column.type
                strings = parquet.is_text(kind)
                if strings:  # bytes, so that invalid UTF-8 is ours to replace
                    column = column.cast(pa.large_binary())
                for value in column.to_pylist():
                    number += 1
                    if strings and value is not None:
                        yield from _document(decode(value, notes), notes)
                    else:
                        found = "null" if value is None else kind
                        _bad(notes, name, number, f"{key!r} is {found}, not a string")
                    notes.records[name] = number
    except (OSError, pa.ArrowException) as error:
        _broken(notes, name, error)


READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "table": _read_table,
    "parquet": _read_parquet,
}


def _field(line: str, key: str) -> str:
    """The text under `key` of a JSON object, or a ValueError that says why there is none."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at character {error.pos}") from None
    return _text_under(record, key)


def _text_under(record: object, key: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"not an object but {type(record).__name__}")
    if key not in record:
        there = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"no key {key!r}; there are {there}")
    value = record[key]
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise ValueError(f"{key!r} is {found}, not a string")
    return value


def _broken(notes: Notes, name: str, error: Exception) -> None:
    notes.broken.append((name, " ".join(str(error).split()), notes.records.get(name, 0)))


def _bad(notes: Notes, name: str, number: int, reason: str) -> None:
    notes.counts["bad_records"] += 1
    if reason not in notes.reasons and len(notes.reasons) == BAD_SHOWN:
        return
    notes.reasons[reason] += 1
    if notes.reasons[reason] <= PLACES_SHOWN:
        notes.bad.append((name, number, reason))


def _blocks(span: Span, notes: Notes) -> Iterator[bytes]:
    """The bytes of a span, decompressed. A file that breaks off ends early, and is noted."""
    try:
        if not span.source.bytes and span.source.path.lower().endswith(COMPRESSED):
            raise OSError("empty, which no compressed file is")
        if span.source.streamed:
            yield from _streamed(span.source, notes)
            return
        with open(span.source.path, "rb") as stream:
            stream.seek(span.start)
            for start in range(span.start, span.stop, BLOCK_BYTES):
                yield stream.read(min(BLOCK_BYTES, span.stop - start))
    except formats.BROKEN as error:
        _broken(notes, span.source.name, error)


def _streamed(source: Source, notes: Notes) -> Iterator[bytes]:
    """All of a file as UTF-8, without its compression."""
    with formats.open_stream(source.path, source.compression) as stream:
        blocks = iter(lambda: stream.read(BLOCK_BYTES), b"")
        if source.encoding:
            notes.counts["byte_order_marks"] += 1
            blocks = formats.to_utf8(blocks, source.encoding)
        yield from blocks


def _document(text: str, notes: Notes) -> Iterator[Piece]:
    if len(text) <= PIECE_BYTES // 4:  # then its UTF-8 is not longer than a piece
        yield Piece(text, True, True)
    else:
        yield from pieces([text.encode()], notes)
