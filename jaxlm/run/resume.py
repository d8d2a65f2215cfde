"""A run that goes on: the state to start with, and what has changed since its last checkpoint."""

import json
import math
from pathlib import PurePath

from ml_collections import ConfigDict

from jaxlm.config.recipe import flatten, set_key
from jaxlm.errors import CheckpointError
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.counted import weigh_ngrams
from jaxlm.run.warm_start import warm_start
from jaxlm.run.workdir import write_whole
from jaxlm.step.optim import schedule
from jaxlm.step.state import State, abstract_state, init_state, state_shardings

# Keys that the learning rate of a step follows from.
SCHEDULE = (
    "train.steps optim.learning_rate optim.schedule optim.warmup_steps optim.end_factor optim.cooldown_fraction "
    "optim.adam_learning_rate"
).split()
RATES = {"learning_rate": "learning rate", "adam_learning_rate": "learning rate of Adam's part"}


def start_state(
    config, mesh, checkpoints: Checkpoints, data: dict, allow_data_change: bool
) -> tuple[State, dict]:
    """(state, its checkpoint's `meta`) of the newest checkpoint, or (a fresh state, {}).

    data: the fingerprint of the data. Raises CheckpointError where it is not the checkpoint's, unless
    allow_data_change, and where the checkpoint does not fit the config.
    """
    step = checkpoints.latest()
    if step is None:
        return fresh_state(config, mesh), {}
    meta = checkpoints.meta(step)
    changed = []
    for key, now in data.items():
        was = meta["data"].get(key)
        if was != now:
            changed.append(f"{key}: {was} -> {now}")
    if changed and not allow_data_change:
        raise CheckpointError(
            f"the data is not what step {step} of {checkpoints.path.parent} was trained on:\n  "
            + "\n  ".join(changed)
            + "\ngive the same data, another --workdir, or --allow_data_change to go on all the same"
        )
    return checkpoints.restore(step, abstract_state(config)[0], state_shardings(config, mesh)), meta


def fresh_state(config: ConfigDict, mesh) -> State:
    """The state of step 0. Raises CheckpointError where train.init_from does not fit."""
    state = init_state(config, mesh)
    if config.train.init_from:
        return state.replace(params=warm_start(state.params, config))
    if config.model.ngram_weights != "none":
        return state.replace(params=weigh_ngrams(state.params, config))
    return state


def write_config(workdir: PurePath, config: ConfigDict, meta: dict) -> None:
    """Writes config.json, and prints what is not as in the last checkpoint. meta: that checkpoint's, or {}."""
    new = json.loads(json.dumps(flatten(config)))
    for key, old in meta.get("config", {}).items():
        if key in new and new[key] != old:
            print(f"config.{key}: {old} -> {new[key]}")
    write_whole(workdir / "config.json", json.dumps(new, indent=1) + "\n")


def rate_jump(config: ConfigDict, meta: dict, step: int, skipped: int) -> str:
    """How a resumed run's learning rate jumps because the config has changed, in words; '' where it doesn't.

    meta: of the checkpoint, {} for a new run. step, skipped: as in its state.
    """
    saved = meta.get("config", {})
    now = flatten(config)
    old = config.copy_and_resolve_references()
    changes = []
    for key in SCHEDULE:
        if key in saved and saved[key] != now[key]:
            set_key(old, key, saved[key])
            changes.append(f"{key} {saved[key]} -> {now[key]}")
    if not changes or step >= config.train.stop_at:
        return ""
    jumps = []
    for key, name in RATES.items():
        if key == "adam_learning_rate" and config.optim.name != "muon":
            continue
        before = float(schedule(old, old.optim[key])(step - skipped))
        after = float(schedule(config, config.optim[key])(step - skipped))
        if not math.isclose(before, after, rel_tol=0.01):
            jumps.append(
                f"the {name} at step {step + 1} was {before:.2e} under the checkpoint's config, and is {after:.2e} now"
            )
    if not jumps:
        return ""
    return f"{'; '.join(jumps)} ({', '.join(changes)})"
