"""What people pass to jaxlm.load and its LM: taken where it is plainly meant, else refused by its name."""

import math
from numbers import Integral, Real
from operator import index

import numpy as np

from jaxlm.cli import did_you_mean
from jaxlm.errors import ConfigError


class Arguments:
    """The arguments of one call. Each method returns the value as the code wants it, or notes what is wrong with it.

    `refuse()` raises one ConfigError of everything that was noted; what was returned till then may be None.
    """

    def __init__(self, where: str):
        self.where = where
        self.problems: list[str] = []

    def refuse(self) -> None:
        if self.problems:
            raise ConfigError(f"{self.where}: " + "; ".join(self.problems))

    def must(self, name: str, value, rule: str) -> None:
        self.problems.append(f"{name}={shown(value)}: must be {rule}")

    def whole(self, name: str, value, low: int | None, rule: str, high: int | None = None) -> int | None:
        """An int of any integer type, or of a float such as 5.0."""
        number = number_of(value)
        is_whole = number is not None and math.isfinite(number) and number == int(number)
        if not is_whole or (low is not None and number < low) or (high is not None and number > high):
            self.must(name, value, f"a whole number, {rule}")
            return None
        return int(number)

    def real(self, name: str, value, low: float, high: float, rule: str) -> float | None:
        """A finite float from low to high."""
        number = number_of(value)
        if number is None or not math.isfinite(number) or not low <= number <= high:
            self.must(name, value, f"a number, {rule}")
            return None
        return float(number)

    def texts(self, name: str, value) -> list[str] | None:
        """A list of str, of a str alone or of anything that gives them in order."""
        if isinstance(value, str):
            return [str(value)]
        items = self.items(name, value, "a text or a list of texts")
        if items is None:
            return None
        for number, item in enumerate(items):
            if not isinstance(item, str):
                self.must(f"{name}[{number}]", item, f"a text{hint_of(item)}")
                return None
        return [str(item) for item in items]

    def items(self, name: str, value, rule: str) -> list | None:
        """The items of a list, a tuple, a generator, an array or a column of a table."""
        unordered = isinstance(value, (bytes, bytearray, dict, set, frozenset))
        if isinstance(value, np.ndarray):
            return np.atleast_1d(value).tolist()
        if unordered or not hasattr(value, "__iter__"):
            self.must(name, value, f"{rule}{hint_of(value)}")
            return None
        return list(value)

    def known(self, given, allowed, what: str) -> None:
        """Notes each name of `given` that is not among `allowed`."""
        for name in given:
            if name not in allowed:
                self.problems.append(
                    f"there is no {what} {name!r}{did_you_mean(str(name), allowed)} (there are {', '.join(allowed)})"
                )


def number_of(value) -> float | int | None:
    """A Python number of a number of any library, None of anything else; True is no number."""
    if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
        value = scalar_of(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return index(value)
    return float(value) if isinstance(value, Real) else None


def scalar_of(value):
    """The Python object in an array of no dimensions, else None."""
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else None


def hint_of(value) -> str:
    if isinstance(value, (bytes, bytearray)):
        return ' (bytes become text by .decode("utf-8"))'
    if isinstance(value, (dict, list, tuple)):
        return " (a dialogue or an example is for lm.answer)"
    return ""


def shown(value, longest: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= longest else text[:longest] + "..."
