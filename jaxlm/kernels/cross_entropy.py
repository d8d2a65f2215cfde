"""Token cross-entropy in chunks over the sequence: logits exist a chunk at a time and are not kept for backward."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.kernels.attention import capped
from jaxlm.parallel.linear import activation_specs, sum_parts
from jaxlm.parallel.mesh import even_mesh, gather, gather_weight, partition_spec, platform, split_axes

# Of float32 logits a device. Each chunk reads the output table and adds to its gradient: on accelerators few are fast.
AUTO_CHUNK_BYTES = {"cpu": 64 << 20, "gpu": 512 << 20, "tpu": 512 << 20}


def logits_of(x_BTD: jax.Array, unembed_VD: jax.Array, softcap: float) -> jax.Array:
    """float32 [B, T, V]."""
    logits = jnp.einsum("BTD,VD->BTV", x_BTD, unembed_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    return capped(logits, softcap)


def chunk_length(batch: int, length: int, vocab: int, limit: int = 0) -> int:
    """The largest divisor of `length` whose float32 logits stay within AUTO_CHUNK_BYTES, or that is at most `limit`."""
    fit = limit or max(1, AUTO_CHUNK_BYTES[platform()] // (4 * batch * vocab))
    return max(d for d in range(1, length + 1) if length % d == 0 and (d <= fit or d == 1))


def cross_entropy(x_BTD, unembed_VD, targets_BT, *, softcap=0.0, chunk=0) -> tuple[jax.Array, jax.Array]:
    """(loss, log_z), both float32 [B, T]: nats of each target, and log of the softmax's denominator.

    x: final hidden states. chunk: positions whose logits a device has at one time; 0 chooses. Any chunk and any mesh
    give the same numbers. On a mesh each device has the logits of its own part of the vocabulary (Shoeybi et al. 2019).
    """
    unembed_VD = unembed_VD.astype(x_BTD.dtype)
    mesh = even_mesh(*targets_BT.shape)
    if mesh is None:
        return chunked(x_BTD, unembed_VD, targets_BT, softcap, chunk, (), ())
    spec = partition_spec(("vocab", "embed"), unembed_VD.shape, mesh)
    batch, _, between, extra = activation_specs(*targets_BT.shape, mesh)
    vocab = split_axes("vocab", unembed_VD.shape[0], mesh)
    scattered = tuple(name for name in vocab if name in extra)

    def f(x, unembed, targets):
        return chunked(x, gather_weight(unembed, spec[1:], x, start=1), targets, softcap, chunk, vocab, scattered)

    tokens = PartitionSpec(batch, between)
    return jax.shard_map(f, in_specs=(tokens, spec, tokens), out_specs=(tokens, tokens))(x_BTD, unembed_VD, targets_BT)


def chunked(x_BTD, unembed_VD, targets_BT, softcap, chunk, vocab, scattered):
    """vocab: mesh axes that shard V here; scattered: those of them that also shard T, gathered a chunk at a time."""
    B, T, _ = x_BTD.shape
    peers = jax.lax.axis_size(scattered) if scattered else 1
    chunk = chunk_length(B * peers, T, unembed_VD.shape[0], -(-chunk // peers))
    offset = jax.lax.axis_index(vocab) * unembed_VD.shape[0] if vocab else 0

    @jax.checkpoint
    def one(x_BCD, targets_BC):
        x_BCD, targets_BC = gather(x_BCD, 1, scattered), gather(targets_BC, 1, scattered)
        logits_BCV = logits_of(x_BCD, unembed_VD, softcap)
        top_BC = jax.lax.stop_gradient(jnp.max(logits_BCV, axis=-1))
        top_BC = jax.lax.pmax(top_BC, vocab) if vocab else top_BC  # of all positions: the sums below need one maximum
        sums = jnp.exp(logits_BCV - top_BC[..., None]).sum(axis=-1)
        local = targets_BC - offset
        mine = (local >= 0) & (local < logits_BCV.shape[-1])
        found = jnp.take_along_axis(logits_BCV, jnp.where(mine, local, 0)[..., None], axis=-1)[..., 0]
        log_sum = jnp.log(sum_parts(sums, vocab, scattered))
        target_BC = sum_parts(jnp.where(mine, found - top_BC, 0.0), vocab, scattered)
        if scattered:
            top_BC = jax.lax.dynamic_slice_in_dim(top_BC, jax.lax.axis_index(scattered) * chunk, chunk, axis=1)
        return log_sum - target_BC, log_sum + top_BC

    if chunk == T:
        return one(x_BTD, targets_BT)
    split = lambda a: jnp.moveaxis(a.reshape(B, T // chunk, chunk, *a.shape[2:]), 1, 0)
    loss, log_z = jax.lax.map(lambda parts: one(*parts), (split(x_BTD), split(targets_BT)))
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(B, T)
    return join(loss), join(log_z)


def divergence(student: tuple, teacher: tuple, temperature: float) -> jax.Array:
    """float32 [B, T]: KL(teacher || student) of the softened next-token distributions, times temperature^2.

    Hinton et al. 2015. student, teacher: (x [B, T, D], table [V, D], softcap), of one vocabulary. Like cross_entropy,
    logits exist a chunk of positions at a time and are not kept.
    """
    (x_BTD, table, softcap), (y_BTE, their_table, their_softcap) = student, teacher
    B, T, _ = x_BTD.shape
    chunk = chunk_length(2 * B, T, table.shape[0])

    @jax.checkpoint
    def one(parts):
        x, y = parts
        mine = jax.nn.log_softmax(logits_of(x, table, softcap) / temperature)
        theirs = jax.nn.log_softmax(logits_of(y, their_table, their_softcap) / temperature)
        return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - mine), axis=-1)

    if chunk == T:
        return one((x_BTD, y_BTE))
    split = lambda a: jnp.moveaxis(a.reshape(B, T // chunk, chunk, -1), 1, 0)
    return jnp.moveaxis(jax.lax.map(one, (split(x_BTD), split(y_BTE))), 0, 1).reshape(B, T)
