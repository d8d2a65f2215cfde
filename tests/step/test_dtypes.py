"""A step changes no dtype: what it returns can be saved, resumed and evaluated, whatever the config is in."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of, small_config
from ml_collections import FrozenConfigDict

from jaxlm.step.optim import OPTIMIZERS
from jaxlm.step.state import abstract_inputs, create_state, train_step

VARIANTS = {
    "plain": {},
    "unrolled": {"model__scan": False},
    "accumulation": {"train__grad_accumulation": 2},
    "bfloat16 accumulation": {
        "train__grad_accumulation": 2,
        "train__accumulation_dtype": "bfloat16",
    },
    "average": {"train__ema": 0.9999},
    "average and accumulation": {"train__ema": 0.99, "train__grad_accumulation": 2},
    "experts": {"model__num_experts": 4, "model__router": "sigmoid", "model__balance_rate": 1e-3},
    "lora": {"model__lora_rank": 2, "train__ema": 0.99},
    "frozen": {"optim__rates": ((r"embed", 0.0), (r".*", 1.0)), "train__ema": 0.99},
}


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_keeps_tree_shapes_and_dtypes(optimizer, dtype, variant):
    settings = VARIANTS[variant] | {"optim__name": optimizer, "model__param_dtype": dtype}
    config = FrozenConfigDict(small_config(**settings))
    state, batch = abstract_inputs(config, mesh_of(1))
    state = jax.eval_shape(partial(create_state, config))
    new, _ = jax.eval_shape(partial(train_step, config=config), state, batch)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert kinds(new) == kinds(state)


def test_an_average_is_float32():
    config = small_config(model__param_dtype="bfloat16", train__ema=0.9999)
    state = jax.eval_shape(partial(create_state, FrozenConfigDict(config)))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
