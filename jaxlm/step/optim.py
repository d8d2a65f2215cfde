"""Optimizers and schedules, from optax.

Weight decay is decoupled (Loshchilov & Hutter 2019): each step takes learning rate x weight_decay x parameter off,
whatever the gradients were. sgd and adam add weight_decay x parameter to the gradient instead (L2, as torch's do), so
that it goes through momentum and Adam's division too.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.tree_util import tree_map_with_path
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm.parallel.mesh import current_mesh
from jaxlm.step.patterns import (
    STACK,
    combine,
    first_match,
    name_of,
    partition,
    rate_factors,
    restore_frozen,
)

# Matrices for Muon (Jordan 2024), by name, with the axes that are summed over and those that come out.
MATRICES = (
    (r"(query|key|value)/kernel", MuonDimensionNumbers(-3, (-2, -1))),
    (r"attention/out/kernel", MuonDimensionNumbers((-3, -2), -1)),
    (r"mlp/(shared/)?(gate|up|down)/kernel", MuonDimensionNumbers(-2, -1)),
    (r"mlp/experts/(gate|up|down)", MuonDimensionNumbers(-2, -1)),
    (r".*", None),
)
# Adafactor factors dimensions from this size on. optax's 128 would leave out the usual heads, of 64.
FACTORED = 32

# ---------------------------------------------------------------- schedules


def constant(config: ConfigDict, peak: float) -> optax.Schedule:
    return optax.constant_schedule(peak)


def linear(config: ConfigDict, peak: float) -> optax.Schedule:
    return optax.linear_schedule(peak, peak * config.optim.end_factor, decay_steps(config))


def cosine(config: ConfigDict, peak: float) -> optax.Schedule:
    """Loshchilov & Hutter 2017."""
    return optax.cosine_decay_schedule(peak, decay_steps(config), config.optim.end_factor)


def wsd(config: ConfigDict, peak: float) -> optax.Schedule:
    """Warm-up, stable, decay: Hu et al. 2024."""
    o = config.optim
    cooldown = round(o.cooldown_fraction * config.train.steps)
    cooldown = max(cooldown, 1)
    stable = max(decay_steps(config) - cooldown, 0)
    return optax.linear_schedule(peak, peak * o.end_factor, cooldown, stable)


def inverse_sqrt(config: ConfigDict, peak: float) -> optax.Schedule:
    """Vaswani et al. 2017."""
    steps = max(config.optim.warmup_steps, 1)

    def schedule(step):
        return peak * (1 + jnp.maximum(step, 0) / steps) ** -0.5

    return schedule


SCHEDULES = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "inverse_sqrt": inverse_sqrt,
}


def decay_steps(config: ConfigDict) -> int:
    """Steps after the warm-up."""
    return max(config.train.steps - config.optim.warmup_steps, 1)


def warmup(steps: int, then: optax.Schedule) -> optax.Schedule:
    """Linear from peak / steps at step 0 to the peak, then `then`, which counts from 0 after the warm-up."""
    if not steps:
        return then
    peak = then(0)
    rise = optax.linear_schedule(peak / steps, peak, max(steps - 1, 1))
    return optax.join_schedules([rise, then], [steps])


def schedule(config: ConfigDict, peak: float) -> optax.Schedule:
    """Learning rate of each step, counted from 0, as config.optim.schedule says, with this peak."""
    after = SCHEDULES[config.optim.schedule](config, peak)
    return warmup(config.optim.warmup_steps, after)


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """`schedule` with the peak of config.optim.learning_rate."""
    return schedule(config, config.optim.learning_rate)


# ---------------------------------------------------------------- optimizers


def weight_decay(config: ConfigDict) -> optax.GradientTransformation:
    """Adds weight_decay x parameter to what reaches it, config.optim.decay giving each parameter's factor."""
    o = config.optim
    factors = sorted({factor for _, factor in o.decay if factor})
    if not factors:
        return optax.identity()
    decays = []
    for factor in factors:
        mask = functools.partial(has_decay, factor, config)
        decays.append(optax.add_decayed_weights(o.weight_decay * factor, mask))
    return optax.chain(*decays)


def has_decay(factor: float, config: ConfigDict, params):
    """Tree of bools: whether config.optim.decay gives a parameter this factor."""
    decay = config.optim.decay
    return tree_map_with_path(lambda path, _: first_match(decay, path) == factor, params)


def descent(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_learning_rate(learning_rate(config))


def sgd(config: ConfigDict) -> optax.GradientTransformation:
    """Momentum as a plain sum, m = momentum * m + g (as torch's); with optim.nesterov, Sutskever et al. 2013."""
    o = config.optim
    momentum = optax.identity()
    if o.momentum:
        momentum = optax.trace(o.momentum, o.nesterov)
    return optax.chain(weight_decay(config), momentum, descent(config))


def adam(config: ConfigDict) -> optax.GradientTransformation:
    """Kingma & Ba 2015."""
    return optax.chain(weight_decay(config), scale_by_adam(config), descent(config))


def adamw(config: ConfigDict) -> optax.GradientTransformation:
    """Loshchilov & Hutter 2019."""
    return optax.chain(scale_by_adam(config), weight_decay(config), descent(config))


def scale_by_adam(config: ConfigDict) -> optax.GradientTransformation:
    o = config.optim
    return optax.scale_by_adam(o.b1, o.b2, o.eps)


def lion(config: ConfigDict) -> optax.GradientTransformation:
    """Chen et al. 2023: steps of the sign of a momentum. A third of AdamW's learning rate or less, as they advise."""
    o = config.optim
    return optax.chain(
        optax.scale_by_lion(o.b1, o.b2),
        weight_decay(config),
        descent(config),
    )


# ---------------------------------------------------------------- Adafactor


def adafactor(config: ConfigDict) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, algorithm 4: of a matrix's second moments only the means of rows and columns are kept.

    Without momentum. An update's root mean square is at most 1, and the learning rate is relative to the parameter's
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

    Its state is a dict: {"0": of the parameters of no stack, "24": of those of stacks of 24 layers, ...}.
    """

    def init(params):
        states = {}
        for depth, part in by_depth(params, config).items():
            states[depth] = for_each_layer(tx.init, depth)(part)
        return states

    def update(updates, state, params):
        params = by_depth(params, config)
        parts = []
        states = {}
        for depth, part in by_depth(updates, config).items():
            layerwise = for_each_layer(tx.update, depth)
            part, states[depth] = layerwise(part, state[depth], params[depth])
            parts.append(part)
        return functools.reduce(combine, parts), states

    return optax.GradientTransformation(init, update)


def by_depth(tree, config: ConfigDict) -> dict:
    """{"0": parameters of no stack, "24": those of stacks of 24 layers}: trees with None for the others."""

    def depth(path, leaf):
        if config.model.scan and STACK.match(name_of(path)):
            return leaf.shape[0]
        return 0

    depths = tree_map_with_path(depth, tree)
    parts = {}
    for wanted in sorted(set(jax.tree.leaves(depths))):
        select = functools.partial(where_equal, wanted)
        parts[str(wanted)] = jax.tree.map(select, tree, depths)
    return parts


def where_equal(wanted: int, leaf, number: int):
    if number == wanted:
        return leaf
    return None


def for_each_layer(function: Callable, depth: str) -> Callable:
    """The function over the leading dimension of stacked layers; as it is for parameters of no stack."""
    if depth == "0":
        return function
    return jax.vmap(function)


def moment_axes(path, leaf_shape: tuple, shape: tuple, axes: PartitionSpec) -> PartitionSpec:
    """Logical axes of the leaf at `path` of an optimizer's state. shape, axes: of the parameter it belongs to.

    The parameter's own where the shapes are equal. Adafactor's means over a dimension keep the axes of the others.
    Else no names.
    """
    if leaf_shape == shape:
        return axes
    first = int(axes[:1] == ("layers",))  # by_layer maps over this dimension
    # As in optax, means of rows are over the largest dimension, of columns over the next.
    by_size = first + np.argsort(shape[first:])
    for field, dim in zip(("v_row", "v_col"), by_size[::-1]):
        rest = (*shape[:dim], *shape[dim + 1 :])
        if jax.tree_util.GetAttrKey(field) in path and leaf_shape == rest:
            return PartitionSpec(*axes[:dim], *axes[dim + 1 :])
    return PartitionSpec()


# ---------------------------------------------------------------- Muon


def muon(config: ConfigDict) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    o = config.optim
    matrix = optax.chain(orthogonal(o.momentum), optax.stateless(scale_by_shape))
    rates = {
        "matrix": optax.scale_by_learning_rate(schedule(config, o.learning_rate)),
        "rest": optax.scale_by_learning_rate(schedule(config, o.adam_learning_rate)),
    }
    return optax.chain(
        optax.partition({"matrix": matrix, "rest": scale_by_adam(config)}, muon_labels),
        weight_decay(config),
        optax.partition(rates, muon_labels),
    )


def muon_labels(tree):
    """The tree with "matrix" for what Muon updates and "rest" for what Adam does."""

    def label(path, _):
        if first_match(MATRICES, path) is None:
            return "rest"
        return "matrix"

    return tree_map_with_path(label, tree)


def muon_dimensions(tree):
    """The tree of MuonDimensionNumbers, None for what is no matrix."""
    return tree_map_with_path(lambda path, _: first_match(MATRICES, path), tree)


def fans(path, x) -> tuple[int, int]:
    """(inputs, outputs) of a parameter that Muon takes for a matrix."""
    dims = first_match(MATRICES, path)
    shape = np.array(x.shape)
    inputs = int(np.prod(shape[np.atleast_1d(dims.reduction_axis)]))
    outputs = int(np.prod(shape[np.atleast_1d(dims.output_axis)]))
    return inputs, outputs


def scale_by_shape(updates, _):
    """Scales orthogonal updates by sqrt(max(1, outputs / inputs)), so that one learning rate fits every shape."""

    def scale(path, update):
        inputs, outputs = fans(path, update)
        return update * math.sqrt(max(1.0, outputs / inputs))

    return tree_map_with_path(scale, updates)


def orthogonal(beta: float) -> optax.GradientTransformation:
    """optax's Muon. On one device matrices of one shape go through it as one stack, whose state is the same.

    Their small products are then a few batched ones: 19 ms instead of 32 for shakespeare_char.py:cpu on 2 cores.
    """
    each = scale_by_muon(beta=beta, weight_dimension_numbers=muon_dimensions)

    def update(updates, state, params=None):
        if current_mesh() is not None:
            return each.update(updates, state, params)
        structure = jax.tree.structure(updates)
        groups = alike_matrices(updates)
        members = list(groups.values())
        dimensions = [dims for dims, _ in groups]
        stacked = scale_by_muon(beta=beta, weight_dimension_numbers=dimensions)
        stacked_state = state._replace(mu=stack(state.mu, members))
        stacks, new_state = stacked.update(stack(updates, members), stacked_state)
        momentum = unstack(new_state.mu, members, structure)
        return unstack(stacks, members, structure), new_state._replace(mu=momentum)

    return optax.GradientTransformation(each.init, update)


def alike_matrices(tree) -> dict[tuple, list[int]]:
    """{(MuonDimensionNumbers, shape): which of the tree's leaves have them}."""
    groups = {}
    for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        kind = (first_match(MATRICES, path), leaf.shape)
        groups.setdefault(kind, []).append(i)
    return groups


def stack(tree, members: list[list[int]]) -> list[jax.Array]:
    """One array [members, ...] for each group of leaves."""
    leaves = jax.tree.leaves(tree)
    stacks = []
    for indices in members:
        stacks.append(jnp.stack([leaves[i] for i in indices]))
    return stacks


def unstack(
    stacks: list[jax.Array],
    members: list[list[int]],
    structure,
):
    """The tree of this structure whose leaves `stack` put together."""
    leaves = {}
    for indices, whole in zip(members, stacks):
        leaves.update(zip(indices, whole))
    return structure.unflatten(leaves[i] for i in sorted(leaves))


# ---------------------------------------------------------------- what the train step calls

OPTIMIZERS = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """What config.optim says, for the trained parameters of a whole tree. Updates and state have None for the frozen.

    Clipping is the train step's, which reports the norm.
    """
    o = config.optim
    tx = OPTIMIZERS[o.name](config)

    def add_l1(path, gradient, parameter):
        if o.l1 and first_match(o.decay, path):
            return gradient + o.l1 * jnp.sign(parameter)
        return gradient

    def init(params):
        trained, _ = partition(params, config)
        return tx.init(trained)

    def update(grads, state, params):
        trained, _ = partition(params, config)
        grads, _ = partition(grads, config)
        factors, _ = partition(rate_factors(params, config), config)
        grads = tree_map_with_path(add_l1, grads, trained)
        updates, state = tx.update(grads, state, trained)
        return jax.tree.map(scale_by_factor, updates, factors), state

    return optax.GradientTransformation(init, update)


def scale_by_factor(update, factor):
    if np.all(factor == 1):
        return update
    return update * jnp.asarray(factor, update.dtype)


def clip(grads, norm: jax.Array, limit: float):
    """The gradients, of this norm, scaled to a norm of at most `limit`; 0: as they are."""
    if not limit:
        return grads
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return optax.tree.scale(factor, grads)


def optimizer_step(grads, params, opt_state, config: ConfigDict) -> tuple:
    """(parameters, optimizer state) after an update of the trained parameters."""
    updates, opt_state = optimizer(config).update(grads, opt_state, params)
    trained, frozen = partition(params, config)
    return combine(optax.apply_updates(trained, updates), frozen), opt_state


def average(
    ema: dict | None,
    params: dict,
    step: jax.Array,
    config: ConfigDict,
) -> dict | None:
    """The moving average of parameters one step on, in the dtypes of `ema`; None where none is kept.

    Its decay is train.ema, but rises to it from 0.1, so that the first parameters are soon forgotten.
    """
    if ema is None:
        return None
    decay = jnp.minimum(config.train.ema, (1 + step) / (10 + step))

    def mix(old, new):
        return decay * old + (1 - decay) * new

    mean = jax.tree.map(mix, ema, params)
    mean = restore_frozen(mean, params, config)
    return optax.tree.cast_like(mean, ema)
