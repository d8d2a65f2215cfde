"""Flash attention for packed causal rows on Hopper GPUs: the kernels of tokamax (openxla/tokamax, Pallas: Mosaic GPU).

The letters are those of jaxlm/kernels/attention.py. A query is told the first key that it sees: no mask is made, rows
may hold any number of documents, and the forward pass skips the blocks before them. cuDNN, through jax, takes packed
rows too, but with a fixed number M of documents a row, and its backward pass then asks for M times the memory. Needs
the extra `cuda` on Python 3.12 or later. What is imported is not among tokamax's public names: pyproject.toml says
which versions have it.
"""

import functools
import importlib.util
import logging

import jax
import jax.numpy as jnp
from jax.extend import backend

ROWS = 128  # positions are multiples: of the blocks below, two of queries at a time
HEAD_DIMS = (64, 128)
FORWARD = {"block_q": 64, "block_kv": 128, "num_stages": 2}
BACKWARD = {
    "block_q_dq": 64,
    "block_kv_dq": 64,
    "block_q_dkv": 64,
    "block_kv_dkv": 64,
    "num_stages": 2,
}


def hopper(q_BTNH, k_BTKH, v_BTKH, segments_BT, *, window: int, softcap: float) -> jax.Array:
    """[B, T, N, H]. segments: int [B, T], documents one after the other, or None. Raises ValueError if not `takes`."""
    if not takes(q_BTNH):
        raise ValueError(
            f"model.attention=tokamax: needs a Hopper GPU, half precision, lengths in multiples of {ROWS} and head_dim "
            f"in {HEAD_DIMS}, not {q_BTNH.dtype}, {q_BTNH.shape[1]} and {q_BTNH.shape[3]}: set auto or blockwise"
        )
    from tokamax._src.ops.attention import base
    from tokamax._src.ops.attention import pallas_mosaic_gpu as forward
    from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp as backward

    attend = forward.PallasMosaicGpuFlashAttention(
        config=forward.ConfigSM90(**FORWARD),
        vjp=backward.PallasMosaicGpuFlashAttentionVjp(config=backward.Config(**BACKWARD)),
    )
    first_BT = first_keys(segments_BT, q_BTNH.shape[1], window)
    mask = base.Mask(is_causal=True, k_start=first_BT[:, None])  # the same for all heads
    return attend(q_BTNH, k_BTKH, v_BTKH, mask=mask, logits_soft_cap=softcap or None)


def first_keys(segments_BT, length: int, window: int) -> jax.Array:
    """int32 [B or 1, T]: where the document of each position begins, or the window if that is later."""
    places_T = jnp.arange(length, dtype=jnp.int32)
    first_BT = (places_T - (window - 1)).clip(0)[None]
    if segments_BT is not None:
        begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
        first_BT = jnp.maximum(first_BT, jax.lax.cummax(jnp.where(begins_BT, places_T, 0), axis=1))
    return first_BT


def takes(q_BTNH) -> bool:
    """Whether there is a kernel: for Hopper GPUs (jax's default device, here or not), where tokamax is installed."""
    device, (_, T, _, H) = backend.get_default_device(), q_BTNH.shape
    fits = T % ROWS == 0 and H in HEAD_DIMS and q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    return (
        fits and device.platform == "gpu" and device.compute_capability == "9.0" and has_tokamax()
    )


@functools.cache
def has_tokamax() -> bool:
    found = importlib.util.find_spec("tokamax") is not None
    if not found:
        logging.getLogger("jaxlm").warning(
            "attention of packed documents goes by blocks in XLA, slower: for the kernel, Python >= 3.12 and "
            "pip install -e '.[cuda]' (tokamax)"
        )
    return found
