"""What a file is by its first bytes, whatever its name says; its bytes without compression, as UTF-8."""

import bz2
import codecs
import lzma
import re
import shlex
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from jaxlm.data.files import encodings

HEAD_BYTES = 64 << 10  # enough to see what a file is
COMPRESSIONS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to skip
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}


class Unread(NamedTuple):
    """A format that is not read: its first bytes, its name for people, and what makes something of it that is read.

    In `to_text` and `to_examples`, {file} is the quoted path, {path} the plain one, {parquet} that of a new file.
    """

    pattern: re.Pattern
    what: str
    to_text: str = ""  # the command that takes its text out
    to_examples: str = ""  # what to do for a table of examples, where that is something else


# A comma between, double quotes, UTF-8.
TO_CSV = (
    'save it as "CSV UTF-8" where it was made, or type (LibreOffice): '
    "soffice --headless --convert-to csv:'Text - txt - csv (StarCalc)':44,34,76 {file}"
)
TO_PARQUET = (
    'write it as parquet: python -c "from pyarrow import feather, parquet; '
    'parquet.write_table(feather.read_table({path!r}), {parquet!r})"'
)
ZIP = re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08)")
ARCHIVES = (
    Unread(ZIP, "a zip archive", "unzip {file} -d FOLDER"),
    Unread(re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive", "7z x {file} -oFOLDER"),
    Unread(re.compile(rb"Rar!\x1a\x07"), "a rar archive", "unrar x {file} FOLDER/"),
    Unread(
        re.compile(rb".{257}ustar", re.DOTALL),
        "a tar archive",
        "mkdir FOLDER && tar -xf {file} -C FOLDER",
    ),
    Unread(re.compile(rb"\x04\x22\x4d\x18"), "compressed with lz4", "lz4 -d {file} TEXT"),
    Unread(re.compile(rb"\x1f\x9d"), "compressed with compress", "gzip -dc {file} > TEXT"),
    Unread(re.compile(rb"%PDF-"), "a PDF", "pdftotext {file} TEXT"),
    Unread(re.compile(rb"\{\\rtf1"), "an RTF document", "pandoc -f rtf -t plain {file} -o TEXT"),
    Unread(
        re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
        "a file of an older Excel or Word",
        "soffice --convert-to txt:Text {file}",
        TO_CSV,
    ),
    Unread(
        re.compile(rb"SQLite format 3\0"),
        "an SQLite database",
        "sqlite3 -csv -header {file} 'select * from TABLE' > TABLE.csv",
    ),
)
# What a zip archive is by the names of the files in it, where it is a document.
ZIPPED = (
    Unread(re.compile(rb"word/"), "a Word document", "pandoc -f docx -t plain {file} -o TEXT"),
    Unread(
        re.compile(rb"application/epub"), "an EPUB book", "pandoc -f epub -t plain {file} -o TEXT"
    ),
    Unread(
        re.compile(rb"application/vnd.oasis|content\.xml"),
        "an OpenDocument file",
        "pandoc -f odt -t plain {file} -o TEXT",
        TO_CSV,
    ),
    Unread(re.compile(rb"xl/"), "an Excel workbook", "soffice --convert-to csv {file}", TO_CSV),
)
ARROW = Unread(re.compile(rb"ARROW1\0\0|FEA1\0"), "an Arrow file", to_examples=TO_PARQUET)
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
    (ARROW.pattern, ARROW.what),
    (re.compile(rb"Obj\x01"), "an Avro file"),
    (re.compile(rb"wOF[F2]\0|\0\x01\0\0\0|OTTO\0"), "a font"),
)
PARQUET = b"PAR1\x15"  # the first bytes of a parquet file
DECOMPRESS = {"": "cat", "gzip": "gzip -dc", "zstd": "zstd -dc", "bz2": "bzip2 -dc", "xz": "xz -dc"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")  # endings of names
PACKED = (*COMPRESSED, ".utf8")  # what a name may end with after its kind; .utf8 is of to_utf8_line
MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
# What reading a compressed or encoded file may raise.
BROKEN = (OSError, EOFError, lzma.LZMAError, UnicodeError)


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
    """Text in an encoding of MARKS, as UTF-8 without the mark. Raises UnicodeError where it is broken."""
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


def first_bytes(path: str, name: str, size: int = HEAD_BYTES) -> bytes:
    """The first bytes of what is in a file; none of one that breaks off there, which reading it reports."""
    try:
        with open_stream(path, name) as stream:
            return stream.read(size)
    except BROKEN:
        return b""


def is_parquet(head: bytes) -> bool:
    """Whether a file with these first bytes is parquet."""
    return head.startswith(PARQUET)


def encoding_label(head: bytes) -> str:
    """The encoding of a file with these first bytes, for people: UTF-8, UTF-16LE, ..."""
    name = encoding(head)
    if not name:
        return "UTF-8"
    little, _ = MARKS[name]
    return name.upper() + ("LE" if head.startswith(little) else "BE")


def refusal(path: str, suffix: str, name: str, head: bytes) -> str:
    """Why a file of text is not read and what to type, else "".

    Its name ends with `suffix` but for its compression, `name`; `head` is what `first_bytes` gives. A .parquet is not
    looked into.
    """
    reason = container_refusal(path, name, head)
    if reason or suffix == ".parquet":
        return reason
    return text_refusal(path, name, head)


def container_refusal(path: str, name: str, head: bytes, for_examples: bool = False) -> str:
    """Why what is in a file has to be taken out of it first, and what to type, else ""."""
    found = _unread_format(path, head)
    if for_examples and found is None and ARROW.pattern.match(head):
        found = ARROW
    if found and for_examples and found.to_examples:
        return f"{found.what}, which is not read; {_filled(found.to_examples, path)}"
    if found:
        command = _filled(found.to_text, path)
        return f"{found.what}, which is not read; take the text out first: {command}"
    if name and compression(head):
        new = before_suffix(path, ".inner")
        return f"compressed twice; take the outer one off: {shell_line(path, name, '', new)}"
    return ""


def text_refusal(path: str, name: str, head: bytes) -> str:
    """Why a file holds no text that is read, and what to type, else ""."""
    if encoding(head):
        return ""
    if is_parquet(head):
        new = path + ".parquet"
        return f"parquet, which is read by itself only: {shell_line(path, name, '', new)}"
    for pattern, what in BINARIES:
        if pattern.match(head):
            return f"{what}, which is no text; leave it out"
    found = encodings.diagnose(head)
    if not found:
        return ""
    if not found.encoding:
        return f"{found.reason}; leave it out, or give the text that is in it"
    condition = f"if it is {found.encoding} (a guess), convert it"
    if found.encoding.startswith("UTF"):
        condition = f"if it is {found.encoding} without a byte order mark, convert it"
    return f"{found.reason}; {condition}: {to_utf8_line(path, name, found.encoding)}"


def to_utf8_line(path: str, name: str, code: str) -> str:
    """The line for the shell that writes the text of a file anew, in UTF-8 and without its compression."""
    return shell_line(path, name, f"iconv -f {code} -t UTF-8", before_suffix(path, ".utf8"))


def shell_line(path: str, name: str, command: str, new: str) -> str:
    """A line for the shell that puts the text of a file through a command, if any, into the new file."""
    steps = [f"{DECOMPRESS[name]} {shlex.quote(path)}"]
    if command:
        steps.append(command)
    return f"{' | '.join(steps)} > {shlex.quote(new)}"


def suffix_of(path: str) -> str:
    """ ".tsv" of "train.tsv.gz", in lower case."""
    return unpacked(path).suffix.lower()


def unpacked(path: str) -> Path:
    """ "train.tsv" of "train.tsv.gz"."""
    file = Path(path)
    while file.suffix.lower() in PACKED:
        file = file.with_suffix("")
    return file


def before_suffix(path: str, word: str) -> str:
    """The path with a word before its suffix, which says what is in it; without the one of a compression."""
    plain = Path(path)
    if plain.suffix.lower() in COMPRESSED:
        plain = plain.with_suffix("")
    return str(plain.with_name(plain.stem + word + plain.suffix))


def _unread_format(path: str, head: bytes) -> Unread | None:
    """The row of ARCHIVES that a file is, or of ZIPPED."""
    if ZIP.match(head):
        names = head
        if zipfile.is_zipfile(path):  # not so where the archive is compressed once more
            with zipfile.ZipFile(path) as archive:
                names += "\n".join(archive.namelist()).encode()
        for kind in ZIPPED:
            if kind.pattern.search(names):
                return kind
    for kind in ARCHIVES:
        if kind.pattern.match(head):
            return kind
    return None


def _filled(command: str, path: str) -> str:
    parquet = str(Path(path).with_suffix(".parquet"))
    return command.format(file=shlex.quote(path), path=path, parquet=parquet)
