"""What a plan holds, and how it reads: the figures of --json, and the page."""

from collections import Counter
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from jaxlm.cli import table
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
    """What --json writes: numbers in bytes, seconds and FLOPs; errors as predicted / measured - 1.

    price: of a chip for an hour.
    """
    mesh = make_mesh(plan.config, plan.topology.devices)
    result = {
        "topology": plan.topology.name,
        "devices": len(plan.topology.devices),
        "estimate": plan.topology.estimate,
        "mesh": {axis: n for axis, n in mesh.shape.items() if n > 1},
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
        result["measured"] = measured_figures(plan, measured)
    if plan.times:
        result |= time_figures(plan, price)
    return result


def measured_figures(plan: Plan, measured: Measured) -> dict:
    predicted = plan.times and plan.times.expected
    return {
        "step": measured.seconds,
        "step_error": relative_error(predicted, measured.seconds),
        "steps": STEPS,
        "memory": measured.memory,
        "memory_error": relative_error(plan.memory["needed"], measured.memory),
    }


def relative_error(predicted: float | None, measured: float | None) -> float | None:
    if predicted and measured:
        return predicted / measured - 1
    return None


def time_figures(plan: Plan, price: float) -> dict:
    times = plan.times
    devices = len(plan.topology.devices)
    days = times.expected * plan.config.train.steps / 86400
    result = {
        "time": {
            "step": times.expected,
            "low": times.low,
            "high": times.high,
            "matrix": times.matrix,
            "work": times.work,
            "communication": sum(times.communication.values()),
            "exposed": times.exposed,
        },
        "mfu": plan.flops["model"] / (times.expected * devices * plan.topology.spec.flops),
        "tokens_per_second": tokens_per_step(plan.config) / times.expected,
        "days": days,
    }
    if price:
        result["cost"] = days * 24 * devices * price
    return result


# How a collective moves data. A sum may be an all-reduce or a reduce-scatter: which one is the compiler's choice.
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
    for one in plan.program.collectives:
        network = network_of(one.axes, mesh, plan.topology, one.inside)
        key = (one.kind, one.axes, network.name)
        if key not in rows:
            rows[key] = {
                "kind": one.kind,
                "axes": list(one.axes),
                "network": network.name,
                "count": 0,
                "bytes": 0,
                "seconds": 0.0,
            }
        row = rows[key]
        row["count"] += one.times
        row["bytes"] += one.times * one.bytes
        row["seconds"] += seconds(one, network)
    ordered = sorted(rows.values(), key=lambda row: -row["bytes"])
    least = costs.least_traffic(plan.config, mesh)
    moves = Counter(map(move_of, ordered))
    for row in ordered:
        move = move_of(row)
        row["least"] = least.pop(move, None)  # beside the largest of its kind alone
        row["shared"] = moves[move] > 1
    return ordered


def move_of(row: dict) -> tuple:
    return (MOVES.get(row["kind"]), tuple(row["axes"]))


KINDS = (  # of memory, in the order of the page
    "parameters",
    "optimizer",
    "EMA",
    "batch",
    "gradients and activations",
    "packed factors",
    "code",
)
INDENT = " " * 12


def page(plan: Plan, found: dict) -> str:
    """The plan as people read it. found: its figures."""
    lines = [*pod_lines(plan, found), "", *memory_lines(plan, found), "", work_line(plan)]
    if plan.program is None:
        return "\n".join(lines)
    if found["collectives"]:
        lines += ["", *collective_lines(found["collectives"])]
    if plan.times:
        lines += ["", *time_lines(plan, found)]
    if "measured" in found:
        lines += ["", *measured_lines(plan, found["measured"])]
    return "\n".join([*lines, f"compiled in {plan.seconds:.0f} s"])


def pod_lines(plan: Plan, found: dict) -> list[str]:
    pod = plan.topology
    axes = " x ".join(f"{axis}={n}" for axis, n in found["mesh"].items()) or "one device"
    devices = f"{found['devices']:,} devices" if found["devices"] > 1 else "1 device"
    lines = [f"{pod.name}: {devices} of {human(plan.memory['available'])}, {axes}"]
    if pod.estimate:
        lines += [
            "AN ESTIMATE: compiled for CPUs, which send float32 for bfloat16, up to twice the bytes. XLA's compiler",
            f"for GPUs comes with pip install -e '.[cuda]', and knows {' and '.join(GPU_CHANGES)}",
        ]
    return lines


def memory_lines(plan: Plan, found: dict) -> list[str]:
    available = plan.memory["available"]
    needed = plan.memory["needed"]
    if found["fits"]:
        verdict = "fits"
        room = f"{human(available - needed)} to spare"
    else:
        verdict = "doesn't fit"
        room = f"{human(needed - available)} too much"
    rows = []
    total = 0
    for kind in KINDS:
        size = plan.memory.get(kind, 0)
        if size:
            rows.append((kind, human(size)))
            total += size
    lines = [f"memory      {verdict}: needs {human(needed)} of {human(available)}, {room}"]
    lines += indented(table(rows))
    if total > needed and found["fits"]:
        lines.append(f"{INDENT}(some of these share memory)")
    return lines


def work_line(plan: Plan) -> str:
    model = plan.flops["model"]
    executed = plan.flops["executed"]
    recomputed = plan.flops["recomputed"]
    again = f"; recomputed: {recomputed / executed:.1%}" if recomputed else ""
    return f"work        {executed:.4g} FLOPs a step (the model's: {model:.4g}{again})"


def collective_lines(collectives: list[dict]) -> list[str]:
    rows = []
    for row in collectives:
        least = f"least {human(row['least'])}" if row["least"] else ""
        if least and row["shared"]:
            least += " of all sums"
        axes = "+".join(row["axes"])
        runs = f"{row['count']:,} x"
        size = human(row["bytes"])
        time = duration(row["seconds"])
        rows.append((row["kind"], axes, row["network"], runs, size, time, least))
    head = "collectives a step and device: runs, bytes, time alone; the least that the strategy must move"
    return [head, *indented(table(rows, left=3))]


def indented(text: str) -> list[str]:
    return [INDENT + line for line in text.splitlines()]


def time_lines(plan: Plan, found: dict) -> list[str]:
    t = plan.times
    train = plan.config.train
    run = f"run         {tokens_per_step(plan.config) * train.steps:,} tokens in {train.steps:,} steps: "
    run += length_of(found["days"])
    if "cost" in found:
        run += f", {found['cost']:,.2f} at the given price"
    return [
        f"time        {duration(t.expected)} a step ({duration(t.low)} to {duration(t.high)}): MFU {found['mfu']:.1%}, "
        f"{found['tokens_per_second']:,.0f} tokens/s",
        f"            on the device {duration(t.work)}, of which matrix units at their peak {duration(t.matrix)}",
        f"            communication {duration(found['time']['communication'])}, waited for {duration(t.exposed)}",
        run,
    ]


def length_of(days: float) -> str:
    """A time in the unit that people would use."""
    if days >= 2:
        return f"{days:,.3g} days"
    if 24 * days >= 1:
        return f"{24 * days:,.3g} hours"
    return f"{1440 * days:,.3g} minutes"


def measured_lines(plan: Plan, found: dict) -> list[str]:
    chip = plan.topology.chip
    step = f"measured    {found['step']:.4g} s a step, the mean of {STEPS} after {WARM_UP} to warm up; "
    if plan.times:
        step += f"predicted {plan.times.expected:.4g} s: error {found['step_error']:+.1%}"
    else:
        step += f"not predicted: there is no data sheet of {chip}"
    memory = f"not measured ({chip} does not report it)"
    error = ""
    if found["memory"]:
        memory = f"{human(found['memory'])} at its peak"
        error = f": error {found['memory_error']:+.1%}"
    predicted = human(plan.memory["needed"])
    return [step, f"            memory {memory}; predicted {predicted}{error}"]


def duration(seconds: float) -> str:
    """In seconds, or in milliseconds below a tenth."""
    if seconds >= 0.1:
        return f"{seconds:,.3f} s"
    return f"{1000 * seconds:,.3f} ms"
