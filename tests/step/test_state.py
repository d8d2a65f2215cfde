"""The step: the same on any mesh, in any number of microbatches; nothing that is not finite reaches the parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fresh_state, mesh_of, one_step, random_batch, small_config

from jaxlm.parallel.hosts import to_global
from jaxlm.parallel.mesh import partition_spec
from jaxlm.step.state import (
    State,
    abstract_state,
    eval_step,
    gradients,
    init_state,
    state_shardings,
    train_step,
)

MESHES = [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


def train(config, mesh, steps=20):
    """(losses, final state) on one made batch, again and again."""
    rows = config.train.batch_size
    losses = []
    batch = random_batch(np.random.default_rng(0), rows)
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        step = jax.jit(
            partial(train_step, config=config),
            donate_argnums=0,
            out_shardings=(state_shardings(config, mesh), None),
        )
        for _ in range(steps):
            state, metrics = step(state, to_global(batch, mesh, rows))
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.fixture(scope="module")
def alone():
    return train(small_config(model__dropout=0.1), mesh_of(1))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_any_mesh_is_one_device(sizes, alone):
    losses, state = train(small_config(model__dropout=0.1), mesh_of(**sizes))
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert alone[0][-1] < alone[0][0] - 0.2
    if sizes.get("tensor"):
        kernel = state.params["layers"]["block_0"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")
        moment = state.opt_state[0].mu["layers"]["block_0"]["mlp"]["up"]["kernel"]
        assert moment.sharding.spec == kernel.sharding.spec


def test_muon_is_the_same_on_any_mesh():
    c = small_config(optim__name="muon")
    one, _ = train(c, mesh_of(1), steps=5)
    many, _ = train(c, mesh_of(fsdp=4, tensor=2), steps=5)
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_parameters_are_born_equal_on_every_mesh():
    c = small_config()
    want = init_state(c, mesh_of(1)).params
    got = init_state(c, mesh_of(data=2, fsdp=2, tensor=2)).params
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_microbatches_change_nothing():
    """Loss and parameters after a step are those of the whole batch, with weights that differ from row to row."""
    batch = random_batch(np.random.default_rng(0))
    results = {}
    for parts in (1, 2, 4):
        c = small_config(train__grad_accumulation=parts, train__z_loss=1e-3)
        state, metrics = one_step(c, fresh_state(c), batch)
        results[parts] = metrics["loss"], metrics["grad_norm"], state.params
    for parts in (2, 4):
        assert float(results[parts][0]) == pytest.approx(float(results[1][0]), rel=1e-6)
        assert float(results[parts][1]) == pytest.approx(float(results[1][1]), rel=1e-5)


def test_gradients_summed_in_bfloat16_are_its_rounding_off():
    batch = random_batch(np.random.default_rng(0))
    grads = {}
    for dtype in ("float32", "bfloat16"):
        c = small_config(train__grad_accumulation=4, train__accumulation_dtype=dtype)
        grads[dtype], _ = jax.jit(
            lambda params, c=c: gradients(params, batch, jax.random.key(0), c)
        )(fresh_state(c).params)
    for exact, rounded in zip(*map(jax.tree.leaves, grads.values())):
        assert rounded.dtype == jnp.float32
        assert 0 < np.abs(rounded - exact).max() <= 3 * 2**-8 * np.abs(exact).max()


def test_microbatches_change_nothing_on_a_mesh():
    c = small_config()
    parts = small_config(train__grad_accumulation=4, train__batch_size=16)
    one, _ = train(c, mesh_of(1), steps=5)
    many, _ = train(parts, mesh_of(4, data=2, fsdp=2), steps=5)
    np.testing.assert_allclose(many, one, rtol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(poison):
    c = small_config(train__ema=0.9)
    state = fresh_state(c)
    batch = random_batch(np.random.default_rng(0))
    bad = batch | {"weights": batch["weights"] + poison}
    new, metrics = one_step(c, state, bad)
    assert int(new.skipped) == 1
    assert int(new.step) == 1
    assert not np.isfinite(metrics["loss"])
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, name), getattr(state, name))


def test_a_batch_of_padding_has_loss_0_and_moves_nothing_by_gradient():
    c = small_config(optim__weight_decay=0.0)
    state = fresh_state(c)
    batch = random_batch(np.random.default_rng(0))
    new, metrics = one_step(c, state, batch | {"weights": np.zeros_like(batch["weights"])})
    assert float(metrics["loss"]) == 0.0
    assert float(metrics["grad_norm"]) == 0.0
    assert int(new.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


def test_clipping_bounds_the_gradient_and_reports_the_norm_before():
    batch = random_batch(np.random.default_rng(0))
    moments = []
    for clip in (0.0, 1e-3):
        c = small_config(optim__clip=clip)
        state, metrics = one_step(c, fresh_state(c), batch)
        moments.append(
            np.sqrt(sum(float(jnp.sum(m**2)) for m in jax.tree.leaves(state.opt_state[0].mu)))
            / (1 - c.optim.b1)
        )
    assert moments[0] == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)
    assert moments[1] == pytest.approx(1e-3, rel=1e-2)


def test_the_average_of_parameters():
    c = small_config(train__ema=0.75)
    first = fresh_state(c)
    new, _ = one_step(c, first, random_batch(np.random.default_rng(0)))
    want = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, first.params, new.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), new.ema, want)


def test_dropout_acts_in_training_and_not_in_evaluation():
    batch = random_batch(np.random.default_rng(0))
    on = small_config(model__dropout=0.5)
    off = small_config()
    state = fresh_state(off)
    assert one_step(on, state, batch)[1]["loss"] != one_step(off, state, batch)[1]["loss"]
    assert (
        eval_step(state.params, batch, config=on)[0]["loss"]
        == eval_step(state.params, batch, config=off)[0]["loss"]
    )


def test_the_state_is_described_exactly_before_it_exists():
    c = small_config(optim__name="muon", train__ema=0.9)
    abstract, axes = abstract_state(c)

    def describe(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert describe(abstract) == describe(fresh_state(c))
    assert isinstance(axes, State)


def test_one_mesh_axis_never_shards_two_dimensions():
    with pytest.raises(ValueError, match="two dimensions"):
        partition_spec(("heads", "mlp"), (8, 8), mesh_of(tensor=8))


def test_a_dimension_that_is_not_divided_stays_whole():
    assert partition_spec(("norm", "heads"), (16, 3), mesh_of(fsdp=4, tensor=2)) == jax.P(
        None, None
    )


def test_a_golden_step():
    """A change of these numbers is a change of what every run computes: make it on purpose."""
    c = small_config()
    state, metrics = one_step(c, fresh_state(c), random_batch(np.random.default_rng(0)))
    total = sum(float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(state.params))
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), total) == pytest.approx(
        GOLDEN, rel=1e-5
    )


GOLDEN = (4.1713886, 0.8273115, 3514.7295589)
