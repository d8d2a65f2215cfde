"""The train step of a config, timed on the devices that are here."""

import time

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.data.batches import Prefetch, train_batches
from jaxlm.parallel import hosts
from jaxlm.parallel.chips import peak_flops
from jaxlm.parallel.mesh import make_mesh
from jaxlm.plan.measure import Times, begin, peak_memory, time_steps
from jaxlm.step import costs
from jaxlm.step.state import (
    abstract_inputs,
    abstract_state,
    check_sharding,
    init_state,
    jit_train_step,
)

WARM_UP = 5  # steps before those that are timed
SPREAD = {"min": 0, "p10": 10, "p90": 90, "max": 100}  # name -> percentile


class Running:
    """The compiled step of a resolved config, its state and its batches: to be timed, again and again."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.mesh = make_mesh(config)
        self.at = 0  # the next batch
        self.state = None
        check_sharding(config, self.mesh)
        self.batches = train_batches(config, hosts.local_rows(self.mesh, config.train.batch_size))
        with jax.set_mesh(self.mesh):
            began = time.perf_counter()
            step = jit_train_step(config, self.mesh)
            self.step = step.lower(*abstract_inputs(config, self.mesh)).compile()
            self.compile_s = time.perf_counter() - began

    def place(self, rows: dict) -> dict:
        return hosts.to_global(rows, self.mesh, self.config.train.batch_size)

    def time(self, steps: int, warm_up: int = WARM_UP) -> tuple[Times, list[float]]:
        """(times, losses) of so many steps, after a warm-up."""
        start = self.at
        self.at += warm_up + steps + 1
        with jax.set_mesh(self.mesh):
            if self.state is None:
                self.state = init_state(self.config, self.mesh)
            ready = Prefetch(self.batches, start, self.at, self.config.data.prefetch, self.place)
            times, self.state, losses = time_steps(self.step, self.state, ready, steps, warm_up)
            ready.close()
        return times, losses


def time_step(config: ConfigDict, steps: int) -> dict:
    """The figures of a resolved config, as --json has them: milliseconds a step and what they are made of."""
    run = Running(config)
    mesh = run.mesh
    with jax.set_mesh(mesh):
        run.state, before = begin(config, mesh, run.step, run.place(run.batches[0]))
    times, losses = run.time(steps)
    peak_bytes = peak_memory(mesh, before)
    seconds = float(np.median(times.step))
    tokens = config.train.batch_size * config.data.seq_len
    flops = costs.flops_per_token(config, abstract_state(config)[0].params)
    mfu = None
    peak = peak_flops(mesh.local_devices[0].device_kind)
    if peak:
        mfu = flops * tokens / seconds / (peak * mesh.size)
    return {
        "step_ms": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": mfu,
        "data_wait_ms": 1e3 * float(np.mean(times.data)),
        "host_ms": 1e3 * float(np.median(times.host)),
        "compile_s": run.compile_s,
        "peak_bytes": peak_bytes,
        "step_ms_spread": spread(times),
        "steps": steps,
        "loss": losses[-1],
        "flops_per_token": flops,
        "parameters": costs.num_parameters(run.state.params),
        "tokens_per_step": tokens,
        "attention": dict(costs.attention_lines(config, mesh)).get("attention"),
    }


def spread(times: Times) -> dict[str, float]:
    """Milliseconds a step."""
    found = {}
    for name, percent in SPREAD.items():
        found[name] = 1e3 * float(np.percentile(times.step, percent))
    return found


def lines(figures: dict) -> list[str]:
    """The figures as people read them."""
    f = figures
    low = figures["step_ms_spread"]
    share = f["data_wait_ms"] / f["step_ms"]
    mfu = "no peak is known for this chip"
    if f["mfu"] is not None:
        mfu = f"{f['mfu']:.1%}"
    peak = "not known here"
    if f["peak_bytes"] is not None:
        peak = costs.human(f["peak_bytes"])
    return [
        f"step            {f['step_ms']:10.2f} ms, the median of {f['steps']} (min {low['min']:.2f}, "
        f"10-90%: {low['p10']:.2f}-{low['p90']:.2f}, max {low['max']:.2f})",
        f"tokens/s        {f['tokens_per_second']:10,.0f}",
        f"MFU             {mfu:>10}  (6 per parameter + 12 x width x length a layer, as PaLM counts)",
        f"waits for data  {f['data_wait_ms']:10.3f} ms a step, {share:.2%}",
        f"host            {f['host_ms']:10.3f} ms a step, in Python",
        f"compile         {f['compile_s']:10.2f} s",
        f"peak memory     {peak:>10}",
    ]
