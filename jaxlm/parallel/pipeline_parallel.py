"""Pipeline parallelism: the stacked layers in stages, microbatches flowing through them (Huang et al. 2019, GPipe).

All stages are one vmapped function whose leading dimension is sharded over the mesh axis `stage`; passing activations
on is a rotation of that dimension (Xu et al. 2021, GSPMD, section 3.3). With `rounds` > 1 each stage holds several
parts of the layers and a microbatch goes round the ring several times (the circular schedule: Narayanan et al. 2021).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel.mesh import constrain


def bubble_fraction(stages: int, microbatches: int, rounds: int) -> float:
    """Part of the time in which a stage has nothing to do."""
    return (stages - 1) / (rounds * microbatches + stages - 1)


def pipeline(apply: Callable, layers, x_BTD, rows, *, stages: int, microbatches: int, rounds: int):
    """(x, extra) after all layers.

    apply(layers, x, rows, number) -> (x, extra): some of the layers on some rows; `number` differs from call to call.
    layers: tree of [R, ...] with R divided by stages x rounds. rows: tree of [B, ...] that travels with x [B, T, D].
    extra: tree of [rounds, stages, microbatches, ...], what the calls for these layers and rows returned. Row i of the
    batch is in microbatch i % microbatches, so that every device keeps its own rows. Needs microbatches >= stages where
    rounds > 1: a microbatch must be back before its next round.
    """
    S = stages
    M = microbatches
    V = rounds
    if V > 1 and M < S:
        raise ValueError(
            f"{rounds} rounds over {stages} stages need at least {stages} microbatches, not {microbatches}"
        )

    def split(a):
        return a.reshape(-1, M, *a.shape[1:]).swapaxes(0, 1)

    stage_S = jnp.arange(S)

    def own_layers(a):  # [R, ...] -> [S, V, R / (S V), ...]
        a = a.reshape(V, S, -1, *a.shape[1:]).swapaxes(0, 1)
        others = [PartitionSpec.UNCONSTRAINED] * (a.ndim - 1)
        return jax.lax.with_sharding_constraint(a, PartitionSpec("stage", *others))

    def run(stage, layers, x, i):
        unit = i - stage  # microbatches of all rounds, in the order in which they enter
        place = jnp.clip(unit // M, 0, V - 1)
        layers = jax.tree.map(
            lambda a: a[0] if V == 1 else jax.lax.dynamic_index_in_dim(a, place, 0, False), layers
        )
        mine = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, unit % M, 0, False), micro)
        return apply(layers, x, mine, i * S + stage)

    def store(
        buffer_SM, x_S, i
    ):  # what comes round to stage 0 waits there for its next round, or for the end
        return jax.vmap(
            lambda b, x: jnp.where(
                i >= S, jax.lax.dynamic_update_index_in_dim(b, x, (i - S) % M, 0), b
            ),
            spmd_axis_name="stage",
        )(buffer_SM, x_S)

    def iteration(carry, i):
        x_S, buffer_SM = carry
        x_S = jnp.roll(x_S, 1, axis=0)
        buffer_SM = store(buffer_SM, x_S, i)
        waiting_S = jax.lax.dynamic_index_in_dim(buffer_SM, i % M, 1, False)
        x_S = jnp.where((stage_S == 0)[:, None, None, None], waiting_S, x_S)
        x_S = constrain(x_S, "stage", "batch", "residual", None)
        x_S, extra = jax.vmap(run, (0, 0, 0, None), spmd_axis_name="stage")(stage_S, layers, x_S, i)
        return (constrain(x_S, "stage", "batch", "residual", None), buffer_SM), extra

    layers = jax.tree.map(own_layers, layers)
    micro = jax.tree.map(split, rows)
    x_MBTD = split(x_BTD)
    buffer_SM = jnp.where((stage_S == 0)[:, None, None, None, None], x_MBTD[None], 0)
    buffer_SM = constrain(buffer_SM, "stage", None, "batch", "residual", None)
    start = jnp.zeros((S, *x_MBTD.shape[1:]), x_BTD.dtype)
    (x_S, buffer_SM), extra = jax.lax.scan(iteration, (start, buffer_SM), jnp.arange(V * M + S - 1))
    out_MBTD = store(buffer_SM, jnp.roll(x_S, 1, axis=0), V * M + S - 1)[0]
    # Stage s meets microbatch m for round v at iteration v M + m + s; what it did before and after is the bubble.
    when_VSM = jnp.arange(V)[:, None, None] * M + stage_S[:, None] + jnp.arange(M)
    extra = jax.tree.map(lambda a: a[when_VSM, stage_S[:, None]], extra)
    return constrain(out_MBTD.swapaxes(0, 1).reshape(x_BTD.shape), "batch", "residual", None), extra
