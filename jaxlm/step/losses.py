"""Losses: (model, params, batch) -> sums over what counts, so that they add up over microbatches, batches and hosts.

C labels, M examples of a row; the other letters are those of jaxlm/models/__init__.py. To add one, write a function
with the arguments of `token_loss` and name it in LOSSES.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxlm.config.tasks import task_of
from jaxlm.data.transforms import ALLOWED, START, STOP
from jaxlm.kernels.attention import NEVER
from jaxlm.kernels.cross_entropy import Mix, divergence
from jaxlm.models import build_section, nats_of, weighted_nats_of
from jaxlm.models.transformer import unembedding
from jaxlm.models.vectors import pair_scores
from jaxlm.parallel.context_parallel import zigzag
from jaxlm.parallel.mesh import even_mesh

IN_ORDER = (
    "tokens",
    "targets",
    "positions",
    "segments",
    "reach",
    "weights",
)  # have the positions of a row
EXTRA = (
    "reach",
    "enc_tokens",
    "enc_segments",
    "enc_positions",
)  # what some models are told besides


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
    moved = []
    for name in IN_ORDER:
        if name in batch and not (name == "weights" and "labels" in batch):
            moved.append(name)
    return batch | {name: batch[name][:, places] for name in moved}, places


def arguments(batch: dict, config: ConfigDict) -> tuple[tuple, dict]:
    """What a model is called with, but for its parameters: of rows, see `rows_of`."""
    seen = {}
    for name in EXTRA:
        if name in batch:
            seen["reach_BT" if name == "reach" else name] = batch[name]
    if not config.data.isolate:
        return (batch["tokens"], None, None), {
            name: x for name, x in seen.items() if name != "enc_segments"
        }
    return (batch["tokens"], batch["segments"], batch["positions"]), seen


def rows_of(batch: dict) -> dict:
    """The batch with [B, T] tokens: of pairs [B, 2, T], 2 B rows."""
    if batch["tokens"].ndim == 2:
        return batch
    return {
        name: batch[name].reshape(-1, batch[name].shape[-1]) for name in IN_ORDER if name in batch
    }


def forward(
    model: nn.Module, params, batch, places, config: ConfigDict, dropout_key=None
) -> tuple[jax.Array, dict]:
    """(final hidden states [B, T, D], what the layers say of their routing). batch, places: `mesh_order`'s.

    dropout_key: a key while training, None for evaluation.
    """
    train = dropout_key is not None
    given, seen = arguments(batch, config)
    (x_BTD, _), made = model.apply(
        {"params": params},
        *given,
        places_T=places,
        train=train,
        rngs={"dropout": dropout_key} if train else None,
        mutable=["aux"],
        **seen,
    )
    return x_BTD, made.get("aux", {})


def token_losses(model: nn.Module, params, batch, places, config: ConfigDict, dropout_key=None):
    """(nats of each target, log of the softmax's denominator, final hidden states, what the layers say of routing).

    The first two are float32 [B, T], unweighted. The arguments are those of `forward`.
    """
    x_BTD, aux = forward(model, params, batch, places, config, dropout_key)
    return *nats_of(model, params, x_BTD, batch["targets"], config.train.loss_chunk), x_BTD, aux


def token_loss(
    model: nn.Module, params, batch, config: ConfigDict, dropout_key=None, teacher=None
) -> dict:
    """Weighted sums over the batch, float32: `loss` in nats, `weight`, the sum of the weights, and `objective`.

    The objective is what is differentiated: the loss, smoothed and mixed with the divergence from a teacher where the
    task says so, z-loss and the routers' losses. `routing`: see `routing_sums`. teacher: its parameters.
    """
    batch, places = mesh_order(batch)
    x_BTD, aux = forward(model, params, batch, places, config, dropout_key)
    weights_BT = batch["weights"]
    task = config.task
    more = {}
    own = 1 - task.distill
    smooth = task.label_smoothing
    objective, loss_BT, _ = weighted_nats_of(
        model, params, x_BTD, batch["targets"], weights_BT,
        Mix(own * (1 - smooth), own * smooth, config.train.z_loss), config.train.loss_chunk,
    )  # fmt: skip
    if smooth:  # the mean logit is that of the mean row of the table
        mean_BT = jnp.einsum(
            "BTD,D->BT", x_BTD.astype(jnp.float32), jnp.mean(unembedding(params), axis=0)
        )
        objective -= own * smooth * jnp.sum(weights_BT * mean_BT)
    if task.distill:
        section = teacher_section(config)
        y_BTD, _ = forward(build_section(section), teacher, batch, places, config)
        tables = (
            (x_BTD, unembedding(params), config.model.logit_softcap),
            (y_BTD, unembedding(teacher), section.logit_softcap),
        )
        more["divergence"] = jnp.sum(weights_BT * divergence(*tables, task.temperature))
        objective += task.distill * more["divergence"]
    router_loss, routing = routing_sums(aux, jnp.sum(weights_BT, axis=1), config)
    return more | {
        "objective": objective + router_loss,
        "loss": jnp.sum(weights_BT * loss_BT),
        "weight": jnp.sum(weights_BT),
        "routing": routing,
    }


def teacher_section(config: ConfigDict):
    """The `model` section of config.task.teacher_model."""
    return ConfigDict(dict(config.task.teacher_model))


def routing_sums(aux: dict, weight_B: jax.Array, config: ConfigDict) -> tuple[jax.Array, dict]:
    """(the routers' weighted losses, {"load": tree of token counts [layers, experts], "dropped": assignments})."""
    layers = {"balance_B": config.model.balance_loss, "router_z_B": config.model.router_z_loss}
    loss = jnp.zeros(())
    dropped = jnp.zeros(())
    load = {}
    for path, leaf in jax.tree.leaves_with_path(aux):
        name = path[-1].key
        if name in layers:
            loss += layers[name] * jnp.sum(weight_B * leaf)
        elif name == "dropped":
            dropped += jnp.sum(leaf)
        elif name == "load_E":
            load[path[1].key] = leaf
    return loss, {"load": load, "dropped": dropped} if load else {}


# ---------------------------------------------------------------- labels of examples and of tokens


def apply_head(params, x) -> jax.Array:
    """float32 [..., C]."""
    head = params["head"]
    return jnp.dot(x.astype(jnp.float32), head["kernel"].astype(jnp.float32)) + head["bias"]


def pool(x_BTD, segments_BT, positions_BT, examples: int, kind: str) -> jax.Array:
    """float32 [B, M, D]: one vector for each segment 1 ... M of a row, whatever the order of its positions."""
    x_BTD = x_BTD.astype(jnp.float32)
    mine_BMT = segments_BT[:, None] == jnp.arange(1, examples + 1)[:, None]
    if kind == "max":
        top_BMD = jnp.max(jnp.where(mine_BMT[..., None], x_BTD[:, None], NEVER), axis=2)
        return jnp.where(jnp.any(mine_BMT, axis=2)[..., None], top_BMD, 0)
    if kind == "first":
        mine_BMT &= positions_BT[:, None] == 0
    if kind == "last":
        places_BMT = jnp.where(mine_BMT, positions_BT[:, None], -1)
        mine_BMT &= places_BMT == jnp.max(places_BMT, axis=2, keepdims=True)
    if kind != "sum":
        count_BM = jnp.maximum(jnp.sum(mine_BMT, axis=2), 1)
    else:
        count_BM = jnp.ones(mine_BMT.shape[:2])
    return jnp.einsum("BMT,BTD->BMD", mine_BMT.astype(jnp.float32), x_BTD) / count_BM[..., None]


def class_nats(logits, labels, task) -> tuple[jax.Array, jax.Array]:
    """(cross-entropy, what is learned: smoothed, focal). logits: [..., C], labels: int [...]."""
    log_p = jax.nn.log_softmax(logits)
    nats = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    learned = (1 - task.label_smoothing) * nats - task.label_smoothing * jnp.mean(log_p, axis=-1)
    return nats, learned * (1 - jnp.exp(-nats)) ** task.focal if task.focal else learned


def binary_nats(logits, labels, task) -> tuple[jax.Array, jax.Array]:
    """The same for labels [..., C] that may hold together, summed over them."""
    nats = -(labels * jax.nn.log_sigmoid(logits) + (1 - labels) * jax.nn.log_sigmoid(-logits))
    if task.focal:
        learned = nats * (1 - jnp.exp(-nats)) ** task.focal
    else:
        learned = nats
    return jnp.sum(nats, axis=-1), jnp.sum(learned, axis=-1)


def squares(outputs, labels, task) -> tuple[jax.Array, jax.Array]:
    error = jnp.square(outputs[..., 0] - labels)
    return error, error


SCORES = {  # Task.loss -> scores of the head's outputs
    "cross_entropy": jax.nn.softmax,
    "binary_cross_entropy": jax.nn.sigmoid,
    "squared_error": lambda x: x,
}
NATS = {
    "cross_entropy": class_nats,
    "binary_cross_entropy": binary_nats,
    "squared_error": squares,
}


def label_loss(
    model: nn.Module, params, batch, config: ConfigDict, dropout_key=None, teacher=None
) -> dict:
    """As token_loss, of labels of whole examples [B, M] or of tokens [B, T]. `scores`: [B, M or T, C].

    The loss is in nats (regression: squares). Distillation: the divergence from the teacher's classes.
    """
    batch, places = mesh_order(batch)
    x_BTD, aux = forward(model, params, batch, places, config, dropout_key)
    outputs = logits_of_labels(params, x_BTD, batch, config.model.pooling)
    labels = batch["labels"] if "labels" in batch else batch["targets"]
    kind = task_of(config).loss
    nats, learned = NATS[kind](outputs, labels, config.task)
    more = {}
    weights = batch["weights"]
    if config.task.distill:
        section = teacher_section(config)
        T = config.task.temperature
        y_BTD, _ = forward(build_section(section), teacher, batch, places, config)
        taught = logits_of_labels(teacher, y_BTD, batch, section.pooling)
        theirs, mine = (jax.nn.log_softmax(z / T) for z in (taught, outputs))
        apart = T**2 * jnp.sum(jnp.exp(theirs) * (theirs - mine), axis=-1)
        learned = (1 - config.task.distill) * learned + config.task.distill * apart
        more["divergence"] = jnp.sum(weights * apart)
    if task_of(config).has_classes:
        more["accuracy"] = jnp.sum(weights * (jnp.argmax(outputs, axis=-1) == labels))
    tokens_B = jnp.sum(
        batch["segments"] != 0, axis=1
    )  # the routers' losses are of tokens: as much as one weight each
    router_loss, routing = routing_sums(aux, jnp.sum(weights, axis=1) * (tokens_B > 0), config)
    return more | {
        "objective": jnp.sum(weights * learned) + router_loss,
        "loss": jnp.sum(weights * nats),
        "weight": jnp.sum(weights),
        "routing": routing,
        "scores": in_row_order(SCORES[kind](outputs), None if "labels" in batch else places),
    }


def logits_of_labels(params, x_BTD, batch, pooling: str) -> jax.Array:
    """float32 [B, M, C] of examples, or [B, T, C] of tokens."""
    if "labels" in batch:
        x_BTD = pool(
            x_BTD, batch["segments"], batch["positions"], batch["labels"].shape[1], pooling
        )
    return apply_head(params, x_BTD)


def in_row_order(x_BT, places):
    if places is None:
        return x_BT
    return jnp.zeros_like(x_BT).at[:, places].set(x_BT)


def span_loss(
    model: nn.Module, params, batch, config: ConfigDict, dropout_key=None, teacher=None
) -> dict:
    """As token_loss, of the first and the last token of an answer, each chosen among its example's allowed tokens.

    Half the sum of both (Devlin et al. 2019), in nats an example. `scores`: log-probabilities [B, T, 2].
    """
    batch, places = mesh_order(batch)
    x_BTD, aux = forward(model, params, batch, places, config, dropout_key)
    bits_BT = batch["targets"]
    segments_BT = batch["segments"]
    logits_BTC = jnp.where((bits_BT & ALLOWED != 0)[..., None], apply_head(params, x_BTD), NEVER)
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    log_z_BTC = jax.nn.logsumexp(jnp.where(same_BTS[..., None], logits_BTC[:, None], NEVER), axis=2)
    nats_BTC = log_z_BTC - logits_BTC
    given_BTC = jnp.stack([bits_BT & START != 0, bits_BT & STOP != 0], axis=-1)
    learned_BT = jnp.sum(jnp.where(given_BTC, nats_BTC, 0), axis=-1) / 2
    loss = jnp.sum(jnp.where(segments_BT != 0, learned_BT, 0))
    router_loss, routing = routing_sums(aux, jnp.sum(batch["weights"], axis=1), config)
    return {
        "objective": loss + router_loss,
        "loss": loss,
        "weight": jnp.sum(batch["weights"]),
        "routing": routing,
        "scores": in_row_order(-nats_BTC, places),
    }


# ---------------------------------------------------------------- preferences


def preference_loss(
    model: nn.Module, params, batch, config: ConfigDict, dropout_key=None, teacher=None
) -> dict:
    """Direct preference optimization (Rafailov et al. 2023) of pairs [B, 2, T], chosen and rejected, M in a row.

    teacher: parameters of the reference model. Besides: `accuracy`, the part of the pairs in which the chosen one gains
    more over the reference, and `margin`, by how much, times beta.
    """
    pairs, places = mesh_order(rows_of(batch))
    M = config.data.examples_per_row

    def log_likelihood(model, params, key):
        nats_BT, _, _, aux = token_losses(model, params, pairs, places, config, key)
        nats_BT *= pairs["weights"]
        mine_BMT = pairs["segments"][:, None] == jnp.arange(1, M + 1)[:, None]
        return -jnp.einsum("BMT,BT->BM", mine_BMT.astype(jnp.float32), nats_BT).reshape(
            -1, 2, M
        ), aux

    policy, aux = log_likelihood(model, params, dropout_key)
    reference, _ = jax.lax.stop_gradient(
        log_likelihood(build_section(teacher_section(config)), teacher, None)
    )
    gain_BPM = policy - reference
    margin_BM = config.task.beta * (gain_BPM[:, 0] - gain_BPM[:, 1])
    counts_BM = jnp.any(
        batch["segments"][:, 0, None] == jnp.arange(1, M + 1)[:, None], axis=2
    ).astype(jnp.float32)
    smooth = (
        config.task.label_smoothing
    )  # conservative DPO: part of the preferences is taken to be wrong
    learned_BM = -(1 - smooth) * jax.nn.log_sigmoid(margin_BM) - smooth * jax.nn.log_sigmoid(
        -margin_BM
    )
    router_loss, routing = routing_sums(aux, jnp.repeat(jnp.sum(counts_BM, axis=1) / 2, 2), config)
    return {
        "objective": jnp.sum(counts_BM * learned_BM) + router_loss,
        "loss": jnp.sum(counts_BM * -jax.nn.log_sigmoid(margin_BM)),
        "accuracy": jnp.sum(counts_BM * (margin_BM > 0)),
        "margin": jnp.sum(counts_BM * margin_BM),
        "weight": jnp.sum(counts_BM),
        "routing": routing,
        "scores": margin_BM,
    }


# ---------------------------------------------------------------- pairs of words

GLOVE_POWER = 0.75  # of the weight of a count below task.x_max (Pennington et al. 2014)


def negatives_loss(
    model: nn.Module, params, batch, config: ConfigDict, dropout_key=None, teacher=None
) -> dict:
    """As token_loss: a context is told from task.negatives words that were drawn (Mikolov et al. 2013, equation 4).

    In nats, summed over the context and the words drawn, of which those that are the context itself do not count.
    """
    x_BTD, _ = forward(model, params, batch, None, config, dropout_key)
    true_BT1 = batch["targets"][..., None]
    drawn_BTN = jnp.swapaxes(batch["negatives"], 1, 2)
    contexts_BTN = jnp.concatenate([true_BT1, drawn_BTN], axis=-1)
    scores_BTN = pair_scores(params, x_BTD, batch["tokens"], contexts_BTN)
    true_BT = -jax.nn.log_sigmoid(scores_BTN[..., 0])
    false_BTN = -jax.nn.log_sigmoid(-scores_BTN[..., 1:])
    nats_BT = true_BT + jnp.sum(jnp.where(drawn_BTN == true_BT1, 0, false_BTN), axis=-1)
    return plain_sums(nats_BT, batch["weights"])


def glove_loss(
    model: nn.Module, params, batch, config: ConfigDict, dropout_key=None, teacher=None
) -> dict:
    """As token_loss: f(X) (w_i w~_j + b_i + b~_j - log X)^2 of a pair, f = min(1, (X / x_max)^0.75).

    Equation 8 of Pennington et al. 2014. batch: of jaxlm.data.pairs.
    """
    x_BTD, _ = forward(model, params, batch, None, config, dropout_key)
    counts_BT = batch["counts"]
    scores_BT = pair_scores(params, x_BTD, batch["tokens"], batch["targets"][..., None])[..., 0]
    error_BT = scores_BT - jnp.log(jnp.where(counts_BT > 0, counts_BT, 1))  # 0: padding
    weight_BT = jnp.minimum(1, (counts_BT / config.task.x_max) ** GLOVE_POWER)
    return plain_sums(weight_BT * jnp.square(error_BT), batch["weights"])


def plain_sums(loss_BT, weights_BT) -> dict:
    loss = jnp.sum(weights_BT * loss_BT)
    return {"objective": loss, "loss": loss, "weight": jnp.sum(weights_BT), "routing": {}}


LOSSES = {  # Task.loss -> its function
    "token": token_loss,
    "cross_entropy": label_loss,
    "binary_cross_entropy": label_loss,
    "squared_error": label_loss,
    "span": span_loss,
    "preference": preference_loss,
    "glove": glove_loss,
}


def loss_of(config: ConfigDict):
    task = task_of(config)
    if config.task.negatives and "task.negatives" in task.keys:
        return negatives_loss
    return LOSSES[task.loss]


def total_weight(batch: dict, config: ConfigDict) -> jax.Array:
    """What the loss of a batch is divided by: the sum of its weights; of preferences, the pairs."""
    if task_of(config).is_preference:
        first = partial(jnp.max, axis=-1)(batch["segments"][:, 0])
        return jnp.maximum(jnp.sum(first).astype(jnp.float32), 1.0)
    return jnp.maximum(jnp.sum(batch["weights"]), 1.0)
