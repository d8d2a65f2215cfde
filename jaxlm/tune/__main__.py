"""python -m jaxlm.tune --config=FILE.py[:ARG] --workdir=DIR --space=KEY=FORM ... --trials=N: searches a config.

Trains the recipe again and again, each time with other values of some keys:

  --space=optim.learning_rate=log:1e-4:1e-1     or int:LOW:HIGH[:STEP], float:LOW:HIGH[:STEP], choice:A,B,C
  --space=space.json                            the same, as {"optim.learning_rate": "log:1e-4:1e-1"}
  --space=optim.learning_rate=grid:1e-4,3e-4    a sweep: all combinations of the grids, in order

Trial 0 is the recipe itself, where the space holds its values; TPE chooses the others by what came out before. They run
in WORKDIR/trials/N/seed_S, in processes of their own. The same command goes on from where it was stopped or killed.
"""

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
from jaxlm.config.check import check, require
from jaxlm.config.recipe import load, override, set_key
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
SIGNALS = signal.SIGINT, signal.SIGTERM
DATA = {
    "data.path",
    "data.mixture",
    "data.train",
}  # where these are searched, each trial has data of its own
SHOWN = 10  # the best trials, and those that have no value


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
    way = "maximized" if study.maximize else "minimized"
    seeds = f" of {goal.seeds} seeds" if goal.seeds > 1 else ""
    have = f"{total} trials{seeds}, of which {study.finished()} are finished"
    print(
        f"{goal.metric} ({goal.take} of each run), {way} over {', '.join(space)}: {have}",
        flush=True,
    )

    def end(number, _):
        study.stop.set()
        print("stopping: what runs is saved first (once more: is not)", flush=True)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # runs end with this process

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        with ThreadPoolExecutor(parallel) as pool:
            for thread in [pool.submit(study.work, total) for _ in range(parallel)]:
                thread.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return study


def report(study: Study) -> None:
    """Prints the best trials, those without a value, what matters, and what to paste; draws history and importances."""
    pictures = []
    ranked = study.ranked()
    others = [r for r in study.records if r["state"] not in ("done", "pruned")]
    table = [("trial", study.goal.metric, *study.space)]
    for record in ranked[:SHOWN]:
        table.append((str(record["trial"]), outcome(record), *values_of(record)))
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for row in table if ranked else []:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    print(", ".join(f"{count} {state}" for state, count in study.results()["counts"].items()))
    for record in others[:SHOWN]:
        print(line(record))
    if len(others) > SHOWN:
        print(f"  and {len(others) - SHOWN} more, in {study.workdir / 'results.json'}")
    if ranked:
        matplotlib.use("Agg")
        plots = optuna.visualization.matplotlib
        axes = plots.plot_optimization_history(study.optuna, target_name=study.goal.metric)
        axes.xaxis.get_major_locator().set_params(integer=True)
        draw(axes, study.workdir, "history")
        pictures.append("history.png")
    if len(ranked) >= ENOUGH and len(study.space) > 1:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        study.importances = optuna.importance.get_param_importances(
            study.optuna, evaluator=evaluator
        )
        study.save()
        draw(
            plots.plot_param_importances(study.optuna, evaluator=evaluator),
            study.workdir,
            "importance",
        )
        pictures.append("importance.png")
        shown = "  ".join(f"{key} {value:.2f}" for key, value in study.importances.items())
        print(
            f"importance (PED-ANOVA of {len(ranked)} trials: rough, and low for choices): {shown}"
        )
    if ranked:
        for text in edges(study.space, ranked[0]["values"], study.config):
            print(text)
        print(f"wrote {' and '.join(pictures)} to {study.workdir}")
        print(f"the best, to paste:\n{flags(ranked[0])}")


def draw(axes, workdir: Path, name: str) -> None:
    axes.figure.savefig(workdir / f"{name}.png", bbox_inches="tight", dpi=120)
    matplotlib.pyplot.close(axes.figure)


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
        if (number := getattr(args, name)) is not None and number < 1:
            problems.append(f"--{name}={number}: must be at least 1")
    sizes = []
    for dimension in space.values():
        if is_grid(dimension):
            sizes.append(len(dimension.values.choices))
    if not (args.trials or sizes) and not any("=grid:" in text for text in args.space):
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


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="jaxlm.tune", description=__doc__)
    parser.add_config()
    parser.add_argument(
        "--workdir", required=True, help="where the results and the runs of all trials go"
    )
    parser.add_argument(
        "--space",
        required=True,
        action="append",
        help="KEY=FORM or FILE.json, as above; for each key",
    )
    parser.add_argument(
        "--trials", type=int, help="how many in all (default: all combinations of grids)"
    )
    parser.add_argument(
        "--metric", default="eval/loss", help="a key of metrics.jsonl (default: eval/loss)"
    )
    parser.add_argument(
        "--direction", choices=("minimize", "maximize"), default="", help="default: by its name"
    )
    parser.add_argument(
        "--take", choices=("best", "last"), default="best", help="of a run's values (default: best)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of a trial, whose mean is its value (default: 1)"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="trials at a time, sharing cores or GPUs (default: 1)",
    )
    parser.add_argument(
        "--no_prune", action="store_true", help="end no trial early, however bad it is"
    )
    parser.add_argument(
        "--sampler_seed", type=int, default=0, help="others give other trials (default: 0)"
    )
    args = parser.parse(argv)
    missing = []
    for name in ("optuna", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            missing.append(name)
    if missing:
        raise ConfigError(
            f'{" and ".join(missing)} is not installed; type: pip install -e ".[tune]"'
        )
    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the trials
    config = load(args.config)
    problems = override(config, args.overrides)
    space, of_space = read_space(args.space, config)
    verdict = judge_space(args, config, space)
    problems += of_space + verdict.problems
    problems += wrong_with(args, space) + ([] if problems else missing_data(config, space))
    require(problems)
    for note in verdict.notes:
        print(f"note: {note}", file=sys.stderr)
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
    study = tune(
        config,
        space,
        workdir,
        Trainer(args.config, args.parallel),
        goal,
        args.trials or 0,
        args.parallel,
        data,
    )
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
