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
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from jaxlm import cli, costs, topology
from jaxlm.check import check, require
from jaxlm.config import load, override, resolve
from jaxlm.costs import human
from jaxlm.count import Program, count, matmul_flops
from jaxlm.errors import ConfigError, UserError
from jaxlm.kernels.attention import BLOCK
from jaxlm.measure import STEPS, WARM_UP, Measured, measure
from jaxlm.parallel.mesh import make_mesh
from jaxlm.predict import Times, network_of, step_times
from jaxlm.search import changed, faster, remedies, search
from jaxlm.state import abstract_inputs, abstract_state, check_sharding, jit_train_step, state_shardings
from jaxlm.topology import Topology


class Plan(NamedTuple):
    config: ConfigDict  # resolved
    topology: Topology
    memory: dict[str, int]  # bytes on a device by kind; `needed` of `available`
    flops: dict[str, float]  # of a step, on all devices
    program: Program | None  # None where it does not fit
    times: Times | None  # nor where the chip is not known
    seconds: float  # that compiling took
    compiled: jax.stages.Compiled | None


def make_plan(config: ConfigDict, pod: Topology) -> Plan:
    """config: resolved, for as many devices as the pod has. Raises ConfigError where the mesh leaves too much whole."""
    began, mesh = time.perf_counter(), make_mesh(config, pod.devices)
    check_sharding(config, mesh)
    with jax.set_mesh(mesh), jax.default_device(pod.devices[0]):  # of which kernels ask what it can do
        traced = jit_train_step(config, mesh).trace(*abstract_inputs(config, mesh))
        flops = {
            "model": float(costs.flops_per_token(config, abstract_state(config)[0].params) * tokens_per_step(config)),
            "executed": matmul_flops(traced.jaxpr, visited(config)),
            "kernels": matmul_flops(traced.jaxpr, visited(config), kernels_only=True),
        }
        memory = state_memory(config, mesh) | {"available": pod.spec.memory}
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            memory["needed"] = needed_by(str(error))
            return Plan(config, pod, memory, flops, None, None, time.perf_counter() - began, None)
    text, found = compiled.as_text(), compiled.memory_analysis()
    memory["batch"] = found.argument_size_in_bytes - sum(memory[kind] for kind in ("parameters", "optimizer", "EMA"))
    memory["gradients and activations"] = found.temp_size_in_bytes
    memory["code"] = found.generated_code_size_in_bytes
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    whole = found.argument_size_in_bytes + found.temp_size_in_bytes + kept
    peak = found.peak_memory_in_bytes if pod.spec.dims else 0  # TPUs: some temporaries lie where arguments were
    memory["needed"] = min(peak or whole, whole) + memory["code"]
    program, devices = count(text, mesh, pod.slices, config.mesh.across), len(pod.devices)
    each = flops["executed"] / devices, flops["kernels"] / devices
    times = step_times(program, *each, mesh, pod) if pod.spec.flops else None
    return Plan(config, pod, memory, flops, program, times, time.perf_counter() - began, compiled)


def tokens_per_step(config: ConfigDict) -> int:
    return config.train.batch_size * config.data.seq_len


def visited(config: ConfigDict) -> float:
    """Part of the blocks of attention that some query of the block sees, over the pattern of layers."""
    m, T = config.model, config.data.seq_len
    n = -(-T // BLOCK)
    reach = {"S": min(m.window, m.context_length, T), "L": min(m.context_length, T)}
    seen = lambda window: sum(min(i + 1, -(-window // BLOCK) + 1) for i in range(n)) / n**2
    return sum(map(seen, (reach[kind] for kind in m.layers))) / len(m.layers)


def state_memory(config: ConfigDict, mesh) -> dict[str, int]:
    """Bytes on a device, by arithmetic."""
    (shapes, _), places = abstract_state(config), state_shardings(config, mesh)
    trees = {"parameters": "params", "optimizer": "opt_state", "EMA": "ema"}
    of = lambda name: costs.bytes_per_device(getattr(shapes, name), getattr(places, name))
    return {kind: of(name) for kind, name in trees.items()}


def needed_by(error: str) -> int:
    """Bytes that the compiler says it would need. Raises UserError where it refused for another reason."""
    patterns = (
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
        r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds",
    )
    found = [match for match in (re.search(pattern, error) for pattern in patterns) if match]
    if not found:
        raise UserError(f"the compiler refused this step: {error[:2000]}")
    return int(float(found[0][1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[0][2]])


# ---------------------------------------------------------------- the page


def figures(plan: Plan, price: float = 0.0, measured: Measured | None = None) -> dict:
    """What --json writes: numbers in bytes, seconds and FLOPs; errors as predicted / measured - 1."""
    devices, times = len(plan.topology.devices), plan.times
    result = {
        "topology": plan.topology.name,
        "devices": devices,
        "estimate": plan.topology.estimate,
        "mesh": {axis: n for axis, n in make_mesh(plan.config, plan.topology.devices).shape.items() if n > 1},
        "fits": fits(plan),
        "memory": plan.memory,
        "flops": plan.flops,
        "compile_seconds": round(plan.seconds, 1),
    }
    if plan.program is None:
        return result
    result["collectives"] = collectives(plan)
    result["cycles"] = plan.program.cycles
    if measured:
        error = lambda predicted, found: predicted / found - 1 if predicted and found else None
        result["measured"] = {
            "step": measured.seconds, "step_error": error(times and times.expected, measured.seconds), "steps": STEPS,
            "memory": measured.memory, "memory_error": error(plan.memory["needed"], measured.memory),
        }  # fmt: skip
    if times is None:
        return result
    tokens, steps = tokens_per_step(plan.config), plan.config.train.steps
    days = times.expected * steps / 86400
    result["time"] = {
        "step": times.expected, "low": times.low, "high": times.high, "matrix": times.matrix, "work": times.work,
        "communication": sum(times.communication.values()), "exposed": times.exposed,
    }  # fmt: skip
    result["mfu"] = plan.flops["model"] / (times.expected * devices * plan.topology.spec.flops)
    result["tokens_per_second"] = tokens / times.expected
    result["days"] = days
    if price:
        result["cost"] = days * 24 * devices * price
    return result


MOVES = {"all-gather": "gather", "all-reduce": "sum", "reduce-scatter": "sum", "collective-permute": "permute"}


def fits(plan: Plan) -> bool:
    return plan.memory["needed"] <= plan.memory["available"]


def collectives(plan: Plan) -> list[dict]:
    """One row for each kind, axes and network: runs and bytes a device and step, beside the least of its strategy."""
    rows, mesh = {}, make_mesh(plan.config, plan.topology.devices)
    least = costs.least_traffic(plan.config, mesh)
    for one in plan.program.collectives:
        network = network_of(one.axes, mesh, plan.topology, one.inside).name
        empty = {"kind": one.kind, "axes": list(one.axes), "network": network, "count": 0, "bytes": 0}
        row = rows.setdefault((one.kind, one.axes, network), empty)
        row["count"] += one.times
        row["bytes"] += one.times * one.bytes
    ordered = sorted(rows.values(), key=lambda row: -row["bytes"])
    for row in ordered:  # the first of its sort: a sum may be one all-reduce, or a reduce-scatter
        what = (MOVES.get(row["kind"]), tuple(row["axes"]))
        row["least"] = least.pop(what, None)
    return ordered


def page(plan: Plan, found: dict) -> str:
    pod = plan.topology
    available, needed = plan.memory["available"], plan.memory["needed"]
    axes = " x ".join(f"{axis}={n}" for axis, n in found["mesh"].items()) or "one device"
    devices = f"{found['devices']:,} device{'s' if found['devices'] > 1 else ''}"
    lines = [f"{pod.name}: {devices} of {human(available)}, {axes}"]
    if pod.estimate:
        lines.append("AN ESTIMATE: compiled for CPUs; this chip's own compiler was not asked (README, plan)")
    verdict = "fits" if found["fits"] else "doesn't fit"
    room = f"{human(available - needed)} to spare" if found["fits"] else f"{human(needed - available)} too much"
    lines += ["", f"memory      {verdict}: needs {human(needed)} of {human(available)}, {room}"]
    kinds = ("parameters", "optimizer", "EMA", "batch", "gradients and activations", "code")
    lines += [f"            {kind:26}{human(plan.memory[kind]):>12}" for kind in kinds if plan.memory.get(kind)]
    if sum(plan.memory.get(kind, 0) for kind in kinds) > needed and found["fits"]:
        lines.append("            (some of these share memory)")
    model, executed = plan.flops["model"], plan.flops["executed"]
    lines += ["", f"work        {executed:.4g} FLOPs a step (the model's: {model:.4g})"]
    if plan.program is None:
        return "\n".join(lines)
    if found["collectives"]:
        lines += ["", "collectives a step and device (the least: what this strategy must move, by arithmetic)"]
    for row in found["collectives"]:
        along, least = "+".join(row["axes"]), f"  least {human(row['least'])}" if row["least"] else ""
        line = f"{row['kind']:20}{along:18}{row['count']:>7,} x{human(row['bytes']):>12} {row['network']}{least}"
        lines.append(" " * 12 + line)
    if plan.times:
        lines += ["", *time_lines(plan, found)]
    if "measured" in found:
        lines += ["", *measured_lines(plan, found["measured"])]
    return "\n".join([*lines, f"compiled in {plan.seconds:.0f} s"])


def time_lines(plan: Plan, found: dict) -> list[str]:
    t, days, train = plan.times, found["days"], plan.config.train
    return [
        f"time        {t.expected:.3f} s a step ({t.low:.3f} to {t.high:.3f}): MFU {found['mfu']:.1%}, "
        f"{found['tokens_per_second']:,.0f} tokens/s",
        f"            on the device {t.work:.3f} s, of which matrix units at their peak {t.matrix:.3f} s",
        f"            communication {found['time']['communication']:.3f} s, of which waited for {t.exposed:.3f} s",
        f"run         {tokens_per_step(plan.config) * train.steps:,} tokens in {train.steps:,} steps: "
        f"{days:,.1f} days" + (f", {found['cost']:,.0f} at the given price" if "cost" in found else ""),
    ]


def measured_lines(plan: Plan, found: dict) -> list[str]:
    chip, predicted, peak = plan.topology.chip, human(plan.memory["needed"]), found["memory"]
    step = f"measured    {found['step']:.4g} s a step, the mean of {STEPS} after {WARM_UP} to warm up; "
    if plan.times:
        step += f"predicted {plan.times.expected:.4g} s: error {found['step_error']:+.1%}"
    else:
        step += f"not predicted: there is no data sheet of {chip}"
    memory = f"{human(peak)} at its peak" if peak else f"not measured ({chip} does not tell)"
    error = f": error {found['memory_error']:+.1%}" if peak else ""
    return [step, f"            memory {memory}; predicted {predicted}{error}"]


# ---------------------------------------------------------------- what to change


def advise(config: ConfigDict, plan: Plan, count: int = 2) -> list[dict]:
    """Compiles what should make a step fit until `count` do, printing each with its effect. config: unresolved."""
    rows = []
    print("\nwhat would fit, each compiled:")
    for overrides in remedies(config, plan.topology, plan.memory["needed"]):
        rows.append(row_of(overrides, make_plan(resolve(changed(config, overrides)), plan.topology)))
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
        print(f"            {-row['saves']:.0%} time, about {human(row['needs'])}  {flags_of(row['overrides'])}")
    return rows


def flags_of(overrides: dict) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def frontier(config: ConfigDict, pod: Topology, count: int) -> list[dict]:
    """The compiled options, the fastest first; * where none is both faster and smaller."""
    rows = [row_of(*found) for found in search(config, pod, lambda config: make_plan(config, pod), count)]
    rows.sort(key=lambda row: row.get("step", math.inf))
    smallest = math.inf
    print(f"\nof all meshes, remat and microbatches the {count} that arithmetic prefers, compiled (* frontier):")
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
    speed = f"{row['step']:8.3f} s, MFU {row['mfu']:5.1%}" if "step" in row else " " * 20
    verdict = "fits" if row["fits"] else "doesn't fit"
    star, flags = "*" if row.get("frontier") else " ", flags_of(row["overrides"])
    return f"{star} {verdict:11}  {human(row['needed']):>11} {speed}  {flags}"


# ---------------------------------------------------------------- the program


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="jaxlm.plan", description=__doc__)
    parser.add_config()
    parser.add_argument("--topology", required=True, help="v5p:4x4x4, v5p-128, v5e:16x16, h100:1x8x8, local")
    parser.add_argument("--slices", type=int, default=1, help="this many of them, joined by the slower network")
    parser.add_argument("--price_per_chip_hour", type=float, default=0.0, help="then the run's cost is printed too")
    parser.add_argument("--search", type=int, default=0, metavar="N", help="compile the N likeliest others too")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--save_hlo", metavar="FILE", help="write the compiled program there, as text")
    args = parser.parse(argv)
    for flag in ("json", "save_hlo"):
        path = getattr(args, flag)
        if path and not Path(path).parent.is_dir():
            raise ConfigError(f"--{flag}={path}: there is no directory {Path(path).parent}")
    config = load(args.config)
    problems = override(config, args.overrides)
    pod = find(args.topology, args.slices)
    if args.search < 0 or (args.search and not pod.spec.flops):
        raise ConfigError(f"--search={args.search}: a number of options, for a chip with a data sheet, not {pod.chip}")
    if pod.slices > 1:
        config.mesh.slices = pod.slices
    require(problems + check(config, len(pod.devices)))
    plan = make_plan(resolve(config), pod)
    here = args.topology == "local" and fits(plan)
    measured = measure(plan.config, make_mesh(plan.config, pod.devices), plan.compiled) if here else None
    found = figures(plan, args.price_per_chip_hour, measured)
    print(page(plan, found))
    if not found["fits"]:
        found["remedies"] = advise(config, plan)
    elif pod.spec.flops and not args.search:
        found["faster"] = suggest(config, pod)
    if args.search:
        found["search"] = frontier(config, pod, args.search)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    if args.save_hlo:
        Path(args.save_hlo).write_text(plan.compiled.as_text() if plan.compiled else "")
    return 0 if found["fits"] else 1


def find(text: str, slices: int) -> Topology:
    if slices < 1:
        raise ConfigError(f"--slices={slices}: must be at least 1")
    if text == "local":
        return topology.local()
    chip, shape = topology.parse(text)
    topology.prepare_environment(1 if topology.CHIPS[chip].dims else slices * math.prod(shape))
    return topology.describe(text, slices)


if __name__ == "__main__":
    cli.run(main)
