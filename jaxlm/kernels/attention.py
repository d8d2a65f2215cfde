"""Scaled dot-product attention (Vaswani et al. 2017) with causal, segment and window masks and grouped queries.

B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head dimension. What decides who sees whom,
at_T and at_S: (places int32 [T] or [S], segments int [B, T] or [B, S], or None where all are one segment). A query's
place is the last that it sees: its own under the causal mask, ANYWHERE without it, and the end of the prefix, [B, T],
in a prefix (Raffel et al. 2020).

`flash_forward` and `flash_backward` go through keys and queries in blocks (Rabe & Staats 2021, FlashAttention: Dao et
al. 2022): memory grows with T, not with T x S. Within a block T and S are the block's. Both may be given a part of the
keys; the parts' results are merged by their log-sum-exp (jaxlm/parallel/context_parallel.py).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxlm.kernels.cpu_attention import dense
from jaxlm.kernels.hopper_attention import hopper, takes
from jaxlm.kernels.tpu_attention import LANES, splash
from jaxlm.parallel.mesh import platform

BLOCK = 512  # positions of queries, and of keys, whose logits exist at one time
MAX_LOGITS = 64 << 20  # bytes of float32 logits beyond which auto goes by blocks
NEVER = -1e30  # a logit that no exponential survives; finite, so that differences are numbers
LAST = np.iinfo(np.int32).max
ANYWHERE = LAST - 1  # the place of a query that sees all keys, with a window of LAST
einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def visible(at_T, at_S, window) -> jax.Array:
    """bool [B or 1, T, S]: key s, of the same segment, is at the place of query t or less than `window` before it."""
    (places_T, segments_BT), (places_S, segments_BS) = at_T, at_S
    mask_BTS = (places_S <= places_T[..., None]) & (places_S > places_T[..., None] - window)
    mask_BTS = mask_BTS if mask_BTS.ndim == 3 else mask_BTS[None]
    if segments_BT is not None:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    return mask_BTS


def reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, softcap):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    logits = capped(einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH), softcap)
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits, NEVER), axis=-1).astype(
        v_BSKH.dtype
    )
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def capped(logits, softcap):
    if softcap:
        return softcap * jnp.tanh(logits / softcap)
    return logits


def library(implementation):
    def attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, softcap):
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation=implementation
        )

    return attend


ATTENTION = {
    "reference": reference,
    "xla": library("xla"),
    "cudnn": library("cudnn"),
}  # and dense, blockwise, splash and tokamax, without a mask


def choose(q_BTNH, S: int, *, plain: bool, in_order: bool, causal: bool, softcap: float) -> str:
    """What auto is, on what the mesh in force is made of. q: the queries of a device, or their shape and dtype.

    in_order: queries and keys are at the places 0, 1, ...; plain: and each sees all of them up to its own, or all.
    """
    (B, T, N, H), chip = q_BTNH.shape, platform()
    fits = (
        q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and H % 8 == 0 and H <= 128
    )  # what cuDNN takes on every GPU
    if chip == "tpu" and in_order and T % LANES == 0:
        return "splash"
    if chip == "gpu" and plain and fits and not softcap:
        return "cudnn"
    if chip == "gpu" and causal and in_order and takes(q_BTNH):
        return "tokamax"
    if 4 * B * N * T * S > MAX_LOGITS:
        return "blockwise"
    if chip == "cpu" and not softcap:
        return "dense"
    return "reference"


def attention(
    q_BTNH, k_BSKH, v_BSKH, segments_BT=None, segments_BS=None, *, places_T=None, places_S=None,
    window, causal=True, softcap=0.0, implementation="auto",
) -> jax.Array:  # fmt: skip
    """[B, T, N, H]. Queries see keys of their own segment, none later than themselves, at most `window` back.

    segments: int [B, T] and [B, S], or None where every row is one document. places: int32 [T] and [S], where queries
    and keys are in the sequence; None: 0, 1, ...; of queries also [B, T], the last place that each sees. window: tokens
    a query sees, itself included. causal: False: all keys of the segment, whatever the window. implementation: see
    ATTENTION; auto: splash on a TPU; on a GPU in half precision cuDNN where the mask is plainly causal (elsewhere it is
    slow) and tokamax on a Hopper; else by blocks where the logits are many, else dense on a CPU and the reference
    elsewhere (`choose`). What the backward pass
    needs is named "attention"; of the kernels for GPUs only the result is, and their forward pass runs again.
    """
    if softcap and implementation in ("xla", "cudnn", "dense"):
        raise ValueError(
            f"model.attention={implementation} has no soft-cap: set reference, blockwise or auto"
        )
    T = q_BTNH.shape[1]
    S = k_BSKH.shape[1]
    in_order = places_T is None and places_S is None and T == S
    plain = in_order and segments_BS is None and (window >= S or not causal)
    if not causal:
        window = LAST
    if implementation == "auto":
        implementation = choose(
            q_BTNH, S, plain=plain, in_order=in_order, causal=causal, softcap=softcap
        )
    if implementation == "splash":
        return splash(
            q_BTNH, k_BSKH, v_BSKH, segments_BT, window=window, causal=causal, softcap=softcap
        )
    if implementation == "tokamax" and causal and in_order:  # else, as in generation, by blocks
        out_BTNH = hopper(q_BTNH, k_BSKH, v_BSKH, segments_BT, window=window, softcap=softcap)
        return checkpoint_name(out_BTNH, "attention")
    if not causal:
        places_T = jnp.full(T, ANYWHERE)
    at_T = (jnp.arange(T) if places_T is None else places_T, segments_BT)
    at_S = (jnp.arange(S) if places_S is None else places_S, segments_BS)
    if implementation == "dense":
        out_BTNH = dense(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, visible, window, causal and in_order)
        return checkpoint_name(out_BTNH, "attention")
    if implementation in ("blockwise", "tokamax"):
        return blockwise(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap)
    if implementation == "cudnn" and plain and not softcap:
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=causal, implementation="cudnn"
        )
    else:
        out_BTNH = ATTENTION[implementation](
            q_BTNH, k_BSKH, v_BSKH, visible(at_T, at_S, window), softcap
        )
    return checkpoint_name(out_BTNH, "attention")


# ---------------------------------------------------------------- by blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def blockwise(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap):
    """[B, T, N, H]. For the backward pass only the arguments, the result and its log-sum-exp [B, T, N] are kept."""
    return flash_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap)[0].astype(
        q_BTNH.dtype
    )


def blockwise_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap):
    out, lse_BTN = flash_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap)
    out_BTNH = checkpoint_name(out.astype(q_BTNH.dtype), "attention")
    return out_BTNH, (
        q_BTNH,
        k_BSKH,
        v_BSKH,
        at_T,
        at_S,
        out_BTNH,
        checkpoint_name(lse_BTN, "attention"),
    )


def blockwise_backward(window, softcap, kept, dout_BTNH):
    q, k, v, at_T, at_S, out_BTNH, lse_BTN = kept
    delta_BTN = einsum("BTNH,BTNH->BTN", out_BTNH, dout_BTNH)
    grads = flash_backward(q, k, v, at_T, at_S, lse_BTN, delta_BTN, dout_BTNH, window, softcap)
    return *(grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v))), None, None


blockwise.defvjp(blockwise_forward, blockwise_backward)


def flash_forward(q_BTNH, k_BSKH, v_BSKH, at_T, at_S, window, softcap):
    """(out [B, T, N, H], log-sum-exp of the logits [B, T, N]), float32: 0 and NEVER where a query sees no key."""
    T, N = q_BTNH.shape[1:3]
    q_BTNH, at_T, at_S = tie(q_BTNH, at_T, at_S)
    keys = (split(k_BSKH), split(v_BSKH), split_marks(at_S, LAST))

    def row(query):
        q_BTKGH, at_T = query

        def step(sums, key):
            k_BSKH, v_BSKH, at_S = key

            def add(sums):
                acc, top, total = sums
                logits, mask = block_logits(q_BTKGH, k_BSKH, at_T, at_S, window, softcap)
                new_top = jnp.maximum(top, jnp.max(logits, axis=-1, where=mask, initial=NEVER))
                weights = jnp.where(mask, jnp.exp(logits - new_top[..., None]), 0)
                fade = jnp.exp(top - new_top)
                part = einsum("BKGTS,BSKH->BKGTH", weights.astype(v_BSKH.dtype), v_BSKH)
                return acc * fade[..., None] + part, new_top, total * fade + weights.sum(axis=-1)

            return jax.lax.cond(may_see(at_T, at_S, window), add, lambda sums: sums, sums), None

        acc = jnp.zeros_like(q_BTKGH.transpose(0, 2, 3, 1, 4), jnp.float32)
        (acc, top, total), _ = jax.lax.scan(step, (acc, acc[..., 0] + NEVER, acc[..., 0]), keys)
        total = jnp.where(total == 0, 1, total)
        return (acc / total[..., None]).transpose(0, 3, 1, 2, 4), (top + jnp.log(total)).transpose(
            0, 3, 1, 2
        )

    out, lse = jax.lax.map(row, (split_queries(q_BTNH, k_BSKH.shape[2]), split_marks(at_T, -1)))
    return join(out, T).reshape(q_BTNH.shape), join(lse, T).reshape(-1, T, N)


def flash_backward(
    q_BTNH, k_BSKH, v_BSKH, at_T, at_S, lse_BTN, delta_BTN, dout_BTNH, window, softcap
):
    """float32 gradients of q, k and v (FlashAttention, algorithm 4).

    lse_BTN: over all keys that the queries see, also those that are not among these. delta_BTN: sum over H of
    out * dout.
    """
    (T, S), H, K = (q_BTNH.shape[1], k_BSKH.shape[1]), q_BTNH.shape[3], k_BSKH.shape[2]
    q_BTNH, at_T, at_S = tie(q_BTNH, at_T, at_S)
    queries = (
        *(split_queries(x, K) for x in (q_BTNH, lse_BTN, delta_BTN, dout_BTNH)),
        split_marks(at_T, -1),
    )

    def column(dq, key):
        k_BSKH, v_BSKH, at_S = key

        def step(dkv, query):
            dq_BTKGH, (q_BTKGH, lse, delta, dout_BTKGH, at_T) = query

            def add(dq_BTKGH, dk_BSKH, dv_BSKH):
                logits, mask = block_logits(q_BTKGH, k_BSKH, at_T, at_S, window, softcap)

                def rows(x_BTKG):
                    return x_BTKG.transpose(0, 2, 3, 1)[..., None]

                weights = jnp.where(mask, jnp.exp(logits - rows(lse)), 0)
                dv_BSKH += einsum("BKGTS,BTKGH->BSKH", weights.astype(dout_BTKGH.dtype), dout_BTKGH)
                dweights = einsum("BTKGH,BSKH->BKGTS", dout_BTKGH, v_BSKH)
                dlogits = weights * (dweights - rows(delta)) * H**-0.5
                if softcap:
                    dlogits *= 1 - jnp.square(logits / softcap)
                dlogits = dlogits.astype(q_BTKGH.dtype)
                dk_BSKH += einsum("BKGTS,BTKGH->BSKH", dlogits, q_BTKGH)
                return dq_BTKGH + einsum("BKGTS,BSKH->BTKGH", dlogits, k_BSKH), dk_BSKH, dv_BSKH

            dq_BTKGH, *dkv = jax.lax.cond(
                may_see(at_T, at_S, window), add, lambda *sums: sums, dq_BTKGH, *dkv
            )
            return dkv, dq_BTKGH

        zeros = [jnp.zeros_like(x, jnp.float32) for x in (k_BSKH, v_BSKH)]
        dkv, dq = jax.lax.scan(step, zeros, (dq, queries))
        return dq, dkv

    keys = (split(k_BSKH), split(v_BSKH), split_marks(at_S, LAST))
    dq, (dk, dv) = jax.lax.scan(column, jnp.zeros_like(queries[0], jnp.float32), keys)
    return join(dq, T).reshape(q_BTNH.shape), join(dk, S), join(dv, S)


FLASH = (flash_forward, flash_backward)


def tie(*arrays):
    """The same, as if each depended on all. A scan over layers computes what is the same in all of them beforehand:

    it would make the masks of all blocks, T x S of them, and keep them.
    """
    return jax.lax.optimization_barrier(arrays)


def block_logits(q_BTKGH, k_BSKH, at_T, at_S, window, softcap):
    """(float32 logits [B, K, G, T, S], which of them count: bool, broadcast to that)."""
    logits = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * q_BTKGH.shape[-1] ** -0.5
    return capped(logits, softcap), visible(at_T, at_S, window)[:, None, None]


def may_see(at_T, at_S, window) -> jax.Array:
    """bool scalar: False only where no query of the block sees a key of the other, by their first and last places."""
    (places_T, _), (places_S, _) = at_T, at_S
    return (places_S.min() <= places_T.max()) & (places_S.max() > places_T.min() - window)


def num_blocks(length: int) -> int:
    """Even, so that no block lies across the two parts of a shard in zig-zag order."""
    if length > 1:
        return 2 * math.ceil(length / (2 * BLOCK))
    return 1


def split(x, axis=1, fill=0):
    """[B, T, ...] -> [blocks, B, T of a block, ...], padded where the blocks do not divide T."""
    blocks = num_blocks(x.shape[axis])
    padding = [(0, -x.shape[axis] % blocks if i == axis else 0) for i in range(x.ndim)]
    if any(after for _, after in padding):
        x = jnp.pad(x, padding, constant_values=fill)
    else:
        x = x
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :]), axis, 0)


def split_queries(x_BTN, K: int):
    """[B, T, N, ...] -> [blocks, B, T of a block, K, G, ...]."""
    return split(x_BTN.reshape(*x_BTN.shape[:2], K, -1, *x_BTN.shape[3:]))


def split_marks(at, fill: int):
    """fill: the place of padding. Before all keys for queries, after all queries for keys: neither sees any."""
    places, segments = at
    return split(places, places.ndim - 1, fill), None if segments is None else split(segments)


def join(x, length: int):
    """The inverse of `split`: [blocks, B, T of a block, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
