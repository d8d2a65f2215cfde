"""Scaled dot-product attention (Vaswani et al. 2017) with causal, segment and window masks and grouped queries.

B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head dimension.
"""

import jax
import jax.numpy as jnp


def attention_mask(length, segments_BT, segments_BS, offset, window) -> jax.Array:
    """bool [B or 1, T, S]: key s is visible to query t, whose place among the keys is offset + t."""
    index_T = jnp.arange(length)[:, None] + offset
    index_S = jnp.arange(length if segments_BS is None else segments_BS.shape[1])[None, :]
    mask_BTS = ((index_S <= index_T) & (index_S > index_T - window))[None]
    if segments_BS is not None:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    return mask_BTS


def reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, softcap):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], logits, -1e30), axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def library(implementation):
    def attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, softcap):
        if softcap:
            raise ValueError(f"model.attention={implementation} has no soft-cap: set model.attention=reference")
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation=implementation
        )

    return attend


ATTENTION = {"reference": reference, "xla": library("xla"), "cudnn": library("cudnn")}


def attention(
    q_BTNH, k_BSKH, v_BSKH, segments_BT=None, segments_BS=None, *, offset=0, window, softcap=0.0, implementation="auto"
) -> jax.Array:
    """[B, T, N, H]. Queries see keys of their own segment, none later than themselves, at most `window` back.

    segments: int [B, T] and [B, S], or None where every row is one document. offset: place of the first query among
    the keys (with a cache, int scalar). window: tokens a query sees, itself included. implementation: see ATTENTION;
    auto: cuDNN on a GPU in half precision where the mask is plainly causal (elsewhere it is slow), else the reference.
    """
    plain = segments_BS is None and isinstance(offset, int) and offset == 0 and window >= k_BSKH.shape[1]
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    if implementation == "auto":
        fits = q_BTNH.shape[-1] % 8 == 0 and q_BTNH.shape[-1] <= 128  # what cuDNN takes on every GPU
        fast = plain and half and fits and not softcap and jax.default_backend() == "gpu"
        implementation = "cudnn" if fast else "reference"
    if implementation == "cudnn" and plain and not softcap:
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn")
    mask_BTS = attention_mask(q_BTNH.shape[1], segments_BT, segments_BS, offset, window)
    return ATTENTION[implementation](q_BTNH, k_BSKH, v_BSKH, mask_BTS, softcap)
