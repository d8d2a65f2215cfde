"""Which values of a search space can run at all: the rules of the config, tried before any trial is started."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxlm.config.recipe import set_key
from jaxlm.tune.space import Dimension, ends, inner

COMBINATIONS = 256  # of ends and choices, up to which all are tried; of more, as many at random
PARTNERS = 8  # combinations that can run, in which each value between the ends is tried
SHOWN = 10  # reasons, where nothing can run

Rule = Callable[[ConfigDict], list[str]]  # why a config cannot run; empty where it can


class Tried(NamedTuple):
    values: dict  # {key: value}
    problems: list[str]


class Verdict(NamedTuple):
    problems: list[str]  # values that can never run, or a space of which nothing can
    notes: list[str]  # trials that will be refused, in a search that is worth its time


def judge(config: ConfigDict, space: dict[str, Dimension], rule: Rule) -> Verdict:
    """What of a space a rule refuses, by the ends of its ranges and its choices in all combinations.

    config: the recipe, not resolved. Of an empty space it is the recipe itself that is judged.
    """
    combinations, complete = combinations_of(space)
    tried = []
    refused = []
    running = []
    for values in combinations:
        one = attempt(config, values, rule)
        tried.append(one)
        if one.problems:
            refused.append(one)
        else:
            running.append(one)
    if not running:
        return Verdict(nothing_runs(tried), [])
    never = never_running(space, refused, running)
    notes = refused_between(config, space, running, rule)
    if refused and not never:
        notes.append(some_refused(refused, len(tried)))
    if complete:
        return Verdict(never, notes)
    return Verdict([], never + notes)


def combinations_of(space: dict[str, Dimension]) -> tuple[list[dict], bool]:
    """(combinations of ends and choices, whether they are all)."""
    values = {key: ends(dimension) for key, dimension in space.items()}
    combinations = []
    if math.prod(map(len, values.values())) <= COMBINATIONS:
        for chosen in itertools.product(*values.values()):
            combinations.append(dict(zip(values, chosen)))
        return combinations, True
    rng = random.Random(0)
    for _ in range(COMBINATIONS):
        combinations.append({key: rng.choice(each) for key, each in values.items()})
    return combinations, False


def attempt(config: ConfigDict, values: dict, rule: Rule) -> Tried:
    """The recipe with these values, tried."""
    config = config.copy_and_resolve_references()
    for key, value in values.items():
        set_key(config, key, value)
    return Tried(values, rule(config))


def nothing_runs(tried: list[Tried]) -> list[str]:
    """Every reason why no combination can run, those of the most combinations first."""
    counts = Counter()
    for one in tried:
        counts.update(one.problems)
    reasons = []
    for text, _ in counts.most_common(SHOWN):
        reasons.append(text)
    if len(counts) > SHOWN:
        reasons.append(
            f"and {len(counts) - SHOWN} other reasons why no trial of this --space can run"
        )
    return reasons


def never_running(
    space: dict[str, Dimension], refused: list[Tried], running: list[Tried]
) -> list[str]:
    """A line for each value that no combination can run with, with the reason that most of them have."""
    lines = []
    for key, dimension in space.items():
        good = {one.values[key] for one in running}
        for value in ends(dimension):
            if value in good:
                continue
            reasons = Counter(one.problems[0] for one in refused if one.values[key] == value)
            for reason, _ in reasons.most_common(1):
                lines.append(f"--space={key}={dimension.text}: {value} can never run: {reason}")
    return lines


def refused_between(
    config: ConfigDict, space: dict[str, Dimension], running: list[Tried], rule: Rule
) -> list[str]:
    """A line for each range of a few whole numbers, some of which between its ends are refused."""
    lines = []
    for key, dimension in space.items():
        bad = []
        for value in inner(dimension):
            problems = []
            for one in running[:PARTNERS]:
                problems.append(attempt(config, one.values | {key: value}, rule).problems)
            if all(problems):
                bad.append(value)
                reason = problems[0][0]
        if bad:
            count = len(inner(dimension)) + len(ends(dimension))
            lines.append(
                f"--space={key}={dimension.text}: {len(bad)} of these {count} values will be refused, such as "
                f"{bad[0]}: {reason}; choice:A,B,C leaves them out"
            )
    return lines


def some_refused(refused: list[Tried], count: int) -> str:
    first = refused[0]
    values = " ".join(f"{key}={value}" for key, value in first.values.items())
    return (
        f"--space: {len(refused)} of {count} combinations of its ends and choices will be refused, such as {values}: "
        f"{first.problems[0]}"
    )
