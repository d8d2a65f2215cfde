"""Losses of labels: of whole examples, of tokens, and of the span of an answer.

C labels, M examples of a row; the other letters are those of jaxlm/models/__init__.py.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxlm.config.tasks import task_of
from jaxlm.data.transforms import ALLOWED, START, STOP
from jaxlm.kernels.attention import NEVER
from jaxlm.step.forward import example_masks, forward, forward_teacher, mesh_order, routing_sums


def apply_head(params: dict, x: jax.Array) -> jax.Array:
    """float32 [..., D] -> [..., C]."""
    head = params["head"]
    kernel = head["kernel"].astype(jnp.float32)
    return jnp.dot(x.astype(jnp.float32), kernel) + head["bias"]


def pool(
    x_BTD: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    examples: int,
    kind: str,
) -> jax.Array:
    """float32 [B, M, D]: one vector for each segment 1 ... M of a row, whatever the order of its positions.

    kind: max, mean, sum, first or last.
    """
    x_BTD = x_BTD.astype(jnp.float32)
    mask_BMT = example_masks(segments_BT, examples)
    if kind == "max":
        own_BMTD = jnp.where(mask_BMT[..., None], x_BTD[:, None], NEVER)
        top_BMD = jnp.max(own_BMTD, axis=2)
        used_BM = jnp.any(mask_BMT, axis=2)
        return jnp.where(used_BM[..., None], top_BMD, 0)
    if kind == "first":
        mask_BMT &= positions_BT[:, None] == 0
    if kind == "last":
        places_BMT = jnp.where(mask_BMT, positions_BT[:, None], -1)
        mask_BMT &= places_BMT == jnp.max(places_BMT, axis=2, keepdims=True)
    count_BM = jnp.maximum(jnp.sum(mask_BMT, axis=2), 1)
    if kind == "sum":
        count_BM = jnp.ones(mask_BMT.shape[:2])
    sum_BMD = jnp.einsum("BMT,BTD->BMD", mask_BMT.astype(jnp.float32), x_BTD)
    return sum_BMD / count_BM[..., None]


def class_nats(
    logits: jax.Array,
    labels: jax.Array,
    task: ConfigDict,
) -> tuple[jax.Array, jax.Array]:
    """(cross-entropy, what is learned: smoothed, focal) in nats. logits: [..., C], labels: int [...]."""
    log_p = jax.nn.log_softmax(logits)
    label_log_p = jnp.take_along_axis(log_p, labels[..., None], axis=-1)
    nats = -label_log_p[..., 0]
    smooth = task.label_smoothing
    learned = (1 - smooth) * nats - smooth * jnp.mean(log_p, axis=-1)
    return nats, focal(learned, nats, task)


def binary_nats(
    logits: jax.Array,
    labels: jax.Array,
    task: ConfigDict,
) -> tuple[jax.Array, jax.Array]:
    """As class_nats, of labels [..., C] that may hold together, summed over them."""
    yes = jax.nn.log_sigmoid(logits)
    no = jax.nn.log_sigmoid(-logits)
    nats = -(labels * yes + (1 - labels) * no)
    learned = focal(nats, nats, task)
    return jnp.sum(nats, axis=-1), jnp.sum(learned, axis=-1)


def focal(
    loss: jax.Array,
    nats: jax.Array,
    task: ConfigDict,
) -> jax.Array:
    """The loss, less of what is already probable: (1 - p)^task.focal of it (Lin et al. 2017)."""
    if not task.focal:
        return loss
    return loss * (1 - jnp.exp(-nats)) ** task.focal


def squares(
    outputs: jax.Array,
    labels: jax.Array,
    task: ConfigDict,
) -> tuple[jax.Array, jax.Array]:
    """As class_nats, of numbers: the squared errors, twice."""
    error = jnp.square(outputs[..., 0] - labels)
    return error, error


# Task.loss -> the scores of the head's outputs, and their losses.
SCORES = {
    "cross_entropy": jax.nn.softmax,
    "binary_cross_entropy": jax.nn.sigmoid,
    "squared_error": lambda outputs: outputs,
}
NATS = {
    "cross_entropy": class_nats,
    "binary_cross_entropy": binary_nats,
    "squared_error": squares,
}


def label_loss(
    model: nn.Module,
    params: dict,
    batch: dict,
    config: ConfigDict,
    dropout_key: jax.Array | None = None,
    teacher: dict | None = None,
) -> dict:
    """As token_loss, of labels of whole examples [B, M] or of tokens [B, T]. `scores`: [B, M or T, C].

    The loss is in nats (regression: squares). Distillation: the divergence from the teacher's classes.
    """
    batch, places = mesh_order(batch)
    x_BTD, aux = forward(model, params, batch, places, config, dropout_key)
    task = config.task
    kind = task_of(config).loss
    outputs = logits_of_labels(params, x_BTD, batch, config.model.pooling)
    scores = SCORES[kind](outputs)
    if "labels" in batch:
        labels = batch["labels"]
    else:
        labels = batch["targets"]
        scores = in_row_order(scores, places)
    nats, learned = NATS[kind](outputs, labels, task)
    weights = batch["weights"]
    sums = {}
    if task.distill:
        y_BTD, section = forward_teacher(teacher, batch, places, config)
        targets = logits_of_labels(teacher, y_BTD, batch, section.pooling)
        apart = class_divergence(outputs, targets, task.temperature)
        learned = (1 - task.distill) * learned + task.distill * apart
        sums["divergence"] = jnp.sum(weights * apart)
    if task_of(config).has_classes:
        right = jnp.argmax(outputs, axis=-1) == labels
        sums["accuracy"] = jnp.sum(weights * right)
    # A row's routers weigh as much as its labels, and nothing in a row of padding.
    tokens_B = jnp.sum(batch["segments"] != 0, axis=1)
    weight_B = jnp.sum(weights, axis=1) * (tokens_B > 0)
    router_loss, routing = routing_sums(aux, weight_B, config)
    return sums | {
        "objective": jnp.sum(weights * learned) + router_loss,
        "loss": jnp.sum(weights * nats),
        "weight": jnp.sum(weights),
        "routing": routing,
        "scores": scores,
    }


def logits_of_labels(
    params: dict,
    x_BTD: jax.Array,
    batch: dict,
    pooling: str,
) -> jax.Array:
    """float32 [B, M, C] of examples, or [B, T, C] of tokens."""
    if "labels" not in batch:
        return apply_head(params, x_BTD)
    examples = batch["labels"].shape[1]
    x_BMD = pool(x_BTD, batch["segments"], batch["positions"], examples, pooling)
    return apply_head(params, x_BMD)


def class_divergence(
    logits: jax.Array,
    targets: jax.Array,
    temperature: float,
) -> jax.Array:
    """Nats [...] by which classes [..., C] diverge from a teacher's, times temperature^2 (Hinton et al. 2015)."""
    log_q = jax.nn.log_softmax(targets / temperature)
    log_p = jax.nn.log_softmax(logits / temperature)
    apart = jnp.exp(log_q) * (log_q - log_p)
    return temperature**2 * jnp.sum(apart, axis=-1)


def in_row_order(x_BT: jax.Array, places: jax.Array | None) -> jax.Array:
    """[B, T, ...] in the order of the rows, from that of `mesh_order`."""
    if places is None:
        return x_BT
    return jnp.zeros_like(x_BT).at[:, places].set(x_BT)


def span_loss(
    model: nn.Module,
    params: dict,
    batch: dict,
    config: ConfigDict,
    dropout_key: jax.Array | None = None,
    teacher: dict | None = None,
) -> dict:
    """As token_loss, of the first and the last token of an answer, each chosen among its example's allowed tokens.

    Half the sum of both (Devlin et al. 2019), in nats an example. `scores`: log-probabilities [B, T, 2].
    """
    batch, places = mesh_order(batch)
    x_BTD, aux = forward(model, params, batch, places, config, dropout_key)
    bits_BT = batch["targets"]
    segments_BT = batch["segments"]
    allowed_BT = bits_BT & ALLOWED != 0
    logits_BTC = jnp.where(allowed_BT[..., None], apply_head(params, x_BTD), NEVER)
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    beside_BTSC = jnp.where(same_BTS[..., None], logits_BTC[:, None], NEVER)
    nats_BTC = jax.nn.logsumexp(beside_BTSC, axis=2) - logits_BTC
    start_BT = bits_BT & START != 0
    stop_BT = bits_BT & STOP != 0
    given_BTC = jnp.stack([start_BT, stop_BT], axis=-1)
    given_nats_BTC = jnp.where(given_BTC, nats_BTC, 0)
    learned_BT = jnp.sum(given_nats_BTC, axis=-1) / 2
    loss = jnp.sum(jnp.where(segments_BT != 0, learned_BT, 0))
    router_loss, routing = routing_sums(aux, jnp.sum(batch["weights"], axis=1), config)
    return {
        "objective": loss + router_loss,
        "loss": loss,
        "weight": jnp.sum(batch["weights"]),
        "routing": routing,
        "scores": in_row_order(-nats_BTC, places),
    }
