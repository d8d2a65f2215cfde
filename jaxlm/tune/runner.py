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
from jaxlm.config.recipe import flatten, load
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
        flags = []
        for key, value in flatten(config).items():
            if value != self.base[key]:
                flags.append(f"--config.{key}={value}")
        cores, environment = share = self.shares.get()
        command = [
            sys.executable,
            "-c",
            CHILD,
            cores,
            f"--config={self.recipe}",
            f"--workdir={folder}",
            *flags,
        ]
        folder.mkdir(parents=True, exist_ok=True)
        rows = Rows(folder / "metrics.jsonl")
        try:
            with open(folder / "train.log", "ab") as log:
                start = log.tell()
                # A session of its own: Ctrl-C in the terminal is for the search, which then asks its runs to save.
                to = {
                    "stdin": subprocess.PIPE,
                    "stdout": log,
                    "stderr": subprocess.STDOUT,
                    "start_new_session": True,
                }
                process = subprocess.Popen(command, env=os.environ | environment, **to)
                try:
                    while process.poll() is None:
                        watch(rows.new())
                        time.sleep(POLL)
                except BaseException:
                    process.terminate()
                    raise
                finally:
                    code = process.wait()
                    process.stdin.close()
        finally:
            self.shares.put(share)
        if code == PREEMPTED:
            raise Stopped
        if code:
            said = last_words((folder / "train.log").read_bytes()[start:].decode(errors="replace"))
            if code < 0:
                how = f"killed by {signal.Signals(-code).name}"
            else:
                how = f"exit code {code}"
            # A directory that is in use says nothing of the config.
            if "another run is using it" not in said:
                refused = ConfigError
            else:
                refused = UserError
            raise {2: refused, 5: NumericsError}.get(code, UserError)(
                f"{said} ({how}; {folder}/train.log)"
            )
        watch(rows.new())
        return Rows(folder / "metrics.jsonl").new()


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
            self.inode, self.offset = inode, self.offset if inode == self.inode else 0
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def last_words(log: str) -> str:
    """What a log ends with, on one line: the error, or the last of a traceback."""
    lines = log.strip().splitlines() or ["it said nothing"]
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    words = " ".join(" ".join(lines[errors[-1] if errors else -1 :]).split())
    return words.removeprefix("error: ")[:500]


def shares(parallel: int) -> list[tuple[str, dict]]:
    """For each of so many runs at a time: its cores, and the environment that shows it its GPUs."""
    if hasattr(os, "sched_getaffinity"):
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    else:
        cores = []
    gpus = []
    for path in sorted(Path("/dev").glob("nvidia[0-9]*")):
        gpus.append(path.name.removeprefix("nvidia"))
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    else:
        gpus = gpus
    if os.environ.get("JAX_PLATFORMS") == "cpu" or parallel == 1:
        gpus = []
    if 0 < len(gpus) < parallel:
        raise ConfigError(
            f"--parallel={parallel}: there are {len(gpus)} GPUs, and a trial needs one of its own"
        )
    environments = []
    for i in range(parallel):
        environments.append(
            {"CUDA_VISIBLE_DEVICES": ",".join(part(gpus, i, parallel))} if gpus else {}
        )
    return [
        (" ".join(part(cores, i, parallel)), environment)
        for i, environment in enumerate(environments)
    ]


def part(things: list, i: int, of: int) -> list:
    """The i-th of so many even parts; where there are fewer things than parts, one of them."""
    size = len(things)
    return things[i * size // of : (i + 1) * size // of] or (
        things[i % size :][:1] if things else []
    )
