"""Losses: (model, params, batch) -> sums over tokens, so that they add up over microbatches, batches and hosts."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxlm.kernels.cross_entropy import cross_entropy
from jaxlm.models.transformer import unembedding


def token_losses(model: nn.Module, params, batch, config: ConfigDict, dropout_key=None) -> tuple[jax.Array, jax.Array]:
    """(nats of each target, log of the softmax's denominator), float32 [B, T], unweighted.

    batch: see jaxlm.data.pipeline. dropout_key: a key while training, None for evaluation.
    """
    train = dropout_key is not None
    x_BTD, _ = model.apply(
        {"params": params},
        batch["tokens"],
        *((batch["segments"], batch["positions"]) if config.data.isolate else (None, None)),
        train=train,
        rngs={"dropout": dropout_key} if train else None,
    )
    options = {"softcap": config.model.logit_softcap, "chunk": config.train.loss_chunk}
    return cross_entropy(x_BTD, unembedding(params), batch["targets"], **options)


def token_loss(model: nn.Module, params, batch, config: ConfigDict, dropout_key=None) -> dict[str, jax.Array]:
    """Weighted sums over the batch, float32: `loss` in nats, `z_loss`, and `weight`, the sum of the weights."""
    loss_BT, log_z_BT = token_losses(model, params, batch, config, dropout_key)
    weights_BT = batch["weights"]
    return {
        "loss": jnp.sum(weights_BT * loss_BT),
        "z_loss": config.train.z_loss * jnp.sum(weights_BT * jnp.square(log_z_BT)),
        "weight": jnp.sum(weights_BT),
    }
