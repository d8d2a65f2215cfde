"""python -m jaxlm.train --config=configs/NAME.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]: trains a model.

The same command again goes on from the newest checkpoint. --dry_run shows what a run would be, without running it.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path, PurePath

import jax
import jax.numpy as jnp
from jax.experimental.multihost_utils import reached_preemption_sync_point
from ml_collections import ConfigDict

from jaxlm import cli
from jaxlm.config.check import check
from jaxlm.config.keys import MESH_AXES, base
from jaxlm.config.problems import require
from jaxlm.config.recipe import flatten, load, override, resolve
from jaxlm.config.tasks import less_is_better, task_of
from jaxlm.data.batches import (
    Prefetch,
    fingerprint,
    load_tokenizer,
    train_batches,
    validation_batches,
)
from jaxlm.data.files.paths import absolute
from jaxlm.data.tokenization.specials import write_tokenizer
from jaxlm.errors import CheckpointError, DataError, NumericsError
from jaxlm.evaluate.evaluator import Evaluator
from jaxlm.evaluate.score import FAULTS, in_a_line
from jaxlm.parallel import hosts
from jaxlm.parallel.chips import peak_flops
from jaxlm.parallel.mesh import abstract_mesh, make_mesh
from jaxlm.run.checkpoint import Checkpoints, describe_run, require_checkpoints
from jaxlm.run.monitor import Monitor, proposal
from jaxlm.run.process import keep_compiled, manage_memory, quick_random_numbers
from jaxlm.run.warm_start import (
    agree,
    count_ngrams,
    inherit,
    look_at_data,
    not_told,
    overruled,
    rate_jump,
    read_teacher,
    warm_start,
    weigh_ngrams,
)
from jaxlm.run.workdir import Hold, run_directory, write_whole
from jaxlm.step import costs
from jaxlm.step.patterns import partition
from jaxlm.step.rounding import warnings
from jaxlm.step.state import (
    State,
    abstract_state,
    check_sharding,
    init_state,
    jit_train_step,
    state_shardings,
)


class StopSignal:
    """SIGTERM or Ctrl-C: the run finishes its step and saves. A second Ctrl-C does not wait.

    Sent to one of several processes, it stops all of them after the same step. There SIGTERM stays with jax, which
    tells the other processes and agrees with them on the call of `after_step` that is to be the last.
    """

    def __init__(self):
        self.number = None
        self.calls = 0
        self.alone = jax.process_count() == 1
        for number in (signal.SIGTERM, signal.SIGINT) if self.alone else (signal.SIGINT,):
            signal.signal(number, self._remember)

    def _remember(self, number, _):
        if self.alone:
            self.number = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # an exit in Python would wait for the other processes

    def after_step(self) -> bool:
        """True where the run is to end here. To be called after each step, on every process."""
        self.calls += 1
        # jax says so once. It counts from 0 in each process: with the run's steps, a signal before the first call
        # would set the end at step 1, which a resumed run has passed.
        if not self.alone and self.number is None and reached_preemption_sync_point(self.calls):
            self.number = signal.SIGTERM
        return self.number is not None


class Best:
    """The best value of a metric so far, and the evaluations since; saved, so that a restart changes nothing."""

    def __init__(self, metric: str, value: float | None = None, since: int = 0):
        self.metric = metric
        self.value = value
        self.since = since

    def badness(self, result: dict) -> float | None:
        """The metric of an evaluation, so that less is better; None where the evaluation has not given it, or NaN."""
        value = result.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        if less_is_better(self.metric):
            return value
        return -value

    def waits(self, result: dict) -> str:
        """In words, why an evaluation says nothing of what is best; empty where it does."""
        if self.badness(result) is not None:
            return ""
        why = "has no such figure on these data"
        if self.metric in result:
            why = f"gave {result[self.metric]}"
        if not result:
            why = "gave no figures"
        wait = f"eval.metric={self.metric}: this evaluation {why}, so the choice of the best and eval.patience wait"
        numbers = [name for name, value in result.items() if isinstance(value, (int, float))]
        others = ", ".join(name for name in numbers if name != self.metric)
        if others:
            return f"{wait}; others it gave: {others}"
        return wait

    def update(self, result: dict) -> bool:
        """True where it is the best. An evaluation without the metric changes nothing: there is nothing to compare."""
        badness = self.badness(result)
        if badness is None:
            return False
        better = self.value is None or badness < self.value
        if better:
            self.value = badness
        self.since = 0 if better else self.since + 1
        return better


def start_state(
    config, mesh, checkpoints: Checkpoints, data: dict, allow_data_change: bool
) -> tuple[State, dict]:
    """(state, what the last checkpoint says) of the newest checkpoint, or a fresh state. Raises CheckpointError."""
    step = checkpoints.latest()
    if step is None:
        state = init_state(config, mesh)
        if config.train.init_from:
            return state.replace(params=warm_start(state.params, config)), {}
        counts = config.model.ngram_weights != "none"
        return state.replace(params=weigh_ngrams(state.params, config)) if counts else state, {}
    meta = checkpoints.meta(step)
    changed = []
    for key in data:
        if meta["data"].get(key) != data[key]:
            changed.append(f"{key}: {meta['data'].get(key)} -> {data[key]}")
    if changed and not allow_data_change:
        raise CheckpointError(
            f"the data is not what step {step} of {checkpoints.path.parent} was trained on:\n  "
            + "\n  ".join(changed)
            + "\ngive the same data, another --workdir, or --allow_data_change to go on all the same"
        )
    return checkpoints.restore(step, abstract_state(config)[0], state_shardings(config, mesh)), meta


def train(
    config: ConfigDict, workdir: PurePath, allow_data_change: bool = False, start_over: bool = False
) -> int:
    """Runs a resolved config to train.stop_at. Returns the exit code: 0, or 75 where a signal asked it to stop."""
    hold = Hold(workdir)
    if not start_over:
        require_checkpoints(workdir, config)
    mesh = make_mesh(config)
    stop = StopSignal()
    data = fingerprint(config)
    tokenizer = load_tokenizer(config)
    if config.model.name == "ngram":
        counted = count_ngrams(config)
    else:
        counted = None
    hosts.require_same(
        json.dumps([flatten(config), data]), "the config or the data differ between processes"
    )
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir, config)
        state, last = start_state(config, mesh, checkpoints, data, allow_data_change)
        if config.task.teacher_model:
            state = state.replace(teacher=read_teacher(config, mesh))
        if jax.process_index() == 0:
            write_config(workdir, config, last)
            if jump := rate_jump(config, last, int(state.step), int(state.skipped)):
                print(jump)
            write_tokenizer(workdir, tokenizer)
        start = int(state.step)
        best = Best(config.eval.metric, *last.get("best", ()))
        parameters = costs.num_parameters(state.params)
        flops = costs.flops_per_token(config, state.params)
        peak = peak_flops(jax.devices()[0].device_kind)
        monitor = Monitor(workdir, config, start, flops, peak)
        trained = costs.num_parameters(partition(state.params, config)[0])
        if 0 < trained < parameters:
            some = f", {trained:,} ({trained / parameters:.1%}) of them trained,"
        else:
            some = ""
        monitor.say(
            f"{parameters:,} parameters{some} on {mesh.size} x {jax.devices()[0].device_kind}; "
            f"from step {start} to {config.train.stop_at}; {workdir}"
        )
        if config.task.teacher:
            if task_of(config).is_preference:
                role = "reference"
            else:
                role = f"teacher of {config.task.distill:.0%} of the loss"
            monitor.say(f"{role}: {config.task.teacher}")
        if config.model.lora_rank and not config.train.init_from:
            monitor.say(
                "adapters (model.lora_rank) beside random weights that stay so: train.init_from names no run"
            )
        for name, text in costs.attention_lines(config, mesh) + costs.pipeline_lines(config, mesh):
            monitor.say(f"{name}: {text}")
        if counted is None and start < config.train.stop_at:
            for line in warnings(state.params, start, config, mesh):
                monitor.say(line)
        try:
            run = Run(
                config,
                mesh,
                checkpoints,
                monitor,
                describe_run(config, tokenizer, data),
                best,
                hold,
            )
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
        else:
            why = "done"
        if run.best.since and config.checkpoint.keep_best:
            best = " --step=best"
        else:
            best = ""
        if stopped:
            then = "the same command goes on"
        else:
            then = proposal(config, workdir, tokenizer, best)
        print(f"{why} at step {last_step}, saved in {checkpoints.path}; {then}")
    if stopped:
        return cli.PREEMPTED
    return 0


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
        self.config = config
        self.mesh = mesh
        self.checkpoints = checkpoints
        self.monitor = monitor
        self.best = best
        self.meta = meta
        self.hold = hold
        self.evaluate = Evaluator(config, mesh) if config.eval.every else None
        if self.evaluate and (some := self.evaluate.leaves_out()):
            monitor.say(f"evaluation: {some}; all with jaxlm.evaluate")
        self.skipped = (
            0,
            0,
        )  # steps so far whose gradients were not finite, and of these the last in a row
        self.train_step = jit_train_step(config, mesh)

    def loop(self, state: State, start: int, stop: StopSignal) -> int:
        """From the batch of step `start` on; returns the last step done. Metrics are fetched one step late."""
        c = self.config
        last = self.config.train.stop_at
        if start >= last:
            self.monitor.say(
                f"nothing to do up to step {last}: raise train.steps or train.stop_at to go on"
            )
            return start
        if self.exhausted():
            return start
        self.skipped = (int(state.skipped), 0)
        batches = train_batches(c, hosts.local_rows(self.mesh, c.train.batch_size))

        def place(rows):
            return hosts.to_global(rows, self.mesh, c.train.batch_size)

        ready = Prefetch(batches, start, last, c.data.prefetch, place)
        pending = None
        for step in range(start + 1, last + 1):
            state, metrics = self.train_step(state, ready.take())
            # A CPU's step is done when its call returns, another's when its metrics are fetched.
            finished = time.perf_counter() if metrics["loss"].is_ready() else None
            self.monitor.waited(ready.waited)
            ready.refill()
            if pending:
                self.record(*pending)
            pending = (step, metrics, finished)
            ended = stop.after_step() or step == last
            evaluates = self.evaluate and (step % c.eval.every == 0 or step == last)
            if ended or evaluates or step % c.checkpoint.every == 0:
                self.record(*pending)
                pending = None
                began = time.perf_counter()
                if self.visit(state, step, ended, evaluates):
                    break
                self.monitor.pause(began)
        ready.close()
        return step

    def keep(self, state: State, params: dict) -> int:
        """Evaluates and saves parameters that were counted, as step 1."""
        if state.step:
            self.monitor.say("nothing to do: the n-grams are counted")
            return int(state.step)

        def place(x, old):
            return jax.device_put(x, old.sharding)

        params = jax.tree.map(place, params, state.params)
        self.visit(
            state.replace(params=params, step=jnp.ones_like(state.step)), 1, True, self.evaluate
        )
        return 1

    def record(self, step: int, metrics, finished: float | None) -> None:
        """Hands a step's metrics on. Raises NumericsError after too many steps in a row that were not finite.

        finished: when the step was done (perf_counter); None: when its metrics are here.
        """
        metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
        finished = finished or time.perf_counter()
        before, in_a_row = self.skipped
        self.skipped = (metrics["skipped"], in_a_row + 1 if metrics["skipped"] > before else 0)
        self.monitor.step(step, metrics, finished)
        if self.skipped[1] >= self.config.train.max_skipped:
            self.monitor.flush()
            raise NumericsError(
                f"{self.skipped[1]} steps in a row up to step {step} had a loss or gradients that are not finite "
                f"(loss {metrics['loss']}); the newest checkpoint is {self.checkpoints.latest()}. Lower "
                "optim.learning_rate, set optim.clip or model.qk_norm, or look at the data of these steps"
            )

    def visit(self, state: State, step: int, ended: bool, evaluates: bool) -> bool:
        """Evaluation and checkpoint after a step. True where the run is to end."""
        badness = None
        better = False
        if evaluates:
            result = self.measure(state, step)
            if result:
                self.monitor.evaluation(step, result)
            badness = self.best.badness(result)
            if waiting := self.best.waits(result):
                self.monitor.say(waiting)
            if (
                step % self.config.eval.every == 0
            ):  # the one at stop_at is extra: patience must not depend on stops
                better = self.best.update(result)
        self.hold.check()
        self.monitor.flush()  # before the checkpoint: a bucket keeps the rows of every step that is not redone
        exhausted = self.exhausted()
        keep_best = better and self.config.checkpoint.keep_best
        if ended or exhausted or keep_best or step % self.config.checkpoint.every == 0:
            meta = self.meta | {"best": [self.best.value, self.best.since]}
            began = time.perf_counter()
            self.checkpoints.save(state, meta, badness)
            self.monitor.saved(time.perf_counter() - began)
        return ended or exhausted

    def measure(self, state: State, step: int) -> dict:
        """The figures of an evaluation; none, and that is told, where it fails: the run goes on. Raises FAULTS."""
        # Several processes would wait for one that fails alone: of them, only what all see alike is held up.
        held = Exception if jax.process_count() == 1 else DataError
        try:
            return self.evaluate(state.params if state.ema is None else state.ema, state.teacher)
        except FAULTS:
            raise
        except held as error:
            self.monitor.say(
                f"step {step:>6}  this evaluation gives no figures: {in_a_line(error)}"
            )
            return {}

    def exhausted(self) -> bool:
        """True, and said, where eval.patience is spent."""
        patience = self.config.eval.patience
        if not patience or self.best.since < patience:
            return False
        # a checkpoint of an older version may have counted evaluations that gave no value
        value = self.best.value
        than = "" if value is None else f" than {abs(value):.4f}"
        self.monitor.say(f"no better {self.best.metric}{than} in {patience} evaluations: stopping")
        return True


def write_config(workdir: PurePath, config: ConfigDict, last: dict) -> None:
    """Writes config.json, and says what is not as in the last checkpoint."""
    new = json.loads(json.dumps(flatten(config)))
    for key, old in last.get("config", {}).items():
        if key in new and new[key] != old:
            print(f"config.{key}: {old} -> {new[key]}")
    write_whole(workdir / "config.json", json.dumps(new, indent=1) + "\n")


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="jaxlm.train", description=__doc__)
    parser.add_config(flatten(base()))
    parser.add_argument("--workdir", help="where config, metrics and checkpoints go")
    parser.add_argument(
        "--print_config", action="store_true", help="print every key of the config and exit"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print what the run would be and exit"
    )
    parser.add_argument(
        "--devices",
        type=int,
        help="with --dry_run: for this many devices (default: as many as the mesh names, or those here)",
    )
    parser.add_argument(
        "--allow_data_change", action="store_true", help="resume although the data has changed"
    )
    parser.add_argument(
        "--start_over", action="store_true", help="begin at step 0 although checkpoints/ is gone"
    )
    hosts.add_flags(parser)
    args = parser.parse(argv)
    config = load(args.config)
    problems = override(config, args.overrides)
    if args.devices is not None and args.devices < 1:
        parser.error(f"--devices={args.devices}: must be at least 1")
    if args.dry_run or args.print_config:
        jax.config.update("jax_platforms", "cpu")  # an accelerator is not even asked
        fixed = [config.mesh[axis] for axis in MESH_AXES if config.mesh[axis] > 0]
        devices = args.devices or max(math.prod(fixed), jax.device_count())
    elif args.workdir:
        manage_memory()
        workdir = run_directory(args.workdir)
        hosts.connect(args)
        devices = jax.device_count()
        quick_random_numbers()
        keep_compiled(workdir / "compiled")
    else:
        parser.error("the following arguments are required: --workdir")

    before = flatten(config)
    problems += inherit(config)
    for line in (
        overruled([key for key, _ in args.overrides], before, config)
        if jax.process_index() == 0
        else ()
    ):
        print(line, file=sys.stderr)
    vocab_size, num_tokens, data_problem = look_at_data(config)
    if not data_problem:
        problems += [] if problems else agree(config, vocab_size)
    elif args.dry_run or args.print_config:
        problems += not_told(config, vocab_size, data_problem)
    require(problems + check(config, devices, vocab_size))
    config = resolve(config, vocab_size)
    if args.print_config:
        print("\n".join(f"{key} = {value!r}" for key, value in flatten(config).items()))
        return 0
    if data_problem and not args.dry_run:
        raise data_problem
    check_sharding(config, abstract_mesh(config, devices))
    if args.dry_run:
        print(costs.describe(config, devices, num_tokens or None))
        return 0
    if config.eval.every:
        validation_batches(
            config
        )  # raises where there is nothing to evaluate on, before the run begins
    if config.data.path:
        config.data.path = str(Path(config.data.path).absolute())  # evaluation may start elsewhere
    config.data.train, config.data.val = absolute(config.data.train), absolute(config.data.val)
    return train(config, workdir, args.allow_data_change, args.start_over)


if __name__ == "__main__":
    cli.run(main)
