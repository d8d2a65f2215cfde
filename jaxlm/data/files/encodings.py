"""Whether bytes are text in UTF-8; of text that isn't, a guess at its encoding."""

import codecs
import re
from typing import NamedTuple

# No text has these, but for a stray one. Tab, line ends, form feed, backspace and escape (colours) are text.
CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b")) + b"\x7f"
NUL_SHARE = 0.2  # of the bytes; above, they are no UTF-8
CONTROL_SHARE = 0.05  # of the bytes; above, they are no text ...
CONTROL_COUNT = 4  # ... where they are as many at least
# (count, share) of bytes that are invalid in UTF-8: from any of them on, a file is in another encoding.
INVALID = ((3, 0.02), (10, 0.003))
# Of control characters in valid UTF-8: below, they stand between the fields of a text.
SEPARATOR_SHARE = 0.3
# Of bytes that are ASCII: text of one byte a character has more, UTF-16 fewer.
PRINTABLE_SHARE = 0.7
# Text in an encoding of one or two bytes has fewer control characters, binary data more.
LEGACY_CONTROLS = 0.01
# UTF-16 has at least these: its spaces, line ends and digits have a zero byte.
WIDE_CONTROLS = 0.005
WIDE_SHARE = 0.9  # of the characters of UTF-16 text that are in LETTERS
# ASCII, Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Indic, Thai, Georgian, punctuation, Chinese, kana, Hangul.
LETTERS = re.compile(
    "[\t\n\r -~\u00a0-\u017f\u0370-\u06ff\u0900-\u0e7f\u10a0-\u10ff\u1e00-\u1fff\u2010-\u2027\u3001-\u30ff"
    "\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff9f]"
)
SPACES = re.compile("[ \n\u3000-\u3002\uff0c]")
KANA = re.compile("[\u3040-\u30ff]")
HANGUL = re.compile("[\uac00-\ud7a3]")
# Encodings of two bytes: the characters that are a share of a text in it at least. Japanese has Chinese characters too.
EAST_ASIAN = (("CP932", KANA, 0.2), ("EUC-JP", KANA, 0.2), ("CP949", HANGUL, 0.95))
# Encodings of Chinese: the first bytes of the characters in common use, which are the most of any text.
CHINESE = (("GB18030", "gb2312", b"\xb0", b"\xd7"), ("BIG5", "big5", b"\xa4", b"\xc6"))
CHINESE_SHARE = 0.6
# Encodings of one byte: what is frequent among the letters beyond ASCII.
LATIN = {
    "WINDOWS-1252": "éèêëàâäáãåöóôõøüúùûíìîïßñçæœ«»°§£\u2018\u2019\u201c\u201d\u2013\u2014",
    "WINDOWS-1250": "ąćęłńóśźżáčďéěíňřšťúůýžőűöüôäĺľŕţâăș",
    "WINDOWS-1254": "ışğüöçâîİŞ",
}
RUSSIAN = "оеаинтсрвлкмдпуяыьгзбйч"
OTHER_SCRIPTS = {
    "WINDOWS-1251": RUSSIAN,
    "KOI8-R": RUSSIAN,
    "CP866": RUSSIAN,
    "ISO-8859-5": RUSSIAN,
    "WINDOWS-1253": "αοιετσνηυρπκμλςάίόέήώ",
    "WINDOWS-1255": "יוהלאמרתבשנםפדקעחכ",
    "WINDOWS-1256": "اليمنتربهودعسكفقح",
    "TIS-620": "านรอกเงมยลวดทสตะปบคห่้",
}
ISO_2022_JP = re.compile(rb"\x1b\$[@B].*\x1b\([BJ]", re.DOTALL)


class Diagnosis(NamedTuple):
    """Why bytes are not read as UTF-8, and what iconv may convert them from: "" where they are no text at all."""

    reason: str
    encoding: str


def diagnose(head: bytes) -> Diagnosis | None:
    """What speaks against reading a file that begins with these bytes as UTF-8; None where nothing does."""
    if ISO_2022_JP.search(head):
        return Diagnosis("not UTF-8: it switches character sets by escapes", "ISO-2022-JP")
    size = len(head)
    controls = count_controls(head)
    invalid = count_invalid(head)
    reason = reason_against(head, controls, invalid)
    if not reason:
        return None
    encoding = ""
    if controls > WIDE_CONTROLS * size:
        encoding = guess_wide(head)
    if not encoding and not invalid and controls <= SEPARATOR_SHARE * size:
        return None
    if not encoding and controls <= LEGACY_CONTROLS * size:
        encoding = guess_narrow(head)
    if encoding:
        return Diagnosis(reason, encoding)
    share = f"{controls / size:.0%}"
    return Diagnosis(f"not text: {share} control characters, {invalid:,} invalid in UTF-8", "")


def reason_against(head: bytes, controls: int, invalid: int) -> str:
    """Why these bytes are no UTF-8, as far as counts say; "" where they may be."""
    size = len(head)
    nul = head.count(0)
    if nul > NUL_SHARE * size:
        return f"{nul / size:.0%} NUL bytes, so not UTF-8"
    if controls >= CONTROL_COUNT and controls > CONTROL_SHARE * size:
        return f"{controls / size:.0%} control characters, so not UTF-8"
    for count, share in INVALID:
        if invalid >= count and invalid > share * size:
            return f"not UTF-8: {invalid / size:.1%} of its bytes are invalid in it"
    return ""


def count_controls(head: bytes) -> int:
    return len(head) - len(head.translate(None, CONTROLS))


def count_invalid(head: bytes) -> int:
    """How many bytes or sequences UTF-8 doesn't have, but for one that is cut at the end; 0 where it has more that
    are right, since then the file is UTF-8 with damage."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    replaced = text.count("\ufffd")
    invalid = replaced - head.count("\ufffd".encode())
    right = len(text) - len(text.encode("ascii", "ignore")) - invalid
    if invalid > right:
        return invalid
    return 0


def guess_wide(head: bytes) -> str:
    """UTF-16 or UTF-32 with its byte order, where the bytes are text in it, else ""."""
    if len(re.findall(rb"[ -~]", head)) > PRINTABLE_SHARE * len(head):
        return ""
    best = ""
    best_score = 0.0
    for name in ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"):
        text = head[: len(head) // 4 * 4 or 2].decode(name, errors="replace")
        share = len(LETTERS.findall(text)) / max(1, len(text))
        score = share + len(SPACES.findall(text)) / max(1, len(text))
        if share >= WIDE_SHARE and score > best_score:
            best = name
            best_score = score
    return best


def guess_narrow(head: bytes) -> str:
    """The likeliest encoding of one or two bytes a character. A guess: nothing in a file says it."""
    for name, letters, least in EAST_ASIAN:
        beyond = beyond_ascii(head, name)
        if beyond and len(letters.findall(beyond)) >= least * len(beyond):
            return name
    shares = {}
    for name, codec, low, high in CHINESE:
        shares[name] = share_in_common_use(beyond_ascii(head, name), codec, low, high)
    best = max(shares, key=shares.get)
    if shares[best] >= CHINESE_SHARE:
        return best
    if b" " not in head and b"\n" not in head:  # as hardly any text has it, but UTF-16 of one line
        wide = guess_wide(head)
        if wide:
            return wide
    num_ascii = len(re.findall(rb"[A-Za-z]", head))
    num_beyond = len(re.findall(rb"[\x80-\xff]", head))
    names = OTHER_SCRIPTS if num_beyond > num_ascii else LATIN
    # The first of those that are equal.
    return max(names, key=lambda name: count_frequent(head, name, names[name]))


def windows_or_latin(data: bytes) -> str:
    """WINDOWS-1252 where bytes are used that are letters and quotes in it, and control characters in Latin-1."""
    if not any(byte in data for byte in range(0x80, 0xA0)):
        return "LATIN1"
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "LATIN1"
    return "WINDOWS-1252"


def beyond_ascii(head: bytes, name: str) -> str:
    """The characters beyond ASCII of the bytes; none where they aren't text in this encoding."""
    decoder = codecs.getincrementaldecoder(name)()  # leaves a character that is cut at the end
    try:
        text = decoder.decode(head)
    except UnicodeDecodeError:
        return ""
    return re.sub("[\0-\x7f]", "", text)


def share_in_common_use(text: str, codec: str, low: bytes, high: bytes) -> float:
    """The share of characters whose first byte in this codec lies between `low` and `high`."""
    common = 0
    for character in text:
        first = character.encode(codec, "ignore")[:1]
        common += low <= first <= high
    return common / max(1, len(text))


def count_frequent(head: bytes, name: str, letters: str) -> int:
    """How many of these letters the bytes have, read in this encoding."""
    text = head.decode(name, errors="ignore")
    return sum(map(text.count, letters))
