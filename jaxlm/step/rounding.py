"""Rounding of a step's results to bfloat16: to the nearest value or stochastically, and what is lost by it.

bfloat16 has 8 significant bits. Rounded to the nearest, a value plus an update that is smaller than about 2^-9 of it is
the value again. Stochastic rounding goes up or down with chances that make the mean exact (Gupta et al. 2015), so that
many small updates add up.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import tree_map_with_path
from ml_collections import ConfigDict

from jaxlm.step.optim import MATRICES, fans, learning_rate
from jaxlm.step.patterns import first_match, partition, rate_factors

NARROW = jnp.bfloat16
# Of a value: a smaller update is lost whatever the value's bits are.
LOST_BELOW = 2.0**-9
# A mean that forgets less than this part of itself in a step may never fall.
NO_DECAY = 2.0**-8
# Folded into a step's key: other random numbers than those of dropout and of microbatches.
STREAM = 2**31 - 1
# Share of the parameters whose updates are lost, from which on there is a warning.
WARN_FROM = 0.1
# Root mean square of an update over the learning rate. Adam's is 0.2 to 0.4 in practice (Liu et al. 2025, Moonlight).
USUAL = {"adam": 0.3, "adamw": 0.3, "lion": 1.0}
# The keys that say how slowly what an optimizer keeps in a parameter's dtype forgets.
DECAYS = {
    "adam": ("b1", "b2"),
    "adamw": ("b1", "b2"),
    "lion": ("b2",),
    "muon": ("momentum", "b1", "b2"),
    "sgd": ("momentum",),
    "adafactor": (),
}


# ---------------------------------------------------------------- in the step


def is_narrow(x) -> bool:
    return x.dtype == NARROW


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16: one of the two neighbours, the nearer one more often, so that the mean is x.

    What bfloat16 can hold, infinities and NaN among it, stays as it is.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A bfloat16 is the upper half of a float32: random numbers of 16 bits carry into it as often as they should.
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16)
    upper = (carried >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, NARROW)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(NARROW))


def widen(tree, config: ConfigDict):
    """The tree with its bfloat16 leaves in float32 where optim.rounding is stochastic; else the tree unchanged."""

    def to_float32(x):
        if is_narrow(x):
            return x.astype(jnp.float32)
        return x

    if config.optim.rounding == "nearest":
        return tree
    return jax.tree.map(to_float32, tree)


def round_like(
    new: tuple,
    old: tuple,
    step: jax.Array,
    config: ConfigDict,
) -> tuple:
    """`new` in the dtypes of `old`, as config.optim.rounding says. Both: (parameters, optimizer state).

    The random numbers follow from the seed, the step and the place in the tree alone: they are the same on any mesh,
    and after a restart.
    """
    if config.optim.rounding == "nearest":
        return optax.tree.cast_like(new, old)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    key = jax.random.fold_in(key, STREAM)
    leaves, structure = jax.tree.flatten(new)
    pairs = zip(leaves, jax.tree.leaves(old), strict=True)
    results = []
    for number, (x, before) in enumerate(pairs):
        if is_narrow(before):
            leaf_key = jax.random.fold_in(key, number)
            x = stochastic_round(x.astype(jnp.float32), leaf_key)
        results.append(x.astype(before.dtype))
    return structure.unflatten(results)


def moved_share(
    new: dict,
    old: dict,
    config: ConfigDict,
) -> dict[str, jax.Array]:
    """{"moved_share": part of the trained bfloat16 parameters that a step has changed}; {} where there are none."""
    new_leaves = narrow_leaves(new, config)
    old_leaves = narrow_leaves(old, config)
    if not old_leaves:
        return {}
    total = sum(x.size for x in old_leaves)
    share = jnp.zeros(())
    for x, before in zip(new_leaves, old_leaves, strict=True):
        # Bits, not values: XLA may compare what x was before it was rounded.
        changed = bits_of(x) != bits_of(before)
        share += jnp.mean(changed, dtype=jnp.float32) * (x.size / total)
    return {"moved_share": share}


def narrow_leaves(params: dict, config: ConfigDict) -> list:
    """The trained parameters in bfloat16."""
    trained, _ = partition(params, config)
    return [x for x in jax.tree.leaves(trained) if is_narrow(x)]


def bits_of(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


# ---------------------------------------------------------------- before the first step


def warnings(
    params: dict,
    start: int,
    config: ConfigDict,
    mesh,
) -> list[str]:
    """A line for each thing that bfloat16 would lose in the steps from `start` on.

    params: the values they begin with, on the mesh. To be called on every process.
    """
    if config.optim.rounding == "stochastic" or not narrow_leaves(params, config):
        return []
    return lost_updates(params, start, config, mesh) + lost_decays(config)


def lost_updates(
    params: dict,
    start: int,
    config: ConfigDict,
    mesh,
) -> list[str]:
    """The warning that many updates would be rounded away, judged by the optimizer's usual ones."""
    assumption = assumed_update(config)
    if assumption is None:
        return []
    rate = largest_rate(config, start)
    share = lost_share(params, rate, config, mesh)
    if share < WARN_FROM:
        return []
    return [
        f"warning: model.param_dtype=bfloat16 will round away the updates of about {share:.0%} of the parameters at a "
        f"learning rate of {rate:.1e} (8 significant bits: an update below 2^-9 of the value is lost; assumed: "
        f"{assumption}); set optim.rounding=stochastic, model.param_dtype=float32 or a larger optim.learning_rate. "
        "moved_share in metrics.jsonl is the share that a step has changed"
    ]


def assumed_update(config: ConfigDict) -> str | None:
    """In words, how large an update is taken to be; None where nothing is known of it."""
    o = config.optim
    if o.name == "sgd":
        if o.clip:
            return f"gradients of the norm optim.clip={o.clip:g}, spread evenly"
        return None
    if o.name == "adafactor":
        return "updates of the learning rate x the parameter's root mean square"
    if o.name == "muon":
        return "updates of the learning rate / sqrt(inputs) for matrices, 0.3 x the learning rate for others"
    return f"updates of {USUAL[o.name]:g} x the learning rate, as is usual for {o.name}"


def largest_rate(config: ConfigDict, start: int) -> float:
    """The largest learning rate of the steps from `start` on."""
    last = max(config.train.stop_at - 1, start)
    steps = np.linspace(start, last, 200)
    rate = jax.vmap(learning_rate(config))
    rates = rate(steps.astype(np.int32))
    return float(jnp.max(rates))


def lost_share(params: dict, rate: float, config: ConfigDict, mesh) -> float:
    """Part of the trained bfloat16 parameters whose usual updates are below 2^-9 of their values."""
    sizes = usual_sizes(params, rate, config)
    trained, _ = partition(params, config)
    values = jax.tree.leaves(trained)
    narrow = []
    narrow_sizes = []
    for x, size in zip(values, jax.tree.leaves(sizes), strict=True):
        if is_narrow(x):
            narrow.append(x)
            narrow_sizes.append(size)
    total = sum(x.size for x in narrow)

    def share(values):
        lost = 0.0
        for x, size in zip(values, narrow_sizes):
            x = jnp.abs(x.astype(jnp.float32))
            if config.optim.name == "adafactor":
                root_mean_square = jnp.sqrt(jnp.mean(jnp.square(x)))
                size = size * jnp.maximum(root_mean_square, 1e-3)
            lost_here = jnp.mean(x * LOST_BELOW > size, dtype=jnp.float32)
            lost += lost_here * (x.size / total)
        return lost

    whole = NamedSharding(mesh, PartitionSpec())
    return float(jax.jit(share, out_shardings=whole)(narrow))


def usual_sizes(params: dict, rate: float, config: ConfigDict):
    """Tree of the trained parameters: how large an update of each usually is, as `usual_size` has it."""
    trained, _ = partition(params, config)
    factors, _ = partition(rate_factors(params, config), config)
    count = sum(x.size for x in jax.tree.leaves(trained))

    def size(path, x, factor):
        return usual_size(path, x, rate, count, config) * factor

    return tree_map_with_path(size, trained, factors)


def usual_size(
    path,
    x: jax.Array,
    rate: float,
    count: int,
    config: ConfigDict,
) -> float:
    """How large an update of this parameter usually is; for Adafactor in units of its root mean square.

    count: of the trained parameters.
    """
    o = config.optim
    if o.name == "adafactor":
        return rate
    if o.name == "sgd":
        return rate * o.clip / (1 - o.momentum) / count**0.5
    if o.name != "muon":
        return rate * USUAL[o.name]
    if first_match(MATRICES, path) is None:
        return rate * USUAL["adamw"] * o.adam_learning_rate / o.learning_rate
    inputs, _ = fans(path, x)
    return rate / inputs**0.5


def lost_decays(config: ConfigDict) -> list[str]:
    """The warning that a mean of the optimizer's forgets too slowly for bfloat16, in which it is kept."""
    o = config.optim
    slow = []
    for key in DECAYS[o.name]:
        if 1 - o[key] < NO_DECAY:
            slow.append(f"optim.{key}={o[key]:g}")
    if o.name == "adafactor" and config.train.stop_at > 1024:  # 1024^-0.8 = 2^-8
        slow = ["adafactor's decay, 1 - step^-0.8, from step 1024 on"]
    if not slow:
        return []
    return [
        "warning: the optimizer's state is in bfloat16, as the parameters are (model.param_dtype), which is too coarse "
        f"for {' and '.join(slow)}: a mean that forgets less than 2^-8 of itself in a step hardly falls any more; set "
        "optim.rounding=stochastic, model.param_dtype=float32 or a faster decay, such as 0.99"
    ]
