"""python -m jaxlm.train --config=configs/NAME.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]: trains a model.

The same command again goes on from the newest checkpoint. --dry_run shows what a run would be, without running it.
"""

import ctypes
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxlm import cli, costs
from jaxlm.check import check, mixture, require
from jaxlm.checkpoint import Checkpoints, describe_run
from jaxlm.config import flatten, load, override, resolve
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.pipeline import fingerprint, open_stores, prefetch, train_batches
from jaxlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from jaxlm.evaluate import Evaluator
from jaxlm.monitor import Monitor
from jaxlm.parallel.mesh import make_mesh, to_global
from jaxlm.state import State, abstract_state, init_state, state_shardings, train_step


class StopSignal:
    """True once SIGTERM or Ctrl-C has come: the run finishes its step and saves. A second Ctrl-C ends it at once."""

    def __init__(self):
        self.number = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number, _):
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self):
        return self.number is not None


class BestLoss:
    """The lowest validation loss so far, and the evaluations since; saved, so that a restart changes nothing."""

    def __init__(self, loss: float | None = None, since: int = 0):
        self.loss, self.since = loss, since

    def update(self, loss: float) -> bool:
        """True where it is the lowest."""
        better = self.loss is None or loss < self.loss
        self.loss, self.since = (loss, 0) if better else (self.loss, self.since + 1)
        return better


def start_state(config, mesh, checkpoints: Checkpoints, data: dict, allow_data_change: bool) -> tuple[State, dict]:
    """(state, what the last checkpoint says) of the newest checkpoint, or a fresh state. Raises CheckpointError."""
    step = checkpoints.latest()
    if step is None:
        return init_state(config, mesh), {}
    meta = checkpoints.meta(step)
    changed = [f"{key}: {meta['data'].get(key)} -> {data[key]}" for key in data if meta["data"].get(key) != data[key]]
    if changed and not allow_data_change:
        raise CheckpointError(
            f"the data is not what step {step} of {checkpoints.path.parent} was trained on:\n  "
            + "\n  ".join(changed)
            + "\ngive the same data, another --workdir, or --allow_data_change to go on all the same"
        )
    return checkpoints.restore(step, abstract_state(config)[0], state_shardings(config, mesh)), meta


def train(config: ConfigDict, workdir: Path, allow_data_change: bool = False) -> int:
    """Runs a resolved config to train.stop_at. Returns the exit code: 0, or 75 where a signal asked it to stop."""
    prepare_workdir(workdir, config)
    if jax.default_backend() == "cpu":
        reuse_freed_memory()
    mesh, stop = make_mesh(config), StopSignal()
    data, tokenizer = fingerprint(config), tokenizers.load(mixture(config)[0][0])
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir, config)
        state, last = start_state(config, mesh, checkpoints, data, allow_data_change)
        start, best = int(state.step), BestLoss(*last.get("best", ()))
        parameters = costs.num_parameters(state.params)
        flops, peak = costs.flops_per_token(config, state.params), costs.peak_flops(jax.devices()[0].device_kind)
        monitor = Monitor(workdir, config, start, flops, peak)
        monitor.say(
            f"{parameters:,} parameters on {mesh.size} x {jax.devices()[0].device_kind}; "
            f"steps {start + 1} to {config.train.stop_at}; {workdir}"
        )
        try:
            run = Run(config, mesh, checkpoints, monitor, describe_run(config, tokenizer, data), best)
            last_step = run.loop(state, start, stop)
            checkpoints.wait()
        finally:
            monitor.close()
            checkpoints.close()
    stopped = stop and last_step < config.train.stop_at
    if jax.process_index() == 0:
        why = f"stopped by {signal.Signals(stop.number).name}" if stopped else "done"
        then = "the same command goes on" if stopped else f"try python -m jaxlm.generate --workdir={workdir}"
        print(f"{why} at step {last_step}, saved in {checkpoints.path}; {then}")
    return cli.PREEMPTED if stopped else 0


class Run:
    """The loop and what it carries from step to step."""

    def __init__(self, config, mesh, checkpoints: Checkpoints, monitor: Monitor, meta: dict, best: BestLoss):
        self.config, self.mesh, self.checkpoints, self.monitor, self.best = config, mesh, checkpoints, monitor, best
        self.meta = meta
        self.evaluate = Evaluator(config, mesh) if config.eval.every else None
        self.skipped = (0, 0)  # all so far, and in a row
        self.train_step = jax.jit(
            partial(train_step, config=config),
            donate_argnums=0,
            out_shardings=(state_shardings(config, mesh), None),
        )

    def loop(self, state: State, start: int, stop: StopSignal) -> int:
        """From the batch of step `start` on; returns the last step done. Metrics are fetched one step late."""
        c, last = self.config, self.config.train.stop_at
        if start >= last:
            self.monitor.say(f"nothing to do up to step {last}: raise train.steps or train.stop_at to go on")
            return start
        batches = train_batches(c, jax.process_count(), jax.process_index())
        place = lambda rows: to_global(rows, self.mesh, c.train.batch_size)
        ready, pending = prefetch(batches, start, last, c.data.prefetch, place), None
        for step in range(start + 1, last + 1):
            began = time.perf_counter()
            batch = next(ready)
            self.monitor.waited(time.perf_counter() - began)
            state, metrics = self.train_step(state, batch)
            if pending:
                self.record(*pending)
            pending, ended = (step, metrics), step == last or bool(stop)
            evaluates = self.evaluate and (step % c.eval.every == 0 or step == last)
            if ended or evaluates or step % c.checkpoint.every == 0:
                self.record(*pending)
                pending, began = None, time.perf_counter()
                if self.visit(state, step, ended, evaluates):
                    break
                self.monitor.pause(began)
        ready.close()
        return step

    def record(self, step: int, metrics) -> None:
        """Hands a step's metrics on. Raises NumericsError after too many steps in a row that were not finite."""
        metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
        before, in_a_row = self.skipped
        self.skipped = (metrics["skipped"], in_a_row + 1 if metrics["skipped"] > before else 0)
        self.monitor.step(step, metrics)
        if self.skipped[1] >= self.config.train.max_skipped:
            raise NumericsError(
                f"{self.skipped[1]} steps in a row up to step {step} had a loss or gradients that are not finite "
                f"(loss {metrics['loss']}); the parameters are those before. Lower optim.learning_rate, set optim.clip "
                "or model.qk_norm, or look at the data of these steps"
            )

    def visit(self, state: State, step: int, ended: bool, evaluates: bool) -> bool:
        """Evaluation and checkpoint after a step. True where the run is to end."""
        loss, better = None, False
        if evaluates:
            result = self.evaluate(state.params if state.ema is None else state.ema)
            self.monitor.evaluation(step, result)
            loss = result["loss"]
            if step % self.config.eval.every == 0:  # the one at stop_at is extra: patience must not depend on stops
                better = self.best.update(loss)
        patience = self.config.eval.patience
        exhausted = bool(patience) and self.best.since >= patience
        if exhausted:
            self.monitor.say(f"no lower validation loss than {self.best.loss:.4f} in {patience} evaluations: stopping")
        keep_best = better and self.config.checkpoint.keep_best
        if ended or exhausted or keep_best or step % self.config.checkpoint.every == 0:
            self.checkpoints.save(state, self.meta | {"best": [self.best.loss, self.best.since]}, loss)
        return ended or exhausted


def reuse_freed_memory() -> None:
    """Keeps glibc from giving large freed blocks back to the kernel after every step on a CPU.

    Each step would fault its temporaries in again, page by page: 393 ms a step instead of 308 for configs/quickstart.py
    with AdamW on 2 cores. Elsewhere (another libc) nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = -4, -1, -2  # mallopt(3)
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20)):
        mallopt(option, value)


def prepare_workdir(workdir: Path, config: ConfigDict) -> None:
    """Makes the directory and writes config.json; says what changed since an earlier run there."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        old = json.loads(path.read_text()) if path.exists() else {}
        new = json.loads(json.dumps(flatten(config)))
        for key in new:
            if old and old.get(key) != new[key]:
                print(f"config.{key}: {old.get(key)} -> {new[key]}")
        path.with_suffix(".tmp").write_text(json.dumps(new, indent=1) + "\n")
        os.replace(path.with_suffix(".tmp"), path)
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: {error.strerror}; give a directory that can be written") from None


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="jaxlm.train", description=__doc__)
    parser.add_config()
    parser.add_argument("--workdir", help="where config, metrics and checkpoints go")
    parser.add_argument("--print_config", action="store_true", help="print every key of the config and exit")
    parser.add_argument("--dry_run", action="store_true", help="print what the run would be and exit")
    parser.add_argument("--devices", type=int, help="with --dry_run: for this many devices (default: those here)")
    parser.add_argument("--allow_data_change", action="store_true", help="resume although the data has changed")
    args = parser.parse(argv)
    config = load(args.config)
    problems = override(config, args.overrides)
    if args.dry_run or args.print_config:
        jax.config.update("jax_platforms", "cpu")  # an accelerator is not even asked
    elif not args.workdir:
        parser.error("the following arguments are required: --workdir")

    try:
        stores, data_problem = open_stores(config, "train"), None
    except DataError as error:
        stores, data_problem = [], error
    vocab_size = stores[0].vocab_size if stores else 0
    if not (config.model.vocab_size or vocab_size) and (args.dry_run or args.print_config):
        problems.append(
            "config.model.vocab_size=0: the tokenizer's, and there is no data yet; set it or config.data.path"
        )
    require(problems + check(config, args.devices or jax.device_count(), vocab_size))
    config = resolve(config, vocab_size)
    if args.print_config:
        print("\n".join(f"{key} = {value!r}" for key, value in flatten(config).items()))
        return 0
    if args.dry_run:
        tokens = sum(store.num_tokens for store in stores) or None
        print(costs.describe(config, args.devices or jax.device_count(), tokens))
        return 0
    if data_problem:
        raise data_problem
    return train(config, Path(args.workdir), args.allow_data_change)


if __name__ == "__main__":
    cli.run(main)
