"""Parameters from other runs: those that a run starts from (train.init_from), and its teacher's."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxlm.errors import CheckpointError
from jaxlm.run.adapters import fold_adapters
from jaxlm.run.checkpoint import as_target, config_of
from jaxlm.run.inherit import head_text
from jaxlm.run.saved_run import read_meta, read_run
from jaxlm.step.patterns import name_of
from jaxlm.step.state import abstract_state, state_shardings


def read_teacher(config: ConfigDict, mesh) -> dict:
    """The parameters of config.task.teacher on the mesh. Raises CheckpointError."""
    like = as_target(abstract_state(config)[0].teacher, state_shardings(config, mesh).teacher)
    try:
        return read_run(config.task.teacher, like)
    except CheckpointError as error:
        raise CheckpointError(
            f"config.task.teacher, which the loss compares this model with: {error}"
        ) from None


def warm_start(params: dict, config: ConfigDict) -> dict:
    """`params`, with those of train.init_from in place of the ones of the same name. Prints what is not replaced.

    Tables of a larger vocabulary keep their further rows, adapters (LoRA) are folded in, and a head of other labels
    stays as it is in `params`. Raises CheckpointError where shapes differ.
    """
    spec = config.train.init_from
    start, notes = starting_params(params, config)
    saved = {name_of(path): x for path, x in jax.tree.leaves_with_path(start)}
    fresh = []
    misfits = []

    def replace(path, x):
        name = name_of(path)
        old = saved.pop(name, None)
        if old is None:
            fresh.append(name)
            return x
        if not fits(name, old.shape, x.shape):
            misfits.append(f"{name}: {old.shape} there, {x.shape} here")
            return x
        return jax.jit(first_rows, out_shardings=x.sharding)(x, old)

    params = jax.tree_util.tree_map_with_path(replace, params)
    if misfits:
        lines = "\n  ".join(misfits[:8])
        raise CheckpointError(f"train.init_from={spec} has other shapes:\n  {lines}")
    if fresh:
        more = " ..." if len(fresh) > 6 else ""
        notes.append(f"new: {', '.join(fresh[:6])}{more}")
    if saved:
        notes.append(f"not used: {', '.join(list(saved)[:6])}")
    if jax.process_index() == 0:
        print("; ".join([f"starts from {spec}", *notes]))
    return params


def starting_params(params: dict, config: ConfigDict) -> tuple[dict, list[str]]:
    """(the parameters that train.init_from offers, notes on what became of its adapters and its head)."""
    start = read_run(config.train.init_from, params)
    saved = config_of(read_meta(config.train.init_from))
    notes = []
    if saved.model.lora_rank:
        start, _ = fold_adapters(start, saved.model)
        notes.append("its adapters are folded in")
    same_task = saved.task.name == config.task.name
    same_head = same_task and saved.data.labels == config.data.labels
    if "head" in start and not same_head:
        notes.append(
            f"its head of {head_text(saved)} is left, for a new one of {head_text(config)}"
        )
        del start["head"]
    return start, notes


def fits(name: str, old: tuple, new: tuple) -> bool:
    """Whether parameters of shape `old` can start those of shape `new`: equal, or a table with fewer rows."""
    if old[1:] != new[1:]:
        return False
    return old[:1] == new[:1] or (old[0] < new[0] and "embed" in name)


def first_rows(x, old):
    """`x` with its first rows from `old`."""
    return jnp.concatenate([old.astype(x.dtype), x[len(old) :]])
