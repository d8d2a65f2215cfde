"""The parts of a step and of a run, each alone: where the time goes."""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.config.recipe import flatten
from jaxlm.config.tasks import task_of
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
from jaxlm.step.forward import rows_of
from jaxlm.step.state import State, apply_gradients, gradients, init_state

REPEATS = 10
SAVES = 5  # of a checkpoint
# Numbers touched between saves, as a step would, so that no state is in the caches.
OTHER_WORK = 8_000_000
ONE_STACK = ("decoder", "encoder")


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

    def both(*args):
        result, pullback = jax.vjp(f, *args)
        return pullback(jnp.ones_like(result))

    return median(partial(jax.jit(both), *args))


def layer(module: nn.Module, mesh, x_BTD, *rest) -> float:
    """Seconds of one layer, forward and backward, its parameters sharded as in the model."""

    def call(variables, x):
        outputs = module.apply(variables, x, *rest)
        return jax.tree.leaves(outputs)[0]  # without a cache

    def variables():
        return module.init(jax.random.key(0), x_BTD, *rest)

    boxed = jax.eval_shape(variables)
    places = shardings(nn.unbox(boxed), nn.get_partition_spec(boxed), mesh)
    made = jax.jit(lambda: nn.unbox(variables()), out_shardings=places)()
    return forward_and_backward(call, made, x_BTD)


def step_parts(config: ConfigDict, mesh) -> dict[str, float]:
    """Milliseconds a step of what can be taken out of it. config: resolved."""
    c = FrozenConfigDict(config)
    state = init_state(config, mesh)
    rows = train_batches(config, hosts.local_rows(mesh, c.train.batch_size))[0]
    batch = hosts.to_global(rows, mesh, c.train.batch_size)
    x_BTD = random_residual(c, batch, mesh)
    seconds = {}
    if c.model.name in ONE_STACK:
        seconds["attention"] = attention_seconds(c, reach(config), batch, x_BTD, mesh)
        if not c.model.num_experts:
            one = layer(MLP(c.model, c.model.mlp_dim), mesh, x_BTD)
            seconds["MLP"] = c.model.num_layers * one
    if task_of(c).is_plain_lm:
        seconds["loss"] = loss_seconds(c, state, batch, x_BTD)
    seconds["optimizer"] = optimizer_seconds(c, state, batch)
    return {name: 1e3 * value for name, value in seconds.items()}


def random_residual(c: FrozenConfigDict, batch: dict, mesh) -> jax.Array:
    """[B, T, D] random numbers, sharded as what layers hand to each other."""
    B, T = rows_of(batch)["tokens"].shape
    shape = (B, T, c.model.embed_dim)
    place = jax.NamedSharding(mesh, partition_spec(("batch", "residual", None), shape, mesh))
    normal = partial(jax.random.normal, shape=shape, dtype=c.model.dtype)
    return jax.jit(normal, out_shardings=place)(jax.random.key(1))


def attention_seconds(
    c: FrozenConfigDict, seen: dict[str, int], batch: dict, x_BTD: jax.Array, mesh
) -> float:
    """Of all layers; each kind of layer is timed once. seen: {kind of layer: tokens that it looks back}."""
    m = c.model
    rows = rows_of(batch)
    segments = rows["segments"] if c.data.isolate else None
    context = self_context(m, segments, segments, rows["positions"], None, None, None)
    kinds = (m.layers * m.num_layers)[: m.num_layers]
    total = 0.0
    for kind, count in Counter(kinds).items():
        attention = Attention(m, seen[kind], m.name == "decoder")
        total += count * layer(attention, mesh, x_BTD, context, None)
    return total


def loss_seconds(c: FrozenConfigDict, state: State, batch: dict, x_BTD: jax.Array) -> float:
    """Of the logits and the loss of a language model."""
    options = {"softcap": c.model.logit_softcap, "chunk": c.train.loss_chunk}

    def loss(x, table):
        return weighted(x, table, batch["targets"], batch["weights"], Mix(), **options)[0]

    return forward_and_backward(loss, x_BTD, unembedding(state.params))


def optimizer_seconds(c: FrozenConfigDict, state: State, batch: dict) -> float:
    @jax.jit
    def gradients_of(state, batch):
        return gradients(state.params, batch, jax.random.key(0), c, state.teacher)

    grads, sums = gradients_of(state, batch)
    update = jax.jit(partial(apply_gradients, config=c))
    return median(partial(update, state, grads, sums))


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


@jax.jit
def copied(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


def checkpoint(config: ConfigDict, mesh) -> dict[str, float]:
    """A save: how long the loop waits for it, beside the state's copy alone, and how long until it is written.

    Each works on new arrays: what has been read once is kept on the host. Other numbers are touched before it.
    """
    state = init_state(config, mesh)
    other = np.ones(OTHER_WORK)
    found = {"blocked_ms": [], "copy_ms": [], "written_ms": []}

    def renew() -> float:
        """Makes the next state; returns when the clock starts."""
        nonlocal state, other
        state = jax.block_until_ready(copied(state.replace(step=state.step + 1)))
        other = other * 1.0
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), config)
        for _ in range(SAVES + 1):
            began = renew()
            on_host(items(state))
            found["copy_ms"].append(1e3 * (time.perf_counter() - began))
            began = renew()
            checkpoints.save(state, {"config": flatten(config)})
            found["blocked_ms"].append(1e3 * (time.perf_counter() - began))
            checkpoints.wait()
            found["written_ms"].append(1e3 * (time.perf_counter() - began))
        checkpoints.close()
    result = {"bytes": sum(x.nbytes for x in jax.tree.leaves(items(state)))}
    for name, times in found.items():
        result[name] = float(np.median(times[1:]))  # the first makes folders and threads
    return result


def time_start(command: list[str]) -> dict[str, float]:
    """Seconds from a command of jaxlm.train to its first step, with no compiled programs and with a run's; of imports.

    In processes of their own, which need the devices that are here: to be called before this one takes them. Raises
    UserError where the run ends before its first step.
    """
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jaxlm.train.__main__"], check=True)
    found = {"imports_s": time.perf_counter() - began}
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
        for name in ("cold_s", "warm_s"):
            words = [sys.executable, "-m", "jaxlm.train", *command, f"--workdir={folder}/{name}"]
            found[name] = seconds_to_first_step(words, env)
    print(
        f"start           {found['warm_s']:10.2f} s from the command to the first step; {found['cold_s']:.2f} s where "
        f"nothing is compiled yet; imports {found['imports_s']:.2f} s",
        flush=True,
    )
    return found


def seconds_to_first_step(words: list[str], env: dict[str, str]) -> float:
    """Of a command of jaxlm.train, which is ended then. Raises UserError where it ends by itself."""
    began = time.perf_counter()
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("step "):
                took = time.perf_counter() - began
                run.kill()
                return took
    raise UserError(f"jaxlm.train ended before its first step: {' '.join(words)}")


def time_parts(config: ConfigDict, step_ms: float) -> dict[str, dict]:
    """Of a step, of its data and of a checkpoint, printed as they come. config: resolved."""
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        step = step_parts(config, mesh)
        step["rest"] = step_ms - sum(step.values())
        for name, ms in step.items():
            more = " (each part was timed alone)" if name == "rest" else ""
            print(f"  {name:14}{ms:10.2f} ms, {ms / step_ms:.0%} of the step{more}", flush=True)
        data = loader(config, mesh)
        print(
            f"  data          {data['ms_a_batch']:10.2f} ms a batch, beside the step: "
            f"{data['tokens_per_second']:,.0f} tokens/s; opened in {data['open_ms']:.0f} ms",
            flush=True,
        )
        save = checkpoint(config, mesh)
    print(
        f"  checkpoint    {save['blocked_ms']:10.2f} ms in the loop, of {human(save['bytes'])}, whose copy to the host "
        f"takes {save['copy_ms']:.2f} ms; written after {save['written_ms']:.0f} ms",
        flush=True,
    )
    return {"step": step, "data": data, "checkpoint": save}
