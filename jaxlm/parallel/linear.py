"""Matrix products on a mesh, their collectives written out: the same on every backend, countable before a run.

Weights are gathered over the axes that shard `embed` (fsdp), activations over the tensor axis (Megatron with sequence
parallelism: Shoeybi et al. 2019, Korthikanti et al. 2022). Transposed, a gather is a reduce-scatter: no whole gradient
and no whole activation is ever all-reduced. Without a mesh, or where it does not divide the batch evenly (generation
from one prompt), the plain product is left to XLA's partitioner. `tensordot`: jnp.tensordot, or what stands for it.

Letters: B batch, T positions, D embed, V vocabulary; "residual" activations are [B, T, D] with T sharded over the
sequence and tensor axes.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.parallel.mesh import (
    even_mesh,
    gather,
    gather_weight,
    names_of,
    partition_spec,
    scatter_sum,
    split_axes,
)


def activation_specs(batch: int, length: int, mesh):
    """(entry of B, entry of T in layers, entry of T between them, the axes that are only in the last)."""
    rows, inside = partition_spec(("batch", "length"), (batch, length), mesh)
    (between,) = partition_spec(("residual",), (length,), mesh)
    extra = tuple(name for name in names_of(between) if name not in names_of(inside))
    return rows, inside, between, extra


@jax.custom_vjp
def product(x_BTK: jax.Array, kernel_KN: jax.Array) -> jax.Array:
    """x kernel. The gradient of the kernel is made in the kernel's own layout.

    jax's rule makes it transposed, and XLA on CPUs then transposes the other factor, element by element, together with
    whatever made it: half of the time of an MLP with GELU.
    """
    return jnp.tensordot(x_BTK, kernel_KN, 1)


def product_backward(kept, dy_BTN):
    x_BTK, kernel_KN = kept
    x = x_BTK.reshape(-1, x_BTK.shape[-1])
    dy = dy_BTN.reshape(-1, dy_BTN.shape[-1])
    dx = jax.lax.dot_general(dy, kernel_KN, (((1,), (1,)), ((), ())))
    return dx.reshape(x_BTK.shape), jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


product.defvjp(
    lambda x_BTK, kernel_KN: (product(x_BTK, kernel_KN), (x_BTK, kernel_KN)), product_backward
)


def columns(
    x_BTD: jax.Array, kernels: list[jax.Array], axes: list[tuple], tensordot=jnp.tensordot
) -> list[jax.Array]:
    """x kernel for each kernel [D, ...]: residual activations -> [B, T, ...], the last sharded as the kernel's."""
    mesh = even_mesh(*x_BTD.shape[:2])
    if mesh is None:
        if tensordot is not jnp.tensordot:
            return [tensordot(x_BTD, kernel, 1) for kernel in kernels]
        outputs = [product(x_BTD, kernel.reshape(kernel.shape[0], -1)) for kernel in kernels]
        return [y.reshape(*y.shape[:2], *kernel.shape[1:]) for y, kernel in zip(outputs, kernels)]
    specs = [
        partition_spec(names, kernel.shape, mesh)
        for names, kernel in zip(axes, kernels, strict=True)
    ]
    rows, inside, between, extra = activation_specs(*x_BTD.shape[:2], mesh)
    # A kernel that the tensor axis does not divide meets only this device's positions.
    parts = [
        set(extra) <= {name for entry in spec[1:] for name in names_of(entry)} for spec in specs
    ]

    def f(x, *kernels):
        whole = gather(x, 1, extra) if any(parts) else x
        return [multiply(whole if part else x, *pair) for part, *pair in zip(parts, kernels, specs)]

    def multiply(
        x, kernel, spec
    ):  # of two dimensions: the TPU compiler would copy a gathered [D, N, H], transposed
        flat = gather_weight(kernel.reshape(kernel.shape[0], -1), spec[:1], x)
        return tensordot(x, flat, 1).reshape(*x.shape[:2], *kernel.shape[1:])

    out = [
        PartitionSpec(rows, inside if part else between, *spec[1:])
        for part, spec in zip(parts, specs)
    ]
    in_specs = PartitionSpec(rows, between), *specs
    return jax.shard_map(f, in_specs=in_specs, out_specs=out, check_vma=can_check(mesh, tensordot))(
        x_BTD, *kernels
    )


def rows(h: jax.Array, kernel: jax.Array, axes: tuple, tensordot=jnp.tensordot) -> jax.Array:
    """[B, T, ...] kernel [..., D] -> residual activations [B, T, D]; the sum over devices is a reduce-scatter."""
    inputs = kernel.ndim - 1
    mesh = even_mesh(*h.shape[:2])
    if mesh is None:
        if tensordot is not jnp.tensordot:
            return tensordot(h, kernel, inputs)
        return product(h.reshape(*h.shape[:2], -1), kernel.reshape(-1, kernel.shape[-1]))
    spec = partition_spec(axes, kernel.shape, mesh)
    batch, inside, between, extra = activation_specs(*h.shape[:2], mesh)
    summed = tuple(name for entry in spec[:-1] for name in names_of(entry))

    def f(h, kernel):
        y = tensordot(h, gather_weight(kernel, spec[-1:], h, start=inputs), inputs)
        return sum_parts(y, summed, extra)

    length = inside if set(extra) <= set(summed) else between
    in_specs = (PartitionSpec(batch, length, *spec[:-1]), spec)
    out = PartitionSpec(batch, between)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out, check_vma=can_check(mesh, tensordot))(
        h, kernel
    )


def can_check(mesh, tensordot) -> bool:
    """Whether shard_map can check along which axes arrays vary.

    Stages are vmapped, and there, up to jax 0.12, it takes any constant in a derivative of one's own for an error.
    """
    return mesh.shape["stage"] == 1 or tensordot is jnp.tensordot


def sum_parts(y, summed: tuple[str, ...], positions: tuple[str, ...]):
    """Within shard_map: y [B, T, ...] summed over `summed`; of them, the axes of `positions` keep their own alone."""
    y = scatter_sum(y, 1, tuple(name for name in summed if name in positions))
    rest = tuple(name for name in summed if name not in positions)
    if rest:
        return jax.lax.psum(y, rest)
    return y


@jax.custom_vjp
def take(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table; its gradient is summed in float32: in bfloat16 a frequent row soon stops growing."""
    return jnp.take(table_VD, ids, axis=0)


def take_backward(kept, dy):
    table_VD, ids = kept
    return jnp.zeros_like(table_VD, jnp.float32).at[ids].add(dy.astype(jnp.float32)).astype(
        table_VD.dtype
    ), None


take.defvjp(lambda table_VD, ids: (take(table_VD, ids), (table_VD, ids)), take_backward)


def lookup(table_VD: jax.Array, ids_BT: jax.Array, axes: tuple) -> jax.Array:
    """Rows of a table -> residual activations [B, T, D]; each device looks up those that it holds.

    Where D is sharded: either the table is gathered, or, where a device has fewer tokens than that has rows, every
    device looks up its part of D for the tokens of all, and they are exchanged (all-to-all).
    """
    mesh = even_mesh(*ids_BT.shape)
    if mesh is None:
        return take(table_VD, ids_BT)
    spec = partition_spec(axes, table_VD.shape, mesh)
    batch, inside, between, extra = activation_specs(*ids_BT.shape, mesh)
    summed = split_axes(axes[0], table_VD.shape[0], mesh)
    parts = names_of(spec[1])
    length = inside if set(extra) <= set(summed) else between
    in_rows, in_length = (
        tuple(name for name in names_of(entry) if name in parts) for entry in (batch, inside)
    )

    def f(table, ids):
        send = parts and in_rows + in_length == parts and ids.size < table.shape[0]
        if send:
            ids = gather(gather(ids, 0, in_rows), 1, in_length)
        table = gather_weight(table, () if send else spec[1:], ids, start=1)
        local = ids - (jax.lax.axis_index(summed) * table.shape[0] if summed else 0)
        mine = (local >= 0) & (local < table.shape[0])
        y = take(table, jnp.where(mine, local, 0))
        y = jnp.where(mine[..., None], y, 0) if summed else y
        if send:
            y = exchange(exchange(y, 1, in_length), 0, in_rows)
        return sum_parts(y, summed, extra)

    in_specs = (spec, PartitionSpec(batch, length))
    out_spec = PartitionSpec(batch, between)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_spec)(table_VD, ids_BT)


def exchange(y, axis: int, names: tuple[str, ...]):
    """Within shard_map: from a part of D for all along `axis` to all of D for this device's part of it."""
    if names:
        return jax.lax.all_to_all(y, names, axis, y.ndim - 1, tiled=True)
    return y
