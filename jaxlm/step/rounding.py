"""Rounding of a step's results to bfloat16: to the nearest value or stochastically, and what is lost by it.

bfloat16 has 8 significant bits. Rounded to the nearest, a value plus an update that is smaller than about 2^-9 of it is
the value again. Stochastic rounding goes up or down with chances that make the mean exact (Gupta et al. 2015), so that
many small updates add up.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxlm.step.optim import MATRICES, fans, first_match, rate_factors, schedule, split

NARROW = jnp.bfloat16
LOST_BELOW = 2.0**-9  # of a value: a smaller update is lost whatever the value's bits are
NO_DECAY = 2.0**-8  # a mean that forgets less than this part of itself in a step may never fall
STREAM = (
    2**31 - 1
)  # folded into a step's key: other random numbers than dropout's and the microbatches'
TOLD_FROM = (
    0.1  # share of the parameters whose updates are lost, from which on it is worth a warning
)
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


def widened(tree, config: ConfigDict):
    """The tree in float32, where its results are to be rounded stochastically; else as it is."""
    if config.optim.rounding == "nearest":
        return tree
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_narrow(x) else x, tree)


def rounded(new, old, step: jax.Array, config: ConfigDict):
    """`new` in the dtypes of `old`, as config.optim.rounding says.

    The random numbers follow from the seed, the step and the place in the tree alone: they are the same on any mesh,
    and after a restart.
    """
    if config.optim.rounding == "nearest":
        return jax.tree.map(lambda x, was: x.astype(was.dtype), new, old)
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    key = jax.random.fold_in(key, STREAM)
    leaves, tree = jax.tree.flatten(new)
    results = []
    for number, (x, was) in enumerate(zip(leaves, jax.tree.leaves(old), strict=True)):
        if is_narrow(was):
            x = stochastic_round(x.astype(jnp.float32), jax.random.fold_in(key, number))
        results.append(x.astype(was.dtype))
    return tree.unflatten(results)


def moved_share(new: dict, old: dict, config: ConfigDict) -> dict[str, jax.Array]:
    """{"moved_share": part of the trained bfloat16 parameters that a step has changed}; {} where there are none."""
    pairs = zip(
        jax.tree.leaves(split(new, config)[0]), jax.tree.leaves(split(old, config)[0]), strict=True
    )
    narrow = [(x, was) for x, was in pairs if is_narrow(was)]
    if not narrow:
        return {}
    total = sum(x.size for x, _ in narrow)
    share = jnp.zeros(())
    for x, was in narrow:
        # Bits, not values: XLA may compare what x was before it was rounded.
        changed = bits_of(x) != bits_of(was)
        share += jnp.mean(changed, dtype=jnp.float32) * (x.size / total)
    return {"moved_share": share}


def bits_of(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


# ---------------------------------------------------------------- before the first step


def warnings(params: dict, start: int, config: ConfigDict, mesh) -> list[str]:
    """A line for each thing that bfloat16 would lose in the steps from `start` on.

    params: the values they begin with, on the mesh. To be called on every process.
    """
    trained = split(params, config)[0]
    narrow = any(map(is_narrow, jax.tree.leaves(trained)))
    if not narrow or config.optim.rounding == "stochastic":
        return []
    return lost_updates(params, start, config, mesh) + lost_decays(config)


def lost_updates(params: dict, start: int, config: ConfigDict, mesh) -> list[str]:
    """The warning that many updates would be rounded away, judged by the optimizer's usual ones."""
    assumption = assumed(config)
    if assumption is None:
        return []
    rate = largest_rate(config, start)
    share = lost_share(params, rate, config, mesh)
    if share < TOLD_FROM:
        return []
    return [
        f"warning: model.param_dtype=bfloat16 will round away the updates of about {share:.0%} of the parameters at a "
        f"learning rate of {rate:.1e} (8 significant bits: an update below 2^-9 of the value is lost; assumed: "
        f"{assumption}); set optim.rounding=stochastic, model.param_dtype=float32 or a larger optim.learning_rate. "
        "moved_share in metrics.jsonl is the share that a step has changed"
    ]


def assumed(config: ConfigDict) -> str | None:
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
    steps = np.linspace(start, last, 200).astype(np.int32)
    rate = schedule(config, config.optim.learning_rate)
    return float(jnp.max(jax.vmap(rate)(steps)))


def lost_share(params: dict, rate: float, config: ConfigDict, mesh) -> float:
    """Part of the trained bfloat16 parameters whose usual updates are below 2^-9 of their values."""
    trained = split(params, config)[0]
    factors = split(rate_factors(params, config), config)[0]
    count = sum(x.size for x in jax.tree.leaves(trained))
    sizes = jax.tree_util.tree_map_with_path(
        lambda path, x, factor: usual_size(path, x, rate, count, config) * factor, trained, factors
    )
    values = jax.tree.leaves(trained)
    narrow = [
        (x, size) for x, size in zip(values, jax.tree.leaves(sizes), strict=True) if is_narrow(x)
    ]
    total = sum(x.size for x, _ in narrow)

    def share(values):
        lost = 0.0
        for x, (_, size) in zip(values, narrow):
            x = jnp.abs(x.astype(jnp.float32))
            if config.optim.name == "adafactor":  # of at least 1e-3
                size = size * jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(x))), 1e-3)
            lost += jnp.mean(x * LOST_BELOW > size, dtype=jnp.float32) * (x.size / total)
        return lost

    whole = NamedSharding(mesh, PartitionSpec())
    return float(jax.jit(share, out_shardings=whole)([x for x, _ in narrow]))


def usual_size(path, x: jax.Array, rate: float, count: int, config: ConfigDict) -> float:
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
    slow = [f"optim.{key}={o[key]:g}" for key in DECAYS[o.name] if 1 - o[key] < NO_DECAY]
    if o.name == "adafactor" and config.train.stop_at > 1024:  # 1024^-0.8 = 2^-8
        slow = ["adafactor's decay, 1 - step^-0.8, from step 1024 on"]
    if not slow:
        return []
    return [
        "warning: the optimizer's state is in bfloat16, as the parameters are (model.param_dtype), which is too coarse "
        f"for {' and '.join(slow)}: a mean that forgets less than 2^-8 of itself in a step hardly falls any more; set "
        "optim.rounding=stochastic, model.param_dtype=float32 or a faster decay, such as 0.99"
    ]
