"""Mixture-of-experts MLP (Shazeer et al. 2017): a router sends each token to a few of many MLPs; only those run.

E experts, X experts per token, F an expert's width, M rows of one or of several experts. How tokens come to the
devices of their experts: jaxlm/parallel/expert_parallel.py.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.kernels.grouped_matmul import grouped_matmul, multiply_each
from jaxlm.models.layers import (
    ACTIVATIONS,
    MLP,
    activated,
    input_kernels,
    name_product,
    parameter,
)
from jaxlm.parallel.expert_parallel import mixture

SCORES = {  # of one token for every expert
    "softmax": jax.nn.softmax,  # Mixtral: Jiang et al. 2024; Qwen
    "sigmoid": jax.nn.sigmoid,  # DeepSeek-AI 2024 (V3), eq. 15
}
ROUTER_AXES = {"kernel": ("embed", None), "bias": (None,)}
EXPERT_AXES = {
    "up": ("expert", "expert_embed", "mlp"),
    "gate": ("expert", "expert_embed", "mlp"),
    "down": ("expert", "mlp", "expert_embed"),
}


class Router(nn.Module):
    """{"kernel": [D, E]} and, where it is used, "bias" [E]; float32 whatever the model's dtypes."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        c = self.config
        normal = nn.initializers.normal(c.embed_dim**-0.5)
        weights = {"kernel": self.weight("kernel", normal, c.embed_dim, c.num_experts)}
        if c.balance_rate or c.router == "sigmoid":
            weights["bias"] = self.weight("bias", nn.initializers.zeros, c.num_experts)
        return weights

    def weight(self, name: str, init, *shape: int) -> jax.Array:
        init = nn.with_logical_partitioning(init, ROUTER_AXES[name])
        return self.param(name, init, shape, jnp.float32)


class Experts(nn.Module):
    """{"up": [E, D, F], "down": [E, F, D]} and, where the activation is gated, "gate"; scales as in MLP."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        c = self.config
        D = c.embed_dim
        F = c.expert_dim
        kernels = {}
        for name in input_kernels(c):
            kernels[name] = self.kernel(name, (D, F), variance=1 / D)
        depth = 2 * c.num_layers
        kernels["down"] = self.kernel("down", (F, D), variance=1 / (F * depth))
        return kernels

    def kernel(self, name: str, shape: tuple[int, int], variance: float) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(math.sqrt(variance))
        return parameter(self, name, init, EXPERT_AXES[name], (c.num_experts, *shape), c)


class MoE(nn.Module):
    """As layers.MLP, and `aux`: a dict of float32 arrays that add up over microbatches and hosts.

    balance_B: DeepSeek-V3's sequence-wise balance loss (eq. 17-20) of each row, 1 where its tokens are spread evenly;
    router_z_B: mean square of the router's log(Z) (ST-MoE: Zoph et al. 2022); load_E: tokens that chose each expert,
    of all rows; dropped: assignments without a result, for lack of capacity. Padding (segment 0) goes to no expert and
    counts nowhere. Neither loss is weighted here. places: int32 [T], of the tokens in their rows where they are in
    another order than 0, 1, ... Capacity limits an expert only in training: in generation a token's result must not
    depend on the tokens beside it.
    """

    config: FrozenConfigDict
    train: bool

    @nn.compact
    def __call__(
        self, x_BTD, segments_BT=None, places_T=None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        B, T, _ = x_BTD.shape
        if segments_BT is None:
            segments_BT = jnp.ones((B, T), jnp.int32)
        if places_T is None:
            places_T = jnp.arange(T)
        slots = 0
        if self.train:
            slots = capacity(c, T)
        y_BTD, sums = mixture(
            x_BTD,
            segments_BT,
            places_T,
            Router(c, name="router")(),
            Experts(c, name="experts")(),
            ROUTER_AXES | EXPERT_AXES,
            route=partial(route, c),
            mlp=partial(expert_mlp, c),
            slots=slots,
        )
        if c.shared_experts:
            y_BTD += MLP(c, c.shared_experts * c.expert_dim, name="shared")(x_BTD)
        return y_BTD, auxiliary(sums, c.experts_per_token, slots)


def capacity(config: FrozenConfigDict, length: int) -> int:
    """Tokens of a row of this length that an expert takes; 0: all."""
    even = length * config.experts_per_token / config.num_experts
    return min(math.ceil(config.capacity_factor * even), length)


def route(config: FrozenConfigDict, x_BTD, segments_BT, router: dict):
    """(ids, weights, sums): each token's experts [B, T, X], their weights, and what `auxiliary` needs of each row.

    The bias decides who is chosen, not what they weigh (Wang et al. 2024; DeepSeek-V3, eq. 13-16).
    """
    x_BTD = x_BTD.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD, router["kernel"], precision=highest)
    scores_BTE = SCORES[config.router](logits_BTE)
    preference_BTE = jax.lax.stop_gradient(scores_BTE + router.get("bias", 0))
    _, ids_BTX = jax.lax.top_k(preference_BTE, config.experts_per_token)
    weights_BTX = jnp.take_along_axis(scores_BTE, ids_BTX, axis=-1)
    # A single one keeps its score (Fedus et al. 2022): a weight of 1 would give the router no gradient.
    if config.experts_per_token > 1:
        weights_BTX /= jnp.sum(weights_BTX, axis=-1, keepdims=True)
    real_BT = segments_BT != 0
    ids_BTX = jnp.where(real_BT[..., None], ids_BTX, config.num_experts)
    chances_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    chosen_BTXE = jax.nn.one_hot(ids_BTX, config.num_experts)
    log_z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    sums = {
        "tokens_B": jnp.sum(real_BT, axis=1, dtype=jnp.float32),
        "load_BE": jnp.sum(chosen_BTXE, axis=(1, 2)),
        "chance_BE": jnp.sum(chances_BTE * real_BT[..., None], axis=1),
        "z_B": jnp.sum(jnp.square(log_z_BT) * real_BT, axis=1),
    }
    return ids_BTX, weights_BTX, sums


def expert_mlp(config: FrozenConfigDict, kernels: dict, rows, sizes_E) -> jax.Array:
    """The MLPs of the experts, of rows' shape. rows: [M, D] sorted by expert, sizes [E] of each; or [E, M, D] and None.

    kernels: of `Experts`.
    """
    multiply = partial(multiply_by_expert, config.quantize, sizes_E)
    factors = [multiply(rows, kernels[name]) for name in input_kernels(config)]
    h = activated(ACTIVATIONS[config.mlp], factors)
    return multiply(h, kernels["down"])


def multiply_by_expert(quantize: str, sizes_E, rows, kernel_EDF) -> jax.Array:
    """[M, F], or [E, M, F] where sizes is None."""
    if sizes_E is None:
        return name_product(multiply_each(rows, kernel_EDF, quantize))
    return name_product(grouped_matmul(rows, kernel_EDF, sizes_E, quantize=quantize))


def auxiliary(sums: dict, experts_per_token: int, slots: int) -> dict[str, jax.Array]:
    """What MoE returns besides its output.

    sums: of `route`, over the whole rows. slots: tokens of a row that an expert takes; 0: all.
    """
    load_BE = sums["load_BE"]
    tokens_B = jnp.maximum(sums["tokens_B"], 1)
    even = load_BE.shape[1] / experts_per_token
    balance_B = even * jnp.sum(load_BE * sums["chance_BE"], axis=1)
    dropped = jnp.zeros(())
    if slots:
        dropped = jnp.sum(jnp.maximum(load_BE - slots, 0))
    return {
        "balance_B": balance_B / jnp.square(tokens_B),
        "router_z_B": sums["z_B"] / tokens_B,
        "load_E": jnp.sum(load_BE, axis=0),
        "dropped": dropped,
    }


def update_bias(bias_E, load_E, rate: float) -> jax.Array:
    """Router bias [E] after a batch with this load [E]: up where an expert had less than the mean (Wang et al. 2024).

    Both may have leading dimensions, the layers of a scan.
    """
    mean = jnp.mean(load_E, axis=-1, keepdims=True)
    return bias_E + rate * jnp.sign(mean - load_E)


def balance(params: dict, routing: dict, config) -> tuple[dict, dict]:
    """(params with the routers' biases moved towards an even load, metrics of the routing) of a mixture of experts.

    routing: `jaxlm.step.forward.routing_sums` of the whole batch; {} for a dense model, of which nothing changes.
    """
    if not routing:
        return params, {}
    layers = dict(params["layers"])
    fullest = []
    for block, load in routing["load"].items():
        mean = jnp.mean(load, -1, keepdims=True)
        fullest.append(jnp.max(load / jnp.maximum(mean, 1)))
        if config.model.balance_rate:
            layers[block] = balanced(layers[block], load, config.model.balance_rate)
    metrics = {
        "expert_load": jnp.max(jnp.stack(fullest)),
        "dropped_tokens": routing["dropped"],
    }
    return params | {"layers": layers}, metrics


def balanced(block: dict, load, rate: float) -> dict:
    """The parameters of a block, its router's bias updated."""
    mlp = block["mlp"]
    router = mlp["router"]
    router = router | {"bias": update_bias(router["bias"], load, rate)}
    return block | {"mlp": mlp | {"router": router}}
