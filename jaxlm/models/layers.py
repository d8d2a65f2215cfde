"""Linear maps, norms, embeddings, positions and MLPs. Every parameter names its logical axes beside its shape."""

import math
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from ml_collections import FrozenConfigDict

from jaxlm.kernels.norm import normalize
from jaxlm.kernels.quantized import tensordot
from jaxlm.parallel.linear import columns, lookup, rows
from jaxlm.parallel.mesh import constrain, current_mesh


def parameter(
    module: nn.Module, name: str, init, axes: tuple[str | None, ...], shape: tuple[int, ...], config
):
    value = module.param(
        name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(config.param_dtype)
    )
    return value.astype(config.dtype)


class Weights(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None
    axes: tuple[str, ...]  # logical, of the kernel
    quantize: str = "none"  # model.quantize: how it is multiplied


class Linear(nn.Module):
    """The weights of a linear map, for `into` and `back`; kernel ~ N(0, scale^2 / inputs).

    axes: logical axes of the kernel, the first `inputs` of them summed over. Where model.lora_targets names it, the
    product of two narrow matrices is added (LoRA: Hu et al. 2021), of which the second starts at zero.
    """

    config: FrozenConfigDict
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: int = 1
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> Weights:
        std = self.scale / math.sqrt(math.prod(self.shape[: self.inputs]))
        kernel = parameter(
            self, "kernel", nn.initializers.normal(std), self.axes, self.shape, self.config
        )
        if self.config.lora_rank and re.fullmatch(self.config.lora_targets, self.name):
            kernel += self.adapter()
        bias = None
        if self.config.bias:
            axes = self.axes[self.inputs :]
            shape = self.shape[self.inputs :]
            bias = parameter(self, "bias", nn.initializers.zeros, axes, shape, self.config)
        return Weights(kernel, bias, self.axes, self.config.quantize)

    def adapter(self) -> jax.Array:
        c = self.config
        n = self.inputs
        rank = self.config.lora_rank
        std = 1 / math.sqrt(math.prod(self.shape[:n]))
        a = parameter(
            self,
            "lora_a",
            nn.initializers.normal(std),
            (*self.axes[:n], None),
            (*self.shape[:n], rank),
            c,
        )
        b = parameter(
            self,
            "lora_b",
            nn.initializers.zeros,
            (None, *self.axes[n:]),
            (rank, *self.shape[n:]),
            c,
        )
        return (c.lora_alpha / rank) * jnp.tensordot(a, b, 1)


class Head(nn.Module):
    """The weights of a linear map to model.num_labels outputs, which the losses apply: kernel [D, C], bias [C]."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(self) -> Weights:
        c = self.config
        axes = ("embed", None)
        init = nn.initializers.normal(c.embed_dim**-0.5)
        kernel = parameter(self, "kernel", init, axes, (c.embed_dim, c.num_labels), c)
        return Weights(
            kernel,
            parameter(self, "bias", nn.initializers.zeros, (None,), (c.num_labels,), c),
            axes,
        )


def embedding_dropout(config: FrozenConfigDict, train: bool, **options) -> nn.Module:
    if config.embed_dropout < 0:
        rate = config.dropout
    else:
        rate = config.embed_dropout
    return nn.Dropout(rate, deterministic=not train, **options)


def product(tree):
    """The same, by a name that model.remat can tell."""
    return jax.tree.map(lambda y: checkpoint_name(y, "product"), tree)


def into(x_BTD, *weights: Weights) -> list[jax.Array]:
    """x kernel + bias for each, kernels [D, ...], whose input is gathered once for all."""
    kernels = [w.kernel for w in weights]
    axes = [w.axes for w in weights]
    outputs = product(columns(x_BTD, kernels, axes, tensordot(weights[0].quantize)))
    return [y if w.bias is None else y + w.bias for y, w in zip(outputs, weights)]


def back(h, weights: Weights) -> jax.Array:
    """h kernel + bias, kernel [..., D]: to the residual stream, [B, T, D]."""
    y_BTD = product(rows(h, weights.kernel, weights.axes, tensordot(weights.quantize)))
    if weights.bias is None:
        return y_BTD
    return y_BTD + weights.bias


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension; its parameters stay in their own dtype."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(self, x):
        c = self.config
        center = self.config.norm == "layer"

        def param(name, init):
            return self.param(
                name,
                nn.with_logical_partitioning(init, ("norm",)),
                x.shape[-1:],
                jnp.dtype(c.param_dtype),
            )

        scale = param("scale", nn.initializers.ones)
        if center and c.bias:
            bias = param("bias", nn.initializers.zeros)
        else:
            bias = None
        return normalize(x, scale, bias, c.norm_eps, center)


def norm(config: FrozenConfigDict, name: str) -> nn.Module:
    return Norm(config, name=name)


def rotary(positions_BT, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """(sin, cos), float32 [B, T, 1, H/2], of rotary positions (Su et al. 2021)."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x_BTNH, sin_cos) -> jax.Array:
    """Rotates the pairs (h, h + H/2), the layout of the published Llama weights."""
    sin, cos = sin_cos
    a, b = (half.astype(jnp.float32) for half in jnp.split(x_BTNH, 2, axis=-1))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def sinusoidal(positions_BT, embed_dim: int) -> jax.Array:
    """float32 [B, T, D] (Vaswani et al. 2017), sines then cosines."""
    sin, cos = rotary(positions_BT, embed_dim, 10_000.0)
    return jnp.concatenate([sin, cos], axis=-1)[:, :, 0]


class Embed(nn.Module):
    """Tokens, positions where they are added to the input, and n-grams -> x [B, T, D].

    ngrams: (buckets, int32 [B, T, G]; whether each is there, bool) of model.embed_ngrams, or None.
    """

    config: FrozenConfigDict

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, ngrams=None):
        c, (B, T) = self.config, tokens_BT.shape
        init = nn.initializers.normal(c.embed_std)
        table_VD = parameter(
            self, "tokens", init, ("vocab", "embed"), (c.vocab_size, c.embed_dim), c
        )
        x_BTD = lookup(table_VD, tokens_BT, ("vocab", "embed"))
        if ngrams is not None:
            table_VD = parameter(
                self, "ngrams", init, ("vocab", "embed"), (c.buckets, c.embed_dim), c
            )
            x_BTGD = lookup(table_VD, ngrams[0].reshape(B, -1), ("vocab", "embed")).reshape(
                B, T, -1, c.embed_dim
            )
            x_BTD += jnp.einsum("BTG,BTGD->BTD", ngrams[1].astype(c.dtype), x_BTGD)
        if c.scale_embeddings:
            x_BTD *= math.sqrt(c.embed_dim)
        if c.positions == "learned":
            axes = (None, "embed")
            shape = (c.context_length, c.embed_dim)
            x_BTD += lookup(parameter(self, "positions", init, axes, shape, c), positions_BT, axes)
        elif c.positions == "sinusoidal":
            x_BTD += sinusoidal(positions_BT, c.embed_dim).astype(x_BTD.dtype)
        return constrain(x_BTD, "batch", "residual", None)


ACTIVATIONS = {
    "swiglu": nn.silu,  # gated: Shazeer 2020
    "gelu": nn.gelu,  # tanh form, as GPT-2
    "relu": nn.relu,  # Vaswani et al. 2017
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0)),  # So et al. 2021 (Primer)
}


def activated(activation, factors: tuple) -> jax.Array:
    up_BTF, *gate_BTF = factors
    if gate_BTF:
        return activation(gate_BTF[0]) * up_BTF
    return activation(up_BTF)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(activation, factors: tuple) -> jax.Array:
    """factors: (up,) or (up, gate). They alone are kept for the backward pass: the rest is cheaper made than read."""
    return activated(activation, factors)


def activate_backward(activation, factors, dh_BTF):
    given = (dh_BTF, factors)
    mesh = current_mesh()
    if (
        mesh is None or mesh.shape["sequence"] == 1
    ):  # rows as one, each of which the TPU compiler would transpose
        given = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), given)
    dh, given = jax.lax.optimization_barrier(given)  # else XLA would keep what is made again
    (dfactors,) = jax.vjp(partial(activated, activation), given)[1](dh)
    return (jax.tree.map(lambda d, x: d.reshape(x.shape), dfactors, factors),)


activate.defvjp(
    lambda activation, factors: (activated(activation, factors), factors), activate_backward
)


class MLP(nn.Module):
    config: FrozenConfigDict
    mlp_dim: int

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        F = self.mlp_dim
        names = ("up", "gate") if c.mlp == "swiglu" else ("up",)
        up_BTF, *gate_BTF = into(
            x_BTD, *(Linear(c, (c.embed_dim, F), ("embed", "mlp"), name=name)() for name in names)
        )
        h_BTF = activate(ACTIVATIONS[c.mlp], (up_BTF, *gate_BTF))
        scale = (2 * c.num_layers) ** -0.5
        return back(
            h_BTF, Linear(c, (F, c.embed_dim), ("mlp", "embed"), scale=scale, name="down")()
        )
