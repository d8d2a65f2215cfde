"""The device mesh, and the one table that says which mesh axes shard which logical axis.

Models name the logical axes of every parameter beside its shape and of activations in `constrain`; only this folder
knows the mesh. With `jax.set_mesh(mesh)` in force, the same code runs on one device or on a pod.
"""

import functools
import logging
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxlm.config.keys import MESH_AXES, STRATEGIES
from jaxlm.config.recipe import mesh_sizes
from jaxlm.errors import ConfigError

# Logical axis -> mesh axes, the outer first. A logical axis that is not here is never sharded.
PARAMETERS = {
    "layers": ("stage",),
    "vocab": ("tensor", "stage"),
    "embed": ("fsdp", "expert", "sequence"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "expert_embed": ("fsdp", "sequence"),  # of the experts' own matrices
}
ACTIVATIONS = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),
    # Positions between the matrix products of layers (Korthikanti et al. 2022).
    "residual": ("sequence", "tensor"),
    "stage": ("stage",),
}
RULES = PARAMETERS | ACTIVATIONS
# Sharded by a mesh axis that no other dimension has taken (fewer key heads than devices, an odd vocabulary).
SPARE = {"embed": ("tensor",), "expert_embed": ("tensor",)}
# ZeRO-1 (Rajbhandari et al. 2020): the optimizer's state is split over the copies of the parameters.
ZERO1_RULES = RULES | {
    "embed": ("data", *RULES["embed"]),
    "expert_embed": ("data", *RULES["expert_embed"]),
    "norm": ("data",),
}
OPTIMIZER_RULES = dict.fromkeys(STRATEGIES, RULES) | {"zero1": ZERO1_RULES}
MAX_REPLICATED = 0.02  # part of the parameters


# ---------------------------------------------------------------- making a mesh


def mesh_shape(config: ConfigDict, num_devices: int) -> dict[str, int]:
    """{axis: size} of a checked config, with -1 replaced by the devices that are left."""
    sizes = dict(mesh_sizes(config))
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = num_devices // fixed
    return sizes


def make_mesh(config: ConfigDict, devices=None) -> Mesh:
    """Mesh over all devices, or those given. The axis that communicates most is last: nearest neighbours share it.

    Devices of several slices (joined by a slower network, DCN): mesh.across is split over the slices first, every
    other axis stays inside one. Raises ConfigError where the slices do not divide mesh.across.
    """
    if devices is None:
        devices = jax.devices()
    shape = mesh_shape(config, len(devices))
    slices = num_slices(config, devices)
    across = config.mesh.across
    if shape[across] % slices:
        raise ConfigError(
            f"config.mesh.{across}={shape[across]}: must be a multiple of the {slices} slices that it spans "
            "(config.mesh.across names the axis)"
        )
    devices = sorted(devices, key=slice_index)  # stable: the order within a slice is kept
    inner = shape | {across: shape[across] // slices}
    size = len(devices) // slices
    grids = []
    for start in range(0, len(devices), size):
        grid = create_device_mesh(
            tuple(inner.values()),
            devices[start : start + size],
            # An axis may have part of a TPU slice's dimension, where no product of whole ones is as long.
            allow_split_physical_axes=True,
        )
        grids.append(grid)
    grid = np.concatenate(grids, axis=MESH_AXES.index(across))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def slice_index(device) -> int:
    return getattr(device, "slice_index", 0)


def num_slices(config: ConfigDict, devices) -> int:
    """TPUs say which slice they are in. Of other devices mesh.slices equal groups in a row count as slices.

    GPUs have a slice_index too, but it tells hosts apart, which any axis may span.
    """
    found = {slice_index(device) for device in devices if device.platform == "tpu"}
    if len(found) > 1:
        return len(found)
    return config.mesh.slices


def abstract_mesh(config: ConfigDict, num_devices: int) -> AbstractMesh:
    """A mesh without devices, for arithmetic."""
    shape = mesh_shape(config, num_devices)
    types = (AxisType.Auto,) * len(shape)
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=types)


# ---------------------------------------------------------------- which axes shard what


def split_axes(
    axis: str | None,
    size: int,
    mesh,
    rules=RULES,
) -> tuple[str, ...]:
    """The mesh axes that shard a dimension of this size: those of its rule that have devices and divide it."""
    names = []
    parts = 1
    for name in rules.get(axis, ()):
        if mesh.shape[name] > 1 and size % (parts * mesh.shape[name]) == 0:
            names.append(name)
            parts *= mesh.shape[name]
    return tuple(names)


def partition_spec(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh,
    rules=RULES,
) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical axes.

    A mesh axis that does not divide a dimension leaves it unsharded. Raises ValueError where one mesh axis would
    shard two dimensions.
    """
    entries = []
    used = []
    for axis, size in zip(axes, shape, strict=True):
        names = split_axes(axis, size, mesh, rules)
        entries.append(names)
        used += names
    if len(used) > len(set(used)):
        raise ValueError(f"axes {axes}: a mesh axis would shard two dimensions: {used}; see RULES")
    for i, axis in enumerate(axes):
        for name in SPARE.get(axis, ()):
            parts = math.prod(mesh.shape[other] for other in (*entries[i], name))
            if name not in used and mesh.shape[name] > 1 and shape[i] % parts == 0:
                entries[i] += (name,)
    return PartitionSpec(*map(spec_entry, entries))


def spec_entry(names: tuple[str, ...]):
    """These mesh axes as an entry of a PartitionSpec."""
    if not names:
        return None
    if len(names) == 1:
        return names[0]
    return names


def names_of(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry)


def axes_in(entries) -> tuple[str, ...]:
    """The mesh axes of several entries of a PartitionSpec."""
    return sum(map(names_of, entries), ())


def batch_shards(mesh) -> int:
    """Devices that each have rows of their own."""
    return math.prod(mesh.shape[name] for name in RULES["batch"])


def batch_sharding(shape: tuple[int, ...], mesh) -> NamedSharding:
    """Of an array [B, ...] of a batch."""
    axes = ("batch", *[None] * (len(shape) - 1))
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


# ---------------------------------------------------------------- the mesh in force


def current_mesh():
    """The mesh in force, or None where there is none or it is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    return mesh


def even_mesh(batch: int, length: int):
    """The mesh in force where it divides such a batch evenly, so that shard_map may be used; else None."""
    mesh = current_mesh()
    if mesh is None:
        return None
    for axis, size in {"batch": batch, "residual": length}.items():
        wanted = tuple(name for name in RULES[axis] if mesh.shape[name] > 1)
        if split_axes(axis, size, mesh) != wanted:
            return None
    return mesh


def platform() -> str:
    """cpu, gpu or tpu: what the mesh in force is made of (it may be of chips that are not here), else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    if device.platform == "cuda":
        return "gpu"
    return device.platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's sharding; one logical axis, or None, for each dimension. No mesh in force: x unchanged."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


# ---------------------------------------------------------------- code that sees one device's shards


def gather(
    x: jax.Array,
    axis: int,
    names: tuple[str, ...],
) -> jax.Array:
    """Within shard_map: all the shards along these mesh axes. The transpose is `scatter_sum`."""
    if not names:
        return x
    if wrong_scatters() and jnp.issubdtype(x.dtype, jnp.floating):
        return gather_by_sums(x, axis, names)
    return jax.lax.all_gather(x, names, axis=axis, tiled=True)


def scatter_sum(
    x: jax.Array,
    axis: int,
    names: tuple[str, ...],
) -> jax.Array:
    """Within shard_map: this device's part, along `axis`, of the sum over these mesh axes."""
    if not names:
        return x
    if wrong_scatters():
        whole = jax.lax.psum(x, names)
        size = x.shape[axis] // jax.lax.axis_size(names)
        start = jax.lax.axis_index(names) * size
        return jax.lax.dynamic_slice_in_dim(whole, start, size, axis)
    return jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True)


def wrong_scatters() -> bool:
    """Whether jax's reduce-scatter may be wrong here: between CPU processes, now and then, without an error.

    It may send what it has overwritten (https://github.com/jax-ml/jax/issues/40830). With it, half of the gradients of
    a small LSTM were off by 1e-3; with a sum over all of it, which sends twice as much, they repeat to the last digit.
    """
    return jax.process_count() > 1 and platform() == "cpu"


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_by_sums(
    x: jax.Array,
    axis: int,
    names: tuple[str, ...],
) -> jax.Array:
    """`gather` whose transpose is not jax's reduce-scatter."""
    return jax.lax.all_gather(x, names, axis=axis, tiled=True)


def gather_by_sums_forward(x, axis, names):
    return gather_by_sums(x, axis, names), None


def gather_by_sums_backward(axis, names, _, gradient):
    return (scatter_sum(gradient, axis, names),)


gather_by_sums.defvjp(gather_by_sums_forward, gather_by_sums_backward)


def gather_weight(
    kernel: jax.Array,
    entries,
    like: jax.Array,
    start: int = 0,
) -> jax.Array:
    """Within shard_map: a weight, whole along the dimensions from `start` on that have these spec entries.

    like: the activation that it will meet. Copies along axes that only shard the activation are made first, so that
    the gradient is reduce-scattered before its shard alone is summed over them.
    """
    copies = varying_axes(like) - varying_axes(kernel)
    if copies:
        kernel = jax.lax.pcast(kernel, tuple(sorted(copies)), to="varying")
    for i, entry in enumerate(entries):
        kernel = gather(kernel, start + i, names_of(entry))
    return kernel


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Within shard_map: the mesh axes along which x may differ."""
    return jax.typeof(x).manual_axis_type.varying


# ---------------------------------------------------------------- shardings of a state


def shardings(abstract, axes, mesh, rules=RULES):
    """NamedSharding for every leaf. abstract: tree of shapes; axes: the same tree of PartitionSpecs of logical axes."""

    def sharding(leaf, names):
        names = tuple(names) + (None,) * (leaf.ndim - len(names))
        warn_unsharded(names, leaf.shape, mesh, rules)
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, rules))

    return jax.tree.map(sharding, abstract, axes)


def warn_unsharded(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh,
    rules,
) -> None:
    """Logs the mesh axes that should shard a dimension and do not divide it."""
    for axis, size in zip(axes, shape):
        split = split_axes(axis, size, mesh, rules)
        for name in rules.get(axis, ()):
            if mesh.shape[name] > 1 and name not in split:
                say_unsharded(axis, size, name, mesh.shape[name])


@functools.cache  # once, although a parameter's moments have the same shape
def say_unsharded(
    axis: str,
    size: int,
    name: str,
    parts: int,
) -> None:
    logging.getLogger("jaxlm").warning(
        "axis %s of %d is not divided by %s=%d: whole there", axis, size, name, parts
    )


def replicated_share(params, places) -> tuple[float, list[str]]:
    """(part of the parameters that every device holds whole, their names and shapes, the largest first)."""
    total = 0
    whole = []
    leaves = jax.tree.leaves_with_path(params)
    for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True):
        size = math.prod(leaf.shape)
        total += size
        if place.is_fully_replicated:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            whole.append((size, f"{name} {leaf.shape}"))
    whole.sort(key=lambda item: -item[0])
    replicated = sum(size for size, _ in whole)
    return replicated / total, [name for _, name in whole]


def require_sharded(params, places, mesh) -> None:
    """Raises ConfigError naming the worst five where a mesh that should shard the parameters leaves many whole."""
    names = {name for name in axes_in(PARAMETERS.values()) if mesh.shape[name] > 1}
    share, whole = replicated_share(params, places)
    if names and share > MAX_REPLICATED:
        worst = "\n  ".join(whole[:5])
        raise ConfigError(
            f"{share:.0%} of the parameters are whole on every device of mesh {sizes_text(mesh, names)} "
            f"(at most {MAX_REPLICATED:.0%} may be); the largest:\n  {worst}\n"
            "use sizes that divide the shapes (the vocabulary may be larger than the tokenizer's), or mesh.fsdp too"
        )


def sizes_text(mesh, names=MESH_AXES) -> str:
    """'fsdp=4 x tensor=2': those of these axes that have several devices."""
    sizes = []
    for name in MESH_AXES:
        if name in names and mesh.shape[name] > 1:
            sizes.append(f"{name}={mesh.shape[name]}")
    return " x ".join(sizes)
