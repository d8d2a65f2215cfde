"""Optimizers and schedules from optax, and ordered (regex, value) lists that say what applies to which parameter.

Weight decay is decoupled (Loshchilov & Hutter 2019): each step takes learning rate x weight_decay x parameter off,
whatever the gradients were. sgd and adam add weight_decay x parameter to the gradient instead (L2, as torch's do), so
that it goes through momentum and Adam's division too.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm.config.keys import COUNTED
from jaxlm.errors import ConfigError
from jaxlm.parallel.mesh import current_mesh

# Matrices for Muon (Jordan 2024), by name, with the axes that are summed over and those that come out.
MATRICES = (
    (r"(query|key|value)/kernel", MuonDimensionNumbers(-3, (-2, -1))),
    (r"attention/out/kernel", MuonDimensionNumbers((-3, -2), -1)),
    (r"mlp/(shared/)?(gate|up|down)/kernel", MuonDimensionNumbers(-2, -1)),
    (r"mlp/experts/(gate|up|down)", MuonDimensionNumbers(-2, -1)),
    (r".*", None),
)
STACK = re.compile(
    r"(|.*/)layers/block_(\d+)/"
)  # a layer's parameter: which stack, which block of its pattern
EMBEDDING = re.compile(r"(|.*/)embed/")
FACTORED = 32  # Adafactor factors dimensions from this on: optax's 128 would leave out the usual heads, of 64


def warmup(steps: int, then: optax.Schedule) -> optax.Schedule:
    """Linear from peak / steps at step 0 to the peak, then `then`, which counts from 0 after the warm-up."""
    if not steps:
        return then
    peak = then(0)
    return optax.join_schedules(
        [optax.linear_schedule(peak / steps, peak, max(steps - 1, 1)), then], [steps]
    )


def schedule(config: ConfigDict, peak: float) -> optax.Schedule:
    """Learning rate of each step, counted from 0."""
    o = config.optim
    steps = max(config.train.steps - config.optim.warmup_steps, 1)
    cooldown = max(round(o.cooldown_fraction * config.train.steps), 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * o.end_factor, steps),
        "cosine": lambda: optax.cosine_decay_schedule(
            peak, steps, o.end_factor
        ),  # Loshchilov & Hutter 2017
        "wsd": lambda: optax.linear_schedule(  # warm-up, stable, decay: Hu et al. 2024
            peak, peak * o.end_factor, cooldown, max(steps - cooldown, 0)
        ),
        "inverse_sqrt": lambda: (
            lambda step: peak * (1 + jnp.maximum(step, 0) / max(o.warmup_steps, 1)) ** -0.5
        ),  # Vaswani et al. 2017
    }
    return warmup(o.warmup_steps, after[o.schedule]())


# ---------------------------------------------------------------- patterns


def name_of(path) -> str:
    """A parameter's name: 'layers/block_0/mlp/up/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def first_match(patterns, path) -> object:
    """Value of the first regex found in a parameter's name; KeyError if none is."""
    name = name_of(path)
    for pattern, value in patterns:
        if re.search(pattern, name):
            return value
    raise KeyError(name)


def require_cover(patterns, params, key: str) -> None:
    """Raises ConfigError naming the patterns that match no parameter and the parameters that none matches."""
    names = [name_of(path) for path, _ in jax.tree.leaves_with_path(params)]
    problems = []
    for p, _ in patterns:
        if not any(re.search(p, name) for name in names):
            problems.append(f"{p!r} matches no parameter")
    problems += [
        f"{name} is matched by none"
        for name in names
        if not any(re.search(p, name) for p, _ in patterns)
    ]
    if problems:
        raise ConfigError(
            f"the patterns of {key}:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def require_trained(params, config: ConfigDict) -> None:
    """Raises ConfigError where config.optim.rates and decay miss a parameter, or leave nothing to train."""
    require_cover(config.optim.decay, params, "config.optim.decay")
    require_cover(config.optim.rates, params, "config.optim.rates")
    if config.model.name not in COUNTED and not jax.tree.leaves(split(params, config)[0]):
        raise ConfigError(
            "config.optim.rates: freezes every parameter; give some pattern a factor above 0"
        )


def split(tree, config: ConfigDict) -> tuple:
    """(trained, frozen): a tree of parameters twice, each with None where the other has a leaf.

    Frozen is what config.optim.rates gives the factor 0. To jax None is a tree without leaves: what is done to all of
    one tree leaves the other's places alone.
    """

    def frozen(path):
        return first_match(config.optim.rates, path) == 0

    def part(which):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if frozen(path) == which else None, tree
        )

    return part(False), part(True)


def merge(one, other):
    """The tree of two that `split` made; of any two that have None where the other has a leaf."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)


def rate_factors(params, config: ConfigDict):
    """The tree of factors of the learning rate: optim.rates times what optim.layer_decay makes of the depth.

    Of L layers the last has layer_decay, the first layer_decay^L, the embeddings before it layer_decay^(L + 1) and
    everything else (final norm, head) 1: BEiT's convention (Bao et al. 2022); ELECTRA (Clark et al. 2020), where it
    began, takes one power more of each. Every stack (`layers`, `encoder/layers`, ...) has its own L; embeddings of
    no stack have the deepest's. A leaf that stacks layers gets an array that broadcasts over its other dimensions.
    """
    decay = config.optim.layer_decay
    blocks = {}
    rounds = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        if match := STACK.match(name_of(path)):
            blocks[match[1]] = max(blocks.get(match[1], 0), int(match[2]) + 1)
            rounds[match[1]] = leaf.shape[0] if config.model.scan else 1
    depths = {stack: blocks[stack] * rounds[stack] for stack in blocks}

    def factor(path, leaf):
        name = name_of(path)
        factor = first_match(config.optim.rates, path)
        if decay == 1:
            return factor
        if match := STACK.match(name):
            layers = np.arange(rounds[match[1]]) * blocks[match[1]] + int(match[2])
            factors = factor * decay ** (depths[match[1]] - layers)
            if config.model.scan:
                return factors.reshape(-1, *(1,) * (leaf.ndim - 1))
            return factors[0]
        if match := EMBEDDING.match(name):
            return factor * decay ** (depths.get(match[1], max(depths.values(), default=0)) + 1)
        return factor

    return jax.tree_util.tree_map_with_path(factor, params)


# ---------------------------------------------------------------- optimizers


def weight_decay(config: ConfigDict) -> optax.GradientTransformation:
    """Adds weight_decay x parameter to what reaches it, config.optim.decay giving each parameter's factor."""
    o = config.optim

    def factors(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: first_match(o.decay, path), params)

    if not any(factor for _, factor in o.decay):
        return optax.identity()
    return optax.chain(
        *(
            optax.add_decayed_weights(
                o.weight_decay * factor,
                lambda params, f=factor: jax.tree.map(lambda x: x == f, factors(params)),
            )
            for factor in sorted({factor for _, factor in o.decay if factor})
        )
    )


def descent(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_learning_rate(schedule(config, config.optim.learning_rate))


def sgd(config: ConfigDict) -> optax.GradientTransformation:
    """Momentum as a plain sum, m = momentum * m + g (as torch's); with optim.nesterov, Sutskever et al. 2013."""
    o = config.optim
    if o.momentum:
        momentum = optax.trace(o.momentum, o.nesterov)
    else:
        momentum = optax.identity()
    return optax.chain(weight_decay(config), momentum, descent(config))


def adam(config: ConfigDict) -> optax.GradientTransformation:
    """Kingma & Ba 2015."""
    o = config.optim
    return optax.chain(
        weight_decay(config), optax.scale_by_adam(o.b1, o.b2, o.eps), descent(config)
    )


def adamw(config: ConfigDict) -> optax.GradientTransformation:
    """Loshchilov & Hutter 2019."""
    o = config.optim
    return optax.chain(
        optax.scale_by_adam(o.b1, o.b2, o.eps), weight_decay(config), descent(config)
    )


def lion(config: ConfigDict) -> optax.GradientTransformation:
    """Chen et al. 2023: steps of the sign of a momentum. A third of AdamW's learning rate or less, as they advise."""
    o = config.optim
    return optax.chain(optax.scale_by_lion(o.b1, o.b2), weight_decay(config), descent(config))


def adafactor(config: ConfigDict) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, algorithm 4: of a matrix's second moments only the means of rows and columns are kept.

    Without momentum; an update's root mean square is at most 1, and the learning rate is relative to the parameter's
    (of at least 1e-3): 1e-2 is usual.
    """
    measured = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(1e-3),
    )
    return optax.chain(by_layer(measured, config), weight_decay(config), descent(config))


def by_layer(tx: optax.GradientTransformation, config: ConfigDict) -> optax.GradientTransformation:
    """tx for every layer on its own where a scan stacks them, since it measures whole parameters.

    Its state is a dict: {"0": of the parameters of no stack, "24": of those of stacks of 24, ...}.
    """

    def depth(path, leaf):
        if config.model.scan and STACK.match(name_of(path)):
            return leaf.shape[0]
        return 0

    def over(f, key):
        if key == "0":
            return f
        return jax.vmap(f)

    def groups(tree):
        depths = jax.tree_util.tree_map_with_path(depth, tree)

        def pick(n):
            return jax.tree.map(lambda x, own: x if own == n else None, tree, depths)

        return {str(n): pick(n) for n in sorted(set(jax.tree.leaves(depths)))}

    def init(params):
        return {key: over(tx.init, key)(part) for key, part in groups(params).items()}

    def update(updates, state, params):
        parts = groups(params)
        new = {}
        for key, part in groups(updates).items():
            parts[key], new[key] = over(tx.update, key)(part, state[key], parts[key])
        return functools.reduce(merge, parts.values()), new

    return optax.GradientTransformation(init, update)


def moment_axes(path, leaf_shape, shape, names) -> PartitionSpec:
    """Logical axes of the leaf at `path` of an optimizer's state, which belongs to a parameter of this shape and names.

    The parameter's own where the shape is; Adafactor's means over a dimension keep the others'; no names where neither.
    """
    if leaf_shape == shape:
        return names
    first = int(names[:1] == ("layers",))  # which by_layer takes away
    # As optax does: means of rows are over the largest dimension, of columns over the next.
    by_size = first + np.argsort(shape[first:])
    for field, dim in zip(("v_row", "v_col"), by_size[::-1]):
        if jax.tree_util.GetAttrKey(field) in path and leaf_shape == (
            *shape[:dim],
            *shape[dim + 1 :],
        ):
            return PartitionSpec(*names[:dim], *names[dim + 1 :])
    return PartitionSpec()


def fans(path, x) -> tuple[int, int]:
    """(inputs, outputs) of a parameter that Muon takes for a matrix."""
    dims = first_match(MATRICES, path)
    inputs = math.prod(x.shape[i] for i in np.atleast_1d(dims.reduction_axis))
    outputs = math.prod(x.shape[i] for i in np.atleast_1d(dims.output_axis))
    return inputs, outputs


def widen(path, update):
    """Scales an orthogonal update by sqrt(max(1, outputs / inputs)), so that one learning rate fits every shape."""
    inputs, outputs = fans(path, update)
    return update * math.sqrt(max(1.0, outputs / inputs))


def orthogonal(beta: float) -> optax.GradientTransformation:
    """optax's Muon. On one device matrices of one shape go through it as one stack, whose state is the same.

    Their small products are then a few batched ones: 19 ms instead of 32 for shakespeare_char.py:cpu on 2 cores.
    """

    def dimensions(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: first_match(MATRICES, path), tree)

    each = scale_by_muon(beta=beta, weight_dimension_numbers=dimensions)

    def update(updates, state, params=None):
        if current_mesh() is not None:
            return each.update(updates, state, params)
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        groups = {}
        for i, (path, leaf) in enumerate(leaves):
            groups.setdefault((first_match(MATRICES, path), leaf.shape), []).append(i)

        def stack(tree):
            return [jnp.stack([jax.tree.leaves(tree)[i] for i in of]) for of in groups.values()]

        def unstack(stacks):
            parts = {}
            for of, whole in zip(groups.values(), stacks):
                for i, part in zip(of, whole):
                    parts[i] = part
            return tree.unflatten([parts[i] for i in range(len(leaves))])

        together = scale_by_muon(beta=beta, weight_dimension_numbers=[dims for dims, _ in groups])
        updates, new = together.update(stack(updates), state._replace(mu=stack(state.mu)))
        return unstack(updates), new._replace(mu=unstack(new.mu))

    return optax.GradientTransformation(each.init, update)


def muon(config: ConfigDict) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    o = config.optim

    def labels(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "rest" if first_match(MATRICES, path) is None else "matrix", tree
        )

    def learning_rate(peak):
        return optax.scale_by_learning_rate(schedule(config, peak))

    matrix = optax.chain(
        orthogonal(o.momentum),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(widen, updates)),
    )
    return optax.chain(
        optax.partition({"matrix": matrix, "rest": optax.scale_by_adam(o.b1, o.b2, o.eps)}, labels),
        weight_decay(config),
        optax.partition(
            {"matrix": learning_rate(o.learning_rate), "rest": learning_rate(o.adam_learning_rate)},
            labels,
        ),
    )


OPTIMIZERS = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """What config.optim says, for the trained parameters of the whole tree: updates and state have None for the rest.

    Clipping is the train step's, which reports the norm.
    """
    o = config.optim
    tx = OPTIMIZERS[config.optim.name](config)

    def trained(tree):
        return split(tree, config)[0]

    def penalty(path, g, p):
        if o.l1 and first_match(o.decay, path):
            return g + o.l1 * jnp.sign(p)
        return g

    def scale(update, factor):
        if np.all(factor == 1):
            return update
        return update * jnp.asarray(factor, update.dtype)

    def update(grads, state, params):
        own = trained(params)
        grads = jax.tree_util.tree_map_with_path(penalty, trained(grads), own)
        updates, state = tx.update(grads, state, own)
        return jax.tree.map(scale, updates, trained(rate_factors(params, config))), state

    return optax.GradientTransformation(lambda params: tx.init(trained(params)), update)
