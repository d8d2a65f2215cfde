"""python -m jaxlm.train --config=RECIPE --workdir=DIR [--config.KEY=VALUE ...]: trains a model.

The same command again goes on from the newest checkpoint. --dry_run shows what a run would be, without running it.
"""

import argparse
import math
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.check import check
from jaxlm.config.keys import MESH_AXES, base
from jaxlm.config.problems import require
from jaxlm.config.recipe import flatten, resolve
from jaxlm.config.sources import from_command_line
from jaxlm.data.batches import validation_batches
from jaxlm.data.files.paths import absolute
from jaxlm.errors import UserError
from jaxlm.parallel import hosts
from jaxlm.parallel.mesh import abstract_mesh
from jaxlm.run.inherit import agree, inherit, overruled
from jaxlm.run.known_data import look_at_data, undescribed
from jaxlm.run.process import keep_compiled, manage_memory, quick_random_numbers
from jaxlm.run.trackers import tracker_problems
from jaxlm.run.workdir import run_directory
from jaxlm.step import costs
from jaxlm.step.state import check_sharding
from jaxlm.train.loop import train


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="jaxlm.train", description=__doc__)
    parser.add_config(flatten(base()))
    parser.add_argument("--workdir", help="where config, metrics and checkpoints go")
    parser.add_argument(
        "--print_config", action="store_true", help="print every key of the config and exit"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print what the run would be and exit"
    )
    parser.add_argument(
        "--devices",
        type=int,
        help="with --dry_run: for this many devices (default: as many as the mesh names, or those here)",
    )
    parser.add_argument(
        "--allow_data_change", action="store_true", help="resume although the data has changed"
    )
    parser.add_argument(
        "--start_over", action="store_true", help="begin at step 0 although checkpoints/ is gone"
    )
    hosts.add_flags(parser)
    return parser


def devices_on_paper(config: ConfigDict, args: argparse.Namespace) -> int:
    """How many devices to describe the run for. No accelerator is started."""
    jax.config.update("jax_platforms", "cpu")
    fixed = [config.mesh[axis] for axis in MESH_AXES if config.mesh[axis] > 0]
    return args.devices or max(math.prod(fixed), jax.device_count())


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse(argv)
    only_prints = args.dry_run or args.print_config
    config, problems = from_command_line(args)
    if args.devices is not None and args.devices < 1:
        parser.error(f"--devices={args.devices}: must be at least 1")
    if only_prints:
        devices = devices_on_paper(config, args)
    elif args.workdir:
        manage_memory()
        workdir = run_directory(args.workdir)
        hosts.connect(args)
        devices = jax.device_count()
        quick_random_numbers()
        keep_compiled(workdir / "compiled")
    else:
        parser.error("the following arguments are required: --workdir")

    before = flatten(config)
    problems += inherit(config)
    if jax.process_index() == 0:
        for line in overruled([key for key, _ in args.overrides], before, config):
            print(line, file=sys.stderr)
    problems += tracker_problems(config)
    vocab_size, num_tokens, data_problem = look_at_data(config)
    if not data_problem and not problems:
        problems += agree(config, vocab_size)
    require(problems + check(config, devices, vocab_size))
    if data_problem:
        require_described(config, vocab_size, data_problem, only_prints)
    config = resolve(config, vocab_size)
    if args.print_config:
        print("\n".join(f"{key} = {value!r}" for key, value in flatten(config).items()))
        return 0
    check_sharding(config, abstract_mesh(config, devices))
    if args.dry_run:
        print(costs.describe(config, devices, None if data_problem else num_tokens))
        return 0
    if config.eval.every:
        validation_batches(config)  # raises where there is nothing to evaluate on
    make_absolute(config)
    return train(config, workdir, args.allow_data_change, args.start_over)


def require_described(
    config: ConfigDict, vocab_size: int, problem: UserError, only_prints: bool
) -> None:
    """Raises the problem with the data, unless the run is only printed and the config describes its model alone."""
    if not only_prints:
        raise problem
    missing = undescribed(config, vocab_size, problem)
    if missing:
        raise type(problem)(missing[0])


def make_absolute(config: ConfigDict) -> None:
    """Paths of data that evaluation finds from any directory."""
    if config.data.path:
        config.data.path = str(Path(config.data.path).absolute())
    config.data.train = absolute(config.data.train)
    config.data.val = absolute(config.data.val)


if __name__ == "__main__":
    cli.run(main)
