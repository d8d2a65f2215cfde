"""python -m jaxlm.bench --config=RECIPE [--config.KEY=VALUE ...] [--steps=50] [--json=FILE]: how fast it trains.

Runs the train step of a config on the devices that are here, on data that is read as train reads it (random tokens
where there is none), and prints the median and the spread of the step's time and what a step waits for.
--parts times attention, MLP, loss, optimizer, data, checkpoint, imports and start, each alone.
--sweep=DIR times it at other batches, lengths, depths and widths, and draws time against arithmetic.
"""

import json
import platform
import tempfile
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.bench.parts import time_parts, time_start
from jaxlm.bench.step import lines, time_step
from jaxlm.bench.sweep import sweep
from jaxlm.config.check import check
from jaxlm.config.keys import COUNTED, base
from jaxlm.config.problems import require
from jaxlm.config.recipe import flatten, resolve
from jaxlm.config.sources import from_command_line
from jaxlm.config.tasks import task_of
from jaxlm.data.batches import describe
from jaxlm.data.synthetic import random_tokens
from jaxlm.errors import ConfigError, DataError
from jaxlm.run.checkpoint import VERSIONS, versions
from jaxlm.run.inherit import inherit
from jaxlm.run.process import manage_memory, quick_random_numbers

VOCABULARY = 256  # of random tokens, where the config names no other
RANDOM_TOKENS = 4_000_000
SWEEP_STEPS = 20  # of each size, at most
SILENT = (
    "--config.eval.every=0",
    "--config.eval.patience=0",
)  # a run whose start is timed evaluates nothing


def with_data(config: ConfigDict, folder: Path) -> tuple[ConfigDict, str, list[str]]:
    """(the config with data that is there, where from, flags that say so): its own, or random tokens in `folder`.

    Raises DataError where the config's data can't be read and random tokens can't stand in for them.
    """
    config = config.copy_and_resolve_references()
    flags = []
    try:
        vocab_size, config.data.labels, _ = describe(config)
        where = config.data.mixture or config.data.path or config.data.train
    except DataError as error:
        if task_of(config).from_examples or config.data.mixture:
            raise
        vocab_size = config.model.vocab_size or VOCABULARY
        random_tokens(folder, vocab_size, RANDOM_TOKENS, config.seed)
        where = f"random tokens of {vocab_size:,} kinds (config.model.vocab_size), because {str(error).splitlines()[0]}"
        config.data.path = str(folder)
        config.task.name = "lm"
        flags = [f"--config.data.path={folder}", "--config.task.name=lm"]
    config.model.vocab_size = config.model.vocab_size or vocab_size
    return config, where, flags


def machine() -> dict:
    device = jax.devices()[0]
    return {
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions((*VERSIONS, "jaxlib")) | {"python": platform.python_version()},
    }


def summary(figures: dict, config: ConfigDict) -> str:
    """What was timed, in one line."""
    text = f"{figures['parameters']:,} parameters on {figures['devices']}"
    text += f", {figures['tokens_per_step']:,} tokens a step"
    if task_of(config).from_examples:
        text += ", padding too"
    if figures["attention"]:
        text += f", attention: {figures['attention']}"
    return text


# ---------------------------------------------------------------- the program


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="jaxlm.bench", description=__doc__)
    parser.add_config(flatten(base()))
    parser.add_argument(
        "--steps", type=int, default=50, metavar="N", help="timed steps, after a warm-up"
    )
    parser.add_argument(
        "--parts", action="store_true", help="also the parts of a step and of a run, each alone"
    )
    parser.add_argument(
        "--sweep",
        metavar="DIR",
        help=f"also other sizes, at most {SWEEP_STEPS} steps each; pictures go there",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse(argv)
    if args.steps < 1:
        parser.error(f"--steps={args.steps}: must be at least 1")
    cli.require_writable("--json", args.json)
    if args.sweep:
        make_folder(args.sweep)
    manage_memory()
    quick_random_numbers()
    config, problems = from_command_line(args)
    require(problems + inherit(config))
    if config.model.name in COUNTED:
        raise ConfigError(
            f"config.model.name={config.model.name}: is counted, not trained: it has no step to time"
        )
    with tempfile.TemporaryDirectory() as folder:
        measure(args, config, Path(folder))
    return 0


def make_folder(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--sweep={path}: {error.strerror}") from None


def measure(args, config: ConfigDict, folder: Path) -> None:
    """Times what the flags ask for, prints it, and writes it after each part. config: unresolved."""
    config, where, flags = with_data(config, folder / "tokens")
    print(f"data: {where}", flush=True)
    if args.parts:
        require(check(config, vocab_size=config.model.vocab_size))
        given = [f"--config.{key}={text}" for key, text in args.overrides]
        started = time_start([f"--config={args.config}", *given, *flags, *SILENT])
    require(check(config, jax.device_count(), config.model.vocab_size))
    resolved = resolve(config)
    figures = time_step(resolved, args.steps) | machine() | {"config": args.config, "data": where}
    print(summary(figures, config))
    print("\n".join(lines(figures)), flush=True)
    write(args.json, figures)
    if args.parts:
        figures["parts"] = time_parts(resolved, figures["step_ms"]) | {"start": started}
        write(args.json, figures)
    if args.sweep:
        figures["sweep"] = sweep(config, min(args.steps, SWEEP_STEPS), Path(args.sweep))
        write(args.json, figures)


def write(file: str | None, figures: dict) -> None:
    if file:
        Path(file).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
