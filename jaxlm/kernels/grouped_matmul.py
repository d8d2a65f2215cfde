"""Matrix products of rows sorted by group with one matrix for each group, of whatever sizes (Gale et al. 2022).

M rows, E groups (experts), D inputs, F outputs; N blocks of R rows. Rows after the last group give zeros.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

from jaxlm.kernels.quantized import tensordot
from jaxlm.parallel.expert_parallel import out_of_range, permute
from jaxlm.parallel.mesh import platform


def reference(rows_MD, kernel_EDF, sizes_E):
    """[M, F]: every row times every matrix, masked."""
    ends_E = jnp.cumsum(sizes_E)
    index_M1 = jnp.arange(rows_MD.shape[0])[:, None]
    mine_ME = (index_M1 < ends_E) & (index_M1 >= ends_E - sizes_E)
    y_MF = 0
    for e, kernel_DF in enumerate(kernel_EDF):
        y_MF = y_MF + jnp.where(mine_ME[:, e, None], rows_MD @ kernel_DF, 0)
    return y_MF


def multiply_each(rows_EMD, kernel_EDF, quantize: str) -> jax.Array:
    """[E, M, F]: as many rows for each matrix."""
    return jax.vmap(partial(tensordot(quantize), axes=1))(rows_EMD, kernel_EDF)


def blocks(rows_MD, kernel_EDF, sizes_E, quantize="none"):
    """Every group is filled up to blocks of half the mean group; each block is multiplied with a copy of its matrix.

    At most 3 E copies and 3/2 M rows, whatever the sizes.
    """
    M = rows_MD.shape[0]
    E, _, F = kernel_EDF.shape
    R = -(-M // (2 * E))
    N = -(-M // R) + E
    counts_E = -(-sizes_E // R)
    ends_E = jnp.cumsum(sizes_E)
    block_ends_E = jnp.cumsum(counts_E)
    starts_E = ends_E - sizes_E
    block_starts_E = block_ends_E - counts_E
    index_N = jnp.arange(N)
    index_M = jnp.arange(M)
    group_N = group_of(index_N, block_ends_E)
    row_N = starts_E[group_N] + (index_N - block_starts_E[group_N]) * R
    row_NR = row_N[:, None] + jnp.arange(R)
    end_N1 = ends_E[group_N][:, None]
    real_N1 = (group_N < E)[:, None]
    inside_NR = (row_NR < end_N1) & real_N1
    nothing_NR = out_of_range(N * R, M).reshape(N, R)
    source_NR = jnp.where(inside_NR, row_NR, nothing_NR)
    x_NRD = permute(rows_MD, source_NR)
    y_NRF = multiply_each(x_NRD, kernel_EDF[group_N], quantize)
    group_M = group_of(index_M, ends_E)
    place_M = block_starts_E[group_M] * R + index_M - starts_E[group_M]
    place_M = jnp.where(group_M < E, place_M, out_of_range(M, N * R))
    return permute(y_NRF.reshape(-1, F), place_M)


def group_of(index, ends_E):
    """int32: the group of each index, E after the last. ends: the index after each group."""
    return jnp.sum(index[:, None] >= ends_E, axis=1)


TILE = (
    512,
    1024,
    1024,
)  # of rows, inputs and outputs: 11 MiB of a TPU's vector memory in bfloat16
LANES = 128  # of a TPU's vector registers, of which tiles are multiples


def megablox(rows_MD, kernel_EDF, sizes_E):
    """JAX's kernels for TPUs, forward and backward; interpreted elsewhere, slowly.

    XLA's own ragged_dot has a kernel for the forward product only: the gradient of the matrices multiplies all rows
    with every matrix there, 8 times the work in Mixtral.
    """
    M, D = rows_MD.shape
    F = kernel_EDF.shape[2]
    tile = []
    for most, size in zip(TILE, (M, D, F)):
        tile.append(min(most, -(-size // LANES) * LANES))
    # The kernels leave what is after the last group undefined.
    inside_M = jnp.arange(M) < jnp.sum(sizes_E)
    inside_M1 = inside_M[:, None]
    rows_MD = jnp.where(inside_M1, rows_MD, 0)
    rows_MD = jnp.pad(rows_MD, ((0, -M % tile[0]), (0, 0)))
    interpret = platform() != "tpu"
    y_MF = gmm(
        rows_MD,
        kernel_EDF,
        sizes_E,
        rows_MD.dtype,
        tuple(tile),
        interpret=interpret,
    )
    return jnp.where(inside_M1, y_MF[:M], 0)


GROUPED_MATMUL = {"reference": reference, "blocks": blocks, "megablox": megablox}


def grouped_matmul(
    rows_MD, kernel_EDF, sizes_E, *, implementation="auto", quantize="none"
) -> jax.Array:
    """[M, F]: the first sizes[0] rows times kernel[0], the next sizes[1] times kernel[1], ...

    rows: [M, D], kernel: [E, D, F], sizes: int32 [E]. implementation: a key of GROUPED_MATMUL, or auto: megablox on
    TPUs, elsewhere blocks, for XLA's ragged_dot would multiply all rows, masked, with every matrix.
    quantize: as in jaxlm/kernels/quantized.py; always by blocks, for megablox takes no 8 bits.
    """
    if quantize != "none":
        return blocks(rows_MD, kernel_EDF, sizes_E, quantize)
    if implementation == "auto":
        implementation = "blocks"
        if platform() == "tpu":
            implementation = "megablox"
    return GROUPED_MATMUL[implementation](rows_MD, kernel_EDF, sizes_E)
