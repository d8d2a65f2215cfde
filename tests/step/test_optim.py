"""Schedules, decay, rates and freezing by ordered patterns, and optimizers that do what their papers say."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import fresh_state, mesh_of, one_step, random_batch, small_config
from ml_collections import FrozenConfigDict
from optax.contrib import MuonDimensionNumbers

from jaxlm.config.check import check
from jaxlm.config.keys import CHOICES
from jaxlm.errors import ConfigError
from jaxlm.parallel.hosts import to_global
from jaxlm.parallel.mesh import replicated_share
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.step.optim import OPTIMIZERS, optimizer, schedule
from jaxlm.step.patterns import name_of, rate_factors, require_cover
from jaxlm.step.state import abstract_state, gradients, init_state, state_shardings, train_step

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def rates(name, **more):
    c = small_config(optim__schedule=name, optim__warmup_steps=10, train__steps=100, **more)
    return np.array([schedule(c, 1.0)(step) for step in range(101)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_linear_to_the_peak_and_never_zero(name):
    np.testing.assert_allclose(rates(name)[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates(name).max() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "half", "end"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1, 1)]
)
def test_where_schedules_pass_and_end(name, half, end):
    r = rates(name)
    assert r[55] == pytest.approx(half, abs=0.01)
    assert r[100] == pytest.approx(end, abs=0.01)


def test_wsd_is_flat_and_then_falls():
    r = rates("wsd", optim__cooldown_fraction=0.2, optim__end_factor=0.0)
    assert np.all(r[10:81] == 1.0)
    assert r[90] == pytest.approx(0.5)
    assert r[100] == 0.0


def test_inverse_square_root_halves_at_four_times_the_warm_up():
    assert rates("inverse_sqrt")[40] == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_warm_up(name):
    c = small_config(optim__schedule=name, optim__warmup_steps=0)
    assert float(schedule(c, 1.0)(0)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_reaches_matrices_and_spares_norms_and_biases(name):
    """With zero gradients only decay moves parameters: by learning rate x decay x parameter, in Adam by its sign."""
    c = small_config(
        optim__name=name, optim__weight_decay=0.5, model__bias=True, optim__warmup_steps=0
    )
    params = jax.tree.map(lambda x: x + 1.0, fresh_state(c).params)
    tx = optimizer(c)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        value = params
        for part in key.split("/"):
            value = value[part]
        if "norm" in key or "bias" in key:
            factor = 0.0
        else:
            factor = 0.5
        if name == "adam":
            value = np.sign(value) / 0.5
        else:
            value = value
        np.testing.assert_allclose(
            update, -1e-2 * factor * value, rtol=1e-5, atol=1e-7, err_msg=key
        )


def test_patterns_must_cover_and_match():
    params = abstract_state(small_config())[0].params
    require_cover(((r"norm", 0.0), (r".*", 1.0)), params, "optim.decay")
    with pytest.raises(ConfigError, match="'lora' matches no parameter"):
        require_cover(((r"lora", 0.0), (r".*", 1.0)), params, "optim.decay")
    with pytest.raises(ConfigError, match="embed/tokens is matched by none"):
        require_cover(((r"layers|norm", 1.0),), params, "optim.decay")


def test_muon_makes_the_updates_of_matrices_orthogonal():
    c = small_config(
        optim__name="muon", optim__weight_decay=0.0, optim__warmup_steps=0, optim__learning_rate=1.0
    )
    params = fresh_state(c).params
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    tx = optimizer(c)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    up = updates["layers"]["block_0"]["mlp"]["up"]["kernel"][0]
    singular = np.linalg.svd(up / np.sqrt(max(1, up.shape[1] / up.shape[0])), compute_uv=False)
    # five Newton-Schulz steps bring them near 1
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_every_optimizer_can_be_chosen():
    assert set(CHOICES["optim.name"]) == set(OPTIMIZERS)


# ---------------------------------------------------------------- against the papers, step by step

SHAPES = {
    "embed/tokens": (40, 33),
    "final_norm/scale": (33,),
    "head/bias": (1,),
    "layers/block_0/attention/query/kernel": (33, 3, 40),
    "layers/block_0/mlp/up/kernel": (33, 48),
    "layers/block_0/mlp/experts/down": (2, 48, 33),
}


def quadratic(c, tx, steps=100):
    """{name: parameter} after these steps on a noisy quadratic bowl of its own curvatures, in float64."""
    rng = np.random.default_rng(0)

    def draw(*lead):
        return {name: rng.normal(size=(*lead, *shape)) for name, shape in SHAPES.items()}

    curvature = jax.tree.map(np.exp, draw())
    centre = draw()
    noise = draw(steps)

    def nest(flat):
        return jax.tree.map(jnp.asarray, unflat(flat))

    def step(carry, noise):
        params, state = carry
        grads = jax.tree.map(
            lambda k, p, m, n: k * (p - m) + n, nest(curvature), params, nest(centre), noise
        )
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = nest(draw())
    (end, _), _ = jax.jit(lambda s: jax.lax.scan(step, (s, tx.init(s)), nest(noise)))(start)

    def gradient(name, p, t):
        return curvature[name] * (p - centre[name]) + noise[name][t]

    return flat_of(end), flat_of(start), gradient


def unflat(flat):
    tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def flat_of(tree):
    return {name_of(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def sgd(p, g, m, v, t, rate, decay, o):
    g = g + decay * p
    m = o.momentum * m + g
    return p - rate * (g + o.momentum * m if o.nesterov else m), m, v


def adam(p, g, m, v, t, rate, decay, o):
    g = g + decay * p
    m = o.b1 * m + (1 - o.b1) * g
    v = o.b2 * v + (1 - o.b2) * g * g
    return p - rate * m / (1 - o.b1**t) / (np.sqrt(v / (1 - o.b2**t)) + o.eps), m, v


def adamw(p, g, m, v, t, rate, decay, o):
    new, m, v = adam(p, g, m, v, t, rate, 0.0, o)
    return new - rate * decay * p, m, v


def lion(p, g, m, v, t, rate, decay, o):
    return p - rate * (np.sign(o.b1 * m + (1 - o.b1) * g) + decay * p), o.b2 * m + (1 - o.b2) * g, v


def by_hand(rule, c, name, p, gradient, peak, steps=100):
    """The parameter after these steps of `rule`, written in numpy."""
    o = c.optim
    m = np.zeros_like(p)
    v = np.zeros_like(p)
    if re.search("norm|bias", name):
        factor = 0.0
    else:
        factor = 1.0
    rate = schedule(c, peak)
    for t in range(steps):
        g = gradient(name, p, t) + o.l1 * np.sign(p) * factor
        p, m, v = rule(p, g, m, v, t + 1, float(rate(t)), o.weight_decay * factor, o)
    return p


STEPS_OF = {
    "sgd": (sgd, {"optim__momentum": 0.9}),
    "sgd without momentum": (sgd, {"optim__momentum": 0.0}),
    "sgd, Nesterov": (sgd, {"optim__momentum": 0.9, "optim__nesterov": True}),
    "adam": (adam, {}),
    "adamw": (adamw, {}),
    "adamw, L1": (adamw, {"optim__l1": 0.3}),
    "lion": (lion, {"optim__b2": 0.99}),
}


def problem(name, **more):
    settings = {
        "train__steps": 100,
        "optim__warmup_steps": 10,
        "optim__learning_rate": 3e-3,
        "model__scan": False,
    }
    return small_config(optim__name=name, optim__weight_decay=0.1, **settings | more)


@pytest.mark.parametrize("case", STEPS_OF)
def test_a_hundred_steps_are_those_of_the_paper(case):
    """Polyak 1964, Sutskever et al. 2013, Kingma & Ba 2015, Loshchilov & Hutter 2019, Chen et al. 2023."""
    rule, settings = STEPS_OF[case]
    c = problem(rule.__name__, **settings)
    with jax.enable_x64(True):
        end, start, gradient = quadratic(c, optimizer(c))
        for name, p in start.items():
            want = by_hand(rule, c, name, p, gradient, c.optim.learning_rate)
            assert np.abs(end[name] - p).max() > 0.05
            np.testing.assert_allclose(end[name], want, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_hundred_steps_of_adafactor_are_those_of_optax():
    c = problem("adafactor", optim__learning_rate=3e-2)
    rate = schedule(c, c.optim.learning_rate)
    mask = unflat({name: not re.search("norm|bias", name) for name in SHAPES})
    want = optax.adafactor(
        rate,
        min_dim_size_to_factor=32,
        weight_decay_rate=lambda step: 0.1 * rate(step),
        weight_decay_mask=mask,
    )
    with jax.enable_x64(True):
        (got, start, _), (end, _, _) = quadratic(c, optimizer(c)), quadratic(c, want)
    for name, p in start.items():
        assert np.abs(end[name] - p).max() > 0.05
        np.testing.assert_allclose(got[name], end[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_hundred_steps_of_muon_are_those_of_optax():
    """Of the matrices; the rest goes by AdamW (optax's: by Nesterov's variant of it)."""
    c = problem("muon", optim__learning_rate=2e-2, optim__adam_learning_rate=3e-3)
    dims = dict.fromkeys(SHAPES) | {
        "layers/block_0/attention/query/kernel": MuonDimensionNumbers(0, (1, 2)),
        "layers/block_0/mlp/up/kernel": MuonDimensionNumbers(0, 1),
        "layers/block_0/mlp/experts/down": MuonDimensionNumbers(1, 2),
    }
    want = optax.contrib.muon(
        schedule(c, 2e-2), beta=0.95, weight_decay=0.1, muon_weight_dimension_numbers=unflat(dims)
    )
    with jax.enable_x64(True):
        (got, start, gradient), (end, _, _) = quadratic(c, optimizer(c)), quadratic(c, want)
        for name, p in start.items():
            assert np.abs(end[name] - p).max() > 0.05
            if dims[name]:
                wanted = end[name]
            else:
                wanted = by_hand(adamw, c, name, p, gradient, 3e-3)
            np.testing.assert_allclose(got[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


# ---------------------------------------------------------------- rates, layers, freezing, L1

FROZEN = ((r"embed|mlp/up", 0.0), (r".*", 1.0))


def updates_of(c, params, steps=2, jit=jax.jit):
    """{name: update} of some steps with made gradients, the last."""
    tx = optimizer(c)
    state = tx.init(params)
    update = jit(tx.update)
    for k in range(steps):
        updates, state = update(
            jax.tree.map(lambda p, k=k: jnp.cos((k + 50) * p), params), state, params
        )
    return flat_of(updates)


def test_factors_scale_the_steps_of_sgd():
    plain = {"optim__name": "sgd", "optim__momentum": 0.0}
    rates = ((r"attention", 0.25), (r"mlp", 3.0), (r".*", 1.0))
    params = fresh_state(small_config()).params

    def updates(**more):
        """As written: the compiler may multiply the factors in another order."""
        return updates_of(small_config(**plain, **more), params, jit=lambda f: f)

    one = updates()
    scaled = updates(optim__rates=rates)
    for name, update in one.items():
        if "attention" in name:
            factor = 0.25
        else:
            factor = 3.0 if "mlp" in name else 1.0
        np.testing.assert_array_equal(scaled[name], np.float32(factor) * update, err_msg=name)


def test_layers_learn_the_slower_the_deeper():
    """BEiT: embeddings decay^(L + 1), layer i of 0, 1, ... decay^(L - i), what follows the layers 1."""
    settings = {
        "optim__name": "sgd",
        "optim__momentum": 0.0,
        "model__num_layers": 4,
        "model__layers": "SL",
    }
    c = small_config(**settings, model__tie_embeddings=False, model__positions="learned")
    decayed = small_config(
        **settings, model__tie_embeddings=False, model__positions="learned", optim__layer_decay=0.5
    )
    params = fresh_state(c).params
    one = updates_of(c, params)
    scaled = updates_of(decayed, params)

    def ratio(name):
        return np.unique(np.round(scaled[name] / np.where(one[name], one[name], np.nan), 6))

    for name in one:
        if "layers" in name:
            block = int(name.split("block_")[1][0])  # layers block, block + 2 of 4
            factors = np.reshape(
                [0.5 ** (4 - block), 0.5 ** (2 - block)], (2, *(1,) * (one[name].ndim - 1))
            )
            np.testing.assert_allclose(scaled[name], one[name] * factors, rtol=1e-6)
    assert ratio("embed/tokens")[0] == ratio("embed/positions")[0] == 0.5**5
    np.testing.assert_array_equal(scaled["unembed"], one["unembed"])
    np.testing.assert_array_equal(scaled["final_norm/scale"], one["final_norm/scale"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_learn_as_separate_ones(name):
    settings = {
        "optim__name": name,
        "optim__layer_decay": 0.7,
        "optim__rates": ((r"mlp", 0.3), (r".*", 1.0)),
        "optim__learning_rate": 1.0,
        "model__num_layers": 4,
        "model__layers": "SL",
    }
    stacked, plain = (small_config(**settings, model__scan=scan) for scan in (True, False))
    params = fresh_state(stacked).params
    layers = {
        f"block_{i}": jax.tree.map(lambda x, i=i: x[i // 2], params["layers"][f"block_{i % 2}"])
        for i in range(4)
    }
    one = updates_of(stacked, params)
    many = updates_of(plain, {**params, "layers": layers})
    for key, update in many.items():
        parts = key.split("/")
        if parts[0] == "layers":
            i = int(parts[1].removeprefix("block_"))
            want = one["/".join(["layers", f"block_{i % 2}", *parts[2:]])][i // 2]
        else:
            want = one[key]
        np.testing.assert_allclose(update, want, rtol=1e-5, atol=1e-7, err_msg=key)


def test_every_stack_has_its_own_depth():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def block(*lead):
        return {"mlp": {"kernel": leaf(*lead, 3, 3)}, "norm": {"scale": leaf(*lead, 3)}}

    params = {
        "embed": {"tokens": leaf(5, 3)},
        "encoder": {"layers": {"block_0": block(2)}, "embed": {"positions": leaf(4, 3)}},
        "decoder": {"layers": {"block_0": block(2), "block_1": block(2)}},
        "head": {"kernel": leaf(3, 2)},
    }
    factors = rate_factors(params, small_config(optim__layer_decay=0.5))
    assert factors["embed"]["tokens"] == 0.5**5
    assert factors["encoder"]["embed"]["positions"] == 0.5**3
    assert factors["head"]["kernel"] == 1.0

    def kernels(stack, j):
        return factors[stack]["layers"][f"block_{j}"]["mlp"]["kernel"]

    np.testing.assert_array_equal(kernels("encoder", 0), np.reshape([0.25, 0.5], (2, 1, 1)))
    np.testing.assert_array_equal(kernels("decoder", 0), np.reshape([0.5**4, 0.5**2], (2, 1, 1)))
    np.testing.assert_array_equal(kernels("decoder", 1), np.reshape([0.5**3, 0.5], (2, 1, 1)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_stays_to_the_bit_and_has_no_optimizer_state(name):
    c = small_config(
        optim__name=name, optim__rates=FROZEN, optim__l1=0.1, train__ema=0.7, optim__warmup_steps=0
    )
    first = fresh_state(c)
    batch = random_batch(np.random.default_rng(0))
    state = first
    for _ in range(3):
        state, metrics = one_step(c, state, batch)
    before = flat_of(first.params)
    after = flat_of(state.params)
    average = flat_of(state.ema)
    frozen = {key for key in before if re.search("embed|mlp/up", key)}
    assert frozen
    assert int(metrics["skipped"]) == 0
    for key, value in before.items():
        for got in (after[key], average[key]):
            assert np.array_equal(got, value) == (key in frozen), key
    kept = flat_of(state.opt_state)
    assert not [k for k in kept if any(k.endswith(key) for key in frozen)]
    assert any(k.endswith("mlp/down/kernel") for k in kept) or name == "sgd"
    assert sum(x.size for x in kept.values()) < 2.1 * sum(
        before[key].size for key in set(before) - frozen
    )


def test_the_other_gradients_are_as_if_nothing_were_frozen():
    batch = random_batch(np.random.default_rng(0))
    results = {}
    state = fresh_state(small_config())
    for rates in (((r".*", 1.0),), FROZEN):
        for parts in (1, 2):
            c = FrozenConfigDict(small_config(optim__rates=rates, train__grad_accumulation=parts))
            grads, _ = jax.jit(partial(gradients, config=c))(state.params, batch, jax.random.key(0))
            results[rates, parts] = flat_of(grads)
    whole = results[((r".*", 1.0),), 1]
    for parts in (1, 2):
        some = results[FROZEN, parts]
        assert set(some) == {key for key in whole if not re.search("embed|mlp/up", key)}
        for key, grad in some.items():
            np.testing.assert_allclose(grad, whole[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_the_gradients_of_frozen_layers_cost_nothing():
    batch = random_batch(np.random.default_rng(0))
    flops = []
    for rates in (((r".*", 1.0),), ((r"final_norm", 1.0), (r".*", 0.0))):
        c = small_config(optim__rates=rates, model__scan=False, model__tie_embeddings=False)
        compiled = (
            jax.jit(partial(train_step, config=FrozenConfigDict(c)))
            .lower(abstract_state(c)[0], batch)
            .compile()
        )
        flops.append(compiled.cost_analysis()["flops"])
    assert flops[1] < 0.55 * flops[0]


def test_a_frozen_router_keeps_its_bias():
    """Which an even load would move by no gradient."""
    rates = ((r"router", 0.0), (r".*", 1.0))
    c = small_config(model__num_experts=4, model__balance_rate=0.1, optim__rates=rates)
    first = fresh_state(c)
    new, _ = one_step(c, first, random_batch(np.random.default_rng(0)))
    routers = []
    for state in (first, new):
        routers.append(state.params["layers"]["block_0"]["mlp"]["router"])
    jax.tree.map(np.testing.assert_array_equal, *routers)


def test_patterns_that_freeze_everything_or_nothing_are_refused():
    def of(**optim):
        return check(small_config(**{f"optim__{key}": value for key, value in optim.items()}))

    assert any(
        "rates" in p and "freezes every" in p for p in of(rates=((r"embed", 0), (r".*", 0.0)))
    )
    assert any("optim.rates: ('(', 1.0)" in p for p in of(rates=(("(", 1.0),)))
    assert any("layer_decay=0.0" in p for p in of(layer_decay=0.0))
    assert any("l1=-1.0" in p for p in of(l1=-1.0))
    assert not of(rates=FROZEN, layer_decay=0.75, l1=0.1)
    with pytest.raises(ConfigError, match="freezes every parameter"):
        abstract_state(
            small_config(optim__rates=((r"embed|layers|final_norm", 0.0), (r"scale|kernel", 1.0)))
        )
    with pytest.raises(ConfigError, match=r"optim.rates:\n.*'block_7' matches no parameter"):
        abstract_state(small_config(optim__rates=((r"block_7", 0.0), (r".*", 1.0))))


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_checkpoint_with_frozen_parameters_comes_back(name, tmp_path):
    c = small_config(optim__name=name, optim__rates=FROZEN)
    mesh = mesh_of(fsdp=8)
    state = init_state(c, mesh)
    checkpoints = Checkpoints(tmp_path, c)
    checkpoints.save(state, {})
    checkpoints.wait()
    back = checkpoints.restore(0, abstract_state(c)[0], state_shardings(c, mesh))
    checkpoints.close()
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_l1_takes_a_useless_weight_to_zero(name):
    """The loss is (w0 - 2)^2: the other weight counts for nothing, and the bias is not penalized."""
    ends = []
    for l1 in (0.0, 0.1):
        c = small_config(
            optim__name=name, optim__l1=l1, optim__weight_decay=0.0, optim__schedule="constant"
        )
        tx = optimizer(c)
        params = {"head": {"kernel": jnp.array([1.0, 1.0]), "bias": jnp.array([1.0])}}
        state = tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(300):
            grads = {
                "head": {
                    "kernel": jnp.array([2 * (params["head"]["kernel"][0] - 2), 0.0]),
                    "bias": jnp.zeros(1),
                }
            }
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params["head"])
    (useful, useless), (penalized, gone) = ends[0]["kernel"], ends[1]["kernel"]
    assert useless == 1.0
    assert abs(gone) < 0.03
    # where 2 (w - 2) + l1 = 0
    assert abs(useful - 2) < 0.05
    assert abs(penalized - 1.95) < 0.05
    assert ends[1]["bias"] == 1.0


# ---------------------------------------------------------------- on a mesh


def losses_on(name, devices, strategy):
    c = small_config(
        optim__name=name, mesh__strategy=strategy, optim__l1=1e-3, optim__layer_decay=0.8
    )
    mesh = mesh_of(devices, **{"fsdp" if strategy == "fsdp" else "data": devices})
    batch = random_batch(np.random.default_rng(0))
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(c, mesh)
        step = jax.jit(
            partial(train_step, config=c), out_shardings=(state_shardings(c, mesh), None)
        )
        for _ in range(3):
            state, metrics = step(state, to_global(batch, mesh, 16))
            losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_on_a_mesh_is_one_device(name):
    alone = losses_on(name, 1, "data")
    assert alone[2] < alone[0]
    for strategy in ("fsdp", "zero1"):
        np.testing.assert_allclose(losses_on(name, 8, strategy), alone, rtol=1e-5, err_msg=strategy)


def test_adafactors_moments_are_sharded_as_their_parameters():
    """By the axes that are left when one is averaged away; what is whole everywhere is next to nothing."""
    c = small_config(
        optim__name="adafactor", model__embed_dim=256, model__mlp_dim=256, model__num_kv_heads=4
    )
    shapes, axes = abstract_state(c)
    moments = axes.opt_state[0]["2"][0]

    def of(tree, *path):
        return tuple(tree["layers"]["block_0"][path[0]][path[1]]["kernel"])

    for name, *kept in (
        ("up", "embed", "mlp"),
        ("down", "mlp", "embed"),
    ):  # square: only the order tells
        assert [of(moments.v_row, "mlp", name), of(moments.v_col, "mlp", name)] == [
            ("layers", axis) for axis in kept
        ]
    assert of(moments.v_row, "attention", "query") == ("layers", "heads", "head_dim")
    assert of(moments.v_col, "attention", "query") == ("layers", "embed", "heads")
    places = state_shardings(c, mesh_of(fsdp=8))
    assert places.opt_state[0]["2"][0].v_row["layers"]["block_0"]["mlp"]["up"][
        "kernel"
    ].spec == jax.P(None, "fsdp")
    share, _ = replicated_share(shapes.opt_state, places.opt_state)
    sizes = [
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (shapes.opt_state, shapes.params)
    ]
    assert sizes[0] < 0.03 * sizes[1]
    assert share * sizes[0] < 0.02 * sizes[1]
