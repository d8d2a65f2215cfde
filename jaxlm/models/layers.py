"""Linear maps, norms, embeddings, positions and MLPs. Every parameter names its logical axes beside its shape."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from ml_collections import FrozenConfigDict

from jaxlm.config.keys import GATED
from jaxlm.kernels.norm import normalize
from jaxlm.kernels.quantized import tensordot
from jaxlm.parallel.linear import columns, lookup, rows
from jaxlm.parallel.mesh import constrain, current_mesh


def parameter(
    module: nn.Module,
    name: str,
    init: Callable,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    config: FrozenConfigDict,
) -> jax.Array:
    """A parameter of the module in config.dtype, kept in config.param_dtype. axes: logical, one for each dimension."""
    init = nn.with_logical_partitioning(init, axes)
    value = module.param(name, init, shape, jnp.dtype(config.param_dtype))
    return value.astype(config.dtype)


# ---------------------------------------------------------------- linear maps


class Weights(NamedTuple):
    """Of a linear map. quantize: model.quantize, how it is multiplied."""

    kernel: jax.Array
    bias: jax.Array | None
    axes: tuple[str, ...]  # logical, of the kernel
    quantize: str = "none"


class Linear(nn.Module):
    """The weights of a linear map, for `project_in` and `project_out`; kernel ~ N(0, scale^2 / inputs).

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
        c = self.config
        init = nn.initializers.normal(self.scale / self.root_of_inputs())
        kernel = parameter(self, "kernel", init, self.axes, self.shape, c)
        if c.lora_rank and re.fullmatch(c.lora_targets, self.name):
            kernel += self.adapter()
        bias = None
        if c.bias:
            axes = self.axes[self.inputs :]
            shape = self.shape[self.inputs :]
            bias = parameter(self, "bias", nn.initializers.zeros, axes, shape, c)
        return Weights(kernel, bias, self.axes, c.quantize)

    def adapter(self) -> jax.Array:
        """Added to the kernel, of its shape."""
        c = self.config
        n = self.inputs
        rank = c.lora_rank
        normal = nn.initializers.normal(1 / self.root_of_inputs())
        a_axes = (*self.axes[:n], None)
        b_axes = (None, *self.axes[n:])
        a = parameter(self, "lora_a", normal, a_axes, (*self.shape[:n], rank), c)
        b = parameter(
            self,
            "lora_b",
            nn.initializers.zeros,
            b_axes,
            (rank, *self.shape[n:]),
            c,
        )
        return (c.lora_alpha / rank) * jnp.tensordot(a, b, 1)

    def root_of_inputs(self) -> float:
        return math.sqrt(math.prod(self.shape[: self.inputs]))


def project_in(x_BTD, *weights: Weights) -> list[jax.Array]:
    """x kernel + bias for each, kernels [D, ...], whose input is gathered once for all."""
    kernels = [w.kernel for w in weights]
    axes = [w.axes for w in weights]
    multiply = tensordot(weights[0].quantize)
    outputs = columns(x_BTD, kernels, axes, multiply)
    outputs = name_product(outputs)
    return [add_bias(y, w) for y, w in zip(outputs, weights)]


def project_out(h, weights: Weights) -> jax.Array:
    """[B, T, D], to the residual stream: h kernel + bias, kernel [..., D]."""
    multiply = tensordot(weights.quantize)
    y_BTD = rows(h, weights.kernel, weights.axes, multiply)
    return add_bias(name_product(y_BTD), weights)


def add_bias(y, weights: Weights) -> jax.Array:
    if weights.bias is None:
        return y
    return y + weights.bias


def name_product(tree):
    """The same arrays, named for model.remat=dots, which keeps them."""
    return jax.tree.map(lambda y: checkpoint_name(y, "product"), tree)


# ---------------------------------------------------------------- heads


class Head(nn.Module):
    """The weights of a linear map to model.num_labels outputs, which the losses apply: kernel [D, C], bias [C]."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(self) -> Weights:
        c = self.config
        axes = ("embed", None)
        init = nn.initializers.normal(c.embed_dim**-0.5)
        kernel = parameter(self, "kernel", init, axes, (c.embed_dim, c.num_labels), c)
        bias = parameter(self, "bias", nn.initializers.zeros, (None,), (c.num_labels,), c)
        return Weights(kernel, bias, axes)


def output_parameters(module: nn.Module, config: FrozenConfigDict) -> None:
    """Makes the parameters of a model's outputs, which the losses apply.

    `unembed` [V, D] where it is not tied to the input's table, and the `head` of labels.
    """
    if not config.tie_embeddings:
        init = nn.initializers.normal(config.embed_dim**-0.5)
        shape = (config.vocab_size, config.embed_dim)
        parameter(module, "unembed", init, ("vocab", "embed"), shape, config)
    if config.num_labels:
        Head(config, name="head")()


# ---------------------------------------------------------------- norms and the residual stream


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension; its parameters stay in their own dtype."""

    config: FrozenConfigDict

    @nn.compact
    def __call__(self, x):
        c = self.config
        center = c.norm == "layer"
        scale = self.vector("scale", nn.initializers.ones, x.shape[-1])
        bias = None
        if center and c.bias:
            bias = self.vector("bias", nn.initializers.zeros, x.shape[-1])
        return normalize(x, scale, bias, c.norm_eps, center)

    def vector(self, name: str, init, width: int) -> jax.Array:
        init = nn.with_logical_partitioning(init, ("norm",))
        return self.param(name, init, (width,), jnp.dtype(self.config.param_dtype))


def norm(config: FrozenConfigDict, name: str) -> nn.Module:
    return Norm(config, name=name)


class NormPlace(NamedTuple):
    """Where the norms of a stack of layers are."""

    inputs: bool = False  # of what a layer adds to the residual stream
    sums: bool = False  # of the stream after each addition
    final: bool = False  # of the stream after all layers


NORM_PLACES = {  # model.norm_place
    "pre": NormPlace(inputs=True, final=True),
    "post": NormPlace(sums=True),  # Vaswani et al. 2017
}


def residual(
    config: FrozenConfigDict,
    name: str,
    function: Callable,
    x_BTD,
    *,
    drop: Callable,
):
    """(x [B, T, D] with the y of function(x) -> (y, other) added, other).

    name: of the norm, whose place is model.norm_place. drop: dropout.
    """
    place = NORM_PLACES[config.norm_place]
    given_BTD = x_BTD
    if place.inputs:
        given_BTD = norm(config, name)(x_BTD)
    y_BTD, other = function(given_BTD)
    x_BTD = constrain(x_BTD + drop(y_BTD), "batch", "residual", None)
    if place.sums:
        x_BTD = norm(config, name)(x_BTD)
    return x_BTD, other


def final_norm(config: FrozenConfigDict, x_BTD) -> jax.Array:
    """x after all layers, normed where model.norm_place asks for it."""
    if NORM_PLACES[config.norm_place].final:
        return norm(config, "final_norm")(x_BTD)
    return x_BTD


# ---------------------------------------------------------------- positions and embeddings


def rotary(positions_BT, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """(sin, cos), float32 [B, T, 1, H/2], of rotary positions (Su et al. 2021)."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = theta**-exponents
    positions_BT11 = positions_BT[:, :, None, None]
    angles = positions_BT11.astype(jnp.float32) * frequencies
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x_BTNH, sin_cos) -> jax.Array:
    """Rotates the pairs (h, h + H/2), the layout of the published Llama weights."""
    sin, cos = sin_cos
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    first = first.astype(jnp.float32)
    second = second.astype(jnp.float32)
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    rotated = jnp.concatenate([rotated_first, rotated_second], axis=-1)
    return rotated.astype(x_BTNH.dtype)


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
        c = self.config
        axes = ("vocab", "embed")
        x_BTD = lookup(self.table("tokens", axes, c.vocab_size), tokens_BT, axes)
        if ngrams is not None:
            buckets_BTG, there_BTG = ngrams
            B, T, G = buckets_BTG.shape
            table = self.table("ngrams", axes, c.buckets)
            x_BTGD = lookup(table, buckets_BTG.reshape(B, T * G), axes).reshape(B, T, G, -1)
            x_BTD += jnp.einsum("BTG,BTGD->BTD", there_BTG.astype(c.dtype), x_BTGD)
        if c.scale_embeddings:
            x_BTD *= math.sqrt(c.embed_dim)
        if c.positions == "learned":
            axes = (None, "embed")
            x_BTD += lookup(self.table("positions", axes, c.context_length), positions_BT, axes)
        elif c.positions == "sinusoidal":
            x_BTD += sinusoidal(positions_BT, c.embed_dim).astype(x_BTD.dtype)
        return constrain(x_BTD, "batch", "residual", None)

    def table(self, name: str, axes: tuple, length: int) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(c.embed_std)
        return parameter(self, name, init, axes, (length, c.embed_dim), c)


def embedding_dropout(config: FrozenConfigDict, train: bool, **options) -> nn.Module:
    """Dropout at model.embed_dropout, or model.dropout where that is negative. options: of nn.Dropout."""
    rate = config.embed_dropout
    if rate < 0:
        rate = config.dropout
    return nn.Dropout(rate, deterministic=not train, **options)


# ---------------------------------------------------------------- MLPs


def square_of_relu(x):
    return jnp.square(jnp.maximum(x, 0))


ACTIVATIONS = {  # model.mlp; which of them are gated: config.keys.GATED
    "swiglu": nn.silu,  # Shazeer 2020
    "gelu": nn.gelu,  # tanh form, as GPT-2
    "relu": nn.relu,  # Vaswani et al. 2017
    "relu2": square_of_relu,  # So et al. 2021 (Primer)
}


def input_kernels(config: FrozenConfigDict) -> tuple[str, ...]:
    """The names of an MLP's maps from its input: `gate` is multiplied with `up` after its activation."""
    if config.mlp in GATED:
        return ("up", "gate")
    return ("up",)


def activated(activation: Callable, factors: tuple) -> jax.Array:
    """activation(up), or activation(gate) * up. factors: (up,) or (up, gate)."""
    up, *gate = factors
    if gate:
        return activation(gate[0]) * up
    return activation(up)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(activation: Callable, factors: tuple) -> jax.Array:
    """`activated`, of which the factors alone are kept for the backward pass: making the rest again is faster."""
    return activated(activation, factors)


def activate_forward(activation, factors):
    return activated(activation, factors), factors


def activate_backward(activation, factors, dh_BTF):
    given = (dh_BTF, factors)
    mesh = current_mesh()
    # The rows of a batch as one row: the TPU compiler would transpose each of several.
    if mesh is None or mesh.shape["sequence"] == 1:
        given = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), given)
    dh, given = jax.lax.optimization_barrier(given)  # else XLA would keep what is made again
    _, pull_back = jax.vjp(partial(activated, activation), given)
    (dfactors,) = pull_back(dh)
    return (jax.tree.map(lambda d, x: d.reshape(x.shape), dfactors, factors),)


activate.defvjp(activate_forward, activate_backward)


class MLP(nn.Module):
    """x [B, T, D] -> [B, T, D], of mlp_dim hidden units."""

    config: FrozenConfigDict
    mlp_dim: int

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        D = c.embed_dim
        F = self.mlp_dim
        weights = []
        for name in input_kernels(c):
            weights.append(Linear(c, (D, F), ("embed", "mlp"), name=name)())
        h_BTF = activate(ACTIVATIONS[c.mlp], tuple(project_in(x_BTD, *weights)))
        scale = (2 * c.num_layers) ** -0.5
        down = Linear(c, (F, D), ("mlp", "embed"), scale=scale, name="down")()
        return project_out(h_BTF, down)
