"""python -m jaxlm.fitting --workdir=DIR --workdir=DIR ...: which of several runs underfits, and which overfits.

It reads what the runs have written, so it takes seconds. They must have learned the same task from the same data. The
run with the lowest validation loss fits best. A worse one underfits if its training loss is higher too: it is too
small, or was trained too little. Otherwise it overfits: it learns its training data by heart. The training loss is the
mean since the evaluation before, with dropout where the run has any.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.recipe import flatten
from jaxlm.errors import ConfigError, DataError
from jaxlm.evaluate import pictures
from jaxlm.evaluate.report import columns
from jaxlm.run.saved_run import read_config
from jaxlm.run.workdir import run_directory
from jaxlm.step.costs import num_parameters
from jaxlm.step.state import abstract_state

SAME = (
    "task.name",
    "data.path",
    "data.mixture",
    "data.train",
    "data.val",
)  # or losses can't be compared
CLOSE = 0.01  # nats: a smaller difference between losses counts as none
FITS = "fits best"
AS_WELL = "fits as well"
UNDER = "underfits"
OVER = "overfits"
NOT_DONE = "not done"


class Fit(NamedTuple):
    """The losses of a run, in nats."""

    name: str
    parameters: int
    steps_N: np.ndarray  # of its evaluations
    train_N: (
        np.ndarray
    )  # mean training loss since the evaluation before; NaN where no row was written
    val_N: np.ndarray
    planned: int  # the step at which it ends
    patience: int  # evaluations; 0: it does not stop early

    @property
    def best(self) -> int:
        """The place of the lowest validation loss."""
        return int(self.val_N.argmin())

    @property
    def training(self) -> float:
        """The last training loss."""
        known = self.train_N[np.isfinite(self.train_N)]
        if len(known):
            return float(known[-1])
        return np.nan

    @property
    def last(self) -> int:
        return int(self.steps_N[-1])

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended it."""
        since = len(self.val_N) - 1 - self.best
        return 0 < self.patience <= since and self.last < self.planned

    @property
    def ended(self) -> str:
        if self.stopped:
            return f"early, at step {self.last:,}"
        if self.last < self.planned:
            return f"not yet: step {self.last:,} of {self.planned:,}"
        return f"at its last step, {self.last:,}"


def require_same_data(configs: dict[str, ConfigDict]) -> None:
    """Raises ConfigError that names every key of SAME in which these runs differ."""
    problems = []
    for key in SAME:
        values = {workdir: flatten(config)[key] for workdir, config in configs.items()}
        if len(set(values.values())) > 1:
            each = [f"{value!r} in {workdir}" for workdir, value in values.items()]
            problems.append(f"  - {key}: {', '.join(each)}")
    if problems:
        raise ConfigError(
            "these runs did not learn the same, so that their losses cannot be compared:\n"
            + "\n".join(problems)
        )


def mean_since(ends_N, steps_M, losses_M) -> np.ndarray:
    """[N]: the mean loss of the steps after one end and up to the next; NaN where there are none."""
    means = []
    start = 0
    for end in ends_N:
        between = losses_M[(steps_M > start) & (steps_M <= end)]
        means.append(between.mean() if len(between) else np.nan)
        start = end
    return np.array(means)


def read_fit(workdir: str, name: str, config: ConfigDict) -> Fit:
    """The losses in a run's metrics.jsonl. Raises DataError where it has not been evaluated."""
    file = run_directory(workdir) / "metrics.jsonl"
    steps_N, val_N = pictures.read(file, "eval/loss")
    if not len(steps_N):
        raise DataError(
            f"{file}: no row has a finite eval/loss; set eval.every, or wait for the first evaluation"
        )
    train_N = mean_since(steps_N, *pictures.read(file, "loss"))
    state, _ = abstract_state(config)
    return Fit(
        name=name,
        parameters=num_parameters(state.params),
        steps_N=steps_N,
        train_N=train_N,
        val_N=val_N,
        planned=config.train.stop_at,
        patience=config.eval.patience,
    )


def verdicts(fits: list[Fit]) -> list[str]:
    """For each run, how it compares with the one of the lowest validation loss."""
    best = min(fits, key=lambda fit: fit.val_N.min())
    found = []
    for fit in fits:
        if fit is best:
            found.append(FITS)
        elif fit.val_N.min() - best.val_N.min() < CLOSE:
            found.append(AS_WELL)
        elif fit.last < fit.planned and not fit.stopped:
            found.append(NOT_DONE)
        elif fit.training > best.training + CLOSE:
            found.append(UNDER)
        else:
            found.append(OVER)
    return found


def rows_of(fits: list[Fit]) -> list[dict]:
    """The table that is printed."""
    rows = []
    for fit, verdict in zip(fits, verdicts(fits)):
        row = {
            "run": fit.name,
            "parameters": fit.parameters,
            "training loss": fit.training,
            "best validation loss": float(fit.val_N.min()),
            "at step": int(fit.steps_N[fit.best]),
            "last validation loss": float(fit.val_N[-1]),
            "ended": fit.ended,
            "shows": verdict,
        }
        rows.append(row)
    return rows


def draw(path: Path, fits: list[Fit]) -> None:
    """Training and validation loss of the runs, with a title that says which fits best."""
    found = verdicts(fits)
    best = fits[found.index(FITS)]
    curves = []
    others = []
    for fit, verdict in zip(fits, found):
        name = pictures.short(fit.name)
        label = f"{name}: {verdict}\n{fit.parameters:,} parameters"
        curves.append(pictures.Curves(label, fit.steps_N, fit.train_N, fit.val_N, fit.stopped))
        if fit is not best:
            others.append(f"{name} {verdict}")
    loss = f"validation loss {best.val_N.min():.3f}"
    step = f"step {best.steps_N[best.best]:,.0f}"
    title = f"{pictures.short(best.name)} {FITS}: {loss} at {step}\n{', '.join(others)}"
    pictures.fitting(path, curves, title)


def require_file(flag: str, path: str | None) -> None:
    """Raises ConfigError where no file can be written at `path`."""
    if path is None:
        return
    if Path(path).is_dir():
        raise ConfigError(f"--{flag}={path}: is a directory; give a file in it")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"--{flag}={path}: there is no directory {Path(path).parent}")


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="jaxlm.fitting", description=__doc__)
    parser.add_argument(
        "--workdir", action="append", required=True, help="run directory of jaxlm.train; several"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="also draw training and validation loss there, .png"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the table there")
    args = parser.parse(argv)
    workdirs = list(dict.fromkeys(args.workdir))
    if len(workdirs) < 2:
        raise ConfigError(
            "--workdir: one run has nothing to be compared with; give two or more, of different sizes"
        )
    for flag, path in {"json": args.json, "picture": args.picture}.items():
        require_file(flag, path)
    configs = {workdir: read_config(workdir) for workdir in workdirs}
    require_same_data(configs)
    names = [Path(workdir).name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = workdirs
    fits = []
    for workdir, name in zip(workdirs, names):
        fits.append(read_fit(workdir, name, configs[workdir]))
    rows = rows_of(fits)
    print("\n".join(columns(rows)))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.picture:
        draw(Path(args.picture), fits)
        print(f"wrote {args.picture}")


if __name__ == "__main__":
    cli.run(main)
