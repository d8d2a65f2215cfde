"""python -m jaxlm.plan --config=RECIPE --topology=v5p:4x4x4 [--slices=N] [--json=FILE] [--save_hlo=FILE]

Compiles the train step of a config, the very one that jaxlm.train runs, for a pod that is not here, with that pod's own
compiler, and prints whether it fits, what it computes and sends, how long a step should take, and what to change.
--topology=local compiles it for the devices that are here, runs it, and prints what was measured beside the prediction.
"""

import json
import math
from pathlib import Path

from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.check import check
from jaxlm.config.keys import base
from jaxlm.config.problems import Problem, require
from jaxlm.config.recipe import flatten, resolve
from jaxlm.config.sources import from_command_line
from jaxlm.errors import ConfigError
from jaxlm.parallel.chips import CHIPS
from jaxlm.parallel.mesh import make_mesh
from jaxlm.plan import topology
from jaxlm.plan.compile import make_plan
from jaxlm.plan.measure import measure
from jaxlm.plan.page import Plan, duration, figures, fits, page
from jaxlm.plan.search import changed, faster, remedies, search
from jaxlm.plan.topology import Topology
from jaxlm.run.inherit import inherit
from jaxlm.run.known_data import look_at_data, undescribed
from jaxlm.run.process import manage_memory, quick_random_numbers
from jaxlm.step.costs import human

# ---------------------------------------------------------------- what to change


def advise(config: ConfigDict, plan: Plan, count: int = 2) -> list[dict]:
    """Compiles what should make a step fit until `count` do, printing each with its effect. config: unresolved."""
    rows = []
    fitting = 0
    print("\nwhat would fit, each compiled:")
    for overrides in remedies(config, plan.topology, plan.memory["needed"]):
        row = row_of(overrides, make_plan(resolve(changed(config, overrides)), plan.topology))
        rows.append(row)
        print(line_of(row), flush=True)
        fitting += row["fits"]
        if fitting == count:
            break
    if not fitting:
        print("nothing of this: more chips are needed, or a smaller model")
    return rows


def suggest(config: ConfigDict, pod: Topology) -> list[dict]:
    """Prints what should be faster, by arithmetic. config: unresolved."""
    rows = []
    for overrides, saves, needs in faster(config, pod):
        if not rows:
            print("\nfaster, by arithmetic alone (--search=3 compiles the likeliest of all):")
        print(f"            {-saves:.0%} time, about {human(needs)}  {flags_of(overrides)}")
        rows.append({"overrides": overrides, "saves": saves, "needs": needs})
    return rows


def frontier(config: ConfigDict, plan: Plan, count: int) -> list[dict]:
    """The compiled options and `plan`, the fastest first; * where none is both faster and smaller."""

    def compile(option: ConfigDict) -> Plan:
        return make_plan(option, plan.topology)

    rows = [row_of({}, plan)]
    for overrides, other in search(config, plan.topology, compile, count):
        rows.append(row_of(overrides, other))
    rows.sort(key=lambda row: row.get("step", math.inf))
    print(
        f"\nof all tensor sizes, remat and microbatches the {count} that arithmetic prefers, compiled (* frontier):"
    )
    smallest = math.inf
    for row in rows:
        row["frontier"] = row["fits"] and row["needed"] < smallest
        if row["fits"]:
            smallest = min(smallest, row["needed"])
        print(line_of(row))
    return rows


def flags_of(overrides: dict) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def row_of(overrides: dict, plan: Plan) -> dict:
    row = {"overrides": overrides, "fits": fits(plan), "needed": plan.memory["needed"]}
    if plan.times is None:
        return row
    found = figures(plan)
    return row | {"step": found["time"]["step"], "mfu": found["mfu"]}


def line_of(row: dict) -> str:
    speed = " " * 20
    if "step" in row:
        speed = f"{duration(row['step']):>10}, MFU {row['mfu']:5.1%}"
    verdict = "fits" if row["fits"] else "doesn't fit"
    star = "*" if row.get("frontier") else " "
    flags = flags_of(row["overrides"]) or "(as given)"
    return f"{star} {verdict:11}  {human(row['needed']):>11} {speed}  {flags}"


# ---------------------------------------------------------------- the program


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="jaxlm.plan", description=__doc__)
    parser.add_config(flatten(base()))
    parser.add_argument(
        "--topology",
        required=True,
        help="chip and shape of a slice: v5p:4x4x4, v5p-128, v5e:16x16, h100:1x8x8; or local",
    )
    parser.add_argument(
        "--slices",
        type=int,
        metavar="N",
        help="slices of that shape, joined by the slower network (default: config.mesh.slices)",
    )
    parser.add_argument(
        "--price_per_chip_hour",
        type=float,
        default=0.0,
        metavar="PRICE",
        help="price of one chip for an hour, in any currency: also print what the run costs; 0: don't",
    )
    parser.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="N",
        help="also compile the N other settings that arithmetic finds fastest",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument(
        "--save_hlo", metavar="FILE", help="write the compiled program to this file, as text"
    )
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse(argv)
    cli.require_writable("--json", args.json)
    cli.require_writable("--save_hlo", args.save_hlo)
    config, pod = read_config(args)
    plan = make_plan(resolve(config), pod)
    measured = None
    if args.topology == "local" and fits(plan):
        measured = measure(plan.config, make_mesh(plan.config, pod.devices), plan.compiled)
    found = figures(plan, args.price_per_chip_hour, measured)
    print(page(plan, found), flush=True)
    if args.save_hlo and plan.compiled:
        Path(args.save_hlo).write_text(plan.compiled.as_text())
    write(args.json, found)  # before the search, which may take long
    if not found["fits"]:
        found["remedies"] = advise(config, plan)
    elif pod.spec.flops and not args.search:
        found["faster"] = suggest(config, pod)
    if args.search:
        found["search"] = frontier(config, plan, args.search)
    write(args.json, found)
    return 0 if found["fits"] else 1


def read_config(args) -> tuple[ConfigDict, Topology]:
    """(the config, unresolved, with a vocabulary size; the pod). Raises ConfigError that lists all problems."""
    config, problems = from_command_line(args)
    if args.topology == "local":
        manage_memory()  # as in a run
        quick_random_numbers()
    slices = config.mesh.slices if args.slices is None else args.slices
    pod = find(args.topology, slices)
    if config.mesh.slices not in (1, pod.slices):
        rule = f"--topology and --slices give {pod.slices}"
        problems.append(Problem("mesh.slices", config.mesh.slices, rule))
    config.mesh.slices = pod.slices
    if args.search < 0 or (args.search and not pod.spec.flops):
        problems.append(
            f"--search={args.search}: of a chip with a data sheet, how many options to compile"
        )
    problems += inherit(config)
    vocab_size, _, data_problem = look_at_data(config)
    problems += undescribed(config, vocab_size, data_problem)
    require(problems + check(config, len(pod.devices), vocab_size))
    config.model.vocab_size = config.model.vocab_size or vocab_size
    return config, pod


def write(file: str | None, found: dict) -> None:
    if file:
        Path(file).write_text(json.dumps(found, indent=1) + "\n")


def find(text: str, slices: int) -> Topology:
    """The pod of --topology and --slices. Raises ConfigError where there is none."""
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
