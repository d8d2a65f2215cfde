"""What a file is by its first bytes, whatever its name says; its bytes without compression, as UTF-8."""

import bz2
import codecs
import lzma
import re
import shlex
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa

HEAD_BYTES = 64 << 10  # enough to see what a file is
COMPRESSIONS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to skip
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
# What is not read, and what takes the text out of it.
ARCHIVES = (
    (re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08)"), "a zip archive", "unzip {} -d FOLDER"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive", "7z x {} -oFOLDER"),
    (re.compile(rb"Rar!\x1a\x07"), "a rar archive", "unrar x {} FOLDER/"),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive", "mkdir FOLDER && tar -xf {} -C FOLDER"),
    (re.compile(rb"\x04\x22\x4d\x18"), "compressed with lz4", "lz4 -d {} TEXT"),
    (re.compile(rb"\x1f\x9d"), "compressed with compress", "gzip -dc {} > TEXT"),
    (re.compile(rb"%PDF-"), "a PDF", "pdftotext {} TEXT"),
)
DECOMPRESS = {"": "cat", "gzip": "gzip -dc", "zstd": "zstd -dc", "bz2": "bzip2 -dc", "xz": "xz -dc"}
TABLES = {".csv": "excel", ".tsv": "excel-tab"}  # the dialects of the csv module
TO_JSONL = (
    "python -c \"import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin, dialect='{}')]\""
)
MARKS = {"utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
NUL_SHARE = 0.2  # of the bytes of what is no UTF-8; a stray NUL in a text is kept
BROKEN = (OSError, EOFError, lzma.LZMAError, UnicodeError)  # what reading a compressed or encoded file may raise


def compression(head: bytes) -> str:
    """The key of COMPRESSIONS that a file with these first bytes is compressed with, else ""."""
    for name, pattern in COMPRESSIONS.items():
        if pattern.match(head):
            return name
    return ""


def encoding(head: bytes) -> str:
    """The key of MARKS whose byte order mark these bytes start with, else "": UTF-8."""
    for name, marks in MARKS.items():  # the UTF-16 mark is the start of the UTF-32 one
        if head.startswith(marks):
            return name
    return ""


def to_utf8(blocks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Text in an encoding of MARKS, as UTF-8 without the mark. Raises: UnicodeError where it is broken."""
    decoder = codecs.getincrementaldecoder(name)()
    for block in blocks:
        yield decoder.decode(block).encode()
    yield decoder.decode(b"", final=True).encode()


def open_stream(path: str, name: str) -> BinaryIO:
    """The bytes of a file without its compression (see `compression`)."""
    if name == "bz2":
        return bz2.open(path)
    if name == "xz":
        return lzma.open(path)
    return pa.input_stream(path, compression=name or None)


def beginning(path: str, name: str) -> bytes:
    """The first bytes of what is in a file; none of one that breaks off there, which reading it will tell."""
    try:
        with open_stream(path, name) as stream:
            return stream.read(HEAD_BYTES)
    except BROKEN:
        return b""


def refusal(path: str, suffix: str, name: str, head: bytes) -> str:
    """Why a file is not read and what to type, else "".

    Its name ends with `suffix` but for its compression, `name`; `head` is what `beginning` gives.
    """
    for pattern, what, command in ARCHIVES:
        if pattern.match(head):
            typed = command.format(shlex.quote(path))
            return f"{what}, which is not read; take the text out first: {typed}"
    name_of_encoding = encoding(head)
    if name_of_encoding:
        head = head.decode(name_of_encoding, errors="replace").encode()
    elif suffix != ".parquet" and head.count(0) > NUL_SHARE * len(head):
        return _nul_refusal(path, name, head)
    if suffix in TABLES:
        typed = _typed(path, name, TO_JSONL.format(TABLES[suffix]), ".jsonl")
        return f"a table, which is not read; write a record a line, and name its column as --text_key: {typed}"
    if suffix == ".json":
        return _json_refusal(path, name, head)
    return ""


def _nul_refusal(path: str, name: str, head: bytes) -> str:
    big = head[::2].count(0) > head[1::2].count(0)
    guess = "UTF-16BE" if big else "UTF-16LE"
    typed = _typed(path, name, f"iconv -f {guess} -t UTF-8", ".utf8")
    share = head.count(0) / len(head)
    return f"{share:.0%} NUL bytes, so not UTF-8; if it is {guess} without a byte order mark, convert it: {typed}"


def _json_refusal(path: str, name: str, head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    if text.startswith(b"["):
        typed = _typed(path, name, "jq -c '.[]'", ".jsonl")
        return f"one JSON list, which is not read; write a record a line: {typed}"
    first, ended, _ = text.partition(b"\n")
    if ended and first.startswith(b"{") and not first.rstrip().endswith(b"}"):
        typed = _typed(path, name, "jq -c .", ".jsonl")
        return f"a JSON object on many lines, which is not read; write a record a line: {typed}"
    return ""


def _typed(path: str, name: str, command: str, ending: str) -> str:
    """A line for the shell that puts the text of a file through a command, into a new file."""
    return f"{DECOMPRESS[name]} {shlex.quote(path)} | {command} > {shlex.quote(path + ending)}"
