"""What a config must satisfy, checked all at once before any device does work. No jax.

Each check yields its problems. The mesh's are in mesh_rules.py.
"""

import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxlm.cli import did_you_mean
from jaxlm.config.attention_kernels import capabilities
from jaxlm.config.keys import ATTENDING, CHOICES, base
from jaxlm.config.mesh_rules import mesh, nearest_divisors, nearest_multiples
from jaxlm.config.problems import Problem
from jaxlm.config.recipe import flatten, set_key
from jaxlm.config.tasks import TEXT_METRICS, task_of, tasks_using
from jaxlm.errors import ConfigError

AT_LEAST_ONE = (
    "model.embed_dim model.num_heads model.window model.order model.embed_ngrams model.buckets model.scan_unroll "
    "model.experts_per_token model.pipeline_rounds data.seq_len data.prefetch data.vocab_size data.min_count "
    "train.steps train.batch_size train.grad_accumulation train.max_skipped checkpoint.every checkpoint.keep log.every "
    "mesh.slices task.window eval.beams"
).split()
AT_LEAST_ZERO = (
    "model.num_layers model.num_kv_heads model.head_dim model.mlp_dim model.vocab_size model.context_length "
    "model.logit_softcap seed model.attention_softcap model.num_experts model.expert_dim model.shared_experts "
    "model.capacity_factor "
    "model.balance_loss model.router_z_loss model.balance_rate model.pipeline_microbatches train.stop_at "
    "train.loss_chunk train.z_loss optim.weight_decay optim.l1 optim.clip optim.adam_learning_rate eval.every "
    "eval.batches eval.patience eval.generate eval.max_tokens eval.length_penalty task.focal model.encoder_layers "
    "model.hidden_dim model.num_labels model.lora_rank data.examples_per_row data.enc_len task.negatives"
).split()
POSITIVE = (
    "model.norm_eps model.rope_theta model.embed_std model.lora_alpha optim.learning_rate optim.eps task.temperature "
    "task.beta task.x_max"
).split()
BELOW_ONE = (
    "model.dropout model.recurrent_dropout train.ema optim.b1 optim.b2 optim.momentum task.label_smoothing "
    "data.word_dropout task.subsample"
).split()
PROPORTIONS = "optim.end_factor optim.cooldown_fraction task.fim_rate task.distill".split()


class Range(NamedTuple):
    """The numbers that some keys may have."""

    keys: list[str]
    rule: str
    low: float
    high: float = math.inf
    has_low: bool = True  # whether low itself is allowed
    has_high: bool = False
    default: float | None = None  # allowed outside of the range: "derive it"

    def allows(self, value: float) -> bool:
        if value == self.default:
            return True
        above = value > self.low or (self.has_low and value == self.low)
        below = value < self.high or (self.has_high and value == self.high)
        return above and below


RANGES = (
    Range(AT_LEAST_ONE, "must be at least 1", 1, has_high=True),
    Range(AT_LEAST_ZERO, "must not be negative", 0),
    Range(
        ["optim.warmup_steps"],
        "must not be negative, or -1 for 5% of train.steps",
        -1,
        has_high=True,
    ),
    Range(POSITIVE, "must be positive", 0, has_low=False),
    Range(BELOW_ONE, "must be in [0, 1)", 0, 1),
    Range(
        ["optim.layer_decay"],
        "must be in (0, 1]; 1: every layer alike",
        0,
        1,
        has_low=False,
        has_high=True,
    ),
    Range(PROPORTIONS, "must be in [0, 1]", 0, 1, has_high=True),
    Range(["task.mask_rate"], "must be in (0, 1)", 0, 1, has_low=False),
    Range(["task.span_length"], "must be at least 1", 1, has_high=True),
    Range(["model.embed_dropout"], "must be in [0, 1), or -1 for model.dropout", 0, 1, default=-1),
)


def check(
    c: ConfigDict, devices: int | None = None, vocab_size: int | None = None
) -> list[Problem]:
    """Every problem of a config, each with key, value, rule and the nearest valid value; empty where it is sound.

    devices: how many there are, if known. vocab_size: the tokenizer's, if known.
    """
    problems = list(ranges(c))
    bad = {problem.key for problem in problems}
    sections = {key.split(".")[0] for key in bad}  # arithmetic on nonsense would only add noise
    if not sections & {"model", "data"}:
        problems += model(c, vocab_size)
    if not sections & {"model", "task", "data"}:
        problems += task(c)
    if not sections & {"train", "data"}:
        problems += training(c)
    return problems + mesh(c, devices, bad)


def ranges(c: ConfigDict) -> Iterator[Problem]:
    """The keys whose own value no config may have."""
    flat = flatten(c)
    for numbers in RANGES:
        for key in numbers.keys:
            if not numbers.allows(flat[key]):
                yield Problem(key, flat[key], numbers.rule)
    for key, words in CHOICES.items():
        if flat[key] not in words:
            rule = f"must be one of {', '.join(words)}"
            yield Problem(key, flat[key], rule, did_you_mean(flat[key], words))
    if not c.model.layers or set(c.model.layers) - set("SL"):
        rule = "a pattern of S (window) and L (whole context), such as SSSL"
        yield Problem("model.layers", repr(c.model.layers), rule)


# ---------------------------------------------------------------- the model


def model(c: ConfigDict, vocab_size: int | None) -> Iterator[Problem]:
    m = c.model
    if m.name in ATTENDING and m.num_layers:
        yield from heads(m)
    if m.num_layers % len(m.layers) and m.scan:
        nearest = nearest_multiples(m.num_layers, len(m.layers))
        yield Problem(
            "model.layers",
            repr(m.layers),
            f"with scan=True its length {len(m.layers)} must divide "
            f"config.model.num_layers={m.num_layers} ({nearest}), or scan=False",
        )
    if m.positions == "sinusoidal" and m.embed_dim % 2:
        yield Problem("model.embed_dim", m.embed_dim, "must be even for positions=sinusoidal")
    longest = max(("seq_len", "enc_len"), key=c.data.get)
    if m.positions == "learned" and 0 < m.context_length < c.data[longest]:
        table = f"the table of learned positions, config.model.context_length={m.context_length}"
        yield Problem(f"data.{longest}", c.data[longest], f"longer than {table}")
    if m.attention_softcap and not capabilities(m.attention).softcap:
        yield Problem(
            "model.attention", m.attention, "has no attention_softcap; set auto or reference"
        )
    if m.num_experts and m.experts_per_token > m.num_experts:
        rule = f"there are only config.model.num_experts={m.num_experts} experts"
        yield Problem("model.experts_per_token", m.experts_per_token, rule)
    if m.embed_ngrams > 1 and m.name not in ("decoder", "encoder"):
        yield Problem("model.embed_ngrams", m.embed_ngrams, "is of decoders and encoders; set 1")
    if vocab_size and 0 < m.vocab_size < vocab_size:
        yield Problem(
            "model.vocab_size",
            m.vocab_size,
            f"the tokenizer of config.data has {vocab_size} ids; set 0 (as the tokenizer) or at least {vocab_size}",
        )


def heads(m: ConfigDict) -> Iterator[Problem]:
    """m: the model section of a model with attention heads."""
    if not m.head_dim and m.embed_dim % m.num_heads:
        nearest = nearest_divisors(m.num_heads, m.embed_dim)
        yield Problem(
            "model.num_heads",
            m.num_heads,
            f"must divide config.model.embed_dim={m.embed_dim} (nearest: {nearest}), or set config.model.head_dim",
        )
    elif m.positions == "rope" and (m.head_dim or m.embed_dim // m.num_heads) % 2:
        yield Problem("model.head_dim", None, "must be even for positions=rope")
    if m.num_kv_heads and m.num_heads % m.num_kv_heads:
        nearest = nearest_divisors(m.num_kv_heads, m.num_heads)
        yield Problem(
            "model.num_kv_heads",
            m.num_kv_heads,
            f"must divide config.model.num_heads={m.num_heads} (nearest: {nearest})",
        )


# ---------------------------------------------------------------- the task


def task(c: ConfigDict) -> Iterator[Problem]:
    """What the task, its model and its data must be to each other."""
    yield from model_of_task(c)
    yield from data_of_task(c)
    yield from features(c)
    yield from evaluation(c)
    yield from objective(c)
    yield from word_vectors(c)
    yield from unused(c)


def model_of_task(c: ConfigDict) -> Iterator[Problem]:
    name = c.model.name
    models = task_of(c).models
    if name not in models:
        yield Problem("model.name", name, f"task {c.task.name} needs {' or '.join(models)}")


def data_of_task(c: ConfigDict) -> Iterator[Problem]:
    record = task_of(c)
    d = c.data
    if record.from_examples and (d.path or d.mixture):
        rule = f"task {record.name} learns from examples; give config.data.train and data.val"
        yield Problem("data.path", None, rule)
    if not record.from_examples and (d.train or d.val):
        rule = f"task {record.name} learns from prepared tokens; give config.data.path"
        yield Problem("data.train", None, rule)


def features(c: ConfigDict) -> Iterator[Problem]:
    """What some models and tasks do not have."""
    m = c.model
    record = task_of(c)
    attends = m.name in ATTENDING
    if "S" in m.layers and (m.name != "decoder" or record.reads_prefix):
        rule = "windows (S) are for causal decoders; set L"
        yield Problem("model.layers", repr(m.layers), rule)
    if m.name == "encoder_decoder" and (m.num_experts or c.mesh.stage > 1):
        rule = "has no experts and no pipeline; set num_experts=0, mesh.stage=1"
        yield Problem("model.name", m.name, rule)
    reads_padding = m.name == "encoder_decoder" or (
        m.name in ("encoder", "bag") and record.from_examples
    )
    if reads_padding and not c.data.isolate:
        rule = f"the {m.name} of task {record.name} would read padding; set True"
        yield Problem("data.isolate", False, rule)
    if not attends and (c.mesh.sequence > 1 or c.mesh.stage > 1 or m.lora_rank):
        rule = "has no sequence or stage axis and no LoRA; set mesh.sequence=1 ..."
        yield Problem("model.name", m.name, rule)
    if not attends and m.quantize != "none":
        yield Problem(
            "model.quantize", m.quantize, f"is of Transformers, not of {m.name}; set none"
        )
    if m.ngram_weights != "none" and (m.name != "bag" or record.answer != "class"):
        yield Problem(
            "model.ngram_weights",
            m.ngram_weights,
            "is of a bag of n-grams that learns classes; set none, or model.name=bag and task.name=classify",
        )
    if m.name == "bilstm" and (m.hidden_dim or m.embed_dim) % 2:
        rule = "must be even for bilstm, half for each direction"
        yield Problem("model.hidden_dim", m.hidden_dim, rule)
    if m.lora_rank:
        try:
            re.compile(m.lora_targets)
        except re.error as error:
            rule = f"not a regular expression: {error}"
            yield Problem("model.lora_targets", repr(m.lora_targets), rule)


def evaluation(c: ConfigDict) -> Iterator[Problem]:
    """eval.metric must be one that an evaluation of the task reports."""
    metric = c.eval.metric
    known = task_of(c).metrics
    if metric not in known:
        rule = f"an evaluation of task {c.task.name} has {', '.join(known)}"
        yield Problem("eval.metric", metric, rule, did_you_mean(metric, known))
    elif metric in TEXT_METRICS and not c.eval.generate:
        yield Problem("eval.metric", metric, "needs texts; set config.eval.generate=100, say")


def objective(c: ConfigDict) -> Iterator[Problem]:
    """What is learned: from whom, and how much each example counts."""
    k = c.task
    is_preference = task_of(c).is_preference
    if k.class_weights != "none" and k.balanced_sampling:
        yield Problem(
            "task.class_weights",
            k.class_weights,
            "rare classes would be raised twice; set it to none, or config.task.balanced_sampling=False",
        )
    if k.distill and not k.teacher:
        yield Problem("task.distill", k.distill, "needs config.task.teacher, a run directory")
    if k.temperature != 1 and not k.distill and k.name in tasks_using("task.temperature"):
        rule = "is of distillation; set config.task.distill as well"
        yield Problem("task.temperature", k.temperature, rule)
    if k.teacher and not k.distill and not is_preference:
        rule = "teaches nothing; set config.task.distill=0.5, say, as well"
        yield Problem("task.teacher", k.teacher, rule)
    if is_preference and not (k.teacher or c.train.init_from):
        rule = f"{k.name} starts from a model, which is its reference; give a run directory"
        yield Problem("train.init_from", None, rule)
    if k.label_smoothing and c.model.logit_softcap:
        rule = "not with config.model.logit_softcap; set one of them to 0"
        yield Problem("task.label_smoothing", None, rule)


def word_vectors(c: ConfigDict) -> Iterator[Problem]:
    """What the losses of pairs of words cannot do."""
    record = task_of(c)
    glove = record.loss == "glove"
    if not glove and not c.task.negatives:
        return
    this = "task glove" if glove else f"config.task.negatives={c.task.negatives}"
    if "task.negatives" in record.keys and c.model.name != "vectors":
        rule = f"{this} needs two vectors a word and no layers; set vectors, or config.task.negatives=0"
        yield Problem("model.name", c.model.name, rule)
    if glove and c.data.mixture:
        yield Problem(
            "data.mixture",
            None,
            "task glove counts the words of one directory; prepare the texts together, and give config.data.path",
        )
    flat = flatten(c)
    for key in ("task.label_smoothing", "task.distill", "train.z_loss", "model.logit_softcap"):
        reported = glove and tasks_using(key)  # by `unused`
        if flat[key] and not reported:
            yield Problem(key, flat[key], f"is of a softmax, which {this} has not; set 0")


def unused(c: ConfigDict) -> Iterator[Problem]:
    """The keys that are set, and that config.task does not use."""
    default = flatten(base())
    derived = {  # what `resolve` makes of the default
        "data.enc_len": c.data.seq_len,
        "eval.max_tokens": c.data.seq_len,
    }
    for key, value in flatten(c).items():
        tasks = tasks_using(key)
        if not tasks or c.task.name in tasks:
            continue
        if value not in (default[key], derived.get(key, default[key])):
            rule = f"task {c.task.name} does not follow it (but {', '.join(tasks)}); leave it out"
            yield Problem(key, value, rule)


def reset_unused(c: ConfigDict) -> None:
    """Sets the keys that config.task does not use back to their defaults."""
    for key, value in flatten(base()).items():
        tasks = tasks_using(key)
        if tasks and c.task.name not in tasks:
            set_key(c, key, value)


# ---------------------------------------------------------------- training


def training(c: ConfigDict) -> Iterator[Problem]:
    t = c.train
    o = c.optim
    if t.batch_size % t.grad_accumulation:
        nearest = nearest_multiples(t.batch_size, t.grad_accumulation)
        rule = f"must be a multiple of config.train.grad_accumulation={t.grad_accumulation} ({nearest})"
        yield Problem("train.batch_size", t.batch_size, rule)
    if t.loss_chunk and c.data.seq_len % t.loss_chunk:
        nearest = nearest_divisors(t.loss_chunk, c.data.seq_len)
        rule = f"must divide config.data.seq_len={c.data.seq_len} (nearest: {nearest}), or be 0"
        yield Problem("train.loss_chunk", t.loss_chunk, rule)
    if o.warmup_steps > t.steps:
        yield Problem(
            "optim.warmup_steps",
            o.warmup_steps,
            f"more than config.train.steps={t.steps}; set --config.optim.warmup_steps={t.steps // 10}, say",
        )
    if o.rounding == "stochastic" and c.model.param_dtype == "float32":
        yield Problem(
            "optim.rounding",
            o.rounding,
            "rounds nothing, since config.model.param_dtype=float32; set --config.optim.rounding=nearest, or "
            "--config.model.param_dtype=bfloat16",
        )
    if t.stop_at > t.steps:
        yield Problem("train.stop_at", t.stop_at, f"beyond config.train.steps={t.steps}")
    if c.eval.patience and not c.eval.every:
        yield Problem("eval.patience", None, "needs evaluations; set config.eval.every")
    yield from patterns(o)
    try:
        mixture(c)
    except ConfigError as error:
        yield error.args[0]


def patterns(o: ConfigDict) -> Iterator[Problem]:
    """The (regular expression, factor) pairs of optim.decay and optim.rates. o: the optim section."""
    for key in ("decay", "rates"):
        for item in o[key]:
            if why := unlike_pattern(item):
                rule = f"{item!r} is not (regular expression, factor): {why}"
                yield Problem(f"optim.{key}", None, rule)
    factors = [item[1] for item in o.rates if not unlike_pattern(item)]
    if factors and not any(factors):
        rule = "freezes every parameter; give some pattern a factor above 0"
        yield Problem("optim.rates", None, rule)


def unlike_pattern(item) -> str:
    """Why this is no (regular expression, factor); empty where it is one."""
    try:
        pattern, factor = item
        re.compile(pattern)
        if 0 <= factor < math.inf:
            return ""
    except (TypeError, ValueError, re.error) as error:
        return str(error)
    return "the factor must not be negative"


def sources_of(spec: str) -> list[str]:
    """What stands between the commas of config.data.mixture. The path of a directory that exists may have commas."""
    pieces = spec.split(",")
    items = []
    while pieces:
        count = len(pieces)
        while count > 1 and not os.path.isdir(",".join(pieces[:count]).strip().rpartition("=")[0]):
            count -= 1
        items.append(",".join(pieces[:count]))
        pieces = pieces[count:]
    return items


def mixture(c: ConfigDict) -> list[tuple[str, float]]:
    """[(directory, weight)] of config.data, weights summing to 1. Raises ConfigError of a Problem."""
    if not c.data.mixture:
        return [(c.data.path, 1.0)]
    sources = []
    for item in sources_of(c.data.mixture):
        path, _, text = item.strip().rpartition("=")
        weight = weight_of(text)
        if not (path and 0 < weight < math.inf):
            rule = f"{item!r} is not DIR=WEIGHT with a positive weight"
            raise ConfigError(Problem("data.mixture", None, rule))
        sources.append((path, weight))
    total = sum(weight for _, weight in sources)
    return [(path, weight / total) for path, weight in sources]


def weight_of(text: str) -> float:
    """NaN where the text is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
