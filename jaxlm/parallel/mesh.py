"""The device mesh, and the one table that says which mesh axes shard which logical axis.

Models name the logical axes of every parameter beside its shape and of activations in `constrain`; only this file
knows the mesh. With `jax.set_mesh(mesh)` in force, the same code runs on one device or on a pod.
"""

import functools
import logging
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxlm.config import MESH_AXES

RULES = {  # logical axis -> mesh axes; one that is not here, or None, is never sharded
    # of parameters
    "layers": ("stage",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # of activations
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
}


def mesh_shape(config: ConfigDict, num_devices: int) -> dict[str, int]:
    """{axis: size} of a checked config, with -1 replaced by the devices that are left."""
    sizes = {axis: config.mesh[axis] for axis in MESH_AXES}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    return {axis: num_devices // fixed if n == -1 else n for axis, n in sizes.items()}


def make_mesh(config: ConfigDict, devices=None) -> Mesh:
    """Mesh over all devices, or those given. The axis that talks most is last: nearest neighbours share it."""
    shape = mesh_shape(config, jax.device_count() if devices is None else len(devices))
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types, devices=devices)


def abstract_mesh(config: ConfigDict, num_devices: int) -> AbstractMesh:
    """A mesh without devices, for arithmetic."""
    shape = mesh_shape(config, num_devices)
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical axes.

    A dimension that its mesh axes do not divide stays unsharded. Raises ValueError where one mesh axis would shard
    two dimensions.
    """
    entries, used = [], set()
    for axis, size in zip(axes, shape):
        names = tuple(name for name in RULES.get(axis, ()) if mesh.shape[name] > 1)
        if not names or size % math.prod(mesh.shape[name] for name in names):
            entries.append(None)
            continue
        if used & set(names):
            raise ValueError(f"axes {axes}: mesh axis {used & set(names)} would shard two dimensions; see RULES")
        used |= set(names)
        entries.append(names if len(names) > 1 else names[0])
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's sharding; one logical axis, or None, for each dimension. No mesh in force: x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def shardings(abstract, axes, mesh):
    """NamedSharding for every leaf. abstract: tree of shapes; axes: the same tree of PartitionSpecs of logical axes."""

    def one(leaf, names):
        names = tuple(names) + (None,) * (leaf.ndim - len(names))
        spec = partition_spec(names, leaf.shape, mesh)
        for axis, size, entry in zip(names, leaf.shape, spec):
            wanted = math.prod(mesh.shape[name] for name in RULES.get(axis, ()))
            if wanted > 1 and entry is None:
                say_unsharded(axis, size, wanted)
        return NamedSharding(mesh, spec)

    return jax.tree.map(one, abstract, axes)


@functools.cache  # once, although a parameter's moments are told of too
def say_unsharded(axis: str, size: int, wanted: int) -> None:
    logging.getLogger("jaxlm").warning("axis %s of %d is not divided by %d and stays whole", axis, size, wanted)


def to_global(rows: dict[str, np.ndarray], mesh: Mesh, num_rows: int) -> dict[str, jax.Array]:
    """This host's rows of a batch -> global arrays [num_rows, ...], sharded over data x fsdp."""

    def one(x):
        shape = (num_rows, *x.shape[1:])
        spec = partition_spec(("batch",) + (None,) * (x.ndim - 1), shape, mesh)
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x, shape)

    return jax.tree.map(one, rows)
