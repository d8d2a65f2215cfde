"""Splash attention, JAX's flash attention kernel for TPUs (jax.experimental.pallas.ops.tpu), for packed rows.

The letters are those of jaxlm/kernels/attention.py. Blocks that no query sees are skipped. For the backward pass the
result and its log-sum-exp are kept, named "attention".
"""

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as library

LANES = 128  # of a TPU's vector registers: lengths and blocks are multiples
BLOCKS = (
    1024,
    512,
    256,
    128,
)  # positions of queries, and of keys; the largest that divides the length


def splash(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    segments_BT,
    *,
    window: int,
    softcap: float,
    causal=True,
    interpret=False,
) -> jax.Array:
    """[B, T, N, H]. T: a multiple of 128. segments: int32 [B, T] or None. interpret: on a CPU, slowly."""
    T, N, H = q_BTNH.shape[1:]
    block = next(size for size in BLOCKS if T % size == 0)
    masks = {True: library.CausalMask, False: library.splash_attention_mask.FullMask}
    if causal and window < T:
        mask = library.LocalMask((T, T), (window - 1, 0), 0)
    else:
        mask = masks[causal]((T, T))
    kernel = library.make_splash_mha_single_device(
        library.splash_attention_mask.MultiHeadMask([mask] * N),
        block_sizes=library.BlockSizes(*[block] * 8),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    if segments_BT is None:
        segments = None
    else:
        segments = library.SegmentIds(segments_BT, segments_BT)
    heads_first = [x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH)]
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)
