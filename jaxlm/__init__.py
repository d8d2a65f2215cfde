"""jaxlm: language models in JAX, from raw text to a trained model that writes. `lm = jaxlm.load(WORKDIR)`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors and type checkers read
    from jaxlm.generate.lm import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    """`jaxlm.load`, imported on use: the command line stays fast."""
    if name != "load":
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    from jaxlm.generate.lm import load

    return load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
