"""Experts on a mesh: which device computes which expert for which token, and what is sent for it.

The batch is sharded over the expert axis too, so tokens travel to their experts and back. Shapes being static, there
are two ways, chosen by whether an expert's tokens are limited:

- Dropless: every device along the expert axis gets the tokens of all (all-gather), computes the assignments to its
  own experts, sorted by expert, and the results are summed where the tokens came from (reduce-scatter). An all-to-all
  that may drop nothing needs room for every token at every device, and would send min(X, E / n) copies where this
  sends one. Memory on each of n devices with N tokens: n N rows gathered, and n N min(X, E / n) sorted, whatever the
  load.
- Slots: each expert takes at most C tokens of a row, the first that chose it (GShard: Lepikhin et al. 2020), and
  buffers [E, B, C, D] go through one all-to-all there and one back. Rows are gathered whole first, so what is dropped
  does not depend on the mesh; the slots are then split over the devices that gathered the same row.

Letters: B batch, T positions, D embed, F MLP, E experts, X experts per token, N = B T tokens, M rows sorted by expert,
C slots. "Residual" activations are as in linear.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel.linear import activation_specs, sum_parts
from jaxlm.parallel.mesh import (
    even_mesh,
    gather,
    gather_weight,
    names_of,
    partition_spec,
    scatter_sum,
)


class Axes(NamedTuple):
    """Mesh axes that shard each dimension, empty ones without a mesh; and how many experts a device has."""

    experts: tuple[str, ...]
    positions: tuple[str, ...]  # of residual activations
    mlp: tuple[str, ...]
    count: int


def mixture(
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    places_T: jax.Array,
    router: dict[str, jax.Array],
    kernels: dict[str, jax.Array],
    logical: dict[str, tuple],
    *,
    route: Callable,
    mlp: Callable,
    slots: int,
) -> tuple[jax.Array, dict]:
    """(y, sums): residual activations [B, T, D], and `route`'s sums over each whole row, [B, ...].

    places: int32 [T], of the tokens in their rows. slots: tokens of a row that an expert takes, the first; 0: all.
    router, kernels: dicts of weights, the kernels [E, ...]; logical: the logical axes of each by name.
    route(x_BTD, segments_BT, router) -> (ids, weights, sums): the experts of each token, int32 [B, T, X] without
    repeats, E where it has none; float32 [B, T, X]; a tree of [B, ...].
    mlp(kernels, rows, sizes_E) -> rows: the experts on [M, D] sorted by expert, or on [E, M, D] where sizes is None.
    """
    compute = partial(route_and_run, route=route, slots=slots)
    mesh = even_mesh(*x_BTD.shape[:2])
    if mesh is None:
        axes = Axes((), (), (), len(kernels["up"]))
        run = partial(mlp, kernels)
        return compute(x_BTD, segments_BT, places_T, router, run, axes)
    batch, _, between, _ = activation_specs(*x_BTD.shape[:2], mesh)
    router_specs = weight_specs(router, logical, mesh)
    kernel_specs = weight_specs(kernels, logical, mesh)
    up = dict(zip(logical["up"], kernel_specs["up"]))

    def on_shard(x, segments, places, router, kernels):
        whole_router = {}
        for name, weight in router.items():
            whole_router[name] = gather_weight(weight, router_specs[name], x)

        def run(rows, sizes):
            return mlp(gather_kernels(kernels, kernel_specs, logical, x), rows, sizes)

        axes = Axes(
            experts=names_of(up["expert"]),
            positions=names_of(between),
            mlp=names_of(up["mlp"]),
            count=len(kernels["up"]),
        )
        return compute(x, segments, places, whole_router, run, axes)

    residual = PartitionSpec(batch, between)
    call = jax.shard_map(
        on_shard,
        in_specs=(residual, residual, PartitionSpec(), router_specs, kernel_specs),
        out_specs=(residual, PartitionSpec(batch)),
        check_vma=False,
    )
    return call(x_BTD, segments_BT, places_T, router, kernels)


def route_and_run(
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    places_T: jax.Array,
    router: dict[str, jax.Array],
    run: Callable,
    axes: Axes,
    *,
    route: Callable,
    slots: int,
) -> tuple[jax.Array, dict]:
    """`mixture` of one device's shards. run(rows, sizes) -> rows: `mlp` of this device's experts."""
    ids_BTX, weights_BTX, sums = route(x_BTD, segments_BT, router)
    if slots:
        y_BTD = by_slots(x_BTD, ids_BTX, weights_BTX, run, axes, places_T=places_T, slots=slots)
    else:
        y_BTD = by_sorting(x_BTD, ids_BTX, weights_BTX, run, axes)
    if axes.positions:
        sums = jax.lax.psum(sums, axes.positions)
    return y_BTD, sums


def weight_specs(weights: dict, logical: dict, mesh) -> dict[str, PartitionSpec]:
    specs = {}
    for name, weight in weights.items():
        specs[name] = partition_spec(logical[name], weight.shape, mesh)
    return specs


def gather_kernels(
    kernels: dict,
    specs: dict,
    logical: dict,
    like: jax.Array,
) -> dict:
    """Within shard_map: this device's experts, whole along `expert_embed`. like: the activations they will meet."""
    whole = {}
    for name, kernel in kernels.items():
        at = logical[name].index("expert_embed")
        entries = specs[name][at : at + 1]
        whole[name] = gather_weight(kernel, entries, like, start=at)
    return whole


# ---------------------------------------------------------------- dropless


def by_sorting(
    x_BTD: jax.Array,
    ids_BTX: jax.Array,
    weights_BTX: jax.Array,
    run: Callable,
    axes: Axes,
) -> jax.Array:
    """[B, T, D]: the weighted sum of each token's experts, none left out. run(rows [M, D], sizes) -> [M, D]."""
    # Devices with parts of F need the same tokens.
    shared = tuple(name for name in axes.positions if name in axes.mlp)

    def collect(a):
        return gather(gather(a, 0, axes.experts), 1, shared)

    x_BTD = collect(x_BTD)
    ids_BTX = collect(ids_BTX)
    weights_BTX = collect(weights_BTX)
    X = ids_BTX.shape[-1]
    E = axes.count
    first = 0
    if axes.experts:
        first = jax.lax.axis_index(axes.experts) * E
    ids = ids_BTX.reshape(-1) - first
    ids = jnp.where((ids >= 0) & (ids < E), ids, E)  # those of other devices last
    order = jnp.argsort(ids)
    sizes_E = jnp.sum(ids[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    used = jnp.sum(sizes_E)
    rows = len(ids) // X * min(X, E)
    source_M = jnp.where(jnp.arange(rows) < used, order[:rows], out_of_range(rows, len(ids)))
    target = jnp.where(ids < E, jnp.argsort(order), out_of_range(len(ids), rows))
    rows_MD = permute(repeat(x_BTD, X), source_M)
    y_MD = run(rows_MD, sizes_E)
    y_BTD = weighted_sum(permute(y_MD, target), weights_BTX).astype(x_BTD.dtype)
    return scatter_sum(sum_parts(y_BTD, axes.mlp, shared), 0, axes.experts)


# ---------------------------------------------------------------- slots


def by_slots(
    x_BTD: jax.Array,
    ids_BTX: jax.Array,
    weights_BTX: jax.Array,
    run: Callable,
    axes: Axes,
    *,
    places_T: jax.Array,
    slots: int,
) -> jax.Array:
    """As by_sorting, of the first `slots` tokens of a row that chose an expert. run([E, M, D], None) -> [E, M, D]."""
    x_BTD = gather(x_BTD, 1, axes.positions)
    ids_BTX = gather(ids_BTX, 1, axes.positions)
    weights_BTX = gather(weights_BTX, 1, axes.positions)
    B, _, X = ids_BTX.shape
    assignments = ids_BTX.size
    E = axes.count * num_devices(axes.experts)
    # Devices that hold the same rows and the same part of F share the slots.
    sharing = tuple(name for name in axes.positions if name not in axes.mlp)
    C = math.ceil(slots / num_devices(sharing))
    first = 0
    if sharing:
        first = jax.lax.axis_index(sharing) * C
    slot_BTX = earlier_choices(ids_BTX, places_T, E)
    own_BTX = (slot_BTX >= first) & (slot_BTX < jnp.minimum(first + C, slots))
    here_BTX = (ids_BTX < E) & own_BTX
    rows_B11 = jnp.arange(B)[:, None, None]
    target_BTX = (ids_BTX * B + rows_B11) * C + slot_BTX - first
    beyond = out_of_range(assignments, E * B * C)
    target = jnp.where(here_BTX.reshape(-1), target_BTX.reshape(-1), beyond)
    empty_M = out_of_range(E * B * C, assignments)
    source_M = empty_M.at[target].set(jnp.arange(assignments), mode="drop")
    rows_EBCD = permute(repeat(x_BTD, X), source_M).reshape(E, B, C, -1)
    rows_EBCD = all_to_all(rows_EBCD, axes.experts, 0, 1)
    y_EMD = run(rows_EBCD.reshape(axes.count, -1, rows_EBCD.shape[-1]), None)
    y_EBCD = all_to_all(y_EMD.reshape(rows_EBCD.shape), axes.experts, 1, 0)
    y_MD = permute(y_EBCD.reshape(E * B * C, -1), target)
    y_BTD = weighted_sum(y_MD, weights_BTX).astype(x_BTD.dtype)
    only_mlp = tuple(name for name in axes.mlp if name not in axes.positions)
    return sum_parts(y_BTD, axes.positions + only_mlp, axes.positions)


def num_devices(names: tuple[str, ...]) -> int:
    """Within shard_map: along these mesh axes."""
    return math.prod(map(jax.lax.axis_size, names))


def all_to_all(
    a: jax.Array,
    names: tuple[str, ...],
    split: int,
    join: int,
) -> jax.Array:
    """Within shard_map: dimension `split` over these mesh axes, whose parts of `join` are put together."""
    if not names:
        return a
    return jax.lax.all_to_all(a, names, split, join, tiled=True)


def earlier_choices(
    ids_BTX: jax.Array,
    places_T: jax.Array,
    experts: int,
) -> jax.Array:
    """int32 [B, T, X]: how many tokens of the row, at earlier places, chose the same expert."""
    order_T = jnp.argsort(places_T)
    one_hot_BTXE = jax.nn.one_hot(ids_BTX, experts, dtype=jnp.int32)
    chosen_BTE = jnp.sum(one_hot_BTXE, axis=2)[:, order_T]
    before_BTE = jnp.cumsum(chosen_BTE, axis=1) - chosen_BTE
    before_BTE = before_BTE[:, jnp.argsort(order_T)]
    return jnp.take_along_axis(before_BTE, jnp.minimum(ids_BTX, experts - 1), axis=2)


# ---------------------------------------------------------------- rows


def out_of_range(count: int, beyond: int) -> jax.Array:
    """int32 [count]: indices, all different, beyond so many rows."""
    return beyond + jnp.arange(count)


def repeat(x_BTD: jax.Array, X: int) -> jax.Array:
    """[B T X, D]: a row for each assignment."""
    return jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[-1]), X, axis=0)


def weighted_sum(y: jax.Array, weights_BTX: jax.Array) -> jax.Array:
    """float32 [B, T, D], from a row for each assignment [B T X, D]."""
    y_BTXD = y.reshape(*weights_BTX.shape, -1)
    return jnp.sum(y_BTXD * weights_BTX[..., None], axis=2)


def permute(x: jax.Array, source: jax.Array) -> jax.Array:
    """x[source], all different; zeros where source is beyond x.

    Every row is wanted once at most, so the gradient adds nothing up: its order can't matter, also on GPUs.
    """
    return x.at[source].get(mode="fill", fill_value=0, unique_indices=True)
