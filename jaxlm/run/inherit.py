"""What a config takes from the runs that it builds on, train.init_from and task.teacher, and whether it fits them."""

import os
from pathlib import Path

from ml_collections import ConfigDict

from jaxlm.cli import near_path
from jaxlm.config.problems import Problem
from jaxlm.config.recipe import flatten
from jaxlm.config.tasks import task_of
from jaxlm.data.batches import load_tokenizer
from jaxlm.data.tokenization.vocabulary import MADE
from jaxlm.run.checkpoint import config_of, tokenizer_of
from jaxlm.run.saved_run import read_config, read_meta, split_step

# Keys of the model section that a run does not take from the one it starts from: they say nothing of its parameters.
OWN = (
    "num_labels pooling lora_rank lora_alpha lora_targets dropout embed_dropout recurrent_dropout scan_unroll remat "
    "attention context_parallel pipeline_microbatches pipeline_rounds dtype param_dtype quantize vocab_size"
).split()


def parents(config: ConfigDict) -> list[tuple[str, str]]:
    """[(key, run)] of the runs that this one builds on."""
    named = [("train.init_from", config.train.init_from), ("task.teacher", config.task.teacher)]
    return [(key, spec) for key, spec in named if spec]


def inherit(config: ConfigDict) -> list[Problem]:
    """Takes the model section and the tokenizer from train.init_from, the teacher's from its run; returns problems.

    Raises CheckpointError where a run's config.json cannot be read.
    """
    problems = []
    for key, spec in parents(config):
        folder = split_step(spec)[0]
        if "://" not in spec and not (Path(folder) / "config.json").exists():
            near = near_path(folder)
            rule = "is not the --workdir of a jaxlm.train run"
            problems.append(Problem(key, spec, rule, near))
    if problems:
        return problems
    task = config.task
    config.train.init_from = absolute(config.train.init_from)
    task.teacher = absolute(task.teacher)
    start = config.train.init_from
    if start:
        inherit_model(config, start)
    if task_of(config).is_preference:
        task.teacher = task.teacher or start
    if task.teacher and not task.teacher_model:
        task.teacher_model = tuple(read_config(task.teacher).model.items())
    return []


def absolute(spec: str) -> str:
    """The same run when evaluation starts in another directory."""
    if not spec or "://" in spec:
        return spec
    return os.path.abspath(spec)


def inherit_model(config: ConfigDict, start: str) -> None:
    saved = read_config(start).model
    config.model.update({key: saved[key] for key in saved if key not in OWN})
    config.model.vocab_size = max(config.model.vocab_size, saved.vocab_size)
    if task_of(config).from_examples and config.data.tokenizer in MADE:
        config.data.tokenizer = str(Path(split_step(start)[0]).absolute())


def overruled(asked: list[str], before: dict, config: ConfigDict) -> list[str]:
    """A line for each key of the model that the user has set and `inherit` has set otherwise.

    asked: the keys that the user has set. before: the flat config as it was before `inherit`.
    """
    now = flatten(config)
    lines = []
    for key in asked:
        grows = key == "model.vocab_size"
        if key.startswith("model.") and not grows and before.get(key) != now.get(key):
            lines.append(
                f"config.{key}={before[key]} is not followed: the run of train.init_from has {now[key]}"
            )
    return lines


def agree(config: ConfigDict, vocab_size: int) -> list[Problem]:
    """What is wrong between the data and the runs that this one builds on: other tokens, other labels.

    vocab_size: ids of the data and the task; a model that the run starts from gets room for them. Call it after
    `inherit`, with config.data.labels filled in. Raises CheckpointError.
    """
    own = load_tokenizer(config)
    task = config.task
    problems = []
    for key, spec in parents(config):
        meta = read_meta(spec)
        saved = config_of(meta)
        tokenizer = tokenizer_of(meta)
        is_teacher = key == "task.teacher"
        same_tokens = tokenizer.fingerprint == own.fingerprint
        other_task = is_teacher and task_of(config).has_head and saved.task.name != task.name
        if not same_tokens and not other_task:
            problems.append(Problem(key, spec, other_tokens(spec, tokenizer, own, config)))
        elif is_teacher:
            if spec == config.train.init_from:
                key = "train.init_from"  # which the user has set
            problem = unfit_teacher(saved, config, vocab_size)
            if problem:
                problems.append(Problem(key, spec, problem))
        else:
            config.model.vocab_size = max(config.model.vocab_size, vocab_size)
    return problems


def other_tokens(spec: str, saved, own, config: ConfigDict) -> str:
    """The problem where a run's tokenizer is not the data's, and what to type."""
    folder = split_step(spec)[0]
    if task_of(config).from_examples:
        remedy = f"give --config.data.tokenizer={folder}"
    else:
        remedy = f"prepare the text again with --tokenizer={folder}"
    return (
        f"its tokenizer ({tokenizer_text(saved)}) is not the data's ({tokenizer_text(own)}), so that the same id is "
        f"another text; {remedy}"
    )


def tokenizer_text(tokenizer) -> str:
    return f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.fingerprint[:8]}"


def unfit_teacher(teacher: ConfigDict, config: ConfigDict, vocab_size: int) -> str:
    """Why a run of config `teacher`, with the tokenizer of `config`, cannot teach it; '' where it can."""
    saved = teacher.model.vocab_size
    own = config.model.vocab_size or vocab_size
    task = config.task.name
    if saved < vocab_size:
        fit = task
        if task_of(config).is_preference:
            fit = "sft, whose model knows who speaks"
        return (
            f"a model of {saved:,} ids, but the data of task {task} have {vocab_size:,}: it was trained on task "
            f"{teacher.task.name}; give a run of task {fit}"
        )
    if task_of(config).has_head and (teacher.task.name, teacher.data.labels) != (
        task,
        config.data.labels,
    ):
        problem = f"its outputs are of {head_text(teacher)}, this run's of {head_text(config)}; give another teacher"
        if teacher.task.name == task:
            labels = teacher.data.labels
            problem += f', or, where they mean the same, --config.data.labels="{labels}"'
        return problem
    if config.task.distill and not task_of(config).has_head and saved != own:
        return (
            f"a model of {saved:,} ids, this one of {own:,}; set --config.model.vocab_size={saved}"
        )
    return ""


def head_text(config: ConfigDict) -> str:
    labels = config.data.labels
    if labels:
        return f"task {config.task.name} with labels {', '.join(labels)}"
    return f"task {config.task.name}"
