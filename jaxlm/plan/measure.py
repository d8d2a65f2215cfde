"""A compiled train step run on the devices that are here, and timed: for bench, and to hold a prediction against."""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.data.batches import Prefetch
from jaxlm.step.state import State, abstract_inputs, init_state

WARM_UP = 3  # steps that load programs and choose among kernels
STEPS = 10


class Times(NamedTuple):
    """Seconds of each step, [steps]. step: from the metrics of one to those of the next, as a run has them.

    data: of these, waiting for a batch. host: of these, neither waiting for a batch nor for the devices; of one CPU,
    whose programs run on the thread that calls them (jaxlm/run/process.py), outside of the call.
    """

    step: np.ndarray
    data: np.ndarray
    host: np.ndarray


def time_steps(
    step: Callable, state: State, batches: Prefetch, steps: int, warm_up: int = WARM_UP
) -> tuple[Times, State, list[float]]:
    """(times, the last state, the loss of each step) of a train step, as train runs it: metrics come a step late."""
    rows = []
    losses = []
    pending = None
    asynchronous = jax.config.read("jax_cpu_enable_async_dispatch") or jax.device_count() > 1
    inline = jax.default_backend() == "cpu" and not asynchronous
    for _ in range(warm_up + steps + 1):
        began = time.perf_counter()
        batch = batches.take()
        called = time.perf_counter()
        state, metrics = step(state, batch)
        sent = time.perf_counter()
        batches.refill()
        if pending:
            losses.append(float(jax.device_get(pending)["loss"]))
        pending = metrics
        whole = time.perf_counter() - began
        busy = sent - began
        if inline:
            busy = whole - (sent - called)
        rows.append((whole, batches.waited, busy - batches.waited))
    jax.block_until_ready(state)
    return Times(*np.array(rows[warm_up + 1 :]).T), state, losses[warm_up:]


class Measured(NamedTuple):
    seconds: float  # of a step, the mean of STEPS after WARM_UP
    # Bytes of the fullest device at its peak; of CPUs what the process grew by, shared among them.
    memory: int | None


def measure(config: ConfigDict, mesh, compiled: jax.stages.Compiled) -> Measured:
    """Runs `compiled`, the train step of a resolved config on this mesh, from its initial state on one random batch."""
    batch = random_batch(config, mesh)
    state, before = begin(config, mesh, compiled, batch)
    batches = Prefetch([batch] * (WARM_UP + STEPS + 1), 0, WARM_UP + STEPS + 1, 1)
    times, *_ = time_steps(compiled, state, batches, STEPS)
    return Measured(float(times.step.mean()), peak_memory(mesh, before))


def begin(
    config: ConfigDict, mesh, compiled: jax.stages.Compiled, batch: dict
) -> tuple[State, int]:
    """(the initial state, on a CPU the bytes of this process without it): what peak_memory measures from.

    On a CPU, a step is run before and its memory is given back. So neither what XLA and Python allocate once and keep
    (about 0.1 GiB) nor what making the state needs is counted.
    """
    if jax.default_backend() != "cpu":
        return init_state(config, mesh), 0
    jax.block_until_ready(compiled(init_state(config, mesh), batch))
    gc.collect()
    before = resident("VmRSS", forget_peak=True)
    state = jax.block_until_ready(init_state(config, mesh))
    resident("VmRSS", forget_peak=True)
    return state, before


def peak_memory(mesh, before: int) -> int | None:
    """Bytes of the fullest device at its peak, or None where the device does not report it.

    A GPU's or TPU's peak is that since the process began: making the state is in it. On CPUs it is what the process
    has grown by over `before`, since `begin`.
    """
    peak = 0
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        peak = max(peak, stats.get("peak_bytes_in_use", 0))
    if not peak and before and jax.default_backend() == "cpu":
        peak = (resident("VmHWM") - before) // mesh.size
    return peak or None


def resident(key: str, forget_peak: bool = False) -> int:
    """Bytes of this process that are in memory: VmRSS now, VmHWM at most since forget_peak. 0 except on Linux."""
    try:
        if forget_peak:
            ctypes.CDLL(None).malloc_trim(0)  # what the compiler has freed would still be counted
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", status)[1])
    except (OSError, AttributeError):
        return 0


def random_batch(config: ConfigDict, mesh) -> dict[str, jax.Array]:
    """One document a row, so that attention skips no block that a prediction counts."""
    rng = np.random.default_rng(config.seed)
    m = config.model
    ends = {
        "tokens": m.vocab_size,
        "enc_tokens": m.vocab_size,
        "targets": m.num_labels or m.vocab_size,
        "labels": max(m.num_labels, 2),
    }
    _, shapes = abstract_inputs(config, mesh)
    batch = {}
    for name, x in shapes.items():
        values = 1
        if name in ends:
            values = rng.integers(0, ends[name], x.shape)
        elif name in ("positions", "enc_positions", "reach"):
            values = np.arange(x.shape[-1])
        whole = np.broadcast_to(values, x.shape).astype(x.dtype)
        batch[name] = jax.device_put(whole, x.sharding)
    return batch
