"""The rows of a run: what each has, when one is due, and who gets it (jaxlm/run/trackers.py)."""

import time
from pathlib import PurePath

import jax
from ml_collections import ConfigDict

from jaxlm.run.trackers import Console, Tracker, make_writers
from jaxlm.run.writers import Writer

# Of a step, where there are: a mixture of experts' routing, and what a task's loss gives besides.
MORE = ("expert_load", "dropped_tokens", "accuracy", "margin", "divergence", "moved_share")


class Monitor:
    """Logs a run on the first process; on the others every method does nothing.

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
        """flops_per_token: of the forward and backward pass. peak_flops: of one device a second, where it is known."""
        self.active = jax.process_index() == 0
        self.config = config
        self.start = start
        self.step_tokens = config.train.batch_size * config.data.seq_len
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.data_seconds = 0.0
        self.save_seconds = 0.0
        self.mark = (start, time.perf_counter())  # the step of the last row, and when it was done
        # Stochastic rounding changes few parameters a step, as it should.
        self.warned_of_rounding = config.optim.rounding == "stochastic"
        self.writers = []
        if self.active:
            self.console = Console()
            self.console.open(config, workdir, start)
            self.open_writers(workdir)

    def open_writers(self, workdir: PurePath) -> None:
        for writer in make_writers(self.config):
            self.writers.append(writer)
            line = self.try_to(writer, writer.open, self.config, workdir, self.start)
            if line:
                self.say(line)

    def try_to(self, writer: Writer, method, *args):
        """method(*args) of a writer. A tracker that raises gets no more rows in this run, and one line says why."""
        try:
            return method(*args)
        except Exception as error:
            if not isinstance(writer, Tracker):
                raise
            self.writers.remove(writer)
            why = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(
                f"{writer.name} failed and gets no more rows; training goes on, and the same command sends the missing "
                f"rows when it goes on ({why})"
            )

    def waited(self, seconds: float) -> None:
        """Adds to the time that the loop spent waiting for data."""
        self.data_seconds += seconds

    def saved(self, seconds: float) -> None:
        """Adds to the time that the loop waited for a checkpoint."""
        self.save_seconds += seconds

    def step(self, step: int, metrics: dict, finished: float) -> None:
        """After each step, with its metrics on the host; writes a row every log.every steps, and after the first.

        finished: when the step was done (perf_counter). Metrics may be handed on later, so that is no measure.
        """
        if not self.active:
            return
        self.console.advance(step)
        due = step % self.config.log.every == 0
        first = step == self.start + 1
        if not (due or first):
            return
        row = self.row_of(step, metrics, finished)
        self.mark = (step, finished)
        self.data_seconds = 0.0
        self.save_seconds = 0.0
        if due or step == 1:
            self.write(row)
        self.console.write(step, row)
        self.warn_of_rounding(row)

    def row_of(self, step: int, metrics: dict, finished: float) -> dict:
        """The row of the steps since the last one."""
        before, then = self.mark
        steps = step - before
        seconds = (finished - then) / steps
        rate = self.step_tokens / seconds
        timed = step > self.start + 1  # the first step compiles: its speed says nothing
        row = {
            "step": step,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "learning_rate": metrics["learning_rate"],
            "tokens": step * self.step_tokens,
        }
        if timed:
            row["tokens_per_second"] = round(rate, 1)
        row["step_seconds"] = round(seconds, 6)
        row["data_seconds"] = round(self.data_seconds / steps, 6)
        row["skipped"] = int(metrics["skipped"])
        if self.save_seconds:
            row["save_seconds"] = round(self.save_seconds, 6)
        for key in MORE:
            if key in metrics:
                row[key] = round(metrics[key], 4)
        if timed and self.peak_flops:
            peak = self.peak_flops * jax.device_count()
            row["mfu"] = round(rate * self.flops_per_token / peak, 4)
        return row

    def warn_of_rounding(self, row: dict) -> None:
        """Says once, after the warm-up, that a step has changed less than half of the bfloat16 parameters."""
        past_warmup = row["step"] > self.config.optim.warmup_steps
        if self.warned_of_rounding or not past_warmup or row.get("moved_share", 1.0) >= 0.5:
            return
        self.warned_of_rounding = True
        self.say(
            f"step {row['step']} changed {row['moved_share']:.1%} of the bfloat16 parameters; the updates of the "
            "others were 0 or rounded away (moved_share in metrics.jsonl), which optim.rounding=stochastic mends"
        )

    def evaluation(self, step: int, result: dict, samples: list[dict] = ()) -> None:
        """A row of eval/ metrics, and samples where there are: examples, each with the model's `answer`."""
        if not self.active:
            return
        row = {"step": step}
        for key, value in result.items():
            if isinstance(value, (int, float)):
                row[f"eval/{key}"] = value
        if samples:
            for writer in tuple(self.writers):
                self.try_to(writer, writer.samples, step, samples)
        self.write(row)
        self.console.write(step, row)

    def pause(self, began: float) -> None:
        """Takes what has passed since `began` (perf_counter) out of the step time."""
        self.mark = (self.mark[0], self.mark[1] + time.perf_counter() - began)

    def say(self, text: str) -> None:
        if self.active:
            self.console.say(text)

    def write(self, row: dict) -> None:
        for writer in tuple(self.writers):
            self.try_to(writer, writer.write, row["step"], row)

    def flush(self) -> None:
        for writer in tuple(self.writers):
            self.try_to(writer, writer.flush)

    def close(self) -> None:
        for writer in tuple(self.writers):
            self.try_to(writer, writer.close)
        if self.active:
            self.console.close()
