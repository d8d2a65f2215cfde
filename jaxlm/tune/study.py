"""The trials of `jaxlm.tune`: which comes next, what came out, and what the same command goes on from."""

import itertools
import json
import math
import re
import shlex
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxlm.cli import did_you_mean
from jaxlm.config.check import check
from jaxlm.config.recipe import flatten, resolve, set_key
from jaxlm.config.tasks import DIRECTIONS
from jaxlm.errors import ConfigError, NumericsError, UserError
from jaxlm.run.workdir import write_whole
from jaxlm.tune.runner import Stopped
from jaxlm.tune.space import Dimension, holds, is_grid, readable

try:
    import optuna
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState
except ImportError:  # the program says so
    optuna = None

FINISHED = ("done", "pruned", "refused", "diverged")  # others, running and failed, run again
FAILURES = 3  # and no other outcome: the values are not the reason
REASONS = 5  # shown of a search without results


class EveryTrialFails(ConfigError):
    """The reason is none of a trial's values, so the search ends."""


@dataclass(frozen=True)
class Goal:
    """What counts as better, and how it is looked for."""

    metric: str = "eval/loss"  # a key of metrics.jsonl
    direction: str = ""  # minimize | maximize; empty: as its name says
    take: str = "best"  # of a run's values: best | last
    seeds: int = 1  # runs of a trial, whose mean is its value
    prune: bool = True  # end a trial whose first run is worse than the median of those before it at the same step
    sampler_seed: int = 0


def direction_of(metric: str) -> str:
    """minimize or maximize. Raises ConfigError where the name does not say."""
    found = []
    for way, words in DIRECTIONS.items():
        if re.search(words, metric.rpartition("/")[2]):
            found.append(way)
    if len(found) != 1:
        known = "|".join(DIRECTIONS.values()).split("|")
        near = did_you_mean(metric, known + [f"eval/{word}" for word in known])
        raise ConfigError(
            f"--metric={metric}: is less of it better, or more? Give --direction=minimize or maximize{near}"
        )
    return found[0]


def grid_of(space: dict[str, Dimension]) -> list[dict]:
    """All combinations of a sweep's values, in order; of another space none."""
    lists = [dimension.values.choices for dimension in space.values() if is_grid(dimension)]
    if not lists:
        return []
    return [dict(zip(space, values)) for values in itertools.product(*lists)]


def asked(goal: Goal, space: dict[str, Dimension], config: ConfigDict, data: dict) -> dict:
    """What makes a search this one and no other, as results.json keeps it."""
    found = asdict(goal)
    for key, dimension in space.items():
        found[f"space.{key}"] = dimension.text
    for key, value in flatten(config).items():
        found[f"config.{key}"] = value
    for key, value in data.items():
        found[f"data.{key}"] = value
    return json.loads(json.dumps(found))


def given(value):
    """A value as a message shows it."""
    if value in (None, ""):
        return "not given"
    return value


def state_of(error: Exception) -> str:
    """The outcome of a trial that ended with this error."""
    if type(error) is ConfigError:
        return "refused"
    if isinstance(error, NumericsError):
        return "diverged"
    if isinstance(error, optuna.TrialPruned):
        return "pruned"
    return "failed"


class Study:
    """All trials. Their only state is results.json, which has a change before anything follows from it.

    optuna's study is in memory alone, made again from results.json: a study of an older jaxlm goes on too.
    """

    def __init__(
        self,
        config: ConfigDict,
        space: dict[str, Dimension],
        workdir: Path,
        run: Callable,
        goal: Goal,
        data: dict,
    ):
        self.config = config
        self.space = space
        self.workdir = workdir
        self.run = run
        self.goal = goal
        self.maximize = (goal.direction or direction_of(goal.metric)) == "maximize"
        self.distributions = {key: dimension.values for key, dimension in space.items()}
        self.grid = grid_of(space)
        self.asked = asked(goal, space, config, data)
        self.records = []
        self.importances = {}
        self.keys = set()
        self.evaluated = set()
        self.lock = threading.Lock()
        self.stop = threading.Event()
        # A sweep is wanted whole; and the training loss, of single batches, says too little at one step.
        self.prunes = goal.prune and not self.grid and goal.metric.startswith("eval/")
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=resolve(config).optim.warmup_steps)
        direction = "maximize" if self.maximize else "minimize"
        self.optuna = optuna.create_study(direction=direction, pruner=pruner)
        self.restore()

    def restore(self) -> None:
        """Continues from results.json, if there is one. Raises ConfigError where it is of another search, or lost."""
        path = self.workdir / "results.json"
        again = f"give the same, or another --workdir than {self.workdir}"
        if path.exists():
            try:
                before = json.loads(path.read_text())
            except ValueError as error:
                raise ConfigError(
                    f"{path} is not JSON any more ({error}); give another --workdir"
                ) from None
            self.records = before["trials"]
            changed = self.changes(before["asked"])
            if changed:
                raise ConfigError("\n".join([f"{path} is of another search:", *changed, again]))
        elif (self.workdir / "trials").exists():
            raise ConfigError(
                f"{path} is lost, and with it what the values of the trials there were; {again}"
            )
        for record in self.records:
            if record["state"] in FINISHED:
                self.optuna.add_trial(self.as_trial(record))
            else:
                self.optuna.enqueue_trial(record["values"])
        if not self.records and not self.grid:
            self.enqueue_recipe()

    def changes(self, before: dict) -> list[str]:
        """What this search asks differently, a line each.

        Keys with a dot have decided what is in the checkpoints; the goal only what the finished trials came to.
        """
        lines = []
        for key in {**before, **self.asked}:
            old = before.get(key)
            new = self.asked.get(key)
            matters = self.finished() or "." in key
            if matters and old != new:
                lines.append(f"  {key}: {given(old)} -> {given(new)}")
        return lines

    def as_trial(self, record: dict):
        """A finished trial, for optuna. Trials without a value are worse than all that have one."""
        state = TrialState.PRUNED
        value = None
        if record["state"] == "done":
            state = TrialState.COMPLETE
            value = record["mean"]
        return optuna.trial.create_trial(
            state=state,
            value=value,
            params=record["values"],
            distributions=self.distributions,
            intermediate_values={int(step): loss for step, loss in record["curve"].items()},
        )

    def enqueue_recipe(self) -> None:
        """Makes the recipe's own values the next trial, where the space holds them."""
        known = flatten(self.config)
        for key, dimension in self.space.items():
            if not holds(dimension, known[key]):
                return
        self.optuna.enqueue_trial({key: known[key] for key in self.space})

    def results(self) -> dict:
        """What results.json holds."""
        best = {}
        for record in self.ranked()[:1]:
            best["best"] = record | {"flags": flags(record)}
        return best | {
            "counts": self.counts(),
            "importances": self.importances,
            "trials": self.records,
            "asked": self.asked,
        }

    def counts(self) -> Counter:
        """{state: trials}"""
        return Counter(record["state"] for record in self.records)

    def ranked(self) -> list[dict]:
        """The trials that are done, the best first."""
        done = [record for record in self.records if record["state"] == "done"]
        return sorted(done, key=lambda record: record["mean"], reverse=self.maximize)

    def finished(self) -> int:
        counts = self.counts()
        return sum(counts[state] for state in FINISHED)

    def save(self) -> None:
        write_whole(self.workdir / "results.json", json.dumps(self.results(), indent=1) + "\n")

    def ask(self, trials: int):
        """The next of so many trials, those that were interrupted first; None where there is no other."""
        with self.lock:
            number = len(self.optuna.trials)
            if not self.optuna.get_trials(states=[TrialState.WAITING]):
                if number >= trials:
                    return None
                if self.grid:
                    self.optuna.enqueue_trial(self.grid[number])
            self.optuna.sampler = self.sampler_of(number)
            trial = self.optuna.ask(self.distributions)
            if trial.number == len(self.records):
                self.records.append({"trial": trial.number, "values": trial.params})
            # An interrupted trial begins anew here; its runs go on, and their metrics.jsonl has all rows.
            fresh = {"state": "running", "reason": "", "by_seed": [], "curve": {}}
            self.records[trial.number] |= fresh
            self.save()
        return trial

    def sampler_of(self, number: int):
        """Each trial has a sampler of its own, seeded by the trial's number: a restart changes nothing."""
        sequence = np.random.SeedSequence((self.goal.sampler_seed, number))
        seed = int(sequence.generate_state(1)[0])
        return TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def work(self, trials: int) -> None:
        """One trial after the other. An error that is not of one trial alone ends the work of all threads."""
        try:
            while not self.stop.is_set():
                trial = self.ask(trials)
                if trial is None:
                    return
                self.attempt(trial, self.records[trial.number])
        except Stopped:
            self.stop.set()
        except BaseException:
            self.stop.set()
            raise

    def attempt(self, trial, record: dict) -> None:
        """Runs a trial and records what came of it.

        Raises Stopped, EveryTrialFails, and UserError where trials have failed and none was done.
        """
        began = time.perf_counter()
        state = "done"
        reason = ""
        try:
            self.run_seeds(trial, record)
        except EveryTrialFails:
            raise
        except (optuna.TrialPruned, UserError) as error:
            state = state_of(error)
            reason = " ".join(str(error).split())
        with self.lock:
            record |= {
                "state": state,
                "reason": reason,
                "seconds": round(time.perf_counter() - began, 1),
            }
            self.finish(trial, record)

    def run_seeds(self, trial, record: dict) -> None:
        """The runs of a trial. Raises what ends them; ConfigError where the config is not valid with its values."""
        config = self.config.copy_and_resolve_references()
        for key, value in record["values"].items():
            set_key(config, key, value)
        problems = check(config)
        if problems:
            raise ConfigError("; ".join(problems))
        first_seed = config.seed
        last_step = config.train.stop_at or config.train.steps
        for i in range(self.goal.seeds):
            config.seed = first_seed + i
            folder = self.workdir / "trials" / str(trial.number) / f"seed_{i}"
            watch = partial(self.watch, trial, record, last_step, i == 0)
            value = self.value_of(self.run(config, folder, watch))
            with self.lock:
                record["by_seed"].append(value)

    def finish(self, trial, record: dict) -> None:
        """Saves and prints what came of a trial. Raises UserError where trials have failed and none was done."""
        if record["state"] == "done":
            values = record["by_seed"]
            deviation = 0.0
            if len(values) > 1:
                deviation = statistics.stdev(values)
            record |= {"mean": statistics.fmean(values), "deviation": deviation}
            self.optuna.tell(trial, record["mean"])
        else:  # for TPE, worse than all that are done
            self.optuna.tell(trial, state=TrialState.PRUNED)
        self.save()
        best = ", the best so far" if record in self.ranked()[:1] else ""
        print(f"{line(record)}{best}  ({record['seconds']:.0f} s)", flush=True)
        states = self.counts()
        if states["failed"] >= FAILURES and not states["done"] + states["pruned"]:
            raise UserError(
                f"{states['failed']} trials failed and none was done; the last: {record['reason']}"
            )

    def watch(self, trial, record: dict, last: int, first_run: bool, rows: list[dict]) -> None:
        """Looks at the new rows of a run up to step `last`. Raises what ends it."""
        if self.stop.is_set():
            raise Stopped
        for row in rows:
            self.require_metric(row)
            step = row["step"]
            value = float(row.get(self.goal.metric, "nan"))
            is_new = math.isfinite(value) and str(step) not in record["curve"]
            if first_run and self.prunes and is_new:
                with self.lock:
                    record["curve"][str(step)] = value
                trial.report(value, step)
                if step < last and trial.should_prune():  # the last step costs nothing more
                    raise optuna.TrialPruned(f"{value:.5g} at step {step}, worse than the median")

    def require_metric(self, row: dict) -> None:
        """Raises EveryTrialFails where a metric of evaluations is still missing after the second one."""
        metric = self.goal.metric
        self.keys |= row.keys()
        if "eval/" in " ".join(row):
            self.evaluated.add(row["step"])
        if metric.startswith("eval/") and metric not in self.keys and len(self.evaluated) > 1:
            self.no_such_metric()

    def no_such_metric(self):
        """Raises EveryTrialFails with the keys that there are."""
        known = sorted(self.keys - {"step"})
        raise EveryTrialFails(
            f"--metric={self.goal.metric}: metrics.jsonl has no such key{did_you_mean(self.goal.metric, known)} "
            f"(it has: {', '.join(known)})"
        )

    def value_of(self, rows: list[dict]) -> float:
        """A run's value.

        Raises NumericsError where it has none that is finite, EveryTrialFails where it has none at all.
        """
        metric = self.goal.metric
        self.keys = self.keys.union(*rows)
        values = [float(row[metric]) for row in rows if metric in row]
        if not values:
            self.no_such_metric()
        if self.goal.take == "last":
            values = values[-1:]
        values = list(filter(math.isfinite, values))
        if not values:
            raise NumericsError(f"{metric} was not finite")
        if self.maximize:
            return max(values)
        return min(values)


def nothing_done(records: list[dict]) -> UserError:
    """The error of a search whose trials are over and none of them done: how many had which outcome, and why.

    Reasons that differ in numbers only, such as the value that a rule refuses, are counted as one.
    """
    counts = Counter()
    examples = {}
    for record in records:
        alike = record["state"], re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", record["reason"])
        counts[alike] += 1
        examples.setdefault(alike, record["reason"])
    lines = [f"none of {len(records)} trials was done, so there is no best:"]
    for alike, count in counts.most_common(REASONS):
        such = "such as " if count > 1 else ""
        lines.append(f"  {count} {alike[0]}: {such}{examples[alike]}")
    if len(counts) > REASONS:
        lines.append(f"  and {len(counts) - REASONS} other reasons, in results.json")
    lines.append("change --space or the config, and give another --workdir")
    kind = UserError
    states = {record["state"] for record in records}
    if states == {"refused"}:
        kind = ConfigError
    elif states == {"diverged"}:
        kind = NumericsError
    return kind("\n".join(lines))


def outcome(record: dict) -> str:
    """A trial's value, or why it has none."""
    if record["state"] != "done":
        return f"{record['state']}: {record['reason']}"
    mean = f"{record['mean']:.5g}"
    if len(record["by_seed"]) > 1:
        return f"{mean} ± {record['deviation']:.2g}"
    return mean


def line(record: dict) -> str:
    """A trial, its values and its outcome."""
    pairs = zip(record["values"], values_of(record))
    values = "  ".join(f"{key}={value}" for key, value in pairs)
    return f"trial {record['trial']:>3}  {values}  {outcome(record)}"


def values_of(record: dict) -> list[str]:
    """With at most four digits."""
    return list(map(readable, record["values"].values()))


def flags(record: dict) -> str:
    """A trial's values, to the last digit, for the command line."""
    return shlex.join(f"--config.{key}={value}" for key, value in record["values"].items())
