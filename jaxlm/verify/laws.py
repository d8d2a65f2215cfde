"""What verify shows of a config: any mesh is one device, and a packed document is as if alone. Names what differs."""

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
from jaxlm.models import build
from jaxlm.parallel.hosts import to_global
from jaxlm.parallel.mesh import make_mesh, replicated_share
from jaxlm.step.costs import bytes_per_device
from jaxlm.step.forward import arguments, rows_of
from jaxlm.step.patterns import partition
from jaxlm.step.state import (
    State,
    abstract_state,
    apply_gradients,
    check_sharding,
    eval_step,
    gradients,
    init_state,
    state_shardings,
)

DEVICES = 8
STEPS = 20
# relative; a gradient's to its largest entry
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
# other data after a tie between experts; tokens that one is of
ATTEMPTS = 5
TIED = 2
WORDS = {
    "zero1": "mesh.strategy",
    "ring": "model.context_parallel",
    "all_gather": "model.context_parallel",
}
ORDER = (  # modules, as the input meets them
    "embed attention_norm attention cross_attention_norm cross_attention mlp_norm mlp final_norm"
).split()
SIDES = ("encoder", "decoder")  # of a model of two


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
            raise ConfigError(
                f"--meshes: {word!r} is not AXIS=SIZE of {', '.join(MESH_AXES)}, nor {', '.join(WORDS)}"
            )
    return c


class Run(NamedTuple):
    losses: np.ndarray  # of each step
    loads: (
        np.ndarray
    )  # [steps, ...]: tokens that chose each expert of each layer; empty without experts
    grads: dict  # of the first step
    bytes: int  # of the state on a device
    replicated: float  # part of the parameters


def train_on(config: ConfigDict, mesh, batches, start: int = 0) -> Run:
    """The train step on a mesh, in its two halves so that its gradients are seen, from batch `start`."""
    places, (shapes, _) = state_shardings(config, mesh), abstract_state(config)

    def step(state: State, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        grads, sums = gradients(state.params, batch, key, config, state.teacher)
        return *apply_gradients(state, grads, sums, config=config), grads, sums["routing"]

    with jax.set_mesh(mesh):
        step = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(places, None, partition(places.params, config)[0], None),
        )
        state = init_state(config, mesh)
        losses = []
        loads = []
        grads = None
        for k in range(start, start + STEPS):
            batch = to_global(batches[k], mesh, config.train.batch_size)
            state, metrics, new, routing = step(state, batch)
            grads = jax.device_get(new) if grads is None else grads
            losses.append(float(metrics["loss"]))
            loads.append(
                np.array([np.asarray(load) for load in jax.tree.leaves(routing.get("load", {}))])
            )
    replicated, _ = replicated_share(shapes.params, places.params)
    return Run(
        np.array(losses), np.array(loads), grads, bytes_per_device(shapes, places), replicated
    )


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


def compare(
    config: ConfigDict, mesh, batches, alone: Callable[[int], Run]
) -> tuple[Run, Difference, int]:
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


def same_as_one_device(
    tiny: ConfigDict, words: str, alone: Callable[[int], Run], batches
) -> Result:
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
        return Result(
            words, False, {"place": f"the step itself: {type(error).__name__}: {str(error)[:500]}"}
        )
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
    differences = {}
    least = 1e-3 * max(float(np.max(np.abs(b))) for b in jax.tree.leaves(want))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(float(np.max(np.abs(b))), least)
        difference = float(np.max(np.abs(a - b))) / scale
        differences[jax.tree_util.keystr(path, simple=True, separator="/")] = difference
    name = max(differences, key=lambda key: (not np.isfinite(differences[key]), differences[key]))
    return differences[name], name


def module_outputs(config: ConfigDict, params, batch, mesh) -> list[tuple[str, np.ndarray]]:
    """[(module, its output [B, T, ...])] in the order in which the input meets them."""

    def seen(module, method):
        return module.name in ORDER and method == "__call__"

    def f(params, batch):
        given, more = arguments(rows_of(batch), config)
        return build(config).apply(
            {"params": params}, *given, **more, capture_intermediates=seen, mutable=["intermediates"]
        )[1]["intermediates"]  # fmt: skip

    with jax.set_mesh(mesh):
        batch = to_global(batch, mesh, len(batch["tokens"]))
        made = jax.device_get(jax.jit(f)(params, batch))
    places = []
    for path, leaf in jax.tree.leaves_with_path(made):
        keys = [getattr(key, "key", None) for key in path]
        module = next(key for key in reversed(keys) if key in ORDER)
        call, *returned = (key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey))
        if leaf.ndim < 3 or any(returned):  # what a module returns first
            continue
        # Two sides have one table, which is asked for the source first.
        side = SIDES.index(keys[0]) if keys[0] in SIDES else call
        if config.model.name in ("encoder_decoder", "lstm_seq2seq"):
            lead = f"{SIDES[side]}/"
        else:
            lead = ""
        if module == "embed":
            stage = 0
        else:
            stage = 2 if module == "final_norm" else 1
        block = next((key for key in keys if str(key).startswith("block_")), "block_0")
        stacked = leaf if stage == 1 and config.model.scan else leaf[None]
        blocks = len(config.model.layers) if config.model.scan else 1
        for i, output in enumerate(stacked):
            layer = i * blocks + int(block.removeprefix("block_"))
            name = lead + (module if stage != 1 else f"layer {layer} {module}")
            places.append(((side, stage, layer, ORDER.index(module)), name, output))
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
    return (
        first_unlike(here, dict(there))
        or "after the last module: the loss, its gradient, or the sum over devices"
    )


def first_unlike(outputs: list, others: dict) -> str | None:
    """The first module whose output is not equal to the other; some (the stages of a pipeline) may not be known."""
    before = "the input"
    known = True
    for name, a in outputs:
        if name not in others:
            known = False
        elif not np.allclose(a, others[name], rtol=1e-4, atol=1e-5):
            if known:
                return f"the output of {name}"
            return f"after {before}, at or before {name}"
        else:
            before = name
            known = True
    return None


def unpacked(batch: dict) -> dict:
    """The same documents or examples, each at the start of a row of its own."""
    rows = []
    for row in range(len(batch["tokens"])):
        mine = {name: batch[name][row] for name in batch}
        for number in np.unique(mine["segments"])[np.unique(mine["segments"]) > 0]:
            here = mine["segments"].reshape(-1, mine["segments"].shape[-1])[0] == number
            if "enc_segments" in mine:
                there = mine["enc_segments"] == number
            else:
                there = None
            alone = {}
            for name, x in mine.items():
                alone[name] = np.zeros_like(x)
                if "labels" in mine and name in ("labels", "weights"):  # of examples
                    alone[name][0] = x[number - 1]
                else:
                    part = x[..., there if name.startswith("enc_") else here]
                    alone[name][..., : part.shape[-1]] = part
            alone["segments"] = np.minimum(alone["segments"], 1)
            if there is not None:
                alone["enc_segments"] = np.minimum(alone["enc_segments"], 1)
            if "reach" in mine:
                alone["reach"] = np.maximum(alone["reach"] - np.argmax(here), np.arange(len(here)))
            rows.append(alone)
    return {name: np.stack([row[name] for row in rows]) for name in batch}


def packed_as_alone(tiny: ConfigDict, batches) -> Result:
    """A document's hidden states and loss are the same whatever is packed beside it, and as in a row of its own."""
    name = "packed = alone"
    config = resolve(on_mesh(tiny, ""))
    if not config.data.isolate:
        return Result(
            name,
            True,
            {"refused": "data.isolate=False: documents in a row are meant to see each other"},
        )

    def packed(batch):
        return batch["segments"].max(axis=tuple(range(1, batch["segments"].ndim))) > 1

    batch = next((batches[k] for k in range(100) if packed(batches[k]).any()), None)
    if batch is None:
        return Result(name, True, {"refused": "no row of this data holds two examples"})
    batch = {key: x[packed(batch)][:4] for key, x in batch.items()}
    mesh = make_mesh(config, jax.devices()[:1])
    state = init_state(config, mesh)

    def outputs(batch):
        return module_outputs(config, state.params, batch, mesh)

    other = dict(batch)
    for side in ("", "enc_") if "enc_tokens" in batch else ("",):
        tokens = batch[f"{side}tokens"]
        other[f"{side}tokens"] = np.where(batch[f"{side}segments"] == 1, (tokens + 1) % 100, tokens)

    def later(module: str, x: np.ndarray) -> np.ndarray:
        segments = batch["enc_segments" if module.startswith("encoder/") else "segments"]
        return np.where(segments.reshape(-1, segments.shape[-1])[..., None] > 1, x, 0)

    one = outputs(batch)
    two = outputs(other)
    of_tokens = [i for i, (_, x) in enumerate(one) if x.ndim == 3]
    place = first_unlike(
        [(one[i][0], later(*one[i])) for i in of_tokens],
        {two[i][0]: later(*two[i]) for i in of_tokens},
    )
    if place:
        return Result(
            name, False, {"place": f"{place} depends on the document before, in the same row"}
        )
    alone = unpacked(batch)
    segments, single = (rows_of(x)["segments"] for x in (batch, alone))
    hidden = one[-1][1]
    theirs = iter(outputs(alone)[-1][1])
    if batch["segments"].ndim == 3:
        pairs = batch["segments"].shape[1]
    else:
        pairs = 1
    differences = []
    for first in range(0, len(segments), pairs):  # the rows of a pair follow one another
        for number in np.unique(segments[first])[np.unique(segments[first]) > 0]:
            for row in range(first, first + pairs):
                here = segments[row] == number
                differences.append(
                    float(np.max(np.abs(hidden[row, here] - next(theirs)[: here.sum()])))
                )
    assert len(differences) == len(single)
    sums = [sums_of_loss(config, state, x, mesh) for x in (batch, alone)]
    apart = max(abs(sums[0][key] - sums[1][key]) / max(abs(sums[0][key]), 1e-6) for key in sums[0])
    figures = {"hidden_difference": max(differences), "loss_difference": apart}
    if max(differences) >= 1e-4:
        figures["place"] = "positions: a document alone has other hidden states"
    elif apart >= 1e-5:
        figures["place"] = "the loss: its sums are not those over the examples alone"
    return Result(name, "place" not in figures, figures)


def sums_of_loss(config: ConfigDict, state: State, batch: dict, mesh) -> dict[str, float]:
    """What eval_step sums over a batch."""
    with jax.set_mesh(mesh):
        sums, _ = jax.jit(partial(eval_step, config=config))(state.params, batch, state.teacher)
    return {key: float(sums[key]) for key in ("loss", "weight")}
