"""Schedules, decay by ordered patterns, and optimizers that do what their papers say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh_state, small_config

from jaxlm.errors import ConfigError
from jaxlm.optim import OPTIMIZERS, optimizer, require_cover, schedule
from jaxlm.state import abstract_state

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def rates(name, **more):
    c = small_config(optim__schedule=name, optim__warmup_steps=10, train__steps=100, **more)
    return np.array([schedule(c, 1.0)(step) for step in range(101)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_linear_to_the_peak_and_never_zero(name):
    np.testing.assert_allclose(rates(name)[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates(name).max() == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "half", "end"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1, 1)])
def test_where_schedules_pass_and_end(name, half, end):
    r = rates(name)
    assert r[55] == pytest.approx(half, abs=0.01) and r[100] == pytest.approx(end, abs=0.01)


def test_wsd_is_flat_and_then_falls():
    r = rates("wsd", optim__cooldown_fraction=0.2, optim__end_factor=0.0)
    assert np.all(r[10:81] == 1.0) and r[90] == pytest.approx(0.5) and r[100] == 0.0


def test_inverse_square_root_halves_at_four_times_the_warm_up():
    assert rates("inverse_sqrt")[40] == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_warm_up(name):
    c = small_config(optim__schedule=name, optim__warmup_steps=0)
    assert float(schedule(c, 1.0)(0)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_reaches_matrices_and_spares_norms_and_biases(name):
    """With zero gradients only decay moves parameters: by learning rate x decay x parameter."""
    c = small_config(optim__name=name, optim__weight_decay=0.5, model__bias=True, optim__warmup_steps=0)
    params = jax.tree.map(lambda x: x + 1.0, fresh_state(c).params)
    tx = optimizer(c)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        value = params
        for part in key.split("/"):
            value = value[part]
        factor = 0.0 if "norm" in key or "bias" in key else 0.5
        np.testing.assert_allclose(update, -1e-2 * factor * value, rtol=1e-5, atol=1e-7, err_msg=key)


def test_patterns_must_cover_and_match():
    params = abstract_state(small_config())[0].params
    require_cover(((r"norm", 0.0), (r".*", 1.0)), params, "optim.decay")
    with pytest.raises(ConfigError, match="'lora' matches no parameter"):
        require_cover(((r"lora", 0.0), (r".*", 1.0)), params, "optim.decay")
    with pytest.raises(ConfigError, match="embed/tokens is matched by none"):
        require_cover(((r"layers|norm", 1.0),), params, "optim.decay")


def test_muon_makes_the_updates_of_matrices_orthogonal():
    c = small_config(optim__name="muon", optim__weight_decay=0.0, optim__warmup_steps=0, optim__learning_rate=1.0)
    params = fresh_state(c).params
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    tx = optimizer(c)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    up = updates["layers"]["block_0"]["mlp"]["up"]["kernel"][0]
    singular = np.linalg.svd(up / np.sqrt(max(1, up.shape[1] / up.shape[0])), compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3  # five Newton-Schulz steps bring them near 1


def test_adamw_is_adam_with_decoupled_decay():
    """Three steps against the formulas of Loshchilov & Hutter (2019), algorithm 2."""
    c = small_config(optim__weight_decay=0.1, optim__warmup_steps=0, optim__schedule="constant", optim__b2=0.99)
    params = fresh_state(c).params
    tx, x = optimizer(c), np.array(params["embed"]["tokens"], np.float64)
    state, m, v = tx.init(params), 0.0, 0.0
    for step in range(1, 4):
        grads = jax.tree.map(lambda p, step=step: jnp.cos(step * p), params)
        g = np.cos(step * x)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        x = x - 1e-2 * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8) + 0.1 * x)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(params["embed"]["tokens"], x, atol=1e-5)
