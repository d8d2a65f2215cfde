"""Where a config comes from: a recipe by path or by name, or the config.json of a run."""

import argparse
import json

from etils import epath
from ml_collections import ConfigDict

from jaxlm.config import recipe
from jaxlm.config.keys import base
from jaxlm.config.problems import Problem
from jaxlm.errors import ConfigError

SAVED = "config.json"  # of a run: every key, resolved


def from_command_line(args: argparse.Namespace) -> tuple[ConfigDict, list[Problem]]:
    """(the config that --config and --config.KEY=VALUE mean, not yet resolved; what is wrong with these words).

    args: what `cli.Parser.parse` gave to a program that takes --config. Raises ConfigError where there is no config.
    """
    config = load(args.config)
    problems = recipe.override(config, args.overrides)
    return config, problems


def load(spec: str) -> ConfigDict:
    """The config that `--config=SPEC` means, not yet resolved.

    spec: `FILE.py`, `FILE.py:ARG`, the `NAME` or `NAME:ARG` of a recipe that comes with jaxlm, a run's `config.json`,
    or the run's directory. Raises ConfigError where there is none, or it is not sound.
    """
    path = epath.Path(spec)
    if path.suffix == ".json":
        return load_saved(path)
    if (path / SAVED).is_file():
        return load_saved(path / SAVED)
    return recipe.load(spec)


def load_saved(path: epath.Path) -> ConfigDict:
    """The config of a run, whose derived keys are derived again: so that a longer train.steps ends later.

    Raises ConfigError where the file is missing, is no JSON object, or has a key or value that no config has.
    """
    try:
        flat = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config={path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"--config={path}: not JSON: {error}") from None
    known = recipe.flatten(base())
    if not isinstance(flat, dict):
        raise ConfigError(f"--config={path}: not a run's config.json: it has no keys")
    problems = []
    for key in flat:
        if key not in known:
            problem = Problem(key, None, "no such key", recipe.nearest_key(key, known))
            problems.append(str(problem))
    if problems:
        raise ConfigError(
            f"--config={path} is not of this version of jaxlm, or not a run's config.json:\n"
            + "\n".join(problems)
        )
    try:
        config = recipe.unflatten(flat)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--config={path}: {error}") from None
    return underived(config)


def underived(config: ConfigDict) -> ConfigDict:
    """The config with each key at its default where `resolve` would derive the same value from the others."""
    result = config.copy_and_resolve_references()
    defaults = recipe.flatten(base())
    saved = recipe.flatten(config)
    for key, value in saved.items():
        if value == defaults[key]:
            continue
        trial = config.copy_and_resolve_references()
        recipe.set_key(trial, key, defaults[key])
        derived = recipe.flatten(recipe.resolve(trial))[key]
        if derived == value:
            recipe.set_key(result, key, defaults[key])
    return result
