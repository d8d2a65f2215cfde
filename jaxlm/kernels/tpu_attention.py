"""Splash attention, JAX's flash attention kernel for TPUs (jax.experimental.pallas.ops.tpu), for packed rows.

The letters and the signature are those of jaxlm/kernels/attention.py. Blocks that no query sees are skipped. For the
backward pass the result and its log-sum-exp are kept, named "attention".
"""

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as library

from jaxlm.config.attention_kernels import ATTENTION_KERNELS
from jaxlm.kernels.attention import Mask

# Positions of queries, and of keys, of a block: the largest that divides the length.
BLOCKS = (1024, 512, 256, 128)


def splash(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    mask: Mask,
    *,
    scale: float,
    softcap: float,
    interpret=False,
) -> jax.Array:
    """[B, T, N, H]. mask: in order. interpret: on a CPU, slowly. Raises ValueError where 128 doesn't divide T."""
    T, N = q_BTNH.shape[1:3]
    multiple = ATTENTION_KERNELS["splash"].length_multiple
    if T % multiple:
        raise ValueError(
            f"model.attention=splash: needs lengths in multiples of {multiple}, not {T}: set auto or blockwise"
        )
    block = next(size for size in BLOCKS if T % size == 0)
    kernel = library.make_splash_mha_single_device(
        library.splash_attention_mask.MultiHeadMask([head_mask(mask, T)] * N),
        block_sizes=library.BlockSizes(*[block] * 8),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    _, segments_BT = mask.at_T
    _, segments_BS = mask.at_S
    segments = None
    if segments_BT is not None:
        segments = library.SegmentIds(segments_BT, segments_BS)
    heads_first = [x.swapaxes(1, 2) for x in (q_BTNH * scale, k_BTKH, v_BTKH)]
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)


def head_mask(mask: Mask, T: int):
    """The mask of one head, T x T, as the kernel has it: computed block by block, never an array."""
    if not mask.causal:
        return library.splash_attention_mask.FullMask((T, T))
    if mask.window < T:
        return library.LocalMask((T, T), (mask.window - 1, 0), 0)
    return library.CausalMask((T, T))
