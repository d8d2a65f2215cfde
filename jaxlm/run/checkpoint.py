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
from jaxlm.step.optim import name_of
from jaxlm.step.state import State

ITEMS = {
    "params": ocp.StandardCheckpointHandler,
    "ema": ocp.StandardCheckpointHandler,
    "rest": ocp.StandardCheckpointHandler,
    "meta": ocp.JsonCheckpointHandler,
}
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
    """Raises CheckpointError where metrics.jsonl tells of steps whose checkpoints are gone.

    A run makes checkpoints/ before its first row, and a save that was cut short leaves a directory in it, so a run that
    died before or inside of its first save is told from one whose checkpoints were deleted. To be called before
    `Checkpoints` makes the directory. A bucket has no empty directories: there nothing is known.
    """
    rows = workdir / "metrics.jsonl"
    folder = workdir / "checkpoints"
    if in_bucket(workdir) or not rows.is_file():
        return
    last = max(
        re.findall(r'^\{"step": (\d+),', rows.read_text(), re.MULTILINE), key=int, default=None
    )
    if last is None:
        return
    if folder.is_dir() and (any(folder.iterdir()) or int(last) <= config.checkpoint.every):
        return
    raise CheckpointError(
        f"{rows} has rows up to step {last}, but {folder} has no checkpoint: put it back, give another --workdir, or "
        "--start_over, which begins at step 0 and drops these rows"
    )


class Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask jax whether a signal has come.

    jax takes the number that it was asked with last for the progress of this process, and orbax asks again, with older
    steps, from a thread: the processes would miss the step at which they agreed to stop (jaxlm/train/stop_signal.py).
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of a run directory. Raises CheckpointError where the directory cannot be used."""

    def __init__(self, workdir: str | PurePath, config: ConfigDict | None = None):
        """config: of the run that saves; None to read only."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every step it takes
        workdir = run_directory(workdir)
        self.config = config
        self.path = (workdir if in_bucket(workdir) else workdir.absolute()) / "checkpoints"
        if config is None and not self.path.is_dir():
            if workdir.is_dir():
                found = "has no checkpoints/"
            else:
                found = "is not a directory"
            need = "give the --workdir of a jaxlm.train run that has saved"
            raise CheckpointError(f"{workdir} {found}: {need}{near_path(workdir)}")
        self._writer = ThreadPoolExecutor(1)
        self._writing = None
        options = {"read_only": True}
        if config is not None:
            policies = [keep.LatestN(config.checkpoint.keep)]
            if config.checkpoint.keep_best:
                lowest = {"get_metric_fn": lambda m: m["loss"], "reverse": True, "n": 1}
                policies.append(keep.BestN(**lowest, keep_checkpoints_without_metrics=False))
            options = {
                "preservation_policy": keep.AnyPreservationPolicy(policies),
                "cleanup_tmp_directories": True,
            }
        try:
            self.manager = Manager(
                self.path,
                item_handlers={name: handler() for name, handler in ITEMS.items()},
                options=ocp.CheckpointManagerOptions(**options),
            )
        except OSError as error:
            raise CheckpointError(f"cannot use {self.path}: {error.strerror or error}") from None

    def latest(self) -> int | None:
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
            losses = {s: self.meta(s).get("eval_loss") for s in steps}
            measured = [s for s in steps if losses[s] is not None]
            if not measured:
                raise CheckpointError(
                    f"{self.path}: no checkpoint is of a step that was evaluated (config.eval.every); steps: {steps}"
                )
            return min(measured, key=losses.get)
        if not str(step).isdecimal() or int(step) not in steps:
            raise CheckpointError(
                f"{self.path} has no step {step}; it has {', '.join(map(str, steps))}, latest and best"
            )
        return int(step)

    def save(self, state: State, meta: dict, eval_loss: float | None = None) -> None:
        """Copies the state to the host, then writes it in the background. Raises what the save before came to."""
        self._settle()
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        if (
            jax.process_count() > 1
        ):  # orbax's processes wait for each other, in the order of the loop
            self._write(step, items(state), meta, eval_loss)
        else:  # orbax takes 50 ms to begin, however small the state
            self._writing = self._writer.submit(
                self._write, step, on_host(items(state)), meta, eval_loss
            )

    def _settle(self) -> None:
        """Waits until orbax has begun with the save before, and raises its error."""
        if self._writing:
            writing = self._writing
            self._writing = None
            writing.result()

    def save_params(self, step: int, params: dict, meta: dict) -> None:
        """A checkpoint to evaluate, to generate and to begin from, not to go on with: it has no optimizer's state."""
        self._write(step, {"params": params}, meta, meta.get("eval_loss"))

    def _write(self, step: int, parts: dict, meta: dict, eval_loss: float | None) -> None:
        args = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
        saved = self.manager.save(
            step,
            args=ocp.args.Composite(
                **args, meta=ocp.args.JsonSave(meta | {"eval_loss": eval_loss})
            ),
            metrics=None if eval_loss is None else {"loss": eval_loss},
        )
        if not saved:  # orbax says no more than this
            raise CheckpointError(
                f"step {step} was not saved: {self.path} has steps {sorted(self.manager.all_steps())}, and nothing is "
                "saved below the newest; if its directory was renamed, rename it back, or give another --workdir"
            )

    def meta(self, step: int) -> dict:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
                "meta"
            ]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path / str(step)} is damaged ({error}): move it away to use the one before"
            ) from error

    def restore(self, step: int, abstract: State, shardings: State) -> State:
        """The state at `step`, on the mesh of `shardings`. Raises CheckpointError where it does not fit `abstract`."""
        places = items(shardings)
        got = self._read(
            step, **{name: as_target(tree, places[name]) for name, tree in items(abstract).items()}
        )
        if (inside := int(got["rest"]["step"])) != step:
            raise CheckpointError(
                f"{self.path / str(step)} holds step {inside}: its directory was renamed or copied; rename it to "
                f"{inside}, or move it away to go on from the one before"
            )
        return State(params=got["params"], ema=got.get("ema"), teacher=None, **got["rest"])

    def restore_params(self, step: int, abstract: State, shardings: State) -> dict:
        """What evaluation and generation use: the average of the parameters where the run keeps one, else these."""
        name = "params" if abstract.ema is None else "ema"
        return self._read(step, **{name: as_target(items(abstract)[name], items(shardings)[name])})[
            name
        ]

    def read_params(self, step: int, place) -> dict:
        """What evaluation uses, as it was saved, whatever the model. place: (name, shape) -> sharding."""
        if self.meta(step)["config"].get("train.ema"):
            name = "ema"
        else:
            name = "params"
        saved = self._saved(step, name)

        def target(path, x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(name_of(path), x.shape))

        return self._read(step, **{name: jax.tree_util.tree_map_with_path(target, saved)})[name]

    def _read(self, step: int, **targets):
        parts = self._parts(step)
        for name, target in targets.items():
            if name not in parts:
                if name == "ema" and "rest" in parts:
                    raise CheckpointError(
                        f"{self.path / str(step)} was trained without an average of the parameters: train.ema can't be "
                        "switched on half-way; set --config.train.ema=0, or begin a new run in another --workdir with "
                        f"--config.train.init_from={self.path.parent}"
                    )
                raise CheckpointError(
                    f"{self.path / str(step)} has no {name}: it is of a model alone, which a run can begin from, but "
                    f"not go on with; give another --workdir, and --config.train.init_from={self.path.parent}"
                )
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

    def _require_fit(self, step: int, name: str, target) -> None:
        """Orbax casts dtypes silently and reports other shapes unreadably: compare first."""

        def flat(tree):
            return {
                name_of(path): (tuple(x.shape), str(x.dtype))
                for path, x in jax.tree.leaves_with_path(tree)
            }

        saved = flat(self._saved(step, name))
        wanted = flat(target)
        both = [path for path in wanted if path in saved and saved[path] != wanted[path]]
        lines = [f"{path}: saved {saved[path]}, wanted {wanted[path]}" for path in both]
        lines += [f"{path}: not in the checkpoint" for path in wanted if path not in saved]
        lines += [f"{path}: only in the checkpoint" for path in saved if path not in wanted]
        if lines:
            more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} is of another model or optimizer than the config:\n  "
                + "\n  ".join(self._changed(step) + lines[:8] + more)
                + "\nuse the config that it was trained with (workdir/config.json), or another --workdir"
            )

    def _parts(self, step: int):
        """{name: what orbax knows of it} of a checkpoint."""
        try:
            return self.manager.item_metadata(step)
        except (
            AttributeError,
            KeyError,
            OSError,
            TypeError,
            ValueError,
        ) as error:  # orbax's, of broken files
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
        except (
            AttributeError,
            KeyError,
            OSError,
            ValueError,
        ):  # orbax: None, where its own files are not whole
            folder = self.path / str(step)
            raise CheckpointError(
                f"{folder} is damaged: its {name} do not say what they are; move it away to use the one before"
            ) from None

    def _changed(self, step: int) -> list[str]:
        """The keys, of those that decide what a state holds, which are not as in a checkpoint."""
        now = json.loads(
            json.dumps(flatten(self.config) if self.config else {})
        )  # tuples are lists there

        def deciding(key):
            return key.startswith(("model.", "optim.", "task.", "train.ema"))

        pairs = [
            (key, old, now[key]) for key, old in self.meta(step)["config"].items() if key in now
        ]
        return [
            f"config.{key}: {old} -> {new}"
            for key, old, new in pairs
            if deciding(key) and old != new
        ]

    def wait(self) -> None:
        self._settle()
        self.manager.wait_until_finished()

    def close(self) -> None:
        self._writer.shutdown()
        self.manager.close()


def items(state: State) -> dict:
    """The parts of a state that are saved, and can be read, on their own."""
    rest = {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped}
    return {"params": state.params, "rest": rest} | (
        {} if state.ema is None else {"ema": state.ema}
    )


def on_host(tree):
    """A copy of its arrays in numpy."""
    if platform() == "cpu":  # where device_get gives views of what the next step donates
        return jax.tree.map(lambda x: np.array(x, copy=True), tree)
    return jax.device_get(tree)


def as_target(abstract, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
