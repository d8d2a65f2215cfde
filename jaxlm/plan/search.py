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

# How many activations of the model's width a layer keeps for the backward pass, besides those of the MLP's width.
KEPT = {"full": 1, "attention": 1, "dots": 4, "none": 8}
KEEPS_MLP = ("dots", "none")
# FLOPs of a step with recomputation, where forward and backward without it are 6 (per parameter and token).
FLOPS = {"full": 8, "attention": 8, "dots": 6.3, "none": 6}
MATRIX = 0.7  # part of the peak that products reach, before anything is compiled
LOGITS = 3 * (512 << 20)  # bytes of a chunk of the loss
# Keys that don't change the state: it is traced once, with these values.
NEUTRAL = {"model.remat": "full", "train.grad_accumulation": 1, "mesh.tensor": 1}
WORTHWHILE = 0.05  # of the step's time: less is not suggested
GATHER = 2  # layers whose weights are whole on a device at one time

TENSORS = (1, 2, 4, 8, 16)
REMATS = ("full", "dots", "none")
MICROBATCHES = (1, 2, 4, 8, 16)


class Option(NamedTuple):
    overrides: dict[str, object]
    config: ConfigDict  # resolved
    memory: float  # bytes on a device, by arithmetic
    seconds: float  # a step, by arithmetic


def options(config: ConfigDict, pod: Topology) -> Iterator[Option]:
    """Every valid tensor parallelism, remat and number of microbatches. config: unresolved."""
    slice_size = len(pod.devices) // pod.slices
    for tensor, remat, parts in itertools.product(TENSORS, REMATS, MICROBATCHES):
        if slice_size % tensor:
            continue
        overrides = {"mesh.tensor": tensor, "model.remat": remat, "train.grad_accumulation": parts}
        option = estimate(config, overrides, pod)
        if option:
            yield option


def estimate(config: ConfigDict, overrides: dict, pod: Topology) -> Option | None:
    """The option by arithmetic; None where the config is not valid with these overrides. config: unresolved."""
    config = changed(config, overrides)
    if check(config, len(pod.devices)):
        return None
    neutral = resolve(changed(config, NEUTRAL))
    config = resolve(config)
    mesh = abstract_mesh(config, len(pod.devices))
    shapes, axes = abstract_state(neutral)
    try:
        require_sharded(shapes.params, shardings(shapes.params, axes.params, mesh), mesh)
    except ConfigError:
        return None
    memory = state_bytes(config, shapes, state_shardings(neutral, mesh))
    memory += layer_bytes(config, shapes, mesh)
    memory += min(LOGITS, 12 * tokens_of(config, mesh) * config.model.vocab_size)
    work = work_seconds(config, shapes, pod)
    sent = sent_seconds(config, shapes, mesh, pod)
    return Option(overrides, config, memory, work + max(sent * (1 - HIDDEN), sent - work))


def tokens_of(config: ConfigDict, mesh) -> float:
    """Tokens of a microbatch on a device."""
    rows = config.train.batch_size / config.train.grad_accumulation / batch_shards(mesh)
    return rows * config.data.seq_len / mesh.shape["sequence"] / mesh.shape["tensor"]


def mlp_width(m: ConfigDict) -> int:
    """Width of the MLP that a token passes: that of all its experts together."""
    if m.num_experts:
        return m.expert_dim * m.experts_per_token
    return m.mlp_dim


def state_bytes(config: ConfigDict, shapes, places) -> float:
    """Parameters, optimizer, EMA and, of several microbatches, the sum of gradients, on a device."""
    params = costs.bytes_per_device(shapes.params, places.params)
    optimizer = costs.bytes_per_device(shapes.opt_state, places.opt_state)
    ema = costs.bytes_per_device(shapes.ema, places.ema)
    size = params + optimizer + ema
    if config.train.grad_accumulation > 1:
        size += params / (1 if config.train.accumulation_dtype == "float32" else 2)
    return size


def layer_bytes(config: ConfigDict, shapes, mesh) -> float:
    """Bytes on a device: what layers keep for the backward pass, what one computes again, and gathered weights."""
    m = config.model
    tokens = tokens_of(config, mesh)
    mlp = mlp_width(m)
    kept = KEPT[m.remat] * m.embed_dim
    if m.remat in KEEPS_MLP:
        gates = 2 if m.mlp in GATED else 1
        kept += gates * mlp
    layers = costs.num_parameters(shapes.params["layers"])
    one_layer = 2 * layers / m.num_layers / mesh.shape["tensor"]
    computed_again = tokens * 2 * (4 * m.embed_dim + 3 * mlp)
    return 2 * tokens * kept * m.num_layers + computed_again + GATHER * one_layer


def work_seconds(config: ConfigDict, shapes, pod: Topology) -> float:
    tokens = config.train.batch_size * config.data.seq_len
    again = FLOPS[config.model.remat] / 6
    flops = costs.flops_per_token(config, shapes.params) * tokens * again
    return flops / len(pod.devices) / (MATRIX * pod.spec.flops)


def sent_seconds(config: ConfigDict, shapes, mesh, pod: Topology) -> float:
    """Of weights gathered and gradients summed (fsdp), and of activations (tensor), in bfloat16."""
    m = config.model
    parts = config.train.grad_accumulation
    tensor = mesh.shape["tensor"]
    sent = 0.0
    if mesh.shape["fsdp"] > 1:
        sent += 3 * parts * 2 * costs.num_parameters(shapes.params) / tensor
    if tensor > 1:
        passes = 8 if m.remat == "full" else 6
        tokens = tokens_of(config, mesh)
        sent += passes * 2 * tokens * tensor * m.embed_dim * m.num_layers * parts
    return sent / bandwidth(pod)


def bandwidth(pod: Topology) -> float:
    """Bytes a second of a device: along both directions of every dimension of a torus, or of GPUs."""
    chip = pod.spec
    if chip.dims:
        return 2 * chip.link * chip.dims
    hosts_of_slice = len(pod.devices) // pod.slices > chip.host
    if hosts_of_slice:
        return min(chip.link, chip.network * chip.host)
    return chip.link


def changed(config: ConfigDict, overrides: dict) -> ConfigDict:
    """A copy with other values of some keys."""
    config = config.copy_and_resolve_references()
    for key, value in overrides.items():
        set_key(config, key, value)
    return config


def by_seconds(option: Option) -> float:
    return option.seconds


def search(
    config: ConfigDict, pod: Topology, compile: Callable, count: int
) -> list[tuple[dict, object]]:
    """[(overrides, plan)] of the options that arithmetic finds fastest among those that should fit, compiled.

    compile: resolved config -> plan. Until `count` fit, at most twice as many: one that does not fit rules out those
    that need more.
    """
    room = 1.1 * pod.memory  # arithmetic is not exact
    promising = [option for option in options(config, pod) if option.memory <= room]
    found = []
    fitting = 0
    limit = math.inf
    for option in sorted(promising, key=by_seconds):
        if option.memory >= limit:
            continue
        plan = compile(option.config)
        if fits(plan):
            fitting += 1
        else:
            limit = option.memory
        found.append((option.overrides, plan))
        if fitting == count or len(found) == 2 * count:
            break
    return found


def remedies(config: ConfigDict, pod: Topology, needed: int) -> Iterator[dict]:
    """Overrides that should make a step fit, in the order in which to try them. config: unresolved. needed: bytes."""
    now = estimate(config, {}, pod)
    if now is None:
        return
    sharded = estimate(config, {"mesh.strategy": "fsdp"}, pod)
    if sharded and sharded.memory < now.memory:
        yield {"mesh.strategy": "fsdp"}
    if config.model.remat != "full":
        yield {"model.remat": "full"}
    yield from smaller_batches(config, pod, now, needed)
    for tensor in (2, 4, 8):
        option = estimate(config, {"mesh.tensor": tensor}, pod)
        if tensor > config.mesh.tensor and option and option.memory < now.memory:
            yield {"mesh.tensor": tensor}


def smaller_batches(config: ConfigDict, pod: Topology, now: Option, needed: int) -> Iterator[dict]:
    """More microbatches, or a smaller batch: the first that should be enough, then the next, in case it is not."""
    state = now.memory - estimate_of_activations(now, pod)
    factor = (needed - state) / max(pod.memory * 0.95 - state, 1)
    if factor <= 0:
        return
    enough = [more for more in (2, 4, 8, 16, 32, 64) if more >= factor]
    for more in enough[:2]:
        parts = {"train.grad_accumulation": config.train.grad_accumulation * more}
        if estimate(config, parts, pod):
            yield parts
            yield {"train.batch_size": config.train.batch_size // more}


def faster(config: ConfigDict, pod: Topology, count: int = 3) -> list[tuple[dict, float, float]]:
    """[(overrides, part of the step's time saved, bytes on a device)]: single changes, by arithmetic, that should fit.

    config: unresolved. The first saves most.
    """
    now = estimate(config, {}, pod)
    if now is None:
        return []
    found = []
    for change in single_changes(config):
        option = estimate(config, change, pod)
        if option and option.memory <= 0.9 * pod.memory:
            saved = 1 - option.seconds / now.seconds
            if saved >= WORTHWHILE:
                found.append((change, saved, option.memory))
    found.sort(key=lambda row: -row[1])
    return found[:count]


def single_changes(config: ConfigDict) -> Iterator[dict]:
    """Of one key each: less recomputation, fewer microbatches, more or less tensor parallelism."""
    for remat in ("none", "dots", "attention"):
        if remat != config.model.remat:
            yield {"model.remat": remat}
    parts = config.train.grad_accumulation
    if parts > 1:
        yield {"train.grad_accumulation": parts // 2}
    tensor = max(config.mesh.tensor, 1)
    yield {"mesh.tensor": 2 * tensor}
    if tensor > 1:
        yield {"mesh.tensor": tensor // 2}


def estimate_of_activations(option: Option, pod: Topology) -> float:
    """Bytes on a device that fall with the rows of a microbatch."""
    twice = estimate(option.config, {"train.batch_size": 2 * option.config.train.batch_size}, pod)
    if twice:
        return twice.memory - option.memory
    return 0.0
