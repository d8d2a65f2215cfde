"""The recipes that come with jaxlm, found by name: `llama:8b` is configs/llama.py:8b, without a checkout too."""

from pathlib import Path

from jaxlm.cli import did_you_mean
from jaxlm.errors import ConfigError


def folder() -> Path:
    """The directory of the shipped recipes: configs/ of a checkout, jaxlm/recipes/ of an installed wheel."""
    package = Path(__file__).parent.parent
    installed = package / "recipes"
    if installed.is_dir():
        return installed
    return package.parent / "configs"


def names() -> list[str]:
    """The names of the shipped recipes, sorted."""
    return sorted(path.stem for path in folder().glob("*.py"))


def find(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one. A file that exists comes first.

    Raises ConfigError where there is neither, with the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in names():
        return folder() / f"{name}.py"
    if path.stem in names() and path.suffix == ".py" and path.parent.name == "configs":
        raise ConfigError(
            f"--config={name}: there is no such file here; the recipe comes with jaxlm: --config={path.stem}"
        )
    if path.parent.is_dir():
        nearby = sorted(str(each) for each in path.parent.glob("*.py"))
    else:
        nearby = []
    known = nearby + names() if path.parent == Path(".") else nearby or names()
    hint = did_you_mean(name, known)
    raise ConfigError(
        f"--config={name}: there is no file {name}{hint} (found: {' '.join(known) or 'none'})"
    )
