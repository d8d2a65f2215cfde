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


# Disks that are full or only to be read, and files of others: no fault of a program, so that a traceback says nothing.
OF_DISKS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are `ConfigError`s that name the nearest flag.

    `parse(argv)` also collects `--config.a.b=value` into `args.overrides`, a list of (key, text), where the program
    has a `--config` flag.
    """

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def add_config(self) -> None:
        self.add_argument(
            "--config",
            required=True,
            metavar="FILE.py[:ARG]",
            help="a recipe, such as configs/gpt2.py",
        )
        self.epilog = "Any key of the config can be set with --config.KEY=VALUE: --config.optim.learning_rate=1e-3."

    def error(self, message: str):
        raise ConfigError(f"{self.prog}: {message} (see --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        overrides = []
        rest = []
        words = iter(argv)
        for word in words:
            if word.startswith("--config.") and "--config" in self._option_string_actions:
                key, equals, text = word.removeprefix("--config.").partition("=")
                text = text if equals else next(words, "--")
                if text.startswith("--"):
                    self.error(f"--config.{key} needs a value: --config.{key}=VALUE")
                overrides.append((key, text))
            else:
                rest.append(word)
        for word in rest:
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in self._option_string_actions:
                self.error(
                    f"there is no flag {flag}{did_you_mean(flag, self._option_string_actions)}"
                )
        args = self.parse_args(rest)
        args.overrides = overrides
        return args


def did_you_mean(word: str, allowed) -> str:
    """' (did you mean X?)', or '' where nothing is near."""
    if len(word) > 2:
        longer = sorted((each for each in allowed if each.startswith(word)), key=len)
    else:
        longer = []
    near = longer[:1] or difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return ""


def near_path(path: str | PurePath) -> str:
    """did_you_mean for a path that is not there, of what lies beside the first part of it that is missing; else ''."""
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
    """Raises ConfigError where a flag's file can't be written, before the work that it is to hold."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise ConfigError(f"{flag}={path}: there is no directory {folder}{near_path(folder)}")
    if Path(path).is_dir():
        raise ConfigError(f"{flag}={path}: is a directory; give a file in it")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ConfigError(f"{flag}={path}: you may not write there")


def readable_json(value) -> str:
    """JSON in one line whose letters, of any script, are themselves; half a surrogate pair is escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def table(rows: Iterable[Sequence], columns: Sequence[str] = (), left: int = 1) -> str:
    """Rows of cells as lines of text in aligned columns, two spaces apart, below the names of the columns if given.

    The first `left` columns are aligned to the left (words), the others to the right (numbers). Cells are shown by
    str(). Returns '' where there are neither rows nor columns.
    """
    rows = [[Text(str(cell)) for cell in row] for row in rows]
    width = max([len(columns), *map(len, rows)])
    grid = Table(box=None, show_header=bool(columns), pad_edge=False, padding=(0, 2, 0, 0))
    for i in range(width):
        name = Text(columns[i]) if columns else ""
        grid.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    page = io.StringIO()
    Console(file=page, width=100_000, color_system=None, force_terminal=False).print(grid)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def spare_threads() -> None:
    """Where a CPU stands in for several devices, gives XLA more threads than their collectives can keep waiting.

    Independent collectives of a device run beside each other, and each keeps a thread until all its devices have come.
    XLA makes one thread for each device or core: where they all wait, a device without one may be waited for until 40
    seconds are over and the process is ended (seen with jaxlib 0.10, once). To be called before the
    first device is asked for; a PJRT_NPROC of the user's stays.
    """
    said = f"{os.environ.get('XLA_FLAGS')} device_count={os.environ.get('JAX_NUM_CPU_DEVICES')}"
    devices = max(map(int, re.findall(r"device_count=(\d+)", said)), default=1)
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(8 * devices, os.cpu_count() or 1)))


def warn_plainly() -> None:
    """Warnings to stderr as the lines they are; libraries give the root logger a format of their own."""
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
    except (
        BrokenPipeError
    ):  # the reader of a pipe (head, less) has gone: nothing is left to tell anyone
        sys.stderr.close()
        code = 141
    except OSError as error:
        if error.errno not in OF_DISKS:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        code = 1
    sys.exit(code)
