"""The one training loop: `train` starts or resumes a run, `Run` loops over its steps."""

import json
import signal
import time
from pathlib import PurePath

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.keys import COUNTED
from jaxlm.config.recipe import flatten
from jaxlm.config.tasks import task_of
from jaxlm.data.batches import Prefetch, fingerprint, load_tokenizer, train_batches
from jaxlm.data.tokenization.specials import write_tokenizer
from jaxlm.errors import DataError, NumericsError
from jaxlm.evaluate.evaluator import Evaluator
from jaxlm.evaluate.score import FAULTS, in_a_line
from jaxlm.parallel import hosts
from jaxlm.parallel.chips import peak_flops
from jaxlm.parallel.mesh import make_mesh
from jaxlm.run.checkpoint import Checkpoints, describe_run, require_checkpoints
from jaxlm.run.counted import count_parameters
from jaxlm.run.monitor import Monitor
from jaxlm.run.next_command import next_command
from jaxlm.run.resume import rate_jump, start_state, write_config
from jaxlm.run.trackers import forget
from jaxlm.run.warm_start import read_teacher
from jaxlm.run.workdir import Hold
from jaxlm.step import costs
from jaxlm.step.patterns import partition
from jaxlm.step.rounding import warnings
from jaxlm.step.state import State, jit_train_step
from jaxlm.train.best import Best
from jaxlm.train.stop_signal import StopSignal


def train(
    config: ConfigDict, workdir: PurePath, allow_data_change: bool = False, start_over: bool = False
) -> int:
    """Runs a resolved config to train.stop_at. Returns the exit code: 0, or 75 where a signal asked it to stop.

    Raises ConfigError where the workdir can't be used, CheckpointError where its checkpoint doesn't fit the config or
    the data, and NumericsError where the loss stays non-finite.
    """
    hold = Hold(workdir)
    prepare_workdir(workdir, config, start_over)
    mesh = make_mesh(config)
    stop = StopSignal()
    data = fingerprint(config)
    tokenizer = load_tokenizer(config)
    counted = None
    if config.model.name in COUNTED:
        counted = count_parameters(config)
    hosts.require_same(
        json.dumps([flatten(config), data]), "the config or the data differ between processes"
    )
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir, config)
        state, meta = start_state(config, mesh, checkpoints, data, allow_data_change)
        if config.task.teacher_model:
            state = state.replace(teacher=read_teacher(config, mesh))
        start = int(state.step)
        if jax.process_index() == 0:
            write_config(workdir, config, meta)
            write_tokenizer(workdir, tokenizer)
        monitor = make_monitor(workdir, config, state)
        for line in introduction(config, mesh, state, meta, workdir):
            monitor.say(line)
        best = Best(config.eval.metric, *meta.get("best", ()))
        meta = describe_run(config, tokenizer, data)
        try:
            run = Run(config, mesh, checkpoints, monitor, meta, best, hold)
            if counted is None:
                last_step = run.loop(state, start, stop)
            else:
                last_step = run.keep(state, counted)
            checkpoints.wait()
        finally:
            monitor.close()
            checkpoints.close()
            hold.close()
    stopped = stop.number is not None and last_step < config.train.stop_at
    if jax.process_index() == 0:
        if stopped:
            why = f"stopped by {signal.Signals(stop.number).name}"
            then = "the same command goes on"
        else:
            why = "done"
            flags = " --step=best" if best.since and config.checkpoint.keep_best else ""
            then = next_command(config, workdir, tokenizer, flags)
        print(f"{why} at step {last_step}, saved in {checkpoints.path}; {then}")
    if stopped:
        return cli.PREEMPTED
    return 0


def prepare_workdir(workdir: PurePath, config: ConfigDict, start_over: bool) -> None:
    """Raises CheckpointError where the run's checkpoints are gone, unless it starts over."""
    if not start_over:
        require_checkpoints(workdir, config)
    elif jax.process_index() == 0:
        forget(workdir)


def make_monitor(workdir: PurePath, config: ConfigDict, state: State) -> Monitor:
    flops = costs.flops_per_token(config, state.params)
    peak = peak_flops(jax.devices()[0].device_kind)
    return Monitor(workdir, config, int(state.step), flops, peak)


def introduction(
    config: ConfigDict, mesh, state: State, meta: dict, workdir: PurePath
) -> list[str]:
    """The lines before the first step: what is trained, where, and what looks odd. meta: of the last checkpoint."""
    start = int(state.step)
    lines = []
    jump = rate_jump(config, meta, start, int(state.skipped))
    if jump:
        lines.append(jump)
    parameters = costs.num_parameters(state.params)
    trained = costs.num_parameters(partition(state.params, config)[0])
    part = ""
    if 0 < trained < parameters:
        part = f", {trained:,} ({trained / parameters:.1%}) of them trained,"
    lines.append(
        f"{parameters:,} parameters{part} on {mesh.size} x {jax.devices()[0].device_kind}; "
        f"from step {start} to {config.train.stop_at}; {workdir}"
    )
    if config.task.teacher:
        role = f"teacher of {config.task.distill:.0%} of the loss"
        if task_of(config).is_preference:
            role = "reference"
        lines.append(f"{role}: {config.task.teacher}")
    if config.model.lora_rank and not config.train.init_from:
        lines.append(
            "adapters (model.lora_rank) beside random weights that stay so: train.init_from names no run"
        )
    for name, text in costs.attention_lines(config, mesh) + costs.pipeline_lines(config, mesh):
        lines.append(f"{name}: {text}")
    if config.model.name not in COUNTED and start < config.train.stop_at:
        lines += warnings(state.params, start, config, mesh)
    return lines


class Run:
    """The loop and what it carries from step to step."""

    def __init__(
        self,
        config,
        mesh,
        checkpoints: Checkpoints,
        monitor: Monitor,
        meta: dict,
        best: Best,
        hold: Hold,
    ):
        """meta: what each checkpoint says of the run besides the best evaluation."""
        self.config = config
        self.mesh = mesh
        self.checkpoints = checkpoints
        self.monitor = monitor
        self.best = best
        self.meta = meta
        self.hold = hold
        self.evaluate = None
        if config.eval.every:
            self.evaluate = Evaluator(config, mesh)
            left_out = self.evaluate.leaves_out()
            if left_out:
                monitor.say(f"evaluation: {left_out}; all with jaxlm.evaluate")
        self.skipped = 0  # steps so far whose gradients were not finite
        self.skipped_in_a_row = 0
        self.train_step = jit_train_step(config, mesh)

    def loop(self, state: State, start: int, stop: StopSignal) -> int:
        """From the batch of step `start` on; returns the last step done. Metrics are fetched one step late."""
        c = self.config
        last = c.train.stop_at
        if start >= last:
            self.monitor.say(
                f"nothing to do up to step {last}: raise train.steps or train.stop_at to go on"
            )
            return start
        if self.exhausted():
            return start
        self.skipped = int(state.skipped)
        batches = self.prefetch(start, last)
        pending = None
        for step in range(start + 1, last + 1):
            state, metrics = self.train_step(state, batches.take())
            # A CPU's step is done when its call returns, another's when its metrics are fetched.
            finished = time.perf_counter() if metrics["loss"].is_ready() else None
            self.monitor.waited(batches.waited)
            batches.refill()
            if pending:
                self.record(*pending)
            pending = (step, metrics, finished)
            ended = stop.after_step() or step == last
            evaluates = self.evaluate and (step % c.eval.every == 0 or step == last)
            if ended or evaluates or step % c.checkpoint.every == 0:
                self.record(*pending)
                pending = None
                began = time.perf_counter()
                if self.evaluate_and_save(state, step, ended, evaluates):
                    break
                self.monitor.pause(began)
        batches.close()
        return step

    def prefetch(self, start: int, last: int) -> Prefetch:
        """The batches of the steps after `start`, on the devices."""
        B = self.config.train.batch_size

        def place(rows):
            return hosts.to_global(rows, self.mesh, B)

        batches = train_batches(self.config, hosts.local_rows(self.mesh, B))
        return Prefetch(batches, start, last, self.config.data.prefetch, place)

    def keep(self, state: State, params: dict) -> int:
        """Evaluates and saves parameters that were counted, as step 1."""
        if state.step:
            self.monitor.say("nothing to do: the n-grams are counted")
            return int(state.step)

        def place(x, old):
            return jax.device_put(x, old.sharding)

        params = jax.tree.map(place, params, state.params)
        state = state.replace(params=params, step=jnp.ones_like(state.step))
        self.evaluate_and_save(state, 1, True, self.evaluate)
        return 1

    def record(self, step: int, metrics, finished: float | None) -> None:
        """Logs a step's metrics. Raises NumericsError after train.max_skipped steps in a row that were not finite.

        finished: when the step was done (perf_counter); None: when its metrics are here.
        """
        metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
        finished = finished or time.perf_counter()
        if metrics["skipped"] > self.skipped:
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
        self.skipped = metrics["skipped"]
        self.monitor.step(step, metrics, finished)
        if self.skipped_in_a_row >= self.config.train.max_skipped:
            self.monitor.flush()
            raise NumericsError(
                f"{self.skipped_in_a_row} steps in a row up to step {step} had a loss or gradients that are not finite "
                f"(loss {metrics['loss']}); the newest checkpoint is {self.checkpoints.latest()}. Lower "
                "optim.learning_rate, set optim.clip or model.qk_norm, or look at the data of these steps"
            )

    def evaluate_and_save(self, state: State, step: int, ended: bool, evaluates: bool) -> bool:
        """Evaluation and checkpoint after a step, where they are due. True where the run is to end."""
        badness = None
        better = False
        if evaluates:
            result = self.try_to_evaluate(state, step)
            if result:
                self.monitor.evaluation(step, result, self.evaluate.samples)
            badness = self.best.badness(result)
            undecided = self.best.why_undecided(result)
            if undecided:
                self.monitor.say(undecided)
            # The evaluation at stop_at is extra: patience must not depend on where a run was stopped.
            if step % self.config.eval.every == 0:
                better = self.best.update(result)
        self.hold.check()
        # Before the checkpoint: so a bucket has the rows of every step that is not done again.
        self.monitor.flush()
        exhausted = self.exhausted()
        keep_best = better and self.config.checkpoint.keep_best
        if ended or exhausted or keep_best or step % self.config.checkpoint.every == 0:
            meta = self.meta | {"best": [self.best.value, self.best.since]}
            began = time.perf_counter()
            self.checkpoints.save(state, meta, badness)
            self.monitor.saved(time.perf_counter() - began)
        return ended or exhausted

    def try_to_evaluate(self, state: State, step: int) -> dict:
        """The figures of an evaluation. Where it fails: {}, with a line that says why. Raises FAULTS."""
        # Of several processes, one that fails alone would leave the others waiting. They go on only after errors of
        # the data, which all of them see.
        caught = Exception if jax.process_count() == 1 else DataError
        params = state.params if state.ema is None else state.ema
        try:
            return self.evaluate(params, state.teacher)
        except FAULTS:
            raise
        except caught as error:
            self.monitor.say(
                f"step {step:>6}  this evaluation gives no figures: {in_a_line(error)}"
            )
            return {}

    def exhausted(self) -> bool:
        """True where eval.patience is spent, with a line that says so."""
        patience = self.config.eval.patience
        if not patience or self.best.since < patience:
            return False
        # A checkpoint of an older version may have counted evaluations that gave no value.
        than = ""
        if self.best.value is not None:
            than = f" than {abs(self.best.value):.4f}"
        self.monitor.say(f"no better {self.best.metric}{than} in {patience} evaluations: stopping")
        return True
