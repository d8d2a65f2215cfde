"""The first law of verify: any mesh computes what one device does, in losses and in every parameter's gradient."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.config.check import check
from jaxlm.config.keys import MESH_AXES
from jaxlm.config.recipe import resolve, set_key
from jaxlm.errors import ConfigError
from jaxlm.parallel.hosts import to_global
from jaxlm.parallel.mesh import make_mesh, replicated_share
from jaxlm.step.costs import bytes_per_device
from jaxlm.step.patterns import partition
from jaxlm.step.state import (
    State,
    abstract_state,
    apply_gradients,
    check_sharding,
    gradients,
    init_state,
    state_shardings,
)
from jaxlm.verify.outputs import first_difference, worst
from jaxlm.verify.tiny import STEPS

DEVICES = 8
LOSS_TOLERANCE = 2e-5  # relative
GRADIENT_TOLERANCE = 1e-4  # relative to the gradient's largest entry
ATTEMPTS = 5  # on other data each, where experts are tied
TIED = 2  # tokens that take another expert, at most, for it to count as a tie
WORDS = {  # of a mesh, besides its axes -> the key that has them as its value
    "zero1": "mesh.strategy",
    "ring": "model.context_parallel",
    "all_gather": "model.context_parallel",
}


class Result(NamedTuple):
    """One law on one mesh, or between two runs."""

    name: str
    ok: bool
    # What was measured; "refused": why it has no meaning here; "place": where it broke.
    figures: dict


def on_mesh(tiny: ConfigDict, words: str) -> ConfigDict:
    """The config on the mesh that words such as "fsdp=4 tensor=2" or "sequence=8 ring" name; "" is one device.

    Raises ConfigError where a word is neither.
    """
    c = tiny.copy_and_resolve_references()
    c.mesh.update(dict.fromkeys(MESH_AXES, 1))
    for word in words.split():
        axis, equals, size = word.partition("=")
        if equals and axis in MESH_AXES and size.isdecimal():
            c.mesh[axis] = int(size)
        elif word in WORDS:
            set_key(c, WORDS[word], word)
        else:
            raise ConfigError(
                f"--meshes: {word!r} is not AXIS=SIZE of {', '.join(MESH_AXES)}, nor {', '.join(WORDS)}"
            )
    return c


class Run(NamedTuple):
    losses: np.ndarray  # [steps]
    # [steps, ...]: tokens that chose each expert of each layer; empty without experts.
    loads: np.ndarray
    grads: dict  # of the first step
    bytes: int  # of the state on a device
    replicated: float  # part of the parameters


def observed_step(state: State, batch: dict, *, config: ConfigDict):
    """The train step in its two halves, so that its gradients are seen: (state, metrics, gradients, routing)."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    grads, sums = gradients(state.params, batch, key, config, state.teacher)
    state, metrics = apply_gradients(state, grads, sums, config=config)
    return state, metrics, grads, sums["routing"]


def train_on(config: ConfigDict, mesh, batches, start: int = 0) -> Run:
    """STEPS train steps on a mesh, from batch `start` on. config: resolved."""
    shapes, _ = abstract_state(config)
    places = state_shardings(config, mesh)
    trained, _ = partition(places.params, config)
    step = jax.jit(
        partial(observed_step, config=config),
        donate_argnums=0,
        out_shardings=(places, None, trained, None),
    )
    losses = []
    loads = []
    first_grads = None
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        for k in range(start, start + STEPS):
            batch = to_global(batches[k], mesh, config.train.batch_size)
            state, metrics, grads, routing = step(state, batch)
            if first_grads is None:
                first_grads = jax.device_get(grads)
            losses.append(float(metrics["loss"]))
            layers = jax.tree.leaves(routing.get("load", {}))
            loads.append(np.array(jax.device_get(layers)))
    replicated, _ = replicated_share(shapes.params, places.params)
    size = bytes_per_device(shapes, places)
    return Run(np.array(losses), np.array(loads), first_grads, size, replicated)


class Difference(NamedTuple):
    """How far a run is from the same run on one device, relative."""

    loss: float  # the largest of any step
    gradient: float  # the largest of any parameter
    parameter: str  # the one with that gradient
    tied: bool  # equal until a token or two took another expert

    @property
    def ok(self) -> bool:
        return self.loss <= LOSS_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def difference(run: Run, one: Run) -> Difference:
    """A mixture of experts is not continuous: where a token likes two experts alike, rounding decides for one of them.

    From there on another model is computed, and equally right.
    """
    losses = np.abs(run.losses - one.losses) / np.abs(one.losses)
    moved = np.abs(run.loads - one.loads).reshape(STEPS, -1).sum(axis=1) / 2
    first = int(np.argmax(moved > 0))
    equal_before = bool(np.all(losses[:first] <= LOSS_TOLERANCE))
    tied = 0 < moved[first] <= TIED and equal_before
    gradient, parameter = worst(run.grads, one.grads)
    return Difference(float(np.max(losses)), gradient, parameter, tied)


def compare(
    config: ConfigDict, mesh, batches, alone: Callable[[int], Run]
) -> tuple[Run, Difference, int]:
    """(run on a mesh, its difference from one device, ties before it). A run with a tie is repeated on other data.

    alone: first batch -> the run on one device.
    """
    for ties in range(ATTEMPTS):
        start = ties * STEPS
        run = train_on(config, mesh, batches, start)
        found = difference(run, alone(start))
        if found.ok or not found.tied:
            break
    return run, found, ties


def refusal(tiny: ConfigDict, words: str) -> str:
    """Why jaxlm.train would refuse this mesh for this model; '' where it would not."""
    config = on_mesh(tiny, words)
    problems = check(config, DEVICES)
    if problems:
        return "; ".join(problems)
    config = resolve(config)
    try:
        check_sharding(config, make_mesh(config))
    except ConfigError as error:
        return str(error)
    return ""


def same_as_one_device(
    tiny: ConfigDict, words: str, alone: Callable[[int], Run], batches
) -> Result:
    """The law for the mesh that `words` name (see on_mesh). An error of any kind counts as a broken law."""
    refused = refusal(tiny, words)
    if refused:
        return Result(words, True, {"refused": refused})
    config = resolve(on_mesh(tiny, words))
    mesh = make_mesh(config)
    try:
        run, found, ties = compare(config, mesh, batches, alone)
    except Exception as error:
        return Result(words, False, {"place": f"the step itself: {short(error)}"})
    figures = {
        "loss_difference": found.loss,
        "gradient_difference": found.gradient,
        "parameter": found.parameter,
        "bytes_per_device": run.bytes,
        "replicated": run.replicated,
        "ties": ties,
    }
    if not found.ok:
        one_device = make_mesh(on_mesh(tiny, ""), jax.devices()[:1])
        try:
            figures["place"] = first_difference(config, mesh, one_device, batches[0])
        except Exception as error:
            figures["place"] = f"not found: {short(error)}"
    return Result(words, found.ok, figures)


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"
