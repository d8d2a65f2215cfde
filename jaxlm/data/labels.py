"""The labels of examples: which there are, and which of them a model knows."""

import logging
from collections import Counter
from collections.abc import Callable

from ml_collections import ConfigDict

from jaxlm.config.tasks import task_of
from jaxlm.data.example_records import examples_of, training_examples
from jaxlm.data.files.tables import refuse
from jaxlm.data.transforms import label_of, split_names, words_of
from jaxlm.errors import DataError

LOGGER = logging.getLogger("jaxlm")
MANY = 20  # examples, to believe that half as many labels are none


def label_list(example: dict) -> list[str]:
    return [label_of(example["label"])]


def several_labels(example: dict) -> list[str]:
    return split_names(example["label"])


def tag_list(example: dict) -> list[str]:
    return words_of(example["tags"])


NAMES = {  # Task.answer -> the labels of an example
    "class": label_list,
    "labels": several_labels,
    "tags": tag_list,
}


def label_names(config: ConfigDict) -> tuple[str, ...]:
    """The classes or tags of config.data.labels, or of the training examples, sorted: 2 before 10.

    Raises DataError where they are no labels to learn: one alone, an empty one, or nearly as many as examples.
    """
    task = task_of(config)
    train = config.data.train
    if config.data.labels or not task.has_label_names:
        return tuple(map(str, config.data.labels))
    examples = training_examples(config.data, task.name)
    counts = Counter()
    for example in examples:
        counts.update(NAMES[task.answer](example))
    names = sorted(counts)
    if all(map(str.isdecimal, counts)):
        names.sort(key=len)
    if task.answer == "class" and "" in counts:
        refuse_empty_labels(config)
    if task.answer == "class" and len(examples) >= MANY and len(names) > len(examples) / 2:
        hint = 'Are the columns in another order? Say --config.data.columns="text=1 label=0"'
        if config.data.columns:
            hint = f"Are config.data.columns={config.data.columns!r} right?"
        raise DataError(
            f"{train}: {len(names):,} different labels in {len(examples):,} examples, such as {names[0][:60]!r}: that "
            f"is no classification. {hint}, or give config.data.labels"
        )
    if len(names) < 2 and task.answer != "labels":
        raise DataError(
            f"{train}: every example has the label {''.join(names)!r}; there is nothing to tell apart"
        )
    return tuple(names)


def refuse_empty_labels(config: ConfigDict) -> None:
    """Raises DataError that names the training examples without a label."""
    bad = []
    examples, places = examples_of(config.data.train, config.task.name, config.data.columns)
    for example, place in zip(examples, places):
        if not label_of(example["label"]):
            bad.append(f"{place}: its label is empty")
    refuse(bad)


def with_known_labels(
    examples: list[dict], places: list[str], config: ConfigDict
) -> tuple[list[dict], list[str]]:
    """Those whose labels the model knows, and where they are from; a warning says how many others there are.

    All of them where it knows the labels of none: then these are probably no labels, which is refused later.
    """
    names_of = NAMES.get(task_of(config).answer)
    known = set(label_names(config))
    kept = []
    kept_places = []
    others = Counter()
    for example, place in zip(examples, places):
        unknown = labels_beside(example, names_of, known)
        others.update(unknown)
        if not unknown:
            kept.append(example)
            kept_places.append(place)
    if not others or not kept:
        return examples, places
    most = ", ".join(f"{name[:40]!r} {count:,}" for name, count in others.most_common(5))
    if len(others) > 5:
        most += ", ..."
    LOGGER.warning(
        f"left out of all figures: {len(examples) - len(kept):,} of {len(examples):,} examples, whose labels the model "
        f"was not trained with, so that it can't be right there: {most}"
    )
    return kept, kept_places


def labels_beside(example: dict, names_of: Callable | None, known: set[str]) -> set[str]:
    """The labels of an example that are not among these; none where it has no labels, or odd ones."""
    if names_of is None:
        return set()
    try:
        return {name for name in names_of(example) if name and name not in known}
    except (KeyError, ValueError, TypeError, AttributeError):
        return set()
