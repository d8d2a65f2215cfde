"""JSON files: an object a line, one list of objects, or objects of many lines, one after the other.

Examples are read as a whole, documents as a stream: see `read` and `stream_values`.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator

from jaxlm.data.files.example_files import lines_of

NAMES = (".json", ".jsonl", ".ndjson")
LIST_OF_OBJECTS = re.compile(r"\[\s*[{\]]")
SPACE = re.compile(r"\s*")
SPACE_IN_LIST = re.compile(r"[\s,]*")
DECODER = json.JSONDecoder()
OBJECT_CHARS = 32 << 20  # of one value in a stream at most, so that memory is bounded
NO_OBJECT = 'not a JSON object, such as {"text": ..., "label": ...}'
# A record for each question, from articles with paragraphs with questions; no answers are an empty list.
SQUAD = (
    ".data[].paragraphs[] | .context as $context | .qas[] | "
    "{question, context: $context, answer: [.answers[].text], start: [.answers[].answer_start]}"
)


def is_json(text: str, suffix: str) -> bool:
    """Whether a text is JSON, by its name or because it begins with an object or a list of them."""
    if suffix in NAMES:
        return True
    start = text.lstrip()
    if begins_list(start):
        return start.rstrip() == "[]" or object_at(start[1:].lstrip()) is not None
    return start.startswith("{") and is_alone(start)


def begins_list(text: str) -> bool:
    """Whether a text begins with a list of objects, or with an empty list."""
    return LIST_OF_OBJECTS.match(text) is not None


def is_alone(text: str) -> bool:
    """Whether a text begins with an object after which its line ends: a table may have one in a cell."""
    try:
        _, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].partition("\n")[0].strip() == ""


def object_at(text: str) -> dict | None:
    """The object that a text begins with."""
    try:
        value, _ = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return value
    return None


def parse_object(text: str) -> dict | None:
    """The object that a text is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return value
    return None


def read(path: str, text: str, bad: list[str]) -> Iterator[tuple[dict, int]]:
    """The objects, each with its line, or its number in a list. Adds to `bad` what is wrong with the file."""
    for value, number in values_of(path, text, bad):
        if isinstance(value, dict):
            yield value, number
        elif value is not None:
            bad.append(f"{path}:{number}: {NO_OBJECT}")


def values_of(path: str, text: str, bad: list[str]) -> Iterator[tuple[object, int]]:
    """The values, each with its line, or its number in a list; None for one that is broken, which is added to `bad`."""
    start = text.lstrip()
    if begins_list(start):
        for number, value in enumerate(parse(path, text, bad) or [], 1):
            yield value, number
        return
    first = start.partition("\n")[0].rstrip()
    if start.startswith("{") and not first.endswith("}") and object_at(start) is not None:
        yield from many_lines(path, text, bad)
        return
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            yield parse(f"{path}:{number}", line, bad), number


def many_lines(path: str, text: str, bad: list[str]) -> Iterator[tuple[object, int]]:
    """Objects of many lines, one after the other."""
    at = 0
    line = 1
    while True:
        start = SPACE.match(text, at).end()
        if start == len(text):
            return
        line += text.count("\n", at, start)
        try:
            value, at = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            bad.append(f"{path}:{line}: not JSON: {error}")
            return
        yield value, line
        line += text.count("\n", start, at)


def keys_of_lists(value) -> list[str]:
    """The keys of an object under which there are lists of objects."""
    if not isinstance(value, dict):
        return []
    keys = []
    for key, item in value.items():
        if isinstance(item, list) and item and set(map(type, item)) == {dict}:
            keys.append(key)
    return keys


def within(path: str, record: dict) -> str:
    """What to type where the only object of a file holds the examples; "" where it does not."""
    keys = keys_of_lists(record)
    if not keys:
        return ""
    if is_squad(record):
        return f"the articles of SQuAD, with lists within lists; for a question a line, type: {converted(path, SQUAD)}"
    typed = converted(path, f".[{json.dumps(keys[0])}][]")
    return f"one object with lists of objects under {', '.join(keys)}; if those are the examples, type: {typed}"


def is_squad(record: dict) -> bool:
    """Whether an object has articles with paragraphs, as SQuAD's files have them."""
    articles = record.get("data")
    return isinstance(articles, list) and len(articles) > 0 and "paragraphs" in articles[0]


def inside(path: str, record: dict, num_columns: int) -> str:
    """What to type where each record holds an object with so many columns or more; "" where it does not."""
    beside = [value for value in record.values() if not isinstance(value, dict)]
    if len(beside) >= num_columns:  # more likely the columns themselves
        return ""
    for key, value in record.items():
        if isinstance(value, dict) and len(value) >= num_columns:
            typed = converted(path, f".[{json.dumps(key)}]")
            return f"the columns are within {key!r}, which has {', '.join(value)}; take them out: {typed}"
    return ""


def converted(path: str, program: str) -> str:
    """The command by which jq makes lines of examples from a file."""
    return f"jq -c {shlex.quote(program)} {shlex.quote(path)} > {shlex.quote(path + '.jsonl')}"


def parse(place: str, text: str, bad: list[str]):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        bad.append(f"{place}: not JSON: {error}")
        return None


# ---------------------------------------------------------------- a stream


def stream_values(blocks: Iterable[str]) -> Iterator[object]:
    """The elements of a JSON list, or JSON values that follow one another, from text that comes in blocks.

    Raises ValueError where it is broken, breaks off, or has a value above OBJECT_CHARS.
    """
    blocks = iter(blocks)
    buffer, ended = _read_more("", blocks)
    at = SPACE.match(buffer).end()
    in_list = buffer.startswith("[", at)
    at += in_list
    closed = not in_list
    while True:
        between = SPACE if closed else SPACE_IN_LIST
        at = between.match(buffer, at).end()
        if not closed and buffer.startswith("]", at):
            closed = True
            at = SPACE.match(buffer, at + 1).end()
        if in_list and closed and at < len(buffer):
            raise ValueError("something follows the end of the list")
        error = None
        if at < len(buffer):
            try:
                value, end = DECODER.raw_decode(buffer, at)
            except json.JSONDecodeError as broken:
                error = broken.msg
            else:
                if end < len(buffer) or ended:  # else a number may go on
                    yield value
                    at = end
                    continue
        if ended or len(buffer) - at > OBJECT_CHARS:
            break
        buffer, ended = _read_more(buffer[at:], blocks)
        at = 0
    if error:
        raise ValueError(f"broken JSON: {error}")
    if not closed:
        raise ValueError("the list has no end")


def _read_more(rest: str, blocks: Iterator[str]) -> tuple[str, bool]:
    """(twice as much text or more, so that a long value is tried a few times only; whether it was the last)."""
    got = [rest]
    size = len(rest)
    for block in blocks:
        got.append(block)
        size += len(block)
        if size > 2 * len(rest):
            return "".join(got), False
    return "".join(got), True
