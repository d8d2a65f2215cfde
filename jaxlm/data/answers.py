"""Where an answer lies in its context, in characters and in tokens."""

import re

import numpy as np

# Bits of the targets of task qa: the answer's first and last token, and where it may lie.
START = 1
STOP = 2
ALLOWED = 4


def place_of_answer(example) -> tuple[str, int]:
    """(the answer without white space around it, its first character in the context); ("", 0) where there is none.

    Raises ValueError where the answer is not in the context, or not where `start` says.
    """
    context = example["context"]
    answer = first_of(example["answer"])
    start = first_of(example.get("start", -1))
    if not answer or not answer.strip():
        return "", 0
    start = whole_number(-1 if start in ("", None) else start, "start")
    there = context[start : start + len(answer)]
    if start >= 0 and there != answer:
        raise ValueError(
            f"at character start={start} of its context is {there[:40]!r}, not the answer {answer[:40]!r}; without the "
            "column start the answer is looked for"
        )
    if start < 0:
        start = context.find(answer)
    if start < 0:
        raise ValueError(f"its answer {answer[:60]!r} is not in its context")
    return answer.strip(), start + len(answer) - len(answer.lstrip())


def first_of(value):
    """The first of a list, None of an empty one; else the value."""
    if isinstance(value, (list, tuple)):
        return value[0] if value else None
    return value


def whole_number(value, name: str) -> int:
    """Raises ValueError where a value, which may be a text, is no whole number."""
    try:
        number = float(value)
    except (ValueError, TypeError):
        number = float("nan")
    if not number.is_integer():
        raise ValueError(f"its {name} {str(value)[:60]!r} is not a whole number")
    return int(number)


def tokens_of(start: int, stop: int, offsets: np.ndarray) -> tuple[int, int]:
    """The first and the last token of characters `start` to `stop`; a space in front goes with the word after it.

    Raises ValueError where no token stands for them.
    """
    inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
    if not len(inside):
        raise ValueError("the tokenizer has no token for its answer")
    first = int(inside[0])
    last = int(inside[-1])
    while first > 0 and (offsets[first - 1] == offsets[first, 0]).all():
        first -= 1
    return first, last


def encode_context(context: str, encode) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [ids] of the words of a context with one space between two, int64 [ids, 2]: the characters of each).

    The characters are those of the context as it stands, without spaces around a token's.
    """
    spans = list(map(re.Match.span, re.finditer(r"\S+", context)))
    text = " ".join(context.split())
    ids, offsets = encode.with_offsets(text)
    offsets = without_spaces(text, offsets)
    # The place of each character of `text` in the context; a space is at the end of the word before it.
    places = [np.arange(begin, end + 1) for begin, end in spans] or [np.zeros(1, int)]
    places = np.concatenate(places)
    begin = offsets[:, 0]
    end = offsets[:, 1]
    after = np.where(begin < end, places[end - 1] + 1, places[begin])
    return ids, np.stack([places[begin], after], axis=1)


def without_spaces(text: str, offsets: np.ndarray) -> np.ndarray:
    """Offsets [tokens, 2] without the space that a token begins or ends with. text: has single spaces, no others."""
    spaces = np.array([character == " " for character in text] + [False])
    begin = offsets[:, 0]
    end = offsets[:, 1]
    begin = begin + (spaces[begin] & (begin < end))
    end = end - (spaces[end - 1] & (begin < end))
    return np.stack([begin, end], axis=1)


def answer_text(example, encode, first: int, last: int) -> str:
    """The characters of the context that tokens `first` to `last` of `qa`'s piece stand for; "" for the first token."""
    ids, offsets = encode_context(example["context"], encode)
    before = 2 + len(encode(example["question"]))
    first -= before
    last -= before
    if first < 0 or last < first or last >= len(ids):
        return ""
    return example["context"][offsets[first, 0] : offsets[last, 1]].strip()
