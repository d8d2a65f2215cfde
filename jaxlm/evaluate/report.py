"""What jaxlm.evaluate reports on a model: figures for each word of --tasks, and tables of them all."""

import io
import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePath

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxlm import cli
from jaxlm.config.check import mixture
from jaxlm.config.tasks import GROUP, task_of
from jaxlm.data.labels import label_names
from jaxlm.errors import ConfigError
from jaxlm.evaluate import metrics, pictures
from jaxlm.evaluate.absent import of_groups
from jaxlm.evaluate.evaluator import Evaluator
from jaxlm.evaluate.score import (
    answers_of,
    attempt,
    bleu_options,
    labels_of,
    left_out,
    of_texts,
    score,
    warn_once,
    write_answers,
)
from jaxlm.generate.answer import BATCH

# Task.answer -> the value of these figures where there is no mistake; those of numbers are no shares of examples.
PERFECT = {"class": 1, "labels": 1, "span": 100, "text": 100}
MANY = 20  # classes: a table of several runs leaves out the F1 of more
REPORTS = ("loss", "labels", "calibration", "texts", "samples", "sources", "groups")


class Reporter:
    """A method for each report. `run` passes the examples through the model once for all. args: of jaxlm.evaluate."""

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
            result |= attempt("95% intervals are left out", partial(self.intervals, result))
        if task_of(config).answer == "class" and self.args.pictures:
            names = list(label_names(config))
            pictures.roc(self.picture("roc"), self.score_rows(), self.gold(), names)
            pictures.confusion(self.picture("confusion"), result["confusion"], names)
        return result

    def of_classes(self, figures: dict) -> dict:
        """How often it would be right to say the commonest class; and a warning of classes that no mean includes."""
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
        if not names or not enough(numbers):
            return {}

        def draw(chosen) -> list[float]:
            pairs = [(numbers[i], self.scores[numbers[i]]) for i in chosen]
            drawn = score(self.config, self.source, None, pairs)
            return [drawn.get(name, np.nan) for name in names]

        places = np.arange(len(numbers))
        draws = metrics.resample(draw, places, samples=self.args.bootstrap)
        result = {}
        for name, values in zip(names, np.array(draws).T):
            interval = partial(self.interval, name, values, len(numbers))
            result |= attempt(f"the interval of {name} is left out", interval)
        return result

    def interval(self, name: str, values: Sequence[float], total: int) -> dict:
        """{NAME_interval: [low, high]}, 95%, of a figure's values in draws of `total` examples.

        Where all draws give the same, as those of a model without a mistake do, resampling knows nothing of the
        mistakes that other examples would show: then Wilson's interval of the figure as a share of the examples.
        """
        low, high = metrics.percentile_interval(values)
        perfect = PERFECT.get(task_of(self.config).answer)
        if perfect and high - low < 1e-9 * perfect:
            share = min(low / perfect, 1.0)
            low, high = metrics.wilson_interval(share, total)
            low *= perfect
            high *= perfect
        return {f"{name}_interval": [round(low, 6), round(high, 6)]}

    def calibration(self) -> dict:
        """Is a class of which the model is 80% sure right in 80% of the cases (Guo et al. 2017)?"""
        scores = self.score_rows()
        result = metrics.calibration(scores, scores.argmax(axis=1) == self.gold())
        if self.args.pictures:
            pictures.calibration(self.picture("calibration"), result)
        figures = {}
        for name, value in result.items():
            figures[f"calibration_{name}"] = value
        return figures

    def texts(self) -> dict:
        """BLEU, chrF and ROUGE of what the model writes."""
        texts, references = self.written()
        result = of_texts(self.config, texts, references)
        if self.args.bootstrap and "bleu" in result and enough(texts):
            counts = metrics.bleu_counts(texts, references, **bleu_options(self.config))
            values = metrics.resample(metrics.bleu_of, counts, samples=self.args.bootstrap)
            result |= self.interval("bleu", values, len(texts))
        return result

    def samples(self) -> dict:
        """Three texts: answers to the first examples, or what follows nothing."""
        if task_of(self.config).writes_text:
            lines = []
            for text, reference in list(zip(*self.written()))[:3]:
                lines.append(f"{text!r} (wanted: {reference!r})")
            return {"samples": lines}
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
        """The figures of each value of the examples' column `group`, the largest group first."""
        groups = {}
        for number in self.scores:
            name = str(self.source.examples[number].get(GROUP, ""))
            groups.setdefault(name, {})[number] = self.scores[number]
        parts = {}
        for name in sorted(groups, key=lambda name: -len(groups[name])):
            figures = attempt(
                f"the figures of group {name} are left out",
                partial(score, self.config, self.source, groups[name]),
            )
            parts[name] = {"count": len(groups[name])}
            for key, value in figures.items():
                if isinstance(value, float):
                    parts[name][key] = value
        for line in of_groups(parts):
            warn_once(line)
        return {"groups": parts}

    def written(self) -> tuple[list[str], list[str]]:
        """(texts of the model, references) of all examples, written once."""
        if not hasattr(self, "_written"):
            self._written = write_answers(
                self.config, self.source, self.lm.params, progress=print_progress
            )
        return self._written

    def gold(self) -> np.ndarray:
        """The right labels, [N]."""
        return labels_of(self.source, self.scores)

    def score_rows(self) -> np.ndarray:
        """Scores [N, C] in the order of `gold`."""
        return np.stack(list(self.scores.values()))

    def picture(self, name: str) -> Path:
        self.files.append(f"{name}.png")
        return Path(self.args.pictures) / self.files[-1]


def enough(examples: Sequence) -> bool:
    """Whether there are examples to resample; a warning where there are not."""
    if len(examples) < 2:
        warn_once("95% intervals are left out: there is one example, and resampling needs two")
    return len(examples) > 1


def print_progress(done: int, total: int) -> None:
    """How many texts are written, where they take more than one batch."""
    if total > BATCH and jax.process_index() == 0:
        print(f"{done:,} of {total:,} texts are written", file=sys.stderr, flush=True)


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
    """The figures of all reports, one flat dict; a report that does not fit the task is left out, and named.

    asked: reports; None: the usual ones of the task. args: of jaxlm.evaluate. Raises ConfigError where none fits.
    """
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
    fitting = [word for word in REPORTS if fits.get(word, True)]
    if not set(words) & set(fitting):
        raise ConfigError(
            f"--tasks={','.join(words)}: not for task {config.task.name} on these data; {', '.join(fitting)} are"
        )
    reporter.run()
    for word in words:
        if word not in fitting:
            print(f"--tasks: {word} is not for task {config.task.name}")
            continue
        what = f"the report {word} is left out"
        result |= attempt(what, getattr(reporter, word), passes=(ConfigError, OSError))
    if not result:
        result = reporter.loss()
    if jax.process_index() == 0:
        write_files(reporter, Path(workdir) / "metrics.jsonl")
    return result


def write_files(reporter: Reporter, log: Path) -> None:
    """The files that --pictures and --answers ask for. log: the run's metrics.jsonl, drawn where it is there."""
    args = reporter.args
    if args.pictures and log.is_file():
        pictures.losses(reporter.picture("losses"), log)
    if args.answers:
        rows = answers_of(
            reporter.config,
            reporter.source,
            reporter.scores,
            reporter.written if task_of(reporter.config).writes_text else None,
        )
        lines = [*map(cli.readable_json, rows), ""]
        Path(args.answers).write_text("\n".join(lines), "utf-8")
    if reporter.files:
        print(f"wrote {', '.join(reporter.files)} to {args.pictures}")


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


# ---------------------------------------------------------------- tables

PLAIN = (int, float, str)  # what a cell of a table holds
WIDTH = 100_000  # characters: a table is never folded


def in_digits(value: int | float | str) -> str:
    """A number for people: four decimals, or four digits where these would make a long line."""
    if isinstance(value, float):
        if abs(value) < 1e9:
            return f"{value:.4f}"
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value


def table(result: dict) -> list[str]:
    """The lines that are printed: figures, then tables of classes, sources and groups, then texts."""
    figures = Table.grid(padding=(0, 2, 0, 0))
    for key, value in result.items():
        if not isinstance(value, PLAIN):
            continue
        shown = in_digits(value)
        if f"{key}_interval" in result:
            shown += f"  ({in_words(result[f'{key}_interval'])}: 95% interval)"
        figures.add_row(Text(key), Text(shown))
    lines = rendered(figures)
    for name in ("classes", "tags", "entities", "sources", "groups"):
        rows = result.get(name)
        if isinstance(rows, dict):
            rows = [{name: key, **row} for key, row in rows.items()]
        if rows:
            lines += ["", *columns(rows)]
    for i, text in enumerate(result.get("samples", ()), 1):
        lines.append(f"\n--- sample {i} ---\n{text}")
    return lines


def comparison(results: dict[str, dict]) -> list[str]:
    """The lines of a table: a column for each run, a row for each figure that any has, and one for its interval."""
    names = [PurePath(workdir).name for workdir in results]
    if len(set(names)) < len(names):
        names = list(results)
    runs = list(results.values())
    rows = []
    for key in plain_keys(runs):
        cells = values_of(key, runs)
        if key == "data":
            cells = map(short_path, cells)
        rows.append({"": key, **dict(zip(names, cells))})
        intervals = values_of(f"{key}_interval", runs)
        if any(intervals):
            cells = map(in_words, intervals)
            rows.append({"": "  95% interval", **dict(zip(names, cells))})
    classes = {}
    for run in runs:
        for row in run.get("classes", ()):
            classes[row["name"]] = None
    if len(classes) <= MANY:
        for name in classes:
            cells = map(partial(f1_of, name), runs)
            rows.append({"": f"f1 of {name}", **dict(zip(names, cells))})
    return columns(rows)


def values_of(key: str, runs: Sequence[dict]) -> list:
    """What each run has under a key, '' where it has nothing."""
    return [run.get(key, "") for run in runs]


def in_words(interval: Sequence[float]) -> str:
    return " to ".join(map(in_digits, interval))


def f1_of(name: str, result: dict) -> float | str:
    """The F1 of a class in a run's figures, '' where it has none."""
    for each in result.get("classes", ()):
        if each["name"] == name:
            return each.get("f1", "")
    return ""


def short_path(files: str) -> str:
    """The names alone: of a file or a directory, of two in parallel (A+B), of a mixture (A=0.7,B=0.3)."""
    return re.sub(r"[^+,]*/(?=[^+,])", "", files)


def plain_keys(rows: Iterable[dict]) -> list[str]:
    """The keys under which any of the rows has a number or a text, in their order."""
    keys = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, PLAIN):
                keys[key] = None
    return list(keys)


def columns(rows: list[dict]) -> list[str]:
    """Lines of a table, a row under the names of all that any row has; the first column to the left."""
    keys = plain_keys(rows)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for key in keys:
        grid.add_column(Text(key), justify="right")
    for column in grid.columns[:1]:
        column.justify = "left"
    for row in rows:
        cells = [in_digits(row.get(key, "")) for key in keys]
        grid.add_row(*map(Text, cells))
    return rendered(grid)


def rendered(grid: Table) -> list[str]:
    """The lines of a table as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(grid)
    text = console.file.getvalue().rstrip("\n")
    return list(map(str.rstrip, text.split("\n")))
