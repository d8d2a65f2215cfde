"""The output directory of jaxlm.data.prepare: claimed for one piece of work, compared with it, cleared."""

import json
import shutil
from pathlib import Path

from jaxlm.data import store
from jaxlm.data.shard_jobs import save
from jaxlm.errors import ConfigError

PARTIAL = ".partial"  # the folder in the output that holds unfinished work
IDENTITY = "identity.json"  # in it: what this work is for
SOURCES_SHOWN = 5  # that have changed
# What prepare writes. The manifest comes first, so that the rest counts as unfinished.
WRITTEN = (
    store.MANIFEST,
    "*-[0-9]*.tokens",
    "*-[0-9]*.offsets",
    "tokenizer.model",
    "tokenizer.json",
)


def claim(output: Path, identity: dict, overwrite: bool) -> bool:
    """Makes the output ready to be worked on; False where it is finished.

    Raises ConfigError where it is of other work, has files of others, or can't be written.
    """
    try:
        if overwrite:
            clear(output)
        folder = output / PARTIAL
        if (output / store.MANIFEST).exists():
            compare(store.load_manifest(output), identity, output)
            shutil.rmtree(folder, ignore_errors=True)
            return False
        if (folder / IDENTITY).exists():
            compare(json.loads((folder / IDENTITY).read_bytes()), identity, output)
            return True
        shutil.rmtree(folder, ignore_errors=True)
        if not overwrite and output.is_dir() and any(output.iterdir()):
            raise ConfigError(f"--output={output} has other files in it; choose a new directory")
        folder.mkdir(parents=True)
        save(folder / IDENTITY, identity)
        return True
    except OSError as error:
        raise ConfigError(
            f"--output={output} can't be written: {error.filename}: {error.strerror}"
        ) from None


def compare(found: dict, identity: dict, output: Path) -> None:
    """Raises ConfigError that lists every option and source that is not what it was."""
    changes = changed_options(found["options"], identity["options"])
    changes += changed_sources(found["sources"], identity["sources"])
    if changes:
        raise ConfigError(
            f"{output} was prepared from something else:\n  "
            + "\n  ".join(changes)
            + "\nchoose another --output, or pass --overwrite to replace it"
        )


def changed_options(there: dict, now: dict) -> list[str]:
    if "bos_id" not in there:  # of an earlier version: its ids are in the manifest, and stay
        there = {**there, "bos_id": now["bos_id"], "eos_id": now["eos_id"]}
    changes = []
    for key in now:
        if there.get(key) != now[key]:
            changes.append(f"{key} was {there.get(key)!r}, is {now[key]!r}")
    return changes


def changed_sources(there: list[dict], now: list[dict]) -> list[str]:
    """there, now: dicts of path, bytes and hash, in order."""
    before = {source["path"]: source for source in there}
    after = {source["path"]: source for source in now}
    changes = []
    for name in {**before, **after}:
        if name not in before:
            changes.append(f"the input {name} is new")
        elif name not in after:
            changes.append(f"the input {name} is gone")
        elif before[name] != after[name]:
            changes.append(f"the input {name} has changed")
    if len(changes) > SOURCES_SHOWN:
        return [*changes[:SOURCES_SHOWN], f"and {len(changes) - SOURCES_SHOWN:,} more inputs"]
    if list(before) != list(after) and not changes:
        return ["the inputs are in another order"]
    return changes


def clear(output: Path) -> None:
    """Deletes what prepare writes, and nothing else."""
    if not output.is_dir():
        return
    for pattern in WRITTEN:
        for file in output.glob(pattern):
            file.unlink()
    for folder in (output / PARTIAL, *output.glob(f"{store.PAIRS}-*")):
        shutil.rmtree(folder, ignore_errors=True)
    if not any(output.iterdir()):
        output.rmdir()
