"""What a file is by its first bytes, whatever its name says; its bytes without compression, as UTF-8."""

import bz2
import codecs
import lzma
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from jaxlm.data.files import encodings

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
    (
        re.compile(rb".{257}ustar", re.DOTALL),
        "a tar archive",
        "mkdir FOLDER && tar -xf {} -C FOLDER",
    ),
    (re.compile(rb"\x04\x22\x4d\x18"), "compressed with lz4", "lz4 -d {} TEXT"),
    (re.compile(rb"\x1f\x9d"), "compressed with compress", "gzip -dc {} > TEXT"),
    (re.compile(rb"%PDF-"), "a PDF", "pdftotext {} TEXT"),
    (re.compile(rb"\{\\rtf1"), "an RTF document", "pandoc -f rtf -t plain {} -o TEXT"),
    (
        re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
        "an old Office document",
        "soffice --convert-to txt:Text {}",
    ),
    (
        re.compile(rb"SQLite format 3\0"),
        "an SQLite database",
        "sqlite3 -csv -header {} 'select * from TABLE' > TABLE.csv",
    ),
)
# What a zip archive holds by the names in its first bytes, where it is a document.
ZIPPED = (
    (re.compile(rb"word/"), "a Word document", "pandoc -f docx -t plain {} -o TEXT"),
    (re.compile(rb"application/epub"), "an EPUB book", "pandoc -f epub -t plain {} -o TEXT"),
    (
        re.compile(rb"application/vnd.oasis"),
        "an OpenDocument file",
        "pandoc -f odt -t plain {} -o TEXT",
    ),
    (re.compile(rb"xl/"), "an Excel table", "soffice --convert-to csv {}"),
)
# What has no text in it.
BINARIES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "a PNG image"),
    (re.compile(rb"\xff\xd8\xff"), "a JPEG image"),
    (re.compile(rb"GIF8[79]a.{,9}\0", re.DOTALL), "a GIF image"),
    (re.compile(rb"II\*\0|MM\0\*"), "a TIFF image"),
    (re.compile(rb"BM.{4}\0{4}", re.DOTALL), "a BMP image"),
    (re.compile(rb"RIFF.{4}(WAVE|AVI |WEBP)", re.DOTALL), "sound, video or an image (RIFF)"),
    (re.compile(rb"ID3[\x02-\x04]|\xff[\xf2\xf3\xfa\xfb][\x10-\xef]"), "MP3 sound"),
    (re.compile(rb"OggS\0"), "Ogg sound"),
    (re.compile(rb"fLaC\0"), "FLAC sound"),
    (re.compile(rb"\0\0\0.ftyp", re.DOTALL), "MP4 video or sound"),
    (re.compile(rb"\x1a\x45\xdf\xa3"), "Matroska video"),
    (re.compile(rb"\x7fELF"), "a program (ELF)"),
    (re.compile(rb"MZ.{58}.{2}\0\0", re.DOTALL), "a program for Windows"),
    (re.compile(rb"\xcf\xfa\xed\xfe|\xfe\xed\xfa\xcf"), "a program for macOS"),
    (re.compile(rb"\xca\xfe\xba\xbe"), "a Java class or a program for macOS"),
    (re.compile(rb"\0asm"), "WebAssembly"),
    (re.compile(rb"\x93NUMPY"), "a NumPy array (.npy)"),
    (re.compile(rb"\x80[\x02-\x05]."), "a Python pickle"),
    (re.compile(rb"GGUF.\0\0\0", re.DOTALL), "model weights (GGUF)"),
    (re.compile(rb".{4}\0{4}\{\"", re.DOTALL), "model weights (safetensors)"),
    (re.compile(rb"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    (re.compile(rb"ARROW1\0\0|FEA1\0"), "an Arrow file"),
    (re.compile(rb"Obj\x01"), "an Avro file"),
    (re.compile(rb"wOF[F2]\0|\0\x01\0\0\0|OTTO\0"), "a font"),
)
PARQUET = b"PAR1\x15"  # the first bytes of a parquet file
DECOMPRESS = {"": "cat", "gzip": "gzip -dc", "zstd": "zstd -dc", "bz2": "bzip2 -dc", "xz": "xz -dc"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # endings of names
MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
BROKEN = (
    OSError,
    EOFError,
    lzma.LZMAError,
    UnicodeError,
)  # what reading a compressed or encoded file may raise


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


def beginning(path: str, name: str, size: int = HEAD_BYTES) -> bytes:
    """The first bytes of what is in a file; none of one that breaks off there, which reading it will tell."""
    try:
        with open_stream(path, name) as stream:
            return stream.read(size)
    except BROKEN:
        return b""


def encoding_label(head: bytes) -> str:
    """The encoding of a file with these first bytes, for people: UTF-8, UTF-16LE, ..."""
    name = encoding(head)
    if not name:
        return "UTF-8"
    little, _ = MARKS[name]
    return name.upper() + ("LE" if head.startswith(little) else "BE")


def refusal(path: str, suffix: str, name: str, head: bytes) -> str:
    """Why a file is not read and what to type, else "".

    Its name ends with `suffix` but for its compression, `name`; `head` is what `beginning` gives. A .parquet is not
    looked into.
    """
    for pattern, what, command in ARCHIVES:
        if pattern.match(head):
            what, command = _in_zip(head) or (what, command)
            return f"{what}, which is not read; take the text out first: {command.format(shlex.quote(path))}"
    if name and compression(head):
        return f"compressed twice; take the outer one off: {typed(path, name, '', before_suffix(path, '.inner'))}"
    if suffix == ".parquet" or encoding(head):
        return ""
    if head.startswith(PARQUET):
        return f"parquet, which is read by itself only: {typed(path, name, '', path + '.parquet')}"
    for pattern, what in BINARIES:
        if pattern.match(head):
            return f"{what}, which is no text; leave it out"
    found = encodings.doubt(head)
    if not found:
        return ""
    if not found.encoding:
        return f"{found.reason}; leave it out, or give the text that is in it"
    condition = f"if it is {found.encoding} (a guess), convert it"
    if found.encoding.startswith("UTF"):
        condition = f"if it is {found.encoding} without a byte order mark, convert it"
    new = before_suffix(path, ".utf8")
    return f"{found.reason}; {condition}: {typed(path, name, f'iconv -f {found.encoding} -t UTF-8', new)}"


def typed(path: str, name: str, command: str, new: str) -> str:
    """A line for the shell that puts the text of a file through a command, if any, into the new file."""
    steps = [f"{DECOMPRESS[name]} {shlex.quote(path)}"]
    if command:
        steps.append(command)
    return f"{' | '.join(steps)} > {shlex.quote(new)}"


def before_suffix(path: str, word: str) -> str:
    """The path with a word before its suffix, which says what is in it; without the one of a compression."""
    plain = Path(path)
    if plain.suffix.lower() in COMPRESSED:
        plain = plain.with_suffix("")
    return str(plain.with_name(plain.stem + word + plain.suffix))


def _in_zip(head: bytes) -> tuple[str, str] | None:
    """(what a zip archive is, the command that takes its text out), where it is a document."""
    if not head.startswith(b"PK"):
        return None
    for pattern, what, command in ZIPPED:
        if pattern.search(head):
            return what, command
    return None
