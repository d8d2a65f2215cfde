"""A batch through a model: its rows as the mesh holds them, and final hidden states.

The letters are those of jaxlm/models/__init__.py.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxlm.models import build_section
from jaxlm.parallel.context_parallel import zigzag
from jaxlm.parallel.mesh import even_mesh

# Arrays whose last dimension is the positions of a row.
PER_POSITION = ("tokens", "targets", "positions", "segments", "reach", "weights")
# Further inputs of some models: the name in a batch, and the model's name for it.
FURTHER_INPUTS = {
    "reach": "reach_BT",
    "enc_tokens": "enc_tokens",
    "enc_segments": "enc_segments",
    "enc_positions": "enc_positions",
}


def mesh_order(batch: dict) -> tuple[dict, jax.Array | None]:
    """(batch, places): positions in the order in which the mesh holds them, and that order, [T]; None: unchanged.

    Zig-zag over the sequence axis, so that under the causal mask every device has the same work.
    """
    B, T = batch["tokens"].shape
    mesh = even_mesh(B, T)
    parts = 1
    if mesh is not None:
        parts = mesh.shape["sequence"]
    if parts == 1 or T % (2 * parts):
        return batch, None
    places = zigzag(T, parts)
    ordered = dict(batch)
    for name in PER_POSITION:
        of_examples = name == "weights" and "labels" in batch
        if name in batch and not of_examples:
            ordered[name] = batch[name][:, places]
    return ordered, places


def arguments(batch: dict, config: ConfigDict) -> tuple[tuple, dict]:
    """(positional, keyword) arguments of a model, but for its parameters. batch: of [B, T] rows, see `rows_of`."""
    further = {}
    for name, argument in FURTHER_INPUTS.items():
        if name in batch:
            further[argument] = batch[name]
    if config.data.isolate:
        return (batch["tokens"], batch["segments"], batch["positions"]), further
    further.pop("enc_segments", None)
    return (batch["tokens"], None, None), further


def rows_of(batch: dict) -> dict:
    """The batch with [B, T] tokens. Of pairs [B, 2, T]: 2 B rows."""
    if batch["tokens"].ndim == 2:
        return batch
    rows = {}
    for name in PER_POSITION:
        if name in batch:
            rows[name] = batch[name].reshape(-1, batch[name].shape[-1])
    return rows


def forward(
    model: nn.Module,
    params: dict,
    batch: dict,
    places: jax.Array | None,
    config: ConfigDict,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """(final hidden states [B, T, D], what the layers report of their routing). batch, places: from `mesh_order`.

    dropout_key: a key while training, None for evaluation.
    """
    inputs, further = arguments(batch, config)
    rngs = None
    if dropout_key is not None:
        rngs = {"dropout": dropout_key}
    (x_BTD, _), collections = model.apply(
        {"params": params},
        *inputs,
        places_T=places,
        train=dropout_key is not None,
        rngs=rngs,
        mutable=["aux"],
        **further,
    )
    return x_BTD, collections.get("aux", {})


def forward_teacher(
    teacher: dict,
    batch: dict,
    places: jax.Array | None,
    config: ConfigDict,
) -> tuple[jax.Array, ConfigDict]:
    """(final hidden states [B, T, D] of the teacher, its `model` section). teacher: its parameters."""
    y_BTD, _ = forward(teacher_model(config), teacher, batch, places, config)
    return y_BTD, teacher_section(config)


def teacher_model(config: ConfigDict) -> nn.Module:
    """The model of config.task.teacher_model."""
    return build_section(teacher_section(config))


def teacher_section(config: ConfigDict) -> ConfigDict:
    """The `model` section of config.task.teacher_model."""
    return ConfigDict(dict(config.task.teacher_model))


def routing_sums(
    aux: dict,
    weight_B: jax.Array,
    config: ConfigDict,
) -> tuple[jax.Array, dict]:
    """(the routers' weighted losses, {"load": tree of token counts [layers, experts], "dropped": assignments}).

    The second is {} for a dense model. aux: from `forward`. weight_B: float32, of each row.
    """
    factors = {"balance_B": config.model.balance_loss, "router_z_B": config.model.router_z_loss}
    loss = jnp.zeros(())
    dropped = jnp.zeros(())
    load = {}
    for path, leaf in jax.tree.leaves_with_path(aux):
        name = path[-1].key
        if name in factors:
            loss += factors[name] * jnp.sum(weight_B * leaf)
        elif name == "dropped":
            dropped += jnp.sum(leaf)
        elif name == "load_E":
            load[path[1].key] = leaf
    if not load:
        return loss, {}
    return loss, {"load": load, "dropped": dropped}


def example_masks(segments_BT: jax.Array, examples: int) -> jax.Array:
    """bool [B, M, T]: which positions belong to the segments 1 ... M of a row."""
    return segments_BT[:, None] == jnp.arange(1, examples + 1)[:, None]
