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
from jaxlm.tune.space import Dimension, holds, is_grid

try:
    import optuna
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState
except ImportError:  # the program says so
    optuna = None

FINISHED = ("done", "pruned", "refused", "diverged")  # others, running and failed, run again
FAILURES = 3  # and no other outcome: the values are not the reason
REASONS = 5  # shown of a search without results


class Vain(ConfigError):
    """What is wrong with every trial."""


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
        known = []
        for words in DIRECTIONS.values():
            for word in words.split("|"):
                known.append(word)
        near = did_you_mean(metric, [*known, *(f"eval/{word}" for word in known)])
        raise ConfigError(
            f"--metric={metric}: is less of it better, or more? Give --direction=minimize or maximize{near}"
        )
    return found[0]


class Study:
    """All trials. results.json is their only state: a change is in it before anything follows from it."""

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
        lists = [dimension.values.choices for dimension in space.values() if is_grid(dimension)]
        if lists:
            self.grid = [dict(zip(space, values)) for values in itertools.product(*lists)]
        else:
            self.grid = []
        parts = {
            "space": {key: d.text for key, d in space.items()},
            "config": flatten(config),
            "data": data,
        }
        named = {}
        for part, values in parts.items():
            for key, value in values.items():
                named[f"{part}.{key}"] = value
        self.asked = json.loads(json.dumps(asdict(goal) | named))
        self.records = []
        self.importances = {}
        self.keys = set()
        self.evaluated = set()
        self.lock = threading.Lock()
        self.stop = threading.Event()
        # A sweep is wanted whole; and the training loss, of single batches, says too little at one step.
        self.prunes = goal.prune and not self.grid and goal.metric.startswith("eval/")
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=resolve(config).optim.warmup_steps)
        self.optuna = optuna.create_study(
            direction="maximize" if self.maximize else "minimize", pruner=pruner
        )
        self.restore()

    def restore(self) -> None:
        """Takes up results.json, where there is one. Raises ConfigError where it is of another search."""
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
            pairs = {}
            for key in {**before["asked"], **self.asked}:
                pairs[key] = (before["asked"].get(key), self.asked.get(key))
            # Those with a dot have decided what is in the checkpoints; the goal, only what the finished trials came to.
            compared = [key for key in pairs if self.finished() or "." in key]

            def say(value):
                if value in (None, ""):
                    return "not given"
                return value

            changed = []
            for key in compared:
                for a, b in [pairs[key]]:
                    if a != b:
                        changed.append(f"  {key}: {say(a)} -> {say(b)}")
            if changed:
                raise ConfigError("\n".join([f"{path} is of another search:", *changed, again]))
        elif (self.workdir / "trials").exists():
            raise ConfigError(
                f"{path} is lost, and with it what the values of the trials there were; {again}"
            )
        for record in self.records:
            if record["state"] not in FINISHED:
                self.optuna.enqueue_trial(record["values"])
                continue
            done = record["state"] == "done"
            finished = optuna.trial.create_trial(
                state=TrialState.COMPLETE if done else TrialState.PRUNED,
                value=record["mean"] if done else None,
                params=record["values"],
                distributions=self.distributions,
                intermediate_values={int(step): value for step, value in record["curve"].items()},
            )
            self.optuna.add_trial(finished)
        recipe = {key: flatten(self.config)[key] for key in self.space}
        if (
            not self.records
            and not self.grid
            and all(holds(self.space[key], recipe[key]) for key in recipe)
        ):
            self.optuna.enqueue_trial(recipe)

    def results(self) -> dict:
        """What results.json holds."""
        ranked = self.ranked()
        if ranked:
            best = {"best": ranked[0] | {"flags": flags(ranked[0])}}
        else:
            best = {}
        counts = Counter(record["state"] for record in self.records)
        return best | {
            "counts": counts,
            "importances": self.importances,
            "trials": self.records,
            "asked": self.asked,
        }

    def ranked(self) -> list[dict]:
        """The trials that are done, the best first."""
        done = [record for record in self.records if record["state"] == "done"]
        return sorted(done, key=lambda record: record["mean"], reverse=self.maximize)

    def finished(self) -> int:
        return sum(record["state"] in FINISHED for record in self.records)

    def save(self) -> None:
        write_whole(self.workdir / "results.json", json.dumps(self.results(), indent=1) + "\n")

    def ask(self, trials: int):
        """The next of so many trials, those that were interrupted first; None where there is no other.

        Each has a sampler of its own, seeded by its number: a restart changes nothing.
        """
        with self.lock:
            number = len(self.optuna.trials)
            if not self.optuna.get_trials(states=[TrialState.WAITING]):
                if number >= trials:
                    return None
                if self.grid:
                    self.optuna.enqueue_trial(self.grid[number])
            seed = int(
                np.random.SeedSequence((self.goal.sampler_seed, number)).generate_state(1)[0]
            )
            self.optuna.sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)
            trial = self.optuna.ask(self.distributions)
            if trial.number == len(self.records):
                self.records.append({"trial": trial.number, "values": trial.params})
            # Of one that was interrupted, metrics.jsonl has the rest.
            self.records[trial.number] |= {
                "state": "running",
                "reason": "",
                "by_seed": [],
                "curve": {},
            }
            self.save()
        return trial

    def work(self, trials: int) -> None:
        """One trial after the other. What goes wrong with more than one of them ends the work of all threads."""
        try:
            while not self.stop.is_set() and (trial := self.ask(trials)):
                self.attempt(trial, self.records[trial.number])
        except Stopped:
            self.stop.set()
        except BaseException:
            self.stop.set()
            raise

    def attempt(self, trial, record: dict) -> None:
        """Runs a trial, whatever becomes of it. Raises Stopped, Vain, and UserError where every trial has failed."""
        config = self.config.copy_and_resolve_references()
        began = time.perf_counter()
        for key, value in record["values"].items():
            set_key(config, key, value)
        first = config.seed
        state = "done"
        reason = ""
        try:
            if problems := check(config):
                raise ConfigError("; ".join(problems))
            for seed in range(self.goal.seeds):
                config.seed = first + seed
                folder = self.workdir / "trials" / str(trial.number) / f"seed_{seed}"
                watch = partial(
                    self.watch, trial, record, config.train.stop_at or config.train.steps, seed == 0
                )
                value = self.value_of(self.run(config, folder, watch))
                with self.lock:
                    record["by_seed"].append(value)
        except Vain:
            raise
        except (optuna.TrialPruned, UserError) as error:
            outcomes = {
                optuna.TrialPruned: "pruned",
                ConfigError: "refused",
                NumericsError: "diverged",
            }
            state = outcomes.get(type(error), "failed")
            reason = " ".join(str(error).split())
        with self.lock:
            record |= {
                "state": state,
                "reason": reason,
                "seconds": round(time.perf_counter() - began, 1),
            }
            self.tell(trial, record)

    def tell(self, trial, record: dict) -> None:
        """Takes note of what came of a trial, and says it."""
        if record["state"] == "done":
            values = record["by_seed"]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            record |= {"mean": statistics.fmean(values), "deviation": deviation}
            self.optuna.tell(trial, record["mean"])
        else:  # for TPE, worse than all that are done
            self.optuna.tell(trial, state=TrialState.PRUNED)
        self.save()
        best = ", the best so far" if record in self.ranked()[:1] else ""
        print(f"{line(record)}{best}  ({record['seconds']:.0f} s)", flush=True)
        states = Counter(record["state"] for record in self.records)
        if states["failed"] >= FAILURES and not states["done"] + states["pruned"]:
            raise UserError(
                f"{states['failed']} trials failed and none was done; the last: {record['reason']}"
            )

    def watch(self, trial, record: dict, last: int, first_run: bool, rows: list[dict]) -> None:
        """Looks at the new rows of a run up to step `last`. Raises what ends it."""
        if self.stop.is_set():
            raise Stopped
        metric = self.goal.metric
        for row in rows:
            self.keys |= row.keys()
            self.evaluated |= (
                {row["step"]} if any(key.startswith("eval/") for key in row) else set()
            )
            if metric.startswith("eval/") and metric not in self.keys and len(self.evaluated) > 1:
                self.no_such_metric()
            step = row["step"]
            value = float(row.get(metric, "nan"))
            if (
                first_run
                and self.prunes
                and math.isfinite(value)
                and str(step) not in record["curve"]
            ):
                with self.lock:
                    record["curve"][str(step)] = value
                trial.report(value, step)
                if step < last and trial.should_prune():  # the last step costs nothing more
                    raise optuna.TrialPruned(f"{value:.5g} at step {step}, worse than the median")

    def no_such_metric(self):
        known = sorted(self.keys - {"step"})
        raise Vain(
            f"--metric={self.goal.metric}: metrics.jsonl has no such key{did_you_mean(self.goal.metric, known)} "
            f"(it has: {', '.join(known)})"
        )

    def value_of(self, rows: list[dict]) -> float:
        """A run's value. Raises NumericsError where it has none that is finite, Vain where it has none at all."""
        self.keys = self.keys.union(*rows)
        values = [float(row[self.goal.metric]) for row in rows if self.goal.metric in row]
        if not values:
            self.no_such_metric()
        values = [
            value
            for value in (values[-1:] if self.goal.take == "last" else values)
            if math.isfinite(value)
        ]
        if not values:
            raise NumericsError(f"{self.goal.metric} was not finite")
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
    states = {record["state"] for record in records}
    kinds = {"refused": ConfigError, "diverged": NumericsError}
    if len(states) == 1:
        kind = kinds.get(states.pop(), UserError)
    else:
        kind = UserError
    return kind("\n".join(lines))


def outcome(record: dict) -> str:
    """A trial's value, or why it has none."""
    if record["state"] != "done":
        return f"{record['state']}: {record['reason']}"
    return f"{record['mean']:.5g}" + (
        f" ± {record['deviation']:.2g}" if len(record["by_seed"]) > 1 else ""
    )


def line(record: dict) -> str:
    values = zip(record["values"], values_of(record))
    return f"trial {record['trial']:>3}  {'  '.join(f'{key}={value}' for key, value in values)}  {outcome(record)}"


def values_of(record: dict) -> list[str]:
    """To be read."""
    return [
        f"{value:.4g}" if isinstance(value, float) else str(value)
        for value in record["values"].values()
    ]


def flags(record: dict) -> str:
    """A trial's values, to the last digit, for the command line."""
    return shlex.join(f"--config.{key}={value}" for key, value in record["values"].items())
