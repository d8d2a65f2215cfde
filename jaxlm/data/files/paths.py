"""The files that a spec of examples names: "a.tsv,b*.tsv", or "*.de+*.en" for files in parallel.

A path that exists is one path, whatever is in its name: a comma, a plus, brackets, spaces.
"""

import glob
import os
from collections.abc import Callable
from pathlib import Path

from jaxlm.cli import near_path
from jaxlm.errors import DataError

MOST_PIECES = 12  # into which commas, or plus signs, may cut one path


def paths_of(spec: str) -> list[str]:
    """The files of a spec, those in parallel as "a.de+a.en". Raises DataError that names what is not there."""
    paths = []
    missing = []
    for item in items_of(spec):
        found = {part: matches(part) for part in parts_of(item)}
        absent = [part for part, files in found.items() if not files]
        missing += absent
        if not absent and len(set(map(len, found.values()))) > 1:
            counts = ", ".join(f"{part}: {len(files)}" for part, files in found.items())
            raise DataError(f"{item}: as many files on each side are needed ({counts})")
        paths += map("+".join, zip(*found.values()))
    if missing:
        raise DataError(f"there is no file {', '.join(missing)}{_hint(missing[0])}")
    if not paths:
        raise DataError(f"there is no file {spec!r}")
    return paths


def _hint(path: str) -> str:
    """Where the path of a file that is not there may be wrong."""
    folder = Path(path).parent
    if folder.is_dir():
        return near_path(path)
    return f"; there is no directory {folder}{near_path(path)}"


def absolute(spec: str) -> str:
    """The same files, whatever the working directory is."""
    return with_each_path(spec, os.path.abspath)


def relative(spec: str) -> str:
    """The same files, those in the working directory by their names there: each file has one spec, and a short one."""
    return with_each_path(spec, relative_path)


def with_each_path(spec: str, change: Callable[[str], str]) -> str:
    """A spec whose paths are changed, one by one."""
    items = []
    for item in items_of(spec):
        items.append("+".join(map(change, parts_of(item))))
    return ",".join(items)


def relative_path(path: str) -> str:
    inside = os.path.relpath(path)
    if inside.startswith(os.pardir):
        return path
    return inside


def items_of(spec: str) -> list[str]:
    """What stands between the commas of a spec."""
    if os.path.exists(spec):
        return [spec]
    items = rejoined(spec.split(","), ",", lambda item: all(map(matches, parts_of(item))))
    return list(filter(None, items))


def parts_of(item: str) -> list[str]:
    """The files of "a.de+b.en", in parallel; b.en may lie beside a.de."""
    if "+" not in item or os.path.exists(item):
        return [item]
    pieces = item.split("+")
    first = next(filter(matches, heads(pieces)), pieces[0])
    folder = os.path.dirname(first)

    def exists(part: str) -> bool:
        return bool(matches(part) or matches(os.path.join(folder, part)))

    parts = []
    for part in rejoined(pieces, "+", exists):
        beside = os.path.join(folder, part)
        if matches(beside) and not matches(part):
            part = beside
        parts.append(part)
    return parts


def heads(pieces: list[str]) -> list[str]:
    """What the first of the paths may be, the longest first."""
    most = min(len(pieces), MOST_PIECES)
    return ["+".join(pieces[:count]) for count in range(most, 0, -1)]


def rejoined(pieces: list[str], mark: str, exists: Callable[[str], bool]) -> list[str]:
    """The pieces, those put together again that are one path that exists: the longest such."""
    items = []
    start = 0
    while start < len(pieces):
        count = min(len(pieces) - start, MOST_PIECES)
        while count > 1 and not exists(mark.join(pieces[start : start + count]).strip()):
            count -= 1
        items.append(mark.join(pieces[start : start + count]).strip())
        start += count
    return items


def matches(pattern: str) -> list[str]:
    """The file or directory of this name, else those that the pattern matches, sorted."""
    if os.path.exists(pattern):
        return [pattern]
    if not glob.has_magic(pattern):
        return []
    return sorted(glob.glob(literal_folders(pattern), recursive=True))


def literal_folders(pattern: str) -> str:
    """The pattern with the folders that exist under that very name escaped, such as data[1]/*.tsv."""
    *folders, last = pattern.split(os.sep)
    seen = ""
    kept = []
    for folder in folders:
        seen += folder + os.sep
        if os.path.isdir(seen):
            folder = glob.escape(folder)
        kept.append(folder)
    return os.sep.join([*kept, last])
