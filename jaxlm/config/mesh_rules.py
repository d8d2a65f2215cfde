"""Which meshes fit a config and its devices, and the nearest ones that do. No jax."""

import itertools
import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from jaxlm.config.attention_kernels import capabilities
from jaxlm.config.keys import ATTENDING, MESH_AXES
from jaxlm.config.problems import Problem
from jaxlm.config.recipe import mesh_sizes, pipeline_microbatches

# Where these have no sound value, nothing can be counted with them.
MODEL_SIZES = {
    "model.num_heads",
    "model.num_experts",
    "model.num_layers",
    "model.layers",
    "model.pipeline_rounds",
}
BATCH_SIZES = {
    "train.batch_size",
    "train.grad_accumulation",
    "data.seq_len",
    "model.pipeline_microbatches",
}


def nearest_multiples(value: int, factor: int) -> str:
    low = value // factor * factor
    if low:
        return f"nearest: {low} or {low + factor}"
    return f"nearest: {factor}"


def divisors_of(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def nearest_divisors(value: int, number: int) -> str:
    """The two divisors of `number` that are nearest to the value."""

    def distance(divisor: int) -> int:
        return abs(divisor - value)

    nearest = sorted(divisors_of(number), key=distance)[:2]
    return " or ".join(map(str, sorted(nearest)))


def fixed_devices(sizes: dict[str, int]) -> int:
    """Devices of all axes but the one that takes those left over (-1)."""
    return math.prod(n for n in sizes.values() if n != -1)


def fits(sizes: dict[str, int], devices: int) -> bool:
    if -1 in sizes.values():
        return devices % fixed_devices(sizes) == 0
    return devices == fixed_devices(sizes)


def mesh(c: ConfigDict, devices: int | None, bad: set[str]) -> list[Problem]:
    """The problems of a config's mesh. bad: keys whose values are no numbers to count with."""
    problems = list(axes(c))
    if problems or c.mesh.slices < 1:
        return problems
    sizes = mesh_sizes(c)
    if devices is not None and not fits(sizes, devices):
        problems.append(misfit(c, sizes, devices))
        for axis, size in sizes.items():  # to find the rest of what is wrong
            if devices % size:
                sizes[axis] = 1
    left = max((devices or fixed_devices(sizes)) // fixed_devices(sizes), 1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = left
    across = sizes.get(c.mesh.across, 1)
    if across % c.mesh.slices:
        nearest = nearest_divisors(c.mesh.slices, across)
        rule = f"must divide config.mesh.{c.mesh.across}={across}, the axis across them (nearest: {nearest})"
        problems.append(Problem("mesh.slices", c.mesh.slices, rule))
    if not bad & MODEL_SIZES:
        problems += model_on_mesh(c, sizes, devices)
    if not bad & BATCH_SIZES:
        problems += batch_on_mesh(c, sizes)
    return problems


def axes(c: ConfigDict) -> Iterator[Problem]:
    free = []
    for axis in MESH_AXES:
        size = c.mesh[axis]
        if size < -1:
            rule = (
                "must be at least 1, -1 for all devices that are left, or 0 (1, or the strategy's)"
            )
            yield Problem(f"mesh.{axis}", size, rule)
        if size == -1:
            free.append(axis)
    if len(free) > 1:
        yield Problem("mesh", None, f"only one axis may be -1, not {' and '.join(free)}")


def in_words(sizes: dict[str, int]) -> str:
    """data=2 x tensor=4"""
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


def misfit(c: ConfigDict, sizes: dict[str, int], devices: int) -> Problem:
    """What is wrong with these sizes, and the two nearest meshes of these axes (and data) that are right."""
    given = {axis: size for axis, size in sizes.items() if size > 1}
    divided = {"tensor": c.model.num_heads, "expert": c.model.num_experts or 1}  # by these axes
    names = list(dict.fromkeys(["data", *given]))
    choices = []
    for axis in names:
        allowed = divided.get(axis, devices)
        choices.append([n for n in divisors_of(devices) if allowed % n == 0])
    meshes = []
    for numbers in itertools.product(*choices):
        if math.prod(numbers) == devices:
            other = dict(zip(names, numbers))
            meshes.append((change(given, other), in_words(other)))
    nearest = " or ".join(text or "data=1" for _, text in sorted(meshes)[:2])
    rule = "be"
    if -1 in sizes.values():
        rule = "divide"
    (first, size), *others = given.items() or [("data", 1)]
    value = " x ".join([str(size), *(f"config.mesh.{axis}={n}" for axis, n in others)])
    return Problem(
        f"mesh.{first}",
        value,
        f"{fixed_devices(sizes)} of {devices} devices; the product must {rule} {devices} (nearest: {nearest})",
    )


def change(given: dict[str, int], other: dict[str, int]) -> float:
    """How far another mesh is from the given sizes: the sum of the logarithms of their ratios."""
    return sum(abs(math.log(other[axis] / size)) for axis, size in given.items())


def model_on_mesh(c: ConfigDict, sizes: dict[str, int], devices: int | None) -> Iterator[Problem]:
    m = c.model

    def nearest(size: int, number: int) -> str:
        """Divisors of the number that divide the devices too."""
        return nearest_divisors(size, math.gcd(number, devices or number))

    tensor = sizes["tensor"]
    if m.name in ATTENDING and m.num_heads > 0 and m.num_heads % tensor:
        near = nearest(tensor, m.num_heads)
        rule = f"must divide config.model.num_heads={m.num_heads} (nearest: {near})"
        yield Problem("mesh.tensor", tensor, rule)
    expert = sizes["expert"]
    if expert > 1 and m.num_experts % expert:
        near = nearest(expert, m.num_experts)
        rule = f"must divide config.model.num_experts={m.num_experts} (nearest: {near})"
        yield Problem("mesh.expert", expert, rule)
    elif expert > 1 and not m.num_experts:
        rule = "the model has no experts; set config.model.num_experts, or 1"
        yield Problem("mesh.expert", expert, rule)
    ring = sizes["sequence"] > 1 and m.context_parallel == "ring"
    if ring and not capabilities(m.attention).ring:
        yield Problem(
            "model.attention",
            m.attention,
            f"the ring over config.mesh.sequence={sizes['sequence']} has its own kernel; set auto, or "
            "config.model.context_parallel=all_gather",
        )
    stage = sizes["stage"]
    if stage > 1 and not m.scan:
        yield Problem("mesh.stage", stage, "needs config.model.scan=True")
        return
    rounds = max(m.pipeline_rounds, 1)
    parts = stage * rounds
    layers = m.num_layers // max(len(m.layers), 1)
    if stage > 1 and (m.num_layers % len(m.layers) or layers % parts):
        multiple = parts * len(m.layers)
        yield Problem(
            "mesh.stage",
            stage,
            f"with config.model.pipeline_rounds={m.pipeline_rounds} the layers are cut into {parts} parts; "
            f"config.model.num_layers={m.num_layers} must be a multiple of {multiple} "
            f"({nearest_multiples(m.num_layers, multiple)}), or mesh.stage divide it "
            f"(nearest: {nearest(stage, max(layers // rounds, 1))})",
        )


def batch_on_mesh(c: ConfigDict, sizes: dict[str, int]) -> Iterator[Problem]:
    t = c.train
    accumulation = max(t.grad_accumulation, 1)
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    if t.batch_size % (shards * accumulation):
        nearest = nearest_multiples(t.batch_size, shards * accumulation)
        product = "mesh.data x mesh.fsdp x mesh.expert x grad_accumulation"
        rule = f"must be a multiple of {product} = {shards * accumulation} ({nearest})"
        yield Problem("train.batch_size", t.batch_size, rule)
    elif sizes["stage"] > 1:
        yield from rows_on_stages(c.model, t.batch_size // accumulation // shards, sizes["stage"])
    rule = "mesh.tensor"
    parts = sizes["tensor"]
    if sizes["sequence"] > 1:
        rule = "2 x mesh.sequence x mesh.tensor"
        parts = 2 * sizes["sequence"] * sizes["tensor"]
    if c.data.seq_len > 0 and c.data.seq_len % parts:
        nearest = nearest_multiples(c.data.seq_len, parts)
        yield Problem(
            "data.seq_len", c.data.seq_len, f"must be a multiple of {rule} = {parts} ({nearest})"
        )


def rows_on_stages(m: ConfigDict, rows: int, stages: int) -> Iterator[Problem]:
    """m: the model section. rows: of a microbatch on each device."""
    parts = pipeline_microbatches(m, rows, stages)
    if rows % parts:
        rule = (
            f"must divide the {rows} rows of each device (nearest: {nearest_divisors(parts, rows)})"
        )
        yield Problem("model.pipeline_microbatches", parts, rule)
    elif m.pipeline_rounds > 1 and parts < stages:
        yield Problem(
            "model.pipeline_rounds",
            m.pipeline_rounds,
            f"needs at least mesh.stage={stages} microbatches, not {parts}; each device has {rows} rows: raise "
            "train.batch_size, or lower grad_accumulation",
        )
