"""The train step of a config, compiled for a pod: its memory, FLOPs, collectives and time."""

import re
import time

import jax
from ml_collections import ConfigDict

from jaxlm.errors import UserError
from jaxlm.kernels.blockwise import BLOCK
from jaxlm.parallel.mesh import make_mesh
from jaxlm.plan.flops import matmul_flops
from jaxlm.plan.hlo import Program, count, largest_factor, traffic
from jaxlm.plan.page import Plan, tokens_per_step
from jaxlm.plan.step_time import Times, step_times
from jaxlm.plan.topology import Topology
from jaxlm.step import costs
from jaxlm.step.state import (
    abstract_inputs,
    abstract_state,
    check_sharding,
    jit_train_step,
    state_shardings,
)

STATE = {"parameters": "params", "optimizer": "opt_state", "EMA": "ema"}
# What XLA's compilers say of a program that does not fit: a number and its unit.
NEEDED = (
    r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
    r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds",
)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_plan(config: ConfigDict, pod: Topology) -> Plan:
    """Compiles the step. config: resolved, for as many devices as the pod has.

    Raises ConfigError where the mesh leaves too many parameters unsharded, and UserError where the compiler refuses the
    step for another reason than its memory.
    """
    began = time.perf_counter()
    mesh = make_mesh(config, pod.devices)
    check_sharding(config, mesh)
    # Kernels ask the default device what it can do.
    with jax.set_mesh(mesh), jax.default_device(pod.devices[0]):
        traced = jit_train_step(config, mesh).trace(*abstract_inputs(config, mesh))
        flops = step_flops(config, mesh, traced.jaxpr)
        narrow = 0.0
        if config.model.quantize != "none":
            narrow = matmul_flops(traced.jaxpr, only="8 bits")
        memory = state_memory(config, mesh) | {"available": pod.memory}
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            memory |= refused_memory(memory, str(error))
            took = time.perf_counter() - began
            return Plan(config, pod, memory, flops, None, None, took, None)
    text = compiled.as_text()
    memory |= compiled_memory(compiled, memory, text, pod)
    program = count(text, mesh, pod.slices, config.mesh.across)
    is_gpu = not (pod.spec.dims or pod.estimate) and pod.spec.flops
    if is_gpu:
        program = program._replace(traffic=traffic(text))
    times = predict_times(program, flops, narrow, mesh, pod)
    took = time.perf_counter() - began
    return Plan(config, pod, memory, flops, program, times, took, compiled)


def step_flops(config: ConfigDict, mesh, jaxpr) -> dict[str, float]:
    """FLOPs of a step on all devices: the model's, and those that are executed, in kernels and again."""
    share = attended_share(config)
    per_token = costs.flops_per_token(config, abstract_state(config)[0].params)
    flops = {
        "model": float(per_token * tokens_per_step(config)),
        "executed": matmul_flops(jaxpr, share),
        "kernels": matmul_flops(jaxpr, share, "kernels"),
        "recomputed": 0.0,
    }
    if config.model.remat != "none":
        flops["recomputed"] = flops["executed"] - flops_without_remat(config, mesh)
    return flops


def flops_without_remat(config: ConfigDict, mesh) -> float:
    """What the step would compute if the backward pass found all that it needs."""
    config = config.copy_and_resolve_references()
    config.model.remat = "none"
    traced = jit_train_step(config, mesh).trace(*abstract_inputs(config, mesh))
    return matmul_flops(traced.jaxpr, attended_share(config))


def attended_share(config: ConfigDict) -> float:
    """Part of attention's blocks of which some query sees something, the mean over the layers."""
    layers = config.model.layers
    reach = costs.reach(config)
    blocks = -(-config.data.seq_len // BLOCK)
    total = 0.0
    for kind in layers:
        window = -(-reach[kind] // BLOCK) + 1
        total += sum(min(i + 1, window) for i in range(blocks)) / blocks**2
    return total / len(layers)


def state_memory(config: ConfigDict, mesh) -> dict[str, int]:
    """Bytes of the state on a device, by arithmetic."""
    shapes, _ = abstract_state(config)
    places = state_shardings(config, mesh)
    memory = {}
    for kind, name in STATE.items():
        memory[kind] = costs.bytes_per_device(getattr(shapes, name), getattr(places, name))
    return memory


def state_total(memory: dict[str, int]) -> int:
    return sum(memory[kind] for kind in STATE)


def compiled_memory(
    compiled: jax.stages.Compiled, memory: dict[str, int], text: str, pod: Topology
) -> dict[str, int]:
    """What the compiler has laid out, in bytes on a device. memory: of the state. text: the program's HLO."""
    found = compiled.memory_analysis()
    arguments = found.argument_size_in_bytes
    temporary = found.temp_size_in_bytes
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    parts = {
        "batch": arguments - state_total(memory),
        "gradients and activations": temporary,
        "code": found.generated_code_size_in_bytes,
    }
    needed = arguments + temporary + outputs
    if (
        pod.spec.dims and found.peak_memory_in_bytes
    ):  # TPUs put some temporaries where arguments were
        needed = min(found.peak_memory_in_bytes, needed)
    needed += parts["code"]
    if (
        pod.chip == "cpu"
    ):  # packs the factors of a product into blocks, which the analysis leaves out
        parts["packed factors"] = largest_factor(text)
        needed += parts["packed factors"]
    return parts | {"needed": needed}


def refused_memory(memory: dict[str, int], error: str) -> dict[str, int]:
    """Bytes on a device of a step that did not fit. Raises UserError where that was not the compiler's reason.

    The compiler gives three digits, which may be rounded down to what is available.
    """
    needed = max(needed_bytes(error), memory["available"] + 1)
    return {"needed": needed, "gradients and activations": needed - state_total(memory)}


def needed_bytes(error: str) -> int:
    """Bytes that the compiler says it would need. Raises UserError where it refused for another reason."""
    for pattern in NEEDED:
        match = re.search(pattern, error)
        if match:
            return int(float(match[1]) * UNITS[match[2]])
    raise UserError(f"the compiler refused this step: {error[:2000]}")


def predict_times(
    program: Program, flops: dict[str, float], narrow: float, mesh, pod: Topology
) -> Times | None:
    """None for a chip without a data sheet. narrow: FLOPs of products of 8 bits, which run at twice the rate."""
    if not pod.spec.flops:
        return None
    devices = len(pod.devices)
    each = (flops["executed"] - narrow / 2) / devices
    return step_times(program, each, flops["kernels"] / devices, mesh, pod)
