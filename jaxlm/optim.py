"""Optimizers and schedules from optax, and ordered (regex, value) lists that say what applies to which parameter."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm.errors import ConfigError

# Matrices for Muon (Jordan 2024), by name, with the axes that are summed over and those that come out.
MATRICES = (
    (r"(query|key|value)/kernel", MuonDimensionNumbers(-3, (-2, -1))),
    (r"attention/out/kernel", MuonDimensionNumbers((-3, -2), -1)),
    (r"mlp/(shared/)?(gate|up|down)/kernel", MuonDimensionNumbers(-2, -1)),
    (r"mlp/experts/(gate|up|down)", MuonDimensionNumbers(-2, -1)),
    (r".*", None),
)


def warmup(steps: int, then: optax.Schedule) -> optax.Schedule:
    """Linear from peak / steps at step 0 to the peak, then `then`, which counts from 0 after the warm-up."""
    if not steps:
        return then
    peak = then(0)
    return optax.join_schedules([optax.linear_schedule(peak / steps, peak, max(steps - 1, 1)), then], [steps])


def schedule(config: ConfigDict, peak: float) -> optax.Schedule:
    """Learning rate of each step, counted from 0."""
    o, steps = config.optim, max(config.train.steps - config.optim.warmup_steps, 1)
    cooldown = max(round(o.cooldown_fraction * config.train.steps), 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * o.end_factor, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, o.end_factor),  # Loshchilov & Hutter 2017
        "wsd": lambda: optax.linear_schedule(  # warm-up, stable, decay: Hu et al. 2024
            peak, peak * o.end_factor, cooldown, max(steps - cooldown, 0)
        ),
        "inverse_sqrt": lambda: (
            lambda step: peak * (1 + jnp.maximum(step, 0) / max(o.warmup_steps, 1)) ** -0.5
        ),  # Vaswani et al. 2017
    }
    return warmup(o.warmup_steps, after[o.schedule]())


def first_match(patterns, path) -> object:
    """Value of the first regex found in a parameter's name ('layers/block_0/mlp/up/kernel'); KeyError if none is."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, value in patterns:
        if re.search(pattern, name):
            return value
    raise KeyError(name)


def require_cover(patterns, params, key: str) -> None:
    """Raises ConfigError naming the patterns that match no parameter and the parameters that none matches."""
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    problems = [f"{p!r} matches no parameter" for p, _ in patterns if not any(re.search(p, name) for name in names)]
    problems += [f"{name} is matched by none" for name in names if not any(re.search(p, name) for p, _ in patterns)]
    if problems:
        raise ConfigError(f"the patterns of {key}:\n" + "\n".join(f"  - {problem}" for problem in problems))


def weight_decay(config: ConfigDict) -> optax.GradientTransformation:
    """Decoupled decay (Loshchilov & Hutter 2019), config.optim.decay giving each parameter's factor."""
    o = config.optim
    factors = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: first_match(o.decay, path), params)
    if not any(factor for _, factor in o.decay):
        return optax.identity()
    return optax.chain(
        *(
            optax.add_decayed_weights(
                o.weight_decay * factor, lambda params, f=factor: jax.tree.map(lambda x: x == f, factors(params))
            )
            for factor in sorted({factor for _, factor in o.decay if factor})
        )
    )


def adamw(config: ConfigDict) -> optax.GradientTransformation:
    o = config.optim
    return optax.chain(
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        weight_decay(config),
        optax.scale_by_learning_rate(schedule(config, o.learning_rate)),
    )


def widen(path, update):
    """Scales an orthogonal update by sqrt(max(1, outputs / inputs)), so that one learning rate fits every shape."""
    dims = first_match(MATRICES, path)
    inputs, outputs = (
        math.prod(update.shape[i] for i in np.atleast_1d(axes)) for axes in (dims.reduction_axis, dims.output_axis)
    )
    return update * math.sqrt(max(1.0, outputs / inputs))


def muon(config: ConfigDict) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    o = config.optim
    dimensions = lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: first_match(MATRICES, path), tree)
    labels = lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: "rest" if first_match(MATRICES, path) is None else "matrix", tree
    )
    learning_rate = lambda peak: optax.scale_by_learning_rate(schedule(config, peak))
    matrix = optax.chain(
        scale_by_muon(beta=o.momentum, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(widen, updates)),
    )
    return optax.chain(
        optax.partition({"matrix": matrix, "rest": optax.scale_by_adam(o.b1, o.b2, o.eps)}, labels),
        weight_decay(config),
        optax.partition(
            {"matrix": learning_rate(o.learning_rate), "rest": learning_rate(o.adam_learning_rate)}, labels
        ),
    )


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """What config.optim names. Clipping is the train step's, which reports the norm."""
    return OPTIMIZERS[config.optim.name](config)
