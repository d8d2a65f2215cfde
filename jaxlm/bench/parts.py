"""The parts of a step and of a run, each alone: where the time goes."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.config.recipe import flatten
from jaxlm.data.batches import train_batches
from jaxlm.errors import UserError
from jaxlm.kernels.cross_entropy import Mix, weighted
from jaxlm.models.attention import Attention, self_context
from jaxlm.models.layers import MLP
from jaxlm.models.transformer import unembedding
from jaxlm.parallel import hosts
from jaxlm.parallel.mesh import make_mesh, partition_spec, shardings
from jaxlm.run.checkpoint import Checkpoints, items, on_host
from jaxlm.step.costs import human, reach
from jaxlm.step.losses import rows_of
from jaxlm.step.state import apply_gradients, gradients, init_state

REPEATS = 10
SAVES = 5  # of a checkpoint
OTHER_WORK = (
    8_000_000  # numbers touched between them, as a step would, so that no state is in the caches
)


def median(f: Callable, repeats: int = REPEATS) -> float:
    """Seconds of a call whose result is waited for, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(f())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def forward_and_backward(f: Callable, *args) -> float:
    """Seconds of f(*args), an array, and of its gradients for all of args."""
    both = jax.jit(lambda *args: jax.vjp(f, *args)[1](jnp.ones_like(jax.eval_shape(f, *args))))
    return median(partial(both, *args))


def layer(module: nn.Module, mesh, x_BTD, *rest) -> float:
    """Seconds of one layer, forward and backward, its parameters sharded as in the model."""

    # the first: no cache
    def call(variables, x):
        return jax.tree.leaves(module.apply(variables, x, *rest))[0]

    make = partial(module.init, jax.random.key(0), x_BTD, *rest)
    boxed = jax.eval_shape(make)
    places = shardings(nn.unbox(boxed), nn.get_partition_spec(boxed), mesh)
    return forward_and_backward(
        call, jax.jit(lambda: nn.unbox(make()), out_shardings=places)(), x_BTD
    )


def step_parts(config: ConfigDict, mesh) -> dict[str, float]:
    """Milliseconds a step of what can be taken out of it. config: resolved."""
    c = FrozenConfigDict(config)
    state = init_state(config, mesh)
    found = {}
    rows = train_batches(config, hosts.local_rows(mesh, c.train.batch_size))[0]
    batch = hosts.to_global(rows, mesh, c.train.batch_size)
    B, T = rows_of(batch)["tokens"].shape
    place = jax.NamedSharding(
        mesh, partition_spec(("batch", "residual", None), (B, T, c.model.embed_dim), mesh)
    )
    x_BTD = jax.jit(
        lambda: jax.random.normal(jax.random.key(1), (B, T, c.model.embed_dim), c.model.dtype),
        out_shardings=place,
    )()
    if c.model.name in ("decoder", "encoder"):  # of one stack
        m = c.model
        flat = rows_of(batch)
        segments = flat["segments"] if c.data.isolate else None
        causal = m.name == "decoder"
        context = self_context(m, segments, segments, flat["positions"], None, None, None)
        kinds = (m.layers * m.num_layers)[: m.num_layers]
        seen = reach(config)
        one = {}
        for kind in set(kinds):
            one[kind] = layer(Attention(m, seen[kind], causal), mesh, x_BTD, context, None)
        found["attention"] = sum(one[kind] for kind in kinds)
        if not m.num_experts:
            found["MLP"] = m.num_layers * layer(MLP(m, m.mlp_dim), mesh, x_BTD)
    if c.task.name == "lm":
        table = unembedding(state.params)
        options = {"softcap": c.model.logit_softcap, "chunk": c.train.loss_chunk}

        def loss(x, table):
            return weighted(x, table, batch["targets"], batch["weights"], Mix(), **options)[0]

        found["loss"] = forward_and_backward(loss, x_BTD, table)
    grads, sums = jax.jit(
        lambda s, batch: gradients(s.params, batch, jax.random.key(0), c, s.teacher)
    )(state, batch)
    update = jax.jit(partial(apply_gradients, config=c))
    found["optimizer"] = median(lambda: update(state, grads, sums))
    return {name: 1e3 * seconds for name, seconds in found.items()}


def loader(config: ConfigDict, mesh) -> dict[str, float]:
    """Batches alone, made on one thread as a run makes them: this host's rows."""
    began = time.perf_counter()
    count = 0
    batches = train_batches(config, hosts.local_rows(mesh, config.train.batch_size))
    tokens = len(batches[0]["tokens"]) * config.data.seq_len
    opened = time.perf_counter() - began
    began = time.perf_counter()
    while time.perf_counter() - began < 1:
        count += 1
        batches[count]
    seconds = (time.perf_counter() - began) / count
    return {
        "ms_a_batch": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "open_ms": 1e3 * opened,
    }


def checkpoint(config: ConfigDict, mesh) -> dict[str, float]:
    """A save: how long the loop waits for it, beside the state's copy alone, and how long until it is written."""
    state = init_state(config, mesh)
    found = {"blocked_ms": [], "copy_ms": [], "written_ms": []}
    other = np.ones(OTHER_WORK)
    size = sum(x.nbytes for x in jax.tree.leaves(items(state)))
    new_arrays = jax.jit(
        lambda state: jax.tree.map(jnp.copy, state)
    )  # what has been read once is kept on the host

    def timed(f: Callable) -> float:
        nonlocal state, other
        state = jax.block_until_ready(new_arrays(state.replace(step=state.step + 1)))
        other = other * 1.0
        began = time.perf_counter()
        f()
        return 1e3 * (time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), config)
        for _ in range(SAVES + 1):
            found["copy_ms"].append(timed(lambda: on_host(items(state))))
            found["blocked_ms"].append(
                timed(lambda: checkpoints.save(state, {"config": flatten(config)}))
            )
            began = time.perf_counter()
            checkpoints.wait()
            found["written_ms"].append(
                found["blocked_ms"][-1] + 1e3 * (time.perf_counter() - began)
            )
        checkpoints.close()
    return {"bytes": size} | {name: float(np.median(times[1:])) for name, times in found.items()}


def start(command: list[str]) -> dict[str, float]:
    """Seconds from a command of jaxlm.train to its first step, with no compiled programs and with a run's; of imports.

    In processes of their own, which need the devices that are here: to be called before this one takes them.
    """
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jaxlm.train.__main__"], check=True)
    found = {"imports_s": time.perf_counter() - began}
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
        for name in ("cold_s", "warm_s"):
            words = [sys.executable, "-m", "jaxlm.train", *command, f"--workdir={folder}/{name}"]
            began = time.perf_counter()
            with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as run:
                first = next((line for line in run.stdout if line.startswith("step ")), None)
                if first is None:
                    raise UserError(f"jaxlm.train ended before its first step: {' '.join(words)}")
                found[name] = time.perf_counter() - began
                run.kill()
    print(
        f"start           {found['warm_s']:10.2f} s from the command to the first step; {found['cold_s']:.2f} s where "
        f"nothing is compiled yet; imports {found['imports_s']:.2f} s",
        flush=True,
    )
    return found


def parts(config: ConfigDict, step_ms: float) -> dict[str, dict]:
    """Of a step, of its data and of a checkpoint, printed as they come. config: resolved."""
    found = {}
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        found["step"] = step_parts(config, mesh)
        found["step"]["rest"] = step_ms - sum(found["step"].values())
        for name, ms in found["step"].items():
            more = " (each part was timed alone)" * (name == "rest")
            print(f"  {name:14}{ms:10.2f} ms, {ms / step_ms:.0%} of the step{more}", flush=True)
        f = found["data"] = loader(config, mesh)
        print(
            f"  data          {f['ms_a_batch']:10.2f} ms a batch, beside the step: {f['tokens_per_second']:,.0f} "
            f"tokens/s; opened in {f['open_ms']:.0f} ms",
            flush=True,
        )
        f = found["checkpoint"] = checkpoint(config, mesh)
    print(
        f"  checkpoint    {f['blocked_ms']:10.2f} ms in the loop, of {human(f['bytes'])}, whose copy to the host "
        f"takes {f['copy_ms']:.2f} ms; written after {f['written_ms']:.0f} ms",
        flush=True,
    )
    return found
