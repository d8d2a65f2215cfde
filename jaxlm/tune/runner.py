"""Runs of `python -m jaxlm.train` in processes of their own, watched while they go on, which end with this one."""

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.cli import PREEMPTED
from jaxlm.config.recipe import flatten
from jaxlm.config.sources import load
from jaxlm.errors import ConfigError, NumericsError, UserError

POLL = 0.2  # seconds between looks at a run

# Nobody writes to the input: it ends when the process at its other end does, however that comes about. A run that
# outlived its search would be in the way of the same command, which goes on in the same directory.
CHILD = """
import os, runpy, sys, threading

def end_with_parent():
    os.read(0, 1)
    os._exit(1)

threading.Thread(target=end_with_parent, daemon=True).start()
if cores := [int(core) for core in sys.argv.pop(1).split()]:
    os.sched_setaffinity(0, cores)
runpy.run_module("jaxlm.train", run_name="__main__", alter_sys=True)
"""


class Stopped(Exception):
    """A run was ended before it was done; it can go on."""


class Trainer:
    """Trains variants of a recipe, `parallel` at a time, each with its share of the cores and GPUs.

    Raises ConfigError where there are GPUs, but fewer than that.
    """

    def __init__(self, recipe: str, parallel: int = 1):
        self.recipe = recipe
        self.base = flatten(load(recipe))
        self.shares = queue.SimpleQueue()
        for share in shares(parallel):
            self.shares.put(share)

    def __call__(
        self, config: ConfigDict, folder: Path, watch: Callable[[list[dict]], None]
    ) -> list[dict]:
        """Trains in `folder`, or goes on there. Returns all rows of metrics.jsonl; `watch` is given them as they come.

        What `watch` raises ends the run, which saves first. Raises ConfigError where train refuses the config,
        NumericsError where it diverges, UserError where it fails, Stopped where something else has stopped it.
        """
        flags = [f"--config={self.recipe}", f"--workdir={folder}"]
        for key, value in flatten(config).items():
            if value != self.base[key]:
                flags.append(f"--config.{key}={value}")
        folder.mkdir(parents=True, exist_ok=True)
        rows = Rows(folder / "metrics.jsonl")
        file = folder / "train.log"
        share = self.shares.get()
        try:
            with open(file, "ab") as log:
                start = log.tell()
                code = run(flags, share, log, lambda: watch(rows.new()))
        finally:
            self.shares.put(share)
        if code == PREEMPTED:
            raise Stopped
        if code:
            raise error_of(code, file.read_bytes()[start:].decode(errors="replace"), file)
        watch(rows.new())
        return Rows(folder / "metrics.jsonl").new()


def run(flags: list[str], share: tuple[str, dict], log, look: Callable[[], None]) -> int:
    """Trains on a share of the machine and returns the exit code.

    `look` is called again and again. What it raises ends the run, which saves first.
    """
    cores, environment = share
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, cores, *flags],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        # Ctrl-C in the terminal is for the search, which then asks its runs to save.
        start_new_session=True,
    )
    try:
        while process.poll() is None:
            look()
            time.sleep(POLL)
    except BaseException:
        process.terminate()
        raise
    finally:
        code = process.wait()
        process.stdin.close()
    return code


def error_of(code: int, log: str, file: Path) -> UserError:
    """What a run that failed comes to, with the end of its log."""
    reason = last_words(log)
    how = f"exit code {code}"
    if code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    kind = UserError
    if code == NumericsError.exit_code:
        kind = NumericsError
    elif code == ConfigError.exit_code and "another run is using it" not in reason:
        kind = ConfigError  # a directory that is in use is no fault of the config
    return kind(f"{reason} ({how}; {file})")


class Rows:
    """The rows of a metrics.jsonl that is being written."""

    def __init__(self, path: Path):
        self.path = path
        self.inode = None
        self.offset = 0

    def new(self) -> list[dict]:
        """Those since the last call; all of them again where a restart has replaced the file."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:
                self.inode = inode
                self.offset = 0
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def last_words(log: str) -> str:
    """What a log ends with, on one line: the error, or the last of a traceback."""
    text = "\n" + log.strip()
    _, error, message = text.rpartition("\nerror: ")
    if not error:
        message = text.splitlines()[-1] or "it printed nothing"
    return " ".join(message.split())[:500]


def shares(parallel: int) -> list[tuple[str, dict]]:
    """For each of so many runs at a time: its cores, and the environment that shows it its GPUs.

    Raises ConfigError where there are GPUs, but fewer than runs.
    """
    cores = []
    if hasattr(os, "sched_getaffinity"):
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    gpus = []
    if parallel > 1 and os.environ.get("JAX_PLATFORMS") != "cpu":
        gpus = gpus_here()
    if 0 < len(gpus) < parallel:
        raise ConfigError(
            f"--parallel={parallel}: there are {len(gpus)} GPUs, and a trial needs one of its own"
        )
    found = []
    for i in range(parallel):
        environment = {}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(part(gpus, i, parallel))
        found.append((" ".join(part(cores, i, parallel)), environment))
    return found


def gpus_here() -> list[str]:
    """Those that this process may use, by number or name."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    files = sorted(Path("/dev").glob("nvidia[0-9]*"))
    return [file.name.removeprefix("nvidia") for file in files]


def part(things: list, i: int, of: int) -> list:
    """The i-th of so many even parts; where there are fewer things than parts, one of them."""
    size = len(things)
    even = things[i * size // of : (i + 1) * size // of]
    if even or not things:
        return even
    return [things[i % size]]
