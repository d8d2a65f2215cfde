"""Which figures have no meaning on the data at hand, and why: a line for each reason.

jaxlm/evaluate/metrics.py leaves such figures out. These lines are about the figures that were expected.
"""

from collections.abc import Sequence

import numpy as np

CORRELATIONS = ("pearson", "spearman")


def of_classes(figures: dict) -> list[str]:
    """figures: what metrics.classification gives."""
    rows = figures["classes"]
    lines = []
    if "auc" not in figures:
        occurring = next(row["name"] for row in rows if row["count"])
        lines.append(
            f"auc is left out: every example is of the class {occurring}, and it compares two"
        )
    if len(rows) == 2 and "f1_positive" not in figures:
        lines.append(
            f"f1_positive is left out: no example is of the class {rows[1]['name']}, and none is taken for it"
        )
    return lines


def of_sets(figures: dict) -> list[str]:
    """figures: what metrics.multilabel gives."""
    lines = []
    if "f1" not in figures:
        lines.append("f1 and f1_micro are left out: no example has a label, and none is predicted")
    if "auc" not in figures:
        lines.append(
            "auc is left out: each label is true of every example or of none, and it compares both"
        )
    return lines


def of_numbers(figures: dict, predictions: Sequence[float], labels: Sequence[float]) -> list[str]:
    """figures: what metrics.regression gives of these."""
    lines = []
    missing = without(figures, CORRELATIONS)
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        why = why_uncorrelated(predictions, labels)
        lines.append(f"{' and '.join(missing)} {verb} left out: {why}")
    lost = without(figures, ("mse", "mae"))
    if lost:
        lines.append(f"{' and '.join(lost)} left out: the errors are too large for a float64")
    return lines


def without(figures: dict, names: Sequence[str]) -> list[str]:
    """The names that are not among the figures."""
    return [name for name in names if name not in figures]


def why_uncorrelated(predictions: Sequence[float], labels: Sequence[float]) -> str:
    if len(labels) == 1:
        return "there is one example, and a correlation needs two"
    if np.min(labels) == np.max(labels):
        return f"every label is {labels[0]:g}, and a correlation needs values that differ"
    if np.min(predictions) == np.max(predictions):
        return "every prediction is the same, and a correlation needs values that differ"
    return "the values are too near to each other, or too large, for a correlation"


def of_tags(figures: dict, names: Sequence[str]) -> list[str]:
    """figures: what metrics.tagging gives. names: of all tags that the model knows."""
    has_entities = any(name.startswith(("B-", "I-")) for name in names)
    if has_entities and "entity_f1" not in figures:
        return [
            "entity_precision, entity_recall and entity_f1 are left out: there is no entity, and none is predicted"
        ]
    return []


def of_groups(parts: dict[str, dict]) -> list[str]:
    """parts: the figures of each group. A line for each figure that some groups have and others don't."""
    names = {}
    for figures in parts.values():
        names |= dict.fromkeys(figures)
    lines = []
    for name in names:
        groups = [group for group, figures in parts.items() if name not in figures]
        if not groups:
            continue
        some = ", ".join(groups[:5])
        if len(groups) > 5:
            some += ", ..."
        lines.append(
            f"{name} has no meaning in {len(groups):,} of {len(parts):,} groups, and is empty there: {some}"
        )
    return lines
