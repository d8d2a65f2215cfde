"""A compiled train step run on the devices that are here: what a prediction (jaxlm/predict.py) is compared with."""

import re
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxlm.state import abstract_inputs, init_state

WARM_UP, STEPS = 3, 10  # the first steps load programs and choose among kernels


class Measured(NamedTuple):
    seconds: float  # of a step, the mean of STEPS after WARM_UP
    memory: int | None  # bytes of the fullest device at its peak; of CPUs what the process grew by, shared by them


def measure(config: ConfigDict, mesh, compiled: jax.stages.Compiled) -> Measured:
    """Runs `compiled`, the train step of a resolved config on this mesh, from its initial state on one random batch.

    A GPU's or TPU's peak is that since the process began: making the state is in it. On CPUs the growth of the process
    has buffers of XLA and Python in it too, 0.1 GiB or so. None where neither is told.
    """
    before = resident("VmRSS", forget_peak=True)
    state, batch = init_state(config, mesh), random_batch(config, mesh)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, _ = compiled(state, batch)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / STEPS
    peak = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in mesh.local_devices)
    grown = (resident("VmHWM") - before) // mesh.size if jax.default_backend() == "cpu" and before else 0
    return Measured(seconds, peak or grown or None)


def resident(key: str, forget_peak: bool = False) -> int:
    """Bytes of this process that are in memory, VmRSS: now, VmHWM: at most since forget_peak. 0 where Linux is not."""
    try:
        if forget_peak:
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    except OSError:
        return 0


def random_batch(config: ConfigDict, mesh) -> dict[str, jax.Array]:
    """Of one document a row: no block of attention is skipped that a prediction counts."""
    rng, shapes = np.random.default_rng(config.seed), abstract_inputs(config, mesh)[1]
    B, T = shapes["tokens"].shape
    window = rng.integers(0, config.model.vocab_size, (B, T + 1), np.int32)
    ones = np.ones((B, T), np.int32)
    made = {"tokens": window[:, :-1], "targets": window[:, 1:], "weights": ones.astype(jnp.float32),
            "positions": ones * np.arange(T, dtype=np.int32), "segments": ones}  # fmt: skip
    return {name: jax.device_put(x, shapes[name].sharding) for name, x in made.items()}
