"""Checkpoints through orbax: asynchronous, sharded, self-contained, and restored on any other mesh.

`workdir/checkpoints/STEP/` holds `params`, `ema` (their average, where one is kept), `rest` (optimizer, step) and
`meta`: the resolved config, the tokenizer, the fingerprint of the data, versions, and the validation loss where one was
measured at that step.
"""

import base64
import importlib.metadata
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from jaxlm.cli import near_path
from jaxlm.config.keys import base
from jaxlm.config.recipe import flatten, unflatten
from jaxlm.data.tokenization import specials
from jaxlm.data.tokenization import tokenizer as tokenizers
from jaxlm.errors import CheckpointError
from jaxlm.parallel.mesh import platform
from jaxlm.run.workdir import in_bucket, run_directory
from jaxlm.step.patterns import name_of
from jaxlm.step.state import State

ITEMS = {
    "params": ocp.StandardCheckpointHandler,
    "ema": ocp.StandardCheckpointHandler,
    "rest": ocp.StandardCheckpointHandler,
    "meta": ocp.JsonCheckpointHandler,
}
DECIDING = ("model.", "optim.", "task.", "train.ema")  # keys that decide what a state holds
# What orbax raises where files are broken.
BROKEN_FILES = (AttributeError, KeyError, OSError, TypeError, ValueError)
ROW_STEP = r'^\{"step": (\d+),'  # of a row of metrics.jsonl, whole or cut short
VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint")


def describe_run(config: ConfigDict, tokenizer, data: dict) -> dict:
    """The `meta` of a run's checkpoints, as JSON. data: jaxlm.data.batches.fingerprint."""
    return {
        "config": flatten(config),
        "tokenizer": describe_tokenizer(tokenizer),
        "data": data,
        "versions": versions(VERSIONS),
    }


def describe_tokenizer(tokenizer) -> dict:
    """A tokenizer, with the begin and the end of text that the run was trained with, as JSON."""
    data = base64.b64encode(tokenizer.to_bytes()).decode()
    return {"name": tokenizer.name, "data": data} | specials.ids_of(tokenizer)


def versions(packages) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def config_of(meta: dict) -> ConfigDict:
    """The config of a checkpoint. Raises CheckpointError where it has keys or values that this jaxlm doesn't know."""
    return known_config(meta["config"], "the checkpoint")


def known_config(flat: dict, where: str) -> ConfigDict:
    """A flat config, as JSON, as a ConfigDict. where: what it is read from, for messages. Raises CheckpointError."""
    known = flatten(base())
    unknown = [f"config.{key}={value}" for key, value in flat.items() if key not in known]
    if unknown:
        raise CheckpointError(
            f"{where} is of another version of jaxlm: this one has no key {', no key '.join(unknown)}; "
            "use the version that the run was trained with"
        )
    try:
        return unflatten(flat)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the config of {where} can't be read: {error}") from None


def tokenizer_of(meta: dict):
    """The tokenizer of a checkpoint, with the begin and the end of text that it was trained with."""
    entry = meta["tokenizer"]
    tokenizer = tokenizers.from_bytes(entry["name"], base64.b64decode(entry["data"]))
    if "bos_id" in entry:
        specials.put_ids(tokenizer, entry)
    else:
        specials.of_an_older_run(tokenizer, meta["config"])
    return tokenizer


def require_checkpoints(workdir: PurePath, config: ConfigDict) -> None:
    """Raises CheckpointError where metrics.jsonl has steps whose checkpoints are gone.

    A run makes checkpoints/ before its first row, and a save that was cut short leaves a directory in it. So a run that
    died before or during its first save is not taken for one whose checkpoints were deleted. Call it before
    `Checkpoints` makes the directory. A bucket has no empty directories: there nothing is known.
    """
    rows = workdir / "metrics.jsonl"
    folder = workdir / "checkpoints"
    if in_bucket(workdir) or not rows.is_file():
        return
    steps = [int(step) for step in re.findall(ROW_STEP, rows.read_text(), re.MULTILINE)]
    if not steps:
        return
    last = max(steps)
    if folder.is_dir() and (any(folder.iterdir()) or last <= config.checkpoint.every):
        return
    raise CheckpointError(
        f"{rows} has rows up to step {last}, but {folder} has no checkpoint: put it back, give another --workdir, or "
        "--start_over, which begins at step 0 and drops these rows"
    )


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask jax whether a signal has come.

    jax takes the number of the latest question for the progress of this process. Orbax asks from a thread, with older
    steps, so the processes would miss the step at which they agreed to stop (jaxlm/train/stop_signal.py).
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of a run directory. Raises CheckpointError where the directory cannot be used."""

    def __init__(self, workdir: str | PurePath, config: ConfigDict | None = None):
        """config: of the run that saves; None to read only."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every step it takes
        workdir = run_directory(workdir)
        self.config = config
        self.path = workdir / "checkpoints"
        if not in_bucket(workdir):
            self.path = self.path.absolute()
        if config is None:
            self._require_saved(workdir)
        self._writer = ThreadPoolExecutor(1)
        self._writing = None
        try:
            self.manager = Manager(
                self.path,
                item_handlers={name: handler() for name, handler in ITEMS.items()},
                options=manager_options(config),
            )
        except OSError as error:
            raise CheckpointError(f"cannot use {self.path}: {error.strerror or error}") from None

    def _require_saved(self, workdir: PurePath) -> None:
        if self.path.is_dir():
            return
        found = "is not a directory"
        if workdir.is_dir():
            found = "has no checkpoints/"
        raise CheckpointError(
            f"{workdir} {found}: give the --workdir of a jaxlm.train run that has saved{near_path(workdir)}"
        )

    def latest(self) -> int | None:
        """The newest step that is saved whole."""
        self._settle()
        return self.manager.latest_step()

    def choose(self, step: str | int = "latest") -> int:
        """The step that `latest`, `best` (lowest validation loss) or a number means. Raises CheckpointError."""
        steps = sorted(self.manager.all_steps())
        if not steps:
            raise CheckpointError(f"{self.path} has no finished checkpoint")
        if step == "latest":
            return steps[-1]
        if step == "best":
            losses = {}
            for saved in steps:
                loss = self.meta(saved).get("eval_loss")
                if loss is not None:
                    losses[saved] = loss
            if not losses:
                raise CheckpointError(
                    f"{self.path}: no checkpoint is of a step that was evaluated (config.eval.every); steps: {steps}"
                )
            return min(losses, key=losses.get)
        if not str(step).isdecimal() or int(step) not in steps:
            raise CheckpointError(
                f"{self.path} has no step {step}; it has {', '.join(map(str, steps))}, latest and best"
            )
        return int(step)

    def save(self, state: State, meta: dict, eval_loss: float | None = None) -> None:
        """Copies the state to the host, then writes it in the background. Raises the error of the save before.

        eval_loss: the step's `Best.badness`, None where it was not evaluated.
        """
        self._settle()
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        if jax.process_count() > 1:
            # Orbax's processes wait for each other, in the order of the loop.
            self._write(step, items(state), meta, eval_loss)
            return
        # In a thread: orbax takes 50 ms to begin, however small the state.
        parts = on_host(items(state))
        self._writing = self._writer.submit(self._write, step, parts, meta, eval_loss)

    def _settle(self) -> None:
        """Waits until orbax has begun the save before, and raises its error."""
        if self._writing:
            writing = self._writing
            self._writing = None
            writing.result()

    def save_params(self, step: int, params: dict, meta: dict) -> None:
        """Writes a checkpoint to evaluate, generate or start from. Training can't go on: it has no optimizer state."""
        self._write(step, {"params": params}, meta, meta.get("eval_loss"))

    def _write(self, step: int, parts: dict, meta: dict, eval_loss: float | None) -> None:
        args = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
        args["meta"] = ocp.args.JsonSave(meta | {"eval_loss": eval_loss})
        metrics = None
        if eval_loss is not None:
            metrics = {"loss": eval_loss}
        saved = self.manager.save(step, args=ocp.args.Composite(**args), metrics=metrics)
        if not saved:  # orbax says no more than this
            raise CheckpointError(
                f"step {step} was not saved: {self.path} has steps {sorted(self.manager.all_steps())}, and nothing is "
                "saved below the newest; if its directory was renamed, rename it back, or give another --workdir"
            )

    def meta(self, step: int) -> dict:
        """What `describe_run` made for this checkpoint, and `eval_loss`. Raises CheckpointError where it is damaged."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        try:
            return self.manager.restore(step, args=args)["meta"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path / str(step)} is damaged ({error}): move it away to use the one before"
            ) from error

    def restore(self, step: int, abstract: State, shardings: State) -> State:
        """The state at `step`, on the mesh of `shardings`. Raises CheckpointError where it does not fit `abstract`."""
        targets = {}
        for name, tree in items(abstract).items():
            targets[name] = as_target(tree, items(shardings)[name])
        got = self._read(step, **targets)
        inside = int(got["rest"]["step"])
        if inside != step:
            raise CheckpointError(
                f"{self.path / str(step)} holds step {inside}: its directory was renamed or copied; rename it to "
                f"{inside}, or move it away to go on from the one before"
            )
        return State(params=got["params"], ema=got.get("ema"), teacher=None, **got["rest"])

    def restore_params(self, step: int, abstract: State, shardings: State) -> dict:
        """What evaluation and generation use: the average of the parameters where the run keeps one, else these.

        Raises CheckpointError where they do not fit `abstract`.
        """
        name = "params" if abstract.ema is None else "ema"
        target = as_target(items(abstract)[name], items(shardings)[name])
        return self._read(step, **{name: target})[name]

    def read_params(self, step: int, place) -> dict:
        """What evaluation uses, as it was saved, whatever the model. place: (name, shape) -> sharding.

        Raises CheckpointError where it is damaged.
        """
        name = "ema" if self.meta(step)["config"].get("train.ema") else "params"

        def target(path, x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(name_of(path), x.shape))

        targets = jax.tree_util.tree_map_with_path(target, self._saved(step, name))
        return self._read(step, **{name: targets})[name]

    def _read(self, step: int, **targets):
        parts = self._parts(step)
        for name, target in targets.items():
            if name not in parts:
                raise self._lacks(step, name, parts)
            self._require_fit(step, name, target)
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**args))
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(step, error) from error
        except Exception as error:
            if type(error) is not Exception:  # which orbax raises of files that are cut or gone
                raise
            raise self._damaged(step, error.__cause__ or error) from error

    def _lacks(self, step: int, name: str, parts) -> CheckpointError:
        where = self.path / str(step)
        if name == "ema" and "rest" in parts:
            return CheckpointError(
                f"{where} was trained without an average of the parameters: train.ema can't be switched on half-way; "
                "set --config.train.ema=0, or begin a new run in another --workdir with "
                f"--config.train.init_from={self.path.parent}"
            )
        return CheckpointError(
            f"{where} has no {name}: it is of a model alone, which a run can begin from, but not go on with; give "
            f"another --workdir, and --config.train.init_from={self.path.parent}"
        )

    def _require_fit(self, step: int, name: str, target) -> None:
        """Orbax casts dtypes silently and reports other shapes unreadably: compare first."""
        lines = differences(self._saved(step, name), target)
        if not lines:
            return
        more = []
        if len(lines) > 8:
            more = [f"and {len(lines) - 8} more"]
        raise CheckpointError(
            f"checkpoint {self.path / str(step)} is of another model or optimizer than the config:\n  "
            + "\n  ".join(self._changed(step) + lines[:8] + more)
            + "\nuse the config that it was trained with (workdir/config.json), or another --workdir"
        )

    def _parts(self, step: int):
        """{name: what orbax knows of it} of a checkpoint."""
        try:
            return self.manager.item_metadata(step)
        except BROKEN_FILES as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: BaseException) -> CheckpointError:
        why = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0]
        return CheckpointError(
            f"{self.path / str(step)} is damaged ({why}): move it away to use the one before"
        )

    def _saved(self, step: int, name: str):
        """Shapes and dtypes of what is in a checkpoint."""
        try:
            return self._parts(step)[name].tree
        except CheckpointError:
            raise
        except BROKEN_FILES:  # orbax gives None where its own files are not whole
            folder = self.path / str(step)
            raise CheckpointError(
                f"{folder} is damaged: its {name} do not say what they are; move it away to use the one before"
            ) from None

    def _changed(self, step: int) -> list[str]:
        """The keys that decide what a state holds, where the config differs from a checkpoint's."""
        if self.config is None:
            return []
        now = json.loads(
            json.dumps(flatten(self.config))
        )  # tuples become lists, as in the checkpoint
        lines = []
        for key, old in self.meta(step)["config"].items():
            if key.startswith(DECIDING) and key in now and old != now[key]:
                lines.append(f"config.{key}: {old} -> {now[key]}")
        return lines

    def wait(self) -> None:
        """Returns when all saves are on the disk. Raises the error of the last one."""
        self._settle()
        self.manager.wait_until_finished()

    def close(self) -> None:
        self._writer.shutdown()
        self.manager.close()


def manager_options(config: ConfigDict | None) -> ocp.CheckpointManagerOptions:
    """Which checkpoints a run keeps. config: None to read only."""
    if config is None:
        return ocp.CheckpointManagerOptions(read_only=True)
    policies = [keep.LatestN(config.checkpoint.keep)]
    if config.checkpoint.keep_best:
        policies.append(
            keep.BestN(
                get_metric_fn=lambda metrics: metrics["loss"],
                reverse=True,  # the lowest
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    return ocp.CheckpointManagerOptions(
        preservation_policy=keep.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
    )


def items(state: State) -> dict:
    """The parts of a state that are saved, and can be read, on their own."""
    parts = {
        "params": state.params,
        "rest": {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped},
    }
    if state.ema is not None:
        parts["ema"] = state.ema
    return parts


def on_host(tree):
    """A copy of its arrays in numpy."""
    if platform() == "cpu":  # where device_get gives views of what the next step donates
        return jax.tree.map(lambda x: np.array(x, copy=True), tree)
    return jax.device_get(tree)


def as_target(abstract, shardings):
    """What orbax is to restore: shapes and dtypes, each with its sharding."""

    def target(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(target, abstract, shardings)


def differences(saved, wanted) -> list[str]:
    """A line for each parameter of two trees that differs in shape or dtype, or is in one alone."""
    saved = shapes_of(saved)
    wanted = shapes_of(wanted)
    other = []
    missing = []
    for path, shape in wanted.items():
        if path not in saved:
            missing.append(f"{path}: not in the checkpoint")
        elif saved[path] != shape:
            other.append(f"{path}: saved {saved[path]}, wanted {shape}")
    extra = [f"{path}: only in the checkpoint" for path in saved if path not in wanted]
    return other + missing + extra


def shapes_of(tree) -> dict[str, tuple]:
    shapes = {}
    for path, x in jax.tree.leaves_with_path(tree):
        shapes[name_of(path)] = (tuple(x.shape), str(x.dtype))
    return shapes
