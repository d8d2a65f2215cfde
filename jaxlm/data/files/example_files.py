"""A file of examples, opened by what it is, not by its name: compression, archives, encoding, and the kind of table.

Compression and encoding are those of formats.py, so that examples and the text of `prepare` are read alike.
"""

import os
import shlex
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

from jaxlm.data.files import encodings, formats
from jaxlm.errors import DataError

KINDS = ".tsv, .csv, .jsonl, .conll or .parquet, each also .gz, .zst, .bz2 or .xz, or a.de+b.en"
CONTROL_SHARE = 0.02  # of the bytes; a table of examples has fewer control characters


class NotUtf8(DataError):
    """A text in another encoding. byte: the first that is wrong; remedy: what to type."""

    def __init__(self, message: str, byte: int, remedy: str):
        super().__init__(message)
        self.byte = byte
        self.remedy = remedy


class Opened(NamedTuple):
    """A file that can be read: its ending without that of a compression, its compression, and its first bytes."""

    path: str
    suffix: str
    compression: str
    head: bytes

    @property
    def is_parquet(self) -> bool:
        return self.suffix == ".parquet" or formats.is_parquet(self.head)


def opened(path: str) -> Opened:
    """Raises DataError for what cannot be read: a directory, an archive, a workbook."""
    if os.path.isdir(path):
        raise DataError(
            f"{path}: a directory, not a file of examples; name its files: {shlex.quote(path + '/*')}"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(formats.HEAD_BYTES)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from None
    name = formats.compression(start)
    head = formats.first_bytes(path, name)
    reason = formats.container_refusal(path, name, head, for_examples=True)
    if reason:
        raise DataError(f"{path}: {reason}")
    return Opened(path, formats.suffix_of(path), name, head)


def read_bytes(file: Opened) -> bytes:
    """What is in a file, without its compression. Raises DataError where it breaks off."""
    try:
        with formats.open_stream(file.path, file.compression) as stream:
            return bytes(stream.read())
    except (*formats.BROKEN, pa.ArrowException) as error:
        packed = ""
        if file.compression:
            packed = f" (it is compressed with {file.compression}; is it whole?)"
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file.path} can't be read: {reason}{packed}") from None


def read_text(file: Opened) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with its mark. Raises DataError with what converts others."""
    data = read_bytes(file)
    name = formats.encoding(data[:4])
    try:
        text = data.decode(name or "utf-8-sig")
    except UnicodeDecodeError as error:
        raise undecodable(file, data, name, error) from None
    if "\0" in text:
        reason = formats.text_refusal(file.path, file.compression, file.head)
        if reason:
            raise DataError(f"{file.path}: {reason}")
    return text


def undecodable(file: Opened, data: bytes, name: str, error: UnicodeDecodeError) -> DataError:
    """Why the bytes of a file are not the text that they should be, and what to type."""
    if name:
        reason = (
            f"it begins as {name.upper()}, but is broken at byte {error.start:,}: {error.reason}"
        )
        return DataError(f"{file.path}: {reason}")
    reason = formats.text_refusal(file.path, file.compression, file.head)
    if reason:
        return DataError(f"{file.path}: {reason}")
    controls = encodings.count_controls(file.head)
    size = len(file.head)
    if controls > CONTROL_SHARE * size:
        reason = f"not text: {controls:,} of its first {size:,} bytes are control characters"
        return DataError(f"{file.path}: {reason}")
    line = data[: error.start].count(b"\n") + 1
    guess = encodings.windows_or_latin(data)
    typed = formats.to_utf8_line(file.path, file.compression, guess)
    remedy = f"if it is {guess}, convert it: {typed}"
    message = f"{file.path}:{line}: not UTF-8 text ({error.reason}); {remedy}"
    return NotUtf8(message, error.start, remedy)


def lines_of(text: str) -> list[str]:
    """Its lines: only a line feed ends one, with or without a carriage return."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def parallel(path: str, parts: Iterable[str]) -> list[list[str]]:
    """The lines of files in parallel, side by side. Raises DataError where one has more."""
    columns = {part: lines_of(read_text(opened(part))) for part in parts}
    if len(set(map(len, columns.values()))) > 1:
        counts = ", ".join(f"{part} has {len(column):,}" for part, column in columns.items())
        raise DataError(f"{path}: files in parallel must have as many lines each: {counts}")
    return list(map(list, zip(*columns.values())))
