"""Named entities in tags of BIO and BIOES, and how many are found: the arithmetic of conlleval.

Own code: seqeval, the library for this, has had no release since 2020, and reads a tag of another kind, such as <pad>,
as an entity.
"""

import re
from collections import Counter
from collections.abc import Sequence

BIO = re.compile(r"O|[BIES](-.*)?", re.DOTALL)  # also BIOES, where E and S end an entity


def entity_rates(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> dict:
    """entity_precision, entity_recall, entity_f1 over all sentences, and `entities`, a row for each type."""
    found = entities_of(predicted)
    true = entities_of(gold)
    counts = []
    for group in (found & true, found, true):
        counts.append(Counter(kind for *_, kind in group))
    right, predicted_kinds, gold_kinds = counts

    overall = rates(right.total(), len(found), len(true))
    rows = []
    for kind in sorted({*predicted_kinds, *gold_kinds}):
        row = rates(right[kind], predicted_kinds[kind], gold_kinds[kind])
        rows.append({"name": kind, **row})
    return {
        "entity_precision": overall["precision"],
        "entity_recall": overall["recall"],
        "entity_f1": overall["f1"],
        "entities": rows,
    }


def entities_of(sentences: Sequence[Sequence[str]]) -> set[tuple[int, int, int, str]]:
    """(sentence, first token, token after the last, type) of all entities."""
    found = set()
    for i, tags in enumerate(sentences):
        for entity in entities(tags):
            found.add((i, *entity))
    return found


def rates(right: int, found: int, true: int) -> dict:
    """precision, recall and f1 of `found` items, of which `right` are among the `true`, and the count of these."""
    return {
        "precision": right / max(found, 1),
        "recall": right / max(true, 1),
        "f1": 2 * right / max(found + true, 1),
        "count": true,
    }


def entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first token, token after the last, type) of each entity of a sentence.

    As conlleval has it, an I- that follows O or another type begins an entity as B- does, and whatever begins one ends
    the one before. A tag that is none of BIOES is O.
    """
    found = []
    begin = None  # of the entity that is open
    last = "O"
    kind = ""
    for i, tag in enumerate([*tags, "O"]):
        if not BIO.fullmatch(tag):
            tag = "O"
        mark, _, new = tag.partition("-")
        begins = mark != "O" and (mark in "BS" or last in "OES" or new != kind)
        if begin is not None and (begins or mark == "O"):
            found.append((begin, i, kind))
            begin = None
        if begins:
            begin = i
        last = mark
        kind = new
    return found
