"""Which meshes fit a config and its devices, and the nearest ones that do. No jax."""

import itertools
import math

from ml_collections import ConfigDict

from jaxlm.config.attention_kernels import capabilities
from jaxlm.config.keys import ATTENDING, MESH_AXES
from jaxlm.config.recipe import mesh_sizes, pipeline_microbatches


def nearest_multiples(value: int, factor: int) -> str:
    low = value // factor * factor
    if low:
        return f"nearest: {low} or {low + factor}"
    return f"nearest: {factor}"


def nearest_divisors(value: int, of: int) -> str:
    divisors = [d for d in range(1, of + 1) if of % d == 0]
    return " or ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(d - value))[:2]))


def fits(sizes: dict[str, int], devices: int) -> bool:
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values():
        return devices % fixed == 0
    return devices == fixed


def mesh(c: ConfigDict, devices: int | None, bad: set[str]) -> list[str]:
    """bad: keys whose values are no numbers to count with."""
    given = {axis: c.mesh[axis] for axis in MESH_AXES}
    problems = [
        f"config.mesh.{axis}={n}: must be at least 1, -1 for all devices that are left, or 0 (1, or the strategy's)"
        for axis, n in given.items()
        if n < -1
    ]
    free = [axis for axis, n in given.items() if n == -1]
    if len(free) > 1:
        problems.append(f"config.mesh: only one axis may be -1, not {' and '.join(free)}")
    if problems or c.mesh.slices < 1:
        return problems
    sizes = mesh_sizes(c)
    if devices is not None and not fits(sizes, devices):
        problems.append(misfit(c, sizes, devices))
        sizes = {
            axis: n if devices % n == 0 else 1 for axis, n in sizes.items()
        }  # the rest of what is wrong
    free = [axis for axis, n in sizes.items() if n == -1]
    fixed = math.prod(n for n in sizes.values() if n != -1)
    for axis in free:  # as many as are left, or nothing more is known
        sizes[axis] = max((devices or fixed) // fixed, 1)
    across = sizes.get(c.mesh.across, 1)
    if across % c.mesh.slices:
        problems.append(
            f"config.mesh.slices={c.mesh.slices}: must divide config.mesh.{c.mesh.across}={across}, the axis across "
            f"them (nearest: {nearest_divisors(c.mesh.slices, across)})"
        )
    if not bad & {
        "model.num_heads",
        "model.num_experts",
        "model.num_layers",
        "model.layers",
        "model.pipeline_rounds",
    }:
        problems += model_on_mesh(c, sizes, devices)
    if not bad & {
        "train.batch_size",
        "train.grad_accumulation",
        "data.seq_len",
        "model.pipeline_microbatches",
    }:
        problems += batch_on_mesh(c, sizes)
    return problems


def misfit(c: ConfigDict, sizes: dict[str, int], devices: int) -> str:
    """What is wrong with these sizes, and the two nearest meshes of these axes (and data) that are right."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    of = {
        "tensor": c.model.num_heads,
        "expert": c.model.num_experts or 1,
    }  # what an axis must divide besides
    given = {axis: n for axis, n in sizes.items() if n > 1}
    axes = list(dict.fromkeys(["data", *given]))
    meshes = []
    for numbers in itertools.product(
        *([n for n in divisors if of.get(axis, n) % n == 0] for axis in axes)
    ):
        if math.prod(numbers) == devices:
            changes = (
                abs(math.log(n / given[axis])) for axis, n in zip(axes, numbers) if axis in given
            )
            meshes.append(
                (sum(changes), " x ".join(f"{axis}={n}" for axis, n in zip(axes, numbers) if n > 1))
            )
    nearest = " or ".join(text or "data=1" for _, text in sorted(meshes)[:2])
    fixed = math.prod(n for n in sizes.values() if n != -1)
    rule = "divide" if -1 in sizes.values() else "be"
    named = (
        " x ".join(f"config.mesh.{axis}={n}" for axis, n in given.items()) or "config.mesh.data=1"
    )
    return f"{named}: {fixed} of {devices} devices; the product must {rule} {devices} (nearest: {nearest})"


def model_on_mesh(c: ConfigDict, sizes: dict[str, int], devices: int | None) -> list[str]:
    m = c.model
    problems = []

    # a size that divides this divides the devices too
    def both(size):
        return math.gcd(size, devices or size)

    tensor = sizes["tensor"]
    expert = sizes["expert"]
    stage = sizes["stage"]
    if m.name in ATTENDING and m.num_heads > 0 and m.num_heads % tensor:
        problems.append(
            f"config.mesh.tensor={tensor}: must divide config.model.num_heads={m.num_heads} "
            f"(nearest: {nearest_divisors(tensor, both(m.num_heads))})"
        )
    if expert > 1 and m.num_experts % expert:
        problems.append(
            f"config.mesh.expert={expert}: must divide config.model.num_experts={m.num_experts} "
            f"(nearest: {nearest_divisors(expert, both(m.num_experts))})"
        )
    elif expert > 1 and not m.num_experts:
        problems.append(
            f"config.mesh.expert={expert}: the model has no experts; set config.model.num_experts, or 1"
        )
    if (
        sizes["sequence"] > 1
        and m.context_parallel == "ring"
        and not capabilities(m.attention).ring
    ):
        problems.append(
            f"config.model.attention={m.attention}: the ring over config.mesh.sequence={sizes['sequence']} has its own "
            "kernel; set auto, or config.model.context_parallel=all_gather"
        )
    parts = stage * max(m.pipeline_rounds, 1)
    layers = m.num_layers // max(len(m.layers), 1)
    if stage > 1 and not m.scan:
        problems.append(f"config.mesh.stage={stage}: needs config.model.scan=True")
    elif stage > 1 and (m.num_layers % len(m.layers) or layers % parts):
        problems.append(
            f"config.mesh.stage={stage}: with config.model.pipeline_rounds={m.pipeline_rounds} the layers are cut into "
            f"{parts} parts; config.model.num_layers={m.num_layers} must be a multiple of "
            f"{parts * len(m.layers)} ({nearest_multiples(m.num_layers, parts * len(m.layers))}), or mesh.stage divide "
            f"it (nearest: {nearest_divisors(stage, both(max(layers // max(m.pipeline_rounds, 1), 1)))})"
        )
    return problems


def batch_on_mesh(c: ConfigDict, sizes: dict[str, int]) -> list[str]:
    m = c.model
    t = c.train
    problems = []
    accumulation = max(t.grad_accumulation, 1)
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    product = "mesh.data x mesh.fsdp x mesh.expert x grad_accumulation"
    if t.batch_size % (shards * accumulation):
        problems.append(
            f"config.train.batch_size={t.batch_size}: must be a multiple of {product} = {shards * accumulation} "
            f"({nearest_multiples(t.batch_size, shards * accumulation)})"
        )
    elif sizes["stage"] > 1:
        rows = t.batch_size // accumulation // shards
        stages = sizes["stage"]
        parts = pipeline_microbatches(m, rows, stages)
        if rows % parts:
            problems.append(
                f"config.model.pipeline_microbatches={parts}: must divide the {rows} rows of each device "
                f"(nearest: {nearest_divisors(parts, rows)})"
            )
        elif m.pipeline_rounds > 1 and parts < stages:
            problems.append(
                f"config.model.pipeline_rounds={m.pipeline_rounds}: needs at least mesh.stage={stages} microbatches, "
                f"not {parts}; each device has {rows} rows: raise train.batch_size, or lower grad_accumulation"
            )
    parts = sizes["tensor"] * sizes["sequence"] * (2 if sizes["sequence"] > 1 else 1)
    if c.data.seq_len > 0 and c.data.seq_len % parts:
        if sizes["sequence"] > 1:
            rule = "2 x mesh.sequence x mesh.tensor"
        else:
            rule = "mesh.tensor"
        problems.append(
            f"config.data.seq_len={c.data.seq_len}: must be a multiple of {rule} = {parts} "
            f"({nearest_multiples(c.data.seq_len, parts)})"
        )
    return problems
