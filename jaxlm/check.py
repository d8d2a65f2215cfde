"""What a config must satisfy, checked all at once before any device does work. No jax."""

import math
import re

from ml_collections import ConfigDict

from jaxlm.cli import did_you_mean
from jaxlm.config import CHOICES, MESH_AXES, flatten
from jaxlm.errors import ConfigError

AT_LEAST_ONE = (
    "model.num_layers model.embed_dim model.num_heads model.window data.seq_len train.steps train.batch_size "
    "train.grad_accumulation train.max_skipped checkpoint.every checkpoint.keep log.every data.prefetch"
).split()
AT_LEAST_ZERO = (
    "model.num_kv_heads model.head_dim model.mlp_dim model.vocab_size model.context_length model.logit_softcap "
    "seed model.attention_softcap train.stop_at train.loss_chunk train.z_loss optim.weight_decay "
    "optim.clip optim.adam_learning_rate eval.every eval.batches eval.patience"
).split()
POSITIVE = "model.norm_eps model.rope_theta model.embed_std optim.learning_rate optim.eps".split()
BELOW_ONE = "model.dropout train.ema optim.b1 optim.b2 optim.momentum".split()


def require(problems: list[str]) -> None:
    """Raises one ConfigError that lists them all, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count} in the config:\n" + "\n".join(f"  - {p}" for p in problems))


def check(c: ConfigDict, devices: int | None = None, vocab_size: int | None = None) -> list[str]:
    """Every problem of a config, each with key, value, rule and the nearest valid value; empty where it is sound.

    devices: how many there are, if known. vocab_size: the tokenizer's, if known.
    """
    problems = ranges(c)
    bad = {problem.split(".")[1] for problem in problems}  # sections: arithmetic on nonsense would only add noise
    if not bad & {"model", "data"}:
        problems += model(c, vocab_size)
    if not bad & {"train", "data"}:
        problems += training(c)
    return problems if bad & {"model", "train"} else problems + mesh(c, devices)


def ranges(c: ConfigDict) -> list[str]:
    flat = flatten(c)
    problems = []
    for keys, rule, ok in (
        (AT_LEAST_ONE, "must be at least 1", lambda v: v >= 1),
        (AT_LEAST_ZERO, "must not be negative", lambda v: 0 <= v < math.inf),
        (["optim.warmup_steps"], "must not be negative, or -1 for 5% of train.steps", lambda v: v >= -1),
        (POSITIVE, "must be positive", lambda v: 0 < v < math.inf),
        (BELOW_ONE, "must be in [0, 1)", lambda v: 0 <= v < 1),
        (["optim.end_factor", "optim.cooldown_fraction"], "must be in [0, 1]", lambda v: 0 <= v <= 1),
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


def nearest_multiples(value: int, factor: int) -> str:
    low = value // factor * factor
    return f"nearest: {low} or {low + factor}" if low else f"nearest: {factor}"


def nearest_divisors(value: int, of: int) -> str:
    divisors = [d for d in range(1, of + 1) if of % d == 0]
    return " or ".join(str(d) for d in sorted(sorted(divisors, key=lambda d: abs(d - value))[:2]))


def model(c: ConfigDict, vocab_size: int | None) -> list[str]:
    m, problems = c.model, []
    if not m.head_dim and m.embed_dim % m.num_heads:
        problems.append(
            f"config.model.num_heads={m.num_heads}: must divide config.model.embed_dim={m.embed_dim} "
            f"(nearest: {nearest_divisors(m.num_heads, m.embed_dim)}), or set config.model.head_dim"
        )
    elif m.positions == "rope" and (m.head_dim or m.embed_dim // m.num_heads) % 2:
        problems.append("config.model.head_dim: must be even for positions=rope")
    if m.num_kv_heads and m.num_heads % m.num_kv_heads:
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
        problems.append(f"config.model.embed_dim={m.embed_dim}: must be even for positions=sinusoidal")
    if m.positions == "learned" and 0 < m.context_length < c.data.seq_len:
        problems.append(
            f"config.data.seq_len={c.data.seq_len}: longer than the table of learned positions, "
            f"config.model.context_length={m.context_length}"
        )
    if m.attention_softcap and m.attention not in ("auto", "reference"):
        problems.append(f"config.model.attention={m.attention}: has no attention_softcap; set auto or reference")
    if vocab_size and 0 < m.vocab_size < vocab_size:
        problems.append(
            f"config.model.vocab_size={m.vocab_size}: the tokenizer of config.data has {vocab_size} ids; "
            f"set 0 (as the tokenizer) or at least {vocab_size}"
        )
    return problems


def training(c: ConfigDict) -> list[str]:
    t, o, problems = c.train, c.optim, []
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
    if t.stop_at > t.steps:
        problems.append(f"config.train.stop_at={t.stop_at}: beyond config.train.steps={t.steps}")
    if c.eval.patience and not c.eval.every:
        problems.append("config.eval.patience: needs evaluations; set config.eval.every")
    for item in o.decay:
        try:
            pattern, factor = item
            re.compile(pattern)
            if not 0 <= factor < math.inf:
                raise ValueError("the factor must not be negative")
        except (TypeError, ValueError, re.error) as error:
            problems.append(f"config.optim.decay: {item!r} is not (regular expression, factor): {error}")
    try:
        mixture(c)
    except ConfigError as error:
        problems.append(str(error))
    return problems


def mixture(c: ConfigDict) -> list[tuple[str, float]]:
    """[(directory, weight)] of config.data, weights summing to 1. Raises ConfigError that says what is wrong."""
    if not c.data.mixture:
        return [(c.data.path, 1.0)]
    sources = []
    for item in c.data.mixture.split(","):
        path, equals, text = item.strip().rpartition("=")
        try:
            weight = float(text) if equals else math.nan
        except ValueError:
            weight = math.nan
        if not (path and 0 < weight < math.inf):
            raise ConfigError(f"config.data.mixture: {item!r} is not DIR=WEIGHT with a positive weight")
        sources.append((path, weight))
    total = sum(weight for _, weight in sources)
    return [(path, weight / total) for path, weight in sources]


def fits(sizes: dict[str, int], devices: int) -> bool:
    fixed = math.prod(n for n in sizes.values() if n != -1)
    return devices % fixed == 0 if -1 in sizes.values() else devices == fixed


def mesh(c: ConfigDict, devices: int | None) -> list[str]:
    sizes, m, problems = {axis: c.mesh[axis] for axis in MESH_AXES}, c.model, []
    bad = {axis: n for axis, n in sizes.items() if n < 1 and n != -1}
    problems += [
        f"config.mesh.{axis}={n}: must be at least 1, or -1 for all devices that are left" for axis, n in bad.items()
    ]
    for axis in ("stage", "expert", "sequence"):
        if sizes[axis] != 1:
            problems.append(f"config.mesh.{axis}={sizes[axis]}: nothing is split along this axis yet; set it to 1")
    free = [axis for axis, n in sizes.items() if n == -1]
    if len(free) > 1:
        problems.append(f"config.mesh: only one axis may be -1, not {' and '.join(free)}")
    if problems:
        return problems
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if devices is not None and not fits(sizes, devices):
        given = " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "data=1"
        fixes = [(axis, n) for axis in MESH_AXES for n in range(1, devices + 1) if fits(sizes | {axis: n}, devices)]
        fixes.sort(key=lambda fix: abs(math.log(fix[1] / max(sizes[fix[0]], 1))))
        nearest = " or ".join(f"{axis}={n}" for axis, n in fixes[:2]) or "data=-1 and all others 1"
        rule = "divide" if free else "be"
        problems.append(
            f"config.mesh: {given} is {fixed} of {devices} devices; it must {rule} {devices} (nearest: {nearest})"
        )
    tensor = sizes["tensor"]
    if tensor > 1 and m.num_heads > 0 and m.num_heads % tensor:
        problems.append(
            f"config.mesh.tensor={tensor}: must divide config.model.num_heads={m.num_heads} "
            f"(nearest: {nearest_divisors(tensor, m.num_heads)})"
        )
    rows, shards = c.train.batch_size // max(c.train.grad_accumulation, 1), sizes["data"] * sizes["fsdp"]
    if free and free[0] in ("data", "fsdp"):
        shards = abs(shards) * (devices or fixed) // fixed
    if shards > 1 and rows > 0 and rows % shards:
        parts = max(c.train.grad_accumulation, 1)
        problems.append(
            f"config.train.batch_size={c.train.batch_size}: must be a multiple of mesh.data x mesh.fsdp x "
            f"grad_accumulation = {shards * parts} ({nearest_multiples(c.train.batch_size, shards * parts)})"
        )
    return problems
