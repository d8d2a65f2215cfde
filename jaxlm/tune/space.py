"""What `jaxlm.tune` searches: keys of the config and the values that they may take, as text and for optuna."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxlm.config.check import ranges
from jaxlm.config.recipe import flatten, nearest_key, override, parse

try:
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
except ImportError:  # the program says so
    BaseDistribution = object

EDGE = 0.05  # part of a range, in its scale: a best value so near to an end says little about what lies beyond
FEW = 32  # whole numbers of a range, up to which each is tried


class Dimension(NamedTuple):
    text: str  # such as log:1e-4:1e-1
    values: BaseDistribution


def read_space(texts: list[str], config: ConfigDict) -> tuple[dict[str, Dimension], list[str]]:
    """({key: dimension}, problems) of KEY=FORM texts, or names of JSON files of {KEY: FORM}."""
    pairs = []
    space = {}
    problems = []
    for text in texts:
        if "=" in text:
            pairs.append(text.split("=", 1))
            continue
        try:
            pairs += json.loads(Path(text).read_text()).items()
        except (OSError, ValueError, AttributeError) as error:
            problems.append(
                f"--space={text}: give KEY=FORM, or a file of {{KEY: FORM}} in JSON ({error})"
            )
    for key, form in pairs:
        try:
            if key in space:
                raise ValueError(f"the key is already searched, {space[key].text}")
            space[key] = Dimension(str(form), distribution(key, str(form), config))
        except ValueError as error:
            problems.append(f"--space={key}={form}: {error}")
    swept = [key for key, dimension in space.items() if is_grid(dimension)]
    if 0 < len(swept) < len(space):
        problems.append(
            f"--space={swept[0]}={space[swept[0]].text}: grid is for all keys or none; write choice:"
        )
    return space, problems


def is_grid(dimension: Dimension) -> bool:
    return dimension.text.startswith("grid:")


def forms(default) -> list[str]:
    """How a key with this default can be searched. A;B;C too, for values with commas in them."""
    kind = type(default).__name__
    lists = ["choice:A,B,C", "grid:A,B,C"]
    if kind == "tuple":
        return []
    if kind in ("int", "float"):
        return [f"{kind}:LOW:HIGH[:STEP]", "log:LOW:HIGH", *lists]
    return lists


def distribution(key: str, form: str, config: ConfigDict) -> BaseDistribution:
    """The values that a key may take. Raises ValueError that says all that is wrong with them."""
    known = flatten(config)
    kind, _, rest = form.partition(":")
    if key not in known:
        raise ValueError(f"no such key{nearest_key(key, known)}")
    default = known[key]
    allowed = {text.partition(":")[0]: text for text in forms(default)}
    if kind not in allowed:
        what = "cannot be searched"
        if allowed:
            what = f"takes {' or '.join(allowed.values())}"
        raise ValueError(f"the key is of type {type(default).__name__}, which {what}")
    if kind in ("choice", "grid"):
        values = read_values(key, rest.split(";" if ";" in rest else ","), config)
        return CategoricalDistribution(list(dict.fromkeys(values)))
    texts = rest.split(":")
    if len(texts) != 2 and (len(texts) != 3 or kind == "log"):
        raise ValueError(f"give {allowed[kind]}")
    low, high = read_values(key, texts[:2], config)
    if not (-math.inf < low < high < math.inf and (kind != "log" or low > 0)):
        above = ", and above 0" if kind == "log" else ""
        raise ValueError(f"LOW must be below HIGH{above}")
    kind_of = FloatDistribution
    step = None
    if isinstance(default, int):
        kind_of = IntDistribution
        step = 1
    if len(texts) == 3:
        step = parse(texts[2], default)
        if not 0 < step <= high - low:
            raise ValueError(f"STEP must be above 0 and at most {high - low:g}")
    return kind_of(low, high, log=kind == "log", step=step)


def read_values(key: str, texts: list[str], config: ConfigDict) -> list:
    """The texts as values of the key. Raises ValueError where no config may have them, whatever its other keys."""
    values = []
    problems = []
    for text in texts:
        one = config.copy_and_resolve_references()
        problems += override(one, [(key, text)]) or out_of_range(key, one)
        values.append(flatten(one)[key])
    if problems:
        raise ValueError("; ".join(problems))
    return values


def out_of_range(key: str, config: ConfigDict) -> list[str]:
    """What is wrong with the value of this key by itself."""
    return [problem for problem in ranges(config) if problem.key == key]


def ends(dimension: Dimension) -> list:
    """Its lowest and its highest value, or all values where they are given one by one."""
    among = dimension.values
    if isinstance(among, CategoricalDistribution):
        return list(among.choices)
    return [among.low, among.high]


def inner(dimension: Dimension) -> list:
    """The whole numbers between its ends, where they are few."""
    among = dimension.values
    if not isinstance(among, IntDistribution):
        return []
    between = list(range(among.low + among.step, among.high, among.step))
    if len(between) <= FEW:
        return between
    return []


def holds(dimension: Dimension, value) -> bool:
    """Whether a value is one of the dimension's."""
    among = dimension.values
    if isinstance(among, CategoricalDistribution):
        return value in among.choices
    if not among.low <= value <= among.high:
        return False
    if not among.step:
        return True
    steps = (value - among.low) / among.step
    return abs(steps - round(steps)) < 1e-8


def edge_of(dimension: Dimension, value) -> str:
    """Whether a value is the "lowest" or "highest" that was searched, or within 5% of the range of it; else empty.

    Empty too where values have no order, or where there are fewer than three: all are at an edge then.
    """
    among = dimension.values
    if isinstance(among, CategoricalDistribution):
        return end_of_list(among.choices, value)
    if among.step and among.high - among.low < 2 * among.step:
        return ""
    scale = math.log if among.log else float
    low = scale(among.low)
    high = scale(among.high)
    position = (scale(value) - low) / (high - low)
    if position <= EDGE:
        return "lowest"
    if position >= 1 - EDGE:
        return "highest"
    return ""


def end_of_list(choices: tuple, value) -> str:
    """As edge_of, of numbers that are given one by one."""
    numbers = all(type(choice) in (int, float) for choice in choices)
    if not numbers or len(choices) < 3:
        return ""
    if value == min(choices):
        return "lowest"
    if value == max(choices):
        return "highest"
    return ""


def beyond(dimension: Dimension, edge: str) -> float | int:
    """A value a little outside of what was searched, at that edge."""
    among = dimension.values
    if isinstance(among, CategoricalDistribution):
        low = min(among.choices)
        high = max(among.choices)
    else:
        low = among.low
        high = among.high
    if isinstance(low, int):
        if edge == "lowest":
            return low - 1
        return high + 1
    if low > 0:  # on a linear scale too: a positive key may have no values below 0
        if edge == "lowest":
            return low * 0.9
        return high * 1.1
    margin = EDGE * (high - low)
    if edge == "lowest":
        return low - margin
    return high + margin


def readable(value) -> str:
    """A value with at most four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def edges(space: dict[str, Dimension], best: dict, config: ConfigDict) -> list[str]:
    """A line for each key whose best value is at an edge of what was searched. best: {key: value}."""
    lines = []
    for key, value in best.items():
        edge = edge_of(space[key], value)
        if not edge:
            continue
        said = f"{key}={readable(value)} is at the {edge} end of {space[key].text}"
        try:
            read_values(key, [str(beyond(space[key], edge))], config)
        except ValueError:
            lines.append(f"{said}, and no config may go further")
        else:
            lines.append(
                f"{said}: better may lie beyond; search a wider --space in another --workdir"
            )
    return lines
