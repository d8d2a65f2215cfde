"""Several processes, one run: how they meet, what they must agree on, and which rows of a batch each of them holds.

A process is what jax.process_index() counts: one on each host of a TPU pod, one or more on a machine with GPUs.
"""

import argparse
import functools
import hashlib
import logging
import os
import re
import socket
import threading
import uuid
from collections.abc import Mapping
from pathlib import PurePath

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlm.errors import ConfigError
from jaxlm.parallel.mesh import batch_sharding

ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d{1,5})")  # HOST:PORT or [IPv6]:PORT
# Set in what srun starts, not in a batch script itself.
SLURM_TASK = "SLURM_JOB_ID SLURM_STEP_NODELIST SLURM_NTASKS SLURM_PROCID SLURM_LOCALID".split()
REQUIRED_TOGETHER = ("coordinator", "num_processes", "process_id")
# The least value of each flag that is a number.
LEAST = {"num_processes": 1, "process_id": 0, "connect_timeout": 1, "heartbeat_timeout": 1}


# ---------------------------------------------------------------- meeting


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `connect` reads. They are text: `parse_flags` reports all that is wrong at once."""
    group = parser.add_argument_group(
        "several processes",
        "On Cloud TPU, SLURM and Open MPI 4 they find each other. Elsewhere start the same command in each, with these "
        "three flags; which GPUs each of them has is up to CUDA_VISIBLE_DEVICES.",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="host of process 0, and a port that is free there",
    )
    group.add_argument("--num_processes", metavar="N", help="how many there are")
    group.add_argument("--process_id", metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--connect_timeout",
        metavar="SECONDS",
        default="300",
        help="how long to wait for the others (default: 300)",
    )
    # jax's own 100 s bear longer pauses, but all that time every other device does nothing. Heartbeats come from a
    # thread of the runtime: compiling, saving or waiting for data does not delay them.
    group.add_argument(
        "--heartbeat_timeout",
        metavar="SECONDS",
        default="60",
        help="end when a process has given no sign of life for so long (default: 60)",
    )


def connect(args: argparse.Namespace) -> None:
    """Joins the other processes of the run, if there are any. Call it before anything asks jax for devices.

    Raises ConfigError where the flags are wrong or the others are not met in time.
    """
    flags, connect_timeout, heartbeat_timeout = parse_flags(args)
    if flags:
        method = "deactivate"
    else:
        method = cluster(os.environ)
    if method is None or flags.get("num_processes") == 1:
        return
    if flags.get("process_id") == 0:
        require_free_port(flags["coordinator_address"])
    meet(
        connect_timeout,
        cluster_detection_method=method,
        heartbeat_timeout_seconds=heartbeat_timeout,
        # A process that fails alone waits at its end for the others, which wait for it in a collective.
        shutdown_timeout_seconds=heartbeat_timeout,
        **flags,
    )
    if method in ("slurm", "ompi") and alone_on_node(os.environ):
        # jax has given this process the one GPU that has its number on the node.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")
    if jax.process_index() > 0:
        logging.getLogger("jaxlm").setLevel(logging.ERROR)  # process 0 warns for all


def parse_flags(args: argparse.Namespace) -> tuple[dict, int, int]:
    """(arguments of jax.distributed.initialize or {}, seconds to connect, seconds to miss heartbeats).

    Raises one ConfigError with every problem.
    """
    missing = [f"--{name}" for name in REQUIRED_TOGETHER if getattr(args, name) is None]
    problems = []
    if 0 < len(missing) < len(REQUIRED_TOGETHER):
        problems.append(
            f"{' and '.join(missing)}: missing; give each process all of "
            f"--{', --'.join(REQUIRED_TOGETHER)}, or none"
        )
    numbers = {}
    for name, least in LEAST.items():
        text = getattr(args, name)
        if text is None:
            continue
        if text.isdecimal() and int(text) >= least:
            numbers[name] = int(text)
        else:
            problems.append(f"--{name}={text}: must be a whole number from {least} on")
    count = numbers.get("num_processes")
    process = numbers.get("process_id")
    if count is not None and process is not None and process >= count:
        problems.append(
            f"--process_id={process}: must be from 0 to {count - 1}, --num_processes being {count}"
        )
    if args.coordinator is not None and not is_address(args.coordinator):
        problems.append(
            f"--coordinator={args.coordinator}: must be HOST:PORT of process 0, such as node0:8476"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    flags = {}
    if not missing:
        flags = {
            "coordinator_address": args.coordinator,
            "num_processes": count,
            "process_id": process,
        }
    return flags, numbers["connect_timeout"], numbers["heartbeat_timeout"]


def is_address(text: str) -> bool:
    """Whether a text is HOST:PORT or [IPv6]:PORT."""
    match = ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[2]) < 2**16


def cluster(environ: Mapping[str, str]) -> str | None:
    """jax's name of the cluster that started this process as one of several; None where it is the only one.

    Looks in jax's order, and at nothing but the environment: 'gcetpu' is every TPU machine of Google Compute Engine,
    whose metadata server jax asks for the others. Raises ConfigError for a launcher that names no coordinator.
    """

    def number(name, default):
        return int(environ.get(name, default))

    if number("OMPI_COMM_WORLD_SIZE", 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return "ompi"
        raise ConfigError(
            "this launcher (Open MPI 5 or later) names no host that all processes can meet at; start each of them with "
            "--coordinator=HOST:PORT --num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK"
        )
    if set(SLURM_TASK) <= set(environ):
        tasks = number("SLURM_NTASKS", 1)
        step_tasks = number("SLURM_STEP_NUM_TASKS", tasks)
        if min(tasks, step_tasks) > 1:
            return "slurm"
        return None
    # jax sets the first where it finds TPU chips and their library.
    if "TPU_ML_PLATFORM" not in environ or "tpu" not in environ.get("JAX_PLATFORMS", "tpu"):
        return None
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:  # Google Kubernetes Engine
        if len(hosts.split(",")) * number("MEGASCALE_NUM_SLICES", 1) > 1:
            return "gketpu"
        return None
    if "TPU_SKIP_MDS_QUERY" in environ:
        return None
    return "gcetpu"


def alone_on_node(environ: Mapping[str, str]) -> bool:
    """Whether SLURM or Open MPI started one process on each node, which should then have all of the node's GPUs."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        return environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS"))
    return tasks == environ.get("SLURM_STEP_NUM_NODES")


def require_free_port(address: str) -> None:
    """Raises ConfigError where another program listens on the port of `address`: jax would crash."""
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ConfigError(
            f"--coordinator={address}: port {port} cannot be used ({error.strerror})"
        ) from None


def meet(timeout: int, **options) -> None:
    """jax.distributed.initialize(**options). Raises ConfigError where it has not met the others in `timeout` seconds.

    jax itself would abort the process then. So it gets more time than it needs, in a thread that is not waited for.
    """
    failures = []

    def initialize():
        try:
            jax.distributed.initialize(initialization_timeout=2 * timeout, **options)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        where = ""
        if "coordinator_address" in options:
            where = f" at {options['coordinator_address']}"
        raise ConfigError(
            f"the processes of this run have not met{where} in {timeout} s. Start all of them, process 0 on the host "
            "that --coordinator names, with one --num_processes and each its own --process_id; firewalls must let the "
            "port through; --connect_timeout waits longer"
        )
    if failures:
        error = failures[0]
        raise ConfigError(f"cannot join the other processes of this run: {error}") from error


# ---------------------------------------------------------------- agreeing


def require_same(text: str, problem: str) -> None:
    """Raises ConfigError that begins with `problem`, on every process, where `text` is not the same on all of them."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(text.encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = [str(i) for i, digest in enumerate(digests) if (digest != digests[0]).any()]
    if others:
        raise ConfigError(
            f"{problem} (process 0 is not as {', '.join(others)}); give all processes the same"
        )


def require_shared(directory: PurePath) -> None:
    """Raises ConfigError, on every process, where `directory` is not one that all of them see."""
    if jax.process_count() == 1:
        return
    note = directory / ".shared"
    if jax.process_index() == 0:
        note.write_text(uuid.uuid4().hex)
    multihost_utils.sync_global_devices("written")
    problem = f"{directory}: not one directory, on a file system that all hosts share"
    require_same(read_if_there(note), problem)
    if jax.process_index() == 0:
        note.unlink()


def read_if_there(path: PurePath) -> str:
    """The text of a file, "" where there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


# ---------------------------------------------------------------- rows of a batch


@functools.cache  # asked for every batch
def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, ascending, int64.

    They need not be an equal share nor in one piece: where the batch is on fewer devices than there are (tensor
    parallelism, pipeline stages), several processes hold the same rows.
    """
    held = np.zeros(num_rows, bool)
    sharding = batch_sharding((num_rows,), mesh)
    for index in sharding.addressable_devices_indices_map((num_rows,)).values():
        held[index] = True
    return np.flatnonzero(held)


def to_global(
    batch: dict[str, np.ndarray],
    mesh: Mesh,
    num_rows: int,
) -> dict[str, jax.Array]:
    """The local_rows(mesh, num_rows) of a batch, or all its rows -> global arrays [num_rows, ...]."""
    here = local_rows(mesh, num_rows)

    def global_array(x):
        shape = (num_rows, *x.shape[1:])
        rows = here
        if len(x) == num_rows:
            rows = np.arange(num_rows)

        def shard(index):
            start, stop, _ = index[0].indices(num_rows)
            first = np.searchsorted(rows, start)
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(shape, mesh), shard)

    return jax.tree.map(global_array, batch)


def fetch(x: jax.Array) -> np.ndarray:
    """All of a global array, on every process."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
