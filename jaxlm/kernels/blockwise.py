"""Flash attention by blocks of keys and queries (Rabe & Staats 2021, FlashAttention: Dao et al. 2022), in XLA.

Memory grows with T, not with T x S. The letters, at_T and at_S are those of jaxlm/kernels/attention.py; within a block
T and S are the block's. `flash_forward` and `flash_backward` may be given a part of the keys; the parts' results are
merged by their log-sum-exp (jaxlm/parallel/context_parallel.py).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.kernels.attention import LAST, NEVER, Mask, capped, einsum, visible

BLOCK = 512  # positions of queries, and of keys, whose logits exist at one time


def blockwise(q_BTNH, k_BSKH, v_BSKH, mask: Mask, *, scale: float, softcap: float) -> jax.Array:
    """[B, T, N, H]; 0 for a query that sees no key. Names what its backward pass keeps "attention"."""
    return flash(q_BTNH, k_BSKH, v_BSKH, mask.at_T, mask.at_S, mask.window, softcap, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def flash(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap, scale):
    """[B, T, N, H]. For the backward pass only the arguments, the result and its log-sum-exp [B, T, N] are kept."""
    out, _ = flash_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap, scale)
    return out.astype(q_BTNH.dtype)


def keep(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap, scale):
    """(the result, what the backward pass keeps)."""
    out, lse_BTN = flash_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap, scale)
    out_BTNH = checkpoint_name(out.astype(q_BTNH.dtype), "attention")
    lse_BTN = checkpoint_name(lse_BTN, "attention")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, at_T, at_S, out_BTNH, lse_BTN)


def differentiate(window, softcap, scale, kept, dout_BTNH):
    q, k, v, at_T, at_S, out_BTNH, lse_BTN = kept
    delta_BTN = einsum("BTNH,BTNH->BTN", out_BTNH, dout_BTNH)
    dq, dk, dv = flash_backward(
        q, k, v, at_T, at_S, lse_BTN, delta_BTN, dout_BTNH, window, softcap, scale
    )
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


flash.defvjp(keep, differentiate)


# ---------------------------------------------------------------- forward


def flash_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap, scale=None):
    """(out [B, T, N, H], log-sum-exp of the logits [B, T, N]), float32: 0 and NEVER where a query sees no key.

    window, softcap: as in `attention`. scale: the logits' factor; None: H^-0.5.
    """
    T, N = q_BTNH.shape[1:3]
    q_BTNH, at_T, at_S = tie(q_BTNH, at_T, at_S)
    keys = (split(k_BSKH), split(v_BSKH), split_marks(at_S, LAST))
    queries = (split_queries(q_BTNH, k_BSKH.shape[2]), split_marks(at_T, -1))
    logits_of = functools.partial(block_logits, window=window, softcap=softcap, scale=scale)

    def one_query_block(query):
        q_BTKGH, at_T = query

        def add_key_block(sums, key):
            k_BSKH, v_BSKH, at_S = key

            def add(sums):
                logits, mask = logits_of(q_BTKGH, k_BSKH, at_T, at_S)
                return add_block(sums, logits, mask, v_BSKH)

            return jax.lax.cond(may_see(at_T, at_S, window), add, unchanged, sums), None

        sums, _ = jax.lax.scan(add_key_block, no_sums(q_BTKGH), keys)
        return divide(*sums)

    out, lse = jax.lax.map(one_query_block, queries)
    return join(out, T).reshape(q_BTNH.shape), join(lse, T).reshape(-1, T, N)


def unchanged(sums):
    return sums


def no_sums(q_BTKGH):
    """What `add_block` begins with."""
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    acc = jnp.zeros_like(q_BKGTH, jnp.float32)
    total = acc[..., 0]
    return acc, total + NEVER, total


def add_block(sums, logits, mask, v_BSKH):
    """The sums of the online softmax with one more block of keys.

    sums: (the weighted values [B, K, G, T, H], the largest logit, the sum of weights: both [B, K, G, T]).
    """
    acc, top, total = sums
    block_top = jnp.max(logits, axis=-1, where=mask, initial=NEVER)
    new_top = jnp.maximum(top, block_top)
    weights = jnp.where(mask, jnp.exp(logits - new_top[..., None]), 0)
    fade = jnp.exp(top - new_top)
    part = einsum("BKGTS,BSKH->BKGTH", weights.astype(v_BSKH.dtype), v_BSKH)
    acc = acc * fade[..., None] + part
    total = total * fade + weights.sum(axis=-1)
    return acc, new_top, total


def divide(acc, top, total):
    """(out [B, T, K, G, H], log-sum-exp [B, T, K, G]) from the sums of `add_block`."""
    total = jnp.where(total == 0, 1, total)
    out = acc / total[..., None]
    lse = top + jnp.log(total)
    return out.transpose(0, 3, 1, 2, 4), lse.transpose(0, 3, 1, 2)


# ---------------------------------------------------------------- backward


def flash_backward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    at_T,
    at_S,
    lse_BTN,
    delta_BTN,
    dout_BTNH,
    window,
    softcap,
    scale=None,
):
    """float32 gradients of q, k and v (FlashAttention, algorithm 4).

    lse_BTN: over all keys that the queries see, also those that are not among these. delta_BTN: sum over H of
    out * dout.
    """
    T = q_BTNH.shape[1]
    S, K = k_BSKH.shape[1:3]
    q_BTNH, at_T, at_S = tie(q_BTNH, at_T, at_S)
    queries = (
        split_queries(q_BTNH, K),
        split_queries(lse_BTN, K),
        split_queries(delta_BTN, K),
        split_queries(dout_BTNH, K),
        split_marks(at_T, -1),
    )
    gradients_of = functools.partial(block_gradients, window=window, softcap=softcap, scale=scale)

    def one_key_block(dq, key):
        _, _, at_S = key

        def add_query_block(dkv, query):
            dq_BTKGH, query = query
            *_, at_T = query

            def add(dq_BTKGH, dk_BSKH, dv_BSKH):
                return gradients_of(query, key, dq_BTKGH, dk_BSKH, dv_BSKH)

            dq_BTKGH, *dkv = jax.lax.cond(
                may_see(at_T, at_S, window), add, unchanged_sums, dq_BTKGH, *dkv
            )
            return dkv, dq_BTKGH

        zeros = [jnp.zeros_like(x, jnp.float32) for x in key[:2]]
        dkv, dq = jax.lax.scan(add_query_block, zeros, (dq, queries))
        return dq, dkv

    keys = (split(k_BSKH), split(v_BSKH), split_marks(at_S, LAST))
    dq, (dk, dv) = jax.lax.scan(one_key_block, jnp.zeros_like(queries[0], jnp.float32), keys)
    return join(dq, T).reshape(q_BTNH.shape), join(dk, S), join(dv, S)


def unchanged_sums(*sums):
    return sums


def block_gradients(query, key, dq_BTKGH, dk_BSKH, dv_BSKH, *, window, softcap, scale):
    """The three gradients with what one block of queries and one of keys add to them.

    query: (q, log-sum-exp, delta, gradient of the result, at_T), key: (k, v, at_S).
    """
    q_BTKGH, lse_BTKG, delta_BTKG, dout_BTKGH, at_T = query
    k_BSKH, v_BSKH, at_S = key
    logits, mask = block_logits(q_BTKGH, k_BSKH, at_T, at_S, window, softcap, scale)
    weights = jnp.where(mask, jnp.exp(logits - over_keys(lse_BTKG)), 0)
    dv_BSKH += einsum("BKGTS,BTKGH->BSKH", weights.astype(dout_BTKGH.dtype), dout_BTKGH)
    dweights = einsum("BTKGH,BSKH->BKGTS", dout_BTKGH, v_BSKH)
    dlogits = weights * (dweights - over_keys(delta_BTKG)) * scale_of(q_BTKGH, scale)
    if softcap:
        dlogits *= 1 - jnp.square(logits / softcap)
    dlogits = dlogits.astype(q_BTKGH.dtype)
    dk_BSKH += einsum("BKGTS,BTKGH->BSKH", dlogits, q_BTKGH)
    dq_BTKGH += einsum("BKGTS,BSKH->BTKGH", dlogits, k_BSKH)
    return dq_BTKGH, dk_BSKH, dv_BSKH


FLASH = (flash_forward, flash_backward)


# ---------------------------------------------------------------- blocks


def tie(*arrays):
    """The same arrays, each as if it depended on all.

    A scan over layers computes beforehand what is the same in all of them: it would make the masks of all blocks, T x S
    of them, and keep them.
    """
    return jax.lax.optimization_barrier(arrays)


def block_logits(q_BTKGH, k_BSKH, at_T, at_S, window, softcap, scale):
    """(float32 logits [B, K, G, T, S], which of them count: bool, broadcast to that)."""
    logits = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * scale_of(q_BTKGH, scale)
    return capped(logits, softcap), visible(at_T, at_S, window)[:, None, None]


def scale_of(q_BTKGH, scale: float | None) -> float:
    if scale is None:
        return q_BTKGH.shape[-1] ** -0.5
    return scale


def over_keys(x_BTKG):
    """[B, K, G, T, 1]."""
    return x_BTKG.transpose(0, 2, 3, 1)[..., None]


def may_see(at_T, at_S, window) -> jax.Array:
    """bool scalar: False only where no query of the block sees a key of the other, by their first and last places."""
    places_T, _ = at_T
    places_S, _ = at_S
    return (places_S.min() <= places_T.max()) & (places_S.max() > places_T.min() - window)


def num_blocks(length: int) -> int:
    """Even, so that no block lies across the two parts of a shard in zig-zag order."""
    if length > 1:
        return 2 * math.ceil(length / (2 * BLOCK))
    return 1


def split(x, axis=1, fill=0):
    """[B, T, ...] -> [blocks, B, T of a block, ...], padded with `fill` where the blocks do not divide T.

    axis: of T.
    """
    blocks = num_blocks(x.shape[axis])
    missing = -x.shape[axis] % blocks
    if missing:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, missing)
        x = jnp.pad(x, padding, constant_values=fill)
    x = x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def split_queries(x_BTN, K: int):
    """[B, T, N, ...] -> [blocks, B, T of a block, K, G, ...]."""
    B, T, _, *rest = x_BTN.shape
    return split(x_BTN.reshape(B, T, K, -1, *rest))


def split_marks(at, fill: int):
    """at_T or at_S in blocks. fill: the place of padding.

    -1 of queries, before all keys, and LAST of keys, after all queries: no query sees padding, and padding sees none.
    """
    places, segments = at
    places = split(places, places.ndim - 1, fill)
    if segments is None:
        return places, None
    return places, split(segments)


def join(x, length: int):
    """The inverse of `split`: [blocks, B, T of a block, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
