"""Token cross-entropy in chunks over the sequence: logits exist a chunk at a time and are not kept for backward."""

import jax
import jax.numpy as jnp

AUTO_CHUNK_BYTES = 64 << 20  # of float32 logits a device


def logits_of(x_BTD: jax.Array, unembed_VD: jax.Array, softcap: float) -> jax.Array:
    """float32 [B, T, V]."""
    logits = jnp.einsum("BTD,VD->BTV", x_BTD, unembed_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def chunk_length(shape_BTV: tuple[int, int, int], shards: int = 1) -> int:
    """The largest divisor of T whose float32 logits stay within AUTO_CHUNK_BYTES on each of `shards` devices."""
    B, T, V = shape_BTV
    fit = max(1, AUTO_CHUNK_BYTES * shards // (4 * B * V))
    return max(d for d in range(1, T + 1) if T % d == 0 and (d <= fit or d == 1))


def cross_entropy(x_BTD, unembed_VD, targets_BT, *, softcap=0.0, chunk=0) -> tuple[jax.Array, jax.Array]:
    """(loss, log_z), both float32 [B, T]: nats of each target, and log of the softmax's denominator.

    x: final hidden states. chunk: positions at a time; 0 chooses. Any chunk gives the same numbers.
    """
    B, T, _ = x_BTD.shape
    mesh = jax.sharding.get_abstract_mesh()
    chunk = chunk or chunk_length((B, T, unembed_VD.shape[0]), 1 if mesh.empty else mesh.size)
    if T % chunk:
        raise ValueError(f"train.loss_chunk={chunk} must divide the sequence length {T}")

    @jax.checkpoint
    def one(x_BCD, targets_BC):
        logits_BCV = logits_of(x_BCD, unembed_VD, softcap)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        return log_z_BC - jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0], log_z_BC

    if chunk == T:
        return one(x_BTD, targets_BT)
    split = lambda a: jnp.moveaxis(a.reshape(B, T // chunk, chunk, *a.shape[2:]), 1, 0)
    loss, log_z = jax.lax.map(lambda parts: one(*parts), (split(x_BTD), split(targets_BT)))
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(B, T)
    return join(loss), join(log_z)
