"""Losses: (model, params, batch) -> sums over tokens, so that they add up over microbatches, batches and hosts."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxlm.kernels.cross_entropy import cross_entropy
from jaxlm.models.transformer import unembedding
from jaxlm.parallel.mesh import even_mesh
from jaxlm.parallel.ring import zigzag


def mesh_order(batch: dict) -> tuple[dict, jax.Array | None]:
    """(batch, places): its positions in the order in which the mesh holds them, and that order [T]; None: as they are.

    Zig-zag over the sequence axis, so that under the causal mask every device has the same work.
    """
    T = batch["tokens"].shape[1]
    mesh = even_mesh(*batch["tokens"].shape)
    parts = 1 if mesh is None else mesh.shape["sequence"]
    if parts == 1 or T % (2 * parts):
        return batch, None
    places = zigzag(T, parts)
    return {name: x[:, places] for name, x in batch.items()}, places


def token_losses(model: nn.Module, params, batch, places, config: ConfigDict, dropout_key=None):
    """(nats of each target, log of the softmax's denominator, what the layers say of their routing).

    The first two are float32 [B, T], unweighted. batch: see jaxlm.data.pipeline; it and places are `mesh_order`'s.
    dropout_key: a key while training, None for evaluation.
    """
    train = dropout_key is not None
    (x_BTD, _), made = model.apply(
        {"params": params},
        batch["tokens"],
        *((batch["segments"], batch["positions"]) if config.data.isolate else (None, None)),
        places_T=places,
        train=train,
        rngs={"dropout": dropout_key} if train else None,
        mutable=["aux"],
    )
    options = {"softcap": config.model.logit_softcap, "chunk": config.train.loss_chunk}
    return *cross_entropy(x_BTD, unembedding(params), batch["targets"], **options), made.get("aux", {})


def token_loss(model: nn.Module, params, batch, config: ConfigDict, dropout_key=None) -> dict:
    """Weighted sums over the batch, float32: `loss` in nats, `weight`, the sum of the weights, and `objective`.

    The objective is what is differentiated: the loss, z-loss and the routers' losses. `routing`: see `routing_sums`.
    """
    batch, places = mesh_order(batch)
    loss_BT, log_z_BT, aux = token_losses(model, params, batch, places, config, dropout_key)
    weights_BT = batch["weights"]
    loss = jnp.sum(weights_BT * loss_BT)
    z_loss = config.train.z_loss * jnp.sum(weights_BT * jnp.square(log_z_BT))
    router_loss, routing = routing_sums(aux, jnp.sum(weights_BT, axis=1), config)
    return {
        "objective": loss + z_loss + router_loss,
        "loss": loss,
        "weight": jnp.sum(weights_BT),
        "routing": routing,
    }


def routing_sums(aux: dict, weight_B: jax.Array, config: ConfigDict) -> tuple[jax.Array, dict]:
    """(the routers' weighted losses, {"load": tree of token counts [layers, experts], "dropped": assignments})."""
    layers = {"balance_B": config.model.balance_loss, "router_z_B": config.model.router_z_loss}
    loss, dropped, load = jnp.zeros(()), jnp.zeros(()), {}
    for path, leaf in jax.tree.leaves_with_path(aux):
        name = path[-1].key
        if name in layers:
            loss += layers[name] * jnp.sum(weight_B * leaf)
        elif name == "dropped":
            dropped += jnp.sum(leaf)
        elif name == "load_E":
            load[path[1].key] = leaf
    return loss, {"load": load, "dropped": dropped} if load else {}
