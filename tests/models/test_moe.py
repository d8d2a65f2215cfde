"""Laws of mixture of experts: = every expert computed and weighed, on every mesh; what is dropped; an even load."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, small_config
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.kernels.grouped_matmul import GROUPED_MATMUL, grouped_matmul
from jaxlm.models.layers import ACTIVATIONS
from jaxlm.models.moe import SCORES, MoE, capacity, update_bias

B = 8
T = 16
D = 16
E = 8
VARIANTS = {
    "softmax": {"router": "softmax"},
    "sigmoid": {"router": "sigmoid", "experts_per_token": 3, "shared_experts": 2},
    "bias": {"router": "softmax", "balance_rate": 1e-3, "mlp": "relu2", "experts_per_token": 1},
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "expert": {"expert": 4, "data": 2},
    "all_three": {"expert": 2, "fsdp": 2, "tensor": 2},
    "positions": {"sequence": 4, "tensor": 2},
}


def model_config(**overrides):
    settings = {"embed_dim": D, "num_experts": E, "expert_dim": 12, "num_layers": 1} | overrides
    return FrozenConfigDict(
        small_config(**{f"model__{key}": value for key, value in settings.items()})
    ).model


def make(**overrides):
    """(config, model, params, x, segments): a router with preferences, rows that end in padding of various lengths."""
    c = model_config(**overrides)
    x_BTD = jax.random.normal(jax.random.key(0), (B, T, D))
    params = nn.unbox(jax.jit(MoE(c, True).init)(jax.random.key(1), x_BTD))["params"]
    if "bias" in params["router"]:
        params["router"]["bias"] = jnp.linspace(0.3, 0, E)
    segments_BT = (jnp.arange(T) < T - jnp.arange(B)[:, None]).astype(jnp.int32)
    return c, MoE(c, True), params, x_BTD, segments_BT


def chosen(c, params, x_BTD):
    """(scores, ids), float32 [B, T, E] and [B, T, X]."""
    scores_BTE = SCORES[c.router](x_BTD @ params["router"]["kernel"])
    _, ids_BTX = jax.lax.top_k(scores_BTE + params["router"].get("bias", 0), c.experts_per_token)
    return scores_BTE, ids_BTX


def dense(c, params, x_BTD, kept_BTE):
    """Every expert for every token."""
    scores_BTE, ids_BTX = chosen(c, params, x_BTD)
    mask_BTE = jax.nn.one_hot(ids_BTX, E).sum(2)
    weights_BTE = scores_BTE * mask_BTE
    if c.experts_per_token > 1:
        weights_BTE /= jnp.sum(weights_BTE, -1, keepdims=True)

    def mlp(up, down, gate=None):
        h = ACTIVATIONS[c.mlp](x_BTD @ (up if gate is None else gate))
        return (h if gate is None else h * (x_BTD @ up)) @ down

    y = jnp.einsum(
        "EBTD,BTE->BTD", jax.vmap(lambda k: mlp(**k))(params["experts"]), weights_BTE * kept_BTE
    )
    if c.shared_experts:
        y += mlp(**{name: leaf["kernel"] for name, leaf in params["shared"].items()})
    return y


def first_come(c, params, x_BTD, segments_BT):
    """bool [B, T, E]: the assignments that find room, counted one by one; and how many do not."""
    _, ids_BTX = chosen(c, params, x_BTD)
    kept = np.zeros((B, T, E), bool)
    dropped = 0
    room = capacity(c, T)
    for b in range(B):
        count = np.zeros(E, int)
        for t in range(T):
            for e in np.asarray(ids_BTX[b, t]) if segments_BT[b, t] else ():
                kept[b, t, e] = count[e] < room
                dropped += count[e] >= room
                count[e] += 1
    return kept, dropped


def close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), a, b
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_chosen_run_and_it_is_as_if_all_did(variant):
    c, model, params, x, segments = make(**VARIANTS[variant])
    kept = (segments != 0)[..., None]

    def f(run):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(run(p, x))), (0, 1)))(
            params, x
        )

    found = f(lambda p, x: model.apply({"params": p}, x, segments)[0])
    close(found, f(lambda p, x: dense(c, p, x, kept)))
    assert np.abs(found[1][0]["router"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_ample_capacity_drops_nothing(variant):
    _, model, params, x, segments = make(**VARIANTS[variant])
    roomy = MoE(model_config(**VARIANTS[variant], capacity_factor=float(E)), True)
    a, b = (jax.jit(partial(m.apply, {"params": params}))(x, segments) for m in (model, roomy))
    close(a, b)
    assert b[1]["dropped"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_come_find_room_and_the_others_are_counted(variant):
    c, model, params, x, segments = make(**VARIANTS[variant], capacity_factor=0.75)
    y, aux = jax.jit(partial(model.apply, {"params": params}))(x, segments)
    kept, dropped = first_come(c, params, x, segments)
    close(y, dense(c, params, x, kept))
    assert aux["dropped"] == dropped > 0


def test_places_say_who_comes_first():
    _, model, params, x, segments = make(capacity_factor=0.75)
    run = jax.jit(partial(model.apply, {"params": params}))
    order_T = jax.random.permutation(jax.random.key(2), T)
    y, aux = run(x, segments)
    close(run(x[:, order_T], segments[:, order_T], order_T), (y[:, order_T], aux))


def objective(model, segments, params, x):
    places_T = jnp.arange(x.shape[1]) * 7 % T  # not as they lie
    y, aux = model.apply({"params": params}, x, segments, places_T)
    return jnp.sum(jnp.square(y)) + jnp.sum(aux["balance_B"] + aux["router_z_B"]), (y, aux)


def everything(model, segments, params, x):
    """(loss, output, aux, gradients)."""
    return jax.jit(jax.value_and_grad(partial(objective, model, segments), (0, 1), has_aux=True))(
        params, x
    )


@pytest.fixture(scope="module", params=[0.0, 0.75], ids=["dropless", "slots"])
def made(request):
    _, model, params, x, segments = make(
        router="sigmoid", shared_experts=1, capacity_factor=request.param
    )
    return model, params, x, segments, everything(model, segments, params, x)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same(made, mesh):
    model, params, x, segments, expected = made
    with jax.set_mesh(mesh_of(**MESHES[mesh])):
        found = everything(model, segments, params, x)
    close(found, expected, 1e-4)
    assert float(found[0][0]) == pytest.approx(float(expected[0][0]), rel=2e-5)
    for name in ("load_E", "dropped"):
        np.testing.assert_array_equal(found[0][1][1][name], expected[0][1][1][name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "rows", "length"),
    [
        ({"expert": 4, "fsdp": 2}, 1, T),  # one prompt: nothing divides the batch
        ({"sequence": 4, "tensor": 2}, B, T - 1),
        ({"tensor": 8}, B, T),  # does not divide F
        ({"tensor": 4, "data": 2}, B, T - 1),  # divides F, not T
    ],
)
def test_sizes_that_do_not_divide(made, sizes, rows, length):
    model, params, x, segments, _ = made
    x = x[:rows, :length]
    segments = segments[:rows, :length]
    expected = everything(model, segments, params, x)
    with jax.set_mesh(mesh_of(**sizes)):
        close(everything(model, segments, params, x), expected, 1e-4)


def test_more_devices_than_divide_the_experts():
    _, model, params, x, segments = make(num_experts=6)
    expected = everything(model, segments, params, x)
    with jax.set_mesh(mesh_of(expert=4, data=2)):
        close(everything(model, segments, params, x), expected, 1e-4)


def test_stages_of_scanned_rematerialized_layers(made):
    """As a pipeline runs them: vmapped over stages, each on its own devices."""
    model, params, x, segments, _ = made
    layers = jax.tree.map(
        lambda p: jnp.stack([p, p[::-1]])[:, None], params
    )  # two stages of one layer
    xs = jnp.stack([x, x[::-1]])
    many = jnp.stack([segments, segments[::-1]])

    def stage(layers, x, segments):
        body = jax.checkpoint(lambda x, p: model.apply({"params": p}, x, segments))
        x, aux = jax.lax.scan(body, x, layers)
        return jnp.sum(jnp.square(x)) + jnp.sum(aux["balance_B"]), aux

    def loss(layers, xs):
        loss, aux = jax.vmap(stage, spmd_axis_name="stage")(layers, xs, many)
        return jnp.sum(loss), aux

    def run():
        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(layers, xs)

    expected = run()
    with jax.set_mesh(mesh_of(stage=2, expert=2, data=2)):
        close(run(), expected, 1e-4)


@pytest.mark.parametrize(
    ("factor", "sizes", "expected"),
    [
        (0.0, {"data": 8}, {}),
        (1.0, {"data": 8}, {}),
        (0.0, {"expert": 8}, {"all_gather": 3, "reduce_scatter": 1}),  # x, ids and weights; y
        (1.0, {"expert": 8}, {"all_to_all": 2}),
    ],
)
def test_what_is_sent(factor, sizes, expected):
    """Besides the router's weight where it is sharded; nothing over axes of one device."""
    _, model, params, x, segments = make(capacity_factor=factor)
    with jax.set_mesh(mesh_of(**sizes)):
        text = (
            jax.jit(lambda p, x: model.apply({"params": p}, x, segments)[0])
            .lower(params, x)
            .as_text()
        )
    found = {}
    for name in (
        "all_gather",
        "all_to_all",
        "reduce_scatter",
        "all_reduce",
        "collective_permute",
    ):
        found[name] = len(re.findall(rf'"stablehlo\.{name}"', text))
    found["all_gather"] -= "expert" in sizes  # the router's kernel
    assert {name: count for name, count in found.items() if count} == expected


def test_padding_visits_no_expert_and_counts_nowhere():
    _, model, params, x, segments = make(capacity_factor=1.0)
    run = jax.jit(partial(model.apply, {"params": params}))
    a, b = (run(jnp.where(segments[..., None] == 0, fill, x), segments) for fill in (0, 9))
    close(a, b, 0)
    assert a[1]["load_E"].sum() == 2 * segments.sum()
    assert np.all(a[0][segments == 0] == 0)
    _, alone = run(x[:, :9])  # rows of 9 tokens, and the same with padding
    _, padded = run(x, jnp.broadcast_to(jnp.arange(T) < 9, (B, T)).astype(jnp.int32))
    for name in ("balance_B", "router_z_B", "load_E"):
        close(alone[name], padded[name])


def test_rows_add_up():
    """So that microbatches, hosts and devices give what the whole batch gives."""
    _, model, params, x, segments = make(capacity_factor=0.75)
    run = jax.jit(partial(model.apply, {"params": params}))

    def total(rows):
        return jax.tree.map(jnp.sum, run(x[rows], segments[rows])[1])

    close(
        total(slice(None)),
        jax.tree.map(jnp.add, total(slice(0, None, 2)), total(slice(1, None, 2))),
    )


def test_the_balance_loss_of_an_even_spread_is_one():
    _, model, params, x, _ = make(experts_per_token=E)  # everyone goes everywhere
    close(model.apply({"params": params}, x)[1]["balance_B"], np.ones(B))


def test_the_router_computes_in_float32():
    _, model, params, x, segments = make(dtype="bfloat16", param_dtype="bfloat16")
    assert params["router"]["kernel"].dtype == jnp.float32
    assert params["experts"]["up"].dtype == jnp.bfloat16
    x = x.astype(jnp.bfloat16)
    y, aux = jax.jit(partial(model.apply, {"params": params}))(x, segments)
    exact = MoE(model_config(dtype="float32"), True)
    _, aux_exact = jax.jit(partial(exact.apply, {"params": params}))(
        x.astype(jnp.float32), segments
    )
    assert y.dtype == jnp.bfloat16
    close(aux, aux_exact, 0)


TRAINING = {
    "neither": ({"balance_loss": 0.0}, False),
    "loss": ({"balance_loss": 0.1}, True),
    "bias": ({"balance_loss": 0.0, "balance_rate": 1e-2, "router": "sigmoid"}, True),
}


@pytest.mark.parametrize("kind", TRAINING)
def test_the_load_is_spread(kind):
    """200 steps of regression, from a router that prefers two experts."""
    settings, spreads = TRAINING[kind]
    c, model, params, _, _ = make(**settings)
    params["router"] = jax.tree.map(jnp.zeros_like, params["router"])
    params["router"]["kernel"] = params["router"]["kernel"].at[0].set(jnp.linspace(-1, 1, E))
    teacher = jax.random.normal(jax.random.key(5), (D, D)) / 4
    adam = optax.adam(1e-2)

    def batch(key):
        x_BTD = (
            jax.random.normal(key, (B, T, D)).at[..., 0].set(2.0)
        )  # the feature by which the router prefers
        return x_BTD, jnp.tanh(x_BTD @ teacher)

    def step(carry, key):
        params, state = carry
        x_BTD, targets_BTD = batch(key)

        def loss(params):
            y_BTD, aux = model.apply({"params": params}, x_BTD)
            error = jnp.mean(jnp.square(y_BTD - targets_BTD))
            return error + c.balance_loss * jnp.mean(aux["balance_B"]), (error, aux["load_E"])

        grads, (error, load_E) = jax.grad(loss, has_aux=True)(params)
        updates, state = adam.update(grads, state)
        params = optax.apply_updates(params, updates)
        if c.balance_rate:
            params["router"]["bias"] = update_bias(params["router"]["bias"], load_E, c.balance_rate)
        return (params, state), (error, jnp.max(load_E) / jnp.mean(load_E))

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jax.random.split(jax.random.key(6), 200)))
    _, (errors, uneven) = run((params, adam.init(params)))
    before = float(uneven[0])
    after = float(jnp.mean(uneven[-20:]))
    print(
        f"{kind}: max / mean load {before:.2f} -> {after:.2f}, error {errors[0]:.3f} -> {errors[-20:].mean():.3f}"
    )
    assert before == 4
    assert (after < 2) == spreads


def test_the_bias_follows_the_load_in_every_layer():
    load_LE = jnp.array([[9.0, 1, 2], [4, 4, 4]])
    np.testing.assert_allclose(
        update_bias(jnp.ones((2, 3)), load_LE, 0.5), [[0.5, 1.5, 1.5], [1, 1, 1]]
    )


@pytest.mark.parametrize("implementation", GROUPED_MATMUL)
def test_grouped_matmul(implementation):
    """Each row with its group's matrix; an empty group, rows after the last."""
    rows = jax.random.normal(jax.random.key(0), (9, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 5, 4))
    sizes = jnp.array([3, 0, 4])
    group = np.array([0, 0, 0, 2, 2, 2, 2, 1, 1])

    def plain(rows, kernel):
        return jnp.einsum("MD,MDF->MF", rows, kernel[group]) * (np.arange(9) < 7)[:, None]

    def grouped(rows, kernel):
        return grouped_matmul(rows, kernel, sizes, implementation=implementation)

    close(grouped(rows, kernel), plain(rows, kernel))
    grads = (
        jax.grad(lambda r, k, f=f: jnp.sum(jnp.sin(f(r, k))), (0, 1))(rows, kernel)
        for f in (grouped, plain)
    )
    close(*grads)
