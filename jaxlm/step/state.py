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
from jaxlm.models import build
from jaxlm.models.moe import balance
from jaxlm.parallel.chips import COMPILER_OPTIONS
from jaxlm.parallel.mesh import (
    OPTIMIZER_RULES,
    batch_sharding,
    platform,
    require_sharded,
    shardings,
)
from jaxlm.step.accumulate import accumulate
from jaxlm.step.forward import teacher_model
from jaxlm.step.losses import loss_of, means_of, total_weight, without
from jaxlm.step.optim import average, clip, learning_rate, moment_axes, optimizer, optimizer_step
from jaxlm.step.patterns import combine, partition, require_trained, restore_frozen
from jaxlm.step.rounding import moved_share, round_like, widen


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


# ---------------------------------------------------------------- before it exists


def create_state(config: ConfigDict) -> State:
    """The state at step 0. Call it through `init_state`, or under jax.eval_shape.

    Raises ConfigError where config.optim.rates or decay miss a parameter, or nothing is left to train.
    """
    params = nn.unbox(initial_parameters(build(config), config.seed))
    require_trained(params, config)
    zero = jnp.zeros((), jnp.int32)
    ema = None
    teacher = None
    if config.train.ema:
        # float32 whatever the parameters are in: bfloat16 could not hold a decay of 0.9999.
        ema = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    if config.task.teacher_model:
        teacher = nn.unbox(initial_teacher(config))
    return State(
        step=zero,
        params=params,
        opt_state=optimizer(config).init(params),
        ema=ema,
        skipped=zero,
        teacher=teacher,
    )


def initial_parameters(model: nn.Module, seed: int) -> dict:
    """A model's parameters, each in a box with its logical axes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(jax.random.key(seed), tokens)["params"]


def initial_teacher(config: ConfigDict) -> dict:
    """As initial_parameters, of config.task.teacher_model. A run replaces their values by those of a checkpoint."""
    return initial_parameters(teacher_model(config), 0)


def abstract_state(config: ConfigDict) -> tuple[State, State]:
    """(shapes and dtypes, PartitionSpecs of logical axis names) of the state, without making an array."""
    return trace_state(FrozenConfigDict(config))


@cache  # tracing takes half a second, and many callers ask
def trace_state(config: FrozenConfigDict) -> tuple[State, State]:
    """`abstract_state` of a config that can be hashed."""
    shapes = jax.eval_shape(partial(create_state, config))
    boxed = jax.eval_shape(partial(initial_parameters, build(config), 0))
    names = jax.tree.leaves(nn.get_partition_spec(boxed))
    parameters = {}
    leaves = jax.tree.leaves_with_path(shapes.params)
    for (path, leaf), axes in zip(leaves, names, strict=True):
        parameters[tuple(path)] = (leaf.shape, axes)
    axes = jax.tree_util.tree_map_with_path(partial(leaf_axes, parameters), shapes)
    if config.task.teacher_model:
        teacher = jax.eval_shape(partial(initial_teacher, config))
        axes = axes.replace(teacher=nn.get_partition_spec(teacher))
    return shapes, axes


def leaf_axes(parameters: dict, path, leaf) -> PartitionSpec:
    """Logical axes of a leaf of the state. parameters: {path: (shape, logical axes)}.

    Moments and averages repeat the tree of parameters somewhere below themselves, so the end of a leaf's path is the
    path of its parameter. Leaves without one, such as counters, have no axes.
    """
    for start in range(len(path)):
        parameter = parameters.get(tuple(path[start:]))
        if parameter is not None:
            return moment_axes(path, leaf.shape, *parameter)
    return PartitionSpec()


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
    """The state at step 0, made sharded on the mesh; the same values on every mesh. Raises as `create_state`."""
    options = {}
    with jax.set_mesh(mesh):
        if platform() == "cpu":  # where compiling takes longer than running
            options["xla_backend_optimization_level"] = 1
    places = state_shardings(config, mesh)
    create = partial(create_state, config)
    return jax.jit(create, out_shardings=places, compiler_options=options)()


# ---------------------------------------------------------------- the train step


def train_step(state: State, batch: dict, *, config: ConfigDict) -> tuple[State, dict]:
    """One optimizer step on a global batch: (new state, metrics as float32 scalars)."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    grads, means = gradients(state.params, batch, key, config, state.teacher)
    return apply_gradients(state, grads, means, config=config)


def gradients(
    params: dict,
    batch: dict,
    key: jax.Array,
    config: ConfigDict,
    teacher=None,
) -> tuple[dict, dict]:
    """(gradients, means) of the loss over a global batch, in train.grad_accumulation microbatches.

    The loss is the sum of weighted losses over the sum of weights of the whole batch, in however many microbatches.
    gradients: None for frozen parameters (config.optim.rates), of which none is computed. means: of `loss` and of
    what else the task's loss reports, over that batch; and `routing`, in sums.
    """
    loss = loss_of(config)
    weight = total_weight(batch, config)
    trained, frozen = partition(params, config)

    def objective(trained, rows, key):
        params = combine(trained, frozen)
        sums = loss(build(config), params, rows, config, key, teacher)
        return sums["objective"] / weight, without(sums, "objective", "scores")

    grads, sums = accumulate(objective, trained, batch, key, config)
    return grads, means_of(sums, weight)


def apply_gradients(
    state: State,
    grads: dict,
    means: dict,
    *,
    config: ConfigDict,
) -> tuple[State, dict]:
    """(new state, metrics) from what `gradients` returned. Where it is not finite nothing changes but `skipped`.

    The new state has the dtypes of the old one, whatever the arithmetic between them was done in. Of bfloat16
    parameters the metrics have `moved_share`.
    """
    norm = optax.tree.norm(grads)
    grads = clip(grads, norm, config.optim.clip)
    old = state.params, state.opt_state
    wide = widen((grads, *old), config)
    params, opt_state = optimizer_step(*wide, config)
    params, routing = balance(params, means["routing"], config)
    # Frozen parameters stay bit-identical; balance() would otherwise move router biases.
    params = restore_frozen(params, state.params, config)
    params, opt_state = round_like((params, opt_state), old, state.step, config)
    ema = average(state.ema, params, state.step, config)
    finite = jnp.isfinite(means["loss"]) & jnp.isfinite(norm)
    new = state.replace(params=params, opt_state=opt_state, ema=ema)
    new = optax.tree.where(finite, new, state)
    new = new.replace(step=state.step + 1, skipped=state.skipped + ~finite)
    rate = learning_rate(config)(state.step - state.skipped)
    metrics = without(means, "routing") | routing | moved_share(new.params, state.params, config)
    metrics |= {"grad_norm": norm, "learning_rate": rate, "skipped": new.skipped}
    return new, metrics


def jit_train_step(config: ConfigDict, mesh):
    """The compiled form of `train_step`: (state, batch) -> (state, metrics). The given state's memory is reused."""
    with jax.set_mesh(mesh):
        table = COMPILER_OPTIONS[platform()]
    return jax.jit(
        partial(train_step, config=config),
        donate_argnums=0,
        out_shardings=(state_shardings(config, mesh), NamedSharding(mesh, PartitionSpec())),
        compiler_options={option: value for option, (value, _) in table.items()},
    )


def abstract_inputs(config: ConfigDict, mesh) -> tuple[State, dict]:
    """(state, batch) of the train step: shapes, dtypes and shardings, without a number."""

    def abstract(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    shapes, _ = abstract_state(config)
    state = jax.tree.map(abstract, shapes, state_shardings(config, mesh))
    batch = {}
    for name, (shape, dtype) in batch_shapes(config).items():
        batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(shape, mesh))
    return state, batch


# ---------------------------------------------------------------- the eval step


def eval_step(
    params: dict,
    batch: dict,
    teacher=None,
    *,
    config: ConfigDict,
) -> tuple[dict, jax.Array | None]:
    """(sums over the batch, float32: `loss` in nats, `weight` and others of the task; scores of its examples)."""
    loss = loss_of(config)
    sums = loss(build(config), params, batch, config, teacher=teacher)
    return without(sums, "objective", "routing", "scores"), sums.get("scores")
