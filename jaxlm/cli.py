"""The command line that every program shares: flags, did-you-mean, and exit codes instead of tracebacks."""

import argparse
import difflib
import errno
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxlm.errors import ConfigError, UserError

PREEMPTED = 75  # exit code: stopped by a signal, saved, and the same command goes on from there

# Disks that are full or read-only, and files of other people: no fault of the program, so a traceback would not help.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to an option's help, where there is one and the help does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default:" in text or not has_default(action):
            return text
        return f"{text} (default: %(default)s)"


def has_default(action: argparse.Action) -> bool:
    """Whether an option that is not given has a value of its own; switches and empty values don't count."""
    if action.required or action.default is None or isinstance(action.default, bool):
        return False
    return action.default not in ("", [], argparse.SUPPRESS)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are `ConfigError`s that name the nearest flag.

    `parse(argv)` also collects `--config.a.b=value` into `args.overrides`, a list of (key, text), where the program
    has a `--config` flag.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.config_keys = []

    def add_config(self, keys: Iterable[str]) -> None:
        """Adds --config. keys: those of a config, such as optim.learning_rate, for hints."""
        self.config_keys = list(keys)
        self.add_argument(
            "--config",
            required=True,
            metavar="RECIPE",
            help="a recipe: a file (my.py, my.py:ARG), the name of one that comes with jaxlm (llama:8b), or the "
            "config.json of a run",
        )
        self.epilog = "Any key of the config can be set with --config.KEY=VALUE: --config.optim.learning_rate=1e-3."

    def error(self, message: str):
        """Raises ConfigError, where argparse would exit."""
        raise ConfigError(f"{self.prog}: {message} (see --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments, and `overrides`. Raises ConfigError where a flag is unknown or a value is missing or wrong."""
        overrides = []
        rest = []
        words = iter(argv)
        for word in words:
            if word.startswith("--config.") and "--config" in self._option_string_actions:
                key, equals, text = word.removeprefix("--config.").partition("=")
                if not equals:
                    text = next(words, "--")
                if text.startswith("--"):
                    self.error(f"--config.{key} needs a value: --config.{key}=VALUE")
                overrides.append((key, text))
            else:
                rest.append(word)
        for word in rest:
            self.require_known(word)
        args = self.parse_args(rest)
        args.overrides = overrides
        return args

    def require_known(self, word: str) -> None:
        """Raises ConfigError where a word is a flag that this program does not have."""
        flag, equals, value = word.partition("=")
        flags = self._option_string_actions
        if not flag.startswith("--") or flag in ("--", *flags):
            return
        name = flag.removeprefix("--")
        hint = ""
        if not is_key(name, self.config_keys):
            hint = did_you_mean(flag, flags)
        if not hint:
            key = nearest_key(name, self.config_keys)
            if key:
                hint = f"; did you mean --config.{key}{equals}{value}?"
        self.error(f"there is no flag {flag}{hint}")


def is_key(name: str, keys: Sequence[str]) -> bool:
    """Whether a name is a key, or the last part of one."""
    return any(key == name or key.endswith(f".{name}") for key in keys)


def nearest_key(name: str, keys: Sequence[str]) -> str:
    """The key that a name means: the same, else one with the same or a similar last part, else a similar one; or ''."""
    if name in keys:
        return name
    by_last_part = {}
    for key in keys:
        by_last_part.setdefault(key.rpartition(".")[2], key)
    last_part = name.rpartition(".")[2]
    if last_part in by_last_part:
        return by_last_part[last_part]
    for near in difflib.get_close_matches(name, keys, n=1, cutoff=0.6):
        return near
    for near in difflib.get_close_matches(last_part, by_last_part, n=1, cutoff=0.6):
        return by_last_part[near]
    return ""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The shortest allowed word that begins with `word`, else the most similar; '' where none is near."""
    allowed = list(allowed)
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    if len(word) > 2:
        longer = [each for each in allowed if each.startswith(word)]
        near = sorted(longer, key=len)[:1] or near
    if near:
        return near[0]
    return ""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """'; did you mean X?', of the allowed words that begin with `word` or are like it; '' where none is near."""
    if near := nearest(word, allowed):
        return f"; did you mean {near}?"
    return ""


def near_path(path: str | PurePath) -> str:
    """did_you_mean for a path that does not exist, of the files beside its first missing part; '' where it exists."""
    if os.path.exists(path):
        return ""
    for part in (Path(path), *Path(path).parents):
        if part.parent.is_dir():
            near = difflib.get_close_matches(part.name, os.listdir(part.parent), n=1, cutoff=0.6)
            if near:
                return f"; did you mean {part.parent / near[0]}?"
            return ""
    return ""


def require_writable(flag: str, path: str | None) -> None:
    """Raises ConfigError where the file that a flag names can't be written, before the work whose results it is for."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise ConfigError(f"{flag}={path}: there is no directory {folder}{near_path(folder)}")
    if Path(path).is_dir():
        raise ConfigError(f"{flag}={path}: is a directory; give a file in it")
    existing = path if os.path.exists(path) else folder
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{flag}={path}: you may not write there")


def readable_json(value) -> str:
    """JSON in one line with letters of every script as they are; half a surrogate pair is escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def table(rows: Iterable[Sequence], columns: Sequence[str] = (), left: int = 1) -> str:
    """Rows of cells as lines of text in aligned columns, two spaces apart, below the names of the columns if given.

    The first `left` columns are aligned to the left (words), the others to the right (numbers). Cells are shown by
    str(). Returns '' where there are neither rows nor columns.
    """
    rows = list(rows)
    names = columns
    if not columns:
        names = [""] * max(map(len, rows), default=0)
    grid = Table(box=None, show_header=bool(columns), pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(names):
        side = "left" if i < left else "right"
        grid.add_column(Text(name), justify=side, no_wrap=True)
    for row in rows:
        grid.add_row(*[Text(str(cell)) for cell in row])
    page = io.StringIO()
    Console(file=page, width=100_000, color_system=None, force_terminal=False).print(grid)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def spare_threads() -> None:
    """Where a CPU stands in for several devices, gives XLA more threads than their collectives can keep waiting.

    Independent collectives of a device run side by side, and each keeps a thread until all its devices have come. XLA
    makes one thread for each device or core. Where all of them wait, a device without a thread is waited for, and after
    40 seconds XLA ends the process (seen once with jaxlib 0.10). To be called before jax is asked for the first device;
    a PJRT_NPROC that the user has set stays.
    """
    flags = f"{os.environ.get('XLA_FLAGS')} device_count={os.environ.get('JAX_NUM_CPU_DEVICES')}"
    devices = max(map(int, re.findall(r"device_count=(\d+)", flags)), default=1)
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(8 * devices, os.cpu_count() or 1)))


def warn_plainly() -> None:
    """Prints jaxlm's warnings to stderr without a prefix; libraries give the root logger a format of their own."""
    logger = logging.getLogger("jaxlm")
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a program's `main(argv)` and exits: 0, its return value, a `UserError`'s code, or 130 after Ctrl-C."""
    spare_threads()
    warn_plainly()
    try:
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone: nobody reads a message
        sys.stderr.close()
        code = 141
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        code = 1
    sys.exit(code)
