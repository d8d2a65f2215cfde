"""What all pictures share: a figure that is written at its end, colours, names that fit. Needs matplotlib."""

import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jaxlm.evaluate.metrics import library

# The colours of Okabe and Ito (2008), which the colour-blind tell apart, without the yellow, too pale for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = {
    "text.parse_math": False,  # `$` in a name begins no formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "font.size": 9,
}


@contextmanager
def drawing(path, width: float, height: float):
    """A figure of these inches, and a function that sets its title; written to `path` at the end."""
    fonts = ["DejaVu Sans"]
    for name in library("matplotlib.font_manager").get_font_names():
        if "CJK" in name:
            fonts.append(name)
    with library("matplotlib").rc_context(STYLE | {"font.family": fonts}):
        figure = library("matplotlib.figure").Figure((width, height), layout="constrained")

        def set_title(text: str) -> None:
            lines = [textwrap.fill(line, int(12 * width)) for line in text.splitlines()]
            figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11)

        yield figure, set_title
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")


def short(name, most: int = 24) -> str:
    """A name in one line of at most `most` characters."""
    name = " ".join(str(name).split()) or "(empty)"
    if len(name) <= most:
        return name
    return name[: most - 1] + "…"


def digits(value: float, significant: int = 4) -> str:
    """A number in so many digits, or all before its point."""
    if abs(value) >= 10 ** (significant - 1):
        return f"{value:,.0f}"
    return f"{value:.{significant}g}"


def show_steps(axes) -> None:
    """Whole numbers below, and a grid."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)


def colours_of(number: int) -> Sequence:
    """A colour for each of so many runs."""
    if number <= len(COLOURS):
        return COLOURS
    return library("matplotlib").colormaps["viridis"](np.linspace(0, 0.9, number))
