"""Other settings of a config for a pod: pruned by arithmetic, the promising ones compiled by jaxlm.plan."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxlm.config.check import check
from jaxlm.config.keys import GATED
from jaxlm.config.recipe import resolve, set_key
from jaxlm.errors import ConfigError
from jaxlm.parallel.mesh import abstract_mesh, batch_shards, require_sharded, shardings
from jaxlm.plan.page import fits
from jaxlm.plan.step_time import HIDDEN
from jaxlm.plan.topology import Topology
from jaxlm.step import costs
from jaxlm.step.state import abstract_state, state_shardings

KEPT = {
    "full": 1,
    "attention": 1,
    "dots": 4,
    "none": 8,
}  # of D-wide activations a layer besides the MLP's
MATRIX = 0.7  # part of the peak that products reach, before anything is compiled
LOGITS = 3 * (512 << 20)  # bytes of a chunk of the loss
NEUTRAL = {
    "model.remat": "full",
    "train.grad_accumulation": 1,
    "mesh.tensor": 1,
}  # the state is the same: traced once
WORTHWHILE = 0.05  # of the step's time: less is not suggested
GATHER = 2  # layers' weights that are whole on a device at one time


class Option(NamedTuple):
    overrides: dict[str, object]
    config: ConfigDict  # resolved
    memory: float  # bytes on a device, by arithmetic
    seconds: float  # a step, by arithmetic


def options(config: ConfigDict, pod: Topology) -> Iterator[Option]:
    """Every valid tensor parallelism, remat and number of microbatches. config: unresolved."""
    n = len(pod.devices) // pod.slices
    tensors = [t for t in (1, 2, 4, 8, 16) if n % t == 0]
    for tensor, remat, parts in itertools.product(
        tensors, ("full", "dots", "none"), (1, 2, 4, 8, 16)
    ):
        overrides = {"mesh.tensor": tensor, "model.remat": remat, "train.grad_accumulation": parts}
        option = estimate(config, overrides, pod)
        if option:
            yield option


def estimate(config: ConfigDict, overrides: dict, pod: Topology) -> Option | None:
    """By arithmetic; None where the config is not valid so."""
    config = changed(config, overrides)
    if check(config, len(pod.devices)):
        return None
    config, same = resolve(config), resolve(changed(config, NEUTRAL))
    mesh, (shapes, axes) = abstract_mesh(config, len(pod.devices)), abstract_state(same)
    try:
        require_sharded(shapes.params, shardings(shapes.params, axes.params, mesh), mesh)
    except ConfigError:
        return None
    places = state_shardings(same, mesh)
    m = config.model
    chip = pod.spec

    def of(name):
        return costs.bytes_per_device(getattr(shapes, name), getattr(places, name))

    parts = config.train.grad_accumulation
    tensor = mesh.shape["tensor"]
    sequence = mesh.shape["sequence"]
    rows = config.train.batch_size / parts / batch_shards(mesh)
    tokens = rows * config.data.seq_len / sequence / tensor
    width = m.embed_dim
    gates = 2 if m.mlp in GATED else 1
    if not m.num_experts:
        mlp = m.mlp_dim
    else:
        mlp = m.expert_dim * m.experts_per_token
    kept = KEPT[m.remat] * width + (gates * mlp if m.remat in ("dots", "none") else 0)
    one_layer = 2 * costs.num_parameters(shapes.params["layers"]) / m.num_layers / tensor
    layer_work = tokens * 2 * (4 * width + 3 * mlp)  # of the layer that is computed again
    memory = of("params") + of("opt_state") + of("ema")
    memory += (
        of("params") * (parts > 1) / (1 if config.train.accumulation_dtype == "float32" else 2)
    )
    memory += 2 * tokens * kept * m.num_layers + layer_work + GATHER * one_layer
    memory += min(LOGITS, 12 * tokens * m.vocab_size)
    again = {"full": 8, "attention": 8, "dots": 6.3, "none": 6}[m.remat] / 6
    flops = (
        costs.flops_per_token(config, shapes.params)
        * config.train.batch_size
        * config.data.seq_len
        * again
    )
    work = flops / len(pod.devices) / (MATRIX * chip.flops)
    weights = (
        3 * parts * 2 * costs.num_parameters(shapes.params) / tensor * (mesh.shape["fsdp"] > 1)
    )
    activations = (
        (8 if m.remat == "full" else 6)
        * 2
        * tokens
        * tensor
        * width
        * m.num_layers
        * parts
        * (tensor > 1)
    )
    hosts = len(pod.devices) // pod.slices > chip.host
    if hosts:
        gpu = min(chip.link, chip.network * chip.host)
    else:
        gpu = chip.link
    sent = (weights + activations) / (2 * chip.link * chip.dims or gpu)
    return Option(overrides, config, memory, work + max(sent * (1 - HIDDEN), sent - work))


def changed(config: ConfigDict, overrides: dict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    for key, value in overrides.items():
        set_key(config, key, value)
    return config


def search(
    config: ConfigDict, pod: Topology, compile: Callable, count: int
) -> list[tuple[dict, object]]:
    """[(overrides, plan)] of the options that arithmetic finds fastest among those that should fit, compiled.

    compile: resolved config -> plan. Until `count` fit, at most twice as many: one that does not fit rules out those
    that need more.
    """
    room = 1.1 * pod.memory  # arithmetic is not exact
    promising = sorted(
        (o for o in options(config, pod) if o.memory <= room), key=lambda o: o.seconds
    )
    found = []
    fitting = 0
    limit = math.inf
    for option in promising:
        if option.memory >= limit:
            continue
        plan = compile(option.config)
        fitting = fitting + fits(plan)
        limit = limit if fits(plan) else option.memory
        found.append((option.overrides, plan))
        if fitting == count or len(found) == 2 * count:
            break
    return found


def remedies(config: ConfigDict, pod: Topology, needed: int) -> Iterator[dict]:
    """What makes a step that needs this much fit, in the order in which it should be tried. config: unresolved."""
    fixed = estimate(config, {}, pod)
    if fixed is None:
        return
    parts = config.train.grad_accumulation
    state = fixed.memory - estimate_of_activations(fixed, pod)
    factor = (needed - state) / max(pod.memory * 0.95 - state, 1)
    sharded = estimate(config, {"mesh.strategy": "fsdp"}, pod)
    if sharded and sharded.memory < fixed.memory:
        yield {"mesh.strategy": "fsdp"}
    if config.model.remat != "full":
        yield {"model.remat": "full"}
    enough = [more for more in (2, 4, 8, 16, 32, 64) if more >= factor > 0]
    for more in enough[:2]:  # the second because arithmetic is not exact
        if estimate(config, {"train.grad_accumulation": parts * more}, pod):
            yield {"train.grad_accumulation": parts * more}
            yield {"train.batch_size": config.train.batch_size // more}
    for tensor in (2, 4, 8):
        option = estimate(config, {"mesh.tensor": tensor}, pod)
        if tensor > config.mesh.tensor and option and option.memory < fixed.memory:
            yield {"mesh.tensor": tensor}


def faster(config: ConfigDict, pod: Topology, count: int = 3) -> list[tuple[dict, float, float]]:
    """[(overrides, part of the step's time saved, bytes on a device)]: single changes, by arithmetic, that should fit.

    config: unresolved. The first saves most.
    """
    now = estimate(config, {}, pod)
    parts = config.train.grad_accumulation
    tensor = max(config.mesh.tensor, 1)
    changes = []
    for remat in ("none", "dots", "attention"):
        if remat != config.model.remat:
            changes.append({"model.remat": remat})
    changes += [{"train.grad_accumulation": parts // 2}] if parts > 1 else []
    changes += [{"mesh.tensor": n} for n in (2 * tensor, tensor // 2) if n]
    tried = []
    for option in (estimate(config, change, pod) for change in changes):
        if option and now:
            tried.append(option)
    found = []
    for o in tried:
        if o.memory <= 0.9 * pod.memory:
            found.append((o.overrides, 1 - o.seconds / now.seconds, o.memory))
    return sorted((row for row in found if row[1] >= WORTHWHILE), key=lambda row: -row[1])[:count]


def estimate_of_activations(option: Option, pod: Topology) -> float:
    """Bytes on a device that fall with the rows of a microbatch."""
    twice = estimate(option.config, {"train.batch_size": 2 * option.config.train.batch_size}, pod)
    if twice:
        return twice.memory - option.memory
    return 0.0
