"""Bytes to text, in blocks, lines or pieces, with notes of what was odd about them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

PIECE_BYTES = 64 << 10  # of text to encode at a time: sentencepiece is half as fast on 1 MiB


class Piece(NamedTuple):
    """Some text of a document: never empty, about PIECE_BYTES at most."""

    text: str
    first: bool  # the document starts with it
    last: bool  # the document ends with it


@dataclass
class Notes:
    """What was odd about a part. `bad` and `broken` list the sources by name."""

    counts: Counter = field(default_factory=Counter)  # the keys of prepare.COUNTS
    # (source, record, reason), of each of the first reasons the first places
    bad: list[tuple[str, int, str]] = field(default_factory=list)
    reasons: Counter = field(default_factory=Counter)  # how often each of these was the reason
    broken: list[tuple[str, str, int]] = field(
        default_factory=list
    )  # (source, reason, records read)
    records: dict[str, int] = field(default_factory=dict)  # lines or rows seen, by source


def character(data: bytes | bytearray, index: int) -> int:
    """Where the UTF-8 character that has byte `index` starts."""
    for start in range(index, index - 4, -1):
        if data[start] & 0xC0 != 0x80:
            return start
    return index


def texts(blocks: Iterable[bytes], notes: Notes) -> Iterator[str]:
    """Text in blocks that are cut between characters, without a byte order mark."""
    rest = b""
    first = True
    for block in blocks:
        data = rest + block
        cut = character(data, len(data) - 1) if data else 0
        text = decode(data[:cut], notes)
        rest = data[cut:]
        if first and text.startswith("\ufeff"):
            notes.counts["byte_order_marks"] += 1
            text = text[1:]
        first = first and not text
        yield text
    yield decode(rest, notes)


def lines(blocks: Iterable[bytes], notes: Notes) -> Iterator[bytes]:
    """Lines of any length, without their ends; not the last one of a file that breaks off."""
    known = len(notes.broken)
    rest = []
    for block in blocks:
        *whole, tail = block.split(b"\n")
        if whole:
            yield b"".join(rest) + whole[0]
            yield from whole[1:]
            rest = []
        rest.append(tail)
    if len(notes.broken) == known and any(rest):
        yield b"".join(rest)


def pieces(
    blocks: Iterable[bytes], notes: Notes, starts: bool = True, ends: bool = True
) -> Iterator[Piece]:
    """Cuts one document (or, without `starts` or `ends`, a stretch of one) where a line ends in the second half of each
    PIECE_BYTES, else between two characters. The cuts depend on the document, not on the blocks that it comes in."""
    buffer = bytearray()
    for block in blocks:
        buffer += block
        done = 0
        while len(buffer) - done > PIECE_BYTES:  # so that something is left to end with
            end = done + PIECE_BYTES
            cut = buffer.rfind(b"\n", done + PIECE_BYTES // 2, end) + 1 or character(buffer, end)
            yield Piece(decode(buffer[done:cut], notes), starts, False)
            starts = False
            done = cut
        del buffer[:done]
    yield Piece(decode(buffer, notes), starts, ends)


def decode(data: bytes | bytearray, notes: Notes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        notes.counts["replaced_bytes"] += text.count("\ufffd") - data.count("\ufffd".encode())
        return text
