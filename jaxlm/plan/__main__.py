"""python -m jaxlm.plan --config=FILE.py[:ARG] --topology=v5p:4x4x4 [--slices=N] [--json=FILE] [--save_hlo=FILE]

Compiles the train step of a config, the very one that jaxlm.train runs, for a pod that is not here, with that pod's own
compiler, and prints whether it fits, what it computes and sends, how long a step should take, and what to change.
--topology=local compiles it for the devices that are here, runs it, and prints what was measured beside the prediction.
"""

import json
import math
import re
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.check import check, require
from jaxlm.config.recipe import load, override, resolve
from jaxlm.errors import ConfigError, UserError
from jaxlm.kernels.blockwise import BLOCK
from jaxlm.parallel.chips import CHIPS
from jaxlm.parallel.mesh import make_mesh
from jaxlm.plan import topology
from jaxlm.plan.flops import matmul_flops
from jaxlm.plan.hlo import count, largest_factor, traffic
from jaxlm.plan.measure import measure
from jaxlm.plan.page import Plan, duration, figures, fits, page, tokens_per_step
from jaxlm.plan.search import changed, faster, remedies, search
from jaxlm.plan.step_time import step_times
from jaxlm.plan.topology import Topology
from jaxlm.run.process import manage_memory, quick_random_numbers
from jaxlm.run.warm_start import inherit, look_at_data, not_told
from jaxlm.step import costs
from jaxlm.step.costs import human
from jaxlm.step.state import (
    abstract_inputs,
    abstract_state,
    check_sharding,
    jit_train_step,
    state_shardings,
)

STATE = {"parameters": "params", "optimizer": "opt_state", "EMA": "ema"}


def make_plan(config: ConfigDict, pod: Topology) -> Plan:
    """config: resolved, for as many devices as the pod has. Raises ConfigError where the mesh leaves too much whole."""
    began = time.perf_counter()
    mesh = make_mesh(config, pod.devices)
    check_sharding(config, mesh)
    with (
        jax.set_mesh(mesh),
        jax.default_device(pod.devices[0]),
    ):  # of which kernels ask what it can do
        traced = jit_train_step(config, mesh).trace(*abstract_inputs(config, mesh))
        flops = {
            "model": float(
                costs.flops_per_token(config, abstract_state(config)[0].params)
                * tokens_per_step(config)
            ),
            "executed": matmul_flops(traced.jaxpr, visited(config)),
            "kernels": matmul_flops(traced.jaxpr, visited(config), "kernels"),
        }
        if config.model.quantize != "none":
            narrow = matmul_flops(traced.jaxpr, 1.0, "8 bits")
        else:
            narrow = 0.0
        if config.model.remat != "none":
            flops["recomputed"] = flops["executed"] - kept_flops(config, mesh)
        else:
            flops["recomputed"] = 0.0
        memory = state_memory(config, mesh) | {"available": pod.memory}
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            memory["needed"] = max(
                needed_by(str(error)), pod.memory + 1
            )  # told in three digits; it did not fit
            memory["gradients and activations"] = memory["needed"] - sum(
                memory[kind] for kind in STATE
            )
            return Plan(config, pod, memory, flops, None, None, time.perf_counter() - began, None)
    text = compiled.as_text()
    found = compiled.memory_analysis()
    memory["batch"] = found.argument_size_in_bytes - sum(memory[kind] for kind in STATE)
    memory["gradients and activations"] = found.temp_size_in_bytes
    memory["code"] = found.generated_code_size_in_bytes
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    whole = found.argument_size_in_bytes + found.temp_size_in_bytes + kept
    peak = (
        found.peak_memory_in_bytes if pod.spec.dims else 0
    )  # TPUs: some temporaries lie where arguments were
    if (
        pod.chip == "cpu"
    ):  # there a product's factors are packed into blocks, which the compiler does not tell of
        memory["packed factors"] = largest_factor(text)
    memory["needed"] = min(peak or whole, whole) + memory["code"] + memory.get("packed factors", 0)
    program = count(text, mesh, pod.slices, config.mesh.across)
    devices = len(pod.devices)
    if not (pod.spec.dims or pod.estimate) and pod.spec.flops:
        program = program._replace(traffic=traffic(text))
    each = (
        (flops["executed"] - narrow / 2) / devices,
        flops["kernels"] / devices,
    )  # 8 bits: at twice the rate
    if pod.spec.flops:
        times = step_times(program, *each, mesh, pod)
    else:
        times = None
    return Plan(config, pod, memory, flops, program, times, time.perf_counter() - began, compiled)


def kept_flops(config: ConfigDict, mesh) -> float:
    """What the step would compute if the backward pass found all that it needs."""
    keeps = config.copy_and_resolve_references()
    keeps.model.remat = "none"
    traced = jit_train_step(keeps, mesh).trace(*abstract_inputs(keeps, mesh))
    return matmul_flops(traced.jaxpr, visited(config))


def visited(config: ConfigDict) -> float:
    """Part of the blocks of attention that some query of the block sees, over the pattern of layers."""
    m = config.model
    T = config.data.seq_len
    n = -(-T // BLOCK)

    def seen(window):
        return sum(min(i + 1, -(-window // BLOCK) + 1) for i in range(n)) / n**2

    return sum(seen(costs.reach(config)[kind]) for kind in m.layers) / len(m.layers)


def state_memory(config: ConfigDict, mesh) -> dict[str, int]:
    """Bytes on a device, by arithmetic."""
    (shapes, _), places = abstract_state(config), state_shardings(config, mesh)

    def of(name):
        return costs.bytes_per_device(getattr(shapes, name), getattr(places, name))

    return {kind: of(name) for kind, name in STATE.items()}


def needed_by(error: str) -> int:
    """Bytes that the compiler says it would need. Raises UserError where it refused for another reason."""
    patterns = (
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
        r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds",
    )
    found = []
    for match in (re.search(pattern, error) for pattern in patterns):
        if match:
            found.append(match)
    if not found:
        raise UserError(f"the compiler refused this step: {error[:2000]}")
    return int(float(found[0][1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[0][2]])


# ---------------------------------------------------------------- what to change


def advise(config: ConfigDict, plan: Plan, count: int = 2) -> list[dict]:
    """Compiles what should make a step fit until `count` do, printing each with its effect. config: unresolved."""
    rows = []
    print("\nwhat would fit, each compiled:")
    for overrides in remedies(config, plan.topology, plan.memory["needed"]):
        rows.append(
            row_of(overrides, make_plan(resolve(changed(config, overrides)), plan.topology))
        )
        print(line_of(rows[-1]), flush=True)
        if sum(row["fits"] for row in rows) == count:
            break
    if not any(row["fits"] for row in rows):
        print("nothing of this: more chips are needed, or a smaller model")
    return rows


def suggest(config: ConfigDict, pod: Topology) -> list[dict]:
    """What arithmetic finds faster. config: unresolved."""
    rows = [{"overrides": row[0], "saves": row[1], "needs": row[2]} for row in faster(config, pod)]
    if rows:
        print("\nfaster, by arithmetic alone (--search=3 compiles the likeliest of all):")
    for row in rows:
        print(
            f"            {-row['saves']:.0%} time, about {human(row['needs'])}  {flags_of(row['overrides'])}"
        )
    return rows


def flags_of(overrides: dict) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def frontier(config: ConfigDict, plan: Plan, count: int) -> list[dict]:
    """The compiled options and `plan`, the fastest first; * where none is both faster and smaller."""
    found = search(config, plan.topology, lambda config: make_plan(config, plan.topology), count)
    rows = [row_of({}, plan), *(row_of(*one) for one in found)]
    rows.sort(key=lambda row: row.get("step", math.inf))
    smallest = math.inf
    print(
        f"\nof all tensor sizes, remat and microbatches the {count} that arithmetic prefers, compiled (* frontier):"
    )
    for row in rows:
        row["frontier"] = row["fits"] and row["needed"] < smallest
        smallest = min(smallest, row["needed"]) if row["fits"] else smallest
        print(line_of(row))
    return rows


def row_of(overrides: dict, plan: Plan) -> dict:
    row = {"overrides": overrides, "fits": fits(plan), "needed": plan.memory["needed"]}
    if plan.times is None:
        return row
    found = figures(plan)
    return row | {"step": found["time"]["step"], "mfu": found["mfu"]}


def line_of(row: dict) -> str:
    if "step" in row:
        speed = f"{duration(row['step']):>10}, MFU {row['mfu']:5.1%}"
    else:
        speed = " " * 20
    verdict = "fits" if row["fits"] else "doesn't fit"
    star = "*" if row.get("frontier") else " "
    flags = flags_of(row["overrides"]) or "(as given)"
    return f"{star} {verdict:11}  {human(row['needed']):>11} {speed}  {flags}"


# ---------------------------------------------------------------- the program


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="jaxlm.plan", description=__doc__)
    parser.add_config()
    parser.add_argument(
        "--topology", required=True, help="v5p:4x4x4, v5p-128, v5e:16x16, h100:1x8x8, local"
    )
    parser.add_argument(
        "--slices", type=int, help="this many of them, joined by the slower network"
    )
    parser.add_argument(
        "--price_per_chip_hour", type=float, default=0.0, help="then the run's cost is printed too"
    )
    parser.add_argument(
        "--search", type=int, default=0, metavar="N", help="compile the N likeliest others too"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "--save_hlo", metavar="FILE", help="write the compiled program there, as text"
    )
    args = parser.parse(argv)
    for flag in ("json", "save_hlo"):
        cli.require_writable(f"--{flag}", getattr(args, flag))
    config = load(args.config)
    problems = override(config, args.overrides)
    if args.topology == "local":
        manage_memory()  # as in a run
        quick_random_numbers()
    pod = find(args.topology, config.mesh.slices if args.slices is None else args.slices)
    if config.mesh.slices not in (1, pod.slices):
        problems.append(
            f"config.mesh.slices={config.mesh.slices}: --topology and --slices give {pod.slices}"
        )
    config.mesh.slices = pod.slices
    if args.search < 0 or (args.search and not pod.spec.flops):
        problems.append(
            f"--search={args.search}: of a chip with a data sheet, how many options to compile"
        )
    problems += inherit(config)
    vocab_size, _, data_problem = look_at_data(config)
    problems += not_told(config, vocab_size, data_problem)
    require(problems + check(config, len(pod.devices), vocab_size))
    config.model.vocab_size = config.model.vocab_size or vocab_size
    plan = make_plan(resolve(config), pod)
    here = args.topology == "local" and fits(plan)
    if here:
        measured = measure(plan.config, make_mesh(plan.config, pod.devices), plan.compiled)
    else:
        measured = None
    found = figures(plan, args.price_per_chip_hour, measured)
    print(page(plan, found), flush=True)
    if args.save_hlo and plan.compiled:
        Path(args.save_hlo).write_text(plan.compiled.as_text())

    def write():
        if args.json:
            return Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
        return None

    write()
    if not found["fits"]:
        found["remedies"] = advise(config, plan)
    elif pod.spec.flops and not args.search:
        found["faster"] = suggest(config, pod)
    if args.search:
        found["search"] = frontier(config, plan, args.search)
    write()
    if found["fits"]:
        return 0
    return 1


def find(text: str, slices: int) -> Topology:
    if slices < 1:
        raise ConfigError(f"--slices={slices}: must be at least 1")
    if text == "local":
        if slices > 1:
            raise ConfigError(f"--slices={slices}: the devices that are here are what they are")
        return topology.local()
    chip, shape = topology.parse(text)
    topology.prepare_environment(1 if CHIPS[chip].dims else slices * math.prod(shape))
    return topology.describe(text, slices)


if __name__ == "__main__":
    cli.run(main)
