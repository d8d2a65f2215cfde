"""Mixture-of-experts MLP (Shazeer et al. 2017): a router sends each token to a few of many MLPs; only those run.

E experts, X experts per token, F an expert's width, M rows of one or of several experts; see also parallel/experts.py.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import FrozenConfigDict

from jaxlm.kernels.grouped_matmul import grouped_matmul, multiply_each
from jaxlm.models.layers import ACTIVATIONS, MLP, parameter, product
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

        def make(name, init, *shape):
            return self.param(
                name, nn.with_logical_partitioning(init, ROUTER_AXES[name]), shape, jnp.float32
            )

        weights = {
            "kernel": make(
                "kernel", nn.initializers.normal(c.embed_dim**-0.5), c.embed_dim, c.num_experts
            )
        }
        if c.balance_rate or c.router == "sigmoid":
            weights["bias"] = make("bias", nn.initializers.zeros, c.num_experts)
        return weights


class Experts(nn.Module):
    """{"up": [E, D, F], "down": [E, F, D]} and, where the activation is gated, "gate"; scales as in MLP."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        c = self.config
        D = c.embed_dim
        F = c.expert_dim
        depth = 2 * c.num_layers
        kernels = {
            "up": ((D, F), 1 / D),
            "gate": ((D, F), 1 / D),
            "down": ((F, D), 1 / (F * depth)),
        }
        return {
            name: parameter(
                self,
                name,
                nn.initializers.normal(math.sqrt(variance)),
                EXPERT_AXES[name],
                (c.num_experts, *shape),
                c,
            )
            for name, (shape, variance) in kernels.items()
            if name != "gate" or c.mlp == "swiglu"
        }


class MoE(nn.Module):
    """As layers.MLP, and `aux`: a dict of float32 arrays that add up over microbatches and hosts.

    balance_B: DeepSeek-V3's sequence-wise balance loss (eq. 17-20) of each row, 1 where its tokens are spread evenly;
    router_z_B: mean square of the router's log(Z) (ST-MoE: Zoph et al. 2022); load_E: tokens that chose each expert,
    of all rows; dropped: assignments without a result, for lack of capacity. Padding (segment 0) visits no expert and
    counts nowhere. Neither loss is weighted here. places: int32 [T], of the tokens in their rows where they are in
    another order than 0, 1, ...
    """

    config: FrozenConfigDict
    train: bool  # only then does an expert's capacity count: what is written must not depend on what stands beside it

    @nn.compact
    def __call__(
        self, x_BTD, segments_BT=None, places_T=None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        if segments_BT is None:
            segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
        else:
            segments_BT = segments_BT
        places_T = jnp.arange(x_BTD.shape[1]) if places_T is None else places_T
        slots = capacity(c, x_BTD.shape[1]) if self.train else 0
        y_BTD, sums = mixture(
            x_BTD, segments_BT, places_T, Router(c, name="router")(), Experts(c, name="experts")(),
            ROUTER_AXES | EXPERT_AXES, route=partial(route, c), mlp=partial(expert_mlp, c), slots=slots,
        )  # fmt: skip
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
    logits_BTE = jnp.einsum(
        "BTD,DE->BTE",
        x_BTD.astype(jnp.float32),
        router["kernel"],
        precision=jax.lax.Precision.HIGHEST,
    )
    scores_BTE = SCORES[config.router](logits_BTE)
    preference_BTE = jax.lax.stop_gradient(scores_BTE + router.get("bias", 0))
    _, ids_BTX = jax.lax.top_k(preference_BTE, config.experts_per_token)
    weights_BTX = jnp.take_along_axis(scores_BTE, ids_BTX, axis=-1)
    if (
        config.experts_per_token > 1
    ):  # a single one keeps its score (Fedus et al. 2022): 1 would teach the router nothing
        weights_BTX /= jnp.sum(weights_BTX, axis=-1, keepdims=True)
    real_BT = segments_BT != 0
    ids_BTX = jnp.where(real_BT[..., None], ids_BTX, config.num_experts)
    chances_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    sums = {
        "tokens_B": jnp.sum(real_BT, axis=1, dtype=jnp.float32),
        "load_BE": jnp.sum(jax.nn.one_hot(ids_BTX, config.num_experts), axis=(1, 2)),
        "chance_BE": jnp.sum(chances_BTE * real_BT[..., None], axis=1),
        "z_B": jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real_BT, axis=1),
    }
    return ids_BTX, weights_BTX, sums


def expert_mlp(config: FrozenConfigDict, kernels: dict, rows, sizes_E) -> jax.Array:
    """rows: [M, D] sorted by expert, sizes [E] of them each; or [E, M, D] and None."""
    if sizes_E is None:

        def multiply(rows, kernel):
            return product(multiply_each(rows, kernel, config.quantize))

    else:

        def multiply(rows, kernel):
            return product(grouped_matmul(rows, kernel, sizes_E, quantize=config.quantize))

    h = multiply(rows, kernels["up"])
    activation = ACTIVATIONS[config.mlp]
    if "gate" in kernels:
        h = activation(multiply(rows, kernels["gate"])) * h
    else:
        h = activation(h)
    return multiply(h, kernels["down"])


def auxiliary(sums: dict, experts_per_token: int, slots: int) -> dict[str, jax.Array]:
    """What MoE returns besides its output. sums: of the whole rows."""
    load_BE = sums["load_BE"]
    tokens_B = jnp.maximum(sums["tokens_B"], 1)
    even = load_BE.shape[1] / experts_per_token
    return {
        "balance_B": even * jnp.sum(load_BE * sums["chance_BE"], axis=1) / jnp.square(tokens_B),
        "router_z_B": sums["z_B"] / tokens_B,
        "load_E": jnp.sum(load_BE, axis=0),
        "dropped": jnp.sum(jnp.maximum(load_BE - slots, 0)) if slots else jnp.zeros(()),
    }


def update_bias(bias_E, load_E, rate: float) -> jax.Array:
    """Router bias after a batch with this load: up where an expert had less than the mean (Wang et al. 2024).

    Both may have leading dimensions, the layers of a scan.
    """
    return bias_E + rate * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)


def balance(params: dict, routing: dict, config) -> tuple[dict, dict]:
    """(params with the routers' biases moved towards an even load, metrics of the routing) of a mixture of experts.

    routing: `jaxlm.step.forward.routing_sums` of the whole batch; {} for a dense model, of which nothing changes.
    """
    if not routing:
        return params, {}
    layers = dict(params["layers"])
    for block, load in routing["load"].items():
        mlp = dict(layers[block]["mlp"])
        if config.model.balance_rate:
            bias = update_bias(mlp["router"]["bias"], load, config.model.balance_rate)
            mlp["router"] = mlp["router"] | {"bias": bias}
        layers[block] = layers[block] | {"mlp": mlp}
    fullest = [
        jnp.max(load / jnp.maximum(jnp.mean(load, -1, keepdims=True), 1))
        for load in routing["load"].values()
    ]
    metrics = {"expert_load": jnp.max(jnp.stack(fullest)), "dropped_tokens": routing["dropped"]}
    return params | {"layers": layers}, metrics
