"""A run that begins where another ended: its model, its tokenizer and its parameters; and the teacher of one."""

import json
import math
import os
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxlm.cli import near_path
from jaxlm.config.problems import Problem
from jaxlm.config.recipe import flatten, num_labels, set_key
from jaxlm.config.tasks import task_of
from jaxlm.data.batches import describe, load_tokenizer, open_stores
from jaxlm.data.examples import Examples
from jaxlm.data.tokenization.vocabulary import MADE
from jaxlm.errors import CheckpointError, UserError
from jaxlm.models import ngram
from jaxlm.models.bag import log_count_ratios
from jaxlm.run.checkpoint import Checkpoints, as_target, config_of, known_config, tokenizer_of
from jaxlm.run.workdir import run_directory
from jaxlm.step.optim import schedule
from jaxlm.step.patterns import name_of
from jaxlm.step.state import abstract_state, state_shardings

# Keys of the model section that say nothing of the parameters it starts from: the new run's own.
OWN = (
    "num_labels pooling lora_rank lora_alpha lora_targets dropout embed_dropout recurrent_dropout scan_unroll remat "
    "attention context_parallel pipeline_microbatches pipeline_rounds dtype param_dtype quantize vocab_size"
).split()

# Keys that the learning rate of a step follows from.
SCHEDULE = (
    "train.steps optim.learning_rate optim.schedule optim.warmup_steps optim.end_factor optim.cooldown_fraction "
    "optim.adam_learning_rate"
).split()


def split_step(spec: str) -> tuple[str, str]:
    """("DIR", "best") of "DIR@best"; the step is `latest` where none is given."""
    path, at, step = spec.rpartition("@")
    if at and (step in ("best", "latest") or step.isdecimal()):
        return (path, step)
    return (spec, "latest")


def read_config(spec: str) -> ConfigDict:
    """The resolved config of a run directory. Raises CheckpointError."""
    file = run_directory(split_step(spec)[0]) / "config.json"
    try:
        flat = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    except OSError as error:
        raise CheckpointError(
            f"{file}: {error.strerror or error}: give the --workdir of a jaxlm.train run"
        ) from None
    return known_config(flat, str(file))


def inherit(config: ConfigDict) -> list[Problem]:
    """Takes the model section and the tokenizer from train.init_from, the teacher's from its run; returns problems."""
    problems = []
    task = config.task
    for key, spec in (("train.init_from", config.train.init_from), ("task.teacher", task.teacher)):
        if spec and not (Path(split_step(spec)[0]) / "config.json").exists() and "://" not in spec:
            near = near_path(split_step(spec)[0])
            rule = "is not the --workdir of a jaxlm.train run"
            problems.append(Problem(key, spec, rule, near))
    if problems:
        return problems

    # evaluation may start elsewhere
    def whole(spec):
        if spec and "://" not in spec:
            return os.path.abspath(spec)
        return spec

    config.train.init_from = whole(config.train.init_from)
    task.teacher = whole(task.teacher)
    if start := config.train.init_from:
        theirs = read_config(start).model
        config.model.update({key: theirs[key] for key in theirs if key not in OWN})
        config.model.vocab_size = max(config.model.vocab_size, theirs.vocab_size)
        if task_of(config).from_examples and config.data.tokenizer in MADE:
            config.data.tokenizer = str(Path(split_step(start)[0]).absolute())
    if task_of(config).is_preference:
        task.teacher = task.teacher or start
    if task.teacher and not task.teacher_model:
        task.teacher_model = tuple(read_config(task.teacher).model.items())
    return problems


def overruled(asked: list[str], before: dict, config: ConfigDict) -> list[str]:
    """A line for each key of the model that the user has set and `inherit` has set otherwise.

    asked: those keys; before: the config as it was, flat.
    """
    now = flatten(config)
    grows = "model.vocab_size"
    keys = []
    for key in asked:
        if key.startswith("model.") and key != grows and before.get(key) != now.get(key):
            keys.append(key)
    return [
        f"config.{key}={before[key]} is not followed: the run of train.init_from has {now[key]}"
        for key in keys
    ]


def look_at_data(config: ConfigDict) -> tuple[int, int, UserError | None]:
    """(ids of the vocabulary, tokens of the training data, what is wrong with it); fills in config.data.labels."""
    try:
        vocab_size, config.data.labels, num_tokens = describe(config)
    except UserError as error:
        return 0, 0, error
    return vocab_size, num_tokens, None


def not_told(config: ConfigDict, vocab_size: int, problem: UserError | None) -> list[str]:
    """The problem with the data, where a config leaves to it what must be known to describe a model."""
    if config.model.vocab_size or vocab_size:
        missing = []
    else:
        missing = ["config.model.vocab_size"]
    if task_of(config).has_head and not (config.model.num_labels or num_labels(config)):
        missing.append("config.model.num_labels")
    if problem and missing:
        return [f"{problem}; or set {' and '.join(missing)}, which it would tell"]
    return []


def agree(config: ConfigDict, vocab_size: int) -> list[Problem]:
    """What is wrong between the data and the runs that this one builds on: other tokens, other labels.

    vocab_size: ids of the data and the task; a model that is begun from gets room for them. To be called after
    `inherit`, with config.data.labels filled in. Raises CheckpointError.
    """
    mine = load_tokenizer(config)
    problems = []
    task = config.task
    for key, spec in (("train.init_from", config.train.init_from), ("task.teacher", task.teacher)):
        if not spec:
            continue
        meta = read_meta(spec)
        theirs = tokenizer_of(meta)
        teaches = key == "task.teacher"
        other_task = teaches and task_of(config).has_head and config_of(meta).task.name != task.name
        if theirs.fingerprint != mine.fingerprint and not other_task:
            if task_of(config).from_examples:
                verb = "give"
                where = "--config.data.tokenizer="
            else:
                verb = "prepare"
                where = "the text anew with --tokenizer="
            rule = (
                f"its tokenizer ({in_words(theirs)}) is not the data's ({in_words(mine)}), so that the same "
                f"id is another text; {verb} {where}{split_step(spec)[0]}"
            )
            problems.append(Problem(key, spec, rule))
        elif teaches:
            if spec == config.train.init_from:
                key = "train.init_from"
            rules = unlike(config_of(meta), config, vocab_size)
            problems += [Problem(key, spec, rule) for rule in rules]
        else:
            config.model.vocab_size = max(config.model.vocab_size, vocab_size)
    return problems


def in_words(tokenizer) -> str:
    return f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.fingerprint[:8]}"


def unlike(teacher: ConfigDict, config: ConfigDict, vocab_size: int) -> list[str]:
    """Why a run of config `teacher`, with the tokenizer of `config`, cannot teach it."""
    theirs = teacher.model.vocab_size
    mine = config.model.vocab_size or vocab_size
    task = config.task.name
    if theirs < vocab_size:
        return [
            f"a model of {theirs:,} ids, but the data of task {task} have {vocab_size:,}: it was trained on task "
            f"{teacher.task.name}; give a run of task {'sft, whose model knows who speaks' if task == 'dpo' else task}"
        ]
    if task_of(config).has_head and (teacher.task.name, teacher.data.labels) != (
        task,
        config.data.labels,
    ):
        same = f', or, where they mean the same, --config.data.labels="{teacher.data.labels}"'
        return [
            f"its outputs are of {head_in_words(teacher)}, this run's of {head_in_words(config)}; give another teacher"
            + same * (teacher.task.name == task)
        ]
    if config.task.distill and not task_of(config).has_head and theirs != mine:
        return [
            f"a model of {theirs:,} ids, this one of {mine:,}; set --config.model.vocab_size={theirs}"
        ]
    return []


def head_in_words(config: ConfigDict) -> str:
    labels = config.data.labels
    return f"task {config.task.name}" + (f" with labels {', '.join(labels)}" if labels else "")


def read_meta(spec: str) -> dict:
    """What the checkpoint of a run directory, "DIR" or "DIR@STEP", says of itself. Raises CheckpointError."""
    path, step = split_step(spec)
    checkpoints = Checkpoints(path)
    meta = checkpoints.meta(checkpoints.choose(step))
    checkpoints.close()
    return meta


def rate_jump(config: ConfigDict, meta: dict, step: int, skipped: int) -> str:
    """In words, how a resumed run's learning rate jumps because the config has changed; empty where it doesn't.

    meta: what the checkpoint says of itself, {} for a new run. step, skipped: as in its state.
    """
    saved = meta.get("config", {})
    old = config.copy_and_resolve_references()
    changed = []
    for key in SCHEDULE:
        now = flatten(config)[key]
        if key in saved and saved[key] != now:
            set_key(old, key, saved[key])
            changed.append(f"{key} {saved[key]} -> {now}")
    if not changed or step >= config.train.stop_at:
        return ""
    lines = []
    for key, what in (
        ("learning_rate", "learning rate"),
        ("adam_learning_rate", "learning rate of Adam's part"),
    ):
        was = float(schedule(old, old.optim[key])(step - skipped))
        now = float(schedule(config, config.optim[key])(step - skipped))
        used = key == "learning_rate" or config.optim.name == "muon"
        if used and not math.isclose(was, now, rel_tol=0.01):
            lines.append(
                f"the {what} at step {step + 1} was {was:.2e} under the checkpoint's config, and is {now:.2e} now"
            )
    if lines:
        return f"{'; '.join(lines)} ({', '.join(changed)})"
    return ""


def read_teacher(config: ConfigDict, mesh) -> dict:
    """The parameters of config.task.teacher on the mesh. Raises CheckpointError."""
    like = as_target(abstract_state(config)[0].teacher, state_shardings(config, mesh).teacher)
    try:
        return read_run(config.task.teacher, like)
    except CheckpointError as error:
        raise CheckpointError(
            f"config.task.teacher, which the loss compares this model with: {error}"
        ) from None


def read_run(spec: str, like: dict) -> dict:
    """The parameters of a run directory, "DIR" or "DIR@STEP", sharded as those of the same name and shape in `like`."""
    known = {name_of(path): x for path, x in jax.tree.leaves_with_path(like)}
    mesh = next(iter(known.values())).sharding.mesh

    def place(name, shape):
        same = name in known and known[name].shape == shape
        if same:
            return known[name].sharding
        return NamedSharding(mesh, PartitionSpec())

    path, step = split_step(spec)
    checkpoints = Checkpoints(path)
    params = checkpoints.read_params(checkpoints.choose(step), place)
    checkpoints.close()
    return params


def count_ngrams(config: ConfigDict) -> dict:
    """The parameters of an n-gram model of the training data; fills in config.model.ngrams."""
    stores = open_stores(config, "train")
    m = config.model
    bos = stores[0].bos_id
    params = ngram.fit(
        (text for store in stores for text in documents(store)),
        m.order,
        m.vocab_size,
        bos,
        m.discount,
    )
    m.ngrams = ngram.sizes(params)
    return params


def weigh_ngrams(params: dict, config: ConfigDict) -> dict:
    """The parameters of a bag of n-grams with its log-count ratios, of the training examples."""
    m = config.model
    pieces = Examples(config, "train").pieces
    texts, labels = zip(*((piece["tokens"], piece["label"]) for piece in pieces))
    ratio = log_count_ratios(texts, np.array(labels), m.num_labels, m.order, m.buckets)
    old = params["embed"]["ratio"]
    return params | {
        "embed": params["embed"] | {"ratio": jax.device_put(ratio.astype(old.dtype), old.sharding)}
    }


def documents(store):
    """Each document's tokens, int32, bos in front where the tokenizer has one."""
    starts = [*store.document_starts(0, store.num_tokens), store.num_tokens]
    front = [] if store.bos_id is None else [store.bos_id]
    for start, stop in pairwise(starts):
        yield np.concatenate([front, store.read(int(start), int(stop - start))]).astype(np.int32)


def merge(params: dict, section: ConfigDict) -> tuple[dict, ConfigDict]:
    """(params, model section) without adapters: each kernel with its product of two narrow matrices added.

    section: the resolved `model` section that params are of. Layers may be stacked by scan, on a leading axis.
    """
    scale = section.lora_alpha / max(section.lora_rank, 1)

    def fold(tree):
        if not isinstance(tree, dict):
            return tree
        tree = {name: fold(part) for name, part in tree.items()}
        if "lora_a" in tree:
            a = tree.pop("lora_a")
            b = tree.pop("lora_b")

            def product(a, b):
                return scale * jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1)

            stacked = a.ndim + b.ndim - 2 > tree["kernel"].ndim
            more = jax.vmap(product)(a, b) if stacked else product(a, b)
            tree["kernel"] = (tree["kernel"] + more).astype(tree["kernel"].dtype)
        return tree

    section = section.copy_and_resolve_references()
    section.lora_rank = 0
    return fold(params), section


def warm_start(params: dict, config: ConfigDict) -> dict:
    """The parameters of train.init_from in place of those of the same name; the rest stays, and is told of.

    Tables of a larger vocabulary keep their further rows, adapters (LoRA) are folded in, and a head of other labels
    begins anew. Raises CheckpointError where shapes are not alike.
    """
    spec = config.train.init_from
    theirs = config_of(read_meta(config.train.init_from))
    start = read_run(spec, params)
    told = []
    if theirs.model.lora_rank:
        start, _ = merge(start, theirs.model)
        told.append("its adapters are folded in")
    if "head" in start and (theirs.task.name, theirs.data.labels) != (
        config.task.name,
        config.data.labels,
    ):
        told.append(
            f"its head of {head_in_words(theirs)} is left, for a new one of {head_in_words(config)}"
        )
        del start["head"]
    saved = {name_of(path): x for path, x in jax.tree.leaves_with_path(start)}
    fresh = []
    unlike = []

    def one(path, x):
        name = name_of(path)
        old = saved.pop(name, None)
        if old is None:
            fresh.append(name)
            return x
        if (
            old.shape[1:] != x.shape[1:]
            or len(old) > len(x)
            or (len(old) < len(x) and "embed" not in name)
        ):
            unlike.append(f"{name}: {old.shape} there, {x.shape} here")
            return x

        def put(x, old):
            return jnp.concatenate([old.astype(x.dtype), x[len(old) :]])

        return jax.jit(put, out_shardings=x.sharding)(x, old)

    params = jax.tree_util.tree_map_with_path(one, params)
    if unlike:
        raise CheckpointError(
            f"train.init_from={spec} has other shapes:\n  " + "\n  ".join(unlike[:8])
        )
    if jax.process_index() == 0:
        told += [f"new: {', '.join(fresh[:6])}{' ...' if len(fresh) > 6 else ''}"] if fresh else []
        told += [f"not used: {', '.join(list(saved)[:6])}"] if saved else []
        print(f"starts from {spec}" + "".join(f"; {text}" for text in told))
    return params
