"""What a plan holds, and how it reads: the figures of --json, and the page."""

from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from jaxlm.parallel.mesh import make_mesh
from jaxlm.plan.hlo import Program
from jaxlm.plan.measure import STEPS, WARM_UP, Measured
from jaxlm.plan.step_time import Times, network_of, seconds
from jaxlm.plan.topology import GPU_CHANGES, Topology
from jaxlm.step import costs
from jaxlm.step.costs import human


class Plan(NamedTuple):
    config: ConfigDict  # resolved
    topology: Topology
    memory: dict[str, int]  # bytes on a device by kind; `needed` of `available`
    flops: dict[str, float]  # of a step, on all devices
    program: Program | None  # None where it does not fit
    times: Times | None  # nor where the chip is not known
    seconds: float  # that compiling took
    compiled: jax.stages.Compiled | None


def tokens_per_step(config: ConfigDict) -> int:
    return config.train.batch_size * config.data.seq_len


def figures(plan: Plan, price: float = 0.0, measured: Measured | None = None) -> dict:
    """What --json writes: numbers in bytes, seconds and FLOPs; errors as predicted / measured - 1."""
    devices = len(plan.topology.devices)
    times = plan.times
    result = {
        "topology": plan.topology.name,
        "devices": devices,
        "estimate": plan.topology.estimate,
        "mesh": {
            axis: n
            for axis, n in make_mesh(plan.config, plan.topology.devices).shape.items()
            if n > 1
        },
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

        def error(predicted, found):
            if predicted and found:
                return predicted / found - 1
            return None

        result["measured"] = {
            "step": measured.seconds, "step_error": error(times and times.expected, measured.seconds), "steps": STEPS,
            "memory": measured.memory, "memory_error": error(plan.memory["needed"], measured.memory),
        }  # fmt: skip
    if times is None:
        return result
    tokens = tokens_per_step(plan.config)
    steps = plan.config.train.steps
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


MOVES = {
    "all-gather": "gather",
    "all-reduce": "sum",
    "reduce-scatter": "sum",
    "collective-permute": "permute",
}


def fits(plan: Plan) -> bool:
    return plan.memory["needed"] <= plan.memory["available"]


def collectives(plan: Plan) -> list[dict]:
    """One row for each kind, axes and network: runs and bytes a device and step, beside the least of its strategy."""
    rows = {}
    mesh = make_mesh(plan.config, plan.topology.devices)
    least = costs.least_traffic(plan.config, mesh)
    for one in plan.program.collectives:
        network = network_of(one.axes, mesh, plan.topology, one.inside)
        named = {"kind": one.kind, "axes": list(one.axes), "network": network.name}
        row = rows.setdefault(
            (one.kind, one.axes, network.name), named | {"count": 0, "bytes": 0, "seconds": 0.0}
        )
        row["count"] += one.times
        row["bytes"] += one.times * one.bytes
        row["seconds"] += seconds(one, network)
    ordered = sorted(rows.values(), key=lambda row: -row["bytes"])
    moves = [(MOVES.get(row["kind"]), tuple(row["axes"])) for row in ordered]
    for row, move in zip(
        ordered, moves
    ):  # the first of its sort: sums may be all-reduces and reduce-scatters
        row["least"] = least.pop(move, None)
        row["shared"] = moves.count(move) > 1
    return ordered


def page(plan: Plan, found: dict) -> str:
    pod = plan.topology
    available = plan.memory["available"]
    needed = plan.memory["needed"]
    axes = " x ".join(f"{axis}={n}" for axis, n in found["mesh"].items()) or "one device"
    devices = f"{found['devices']:,} device{'s' if found['devices'] > 1 else ''}"
    lines = [f"{pod.name}: {devices} of {human(available)}, {axes}"]
    if pod.estimate:
        lines += [
            "AN ESTIMATE: compiled for CPUs, which send float32 for bfloat16, up to twice the bytes. XLA's compiler",
            f"for GPUs comes with pip install -e '.[cuda]', and knows {' and '.join(GPU_CHANGES)}",
        ]
    verdict = "fits" if found["fits"] else "doesn't fit"
    if found["fits"]:
        room = f"{human(available - needed)} to spare"
    else:
        room = f"{human(needed - available)} too much"
    lines += ["", f"memory      {verdict}: needs {human(needed)} of {human(available)}, {room}"]
    kinds = (
        "parameters",
        "optimizer",
        "EMA",
        "batch",
        "gradients and activations",
        "packed factors",
        "code",
    )
    lines += [
        f"            {kind:26}{human(plan.memory[kind]):>12}"
        for kind in kinds
        if plan.memory.get(kind)
    ]
    if sum(plan.memory.get(kind, 0) for kind in kinds) > needed and found["fits"]:
        lines.append("            (some of these share memory)")
    model = plan.flops["model"]
    executed = plan.flops["executed"]
    if plan.flops["recomputed"]:
        again = f"; recomputed: {plan.flops['recomputed'] / executed:.1%}"
    else:
        again = ""
    lines += ["", f"work        {executed:.4g} FLOPs a step (the model's: {model:.4g}{again})"]
    if plan.program is None:
        return "\n".join(lines)
    if found["collectives"]:
        lines += [
            "",
            "collectives a step and device: runs, bytes, time alone; the least that the strategy must move",
        ]
    for row in found["collectives"]:
        along = "+".join(row["axes"])
        least = f"  least {human(row['least'])}" if row["least"] else ""
        least += " of all sums" if least and row["shared"] else ""
        sent = f"{row['count']:>7,} x{human(row['bytes']):>12} {row['network']:6} {duration(row['seconds']):>9}"
        lines.append(f"            {row['kind']:20}{along:14}{sent}{least}")
    if plan.times:
        lines += ["", *time_lines(plan, found)]
    if "measured" in found:
        lines += ["", *measured_lines(plan, found["measured"])]
    return "\n".join([*lines, f"compiled in {plan.seconds:.0f} s"])


def time_lines(plan: Plan, found: dict) -> list[str]:
    t = plan.times
    days = found["days"]
    train = plan.config.train
    units = (("days", days, 2), ("hours", 24 * days, 1), ("minutes", 1440 * days, 0))
    length = next(f"{n:,.3g} {unit}" for unit, n, least in units if n >= least)
    return [
        f"time        {duration(t.expected)} a step ({duration(t.low)} to {duration(t.high)}): MFU {found['mfu']:.1%}, "
        f"{found['tokens_per_second']:,.0f} tokens/s",
        f"            on the device {duration(t.work)}, of which matrix units at their peak {duration(t.matrix)}",
        f"            communication {duration(found['time']['communication'])}, waited for {duration(t.exposed)}",
        f"run         {tokens_per_step(plan.config) * train.steps:,} tokens in {train.steps:,} steps: {length}"
        + (f", {found['cost']:,.2f} at the given price" if "cost" in found else ""),
    ]


def measured_lines(plan: Plan, found: dict) -> list[str]:
    chip = plan.topology.chip
    predicted = human(plan.memory["needed"])
    peak = found["memory"]
    step = f"measured    {found['step']:.4g} s a step, the mean of {STEPS} after {WARM_UP} to warm up; "
    if plan.times:
        step += f"predicted {plan.times.expected:.4g} s: error {found['step_error']:+.1%}"
    else:
        step += f"not predicted: there is no data sheet of {chip}"
    if peak:
        memory = f"{human(peak)} at its peak"
    else:
        memory = f"not measured ({chip} does not tell)"
    error = f": error {found['memory_error']:+.1%}" if peak else ""
    return [step, f"            memory {memory}; predicted {predicted}{error}"]


def duration(seconds: float) -> str:
    if seconds >= 0.1:
        return f"{seconds:,.3f} s"
    return f"{1000 * seconds:,.3f} ms"
