"""A finished or stopped run that another one builds on, named by its run directory: "DIR" or "DIR@STEP"."""

import json

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxlm.errors import CheckpointError
from jaxlm.run.checkpoint import Checkpoints, known_config
from jaxlm.run.workdir import run_directory
from jaxlm.step.patterns import name_of


def split_step(spec: str) -> tuple[str, str]:
    """("DIR", "best") of "DIR@best"; the step is `latest` where none is given."""
    path, at, step = spec.rpartition("@")
    if at and (step in ("best", "latest") or step.isdecimal()):
        return path, step
    return spec, "latest"


def read_config(spec: str) -> ConfigDict:
    """The resolved config of a run directory. Raises CheckpointError where there is none that can be read."""
    file = run_directory(split_step(spec)[0]) / "config.json"
    try:
        flat = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(
            f"{file}: {error.strerror or error}: give the --workdir of a jaxlm.train run"
        ) from None
    return known_config(flat, str(file))


def read_meta(spec: str) -> dict:
    """The `meta` of a run's checkpoint: config, tokenizer, data. Raises CheckpointError."""
    path, step = split_step(spec)
    checkpoints = Checkpoints(path)
    meta = checkpoints.meta(checkpoints.choose(step))
    checkpoints.close()
    return meta


def read_run(spec: str, like: dict) -> dict:
    """The parameters of a run, sharded as those of the same name and shape in `like`, otherwise replicated.

    Raises CheckpointError.
    """
    known = {name_of(path): x for path, x in jax.tree.leaves_with_path(like)}
    mesh = next(iter(known.values())).sharding.mesh

    def place(name, shape):
        if name in known and known[name].shape == shape:
            return known[name].sharding
        return NamedSharding(mesh, PartitionSpec())

    path, step = split_step(spec)
    checkpoints = Checkpoints(path)
    params = checkpoints.read_params(checkpoints.choose(step), place)
    checkpoints.close()
    return params
