"""What verify shows of a config: any mesh is one device, and a packed document is as if alone. Names what differs."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm.check import check
from jaxlm.config import resolve, set_key
from jaxlm.costs import bytes_per_device
from jaxlm.errors import ConfigError
from jaxlm.keys import MESH_AXES
from jaxlm.models import build
from jaxlm.optim import split
from jaxlm.parallel.hosts import to_global
from jaxlm.parallel.mesh import make_mesh, replicated_share
from jaxlm.state import State, abstract_state, apply_gradients, check_sharding, gradients, init_state, state_shardings

DEVICES, STEPS = 8, 20
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4  # relative; a gradient's to its largest entry
ATTEMPTS, TIED = 5, 2  # other data after a tie between experts; tokens that one is of
WORDS = {"zero1": "mesh.strategy", "ring": "model.context_parallel", "all_gather": "model.context_parallel"}
ORDER = ("embed", "attention_norm", "attention", "mlp_norm", "mlp", "final_norm")  # modules, as the input meets them


class Result(NamedTuple):
    """One law: on which mesh or between which runs, whether it held, and what was measured."""

    name: str
    ok: bool
    figures: dict


def on_mesh(tiny: ConfigDict, words: str) -> ConfigDict:
    """The config on the mesh that words such as "fsdp=4 tensor=2" or "sequence=8 ring" name. Raises ConfigError."""
    c = tiny.copy_and_resolve_references()
    c.mesh.update(dict.fromkeys(MESH_AXES, 1))
    for word in words.split():
        axis, equals, size = word.partition("=")
        if equals and axis in MESH_AXES and size.isdecimal():
            c.mesh[axis] = int(size)
        elif word in WORDS:
            set_key(c, WORDS[word], word)
        else:
            raise ConfigError(f"--meshes: {word!r} is not AXIS=SIZE of {', '.join(MESH_AXES)}, nor {', '.join(WORDS)}")
    return c


class Run(NamedTuple):
    losses: np.ndarray  # of each step
    loads: np.ndarray  # [steps, ...]: tokens that chose each expert of each layer; empty without experts
    grads: dict  # of the first step
    bytes: int  # of the state on a device
    replicated: float  # part of the parameters


def train_on(config: ConfigDict, mesh, batches, start: int = 0) -> Run:
    """The train step on a mesh, in its two halves so that its gradients are seen, from batch `start`."""
    places, (shapes, _) = state_shardings(config, mesh), abstract_state(config)

    def step(state: State, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        grads, sums = gradients(state.params, batch, key, config)
        return *apply_gradients(state, grads, sums, config=config), grads, sums["routing"]

    with jax.set_mesh(mesh):
        step = jax.jit(step, donate_argnums=0, out_shardings=(places, None, split(places.params, config)[0], None))
        state, losses, loads, grads = init_state(config, mesh), [], [], None
        for k in range(start, start + STEPS):
            batch = to_global(batches[k], mesh, config.train.batch_size)
            state, metrics, new, routing = step(state, batch)
            grads = jax.device_get(new) if grads is None else grads
            losses.append(float(metrics["loss"]))
            loads.append(np.array([np.asarray(load) for load in jax.tree.leaves(routing.get("load", {}))]))
    replicated, _ = replicated_share(shapes.params, places.params)
    return Run(np.array(losses), np.array(loads), grads, bytes_per_device(shapes, places), replicated)


class Difference(NamedTuple):
    """Of a run from the same on one device, relative."""

    loss: float  # the largest of any step
    gradient: float
    parameter: str  # whose gradient
    tied: bool  # all was well until a token or two took another expert

    @property
    def ok(self) -> bool:
        return self.loss <= LOSS_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def difference(run: Run, one: Run) -> Difference:
    """A mixture of experts is not continuous: where a token likes two experts alike, rounding decides for one of them.

    What is computed from there on is another model's, and equally right.
    """
    losses = np.abs(run.losses - one.losses) / np.abs(one.losses)
    moved = np.abs(run.loads - one.loads).reshape(STEPS, -1).sum(axis=1) / 2
    first = int(np.argmax(moved > 0))
    tied = 0 < moved[first] <= TIED and bool(np.all(losses[:first] <= LOSS_TOLERANCE))
    return Difference(float(np.max(losses)), *worst(run.grads, one.grads), tied)


def compare(config: ConfigDict, mesh, batches, alone: Callable[[int], Run]) -> tuple[Run, Difference, int]:
    """(run on a mesh, its difference from one device, ties before it). A run with a tie is made again on other data.

    alone: batch that it begins with -> the run on one device.
    """
    for ties in range(ATTEMPTS):
        start = ties * STEPS
        run = train_on(config, mesh, batches, start)
        found = difference(run, alone(start))
        if found.ok or not found.tied:
            break
    return run, found, ties


def same_as_one_device(tiny: ConfigDict, words: str, alone: Callable[[int], Run], batches) -> Result:
    config = on_mesh(tiny, words)
    problems = check(config, DEVICES)
    if problems:  # this mesh is not for this model, and train would say the same
        return Result(words, True, {"refused": "; ".join(problems)})
    config = resolve(config)
    mesh = make_mesh(config)
    try:
        check_sharding(config, mesh)
    except ConfigError as error:
        return Result(words, True, {"refused": str(error)})
    try:
        run, found, ties = compare(config, mesh, batches, alone)
    except Exception as error:  # of whatever kind: the other meshes are to be tried too
        return Result(words, False, {"place": f"the step itself: {type(error).__name__}: {str(error)[:500]}"})
    figures = {
        "loss_difference": found.loss,
        "gradient_difference": found.gradient,
        "parameter": found.parameter,
        "bytes_per_device": run.bytes,
        "replicated": run.replicated,
        "ties": ties,
    }
    if not found.ok:
        try:
            figures["place"] = first_difference(tiny, config, mesh, batches[0])
        except Exception as error:  # the law is broken all the same
            figures["place"] = f"not found: {type(error).__name__}: {str(error)[:500]}"
    return Result(words, found.ok, figures)


def worst(got: dict, want: dict) -> tuple[float, str]:
    """(largest difference of any parameter's gradient, over that gradient's largest entry, the parameter's name).

    At least over a thousandth of the largest of all: the gradient of a key's bias is nothing but rounding errors.
    """
    differences, least = {}, 1e-3 * max(float(np.max(np.abs(b))) for b in jax.tree.leaves(want))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(float(np.max(np.abs(b))), least)
        difference = float(np.max(np.abs(a - b))) / scale
        differences[jax.tree_util.keystr(path, simple=True, separator="/")] = difference
    name = max(differences, key=lambda key: (not np.isfinite(differences[key]), differences[key]))
    return differences[name], name


def module_outputs(config: ConfigDict, params, batch, mesh) -> list[tuple[str, np.ndarray]]:
    """[(module, its output [B, T, ...])] in the order in which the input meets them."""
    seen = lambda module, method: module.name in ORDER and method == "__call__"

    def f(params, batch):
        arguments = batch["tokens"], batch["segments"], batch["positions"]
        return build(config).apply(
            {"params": params}, *arguments, capture_intermediates=seen, mutable=["intermediates"]
        )[1]["intermediates"]  # fmt: skip

    with jax.set_mesh(mesh):
        batch = to_global(batch, mesh, len(batch["tokens"]))
        made = jax.device_get(jax.jit(f)(params, batch))
    places = []
    for path, leaf in jax.tree.leaves_with_path(made):
        keys = [getattr(key, "key", None) for key in path]
        module = next(key for key in reversed(keys) if key in ORDER)
        if leaf.ndim < 3 or path[-1] != jax.tree_util.SequenceKey(0):  # what a module returns first
            continue
        stage = 0 if module == "embed" else 2 if module == "final_norm" else 1
        block = next((key for key in keys if str(key).startswith("block_")), "block_0")
        stacked = leaf if stage == 1 and config.model.scan else leaf[None]
        blocks = len(config.model.layers) if config.model.scan else 1
        for i, output in enumerate(stacked):
            layer = i * blocks + int(block.removeprefix("block_"))
            name = module if stage != 1 else f"layer {layer} {module}"
            places.append(((stage, layer, ORDER.index(module)), name, output))
    places.sort(key=lambda place: place[0])
    return [(name, output) for _, name, output in places]


def first_difference(tiny: ConfigDict, config: ConfigDict, mesh, batch) -> str:
    """Where the mesh and one device first differ: the parameters at the start, or the first module's output."""
    alone = make_mesh(on_mesh(tiny, ""), jax.devices()[:1])
    params = [init_state(config, m).params for m in (alone, mesh)]
    born, parameter = worst(*map(jax.device_get, params))
    if born > 1e-6:
        return f"the initial value of {parameter}"
    here, there = (module_outputs(config, p, batch, m) for p, m in zip(params, (alone, mesh)))
    return first_unlike(here, dict(there)) or "after the last module: the loss, its gradient, or the sum over devices"


def first_unlike(outputs: list, others: dict) -> str | None:
    """The first module whose output is not equal to the other; some (the stages of a pipeline) may not be known."""
    before, known = "the input", True
    for name, a in outputs:
        if name not in others:
            known = False
        elif not np.allclose(a, others[name], rtol=1e-4, atol=1e-5):
            return f"the output of {name}" if known else f"after {before}, at or before {name}"
        else:
            before, known = name, True
    return None


def packed_as_alone(tiny: ConfigDict, batches) -> Result:
    """A document's hidden states are the same whatever is packed beside it, and those that it has alone."""
    name, config = "packed = alone", resolve(on_mesh(tiny, ""))
    if not config.data.isolate:
        return Result(name, True, {"refused": "data.isolate=False: documents in a row are meant to see each other"})
    mesh = make_mesh(config, jax.devices()[:1])
    params = init_state(config, mesh).params
    batch = next(batches[k] for k in range(100) if (batches[k]["segments"].max(axis=1) > 1).all())
    first = batch["segments"] == 1
    other = batch | {"tokens": np.where(first, batch["tokens"][::-1] % 100, batch["tokens"])}
    later = (batch["segments"] > 1)[..., None]
    one, two = (module_outputs(config, params, b, mesh) for b in (batch, other))
    shown = lambda outputs: [(module, np.where(later, x, 0)) for module, x in outputs if x.shape[:2] == first.shape]
    place = first_unlike(shown(one), dict(shown(two)))
    if place:
        return Result(name, False, {"place": f"{place} depends on the document before, in the same row"})
    differences = []
    for row, segments in enumerate(batch["segments"][:4]):
        here = segments == 2
        alone = {key: batch[key][row : row + 1, here] for key in batch} | {
            "segments": np.ones((1, here.sum()), np.int32)
        }
        hidden = module_outputs(config, params, alone, mesh)[-1][1][0]
        differences.append(float(np.max(np.abs(hidden - one[-1][1][row, here]))))
    figures = {"hidden_difference": max(differences)}
    ok = max(differences) < 1e-4
    return Result(
        name, ok, figures if ok else figures | {"place": "positions: a document alone has other hidden states"}
    )
