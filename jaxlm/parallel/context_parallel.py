"""Attention on a mesh: heads over `tensor`, positions over `sequence` (context parallelism).

On every device the queries stay; the keys and values of the other devices of the sequence axis come to them, either
one shard at a time (Ring Attention: Liu et al. 2023) or all at once (all-gather). The kernels are arguments: see
jaxlm/kernels/attention.py, also for the letters and for at_T, at_S = (places, segments).
"""

import functools
import math

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
    """
    if length % (2 * parts):
        raise ValueError(
            f"zigzag: {length} positions are not a multiple of 2 x {parts}, two chunks for each part"
        )
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, 2 * parts - 1 - i]].ravel() for i in range(parts)])


def sharded_attention(
    q_BTNH, k_BSKH, v_BSKH, segments_BT=None, segments_BS=None, places_T=None, places_S=None, *, attend, flash,
    context_parallel, anywhere, causal=True, **options
) -> jax.Array:  # fmt: skip
    """[B, T, N, H]: `attend` on every device's shards, or as it is without a mesh that divides the batch evenly.

    q, k, v: as jaxlm.parallel.linear.columns leaves them: heads over the tensor axis, or, where it does not divide
    them, positions. The result is sharded as q. places: int32 [T] and [S] where positions are not in their order
    (`zigzag`); of queries also [B, T], the last place that each sees. attend: jaxlm.kernels.attention.attention;
    flash: its (flash_forward, flash_backward), of which the ring is made; anywhere: its place of a query that sees all.
    context_parallel: ring | all_gather. options: window, softcap and implementation; the ring is always of `flash`.
    """
    (B, T, N, _), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    options["causal"] = causal
    mesh = even_mesh(B, T)
    if mesh is None or even_mesh(B, S) is None:
        return attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            segments_BT,
            segments_BS,
            places_T=places_T,
            places_S=places_S,
            **options,
        )
    rows, inside, between, extra = activation_specs(B, T, mesh)
    heads = partition_spec(("heads",), (N,), mesh)[0]
    kv_heads = partition_spec(("kv_heads",), (K,), mesh)[0]
    length_T, length_S = (
        inside if set(extra) <= set(names_of(entry)) else between for entry in (heads, kv_heads)
    )
    if length_T is not None and causal:
        places_T = jnp.arange(T) if places_T is None else places_T
        places_S = jnp.arange(S) if places_S is None else places_S
    ring_axis = inside if context_parallel == "ring" else None
    if ring_axis and not causal:
        places_T = jnp.full(T, anywhere)
        places_S = jnp.arange(S)
        options["window"] = anywhere + 1
    gathered = () if ring_axis else names_of(inside)

    def f(q_BTNH, k_BSKH, v_BSKH, at_T, at_S):
        if length_S != inside:
            k_BSKH = gather(k_BSKH, 1, extra)
            v_BSKH = gather(v_BSKH, 1, extra)
        if heads != kv_heads:
            index = own_kv_heads(q_BTNH.shape[2], N // K, jax.lax.axis_index(names_of(heads)))
            k_BSKH = k_BSKH[:, :, index]
            v_BSKH = v_BSKH[:, :, index]
        if ring_axis:
            return ring(
                q_BTNH,
                k_BSKH,
                v_BSKH,
                at_T,
                at_S,
                flash,
                ring_axis,
                options["window"],
                options["softcap"],
            )
        k_BSKH = gather(k_BSKH, 1, gathered)
        v_BSKH = gather(v_BSKH, 1, gathered)
        places_S, segments_BS = jax.tree.map(lambda x: gather(x, x.ndim - 1, gathered), at_S)
        return attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            at_T[1],
            segments_BS,
            places_T=at_T[0],
            places_S=places_S,
            **options,
        )

    # Unchecked: the check cannot follow places, the same in all stages, into the vmap over stages of a pipeline. Axes
    # that no spec names are then summed over in the backward pass: all of size 1 are named, for the rows.
    rows = (*names_of(rows), *(name for name in mesh.axis_names if mesh.shape[name] == 1))
    q_spec = PartitionSpec(rows, length_T, heads)
    k_spec = PartitionSpec(rows, length_S, kv_heads)
    if places_T is not None and places_T.ndim == 2:
        of_rows = (rows,)
    else:
        of_rows = ()
    at_specs = (
        (PartitionSpec(*of_rows, length_T), PartitionSpec(rows, length_T)),
        (PartitionSpec(inside), PartitionSpec(rows, inside)),
    )
    call = jax.shard_map(
        f, in_specs=(q_spec, k_spec, k_spec, *at_specs), out_specs=q_spec, check_vma=False
    )
    return call(q_BTNH, k_BSKH, v_BSKH, (places_T, segments_BT), (places_S, segments_BS))


def own_kv_heads(num_heads: int, group: int, index: jax.Array) -> jax.Array:
    """int [.]: of all key-value heads those that the index-th `num_heads` query heads need, in equal groups."""
    step = math.gcd(num_heads, group)
    return (index * num_heads + jnp.arange(0, num_heads, step)) // group


# ---------------------------------------------------------------- the ring


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def ring(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, flash, axis: str, window: int, softcap: float):
    """[B, T, N, H], within shard_map: this device's queries, and the keys of all devices along the axis.

    For the backward pass only the arguments, the result and its log-sum-exp [B, T, N] are kept: this device's shards.
    """
    return ring_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, flash, axis, window, softcap)[0]


def ring_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, flash, axis, window, softcap):
    forward, _ = flash

    def step(carry, _):
        sums, held = carry
        coming = shift(held, axis)  # before the work, which hides it
        return (
            merge(sums, forward(q_BTNH, *held[:2], at_T, held[2], window, softcap)),
            coming,
        ), None

    zeros = jnp.zeros_like(q_BTNH, jnp.float32)
    carry = (zeros, zeros[..., 0] - jnp.inf), (k_BSKH, v_BSKH, at_S)  # no key has been seen yet
    ((out, lse_BTN), _), _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(axis))
    out_BTNH, lse_BTN = (
        checkpoint_name(x, "attention") for x in (out.astype(q_BTNH.dtype), lse_BTN)
    )
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, at_T, at_S, out_BTNH, lse_BTN)


def ring_backward(flash, axis, window, softcap, kept, dout_BTNH):
    """Gradients of keys and values travel with them, one step behind, and come home last."""
    (q_BTNH, k_BSKH, v_BSKH, at_T, at_S, out_BTNH, lse_BTN), (_, backward) = kept, flash
    delta_BTN = jnp.sum(out_BTNH.astype(jnp.float32) * dout_BTNH, axis=-1)

    def step(carry, _):
        dq, dkv, held = carry
        coming, dkv = shift((held, dkv), axis)
        parts = backward(
            q_BTNH, *held[:2], at_T, held[2], lse_BTN, delta_BTN, dout_BTNH, window, softcap
        )
        return (dq + parts[0], (dkv[0] + parts[1], dkv[1] + parts[2]), coming), None

    dq, *dkv = (jnp.zeros_like(x, jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    carry = dq, tuple(dkv), (k_BSKH, v_BSKH, at_S)
    (dq, dkv, _), _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(axis))
    grads = dq, *shift(dkv, axis)
    return *(grad.astype(x.dtype) for grad, x in zip(grads, (q_BTNH, k_BSKH, v_BSKH))), None, None


ring.defvjp(ring_forward, ring_backward)


def merge(a, b):
    """(out [B, T, N, H], lse [B, T, N]) over the keys of a and of b, from those over each."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    return out_a * jnp.exp(lse_a - lse)[..., None] + out_b * jnp.exp(lse_b - lse)[..., None], lse


def shift(tree, axis: str):
    """Every device's shard to the next along the axis."""
    size = jax.lax.axis_size(axis)
    pairs = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)
