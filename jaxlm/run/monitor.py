"""What people see of a run: metrics.jsonl always, TensorBoard when installed, and a console one likes to watch."""

import json
import math
import shlex
import statistics
import sys
import time
from collections import deque
from pathlib import PurePath

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxlm.config.tasks import task_of
from jaxlm.errors import DataError
from jaxlm.run.workdir import in_bucket, write_whole

# Of a step, where there are: a mixture of experts' routing, and what a task's loss says besides.
MORE = ("expert_load", "dropped_tokens", "accuracy", "margin", "divergence", "moved_share")
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


class Monitor:
    """Logs a run on the first host; on the others every method does nothing.

    Rows of metrics.jsonl after `start`, redone because of a restart, are dropped, so that each step appears once.
    """

    def __init__(
        self,
        workdir: PurePath,
        config: ConfigDict,
        start: int,
        flops_per_token: int,
        peak_flops: float | None,
    ):
        self.active = jax.process_index() == 0
        self.config = config
        self.start = start
        self.step_tokens = config.train.batch_size * config.data.seq_len
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.data_seconds = self.save_seconds = 0.0
        self.paces = deque(
            maxlen=9
        )  # seconds a step between the last rows, for an ETA that one stall does not move
        self.mark = (start, time.perf_counter())
        self.told_moved = (
            config.optim.rounding == "stochastic"
        )  # where few are changed by each step, as they should be
        if not self.active:
            return
        path = workdir / "metrics.jsonl"
        keep_rows(path, start)
        if in_bucket(path):
            self.file = Upload(path)
        else:
            self.file = open(path, "a", buffering=1)  # noqa: SIM115 (closed in close)
        self.board = tensorboard(workdir) if config.log.tensorboard else None
        self.progress = progress_bar() if sys.stdout.isatty() else None
        if self.progress:
            self.task = self.progress.add_task(
                "", total=config.train.stop_at, completed=start, shown="compiling"
            )
            self.progress.start()

    def waited(self, seconds: float) -> None:
        """Adds to the time that the loop spent waiting for data."""
        self.data_seconds += seconds

    def saved(self, seconds: float) -> None:
        """Adds to the time that the loop stood still for a checkpoint."""
        self.save_seconds += seconds

    def step(self, step: int, metrics: dict, finished: float) -> None:
        """After each step, with its metrics on the host; writes a row every log.every steps, and after the first.

        finished: when the step was done (perf_counter). Metrics may be handed on later, so that is no measure.
        """
        if not self.active:
            return
        if self.progress:
            self.progress.update(self.task, completed=step)
        if step % self.config.log.every and step != self.start + 1:
            return
        before, then = self.mark
        steps = step - before
        seconds = (finished - then) / steps
        rate = self.step_tokens / seconds
        row = {
            "step": step,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "learning_rate": metrics["learning_rate"],
            "tokens": step * self.step_tokens,
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(seconds, 6),
            "data_seconds": round(self.data_seconds / steps, 6),
            "skipped": int(metrics["skipped"]),
        }
        row |= {"save_seconds": round(self.save_seconds, 6)} if self.save_seconds else {}
        row |= {key: round(metrics[key], 4) for key in MORE if key in metrics}
        if self.peak_flops:
            row["mfu"] = round(
                rate * self.flops_per_token / (self.peak_flops * jax.device_count()), 4
            )
        if step == self.start + 1:  # compiling: no speed is measured by it
            row = {k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu")}
        else:
            self.paces.append(seconds)
        self.mark = (step, finished)
        self.data_seconds = 0.0
        self.save_seconds = 0.0
        if step % self.config.log.every == 0 or step == 1:
            self.write(row)
        self.show(row)
        self.tell_moved(row)

    def tell_moved(self, row: dict) -> None:
        """Says once, after the warm-up, that a step has changed less than half of the bfloat16 parameters."""
        past_warmup = row["step"] > self.config.optim.warmup_steps
        if self.told_moved or not past_warmup or row.get("moved_share", 1.0) >= 0.5:
            return
        self.told_moved = True
        self.say(
            f"step {row['step']} changed {row['moved_share']:.1%} of the bfloat16 parameters; the updates of the "
            "others were 0 or rounded away (moved_share in metrics.jsonl), which optim.rounding=stochastic mends"
        )

    def show(self, row: dict) -> None:
        text = f"loss {row['loss']:.4f}"
        if "tokens_per_second" in row:
            text += f"  {row['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in row:
            text += f"  MFU {row['mfu']:.1%}"
        if self.progress:
            self.progress.update(self.task, shown=text)
        else:
            stop = self.config.train.stop_at
            if self.paces:
                left = clock((stop - row["step"]) * statistics.median(self.paces))
            else:
                left = "--:--"
            print(
                f"step {row['step']:>6}/{stop}  {text}  lr {row['learning_rate']:.2e}  ETA {left}",
                flush=True,
            )

    def evaluation(self, step: int, result: dict) -> None:
        """A row of eval/ metrics. The time since the last row is not counted as the steps'."""
        if self.active:
            numbers = {
                key: value for key, value in result.items() if isinstance(value, (int, float))
            }
            self.write({"step": step} | {f"eval/{key}": value for key, value in numbers.items()})
            told = "".join(
                f"  {key.replace('_', ' ')} {result[key]:.4f}" for key in SHOWN if key in result
            )
            self.say(f"step {step:>6}  validation loss {result['loss']:.4f}{told}")

    def pause(self, began: float) -> None:
        """Takes what has passed since `began` (perf_counter) out of the step time."""
        self.mark = (self.mark[0], self.mark[1] + time.perf_counter() - began)

    def say(self, text: str) -> None:
        if self.active:
            self.progress.console.print(text, highlight=False) if self.progress else print(
                text, flush=True
            )

    def write(self, row: dict) -> None:
        # JSON has no NaN or infinity
        row = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in row.items()
        }
        self.file.write(json.dumps(row) + "\n")
        if self.board:
            for key, value in row.items():
                if key != "step" and not isinstance(value, str):
                    self.board.add_scalar(key, value, row["step"])

    def flush(self) -> None:
        if self.active:
            self.file.flush()

    def close(self) -> None:
        if self.active:
            self.file.close()
            if self.board:
                self.board.close()
            if self.progress:
                self.progress.stop()


class Upload:
    """Lines to append to an object in a bucket, which cannot be appended to: `flush` writes all of it again."""

    def __init__(self, path: PurePath):
        self.path = path
        self.lines = [path.read_text()] if path.exists() else []

    def write(self, line: str) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        self.path.write_text("".join(self.lines))

    def close(self) -> None:
        """Writes nothing: it may belong to another run by now."""


EXAMPLE = (
    '{"question": "Who wrote it?", "context": "Ann wrote it."}'  # of a task whose answer is a span
)


def proposal(config: ConfigDict, workdir: PurePath, tokenizer, flags: str = "") -> str:
    """The command that shows what a trained model does."""
    task = task_of(config)
    program = "evaluate" if task.answers_nothing else "generate"
    prompt = ""
    if task.answer == "hidden":
        prompt = "[MASK]"
    elif task.answer == "span":
        prompt = EXAMPLE
    elif len(task.asked_columns) > 1:
        text = known_text(tokenizer, config.data.lowercase)
        prompt = json.dumps(dict.fromkeys(task.asked_columns, text))
    elif task.answers_examples or (program == "generate" and tokenizer.bos_id is None):
        prompt = known_text(tokenizer, config.data.lowercase)
    asked = f" --prompt={shlex.quote(prompt)}" if prompt else ""
    return f"try python -m jaxlm.{program} --workdir={shlex.quote(str(workdir))}{flags}{asked}"


def known_text(tokenizer, lowercase: bool) -> str:
    """TEXT, for the reader to replace; where a tokenizer of characters lacks these, one that it has."""
    try:
        tokenizer.encode("text" if lowercase else "TEXT")
    except DataError:
        shown = [character for character in tokenizer.characters if character.isalnum()]
        return (shown or tokenizer.characters)[0]
    return "TEXT"


def keep_rows(path: PurePath, last_step: int) -> None:
    """Drops the rows of later steps, and a last line that a crash cut short."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                rows.append(line + "\n")
        except ValueError:
            continue
    write_whole(path, "".join(rows))


def tensorboard(workdir: PurePath):
    """A writer of workdir/tensorboard, or None where tensorboardX is not installed and in a bucket."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    if in_bucket(
        workdir
    ):  # it writes from a thread, and where that fails once the run would wait for it for ever
        print("no TensorBoard files in a bucket: metrics.jsonl has the same numbers")
        return None
    return SummaryWriter(str(workdir / "tensorboard"))


def progress_bar() -> Progress:
    return Progress(
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=Console(),
    )


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"
