"""Token cross-entropy in chunks over the sequence: logits exist a chunk at a time and are not kept for backward.

Where the weight of each token is known beforehand (`weighted`), the gradient is made beside the loss, of the same
logits; elsewhere (`cross_entropy`) the backward pass computes them again.

Letters: C the positions of a chunk; V, on a mesh, a device's part of the vocabulary.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.kernels.attention import NEVER, capped
from jaxlm.parallel.linear import activation_specs, sum_parts
from jaxlm.parallel.mesh import (
    current_mesh,
    even_mesh,
    gather,
    gather_weight,
    names_of,
    partition_spec,
    platform,
    split_axes,
)

# Of float32 logits a device, at most. Each chunk reads the output table and adds to its gradient: on accelerators few
# are fast. On a CPU a chunk is best as large as the table, or what its caches hold: 16 x 256 tokens of 128 numbers and
# 4,096 words take 86 ms by 8 MiB and 147 by 64, while 32,000 words of 512 are the slower the smaller chunks are.
AUTO_CHUNK_BYTES = {"cpu": 64 << 20, "gpu": 1 << 30, "tpu": 512 << 20}
CPU_CACHE = 8 << 20
# Chunks of which the table's gradient may be summed in x's dtype, as devices sum it: half the memory of float32.
FEW = 16


class Mix(NamedTuple):
    """What is learned of a token: loss x its nats + log_z x log Z + z_loss x log(Z)^2, Z the softmax's denominator."""

    loss: float = 1.0
    log_z: float = 0.0
    z_loss: float = 0.0


class Options(NamedTuple):
    """vocab: mesh axes that shard V here; scattered: those of them that also shard T, gathered a chunk at a time."""

    softcap: float
    chunk: int
    vocab: tuple[str, ...] = ()
    scattered: tuple[str, ...] = ()


def logits_of(x_BTD: jax.Array, unembed_VD: jax.Array, softcap: float) -> jax.Array:
    """float32 [B, T, V]."""
    logits = jnp.einsum(
        "BTD,VD->BTV",
        x_BTD,
        unembed_VD.astype(x_BTD.dtype),
        preferred_element_type=jnp.float32,
    )
    return capped(logits, softcap)


def chunk_length(batch: int, length: int, table: tuple[int, int], limit: int = 0) -> int:
    """Positions of a chunk: the largest divisor of `length` whose float32 logits stay within AUTO_CHUNK_BYTES.

    table: (V, D) of the output table. limit: positions at most, instead; 0: none. On a CPU without a limit: of those
    divisors the one whose logits come nearest to the size of the table, or to CPU_CACHE where that is larger.
    """
    vocab, dim = table
    most_bytes = AUTO_CHUNK_BYTES[platform()]
    best_bytes = most_bytes
    if platform() == "cpu":
        best_bytes = min(most_bytes, max(CPU_CACHE, 4 * vocab * dim))
    a_position = 4 * batch * vocab  # bytes of its logits
    most = limit or most_bytes // a_position or 1
    best = limit or best_bytes // a_position or 1
    divisors = [d for d in range(1, min(most, length) + 1) if length % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / best)))


def cross_entropy(
    x_BTD, unembed_VD, targets_BT, *, softcap=0.0, chunk=0
) -> tuple[jax.Array, jax.Array]:
    """(loss, log_z), both float32 [B, T]: nats of each target, and log of the softmax's denominator.

    x: final hidden states [B, T, D]. unembed: [V, D]. targets: int [B, T]. chunk: positions whose logits a device has
    at one time; 0 chooses. Any chunk and any mesh give the same numbers. On a mesh each device has the logits of its
    own part of the vocabulary (Shoeybi et al. 2019).
    """
    return on_mesh(nats, Options(softcap, chunk), x_BTD, unembed_VD, targets_BT)


def weighted(x_BTD, unembed_VD, targets_BT, weights_BT, mix: Mix, *, softcap=0.0, chunk=0):
    """(float32 sum over tokens of weight x mix; loss and log_z of cross_entropy, which pass no gradient on).

    x: final hidden states [B, T, D]. unembed: [V, D]. targets, weights: [B, T]; the weights are constants. Takes three
    products where cross_entropy's gradient takes four.
    """
    f = partial(weighted_nats, mix)
    weights_BT = weights_BT.astype(jnp.float32)
    return on_mesh(f, Options(softcap, chunk), x_BTD, unembed_VD, targets_BT, weights_BT)


def on_mesh(f, options: Options, x_BTD, unembed_VD, *arrays):
    """f(options, x, table, *arrays) on what each device holds; results without dimensions are summed over devices.

    arrays: [B, T].
    """
    unembed_VD = unembed_VD.astype(x_BTD.dtype)
    mesh = even_mesh(*x_BTD.shape[:2])
    if mesh is None:
        return f(options, x_BTD, unembed_VD, *arrays)
    spec = partition_spec(("vocab", "embed"), unembed_VD.shape, mesh)
    batch, _, between, extra = activation_specs(*x_BTD.shape[:2], mesh)
    vocab = split_axes("vocab", unembed_VD.shape[0], mesh)
    scattered = tuple(name for name in vocab if name in extra)
    options = options._replace(vocab=vocab, scattered=scattered)
    tokens = PartitionSpec(batch, between)
    everywhere = names_of(batch) + names_of(between)

    def sum_scalar(y):
        if y.ndim:
            return y
        return jax.lax.psum(y, everywhere)

    def local(x, unembed, *arrays):
        unembed = gather_weight(unembed, spec[1:], x, start=1)
        return [sum_scalar(y) for y in f(options, x, unembed, *arrays)]

    out_specs = [PartitionSpec()] * (len(arrays) - 1) + [tokens, tokens]
    in_specs = (tokens, spec, *[tokens] * len(arrays))
    call = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)
    return call(x_BTD, unembed_VD, *arrays)


# ---------------------------------------------------------------- on one device


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def nats(options: Options, x_BTD, unembed_VD, targets_BT):
    """(nats of each target, log Z), float32 [B, T]."""

    def step(carry, x_BCD, targets_BC):
        found, _ = forward(options, unembed_VD, x_BCD, targets_BC)
        return carry, found

    _, found = scan_chunks(options, unembed_VD, step, None, x_BTD, targets_BT)
    return found


def nats_forward(options, x_BTD, unembed_VD, targets_BT):
    found = nats(options, x_BTD, unembed_VD, targets_BT)
    return found, (x_BTD, unembed_VD, targets_BT)


def nats_backward(options, kept, slopes):
    x_BTD, unembed_VD, targets_BT = kept

    def step(dunembed_VD, x_BCD, targets_BC, *slopes):
        (_, log_z_BC), logits_BCV = forward(options, unembed_VD, x_BCD, targets_BC)
        dx_BCD, more = backward(
            options, unembed_VD, x_BCD, targets_BC, logits_BCV, log_z_BC, *slopes
        )
        return dunembed_VD + more, (dx_BCD,)

    zeros = jnp.zeros_like(unembed_VD, jnp.float32)
    dunembed_VD, (dx_BTD,) = scan_chunks(
        options, unembed_VD, step, zeros, x_BTD, targets_BT, *slopes
    )
    return dx_BTD, dunembed_VD.astype(unembed_VD.dtype), None


nats.defvjp(nats_forward, nats_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_nats(mix: Mix, options: Options, x_BTD, unembed_VD, targets_BT, weights_BT):
    loss_BT, log_z_BT = nats(options, x_BTD, unembed_VD, targets_BT)
    return total(mix, weights_BT, loss_BT, log_z_BT), loss_BT, log_z_BT


def weighted_forward(mix, options, x_BTD, unembed_VD, targets_BT, weights_BT):
    def step(dunembed_VD, x_BCD, targets_BC, weights_BC):
        (loss_BC, log_z_BC), logits_BCV = forward(options, unembed_VD, x_BCD, targets_BC)
        dloss_BC = weights_BC * mix.loss
        dlog_z_BC = weights_BC * (mix.log_z + 2 * mix.z_loss * log_z_BC)
        dx_BCD, more = backward(
            options,
            unembed_VD,
            x_BCD,
            targets_BC,
            logits_BCV,
            log_z_BC,
            dloss_BC,
            dlog_z_BC,
        )
        dunembed_VD = (dunembed_VD + more).astype(dunembed_VD.dtype)
        return dunembed_VD, (loss_BC, log_z_BC, dx_BCD)

    few = x_BTD.shape[1] <= FEW * chunk_of(options, unembed_VD, x_BTD)
    dtype = jnp.float32
    if few and current_mesh():
        dtype = unembed_VD.dtype
    zeros = jnp.zeros_like(unembed_VD, dtype)
    dunembed_VD, found = scan_chunks(
        options, unembed_VD, step, zeros, x_BTD, targets_BT, weights_BT
    )
    loss_BT, log_z_BT, dx_BTD = found
    return (total(mix, weights_BT, loss_BT, log_z_BT), loss_BT, log_z_BT), (
        dx_BTD,
        dunembed_VD,
    )


def weighted_backward(mix, options, kept, slopes):
    """mix, whose weights are constants, is the only result that passes a gradient on."""
    slope, *_ = slopes
    dx_BTD, dunembed_VD = kept
    dtype = dx_BTD.dtype
    return (
        (slope * dx_BTD).astype(dtype),
        (slope * dunembed_VD).astype(dtype),
        None,
        None,
    )


weighted_nats.defvjp(weighted_forward, weighted_backward)


def total(mix: Mix, weights_BT, loss_BT, log_z_BT) -> jax.Array:
    mixed_BT = mix.loss * loss_BT + mix.log_z * log_z_BT + mix.z_loss * jnp.square(log_z_BT)
    return jnp.sum(weights_BT * mixed_BT)


def chunk_of(options: Options, unembed_VD, x_BTD) -> int:
    """Positions of this device in a chunk, to which those of the other devices in `scattered` come."""
    peers = 1
    if options.scattered:
        peers = jax.lax.axis_size(options.scattered)
    limit = -(-options.chunk // peers)
    return chunk_length(x_BTD.shape[0] * peers, x_BTD.shape[1], unembed_VD.shape, limit)


def scan_chunks(options: Options, unembed_VD, step, carry, *arrays):
    """(the last carry, outputs joined) of step(carry, *chunks of the arrays [B, T, ...]) -> (carry, outputs)."""
    T = arrays[0].shape[1]
    chunk = chunk_of(options, unembed_VD, arrays[0])
    if chunk == T:
        return step(carry, *arrays)
    chunks = [split_positions(a, chunk) for a in arrays]
    carry, out = jax.lax.scan(lambda carry, parts: step(carry, *parts), carry, chunks)
    return carry, tuple(join_positions(a) for a in out)


def split_positions(a, chunk: int):
    """[B, T, ...] -> [T / C, B, C, ...]."""
    B, T, *rest = a.shape
    return jnp.moveaxis(a.reshape(B, T // chunk, chunk, *rest), 1, 0)


def join_positions(a):
    """The inverse of `split_positions`."""
    chunks, B, C, *rest = a.shape
    return jnp.moveaxis(a, 0, 1).reshape(B, chunks * C, *rest)


def forward(options: Options, unembed_VD, x_BCD, targets_BC):
    """((nats, log Z) of this device's positions, float32 [B, C]; logits of those of all in `scattered`)."""
    vocab = options.vocab
    scattered = options.scattered
    chunk = x_BCD.shape[1]
    x_BCD, targets_BC = whole(options, x_BCD, targets_BC)
    logits_BCV = logits_of(x_BCD, unembed_VD, options.softcap)
    top_BC, sums_BC = top_and_sum(logits_BCV)
    if vocab:  # of all positions: the sums of the devices need one maximum
        own_BC = top_BC
        top_BC = jax.lax.pmax(top_BC, vocab)
        sums_BC *= jnp.exp(own_BC - top_BC)
    local = local_targets(options, unembed_VD, targets_BC)
    mine = (local >= 0) & (local < logits_BCV.shape[-1])
    row_BC1 = jnp.where(mine, local, 0)[..., None]
    found_BC = jnp.take_along_axis(logits_BCV, row_BC1, axis=-1)[..., 0]
    log_sum = jnp.log(sum_parts(sums_BC, vocab, scattered))
    target_BC = sum_parts(jnp.where(mine, found_BC - top_BC, 0.0), vocab, scattered)
    if scattered:
        start = jax.lax.axis_index(scattered) * chunk
        top_BC = jax.lax.dynamic_slice_in_dim(top_BC, start, chunk, axis=1)
    return (log_sum - target_BC, log_sum + top_BC), logits_BCV


def top_and_sum(logits_BCV) -> tuple[jax.Array, jax.Array]:
    """(maximum, sum of exp(logit - maximum)) over V; on a GPU in one pass (Milakov & Gimelshein 2018)."""
    if platform() != "gpu":
        top_BC = jnp.max(logits_BCV, axis=-1)
        weights_BCV = jnp.exp(logits_BCV - top_BC[..., None])
        return top_BC, weights_BCV.sum(axis=-1)

    def combine(a, b):
        top_a, sum_a = a
        top_b, sum_b = b
        top = jnp.maximum(top_a, top_b)
        sum_a = sum_a * jnp.exp(top_a - top)
        sum_b = sum_b * jnp.exp(top_b - top)
        return top, sum_a + sum_b

    start = (jnp.float32(NEVER), jnp.float32(0))
    pairs = (logits_BCV, jnp.ones_like(logits_BCV))
    return jax.lax.reduce(pairs, start, combine, (logits_BCV.ndim - 1,))


def backward(
    options: Options,
    unembed_VD,
    x_BCD,
    targets_BC,
    logits_BCV,
    log_z_BC,
    dloss_BC,
    dlog_z_BC,
):
    """(dx, of this device's positions; dunembed, float32); the logits' gradient is rounded as x is."""
    given = whole(options, x_BCD, targets_BC, log_z_BC, dloss_BC, dlog_z_BC)
    x_BCD, targets_BC, log_z_BC, dloss_BC, dlog_z_BC = given
    local = local_targets(options, unembed_VD, targets_BC)
    hit_BCV = jnp.arange(unembed_VD.shape[0]) == local[..., None]
    dlogits_BCV = (dloss_BC + dlog_z_BC)[..., None] * jnp.exp(logits_BCV - log_z_BC[..., None])
    dlogits_BCV -= jnp.where(hit_BCV, dloss_BC[..., None], 0)
    if options.softcap:
        dlogits_BCV *= 1 - jnp.square(logits_BCV / options.softcap)
    dlogits_BCV = dlogits_BCV.astype(x_BCD.dtype)
    dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, unembed_VD)
    dunembed_VD = jnp.einsum("BCV,BCD->VD", dlogits_BCV, x_BCD, preferred_element_type=jnp.float32)
    return sum_parts(dx_BCD, options.vocab, options.scattered), dunembed_VD


def whole(options: Options, *arrays) -> list[jax.Array]:
    """The arrays [B, C, ...] with the positions that the other devices in `scattered` hold."""
    return [gather(x, 1, options.scattered) for x in arrays]


def local_targets(options: Options, unembed_VD, targets_BC) -> jax.Array:
    """The targets' rows in this device's part of the table; out of its bounds where others have them."""
    if not options.vocab:
        return targets_BC
    return targets_BC - jax.lax.axis_index(options.vocab) * unembed_VD.shape[0]


def divergence(student: tuple, teacher: tuple, temperature: float) -> jax.Array:
    """float32 [B, T]: KL(teacher || student) of the softened next-token distributions, times temperature^2.

    Hinton et al. 2015. student, teacher: (x [B, T, D], table [V, D], softcap), of one vocabulary. Like cross_entropy,
    logits exist a chunk of positions at a time and are not kept.
    """
    x_BTD, student_table, student_softcap = student
    y_BTE, teacher_table, teacher_softcap = teacher
    B, T, _ = x_BTD.shape
    chunk = chunk_length(2 * B, T, student_table.shape)

    def log_softmax(x, table, softcap):
        return jax.nn.log_softmax(logits_of(x, table, softcap) / temperature)

    @jax.checkpoint
    def of_chunk(parts):
        x_BCD, y_BCE = parts
        student_BCV = log_softmax(x_BCD, student_table, student_softcap)
        teacher_BCV = log_softmax(y_BCE, teacher_table, teacher_softcap)
        difference_BCV = teacher_BCV - student_BCV
        return temperature**2 * jnp.sum(jnp.exp(teacher_BCV) * difference_BCV, axis=-1)

    if chunk == T:
        return of_chunk((x_BTD, y_BTE))
    chunks = (split_positions(x_BTD, chunk), split_positions(y_BTE, chunk))
    return join_positions(jax.lax.map(of_chunk, chunks))
