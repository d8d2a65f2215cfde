"""python -m jaxlm.tune --config=RECIPE --workdir=DIR --space=KEY=FORM ... --trials=N: searches a config.

Trains the recipe again and again, each time with other values of some keys:

  --space=optim.learning_rate=log:1e-4:1e-1     or int:LOW:HIGH[:STEP], float:LOW:HIGH[:STEP], choice:A,B,C
  --space=space.json                            the same, as {"optim.learning_rate": "log:1e-4:1e-1"}
  --space=optim.learning_rate=grid:1e-4,3e-4    a sweep: all combinations of the grids, in order

Trial 0 is the recipe itself, where the space holds its values; TPE chooses the others by what came out before. They run
in WORKDIR/trials/N/seed_S, in processes of their own. The same command goes on from where it was stopped or killed.
"""

import contextlib
import importlib.util
import math
import signal
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.check import check
from jaxlm.config.keys import base
from jaxlm.config.problems import require
from jaxlm.config.recipe import flatten, set_key
from jaxlm.config.sources import from_command_line
from jaxlm.data.batches import fingerprint, validation_batches
from jaxlm.errors import ConfigError, UserError
from jaxlm.run.inherit import inherit
from jaxlm.run.workdir import Hold
from jaxlm.tune.feasible import Verdict, judge
from jaxlm.tune.runner import Trainer
from jaxlm.tune.space import Dimension, edges, ends, is_grid, read_space
from jaxlm.tune.study import (
    Goal,
    Study,
    direction_of,
    flags,
    line,
    nothing_done,
    outcome,
    values_of,
)

try:
    import matplotlib
    import optuna
except ImportError:  # main says so
    pass

# Trials done before importances are shown: of a known space with 4 keys, between seeds, that of the largest (about 0.7)
# was 0.54 with a deviation of 0.35 after 12 trials, 0.59 and 0.25 after 30. A choice of two came out too low in both.
ENOUGH = 20
SIGNALS = (signal.SIGINT, signal.SIGTERM)
DATA = {
    "data.path",
    "data.mixture",
    "data.train",
}  # where one is searched, each trial has data of its own
SHOWN = 10  # the best trials, and those that have no value
NEEDED = ("optuna", "matplotlib")


def tune(
    config: ConfigDict,
    space: dict[str, Dimension],
    workdir: Path,
    run: Callable,
    goal: Goal,
    trials: int = 0,
    parallel: int = 1,
    data: dict | None = None,
) -> Study:
    """Searches a space around an (unresolved) config, until it has so many trials (0: those of the grid).

    run(config, folder, watch) -> rows of metrics.jsonl: trains, as runner.Trainer does. data: its fingerprint.
    After SIGTERM or Ctrl-C `stop` of what it returns is set. Raises ConfigError where `workdir` is of another search.
    """
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = Study(config, space, workdir, run, goal, data or {})
    total = trials or len(study.grid)
    print(
        f"{headline(study)}: {total} trials{of_seeds(goal)}, of which {study.finished()} are finished",
        flush=True,
    )
    with stopped_by_signals(study), ThreadPoolExecutor(parallel) as pool:
        threads = [pool.submit(study.work, total) for _ in range(parallel)]
        for thread in threads:
            thread.result()
    return study


def headline(study: Study) -> str:
    """The metric, and what is searched."""
    goal = study.goal
    way = "maximized" if study.maximize else "minimized"
    return f"{goal.metric} ({goal.take} of each run), {way} over {', '.join(study.space)}"


def of_seeds(goal: Goal) -> str:
    if goal.seeds > 1:
        return f" of {goal.seeds} seeds"
    return ""


@contextlib.contextmanager
def stopped_by_signals(study: Study):
    """Within it, Ctrl-C or SIGTERM stops the study after its runs have saved; a second one ends them at once."""

    def stop(number, frame):
        study.stop.set()
        print("stopping: what runs is saved first (a second signal: without saving)", flush=True)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # runs end with this process

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(study: Study) -> None:
    """Prints the best trials, those without a value, what matters, and what to paste; draws history and importances."""
    ranked = study.ranked()
    print()
    if ranked:
        rows = [(record["trial"], outcome(record), *values_of(record)) for record in ranked[:SHOWN]]
        print(cli.table(rows, ("trial", study.goal.metric, *study.space), left=0))
    print(", ".join(f"{count} {state}" for state, count in study.counts().items()))
    report_others(study)
    if not ranked:
        return
    pictures = [draw_history(study)]
    if len(ranked) >= ENOUGH and len(study.space) > 1:
        pictures.append(draw_importances(study))
        shown = "  ".join(f"{key} {value:.2f}" for key, value in study.importances.items())
        trials = len(ranked)
        print(f"importance (PED-ANOVA of {trials} trials: rough, and low for choices): {shown}")
    for text in edges(study.space, ranked[0]["values"], study.config):
        print(text)
    print(f"wrote {' and '.join(pictures)} to {study.workdir}")
    print(f"the best, to paste:\n{flags(ranked[0])}")


def report_others(study: Study) -> None:
    """The trials that were refused, diverged or failed, with the reason."""
    others = [record for record in study.records if record["state"] not in ("done", "pruned")]
    for record in others[:SHOWN]:
        print(line(record))
    if len(others) > SHOWN:
        print(f"  and {len(others) - SHOWN} more, in {study.workdir / 'results.json'}")


def draw_history(study: Study) -> str:
    matplotlib.use("Agg")
    plot = optuna.visualization.matplotlib.plot_optimization_history
    axes = plot(study.optuna, target_name=study.goal.metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return draw(axes, study.workdir, "history.png")


def draw_importances(study: Study) -> str:
    """Sets and saves the study's importances, and draws them."""
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    study.importances = optuna.importance.get_param_importances(study.optuna, evaluator=evaluator)
    study.save()
    plot = optuna.visualization.matplotlib.plot_param_importances
    return draw(plot(study.optuna, evaluator=evaluator), study.workdir, "importance.png")


def draw(axes, workdir: Path, name: str) -> str:
    axes.figure.savefig(workdir / name, bbox_inches="tight", dpi=120)
    matplotlib.pyplot.close(axes.figure)
    return name


def judge_space(args, config: ConfigDict, space: dict[str, Dimension]) -> Verdict:
    """What of the space, and of the recipe, train would refuse before its first step."""

    def rule(one: ConfigDict) -> list[str]:
        problems = inherit(one) or check(one)
        if args.metric.startswith("eval/") and not one.eval.every:
            problems.append(f"--metric={args.metric}: needs evaluations; set --config.eval.every")
        return problems

    return judge(config, space, rule)


def missing_data(config: ConfigDict, space: dict[str, Dimension]) -> list[str]:
    """What is wrong with the data that a key of the space names."""
    problems = []
    for key in DATA & space.keys():
        for value in ends(space[key]):
            one = config.copy_and_resolve_references()
            set_key(one, key, value)
            try:
                fingerprint(one)
            except UserError as error:
                problems.append(f"--space={key}={space[key].text}: {value}: {error}")
    return problems


def wrong_with(args, space: dict[str, Dimension]) -> list[str]:
    """What is wrong with the other flags, whatever the config and the space."""
    problems = []
    for name in ("trials", "seeds", "parallel"):
        number = getattr(args, name)
        if number is not None and number < 1:
            problems.append(f"--{name}={number}: must be at least 1")
    sizes = []
    for dimension in space.values():
        if is_grid(dimension):
            sizes.append(len(dimension.values.choices))
    if not (args.trials or sizes) and "=grid:" not in " ".join(args.space):
        problems.append("--trials: how many? Only a sweep, whose keys are all grid:A,B,C, knows")
    if sizes and (args.trials or 0) > math.prod(sizes):
        problems.append(f"--trials={args.trials}: the grids have {math.prod(sizes)} combinations")
    if "://" in args.workdir:
        problems.append(f"--workdir={args.workdir}: give a directory on a file system")
    try:
        args.direction = args.direction or direction_of(args.metric)
    except ConfigError as error:
        problems.append(str(error))
    return problems


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="jaxlm.tune", description=__doc__)
    parser.add_config(flatten(base()))
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where the results and the runs of all trials go",
    )
    parser.add_argument(
        "--space",
        required=True,
        action="append",
        metavar="KEY=FORM|FILE.json",
        help="values of a key, as above; may be given again",
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", help="in all (default: all combinations of grids)"
    )
    parser.add_argument("--metric", default="eval/loss", help="a key of metrics.jsonl")
    parser.add_argument(
        "--direction", choices=("minimize", "maximize"), default="", help="default: by its name"
    )
    parser.add_argument(
        "--take", choices=("best", "last"), default="best", help="which of a run's values counts"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="runs of a trial, whose mean is its value",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="trials at a time, sharing cores or GPUs",
    )
    parser.add_argument(
        "--no_prune", action="store_true", help="end no trial early, however bad it is"
    )
    parser.add_argument(
        "--sampler_seed", type=int, default=0, metavar="N", help="other seeds, other trials"
    )
    return parser


def require_libraries() -> None:
    """Raises ConfigError that says what to install."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'{" and ".join(missing)} is not installed; type: pip install -e ".[tune]"'
        )


def read_config(args) -> tuple[ConfigDict, dict[str, Dimension]]:
    """(the config, unresolved; the space). Raises ConfigError that lists all problems; prints notes."""
    config, problems = from_command_line(args)
    space, space_problems = read_space(args.space, config)
    verdict = judge_space(args, config, space)
    problems += space_problems + verdict.problems
    data_problems = []
    if not problems:
        data_problems = missing_data(config, space)
    require(problems + wrong_with(args, space) + data_problems)
    for note in verdict.notes:
        print(f"note: {note}", file=sys.stderr)
    return config, space


def main(argv: list[str]) -> int:
    args = make_parser().parse(argv)
    require_libraries()
    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the trials
    config, space = read_config(args)
    data = {}
    if not DATA & space.keys():
        data = fingerprint(config)
        if config.eval.every:
            validation_batches(config)  # raises where there is nothing to evaluate on
    workdir = Path(args.workdir)
    hold = Hold(workdir)
    goal = Goal(
        args.metric, args.direction, args.take, args.seeds, not args.no_prune, args.sampler_seed
    )
    run = Trainer(args.config, args.parallel)
    study = tune(config, space, workdir, run, goal, args.trials or 0, args.parallel, data)
    hold.close()
    if study.stop.is_set():
        total = args.trials or len(study.grid)
        print(
            f"stopped: {study.finished()} of {total} trials are finished, in {workdir}; the same command goes on"
        )
        return cli.PREEMPTED
    report(study)
    if not study.ranked():
        raise nothing_done(study.records)
    return 0


if __name__ == "__main__":
    cli.run(main)
