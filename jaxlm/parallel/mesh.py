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

PARAMETERS = {  # logical axis -> mesh axes, the outer first; one that is not here is never sharded
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
    "residual": (
        "sequence",
        "tensor",
    ),  # positions between the layers' matrix products (Korthikanti et al. 2022)
    "stage": ("stage",),
}
RULES = PARAMETERS | ACTIVATIONS
# Sharded by a mesh axis that no other dimension has taken (fewer key heads than devices, an odd vocabulary).
SPARE = {"embed": ("tensor",), "expert_embed": ("tensor",)}
# ZeRO-1 (Rajbhandari et al. 2020): the optimizer's state is split over the copies of the parameters.
ZERO1_RULES = RULES | {
    axis: ("data", *RULES.get(axis, ())) for axis in ("embed", "expert_embed", "norm")
}
OPTIMIZER_RULES = {
    strategy: ZERO1_RULES if strategy == "zero1" else RULES for strategy in STRATEGIES
}
MAX_REPLICATED = 0.02  # part of the parameters


def mesh_shape(config: ConfigDict, num_devices: int) -> dict[str, int]:
    """{axis: size} of a checked config, with -1 replaced by the devices that are left."""
    sizes = mesh_sizes(config)
    fixed = math.prod(n for n in sizes.values() if n != -1)
    return {axis: num_devices // fixed if n == -1 else n for axis, n in sizes.items()}


def make_mesh(config: ConfigDict, devices=None) -> Mesh:
    """Mesh over all devices, or those given. The axis that talks most is last: nearest neighbours share it.

    Devices of several slices (joined by a slower network, DCN): mesh.across is split over the slices first, every
    other axis stays inside one. TPUs say which slice they are in; otherwise mesh.slices equal groups in a row count as
    slices (GPUs have such a number too, but it tells hosts apart, which any axis may span).
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    found = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    slices = len(found) if len(found) > 1 else config.mesh.slices
    across = config.mesh.across
    if shape[across] % slices:
        raise ConfigError(
            f"config.mesh.{across}={shape[across]}: must be a multiple of the {slices} slices that it spans "
            "(config.mesh.across names the axis)"
        )
    devices.sort(
        key=lambda device: getattr(device, "slice_index", 0)
    )  # stable: the order within a slice is kept
    inner = shape | {across: shape[across] // slices}
    size = len(devices) // slices
    groups = [devices[i * size : (i + 1) * size] for i in range(slices)]
    # Split: an axis may have part of a TPU slice's dimension, where no product of whole ones is as long.
    place = partial(create_device_mesh, tuple(inner.values()), allow_split_physical_axes=True)
    grids = [place(group) for group in groups]
    grid = np.concatenate(grids, axis=MESH_AXES.index(across))
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def abstract_mesh(config: ConfigDict, num_devices: int) -> AbstractMesh:
    """A mesh without devices, for arithmetic."""
    shape = mesh_shape(config, num_devices)
    return AbstractMesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)
    )


def split_axes(axis: str | None, size: int, mesh, rules=RULES) -> tuple[str, ...]:
    """The mesh axes that shard a dimension of this size: those of its rule that have devices and divide it."""
    names = []
    parts = 1
    for name in rules.get(axis, ()):
        if mesh.shape[name] > 1 and size % (parts * mesh.shape[name]) == 0:
            names.append(name)
            parts *= mesh.shape[name]
    return tuple(names)


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh, rules=RULES
) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical axes.

    A mesh axis that does not divide a dimension leaves it unsharded. Raises ValueError where one mesh axis would
    shard two dimensions.
    """
    entries = [split_axes(axis, size, mesh, rules) for axis, size in zip(axes, shape, strict=True)]
    used = [name for names in entries for name in names]
    if len(used) > len(set(used)):
        raise ValueError(f"axes {axes}: a mesh axis would shard two dimensions: {used}; see RULES")
    for i, axis in enumerate(axes):
        for name in SPARE.get(axis, ()):
            parts = math.prod(mesh.shape[other] for other in entries[i]) * mesh.shape[name]
            if name not in used and mesh.shape[name] > 1 and shape[i] % parts == 0:
                entries[i] += (name,)
    return PartitionSpec(
        *(names if len(names) > 1 else names[0] if names else None for names in entries)
    )


def batch_shards(mesh) -> int:
    """Devices that each have rows of their own."""
    return math.prod(mesh.shape[name] for name in RULES["batch"])


def current_mesh():
    """The mesh in force, or None where there is none or it is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    return mesh


def platform() -> str:
    """cpu, gpu or tpu: what the mesh in force is made of (it may be of chips that are not here), else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return {"cuda": "gpu"}.get(device.platform, device.platform)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's sharding; one logical axis, or None, for each dimension. No mesh in force: x as it is."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


# ---------------------------------------------------------------- code that sees one device's shards


def even_mesh(batch: int, length: int):
    """The mesh in force where it divides such a batch evenly, so that shard_map may be used; else None."""
    mesh = current_mesh()
    if mesh is None:
        return None
    sizes = {"batch": batch, "residual": length}
    sharded = []
    for axis, size in sizes.items():
        for name in split_axes(axis, size, mesh):
            sharded.append(name)
    wanted = []
    for axis in sizes:
        for name in RULES[axis]:
            if mesh.shape[name] > 1:
                wanted.append(name)
    if sharded == wanted:
        return mesh
    return None


def names_of(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry)


def gather(x: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
    """Within shard_map: all the shards along these mesh axes. The transpose is `scatter_sum`."""
    if names and wrong_scatters() and jnp.issubdtype(x.dtype, jnp.floating):
        return gather_by_sums(x, axis, names)
    if names:
        return jax.lax.all_gather(x, names, axis=axis, tiled=True)
    return x


def scatter_sum(x: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
    """Within shard_map: this device's part, along `axis`, of the sum over these mesh axes."""
    if names and wrong_scatters():
        size = x.shape[axis] // jax.lax.axis_size(names)
        return jax.lax.dynamic_slice_in_dim(
            jax.lax.psum(x, names), jax.lax.axis_index(names) * size, size, axis
        )
    if names:
        return jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True)
    return x


def wrong_scatters() -> bool:
    """Whether jax's reduce-scatter may be wrong here: between CPU processes, now and then, without an error.

    It may send what it has overwritten (https://github.com/jax-ml/jax/issues/40830). With it, half of the gradients of
    a small LSTM were off by 1e-3; with a sum over all of it, which sends twice as much, they repeat to the last digit.
    """
    return jax.process_count() > 1 and platform() == "cpu"


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_by_sums(x, axis, names):
    return jax.lax.all_gather(x, names, axis=axis, tiled=True)


gather_by_sums.defvjp(
    lambda x, axis, names: (gather_by_sums(x, axis, names), None),
    lambda axis, names, _, gradient: (scatter_sum(gradient, axis, names),),
)


def gather_weight(kernel: jax.Array, entries, like: jax.Array, start: int = 0) -> jax.Array:
    """Within shard_map: a weight, whole along the dimensions from `start` on that have these spec entries.

    like: the activation that it will meet. Copies along axes that only shard the activation are made first, so that
    the gradient is reduce-scattered before its shard alone is summed over them.
    """

    def varies(x):
        return jax.typeof(x).manual_axis_type.varying

    copies = tuple(sorted(varies(like) - varies(kernel)))
    if copies:
        kernel = jax.lax.pcast(kernel, copies, to="varying")
    else:
        kernel = kernel
    for i, entry in enumerate(entries):
        kernel = gather(kernel, start + i, names_of(entry))
    return kernel


# ---------------------------------------------------------------- shardings of a state


def shardings(abstract, axes, mesh, rules=RULES):
    """NamedSharding for every leaf. abstract: tree of shapes; axes: the same tree of PartitionSpecs of logical axes."""

    def one(leaf, names):
        names = tuple(names) + (None,) * (leaf.ndim - len(names))
        for axis, size in zip(names, leaf.shape):
            for name in rules.get(axis, ()):
                if mesh.shape[name] > 1 and name not in split_axes(axis, size, mesh, rules):
                    say_unsharded(axis, size, name, mesh.shape[name])
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, rules))

    return jax.tree.map(one, abstract, axes)


@functools.cache  # once, although a parameter's moments are told of too
def say_unsharded(axis: str, size: int, name: str, parts: int) -> None:
    logging.getLogger("jaxlm").warning(
        "axis %s of %d is not divided by %s=%d: whole there", axis, size, name, parts
    )


def replicated_share(params, places) -> tuple[float, list[str]]:
    """(part of the parameters that every device holds whole, their names, the largest first)."""
    whole = []
    for (path, leaf), place in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(places), strict=True
    ):
        if place.is_fully_replicated:
            whole.append(
                (
                    math.prod(leaf.shape),
                    jax.tree_util.keystr(path, simple=True, separator="/"),
                    leaf.shape,
                )
            )
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    whole.sort(key=lambda item: -item[0])
    return sum(size for size, _, _ in whole) / total, [
        f"{name} {shape}" for _, name, shape in whole
    ]


def require_sharded(params, places, mesh) -> None:
    """Raises ConfigError naming the worst five where a mesh that should shard the parameters leaves many whole."""
    sharding = set()
    for names in PARAMETERS.values():
        for name in names:
            if mesh.shape[name] > 1:
                sharding.add(name)
    share, whole = replicated_share(params, places)
    if sharding and share > MAX_REPLICATED:
        given = " x ".join(f"{name}={mesh.shape[name]}" for name in MESH_AXES if name in sharding)
        raise ConfigError(
            f"{share:.0%} of the parameters are whole on every device of mesh {given} (at most {MAX_REPLICATED:.0%} "
            "may be); the largest:\n  "
            + "\n  ".join(whole[:5])
            + "\nuse sizes that divide the shapes (the vocabulary may be larger than the tokenizer's), or mesh.fsdp too"
        )
