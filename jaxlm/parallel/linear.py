"""Matrix products on a mesh, their collectives written out: the same on every backend, countable before a run.

Weights are gathered over the axes that shard `embed` (fsdp), activations over the tensor axis (Megatron with sequence
parallelism: Shoeybi et al. 2019, Korthikanti et al. 2022). Transposed, a gather is a reduce-scatter: no whole gradient
and no whole activation is ever all-reduced. Without a mesh, or where it does not divide the batch evenly (generation
from one prompt), the plain product is left to XLA's partitioner. `tensordot`: jnp.tensordot, or what stands for it.

Letters: B batch, T positions, D embed, V vocabulary; "residual" activations are [B, T, D] with T sharded over the
sequence and tensor axes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel.mesh import (
    axes_in,
    even_mesh,
    gather,
    gather_weight,
    names_of,
    partition_spec,
    scatter_sum,
    split_axes,
)


def activation_specs(batch: int, length: int, mesh) -> tuple:
    """(entry of B, entry of T in layers, entry of T between them, the axes that are only in the last)."""
    rows, inside = partition_spec(("batch", "length"), (batch, length), mesh)
    (between,) = partition_spec(("residual",), (length,), mesh)
    everywhere = names_of(inside)
    extra = tuple(name for name in names_of(between) if name not in everywhere)
    return rows, inside, between, extra


# ---------------------------------------------------------------- on one device


@jax.custom_vjp
def product(x_BTK: jax.Array, kernel_KN: jax.Array) -> jax.Array:
    """x kernel, [B, T, N]. The gradient of the kernel is made in the kernel's own layout.

    jax's rule makes it transposed, and XLA on CPUs then transposes the other factor, element by element, together with
    whatever made it: half of the time of an MLP with GELU.
    """
    return jnp.tensordot(x_BTK, kernel_KN, 1)


def product_forward(x_BTK, kernel_KN):
    return product(x_BTK, kernel_KN), (x_BTK, kernel_KN)


def product_backward(residuals, dy_BTN):
    x_BTK, kernel_KN = residuals
    x = x_BTK.reshape(-1, x_BTK.shape[-1])
    dy = dy_BTN.reshape(-1, dy_BTN.shape[-1])
    last_with_last = (((1,), (1,)), ((), ()))
    first_with_first = (((0,), (0,)), ((), ()))
    dx = jax.lax.dot_general(dy, kernel_KN, last_with_last)
    dkernel = jax.lax.dot_general(x, dy, first_with_first)
    return dx.reshape(x_BTK.shape), dkernel


product.defvjp(product_forward, product_backward)


@jax.custom_vjp
def take(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table, [..., D]. Its gradient is summed in float32: in bfloat16 a frequent row soon stops growing."""
    return jnp.take(table_VD, ids, axis=0)


def take_forward(table_VD, ids):
    return take(table_VD, ids), (table_VD, ids)


def take_backward(residuals, dy):
    table_VD, ids = residuals
    zeros_VD = jnp.zeros_like(table_VD, jnp.float32)
    dtable_VD = zeros_VD.at[ids].add(dy.astype(jnp.float32))
    return dtable_VD.astype(table_VD.dtype), None


take.defvjp(take_forward, take_backward)


# ---------------------------------------------------------------- on a mesh


def columns(
    x_BTD: jax.Array,
    kernels: list[jax.Array],
    axes: list[tuple],
    tensordot: Callable = jnp.tensordot,
) -> list[jax.Array]:
    """x kernel for each kernel [D, ...]: residual activations -> [B, T, ...], the last sharded as the kernel's.

    axes: the logical axes of each kernel.
    """
    mesh = even_mesh(*x_BTD.shape[:2])
    if mesh is None:
        return [plain_columns(x_BTD, kernel, tensordot) for kernel in kernels]
    rows, inside, between, extra = activation_specs(*x_BTD.shape[:2], mesh)
    specs = []
    out_specs = []
    needs_all = []  # of each kernel: whether it meets the positions of all devices of the tensor axis
    for names, kernel in zip(axes, kernels, strict=True):
        spec = partition_spec(names, kernel.shape, mesh)
        split = set(extra) <= set(axes_in(spec[1:]))
        length = inside if split else between
        specs.append(spec)
        needs_all.append(split)
        out_specs.append(PartitionSpec(rows, length, *spec[1:]))

    def on_shard(x, *kernels):
        whole = x
        if any(needs_all):
            whole = gather(x, 1, extra)
        outputs = []
        for split, kernel, spec in zip(needs_all, kernels, specs):
            factor = whole if split else x
            outputs.append(flat_product(factor, kernel, spec, tensordot))
        return outputs

    call = jax.shard_map(
        on_shard,
        in_specs=(PartitionSpec(rows, between), *specs),
        out_specs=out_specs,
        check_vma=can_check(mesh, tensordot),
    )
    return call(x_BTD, *kernels)


def plain_columns(
    x_BTD: jax.Array,
    kernel: jax.Array,
    tensordot: Callable,
) -> jax.Array:
    """x kernel without a mesh: [B, T, ...]."""
    if tensordot is not jnp.tensordot:
        return tensordot(x_BTD, kernel, 1)
    y = product(x_BTD, kernel.reshape(kernel.shape[0], -1))
    return y.reshape(*y.shape[:2], *kernel.shape[1:])


def flat_product(x, kernel, spec: PartitionSpec, tensordot: Callable) -> jax.Array:
    """Within shard_map: x kernel, with a shard of a kernel [D, ...] of this spec.

    As a product of two dimensions: the TPU compiler would copy a gathered [D, N, H], transposed.
    """
    flat = gather_weight(kernel.reshape(kernel.shape[0], -1), spec[:1], x)
    y = tensordot(x, flat, 1)
    return y.reshape(*x.shape[:2], *kernel.shape[1:])


def rows(
    h: jax.Array,
    kernel: jax.Array,
    axes: tuple,
    tensordot: Callable = jnp.tensordot,
) -> jax.Array:
    """[B, T, ...] kernel [..., D] -> residual activations [B, T, D]; the sum over devices is a reduce-scatter.

    axes: the logical axes of the kernel.
    """
    inputs = kernel.ndim - 1
    mesh = even_mesh(*h.shape[:2])
    if mesh is None:
        if tensordot is not jnp.tensordot:
            return tensordot(h, kernel, inputs)
        return product(h.reshape(*h.shape[:2], -1), kernel.reshape(-1, kernel.shape[-1]))
    spec = partition_spec(axes, kernel.shape, mesh)
    batch, inside, between, extra = activation_specs(*h.shape[:2], mesh)
    summed = axes_in(spec[:-1])

    def on_shard(h, kernel):
        whole = gather_weight(kernel, spec[-1:], h, start=inputs)
        return sum_parts(tensordot(h, whole, inputs), summed, extra)

    length = inside if set(extra) <= set(summed) else between
    call = jax.shard_map(
        on_shard,
        in_specs=(PartitionSpec(batch, length, *spec[:-1]), spec),
        out_specs=PartitionSpec(batch, between),
        check_vma=can_check(mesh, tensordot),
    )
    return call(h, kernel)


def can_check(mesh, tensordot: Callable) -> bool:
    """Whether shard_map can check along which axes arrays vary.

    Stages are vmapped. There, up to jax 0.12, the check refuses every constant in a custom derivative.
    """
    return mesh.shape["stage"] == 1 or tensordot is jnp.tensordot


def sum_parts(
    y: jax.Array,
    summed: tuple[str, ...],
    positions: tuple[str, ...],
) -> jax.Array:
    """Within shard_map: y [B, T, ...] summed over `summed`; of them, the axes of `positions` keep their own alone."""
    scattered = tuple(name for name in summed if name in positions)
    rest = tuple(name for name in summed if name not in positions)
    y = scatter_sum(y, 1, scattered)
    if rest:
        return jax.lax.psum(y, rest)
    return y


def lookup(
    table_VD: jax.Array,
    ids_BT: jax.Array,
    axes: tuple,
) -> jax.Array:
    """Rows of a table -> residual activations [B, T, D]; each device looks up those that it holds.

    Where D is sharded, either the table is gathered, or, where a device has fewer tokens than that has rows, every
    device looks up its part of D for the tokens of all, and they are exchanged (all-to-all). axes: the logical axes of
    the table.
    """
    mesh = even_mesh(*ids_BT.shape)
    if mesh is None:
        return take(table_VD, ids_BT)
    spec = partition_spec(axes, table_VD.shape, mesh)
    batch, inside, between, extra = activation_specs(*ids_BT.shape, mesh)
    summed = split_axes(axes[0], table_VD.shape[0], mesh)
    parts = names_of(spec[1])
    in_rows = tuple(name for name in names_of(batch) if name in parts)
    in_length = tuple(name for name in names_of(inside) if name in parts)

    def on_shard(table, ids):
        exchanges = parts and in_rows + in_length == parts and ids.size < table.shape[0]
        if exchanges:
            ids = gather(ids, 0, in_rows)
            ids = gather(ids, 1, in_length)
            table = gather_weight(table, (), ids, start=1)
        else:
            table = gather_weight(table, spec[1:], ids, start=1)
        y = take_own(table, ids, summed)
        if exchanges:
            y = exchange(y, 1, in_length)
            y = exchange(y, 0, in_rows)
        return sum_parts(y, summed, extra)

    length = inside if set(extra) <= set(summed) else between
    call = jax.shard_map(
        on_shard,
        in_specs=(spec, PartitionSpec(batch, length)),
        out_specs=PartitionSpec(batch, between),
    )
    return call(table_VD, ids_BT)


def take_own(
    table_VD: jax.Array,
    ids_BT: jax.Array,
    names: tuple[str, ...],
) -> jax.Array:
    """Within shard_map: [B, T, D], zeros for rows that other devices hold. names: mesh axes that shard the rows."""
    V = table_VD.shape[0]
    first = 0
    if names:
        first = jax.lax.axis_index(names) * V
    local_BT = ids_BT - first
    mine_BT = (local_BT >= 0) & (local_BT < V)
    y_BTD = take(table_VD, jnp.where(mine_BT, local_BT, 0))
    if names:
        return jnp.where(mine_BT[..., None], y_BTD, 0)
    return y_BTD


def exchange(
    y: jax.Array,
    axis: int,
    names: tuple[str, ...],
) -> jax.Array:
    """Within shard_map: from a part of D for all along `axis` to all of D for this device's part of it."""
    if not names:
        return y
    return jax.lax.all_to_all(y, names, axis, y.ndim - 1, tiled=True)
