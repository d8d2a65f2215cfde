"""Attention on a mesh: heads over `tensor`, positions over `sequence` (context parallelism).

On every device the queries stay; the keys and values of the other devices of the sequence axis come to them, either
one shard at a time (Ring Attention: Liu et al. 2023) or all at once (all-gather). The kernels are arguments: see
jaxlm/kernels/attention.py, also for the letters and for at_T, at_S = (places, segments).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxlm.parallel.linear import activation_specs
from jaxlm.parallel.mesh import even_mesh, gather, names_of, partition_spec


def zigzag(length: int, parts: int) -> np.ndarray:
    """int32 [length]: the order of positions in which shard i of `parts` holds chunks i and 2 parts - 1 - i of 2 parts.

    An early one and a late one: under the causal mask all shards have the same work (Llama 3: Dubey et al. 2024).
    Raises ValueError where the length is not a multiple of 2 parts.
    """
    if length % (2 * parts):
        raise ValueError(
            f"zigzag: {length} positions are not a multiple of 2 x {parts}, two chunks for each part"
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    early = chunks[:parts]
    late = chunks[parts:][::-1]
    return np.stack([early, late], axis=1).ravel()


# ---------------------------------------------------------------- how attention is sharded

Entry = str | tuple[str, ...] | None  # of a PartitionSpec


class Layout(NamedTuple):
    """Which mesh axes shard each dimension."""

    rows: tuple[str, ...]
    heads: Entry
    kv_heads: Entry
    length_T: Entry  # of queries
    length_S: Entry  # of keys and values
    inside: Entry  # of positions in layers: the sequence axis
    extra: tuple[str, ...]  # axes that shard positions only between layers


def attention_layout(B: int, T: int, N: int, K: int, mesh) -> Layout:
    """The layout of queries [B, T, N, H] and keys [B, S, K, H] as jaxlm.parallel.linear.columns leaves them.

    Heads are over the tensor axis; positions are where it does not divide the heads.
    """
    rows, inside, between, extra = activation_specs(B, T, mesh)
    (heads,) = partition_spec(("heads",), (N,), mesh)
    (kv_heads,) = partition_spec(("kv_heads",), (K,), mesh)

    def length_beside(entry):
        if set(extra) <= set(names_of(entry)):
            return inside
        return between

    # shard_map does not check the axes (see sharded_attention). It then sums over those that no spec names in the
    # backward pass, so the rows name all axes of size 1.
    trivial = [name for name in mesh.axis_names if mesh.shape[name] == 1]
    return Layout(
        rows=(*names_of(rows), *trivial),
        heads=heads,
        kv_heads=kv_heads,
        length_T=length_beside(heads),
        length_S=length_beside(kv_heads),
        inside=inside,
        extra=extra,
    )


def sharded_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    places_T: jax.Array | None = None,
    places_S: jax.Array | None = None,
    *,
    attend: Callable,
    flash: tuple[Callable, Callable],
    context_parallel: str,
    anywhere: int,
    causal: bool = True,
    **options,
) -> jax.Array:
    """[B, T, N, H]: `attend` on every device's shards, or as it is without a mesh that divides the batch evenly.

    q, k, v: as jaxlm.parallel.linear.columns leaves them: heads over the tensor axis, or, where it does not divide
    them, positions. The result is sharded as q. places: int32 [T] and [S] where positions are not in their order
    (`zigzag`); of queries also [B, T], the last place that each sees. attend: jaxlm.kernels.attention.attention;
    flash: its (flash_forward, flash_backward), of which the ring is made; anywhere: its place of a query that sees all.
    context_parallel: ring | all_gather. options: window, softcap and implementation; the ring is always of `flash`.
    """
    B, T, N, _ = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    attend = functools.partial(attend, causal=causal, **options)
    mesh = even_mesh(B, T)
    if mesh is None or even_mesh(B, S) is None:
        places = {"places_T": places_T, "places_S": places_S}
        return attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, **places)
    layout = attention_layout(B, T, N, K, mesh)
    window = options["window"]
    around_ring = layout.inside is not None and context_parallel == "ring"
    if layout.length_T is not None and causal:
        places_T = places_or_range(places_T, T)
        places_S = places_or_range(places_S, S)
    if around_ring and not causal:
        places_T = jnp.full(T, anywhere)
        places_S = jnp.arange(S)
        window = anywhere + 1

    def on_shard(q_BTNH, k_BSKH, v_BSKH, at_T, at_S):
        k_BSKH = own_keys(k_BSKH, q_BTNH.shape[2], N // K, layout)
        v_BSKH = own_keys(v_BSKH, q_BTNH.shape[2], N // K, layout)
        shards = (q_BTNH, k_BSKH, v_BSKH, at_T, at_S)
        if around_ring:
            return ring(*shards, flash, layout.inside, window, options["softcap"])
        return attend_gathered(attend, *shards, names_of(layout.inside))

    q_spec = PartitionSpec(layout.rows, layout.length_T, layout.heads)
    k_spec = PartitionSpec(layout.rows, layout.length_S, layout.kv_heads)
    call = jax.shard_map(
        on_shard,
        in_specs=(q_spec, k_spec, k_spec, *place_specs(layout, places_T)),
        out_specs=q_spec,
        # The check cannot follow places, the same in all stages, into the vmap over stages of a pipeline.
        check_vma=False,
    )
    return call(q_BTNH, k_BSKH, v_BSKH, (places_T, segments_BT), (places_S, segments_BS))


def places_or_range(places: jax.Array | None, length: int) -> jax.Array:
    if places is None:
        return jnp.arange(length)
    return places


def place_specs(layout: Layout, places_T: jax.Array | None) -> tuple[tuple, tuple]:
    """PartitionSpecs of at_T and at_S, each (places, segments)."""
    places_spec = PartitionSpec(layout.length_T)
    if places_T is not None and places_T.ndim == 2:
        places_spec = PartitionSpec(layout.rows, layout.length_T)
    return (
        (places_spec, PartitionSpec(layout.rows, layout.length_T)),
        (PartitionSpec(layout.inside), PartitionSpec(layout.rows, layout.inside)),
    )


# ---------------------------------------------------------------- on one device's shards


def own_keys(
    k_BSKH: jax.Array,
    num_heads: int,
    group: int,
    layout: Layout,
) -> jax.Array:
    """Within shard_map: keys, or values, of this device's positions for its `num_heads` query heads."""
    if layout.length_S != layout.inside:
        k_BSKH = gather(k_BSKH, 1, layout.extra)
    if layout.heads == layout.kv_heads:
        return k_BSKH
    device = jax.lax.axis_index(names_of(layout.heads))
    return k_BSKH[:, :, own_kv_heads(num_heads, group, device)]


def own_kv_heads(
    num_heads: int,
    group: int,
    index: jax.Array,
) -> jax.Array:
    """int [.]: of all key-value heads those that the index-th `num_heads` query heads need, in equal groups."""
    step = math.gcd(num_heads, group)
    return (index * num_heads + jnp.arange(0, num_heads, step)) // group


def attend_gathered(
    attend: Callable,
    q_BTNH,
    k_BSKH,
    v_BSKH,
    at_T,
    at_S,
    names,
) -> jax.Array:
    """Within shard_map: [B, T, N, H] over the keys of all devices along the axes `names`."""

    def gather_last(x):
        return gather(x, x.ndim - 1, names)

    k_BSKH = gather(k_BSKH, 1, names)
    v_BSKH = gather(v_BSKH, 1, names)
    places_T, segments_BT = at_T
    places_S, segments_BS = jax.tree.map(gather_last, at_S)
    return attend(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        segments_BT,
        segments_BS,
        places_T=places_T,
        places_S=places_S,
    )


# ---------------------------------------------------------------- the ring


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def ring(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    at_T: tuple,
    at_S: tuple,
    flash: tuple[Callable, Callable],
    axis: str,
    window: int,
    softcap: float,
) -> jax.Array:
    """[B, T, N, H], within shard_map: this device's queries, and the keys of all devices along the axis.

    For the backward pass only the arguments, the result and its log-sum-exp [B, T, N] are kept: this device's shards.
    """
    out_BTNH, _ = ring_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, flash, axis, window, softcap)
    return out_BTNH


def ring_forward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    at_T,
    at_S,
    flash,
    axis,
    window,
    softcap,
):
    forward, _ = flash

    def step(carry, _):
        sums, shards = carry
        k_BSKH, v_BSKH, at_S = shards
        coming = shift(shards, axis)  # before the work, which hides it
        part = forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap)
        return (merge_parts(sums, part), coming), None

    zeros = jnp.zeros_like(q_BTNH, jnp.float32)
    nothing_seen = (zeros, zeros[..., 0] - jnp.inf)
    carry = (nothing_seen, (k_BSKH, v_BSKH, at_S))
    carry, _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(axis))
    (out_BTNH, lse_BTN), _ = carry
    out_BTNH = checkpoint_name(out_BTNH.astype(q_BTNH.dtype), "attention")
    lse_BTN = checkpoint_name(lse_BTN, "attention")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, at_T, at_S, out_BTNH, lse_BTN)


def ring_backward(flash, axis, window, softcap, residuals, dout_BTNH):
    """Gradients of keys and values travel with them, one step behind, and come home last."""
    q_BTNH, k_BSKH, v_BSKH, at_T, at_S, out_BTNH, lse_BTN = residuals
    _, backward = flash
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH, axis=-1)
    saved = (lse_BTN, delta_BTN, dout_BTNH)

    def step(carry, _):
        dq, dkv, shards = carry
        k_BSKH, v_BSKH, at_S = shards
        coming, (dk, dv) = shift((shards, dkv), axis)
        parts = backward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, *saved, window, softcap)
        return (dq + parts[0], (dk + parts[1], dv + parts[2]), coming), None

    zeros = [jnp.zeros_like(x, jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH)]
    carry = (zeros[0], (zeros[1], zeros[2]), (k_BSKH, v_BSKH, at_S))
    (dq, dkv, _), _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(axis))
    dk, dv = shift(dkv, axis)
    dq = dq.astype(q_BTNH.dtype)
    dk = dk.astype(k_BSKH.dtype)
    dv = dv.astype(v_BSKH.dtype)
    return dq, dk, dv, None, None


ring.defvjp(ring_forward, ring_backward)


def merge_parts(a: tuple, b: tuple) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H], lse [B, T, N]) over the keys of a and of b, from those over each."""
    out_a, lse_a = a
    out_b, lse_b = b
    lse = jnp.logaddexp(lse_a, lse_b)
    weight_a = jnp.exp(lse_a - lse)[..., None]
    weight_b = jnp.exp(lse_b - lse)[..., None]
    return out_a * weight_a + out_b * weight_b, lse


def shift(tree, axis: str):
    """Every device's shard to the next along the axis."""
    size = jax.lax.axis_size(axis)
    pairs = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)
