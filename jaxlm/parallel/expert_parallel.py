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
    x_BTD,
    segments_BT,
    places_T,
    router,
    kernels,
    logical,
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

    def compute(x, segments, places, router, run, axes):
        ids, weights, sums = route(x, segments, router)
        if slots:
            exchange = partial(by_slots, places_T=places, slots=slots)
        else:
            exchange = by_sorting
        y = exchange(x, ids, weights, run, axes)
        return y, jax.lax.psum(sums, axes.positions) if axes.positions else sums

    mesh = even_mesh(*x_BTD.shape[:2])
    if mesh is None:
        axes = Axes((), (), (), len(kernels["up"]))
        return compute(x_BTD, segments_BT, places_T, router, partial(mlp, kernels), axes)
    batch, _, between, _ = activation_specs(*x_BTD.shape[:2], mesh)
    specs = {
        name: partition_spec(logical[name], value.shape, mesh)
        for name, value in (router | kernels).items()
    }
    up = dict(zip(logical["up"], map(names_of, specs["up"])))

    def on_shard(x, segments, places, router, kernels):
        router = {name: gather_weight(value, specs[name], x) for name, value in router.items()}

        def run(rows, sizes):
            whole = {}
            for name, kernel in kernels.items():
                at = logical[name].index("expert_embed")
                whole[name] = gather_weight(kernel, specs[name][at : at + 1], x, start=at)
            return mlp(whole, rows, sizes)

        axes = Axes(up["expert"], names_of(between), up["mlp"], len(kernels["up"]))
        return compute(x, segments, places, router, run, axes)

    residual = PartitionSpec(batch, between)
    own = [{name: specs[name] for name in weights} for weights in (router, kernels)]
    in_specs = (residual, residual, PartitionSpec(), *own)
    out_specs = (residual, PartitionSpec(batch))
    call = jax.shard_map(on_shard, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return call(x_BTD, segments_BT, places_T, router, kernels)


def by_sorting(x_BTD, ids_BTX, weights_BTX, run: Callable, axes: Axes) -> jax.Array:
    """The weighted sum of each token's experts, none left out. run(rows [M, D], sizes) -> [M, D]."""
    shared = tuple(
        name for name in axes.positions if name in axes.mlp
    )  # devices with parts of F need the same tokens

    def meet(a):
        return gather(gather(a, 0, axes.experts), 1, shared)

    x_BTD = meet(x_BTD)
    ids_BTX = meet(ids_BTX)
    weights_BTX = meet(weights_BTX)
    X = ids_BTX.shape[-1]
    E = axes.count
    ids = ids_BTX.reshape(-1) - (jax.lax.axis_index(axes.experts) * E if axes.experts else 0)
    ids = jnp.where((ids >= 0) & (ids < E), ids, E)  # those of other devices last
    order = jnp.argsort(ids)
    sizes_E = jnp.sum(ids[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    used = jnp.sum(sizes_E)
    rows = len(ids) // X * min(X, E)
    source_M = jnp.where(jnp.arange(rows) < used, order[:rows], nowhere(rows, len(ids)))
    target = jnp.where(ids < E, jnp.argsort(order), nowhere(len(ids), rows))
    y_MD = run(permute(repeat(x_BTD, X), source_M), sizes_E)
    y_BTD = combine(permute(y_MD, target), weights_BTX).astype(x_BTD.dtype)
    return scatter_sum(sum_parts(y_BTD, axes.mlp, shared), 0, axes.experts)


def by_slots(
    x_BTD, ids_BTX, weights_BTX, run: Callable, axes: Axes, *, places_T, slots: int
) -> jax.Array:
    """The same of the first `slots` tokens of a row that chose an expert. run(rows [E, M, D], None) -> [E, M, D]."""

    def meet(a):
        return gather(a, 1, axes.positions)

    x_BTD = meet(x_BTD)
    ids_BTX = meet(ids_BTX)
    weights_BTX = meet(weights_BTX)
    (B, _, X), count = ids_BTX.shape, ids_BTX.size
    E = axes.count * math.prod(map(jax.lax.axis_size, axes.experts))
    split = tuple(name for name in axes.positions if name not in axes.mlp)
    C = math.ceil(slots / math.prod(map(jax.lax.axis_size, split)))
    slot_BTX = earlier(ids_BTX, places_T, E)
    first = jax.lax.axis_index(split) * C if split else 0
    here_BTX = (ids_BTX < E) & (slot_BTX >= first) & (slot_BTX < jnp.minimum(first + C, slots))
    target_BTX = (ids_BTX * B + jnp.arange(B)[:, None, None]) * C + slot_BTX - first
    target = jnp.where(here_BTX.reshape(-1), target_BTX.reshape(-1), nowhere(count, E * B * C))
    source_M = nowhere(E * B * C, count).at[target].set(jnp.arange(count), mode="drop")
    rows_EBCD = permute(repeat(x_BTD, X), source_M).reshape(E, B, C, -1)

    def send(a, cut, join):
        if axes.experts:
            return jax.lax.all_to_all(a, axes.experts, cut, join, tiled=True)
        return a

    rows_EBCD = send(rows_EBCD, 0, 1)
    y_EMD = run(rows_EBCD.reshape(axes.count, -1, rows_EBCD.shape[-1]), None)
    y_EBCD = send(y_EMD.reshape(rows_EBCD.shape), 1, 0)
    y_BTD = combine(permute(y_EBCD.reshape(E * B * C, -1), target), weights_BTX).astype(x_BTD.dtype)
    summed = axes.positions + tuple(name for name in axes.mlp if name not in axes.positions)
    return sum_parts(y_BTD, summed, axes.positions)


def earlier(ids_BTX, places_T, experts: int) -> jax.Array:
    """int32 [B, T, X]: how many tokens of the row, at earlier places, chose the same expert."""
    order_T = jnp.argsort(places_T)
    chosen_BTE = jnp.sum(jax.nn.one_hot(ids_BTX, experts, dtype=jnp.int32), axis=2)[:, order_T]
    before_BTE = (jnp.cumsum(chosen_BTE, axis=1) - chosen_BTE)[:, jnp.argsort(order_T)]
    return jnp.take_along_axis(before_BTE, jnp.minimum(ids_BTX, experts - 1), axis=2)


def nowhere(count: int, beyond: int) -> jax.Array:
    """As many indices, all different, beyond so many rows."""
    return beyond + jnp.arange(count)


def repeat(x_BTD, X: int) -> jax.Array:
    """[B T X, D]: a row for each assignment."""
    return jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[-1]), X, axis=0)


def combine(y, weights_BTX) -> jax.Array:
    """float32 [B, T, D], from a row for each assignment [B T X, D]."""
    return jnp.sum(y.reshape(*weights_BTX.shape, -1) * weights_BTX[..., None], axis=2)


def permute(x, source) -> jax.Array:
    """x[source], all different; zeros where source is beyond x.

    Every row is wanted once at most, so the gradient adds nothing up: its order can't matter, also on GPUs.
    """
    return x.at[source].get(mode="fill", fill_value=0, unique_indices=True)
