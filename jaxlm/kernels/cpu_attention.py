"""Attention for CPUs: its weights are kept for the backward pass, and memory is gone through few times.

The letters and the signature are those of jaxlm/kernels/attention.py, whose reference does the same arithmetic. What
makes it faster than that with jax's own derivative, three times at 16 x 256: products whose outcome is in the layout of
the next one, the quotient of the softmax taken of the result instead of the weights, sums of the backward pass over H
instead of S (as in FlashAttention), and queries in a few blocks, of which each meets only the keys that it can see.
"""

import functools

import jax
import jax.numpy as jnp

from jaxlm.kernels.attention import Mask, visible

MAX_BLOCKS = 8  # of queries
MIN_QUERIES = 64  # of a block that is worth it
HIDDEN = -1e30  # the logit of a key that is not seen
NOTHING = -1e29  # the maximum where no key is: the exponential of HIDDEN less this is 0, not 1


def dense(q_BTNH, k_BSKH, v_BSKH, mask: Mask, *, scale: float, softcap: float) -> jax.Array:
    """[B, T, N, H]; 0 for a query that sees no key. softcap: 0, for there is none."""
    ordered = mask.causal and mask.in_order
    return attend(q_BTNH, k_BSKH, v_BSKH, mask.at_T, mask.at_S, mask.window, ordered, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window: int, ordered: bool, scale: float):
    return forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, ordered, scale)[0]


def forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, ordered, scale):
    """(the result, what the backward pass keeps). The weights are a list, an array for each block of queries."""
    T = q_BTNH.shape[1]
    S, K = k_BSKH.shape[1:3]
    dtype = q_BTNH.dtype
    q_BKGTH = heads_first(q_BTNH * scale, K)
    k_BKSH = k_BSKH.transpose(0, 2, 1, 3)
    v_BKSH = v_BSKH.transpose(0, 2, 1, 3)
    weights = []
    totals = []
    outputs = []
    for rows, keys in blocks(T, S, window, ordered):
        q_BKGtH = q_BKGTH[:, :, :, rows]
        k_BKsH = k_BKSH[:, :, keys]
        v_BKsH = v_BKSH[:, :, keys]
        logits = contract(merged(q_BKGtH), k_BKsH, 3, 3)
        logits = logits.reshape(*q_BKGtH.shape[:-1], -1)
        mask_BtS = visible(part(at_T, rows), part(at_S, keys), window)
        logits = jnp.where(mask_BtS[:, None, None], logits, HIDDEN)
        top = jnp.maximum(logits.max(axis=-1, keepdims=True), NOTHING)
        p_BKGtS = jnp.exp(logits - top).astype(dtype)
        total = p_BKGtS.sum(axis=-1, keepdims=True, dtype=jnp.float32)
        total = jnp.maximum(total, 1e-37)
        sums = contract(merged(p_BKGtS), v_BKsH, 3, 2)
        sums = sums.reshape(q_BKGtH.shape)
        weights.append(p_BKGtS)
        totals.append(total)
        outputs.append((sums / total).astype(dtype))
    out_BKGTH = jnp.concatenate(outputs, axis=3)
    total_BKGT1 = jnp.concatenate(totals, axis=3)
    kept = (q_BKGTH, k_BKSH, v_BKSH, weights, total_BKGT1, out_BKGTH)
    return heads_last(out_BKGTH), kept


def backward(window, ordered, scale, kept, dout_BTNH):
    q_BKGTH, k_BKSH, v_BKSH, weights, total_BKGT1, out_BKGTH = kept
    _, K, _, T, H = q_BKGTH.shape
    S = k_BKSH.shape[2]
    dtype = q_BKGTH.dtype
    dout = heads_first(dout_BTNH, K) / total_BKGT1
    delta_BKGT1 = jnp.sum(dout * out_BKGTH, axis=-1, keepdims=True)
    # Else XLA would make them again within each product.
    dout, delta_BKGT1 = jax.lax.optimization_barrier((dout.astype(dtype), delta_BKGT1))
    dq = []
    dk = []
    dv = []
    for (rows, keys), p_BKGtS in zip(blocks(T, S, window, ordered), weights):
        p = merged(p_BKGtS)
        q = merged(q_BKGTH[:, :, :, rows])
        do = merged(dout[:, :, :, rows])
        delta = merged(delta_BKGT1[:, :, :, rows])
        k_BKsH = k_BKSH[:, :, keys]
        v_BKsH = v_BKSH[:, :, keys]
        dweights = contract(do, v_BKsH, 3, 3) - delta
        dlogits = (p * dweights).astype(dtype)
        dv_BKsH = contract(p, do, 2, 2)
        dk_BKsH = contract(dlogits, q, 2, 2)
        dq_BKgH = contract(dlogits, k_BKsH, 3, 2)
        dv.append(among_all(dv_BKsH, keys, S))
        dk.append(among_all(dk_BKsH, keys, S))
        dq.append(dq_BKgH.reshape(*p_BKGtS.shape[:-1], H))
    dq_BTNH = heads_last(jnp.concatenate(dq, axis=3) * scale)
    dk_BSKH = sum(dk[1:], dk[0]).transpose(0, 2, 1, 3)
    dv_BSKH = sum(dv[1:], dv[0]).transpose(0, 2, 1, 3)
    dq_BTNH = dq_BTNH.astype(dtype)
    dk_BSKH = dk_BSKH.astype(dtype)
    dv_BSKH = dv_BSKH.astype(dtype)
    return dq_BTNH, dk_BSKH, dv_BSKH, None, None


attend.defvjp(forward, backward)


def contract(a, b, i: int, j: int):
    """[B, K, ...], float32: a times b, summed over the dimensions i of a and j of b."""
    batch = ((0, 1), (0, 1))
    summed = ((i,), (j,))
    dims = (summed, batch)
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def blocks(T: int, S: int, window: int, ordered: bool) -> list[tuple[slice, slice]]:
    """(queries, the keys that they can see). ordered: both are at 0, 1, ..., and none sees a later one."""
    if not ordered or T < 2 * MIN_QUERIES:
        return [(slice(0, T), slice(0, S))]
    size = max(-(-T // MAX_BLOCKS), MIN_QUERIES)
    found = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first_key = max(0, start - window + 1)
        found.append((slice(start, stop), slice(first_key, stop)))
    return found


def part(at, here: slice):
    """at_T or at_S of a part of the positions."""
    places, segments = at
    if segments is None:
        return places[..., here], None
    return places[..., here], segments[:, here]


def among_all(x_BKsH, keys: slice, S: int):
    """[B, K, S, H]: zeros where the keys are not these."""
    return jnp.pad(x_BKsH, ((0, 0), (0, 0), (keys.start, S - keys.stop), (0, 0)))


def heads_first(x_BTNH, K: int):
    """[B, T, N, H] -> [B, K, G, T, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def heads_last(x_BKGTH):
    """[B, K, G, T, H] -> [B, T, N, H]."""
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def merged(x_BKGTH):
    """[B, K, G T, H]: all queries that meet a key's head, as the rows of one product."""
    return x_BKGTH.reshape(*x_BKGTH.shape[:2], -1, x_BKGTH.shape[-1])
