"""The heart: training state, described before it exists, and the pure train and eval steps."""

from functools import cache, partial

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm.data.batches import batch_shapes
from jaxlm.models import build, build_section
from jaxlm.models.moe import balance
from jaxlm.parallel.chips import COMPILER_OPTIONS
from jaxlm.parallel.mesh import (
    OPTIMIZER_RULES,
    partition_spec,
    platform,
    require_sharded,
    shardings,
)
from jaxlm.step.losses import loss_of, teacher_section, total_weight
from jaxlm.step.optim import merge, moment_axes, optimizer, require_trained, schedule, split
from jaxlm.step.rounding import moved_share, rounded, widened


@flax.struct.dataclass
class State:
    """step: int32, steps done. ema: float32 average of params, or None. skipped: int32, steps dropped as not finite.

    teacher: parameters that the loss compares with and nothing changes, or None; not saved in checkpoints.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict | None
    skipped: jax.Array
    teacher: dict | None = None


def create_state(config: ConfigDict) -> State:
    """The state at step 0. Call it through `init_state`, or under jax.eval_shape."""
    params = nn.unbox(initial(build(config), config.seed))
    require_trained(params, config)
    zero = jnp.zeros((), jnp.int32)
    # An average needs float32 whatever the parameters are in: bfloat16 could not hold a decay of 0.9999.
    if config.train.ema:
        ema = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    else:
        ema = None
    if config.task.teacher_model:
        teacher = nn.unbox(initial(build_section(teacher_section(config)), 0))
    else:
        teacher = None
    return State(zero, params, optimizer(config).init(params), ema, zero, teacher)


def initial(model: nn.Module, seed: int) -> dict:
    """A model's parameters, each in a box with its logical axes."""
    return model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def abstract_state(config: ConfigDict) -> tuple[State, State]:
    """(shapes and dtypes, PartitionSpecs of logical axis names) of the state, without making an array."""
    return trace_state(FrozenConfigDict(config))


@cache  # half a second, and asked for at every turn
def trace_state(config: FrozenConfigDict) -> tuple[State, State]:
    shapes = jax.eval_shape(partial(create_state, config))
    axes = nn.get_partition_spec(jax.eval_shape(partial(initial, build(config), 0)))
    parameters = zip(jax.tree.leaves_with_path(shapes.params), jax.tree.leaves(axes), strict=True)
    by_path = {tuple(path): (leaf.shape, names) for (path, leaf), names in parameters}

    def like_its_parameter(path, leaf):
        # Moments and averages repeat the tree of parameters somewhere below: the end of the path says which one.
        tails = (by_path.get(tuple(path[i:])) for i in range(len(path)))
        found = next((found for found in tails if found is not None), None)
        if found is None:
            return PartitionSpec()
        return moment_axes(path, leaf.shape, *found)

    places = jax.tree_util.tree_map_with_path(like_its_parameter, shapes)
    if config.task.teacher_model:
        teacher = jax.eval_shape(partial(initial, build_section(teacher_section(config)), 0))
        places = places.replace(teacher=nn.get_partition_spec(teacher))
    return shapes, places


def state_shardings(config: ConfigDict, mesh) -> State:
    """NamedSharding of every leaf."""
    shapes, axes = abstract_state(config)
    places = shardings(shapes, axes, mesh)
    rules = OPTIMIZER_RULES[config.mesh.strategy]
    return places.replace(opt_state=shardings(shapes.opt_state, axes.opt_state, mesh, rules))


def check_sharding(config: ConfigDict, mesh) -> None:
    """Raises ConfigError where the mesh leaves too many parameters whole. An abstract mesh will do."""
    shapes, axes = abstract_state(config)
    require_sharded(shapes.params, shardings(shapes.params, axes.params, mesh), mesh)


def init_state(config: ConfigDict, mesh) -> State:
    """The state at step 0, born sharded; the same values on every mesh."""
    with jax.set_mesh(mesh):  # on a CPU its compilation, not its run, takes the time
        if platform() == "cpu":
            options = {"xla_backend_optimization_level": 1}
        else:
            options = {}
    places = state_shardings(config, mesh)
    return jax.jit(partial(create_state, config), out_shardings=places, compiler_options=options)()


def gradients(
    params: dict, batch: dict, key: jax.Array, config: ConfigDict, teacher=None
) -> tuple[dict, dict]:
    """(gradients, sums): of the loss over a global batch, in train.grad_accumulation microbatches.

    The loss is the sum of weighted losses over the sum of weights of the whole batch, in however many microbatches.
    gradients: None for what config.optim.rates freezes, of which none is computed. sums: the means of `loss` and of
    what else the task's loss reports over that batch, and `routing`.
    """
    model = build(config)
    parts = config.train.grad_accumulation
    loss = loss_of(config)
    weight = total_weight(batch, config)
    trained, frozen = split(params, config)

    def objective(trained, rows, key):
        sums = loss(model, merge(trained, frozen), rows, config, key, teacher)
        return sums["objective"] / weight, {
            name: sums[name] for name in sums if name not in ("objective", "scores")
        }

    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        grads, sums = gradient(trained, batch, key)
    else:  # row i goes to microbatch i % parts: every device keeps its own rows
        micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        shapes, sums = jax.eval_shape(gradient, trained, batch, key)

        def zeros(tree, dtype):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), tree)

        start = zeros(shapes, config.train.accumulation_dtype), zeros(sums, jnp.float32)

        def plus(total, x):
            return (total.astype(jnp.float32) + x).astype(total.dtype)

        def add(sums, part):
            return (jax.tree.map(plus, sums, gradient(trained, *part)), None)

        (grads, sums), _ = jax.lax.scan(add, start, (micro, jax.random.split(key, parts)))
        grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    routing = sums.pop("routing")
    sums.pop("weight")
    return grads, {name: value / weight for name, value in sums.items()} | {"routing": routing}


def train_step(state: State, batch: dict, *, config: ConfigDict) -> tuple[State, dict]:
    """One optimizer step on a global batch: (new state, metrics as float32 scalars)."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    return apply_gradients(
        state, *gradients(state.params, batch, key, config, state.teacher), config=config
    )


def apply_gradients(
    state: State, grads: dict, sums: dict, *, config: ConfigDict
) -> tuple[State, dict]:
    """As train_step, of what `gradients` returned. Where it is not finite nothing changes but `skipped`.

    The new state has the dtypes of the old one, in whatever dtype the arithmetic between them was done; of bfloat16
    parameters the metrics have `moved_share`.
    """
    norm = optax.tree.norm(grads)
    if config.optim.clip:
        grads = jax.tree.map(
            lambda g: g * jnp.minimum(1.0, config.optim.clip / (norm + 1e-6)), grads
        )
    grads, old_opt_state, old_params = widened((grads, state.opt_state, state.params), config)
    updates, opt_state = optimizer(config).update(grads, old_opt_state, old_params)
    trained, frozen = split(old_params, config)

    # to the bit; routers' biases move by no gradient
    def still(tree):
        return merge(split(tree, config)[0], frozen)

    params, routing = balance(
        merge(optax.apply_updates(trained, updates), frozen), sums["routing"], config
    )
    old = state.params, state.opt_state
    params, opt_state = rounded((still(params), opt_state), old, state.step, config)
    if (
        ema := state.ema
    ) is not None:  # the decay rises from 0.1: the first parameters are soon forgotten
        decay = jnp.minimum(config.train.ema, (1 + state.step) / (10 + state.step))
        ema = still(jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params))
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)

    def keep(new, old):
        return jax.tree.map(lambda x, was: jnp.where(finite, x.astype(was.dtype), was), new, old)

    params, opt_state, ema = keep(
        (params, opt_state, ema), (state.params, state.opt_state, state.ema)
    )
    new = State(state.step + 1, params, opt_state, ema, state.skipped + ~finite, state.teacher)
    rate = schedule(config, config.optim.learning_rate)(
        state.step - state.skipped
    )  # dropped steps do not count
    metrics = {name: value for name, value in sums.items() if name != "routing"}
    metrics |= {"grad_norm": norm, "learning_rate": rate, "skipped": new.skipped}
    return new, metrics | routing | moved_share(params, state.params, config)


def jit_train_step(config: ConfigDict, mesh):
    """The compiled form of `train_step`: (state, batch) -> (state, metrics), the given state's memory being reused."""
    out = state_shardings(config, mesh), NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        options = {option: value for option, (value, _) in COMPILER_OPTIONS[platform()].items()}
    return jax.jit(
        partial(train_step, config=config),
        donate_argnums=0,
        out_shardings=out,
        compiler_options=options,
    )


def abstract_inputs(config: ConfigDict, mesh) -> tuple[State, dict]:
    """(state, batch) of the train step: shapes, dtypes and shardings, without a number."""

    def like(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    batch = {}
    for name, (shape, dtype) in batch_shapes(config).items():
        place = NamedSharding(
            mesh, partition_spec(("batch",) + (None,) * (len(shape) - 1), shape, mesh)
        )
        batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    return jax.tree.map(like, abstract_state(config)[0], state_shardings(config, mesh)), batch


def eval_step(
    params: dict, batch: dict, teacher=None, *, config: ConfigDict
) -> tuple[dict, jax.Array | None]:
    """(sums over the batch, float32: `loss` in nats, `weight` and others of the task; scores of its examples)."""
    sums = loss_of(config)(build(config), params, batch, config, teacher=teacher)
    kept = {}
    for name, value in sums.items():
        if name not in ("objective", "routing", "scores"):
            kept[name] = value
    return kept, sums.get("scores")
