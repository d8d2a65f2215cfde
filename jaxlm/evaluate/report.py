"""What jaxlm.evaluate tells of a model: a report for each word of --tasks, and the table of them all."""

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePath

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.check import mixture
from jaxlm.config.tasks import GROUP, task_of
from jaxlm.data.examples import label_names
from jaxlm.errors import ConfigError
from jaxlm.evaluate import metrics, pictures
from jaxlm.evaluate.absent import of_groups
from jaxlm.evaluate.evaluator import Evaluator
from jaxlm.evaluate.score import (
    answers_of,
    attempt,
    bleu_options,
    left_out,
    of_texts,
    score,
    warn_once,
    write_answers,
)
from jaxlm.generate.answer import BATCH


class Reporter:
    """Its `run` passes the examples through the model, once for all reports. args: those of jaxlm.evaluate."""

    def __init__(self, lm, config: ConfigDict, args):
        self.lm = lm
        self.config = config
        self.args = args
        self.evaluator = Evaluator(config, lm.mesh, lm.tokenizer)
        self.source = self.evaluator.sources[0]
        self.files = []

    def run(self) -> None:
        self.sums, self.scores, self.complete = self.evaluator.run(self.lm.params, self.lm.teacher)

    def loss(self) -> dict:
        return self.evaluator.figures(self.sums, self.complete)

    def labels(self) -> dict:
        """The figures of the task, each with its interval; an ROC curve and a confusion matrix."""
        config = self.config
        source = self.source
        result = {"examples": len(self.scores), **score(config, source, self.scores)}
        for line in left_out(config, source, self.scores, result):
            warn_once(line)
        if task_of(config).answer == "class":
            result |= self.of_classes(result)
        if self.args.bootstrap:
            result |= self.intervals(result)
        if task_of(config).answer == "class" and self.args.pictures:
            scores = np.stack(list(self.scores.values()))
            labels = self.gold()
            names = list(label_names(config))
            pictures.roc(self.picture("roc"), scores, labels, names)
            pictures.confusion(self.picture("confusion"), result["confusion"], names)
        return result

    def of_classes(self, figures: dict) -> dict:
        """What says nothing but the commonest class is right so often; and which classes the means leave out."""
        counts = np.bincount(self.gold())
        names = label_names(self.config)
        result = {
            "commonest_class": names[counts.argmax()],
            "commonest_share": counts.max() / counts.sum(),
        }
        if "f1_positive" in figures:
            result["positive_class"] = names[1]
        predicted = np.sum(figures["confusion"], axis=0)
        absent = leave_out_absent(figures["classes"], predicted)
        if absent:
            warn_once(
                f"precision, recall and f1 are means without what neither occurs nor is said: {', '.join(absent)}"
            )
        return result

    def intervals(self, figures: dict) -> dict:
        """The 95% intervals of the task's figures that have one."""
        names = [name for name in task_of(self.config).intervals if name in figures]
        numbers = list(self.scores)
        if names and not enough(numbers):
            return {}
        result = {}
        for name in names:

            def again(chosen, name=name) -> float:
                pairs = [(numbers[i], self.scores[numbers[i]]) for i in chosen]
                return score(self.config, self.source, None, pairs).get(name, np.nan)

            place = np.arange(len(numbers))
            interval = partial(self.interval, f"{name}_interval", again, place)
            result |= attempt(f"the interval of {name} is left out", interval)
        return result

    def calibration(self) -> dict:
        """Is a class of which the model is 80% sure right in 80% of the cases (Guo et al. 2017)?"""
        scores = np.stack(list(self.scores.values()))
        result = metrics.calibration(scores, scores.argmax(axis=1) == self.gold())
        if self.args.pictures:
            pictures.calibration(self.picture("calibration"), result)
        return {f"calibration_{name}": value for name, value in result.items()}

    def texts(self) -> dict:
        """BLEU, chrF and ROUGE of what the model writes."""
        said, wanted = self.written()
        result = of_texts(self.config, said, wanted)
        if self.args.bootstrap and "bleu" in result and enough(said):
            counts = metrics.bleu_counts(said, wanted, **bleu_options(self.config))
            result |= self.interval("bleu_interval", metrics.bleu_of, counts)
        return result

    def samples(self) -> dict:
        """Three texts: answers to the first examples, or what follows nothing."""
        if task_of(self.config).writes_text:
            said, wanted = self.written()
            return {
                "samples": [f"{text!r} (wanted: {want!r})" for text, want in zip(said[:3], wanted)]
            }
        start = "" if self.lm.tokenizer.bos_id is not None else "\n"
        return {"samples": self.lm.generate(start, max_tokens=100, num_samples=3)}

    def sources(self) -> dict:
        """The loss on each directory of data.mixture."""
        parts = {}
        for path, _ in mixture(self.config):
            alone = self.config.copy_and_resolve_references()
            alone.data.path = path
            alone.data.mixture = ""
            parts[path] = Evaluator(alone, self.lm.mesh, self.lm.tokenizer)(
                self.lm.params, self.lm.teacher
            )
        return {"sources": parts}

    def groups(self) -> dict:
        """The figures of each value of the examples' column `group`."""
        groups = {}
        for number in self.scores:
            groups.setdefault(str(self.source.examples[number].get(GROUP, "")), []).append(number)
        parts = {}
        for name, numbers in sorted(groups.items(), key=lambda item: -len(item[1])):
            chosen = {i: self.scores[i] for i in numbers}
            figures = attempt(
                f"the figures of group {name} are left out",
                partial(score, self.config, self.source, chosen),
            )
            parts[name] = {"count": len(numbers)} | {
                k: v for k, v in figures.items() if isinstance(v, float)
            }
        for line in of_groups(parts):
            warn_once(line)
        return {"groups": parts}

    def written(self) -> tuple[list[str], list[str]]:
        if not hasattr(self, "_written"):
            self._written = write_answers(self.config, self.source, self.lm.params, tell=progress)
        return self._written

    def gold(self) -> np.ndarray:
        return np.array([self.source.pieces[i]["label"] for i in self.scores])

    def interval(self, name: str, metric, *arrays) -> dict:
        low, high = metrics.bootstrap(metric, *arrays, samples=self.args.bootstrap)
        return {name: [round(low, 6), round(high, 6)]}

    def picture(self, name: str) -> Path:
        self.files.append(f"{name}.png")
        return Path(self.args.pictures) / self.files[-1]


def enough(examples: Sequence) -> bool:
    """Whether there are examples to resample; where not, that is told."""
    if len(examples) < 2:
        warn_once("95% intervals are left out: there is one example, and resampling needs two")
    return len(examples) > 1


def progress(done: int, total: int) -> None:
    """Says how many texts are written, of those that take more than one turn."""
    if total > BATCH and jax.process_index() == 0:
        print(f"{done:,} of {total:,} texts are written", file=sys.stderr, flush=True)


MANY = 20  # classes, of which a table of several runs has the F1 of none
REPORTS = ("loss", "labels", "calibration", "texts", "samples", "sources", "groups")


def usual(config: ConfigDict, source) -> list[str]:
    """The reports that a task's model is for."""
    task = task_of(config)
    words = ["loss"]
    words += (
        ["labels"] * task.has_head
        + ["calibration"] * (task.answer == "class")
        + ["texts"] * task.writes_text
    )
    words += ["groups"] * (task.has_head and any(GROUP in example for example in source.examples))
    return words + ["sources"] * (not task.from_examples and len(mixture(config)) > 1)


def report(lm, config: ConfigDict, asked: list[str] | None, workdir: str, args) -> dict:
    """The figures of all reports, one flat dict; what does not go with the task is told, and left out."""
    reporter = Reporter(lm, config, args)
    result = {}
    fits = {
        "labels": task_of(config).has_head,
        "groups": "groups" in usual(config, reporter.source),
        "calibration": task_of(config).answer == "class",
        "texts": task_of(config).writes_text,
        "samples": task_of(config).answer in ("text", "continuation"),
        "sources": not task_of(config).from_examples,
    }
    words = asked or usual(config, reporter.source)
    if not any(fits.get(word, True) for word in words):
        fit = ", ".join(word for word in REPORTS if fits.get(word, True))
        raise ConfigError(
            f"--tasks={','.join(words)}: not for task {config.task.name} on these data; {fit} are"
        )
    reporter.run()
    for word in words:
        if not fits.get(word, True):
            print(f"--tasks: {word} is not for task {config.task.name}")
            continue
        result |= attempt(
            f"the report {word} is left out", getattr(reporter, word), passes=(ConfigError, OSError)
        )
    if not result:
        result = reporter.loss()
    if args.pictures and jax.process_index() == 0 and (Path(workdir) / "metrics.jsonl").is_file():
        pictures.losses(reporter.picture("losses"), Path(workdir) / "metrics.jsonl")
    if args.answers and jax.process_index() == 0:
        rows = answers_of(
            config,
            reporter.source,
            reporter.scores,
            reporter.written if task_of(config).writes_text else None,
        )
        Path(args.answers).write_text(
            "".join(cli.readable_json(row) + "\n" for row in rows), "utf-8"
        )
    if reporter.files and jax.process_index() == 0:
        print(f"wrote {', '.join(reporter.files)} to {args.pictures}")
    return result


def in_digits(value: int | float | str) -> str:
    """To be read: four decimals, of numbers that would be a line of digits four digits."""
    if isinstance(value, float):
        if abs(value) < 1e9:
            return f"{value:.4f}"
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value


def leave_out_absent(rows: list[dict], predicted_C) -> list[str]:
    """The classes that neither occur nor are predicted; their rows keep the count alone, since all rates are 0 / 0."""
    absent = []
    for row, times in zip(rows, predicted_C):
        if row["count"] or times:
            continue
        absent.append(row["name"])
        for rate in ("precision", "recall", "f1"):
            row.pop(rate, None)
    return absent


def table(result: dict) -> list[str]:
    """The lines that are printed: figures, then tables of classes, sources and groups, then texts."""
    plain = {key: value for key, value in result.items() if isinstance(value, (int, float, str))}
    width = max(map(len, plain))
    lines = []
    for key, value in plain.items():
        shown = in_digits(value)
        if f"{key}_interval" in result:
            low, high = result[f"{key}_interval"]
            shown += f"  ({in_digits(low)} to {in_digits(high)}: 95% interval)"
        lines.append(f"{key:{width}}  {shown}")
    for name in ("classes", "tags", "entities", "sources", "groups"):
        if rows := result.get(name):
            if isinstance(rows, dict):
                rows = [{name: key, **row} for key, row in rows.items()]
            else:
                rows = rows
            lines += ["", *columns(rows)]
    return lines + [
        f"\n--- sample {i} ---\n{text}" for i, text in enumerate(result.get("samples", ()), 1)
    ]


def comparison(results: dict[str, dict]) -> list[str]:
    """A column for each run, a line for each figure that any of them has, and one for its interval."""
    keys = dict.fromkeys(
        k for r in results.values() for k, x in r.items() if isinstance(x, (int, float, str))
    )
    last = {workdir: PurePath(workdir).name for workdir in results}
    if len(set(last.values())) == len(last):
        names = last
    else:
        names = {workdir: workdir for workdir in results}

    def row(name, cell):
        return {"": name} | {names[workdir]: cell(result) for workdir, result in results.items()}

    rows = []
    for key in keys:
        shown = short_path if key == "data" else lambda x: x

        def between(r, key=f"{key}_interval"):
            return " to ".join(map(in_digits, r.get(key, ())))

        rows.append(row(key, lambda r, key=key, shown=shown: shown(r.get(key, ""))))
        rows += [row("  95% interval", between)] * any(
            f"{key}_interval" in r for r in results.values()
        )
    classes = dict.fromkeys(each["name"] for r in results.values() for each in r.get("classes", ()))
    for name in classes if len(classes) <= MANY else ():
        rows.append(row(f"f1 of {name}", partial(f1_of, name)))
    return columns(rows)


def f1_of(name: str, result: dict) -> float | str:
    """The F1 of a class in a run's figures, '' where it has none."""
    for each in result.get("classes", ()):
        if each["name"] == name:
            return each.get("f1", "")
    return ""


def short_path(files: str) -> str:
    """The names alone: of a file or a directory, of two in parallel (A+B), of a mixture (A=0.7,B=0.3)."""
    return re.sub(r"[^+,]*/(?=[^+,])", "", files)


def columns(rows: list[dict]) -> list[str]:
    """Lines of a table, a row under the names of all that any row has."""
    keys = dict.fromkeys(
        key for row in rows for key, value in row.items() if isinstance(value, (int, float, str))
    )
    cells = [list(keys)] + [[in_digits(r.get(k, "")) for k in keys] for r in rows]
    widths = []
    for i in range(len(keys)):
        widths.append(max(len(row[i]) for row in cells))
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        for row in cells
    ]
