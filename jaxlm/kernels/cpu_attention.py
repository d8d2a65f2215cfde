"""Attention for CPUs: its weights are kept for the backward pass, and memory is gone through few times.

The letters of jaxlm/kernels/attention.py, whose reference does the same arithmetic. What makes it faster than that with
jax's own derivative, three times at 16 x 256: products whose outcome is in the layout of the next one, the quotient of
the softmax taken of the result instead of the weights, sums of the backward pass over H instead of S (as in
FlashAttention), and queries in a few blocks, of which each meets only the keys that it can see.
"""

import functools

import jax
import jax.numpy as jnp

# of queries, at most; the shortest worth it
BLOCKS = 8
LEAST = 64
# the logit of a hidden key; the maximum where all are: its exponential is 0, not 1
HIDDEN = -1e30
NOTHING = -1e29


def contract(a, b, i: int, j: int):
    """[B, K, ...] b, over the dimensions i of a and j of b; float32."""
    dims = (((i,), (j,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def blocks(T: int, S: int, window: int, ordered: bool) -> list[tuple[slice, slice]]:
    """(queries, the keys that they can see). ordered: both are at 0, 1, ..., and none sees a later one."""
    if not ordered or T < 2 * LEAST:
        return [(slice(0, T), slice(0, S))]
    size = max(-(-T // BLOCKS), LEAST)
    return [
        (slice(i, min(i + size, T)), slice(max(0, i - window + 1), min(i + size, T)))
        for i in range(0, T, size)
    ]


def heads_first(x_BTN, K: int):
    """[B, T, N, H] -> [B, K, G, T, H]."""
    B, T, N, H = x_BTN.shape
    return x_BTN.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def heads_last(x_BKGTH):
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def merged(x_BKGTH):
    """[B, K, G T, H]: all queries that meet a key's head, as the rows of one product."""
    return x_BKGTH.reshape(*x_BKGTH.shape[:2], -1, x_BKGTH.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def dense(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, visible, window: int, ordered: bool) -> jax.Array:
    """[B, T, N, H]; 0 for a query that sees no key. visible: (at_T, at_S, window) -> bool [B or 1, T, S]."""
    return forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, visible, window, ordered)[0]


def forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, visible, window, ordered):
    (T, H), (S, K), dtype = q_BTNH.shape[1::2], k_BSKH.shape[1:3], q_BTNH.dtype
    q_BKGTH = heads_first(q_BTNH * H**-0.5, K)
    k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))

    def part(at, here):
        return (at[0][..., here], None if at[1] is None else at[1][:, here])

    weights = []
    totals = []
    outputs = []
    for rows, keys in blocks(T, S, window, ordered):
        q_BKGtH = q_BKGTH[:, :, :, rows]
        logits = contract(merged(q_BKGtH), k_BKSH[:, :, keys], 3, 3).reshape(
            *q_BKGtH.shape[:-1], -1
        )
        mask_BtS = visible(part(at_T, rows), part(at_S, keys), window)
        logits = jnp.where(mask_BtS[:, None, None], logits, HIDDEN)
        top = jnp.maximum(logits.max(axis=-1, keepdims=True), NOTHING)
        weights.append(jnp.exp(logits - top).astype(dtype))
        totals.append(
            jnp.maximum(weights[-1].sum(axis=-1, keepdims=True, dtype=jnp.float32), 1e-37)
        )
        sums = contract(merged(weights[-1]), v_BKSH[:, :, keys], 3, 2).reshape(q_BKGtH.shape)
        outputs.append((sums / totals[-1]).astype(dtype))
    out_BKGTH = jnp.concatenate(outputs, axis=3)
    total_BKGT1 = jnp.concatenate(totals, axis=3)
    return heads_last(out_BKGTH), (q_BKGTH, k_BKSH, v_BKSH, weights, total_BKGT1, out_BKGTH)


def backward(visible, window, ordered, kept, dout_BTNH):
    q_BKGTH, k_BKSH, v_BKSH, weights, total_BKGT1, out_BKGTH = kept
    (_, K, _, T, H), S, dtype = q_BKGTH.shape, k_BKSH.shape[2], q_BKGTH.dtype
    dout = heads_first(dout_BTNH, K) / total_BKGT1
    delta_BKGT1 = jnp.sum(dout * out_BKGTH, axis=-1, keepdims=True)
    dout, delta_BKGT1 = jax.lax.optimization_barrier(
        (dout.astype(dtype), delta_BKGT1)
    )  # not made in a product
    dq = []
    dk = []
    dv = []
    for (rows, keys), p_BKGtS in zip(blocks(T, S, window, ordered), weights):

        def fill(x, keys=keys):
            return jnp.pad(x, ((0, 0), (0, 0), (keys.start, S - keys.stop), (0, 0)))

        p = merged(p_BKGtS)
        do = merged(dout[:, :, :, rows])
        dweights = contract(do, v_BKSH[:, :, keys], 3, 3) - merged(delta_BKGT1[:, :, :, rows])
        dlogits = (p * dweights).astype(dtype)
        dv.append(fill(contract(p, do, 2, 2)))
        dk.append(fill(contract(dlogits, merged(q_BKGTH[:, :, :, rows]), 2, 2)))
        dq.append(contract(dlogits, k_BKSH[:, :, keys], 3, 2).reshape(*p_BKGtS.shape[:-1], H))
    dq_BTNH = heads_last(jnp.concatenate(dq, axis=3) * H**-0.5)
    dk_BSKH, dv_BSKH = (sum(parts[1:], parts[0]).transpose(0, 2, 1, 3) for parts in (dk, dv))
    return *(x.astype(dtype) for x in (dq_BTNH, dk_BSKH, dv_BSKH)), None, None


dense.defvjp(forward, backward)
