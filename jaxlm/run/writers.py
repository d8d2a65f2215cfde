"""Where the rows of a run go: the interface, and what needs no account. jaxlm/run/trackers.py has the table of all."""

import json
import math
import statistics
import sys
from collections import deque
from pathlib import PurePath

from ml_collections import ConfigDict
from rich import progress
from rich.console import Console as Terminal

from jaxlm.cli import readable_json
from jaxlm.run.workdir import in_bucket, write_whole

# Figures of an evaluation that the console shows beside its loss.
SHOWN = (
    "bits_per_byte",
    "accuracy",
    "f1",
    "auc",
    "margin",
    "bleu",
    "chrf",
    "rougeL",
    "exact_match",
    "mse",
)


class Writer:
    """One place where rows go. A row is a dict from metric to number, and has its `step`.

    `open` comes first and `close` last; both once, on the first process alone.
    """

    def open(self, config: ConfigDict, workdir: PurePath, start_step: int) -> str:
        """Makes ready for the rows after `start_step`. Returns a line for the console, or ''."""
        return ""

    def write(self, step: int, row: dict) -> None:
        """One row of metrics."""

    def samples(self, step: int, samples: list[dict]) -> None:
        """Examples of the validation split, each with the model's `answer`."""

    def flush(self) -> None:
        """Puts everything so far where a crash cannot lose it. Called before each checkpoint."""

    def close(self) -> None:
        """After the last row, or after an error."""


class Console(Writer):
    """A progress bar in a terminal, lines elsewhere."""

    def open(self, config: ConfigDict, workdir: PurePath, start_step: int) -> str:
        self.stop_at = config.train.stop_at
        self.step_seconds = deque(maxlen=9)  # their median is an ETA that one slow row cannot move
        self.bar = None
        if sys.stdout.isatty():
            self.bar = progress_bar()
            self.task = self.bar.add_task(
                "", total=self.stop_at, completed=start_step, shown="compiling"
            )
            self.bar.start()
        return ""

    def advance(self, step: int) -> None:
        """Moves the progress bar, at every step."""
        if self.bar:
            self.bar.update(self.task, completed=step)

    def write(self, step: int, row: dict) -> None:
        if "eval/loss" in row:
            self.say(f"step {step:>6}  validation loss {row['eval/loss']:.4f}{figures_of(row)}")
            return
        text = f"loss {row['loss']:.4f}"
        if "tokens_per_second" in row:
            self.step_seconds.append(row["step_seconds"])
            text += f"  {row['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in row:
            text += f"  MFU {row['mfu']:.1%}"
        if self.bar:
            self.bar.update(self.task, shown=text)
            return
        rate = row["learning_rate"]
        eta = self.eta(step)
        self.say(f"step {step:>6}/{self.stop_at}  {text}  lr {rate:.2e}  ETA {eta}")

    def eta(self, step: int) -> str:
        if not self.step_seconds:
            return "--:--"
        return clock((self.stop_at - step) * statistics.median(self.step_seconds))

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def figures_of(row: dict) -> str:
    """The figures of an evaluation, as the console shows them after the loss."""
    text = ""
    for name in SHOWN:
        if f"eval/{name}" in row:
            text += f"  {name.replace('_', ' ')} {row[f'eval/{name}']:.4f}"
    return text


def progress_bar() -> progress.Progress:
    return progress.Progress(
        progress.BarColumn(24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[shown]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("ETA"),
        progress.TimeRemainingColumn(elapsed_when_finished=False),
        console=Terminal(),
    )


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


class JsonLines(Writer):
    """metrics.jsonl. Rows after the start step are dropped when it opens: they will be done again."""

    def open(self, config: ConfigDict, workdir: PurePath, start_step: int) -> str:
        path = workdir / "metrics.jsonl"
        keep_rows(path, start_step)
        if in_bucket(path):
            self.file = Upload(path)
        else:
            self.file = open(path, "a", buffering=1)  # noqa: SIM115 (closed in close)
        return ""

    def write(self, step: int, row: dict) -> None:
        line = {}
        for key, value in row.items():
            line[key] = value if math.isfinite(value) else str(value)  # JSON has no NaN or infinity
        self.file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Upload:
    """Lines for an object in a bucket. Objects can't be appended to, so `flush` writes all of them again."""

    def __init__(self, path: PurePath):
        self.path = path
        self.lines = [path.read_text()] if path.exists() else []

    def write(self, line: str) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        self.path.write_text("".join(self.lines))

    def close(self) -> None:
        """Writes nothing: the object may belong to another run by now."""


def read_rows(path: PurePath) -> list[dict]:
    """The rows of a metrics.jsonl, [] where there is none. A last line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def keep_rows(path: PurePath, last_step: int) -> None:
    """Drops the rows of later steps, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= last_step]
    write_whole(path, "".join(kept))


class TensorBoard(Writer):
    """Files in workdir/tensorboard, where tensorboardX is installed. None in a bucket."""

    board = None

    def open(self, config: ConfigDict, workdir: PurePath, start_step: int) -> str:
        try:
            from tensorboardX import SummaryWriter  # late: an extra
        except ImportError:
            return ""
        if in_bucket(workdir):  # after one failed write of its thread the run would wait forever
            return "no TensorBoard files in a bucket: metrics.jsonl has the same numbers"
        self.board = SummaryWriter(str(workdir / "tensorboard"))
        return ""

    def write(self, step: int, row: dict) -> None:
        if not self.board:
            return
        for key, value in row.items():
            if key != "step" and math.isfinite(value):
                self.board.add_scalar(key, value, step)

    def samples(self, step: int, samples: list[dict]) -> None:
        if self.board:
            text = "\n\n".join(readable_json(sample) for sample in samples)
            self.board.add_text("samples", text, step)

    def close(self) -> None:
        if self.board:
            self.board.close()
