"""Stochastic rounding is right in the mean, the same on any mesh; what nearest loses is told before it is lost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, small_config
from jax.sharding import NamedSharding
from ml_collections import FrozenConfigDict

from jaxlm.config.check import check
from jaxlm.step.optim import OPTIMIZERS, optimizer
from jaxlm.step.rounding import lost_share, moved_share, stochastic_round, warnings
from jaxlm.step.state import State, apply_gradients

ONE = mesh_of(1)


def bfloat16(**settings):
    return small_config(model__param_dtype="bfloat16", **settings)


def parameters(dtype):
    """A few parameters under names that the patterns know, with values that bfloat16 holds."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.array(rng.standard_normal(shape) / 8, jnp.bfloat16).astype(dtype)

    kernel = {"kernel": normal(2, 32, 64)}
    return {
        "embed": {"table": normal(64, 32)},
        "layers": {"block_0": {"mlp": {"up": kernel}, "norm": {"scale": jnp.ones((2, 32), dtype)}}},
    }


def made_state(config):
    params = parameters(config.model.param_dtype)
    zero = jnp.zeros((), jnp.int32)
    return State(zero, params, optimizer(config).init(params), None, zero)


def stepped(config, state, grads):
    """The state after a step with these gradients, and its metrics."""
    return step(state, grads, config=FrozenConfigDict(config))


@partial(jax.jit, static_argnames="config")
def step(state, grads, config):
    sums = {"loss": jnp.zeros(()), "routing": {}}
    return apply_gradients(state, grads, sums, config=config)


def gradients_like(state, scale=1.0):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.array(scale * rng.standard_normal(x.shape), x.dtype), state.params
    )


def neighbours(x):
    """(below, above) of float32 values in bfloat16, as float32; both the value where it is one."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    towards_zero = bits & 0xFFFF0000
    away = towards_zero + np.where(bits & 0xFFFF, 0x10000, 0).astype(np.uint32)
    both = towards_zero.view(np.float32), away.view(np.float32)
    return np.minimum(*both), np.maximum(*both)


def test_rounding_gives_one_of_two_neighbours_and_is_right_in_the_mean():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(64) * 10.0 ** rng.integers(-30, 30, 64)).astype(np.float32)
    many = np.tile(x, (4096, 1))
    drawn = jax.jit(stochastic_round)(many, jax.random.key(1))
    assert drawn.dtype == jnp.bfloat16
    drawn = np.asarray(drawn).astype(np.float64)
    below, above = (side.astype(np.float64) for side in neighbours(x))
    assert ((drawn == below) | (drawn == above)).all()
    chance = (x - below) / (above - below)
    error = (drawn == above).mean(axis=0) - chance
    assert np.abs(error).max() < 4.5 * 0.5 / 4096**0.5
    assert np.abs(error).mean() < 0.01


@pytest.mark.parametrize(
    "values", [[0.0, -0.0, 1.0, -2.5, 3.0e38, 1.0e-40, 2.0**-126], [np.inf, -np.inf]]
)
def test_what_bfloat16_holds_stays_as_it_is(values):
    held = np.tile(np.array(values, jnp.bfloat16), (20, 1))
    again = jax.jit(stochastic_round)(held.astype(np.float32), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(again).view(np.uint16), held.view(np.uint16))


def test_a_nan_of_any_bits_stays_one():
    bits = np.tile(np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF80FFFF], np.uint32), (20, 1))
    assert jnp.isnan(jax.jit(stochastic_round)(bits.view(np.float32), jax.random.key(0))).all()


def test_random_numbers_follow_from_seed_and_step_alone():
    """On any mesh, and at another time, the same step rounds to the same bits; another seed or step to others."""
    config = bfloat16(
        optim__rounding="stochastic", optim__learning_rate=1e-3, optim__schedule="constant"
    )
    state = made_state(config)
    grads = gradients_like(state)

    def after(state, grads, seed=0):
        config.seed = seed
        return jax.tree.leaves(jax.device_get(stepped(config, state, grads)[0].params))

    alone = after(state, grads)
    mesh = mesh_of(fsdp=4, tensor=2)

    def spread(x):
        return jax.device_put(
            x, NamedSharding(mesh, jax.P(*[None] * (x.ndim - 2), "fsdp", "tensor"))
        )

    def place(x):
        if x.ndim > 2:
            return spread(x)
        return x

    sharded = after(*jax.tree.map(place, (state, grads)))
    for one, other in zip(alone, sharded):
        np.testing.assert_array_equal(one, other)
    later = state.replace(step=state.step + 1)
    for different in (after(state, grads, seed=1), after(later, grads)):
        assert all((one != other).any() for one, other in zip(alone, different))


def way(config, steps):
    """How far each parameter has gone in so many steps, and the last metrics."""
    state = made_state(config)
    start = state.params
    for _ in range(steps):
        state, metrics = stepped(config, state, gradients_like(state))

    def gone(new, old):
        return np.asarray(new, np.float64).ravel() - np.asarray(old, np.float64).ravel()

    return np.concatenate(jax.tree.leaves(jax.tree.map(gone, state.params, start))), metrics


def test_small_updates_add_up_where_they_are_rounded_stochastically():
    """At a learning rate that nearest rounds away stochastic rounding goes, in the mean, where float32 does."""
    rate = {"optim__learning_rate": 2e-5, "optim__warmup_steps": 0, "optim__schedule": "constant"}
    exact, metrics = way(small_config(**rate), 20)
    assert "moved_share" not in metrics
    gone = {}
    for rounding in ("nearest", "stochastic"):
        moved, metrics = way(bfloat16(**rate, optim__rounding=rounding), 20)
        gone[rounding] = float(moved @ exact / (exact @ exact))  # the part of float32's way
        assert 0 < float(metrics["moved_share"]) < 0.2
    assert gone["nearest"] < 0.3
    assert gone["stochastic"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("rounding", "left"), [("nearest", 1.0), ("stochastic", 0.999**200)])
def test_the_mean_of_squares_falls_with_a_long_memory(rounding, left):
    """b2 = 0.999: after large gradients come none, and v falls by 0.1% a step; rounded to nearest it stands still."""
    settings = {"optim__b2": 0.999, "optim__name": "adam", "optim__weight_decay": 0.0}
    config = bfloat16(**settings, optim__rounding=rounding)
    state = made_state(config)
    state, _ = stepped(config, state, gradients_like(state))

    def total(state):
        return sum(np.asarray(x, np.float64).sum() for x in jax.tree.leaves(nu_of(state)))

    first = total(state)
    still = gradients_like(state, 0.0)
    for _ in range(200):
        state, _ = stepped(config, state, still)
    assert total(state) / first == pytest.approx(left, rel=0.02)


def nu_of(state):
    (moments,) = [part for part in state.opt_state if hasattr(part, "nu")]
    return moments.nu


def test_moved_share_counts_trained_parameters_that_are_not_float32():
    config = bfloat16(optim__rates=((r"embed", 0.0), (r".*", 1.0)))
    old = parameters("bfloat16")
    new = parameters("bfloat16")
    new["layers"]["block_0"]["norm"]["scale"] += 1
    new["embed"]["table"] += 1
    share = moved_share(new, old, config)["moved_share"]
    assert float(share) == pytest.approx(64 / (64 + 2 * 32 * 64))
    assert moved_share(parameters("float32"), parameters("float32"), small_config()) == {}


# ---------------------------------------------------------------- told before step 1

RATES = {"sgd": 1e-4, "adam": 1e-5, "adamw": 1e-5, "lion": 1e-5, "muon": 1e-4, "adafactor": 1e-4}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_that_is_rounded_away_is_told_in_a_line(name):
    params = parameters("bfloat16")
    rate = RATES[name]
    (line,) = warnings(params, 0, bfloat16(optim__name=name, optim__learning_rate=rate), ONE)
    for word in ("bfloat16", f"{rate:.1e}", "assumed", "optim.rounding=stochastic"):
        assert word in line
    assert "\n" not in line
    assert not warnings(params, 0, bfloat16(optim__name=name, optim__learning_rate=8.0), ONE)
    settings = {"optim__name": name, "optim__learning_rate": rate}
    assert not warnings(params, 0, bfloat16(**settings, optim__rounding="stochastic"), ONE)
    assert not warnings(parameters("float32"), 0, small_config(**settings), ONE)


def test_only_what_is_trained_is_judged_and_only_by_the_steps_that_are_left():
    params = parameters("bfloat16")
    frozen = bfloat16(optim__rates=((r"scale", 0.0), (r".*", 1.0)))
    assert lost_share(params, 4e-3, bfloat16(), ONE) > lost_share(params, 4e-3, frozen, ONE) == 0
    late = bfloat16(
        optim__learning_rate=1e-2,
        optim__schedule="linear",
        optim__end_factor=0.0,
        train__steps=1000,
    )
    assert not warnings(params, 0, late, ONE)
    assert warnings(params, 999, late, ONE)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optim__name": "adamw", "optim__b2": 0.999}, "optim.b2=0.999"),
        ({"optim__name": "adam", "optim__b1": 0.998}, "optim.b1=0.998"),
        ({"optim__name": "lion", "optim__b2": 0.9999}, "optim.b2=0.9999"),
        ({"optim__name": "muon", "optim__momentum": 0.999}, "optim.momentum=0.999"),
        (
            {"optim__name": "sgd", "optim__momentum": 0.999, "optim__clip": 0.0},
            "optim.momentum=0.999",
        ),
        ({"optim__name": "adafactor", "train__steps": 5000}, "adafactor"),
        ({"optim__name": "adamw", "optim__b2": 0.99}, None),
        ({"optim__name": "lion", "optim__b1": 0.999}, None),
    ],
    ids=str,
)
def test_a_memory_too_long_for_bfloat16_is_told(settings, named):
    config = bfloat16(optim__learning_rate=8.0, **settings)
    lines = warnings(parameters("bfloat16"), 0, config, ONE)
    assert len(lines) == (named is not None)
    assert all(named in line for line in lines)


def test_stochastic_rounding_of_float32_is_refused():
    config = small_config(optim__rounding="stochastic")
    assert [problem for problem in check(config, 1) if "optim.rounding" in problem]
    assert not check(bfloat16(optim__rounding="stochastic"), 1)
