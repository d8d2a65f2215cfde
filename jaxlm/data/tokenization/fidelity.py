"""How much of a text its tokenizer keeps: what becomes unknown tokens, and what doesn't come back from the tokens."""

import re
from collections import Counter

import numpy as np

from jaxlm.data.tokenization.tokenizer import Tokenizer

MOST_UNKNOWN = 0.01  # of the text: more is refused, unless it is allowed
SAMPLED_PIECES = 100  # of a split of a part, the first, are decoded again ...
SAMPLED_CHARS = 2000  # ... as far as this
SHOWN = 5  # examples
SHOWN_CHARS = 20  # of an example
KEPT_EXAMPLES = 1000  # while a part is read
# What is often changed: in words, how to find it in a text, and a text that shows it.
SPACES = (
    ("newlines are lost", r"\n", "a\nb"),
    ("tabs are lost", r"\t", "a\tb"),
    ("runs of spaces shrink", r"  ", "a  b"),
)
KINDS = (
    *SPACES,
    ("capital letters are lost", r"[A-Z\u00c0-\u00de\u0391-\u03a9\u0410-\u042f]", "Ab"),
    ("accents are lost", r"[\u00e0-\u00fe\u0100-\u017f\u0300-\u036f]", "\u00e9"),
    (
        "compatibility characters are replaced",
        r"[\u00bc-\u00be\u2026\u2122\u3000\ufb00-\ufb06\uff01-\uff5e]",
        "\ufb01",
    ),
)


class Kept:
    """Counts what a tokenizer keeps of the texts that it is shown."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens = 0
        self._characters = 0
        self._sampled = 0
        self._changed = 0
        self._lost = Counter()
        self._kinds = Counter()
        self._example: tuple[str, str] | None = None

    def inspect(self, text: str, ids: np.ndarray) -> None:
        """text, and the int32 ids that it was written as. Looks closer only where something may be missing."""
        complete = not self._tokenizer.may_lose(ids) or not self._count_lost(text, ids)
        if self._sampled < SAMPLED_PIECES:
            self._sampled += 1
            self._compare(text[:SAMPLED_CHARS], complete)

    def record(self) -> dict:
        """All counts, as JSON."""
        return {
            "unknown_tokens": self._tokens,
            "unknown_characters": self._characters,
            "lost": dict(self._lost.most_common(SHOWN)),
            "sampled": self._sampled,
            "changed": self._changed,
            "kinds": dict(self._kinds),
            "example": self._example,
        }

    def _count_lost(self, text: str, ids: np.ndarray) -> int:
        """How many characters of the text are unknown."""
        lost = self._tokenizer.lost(text)
        self._tokens += int(np.sum(ids == self._tokenizer.unknown_id))
        for stretch in lost:
            shown = shortened(stretch)
            if shown in self._lost or len(self._lost) < KEPT_EXAMPLES:
                self._lost[shown] += 1
        characters = sum(map(len, lost))
        self._characters += characters
        return characters

    def _compare(self, text: str, complete: bool) -> None:
        """Counts what is other in the text after encoding and decoding, but for a space before it.

        complete: whether it has no unknown text; else only changes of white space are counted.
        """
        back = self._tokenizer.decode(self._tokenizer.encode(text))
        if same(text, back):
            return
        kinds = KINDS if complete else SPACES
        found = [name for name, pattern, _ in kinds if _has_fewer(pattern, text, back)]
        self._kinds.update(found)
        if found or complete:
            self._changed += 1
        if complete and not found and self._example is None:
            self._example = _first_difference(text, back)


def add(records: list[dict]) -> dict:
    """The records of all parts together; an older version's lack what it didn't count."""
    total = Counter()
    lost = Counter()
    kinds = Counter()
    examples = []
    for record in records:
        for key in ("unknown_tokens", "unknown_characters", "sampled", "changed"):
            total[key] += record.get(key, 0)
        lost.update(record.get("lost", {}))
        kinds.update(record.get("kinds", {}))
        examples.append(record.get("example"))
    example = next(filter(None, examples), None)
    return {
        **total,
        "lost": dict(lost.most_common(SHOWN)),
        "kinds": dict(kinds),
        "example": example,
    }


def unknown_in_words(kept: dict) -> str:
    """What of a text is unknown, for people. kept: of `add`, with how many `tokens` and `characters` it has."""
    unknown = kept["unknown_tokens"]
    lost = kept["unknown_characters"]
    tokens = kept["tokens"]
    characters = kept["characters"]
    share = lost / max(1, characters)
    examples = ", ".join(map(repr, kept["lost"]))
    text = f"{share:.2%} of the text ({lost:,} of {characters:,} characters), such as {examples}"
    if not unknown:
        return f"{text}, has no token in this tokenizer and is lost"
    part = f"{unknown:,} of {tokens:,} tokens ({unknown / max(1, tokens):.1%})"
    return f"{part} are the tokenizer's unknown token: {text}, is lost"


def give_back_in_words(kept: dict, tokenizer: Tokenizer) -> str | None:
    """A line on what does not come back from the tokens, None where all does. kept: of `add`."""
    if not kept.get("changed"):
        return None
    share = kept["changed"] / kept["sampled"]
    changes = []
    for name, _, probe in KINDS:
        if kept["kinds"].get(name):
            changes.append(name + _shown_change(tokenizer, probe))
    if kept["example"]:
        before, after = kept["example"]
        changes.append(f"{before!r} comes back as {after!r}")
    return (
        f"this tokenizer doesn't give the text back: {', '.join(changes)}; in {share:.0%} of the documents "
        f"({kept['sampled']:,} were looked at)"
    )


def _shown_change(tokenizer: Tokenizer, probe: str) -> str:
    """What becomes of a text, "" where it comes back, or is of words that the tokenizer doesn't know."""
    back = tokenizer.decode(tokenizer.encode(probe))
    if not back or back == probe or tokenizer.lost(probe):
        return ""
    return f" ({probe!r} comes back as {back!r})"


def shortened(text: str) -> str:
    text = text.strip("\u2581 ") or text
    if len(text) <= SHOWN_CHARS:
        return text
    return text[: SHOWN_CHARS - 3] + "..."


def same(text: str, back: str) -> bool:
    """Whether two texts are the same but for one space at the beginning, which some tokenizers put or take."""
    return back in (text, f" {text}") or text == f" {back}"


def _has_fewer(pattern: str, text: str, back: str) -> bool:
    return len(re.findall(pattern, text)) > len(re.findall(pattern, back))


def _first_difference(text: str, back: str) -> tuple[str, str]:
    """The first place at which two texts part, with some of what stands around it."""
    place = min(len(text), len(back))
    for i, (one, other) in enumerate(zip(text, back)):
        if one != other:
            place = i
            break
    start = max(0, place - 8)
    return text[start : place + 8], back[start : place + 8]
