"""Gradients of a batch in microbatches, one after the other, so that only one of them needs memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxlm.parallel.pipeline_parallel import split_rows


def accumulate(
    objective: Callable,
    params: dict,
    batch: dict,
    key: jax.Array,
    config: ConfigDict,
) -> tuple[dict, dict]:
    """(gradients, sums) of objective(params, batch, key) -> (float32 scalar, tree of sums over the batch).

    Both are summed over train.grad_accumulation microbatches, each with a key of its own. The sum of gradients is kept
    in train.accumulation_dtype and returned in float32. One microbatch: gradients in the dtype of the parameters.
    """
    parts = config.train.grad_accumulation
    gradient = jax.grad(objective, has_aux=True)
    if parts == 1:
        return gradient(params, batch, key)
    grads, sums = jax.eval_shape(gradient, params, batch, key)
    grads = optax.tree.zeros_like(grads, config.train.accumulation_dtype)
    sums = optax.tree.zeros_like(sums, jnp.float32)

    def add(totals, microbatch):
        rows, key = microbatch
        return jax.tree.map(add_to, totals, gradient(params, rows, key)), None

    microbatches = (split_rows(batch, parts), jax.random.split(key, parts))
    totals, _ = jax.lax.scan(add, (grads, sums), microbatches)
    grads, sums = totals
    return optax.tree.cast(grads, jnp.float32), sums


def add_to(total: jax.Array, x: jax.Array) -> jax.Array:
    """total + x, added in float32, in the dtype of total."""
    return (total.astype(jnp.float32) + x).astype(total.dtype)
