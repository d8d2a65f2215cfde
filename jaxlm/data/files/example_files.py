"""A file of examples, opened by what it is, not by its name: compression, archives, encoding, and the kind of table.

Compression and encoding are those of formats.py, so that examples and the text of `prepare` are read alike.
"""

import os
import shlex
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from jaxlm.data.files import formats
from jaxlm.errors import DataError

KINDS = ".tsv, .csv, .jsonl, .conll or .parquet, each also .gz, .zst, .bz2 or .xz, or a.de+b.en"
PACKED = (
    *formats.COMPRESSED,
    ".utf8",
)  # what a name may end with after its kind; .utf8 is iconv's, see below
PARQUET = b"PAR1"
WORKBOOKS = {  # a file within the zip archive -> what the archive is
    "xl/workbook.xml": "an Excel workbook",
    "xl/workbook.bin": "an Excel workbook",
    "content.xml": "an OpenDocument file",
    "word/document.xml": "a Word document",
}
OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # .xls, .doc
BINARY = {  # first bytes -> what a file is that cannot be text
    b"ARROW1\0\0": ("an Arrow file", "feather.read_table"),
}
TO_PARQUET = 'python -c "from pyarrow import {module}, parquet; parquet.write_table({call}({old!r}), {new!r})"'
CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))  # what is in no text
CONTROL_SHARE = 0.02


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
        return self.suffix == ".parquet" or self.head.startswith(PARQUET)


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
    head = formats.beginning(path, name)
    reason = (
        office_refusal(path, start)
        or binary_refusal(path, head)
        or formats.refusal(path, ".parquet", name, head)
    )
    if reason:
        raise DataError(f"{path}: {reason}")
    return Opened(path, suffix_of(path), name, head)


def suffix_of(path: str) -> str:
    """ ".tsv" of "train.tsv.gz"."""
    return unpacked(path).suffix.lower()


def unpacked(path: str) -> Path:
    """ "train.tsv" of "train.tsv.gz"."""
    file = Path(path)
    while file.suffix.lower() in PACKED:
        file = file.with_suffix("")
    return file


def office_refusal(path: str, start: bytes) -> str:
    if start.startswith(OLD_OFFICE):
        what = "a file of an older Excel or Word"
    else:
        what = ""
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = set(archive.namelist())
        what = next((kind for name, kind in WORKBOOKS.items() if name in inside), "")
    if not what:
        return ""
    options = "csv:'Text - txt - csv (StarCalc)':44,34,76"  # a comma between, double quotes, UTF-8
    typed = f"soffice --headless --convert-to {options} {shlex.quote(path)}"
    return f'{what}, which is not read; save it as "CSV UTF-8" where it was made, or type (LibreOffice): {typed}'


def binary_refusal(path: str, head: bytes) -> str:
    for start, (what, call) in BINARY.items():
        if head.startswith(start):
            new = str(Path(path).with_suffix(".parquet"))
            typed = TO_PARQUET.format(module=call.partition(".")[0], call=call, old=path, new=new)
            return f"{what}, which is not read; write it as parquet: {typed}"
    return ""


def read_bytes(file: Opened) -> bytes:
    """What is in a file, without its compression. Raises DataError where it breaks off."""
    try:
        with formats.open_stream(file.path, file.compression) as stream:
            return bytes(stream.read())
    except (*formats.BROKEN, pa.ArrowException) as error:
        if file.compression:
            packed = f" (it is compressed with {file.compression}; is it whole?)"
        else:
            packed = ""
        raise DataError(
            f"{file.path} can't be read: {getattr(error, 'strerror', None) or error}{packed}"
        ) from None


def read_text(file: Opened) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with its mark. Raises DataError with what converts others."""
    data = read_bytes(file)
    name = formats.encoding(data[:4])
    try:
        text = data.decode(name or "utf-8-sig")
    except UnicodeDecodeError as error:
        raise undecodable(file, data, name, error) from None
    if "\0" in text:
        reason = formats.refusal(file.path, ".txt", file.compression, file.head)
    else:
        reason = ""
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
    reason = formats.refusal(file.path, ".txt", file.compression, file.head)
    if reason:
        return DataError(f"{file.path}: {reason}")
    head = file.head
    controls = len(head) - len(head.translate(None, CONTROLS))
    if controls > CONTROL_SHARE * len(head):
        reason = f"not text: {controls:,} of its first {len(head):,} bytes are control characters"
        return DataError(f"{file.path}: {reason}")
    line = data[: error.start].count(b"\n") + 1
    guess = "WINDOWS-1252" if is_windows(data) else "LATIN1"
    new = converted(file.path)
    whole = f"{formats.DECOMPRESS[file.compression]} {shlex.quote(file.path)}"
    typed = f"{whole} | iconv -f {guess} -t UTF-8 > {shlex.quote(new)}"
    remedy = f"if it is {guess}, convert it: {typed}"
    return NotUtf8(
        f"{file.path}:{line}: not UTF-8 text ({error.reason}); {remedy}", error.start, remedy
    )


def is_windows(data: bytes) -> bool:
    """Whether bytes are used that are letters and quotes in Windows-1252, and control characters in Latin-1."""
    if not any(byte in data for byte in range(0x80, 0xA0)):
        return False
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    return True


def converted(path: str) -> str:
    """A name for the same file in UTF-8, without compression: a.utf8.tsv of a.tsv.gz."""
    file = unpacked(path)
    return str(file.with_name(f"{file.stem}.utf8{file.suffix}"))


def lines_of(text: str) -> list[str]:
    """Its lines: only a line feed ends one, with or without a carriage return."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def parallel(path: str, parts: Iterable[str]) -> list[list[str]]:
    """The lines of files in parallel, side by side. Raises DataError where one has more."""
    columns = {part: lines_of(read_text(opened(part))) for part in parts}
    if len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(f"{part} has {len(column):,}" for part, column in columns.items())
        raise DataError(f"{path}: files in parallel must have as many lines each: {counts}")
    return [list(cells) for cells in zip(*columns.values())]
