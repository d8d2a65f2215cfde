"""Pipeline parallelism: the stacked layers in stages, microbatches flowing through them (Huang et al. 2019, GPipe).

All stages are one vmapped function whose leading dimension is sharded over the mesh axis `stage`; passing activations
on is a rotation of that dimension (Xu et al. 2021, GSPMD, section 3.3). With `rounds` > 1 each stage holds several
parts of the layers and a microbatch goes round the ring several times (the circular schedule: Narayanan et al. 2021).

Letters: S stages, M microbatches, V rounds, R layers; the others are those of jaxlm/models/__init__.py.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel.mesh import constrain


def bubble_fraction(stages: int, microbatches: int, rounds: int) -> float:
    """Part of the time in which a stage has nothing to do."""
    return (stages - 1) / (rounds * microbatches + stages - 1)


def split_rows(tree, parts: int):
    """[B, ...] -> [parts, B / parts, ...] for every leaf. Row i goes to part i % parts: every device keeps its rows."""

    def split(x):
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def pipeline(
    apply: Callable,
    layers,
    x_BTD: jax.Array,
    rows,
    *,
    stages: int,
    microbatches: int,
    rounds: int,
) -> tuple[jax.Array, dict]:
    """(x [B, T, D], extra) after all layers.

    apply(layers, x, rows, number) -> (x, extra): some of the layers on some rows; `number` differs from call to call.
    layers: tree of [R, ...] with R divided by stages x rounds. rows: tree of [B, ...] that travels with x [B, T, D].
    extra: tree of [rounds, stages, microbatches, ...], what the calls for these layers and rows returned. Row i of the
    batch is in microbatch i % microbatches. Raises ValueError where rounds > 1 and microbatches < stages: a microbatch
    must be back before its next round.
    """
    S = stages
    M = microbatches
    V = rounds
    if V > 1 and M < S:
        raise ValueError(f"{V} rounds over {S} stages need at least {S} microbatches, not {M}")
    layers = jax.tree.map(partial(split_layers, S=S, V=V), layers)
    rows_M = split_rows(rows, M)
    x_MBTD = split_rows(x_BTD, M)
    stage_S = jnp.arange(S)
    is_first = (stage_S == 0)[:, None, None, None]

    def run_stage(stage, layers, x, i):
        unit = i - stage  # microbatches of all rounds, in the order in which they enter
        turn = jnp.clip(unit // M, 0, V - 1)
        own = jax.tree.map(lambda leaf: layers_of_round(leaf, turn), layers)
        mine = jax.tree.map(lambda leaf: at_index(leaf, unit % M), rows_M)
        return apply(own, x, mine, i * S + stage)

    def iteration(carry, i):
        x_S, waiting_SM = carry
        x_S = jnp.roll(x_S, 1, axis=0)
        waiting_SM = store(waiting_SM, x_S, i, S, M)
        entering_S = at_index(waiting_SM, i % M, axis=1)
        x_S = jnp.where(is_first, entering_S, x_S)
        x_S = constrain(x_S, "stage", "batch", "residual", None)
        run = jax.vmap(run_stage, (0, 0, 0, None), spmd_axis_name="stage")
        x_S, extra = run(stage_S, layers, x_S, i)
        x_S = constrain(x_S, "stage", "batch", "residual", None)
        return (x_S, waiting_SM), extra

    waiting_SM = jnp.where(is_first[..., None], x_MBTD[None], 0)
    waiting_SM = constrain(waiting_SM, "stage", None, "batch", "residual", None)
    start_S = jnp.zeros((S, *x_MBTD.shape[1:]), x_BTD.dtype)
    last = V * M + S - 1
    carry, extra = jax.lax.scan(iteration, (start_S, waiting_SM), jnp.arange(last))
    x_S, waiting_SM = carry
    out_MBTD = store(waiting_SM, jnp.roll(x_S, 1, axis=0), last, S, M)[0]
    out_BTD = out_MBTD.swapaxes(0, 1).reshape(x_BTD.shape)
    out_BTD = constrain(out_BTD, "batch", "residual", None)
    return out_BTD, jax.tree.map(partial(without_bubble, S=S, M=M, V=V), extra)


def without_bubble(leaf: jax.Array, S: int, M: int, V: int) -> jax.Array:
    """[iterations, S, ...] -> [V, S, M, ...].

    Stage s meets microbatch m for round v at iteration v M + m + s; what it did before and after is the bubble.
    """
    stage_S1 = jnp.arange(S)[:, None]
    when_VSM = jnp.arange(V)[:, None, None] * M + stage_S1 + jnp.arange(M)
    return leaf[when_VSM, stage_S1]


def split_layers(leaf: jax.Array, S: int, V: int) -> jax.Array:
    """[R, ...] -> [S, V, R / (S V), ...], on the devices of their stages."""
    leaf = leaf.reshape(V, S, -1, *leaf.shape[1:]).swapaxes(0, 1)
    others = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec("stage", *others))


def layers_of_round(leaf: jax.Array, turn: jax.Array) -> jax.Array:
    """[V, ...] -> [...], of this round."""
    if leaf.shape[0] == 1:
        return leaf[0]
    return at_index(leaf, turn)


def at_index(x: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False)


def store(
    waiting_SM: jax.Array,
    x_S: jax.Array,
    i: jax.Array,
    S: int,
    M: int,
) -> jax.Array:
    """waiting [S, M, B, T, D] with what the stages passed on in iteration i, x [S, B, T, D].

    What comes round to stage 0 waits there for its next round, or for the end.
    """

    def put(waiting_M, x):
        new_M = jax.lax.dynamic_update_index_in_dim(waiting_M, x, (i - S) % M, 0)
        return jnp.where(i >= S, new_M, waiting_M)

    return jax.vmap(put, spmd_axis_name="stage")(waiting_SM, x_S)
