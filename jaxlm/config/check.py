"""What a config must satisfy, checked all at once before any device does work. No jax."""

import math
import os
import re

from ml_collections import ConfigDict

from jaxlm.cli import did_you_mean
from jaxlm.config.attention_kernels import capabilities
from jaxlm.config.keys import (
    ATTENDING,
    CHOICES,
    FOLLOWED,
    LABELLED,
    METRICS,
    OF_TEXTS,
    ROLES,
    TOKEN_TASKS,
    TWO_SIDED,
    base,
)
from jaxlm.config.mesh_rules import mesh, nearest_divisors, nearest_multiples
from jaxlm.config.recipe import flatten, set_key
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


def require(problems: list[str]) -> None:
    """Raises one ConfigError that lists them all, if there are any."""
    if problems:
        if len(problems) == 1:
            count = "1 problem"
        else:
            count = f"{len(problems)} problems"
        raise ConfigError(f"{count} in the config:\n" + "\n".join(f"  - {p}" for p in problems))


def check(c: ConfigDict, devices: int | None = None, vocab_size: int | None = None) -> list[str]:
    """Every problem of a config, each with key, value, rule and the nearest valid value; empty where it is sound.

    devices: how many there are, if known. vocab_size: the tokenizer's, if known.
    """
    problems = ranges(c)
    bad = {problem.removeprefix("config.").partition("=")[0] for problem in problems}
    sections = {key.split(".")[0] for key in bad}  # arithmetic on nonsense would only add noise
    if not sections & {"model", "data"}:
        problems += model(c, vocab_size)
    if not sections & {"model", "task", "data"}:
        problems += task(c)
    if not sections & {"train", "data"}:
        problems += training(c)
    return problems + mesh(c, devices, bad)


def ranges(c: ConfigDict) -> list[str]:
    flat = flatten(c)
    problems = []
    for keys, rule, ok in (
        (AT_LEAST_ONE, "must be at least 1", lambda v: v >= 1),
        (AT_LEAST_ZERO, "must not be negative", lambda v: 0 <= v < math.inf),
        (
            ["optim.warmup_steps"],
            "must not be negative, or -1 for 5% of train.steps",
            lambda v: v >= -1,
        ),
        (POSITIVE, "must be positive", lambda v: 0 < v < math.inf),
        (BELOW_ONE, "must be in [0, 1)", lambda v: 0 <= v < 1),
        (["optim.layer_decay"], "must be in (0, 1]; 1: every layer alike", lambda v: 0 < v <= 1),
        (
            ["optim.end_factor", "optim.cooldown_fraction", "task.fim_rate", "task.distill"],
            "must be in [0, 1]",
            lambda v: 0 <= v <= 1,
        ),
        (["task.mask_rate"], "must be in (0, 1)", lambda v: 0 < v < 1),
        (["task.span_length"], "must be at least 1", lambda v: v >= 1),
        (
            ["model.embed_dropout"],
            "must be in [0, 1), or -1 for model.dropout",
            lambda v: v == -1 or 0 <= v < 1,
        ),
    ):
        problems += [f"config.{key}={flat[key]}: {rule}" for key in keys if not ok(flat[key])]
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            hint = did_you_mean(flat[key], allowed)
            problems.append(f"config.{key}={flat[key]}: must be one of {', '.join(allowed)}{hint}")
    if not c.model.layers or set(c.model.layers) - set("SL"):
        problems.append(
            f"config.model.layers={c.model.layers!r}: a pattern of S (window) and L (whole context), such as SSSL"
        )
    return problems


def model(c: ConfigDict, vocab_size: int | None) -> list[str]:
    m = c.model
    problems = []
    attends = m.name in ATTENDING and m.num_layers
    if attends and not m.head_dim and m.embed_dim % m.num_heads:
        problems.append(
            f"config.model.num_heads={m.num_heads}: must divide config.model.embed_dim={m.embed_dim} "
            f"(nearest: {nearest_divisors(m.num_heads, m.embed_dim)}), or set config.model.head_dim"
        )
    elif attends and m.positions == "rope" and (m.head_dim or m.embed_dim // m.num_heads) % 2:
        problems.append("config.model.head_dim: must be even for positions=rope")
    if attends and m.num_kv_heads and m.num_heads % m.num_kv_heads:
        problems.append(
            f"config.model.num_kv_heads={m.num_kv_heads}: must divide config.model.num_heads={m.num_heads} "
            f"(nearest: {nearest_divisors(m.num_kv_heads, m.num_heads)})"
        )
    if m.num_layers % len(m.layers) and m.scan:
        problems.append(
            f"config.model.layers={m.layers!r}: with scan=True its length {len(m.layers)} must divide "
            f"config.model.num_layers={m.num_layers} ({nearest_multiples(m.num_layers, len(m.layers))}), or scan=False"
        )
    if m.positions == "sinusoidal" and m.embed_dim % 2:
        problems.append(
            f"config.model.embed_dim={m.embed_dim}: must be even for positions=sinusoidal"
        )
    longest = max(("seq_len", "enc_len"), key=lambda key: c.data[key])
    if m.positions == "learned" and 0 < m.context_length < c.data[longest]:
        table = f"the table of learned positions, config.model.context_length={m.context_length}"
        problems.append(f"config.data.{longest}={c.data[longest]}: longer than {table}")
    if m.attention_softcap and not capabilities(m.attention).softcap:
        problems.append(
            f"config.model.attention={m.attention}: has no attention_softcap; set auto or reference"
        )
    if m.num_experts and m.experts_per_token > m.num_experts:
        problems.append(
            f"config.model.experts_per_token={m.experts_per_token}: there are only config.model.num_experts="
            f"{m.num_experts} experts"
        )
    if m.embed_ngrams > 1 and m.name not in ("decoder", "encoder"):
        problems.append(
            f"config.model.embed_ngrams={m.embed_ngrams}: is of decoders and encoders; set 1"
        )
    if vocab_size and 0 < m.vocab_size < vocab_size:
        problems.append(
            f"config.model.vocab_size={m.vocab_size}: the tokenizer of config.data has {vocab_size} ids; "
            f"set 0 (as the tokenizer) or at least {vocab_size}"
        )
    return problems


def task(c: ConfigDict) -> list[str]:
    """What the task, its model and its data must be to each other."""
    k = c.task
    m = c.model
    d = c.data
    problems = []
    causal = ("decoder", "lstm")
    both_ways = ("encoder", "bilstm")
    two_sided = ("encoder_decoder", "lstm_seq2seq")
    kinds = {
        "lm": (*causal, "ngram"), "mlm": both_ways, "prefix_lm": ("decoder",), "fim": causal,
        "skipgram": ("vectors", "decoder"), "glove": ("vectors",), "sft": causal, "dpo": causal,
    }.get(k.name, two_sided if k.name in TWO_SIDED else (*both_ways, *causal))  # fmt: skip
    if k.name in LABELLED:
        kinds += ("bag",)
    if m.name not in kinds:
        problems.append(f"config.model.name={m.name}: task {k.name} needs {' or '.join(kinds)}")
    if k.name in ROLES and (d.path or d.mixture):
        problems.append(
            f"config.data.path: task {k.name} learns from examples; give config.data.train and data.val"
        )
    if k.name in TOKEN_TASKS and (d.train or d.val):
        problems.append(
            f"config.data.train: task {k.name} learns from prepared tokens; give config.data.path"
        )
    if "S" in m.layers and (m.name != "decoder" or k.name == "prefix_lm"):
        problems.append(
            f"config.model.layers={m.layers!r}: windows (S) are for causal decoders; set L"
        )
    if m.name == "encoder_decoder" and (m.num_experts or c.mesh.stage > 1):
        problems.append(
            "config.model.name=encoder_decoder: has no experts and no pipeline; set num_experts=0, mesh.stage=1"
        )
    if not d.isolate and (
        m.name == "encoder_decoder" or (m.name in ("encoder", "bag") and k.name in ROLES)
    ):
        problems.append(
            f"config.data.isolate=False: the {m.name} of task {k.name} would read padding; set True"
        )
    if m.name not in ATTENDING and (c.mesh.sequence > 1 or c.mesh.stage > 1 or m.lora_rank):
        problems.append(
            f"config.model.name={m.name}: has no sequence or stage axis and no LoRA; set mesh.sequence=1 ..."
        )
    if m.name not in ATTENDING and m.quantize != "none":
        problems.append(
            f"config.model.quantize={m.quantize}: is of Transformers, not of {m.name}; set none"
        )
    if m.ngram_weights != "none" and (m.name != "bag" or k.name != "classify"):
        problems.append(
            f"config.model.ngram_weights={m.ngram_weights}: is of a bag of n-grams that learns classes; set none, or "
            "model.name=bag and task.name=classify"
        )
    if m.name == "bilstm" and (m.hidden_dim or m.embed_dim) % 2:
        problems.append(
            f"config.model.hidden_dim={m.hidden_dim}: must be even for bilstm, half for each direction"
        )
    if m.lora_rank:
        try:
            re.compile(m.lora_targets)
        except re.error as error:
            problems.append(
                f"config.model.lora_targets={m.lora_targets!r}: not a regular expression: {error}"
            )
    if (metric := c.eval.metric) not in METRICS[k.name]:
        problems.append(
            f"config.eval.metric={metric}: an evaluation of task {k.name} has {', '.join(METRICS[k.name])}"
            f"{did_you_mean(metric, METRICS[k.name])}"
        )
    elif metric in OF_TEXTS and not c.eval.generate:
        problems.append(
            f"config.eval.metric={metric}: needs texts; set config.eval.generate=100, say"
        )
    return problems + objective(c) + word_vectors(c) + in_vain(c)


def objective(c: ConfigDict) -> list[str]:
    """What is learned: from whom, and how much each example counts."""
    k = c.task
    m = c.model
    problems = []
    if k.class_weights != "none" and k.balanced_sampling:
        problems.append(
            f"config.task.class_weights={k.class_weights}: rare classes would be raised twice; set it to none, or "
            "config.task.balanced_sampling=False"
        )
    if k.distill and not k.teacher:
        problems.append(
            f"config.task.distill={k.distill}: needs config.task.teacher, a run directory"
        )
    if k.temperature != 1 and not k.distill and k.name in FOLLOWED["task.temperature"]:
        problems.append(
            f"config.task.temperature={k.temperature}: is of distillation; set config.task.distill as well"
        )
    if k.teacher and not k.distill and k.name != "dpo":
        problems.append(
            f"config.task.teacher={k.teacher}: teaches nothing; set config.task.distill=0.5, say, as well"
        )
    if k.name == "dpo" and not (k.teacher or c.train.init_from):
        problems.append(
            "config.train.init_from: dpo starts from a model, which is its reference; give a run directory"
        )
    if k.label_smoothing and m.logit_softcap:
        problems.append(
            "config.task.label_smoothing: not with config.model.logit_softcap; set one of them to 0"
        )
    return problems


def word_vectors(c: ConfigDict) -> list[str]:
    """What the losses of pairs of words cannot do."""
    glove = c.task.name == "glove"
    if not glove and not c.task.negatives:
        return []
    problems = []
    if glove:
        this = "task glove"
    else:
        this = f"config.task.negatives={c.task.negatives}"
    if not glove and c.task.name == "skipgram" and c.model.name != "vectors":
        problems.append(
            f"config.model.name={c.model.name}: {this} needs two vectors a word and no layers; set vectors, or "
            "config.task.negatives=0"
        )
    if glove and c.data.mixture:
        problems.append(
            "config.data.mixture: task glove counts the words of one directory; prepare the texts together, and give "
            "config.data.path"
        )
    flat = flatten(c)
    for key in ("task.label_smoothing", "task.distill", "train.z_loss", "model.logit_softcap"):
        if flat[key] and not (glove and key in FOLLOWED):  # which `in_vain` tells
            problems.append(
                f"config.{key}={flat[key]}: is of a softmax, which {this} has not; set 0"
            )
    return problems


def in_vain(c: ConfigDict) -> list[str]:
    """The keys that are set, and that config.task does not follow."""
    default = flatten(base())
    given = flatten(c)
    derived = {
        "data.enc_len": c.data.seq_len,
        "eval.max_tokens": c.data.seq_len,
    }  # what `resolve` makes of the default
    return [
        f"config.{key}={given[key]}: task {c.task.name} does not follow it (but {', '.join(tasks)}); leave it out"
        for key, tasks in FOLLOWED.items()
        if c.task.name not in tasks
        and given[key] not in (default[key], derived.get(key, default[key]))
    ]


def forget(c: ConfigDict) -> None:
    """Sets what config.task does not follow back to its default."""
    default = flatten(base())
    for key, tasks in FOLLOWED.items():
        if c.task.name not in tasks:
            set_key(c, key, default[key])


def training(c: ConfigDict) -> list[str]:
    t = c.train
    o = c.optim
    problems = []
    if t.batch_size % t.grad_accumulation:
        problems.append(
            f"config.train.batch_size={t.batch_size}: must be a multiple of config.train.grad_accumulation="
            f"{t.grad_accumulation} ({nearest_multiples(t.batch_size, t.grad_accumulation)})"
        )
    if t.loss_chunk and c.data.seq_len % t.loss_chunk:
        nearest = nearest_divisors(t.loss_chunk, c.data.seq_len)
        problems.append(
            f"config.train.loss_chunk={t.loss_chunk}: must divide config.data.seq_len={c.data.seq_len} "
            f"(nearest: {nearest}), or be 0"
        )
    if o.warmup_steps > t.steps:
        problems.append(
            f"config.optim.warmup_steps={o.warmup_steps}: more than config.train.steps={t.steps}; "
            f"set --config.optim.warmup_steps={t.steps // 10}, say"
        )
    if o.rounding == "stochastic" and c.model.param_dtype == "float32":
        problems.append(
            "config.optim.rounding=stochastic: rounds nothing, since config.model.param_dtype=float32; set "
            "--config.optim.rounding=nearest, or --config.model.param_dtype=bfloat16"
        )
    if t.stop_at > t.steps:
        problems.append(f"config.train.stop_at={t.stop_at}: beyond config.train.steps={t.steps}")
    if c.eval.patience and not c.eval.every:
        problems.append("config.eval.patience: needs evaluations; set config.eval.every")
    factors = []
    for key, item in [
        *(("decay", item) for item in o.decay),
        *(("rates", item) for item in o.rates),
    ]:
        try:
            pattern, factor = item
            re.compile(pattern)
            if not 0 <= factor < math.inf:
                raise ValueError("the factor must not be negative")
            factors += [factor] * (key == "rates")
        except (TypeError, ValueError, re.error) as error:
            problems.append(
                f"config.optim.{key}: {item!r} is not (regular expression, factor): {error}"
            )
    if factors and not any(factors):
        problems.append(
            "config.optim.rates: freezes every parameter; give some pattern a factor above 0"
        )
    try:
        mixture(c)
    except ConfigError as error:
        problems.append(str(error))
    return problems


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
    """[(directory, weight)] of config.data, weights summing to 1. Raises ConfigError that says what is wrong."""
    if not c.data.mixture:
        return [(c.data.path, 1.0)]
    sources = []
    for item in sources_of(c.data.mixture):
        path, equals, text = item.strip().rpartition("=")
        try:
            weight = float(text) if equals else math.nan
        except ValueError:
            weight = math.nan
        if not (path and 0 < weight < math.inf):
            raise ConfigError(
                f"config.data.mixture: {item!r} is not DIR=WEIGHT with a positive weight"
            )
        sources.append((path, weight))
    total = sum(weight for _, weight in sources)
    return [(path, weight / total) for path, weight in sources]
