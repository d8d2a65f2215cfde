"""Attention of packed documents on Hopper GPUs: the kernels of tokamax (openxla/tokamax, Pallas: Mosaic GPU).

The letters and the signature are those of jaxlm/kernels/attention.py. Each query has the first key that it sees: no
mask is made, rows may hold any number of documents, and the forward pass skips the blocks before them. cuDNN, through
jax, takes packed rows too, but with a fixed number M of documents a row, and its backward pass then asks for M times
the memory. Needs the extra `cuda` on Python 3.12 or later. What is imported is not among tokamax's public names:
pyproject.toml says which versions have it.
"""

import jax
import jax.numpy as jnp

from jaxlm.config.attention_kernels import ATTENTION_KERNELS
from jaxlm.kernels.attention import Mask, fits

FORWARD = {"block_q": 64, "block_kv": 128, "num_stages": 2}
BACKWARD = {
    "block_q_dq": 64,
    "block_kv_dq": 64,
    "block_q_dkv": 64,
    "block_kv_dkv": 64,
    "num_stages": 2,
}


def tokamax(q_BTNH, k_BTKH, v_BTKH, mask: Mask, *, scale: float, softcap: float) -> jax.Array:
    """[B, T, N, H]. mask: causal and in order, documents one after the other.

    Raises ValueError on other GPUs, and for dtypes, lengths and head dimensions that the kernel doesn't take.
    """
    kernel = ATTENTION_KERNELS["tokamax"]
    if not fits(kernel, q_BTNH):
        raise ValueError(
            f"model.attention=tokamax: needs a Hopper GPU, half precision, lengths in multiples of "
            f"{kernel.length_multiple} and head_dim in {kernel.head_dims}, not {q_BTNH.dtype}, {q_BTNH.shape[1]} and "
            f"{q_BTNH.shape[3]}: set auto or blockwise"
        )
    from tokamax._src.ops.attention import base
    from tokamax._src.ops.attention import pallas_mosaic_gpu as forward
    from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp as backward

    attend = forward.PallasMosaicGpuFlashAttention(
        config=forward.ConfigSM90(**FORWARD),
        vjp=backward.PallasMosaicGpuFlashAttentionVjp(config=backward.Config(**BACKWARD)),
    )
    _, segments_BT = mask.at_T
    first_BT = first_keys(segments_BT, q_BTNH.shape[1], mask.window)
    ranges = base.Mask(is_causal=True, k_start=first_BT[:, None])  # the same for all heads
    return attend(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=ranges,
        logits_scale=scale,
        logits_soft_cap=softcap or None,
    )


def first_keys(segments_BT, length: int, window: int) -> jax.Array:
    """int32 [B or 1, T]: where the document of each position begins, or the window if that is later."""
    places_T = jnp.arange(length, dtype=jnp.int32)
    first_BT = (places_T - (window - 1)).clip(0)[None]
    if segments_BT is None:
        return first_BT
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)))
    start_BT = jax.lax.cummax(jnp.where(begins_BT, places_T, 0), axis=1)
    return jnp.maximum(first_BT, start_BT)
