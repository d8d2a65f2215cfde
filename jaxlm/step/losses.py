"""Losses: (model, params, batch) -> sums over what counts, so that they add up over microbatches, batches and hosts.

M examples of a row; the other letters are those of jaxlm/models/__init__.py. To add one, write a function with the
arguments of `token_loss` and name it in LOSSES.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxlm.config.tasks import task_of
from jaxlm.kernels.cross_entropy import Mix, divergence
from jaxlm.models import nats_of, weighted_nats_of
from jaxlm.models.transformer import unembedding
from jaxlm.models.vectors import pair_scores
from jaxlm.step.forward import (
    example_masks,
    forward,
    forward_teacher,
    mesh_order,
    routing_sums,
    rows_of,
    teacher_model,
)
from jaxlm.step.label_losses import label_loss, span_loss

# ---------------------------------------------------------------- tokens


def token_losses(
    model: nn.Module,
    params: dict,
    batch: dict,
    places: jax.Array | None,
    config: ConfigDict,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, dict]:
    """(nats of each target, log of the softmax's denominator, final hidden states, what the layers say of routing).

    The first two are float32 [B, T], unweighted. The arguments are those of `forward`.
    """
    x_BTD, aux = forward(model, params, batch, places, config, dropout_key)
    chunk = config.train.loss_chunk
    nats_BT, log_z_BT = nats_of(model, params, x_BTD, batch["targets"], chunk)
    return nats_BT, log_z_BT, x_BTD, aux


def token_loss(
    model: nn.Module,
    params: dict,
    batch: dict,
    config: ConfigDict,
    dropout_key: jax.Array | None = None,
    teacher: dict | None = None,
) -> dict:
    """Weighted sums over the batch, float32: `loss` in nats, `weight`, the sum of the weights, and `objective`.

    The objective is what is differentiated: the loss, smoothed and mixed with the divergence from a teacher where the
    task says so, z-loss and the routers' losses. `routing`: see `routing_sums`. teacher: its parameters.
    """
    batch, places = mesh_order(batch)
    x_BTD, aux = forward(model, params, batch, places, config, dropout_key)
    weights_BT = batch["weights"]
    task = config.task
    own = 1 - task.distill
    smooth = task.label_smoothing
    objective, loss_BT, _ = weighted_nats_of(
        model,
        params,
        x_BTD,
        batch["targets"],
        weights_BT,
        Mix(own * (1 - smooth), own * smooth, config.train.z_loss),
        config.train.loss_chunk,
    )
    sums = {}
    if smooth:
        mean_BT = mean_logits(params, x_BTD)
        objective -= own * smooth * jnp.sum(weights_BT * mean_BT)
    if task.distill:
        y_BTD, section = forward_teacher(teacher, batch, places, config)
        student = (x_BTD, unembedding(params), config.model.logit_softcap)
        target = (y_BTD, unembedding(teacher), section.logit_softcap)
        apart_BT = divergence(student, target, task.temperature)
        sums["divergence"] = jnp.sum(weights_BT * apart_BT)
        objective += task.distill * sums["divergence"]
    router_loss, routing = routing_sums(aux, jnp.sum(weights_BT, axis=1), config)
    return sums | {
        "objective": objective + router_loss,
        "loss": jnp.sum(weights_BT * loss_BT),
        "weight": jnp.sum(weights_BT),
        "routing": routing,
    }


def mean_logits(params: dict, x_BTD: jax.Array) -> jax.Array:
    """float32 [B, T]: the mean over the vocabulary, which is the logit of the mean row of the table."""
    mean_D = jnp.mean(unembedding(params), axis=0)
    return jnp.einsum("BTD,D->BT", x_BTD.astype(jnp.float32), mean_D)


# ---------------------------------------------------------------- preferences


def preference_loss(
    model: nn.Module,
    params: dict,
    batch: dict,
    config: ConfigDict,
    dropout_key: jax.Array | None = None,
    teacher: dict | None = None,
) -> dict:
    """Direct preference optimization (Rafailov et al. 2023) of pairs [B, 2, T], chosen and rejected, M in a row.

    teacher: parameters of the reference model. Besides: `accuracy`, the part of the pairs in which the chosen one gains
    more over the reference, and `margin`, by how much, times beta. `scores`: the margins [B, M].
    """
    policy_BPM, aux = log_likelihoods(model, params, batch, config, dropout_key)
    reference_BPM, _ = log_likelihoods(teacher_model(config), teacher, batch, config, None)
    gain_BPM = policy_BPM - jax.lax.stop_gradient(reference_BPM)
    margin_BM = config.task.beta * (gain_BPM[:, 0] - gain_BPM[:, 1])
    mask_BMT = example_masks(batch["segments"][:, 0], config.data.examples_per_row)
    counts_BM = jnp.any(mask_BMT, axis=2).astype(jnp.float32)
    right_BM = jax.nn.log_sigmoid(margin_BM)
    wrong_BM = jax.nn.log_sigmoid(-margin_BM)
    # Conservative DPO: part of the preferences is taken to be wrong.
    smooth = config.task.label_smoothing
    learned_BM = -(1 - smooth) * right_BM - smooth * wrong_BM
    # A pair is two rows, each of which weighs half.
    weight_B = jnp.repeat(jnp.sum(counts_BM, axis=1) / 2, 2)
    router_loss, routing = routing_sums(aux, weight_B, config)
    return {
        "objective": jnp.sum(counts_BM * learned_BM) + router_loss,
        "loss": jnp.sum(counts_BM * -right_BM),
        "accuracy": jnp.sum(counts_BM * (margin_BM > 0)),
        "margin": jnp.sum(counts_BM * margin_BM),
        "weight": jnp.sum(counts_BM),
        "routing": routing,
        "scores": margin_BM,
    }


def log_likelihoods(
    model: nn.Module,
    params: dict,
    batch: dict,
    config: ConfigDict,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, dict]:
    """(log-likelihood in nats of each answer of the pairs, float32 [B, 2, M]; what the layers report of routing)."""
    rows, places = mesh_order(rows_of(batch))
    nats_BT, _, _, aux = token_losses(model, params, rows, places, config, dropout_key)
    nats_BT *= rows["weights"]
    M = config.data.examples_per_row
    mask_BMT = example_masks(rows["segments"], M).astype(jnp.float32)
    likelihoods = -jnp.einsum("BMT,BT->BM", mask_BMT, nats_BT)
    return likelihoods.reshape(-1, 2, M), aux


# ---------------------------------------------------------------- pairs of words

GLOVE_POWER = 0.75  # of the weight of a count below task.x_max (Pennington et al. 2014)


def negatives_loss(
    model: nn.Module,
    params: dict,
    batch: dict,
    config: ConfigDict,
    dropout_key: jax.Array | None = None,
    teacher: dict | None = None,
) -> dict:
    """As token_loss, of telling a context from task.negatives drawn words (Mikolov et al. 2013, equation 4).

    In nats, summed over the context and the drawn words. Drawn words that are the context itself do not count.
    """
    x_BTD, _ = forward(model, params, batch, None, config, dropout_key)
    true_BT1 = batch["targets"][..., None]
    drawn_BTN = jnp.swapaxes(batch["negatives"], 1, 2)
    contexts_BTN = jnp.concatenate([true_BT1, drawn_BTN], axis=-1)
    scores_BTN = pair_scores(params, x_BTD, batch["tokens"], contexts_BTN)
    true_BT = -jax.nn.log_sigmoid(scores_BTN[..., 0])
    false_BTN = -jax.nn.log_sigmoid(-scores_BTN[..., 1:])
    counted_BTN = jnp.where(drawn_BTN == true_BT1, 0, false_BTN)
    nats_BT = true_BT + jnp.sum(counted_BTN, axis=-1)
    return plain_sums(nats_BT, batch["weights"])


def glove_loss(
    model: nn.Module,
    params: dict,
    batch: dict,
    config: ConfigDict,
    dropout_key: jax.Array | None = None,
    teacher: dict | None = None,
) -> dict:
    """As token_loss: f(X) (w_i w~_j + b_i + b~_j - log X)^2 of a pair, f = min(1, (X / x_max)^0.75).

    Equation 8 of Pennington et al. 2014. batch: of jaxlm.data.pairs.
    """
    x_BTD, _ = forward(model, params, batch, None, config, dropout_key)
    counts_BT = batch["counts"]
    contexts_BT1 = batch["targets"][..., None]
    scores_BT1 = pair_scores(params, x_BTD, batch["tokens"], contexts_BT1)
    log_BT = jnp.log(jnp.where(counts_BT > 0, counts_BT, 1))  # a count of 0 is padding
    error_BT = scores_BT1[..., 0] - log_BT
    weight_BT = jnp.minimum(1, (counts_BT / config.task.x_max) ** GLOVE_POWER)
    return plain_sums(weight_BT * jnp.square(error_BT), batch["weights"])


def plain_sums(loss_BT: jax.Array, weights_BT: jax.Array) -> dict:
    """What a loss returns whose objective is the loss itself."""
    loss = jnp.sum(weights_BT * loss_BT)
    return {
        "objective": loss,
        "loss": loss,
        "weight": jnp.sum(weights_BT),
        "routing": {},
    }


# ---------------------------------------------------------------- the table

LOSSES = {  # Task.loss -> its function
    "token": token_loss,
    "cross_entropy": label_loss,
    "binary_cross_entropy": label_loss,
    "squared_error": label_loss,
    "span": span_loss,
    "preference": preference_loss,
    "glove": glove_loss,
}


def loss_of(config: ConfigDict) -> Callable:
    """The loss of config.task, with the arguments of `token_loss`."""
    task = task_of(config)
    if config.task.negatives and "task.negatives" in task.keys:
        return negatives_loss
    return LOSSES[task.loss]


def total_weight(batch: dict, config: ConfigDict) -> jax.Array:
    """What the loss of a batch is divided by, float32, at least 1: its weights in sum; of preferences, the pairs."""
    if task_of(config).is_preference:
        pairs_B = jnp.max(batch["segments"][:, 0], axis=-1)
        weight = jnp.sum(pairs_B).astype(jnp.float32)
    else:
        weight = jnp.sum(batch["weights"])
    return jnp.maximum(weight, 1.0)


def without(sums: dict, *names: str) -> dict:
    """The entries of other names."""
    return {name: value for name, value in sums.items() if name not in names}


def means_of(sums: dict, weight: jax.Array) -> dict:
    """What a loss reports, divided by the weight of the batch; `routing` stays in sums."""
    means = {"routing": sums["routing"]}
    for name, total in without(sums, "weight", "routing").items():
        means[name] = total / weight
    return means
