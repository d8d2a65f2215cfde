"""Attention of jax.nn: by XLA, and by cuDNN on GPUs. The letters and the signature: jaxlm/kernels/attention.py."""

import jax

from jaxlm.kernels.attention import Mask, visible


def xla(q_BTNH, k_BSKH, v_BSKH, mask: Mask, *, scale: float, softcap: float) -> jax.Array:
    """[B, T, N, H], softmax(scale q k) v in XLA's operations. softcap: 0, for there is none."""
    return with_mask(q_BTNH, k_BSKH, v_BSKH, mask, scale, "xla")


def cudnn(q_BTNH, k_BSKH, v_BSKH, mask: Mask, *, scale: float, softcap: float) -> jax.Array:
    """[B, T, N, H] by cuDNN's flash attention: fast where mask.plain. softcap: 0, for there is none."""
    if not mask.plain:
        return with_mask(q_BTNH, k_BSKH, v_BSKH, mask, scale, "cudnn")
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        scale=scale,
        is_causal=mask.causal,
        implementation="cudnn",
    )


def with_mask(q_BTNH, k_BSKH, v_BSKH, mask: Mask, scale: float, implementation: str) -> jax.Array:
    """Attention with the mask as an array, bool [B or 1, 1, T, S]."""
    mask_BTS = visible(mask.at_T, mask.at_S, mask.window)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask_BTS[:, None],
        scale=scale,
        implementation=implementation,
    )
